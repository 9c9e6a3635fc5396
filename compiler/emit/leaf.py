"""How a torch.nn module is recognised by the calls that it made.

A leaf is taken for the module that it was only if every argument of its calls is accounted for:
those that the constructor sets, and the rest at their defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from p2bw.compiler.emit.expr import Call, Node, Num, Raw, method
from p2bw.compiler.emit.op import Op
from p2bw.compiler.program import TensorType


@dataclass(frozen=True, slots=True)
class Leaf:
    """A torch.nn module: how to construct it, its tensors, and what it is called with."""

    constructor: Call
    provides: frozenset[str]
    inputs: tuple[Any, ...]  # fx nodes, or tuples of them


class MismatchError(Exception):
    """The calls are not what the module's own forward would make."""


class Match:
    """The calls of one region, and what has been read of them so far."""

    def __init__(
        self,
        ops: Sequence[Op],
        owned: Callable[[fx.Node], str | None],
        trainable: Callable[[fx.Node], bool],
    ) -> None:
        self.ops = ops
        self.op = ops[-1]
        self.owned = owned  # name below the module of a parameter or buffer, None for others
        self.trainable = trainable
        self.tensors: dict[str, fx.Node] = {}
        self.read: set[str] = set()

    def only(self, *names: str) -> None:
        """The region is this one call."""
        self.require(len(self.ops) == 1 and self.op.name in names)

    def require(self, condition: bool) -> None:
        if not condition:
            raise MismatchError

    def get(self, name: str) -> Any:
        self.read.add(name)
        return self.op[name]

    def num(self, name: str) -> Num:
        value = self.get(name)
        self.require(isinstance(value, (int, float)) and not isinstance(value, bool))
        return Num(value, name)

    def input(self, name: str) -> fx.Node:
        value = self.get(name)
        self.require(isinstance(value, fx.Node) and self.owned(value) is None)
        assert isinstance(value, fx.Node)
        return value

    def own(self, argument: str, name: str = "") -> TensorType | None:
        """The type of the module's tensor `name`, which the argument must be; None: it has none."""
        return self.own_node(self.get(argument), name or argument)

    def own_node(self, value: Any, name: str) -> TensorType | None:
        if value is None:
            return None
        self.require(isinstance(value, fx.Node) and self.owned(value) == name)
        assert isinstance(value, fx.Node)
        self.tensors[name] = value
        return self.op.types(value)

    def sure(self, argument: str, name: str = "") -> TensorType:
        found = self.own(argument, name)
        self.require(found is not None)
        assert found is not None
        return found

    def leaf(self, name: str, args: Sequence[Node], kwargs: dict[str, Node], *inputs: Any) -> Leaf:
        """The constructor, once every argument of the last call has been read."""
        self.require(self.op.changed() <= self.read | _IRRELEVANT)
        dtypes = {
            self.op.types(t).dtype
            for t in self.tensors.values()
            if self.op.types(t).dtype.is_floating_point
        }
        self.require(len(dtypes) <= 1)
        if dtypes and dtypes != {torch.float32}:
            kwargs["dtype"] = Raw(repr(dtypes.pop()))
        constructor = Call(Raw(f"nn.{name}"), tuple(args), tuple(kwargs.items()))
        frozen = {not self.trainable(t) for n, t in self.tensors.items() if n not in BUFFERS}
        self.require(len(frozen) <= 1)
        if frozen == {True}:
            constructor = method(constructor, "requires_grad_", Raw("False"))
        return Leaf(constructor, frozenset(self.tensors), inputs)


_IRRELEVANT = {"cudnn_enable", "cudnn_enabled"}
BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
