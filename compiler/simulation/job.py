"""What a simulation is made of: a plan as whole picoseconds and bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from p2bw.compiler.plan import Plan, Stage
from p2bw.compiler.topology import Topology
from p2bw.contract.check import planned_stash
from p2bw.contract.errors import UsageError
from p2bw.contract.schedule import Channel, Flow, Kind, Pipeline, make_pipeline

PS = 10**12  # picoseconds in a second
PPM = 10**6  # factors are whole millionths: products of whole numbers are the same everywhere


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage, measured: each microbatch, and each update.

    `backward_s` includes computing the forward again, where the stage does. `norm_s` is what the
    norm of a batch's gradients takes, where they are clipped; None: as long as reading them once.
    """

    forward_s: float
    backward_s: float
    update_s: float = 0.0
    norm_s: float | None = None

    def per_microbatch_s(self, microbatches: int) -> float:
        """Of a microbatch, with its share of the update and of a norm that was measured."""
        update_s = (self.norm_s or 0.0) + self.update_s
        return self.forward_s + self.backward_s + update_s / microbatches


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one stage, by what they last as long as."""

    fixed: int  # weights, optimizer, buffers, reserve
    kept: int  # of one microbatch from its forward to its backward
    again: int  # what a backward makes again first
    transient: int  # of one forward or backward
    gradients: int  # one set, from a batch's first backward to its update


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One simulation; times in picoseconds."""

    pipe: Pipeline
    width: int
    ranks: tuple[tuple[int, ...], ...]  # by stage and replica
    topology: Topology
    durations: tuple[Mapping[Kind, int], ...]  # by stage; none for what takes no time
    own: tuple[Mapping[Kind, int], ...]  # by stage: what the runtime adds to a computation
    memory: tuple[StageMemory, ...]
    sizes: Mapping[Channel, int]  # bytes of a message
    ring: tuple[int, ...]  # by stage: bytes that each replica sends to the next to sum gradients
    factors: Mapping[int, int]  # millionths of the time, of the ranks that are slower than planned
    jitter: int  # millionths that each computation may be faster or slower
    seed: int


