"""The command line of the simulation."""

import json
from pathlib import Path

import pytest
from simulated import made_plan
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler.plan import Plan
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
