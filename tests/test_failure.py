"""Ranks that die, freeze, hang and are stopped: the others leave in time, and nothing is lost."""

import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from handmade import write_artifact
from processes import Ranks, alive, children, saved_states, wait_until

from p2bw.contract.checkpoint import commits, open_checkpoint
from p2bw.contract.job import Job, Options, command
from p2bw.launch import run
from p2bw.runtime.failure import Stop
from p2bw.runtime.local import train_in_threads

DEPTH, M, STEPS, EVERY = 3, 3, 10, 4


def artifact_in(folder: Path) -> Path:
    return write_artifact(folder / "a", depth=DEPTH, microbatches=M, optimizer="adamw")


def flags(artifact: Path, steps: int = STEPS, *more: object) -> list[object]:
    where = ["--checkpoint", artifact.parent / "saved", "--checkpoint-every", EVERY]
    return [artifact, "--steps", steps, *where, "--resume", "last", *more]


def assert_equal_to_a_run_without_failures(artifact: Path, steps: int = STEPS) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = train_in_threads(Job(artifact=artifact, steps=steps)).states
    torch.set_num_threads(threads)
    found = saved_states(artifact.parent / "saved" / f"step-{steps:08}", DEPTH)
    for want, have in zip(expected, found, strict=True):
        assert want.keys() == have.keys()
        assert [name for name in want if not torch.equal(want[name], have[name])] == []


