"""Proof of a schedule: it is executed, without tensors, before any rank starts.

Channels are tried at capacity 0, where a send ends only once its receive is posted, and at
capacity 1. What passes cannot deadlock on any transport that buffers at least as much.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from p2bw.contract.actions import actions
from p2bw.contract.schedule import Action, Channel, Flow, Kind, Pipeline

_WAITS = {
    Kind.FORWARD: (Flow.ACTIVATION,),
    Kind.BACKWARD: (Flow.GRADIENT,),
    Kind.CLOSE: (Flow.LOSS,),
    Kind.NORM: (Flow.NORMS, Flow.TIED),
    Kind.UPDATE: (Flow.NORM,),
    Kind.MERGE: (Flow.TIED,),
}


class ScheduleError(AssertionError):
    """A schedule that would hang or compute something else: a bug in what made it."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen while executing, the most of each stage at any time."""

    stash: tuple[int, ...]  # microbatches in flight
    versions: tuple[int, ...]  # of the weights that live
    gradients: tuple[int, ...]  # batches whose gradients live


def check(pipe: Pipeline) -> Proof:
    """Prove a pipeline's schedule; ScheduleError says what is wrong.

    Proven: no deadlock; every message sent and received once, in order; a backward uses the version
    of its forward; each version is made once, of its predecessor, with the norm and the sums that
    it needs, and never while a microbatch still needs the memory that it goes into; stage k holds
    no more microbatches and gradients than its memory is planned for. The actions of a batch repeat
    with a period of few batches, so a few stand for all.
    """
    few = replace(pipe, batches=min(pipe.batches, pipe.first + 4))
    return _check(few, lambda stage: actions(few, stage))


def planned_stash(pipe: Pipeline, stage: int) -> int:
    """Most microbatches in flight (n_k = d - k, and the extra; GPipe keeps all of a batch)."""
    if pipe.schedule == "gpipe":
        return pipe.microbatches
    last = stage == pipe.depth - 1
    count = pipe.depth - stage + (0 if last else pipe.extra)
    return min(count, pipe.microbatches) if pipe.drains else count


def check_actions(pipe: Pipeline, schedule: Sequence[Sequence[Action]]) -> Proof:
    """Prove the given actions, one sequence per stage, to be a schedule of the pipeline."""
    return _check(pipe, lambda stage: iter(schedule[stage]))


def _check(pipe: Pipeline, schedule: Callable[[int], Iterator[Action]]) -> Proof:
    proofs = {_execute(pipe, schedule, capacity) for capacity in (0, 1)}
    (proof,) = proofs
    return proof


