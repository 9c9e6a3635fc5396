"""One rank: torchrun --nproc-per-node N -m p2bw.runtime ARTIFACT --steps N."""

import sys

import torch

from p2bw.contract.errors import P2BWError, PeerError, ResourceError
from p2bw.contract.job import parse
from p2bw.runtime.failure import Watchdog, fail
from p2bw.runtime.place import connect, find_place, within
from p2bw.runtime.rank import run_rank


def main() -> int:
    job, options = parse(__doc__)
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


if __name__ == "__main__":
    sys.exit(main())
