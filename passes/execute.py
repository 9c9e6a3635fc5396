"""Run one node by itself on tensors that have metadata but no data.

What autograd does with a node depends only on its operator, its plain arguments and the metadata
of its tensors, so nodes of equal `Call` need to run only once: 96 equal layers cost as much as one.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from p2bw.compiler.program import tensor_arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """What a node sees of a tensor that it is given."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    storage_bytes: int


@dataclass(frozen=True, slots=True)
class Call:
    """A node without its identity: equal calls behave alike."""

    target: Hashable
    arguments: Hashable
    tensors: tuple[TensorMeta, ...]
    repeats: tuple[int, ...]  # per tensor argument, the first that is the same tensor
    context: tuple[str, ...]


def describe_call(node: fx.Node, tensors: tuple[TensorMeta, ...], context: tuple[str, ...]) -> Call:
    """The Call of a node whose tensor arguments are like `tensors`."""
    arguments = tensor_arguments(node)
    repeats = tuple(map(arguments.index, arguments))
    return Call(node.target, (_freeze(node.args), _freeze(node.kwargs)), tensors, repeats, context)


def _freeze(value: Any) -> Hashable:
    # 2, 2.0 and True are equal keys in Python but not equal arguments in torch.
    if isinstance(value, fx.Node):
        return "%"
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_freeze, value))
    if isinstance(value, dict):
        return ("dict", *((key, _freeze(item)) for key, item in value.items()))
    if isinstance(value, slice):
        return ("slice", _freeze(value.start), _freeze(value.stop), _freeze(value.step))
    return (type(value).__name__, value)


class _Source(torch.autograd.Function):
    """Makes a tensor like its leaf that counts as computed: it may be written in place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return _allocate(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def _allocate(shape: Any, stride: Any, dtype: torch.dtype, device: Any) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A call's tensor arguments, and the leaves that get their gradients."""

    tensors: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]


def make_inputs(call: Call, device: str) -> Inputs:
    """Tensors with the metadata of a call's tensor arguments, each made once."""
    tensors: list[Tensor] = []
    leaves: list[Tensor] = []
    for position, (meta, first) in enumerate(zip(call.tensors, call.repeats, strict=True)):
        if first < position:
            tensors.append(tensors[first])
            continue
        tensor = _allocate(meta.shape, meta.stride, meta.dtype, device)
        if meta.requires_grad:
            leaves.append(tensor.requires_grad_())
            with torch.enable_grad():
                tensor = _Source.apply(tensor)  # type: ignore[no-untyped-call]
        tensors.append(tensor)
    return Inputs(tuple(tensors), tuple(leaves))


def invoke(node: fx.Node, tensors: tuple[Tensor, ...], device: str) -> Any:
    """Call the node's operator on `tensors`, one per tensor argument, on another device."""
    rest = iter(tensors)

    def convert(value: Any) -> Any:
        return torch.device(device) if isinstance(value, torch.device) else value

    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda value: next(rest) if isinstance(value, fx.Node) else convert(value),
    )
    target = node.target
    assert callable(target)
    return target(*args, **kwargs)


def flatten_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an operator's result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from flatten_tensors(item)


def tensor_index(value: Any, leaf: Callable[[Any], bool]) -> Any:
    """`value` with each tensor leaf replaced by its position among the tensors, others by None."""
    count = iter(range(1 << 30))

    def number(item: Any) -> Any:
        if isinstance(item, (tuple, list)):
            return tuple(map(number, item))
        return next(count) if leaf(item) else None

    return number(value)


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor, valid while the tensor lives."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def argument_positions(node: fx.Node, is_wanted: Callable[[str, Any], bool]) -> tuple[int, ...]:
    """Positions among `tensor_arguments(node)` of the operator arguments that are wanted.

    `is_wanted(name, schema_argument)` decides for each argument of an ATen operator's schema.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return ()
    declared = node.target._schema.arguments
    by_name = {argument.name: argument for argument in declared}
    pairs = [
        *zip(declared, node.args, strict=False),
        *((by_name[k], v) for k, v in node.kwargs.items()),
    ]
    found: list[int] = []
    position = 0
    for argument, value in pairs:
        count = len(_nodes_in(value))
        if is_wanted(argument.name, argument):
            found.extend(range(position, position + count))
        position += count
    return tuple(found)


def plain_argument(node: fx.Node, names: tuple[str, ...]) -> Any:
    """The value of the first of an operator's arguments with one of these names, else None."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name in names:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(argument.name, argument.default_value)
    return None


def _nodes_in(value: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.node.map_arg(value, nodes.append)
    return nodes
