"""What the runtime itself takes of a core for each microbatch: `measure_overhead`.

Run as a module it is one of the two ranks that train a small model for that.
"""

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import torch.distributed as dist

from p2bw.compiler.driver import compile_model
from p2bw.compiler.rules import parse_rules
from p2bw.contract.job import Job
from p2bw.contract.schedule import Action, Kind
from p2bw.measure.alone import COMPUTING
from p2bw.measure.pair import ask_two_processes, meeting
from p2bw.runtime.prepare import initial_stage, prepare
from p2bw.runtime.rank import build
from p2bw.runtime.worker import Events

_SAMPLES, _UPDATES, _WARM_UP = 128, 40, 5
# Two stages of some 10 ms, whose weights fill caches, as a model's do: what runs between two
# computations is slower then. Messages are short: their bytes are counted apart.
_MODEL = """\
import torch
from torch import nn

def part():
    return nn.Sequential(nn.Linear(16, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.Linear(1024, 16))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = part(), part()

    def forward(self, x):
        return self.last(self.first(x))

def model():
    return Model()

def inputs(batch_size):
    return (torch.randn(batch_size, 16),)

def loss(y, wanted):
    return (y - wanted).square().mean()

def targets(batch_size):
    return (torch.randn(batch_size, 16),)

def data(batch_size, seed):
    x, wanted = inputs(batch_size), targets(batch_size)
    while True:
        yield x, wanted  # what it takes to make data is not the runtime's
"""


def measure_overhead() -> float:
    """Seconds of a microbatch in which a rank neither computes nor waits: Python, short messages.

    On the CPU, where the core that does this computes, too. 0 if two ranks could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="p2bw-overhead-") as folder:
        file, artifact = Path(folder, "small.py"), Path(folder, "small")
        file.write_text(_MODEL, encoding="utf-8")
        compile_model(
            file,
            gpus=2,
            device="cpu",
            depth=2,
            microbatch=_SAMPLES,
            recompute="never",
            rules=parse_rules(cut_after=["first"]),
            out=artifact,
        )
        said = ask_two_processes("p2bw.measure.overhead", (str(artifact),), "gloo")
    return fmean(map(json.loads, said)) if said else 0.0


class _Own(Events):
    """Sums up, batch by batch, the time in which a rank computes or waits."""

    tracing = True

    def __init__(self) -> None:
        self.known_s = 0.0
        self.batches: list[tuple[float, float]] = []  # when each was updated with; known by then

    def action(self, action: Action, start_s: float, end_s: float) -> None:
        if action.kind in (*COMPUTING, Kind.RECEIVE):
            self.known_s += end_s - start_s
        if action.kind is Kind.UPDATE:
            self.batches.append((time.perf_counter(), self.known_s))

    def own_s(self, microbatches: int) -> float:
        """Per microbatch, the median over the batches."""
        steady = self.batches[_WARM_UP:-2]
        own = (b[0] - a[0] - (b[1] - a[1]) for a, b in pairwise(steady))
        return median(own) / microbatches


def main() -> None:
    with meeting(sys.argv[1:]) as (rank, device, (artifact,)):
        prepared = prepare(Job(artifact=Path(artifact), steps=_UPDATES))
        stage, _ = prepared.plan.position(rank)
        own = _Own()
        worker = build(prepared, rank, initial_stage(prepared, stage, device), device, own)
        dist.barrier()
        worker.run()
        print(json.dumps(own.own_s(prepared.pipeline.microbatches)))


if __name__ == "__main__":
    main()
