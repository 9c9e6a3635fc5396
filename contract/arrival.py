"""A tensor from another stage, and its gradient as autograd makes it."""

from typing import Any

import torch
from torch import Tensor


class _Arrival(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, caught: dict[str, Tensor], name: str) -> Tensor:
        ctx.caught, ctx.name = caught, name
        return tensor.detach()  # where view_as takes half as long again

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.caught[ctx.name] = gradient
        return None, None, None


def arrive(tensor: Tensor, caught: dict[str, Tensor], name: str) -> Tensor:
    """The same tensor for a stage to compute with; a backward leaves its gradient in `caught`.

    A leaf's `.grad` has the memory layout of the leaf, whatever that of the gradient is. In the
    model as a whole the tensor is no leaf, and kernels that look at strides, as those that sum up a
    bias's gradient do, would round otherwise there.
    """
    leaf = tensor.detach().requires_grad_()
    arrived: Tensor = _Arrival.apply(leaf, caught, name)  # type: ignore[no-untyped-call]
    return arrived
