"""One rank of the pipelining benchmark: p2bw, torch.distributed.pipelining and the ideal.

Each measurement gives the seconds per weight update of this rank. All of them run the modules of
pipelining_model.py, with the optimizer that is made there.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pipelining_model import VOCABULARY, Part, loss, optimizer
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.torch_version import TorchVersion

from p2bw.contract.job import Job, Options
from p2bw.runtime.memory import keep_memory
from p2bw.runtime.prepare import initial_stage, prepare
from p2bw.runtime.rank import build
from p2bw.runtime.worker import Events, Update
from p2bw.telemetry.report import Report

CPU = torch.device("cpu")
PEERS = {  # the schedule, and the stages that each of two ranks has
    "GPipe": (ScheduleGPipe, ((0,), (1,))),
    "1F1B": (Schedule1F1B, ((0,), (1,))),
    "Interleaved1F1B": (ScheduleInterleaved1F1B, ((0, 2), (1, 3))),
    "InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, ((0, 2), (1, 3))),
    "ZBVZeroBubble": (ScheduleZBVZeroBubble, ((0, 3), (1, 2))),
}
if TorchVersion(torch.__version__) < "2.12":
    del PEERS["ZBVZeroBubble"]  # it wants a rank to send to itself, which gloo refuses
OURS = ("2bw", "2bw, all on", "flush")


@dataclass(frozen=True, slots=True)
class Bench:
    """What one rank measures, of a model in a size."""

    rank: int
    sizes: dict[str, int]
    microbatch: int
    artifacts: dict[bool, Path]  # whether the embedding is tied -> artifact

    def measure(self, what: str, m: int, updates: int) -> float:
        """Seconds per update of the slowest rank, while both run `what`."""
        dist.barrier()
        if what == "ideal":
            seconds = self.ideal(m, updates)
        elif what in PEERS:
            seconds = self.peer(what, m, updates)
        else:
            seconds = self.p2bw(what, m, updates)
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    def ideal(self, m: int, updates: int) -> float:
        """The rank's stage computes without messages, while the other rank does the same."""
        part = self._part(self.rank, 2)
        weights = optimizer(list(part.parameters()))
        ids, wanted = self._data(1)
        hidden = torch.randn(self.microbatch, self.sizes["tokens"], self.sizes["width"])
        gradient = torch.randn_like(hidden)

        def update() -> None:
            for _ in range(m):
                if self.rank == 0:
                    part(ids).backward(gradient)
                else:
                    (loss(part(hidden.detach().requires_grad_()), wanted) / m).backward()
            weights.step()
            weights.zero_grad()

        return _timed(update, updates)

    def peer(self, name: str, m: int, updates: int) -> float:
        """As its users run it: a step of the schedule, and a step of the optimizer."""
        make_schedule, ranks = PEERS[name]
        indices, count = ranks[self.rank], len(ranks) * len(ranks[0])
        parts = {i: self._part(i, count) for i in indices}
        stages = [PipelineStage(part, i, count, CPU) for i, part in parts.items()]
        schedule = make_schedule(stages if len(stages) > 1 else stages[0], m, loss_fn=loss)
        weights = optimizer([p for part in parts.values() for p in part.parameters()])
        ids, wanted = self._data(m)
        first = [ids] if 0 in parts else []
        last = {"target": wanted, "losses": []} if count - 1 in parts else {}

        def update() -> None:
            schedule.step(*first, **last, return_outputs=False)
            weights.step()
            weights.zero_grad()

        return _timed(update, updates)

    def p2bw(self, name: str, m: int, updates: int) -> float:
        """A whole run, which never waits for all ranks. The first update does not count, as the
        pipeline is being filled, nor do the last two: they wait for no batch that would need them.
        """
        all_on = name == "2bw, all on"
        job = Job(
            artifact=self.artifacts[all_on],
            steps=updates + 4,
            schedule="flush" if name == "flush" else "2bw",
            microbatches=m,
            clip_norm=1.0 if all_on else None,
        )
        prepared = prepare(job)
        report = Report(prepared, say=False)
        times = _Times(report)
        module = initial_stage(prepared, self.rank, CPU)
        worker = build(prepared, self.rank, module, CPU, times)
        if all_on and self.rank == 0:
            report.open(Options(), done=0)
        dist.barrier()
        report.start(worker.clock)
        worker.run()
        done_s = times.done_s[1:-2]
        return (done_s[-1] - done_s[0]) / updates if self.rank == 0 else 0.0

    def _part(self, index: int, count: int) -> Part:
        torch.manual_seed(index)
        blocks = self.sizes["blocks"]
        return Part(index * blocks // count, (index + 1) * blocks // count, **self.sizes)

    def _data(self, microbatches: int) -> tuple[Tensor, Tensor]:
        shape = (microbatches * self.microbatch, self.sizes["tokens"])
        return torch.randint(VOCABULARY, shape), torch.randint(VOCABULARY, shape)


class _Times(Events):
    """Notes when rank 0 has made each update, and reports it."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.done_s: list[float] = []

    def update(self, update: Update) -> None:
        self.report.update(update.batch, update.loss, update.learning_rate, update.norm)
        self.done_s.append(time.perf_counter())


def _timed(update: Callable[[], None], updates: int) -> float:
    """Seconds per call, after one that warms up."""
    update()
    dist.barrier()
    start_s = time.perf_counter()
    for _ in range(updates):
        update()
    return (time.perf_counter() - start_s) / updates


def pin(rank: int) -> None:
    """One thread on one core; malloc keeps its memory, whatever is measured first."""
    keep_memory(CPU)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
