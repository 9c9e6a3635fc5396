"""The worker: performs the actions of one rank's schedule."""

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from p2bw.runtime.clock import Clock
from p2bw.runtime.compute import Compute
from p2bw.runtime.errors import MismatchError, ModelError
from p2bw.runtime.feed import Feed
from p2bw.runtime.plan import Plan
from p2bw.runtime.prepare import Prepared
from p2bw.runtime.schedule import Action, Channel, Flow, Kind, actions
from p2bw.runtime.transport import Arrival, Reduction, Transport
from p2bw.runtime.weights import Updater, Weights


class LossError(ModelError):
    """The loss is not a number any more; no weights were updated with it."""


class Worker:
    """One rank at work: its stage's weights and computing, and the messages to and from it."""

    def __init__(
        self,
        prepared: Prepared,
        rank: int,
        module: nn.Module,
        device: torch.device,
        transport: Transport,
        on_update: Callable[[int, float], None],
        alone: AbstractContextManager[object] | None = None,
    ) -> None:
        """On rank 0, `on_update(batch, loss)` is called after each update. `alone` is held while
        computing, where ranks share a process and its random generator."""
        plan, file, seed = prepared.plan, prepared.file, prepared.job.seed
        stage, self.replica = plan.position(rank)
        self.stage = plan.stages[stage]
        self.width = plan.width
        self.pipeline = prepared.pipeline
        self.transport = transport
        self.on_update = on_update if rank == 0 else None
        self.alone = alone or nullcontext()
        self.clock = Clock(device)
        self.feed = Feed(plan, file, stage, self.replica, seed, device)

        self.weights = Weights(module, self.pipeline.copies)
        share = 1 / (self.pipeline.microbatches * self.width)
        self.compute = Compute(self.stage, module, self.weights, seed, device, share)
        self.tied = _tied_parameters(plan, stage, module)  # canonical name -> name in the stage
        own = [name for name in self.weights.names if name not in self.tied.values()]
        tied = [name for name in self.weights.names if name in self.tied.values()]
        self.own = Updater(self.weights, own, file.optimizer, file.scheduler)
        self.shared = Updater(self.weights, tied, file.optimizer, file.scheduler)

        self.inbound: dict[Flow, list[Channel]] = defaultdict(list)
        self.outbound: dict[Flow, list[Channel]] = defaultdict(list)
        for channel in self.pipeline.channels:
            if channel.target == stage:
                self.inbound[channel.flow].append(channel)
            if channel.source == stage:
                self.outbound[channel.flow].append(channel)
        # A tensor's gradients are added as autograd would add them, those of later uses first.
        self.inbound[Flow.GRADIENT].sort(key=lambda channel: -channel.source)
        self.arriving: dict[Channel, deque[Arrival]] = defaultdict(deque)
        self.leaving: dict[Channel, Tensor] = {}
        self.losses: list[Tensor] = []  # of the current batch's microbatches
        self.batch_losses: deque[Tensor] = deque()  # of whole batches, where they are reported
        self.gradients: dict[str, Tensor] = {}  # of the batch to be updated with
        self.shares: dict[str, Tensor] = {}  # of those, the tied parameters', to be merged
        self.reduction: Reduction | None = None

    def run(self) -> None:
        """Perform the whole schedule."""
        perform = {
            Kind.RECEIVE: self._receive,
            Kind.SEND: self._send,
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.REDUCE: self._reduce,
            Kind.UPDATE: self._update,
            Kind.MERGE: self._merge,
        }
        for action in actions(self.pipeline, self.stage.index):
            perform[action.kind](action)
        self.transport.finish()

    def final_state(self) -> dict[str, Tensor]:
        """The stage's part of the trained model, by the model's own names."""
        self.weights.use(self.pipeline.batches)
        state: dict[str, Tensor] = self.weights.module.state_dict()
        return state

    def _receive(self, action: Action) -> None:
        assert action.channel is not None
        self.arriving[action.channel].append(self.transport.receive(action.channel))

    def _send(self, action: Action) -> None:
        assert action.channel is not None
        self.transport.send(action.channel, self.leaving.pop(action.channel))

    def _take(self, channel: Channel) -> Tensor:
        return self.arriving[channel].popleft().wait()

    def _number(self, microbatch: int) -> int:
        return microbatch * self.width + self.replica

    def _forward(self, action: Action) -> None:
        received = {c.tensor: self._take(c) for c in self.inbound[Flow.ACTIVATION]}
        with self.alone, self.clock.computing():
            inputs = self.feed.microbatch(action.index)
            named = dict(zip(self.stage.inputs, inputs, strict=True)) | received
            arguments = [named[name] for name in self.stage.arguments]
            results = self.compute.forward(self._number(action.index), action.version, arguments)
        for channel in self.outbound[Flow.ACTIVATION]:
            self.leaving[channel] = results[channel.tensor]
        if self.stage.loss is not None:
            self._keep_loss(results[self.stage.loss], action.index)

    def _backward(self, action: Action) -> None:
        gradients: dict[str, Tensor] = {}
        for channel in self.inbound[Flow.GRADIENT]:
            gradient = self._take(channel)
            known = gradients.get(channel.tensor)
            gradients[channel.tensor] = gradient if known is None else known + gradient
        with self.alone, self.clock.computing():
            found = self.compute.backward(self._number(action.index), action.version, gradients)
        for channel in self.outbound[Flow.GRADIENT]:
            self.leaving[channel] = found[channel.tensor]

    def _keep_loss(self, loss: Tensor, microbatch: int) -> None:
        """Sum up a batch's losses in double precision, and check them before its last backward."""
        self.losses.append(loss.double())
        batch, index = divmod(microbatch, self.pipeline.microbatches)
        if index < self.pipeline.microbatches - 1:
            return
        losses, self.losses = torch.stack(self.losses), []
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise LossError(
                f"the loss is {losses[bad[0]].item()} at step {batch + 1}, microbatch {bad[0]} "
                f"of replica {self.replica}; that step changed no weights; a lower learning rate "
                f"is the usual cure"
            )
        loss = losses.sum() / (self.pipeline.microbatches * self.width)
        for channel in self.outbound[Flow.LOSS]:
            self.leaving[channel] = loss
        if not self.outbound[Flow.LOSS]:  # it is reported here
            self.batch_losses.append(loss)

    def _reduce(self, action: Action) -> None:
        self._collect(action.index)
        tensors = [*self.gradients.values(), *list(self.batch_losses)[:1]]
        self.reduction = self.transport.reduce(tensors)

    def _collect(self, batch: int) -> None:
        """The batch's gradients and loss, this replica's part of them."""
        version = self.pipeline.version(batch * self.pipeline.microbatches)
        self.gradients = self.weights.take_gradients(version)
        for channel in self.inbound[Flow.LOSS]:
            self.batch_losses.append(self._take(channel))

    def _update(self, action: Action) -> None:
        if self.reduction is None:
            self._collect(action.index)
        else:
            self.reduction.wait()
            self.reduction = None
        with self.alone, self.clock.computing():
            self.own.update(action.index, self.gradients)
        for tensor, name in self.tied.items():
            self.shares[tensor] = self._share(name)
        self.gradients = {}
        for channel in self.outbound[Flow.TIED]:
            self.leaving[channel] = self.shares[channel.tensor]
        if self.batch_losses:
            loss = self.batch_losses.popleft()
            if self.on_update is not None:
                self.on_update(action.index, loss.item())

    def _merge(self, action: Action) -> None:
        """Add up the gradients of tied parameters, stage by stage: alike wherever they live."""
        terms = {(c.tensor, c.source): self._take(c) for c in self.inbound[Flow.TIED]}
        sums = {}
        for tensor, name in self.tied.items():
            terms[tensor, self.stage.index] = self.shares.pop(tensor)
            stages = sorted(stage for t, stage in terms if t == tensor)
            total = terms[tensor, stages[0]]
            for stage in stages[1:]:
                total = total + terms[tensor, stage]
            sums[name] = total
        with self.alone, self.clock.computing():
            self.shared.update(action.index, sums)

    def _share(self, name: str) -> Tensor:
        """This stage's part of a tied parameter's gradient; zeros if it has none."""
        gradient = self.gradients.get(name)
        parameter = self.weights.module.get_parameter(name)
        return torch.zeros_like(parameter) if gradient is None else gradient


def _tied_parameters(plan: Plan, stage: int, module: nn.Module) -> dict[str, str]:
    """The parameters that the stage shares with others: canonical name -> the stage's own name."""
    found = {}
    names = {name for name, _ in module.named_parameters()}
    for tied in plan.tied:
        if stage in tied.stages and len(tied.stages) > 1:
            here = names.intersection(tied.names)
            if len(here) != 1:
                raise MismatchError(
                    f"stage {stage} should hold one parameter named {' or '.join(tied.names)}, "
                    f"it holds {len(here)}"
                )
            (found[tied.names[0]],) = here
    return found
