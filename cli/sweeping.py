"""The command that sweeps: it parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2bw.app import (
    Autocast,
    Debug,
    Gap,
    Json,
    Quiet,
    Settings,
    app,
    parse_counts,
    print_json,
    reporting,
    split_model,
)

if TYPE_CHECKING:
    from p2bw.compiler.sweep import Row


@app.command("sweep")
def sweep_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL[:FACTORY]", help="The model file, or an ONNX file.")
    ],
    gpus: Annotated[str, typer.Option(help="Numbers of devices: 4,8,16.")],
    device: Annotated[str, typer.Option(help="Kinds of device: v100-16,a100-80.")] = "",
    memory: Annotated[str, typer.Option(help="Memories of a device: 12GiB,16GiB.")] = "",
    cluster: Annotated[
        str | None, typer.Option(help="The cluster of which so many devices are taken.")
    ] = None,
    batch: Annotated[
        str, typer.Option(help="Samples per update, of all replicas together: 512,2048.  [any]")
    ] = "",
    schedule: Annotated[str, typer.Option(help="Of 2bw, flush, gpipe and stash.")] = "2bw",
    autocast: Autocast = None,
    recompute: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    settings: Settings = None,
    price: Annotated[
        list[str] | None,
        typer.Option(help="What an hour of a device costs: a100-80=4.1.", metavar="DEVICE=X"),
    ] = None,
    gap: Gap = "0.1%",
    out: Annotated[
        Path | None, typer.Option(help="A folder for sweep.csv, sweep.svg and every plan.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Plan MODEL for every combination: one table, and a plot, of speed, memory and cost."""
    with reporting(debug):
        from p2bw.compiler.sweep import sweep
        from p2bw.modelfile.load import parse_settings
        from p2bw.progress import progress

        path, factory = split_model(model)
        with progress(quiet) as say:
            rows = sweep(
                path,
                factory=factory,
                settings=parse_settings(settings or []),
                gpus=parse_counts("--gpus", gpus, "4,8,16"),
                device=_split(device),
                memory=_split(memory),
                cluster=cluster,
                batch=parse_counts("--batch", batch, "512,2048") if batch else (),
                schedule=_split(schedule),
                autocast=autocast,
                recompute=recompute,
                prices=parse_prices(price or []),
                gap=gap,
                out=out,
                progress=say,
            )
        if as_json:
            print_json([row.to_json() for row in rows])
        elif not quiet:
            print_sweep(rows, out)


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_prices(texts: list[str]) -> dict[str, float]:
    """['a100-80=4.1'] -> {'a100-80': 4.1}."""
    from p2bw.contract.errors import UsageError

    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name.strip().lower()] = float(value)
        except ValueError:
            raise UsageError(
                f"--price {text}: give a device and a number, like a100-80=4.1"
            ) from None
    return found


def print_sweep(rows: list[Row], out: Path | None) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from p2bw.tables import console

    priced = any(row.cost is not None for row in rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ("devices", "memory", "schedule", "batch", "stages x replicas", "microbatches")
    numbers = ("samples/s", "simulated", "used", "fullest", *(("cost/M",) if priced else ()))
    for name in (*columns, *numbers):
        left = name in ("devices", "schedule")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, _row(row, priced)))
    printer = console()
    printer.print(table)
    if any(stage.recompute for row in rows if row.plan for stage in row.plan.stages):
        printer.print("r: some stages compute their forward again, to keep less.")
    for row in rows:
        if row.plan is None:
            printer.print(escape(f"{row.point.name}: {row.reason}"), soft_wrap=True)
    if out is not None:
        printer.print(escape(f"sweep.csv, sweep.svg and plans/ are in {out}"))


def _row(row: Row, priced: bool) -> list[str]:
    from p2bw.compiler import units

    point, plan = row.point, row.plan
    asked = [point.devices, units.data(point.memory_bytes), point.schedule]
    if plan is None:
        batch = "any" if point.batch is None else str(point.batch)
        return [*asked, batch, "no plan", *[""] * (5 + priced)]
    again = " r" if any(stage.recompute for stage in plan.stages) else ""
    m = plan.microbatches_per_update
    simulated = row.simulated_samples_per_s
    return [
        *asked,
        str(plan.microbatch * m * plan.width),
        f"{plan.depth} x {plan.width}{again}",
        f"{m} of {plan.microbatch}",
        f"{plan.samples_per_s:.4g}",
        "" if simulated is None else f"{simulated:.4g}",
        units.percent(plan.utilisation),
        units.data(max(stage.memory.total for stage in plan.stages)),
        *([f"{row.cost:.4g}" if row.cost is not None else ""] if priced else []),
    ]
