"""The steps of a stage: its actions as the runtime performs them, and what each waits for."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from p2bw.compiler.simulation.job import Job
from p2bw.contract.actions import actions
from p2bw.contract.schedule import Action, Channel, Flow, Kind, Pipeline

# Which messages an action waits for; a norm and a merge: see `_waits`.
_WAITS = {
    Kind.FORWARD: Flow.ACTIVATION,
    Kind.BACKWARD: Flow.GRADIENT,
    Kind.CLOSE: Flow.LOSS,
    Kind.UPDATE: Flow.NORM,
}
_COMPUTES = (Kind.FORWARD, Kind.BACKWARD, Kind.NORM, Kind.UPDATE, Kind.MERGE)


class Step(NamedTuple):
    """An action, and what the engine has to know of it."""

    action: Action
    duration: int
    channel: int  # of a send or a receive
    waits: tuple[tuple[int, int, Channel], ...]  # channels by number, and which of their messages


def make_steps(job: Job, stage: int, number: dict[Channel, int]) -> Iterator[Step]:
    """A stage's actions, as the runtime performs them (runtime/worker.py)."""
    pipe = job.pipe
    into = [channel for channel in pipe.channels if channel.target == stage]
    waits = {kind: [(number[c], c) for c in _waits(pipe, stage, kind, into)] for kind in Kind}
    for action in actions(pipe, stage):
        duration = job.durations[stage][action.kind] if action.kind in _COMPUTES else 0
        channel = number[action.channel] if action.channel is not None else -1
        wanted = tuple((i, action.index, c) for i, c in waits[action.kind])
        yield Step(action, duration, channel, wanted)


def _waits(pipe: Pipeline, stage: int, kind: Kind, into: Sequence[Channel]) -> list[Channel]:
    """The messages that an action takes, in the order in which the runtime takes them."""
    sums = pipe.sums(stage) if pipe.clipped else set()
    tied = [channel for channel in into if channel.flow is Flow.TIED]
    if kind is Kind.NORM:
        norms = [channel for channel in into if channel.flow is Flow.NORMS]
        return [channel for channel in tied if channel.tensor in sums] + norms
    if kind is Kind.MERGE:
        return [channel for channel in tied if channel.tensor not in sums]
    found = [channel for channel in into if channel.flow is _WAITS.get(kind)]
    if kind is Kind.BACKWARD:  # those of later uses first
        found.sort(key=lambda channel: -channel.source)
    return found
