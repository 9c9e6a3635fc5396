"""One ATen call of the graph, its arguments under the schema's names."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from p2bw.compiler.emit.expr import Attr, Device, Node, Num, Raw, Seq, call, quoted
from p2bw.compiler.program import TensorType

Convert = Callable[[fx.Node], Node]


@dataclass(frozen=True, slots=True)
class _Argument:
    name: str
    default: Any
    required: bool
    keyword_only: bool
    out: bool  # what the result is written into


@cache
def _schema(target: Any) -> tuple[_Argument, ...]:
    return tuple(
        _Argument(a.name, a.default_value, not a.has_default_value(), a.kwarg_only, a.is_out)
        for a in target._schema.arguments
    )


@cache
def name_of(target: Any) -> str:
    """ "add.Tensor" for aten.add.Tensor; with its namespace for other operators."""
    namespace, _, name = target._schema.name.partition("::")
    full = f"{name}.{target._overloadname}"
    return full if namespace == "aten" else f"{namespace}::{full}"


class Op:
    """One ATen call, its arguments by the schema's names."""

    def __init__(self, node: fx.Node, ref: Convert, types: Callable[[fx.Node], TensorType]) -> None:
        self.node = node
        self.ref = ref
        self.types = types
        self.name = name_of(node.target)
        self.schema = _schema(node.target)
        given = dict(zip((a.name for a in self.schema), node.args, strict=False))
        self.given: dict[str, Any] = {**given, **node.kwargs}

    def __getitem__(self, name: str) -> Any:
        """The argument as the graph has it: a node, a number, a list ..., or its default."""
        if name in self.given:
            return self.given[name]
        return next(a.default for a in self.schema if a.name == name)

    def has(self, name: str) -> bool:
        return any(a.name == name for a in self.schema)

    def changed(self) -> set[str]:
        """Arguments that differ from the schema's default, or have none."""
        return {
            a.name
            for a in self.schema
            if a.name in self.given and (a.required or not _same(self.given[a.name], a.default))
        }

    def expr(self, name: str) -> Node:
        return self.literal(self[name], name)

    def literal(self, value: Any, name: str = "value") -> Node:
        """The text of an argument."""
        if isinstance(value, fx.Node):
            return self.ref(value)
        if isinstance(value, bool) or value is None:
            return Raw(repr(value))
        if isinstance(value, (int, float)):
            return Num(value, name)
        if isinstance(value, str):
            return Raw(quoted(value))
        if isinstance(value, torch.device):
            return Device()
        if isinstance(value, (list, tuple)):
            return Seq("()", tuple(self.literal(item, name) for item in value))
        assert isinstance(value, (torch.dtype, torch.layout, torch.memory_format, complex)), value
        return Raw(repr(value))

    def rank(self, name: str) -> int:
        return len(self.types(self[name]).shape)


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node):
        return False
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        return list(value) == list(default)
    return type(value) is type(default) and bool(value == default)


def with_item(context: str) -> Node:
    """The `with` item of a region that the user's code put around a node."""
    if context == "no_grad":
        return call("torch.no_grad")
    if context == "enable_grad":
        return call("torch.enable_grad")
    dtype = context.removeprefix("autocast(").removesuffix(")")
    assert isinstance(getattr(torch, dtype), torch.dtype)
    return call("torch.autocast", Attr(Device(), "type"), dtype=Raw(f"torch.{dtype}"))
