"""The modules of one stage as emission builds them: what each holds, and what its forward does."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from p2bw.compiler.emit.expr import Call, Node
from p2bw.compiler.program import TensorType


class Kind(Enum):
    CLASS = "class"  # a class of the emitted file
    LEAF = "leaf"  # a module of torch.nn
    OPAQUE = "opaque"  # the user's own module; what it holds is its own affair
    SEQUENTIAL = "sequential"
    HOLDER = "holder"  # never called: a container, or a module whose parameters others use


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter or buffer that a module holds."""

    type: TensorType
    parameter: bool
    trainable: bool = True
    persistent: bool = True
    literal: Node | None = None  # a constant's values; None: loaded by name


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a local value beside its number."""

    type: TensorType | None
    name: str  # what a person would call it
    passing: bool = False  # named after where it came from, which says nothing about what follows

    @property
    def hint(self) -> str:
        """A name for what is made of it."""
        return "x" if self.passing else self.name


@dataclass(slots=True)
class Statement:
    """One line of a forward: `targets = expr`, with values by number and None for `_`."""

    targets: tuple[int | None, ...]
    expr: Node
    context: tuple[Node, ...] = ()  # `with` around it, outermost first
    augmented: str = ""  # "+=": the expression's receiver is updated in place
    inplace: bool = False  # the one target is the receiver itself, updated
    nested: bool = False  # (output, (h, c)), as recurrent modules return
    source: str = ""
    forced: bool = False  # stays a statement of its own


@dataclass(slots=True)
class Body:
    """One forward. Values 0 .. arguments-1 are its parameters."""

    arguments: int = 0
    values: list[Value] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    results: tuple[int, ...] = ()
    passed_on: tuple[int, ...] = ()  # arguments that a stage returns for the next one
    path: str = ""  # of the module that it was first met in

    def same_as(self, other: "Body") -> bool:
        """Whether both compute the same."""
        return self.key() == other.key()

    def key(self) -> tuple[object, ...]:
        lines = ((s.targets, s.expr, s.context, s.augmented, s.nested) for s in self.statements)
        return (self.arguments, self.results, tuple(lines))


@dataclass(slots=True)
class Module:
    """A module of the stage under its path in the user's model."""

    path: str
    kind: Kind = Kind.HOLDER
    type_name: str = ""
    children: "dict[str, Module]" = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    bodies: list[Body] = field(default_factory=list)
    constructor: Call | None = None
    provides: frozenset[str] = frozenset()
    whole: bool = True
    opens: bool = True
    closes: bool = True
    source: str = ""

    def child(self, path: str) -> "Module":
        """The module at a path below, made (with those between) if need be."""
        module = self
        for part in path.split(".") if path else ():
            below = f"{module.path}.{part}" if module.path else part
            module = module.children.setdefault(part, Module(below))
        return module

    def find(self, path: str) -> "Module | None":
        module: Module | None = self
        for part in path.split(".") if path else ():
            module = module.children.get(part) if module else None
        return module

    def hold(self, path: str, tensor: Tensor) -> None:
        """Declare a tensor at a path below, unless the module there has it already."""
        owner_path, _, name = path.rpartition(".")
        parts = owner_path.split(".")
        above = (self.find(".".join(parts[: i + 1])) for i in range(len(parts)))
        if any(module is not None and module.kind is Kind.OPAQUE for module in above):
            return
        owner = self.child(owner_path)
        if name not in owner.provides:
            owner.tensors.setdefault(name, tensor)

    @property
    def class_name(self) -> str:
        return self.type_name.rpartition(".")[2]

    @property
    def is_container(self) -> bool:
        """A ModuleList or ModuleDict: never called, and its children go by numbers."""
        return (
            self.kind is Kind.HOLDER
            and not self.tensors
            and bool(self.children)
            and not all(name.isidentifier() for name in self.children)
        )

    @property
    def is_list(self) -> bool:
        return list(self.children) == [str(i) for i in range(len(self.children))]

    def walk(self) -> "Iterator[Module]":
        """All modules below and this one, children first."""
        for module in self.children.values():
            yield from module.walk()
        yield self