def make_job(
    plan: Plan,
    *,
    times: Sequence[StageTimes] | None = None,
    batches: int,
    jitter: float = 0.0,
    seed: int = 0,
    stragglers: Mapping[int, float] | None = None,
) -> Job:
    """UsageError for times, stragglers or a jitter that do not fit the plan."""
    run = plan.for_runtime()
    pipe = make_pipeline(run, batches=batches, clipped=plan.clip_norm is not None)
    times = times if times is not None else [planned_times(plan, s) for s in plan.stages]
    if len(times) != plan.depth:
        raise UsageError(f"times of {len(times)} stages were given; the plan has {plan.depth}")
    if not 0 <= jitter < 1:
        raise UsageError(f"a jitter of {jitter:g} is no share of the time; give 0 to 0.99")
    for rank, factor in (stragglers or {}).items():
        if not 0 <= rank < run.ranks:
            raise UsageError(f"no rank {rank} to slow down: the plan's are 0 to {run.ranks - 1}")
        if not 0 < factor <= 10**6:
            raise UsageError(f"rank {rank} cannot take {factor:g} times as long")
    topology = Topology.from_json(plan.topology)
    memory = tuple(_memory(pipe, stage) for stage in plan.stages)
    return Job(
        pipe=pipe,
        width=plan.width,
        ranks=tuple(stage.devices for stage in plan.stages),
        topology=topology,
        durations=tuple(
            _durations(pipe, plan, stage, given, memory[stage.index].gradients, topology)
            for stage, given in zip(plan.stages, times, strict=True)
        ),
        own=tuple(_own(stage, topology) for stage in plan.stages),
        memory=memory,
        sizes=_sizes(pipe, plan),
        ring=tuple(-(-2 * (plan.width - 1) * own.gradients // plan.width) for own in memory),
        factors={rank: round(factor * PPM) for rank, factor in (stragglers or {}).items()},
        jitter=round(jitter * PPM),
        seed=seed,
    )


def planned_times(plan: Plan, stage: Stage) -> StageTimes:
    """The times that the plan was made with."""
    seconds = stage.compute_s
    return StageTimes(
        forward_s=seconds.forward,
        backward_s=seconds.backward + seconds.recompute,
        update_s=seconds.update * plan.microbatches_per_update,
    )


def times_of_stages(plan: Plan) -> list[StageTimes]:
    """Those of all stages, and of norms what the simulation takes them for."""
    norms = [times[Kind.NORM] / PS for times in make_job(plan, batches=1).durations]
    planned = [planned_times(plan, stage) for stage in plan.stages]
    return [replace(times, norm_s=norm) for times, norm in zip(planned, norms, strict=True)]


def _memory(pipe: Pipeline, stage: Stage) -> StageMemory:
    """The plan's bytes, taken apart: its stash is that of as many microbatches as are in flight."""
    planned = stage.memory
    count = planned_stash(pipe, stage.index)
    kept, again = planned.stash // count, 0
    if stage.recompute:
        kept = min(sum(transfer.bytes for transfer in stage.receives), kept)
        again = planned.stash - count * kept
    sets = 2 if pipe.late else 1
    gradients = planned.gradients // sets
    moving = count * kept + again + planned.transient + sets * gradients
    return StageMemory(planned.total - moving, kept, again, planned.transient, gradients)


def _durations(
    pipe: Pipeline, plan: Plan, stage: Stage, times: StageTimes, gradients: int, topology: Topology
) -> Mapping[Kind, int]:
    """An update's time is shared out by bytes where some parameters are updated apart."""
    shared = sum(t.bytes for t in plan.tied if stage.index in t.stages and len(t.stages) > 1)
    shared = min(shared, gradients)
    update = round(times.update_s * PS)
    merge = update * shared // gradients if gradients else 0
    norm_s = times.norm_s
    if norm_s is None:  # it reads every gradient once
        norm_s = gradients / min(topology.devices[r].sustained_bandwidth for r in stage.devices)
    return {
        Kind.FORWARD: round(times.forward_s * PS),
        Kind.BACKWARD: round(times.backward_s * PS),
        Kind.NORM: round(norm_s * PS) if pipe.clipped else 0,
        Kind.UPDATE: update - merge,
        Kind.MERGE: merge,
    }


def _own(stage: Stage, topology: Topology) -> Mapping[Kind, int]:
    """Where a core runs the runtime and computes, it does not compute meanwhile."""
    devices = topology.devices
    cores = [devices[rank] for rank in stage.devices if devices[rank].runtime_s]
    sent = {
        Kind.FORWARD: sum(transfer.bytes for transfer in stage.sends),
        Kind.BACKWARD: sum(transfer.bytes for transfer in stage.receives if transfer.gradient),
    }
    return {
        kind: round(max((c.runtime_s / 2 + size / c.link for c in cores), default=0.0) * PS)
        for kind, size in sent.items()
    }


def _sizes(pipe: Pipeline, plan: Plan) -> Mapping[Channel, int]:
    """Bytes of each channel's messages. A norm or a loss is so small that only latency counts."""
    sent = {(s.index, t.peer, t.tensor): t.bytes for s in plan.stages for t in s.sends}
    tied = {spec.names[0]: spec.bytes for spec in plan.tied}
    sizes = {}
    for channel in pipe.channels:
        match channel.flow:
            case Flow.ACTIVATION:
                size = sent[channel.source, channel.target, channel.tensor]
            case Flow.GRADIENT:
                size = sent[channel.target, channel.source, channel.tensor]
            case Flow.TIED:
                size = tied[channel.tensor]
            case _:
                size = 0
        sizes[channel] = size
    return sizes
