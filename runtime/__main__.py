"""One rank: torchrun --nproc-per-node N -m p2bw.runtime ARTIFACT --steps N."""

import argparse
import os
import sys
import traceback
from dataclasses import fields
from pathlib import Path

import torch

from p2bw.runtime.errors import P2BWError, ResourceError
from p2bw.runtime.failure import record_failure
from p2bw.runtime.job import Job, Options
from p2bw.runtime.rank import Place, Store, connect, find_place, run_rank
from p2bw.runtime.transport import PeerError


def main() -> int:
    job, options = _parse()
    try:
        place = find_place(job)
        store = connect(place, options.timeout_s)
    except P2BWError as error:
        print(f"p2bw: {error}", file=sys.stderr)
        return error.exit_code
    try:
        run_rank(job, options, place, store)
    except torch.OutOfMemoryError as error:
        _fail(ResourceError(f"out of GPU memory: {error}"), place, store)
    except Exception as error:
        _fail(error, place, store)
    return 0


def _parse() -> tuple[Job, Options]:
    parser = argparse.ArgumentParser(prog="p2bw.runtime", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="weight updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", help="2bw or flush; the plan's by default")
    parser.add_argument("--microbatches", type=int, help="per update; the plan's by default")
    parser.add_argument("--model", type=Path, help="where the model file is now")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the trained weights")
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


def _fail(error: Exception, place: Place, store: Store) -> None:
    """Say once, for all ranks, what failed first; then leave at once, as peers may never answer."""
    known = isinstance(error, P2BWError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    trace = "" if known else "".join(traceback.format_exception(error))
    if _is_news(error, message, store):
        where = f"rank {place.rank}: {message}"
        if not record_failure(error, where, trace):
            print(f"{trace}p2bw: {where}", file=sys.stderr, flush=True)
    os._exit(error.exit_code if isinstance(error, P2BWError) else 1)


def _is_news(error: Exception, message: str, store: Store) -> bool:
    """False for what follows from another rank's failure, and for what another has said."""
    try:
        if store.add("failures", 1) == 1:
            store.set("failure", message)
            return True
        return not isinstance(error, PeerError) and store.get("failure").decode() != message
    except RuntimeError:  # the store is gone, and with it whoever failed first
        return not isinstance(error, PeerError)


if __name__ == "__main__":
    sys.exit(main())
