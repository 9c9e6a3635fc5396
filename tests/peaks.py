"""The true peaks of a plan's stages, each trained alone on the CPU, and those that it promises."""

from pathlib import Path

from p2bw.compiler.plan import Plan
from p2bw.contract.job import Job
from p2bw.measure.alone import peak_on_cpu
from p2bw.runtime.prepare import prepare

STEPS = 4


def measure_peaks(artifact: Path) -> list[int]:
    """The most bytes of tensors that each stage of an artifact ever holds."""
    prepared = prepare(Job(artifact=artifact, steps=STEPS))
    return [peak_on_cpu(prepared, stage) for stage in range(prepared.plan.depth)]


def planned_peaks(plan: Plan) -> list[int]:
    """What the plan says of the same: all but what the framework takes for itself."""
    return [stage.memory.total - stage.memory.reserve for stage in plan.stages]
