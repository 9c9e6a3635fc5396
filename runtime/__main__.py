"""One rank: torchrun --nproc-per-node N -m p2bw.runtime ARTIFACT --steps N."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

from p2bw.contract.errors import P2BWError, PeerError, ResourceError
from p2bw.contract.job import Job, Options
from p2bw.runtime.failure import Watchdog, fail
from p2bw.runtime.place import connect, find_place, within
from p2bw.runtime.rank import run_rank


def main() -> int:
    job, options = _parse()
    try:
        place = find_place(job)
        run = connect(place, options.timeout_s)
        watchdog = Watchdog(place, connect(place, options.timeout_s), options.timeout_s)
    except P2BWError as error:
        print(f"p2bw: {error}", file=sys.stderr)
        return error.exit_code
    try:
        run_rank(job, options, place, run, watchdog)
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = ResourceError(f"out of GPU memory: {error}")
        elif isinstance(error, PeerError):
            error = watchdog.blame(error)
        fail(error, place, within(run, place.attempt))
    return 0


def _parse() -> tuple[Job, Options]:
    parser = argparse.ArgumentParser(prog="p2bw.runtime", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="weight updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", help="2bw, flush, gpipe or stash; the plan's by default")
    parser.add_argument("--microbatches", type=int, help="per update; the plan's by default")
    parser.add_argument("--model", type=Path, help="where the model file is now")
    parser.add_argument("--result", type=Path, metavar="FILE", help="write losses and speed")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--timeout", type=float, dest="timeout_s", metavar="S", default=120)
    parser.add_argument("--threads", type=int, help="of each rank; torchrun's default is 1")
    parser.add_argument("--clip-norm", type=float, metavar="X", help="of a batch's gradients")
    parser.add_argument("--weights", type=Path, metavar="PATH", help="safetensors to start with")
    parser.add_argument("--init", choices=["auto", "whole", "modules"], default="auto")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where to keep checkpoints")
    parser.add_argument("--checkpoint-every", type=int, metavar="N", help="updates")
    parser.add_argument("--keep", type=int, metavar="K", default=2, help="so many checkpoints")
    parser.add_argument("--resume", metavar="last|DIR", help="go on from a checkpoint")
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="a line of JSON per update")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a Perfetto trace of the run")
    parser.add_argument("--quiet", action="store_true", help="no lines of progress")
    given = parser.parse_args()
    job = Job(**{field.name: getattr(given, field.name) for field in fields(Job)})
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    return job, options


if __name__ == "__main__":
    sys.exit(main())
