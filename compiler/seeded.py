"""Random numbers that are the same wherever an operator runs: in the whole model or in a stage."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SEED = 20210701
_APART = 1 << 40  # random operators in opaque modules are numbered from here


class SeededRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Seeds the i-th random operator by the i-th of `indices`: its position in the program."""

    def __init__(self, indices: Iterator[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.indices = indices
        self.apart: list[Iterator[int]] = []  # inside of opaque calls: the numbers that count there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            indices = self.apart[-1] if self.apart else self.indices
            torch.manual_seed(SEED + next(indices, -1))
        return func(*args, **(kwargs or {}))


@contextmanager
def seeded_random(
    indices: Iterator[int], module: nn.Module, opaque: Iterable[str]
) -> Iterator[None]:
    """SeededRandom for a module whose parts at the paths `opaque` are opaque calls.

    The random operators inside of those are numbered apart: how many there are, the data decides.
    """
    with ExitStack() as stack:
        random = stack.enter_context(SeededRandom(indices))

        def begin(*_: Any) -> None:
            random.apart.append(count(_APART))

        def end(*_: Any) -> None:
            random.apart.pop()

        for path in opaque:
            part = module.get_submodule(path)
            stack.enter_context(part.register_forward_pre_hook(begin))
            stack.enter_context(part.register_forward_hook(end, always_call=True))
        yield
