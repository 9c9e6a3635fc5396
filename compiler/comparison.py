"""A run as its trace shows it, beside the plan and the simulation: where predictions go wrong."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p2bw.compiler.plan import Plan, wrong_field
from p2bw.compiler.simulation.job import StageTimes, times_of_stages
from p2bw.compiler.simulation.simulate import simulate
from p2bw.contract.errors import InputFileError, MismatchError, UsageError
from p2bw.telemetry.trace import RUN

_LEAST = 4  # updates: the first two fill the pipeline and warm up, the last drains it
_COMPUTE = re.compile(r"([FBNUM])(\d+)(?: w\d+)?")


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds, or shares of the time, as planned (or simulated) and as they were."""

    planned: float
    measured: float

    @property
    def ratio(self) -> float | None:
        return self.measured / self.planned if self.planned else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageComparison:
    """One stage: medians over the microbatches, or updates, of all its ranks."""

    stage: int
    ranks: tuple[int, ...]
    forward_s: Pair
    backward_s: Pair  # with the forward again, where the stage recomputes
    norm_s: Pair  # of a batch's gradients; 0 where they are not clipped
    update_s: Pair
    waiting: Pair  # share of the time in which it does not compute; simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What made the run slower (or faster) than predicted, in seconds of one microbatch."""

    what: str  # forward, backward, norm, update, waiting
    stage: int
    planned_s: float
    measured_s: float
    seconds: float  # per microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run beside its plan. Times are seconds; a period is that of one microbatch."""

    schedule: str
    microbatches: int  # per update
    updates: int  # that were compared
    stages: tuple[StageComparison, ...]
    planned_period_s: float  # simulated, with the plan's times
    replayed_period_s: float  # simulated, with the times of the trace
    measured_period_s: float
    largest: Difference

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Run(BaseModel):
    """What the trace says of its run."""

    model_config = ConfigDict(frozen=True, strict=True)
    schedule: Literal["2bw", "flush", "gpipe", "stash"]
    microbatches: int = Field(ge=1)
    clipped: bool
    depth: int = Field(ge=1)
    width: int = Field(ge=1)


