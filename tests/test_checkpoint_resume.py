"""Runs that go on from a checkpoint: to the bit as if they had never ended, or in another plan."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import CORPUS
from handmade import write_artifact
from safetensors.torch import load_file
from test_checkpoint import damage
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler.driver import Compiled
from p2bw.contract.checkpoint import StageState
from p2bw.contract.errors import MismatchError, UsageError
from p2bw.contract.job import Job, Options
from p2bw.contract.stages import find_model_file, load_stage
from p2bw.export import export
from p2bw.launch import run
from p2bw.modelfile.microbatch import seeded
from p2bw.runtime.checkpoint import Checkpointer, begin
from p2bw.runtime.local import train_in_threads
from p2bw.runtime.prepare import prepare
from p2bw.runtime.worker import Events, Update

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = '''

def data(batch_size, seed):
    """Draws random numbers of its own, microbatch after microbatch."""
    while True:
        yield inputs(batch_size), targets(batch_size)
'''


@dataclass
class Run:
    """What a run has done: the losses of its batches and the state of each rank at the end."""

    losses: list[float] = field(default_factory=list)
    states: list[StageState] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


class Listener(Events):
    def __init__(self, saver: Checkpointer, done: Run) -> None:
        self.saver, self.done = saver, done

    def wants(self, step: int) -> bool:
        return self.saver.wants(step)

    def checkpoint(self, step: int, state: StageState) -> None:
        self.saver.save(step, state)

    def update(self, update: Update) -> None:
        self.done.losses.append(update.loss)


def train(artifact: Path, steps: int, **given: Any) -> Run:
    """All ranks as threads, as `run_rank` does it in processes."""
    of_job = {field.name for field in fields(Job)}.intersection(given)
    job = Job(artifact=artifact, steps=steps, **{name: given.pop(name) for name in of_job})
    options = Options(**given)
    prepared, done, store = prepare(job), Run(), dist.HashStore()
    ranks = range(prepared.plan.ranks)

    # One after the other: what watches how opaque modules are built is the whole process's.
    modules = [load_stage(artifact, prepared.plan.position(rank)[0]) for rank in ranks]

    def start(rank: int) -> Any:
        say = done.said.append if rank == 0 else lambda text: None
        return begin(prepared, options, rank, modules[rank], store, say=say)

    with ThreadPoolExecutor(len(ranks)) as pool:
        begun = list(pool.map(start, ranks))
    savers = [saver for _, _, saver in begun]
    starts = [found for _, found, _ in begun]
    trained = train_in_threads(
        job,
        events=lambda rank: Listener(savers[rank], done),
        starts=starts if starts[0] else None,
    )
    done.states = [worker.state() for worker in trained.workers]
    for saver, worker in zip(savers, trained.workers, strict=True):
        if saver.opened:
            saver.save(worker.step, worker.state())
    for saver in savers:
        saver.wait()
    return done


def assert_equal(found: Run, want: Run, since: int) -> None:
    assert found.losses == want.losses[since:]
    for state, wanted in zip(found.states, want.states, strict=True):
        assert state.values == wanted.values
        assert state.tensors.keys() == wanted.tensors.keys()
        for key, tensor in wanted.tensors.items():
            assert torch.equal(state.tensors[key], tensor), key


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clipped, recomputed": ({"depth": 3, "recompute": (0, 1, 2)}, {"clip_norm": 0.05}),
    "more microbatches": ({"depth": 3, "optimizer": "adamw"}, {"microbatches": 5}),
    "replicas": ({"depth": 2, "width": 2, "optimizer": "adamw"}, {"microbatches": 3}),
    "replicas, clipped": ({"depth": 2, "width": 2, "recompute": (1,)}, {"clip_norm": 0.05}),
    "own data": ({"depth": 2, "width": 2, "edit": lambda text: text + DATA}, {}),
    "one stage": ({"depth": 1, "optimizer": "adamw"}, {"microbatches": 2, "clip_norm": 0.1}),
    "untied, autocast": ({"depth": 4, "tied": False, "autocast": True}, {}),
    "bf16": ({"depth": 2, "dtype": "bfloat16", "optimizer": "adamw"}, {"clip_norm": 0.1}),
    "flush": ({"depth": 2, "optimizer": "adamw"}, {"schedule": "flush", "microbatches": 3}),
    "stash": ({"depth": 3, "optimizer": "adamw", "tied": False}, {"schedule": "stash"}),
    "gpipe": ({"depth": 3}, {"schedule": "gpipe", "clip_norm": 0.05}),
}


SOME = ("clipped, recomputed", "replicas, clipped", "bf16", "stash")


@pytest.mark.parametrize(
    ("given", "options"),
    [
        pytest.param(*case, id=name, marks=[] if name in SOME else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_a_resumed_run_equals_one_that_never_ended(
    tmp_path: Path, given: dict[str, Any], options: dict[str, Any]
) -> None:
    """Resumed twice: from a checkpoint of a running pipeline, and from one of the end of a run."""
    artifact = write_artifact(tmp_path / "a", **given)
    go = partial(train, artifact, **options)
    whole = go(9)
    folder = artifact / "checkpoints"
    first = go(5, checkpoint_every=3)
    assert first.losses == whole.losses[:5]
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000003", "step-00000005"]
    running = go(9, resume=str(folder / "step-00000003"))
    assert running.said == [f"going on from {folder / 'step-00000003'}, after step 3"]
    assert_equal(running, whole, 3)
    again = go(7, resume="last", checkpoint_every=3)
    assert again.losses == whole.losses[5:7]
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000006", "step-00000007"]
    assert_equal(go(9, resume="last"), whole, 7)
    assert_equal(go(9, resume=str(folder / "step-00000006")), whole, 6)


def test_saving_changes_no_bit(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=3, optimizer="adamw")
    assert_equal(train(artifact, 6, checkpoint_every=1), train(artifact, 6), 0)


def test_from_damage_the_run_goes_on_one_checkpoint_earlier(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2, optimizer="adamw")
    whole = train(artifact, 7)
    train(artifact, 5, checkpoint_every=3)
    last = artifact / "checkpoints" / "step-00000005"
    damage(last / "stage-1.safetensors", "flipped")
    found = train(artifact, 7, resume="last")
    assert_equal(found, whole, 3)
    assert found.said == [
        f"{last / 'stage-1.safetensors'} is not as it was written: its SHA-256 differs; "
        f"an earlier checkpoint is used",
        f"going on from {last.with_name('step-00000003')}, after step 3",
    ]


@pytest.mark.parametrize(
    ("depth", "width", "microbatch", "microbatches"),
    [(1, 1, 2, 4), (4, 1, 2, 4), (2, 2, 2, 2), (2, 1, 4, 2)],
)
@pytest.mark.parametrize("schedule", ["flush", "2bw"])
def test_a_run_goes_on_in_another_plan(
    tmp_path: Path, schedule: str, depth: int, width: int, microbatch: int, microbatches: int
) -> None:
    """Without dropout, whose masks belong to stages, the sums' order alone differs.

    With SGD, as Adam makes large steps of gradients that are zero but for rounding.
    """
    still = partial(write_artifact, edit=without_dropout, schedule=schedule)
    a = still(tmp_path / "a", depth=2, microbatch=2, microbatches=4)
    b = still(
        *(tmp_path / "b",),
        depth=depth,
        width=width,
        microbatch=microbatch,
        microbatches=microbatches,
    )
    for artifact in (a, b):
        for stage in artifact.glob("stages/*.py"):
            stage.write_text(without_dropout(stage.read_text()))
    whole = train(a, 8)
    train(a, 4, checkpoint_every=4)
    found = train(b, 8, resume=str(a / "checkpoints" / "step-00000004"))
    want = {k: t for state in whole.states for k, t in state.tensors.items()}
    names = {"weights", "previous"} if schedule == "2bw" else {"weights"}
    assert len(found.losses) == 4
    if microbatch == 2:  # batch normalisation sees other batches otherwise
        assert found.losses == pytest.approx(whole.losses[4:], rel=1e-5)
        for state in found.states:
            for key, tensor in state.tensors.items():
                if key.partition("/")[0] in names:
                    torch.testing.assert_close(tensor, want[key], rtol=1e-4, atol=1e-5)


def without_dropout(text: str) -> str:
    return text.replace(", 0.2)", ", 0.0)").replace(", 0.1)", ", 0.0)")


def test_2bw_goes_on_from_one_version_and_a_flush_from_two(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    train(artifact, 3, schedule="flush", checkpoint=tmp_path / "one")
    found = train(artifact, 5, resume="last", checkpoint=tmp_path / "one")
    last = tmp_path / "one" / "step-00000003"
    assert found.said == [
        f"going on from {last}, after step 3, whose one version of the weights stands for all"
    ]
    other = train(artifact, 6, schedule="flush", resume=str(tmp_path / "one" / "step-00000005"))
    assert len(other.losses) == 1


def test_a_run_that_is_over_has_nothing_left_to_do(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    train(artifact, 3, checkpoint_every=2)
    found = train(artifact, 3, resume="last", checkpoint_every=2)
    assert found.losses == []
    nowhere = train(artifact, 1, resume="last", checkpoint=tmp_path / "x")
    assert nowhere.said == [
        f"{tmp_path / 'x'} has no checkpoint: the run starts from the beginning"
    ]
    with pytest.raises(UsageError, match="is after step 3; --steps 2 counts from the very begin"):
        train(artifact, 2, resume="last")


def test_an_export_is_what_the_model_loads(tmp_path: Path) -> None:
    """Replicas, frozen parameters and buffers; a tied parameter under both names."""
    artifact = write_artifact(tmp_path / "a", depth=3, width=2)
    trained = train(artifact, 3, checkpoint_every=2)
    said: list[str] = []
    exported = export(artifact, out=tmp_path / "out", progress=said.append)
    files = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert exported.files == (*files, "model.safetensors.index.json")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(exported.files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    state = {n: t for file in files for n, t in load_file(tmp_path / "out" / file).items()}
    assert {n: f for f in files for n in load_file(tmp_path / "out" / f)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    model = find_model_file(artifact).model()
    model.load_state_dict(state)  # strict: every name of the user's model, no other
    assert torch.equal(state["wte.weight"], state["head.weight"])
    assert "h.0.gain" in state
    for rank in (0, 2, 4):
        for key, tensor in trained.states[rank].tensors.items():
            kind, _, name = key.partition("/")
            if kind in ("weights", "buffers"):
                assert torch.equal(state[name], tensor)


UNUSED = """
        self.pooler = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("scratch", torch.arange(5.0), persistent=False)
        import numpy
        self.register_buffer("drawn", torch.from_numpy(numpy.random.randn(3)))
