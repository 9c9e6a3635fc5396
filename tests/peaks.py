"""The true peak of one rank's memory: a stage trained alone in this process by the real runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from p2bw.compiler.plan import Plan, read_plan
from p2bw.contract.job import Job
from p2bw.contract.plan import TensorSpec
from p2bw.contract.schedule import Channel
from p2bw.runtime.prepare import Prepared, channel_specs, initial_stage, prepare
from p2bw.runtime.worker import Events, Worker

STEPS = 4


@dataclass(frozen=True, slots=True)
class Posted:
    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


@dataclass(slots=True)
class Summed:
    """Small gradients travel in one message, into which they are copied."""

    together: Tensor | None

    def wait(self) -> None:
        self.together = None


@dataclass(slots=True)
class Alone:
    """Keeps what a transport over NCCL keeps: a buffer from when a receive is posted, what is sent
    until the next message on the same channel. What arrives is zeros."""

    specs: Mapping[Channel, TensorSpec]
    device: torch.device
    sending: dict[Channel, Tensor] = field(default_factory=dict)

    def send(self, channel: Channel, tensor: Tensor) -> None:
        self.sending.pop(channel, None)
        self.sending[channel] = tensor.detach()

    def receive(self, channel: Channel) -> Posted:
        spec = self.specs[channel]
        return Posted(torch.zeros(spec.shape, dtype=spec.dtype, device=self.device))

    def reduce(self, tensors: Sequence[Tensor]) -> Summed:
        small = [t.reshape(-1) for t in tensors if t.nbytes < 1 << 20 and t.dtype == torch.float32]
        return Summed(torch.cat(small))

    def finish(self) -> None:
        pass


def train_alone(prepared: Prepared, stage: int, device: torch.device) -> None:
    module = initial_stage(prepared, stage, device)
    transport = Alone(channel_specs(prepared, stage, module), device)
    rank = prepared.plan.stages[stage].devices[0]
    Worker(prepared, rank, module, device, transport, Events()).run()


def measure_peaks(artifact: Path, steps: int = STEPS) -> list[int]:
    """The most bytes of tensors that each stage of an artifact ever holds, on the CPU."""
    prepared = prepare(Job(artifact=artifact, steps=steps))
    return [peak_on_cpu(prepared, stage) for stage in range(prepared.plan.depth)]


def peak_on_cpu(prepared: Prepared, stage: int) -> int:
    """By the reports of torch's CPU allocator, which tells of every block."""
    from torch.autograd.profiler import profile

    with profile(use_kineto=True, profile_memory=True) as profiler:
        train_alone(prepared, stage, torch.device("cpu"))
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, size in changes:
        live += size
        most = max(most, live)
    return most


def planned_peaks(plan: Plan) -> list[int]:
    """What the plan says of the same: all but what the framework takes for itself."""
    return [stage.memory.total - stage.memory.reserve for stage in plan.stages]


def compare(artifact: Path) -> list[tuple[int, int]]:
    return list(zip(planned_peaks(read_plan(artifact)), measure_peaks(artifact), strict=True))
