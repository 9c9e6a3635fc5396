"""Schedules as data: for each stage the list of its actions, in the order it performs them.

A schedule decides everything that must not depend on timing: the order of forwards and backwards,
the weight version that each uses, when weights are updated, and when messages are sent and their
receives posted. The worker only interprets it; `check` proves it before any rank starts.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from p2bw.contract.errors import UsageError

if TYPE_CHECKING:
    from p2bw.contract.plan import Plan  # which needs torch, and schedules do not

SCHEDULES = ("2bw", "flush", "gpipe", "stash")


class Flow(StrEnum):
    """What a channel carries: the first two once per microbatch, the others once per batch."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"
    TIED = "tied"  # the gradient of a parameter that lives on both stages
    NORMS = "norms"  # of the parameters' gradients, gathered from the last stage down to the first
    NORM = "norm"  # of all gradients, from the first stage to all others
    LOSS = "loss"  # to the stage of rank 0, which reports it


class Channel(NamedTuple):
    """A sequence of messages about one tensor, from one stage to one other, in each replica."""

    flow: Flow
    source: int
    target: int
    tensor: str

    @property
    def distance(self) -> int:
        return abs(self.target - self.source)

    @property
    def per_batch(self) -> bool:
        return self.flow not in (Flow.ACTIVATION, Flow.GRADIENT)

    def __str__(self) -> str:
        return f"{self.flow} {self.tensor} {self.source}>{self.target}"


class Kind(StrEnum):
    """What a stage does next. Posting a receive and sending never wait, the others may."""

    RECEIVE = "R"  # post the receive of a message
    FORWARD = "F"
    SEND = "S"
    BACKWARD = "B"
    CLOSE = "C"  # take the batch's gradients, and start their sum over the replicas
    GATHER = "G"  # wait for that sum; the shares of tied parameters can be sent
    NORM = "N"  # add the norms of this stage's gradients to those of the stages behind it
    UPDATE = "U"  # make the next version of the stage's own parameters
    MERGE = "M"  # make the next version of the parameters that it shares with other stages


