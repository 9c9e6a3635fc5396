"""Schedules as data: for each stage the list of its actions, in the order it performs them.

A schedule decides everything that must not depend on timing: the order of forwards and backwards,
the weight version that each uses, when weights are updated, and when messages are sent and their
receives posted. The worker only interprets it; `check` proves it before any rank starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from p2bw.runtime.errors import UsageError
from p2bw.runtime.plan import Plan

SCHEDULES = ("2bw", "flush")


class Flow(StrEnum):
    """What a channel carries: the first two once per microbatch, the others once per batch."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"
    TIED = "tied"  # the gradient of a parameter that lives on both stages
    LOSS = "loss"  # to the stage of rank 0, which reports it


@dataclass(frozen=True, slots=True, order=True)
class Channel:
    """A sequence of messages about one tensor, from one stage to one other, in each replica."""

    flow: Flow
    source: int
    target: int
    tensor: str

    @property
    def distance(self) -> int:
        return abs(self.target - self.source)

    def __str__(self) -> str:
        return f"{self.flow} {self.tensor} {self.source}>{self.target}"


class Kind(StrEnum):
    """What a stage does next. Only FORWARD, BACKWARD, UPDATE and MERGE wait for messages."""

    RECEIVE = "R"  # post the receive of a message
    FORWARD = "F"
    SEND = "S"
    BACKWARD = "B"
    REDUCE = "A"  # start the sum of the batch's gradients over the replicas
    UPDATE = "U"  # make the next version of the stage's own parameters
    MERGE = "M"  # make the next version of the parameters that it shares with other stages


