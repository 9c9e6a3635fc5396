"""The worker: performs the actions of one rank's schedule."""

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from p2bw.contract.actions import actions
from p2bw.contract.checkpoint import StageState
from p2bw.contract.errors import ModelError
from p2bw.contract.schedule import Action, Channel, Flow, Kind
from p2bw.contract.stages import tied_parameters
from p2bw.runtime.compute import Compute
from p2bw.runtime.feed import Feed
from p2bw.runtime.prepare import Prepared
from p2bw.runtime.transport import Arrival, Reduction, Transport
from p2bw.runtime.weights import Updater, Weights
from p2bw.telemetry.clock import Clock

T = TypeVar("T")


class LossError(ModelError):
    """The loss or its gradient is not a number any more; no weights were updated with it."""


@dataclass(frozen=True, slots=True)
class Update:
    """What rank 0 learns of a batch."""

    batch: int
    loss: float
    norm: float | None  # of all gradients, where they are clipped
    learning_rate: float | None


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on: after `step` updates and `items` of the data."""

    state: StageState
    step: int
    items: int


class Events:
    """What a worker asks and tells the world around it; here: nothing to stop or keep."""

    tracing = False  # whether `action` is to be called

    def allows(self, batch: int) -> bool:
        """Whether a batch may begin; False ends the run before it, on all ranks alike."""
        return True

    def wants(self, step: int) -> bool:
        """Whether `checkpoint` is to be called after so many updates, on all ranks alike."""
        return False

    def checkpoint(self, step: int, state: StageState) -> None:
        """The state after an update. Training changes its tensors as soon as this returns."""

    def update(self, update: Update) -> None:
        """A batch is done; on rank 0 alone."""

    def action(self, action: Action, start_s: float, end_s: float) -> None:
        """The span of a computation, of a send, or of waiting for what was received.

        Seconds of time.perf_counter."""


class Worker:
    """One rank at work: its stage's weights and computing, and the messages to and from it."""

    def __init__(
        self,
        prepared: Prepared,
        rank: int,
        module: nn.Module,
        device: torch.device,
        transport: Transport,
        events: Events,
        alone: AbstractContextManager[object] | None = None,
        start: Start | None = None,
    ) -> None:
        """`alone` is held while computing, where ranks share a process and its random generator."""
        plan, file, seed = prepared.plan, prepared.file, prepared.job.seed
        self.rank = rank
        index, self.replica = plan.position(rank)
        self.stage = plan.stages[index]
        self.width = plan.width
        self.pipeline = pipe = prepared.pipeline
        self.transport = transport
        self.events = events
        self.alone = alone or threading.Lock()
        self.device = device
        self.step = start.step if start else 0  # how many updates were made, ever
        self.at: Action | None = None  # what it performs, or waits in, now
        self.waits: Action | None = None  # and the receive, send or sum that it waits for
        self.record = events.action if events.tracing else None
        self.clock = Clock(device, self.record)
        self.feed = Feed(plan, file, index, seed, device)
        self.items = start.items if start else 0  # of the data, before this run
        self.clip_norm = prepared.clip_norm
        self.places = prepared.places  # of parameters in the order of the model
        self.no_norms = torch.full((prepared.norms,), -1.0, device=device)

        self.weights = Weights(module, pipe.copies(index))
        share = 1 / (pipe.microbatches * self.width)
        self.compute = Compute(self.stage, module, self.weights, seed, device, share)
        self.tied = tied_parameters(plan, index, module)  # canonical name -> name in the stage
        own = [name for name in self.weights.names if name not in self.tied.values()]
        tied = [name for name in self.weights.names if name in self.tied.values()]
        self.own = Updater(self.weights, own, file.optimizer, file.scheduler)
        self.shared = Updater(self.weights, tied, file.optimizer, file.scheduler)
        if start:
            for part in (self.weights, self.own, self.shared):
                part.load(start.state, start.step)

        self.inbound, self.outbound = pipe.inbound(index), pipe.outbound(index)
        # A tensor's gradients are added as autograd would add them, those of later uses first.
        self.inbound[Flow.GRADIENT].sort(key=lambda channel: -channel.source)
        self.arriving: dict[Channel, deque[tuple[Action, Arrival]]] = defaultdict(deque)
        self.leaving: dict[Channel, Tensor] = {}
        self.losses: list[float | Tensor] = []  # of the current batch's microbatches
        self.batch_losses: dict[int, Tensor] = {}  # of whole batches, where they are reported
        self.buffers: dict[int, dict[str, Tensor]] = {}  # step -> as then, for checkpoints
        # Of batches that are closed, but not updated with:
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.reductions: dict[int, Reduction] = {}
        self.present: dict[int, Tensor] = {}  # replicas with a gradient for each fickle weight
        self.shares: dict[str, Tensor] = {}  # the stage's part of tied parameters' gradients
        self.sums: dict[str, Tensor] = {}  # and of all stages
        self.norm: Tensor | None = None

    def run(self) -> None:
        """Perform the whole schedule."""
        perform = {
            Kind.RECEIVE: self._receive,
            Kind.SEND: self._send,
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.CLOSE: self._close,
            Kind.GATHER: self._gather,
            Kind.NORM: self._norm,
            Kind.UPDATE: self._update,
            Kind.MERGE: self._merge,
        }
        for action in actions(self.pipeline, self.stage.index, self.events.allows):
            self.at = action
            perform[action.kind](action)
        self.at = None
        self.transport.finish()

    def state(self) -> StageState:
        """What a run needs to go on from here, at the end of this one."""
        return self._state(self.step, dict(self.weights.module.named_buffers()))

    def final_state(self) -> dict[str, Tensor]:
        """The stage's part of the trained model, by the model's own names."""
        self.weights.use(self.step)
        state: dict[str, Tensor] = self.weights.module.state_dict()
        return state

    def _receive(self, action: Action) -> None:
        assert action.channel is not None
        self.arriving[action.channel].append((action, self.transport.receive(action.channel)))

    def _send(self, action: Action) -> None:
        assert action.channel is not None
        self._wait(action, self.transport.send, action.channel, self.leaving.pop(action.channel))

    def _take(self, channel: Channel) -> Tensor:
        action, arrival = self.arriving[channel].popleft()
        return self._wait(action, arrival)

    def _wait(self, action: Action, function: Callable[..., T], *given: Any) -> T:
        """Call what may wait for another rank."""
        self.waits, start_s = action, time.perf_counter()
        result = function(*given)
        self.waits = None
        if self.record is not None:
            self.record(action, start_s, time.perf_counter())
        return result

    def _timed(self, action: Action, function: Callable[..., T], *given: Any) -> T:
        """Call what computes: timed, and alone where ranks share a process."""
        with self.alone:
            start = self.clock.begin()
            result = function(*given)
            self.clock.end(action, start)
        return result

    def _item(self, microbatch: int) -> int:
        """The number in the data, counted over all replicas, of the pipeline's microbatch."""
        first = self.pipeline.first * self.pipeline.microbatches
        return self.items + (microbatch - first) * self.width + self.replica

    def _forward(self, action: Action) -> None:
        item = self._item(action.index)
        with self.alone:  # first, as there may be time until all has arrived
            named = self.feed.microbatch(item)
        for channel in self.inbound[Flow.ACTIVATION]:
            named[channel.tensor] = self._take(channel)
        results = self._timed(action, self.compute.forward, item, action.version, named)
        for channel in self.outbound[Flow.ACTIVATION]:
            self.leaving[channel] = results[channel.tensor]
        if self.stage.loss is not None:
            self._keep_loss(results[self.stage.loss], action.index)
        batch, index = divmod(action.index, self.pipeline.microbatches)
        if index == self.pipeline.microbatches - 1 and self.events.wants(batch + 1):
            buffers = self.weights.module.named_buffers()
            self.buffers[batch + 1] = {name: buffer.clone() for name, buffer in buffers}

    def _backward(self, action: Action) -> None:
        gradients: dict[str, Tensor] = {}
        for channel in self.inbound[Flow.GRADIENT]:
            gradient = self._take(channel)
            known = gradients.get(channel.tensor)
            gradients[channel.tensor] = gradient if known is None else known + gradient
        item = self._item(action.index)
        found = self._timed(action, self.compute.backward, item, action.version, gradients)
        for channel in self.outbound[Flow.GRADIENT]:
            self.leaving[channel] = found[channel.tensor]

    def _keep_loss(self, loss: Tensor, microbatch: int) -> None:
        """Sum up a batch's losses, exactly, and check them before its last backward."""
        # Not the loss itself: mse_loss's has the memory of all that it is the mean of.
        self.losses.append(loss.item() if self.device.type == "cpu" else loss.clone())
        batch, index = divmod(microbatch, self.pipeline.microbatches)
        if index < self.pipeline.microbatches - 1:
            return
        losses, self.losses = [*map(float, self.losses)], []
        if bad := [i for i, one in enumerate(losses) if not math.isfinite(one)]:
            raise LossError(
                f"the loss is {losses[bad[0]]} at step {batch + 1}, microbatch {bad[0]} "
                f"of replica {self.replica} (stage {self.stage.index}); that step changed no "
                f"weights; a lower learning rate is the usual cure"
            )
        mean = math.fsum(losses) / (self.pipeline.microbatches * self.width)
        loss = torch.tensor(mean, dtype=torch.float64, device=self.device)
        for channel in self.outbound[Flow.LOSS]:
            self.leaving[channel] = loss
        if not self.outbound[Flow.LOSS]:  # it is reported here
            self.batch_losses[batch] = loss

    def _close(self, action: Action) -> None:
        """Take the batch's gradients and loss, this replica's part of them."""
        batch, m, stage = action.index, self.pipeline.microbatches, self.stage.index
        oldest = self.pipeline.version(stage, batch * m)
        newest = self.pipeline.version(stage, batch * m + m - 1)
        self.gradients[batch] = self.weights.take_gradients(range(oldest, newest + 1))
        for channel in self.inbound[Flow.LOSS]:
            self.batch_losses[batch] = self._take(channel)
        if self.pipeline.replicated:
            losses = [self.batch_losses[batch]] if batch in self.batch_losses else []
            self.gradients[batch], present = self.weights.complete(self.gradients[batch])
            self.present[batch] = present
            tensors = [
                *self.gradients[batch].values(),
                *losses,
                *([present] if len(present) else []),
            ]
            self.reductions[batch] = self.transport.reduce(tensors)

    def _gather(self, action: Action) -> None:
        """The gradients are those of all replicas now; set apart what other stages share in."""
        if self.pipeline.replicated:
            self._wait(action, self.reductions.pop(action.index))
            used = self.present.pop(action.index).tolist()
            for name in (n for n, c in zip(self.weights.fickle, used, strict=True) if not c):
                del self.gradients[action.index][name]
        gradients = self.gradients[action.index]
        for tensor, name in self.tied.items():
            share = gradients.pop(name, None)
            parameter = self.weights.module.get_parameter(name)
            self.shares[tensor] = torch.zeros_like(parameter) if share is None else share
        for channel in self.outbound[Flow.TIED]:
            self.leaving[channel] = self.shares[channel.tensor]

    def _sum(self, tensors: Iterable[str]) -> None:
        """Add up the gradients of tied parameters, stage by stage: alike wherever they live."""
        for tensor in tensors:
            terms = {c.source: self._take(c) for c in self.inbound[Flow.TIED] if c.tensor == tensor}
            terms[self.stage.index] = self.shares.pop(tensor)
            first, *rest = (terms[stage] for stage in sorted(terms))
            self.sums[self.tied[tensor]] = sum(rest, start=first)

    def _norm(self, action: Action) -> None:
        """Add this stage's norms to those of the stages behind it, at their places in the model.

        The first stage has them all then: the norm of these is torch's clip_grad_norm_'s, to the
        bit, however the model is cut.
        """
        self._sum(self.pipeline.sums(self.stage.index))
        known = [self._take(c) for c in self.inbound[Flow.NORMS]]
        norms = known[0] if known else self.no_norms.clone()
        if gradients := self.gradients[action.index] | self.sums:
            places = [self.places[name] for name in gradients]
            norms[places] = self._timed(action, _norms_of, gradients.values())
        for channel in self.outbound[Flow.NORMS]:
            self.leaving[channel] = norms
        if self.stage.index == 0:
            present = [norm for norm in norms.tolist() if norm != -1]
            self.norm = torch.linalg.vector_norm(torch.tensor(present, device=self.device))
            if not math.isfinite(self.norm.item()):
                names = [n for n, place in self.places.items() if not norms[place].isfinite()]
                raise LossError(
                    f"the gradient of {names[0]} is not finite at step {action.index + 1}; that "
                    f"step changed no weights; a lower learning rate is the usual cure"
                )
            for channel in self.outbound[Flow.NORM]:
                self.leaving[channel] = self.norm

    def _scale(self) -> Tensor | None:
        """What the gradients are multiplied with to clip their norm."""
        if self.clip_norm is None or self.norm is None:
            return None
        return torch.clamp(self.clip_norm / (self.norm + 1e-6), max=1.0)

    def _update(self, action: Action) -> None:
        for channel in self.inbound[Flow.NORM]:
            self.norm = self._take(channel)
        rate = self.own.learning_rate or self.shared.learning_rate
        gradients = self.gradients.pop(action.index)
        self._timed(action, self.own.update, action.index, gradients, self._scale())
        if action.index in self.batch_losses and self.rank == 0:
            loss = self.batch_losses[action.index].item()
            norm = None if self.norm is None else self.norm.item()
            self.events.update(Update(action.index, loss, norm, rate))
        self.batch_losses.pop(action.index, None)
        if not self.tied:
            self._made(action.version)

    def _merge(self, action: Action) -> None:
        self._sum([*self.shares])
        self._timed(action, self.shared.update, action.index, self.sums, self._scale())
        self.sums = {}
        self._made(action.version)

    def _made(self, version: int) -> None:
        self.step = version
        if (buffers := self.buffers.pop(version, None)) is not None:
            self.events.checkpoint(version, self._state(version, buffers))

    def _state(self, step: int, buffers: Mapping[str, Tensor]) -> StageState:
        state = StageState()
        self.weights.save(state, step, buffers)
        self.own.save(state)
        self.shared.save(state)
        return state


def _norms_of(gradients: Iterable[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm([*gradients], dtype=torch.float32))
