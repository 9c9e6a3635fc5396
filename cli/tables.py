"""What the commands print on stdout when a person reads it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from p2bw.compiler import units

if TYPE_CHECKING:
    from p2bw.compiler.onnx.stages import ExportedStages
    from p2bw.compiler.plan import Plan, Stage
    from p2bw.compiler.solve import Solution
    from p2bw.compiler.verification import Verification
    from p2bw.export import Exported

_PIPED_WIDTH = 168  # a file or a pager has no width of its own
_PROBLEMS = 6  # that `verify` prints


def console() -> Console:
    """stdout; as wide as the terminal, or wide enough for the plan where there is none."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(width=width, highlight=False, soft_wrap=False)


def print_plan(plan: Plan, artifact: str) -> None:
    out = console()
    out.print(_title(plan))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    limits = {stage.memory.limit for stage in plan.stages}
    limit = f"total of {units.data(max(limits))}" if len(limits) == 1 else "total"
    columns = ("stage", "ranks", "layers", "params", "fwd", "bwd", "weights", "grads", "optim",
               "stash", "other", limit, "in", "out")  # fmt: skip
    for name in columns:
        words = name == "layers"
        table.add_column(name, justify="left" if words else "right", no_wrap=name != "layers")
    for stage in plan.stages:
        table.add_row(*map(escape, _row(stage, mixed=len(limits) > 1)))
    out.print(table)
    for line in _summary(plan):
        out.print(escape(line))
    out.print(escape(f"artifact    {artifact}"))


def _title(plan: Plan) -> str:
    model, m = plan.model, plan.microbatches_per_update
    batch = plan.microbatch * m * plan.width
    shape = f"{units.several(plan.depth, 'stage')} x {units.several(plan.width, 'replica')}"
    return escape(
        f"{model.name} ({model.file}:{model.factory}) in {shape}, {plan.schedule}, "
        f"microbatch {plan.microbatch}, {units.several(m, 'microbatch')} per update "
        f"(global batch {batch})"
        f"{f', gradients clipped to norm {plan.clip_norm:g}' if plan.clip_norm else ''}"
        f"{f', autocast to {model.autocast}' if model.autocast else ''}"
    )


def _row(stage: Stage, mixed: bool) -> tuple[str, ...]:
    memory, seconds = stage.memory, stage.compute_s
    other = memory.buffers + memory.transient + memory.reserve
    limit = f" of {units.data(memory.limit)}" if mixed else ""
    return (
        f"{stage.index}{' r' if stage.recompute else ''}",
        units.ranges(stage.devices),
        summarise_modules(stage.modules),
        units.parameters(stage.parameters),
        units.seconds(seconds.forward),
        units.seconds(seconds.backward + seconds.recompute),
        units.data(memory.weights),
        units.data(memory.gradients),
        units.data(memory.optimizer),
        units.data(memory.stash),
        units.data(other),
        f"{units.data(memory.total)}{limit} {100 * memory.total / memory.limit:3.0f}%",
        units.data(sum(t.bytes for t in stage.receives)),
        units.data(sum(t.bytes for t in stage.sends)),
    )


def _summary(plan: Plan) -> Iterable[str]:
    proof = plan.optimality
    gap = "proven optimal" if proof.status == "optimal" else f"gap {100 * proof.gap:.2f} %"
    yield (
        f"period      {units.seconds(plan.period_s)} per microbatch, "
        f"{plan.samples_per_s:.4g} samples/s, utilisation {units.percent(plan.utilisation)}"
    )
    devices, ranks = plan.topology["gpus"], plan.depth * plan.width
    if ranks < devices:
        yield f"idle        {devices - ranks} of {devices} devices"
    yield f"traffic     {units.data(plan.bytes_per_sample)} per sample over all links"
    yield f"proof       {gap}: bound {proof.bound:.4g} samples/s over {proof.search_space}"
    if plan.constraints:
        yield f"constraints {'; '.join(plan.constraints)}"
    if plan.extra_in_flight:
        yield "early       every stage but the last takes on one microbatch early: there is memory"
    for tied in plan.tied:
        if len(tied.stages) > 1:
            stages = ", ".join(map(str, tied.stages))
            yield f"tied        {' = '.join(tied.names)} on stages {stages}: gradients are summed"
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for opaque in plan.opaque:
        key = (opaque.type, opaque.reason, opaque.costs)
        reasons.setdefault(key, []).append(opaque.module)
    for (kind, reason, costs), modules in reasons.items():
        known = "counted in a run" if costs == "counted" else costs
        called = f"called as it is, not cut, its costs {known}"
        yield f"opaque      {summarise_opaque(modules)} ({kind}): {called}: {reason}"
    for note in plan.notes:
        yield f"note        {note}"
    if any(stage.recompute for stage in plan.stages):
        yield "recompute   stages marked r run their forward again before the backward"


