"""What verify finds: loss, gradients and buffers of two runs of the same microbatch, side by side.

All errors are relative to the largest entry of the tensor that is compared with.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn

from p2bw.compiler.plan import Plan
from p2bw.modelfile.initial import lookup

TOLERANCE = 1e-6  # where terms are added in another order
TRACING_TOLERANCE = 1e-5  # where a whole step takes operations that round in another way

EAGER = "eager PyTorch"
TRACING = "tracing"  # the reason of differences that are there before the model is cut


@dataclass(frozen=True, slots=True)
class Difference:
    """A gradient that is not bitwise equal; relative to the largest entry of eager's gradient."""

    parameter: str
    max_rel: float
    reason: str  # "" if nothing in the plan explains it


@dataclass(frozen=True, slots=True)
class Tracing:
    """The traced program, before any cut, differs from eager PyTorch by so little."""

    operation: str  # the first that computes something else; "" if only the backward does
    max_rel: float  # of the loss, of the gradients and of the buffers
    tolerance: float = TRACING_TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found.

    ok: all bitwise, or explained: sums in another order within TOLERANCE, or, where the stages do
    what the traced program does, that program within TRACING_TOLERANCE of eager PyTorch.
    """

    ok: bool
    loss: float
    loss_bitwise: bool
    compared: int
    bitwise: int
    max_rel: float
    differences: tuple[Difference, ...]
    problems: tuple[str, ...]  # each a sentence
    tracing: Tracing | None = None  # where it explains what differs

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
            "tracing": asdict(self.tracing) if self.tracing else None,
        }


def compare(
    plan: Plan,
    whole: nn.Module,
    stages: Sequence[nn.Module],
    losses: tuple[Tensor, Tensor],
    terms: Mapping[str, int],
    by: str = EAGER,
) -> Verification:
    """A step of the whole model, run in the way that `by` names, and the same one by the stages.

    `losses` are in this order; gradients and buffers are the modules' own. `terms`: see _reasons.
    """
    expected, staged = losses
    problems = []
    loss_bitwise = torch.equal(expected, staged)
    if not loss_bitwise:
        problems.append(f"the loss is {staged.item()!r}, {by} gives {expected.item()!r}")
    gradients, first_stage = _stage_gradients(whole, stages)
    explain = _reasons(plan, terms)
    differences, compared = [], 0
    for name, parameter in whole.named_parameters():
        want, got = parameter.grad, gradients.get(name)
        if want is None and got is None:
            continue
        compared += 1
        if error := relative_error(want, got):
            reason = explain(name, first_stage.get(name, 0))
            differences.append(Difference(name, error, reason))
    problems.extend(_gradient_problems(differences, by))
    problems.extend(_buffer_problems(whole, stages))
    return Verification(
        ok=not problems,
        loss=expected.item(),
        loss_bitwise=loss_bitwise,
        compared=compared,
        bitwise=compared - len(differences),
        max_rel=max((d.max_rel for d in differences), default=0.0),
        differences=tuple(differences),
        problems=tuple(problems),
    )


def _stage_gradients(
    whole: nn.Module, stages: Sequence[nn.Module]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Of each parameter, by its name in the whole: its gradient, and the first stage that has it.

    The gradient is the sum over stages, of a parameter that is on several.
    """
    names = {id(p): n for n, p in whole.named_parameters()}
    gradients: dict[str, Tensor] = {}
    first_stage: dict[str, int] = {}
    for k, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            canonical = names[id(lookup(whole, name))]
            first_stage.setdefault(canonical, k)
            if parameter.grad is not None:
                known = gradients.get(canonical)
                gradients[canonical] = parameter.grad if known is None else known + parameter.grad
    return gradients, first_stage


def _gradient_problems(differences: Iterable[Difference], by: str) -> Iterator[str]:
    for d in differences:
        error = f"the gradient of {d.parameter} is {d.max_rel:.2e} relative off that of {by}"
        if not d.reason:
            yield error
        elif d.max_rel > TOLERANCE:
            yield f"{error}, more than the {TOLERANCE:g} that {d.reason} explains"


def relative_error(want: Tensor | None, got: Tensor | None) -> float:
    """0.0 if bitwise equal; infinite where one is missing or of another kind."""
    if want is None or got is None or want.shape != got.shape:
        return inf
    if torch.equal(want, got):
        return 0.0
    error = (want.double() - got.double()).abs().max().item()
    scale = want.double().abs().max().item()
    relative = error / scale if scale else inf
    return inf if isnan(relative) else relative


def _reasons(plan: Plan, terms: Mapping[str, int]) -> Callable[[str, int], str]:
    """Which gradients may differ by the order of summation, and why.

    `terms`: for each tensor that was sent, how many stages it got a gradient from.

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


def _buffer_problems(whole: nn.Module, stages: Sequence[nn.Module]) -> Iterator[str]:
    for k, stage in enumerate(stages):
        for name, buffer in stage.named_buffers():
            value = lookup(whole, name)  # None: a constant that only the stage's code knows
            if value is not None and not torch.equal(value, buffer):
                yield f"buffer {name} of stage {k} differs after the forward pass"


def tracing_error(eager: nn.Module, traced: nn.Module, losses: tuple[Tensor, Tensor]) -> float:
    """The largest relative error of a step of the traced program, before any cut."""
    error = relative_error(*losses)
    for want, got in zip(eager.parameters(), traced.parameters(), strict=True):
        if want.grad is not None or got.grad is not None:
            error = max(error, relative_error(want.grad, got.grad))
    for buffer, other in zip(eager.buffers(), traced.buffers(), strict=True):
        error = max(error, relative_error(buffer, other))
    return error


def explained_by_tracing(
    found: Verification, partition: Verification, tracing: Tracing
) -> Verification:
    """`found`, where all that the partition did is explained: the rest is what tracing did."""
    reasons = {difference.parameter: difference.reason for difference in partition.differences}
    differences = tuple(
        replace(difference, reason=reasons.get(difference.parameter, TRACING))
        for difference in found.differences
    )
    return replace(found, ok=True, differences=differences, problems=(), tracing=tracing)
