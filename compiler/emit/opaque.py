"""Calls of modules that could not be traced: the stage holds the user's own and calls that."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from p2bw.compiler.emit.expr import Call, Dict, Index, Node, Num, Own, Raw, Seq, quoted
from p2bw.compiler.program import OpaqueCall, Slot

# One result: how to take it from what the call returns, and its number.
Part = tuple[tuple[Node, ...], int]


def constructor(call: OpaqueCall) -> Call:
    """What gives the stage the module."""
    return Call(
        Raw("opaque"), (Raw("__file__"), Num(call.path, call.path.rpartition(".")[2] + "_path"))
    )


def call_of(
    path: str, call: OpaqueCall, inputs: Sequence[fx.Node], ref: Callable[[fx.Node], Node]
) -> Call:
    """The call as the user's code makes it; `path` is the module's in the class that calls it."""

    def written(value: Any) -> Node:
        if isinstance(value, Slot):
            return ref(inputs[value.index])
        if isinstance(value, (list, tuple)):
            return Seq("[]" if isinstance(value, list) else "()", tuple(map(written, value)))
        if isinstance(value, dict):
            return Dict(tuple((quoted(str(k)), written(v)) for k, v in value.items()))
        if isinstance(value, str):
            return Raw(quoted(value))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return Num(value)
        assert value is None or isinstance(value, (bool, torch.dtype)), value
        return Raw(repr(value))

    args, kwargs = call.arguments
    return Call(
        Own(path), tuple(map(written, args)), tuple((k, written(v)) for k, v in kwargs.items())
    )


def is_flat(result: Any) -> bool:
    """Whether the results can be unpacked: `y, weights = self.moe(x)`."""
    return (
        type(result) in (list, tuple)
        and len(result) > 1
        and all(isinstance(item, Slot) or item is None for item in result)
    )


def parts(result: Any, way: tuple[Node, ...] = ()) -> list[Part]:
    """Where each tensor of a nested result lies."""
    if isinstance(result, Slot):
        return [(way, result.index)]
    if isinstance(result, (list, tuple)):
        items: Any = enumerate(result)
    elif isinstance(result, dict):
        items = result.items()
    else:
        return []
    return [
        part
        for key, value in items
        for part in parts(value, (*way, Raw(quoted(key) if isinstance(key, str) else repr(key))))
    ]


def taken(base: Node, way: Sequence[Node]) -> Node:
    """`base["logits"][0]`."""
    for key in way:
        base = Index(base, (key,))
    return base
