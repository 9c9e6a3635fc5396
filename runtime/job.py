"""What a run is asked to do, and the command line that says so to every rank."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained and how; it decides every number, and is the same on every rank."""

    artifact: Path
    steps: int
    seed: int = 0
    schedule: str | None = None  # the plan's
    microbatches: int | None = None  # per update; the plan's
    model: Path | None = None  # where the plan says, or the artifact's copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a job is run."""

    device: str | None = None  # "cpu" or "cuda"; None: cuda where every rank has a GPU of its own
    timeout_s: float = 120
    threads: int | None = None  # of each rank
    save: Path | None = None
    result: Path | None = None
    quiet: bool = False


def command(job: Job, options: Options, ranks: int | str) -> list[str]:
    """The torchrun line of a job on one machine."""
    given: Mapping[str, object] = {
        "--steps": job.steps,
        "--seed": job.seed or None,
        "--schedule": job.schedule,
        "--microbatches": job.microbatches,
        "--model": job.model,
        "--device": options.device,
        "--timeout": options.timeout_s if options.timeout_s != Options().timeout_s else None,
        "--threads": options.threads,
        "--save": options.save,
        "--result": options.result,
    }
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "p2bw.runtime", str(job.artifact)),
        *(str(part) for flag in given.items() if flag[1] is not None for part in flag),
        *(["--quiet"] if options.quiet else []),
    ]
