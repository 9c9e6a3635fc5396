"""simulate: how a plan's schedule goes on its topology."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from p2bw.compiler.plan import Plan, read_plan
from p2bw.compiler.simulation.engine import Engine, Mark, Record, Usage
from p2bw.compiler.simulation.job import PPM, PS, Job, StageTimes, make_job, planned_times
from p2bw.compiler.simulation.result import DeviceUse, LinkUse, Simulation
from p2bw.compiler.simulation.trace import Spans
from p2bw.contract.errors import UsageError
from p2bw.contract.schedule import Kind

BATCHES = 10
_SOON = 4  # batches after the pipeline is full in which a cycle is looked for first
_STEADY = 12  # and then
_JITTERED = 256  # microbatches of which the mean is taken, at least, where there can be none


def simulate(
    plan: Plan | str | Path,
    *,
    times: Sequence[StageTimes] | None = None,
    batches: int = BATCHES,
    jitter: float = 0.0,
    seed: int = 0,
    stragglers: Mapping[int, float] | None = None,
    trace: str | Path | None = None,
) -> Simulation:
    """Simulate a plan, or that of an artifact: discrete events, no tensors.

    `times` are those of each stage, measured; without them, the plan's. Each computation takes up
    to `jitter` (a share) more or less time, drawn with `seed`; `stragglers` says of ranks how many
    times as long all of theirs take. `trace` is written for Perfetto, as a run's is. UsageError for
    what does not fit the plan.
    """
    if not isinstance(plan, Plan):
        plan = read_plan(Path(plan))
    if batches < 1:
        raise UsageError(f"{batches} batches are nothing to simulate; ask for 1 or more")
    job = make_job(
        plan, times=times, batches=batches, jitter=jitter, seed=seed, stragglers=stragglers
    )
    steady = find_steady(job)
    if trace is None:
        whole = whole_run(job, steady)
    else:
        spans = Spans(job)
        whole = run_whole(job, spans.record, spans.usage)
        spans.write(Path(trace), plan, steady.engine.symmetry.classes)
    times = times or [planned_times(plan, stage) for stage in plan.stages]
    batch = steady.elapsed / steady.batches
    if not steady.exact:  # it may still be filling up in front of the slowest
        batch = max(batch, _longest(job))
    period_s = batch / PS / job.pipe.microbatches
    return Simulation(
        schedule=job.pipe.schedule,
        depth=plan.depth,
        width=plan.width,
        microbatches=job.pipe.microbatches,
        period_s=period_s,
        samples_per_s=plan.microbatch * plan.width / period_s if period_s else 0.0,
        utilisation=_utilisation(plan, times, period_s),
        planned_period_s=plan.period_s,
        cycle_batches=steady.batches if steady.exact else None,
        batches=batches,
        total_s=whole.total / PS,
        start_s=whole.start / PS,
        drain_s=whole.drain / PS,
        devices=_devices(plan, steady),
        links=_links(steady),
    )


@dataclass(frozen=True, slots=True)
class Steady:
    """The steady state between two marks of a simulation."""

    engine: Engine
    first: Mark
    last: Mark
    exact: bool  # the state is the same at both

    @property
    def batches(self) -> int:
        return self.last.batch - self.first.batch

    @property
    def elapsed(self) -> int:
        return self.last.at - self.first.at


def find_steady(job: Job) -> Steady:
    """Simulate until the state comes again; where it does not, take what is between fill and drain.

    Actions are the same in every batch but for the first ones, which fill the pipeline, and the
    last, which drain it; so what follows a state that came again is a repetition, too. Mostly it
    comes soon: so a short run is tried first, and goes on to its end, for `whole_run`.
    """
    fill = _fill(job)
    if job.jitter:  # no state comes again
        batches = max(2 * fill - -_JITTERED // job.pipe.microbatches, job.pipe.batches)
        return _search(job, batches, fill, fill)
    steady = _search(job, 2 * fill + _SOON, fill, fill)
    return steady if steady.exact else _search(job, 3 * fill + _STEADY, fill, 2 * fill, stop=True)


def _search(job: Job, batches: int, first: int, mean: int, stop: bool = False) -> Steady:
    """Look from batch `first` on, and to the end or until a state comes again.

    If none does, the mean is that from batch `mean` on.
    """
    last = batches - _fill(job)
    marks: dict[object, Mark] = {}
    found: list[tuple[Mark, Mark]] = []

    def watch(mark: Mark) -> bool:
        if first <= mark.batch <= last and not found:
            key = mark.batch if job.jitter else mark.state
            if key in marks:
                found.append((marks[key], mark))
            marks.setdefault(key, mark)
        return not (stop and found)

    engine = Engine(replace(job, pipe=replace(job.pipe, batches=batches)), watch=watch)
    engine.run()
    for one, other in found:
        return Steady(engine, one, other, True)
    every = list(marks.values())
    return Steady(engine, every[mean - first], every[-1], False)


def _fill(job: Job) -> int:
    """Batches after which the pipeline is full, and before the end of which it begins to drain."""
    pipe = job.pipe
    ahead = 0 if pipe.drains else pipe.depth + pipe.extra
    return 2 + -(-ahead // pipe.microbatches)


@dataclass(frozen=True, slots=True)
class Whole:
    """A run from its start to its end, in picoseconds."""

    total: int
    start: int
    drain: int


def run_whole(job: Job, record: Record | None = None, usage: Usage | None = None) -> Whole:
    """Simulate every batch."""
    engine = Engine(job, record=record, usage=usage)
    engine.run()
    return _whole(engine)


def _whole(engine: Engine) -> Whole:
    total = max(engine.ended)
    return Whole(total, engine.first_close, total - engine.last_forward)


def whole_run(job: Job, steady: Steady) -> Whole:
    """Without simulating what is known: batches that only repeat others."""
    more = job.pipe.batches - steady.engine.pipe.batches
    repeats = steady.exact and more > 0 and more % steady.batches == 0
    if steady.engine.going and (more == 0 or repeats):
        whole = _whole(steady.engine)
        return replace(whole, total=whole.total + more // steady.batches * steady.elapsed)
    cycles = 0
    if steady.exact:
        least = steady.last.batch + _fill(job) + 1
        cycles = max(0, (job.pipe.batches - least) // steady.batches)
        batches = job.pipe.batches - cycles * steady.batches
        job = replace(job, pipe=replace(job.pipe, batches=batches))
    whole = run_whole(job)
    return replace(whole, total=whole.total + cycles * steady.elapsed)


def _longest(job: Job) -> int:
    """Picoseconds that the rank with the most work spends on a batch, the runtime's too."""
    m = job.pipe.microbatches
    busy = [
        sum(ps * (m if kind in (Kind.FORWARD, Kind.BACKWARD) else 1) for kind, ps in own.items())
        for own in job.durations
    ]
    return max(
        ps * job.factors.get(rank, PPM) // PPM + m * sum(own.values())
        for ps, own, ranks in zip(busy, job.own, job.ranks, strict=True)
        for rank in ranks
    )


