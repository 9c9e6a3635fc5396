"""Commands that plan: each parses, calls and prints. Heavy imports wait until it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2bw.app import (
    Artifact,
    Autocast,
    Debug,
    Gap,
    Json,
    Limit,
    ModelPath,
    Quiet,
    Settings,
    app,
    fail,
    print_json,
    reporting,
    split_model,
)

if TYPE_CHECKING:
    from p2bw.compiler.plan import Plan


@app.command("compile")
def compile_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL[:FACTORY]", help="The model file, or an ONNX file.")
    ],
    gpus: Annotated[int | None, typer.Option(help="How many devices to plan for.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the artifact.  [build/MODEL]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Kind of device: a100-80, h100 ...")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of each device, if not the preset's: 12GiB.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="p3.16xlarge[:nodes], 8xv100-16+4xa100-40, a .toml file, or nvidia-smi's .txt."
        ),
    ] = None,
    schedule: Annotated[str, typer.Option(help="2bw, flush, gpipe or stash.")] = "2bw",
    depth: Annotated[int | None, typer.Option(help="Stages.  [searched]")] = None,
    width: Annotated[int | None, typer.Option(help="Replicas of the pipeline.  [searched]")] = None,
    microbatch: Annotated[
        int | None, typer.Option(help="Samples in one microbatch.  [searched]")
    ] = None,
    microbatches: Annotated[
        int | None, typer.Option(help="Microbatches per weight update.  [depth]")
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Limit the norm of each update's gradients.", metavar="X")
    ] = None,
    autocast: Autocast = None,
    recompute: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    settings: Settings = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="Have these modules in that stage.", metavar="GLOB=STAGE"),
    ] = None,
    together: Annotated[
        list[str] | None,
        typer.Option(help="Have these modules in one stage.", metavar="GLOB,..."),
    ] = None,
    apart: Annotated[
        list[str] | None,
        typer.Option(help="Have no stage with some of both modules.", metavar="GLOB,GLOB"),
    ] = None,
    never_cut: Annotated[
        list[str] | None,
        typer.Option(help="Keep each of these modules whole: 'h.*.attn'.", metavar="GLOB"),
    ] = None,
    cut_after: Annotated[
        list[str] | None,
        typer.Option(help="Cut behind this module, and nowhere else.", metavar="MODULE"),
    ] = None,
    opaque_cost: Annotated[
        list[str] | None,
        typer.Option(
            help="What one sample costs in a module that cannot be traced.",
            metavar="GLOB:forward=FLOPS,backward=FLOPS,saved=BYTES",
        ),
    ] = None,
    gap: Gap = "0.1%",
    limit: Limit = None,
    dump_passes: Annotated[
        Path | None, typer.Option(help="Write the program after each pass to this folder.")
    ] = None,
    problem: Annotated[
        Path | None,
        typer.Option(help="Write the placement problem here too, for solve.", metavar="FILE"),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Measured times instead of estimates: a file of profile.", metavar="FILE"
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Trace MODEL, place it on the devices and write readable stage code."""
    with reporting(debug):
        from p2bw.compiler.driver import compile_model
        from p2bw.compiler.opaque_costs import parse_declared
        from p2bw.compiler.rules import parse_rules
        from p2bw.modelfile.load import parse_settings
        from p2bw.progress import progress, stopping
        from p2bw.tables import print_plan, print_seconds

        path, factory = split_model(model)
        with progress(quiet) as say:
            compiled = compile_model(
                path,
                factory=factory,
                settings=parse_settings(settings or []),
                gpus=gpus,
                out=out,
                device=device,
                memory=memory,
                cluster=cluster,
                schedule=schedule,
                depth=depth,
                width=width,
                microbatch=microbatch,
                microbatches=microbatches,
                clip_norm=clip_norm,
                autocast=autocast,
                recompute=recompute,
                rules=parse_rules(
                    pin or (), together or (), apart or (), never_cut or (), cut_after or ()
                ),
                opaque_costs=parse_declared(opaque_cost or ()),
                gap=gap,
                stop=stopping(limit, say),
                dump_passes=dump_passes,
                problem=problem,
                profile=profile,
                progress=say,
            )
        if as_json:
            plan = compiled.plan.to_data()
            extra = {"artifact": str(compiled.artifact), "seconds": dict(compiled.seconds)}
            print_json({**plan, **extra})
        elif not quiet:
            print_plan(compiled.plan, str(compiled.artifact))
            print_seconds(compiled.seconds)


