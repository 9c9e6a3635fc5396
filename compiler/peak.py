"""The most that a rank holds at any time: its schedule, walked with the sizes of a footprint."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from p2bw.compiler.footprint import Footprint
from p2bw.compiler.live import Size
from p2bw.contract.actions import actions
from p2bw.contract.schedule import Action, Channel, Flow, Kind, Pipeline

BATCHES = 4  # fill a pipeline, keep it full and drain it, as in contract/check.py


def walk(pipe: Pipeline, stage: int, held: Footprint) -> "Walk":
    """Perform the actions of one stage for a few batches: all others are like these."""
    few = replace(pipe, batches=min(pipe.batches, pipe.first + BATCHES))
    found = Walk(few, stage, held)
    for action in actions(few, stage):
        found.perform(action)
    return found


class Walk:
    """What a stage holds, action by action, as runtime/worker.py and transport.py hold it."""

    def __init__(self, pipe: Pipeline, stage: int, held: Footprint) -> None:
        self.pipe, self.stage, self.held = pipe, stage, held
        self.most = Size()
        self.buffers = Size()  # of messages, at that time
        self.in_flight = 0  # the most microbatches ever
        self.flying = 0
        self.inbound = [c for c in pipe.channels if c.target == stage]
        self.size = {c: _message(held, c) for c in self.inbound}
        self.posted = Size()  # messages whose receives are
        self.sent = Size()  # the last messages that went out: each is kept until the next
        self.accumulating: set[int] = set()  # versions whose leaves have gradients
        self.closed = 0  # batches whose gradients wait for their update
        self.summing = 0  # batches whose gradients the replicas sum up
        self.shares: Counter[str] = Counter()  # gradients of tied parameters apart from these
        self.told: dict[str, int] = {}  # the batch whose share was sent last
        self.sums: set[str] = set()  # shares of all stages, summed up
        self.act = {
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

    def perform(self, action: Action) -> None:
        self.act[action.kind](action)
        if action.kind is not Kind.SEND:
            self._reach(Size())

    def _reach(self, more: Size) -> None:
        """So much more is held for a moment."""
        held = self.held
        buffers = self.sent + self.posted
        now = held.rest + held.stash * self.flying + buffers + more
        now += held.gradients * (len(self.accumulating) + self.closed)
        now += held.small * self.summing
        for name, size in held.tied.items():
            now += size * (len(self.accumulating) + self.shares[name] + (name in self.sums))
        if now.blocks > self.most.blocks:
            self.most, self.buffers = now, buffers

    def _receive(self, action: Action) -> None:
        assert action.channel is not None
        self.posted += self.size[action.channel]

    def _take(self, flow: Flow) -> None:
        for channel in self.inbound:
            if channel.flow is flow:
                self.posted -= self.size[channel]

    def _send(self, action: Action) -> None:
        channel = action.channel
        assert channel is not None
        name, batch = channel.tensor, action.index
        if channel.flow is Flow.TIED and self.told.get(name, batch) != batch:
            self.shares[name] -= 1  # nobody holds the last batch's any more
        if channel.flow is Flow.TIED:
            self.told[name] = batch

    def _forward(self, action: Action) -> None:
        self._take(Flow.ACTIVATION)
        self._reach(self.held.forward)
        self.flying += 1
        self.in_flight = max(self.in_flight, self.flying)
        if action.index == self.pipe.first * self.pipe.microbatches:
            self.sent += self.held.results

    def _backward(self, action: Action) -> None:
        self._take(Flow.GRADIENT)
        adds = action.version in self.accumulating
        self._reach(self.held.backward if adds else self.held.first_backward)
        self.flying -= 1
        self.accumulating.add(action.version)
        if action.index == self.pipe.first * self.pipe.microbatches:
            self.sent += self.held.passed

    def _close(self, action: Action) -> None:
        self.accumulating.clear()
        self.closed += 1
        self.summing += self.pipe.replicated
        self.shares.update(self.held.tied.keys())

    def _gather(self, action: Action) -> None:
        self.summing -= self.pipe.replicated

    def _norm(self, action: Action) -> None:
        self._sum(self.pipe.sums(self.stage))

    def _sum(self, names: Iterable[str]) -> None:
        self.sums.update(names)
        self._reach(Size())
        for channel in self.inbound:
            if channel.flow is Flow.TIED and channel.tensor in names:
                self.posted -= self.size[channel]

    def _update(self, action: Action) -> None:
        self._reach(self.held.update)
        self.closed -= 1

    def _merge(self, action: Action) -> None:
        self._sum(self.held.tied.keys() - self.sums)
        self._reach(self.held.merge)
        self.sums.clear()


def _message(held: Footprint, channel: Channel) -> Size:
    match channel.flow:
        case Flow.ACTIVATION | Flow.GRADIENT:
            return held.messages[channel.tensor]
        case Flow.TIED:
            return held.tied[channel.tensor]
        case _:
            return Size()
