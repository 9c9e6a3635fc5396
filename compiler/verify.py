"""verify: all stages of an artifact in one process against the user's original model.

Both run two microbatches in fp32 on the CPU from the same weights. Every random operator is seeded
by its position in the original program, so dropout draws the same mask wherever the placement has
put it. The second microbatch shows what tracing has fixed for ever, such as a count of calls. The
oracle is the model as the user wrote it, run by eager PyTorch. Where the stages differ from it, the
whole traced program, before any cut, tells what the partition did from what tracing did.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2bw.compiler.disagreement import differing_operation
from p2bw.compiler.interpret import interpret
from p2bw.compiler.plan import Plan, Stage, read_plan
from p2bw.compiler.program import Program
from p2bw.compiler.seeded import SEED, seeded_random
from p2bw.compiler.trace import trace
from p2bw.compiler.trace_env import plain_checkpoints
from p2bw.compiler.verification import (
    TRACING_TOLERANCE,
    Tracing,
    Verification,
    compare,
    explained_by_tracing,
    tracing_error,
)
from p2bw.contract.arrival import arrive
from p2bw.contract.errors import MismatchError
from p2bw.contract.stages import find_model_file, load_stage, opaque_paths
from p2bw.modelfile.initial import copy_state
from p2bw.modelfile.load import ModelFile

_MICROBATCHES = 2

_BAKED = "what Python computed while the model was traced, such as a count of calls, is fixed"


@dataclass(frozen=True, slots=True)
class _Run:
    """One microbatch: the stages beside eager PyTorch, and beside the program before it is cut."""

    found: Verification
    partition: Verification | None = None
    tracing: float = 0.0  # how far that program is from eager PyTorch


def verify(artifact: str | Path, *, model: str | Path | None = None) -> Verification:
    """Compare an artifact with the model that it was compiled from.

    Raises MismatchError if the model file is not the one that was compiled, or if the stages do
    not hold the model's parameters.
    """
    artifact = Path(artifact)
    plan = read_plan(artifact)
    file = find_model_file(artifact, model=Path(model) if model else None)

    def runs(program: Program | None = None) -> Iterator[_Run]:
        """Each microbatch in turn, on models that start anew."""
        stages = [load_stage(artifact, k, file) for k in range(plan.depth)]
        original = _start(file, stages)
        traced = _start(file, []) if program else None
        for number in range(_MICROBATCHES):
            yield _microbatch(plan, file, original, stages, number, program, traced)

    with _fp32_cpu():
        found = _first_problem([run.found for run in _until_wrong(runs())])
        if found.ok:
            return found
        program = trace(file, plan.microbatch)
        return _judge(file, plan, found, program, list(runs(program)))


def _start(file: ModelFile, stages: Sequence[nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    model = file.model()
    for stage in stages:
        copy_state(model, stage)
    return model


def _until_wrong(runs: Iterable[_Run]) -> Iterator[_Run]:
    for run in runs:
        yield run
        if not run.found.ok:
            return


def _first_problem(found: Sequence[Verification]) -> Verification:
    """The numbers of the first microbatch, with what was wrong in a later one."""
    first, *later = found
    for number, other in enumerate(later, 2):
        if first.ok and not other.ok:
            problems = [f"in microbatch {number}, {problem}" for problem in other.problems]
            return replace(first, ok=False, problems=tuple(problems))
    return first


def _judge(
    file: ModelFile, plan: Plan, found: Verification, program: Program, runs: Sequence[_Run]
) -> Verification:
    """What differs from eager PyTorch: is it the partition that does it, or was it tracing?"""
    partition = _first_problem([run.partition for run in runs if run.partition])
    error = max(run.tracing for run in runs)
    if not partition.ok:
        return replace(found, problems=partition.problems) if error else found
    small = error <= TRACING_TOLERANCE
    operation = differing_operation(file, program, plan.microbatch, _MICROBATCHES, rounding=small)
    if not error:  # the second time, all was as it should: the model is another one every time
        return found
    if small:
        return explained_by_tracing(runs[0].found, partition, Tracing(operation, error))
    reason = f"before any cut, tracing made a difference of {error:.2e} relative"
    if operation:
        reason += f": the first operation that gives something else is {operation}; {_BAKED}"
    return replace(found, problems=(*found.problems, reason))


def _microbatch(
    plan: Plan,
    file: ModelFile,
    original: nn.Module,
    stages: Sequence[nn.Module],
    number: int,
    program: Program | None,
    traced: nn.Module | None,
) -> _Run:
    """The same microbatch through the model and through the stages, forward and backward."""
    torch.manual_seed(SEED + 1 + number)
    inputs, targets = file.inputs(plan.microbatch), file.targets(plan.microbatch)
    tensors = file.flatten_microbatch(inputs, targets)
    values = dict(zip((i.name for i in plan.inputs), tensors, strict=True))
    for module in (original, *stages, *filter(None, [traced])):
        module.zero_grad(set_to_none=True)
    opaque = [o.module for o in plan.opaque]
    loss = _eager(file, original, inputs, targets, opaque)
    staged, terms = _staged(plan, stages, values)
    found = compare(plan, original, stages, (loss, staged), terms)
    if program is None or traced is None:
        return _Run(found)
    whole = _traced(program, traced, tensors, opaque)
    return _Run(
        found,
        compare(plan, traced, stages, (whole, staged), terms, "the program before it is cut"),
        tracing_error(original, traced, (loss, whole)),
    )


@contextmanager
def _fp32_cpu() -> Iterator[None]:
    """Deterministic arithmetic, and the caller's RNG and default device left as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield


