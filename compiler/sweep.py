"""sweep: one plan for each combination of devices, memory, batch and schedule."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from p2bw.compiler.artifact import check_file, write_file
from p2bw.compiler.devices import find_device
from p2bw.compiler.driver import DEFAULT_GAP, Shared, plan_model
from p2bw.compiler.onnx.source import model_source
from p2bw.compiler.options import checked_autocast, checked_recompute, checked_schedule
from p2bw.compiler.plan import Plan
from p2bw.compiler.simulation.simulate import simulate
from p2bw.compiler.topology import Topology, make_topology
from p2bw.compiler.units import parse_gap
from p2bw.contract.errors import InfeasibleError, TimeLimitError, UsageError
from p2bw.modelfile.load import Setting, load_model_file

MILLION = 10**6
HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Point:
    """What one plan was asked for."""

    name: str  # of its files: "16xa100-80_2bw"
    series: str  # what it has in common with others that differ in the number of devices
    gpus: int
    devices: str
    memory_bytes: int  # of a device
    schedule: str
    batch: int | None  # samples per update; None: searched


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One point's plan in numbers, or why there is none."""

    point: Point
    plan: Plan | None
    reason: str = ""
    simulated_samples_per_s: float | None = None
    cost: float | None = None  # of a million samples, in the unit of the prices

    def to_json(self) -> dict[str, Any]:
        """One flat record; what does not apply is null."""
        plan = self.plan
        return {
            **asdict(self.point),
            "depth": plan and plan.depth,
            "width": plan and plan.width,
            "microbatch": plan and plan.microbatch,
            "microbatches": plan and plan.microbatches_per_update,
            "samples_per_update": plan
            and plan.microbatch * plan.microbatches_per_update * plan.width,
            "samples_per_s": plan and plan.samples_per_s,
            "simulated_samples_per_s": self.simulated_samples_per_s,
            "utilisation": plan and plan.utilisation,
            "peak_bytes": plan and max(stage.memory.total for stage in plan.stages),
            "recomputing_stages": plan and sum(stage.recompute for stage in plan.stages),
            "gap": plan and plan.optimality.gap,
            "cost_per_million_samples": self.cost,
            "reason": self.reason or None,
        }


def sweep(
    model: str | Path,
    *,
    gpus: Sequence[int],
    factory: str = "model",
    settings: Mapping[str, Setting] | None = None,
    device: Sequence[str] = (),
    memory: Sequence[str] = (),
    cluster: str | None = None,
    batch: Sequence[int] = (),
    schedule: Sequence[str] = ("2bw",),
    autocast: str | None = None,
    recompute: str = "auto",
    prices: Mapping[str, float] | None = None,
    gap: str = DEFAULT_GAP,
    out: str | Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Plan a model for every combination; the model is traced once per microbatch size.

    `batch`: samples per update, of all replicas together; without it the plans are those that
    maximise throughput. `prices`: of an hour of each device, by its name. A combination that has
    no plan is a row that says why; InfeasibleError if none has. With `out`, that folder gets
    sweep.csv, sweep.svg and each plan.
    """
    _check(schedule, recompute, gap, prices or {})
    points = list(_points(gpus, device, memory, cluster, batch, schedule))
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_file("--out", folder / "sweep.csv")
    rows: list[Row] = []
    with model_source(Path(model), factory, settings or {}, None) as source:
        given = dict(source.settings)
        file = load_model_file(source.path, factory, given, checked_autocast(autocast))
        shared = Shared(file, source.weights)
        for number, (point, topology) in enumerate(points, start=1):
            head = f"{number}/{len(points)} {point.name}: "

            def say(message: str, head: str = head) -> None:
                progress(head + message)

            try:
                plan = plan_model(
                    shared,
                    topology,
                    schedule=point.schedule,
                    batch=point.batch,
                    microbatch=source.microbatch,
                    recompute=recompute,
                    gap=gap,
                    progress=say,
                )
            except (InfeasibleError, TimeLimitError) as error:
                rows.append(Row(point=point, plan=None, reason=str(error)))
            else:
                rows.append(_row(point, plan, topology, prices or {}))
    if folder is not None:
        write_sweep(folder, rows)
    if all(row.plan is None for row in rows):
        raise InfeasibleError(f"no point of the sweep has a plan; the first: {rows[0].reason}")
    return rows


def _check(schedule: Sequence[str], recompute: str, gap: str, prices: Mapping[str, float]) -> None:
    """Refuse before any long work what no plan could be made with."""
    for name in schedule:
        checked_schedule(name, None)
    checked_recompute(recompute)
    parse_gap(gap)
    for name, price in prices.items():
        find_device(name)
        if not 0 <= price < math.inf:
            raise UsageError(f"--price {name}={price:g}: give what an hour costs")


def _points(
    gpus: Sequence[int],
    device: Sequence[str],
    memory: Sequence[str],
    cluster: str | None,
    batch: Sequence[int],
    schedule: Sequence[str],
) -> Iterator[tuple[Point, Topology]]:
    """Every combination, the number of devices changing fastest."""
    for count in (*gpus, *batch):
        if count < 1:
            raise UsageError(f"{count} devices or samples are none; give numbers from 1 on")
    if not gpus:
        raise UsageError("give --gpus the numbers of devices to plan for: --gpus 4,8,16")
    combinations = product(device or (None,), memory or (None,), schedule, batch or (None,), gpus)
    for kind, room, name, samples, count in combinations:
        topology = make_topology(gpus=count, device=kind, memory=room, cluster=cluster)
        devices = "+".join(device.name for device in topology.kinds)
        parts = [devices, *([room] if room else []), name]
        parts += [f"batch{samples}"] if samples is not None else []
        series = " ".join(parts)
        yield (
            Point(
                name=f"{count}x{'_'.join(parts)}",
                series=series,
                gpus=count,
                devices=topology.summary,
                memory_bytes=topology.device.memory_bytes,
                schedule=name,
                batch=samples,
            ),
            topology,
        )


def _row(point: Point, plan: Plan, topology: Topology, prices: Mapping[str, float]) -> Row:
    names = [device.name for device in topology.devices]
    cost = None
    if all(name in prices for name in names):
        per_s = math.fsum(prices[name] for name in names) / HOUR_S
        cost = per_s / plan.samples_per_s * MILLION
    return Row(
        point=point,
        plan=plan,
        simulated_samples_per_s=simulate(plan).samples_per_s,
        cost=cost,
    )


def write_sweep(folder: Path, rows: Sequence[Row]) -> None:
    """sweep.csv, sweep.svg, and plans/NAME.json."""
    from p2bw.compiler.plot import draw_sweep

    text = io.StringIO()
    records = [row.to_json() for row in rows]
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_file(folder / "sweep.csv", text.getvalue())
    write_file(folder / "sweep.svg", draw_sweep(rows))
    for row in rows:
        if row.plan is not None:
            write_file(folder / "plans" / f"{row.point.name}.json", row.plan.to_json())
