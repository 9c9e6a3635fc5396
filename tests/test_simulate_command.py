"""The command line of the simulation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulated import made_plan
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler.plan import Plan, read_plan
from p2bw.compiler.simulation.job import StageTimes, planned_times
from p2bw.compiler.simulation.times import read_times
from p2bw.measure.rehearsal import Pair, Rehearsal, StageRehearsal
from p2bw.simulation import parse_jitter, parse_stragglers


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return written(made_plan(3, 2, 4, size=10**6, gradients=10**6), tmp_path / "a")


def written(plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    (folder / "plan.json").write_text(plan.to_json())
    return folder


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_table_and_the_timeline(artifact: Path) -> None:
    code, out, err = run(artifact, "--timeline", "--straggler", "2:1.5x")
    assert code == 0
    assert "simulating 3 stages x 2 replicas" in err
    assert "planned     3.00 ms: simulated takes +50.0 %" in out
    assert "repeats exactly every update" in out
    lines = out.splitlines()
    # Forwards 0 to 2, then forward 3 follows the backward of 0, which all the stages wait for.
    first = next(line for line in lines if line.startswith("0 0"))
    assert first.startswith("0 0──1──2──")
    assert first.index("0━━━") < first.index("3──")


def test_json_has_all(artifact: Path) -> None:
    code, out, err = run(artifact, "--json", "--quiet", "--batches", 3)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["period_s"] == pytest.approx(3e-3, rel=1e-3)
    assert found["ratio"] == pytest.approx(1, rel=1e-3)
    assert found["batches"] == 3
    assert [device["ranks"] for device in found["devices"]] == [[0, 1], [2, 3], [4, 5]]


def test_the_same_command_prints_the_same(artifact: Path) -> None:
    options = (artifact, "--json", "--jitter", "5%", "--seed", 2)
    assert run(*options) == run(*options)


def rehearsal(path: Path, seconds: dict[int, tuple[float, ...]]) -> Path:
    """What rehearse prints: of each stage the forward, backward, norm and update."""
    names = ("forward_s", "backward_s", "norm_s", "update_s")
    stages = tuple(
        StageRehearsal(
            stage=k,
            compute_s=Pair(1.0, 1.0),
            peak_bytes=Pair(1, 1),
            **{name: Pair(1.0, value) for name, value in zip(names, values, strict=True)},
        )
        for k, values in seconds.items()
    )
    nothing = Pair(1.0, 1.0)
    found = Rehearsal(
        device="d", planned_for="e", stages=stages, period_s=nothing, samples_per_s=nothing
    )
    path.write_text(json.dumps(found.to_json()), encoding="utf-8")
    return path


def test_times_of_a_rehearsal_take_the_place_of_the_plans(artifact: Path, tmp_path: Path) -> None:
    """The middle stage, with a fourth of its update; the others as planned."""
    times = rehearsal(tmp_path / "times.json", {1: (2e-3, 5e-3, 9.0, 4e-3)})
    code, out, _ = run(artifact, "--json", "--times", times, "--timeline")
    assert code == 0
    assert json.loads(out)["period_s"] == pytest.approx(8e-3, rel=2e-3)
    plan = read_plan(artifact)
    first, middle, last = read_times(times, plan)
    assert (first, last) == tuple(planned_times(plan, plan.stages[k]) for k in (0, 2))
    assert middle == StageTimes(2e-3, 5e-3, 4e-3, norm_s=9.0)
    _, out, _ = run(artifact, "--quiet", "--json", "--times", times, "--straggler", "2:2x")
    assert json.loads(out)["period_s"] == pytest.approx(16e-3, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda d: d["stages"][0].update(stage=3), 7, "has a stage 3, the plan's are 0 to 2"),
        (lambda d: d["stages"][0].update(stage=-1), 6, "stages.0.stage"),
        (lambda d: d["stages"][0].pop("norm_s"), 6, "stages.0.norm_s: Field required"),
        (lambda d: d["stages"][0]["forward_s"].update(measured=-1.0), 6, "forward_s.measured"),
        (lambda d: d["stages"][0]["forward_s"].update(measured=float("nan")), 6, "measured"),
        (lambda d: d.clear(), 6, "stages: Field required; `p2bw rehearse DIR --json` prints one"),
        (lambda d: d.update(stages=[]), 6, "stages"),
    ],
)
def test_times_that_are_none(
    artifact: Path, tmp_path: Path, change: Callable[[Any], None], code: int, message: str
) -> None:
    path = rehearsal(tmp_path / "times.json", {0: (1e-3, 1e-3, 0.0, 0.0)})
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    found = run(artifact, "--times", path)
    assert (found[0], found[1]) == (code, "")
    assert message in " ".join(found[2].split())


def test_a_file_of_times_that_is_not_there(artifact: Path, tmp_path: Path) -> None:
    code, _, err = run(artifact, "--times", tmp_path / "none.json")
    assert code == 2
    assert "No such file" in err
    (tmp_path / "text").write_text("hello")
    assert run(artifact, "--times", tmp_path / "text")[0] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--straggler", "x"], "--straggler x: give a rank and its factor, like 3:1.3x"),
        (["--straggler", "6:2"], "no rank 6 to slow down: the plan's are 0 to 5"),
        (["--jitter", "120%"], "--jitter 120%: give a share below 1"),
        (["--batches", "0"], "0 batches are nothing to simulate"),
        (["--trace", "/dev/null/trace"], "name another file with --trace"),
    ],
)
def test_what_cannot_be_done_is_said(artifact: Path, arguments: list[str], message: str) -> None:
    code, out, err = run(artifact, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_options_are_read() -> None:
    assert parse_stragglers(["3:1.3x", " 4:2 "]) == {3: 1.3, 4: 2.0}
    assert (parse_jitter("5%"), parse_jitter("0.05"), parse_jitter("0")) == (0.05, 0.05, 0.0)