def _eager(
    file: ModelFile, model: nn.Module, inputs: Any, targets: Any, opaque: Iterable[str]
) -> Tensor:
    # Recomputed in the backward, dropout would draw other masks than the ones seeded here.
    with plain_checkpoints(file.code), seeded_random(count(), model, opaque):
        loss = file.call(model, inputs, targets)
    with file.code.running("the backward of the model's loss"):
        torch.autograd.backward(loss)
    return loss.detach()


def _traced(
    program: Program, model: nn.Module, tensors: Sequence[Tensor], opaque: Iterable[str]
) -> Tensor:
    with seeded_random(count(), model, opaque):
        loss = interpret(program, model, tensors)
    torch.autograd.backward(loss)
    return loss.detach()


def _staged(
    plan: Plan, stages: Sequence[nn.Module], values: dict[str, Tensor]
) -> tuple[Tensor, Counter[str]]:
    """Forward through all stages, then backward through them in reverse, as the runtime does.

    The loss; and for each tensor that was sent, how many stages it got a gradient from.
    """
    arrived: dict[tuple[int, str], Tensor] = {}
    gradients: dict[int, dict[str, Tensor]] = {k: {} for k in range(plan.depth)}  # of these
    produced: list[dict[str, Tensor]] = []
    for k, module in enumerate(stages):
        spec = plan.stages[k]
        arguments = [
            values[name] if name in spec.inputs else arrived[k, name] for name in spec.arguments
        ]
        named = _forward(module, spec, arguments)
        produced.append(named)
        for send in spec.sends:
            tensor = named[send.tensor].detach().clone()
            if send.gradient:
                tensor = arrive(tensor, gradients[send.peer], send.tensor)
            arrived[send.peer, send.tensor] = tensor
    return _backward(plan, produced, gradients)


def _forward(module: nn.Module, spec: Stage, arguments: list[Tensor]) -> dict[str, Tensor]:
    """Results of one stage by name; MismatchError if its code, perhaps edited, cannot give them."""
    where = f"stages/stage_{spec.index}.py"
    try:
        with seeded_random(iter(spec.random), module, opaque_paths(module)):
            results = module(*arguments)
    except Exception as error:
        raise MismatchError(f"{where} fails: {type(error).__name__}: {error}") from error
    values = results if isinstance(results, tuple) else (results,)
    if len(values) != len(spec.results) or not all(isinstance(v, Tensor) for v in values):
        raise MismatchError(
            f"{where} must return {len(spec.results)} tensors ({', '.join(spec.results)}), "
            f"it returns {len(values)} values"
        )
    return dict(zip(spec.results, values, strict=True))


def _backward(
    plan: Plan, produced: list[dict[str, Tensor]], gradients: dict[int, dict[str, Tensor]]
) -> tuple[Tensor, Counter[str]]:
    losses = []
    terms: Counter[str] = Counter()
    for k in reversed(range(plan.depth)):
        spec = plan.stages[k]
        sent = {send.tensor for send in spec.sends}
        roots: list[Tensor] = []
        seeds: list[Tensor | None] = []
        passed_back: dict[str, Tensor] = {}
        for name, tensor in produced[k].items():
            if name not in sent:
                losses.append(tensor.detach())
                roots.append(tensor)
                seeds.append(None)
        # Later consumers first: the order in which eager autograd would have summed them.
        for send in sorted(spec.sends, key=lambda s: s.peer, reverse=True):
            gradient = gradients[send.peer].get(send.tensor)
            if gradient is not None and produced[k][send.tensor].requires_grad:
                roots.append(produced[k][send.tensor])
                seeds.append(gradient)
                passed_back[send.tensor] = gradient
        if roots:
            torch.autograd.backward(roots, seeds)
        for name in (receive.tensor for receive in spec.receives):
            own, later = gradients[k].get(name), passed_back.get(name)
            if own is not None and (later is None or not torch.equal(own, later)):
                terms[name] += 1  # a gradient that is only passed back is no term of the sum
    (loss,) = losses
    return loss, terms
