"""The command that compares a run with its plan, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2bw.app import Artifact, Debug, Json, Quiet, app, print_json, reporting

if TYPE_CHECKING:
    from p2bw.compiler.comparison import Comparison, Pair


@app.command("report")
def report_command(
    artifact: Artifact,
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="What `p2bw run --trace` has written.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the trace of a run with the plan, per stage, and name the largest difference."""
    with reporting(debug):
        from p2bw.compiler.comparison import compare
        from p2bw.compiler.plan import read_plan

        found = compare(read_plan(artifact), trace)
        if as_json:
            print_json(found.to_json())
        elif not quiet:
            print_comparison(found)


def print_comparison(found: Comparison) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from p2bw.compiler import units
    from p2bw.tables import console

    out = console()
    out.print(
        f"{found.schedule}, {units.several(found.microbatches, 'microbatch')} per update; medians "
        f"of {units.several(found.updates, 'update')}, planned > measured"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    clipped = any(stage.norm_s.planned or stage.norm_s.measured for stage in found.stages)
    norm = ("norm",) if clipped else ()
    for name in ("stage", "ranks", "forward", "backward", *norm, "update", "waits"):
        table.add_column(name, justify="left" if name == "ranks" else "right")
    for stage in found.stages:
        waits = f"{units.percent(stage.waiting.planned)} > {units.percent(stage.waiting.measured)}"
        table.add_row(
            str(stage.stage),
            escape(units.ranges(sorted(stage.ranks))),
            *map(_pair, (stage.forward_s, stage.backward_s)),
            *((_pair(stage.norm_s),) if clipped else ()),
            _pair(stage.update_s),
            waits,
        )
    out.print(table)
    for line in _summary(found):
        out.print(escape(line))


def _pair(pair: Pair) -> str:
    from p2bw.compiler import units

    change = "" if pair.ratio is None else f" ({_change(pair.ratio)})"
    return f"{units.seconds(pair.planned)} > {units.seconds(pair.measured)}{change}"


def _change(ratio: float) -> str:
    percent = round(100 * (ratio - 1))
    return f"{ratio:.3g}x" if percent >= 100 else f"{percent:+d} %"


def _summary(found: Comparison) -> list[str]:
    from p2bw.compiler import units

    planned, replayed, measured = map(
        units.seconds,
        (found.planned_period_s, found.replayed_period_s, found.measured_period_s),
    )
    ratio = found.measured_period_s / found.planned_period_s
    return [
        f"period      {planned} simulated with the plan's times, {measured} measured "
        f"({_change(ratio)})",
        f"replayed    {replayed} simulated with the measured times; what the run takes beyond "
        f"that is messages, waiting and Python",
        f"largest     {_largest(found)}",
    ]


def _largest(found: Comparison) -> str:
    from p2bw.compiler import units

    largest = found.largest
    if abs(largest.seconds) < 0.001 * found.measured_period_s:
        return "no difference above 0.1 %"
    planned, measured = units.seconds(largest.planned_s), units.seconds(largest.measured_s)
    more = "longer" if largest.seconds > 0 else "shorter"
    by = f"{units.seconds(abs(largest.seconds))} {more} per microbatch"
    if largest.what == "waiting":
        return f"no stage's work: a microbatch takes {measured}, replayed {planned}: {by}"
    return f"the {largest.what} of stage {largest.stage}: {measured}, planned {planned}: {by}"
