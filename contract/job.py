"""What a run is asked to do, and the command line that says so to every rank."""

import argparse
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

_FLAGS = {"timeout_s": "--timeout"}  # those whose flag is not the field's own name


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained and how; it decides every number, and is the same on every rank."""

    artifact: Path
    steps: int
    seed: int = 0
    schedule: str | None = None  # the plan's
    microbatches: int | None = None  # per update; the plan's
    model: Path | None = None  # where the plan says, or the artifact's copy
    clip_norm: float | None = None  # of the gradients of a whole batch; the plan's
    weights: Path | None = None  # safetensors to start with; the model file's own by default
    init: str = "auto"  # "whole" builds the model and slices it, "modules" only the stage's modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a job is run."""

    device: str | None = None  # "cpu" or "cuda"; None: cuda where every rank has a GPU of its own
    timeout_s: float = 120
    threads: int | None = None  # of each rank
    result: Path | None = None
    quiet: bool = False
    checkpoint: Path | None = None  # folder
    checkpoint_every: int | None = None  # updates
    keep: int = 2  # checkpoints
    resume: str | None = None  # "last", or a checkpoint's folder
    metrics: Path | None = None
    tensorboard: Path | None = None
    trace: Path | None = None


def command(job: Job, options: Options, ranks: int | str, max_restarts: int = 0) -> list[str]:
    """The torchrun line of a job on one machine."""
    restarts = ["--max-restarts", str(max_restarts)] if max_restarts else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *restarts]
    return [*launcher, "--nproc-per-node", str(ranks), *arguments(job, options)]


def arguments(job: Job, options: Options) -> list[str]:
    """What torchrun is to start: whatever differs from the defaults, as flags."""
    default = asdict(Job(artifact=job.artifact, steps=job.steps)) | asdict(Options())
    given = {
        name: value
        for name, value in (asdict(job) | asdict(options)).items()
        if value != default[name] and value is not True
    }
    flags = {_FLAGS.get(name, "--" + name.replace("_", "-")): v for name, v in given.items()}
    return [
        *("-m", "p2bw.runtime", str(job.artifact), "--steps", str(job.steps)),
        *(str(part) for flag in flags.items() for part in flag),
        *(["--quiet"] if options.quiet else []),
    ]


def parse(description: str | None) -> tuple[Job, Options]:
    """The job and options of this process's command line, as `arguments` writes them."""
    parser = argparse.ArgumentParser(
        prog="p2bw.runtime",
        description=description,
        argument_default=argparse.SUPPRESS,  # those of Job and Options hold
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="weight updates")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--schedule", help="2bw, flush, gpipe or stash; the plan's by default")
    parser.add_argument("--microbatches", type=int, help="per update; the plan's by default")
    parser.add_argument("--model", type=Path, help="where the model file is now")
    parser.add_argument("--result", type=Path, metavar="FILE", help="write losses and speed")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--timeout", type=float, dest="timeout_s", metavar="S")
    parser.add_argument("--threads", type=int, help="of each rank; torchrun's default is 1")
    parser.add_argument("--clip-norm", type=float, metavar="X", help="of a batch's gradients")
    parser.add_argument("--weights", type=Path, metavar="PATH", help="safetensors to start with")
    parser.add_argument("--init", choices=["auto", "whole", "modules"])
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where to keep checkpoints")
    parser.add_argument("--checkpoint-every", type=int, metavar="N", help="updates")
    parser.add_argument("--keep", type=int, metavar="K", help="so many checkpoints")
    parser.add_argument("--resume", metavar="last|DIR", help="go on from a checkpoint")
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="a line of JSON per update")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a Perfetto trace of the run")
    parser.add_argument("--quiet", action="store_true", help="no lines of progress")
    given = vars(parser.parse_args())
    of_job = {field.name for field in fields(Job)}
    job = Job(**{name: value for name, value in given.items() if name in of_job})
    return job, Options(**{name: value for name, value in given.items() if name not in of_job})
