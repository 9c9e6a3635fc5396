"""The command that runs a plan's stages on the one device at hand."""

from typing import TYPE_CHECKING, Annotated

import typer

from p2bw.app import (
    Artifact,
    Debug,
    Json,
    ModelPath,
    Quiet,
    app,
    parse_counts,
    print_json,
    reporting,
)

if TYPE_CHECKING:
    from p2bw.measure.rehearsal import Rehearsal


@app.command("rehearse")
def rehearse_command(
    artifact: Artifact,
    stages: Annotated[
        str | None, typer.Option(help="Only these: 0,3.  [all]", metavar="K,...")
    ] = None,
    microbatches: Annotated[
        int, typer.Option(help="How many are timed, at least, in each stage.", metavar="N")
    ] = 16,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.  [cuda where there is a GPU]")
    ] = None,
    threads: Annotated[int, typer.Option(help="On the CPU, as each rank will have.")] = 1,
    model: ModelPath = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run each stage by itself on the device at hand: predicted and measured time and memory."""
    with reporting(debug):
        from p2bw.measure.rehearsal import rehearse
        from p2bw.progress import progress

        with progress(quiet) as say:
            result = rehearse(
                artifact,
                stages=None if stages is None else parse_counts("--stages", stages, "0,3"),
                microbatches=microbatches,
                model=model,
                device=device,
                threads=threads,
                progress=say,
            )
        if as_json:
            print_json(result.to_json())
        elif not quiet:
            print_rehearsal(result)


def print_rehearsal(result: "Rehearsal") -> None:
    """A line for each stage and figure: predicted, measured, and how far off."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from p2bw.compiler import units
    from p2bw.tables import console

    out = console()
    out.print(escape(f"on {result.device}; planned for {result.planned_for}"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("stage", "what", "predicted", "measured", "off"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for stage in result.stages:
        rows = (
            ("forward", stage.forward_s, units.seconds),
            ("backward", stage.backward_s, units.seconds),
            ("norm", stage.norm_s, units.seconds),
            ("update", stage.update_s, units.seconds),
            ("microbatch", stage.compute_s, units.seconds),
            ("memory", stage.peak_bytes, units.data),
        )
        for what, pair, show in rows:
            if what == "norm" and not (pair.predicted or pair.measured):
                continue  # gradients are not clipped
            name = str(stage.stage) if what == "forward" else ""
            cells = (name, what, show(pair.predicted), show(pair.measured), f"{pair.error:+.1%}")
            table.add_row(*map(escape, cells))
    out.print(table)
    period, rate = result.period_s, result.samples_per_s
    out.print(escape(
        f"simulated   {units.seconds(period.predicted)} per microbatch with the planned times, "
        f"{units.seconds(period.measured)} with the measured ones: {rate.predicted:.2f} and "
        f"{rate.measured:.2f} samples/s ({rate.error:+.1%})"
    ))  # fmt: skip