def summarise_opaque(modules: Sequence[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    return ", ".join(modules[:3]) + more


def summarise_modules(modules: Iterable[str]) -> str:
    """('wte', 'h.0', 'h.1', 'h.2.ln_1', 'h.2.attn') -> 'wte, h.0-1, part of h.2'."""
    runs: list[tuple[str, int | None, int | None]] = []  # prefix, first and last number
    for path in modules:
        layer = re.match(r"(.*?\.)?(\d+)(?=[. ])", path)  # of which only something is here
        numbered = re.fullmatch(r"(.*?)(\d+)", path)
        if layer is not None:
            run: tuple[str, int | None, int | None] = (f"part of {layer[0]}", None, None)
        elif numbered is not None:
            run = (numbered[1], int(numbered[2]), int(numbered[2]))
        else:
            run = (path, None, None)
        if runs and run[1] is not None and runs[-1][0] == run[0] and runs[-1][2] == run[1] - 1:
            runs[-1] = (run[0], runs[-1][1], run[1])
        elif run not in runs[-1:]:
            runs.append(run)
    return ", ".join(
        prefix + ("" if first is None else str(first) if first == last else f"{first}-{last}")
        for prefix, first, last in runs
    )


def print_verification(result: Verification) -> None:
    out = console()
    loss = "bitwise equal" if result.loss_bitwise else "DIFFERS"
    if result.tracing and not result.loss_bitwise:
        loss = "equal but for rounding"
    out.print(f"loss        {result.loss:.6g}: {loss}")
    out.print(f"gradients   {result.bitwise} of {result.compared} bitwise equal to eager PyTorch")
    reasons: dict[str, list[float]] = {}
    for difference in result.differences:
        if difference.reason:
            reasons.setdefault(difference.reason, []).append(difference.max_rel)
    for reason, errors in reasons.items():
        why = "see tracing" if reason == "tracing" else f"{reason} is added in another order"
        out.print(escape(f"            {len(errors)} within {max(errors):.1e} relative: {why}"))
    for line in _tracing_lines(result):
        out.print(escape(line))
    problems = result.problems
    if len(problems) > _PROBLEMS:  # the last says why
        more = f"... and {len(problems) - _PROBLEMS} more, see --json"
        problems = (*problems[: _PROBLEMS - 1], more, problems[-1])
    for problem in problems:
        out.print(escape(f"problem     {problem}"))
    verdict = "verified" if result.ok else "NOT verified"
    if tracing := result.tracing:
        allowed = f"of the {tracing.tolerance:g} that tracing may change"
        verdict = f"{verdict}    within {tracing.max_rel:.1e} relative, {allowed}"
    out.print(verdict)


def _tracing_lines(result: Verification) -> Iterator[str]:
    if result.tracing is None:
        return
    yield "partition   none of this: the stages do what the traced program does before it is cut"
    where = result.tracing.operation or "only the backward, which adds terms in another order"
    yield f"tracing     takes another way than eager PyTorch, with other rounding: {where}"


def print_seconds(seconds: Mapping[str, float]) -> None:
    phases = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    console().print(f"seconds     {phases}")


def print_solution(solution: Solution) -> None:
    """The stages of a solved problem in the unit of its file, and the proof."""
    out = console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "device", "replicas", "load", "memory", "blocks"):
        table.add_column(name, justify="left" if name in ("device", "blocks") else "right")
    for k, stage in enumerate(solution.stages):
        blocks = [name[:32] for name, place in solution.assignment.items() if place == k]
        shown = ", ".join(blocks[:4]) + (f" .. {blocks[-1]}" if len(blocks) > 4 else "")
        memory = units.data(round(stage.memory))
        row = (str(k), stage.device, str(stage.replicas), f"{stage.load:.6g}", memory)
        table.add_row(*map(escape, (*row, f"{len(blocks)}: {shown}")))
    out.print(table)
    proof = "proven optimal" if solution.status == "optimal" else f"gap {100 * solution.gap:.2f} %"
    out.print(escape(f"objective   {solution.objective:.7g} {solution.unit}"))
    out.print(escape(f"proof       {proof}: bound {solution.bound:.7g} over {solution.space}"))
    out.print(f"seconds     {solution.seconds:.1f}")


def print_run(result: Mapping[str, Any]) -> None:
    losses: Sequence[float] = result["losses"]
    out = console()
    if not losses:
        out.print("the checkpoint is of the last step already")
        return
    out.print(curve(losses))
    out.print(
        f"{units.several(len(losses), 'update')}, loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
        f"{result['samples_per_s']:.4g} samples/s, utilisation {100 * result['utilisation']:.1f} %"
    )


def curve(values: Sequence[float], width: int = 60) -> str:
    """One line of blocks, the highest value the tallest: enough to see a loss fall."""
    finite = [value for value in values if value == value]
    if not finite:
        return ""
    width = min(width, len(finite))
    edges = [i * len(finite) // width for i in range(width + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[round((mean - low) * scale)] for mean in means)


def print_export(exported: Exported, out: str) -> None:
    lines = [
        f"{exported.tensors} tensors, {units.data(exported.bytes)}, in {len(exported.files) - 1} "
        f"files of {out}, as after step {exported.step}"
    ]
    if exported.initial:
        lines.append(
            f"of no stage, and as the model file makes them: {', '.join(exported.initial)}"
        )
    for line in lines:
        console().print(escape(line))


def print_stages(exported: ExportedStages, out: str) -> None:
    console().print(escape(f"{', '.join(exported.files)} in {out}"))
    if exported.max_rel is None:
        checked = "checked; install onnxruntime to have them run against the model"
    else:
        checked = f"checked; in ONNX Runtime off by {exported.max_rel:.1e} relative"
    console().print(f"loss {exported.loss:.6g} in evaluation mode; {checked}")
