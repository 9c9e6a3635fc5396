"""What `p2bw simulate` prints on stdout when a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from p2bw.compiler import units
from p2bw.tables import console

if TYPE_CHECKING:
    from p2bw.compiler.simulation.job import Job
    from p2bw.compiler.simulation.result import DeviceUse, Simulation

MOST_DEVICES = 64
MOST_LINKS = 3
WIDTH = 100  # of the timeline, where the output has no width of its own
_WAITS = {
    "activation": "activations",
    "gradient": "gradients",
    "replicas": "replicas",
    "tied": "tied weights",
    "norms": "norm",
    "norm": "norm",
    "loss": "loss",
}


def print_simulation(found: Simulation) -> None:
    out = console()
    out.print(
        escape(
            f"{units.several(found.depth, 'stage')} x {units.several(found.width, 'replica')}, "
            f"{found.schedule}, {units.several(found.microbatches, 'microbatch')} per update"
        )
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("stage", "ranks", "computes", "waits for", "in flight", "peak memory", "planned"):
        table.add_column(name, justify="left" if name in ("ranks", "waits for") else "right")
    for device in found.devices[:MOST_DEVICES]:
        table.add_row(*map(escape, _row(device)))
    out.print(table)
    if len(found.devices) > MOST_DEVICES:
        out.print(f"The first {MOST_DEVICES} of {len(found.devices)} rows; --json has all.")
    for line in _summary(found):
        out.print(escape(line))


def _row(device: DeviceUse) -> tuple[str, ...]:
    shares: dict[str, float] = {}
    for what, share in device.waits.items():
        shares[_WAITS[what]] = shares.get(_WAITS[what], 0.0) + share
    waits = [f"{what} {100 * share:.1f} %" for what, share in shares.items() if share >= 5e-4]
    return (
        str(device.stage),
        units.ranges(sorted(device.ranks)),
        units.percent(device.busy),
        ", ".join(waits),
        str(device.in_flight),
        f"{units.data(device.peak_bytes)} {100 * device.peak_bytes / device.limit_bytes:3.0f}%",
        units.data(device.planned_bytes),
    )


def _summary(found: Simulation) -> list[str]:
    cycle = found.cycle_batches
    steady = (
        f"repeats exactly every {'update' if cycle == 1 else f'{cycle} updates'}"
        if cycle
        else "a mean"
    )
    busiest = [link for link in found.links if link.busy >= 5e-4][:MOST_LINKS]
    links = [
        f"{link.name}{f' and {link.count - 1} like it' if link.count > 1 else ''} "
        f"{units.percent(link.busy)}"
        for link in busiest
    ]
    return [
        f"period      {units.seconds(found.period_s)} per microbatch, "
        f"{found.samples_per_s:.4g} samples/s, utilisation {units.percent(found.utilisation)}; "
        f"{steady}",
        f"planned     {units.seconds(found.planned_period_s)}: simulated takes "
        f"{100 * (found.ratio - 1):+.1f} %",
        f"run         {units.several(found.batches, 'update')} in {units.seconds(found.total_s)}, "
        f"the first after {units.seconds(found.start_s)}, {units.seconds(found.drain_s)} to drain",
        f"links       {', '.join(links) or 'idle'}",
    ]


def print_timeline(job: Job) -> None:
    from p2bw.compiler.simulation.timeline import LEGEND, draw_timeline

    out = console()
    margin = len(str(job.pipe.depth - 1)) + 1
    width = min(out.width, WIDTH) - margin
    for stage, line in enumerate(draw_timeline(job, width)):
        out.print(escape(f"{stage:>{margin - 1}} {line}"))
    out.print(LEGEND)
