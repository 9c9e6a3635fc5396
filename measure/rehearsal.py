"""rehearse: every stage of a plan in turn on the one device at hand, against what was predicted."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from p2bw.compiler.plan import Plan, read_plan
from p2bw.compiler.simulation.job import StageTimes, times_of_stages
from p2bw.compiler.simulation.simulate import simulate
from p2bw.contract.errors import ResourceError, UsageError
from p2bw.contract.job import Job
from p2bw.measure.alone import Spans, peak_on_cpu, stage_times, train_alone
from p2bw.measure.device import choose_device, device_name, using_threads
from p2bw.runtime.prepare import Prepared, prepare

MICROBATCHES = 16
_WARM_UP = 2  # batches; the pipeline is being filled, and memory found
_PEAK_BATCHES = 4  # until nothing is held that was not held before


@dataclass(frozen=True, slots=True)
class Pair:
    """What the plan says, and what was measured."""

    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is above what was measured, as a share of that."""
        return self.predicted / self.measured - 1 if self.measured else 0.0

    def to_json(self) -> dict[str, float]:
        return {"predicted": self.predicted, "measured": self.measured, "error": self.error}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRehearsal:
    """One stage: seconds of a microbatch, of an update, and bytes of tensors at the peak.

    `backward_s` includes computing the forward again; `norm_s` is 0 where gradients are not
    clipped; `compute_s` is a microbatch with its share of the norm and the update. The framework's
    reserve is not in the bytes.
    """

    stage: int
    forward_s: Pair
    backward_s: Pair
    norm_s: Pair
    update_s: Pair
    compute_s: Pair
    peak_bytes: Pair

    def to_json(self) -> dict[str, Any]:
        names = ("forward_s", "backward_s", "norm_s", "update_s", "compute_s", "peak_bytes")
        return {"stage": self.stage} | {name: getattr(self, name).to_json() for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Stages that were rehearsed, and the plan simulated with planned and with measured times."""

    device: str
    planned_for: str
    stages: tuple[StageRehearsal, ...]
    period_s: Pair
    samples_per_s: Pair

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "planned_for": self.planned_for,
            "stages": [stage.to_json() for stage in self.stages],
            "period_s": self.period_s.to_json(),
            "samples_per_s": self.samples_per_s.to_json(),
        }


def rehearse(
    artifact: str | Path,
    *,
    stages: Sequence[int] | None = None,
    microbatches: int = MICROBATCHES,
    model: str | Path | None = None,
    device: str | None = None,
    threads: int = 1,
    progress: Callable[[str], None] = lambda message: None,
) -> Rehearsal:
    """Run stages of an artifact as the runtime does, one after the other, with no others in memory.

    Of each, at least so many `microbatches` are timed. Stages that are not rehearsed enter the
    simulation as they were planned.
    """
    plan = read_plan(Path(artifact))
    wanted = sorted(set(range(plan.depth) if stages is None else stages))
    for stage in wanted:
        if not 0 <= stage < plan.depth:
            raise UsageError(f"--stages {stage}: {artifact} has stages 0 to {plan.depth - 1}")
    if microbatches < 1 or threads < 1:
        raise UsageError("--microbatches and --threads: give numbers from 1 on")
    here = choose_device(device)
    batches = _WARM_UP + -(-microbatches // plan.microbatches_per_update)
    where = Path(model) if model else None
    job = Job(artifact=Path(artifact), steps=batches, init="modules", model=where)
    prepared = prepare(job)
    times = times_of_stages(plan)
    planned = simulate(plan, times=times)
    found = []
    with using_threads(threads):
        for stage in wanted:
            progress(f"rehearsing stage {stage} of {plan.depth}")
            measured, peak = _rehearsed(prepared, plan, stage, here)
            found.append(_compared(plan, stage, times[stage], measured, peak))
            times[stage] = measured
    rehearsed = simulate(plan, times=times)
    return Rehearsal(
        device=device_name(here),
        planned_for=plan.topology["device"]["name"],
        stages=tuple(found),
        period_s=Pair(planned.period_s, rehearsed.period_s),
        samples_per_s=Pair(planned.samples_per_s, rehearsed.samples_per_s),
    )


def _rehearsed(
    prepared: Prepared, plan: Plan, stage: int, device: torch.device
) -> tuple[StageTimes, int]:
    """A stage's seconds, and the most bytes of tensors that it ever held."""
    spans = Spans()
    try:
        if device.type == "cuda":
            _forget(device)
            train_alone(prepared, stage, device, spans)
            peak = torch.cuda.max_memory_allocated(device)
        else:
            train_alone(prepared, stage, device, spans)
            short = prepare(replace(prepared.job, steps=_PEAK_BATCHES))
            peak = peak_on_cpu(short, stage)
    except torch.OutOfMemoryError as error:
        memory = plan.stages[stage].memory
        raise ResourceError(
            f"stage {stage} does not fit {device_name(device)}: the plan has "
            f"{memory.total / 2**30:.2f} of {memory.limit / 2**30:.2f} GiB; {error}"
        ) from error
    return stage_times(spans, prepared.pipeline.microbatches, _WARM_UP), peak


def _forget(device: torch.device) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _compared(
    plan: Plan, stage: int, planned: StageTimes, measured: StageTimes, peak: int
) -> StageRehearsal:
    memory, m = plan.stages[stage].memory, plan.microbatches_per_update

    def norm(times: StageTimes) -> float:
        return times.norm_s or 0.0

    return StageRehearsal(
        stage=stage,
        forward_s=Pair(planned.forward_s, measured.forward_s),
        backward_s=Pair(planned.backward_s, measured.backward_s),
        norm_s=Pair(norm(planned), norm(measured)),
        update_s=Pair(planned.update_s, measured.update_s),
        compute_s=Pair(planned.per_microbatch_s(m), measured.per_microbatch_s(m)),
        peak_bytes=Pair(memory.total - memory.reserve, peak),
    )
