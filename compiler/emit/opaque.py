"""Calls of modules that could not be traced: the stage holds the user's own and calls that."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from p2bw.compiler.emit.expr import Call, Dict, Index, Node, Num, Own, Raw, Ref, Seq, quoted
from p2bw.compiler.emit.tree import Body, Statement, Value
from p2bw.compiler.program import OpaqueCall, Slot


def constructor(call: OpaqueCall) -> Call:
    """What gives the stage the module."""
    name = call.path.rpartition(".")[2]
    return Call(Raw("opaque"), (Raw("__file__"), Num(call.path, f"{name}_path")))


def written(
    path: str, call: OpaqueCall, inputs: Sequence[fx.Node], ref: Callable[[fx.Node], Node]
) -> Call:
    """The call as the user's code makes it; `path` is the module's in the class that calls it."""

    def convert(value: Any) -> Node:
        if isinstance(value, Slot):
            return ref(inputs[value.index])
        if isinstance(value, (list, tuple)):
            return Seq("[]" if isinstance(value, list) else "()", tuple(map(convert, value)))
        if isinstance(value, dict):
            return Dict(tuple((quoted(str(k)), convert(v)) for k, v in value.items()))
        if isinstance(value, str):
            return Raw(quoted(value))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return Num(value)
        assert value is None or isinstance(value, (bool, torch.dtype)), value
        return Raw(repr(value))

    args, kwargs = call.arguments
    named = tuple((name, convert(value)) for name, value in kwargs.items())
    return Call(Own(path), tuple(map(convert, args)), named)


def statements(
    call: OpaqueCall,
    expr: Call,
    name: str,
    body: Body,
    target: Callable[[int, str], int],
    used: Container[int],
) -> Iterator[Statement]:
    """The call, and what takes the tensors that are used out of what it returns.

    `target(i, name)` makes a local value of the i-th tensor.
    """
    if _is_flat(call.result):
        targets = tuple(
            target(item.index, f"{name}_{i}" if i else name)
            if item is not None and item.index in used
            else None
            for i, item in enumerate(call.result)
        )
        yield Statement(targets, expr, forced=True)
        return
    places = [(way, i) for way, i in _places(call.result) if i in used]
    base: Node = expr
    if len(places) != 1:
        whole = (len(body.values),) if places else ()
        if places:
            base = Ref(len(body.values))
            body.values.append(Value(None, name))
        yield Statement(whole, expr)
    for number, (way, index) in enumerate(places):
        taken = base
        for key in way:
            taken = Index(taken, (key,))
        yield Statement((target(index, f"{name}_{number}" if number else name),), taken)


def _is_flat(result: Any) -> bool:
    """Whether the results can be unpacked: `y, weights = self.moe(x)`."""
    return (
        type(result) in (list, tuple)
        and len(result) > 1
        and all(isinstance(item, Slot) or item is None for item in result)
    )


def _places(result: Any, way: tuple[Node, ...] = ()) -> Iterator[tuple[tuple[Node, ...], int]]:
    """Each tensor of a nested result: the keys that lead to it, and its number."""
    if isinstance(result, Slot):
        yield way, result.index
    items: Any = ()
    if isinstance(result, (list, tuple)):
        items = enumerate(result)
    elif isinstance(result, dict):
        items = result.items()
    for key, value in items:
        text = quoted(key) if isinstance(key, str) else repr(key)
        yield from _places(value, (*way, Raw(text)))