def kill_and_resume(tmp_path: Path, rank: int, where: str, committed: int) -> None:
    artifact, log = artifact_in(tmp_path), tmp_path / "log"
    with Ranks(DEPTH, flags(artifact), log=log, harm=(rank, f"kill in {where}")) as ranks:
        codes = ranks.exit_codes()
        assert codes == [-9 if r == rank else 75 for r in range(DEPTH)], log.read_text()
        (said,) = (line for line in ranks.said() if line.startswith("p2bw: rank"))
        assert f"rank {rank} (stage {rank}) is gone" in said, said
    newest = commits(tmp_path / "saved")[:1]  # the thread that saves may not have come to the last
    assert all(path.name <= f"step-{committed:08}" for path in newest)
    with Ranks(DEPTH, flags(artifact), log=log) as ranks:
        assert ranks.exit_codes() == [0] * DEPTH, log.read_text()
        went_on = [line for line in ranks.said() if "going on from" in line]
    assert len(went_on) == len(newest)
    assert all(f"from {path}, after" in line for path, line in zip(newest, went_on, strict=True))
    assert_equal_to_a_run_without_failures(artifact)


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 1, f"step-{2 * EVERY:08}", EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(DEPTH))
@pytest.mark.parametrize(
    ("where", "committed"),
    [
        pytest.param("F0", 0, id="warm-up"),
        pytest.param(f"F{7 * M + 1}", EVERY, id="steady"),
        pytest.param(f"step-{2 * EVERY:08}", EVERY, id="checkpoint"),
        pytest.param(f"B{STEPS * M - 1}", 2 * EVERY, id="drain"),
    ],
)
def test_a_rank_killed_in_any_phase(tmp_path: Path, rank: int, where: str, committed: int) -> None:
    kill_and_resume(tmp_path, rank, where, committed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_forty_kills_at_random_times_lose_nothing(tmp_path: Path) -> None:
    artifact, log, saved = artifact_in(tmp_path), tmp_path / "log", tmp_path / "saved"
    dice = random.Random(4)
    step = 0
    for _ in range(40):
        with Ranks(DEPTH, flags(artifact, 1_000_000), log=log) as ranks:
            time.sleep(dice.uniform(0.1, 3))
            newest = commits(saved)[:1]
            victim = dice.randrange(DEPTH)
            ranks.kill(victim)
            codes = ranks.exit_codes()
            assert codes.pop(victim) == -9
            assert {*codes} <= {75, -15}, log.read_text()  # -15: torchrun's, before it was ready
        if newest:
            assert commits(saved)[0].name >= newest[0].name
        for path in commits(saved):
            checkpoint = open_checkpoint(path)
            for file in checkpoint.manifest.files:
                checkpoint.verify(file)
            step = max(step, checkpoint.manifest.step)
    assert step > 0
    with Ranks(DEPTH, flags(artifact, step + 3), log=log) as ranks:
        assert ranks.exit_codes() == [0] * DEPTH, log.read_text()
    assert_equal_to_a_run_without_failures(artifact, step + 3)


def test_an_exception_is_said_once_and_ends_all(tmp_path: Path) -> None:
    artifact, log = artifact_in(tmp_path), tmp_path / "log"
    with Ranks(DEPTH, flags(artifact), log=log, harm=(2, "a bad day in F5")) as ranks:
        assert ranks.exit_codes() == [1] * DEPTH
        assert [line for line in ranks.said() if "last" not in line][-1:] == [
            "p2bw: rank 2: RuntimeError: a bad day"
        ]
    assert log.read_text().count("Traceback") == 1


@pytest.mark.slow
def test_a_hang_is_blamed_on_the_rank_that_waits_for_nobody(tmp_path: Path) -> None:
    artifact, log = artifact_in(tmp_path), tmp_path / "log"
    short = flags(artifact, STEPS, "--timeout", 4)
    with Ranks(DEPTH, short, log=log, harm=(1, "sleep in F5")) as ranks:
        assert ranks.exit_codes() == [75] * DEPTH
        (said,) = (line for line in ranks.said() if line.startswith("p2bw: rank"))
    assert re.search(r"rank 1 \(stage 1\) has been in F5w0 for [45] s, at processes.py:\d+", said)
    assert "; rank 0 (stage 0) waits for gradient x of microbatch" in said
    assert "; rank 2 (stage 2) waits for activation" in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_frozen_rank_is_named_and_killed(tmp_path: Path, rank: int) -> None:
    artifact, log = artifact_in(tmp_path), tmp_path / "log"
    with Ranks(DEPTH, flags(artifact, 1_000_000), log=log) as ranks:
        wait_until(lambda: len(commits(tmp_path / "saved")) > 0, 60)
        ranks.kill(rank, signal.SIGSTOP)
        assert ranks.exit_codes() == [-9 if r == rank else 75 for r in range(DEPTH)]
        (said,) = (line for line in ranks.said() if line.startswith("p2bw: rank"))
    assert f"rank {rank} (stage {rank}) is gone (frozen" in said


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_batch(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    artifact, log, saved = artifact_in(tmp_path), tmp_path / "log", tmp_path / "saved"
    with Ranks(DEPTH, flags(artifact, 1_000_000), log=log) as ranks:
        wait_until(lambda: len(commits(saved)) > 0, 60)
        ranks.kill(1, number)
        assert ranks.exit_codes() == [code] * DEPTH, log.read_text()
        said = ranks.said()[-1]
    found = re.fullmatch(
        rf"p2bw: stopped by {number.name} after step (\d+) of 1000000; --resume (.*)", said
    )
    assert found, said
    step, newest = int(found[1]), commits(saved)[0]
    assert newest.name == f"step-{step:08}"
    assert found[2] == str(newest)
    assert_equal_to_a_run_without_failures(artifact, step)


def test_a_run_that_did_not_mean_to_save_is_saved_when_it_is_stopped(tmp_path: Path) -> None:
    """In the artifact's own folder, or beside what is there of another run."""
    artifact, log = artifact_in(tmp_path), tmp_path / "log"
    for name in ("checkpoints", "checkpoints-2"):
        with Ranks(DEPTH, [artifact, "--steps", 1_000_000], log=log) as ranks:
            wait_until(lambda: log.exists() and "step" in log.read_text(), 60)
            ranks.kill(2, signal.SIGTERM)
            assert ranks.exit_codes() == [143] * DEPTH, log.read_text()
            said = ranks.said()[-1]
        (newest,) = commits(artifact / name)
        assert said.endswith(f"--resume {newest}")
    newest.parent.rename(tmp_path / "saved")
    step = int(newest.name.removeprefix("step-"))
    assert_equal_to_a_run_without_failures(artifact, step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_run_passes_signals_on_and_has_their_exit_code(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    artifact, saved = artifact_in(tmp_path), tmp_path / "saved"
    line = [sys.executable, "-m", "p2bw", "run", *map(str, flags(artifact, 1_000_000))]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(commits(saved)) > 0, 120)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == code
    newest = commits(saved)[0]
    step = int(newest.name.removeprefix("step-"))
    stopped = f"p2bw: stopped by {number.name} after step {step} of 1000000; --resume {newest}"
    assert said[-1] == stopped
    assert "Traceback" not in "".join(said)


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint_by_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = artifact_in(tmp_path)
    stage = artifact / "stages" / "stage_1.py"
    suicide = """
        self.forwards = getattr(self, "forwards", 0) + 1
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if self.forwards == 22 and first:
            os.kill(os.getpid(), 9)
        return x"""
    stage.write_text("import os\n" + stage.read_text().replace("\n        return x", suicide, 1))
    # The first "return x" is a block's: two of them run in this stage at most.
    run(
        artifact,
        steps=STEPS,
        checkpoint=tmp_path / "saved",
        checkpoint_every=2,
        max_restarts=1,
    )
    err = capfd.readouterr().err
    assert "p2bw: restart 1 of 1 after rank " in err
    assert "rank 1 (stage 1) is gone" in err
    assert "p2bw: going on from " in err
    assert_equal_to_a_run_without_failures(artifact)


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    artifact, saved = artifact_in(tmp_path), tmp_path / "saved"
    job, options = Job(artifact=artifact, steps=1_000_000), Options(checkpoint=saved)
    line = command(job, replace(options, checkpoint_every=1), DEPTH)
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(commits(saved)) > 0, 120)
        ranks = children(process.pid)
        assert len(ranks) == DEPTH
        process.kill()
        wait_until(lambda: not any(map(alive, ranks)), 10)


def test_ranks_that_stop_agree_on_the_last_batch() -> None:
    """One is batches ahead; none may begin a batch that another will not run."""
    stops = [Stop() for _ in range(3)]
    for stop, batch in zip(stops, (4, 6, 5), strict=True):
        assert stop.allows(batch)
    asked = [stop.ask() for stop in stops]
    assert asked == [4, 6, 5]
    begun: list[list[int]] = [[], [], []]

    def run(rank: int) -> None:
        batch = asked[rank] + 1
        while stops[rank].allows(batch):
            begun[rank].append(batch)
            batch += 1

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for stop in stops:
        stop.decide(max(asked))
    for thread in threads:
        thread.join(timeout=10)
    assert begun == [[5, 6], [], [6]]
