"""The oracle of the runtime's tests: one process, the whole model, the equation of 2BW.

    W(t+1) = optimizer(W(t), g(W(t-1); batch t)),   W(-1) = W(0)

Synchronous training is the same with g(W(t); batch t). Nothing of the runtime is used here but
`forward_seed`, the definition of the random numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from p2bw.contract.seeds import forward_seed

Step = Callable[[nn.Module, object, Callable[[int], None]], Tensor]


@dataclass(kw_only=True)
class Reference:
    """A training loop. `step(model, item, enter)` gives the loss of one microbatch, and calls
    `enter(stage)` before it draws random numbers that belong to a stage."""

    model: nn.Module
    step: Step
    items: Iterator[object]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    depth: int
    width: int
    microbatches: int
    seed: int = 0
    delay: int = 1  # 0: synchronous
    tied: Sequence[Sequence[str]] = ()  # parameters that should be one, in the order of their sum
    clip_norm: float | None = None
    masters: dict[str, nn.Parameter] = field(default_factory=dict)  # what the optimizer sees
    norms: list[float] = field(default_factory=list)  # of each batch's gradients, where clipped
    statistics: list[dict[str, Tensor]] = field(default_factory=list)  # buffers of each replica

    def train(self, steps: int) -> list[float]:
        """The loss of every batch; the model then holds the final weights."""
        now = self.weights()
        before = now
        losses = []
        for batch in range(steps):
            self.load(before if self.delay else now)
            losses.append(self.gradients(batch))
            self.tie_gradients()
            self.load(now)
            self.update()
            before, now = now, self.weights()
        return losses

    def update(self) -> None:
        """One step of the optimizer: on the model, or on fp32 masters of its weights."""
        named = dict(self.model.named_parameters())
        for name, master in self.masters.items():
            gradient = named[name].grad
            master.grad = None if gradient is None else gradient.float()
        self.clip(named | self.masters)
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                named[name].copy_(master)
                master.grad = None
        self.model.zero_grad(set_to_none=True)

    def clip(self, named: dict[str, nn.Parameter]) -> None:
        """As torch clips the whole model, in which a tied parameter is one."""
        if self.clip_norm is None:
            return
        copies = {name for names in self.tied for name in names[1:]}
        once = [p for name, p in named.items() if name not in copies]
        if not copies:
            self.norms.append(nn.utils.clip_grad_norm_(once, self.clip_norm).item())
            return
        norm = nn.utils.get_total_norm([p.grad for p in once if p.grad is not None])
        nn.utils.clip_grads_with_norm_(named.values(), self.clip_norm, norm)
        self.norms.append(norm.item())

    def gradients(self, batch: int) -> float:
        """Leave on the parameters the average gradient of a batch, summed replica by replica."""
        count = self.microbatches * self.width
        items = [next(self.items) for _ in range(count)]
        loss = 0.0
        sums: dict[str, Tensor] = {}
        for replica in range(self.width):
            losses = []
            for index in range(replica, count, self.width):
                with self.replica(replica):
                    enter = self.generators(batch * count + index)
                    part = self.step(self.model, items[index], enter)
                part.backward(torch.full_like(part, 1 / count))
                losses.append(part.item())
            loss += math.fsum(losses) / count
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    known = sums.get(name)
                    sums[name] = parameter.grad if known is None else known + parameter.grad
                    parameter.grad = None
        for name, gradient in sums.items():
            self.model.get_parameter(name).grad = gradient
        return loss

    def generators(self, number: int) -> Callable[[int], None]:
        """Each stage draws from a stream of its own, however often the program comes back to it."""
        streams = {}
        for stage in range(self.depth):
            torch.manual_seed(forward_seed(self.seed, stage, number))
            streams[stage] = torch.get_rng_state()
        current: list[int] = []

        def enter(stage: int) -> None:
            if current:
                streams[current.pop()] = torch.get_rng_state()
            torch.set_rng_state(streams[stage])
            current.append(stage)

        return enter

    @contextmanager
    def replica(self, index: int) -> Iterator[None]:
        """Every replica has running statistics of its own; the model's are those of replica 0."""
        own = dict(self.model.named_buffers())
        while len(self.statistics) < self.width:
            self.statistics.append(deepcopy(own) if self.statistics else own)
        self.plug(self.statistics[index])
        yield
        self.plug(own)

    def plug(self, buffers: dict[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, buffer)

    def tie_gradients(self) -> None:
        for names in self.tied:
            parameters = [self.model.get_parameter(name) for name in names]
            total = parameters[0].grad
            for parameter in parameters[1:]:
                total = total + parameter.grad
            for parameter in parameters:
                parameter.grad = total.clone()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
