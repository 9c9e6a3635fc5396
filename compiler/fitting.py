"""fitting_plan: place the model, cut it, write its stages as code and count their memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from p2bw import __version__
from p2bw.compiler.compilation import Compilation
from p2bw.compiler.describe import describe_stages, opaque_modules, tensor_spec, tied_parameters
from p2bw.compiler.emit import emit_stages, with_headers
from p2bw.compiler.memory import with_memory
from p2bw.compiler.options import checked_autocast
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.result import Limits, Placement
from p2bw.compiler.placement.solver import Problems, solve
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.plan import ModelSource, Optimality, Plan
from p2bw.compiler.program import Program
from p2bw.compiler.simulation.simulate import simulate
from p2bw.compiler.split import StageGraph, split
from p2bw.compiler.units import data, several
from p2bw.contract.errors import InfeasibleError
from p2bw.contract.schedule import most_extra, updates_late

_ROUNDS = 8  # of placing again, with more memory set aside each time


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the plan is to be like, and how long to search; what is None is searched."""

    depth: int | None
    width: int | None
    microbatch: int | None
    recompute: Recompute
    limits: Limits


def fitting_plan(compilation: Compilation, asked: Asked) -> tuple[Plan, dict[str, str]]:
    """A plan whose stages fit as they were counted, not only as the placement adds up blocks.

    With it come the texts of its stage files, by their names in the artifact. What the placement
    adds up is close and mostly more. Where it was less, and a stage does not fit, all is placed
    again with what it lacked set aside for all stages that have a block of it; and should that not
    do, for all.
    """
    for done in range(_ROUNDS):
        placement = _place(compilation, asked)
        plan, texts = _plan(compilation, placement)
        lacking = [
            (stage.memory.total - numbers.total, stage.blocks)
            for stage, numbers in zip(plan.stages, placement.stages, strict=True)
            if stage.memory.total > stage.memory.limit
        ]
        if not lacking:
            return plan, texts
        for size, blocks in lacking:
            compilation.set_aside(blocks, size)
        if done >= _ROUNDS // 2:
            others = {name for stage in plan.stages for name in stage.blocks}
            others -= {name for _, blocks in lacking for name in blocks}
            compilation.set_aside(others, max(lacking)[0])
    raise InfeasibleError(
        f"no placement was found whose stages fit into memory as they were counted: the last one "
        f"lacks {data(max(lacking)[0])}; offer more devices, more memory or a smaller microbatch"
    )


def _place(compilation: Compilation, asked: Asked) -> Placement:
    """Search what is not given; judge the winner on a trace at its own microbatch size."""
    if asked.microbatch is not None:
        compilation.problem(asked.microbatch)  # traced before the clock of the search runs
        return _solved(compilation, compilation.problem, asked)
    found = _solved(compilation, compilation.candidates(), asked)
    if found.microbatch in compilation.problems:
        return found
    return _on_its_own_trace(compilation, asked, found)


def _solved(
    compilation: Compilation, problems: Problems, asked: Asked, start: Placement | None = None
) -> Placement:
    with compilation.phase("solve"), asked.limits.stop:
        compilation.say("placing the stages")
        return solve(
            problems,
            microbatches=None if asked.microbatch is None else (asked.microbatch,),
            depths=None if asked.depth is None else (asked.depth,),
            widths=None if asked.width is None else (asked.width,),
            recompute=asked.recompute,
            limits=asked.limits,
            progress=lambda p: compilation.say(str(p)),
            start=start,
        )


