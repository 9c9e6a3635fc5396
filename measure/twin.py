"""A process that trains the same model beside the one that is measured: `working_beside`.

The ranks of a run on one machine share its caches and its memory's bandwidth, so a rank alone on
the machine would be measured as too fast.
Run as a module it is that process: python -m p2bw.measure.twin JOB, of JSON.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from p2bw.contract.errors import ResourceError
from p2bw.measure.training import Training
from p2bw.modelfile.load import ModelFile, load_model_file
from p2bw.runtime.memory import keep_memory

_READY = b"ready\n"


@contextmanager
def working_beside(file: ModelFile, batch_size: int, threads: int, others: int) -> Iterator[None]:
    """`others` processes train the model while the body runs, each on a core of its own."""
    job = json.dumps(
        {
            "path": str(file.path),
            "factory": file.factory,
            "settings": dict(file.settings),
            "autocast": file.autocast,
            "batch_size": batch_size,
            "threads": threads,
        }
    )
    twins = []
    try:
        for number in range(others):
            twins.append(
                subprocess.Popen(
                    [sys.executable, "-m", "p2bw.measure.twin", job, str(number)],
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                    stdin=subprocess.PIPE,  # when it closes, the twin ends
                    stdout=subprocess.PIPE,
                )
            )
        for twin in twins:
            assert twin.stdout is not None
            if twin.stdout.readline() != _READY:
                raise ResourceError(
                    "a process that trains the model beside the one that is measured has ended; "
                    "what it said is above; measure without any: --processes 1"
                )
        yield
    finally:
        for twin in twins:
            twin.kill()
            twin.wait()
            for pipe in (twin.stdin, twin.stdout):
                assert pipe is not None
                pipe.close()


def main() -> None:
    job, number = json.loads(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _take_core(number)
    torch.set_num_threads(job["threads"])
    keep_memory(torch.device("cpu"))
    file = load_model_file(Path(job["path"]), job["factory"], job["settings"], job["autocast"])
    model = file.model()
    training = Training(file, model)
    inputs, targets = file.inputs(job["batch_size"]), file.targets(job["batch_size"])
    while True:
        for _ in range(2):
            file.call(model, inputs, targets).backward()  # type: ignore[no-untyped-call]
        training.update()
        if number >= 0:
            sys.stdout.buffer.write(_READY)
            sys.stdout.flush()
            number = -1


def _take_core(number: int) -> None:
    """The last cores, one for each; the scheduler leaves the first to the process measured."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > number + 1:
        os.sched_setaffinity(0, {cores[-1 - number]})


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
