"""What one sees of a run: lines of progress, metrics, TensorBoard, and the trace."""

import json
import sys
import threading
import types
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from handmade import write_artifact

from p2bw import launch
from p2bw.contract.errors import P2BWError, UsageError
from p2bw.contract.job import Job, Options
from p2bw.contract.schedule import Action, Kind, actions
from p2bw.launch import run
from p2bw.runtime.prepare import prepare
from p2bw.telemetry import report as report_module
from p2bw.telemetry import trace as trace_module
from p2bw.telemetry.report import Lines, Report


def make_report(folder: Path, *, say: bool = False) -> Report:
    artifact = folder / "a"
    if not artifact.exists():
        write_artifact(artifact, depth=2)
    return Report(prepare(Job(artifact=artifact, steps=12)), say=say)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_update_is_a_line_of_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    result = run(artifact, steps=5)
    found = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in found] == result["losses"]
    assert all(0 < line["utilisation"] <= 1 and line["samples_per_s"] > 0 for line in found)
    assert sorted(line["time"] for line in found) == [line["time"] for line in found]
    assert "utilisation 0." in capfd.readouterr().err


def test_a_resumed_run_keeps_its_lines_and_a_new_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a" / "metrics.jsonl"
    first = make_report(tmp_path)
    first.open(Options(), done=0)
    for batch in range(5):
        first.update(batch, loss=1.0, lr=0.1, norm=2.0)
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    again = make_report(tmp_path)
    again.open(Options(), done=3)
    again.update(3, loss=0.5)
    assert steps(path) == [1, 2, 3, 4]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (lines[2]["loss"], lines[2]["lr"], lines[2]["grad_norm"]) == (1.0, 0.1, 2.0)
    assert "grad_norm" not in lines[3]
    make_report(tmp_path).open(Options(), done=0)
    assert steps(path) == []


def test_metrics_go_on_where_the_run_does(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    first = run(artifact, steps=3, checkpoint_every=2, quiet=True)
    again = run(artifact, steps=5, checkpoint_every=2, resume="last", quiet=True)
    assert steps(artifact / "metrics.jsonl") == [1, 2, 3, 4, 5]
    lines = (artifact / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == first["losses"] + again["losses"]


def test_an_infinite_norm_is_no_json(tmp_path: Path) -> None:
    report = make_report(tmp_path)
    report.open(Options(metrics=tmp_path / "deep" / "m.jsonl"), done=0)
    report.update(0, loss=1.0, norm=float("inf"))
    (line,) = (tmp_path / "deep" / "m.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"step", "loss", "samples_per_s", "utilisation", "time"}


def test_a_place_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    wrong = artifact / "plan.json" / "metrics.jsonl"
    for option in ("metrics", "trace"):
        with pytest.raises(
            UsageError, match=f"cannot be written: .*; name another file with --{option}"
        ):
            run(artifact, steps=1, quiet=True, **{option: wrong})


def test_a_full_disk_ends_the_file_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(Path("/dev/full"), "--metrics")
    lines.add("a\n")
    lines.add("b\n")
    assert capsys.readouterr().err == "p2bw: /dev/full ends here: No space left on device\n"


def test_progress_is_one_line_a_second_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates take 0.4 s each, of 6 samples."""
    now = [0.0]
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: now[0])
    report = make_report(tmp_path, say=True)
    for batch in range(12):
        now[0] += 0.4
        report.update(batch, loss=1.0)
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["1/12", "4/12", "7/12", "10/12", "12/12"]
    assert said[1] == "step  4/12  loss 1.0000  15 samples/s  utilisation 0.00  0:00:03 left"


def test_updates_that_end_together_do_not_look_fast(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last two do, where updates wait for other ranks while the next batch runs."""
    now = 0.0
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: now)
    report = make_report(tmp_path, say=True)
    report.open(Options(), done=0)
    for batch in range(12):
        now += 1.0 if batch < 11 else 1e-6
        report.update(batch, loss=1.0)
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["samples_per_s"] for line in lines]
    assert max(rates) < 1.2 * rates[0]
    last = capfd.readouterr().err.splitlines()[-1]
    assert float(last.split()[4]) < 1.2 * rates[0]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            seen.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, step))

        def close(self) -> None:
            seen.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        make_report(tmp_path).open(Options(tensorboard=tmp_path / "board"), done=2)
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    report = make_report(tmp_path)
    report.open(Options(tensorboard=tmp_path / "board"), done=2)
    report.update(2, loss=1.0, lr=0.1)
    report.stop()
    assert seen[0] == (str(tmp_path / "board"), 3)
    names = ("loss", "lr", "samples_per_s", "utilisation")
    assert seen[1:] == [*((name, 3) for name in names), "closed"]


