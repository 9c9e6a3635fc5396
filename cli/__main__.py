"""The command line: parse, call, print, exit code. Heavy imports wait until a command runs."""

import json
import tomllib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from p2bw import __version__

app = typer.Typer(
    name="p2bw",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile a PyTorch model into a placed pipeline, and train it under PipeDream-2BW.",
)

Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Limit = Annotated[
    float | None,
    typer.Option(help="Seconds that the search may take; the best plan so far is kept.  [none]"),
]
Gap = Annotated[
    str, typer.Option(help="Stop when the plan is proven to be this near to the fastest; 0: exact.")
]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact of compile.")]
ModelPath = Annotated[
    Path | None, typer.Option("--model", help="The model file, if it has moved.", metavar="FILE")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"p2bw {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    context.default_map = _defaults(Path("p2bw.toml"))


def _defaults(path: Path) -> dict[str, dict[str, Any]]:
    """Options from p2bw.toml: one table for each command, its keys the long options."""
    if not path.is_file():
        return {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        _fail(f"{path} is not valid TOML: {error}", 6)
    group = typer.main.get_command(app)
    commands = getattr(group, "commands", {})
    defaults: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        if name not in commands or not isinstance(table, dict):
            _fail(f"{path}: {name!r} is no table of a command ({', '.join(commands)})", 6)
        options = {
            option.removeprefix("--"): parameter.name
            for parameter in commands[name].params
            for option in parameter.opts
        }
        unknown = [key for key in table if key not in options]
        if unknown:
            _fail(f"{path}: [{name}] has no option {unknown[0]!r}", 6)
        defaults[name] = {options[key]: value for key, value in table.items()}
    return defaults


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"p2bw: {message}", err=True)
    raise SystemExit(code)


@contextmanager
def _reporting(debug: bool) -> Iterator[None]:
    """One clear message and the right exit code, whatever goes wrong."""
    from p2bw.contract.errors import P2BWError

    try:
        yield
    except P2BWError as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("out of memory", 8)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        _fail(
            f"this is a bug of p2bw: {type(error).__name__}: {error}\n"
            "Run the command again with --debug and report what it prints.",
            1,
        )


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@app.command("compile")
def compile_command(
    model: Annotated[str, typer.Argument(metavar="MODEL[:FACTORY]", help="The model file.")],
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
    autocast: Annotated[
        str | None, typer.Option(help="bf16: forward and loss run under torch.autocast.")
    ] = None,
    recompute: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An argument of the factory."),
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
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Trace MODEL, place it on the devices and write readable stage code."""
    with _reporting(debug):
        from p2bw.compiler.driver import compile_model
        from p2bw.modelfile.load import parse_settings
        from p2bw.progress import progress, stopping
        from p2bw.tables import print_plan, print_seconds

        path, _, factory = model.partition(":")
        with progress(quiet) as say:
            compiled = compile_model(
                path,
                factory=factory or "model",
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
                gap=gap,
                stop=stopping(limit, say),
                dump_passes=dump_passes,
                problem=problem,
                progress=say,
            )
        if as_json:
            plan = compiled.plan.model_dump(mode="json", by_alias=True)
            extra = {"artifact": str(compiled.artifact), "seconds": dict(compiled.seconds)}
            _print_json({**plan, **extra})
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
    with _reporting(debug):
        from p2bw.compiler.verify import verify
        from p2bw.progress import progress
        from p2bw.tables import print_verification

        with progress(quiet) as say:
            say("running the original model and the stages")
            result = verify(artifact, model=model)
        if as_json:
            _print_json(result.to_json())
        elif not quiet:
            print_verification(result)
        if not result.ok:
            _fail(f"{artifact} does not compute what the model computes", 7)


@app.command("run")
def run_command(
    artifact: Artifact,
    steps: Annotated[int, typer.Option(help="Weight updates.")],
    seed: Annotated[int, typer.Option(help="Of the weights, the data and dropout.")] = 0,
    schedule: Annotated[
        str | None, typer.Option(help="2bw, flush, gpipe or stash.  [the plan's]")
    ] = None,
    microbatches: Annotated[
        int | None, typer.Option(help="Microbatches per weight update.  [the plan's]")
    ] = None,
    clip_norm: Annotated[
        float | None,
        typer.Option(
            help="Limit the norm of each update's gradients; inf: only record it.  [the plan's]",
            metavar="X",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start with these safetensors of the whole model, a file or a folder.",
            metavar="PATH",
        ),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="How the model's own code makes the first weights: of the whole model on each "
            "rank, or just of its stage's modules; auto goes by the hosts' memory.",
            metavar="auto|whole|modules",
        ),
    ] = "auto",
    save: Annotated[
        Path | None, typer.Option(help="Write the trained weights to this folder.", metavar="DIR")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of checkpoints; one is made at the end.  [DIR/checkpoints]", metavar="DIR"
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Make a checkpoint after so many updates.", metavar="N")
    ] = None,
    keep: Annotated[int, typer.Option(help="How many checkpoints are kept.")] = 2,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on from a checkpoint, or from the last.", metavar="last|DIR"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.  [cuda where there are enough GPUs]")
    ] = None,
    model: ModelPath = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds in which nothing moves that end the run.", metavar="S")
    ] = 120,
    max_restarts: Annotated[
        int, typer.Option(help="So often go on from the last checkpoint after a failure.")
    ] = 0,
    slurm: Annotated[
        Path | None, typer.Option(help="Only write a Slurm batch script.", metavar="FILE")
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(help="A line of JSON per update.  [DIR/metrics.jsonl]", metavar="FILE"),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="The same for TensorBoard.", metavar="DIR")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="What each rank did and when, for ui.perfetto.dev.", metavar="FILE"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an artifact on this machine, one process per device (prints its torchrun line)."""
    with _reporting(debug):
        from p2bw.launch import run
        from p2bw.tables import print_run

        result = run(
            artifact,
            steps=steps,
            seed=seed,
            schedule=schedule,
            microbatches=microbatches,
            clip_norm=clip_norm,
            weights=weights,
            init=init,
            save=save,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            keep=keep,
            resume=resume,
            device=device,
            model=model,
            timeout_s=timeout,
            max_restarts=max_restarts,
            slurm=slurm,
            metrics=metrics,
            tensorboard=tensorboard,
            trace=trace,
            quiet=quiet,
        )
        if as_json:
            _print_json(result)
        elif slurm is not None:
            typer.echo(f"sbatch {slurm}")
        elif not quiet:
            print_run(result)


@app.command("export")
def export_command(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A checkpoint, a folder of them, or an artifact."),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the files.", metavar="DIR")],
    model: ModelPath = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint's weights as safetensors files by the names of the user's own model."""
    with _reporting(debug):
        from p2bw.export import export
        from p2bw.progress import progress
        from p2bw.tables import print_export

        with progress(quiet) as say:
            exported = export(source, out=out, model=model, progress=say)
        if as_json:
            _print_json(exported.to_json())
        elif not quiet:
            print_export(exported, str(out))


@app.command("show")
def show_command(
    artifact: Artifact,
    stage: Annotated[
        int | None, typer.Option(help="Print the code of this stage.", metavar="K")
    ] = None,
    schedule: Annotated[
        bool, typer.Option("--schedule", help="Print what each stage does in three updates.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the plan of an artifact, the code of one stage, or the schedule."""
    with _reporting(debug):
        from p2bw.compiler.plan import read_plan
        from p2bw.contract.errors import UsageError
        from p2bw.tables import print_plan

        plan = read_plan(artifact)
        if stage is not None:
            if not 0 <= stage < plan.depth:
                raise UsageError(f"{artifact} has stages 0 to {plan.depth - 1}, not {stage}")
            code = (artifact / "stages" / f"stage_{stage}.py").read_text(encoding="utf-8")
            if as_json:
                _print_json({"stage": stage, "code": code})
            else:
                typer.echo(code, nl=False)
        elif schedule:
            from p2bw.contract.plan import read_plan as read_for_run
            from p2bw.contract.schedule import make_pipeline, show

            clipped = plan.clip_norm is not None
            pipeline = make_pipeline(read_for_run(artifact), batches=3, clipped=clipped)
            lines = show(pipeline).splitlines()
            if as_json:
                stages = [line.partition(": ")[2].split() for line in lines]
                _print_json({"schedule": plan.schedule, "stages": stages})
            else:
                typer.echo("\n".join(lines))
        elif as_json:
            _print_json(plan.model_dump(mode="json", by_alias=True))
        elif not quiet:
            print_plan(plan, str(artifact))


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
    with _reporting(debug):
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
            _print_json(solution.to_json())
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
    with _reporting(debug):
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
                _print_json(error.to_json())
            raise
        if as_json:
            _print_json(found.to_json())
        elif not quiet:
            print_explanation(found)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