def _utilisation(plan: Plan, times: Sequence[StageTimes], period_s: float) -> float:
    """As the plan counts it: computing the forward again is no use of a device."""
    busy_s = sum(
        t.backward_s if stage.recompute else t.forward_s + t.backward_s
        for stage, t in zip(plan.stages, times, strict=True)
    )
    gpus: int = plan.topology["gpus"]
    return busy_s * plan.width / (gpus * period_s) if period_s else 0.0


def _devices(plan: Plan, steady: Steady) -> tuple[DeviceUse, ...]:
    engine, found = steady.engine, []
    for stage in plan.stages:
        for own, replicas in enumerate(engine.symmetry.classes):
            p = own * plan.depth + stage.index
            waits = steady.last.waited[p] - steady.first.waited[p]
            found.append(
                DeviceUse(
                    stage=stage.index,
                    ranks=tuple(stage.devices[replica] for replica in replicas),
                    busy=(steady.last.busy[p] - steady.first.busy[p]) / max(steady.elapsed, 1),
                    waits={what: ps / max(steady.elapsed, 1) for what, ps in sorted(waits.items())},
                    in_flight=engine.peak_stash[p],
                    peak_bytes=engine.peak[p],
                    planned_bytes=stage.memory.total,
                    limit_bytes=stage.memory.limit,
                )
            )
    return tuple(found)


def _links(steady: Steady) -> tuple[LinkUse, ...]:
    symmetry, elapsed_s = steady.engine.symmetry, max(steady.elapsed, 1) / PS
    sums = zip(steady.last.carried, steady.first.carried, strict=True)
    busy = [
        (last - first) / (bandwidth * elapsed_s)
        for (last, first), bandwidth in zip(sums, symmetry.bandwidth, strict=True)
    ]
    links = map(LinkUse, symmetry.names, symmetry.counts, busy)
    return tuple(sorted(links, key=lambda link: -link.busy))