"""


def test_what_no_stage_holds_is_exported_as_the_model_file_makes_it(tmp_path: Path) -> None:
    def edit(text: str) -> str:
        return text.replace("        self.enter =", UNUSED + "        self.enter =")

    artifact = write_artifact(tmp_path / "a", depth=2, edit=edit)
    train(artifact, 2, checkpoint_every=2, seed=5)
    exported = export(artifact, out=tmp_path / "out")
    assert exported.initial == ("table", "drawn", "pooler.weight", "pooler.bias")
    files = [name for name in exported.files if name.endswith("rs")]
    assert files[-1] == "model-00003-of-00003.safetensors"
    state = {n: t for file in files for n, t in load_file(tmp_path / "out" / file).items()}
    with seeded(5):
        model = find_model_file(artifact).model()
    for name in ("pooler.weight", "drawn"):
        assert torch.equal(state[name], model.state_dict()[name])
    model.load_state_dict(state)


def test_an_export_reads_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    with pytest.raises(UsageError, match="has no whole checkpoint: p2bw run --checkpoint-every"):
        export(artifact, out=tmp_path / "out")
    train(artifact, 4, checkpoint_every=3)
    last = artifact / "checkpoints" / "step-00000004"
    assert export(artifact / "checkpoints", out=tmp_path / "out").step == 4
    damage(last / "stage-0.safetensors", "truncated")
    with pytest.raises(MismatchError, match=r"stage-0.safetensors has \d+ bytes of \d+"):
        export(last, out=tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    said: list[str] = []
    assert export(artifact, out=tmp_path / "out", progress=said.append).step == 3
    assert said[0].endswith("; an earlier checkpoint is used")


def test_the_export_command(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    train(artifact, 2, checkpoint_every=2)
    line = ["export", str(artifact), "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, [*line, "--json"])
    assert said.exit_code == 0
    told = json.loads(said.stdout)
    assert told["step"] == 2
    assert told["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert CliRunner().invoke(app, [*line, "--quiet"]).output == ""
    assert "54 tensors, " in CliRunner().invoke(app, line).stdout
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "x"), "--out", str(tmp_path / "y")])
    assert refused.exit_code == 2


def test_an_export_needs_the_model_file_of_the_checkpoint(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    train(artifact, 2, checkpoint=tmp_path / "elsewhere")
    with pytest.raises(MismatchError, match=r"handmade.py of .* is not here; .*--model"):
        export(tmp_path / "elsewhere", out=tmp_path / "out")
    model = artifact / "source" / "handmade.py"
    assert export(tmp_path / "elsewhere", out=tmp_path / "out", model=model).step == 2
    model.write_text(model.read_text() + "# edited\n")
    with pytest.raises(MismatchError, match=r"is not the file that .*step-00000002"):
        export(tmp_path / "elsewhere", out=tmp_path / "out", model=model)
    (tmp_path / "file").write_text("")
    model.write_text(model.read_text().removesuffix("# edited\n"))
    with pytest.raises(UsageError, match=r"cannot write .*file/out"):
        export(tmp_path / "elsewhere", out=tmp_path / "file" / "out", model=model)


def test_processes_save_and_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through torchrun; and --save needs no checkpoint that stays."""
    artifact = write_artifact(tmp_path / "a", depth=2)
    whole = train(artifact, 5)
    first = run(artifact, steps=3, checkpoint_every=2, quiet=True)
    out = tmp_path / "out"
    second = run(artifact, steps=5, resume="last", save=out)
    assert first["losses"] + second["losses"] == whole.losses
    assert "p2bw: going on from" in capfd.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    state = load_file(out / "model-00001-of-00002.safetensors")
    assert torch.equal(state["wte.weight"], whole.states[0].tensors["weights/wte.weight"])


