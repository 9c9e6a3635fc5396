"""solve_file: place the blocks of a problem from anywhere, in the unit of its file."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from p2bw.compiler.placement import Limits, solve
from p2bw.compiler.placement.additive import solve_loads
from p2bw.compiler.placement.hybrid import solve_hybrid
from p2bw.compiler.placement.loads import LoadProblem
from p2bw.compiler.placement.profile import ProfileProblem
from p2bw.compiler.placement.profile_solver import solve_profile
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.placement.variants import VariantProblem
from p2bw.compiler.placement.windows import TOLERANCE
from p2bw.compiler.problem import PlacementProblem
from p2bw.compiler.readers import read_any
from p2bw.compiler.units import parse_gap
from p2bw.contract.errors import UsageError

Say = Callable[[str], None]
REPLICATIONS = ("uniform", "per-stage")
RECOMPUTED = "activation recomp"  # Piper's name of the variant that recomputes activations


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedStage:
    """What one stage is busy for, and what it holds."""

    load: float
    memory: float
    replicas: int
    device: str
    devices: int = 1  # of each replica
    variants: Mapping[str, str] = field(default_factory=dict)  # by block, where it has several


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A placement and its proof; nothing in `space` has an objective below `bound`."""

    status: Literal["optimal", "feasible"]
    objective: float
    bound: float
    seconds: float
    unit: str
    space: str
    assignment: Mapping[str, int]
    stages: tuple[SolvedStage, ...]

    @property
    def gap(self) -> float:
        return self.objective / self.bound - 1 if self.bound else float(self.objective > 0)

    def to_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap,
            "unit": self.unit,
            "seconds": self.seconds,
            "assignment": dict(self.assignment),
            "stages": [_stage_to_json(stage) for stage in self.stages],
        }


def _stage_to_json(stage: SolvedStage) -> dict[str, Any]:
    fields = asdict(stage)
    if not stage.variants:
        return {name: fields[name] for name in ("load", "memory", "replicas", "device")}
    recomputed = [block for block, variant in stage.variants.items() if variant == RECOMPUTED]
    return fields | {"recompute": recomputed}


def solve_file(
    path: Path,
    *,
    stages: int | None = None,
    cpus: int = 0,
    bandwidth: float | None = None,
    replication: str = "uniform",
    memory: float | None = None,
    gap: str = "0",
    stop: Stop | None = None,
    progress: Say = lambda message: None,
) -> Solution:
    """The best placement of a problem file, and the proof.

    Without `stages`, a PlacementProblem is solved at every depth and another format at as many as
    the file has devices; with it, a PlacementProblem at that depth, another at no more than that.
    With `replication` "per-stage", a stage of Piper's format or of a PipeDream profile has as many
    devices as pay, of `stages` in all; without, it has one. A device has `memory` bytes, if given.
    `gap`: how near to the best a PlacementProblem is solved; other formats always to the end.
    """
    limits = Limits(gap=parse_gap(gap), stop=stop or Stop())
    if stages is not None and stages < 1:
        raise UsageError(f"--stages {stages}: a pipeline has at least one stage")
    if cpus < 0:
        raise UsageError(f"--cpus {cpus}: less than none")
    if replication not in REPLICATIONS:
        raise UsageError(f"--replication {replication}: one of {', '.join(REPLICATIONS)}")
    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        raise UsageError(f"--bandwidth {bandwidth:g}: bytes per second, more than 0")
    started = time.monotonic()
    problem = read_any(path, bandwidth)
    if cpus and not (isinstance(problem, LoadProblem) and problem.timed_on_cpu):
        raise UsageError(f"--cpus {cpus}: {path} does not say how long blocks take on a CPU")
    if isinstance(problem, VariantProblem | ProfileProblem) and memory is not None:
        problem = replace(problem, memory=memory)
    if limits.gap and not isinstance(problem, PlacementProblem):
        raise UsageError(f"--gap {gap}: {path} is of a format that is always solved to the end")
    if isinstance(problem, VariantProblem):
        progress(f"placing {len(problem.nodes)} nodes")
        with stop or Stop() as stop:
            return _solve_variants(problem, stages, replication, started, stop)
    if isinstance(problem, ProfileProblem):
        if stages is None:
            raise UsageError(f"{path} does not say how many devices there are; give --stages")
        progress(f"placing {len(problem.operators)} operators")
        most = stages if replication == "per-stage" else 1
        with stop or Stop() as stop:
            return _solve_profile(problem, stages, most, started, stop)
    if replication == "per-stage" or memory is not None:
        option = "--memory" if replication == "uniform" else "--replication per-stage"
        raise UsageError(f"{option}: not for the format of {path}")
    if isinstance(problem, PlacementProblem):
        progress(f"placing {len(problem.blocks)} blocks")
        with limits.stop:
            return _solve_blocks(problem, stages, started, limits, progress)
    progress(f"placing {len(problem.nodes)} nodes")
    with stop or Stop() as stop:
        return _solve_loads(problem, stages or problem.devices, cpus, started, stop)


