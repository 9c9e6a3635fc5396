"""One rank by itself: the runtime's own worker, with nobody at the other ends."""

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from p2bw.compiler.simulation.job import StageTimes
from p2bw.contract.errors import ModelError
from p2bw.contract.plan import TensorSpec
from p2bw.contract.schedule import Action, Channel, Flow, Kind
from p2bw.modelfile.microbatch import seeded
from p2bw.runtime.memory import keep_memory
from p2bw.runtime.prepare import Prepared, channel_specs, initial_stage
from p2bw.runtime.transport import Arrival, Reduction
from p2bw.runtime.worker import Events, Worker

COMPUTING = (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE, Kind.MERGE, Kind.NORM)


class Spans(Events):
    """The seconds of each computation, by kind and by number of the microbatch or batch."""

    tracing = True

    def __init__(self) -> None:
        self.seconds: dict[Kind, dict[int, float]] = {kind: {} for kind in COMPUTING}

    def action(self, action: Action, start_s: float, end_s: float) -> None:
        if action.kind in self.seconds:
            self.seconds[action.kind][action.index] = end_s - start_s


def stage_times(spans: Spans, m: int, warm_up: int) -> StageTimes:
    """Medians over the batches, of `m` microbatches each, after those that warm up.

    A batch's first backward differs from its others, so that a microbatch is a batch's mean.
    """

    def per_batch(kind: Kind) -> Mapping[int, float]:
        sums: dict[int, float] = {}
        for index, seconds in spans.seconds[kind].items():
            sums[index // m] = sums.get(index // m, 0.0) + seconds / m
        return sums

    def middle(batches: Mapping[int, float]) -> float:
        steady = [seconds for batch, seconds in batches.items() if batch >= warm_up]
        return median(steady) if steady else 0.0

    return StageTimes(
        forward_s=middle(per_batch(Kind.FORWARD)),
        backward_s=middle(per_batch(Kind.BACKWARD)),
        update_s=sum(middle(spans.seconds[kind]) for kind in (Kind.UPDATE, Kind.MERGE)),
        norm_s=middle(spans.seconds[Kind.NORM]),
    )


@dataclass(slots=True)
class _Summed:
    """Small tensors travel together: copied into one before the sum, and back after it."""

    together: list[tuple[Tensor, list[Tensor]]]

    def wait(self) -> None:
        for flat, parts in self.together:
            sums = torch.split(flat, [part.numel() for part in parts])
            for part, total in zip(parts, sums, strict=True):
                part.copy_(total.view_as(part))
        self.together.clear()


@dataclass(slots=True)
class Alone:
    """Holds what a transport over NCCL holds, and for as long: a buffer from when a receive is
    posted, what is sent until the next message on the same channel.

    Numbers that arrive are random and small, so that no loss runs away; integers are zeros, which
    are valid as indices, and masks are true. Sums over replicas change nothing.
    """

    specs: Mapping[Channel, TensorSpec]
    device: torch.device
    arriving: dict[Channel, Tensor] = field(default_factory=dict)
    sending: dict[Channel, Tensor] = field(default_factory=dict)

    def send(self, channel: Channel, tensor: Tensor) -> None:
        self.sending.pop(channel, None)
        self.sending[channel] = tensor

    def receive(self, channel: Channel) -> Arrival:
        tensor = self._made_up(channel)
        return lambda: tensor

    def _made_up(self, channel: Channel) -> Tensor:
        spec = self.specs[channel]
        buffer = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        if channel.flow is Flow.NORM:
            return buffer.fill_(1.0)
        if channel.flow is Flow.NORMS:
            return buffer.fill_(-1.0)  # as of parameters without a gradient
        if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            return buffer.fill_(spec.dtype == torch.bool)
        scale = 0.1 if channel.flow is Flow.ACTIVATION else 1e-4
        with seeded("rehearse"):
            return buffer.normal_(std=scale)

    def reduce(self, tensors: Sequence[Tensor]) -> Reduction:
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.nbytes < 1 << 20 or not tensor.is_contiguous():
                small.setdefault(tensor.dtype, []).append(tensor)
        flat = [torch.cat([tensor.reshape(-1) for tensor in some]) for some in small.values()]
        return _Summed(list(zip(flat, small.values(), strict=True))).wait

    def finish(self) -> None:
        self.sending.clear()


def stage_alone(prepared: Prepared, stage: int, device: torch.device) -> nn.Module:
    """A stage with first weights, made without the rest of the model where its code allows that."""
    try:
        return initial_stage(prepared, stage, device)
    except ModelError:  # its code looks at its weights
        whole = replace(prepared, job=replace(prepared.job, init="whole"))
        return initial_stage(whole, stage, device)


def train_alone(
    prepared: Prepared, stage: int, device: torch.device, events: Events | None = None
) -> None:
    """Run the plan's schedule as the first replica of a stage."""
    keep_memory(device)  # as a rank does
    module = stage_alone(prepared, stage, device)
    transport = Alone(channel_specs(prepared, stage, module), device)
    rank = prepared.plan.stages[stage].devices[0]
    worker = Worker(prepared, rank, module, device, transport, events or Events())
    worker.run()
    worker.clock.busy_s()  # on a GPU: until it has done all this, and has told


def peak_on_cpu(prepared: Prepared, stage: int) -> int:
    """The most bytes of tensors that a stage ever holds, by the reports of torch's CPU allocator,
    which tells of every block. They cost time.
    """
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells on stderr when it starts and stops
    with profile(use_kineto=True, profile_memory=True) as profiler:
        train_alone(prepared, stage, torch.device("cpu"))
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)
