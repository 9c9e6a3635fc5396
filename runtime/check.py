"""Proof of a schedule: it is executed, without tensors, before any rank starts.

Channels are tried at capacity 0, where a send ends only once its receive is posted, and at
capacity 1. What passes cannot deadlock on any transport that buffers at least as much.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2bw.runtime.schedule import Action, Channel, Flow, Kind, Pipeline, actions


class ScheduleError(AssertionError):
    """A schedule that would hang or compute something else: a bug in what made it."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen while executing: per stage, most microbatches in flight and live versions."""

    stash: tuple[int, ...]
    versions: tuple[int, ...]


def check(pipe: Pipeline) -> Proof:
    """Prove a pipeline's schedule; ScheduleError says what is wrong.

    Proven: no deadlock; every message sent and received once, in order; a backward uses the version
    of its forward; each version is made once, of its predecessor, and never while a microbatch
    still needs the memory that it goes into; stage k holds at most depth - k microbatches. The
    actions of a batch repeat with a period of two batches, so a few batches stand for all.
    """
    few = replace(pipe, batches=min(pipe.batches, 4))
    return check_actions(few, [tuple(actions(few, stage)) for stage in range(few.depth)])


def check_actions(pipe: Pipeline, schedule: Sequence[Sequence[Action]]) -> Proof:
    """Prove the given actions, one sequence per stage, to be a schedule of the pipeline."""
    proofs = {_execute(pipe, schedule, capacity) for capacity in (0, 1)}
    (proof,) = proofs
    return proof


def _execute(pipe: Pipeline, schedule: Sequence[Sequence[Action]], capacity: int) -> Proof:
    posted = dict.fromkeys(pipe.channels, 0)
    sent = dict.fromkeys(pipe.channels, 0)
    stages = [_Stage(pipe, index, posted, sent, capacity) for index in range(pipe.depth)]
    next_action = [0] * pipe.depth
    progress = True
    while progress:
        progress = False
        for stage, todo in zip(stages, schedule, strict=True):
            while next_action[stage.index] < len(todo) and stage.ready(
                todo[next_action[stage.index]]
            ):
                stage.perform(todo[next_action[stage.index]])
                next_action[stage.index] += 1
                progress = True
    stuck = [
        f"stage {k} at {todo[at]}"
        for k, (at, todo) in enumerate(zip(next_action, schedule, strict=True))
        if at < len(todo)
    ]
    _must(not stuck, f"deadlock at channel capacity {capacity}: {', '.join(stuck)}")
    for channel in pipe.channels:
        total = pipe.batches * (1 if _per_batch(channel) else pipe.microbatches)
        _must(sent[channel] == total, f"{channel} was sent {sent[channel]} of {total} times")
        _must(
            posted[channel] == total, f"{channel} was received {posted[channel]} of {total} times"
        )
    for stage in stages:
        stage.finish()
    return Proof(tuple(s.peak for s in stages), tuple(s.versions for s in stages))