@app.command("verify")
def verify_command(
    artifact: Artifact,
    model: ModelPath = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run all stages in one process against the original model: loss and every gradient."""
    with reporting(debug):
        from p2bw.compiler.verify import verify
        from p2bw.progress import progress
        from p2bw.tables import print_verification

        with progress(quiet) as say:
            say("running the original model and the stages")
            result = verify(artifact, model=model)
        if as_json:
            print_json(result.to_json())
        elif not quiet:
            print_verification(result)
        if not result.ok:
            fail(f"{artifact} does not compute what the model computes", 7)


@app.command("show")
def show_command(
    artifact: Artifact,
    stage: Annotated[
        int | None, typer.Option(help="Print the code of this stage.", metavar="K")
    ] = None,
    schedule: Annotated[
        bool, typer.Option("--schedule", help="Print what each stage does in three updates.")
    ] = False,
    graph: Annotated[
        str | None,
        typer.Option(help="Print the stages as a graph in this language.", metavar="mermaid|dot"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the plan of an artifact, the code of one stage, the schedule, or the graph."""
    with reporting(debug):
        from p2bw.compiler.plan import read_plan
        from p2bw.contract.errors import UsageError
        from p2bw.tables import print_plan

        plan = read_plan(artifact)
        if stage is not None:
            if not 0 <= stage < plan.depth:
                raise UsageError(f"{artifact} has stages 0 to {plan.depth - 1}, not {stage}")
            code = (artifact / "stages" / f"stage_{stage}.py").read_text(encoding="utf-8")
            if as_json:
                print_json({"stage": stage, "code": code})
            else:
                typer.echo(code, nl=False)
        elif schedule:
            _show_schedule(artifact, plan, as_json)
        elif graph is not None:
            from p2bw.compiler.drawing import draw
            from p2bw.compiler.problem import problem_of
            from p2bw.graph import LANGUAGES

            if graph not in LANGUAGES:
                raise UsageError(f"--graph {graph}: give {' or '.join(LANGUAGES)}")
            text = LANGUAGES[graph](draw(plan, problem_of(artifact)))
            if as_json:
                print_json({"graph": graph, "text": text})
            else:
                typer.echo(text, nl=False)
        elif as_json:
            print_json(plan.to_data())
        elif not quiet:
            print_plan(plan, str(artifact))


def _show_schedule(artifact: Path, plan: "Plan", as_json: bool) -> None:
    from p2bw.contract.actions import show
    from p2bw.contract.plan import read_plan as read_for_run
    from p2bw.contract.schedule import make_pipeline

    clipped = plan.clip_norm is not None
    pipeline = make_pipeline(read_for_run(artifact), batches=3, clipped=clipped)
    lines = show(pipeline).splitlines()
    if as_json:
        stages = [line.partition(": ")[2].split() for line in lines]
        print_json({"schedule": plan.schedule, "stages": stages})
    else:
        typer.echo("\n".join(lines))


@app.command("solve")
def solve_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A placement problem.")],
    stages: Annotated[
        int | None,
        typer.Option(help="How many stages; per-stage: workers.  [searched, or the file's]"),
    ] = None,
    cpus: Annotated[
        int, typer.Option(help="CPUs that may be stages too, if the file has their times.")
    ] = 0,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="Bytes per second between stages, for a PipeDream profile.  [1e9]"),
    ] = None,
    replication: Annotated[
        str, typer.Option(help="uniform or per-stage: replicas where they pay.")
    ] = "uniform",
    memory: Annotated[
        str | None, typer.Option(help="Memory of each device, if not the file's: 12GiB.")
    ] = None,
    gap: Gap = "0",
    limit: Limit = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Place the blocks of a problem file on stages, with a proof."""
    with reporting(debug):
        from p2bw.compiler.devices import parse_bytes
        from p2bw.compiler.solve import solve_file
        from p2bw.progress import progress, stopping
        from p2bw.tables import print_solution

        with progress(quiet) as say:
            solution = solve_file(
                file,
                stages=stages,
                cpus=cpus,
                replication=replication,
                bandwidth=bandwidth,
                memory=None if memory is None else parse_bytes(memory),
                gap=gap,
                stop=stopping(limit, say),
                progress=say,
            )
        if as_json:
            print_json(solution.to_json())
        elif not quiet:
            print_solution(solution)


@app.command("explain")
def explain_command(
    path: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="An artifact, or a placement problem.")
    ],
    depth: Annotated[int | None, typer.Option(help="Solve for so many stages only.")] = None,
    width: Annotated[int | None, typer.Option(help="Solve for so many replicas only.")] = None,
    recompute: Annotated[
        str | None, typer.Option(help="auto, always or never.  [the plan's, or auto]")
    ] = None,
    limit: Limit = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say which limits bind, what moving a block would cost, and what one more GB would buy."""
    with reporting(debug):
        from p2bw.compiler.explanation import explain_file
        from p2bw.compiler.placement.cures import NoPlanError
        from p2bw.explanation import print_explanation
        from p2bw.progress import progress, stopping

        try:
            with progress(quiet) as say:
                found = explain_file(
                    path,
                    depth=depth,
                    width=width,
                    recompute=recompute,
                    stop=stopping(limit, say),
                    progress=say,
                )
        except NoPlanError as error:
            if as_json:
                print_json(error.to_json())
            raise
        if as_json:
            print_json(found.to_json())
        elif not quiet:
            print_explanation(found)
