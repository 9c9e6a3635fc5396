"""The command that simulates: it parses, calls and prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from p2bw.app import Artifact, Debug, Json, Quiet, app, print_json, reporting

if TYPE_CHECKING:
    from p2bw.compiler.simulation.job import StageTimes


class Options(TypedDict):
    """How a simulation differs from the plan."""

    jitter: float
    seed: int
    stragglers: dict[int, float]
    times: list[StageTimes] | None


@app.command("simulate")
def simulate_command(
    artifact: Artifact,
    batches: Annotated[
        int, typer.Option(help="Updates of the run whose start, end and trace are simulated.")
    ] = 10,
    straggler: Annotated[
        list[str] | None,
        typer.Option(help="A rank that is slower than planned: 3:1.3x.", metavar="RANK:FACTORx"),
    ] = None,
    jitter: Annotated[
        str, typer.Option(help="How much each computation may be faster or slower: 5%.")
    ] = "0",
    seed: Annotated[int, typer.Option(help="Of the jitter.")] = 0,
    times: Annotated[
        Path | None,
        typer.Option(
            help="Measured times: what `p2bw rehearse DIR --json` printed.  [the plan's]",
            metavar="FILE",
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write all that happens, for ui.perfetto.dev.")
    ] = None,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Draw what each stage does, from the start on.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Simulate an artifact's schedule on its topology: steady state, waits, links, memory."""
    with reporting(debug):
        from p2bw.compiler.plan import read_plan
        from p2bw.compiler.simulation.job import make_job
        from p2bw.compiler.simulation.simulate import simulate
        from p2bw.compiler.simulation.times import read_times
        from p2bw.compiler.units import several
        from p2bw.progress import progress
        from p2bw.simulation_tables import print_simulation, print_timeline

        plan = read_plan(artifact)
        options = Options(
            jitter=parse_jitter(jitter),
            seed=seed,
            stragglers=parse_stragglers(straggler or []),
            times=read_times(times, plan) if times is not None else None,
        )
        with progress(quiet) as say:
            say(f"simulating {several(plan.depth, 'stage')} x {several(plan.width, 'replica')}")
            found = simulate(plan, batches=batches, trace=trace, **options)
        if as_json:
            print_json(found.to_json())
        elif not quiet:
            print_simulation(found)
            if timeline:
                print_timeline(make_job(plan, batches=batches, **options))


def parse_stragglers(texts: list[str]) -> dict[int, float]:
    """['3:1.3x'] -> {3: 1.3}."""
    from p2bw.contract.errors import UsageError

    found = {}
    for text in texts:
        match = re.fullmatch(r"(\d+):(\d+(?:\.\d+)?)x?", text.strip(), re.ASCII)
        if match is None:
            raise UsageError(f"--straggler {text}: give a rank and its factor, like 3:1.3x")
        found[int(match[1])] = float(match[2])
    return found


def parse_jitter(text: str) -> float:
    """'5%' -> 0.05, as is '0.05'."""
    from p2bw.compiler.units import parse_share

    return parse_share("--jitter", text, "5% or 0.05")