@dataclass(frozen=True, slots=True)
class Action:
    """One step of one stage. `index` counts microbatches, or batches where one is meant."""

    kind: Kind
    index: int
    version: int = 0  # of the weights that F and B use and that U and M make
    channel: Channel | None = None

    def __str__(self) -> str:
        if self.channel is not None:
            return f"{self.kind}{self.index}({self.channel})"
        return f"{self.kind}{self.index}" + ("" if self.kind is Kind.REDUCE else f"w{self.version}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """All that a schedule is made of."""

    schedule: str
    depth: int
    microbatches: int  # m, per update
    batches: int
    channels: tuple[Channel, ...]  # each stage's sends in the order in which it makes them
    replicated: bool = False

    def version(self, microbatch: int) -> int:
        """The weight version that a microbatch runs on, at every stage, forward and backward.

        2bw: batch t runs on W(max(t-1, 0)), a delay of exactly one (PipeDream-2BW, section 3.1).
        """
        batch = microbatch // self.microbatches
        return max(batch - 1, 0) if self.schedule == "2bw" else batch

    @property
    def copies(self) -> int:
        """How many weight versions live at the same time."""
        return 2 if self.schedule == "2bw" else 1

    def ahead(self, stage: int) -> int:
        """How many forwards a stage runs ahead of its backwards."""
        if self.schedule == "2bw":
            return self.depth - 1 - stage
        return min(self.depth - 1 - stage, self.microbatches - 1)


def make_pipeline(
    plan: Plan, *, batches: int, schedule: str | None = None, microbatches: int | None = None
) -> Pipeline:
    """The pipeline of a plan; UsageError if the schedule cannot run with so few microbatches."""
    schedule = schedule or plan.schedule
    m = plan.microbatches_per_update if microbatches is None else microbatches
    if schedule not in SCHEDULES:
        raise UsageError(f"no schedule {schedule!r} to run; there are {', '.join(SCHEDULES)}")
    if batches < 1 or m < 1:
        raise UsageError(
            f"{batches} steps of {m} microbatches are nothing to do; ask for 1 or more"
        )
    if schedule == "2bw" and m < plan.depth:
        raise UsageError(
            f"{m} microbatches per update are too few for 2bw with {plan.depth} stages: the "
            f"pipeline would need a third version of the weights; use --microbatches {plan.depth} "
            f"or more, or --schedule flush"
        )
    return Pipeline(
        schedule=schedule,
        depth=plan.depth,
        microbatches=m,
        batches=batches,
        channels=channels(plan),
        replicated=plan.width > 1,
    )


def channels(plan: Plan) -> tuple[Channel, ...]:
    """Every channel of a plan, the same tuple on every rank."""
    found = []
    for stage in plan.stages:
        for transfer in stage.sends:
            name, peer = transfer.tensor, transfer.peer
            found.append(Channel(Flow.ACTIVATION, stage.index, peer, name))
            if transfer.gradient:
                found.append(Channel(Flow.GRADIENT, peer, stage.index, name))
    for tied in plan.tied:
        found += [
            Channel(Flow.TIED, a, b, tied.names[0])
            for a in tied.stages
            for b in tied.stages
            if a != b
        ]
    home, _ = plan.position(0)
    if home != plan.loss_stage:
        found.append(Channel(Flow.LOSS, plan.loss_stage, home, "loss"))
    return tuple(found)


def actions(pipe: Pipeline, stage: int) -> Iterator[Action]:
    """The actions of one stage, from the first forward to the last update, made as they are used.

    Receives are posted as many messages ahead as the channel spans stages. Then a send always
    finds its receive posted (`check` proves it), and a message crosses while both ends compute.
    """
    return _Stage(pipe, stage).actions()


def compute_order(pipe: Pipeline, stage: int) -> Iterator[tuple[Kind, int]]:
    """Forwards and backwards in order: some forwards ahead, then one of each in turn (1F1B).

    2bw never drains the pipeline before the end of the run, flush drains it after every batch.
    """
    ahead = pipe.ahead(stage)
    total = pipe.microbatches * pipe.batches
    span = total if pipe.schedule == "2bw" else pipe.microbatches
    for start in range(0, total, span):
        end = start + span
        for microbatch in range(start, min(start + ahead, end)):
            yield Kind.FORWARD, microbatch
        for microbatch in range(start, end):
            if microbatch + ahead < end:
                yield Kind.FORWARD, microbatch + ahead
            yield Kind.BACKWARD, microbatch


class _Stage:
    """Weaves messages and updates into the compute order of one stage."""

    def __init__(self, pipe: Pipeline, stage: int) -> None:
        self.pipe = pipe
        self.stage = stage
        self.posted: dict[Channel, int] = {}
        self.reduced: int | None = None  # batch whose gradients are summed, update to come
        self.updated: int | None = None  # batch whose shared parameters are to be merged
        self.inbound = {
            f: [c for c in pipe.channels if (c.flow, c.target) == (f, stage)] for f in Flow
        }
        self.outbound = {
            f: [c for c in pipe.channels if (c.flow, c.source) == (f, stage)] for f in Flow
        }

    def actions(self) -> Iterator[Action]:
        m = self.pipe.microbatches
        for kind, i in compute_order(self.pipe, self.stage):
            batch, last = i // m, i % m == m - 1
            version = self.pipe.version(i)
            if kind is Kind.FORWARD:
                if version > 0 and self.updated == version - 1:
                    yield from self.merge()
                yield from self.forward(i, version)
                if last:
                    yield from self.send(Flow.LOSS, batch)
            else:
                yield from self.update()
                yield from self.backward(i, version)
                if last:
                    yield from self.reduce(batch)
        yield from self.update()
        yield from self.merge()

    def forward(self, i: int, version: int) -> Iterator[Action]:
        if i == 0:
            yield from self.receive(Flow.GRADIENT, -1)
        yield from self.receive(Flow.ACTIVATION, i)
        yield Action(Kind.FORWARD, i, version)
        yield from self.send(Flow.ACTIVATION, i)

    def backward(self, i: int, version: int) -> Iterator[Action]:
        yield from self.receive(Flow.GRADIENT, i)
        yield from self.receive_of_batch(i)
        yield Action(Kind.BACKWARD, i, version)
        yield from self.send(Flow.GRADIENT, i)

    def reduce(self, batch: int) -> Iterator[Action]:
        """After a batch's last backward: update, at once if nothing is to be waited for.

        The sum over replicas gets one forward of slack under 2bw. It cannot get more for free:
        the next backward would need a second set of gradients.
        """
        self.reduced = batch
        if self.pipe.replicated:
            yield Action(Kind.REDUCE, batch)
        if not self.pipe.replicated or self.pipe.schedule != "2bw":
            yield from self.update()

    def update(self) -> Iterator[Action]:
        if self.reduced is None:
            return
        batch, self.reduced = self.reduced, None
        yield from self.merge()
        yield Action(Kind.UPDATE, batch, batch + 1)
        yield from self.send(Flow.TIED, batch)
        if self.inbound[Flow.TIED]:
            self.updated = batch

    def merge(self) -> Iterator[Action]:
        """As late as the next version allows: the stages reach the end of a batch one by one."""
        if self.updated is not None:
            batch, self.updated = self.updated, None
            yield Action(Kind.MERGE, batch, batch + 1)

    def send(self, flow: Flow, index: int) -> Iterator[Action]:
        for channel in self.outbound[flow]:
            yield Action(Kind.SEND, index, channel=channel)

    def receive(self, flow: Flow, index: int) -> Iterator[Action]:
        """Post what message `index` and those posted ahead of it still lack."""
        total = self.pipe.microbatches * self.pipe.batches
        for source in dict.fromkeys(channel.source for channel in self.inbound[flow]):
            same = [channel for channel in self.inbound[flow] if channel.source == source]
            end = min(index + same[0].distance + 1, total)
            for message in range(self.posted.get(same[0], 0), end):
                yield from (Action(Kind.RECEIVE, message, channel=channel) for channel in same)
            self.posted.update(dict.fromkeys(same, max(end, self.posted.get(same[0], 0))))

    def receive_of_batch(self, i: int) -> Iterator[Action]:
        """Later stages finish a batch's forwards and updates earlier: post that much ahead."""
        m = self.pipe.microbatches
        batch, left = i // m, m - 1 - i % m
        for flow in (Flow.TIED, Flow.LOSS):
            for channel in self.inbound[flow]:
                ahead = min(max(channel.source - self.stage, 0), m - 1)
                if left == ahead:
                    yield Action(Kind.RECEIVE, batch, channel=channel)


def show(pipe: Pipeline) -> str:
    """The compute actions of every stage, one line each: F3w1 is forward 3 on weight version 1."""
    return "\n".join(
        f"{stage}: " + " ".join(str(a) for a in actions(pipe, stage) if a.channel is None)
        for stage in range(pipe.depth)
    )
