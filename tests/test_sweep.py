"""The sweep against plans made one by one."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from corpus import ROOT
from typer.testing import CliRunner

import p2bw
from p2bw.__main__ import app
from p2bw.app import parse_counts
from p2bw.compiler import compilation
from p2bw.contract.errors import InfeasibleError, P2BWError, UsageError
from p2bw.sweeping import parse_prices

MLP = ROOT / "examples" / "mlp.py"
SMALL = {"layers": 6, "width": 512}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the model is traced at each microbatch size."""
    counts: Counter[int] = Counter()
    trace = compilation.trace

    def counted(file: Any, batch_size: int) -> Any:
        counts[batch_size] += 1
        return trace(file, batch_size)

    monkeypatch.setattr(compilation, "trace", counted)
    return counts


def test_each_point_is_the_plan_that_compile_makes(tmp_path: Path, traced: Counter[int]) -> None:
    said: list[str] = []
    rows = p2bw.sweep(
        MLP,
        settings=SMALL,
        gpus=[1, 2, 4],
        device=["v100-16", "l4"],
        schedule=["2bw", "flush"],
        prices={"l4": 0.7},
        out=tmp_path / "sweep",
        progress=said.append,
    )
    assert len(rows) == 12
    assert set(traced.values()) == {1}
    assert said[0] == "1/12 1xv100-16_2bw: tracing mlp.py at microbatch 1"
    for row in rows[::5]:
        point, plan = row.point, row.plan
        assert plan is not None
        single = p2bw.compile(
            MLP,
            settings=SMALL,
            gpus=point.gpus,
            device=point.devices.split()[-1],
            schedule=point.schedule,
            out=tmp_path / "single",
        )
        assert single.plan == plan
        written = (tmp_path / "sweep" / "plans" / f"{point.name}.json").read_text()
        assert written == plan.to_json()
    for row in rows:
        assert row.plan is not None
        costs = 0.7 * row.point.gpus / 3600 / row.plan.samples_per_s * 1e6
        assert row.cost == (pytest.approx(costs) if "l4" in row.point.name else None)
    records = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
    assert [record["name"] for record in records] == [row.point.name for row in rows]
    assert float(records[3]["samples_per_s"]) == rows[3].to_json()["samples_per_s"]
    plot = ElementTree.parse(tmp_path / "sweep" / "sweep.svg").getroot()
    circles = [e for e in plot.iter() if e.tag.endswith("circle")]
    assert len(circles) == 3 * 12 + 6  # throughput, memory and utilisation of all; cost of six


def test_a_batch_s_plan_is_the_best_of_all_that_make_it_up(tmp_path: Path) -> None:
    (row,) = p2bw.sweep(MLP, gpus=[4], device=["v100-16"], schedule=["flush"], batch=[24], gap="0")
    assert row.plan is not None
    plan = row.plan
    assert plan.microbatch * plan.microbatches_per_update * plan.width == 24
    best = 0.0
    for width in (1, 2, 3, 4):
        for size in (1, 2, 4, 8):
            if 24 % (width * size) == 0:
                options = {"width": width, "microbatch": size, "gap": "0"}
                m = 24 // (width * size)
                try:
                    made = p2bw.compile(
                        MLP, gpus=4, device="v100-16", schedule="flush", microbatches=m,
                        out=tmp_path / "a", **options,
                    )  # fmt: skip
                except P2BWError:
                    continue
                best = max(best, made.plan.samples_per_s)
    assert plan.samples_per_s == pytest.approx(best, rel=1e-9)


def test_a_point_without_a_plan_is_a_row_that_says_why() -> None:
    fits, none = p2bw.sweep(MLP, gpus=[2], device=["v100-16"], memory=["16GiB", "1030MiB"])
    assert fits.plan is not None
    assert none.plan is None
    assert "memory" in none.reason
    assert none.to_json()["samples_per_s"] is None
    with pytest.raises(InfeasibleError, match="no point of the sweep has a plan"):
        p2bw.sweep(MLP, gpus=[2], device=["v100-16"], memory=["1030MiB"])
    with pytest.raises(InfeasibleError, match="no plan of 1 sample per update fits on 2 devices"):
        p2bw.sweep(MLP, gpus=[2], device=["v100-16"], memory=["1030MiB"], batch=[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": []}, "give --gpus the numbers of devices"),
        ({"gpus": [0]}, "0 devices or samples are none"),
        ({"gpus": [2], "device": ["x100"]}, "unknown device 'x100'"),
        ({"gpus": [2], "schedule": ["fast"]}, "--schedule fast"),
        ({"gpus": [2], "prices": {"x100": 1.0}}, "unknown device 'x100'"),
        ({"gpus": [2], "prices": {"l4": float("nan")}}, "--price l4=nan"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    options: dict[str, Any], message: str, traced: Counter[int]
) -> None:
    with pytest.raises(UsageError, match=message):
        p2bw.sweep(MLP, **options)
    assert not traced


def test_the_command_prints_a_table_or_json() -> None:
    command = ["sweep", str(MLP), "--gpus", "1,2", "--device", "l4", "--price", "l4=0.7"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "1 x l4" in result.stdout
    assert "cost/M" in result.stdout
    assert "r: " not in result.stdout  # no row is marked
    again = CliRunner().invoke(app, [*command, "--recompute", "always"]).stdout
    assert "1 x 1 r" in again
    assert "r: some stages compute their forward again" in again
    found = json.loads(CliRunner().invoke(app, [*command, "--json", "--quiet"]).stdout)
    assert [row["gpus"] for row in found] == [1, 2]
    assert all(row["samples_per_s"] > 0 for row in found)


def test_options_are_read() -> None:
    assert parse_counts("--gpus", "4, 8,8", "4,8") == [4, 8]
    assert parse_prices(["A100-80=4.1"]) == {"a100-80": 4.1}
    for text in ("one", "", "4,,8", "-1", "4-8", "9" * 5000, "٤"):
        with pytest.raises(UsageError, match=rf"--gpus {text}: give numbers .* like 4,8"):
            parse_counts("--gpus", text, "4,8")
    with pytest.raises(UsageError, match="--price l4: give a device and a number"):
        parse_prices(["l4"])