def events_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of a trace by phase: X spans, s and f the two ends of arrows, M names."""
    found = defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        found[event["ph"]].append(event)
    return found


def test_a_trace_has_every_action_once_at_its_time(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2, width=2)
    job = Job(artifact=artifact, steps=3, clip_norm=1.0)
    run(artifact, steps=3, clip_norm=1.0, trace=tmp_path / "t.json", quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "t.json"]
    events = events_of(tmp_path / "t.json")
    prepared = prepare(job)

    def name(action: Action) -> str:
        if action.channel is None:
            return str(action).replace("w", " w")
        sends = action.kind is Kind.SEND
        peer = f"to {action.channel.target}" if sends else f"from {action.channel.source}"
        return f"{action.kind}{action.index} {action.channel.flow} {action.channel.tensor} {peer}"

    for rank in range(4):
        stage, replica = prepared.plan.position(rank)
        found = Counter(event["name"] for event in events["X"] if event["pid"] == rank)
        expected = actions(prepared.pipeline, stage)
        assert found == Counter(name(a) for a in expected if a.kind is not Kind.CLOSE)
        said = {e["name"]: e["args"] for e in events["M"] if e["pid"] == rank}
        assert said["process_name"] == {"name": f"rank {rank}: stage {stage}, replica {replica}"}
        for track in range(2):
            spans = [e for e in events["X"] if (e["pid"], e["tid"]) == (rank, track)]
            spans.sort(key=lambda span: span["ts"])
            assert spans
            for one, following in pairwise(spans):
                assert one["ts"] + one["dur"] <= following["ts"] + 0.001

    sent = {event["id"]: event for event in events["s"]}
    received = {event["id"]: event for event in events["f"]}
    assert len(sent) == len(events["s"])
    assert len(received) == len(events["f"])
    assert sent.keys() == received.keys()
    for number, send in sent.items():
        assert send["ts"] < received[number]["ts"]
        assert send["name"] == received[number]["name"]
        there = [prepared.plan.position(end["pid"])[1] for end in (send, received[number])]
        assert there[0] == there[1]  # the same replica


def test_a_run_that_fails_leaves_its_trace(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    stage = artifact / "stages" / "stage_1.py"
    stage.write_text(stage.read_text().replace("        loss = ", "        loss = missing + "))
    with pytest.raises(P2BWError, match="'missing' is not defined"):
        run(artifact, steps=2, trace=tmp_path / "t.json", quiet=True)
    spans = events_of(tmp_path / "t.json")["X"]
    assert "F0 w0" in [span["name"] for span in spans if span["pid"] == 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "t.json"]


def test_a_run_that_needs_more_memory_than_planned_is_warned_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both stages have 50 bytes of gradients; stage 0 stashes 40 for 2 in flight, 1 for 1."""
    artifact = write_artifact(tmp_path / "a", depth=2)
    plan = json.loads((artifact / "plan.json").read_text())
    for stage, stash in zip(plan["stages"], (40, 1), strict=True):
        memory = {"total": 400, "weights": 100, "gradients": 50, "stash": stash, "limit": 449}
        stage["memory"] = memory

    def warned(planned: float | None, **given: Any) -> str:
        (artifact / "plan.json").write_text(json.dumps(plan | {"clip_norm": planned}))
        prepared = prepare(Job(artifact=artifact, steps=1, **given))
        return "".join(launch._too_full(prepared))

    assert warned(None) == warned(1.0, clip_norm=2.0) == ""
    assert warned(None, schedule="flush", clip_norm=2.0) == ""
    assert "stages 0, 1 may run out of memory" in warned(None, clip_norm=2.0)
    assert "2bw, 2 microbatches per update and no clipping" in warned(None, clip_norm=2.0)
    assert warned(None, schedule="gpipe", microbatches=4) == ""  # one version less
    assert "stages 0 may run" in warned(None, schedule="gpipe", microbatches=8)  # 120 more, 50 less
    plan["stages"][0]["memory"] = None  # written by hand
    assert "stages 1 may run" in warned(None, clip_norm=2.0)
    run(artifact, steps=1, clip_norm=2.0, quiet=True)
    assert "stages 1 may run out of memory" in capfd.readouterr().err


def test_the_plans_norm_is_clipped_to(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    plan = json.loads((artifact / "plan.json").read_text())
    (artifact / "plan.json").write_text(json.dumps(plan | {"clip_norm": 1.0}))
    run(artifact, steps=1, quiet=True)
    assert json.loads((artifact / "metrics.jsonl").read_text())["grad_norm"] > 0


@pytest.mark.parametrize("ahead_s", [0.0, 5.0, -7200.0])
def test_clocks_of_several_machines_are_aligned(
    ahead_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1's clock is ahead of rank 0's; on one machine, exactly equal."""
    store, zero = dist.HashStore(), {}
    real = trace_module.time.perf_counter
    clocks = {"rank 0": real, "rank 1": lambda: real() + ahead_s}
    monkeypatch.setattr(
        trace_module.time, "perf_counter", lambda: clocks[threading.current_thread().name]()
    )

    def rank(number: int) -> None:
        zero[number] = trace_module.align(store, number, 2)

    threads = [threading.Thread(target=rank, args=(r,), name=f"rank {r}") for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    difference = zero[1] - zero[0] - ahead_s
    assert abs(difference) < 0.05
    assert ahead_s or difference == 0