def _on_its_own_trace(compilation: Compilation, asked: Asked, found: Placement) -> Placement:
    """What was found on the line between two traces, solved again on that of its size."""
    exact = {found.microbatch: compilation.problem(found.microbatch)}
    # Once it had to stop, the dynamic program alone competes with what was found.
    limits = asked.limits
    stopped = limits.stop()
    if stopped:
        limits = replace(limits, deterministic_s=0.0, stop=Stop())
    final = _solved(
        compilation,
        exact,
        replace(asked, depth=found.depth, width=found.width, limits=limits),
        start=found if stopped else None,
    )
    space = found.search_space
    if asked.limits.stop() and not stopped and final.status != "optimal":
        space += f"; stopped by {asked.limits.stop.reason}"
    bound = max(found.bound, final.bound)
    return replace(
        final,
        bound=bound,
        gap=max(0.0, bound / final.samples_per_s - 1),
        status=found.status if final.status == "optimal" else final.status,
        search_space=space,
    )


def _plan(compilation: Compilation, placement: Placement) -> tuple[Plan, dict[str, str]]:
    program = compilation.program(placement.microbatch)
    cut = split(program, placement.stage_of_block, placement.relayed)
    plan = _described(compilation, program, cut, placement)
    plan = _with_early(compilation, plan, placement)
    with compilation.phase("emit"):
        compilation.say(f"writing {several(placement.depth, 'stage')}")
        texts = emit_stages(program, cut)
    with compilation.phase("memory"):
        compilation.say("counting memory")
        plan = with_memory(
            plan, program, cut, texts, compilation.file, compilation.topology.device.on_gpu
        )
    with compilation.phase("emit"):
        return plan, with_headers(texts, program, plan)


def _described(
    compilation: Compilation, program: Program, cut: Sequence[StageGraph], placement: Placement
) -> Plan:
    """The plan, with the memory of its stages as the placement adds it up."""
    return Plan(
        p2bw_version=__version__,
        torch_version=torch.__version__.partition("+")[0],
        model=_model_source(compilation, program),
        topology=compilation.topology.to_json(),
        schedule=compilation.schedule,
        depth=placement.depth,
        width=placement.width,
        microbatch=placement.microbatch,
        microbatches_per_update=placement.microbatches_per_update,
        extra_in_flight=0,
        clip_norm=compilation.clip_norm,
        constraints=compilation.rules.texts,
        period_s=placement.period_s,
        samples_per_s=placement.samples_per_s,
        utilisation=placement.utilisation,
        bytes_per_sample=placement.bytes_per_sample,
        optimality=Optimality(
            status=placement.status,
            objective=placement.samples_per_s,
            bound=placement.bound,
            gap=placement.gap,
            search_space=placement.search_space,
        ),
        inputs=tuple(tensor_spec(name, kind) for name, kind in program.inputs.items()),
        tied=tied_parameters(program, cut),
        stages=describe_stages(program, cut, placement),
        opaque=opaque_modules(program, cut),
        notes=program.notes,
    )


def _with_early(compilation: Compilation, plan: Plan, placement: Placement) -> Plan:
    """The plan with a microbatch taken on early by every stage but the last, where that is better.

    It hides what messages take, but lets the sum over the replicas begin later: where that would be
    waited for, both ways are simulated. Whether there is memory for it, `with_memory` finds.
    """
    late = updates_late(
        plan.schedule, replicated=plan.width > 1, clipped=plan.clip_norm is not None
    )
    if most_extra(plan.schedule, plan.depth, plan.microbatches_per_update, late) < 1:
        return plan
    early = plan.model_copy(update={"extra_in_flight": 1})
    waited_for = any(stage.early_s > placement.period_s for stage in placement.stages)
    if not waited_for:
        return early
    with compilation.phase("simulate"):
        compilation.say("simulating it with and without a microbatch taken on early")
        return min(early, plan, key=lambda way: simulate(way).period_s)


def _model_source(compilation: Compilation, program: Program) -> ModelSource:
    file = compilation.file
    return ModelSource(
        file=file.path.name if compilation.weights else _relative(file.path),
        factory=file.factory,
        settings=dict(file.settings),
        autocast=checked_autocast(file.autocast),
        sha256=file.sha256(),
        name=program.model_name,
    )


def _relative(path: Path) -> str:
    """Relative to the working folder where the file lies below it, else the bare name."""
    try:
        return path.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return path.name
