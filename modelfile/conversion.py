"""model.to(dtype), .half() and the like, for modules whose parameters are fake tensors.

torch swaps the contents of a fake parameter with those of the converted one, which it refuses where
anything refers to the parameter weakly, as the fake tensors' own bookkeeping does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

Convert = Callable[[Tensor], Tensor]


class _Conversions:
    """New parameters for old ones; a tied parameter becomes one new parameter wherever it is."""

    def __init__(self) -> None:
        # The old ones live on: no id is used twice.
        self._newer: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._done: set[int] = set()  # ids of what the conversion in progress has made
        self._depth = 0

    def newest(self, parameter: nn.Parameter) -> nn.Parameter:
        while id(parameter) in self._newer:
            parameter = self._newer[id(parameter)][1]
        return parameter

    def apply(
        self, original: Callable[..., nn.Module], module: nn.Module, fn: Convert, recurse: bool
    ) -> None:
        """`Module._apply`, fake parameters replaced instead of swapped."""
        if self._depth == 0:
            self._done.clear()
        slots = module._parameters
        order = list(slots)
        fakes: dict[str, nn.Parameter] = {}
        for name, parameter in slots.items():
            if parameter is not None and isinstance(parameter, FakeTensor):
                fakes[name] = parameter
        for name in fakes:
            del slots[name]
        self._depth += 1
        try:
            original(module, fn, recurse)
            converted = {name: self._convert(p, fn) for name, p in fakes.items()}
        finally:
            self._depth -= 1
            rest = dict(slots)
            slots.clear()
            slots.update({name: rest.get(name, fakes.get(name)) for name in order})
        slots.update(converted)

    def _convert(self, parameter: nn.Parameter, fn: Convert) -> nn.Parameter:
        parameter = self.newest(parameter)
        if id(parameter) in self._done:
            return parameter
        with torch.no_grad():
            value = fn(parameter)
        if value is not parameter:
            old, parameter = parameter, nn.Parameter(value, parameter.requires_grad)
            self._newer[id(old)] = old, parameter
        self._done.add(id(parameter))
        return parameter


@contextmanager
def converting_fakes() -> Iterator[Callable[[nn.Module], None]]:
    """Let modules with fake parameters be converted; yields what to call on the finished model."""
    conversions = _Conversions()
    original = nn.Module._apply

    def apply(module: nn.Module, fn: Convert, recurse: bool = True) -> nn.Module:
        conversions.apply(original, module, fn, recurse)
        return module

    def settle(model: nn.Module) -> None:
        """Give ties that only one of their modules has converted the new parameter as well."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = conversions.newest(parameter)

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield settle
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
