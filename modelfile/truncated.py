"""nn.init.trunc_normal_ as one operator, for tensors without values.

torch draws again until all values are inside the bounds, so it looks at them: a model that starts
so, such as every vision transformer, could not be built without memory otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import init

_original = init._no_grad_trunc_normal_

_library = torch.library.Library("p2bw", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "trunc_normal_(Tensor(a!) tensor, float mean, float std, float a, float b, "
    "Generator? generator) -> ()",
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _draw(
    tensor: Tensor,
    mean: float,
    std: float,
    a: float,
    b: float,
    generator: torch.Generator | None,
) -> None:
    _original(tensor, mean, std, a, b, generator=generator)


_library.impl("trunc_normal_", _draw, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("trunc_normal_", lambda *_: None, "Meta")  # type: ignore[no-untyped-call]


def _as_one_operator(
    tensor: Tensor,
    mean: float,
    std: float,
    a: float,
    b: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    with torch.no_grad():
        torch.ops.p2bw.trunc_normal_(tensor, mean, std, a, b, generator)
    return tensor


@contextmanager
def truncated_normal_as_one_operator() -> Iterator[None]:
    init._no_grad_trunc_normal_ = _as_one_operator
    try:
        yield
    finally:
        init._no_grad_trunc_normal_ = _original