class _Stage:
    """What one stage has done so far."""

    def __init__(
        self,
        pipe: Pipeline,
        index: int,
        posted: dict[Channel, int],
        sent: dict[Channel, int],
        capacity: int,
    ) -> None:
        self.pipe = pipe
        self.index = index
        self.posted = posted
        self.sent = sent
        self.capacity = capacity
        self.in_flight: dict[int, int] = {}  # microbatch -> version of its forward
        self.forwards = self.backwards = self.reduced = self.updated = self.merged = 0
        self.peak = 0
        self.versions = 1
        self.tied = any(c.flow is Flow.TIED and c.target == index for c in pipe.channels)

    def ready(self, action: Action) -> bool:
        if action.kind is Kind.RECEIVE:
            return True
        if action.kind is Kind.SEND:
            assert action.channel is not None
            return action.index < self.posted[action.channel] + self.capacity
        needs = {
            Kind.FORWARD: Flow.ACTIVATION,
            Kind.BACKWARD: Flow.GRADIENT,
            Kind.REDUCE: Flow.LOSS,
            Kind.UPDATE: Flow.LOSS,
            Kind.MERGE: Flow.TIED,
        }.get(action.kind)
        return all(
            min(self.sent[c], self.posted[c]) > action.index
            for c in self.pipe.channels
            if c.target == self.index and c.flow is needs
        )

    def perform(self, action: Action) -> None:
        {
            Kind.RECEIVE: self._receive,
            Kind.SEND: self._send,
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.REDUCE: self._reduce,
            Kind.UPDATE: self._update,
            Kind.MERGE: self._merge,
        }[action.kind](action)

    def _receive(self, action: Action) -> None:
        assert action.channel is not None
        _must(action.channel.target == self.index, f"stage {self.index} receives {action.channel}")
        self._count(self.posted, action)

    def _send(self, action: Action) -> None:
        channel = action.channel
        assert channel is not None
        _must(channel.source == self.index, f"stage {self.index} sends {channel}")
        done = {
            Flow.ACTIVATION: self.forwards,
            Flow.GRADIENT: self.backwards,
            Flow.TIED: self.updated,
            Flow.LOSS: self.forwards // self.pipe.microbatches,
        }[channel.flow]
        _must(action.index < done, f"{action} before there is anything to send")
        self._count(self.sent, action)

    def _count(self, counts: dict[Channel, int], action: Action) -> None:
        assert action.channel is not None
        expected = counts[action.channel]
        _must(action.index == expected, f"{action} instead of message {expected}")
        counts[action.channel] += 1

    def _forward(self, action: Action) -> None:
        _must(action.index == self.forwards, f"{action} instead of forward {self.forwards}")
        expected = self.pipe.version(action.index)
        _must(action.version == expected, f"{action} should use version {expected}")
        made = self._made()
        _must(action.version <= made, f"{action} before version {action.version} is made")
        _must(action.version > self.updated - self.pipe.copies, f"{action}: version was replaced")
        self.forwards += 1
        self.in_flight[action.index] = action.version
        self.peak = max(self.peak, len(self.in_flight))
        limit = self.pipe.depth - self.index
        _must(
            len(self.in_flight) <= limit, f"stage {self.index} holds more than {limit} at {action}"
        )
        self._live()

    def _backward(self, action: Action) -> None:
        _must(action.index == self.backwards, f"{action} instead of backward {self.backwards}")
        _must(action.index in self.in_flight, f"{action} before its forward")
        version = self.in_flight.pop(action.index)
        _must(action.version == version, f"{action} but its forward used version {version}")
        batch = action.index // self.pipe.microbatches
        _must(self.updated == batch, f"{action} while gradients of another batch are kept")
        self.backwards += 1

    def _reduce(self, action: Action) -> None:
        self._batch_done(action)
        _must(self.pipe.replicated and action.index == self.reduced, f"{action} out of order")
        self.reduced += 1

    def _update(self, action: Action) -> None:
        self._batch_done(action)
        _must(action.index == self.updated, f"{action} instead of update {self.updated}")
        _must(action.version == action.index + 1, f"{action} makes another version")
        _must(not self.pipe.replicated or self.reduced > action.index, f"{action} before the sum")
        _must(not self.tied or self.merged == action.index, f"{action} of an unfinished version")
        replaced = action.version - self.pipe.copies
        users = [i for i, version in self.in_flight.items() if version <= replaced]
        _must(not users, f"{action} overwrites the weights that microbatches {users} run on")
        self.updated += 1
        self._live()

    def _merge(self, action: Action) -> None:
        _must(self.tied and action.index == self.merged < self.updated, f"{action} out of order")
        _must(action.version == action.index + 1, f"{action} makes another version")
        self.merged += 1

    def _batch_done(self, action: Action) -> None:
        needed = (action.index + 1) * self.pipe.microbatches
        _must(self.backwards == needed, f"{action} after {self.backwards} of {needed} backwards")

    def _made(self) -> int:
        return self.merged if self.tied else self.updated

    def _live(self) -> None:
        live = {*self.in_flight.values(), self.updated}
        self.versions = max(self.versions, len(live))
        _must(
            len(live) <= self.pipe.copies, f"stage {self.index} needs the versions {sorted(live)}"
        )

    def finish(self) -> None:
        total = self.pipe.batches * self.pipe.microbatches
        done = (self.forwards, self.backwards, self.updated, self._made())
        expected = (total, total, self.pipe.batches, self.pipe.batches)
        _must(done == expected, f"stage {self.index} ended after {done} of {expected}")


def _per_batch(channel: Channel) -> bool:
    return channel.flow in (Flow.TIED, Flow.LOSS)


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ScheduleError(otherwise)
