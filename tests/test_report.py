"""report: a run's trace beside its plan. Simulations with other times stand for such runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from simulated import made_plan
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler.comparison import compare
from p2bw.compiler.plan import Plan, read_plan
from p2bw.compiler.simulation.job import StageTimes, planned_times
from p2bw.compiler.simulation.simulate import simulate
from p2bw.contract.errors import InputFileError, MismatchError, UsageError
from p2bw.launch import run
from p2bw.report import _summary

if TYPE_CHECKING:
    from p2bw.compiler.driver import Compiled

PLAN = made_plan(3, 2, 4, update_s=4e-4, gradients=10**6)


def traced(plan: Plan, path: Path, *, batches: int = 8, **changes: StageTimes) -> Path:
    """The trace of a run in which the stages took other times than planned."""
    times = [changes.get(f"stage_{s.index}", planned_times(plan, s)) for s in plan.stages]
    simulate(plan, times=times, batches=batches, trace=path)
    return path


def test_a_run_that_went_as_planned(tmp_path: Path) -> None:
    found = compare(PLAN, traced(PLAN, tmp_path / "trace.json"))
    assert found.measured_period_s == pytest.approx(found.planned_period_s, rel=1e-5)
    assert found.replayed_period_s == pytest.approx(found.planned_period_s, rel=1e-5)
    for stage in found.stages:
        assert stage.ranks == (2 * stage.stage, 2 * stage.stage + 1)
        for pair in (stage.forward_s, stage.backward_s, stage.update_s):
            assert pair.measured == pytest.approx(pair.planned, rel=1e-5)
        assert stage.waiting.measured == pytest.approx(stage.waiting.planned, abs=1e-4)


@pytest.mark.parametrize(
    ("times", "what", "seconds"),
    [
        (StageTimes(1e-3, 3.5e-3, 4e-4), "backward", 1.5e-3),
        (StageTimes(1.2e-3, 2e-3, 4e-4), "forward", 2e-4),
        (StageTimes(1e-3, 2e-3, 2.4e-3), "update", 5e-4),
        (StageTimes(0.2e-3, 2e-3, 4e-4), "forward", -8e-4),
    ],
)
def test_the_largest_difference_is_named(
    tmp_path: Path, times: StageTimes, what: str, seconds: float
) -> None:
    found = compare(PLAN, traced(PLAN, tmp_path / "trace.json", stage_1=times))
    assert (found.largest.what, found.largest.stage) == (what, 1)
    assert found.largest.seconds == pytest.approx(seconds, rel=1e-3)
    assert found.replayed_period_s == pytest.approx(found.measured_period_s, rel=1e-3)


def test_a_norm_is_told_apart_from_the_update_and_replayed_as_measured(tmp_path: Path) -> None:
    plan = made_plan(3, 1, 4, update_s=4e-4, gradients=10**6, clip_norm=1.0)
    slow = StageTimes(1e-3, 2e-3, 4e-4, norm_s=4e-3)
    found = compare(plan, traced(plan, tmp_path / "trace.json", stage_1=slow))
    assert (found.largest.what, found.largest.stage) == ("norm", 1)
    assert found.largest.seconds == pytest.approx(1e-3, rel=1e-2)
    assert found.replayed_period_s == pytest.approx(found.measured_period_s, rel=1e-3)
    assert found.stages[1].update_s.measured == pytest.approx(4e-4, rel=1e-3)
    assert found.stages[1].norm_s.measured == pytest.approx(4e-3, rel=1e-3)
    assert found.stages[0].norm_s.measured == pytest.approx(found.stages[0].norm_s.planned, rel=0.1)
    told = "\n".join(_summary(found))
    assert "the norm of stage 1: 4.00 ms" in told


def test_what_no_stage_explains_is_waiting(tmp_path: Path) -> None:
    slow = made_plan(3, 2, 4, update_s=4e-4, gradients=10**6, size=3 * 10**12)  # 3 ms to send
    found = compare(PLAN, traced(slow, tmp_path / "trace.json"))
    assert found.largest.what == "waiting"
    assert found.largest.seconds == pytest.approx(
        found.measured_period_s - found.planned_period_s, rel=1e-3
    )
    assert found.stages[0].waiting.measured > found.stages[0].waiting.planned + 0.2


def test_a_run_with_another_schedule_than_the_plans(tmp_path: Path) -> None:
    flushed = PLAN.model_copy(update={"schedule": "flush", "microbatches_per_update": 6})
    found = compare(PLAN, traced(flushed, tmp_path / "trace.json"))
    assert (found.schedule, found.microbatches) == ("flush", 6)
    assert found.measured_period_s == pytest.approx(found.planned_period_s, rel=0.03)
    assert found.measured_period_s > 1.2 * PLAN.period_s


def test_a_real_run(compiled: Callable[[str, int], "Compiled"], tmp_path: Path) -> None:
    artifact, trace = compiled("mlp", 2).artifact, tmp_path / "trace.json"
    run(artifact, steps=12, trace=trace, quiet=True)
    found = compare(read_plan(artifact), trace)
    assert found.updates == 9
    for stage in found.stages:
        assert stage.forward_s.measured > 0
        assert stage.backward_s.measured > 0
        assert stage.update_s.measured > 0
        busy = stage.forward_s.measured + stage.backward_s.measured
        assert busy < found.measured_period_s * 1.5
    told = CliRunner().invoke(app, ["report", str(artifact), str(trace)]).stdout
    assert "largest " in told
    given = CliRunner().invoke(app, ["report", str(artifact), str(trace), "--json"]).stdout
    assert json.loads(given)["measured_period_s"] == found.measured_period_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of events"),
        ("[1]", "no list of events"),
        ("{}", "no list of events"),
        ("[" * 100_000, "no list of events"),
        ('{"traceEvents": 3}', "no list of events"),
        ('{"traceEvents": []}', "does not say what was run"),
        ('{"traceEvents": [{"pid": "x"}]}', "pid"),
        ('{"traceEvents": [{"pid": 0, "ph": "X", "name": "F0", "dur": NaN}]}', "dur"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(InputFileError, match=message):
        compare(PLAN, path)


def test_a_trace_of_another_plan_or_of_too_little(tmp_path: Path) -> None:
    path = traced(PLAN, tmp_path / "trace.json", batches=3)
    with pytest.raises(UsageError, match="3 whole updates; run 4 steps or more"):
        compare(PLAN, path)
    with pytest.raises(MismatchError, match="3 stages x 2 replicas, the plan has 2 x 3"):
        compare(made_plan(2, 3, 4), path)
    events = json.loads(path.read_text())
    events["traceEvents"] = [event for event in events["traceEvents"] if event["pid"] != 4]
    path.write_text(json.dumps(events))
    with pytest.raises(InputFileError, match="lacks the ranks 4"):
        compare(PLAN, path)
    with pytest.raises(InputFileError, match="No such file"):
        compare(PLAN, tmp_path / "none.json")