FEW = ("gpt", "hf_bert", "resnet")


@pytest.mark.parametrize(
    "name",
    [
        architecture.name
        if architecture.name in FEW
        else pytest.param(architecture.name, marks=pytest.mark.slow)
        for architecture in CORPUS
    ],
)
def test_compiled_artifacts_go_on_in_another_depth_and_export(
    compiled: Callable[[str, int], Compiled], tmp_path: Path, name: str
) -> None:
    """Stage code of the compiler: constants, buffers outside the state_dict, unused parameters."""
    two, three = (compiled(name, depth).artifact for depth in (2, 3))
    whole = train(two, 3)
    train(two, 2, checkpoint=tmp_path / "saved")
    saved = tmp_path / "saved" / "step-00000002"
    assert_equal(train(two, 3, resume=str(saved)), whole, 2)
    other = train(three, 3, resume=str(saved), checkpoint=tmp_path / "other")
    assert len(other.losses) == 1
    model = find_model_file(two).model()
    want = model.state_dict()
    for folder in ("saved", "other"):
        exported = export(tmp_path / folder, out=tmp_path / f"{folder}.out", artifact=two)
        files = [tmp_path / f"{folder}.out" / file for file in exported.files[:-1]]
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
            n: (t.shape, t.dtype) for n, t in want.items()
        }
        model.load_state_dict(state)
