"""The runtime in real processes, over gloo, started by torchrun."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from handmade import write_artifact
from safetensors.torch import load_file, save_file
from test_runtime import differences

from p2bw.contract.agreement import compare_ranks
from p2bw.contract.errors import MismatchError, P2BWError, UsageError
from p2bw.contract.job import Job, Options
from p2bw.contract.plan import read_plan
from p2bw.contract.stages import find_model_file
from p2bw.contract.store import Place
from p2bw.launch import run
from p2bw.runtime.local import Trained
from p2bw.runtime.prepare import prepare
from p2bw.runtime.worker import LossError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(d, w, m) for d, w in ((2, 1), (3, 1), (4, 1), (2, 2)) for m in (d, d + 1, 2 * d)]
EVERY = [("2bw", *shape, name) for shape in SHAPES for name in ("sgd", "adamw")] + [
    (kind, *shape, name)
    for kind in ("flush", "gpipe")
    for shape in SHAPES[::2]
    for name in ("sgd", "adamw")
]
SOME = EVERY[0:24:5] + EVERY[24::5]


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*line, "--nproc-per-node", str(ranks), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    "matrix", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_runs_equal_the_reference_bitwise(
    tmp_path: Path, matrix: list[tuple[str, int, int, int, str]]
) -> None:
    """12 updates, dropout on, every other run clipped; with two replicas too, as the reference sums
    replica by replica."""
    jobs = []
    for number, (schedule, depth, width, m, optimizer) in enumerate(matrix):
        folder = tmp_path / str(number)
        write_artifact(
            folder, depth=depth, width=width, optimizer=optimizer, recompute=range(number % 3)
        )
        clip = 3.3 if number % 4 > 1 else None
        job = Job(artifact=folder, steps=12, schedule=schedule, microbatches=m, clip_norm=clip)
        jobs.append(job)
    listed = [
        {
            "artifact": str(job.artifact),
            "steps": job.steps,
            "schedule": job.schedule,
            "microbatches": job.microbatches,
            "clip_norm": job.clip_norm,
            "out": str(job.artifact),
        }
        for job in jobs
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(listed))
    script = Path(__file__).parent / "many_runs.py"
    done = torchrun(4, str(script), str(tmp_path / "jobs.json"))
    assert done.returncode == 0, done.stderr
    for job in jobs:
        ranks = read_plan(job.artifact).ranks
        trained = Trained(
            losses=json.loads((job.artifact / "losses.json").read_text()),
            states=[load_file(job.artifact / f"{rank}.safetensors") for rank in range(ranks)],
        )
        assert differences(job, trained) == {}, job


def test_run_gives_losses_and_saves_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2, width=1)
    saved = tmp_path / "saved"
    result = run(artifact, steps=5, save=saved)
    assert result.keys() == {"losses", "samples_per_s", "utilisation"}
    assert len(result["losses"]) == 5
    assert 0 < result["utilisation"] <= 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "torch.distributed.run --standalone --nproc-per-node 2 -m p2bw.runtime" in err
    assert "step 5/5  loss" in err

    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(p.name for p in saved.iterdir()) == [*files, "model.safetensors.index.json"]
    state = {name: t for file in files for name, t in load_file(saved / file).items()}
    assert state.keys() == index["weight_map"].keys()
    model = find_model_file(artifact).model()
    model.load_state_dict(state)  # strict: every name of the user's model, no other
    trained = Trained(losses=result["losses"], states=[state])
    assert differences(Job(artifact=artifact, steps=5), trained) == {}


def test_the_first_cause_is_raised_and_nothing_else_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    stage = artifact / "stages" / "stage_0.py"
    stage.write_text(stage.read_text().replace("return x,", "return x * float('nan'),"))
    with pytest.raises(LossError, match="rank 1: the loss is nan at step 1, microbatch 0"):
        run(artifact, steps=5, quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_bug_in_a_stage_shows_its_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    stage = artifact / "stages" / "stage_1.py"
    stage.write_text(stage.read_text().replace("        loss = ", "        loss = missing + "))
    with pytest.raises(P2BWError, match="rank 1: NameError: name 'missing' is not defined"):
        run(artifact, steps=2, quiet=True)
    err = capfd.readouterr().err
    assert 'stages/stage_1.py", line' in err
    assert err.count("Traceback") == 1


@pytest.mark.slow
def test_plain_torchrun_says_what_is_wrong_once(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    done = torchrun(3, "-m", "p2bw.runtime", str(artifact), "--steps", "1")
    assert done.returncode != 0
    assert done.stderr.count("is a plan for 2 ranks, torchrun started 3") == 1


def test_without_torchrun_its_line_is_given() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "p2bw.runtime", "artifact", "--steps", "3"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == UsageError.exit_code
    assert "torch.distributed.run --standalone --nproc-per-node N" in done.stderr


def test_what_is_wrong_with_the_files_is_said_before_anything_starts(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=3)
    with pytest.raises(UsageError, match="too few for 2bw"):
        run(artifact, steps=1, microbatches=2)


def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    """Each rank looks at its own artifact and command, as on two machines."""
    same, other = (write_artifact(tmp_path / name, depth=2) for name in "ab")
    stage = other / "stages" / "stage_1.py"
    stage.write_text(stage.read_text() + "# edited here only\n")

    def verdicts(*given: tuple[Job, Options]) -> list[str]:
        store = dist.HashStore()
        said: list[str] = []

        def rank(number: int, job: Job, options: Options) -> None:
            try:
                compare_ranks(job, prepare(job).plan, options, Place(number, 2, 0, 1, 0), store)
            except MismatchError as error:
                said.append(str(error))

        threads = [threading.Thread(target=rank, args=(n, *one)) for n, one in enumerate(given)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return said

    job, options = Job(artifact=same, steps=2), Options()
    moved = Job(artifact=write_artifact(tmp_path / "moved", depth=2), steps=2)
    assert verdicts((job, options), (moved, Options(threads=2, checkpoint=None))) == []
    folders = [tmp_path / name for name in ("here", "there", "others")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        save_file({"w": torch.full((3, 4), float(number // 2))}, folder / "model.safetensors")
    here, there, others = (Job(artifact=same, steps=2, weights=folder) for folder in folders)
    assert verdicts((here, options), (there, options)) == []
    assert "in --weights;" in verdicts((here, options), (others, options))[0]
    for theirs, own in (
        ((Job(artifact=other, steps=2), options), "stages/stage_1.py"),
        ((Job(artifact=same, steps=2, clip_norm=1.0), options), "--clip-norm"),
        ((Job(artifact=same, steps=2, seed=1), options), "--seed"),
        ((job, Options(checkpoint=tmp_path)), "--checkpoint"),
        ((job, Options(checkpoint_every=3)), "--checkpoint-every"),
        ((job, Options(resume="last")), "--resume"),
    ):
        said = verdicts((job, options), theirs)
        assert said == [said[0]] * 2
        assert f"rank 1 differs from rank 0 in {own};" in said[0]