def _execute(pipe: Pipeline, schedule: Callable[[int], Iterator[Action]], capacity: int) -> Proof:
    m = pipe.microbatches
    start = {c: pipe.first * (1 if c.per_batch else m) for c in pipe.channels}
    posted, sent = dict(start), dict(start)
    stages = [_Stage(pipe, index, posted, sent, capacity) for index in range(pipe.depth)]
    todo = [schedule(k) for k in range(pipe.depth)]  # made as it is performed: it may be long
    at = [next(following, None) for following in todo]
    progress = True
    while progress:
        progress = False
        for k, stage in enumerate(stages):
            while (action := at[k]) is not None and stage.ready(action):
                stage.perform(action)
                at[k] = next(todo[k], None)
                progress = True
    stuck = [f"stage {k} at {action}" for k, action in enumerate(at) if action is not None]
    _must(not stuck, f"deadlock at channel capacity {capacity}: {', '.join(stuck)}")
    for channel in pipe.channels:
        total = pipe.batches * (1 if channel.per_batch else m)
        for counts, done in ((sent, "sent"), (posted, "received")):
            _must(
                counts[channel] == total,
                "{} was {} {} of {} times",
                channel,
                done,
                counts[channel],
                total,
            )
    for stage in stages:
        stage.finish()
    return Proof(
        tuple(stage.peak for stage in stages),
        tuple(stage.versions for stage in stages),
        tuple(stage.sets for stage in stages),
    )


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
        self.pipe, self.index, self.capacity = pipe, index, capacity
        self.posted, self.sent = posted, sent
        self.in_flight: dict[int, int] = {}  # microbatch -> version of its forward
        self.users: Counter[int] = Counter()  # version -> how many of these
        first = pipe.first
        # By kind: the next batch, or microbatch, to do it.
        self.done: dict[Kind, int] = defaultdict(lambda: first)
        self.done |= {kind: first * pipe.microbatches for kind in (Kind.FORWARD, Kind.BACKWARD)}
        self.peak = self.sets = 0
        self.versions = 1
        self.sums = pipe.sums(index)
        here = [c for c in pipe.channels if c.target == index]
        self.tied = any(c.flow is Flow.TIED for c in here)
        self.waits = {kind: [c for c in here if self._waits(kind, c)] for kind in Kind}
        self.act = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.CLOSE: self._close,
            Kind.GATHER: self._gather,
            Kind.NORM: self._norm,
            Kind.UPDATE: self._update,
            Kind.MERGE: self._merge,
        }

    def _waits(self, kind: Kind, channel: Channel) -> bool:
        if kind is Kind.NORM and channel.flow is Flow.TIED:
            return channel.tensor in self.sums
        return channel.flow in _WAITS.get(kind, ())

    def ready(self, action: Action) -> bool:
        channel = action.channel
        if channel is not None:
            free = self.posted[channel] + self.capacity
            return action.kind is Kind.RECEIVE or action.index < free
        return all(
            min(self.sent[c], self.posted[c]) > action.index for c in self.waits[action.kind]
        )

    def perform(self, action: Action) -> None:
        if action.channel is not None:
            self._message(action, action.channel)
            return
        expected = self.done[action.kind]
        _must(action.index == expected, "{} instead of {}{}", action, action.kind, expected)
        self.act[action.kind](action)
        self.done[action.kind] += 1
        self._live()

    def _message(self, action: Action, channel: Channel) -> None:
        counts, end = self.posted, channel.target
        if action.kind is Kind.SEND:
            counts, end = self.sent, channel.source
            made = {
                Flow.ACTIVATION: self.done[Kind.FORWARD],
                Flow.GRADIENT: self.done[Kind.BACKWARD],
                Flow.TIED: self.done[Kind.GATHER],
                Flow.NORMS: self.done[Kind.NORM],
                Flow.NORM: self.done[Kind.NORM],
                Flow.LOSS: self.done[Kind.FORWARD] // self.pipe.microbatches,
            }[channel.flow]
            _must(action.index < made, "{} before there is anything to send", action)
        _must(end == self.index, "stage {} is no such end of {}", self.index, channel)
        _must(action.index == counts[channel], "{} instead of message {}", action, counts[channel])
        counts[channel] += 1

    def _forward(self, action: Action) -> None:
        expected = self.pipe.version(self.index, action.index)
        _must(action.version == expected, "{} should use version {}", action, expected)
        _must(
            action.version <= self._made(), "{} before version {} is made", action, action.version
        )
        oldest = self.done[Kind.UPDATE] - self.pipe.copies(self.index)
        _must(action.version > oldest, "{}: its version was replaced", action)
        self.in_flight[action.index] = action.version
        self.users[action.version] += 1
        self.peak = max(self.peak, len(self.in_flight))
        limit = planned_stash(self.pipe, self.index)
        _must(self.peak <= limit, "stage {} holds more than {} at {}", self.index, limit, action)

    def _backward(self, action: Action) -> None:
        _must(action.index in self.in_flight, "{} before its forward", action)
        version = self.in_flight.pop(action.index)
        self.users[version] -= 1
        _must(action.version == version, "{} but its forward used version {}", action, version)
        batch = action.index // self.pipe.microbatches
        _must(
            self.done[Kind.CLOSE] == batch, "{} while another batch's gradients are added", action
        )
        sets = batch + 1 - self.done[Kind.UPDATE]
        limit = 2 if self.pipe.late else 1
        _must(
            sets <= limit,
            "{}: stage {} holds the gradients of {} batches",
            action,
            self.index,
            sets,
        )
        self.sets = max(self.sets, sets)

    def _close(self, action: Action) -> None:
        done, m = self.done[Kind.BACKWARD], self.pipe.microbatches
        _must(done == (action.index + 1) * m, "{} after {} backwards", action, done)

    def _gather(self, action: Action) -> None:
        _must(self.done[Kind.CLOSE] > action.index, "{} before the batch is closed", action)

    def _norm(self, action: Action) -> None:
        _must(self.done[Kind.GATHER] > action.index, "{} before the gradients are summed", action)

    def _update(self, action: Action) -> None:
        _must(action.version == action.index + 1, "{} makes another version", action)
        _must(self.done[Kind.GATHER] > action.index, "{} before the gradients are summed", action)
        clips = self.pipe.clipped
        _must(not clips or self.done[Kind.NORM] > action.index, "{} before the norm", action)
        _must(self._made() == action.index, "{} of an unfinished version", action)
        replaced = action.version - self.pipe.copies(self.index)
        users = [i for i, version in self.in_flight.items() if version <= replaced]
        _must(not users, "{} overwrites the weights that microbatches {} run on", action, users)
        self.users = +self.users  # without the versions that are gone

    def _merge(self, action: Action) -> None:
        _must(self.tied and action.index < self.done[Kind.UPDATE], "{} out of order", action)
        _must(action.version == action.index + 1, "{} makes another version", action)

    def _made(self) -> int:
        return self.done[Kind.MERGE if self.tied else Kind.UPDATE]

    def _live(self) -> None:
        live = {self.done[Kind.UPDATE], *(v for v, count in self.users.items() if count)}
        self.versions = max(self.versions, len(live))
        limit = self.pipe.copies(self.index)
        _must(len(live) <= limit, "stage {} needs the versions {}", self.index, sorted(live))

    def finish(self) -> None:
        batches, total = self.pipe.batches, self.pipe.batches * self.pipe.microbatches
        done = (self.done[Kind.FORWARD], self.done[Kind.BACKWARD])
        _must(done == (total, total), "stage {} ended after {} of {}", self.index, done, total)
        _must(self._made() == batches, "stage {} ended at version {}", self.index, self._made())


def _must(holds: bool, otherwise: str, *values: object) -> None:
    """The text is made only where it is needed: a pipeline may have millions of actions."""
    if not holds:
        raise ScheduleError(otherwise.format(*values) if values else otherwise)