class Action(NamedTuple):
    """One step of one stage. `index` counts microbatches, or batches where one is meant."""

    kind: Kind
    index: int  # type: ignore[assignment]  # a tuple's method, not needed here
    version: int = 0  # of the weights that F and B use and that U and M make
    channel: Channel | None = None

    def __str__(self) -> str:
        if self.channel is not None:
            return f"{self.kind}{self.index}({self.channel})"
        return f"{self.kind}{self.index}" + (f"w{self.version}" if self.kind in "FBUM" else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """All that a schedule is made of. Batches and microbatches keep their numbers on a resume."""

    schedule: str
    depth: int
    microbatches: int  # m, per update
    first: int = 0  # the batch that the run begins with
    batches: int  # the one that it ends before
    channels: tuple[Channel, ...]  # each stage's sends in the order in which it makes them
    replicated: bool = False
    clipped: bool = False  # the norm of the whole batch's gradients is limited
    extra: int = 0  # microbatches taken on early, see `ahead`

    def version(self, stage: int, microbatch: int) -> int:
        """The weight version that a microbatch runs on, at a stage, forward and backward.

        2bw: batch t runs on W(max(t-1, 0)), a delay of exactly one (PipeDream-2BW, section 3.1).
        stash: on the newest that the stage has made (PipeDream, section 3.3).
        """
        if self.schedule == "2bw":
            return max(microbatch // self.microbatches - 1, 0)
        ahead = self.ahead(stage) if self.schedule == "stash" else 0
        return max(microbatch - ahead, 0) // self.microbatches

    def copies(self, stage: int) -> int:
        """How many weight versions live at the same time."""
        if self.schedule == "stash":
            return -(-self.ahead(stage) // self.microbatches) + 1
        return 2 if self.schedule == "2bw" else 1

    def ahead(self, stage: int) -> int:
        """How many forwards a stage runs ahead of its backwards.

        With just one for each stage behind it, equal stages wait for every message: a microbatch
        goes around in the time of as many as are in flight, and the time that its messages take.
        One more in flight hides that, and evens out stages that are now faster, now slower.
        """
        if self.schedule == "gpipe":
            return self.microbatches - 1
        behind = self.depth - 1 - stage
        ahead = behind + self.extra if behind else 0
        return min(ahead, self.microbatches - 1) if self.drains else ahead

    def inbound(self, stage: int) -> dict[Flow, list[Channel]]:
        """The channels to a stage, by what they carry."""
        return {f: [c for c in self.channels if (c.flow, c.target) == (f, stage)] for f in Flow}

    def outbound(self, stage: int) -> dict[Flow, list[Channel]]:
        """The channels from a stage, by what they carry."""
        return {f: [c for c in self.channels if (c.flow, c.source) == (f, stage)] for f in Flow}

    def sums(self, stage: int) -> set[str]:
        """The tied parameters that the stage is the first to hold: it adds the norms of these."""
        ties = [c for c in self.channels if c.flow is Flow.TIED]
        held = {c.tensor for c in ties if c.target == stage}
        return held - {c.tensor for c in ties if c.source < stage}

    @property
    def drains(self) -> bool:
        """Whether every batch ends before the next begins."""
        return self.schedule in ("flush", "gpipe")

    @property
    def late(self) -> bool:
        """Whether updates are late, see `updates_late`."""
        return updates_late(self.schedule, replicated=self.replicated, clipped=self.clipped)


def updates_late(schedule: str, *, replicated: bool, clipped: bool) -> bool:
    """Whether updates wait for what other ranks contribute while the next batch runs.

    2bw needs a version only a batch later. The price is a second set of gradients.
    """
    return schedule == "2bw" and (replicated or clipped)


def make_pipeline(
    plan: "Plan",
    *,
    batches: int,
    first: int = 0,
    schedule: str | None = None,
    microbatches: int | None = None,
    clipped: bool = False,
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
            f"or more, a plan of at most {m} stages, or --schedule flush"
        )
    if schedule == "stash" and clipped:
        raise UsageError(
            "under stash the stages update at different times, and there is no norm of a whole "
            "batch's gradients to clip; use --schedule 2bw or flush, or no --clip-norm"
        )
    for tied in plan.tied:
        if schedule == "stash" and len(tied.stages) > 1:
            raise UsageError(
                f"{tied.names[0]} lives on the stages {', '.join(map(str, tied.stages))}, which "
                f"under stash would run on different versions of it; use --schedule 2bw or flush"
            )
    pipe = Pipeline(
        schedule=schedule,
        depth=plan.depth,
        microbatches=m,
        first=first,
        batches=batches,
        channels=channels(plan, clipped=clipped),
        replicated=plan.width > 1,
        clipped=clipped,
    )
    most = most_extra(schedule, plan.depth, m, pipe.late)
    return replace(pipe, extra=min(plan.extra_in_flight, most))


def most_extra(schedule: str, depth: int, microbatches: int, late: bool) -> int:
    """How many microbatches can be taken on early.

    Under 2bw a batch begins when the one before the last has ended, or at least a backward later if
    its version waits for other ranks (`late`); under flush, where the one before has ended. gpipe
    has all of a batch in flight, and under stash more of them would mean older weights.
    """
    if schedule not in ("2bw", "flush") or depth == 1:
        return 0
    return max(0, microbatches - depth + (schedule == "2bw" and not late))


def channels(plan: "Plan", *, clipped: bool = False) -> tuple[Channel, ...]:
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
    if clipped:
        found += [Channel(Flow.NORMS, k, k - 1, "all") for k in range(plan.depth - 1, 0, -1)]
        found += [Channel(Flow.NORM, 0, k, "all") for k in range(1, plan.depth)]
    home, _ = plan.position(0)
    if home != plan.loss_stage:
        found.append(Channel(Flow.LOSS, plan.loss_stage, home, "loss"))
    return tuple(found)
