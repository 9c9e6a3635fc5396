"""Parameters, buffers and constants of a stage, by the names that the model knows them by."""

from dataclasses import dataclass, field

import torch
from torch import fx

from p2bw.compiler.emit.expr import Node, Raw, Seq, number
from p2bw.compiler.emit.tree import Tensor
from p2bw.compiler.program import Program, TensorType

LITERAL = 64  # constants of up to so many elements are written out


@dataclass(frozen=True, slots=True)
class Attributes:
    """Which name each use of a parameter, buffer or constant goes by."""

    program: Program
    used: dict[str, dict[str, None]] = field(default_factory=dict)  # canonical -> names used

    def use(self, node: fx.Node, name: str) -> None:
        self.used.setdefault(str(node.target), {})[name] = None

    def ties(self) -> list[tuple[str, str]]:
        """Names of one parameter that the stage uses under several: (name, the first of them)."""
        found = []
        for canonical, used in self.used.items():
            first, *others = sorted(used, key=lambda name: name != canonical)
            found += [(name, first) for name in others]
        return found

    def name(self, node: fx.Node, path: str) -> str:
        """The name of a parameter that is nearest to the module that uses it."""
        target = str(node.target)
        if target in self.program.constants:
            return target
        here = path.split(".") if path else []

        def shared(name: str) -> int:
            owner = name.split(".")[:-1]
            depth = 0
            while depth < min(len(owner), len(here)) and owner[depth] == here[depth]:
                depth += 1
            return depth

        return max(self.program.attribute(node).names, key=shared)

    def tensor(self, node: fx.Node) -> Tensor:
        target = str(node.target)
        if target in self.program.constants:
            constant = self.program.constants[target]
            kind = TensorType(tuple(constant.shape), constant.dtype)
            values = literal(constant) if constant.numel() <= LITERAL else None
            return Tensor(kind, parameter=False, persistent=False, literal=values)
        attribute = self.program.attribute(node)
        return Tensor(
            attribute.type,
            parameter=target in self.program.parameters,
            trainable=attribute.trainable,
            persistent=attribute.persistent,
        )

    def owned(self, path: str, node: fx.Node) -> str | None:
        """The name that a parameter has in the module at a path, None for all other values."""
        if node.op != "get_attr" or str(node.target) in self.program.constants:
            return None
        owner, _, last = self.name(node, path).rpartition(".")
        return last if owner == path else None

    def is_trainable(self, node: fx.Node) -> bool:
        return self.program.attribute(node).trainable


def below(path: str, name: str) -> str | None:
    """A qualified name relative to a module's path, None if it is not below it."""
    if not path:
        return name
    return name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else None


def literal(constant: torch.Tensor) -> Node:
    """A tensor's values as nested lists."""
    return _listed(constant.detach().cpu().tolist())


def _listed(value: object) -> Node:
    if isinstance(value, list):
        return Seq("[]", tuple(map(_listed, value)))
    return Raw(number(value) if isinstance(value, float) else repr(value))
