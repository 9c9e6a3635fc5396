"""Commands that train: each parses, calls and prints. Heavy imports wait until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from p2bw.app import Artifact, Debug, Json, ModelPath, Quiet, app, print_json, reporting


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
    with reporting(debug):
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
            print_json(result)
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
    out: Annotated[
        Path | None, typer.Option(help="Write safetensors files to this folder.", metavar="DIR")
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(help="Write the artifact's stages as ONNX files to it.", metavar="DIR"),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="With --onnx: these weights, not the model file's.", metavar="FILES"),
    ] = None,
    model: ModelPath = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint's weights by the names of the user's own model, or stages as ONNX."""
    with reporting(debug):
        from p2bw.contract.errors import UsageError
        from p2bw.export import export
        from p2bw.progress import progress
        from p2bw.tables import print_export, print_stages

        if (out is None) == (onnx is None):
            raise UsageError(
                "export writes weights to --out DIR, or stages to --onnx DIR: give one"
            )
        if onnx is not None:
            from p2bw.compiler.onnx.stages import export_onnx

            with progress(quiet) as say:
                stages = export_onnx(source, out=onnx, model=model, weights=weights, progress=say)
            if as_json:
                print_json(stages.to_json())
            elif not quiet:
                print_stages(stages, str(onnx))
            return
        assert out is not None
        if weights is not None:
            raise UsageError("--weights goes with --onnx; --out writes a checkpoint's own")
        with progress(quiet) as say:
            exported = export(source, out=out, model=model, progress=say)
        if as_json:
            print_json(exported.to_json())
        elif not quiet:
            print_export(exported, str(out))
