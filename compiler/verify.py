"""verify: all stages of an artifact in one process against the user's original model.

Both run two microbatches in fp32 on the CPU from the same weights. Every random operator is seeded
by its position in the original program, so dropout draws the same mask wherever the placement has
put it. The second microbatch shows what tracing has fixed for ever, such as a count of calls. The
oracle is the model as the user wrote it, run by eager PyTorch.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2bw.compiler.disagreement import differing_operation
from p2bw.compiler.plan import Plan, Stage, read_plan
from p2bw.compiler.seeded import SEED, seeded_random
from p2bw.compiler.trace_env import plain_checkpoints
from p2bw.contract.arrival import arrive
from p2bw.contract.errors import MismatchError
from p2bw.contract.stages import find_model_file, load_stage, opaque_paths
from p2bw.modelfile.initial import copy_state, lookup
from p2bw.modelfile.load import ModelFile

TOLERANCE = 1e-6

_BAKED = "what Python computed while the model was traced, such as a count of calls, is fixed"


@dataclass(frozen=True, slots=True)
class Difference:
    """A gradient that is not bitwise equal; relative to the largest entry of eager's gradient."""

    parameter: str
    max_rel: float
    reason: str  # "" if nothing in the plan explains it


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found. ok: all bitwise, or explained and within 1e-6 relative."""

    ok: bool
    loss: float
    loss_bitwise: bool
    compared: int
    bitwise: int
    max_rel: float
    differences: tuple[Difference, ...]
    problems: tuple[str, ...]  # each a sentence

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "loss": self.loss,
            "loss_bitwise": self.loss_bitwise,
            "gradients": {
                "compared": self.compared,
                "bitwise": self.bitwise,
                "max_rel": self.max_rel,
            },
            "differences": [
                {"parameter": d.parameter, "max_rel": d.max_rel, "reason": d.reason}
                for d in self.differences
            ],
            "problems": list(self.problems),
        }


def verify(artifact: str | Path, *, model: str | Path | None = None) -> Verification:
    """Compare an artifact with the model that it was compiled from.

    Raises MismatchError if the model file is not the one that was compiled, or if the stages do
    not hold the model's parameters.
    """
    artifact = Path(artifact)
    plan = read_plan(artifact)
    file = find_model_file(artifact, model=Path(model) if model else None)
    stages = [load_stage(artifact, k, file) for k in range(plan.depth)]
    with _fp32_cpu():
        torch.manual_seed(SEED)
        original = file.model()
        for stage in stages:
            copy_state(original, stage)
        found = _microbatch(plan, file, original, stages, 0)
        same = found.loss_bitwise
        if found.ok:
            second = _microbatch(plan, file, original, stages, 1)
            same = same and second.loss_bitwise
            problems = [f"in the second microbatch, {problem}" for problem in second.problems]
            found = replace(found, ok=second.ok, problems=tuple(problems))
        if found.ok or same:  # the forward pass is right
            return found
        operation = differing_operation(file, plan.microbatch, calls=2)
    if operation:
        reason = f"the first operation that gives something else is {operation}; {_BAKED}"
        found = replace(found, problems=(*found.problems, reason))
    return found


def _microbatch(
    plan: Plan, file: ModelFile, original: nn.Module, stages: Sequence[nn.Module], number: int
) -> Verification:
    """The same microbatch through the model and through the stages, forward and backward."""
    torch.manual_seed(SEED + 1 + number)
    inputs, targets = file.inputs(plan.microbatch), file.targets(plan.microbatch)
    tensors = file.flatten_microbatch(inputs, targets)
    values = dict(zip((i.name for i in plan.inputs), tensors, strict=True))
    for module in (original, *stages):
        module.zero_grad(set_to_none=True)
    loss = _eager(file, original, inputs, targets, [o.module for o in plan.opaque])
    staged, terms = _staged(plan, stages, values)
    return _compare(plan, original, stages, loss, staged, terms)


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


def _compare(
    plan: Plan,
    original: nn.Module,
    stages: Sequence[nn.Module],
    eager: Tensor,
    staged: Tensor,
    terms: Mapping[str, int],
) -> Verification:
    problems = []
    loss_bitwise = torch.equal(eager, staged)
    if not loss_bitwise:
        problems.append(f"the loss is {staged.item()!r}, eager PyTorch gives {eager.item()!r}")
    names = {id(p): n for n, p in original.named_parameters()}
    gradients: dict[str, Tensor | None] = {}
    first_stage: dict[str, int] = {}
    for k, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            canonical = names[id(lookup(original, name))]
            first_stage.setdefault(canonical, k)
            if parameter.grad is not None:
                known = gradients.get(canonical)
                gradients[canonical] = parameter.grad if known is None else known + parameter.grad
    explain = _reasons(plan, terms)
    differences, compared = [], 0
    for name, parameter in original.named_parameters():
        want, got = parameter.grad, gradients.get(name)
        if want is None and got is None:
            continue
        compared += 1
        if want is not None and got is not None and torch.equal(want, got):
            continue
        difference = Difference(name, _relative(want, got), explain(name, first_stage.get(name, 0)))
        differences.append(difference)
    for d in differences:
        if not d.reason:
            problems.append(f"the gradient of {d.parameter} is off by {d.max_rel:.2e} relative")
        elif d.max_rel > TOLERANCE:
            problems.append(
                f"the gradient of {d.parameter} is off by {d.max_rel:.2e} relative, more than "
                f"the {TOLERANCE:g} that {d.reason} explains"
            )
    problems.extend(_buffer_problems(original, stages))
    return Verification(
        ok=not problems,
        loss=eager.item(),
        loss_bitwise=loss_bitwise,
        compared=compared,
        bitwise=compared - len(differences),
        max_rel=max((d.max_rel for d in differences), default=0.0),
        differences=tuple(differences),
        problems=tuple(problems),
    )


def _relative(want: Tensor | None, got: Tensor | None) -> float:
    if want is None or got is None or want.shape != got.shape:
        return float("inf")
    scale = want.abs().max().item()
    error = (want - got).abs().max().item()
    return error / scale if scale else float("inf")


def _reasons(plan: Plan, terms: Mapping[str, int]) -> Callable[[str, int], str]:
    """Which gradients may differ by the order of summation, and why. `terms`: see _staged.

    A sum of three or more terms from different stages is added stage by stage here and term by
    term in eager: everything at or before the tensor where the terms meet may differ in the last
    bits.
    """
    shared = {
        name: (next(s.index for s in plan.stages if name in s.results), count)
        for name, count in terms.items()
        if count > 1
    }
    tied = {name: len(t.stages) for t in plan.tied for name in t.names if len(t.stages) > 1}

    def reason(parameter: str, stage: int) -> str:
        if parameter in tied:
            return f"the sum over its uses in {tied[parameter]} stages"
        for name, (producer, stages) in shared.items():
            if stage <= producer:
                return f"the sum of the gradients of {name} (stage {producer}) from {stages} stages"
        return ""

    return reason


def _buffer_problems(original: nn.Module, stages: Sequence[nn.Module]) -> Iterator[str]:
    for k, stage in enumerate(stages):
        for name, buffer in stage.named_buffers():
            value = lookup(original, name)  # None: a constant that only the stage's code knows
            if value is not None and not torch.equal(value, buffer):
                yield f"buffer {name} of stage {k} differs after the forward pass"