class _Event(BaseModel):
    """An event of a trace, with what is used of it."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)
    pid: int
    ph: str
    name: str
    tid: int = 0
    ts: float = 0.0  # microseconds
    dur: float = Field(0.0, ge=0)
    args: dict[str, Any] = {}


@dataclass(slots=True)
class _Rank:
    """The computations of a rank: index -> seconds, and when the backwards ended."""

    spans: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    ended: dict[int, float] = field(default_factory=dict)

    def add(self, kind: str, index: int, start_s: float, length_s: float) -> None:
        self.spans[kind][index] = length_s
        if kind == "B":
            self.ended[index] = start_s + length_s


def compare(plan: Plan, trace: Path) -> Comparison:
    """Compare a plan with the trace of a run of it.

    InputFileError for what is no trace, MismatchError for one of another plan, UsageError for one
    that is too short to tell anything.
    """
    run, ranks = _read(trace)
    if (run.depth, run.width) != (plan.depth, plan.width):
        raise MismatchError(
            f"{trace} is of {run.depth} stages x {run.width} replicas, the plan has "
            f"{plan.depth} x {plan.width}"
        )
    as_run = plan.model_copy(
        update={
            "schedule": run.schedule,
            "microbatches_per_update": run.microbatches,
            "clip_norm": (plan.clip_norm or 1.0) if run.clipped else None,
        }
    )
    steady = _steady(run, ranks, trace)
    planned = times_of_stages(as_run)
    measured = [_median_times(run, [ranks[r] for r in s.devices], steady) for s in plan.stages]
    expected = simulate(as_run, times=planned)
    replayed = simulate(as_run, times=measured)
    period_s = median(_period(rank, run, steady) for rank in ranks.values())
    waits = {device.stage: 1 - device.busy for device in expected.devices}
    stages = tuple(
        StageComparison(
            stage=stage.index,
            ranks=stage.devices,
            forward_s=Pair(before.forward_s, now.forward_s),
            backward_s=Pair(before.backward_s, now.backward_s),
            norm_s=Pair(before.norm_s or 0.0, now.norm_s or 0.0),
            update_s=Pair(before.update_s, now.update_s),
            waiting=Pair(
                waits[stage.index], max(0.0, 1 - now.per_microbatch_s(run.microbatches) / period_s)
            ),
        )
        for stage, before, now in zip(plan.stages, planned, measured, strict=True)
    )
    return Comparison(
        schedule=run.schedule,
        microbatches=run.microbatches,
        updates=len(steady),
        stages=stages,
        planned_period_s=expected.period_s,
        replayed_period_s=replayed.period_s,
        measured_period_s=period_s,
        largest=_largest(stages, run.microbatches, period_s, replayed.period_s),
    )


def _read(path: Path) -> tuple[_Run, Mapping[int, _Rank]]:
    try:
        events = json.loads(path.read_bytes())["traceEvents"]
        found = [_Event.model_validate(event) for event in events]
        run = next((_Run.model_validate(e.args) for e in found if e.name == RUN), None)
    except OSError as error:
        raise InputFileError(f"{path}: {error.strerror}; `p2bw run --trace` writes one") from None
    except ValidationError as error:
        wrong = wrong_field(error, "the events")
        raise InputFileError(f"{path} is no trace of p2bw: {wrong}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputFileError(f"{path} is no trace of p2bw: no list of events") from None
    if run is None:
        raise InputFileError(f"{path} is no trace of p2bw: it does not say what was run")
    ranks: dict[int, _Rank] = defaultdict(_Rank)
    for event in found:
        match = _COMPUTE.fullmatch(event.name) if (event.ph, event.tid) == ("X", 0) else None
        if match:
            ranks[event.pid].add(match[1], int(match[2]), event.ts / 1e6, event.dur / 1e6)
    missing = [r for r in range(run.depth * run.width) if r not in ranks]
    if missing or len(ranks) > run.depth * run.width:
        raise InputFileError(
            f"{path} lacks the ranks {', '.join(map(str, missing))}: on several machines each "
            f"keeps its own parts"
            if missing
            else f"{path} has more ranks than its run"
        )
    return run, ranks


def _steady(run: _Run, ranks: Mapping[int, _Rank], path: Path) -> range:
    """The updates, by number, in which every rank was in its stride."""
    m = run.microbatches
    whole = [
        {i // m for i in rank.ended if all(i // m * m + j in rank.ended for j in range(m))}
        for rank in ranks.values()
    ]
    seen = sorted(set.intersection(*whole))
    if len(seen) < _LEAST:
        raise UsageError(
            f"{path} has {len(seen)} whole updates; run {_LEAST} steps or more with --trace"
        )
    return range(seen[2], seen[-1])


def _median_times(run: _Run, ranks: Sequence[_Rank], steady: range) -> StageTimes:
    m = run.microbatches
    wanted = range(steady.start * m, steady.stop * m)

    def of_microbatches(kind: str) -> float:
        return median(s for rank in ranks for i, s in rank.spans[kind].items() if i in wanted)

    def of_batches(kinds: str) -> float:
        return median(
            sum(rank.spans[kind].get(batch, 0.0) for kind in kinds)
            for rank in ranks
            for batch in steady
        )

    return StageTimes(
        of_microbatches("F"),
        of_microbatches("B"),
        update_s=of_batches("UM"),
        norm_s=of_batches("N"),
    )


def _period(rank: _Rank, run: _Run, steady: range) -> float:
    """Seconds per microbatch between the ends of the updates before the first and of the last."""
    m = run.microbatches
    first, last = steady.start * m - 1, steady.stop * m - 1
    return (rank.ended[last] - rank.ended[first]) / (last - first)


def _largest(
    stages: Sequence[StageComparison], m: int, period_s: float, replayed_s: float
) -> Difference:
    """Of one stage's work, or of the messages: what the measured times do not explain."""
    found = []
    for stage in stages:
        for what, share in (("forward", 1), ("backward", 1), ("norm", m), ("update", m)):
            pair: Pair = getattr(stage, f"{what}_s")
            found.append(
                Difference(
                    what=what,
                    stage=stage.stage,
                    planned_s=pair.planned,
                    measured_s=pair.measured,
                    seconds=(pair.measured - pair.planned) / share,
                )
            )
    slowest = max(stages, key=lambda s: s.forward_s.measured + s.backward_s.measured).stage
    found.append(
        Difference(
            what="waiting",
            stage=slowest,
            planned_s=replayed_s,
            measured_s=period_s,
            seconds=period_s - replayed_s,
        )
    )
    return max(found, key=lambda difference: abs(difference.seconds))
