"""The command that measures a model on the device at hand."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2bw.app import (
    Autocast,
    Debug,
    Json,
    Quiet,
    Settings,
    app,
    print_json,
    reporting,
    split_model,
)

if TYPE_CHECKING:
    from p2bw.compiler.measured import Profile


@app.command("profile")
def profile_command(
    model: Annotated[str, typer.Argument(metavar="MODEL[:FACTORY]", help="The model file.")],
    microbatch: Annotated[
        list[int] | None,
        typer.Option(help="Samples in one microbatch; may be given several times.  [1, 2, 4]"),
    ] = None,
    settings: Settings = None,
    autocast: Autocast = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the profile.  [build/MODEL.profile.json]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.  [cuda where there is a GPU]")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of each rank on the CPU, as in the run.")] = 1,
    processes: Annotated[
        int | None,
        typer.Option(help="Ranks that will share this machine's CPU.  [2, if there are the cores]"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew what was measured before.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure this machine's device and MODEL's blocks on it, for compile --profile."""
    with reporting(debug):
        from p2bw.compiler.artifact import check_file, write_file
        from p2bw.measure.driver import profile_model
        from p2bw.modelfile.load import parse_settings
        from p2bw.progress import progress

        path, factory = split_model(model)
        name = Path(path).stem + (f"_{factory}" if factory != "model" else "")
        out = out or Path("build", f"{name}.profile.json")
        check_file("--out", out)
        with progress(quiet) as say:
            profile = profile_model(
                path,
                factory=factory,
                settings=parse_settings(settings or []),
                microbatches=microbatch or (),
                autocast=autocast,
                device=device,
                threads=threads,
                processes=processes,
                fresh=fresh,
                progress=say,
            )
        write_file(out, profile.to_json())
        if as_json:
            print_json({**profile.model_dump(mode="json", by_alias=True), "profile": str(out)})
        elif not quiet:
            print_profile(profile, str(out))


def print_profile(profile: "Profile", file: str) -> None:
    """The device, each microbatch size against the whole model, and the blocks that take most."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from p2bw.compiler import units
    from p2bw.tables import console

    out, device = console(), profile.device
    processes = f"each of {device.processes} processes" if device.processes > 1 else "one process"
    rates = {m.dtype: m.flops_per_s for m in sorted(device.matmuls, key=lambda m: m.flops_per_s)}
    out.print(escape(
        f"{device.name}, {units.several(device.threads, 'thread')} in {processes}: "
        + ", ".join(f"{dtype} {units.count(rate)}FLOP/s" for dtype, rate in rates.items())
        + f", memory {units.data(device.bandwidth)}/s, {units.seconds(device.op_overhead_s)} an "
        "operator"
        + f", {units.seconds(device.runtime_s)} a microbatch for the runtime"
        * bool(device.runtime_s)
        + (
            f", {device.backend} {units.data(device.link)}/s, {units.seconds(device.latency_s)}"
            if device.link
            else ", no peer to send to"
        )
    ))  # fmt: skip
    for step in profile.steps:
        forward = sum(profile.kinds[kind].forward.median_s for kind in step.blocks.values())
        backward = sum(profile.kinds[kind].backward.median_s for kind in step.blocks.values())
        check = (
            f"{step.check.ratio:.3f} of the whole model's step{_doubt(step.check.ratio)}"
            if step.check
            else "layer by layer: the whole does not fit"
        )
        out.print(escape(
            f"microbatch {step.microbatch}: {units.several(len(step.blocks), 'block')} of "
            f"{units.several(len(set(step.blocks.values())), 'kind')}, forward "
            f"{units.seconds(forward)}, backward {units.seconds(backward)}, "
            f"{check}; data {units.seconds(step.feed_s)}"
        ))  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("block", "of its kind", "forward", "+-", "backward", "+-"):
        table.add_column(column, justify="left" if column == "block" else "right", no_wrap=True)
    for row in _longest(profile):
        table.add_row(*map(escape, row))
    out.print(table)
    out.print(escape(f"profile     {file}"))


def _doubt(ratio: float) -> str:
    if 0.9 < ratio < 1.1:
        return ""
    return " (far from 1: was something else running? --fresh measures again)"


def _longest(profile: "Profile", most: int = 12) -> list[tuple[str, ...]]:
    """The kinds that take most of the largest microbatch's time, with the first of their blocks."""
    from p2bw.compiler import units

    step = profile.steps[-1]
    members: dict[str, list[str]] = {}
    for block, kind in step.blocks.items():
        members.setdefault(kind, []).append(block)

    def total(kind: str) -> float:
        times = profile.kinds[kind]
        return len(members[kind]) * (times.forward.median_s + times.backward.median_s)

    rows = []
    for kind in sorted(members, key=lambda k: -total(k))[:most]:
        times = profile.kinds[kind]
        pairs = (times.forward, times.backward)
        cells = (units.seconds(s) for t in pairs for s in (t.median_s, t.spread_s))
        rows.append((members[kind][0], str(len(members[kind])), *cells))
    return rows
