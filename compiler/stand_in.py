"""Stand-ins for modules that could not be traced: they hold and keep the same, and compute nothing.

Code that looks at values cannot run on fake tensors; what it keeps was seen when it was compiled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from p2bw.compiler.opaque_run import filled, state_of, with_slots
from p2bw.compiler.program import Attribute, OpaqueCall, Program


@dataclass(frozen=True, slots=True)
class StandIns:
    """Lends them to a stage in place of the user's own modules."""

    program: Program
    nodes: tuple[str, ...]  # of the stage

    def blank(self, path: str) -> nn.Module:
        calls = [self.program.opaque[n] for n in self.nodes if n in self.program.opaque]
        module = _StandIn([call for call in calls if call.path == path])
        for name, attribute in _below(path, self.program.parameters):
            parameter = nn.Parameter(_empty(attribute), requires_grad=attribute.trainable)
            owner, last = _owner(module, name)
            owner.register_parameter(last, parameter)
        for name, attribute in _below(path, self.program.buffers):
            owner, last = _owner(module, name)
            owner.register_buffer(last, _empty(attribute))
        return module


class _StandIn(nn.Module):
    """Gives what each of its calls in the stage gave, in turn."""

    def __init__(self, calls: list[OpaqueCall]) -> None:
        super().__init__()
        self._stand_in_calls = cycle(calls)  # a name that no parameter has

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = next(self._stand_in_calls)
        _, tensors = with_slots((args, kwargs), "is called with")
        outputs = _Call.apply(call, *tensors, *state_of(self))  # type: ignore[no-untyped-call]
        return filled(call.result, list(outputs))


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: OpaqueCall, *given: Tensor) -> tuple[Tensor, ...]:
        outputs = [
            torch.empty_strided(kind.shape, stride, dtype=kind.dtype)
            for kind, stride in zip(call.outputs, call.strides, strict=True)
        ]
        kept = {"input": given, "output": outputs}
        ctx.save_for_backward(
            *(
                torch.empty(saved.bytes, dtype=torch.uint8)
                if saved.kind == "fresh"
                else kept[saved.kind][saved.index]
                for saved in call.saved
            )
        )
        ctx.given = [(t.shape, t.dtype) if t.requires_grad else None for t in given]
        fixed = (o for o, needed in zip(outputs, call.requires_grad, strict=True) if not needed)
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        made = (spec and torch.empty(spec[0], dtype=spec[1]) for spec in ctx.given)
        return None, *made


def _below(path: str, attributes: Mapping[str, Attribute]) -> Iterator[tuple[str, Attribute]]:
    """What a module holds, by its own names."""
    for attribute in attributes.values():
        for name in attribute.names:
            if name.startswith(f"{path}."):
                yield name.removeprefix(f"{path}."), attribute


def _empty(attribute: Attribute) -> Tensor:
    return torch.empty(attribute.type.shape, dtype=attribute.type.dtype)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a name, made if need be, and the name in it."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module, last