def _solve_blocks(
    problem: PlacementProblem, stages: int | None, started: float, limits: Limits, say: Say
) -> Solution:
    depths = None if stages is None else (stages,)
    found = solve(
        {problem.microbatch: problem},
        depths=depths,
        limits=limits,
        progress=lambda p: say(str(p)),
    )
    samples = problem.microbatch * found.width
    return Solution(
        status=found.status,
        objective=1 / found.samples_per_s,
        bound=1 / found.bound,
        seconds=time.monotonic() - started,
        unit="s per sample",
        space=found.search_space,
        assignment=found.stage_of_block,
        stages=tuple(
            SolvedStage(
                load=stage.compute_s / samples,
                memory=stage.total,
                replicas=found.width,
                device=problem.topology.device.name,
            )
            for stage in found.stages
        ),
    )


def _solve_loads(
    problem: LoadProblem, devices: int, cpus: int, started: float, stop: Stop
) -> Solution:
    found = solve_loads(problem, devices, cpus, stop)
    names = [node.name for node in problem.nodes]
    beside = f" and {cpus} CPU{'s' if cpus > 1 else ''}" if cpus else ""
    return Solution(
        status="optimal" if found.bound >= found.objective * (1 - TOLERANCE) else "feasible",
        objective=found.objective,
        bound=found.bound,
        seconds=time.monotonic() - started,
        unit=problem.unit,
        space=f"1..{devices} accelerators{beside} in a row: {found.settled_by}",
        assignment=dict(zip(names, found.place, strict=True)),
        stages=tuple(
            SolvedStage(load=device.load, memory=device.memory, replicas=1, device=device.kind)
            for device in found.devices
        ),
    )


def _solve_variants(
    problem: VariantProblem,
    devices: int | None,
    replication: str,
    started: float,
    stop: Stop,
) -> Solution:
    devices = devices or problem.devices
    found = solve_hybrid(problem, devices, replicated=replication == "per-stage", stop=stop)
    names = [node.name for node in problem.nodes]
    stages = found.stages
    place = {v: k for k, stage in enumerate(stages) for v in stage.nodes}
    kind = "replicated stages" if replication == "per-stage" else "stages of one device"
    return Solution(
        status="optimal" if found.bound >= found.objective * (1 - TOLERANCE) else "feasible",
        objective=found.objective,
        bound=found.bound,
        seconds=time.monotonic() - started,
        unit=problem.unit,
        space=f"1..{devices} devices, {kind}, a variant of each node: {found.settled_by}",
        assignment={name: place[v] for v, name in enumerate(names)},
        stages=tuple(
            SolvedStage(
                load=cost.load,
                memory=cost.memory,
                replicas=stage.replicas,
                device="accelerator" if stage.degree == 1 else f"{stage.degree} accelerators",
                devices=stage.degree,
                variants={
                    names[v]: own.name for v, own in zip(stage.nodes, stage.variants, strict=True)
                },
            )
            for stage, cost in zip(stages, found.costs, strict=True)
        ),
    )


def _solve_profile(
    problem: ProfileProblem, workers: int, most: int, started: float, stop: Stop
) -> Solution:
    found = solve_profile(problem, workers, most, stop)
    names = [op.name for op in problem.operators]
    return Solution(
        status="optimal" if found.bound >= found.objective * (1 - TOLERANCE) else "feasible",
        objective=found.objective,
        bound=found.bound,
        seconds=time.monotonic() - started,
        unit="s per minibatch",
        space=f"1..{workers} workers, at most {most} to a stage: {found.settled_by}",
        assignment=dict(zip(names, found.place, strict=True)),
        stages=tuple(
            SolvedStage(
                load=stage.load, memory=stage.memory, replicas=stage.replicas, device="worker"
            )
            for stage in found.stages
        ),
    )
