"""What the translation of a graph works with: values, statements, and nodes as operators see them.

A value is a tensor that a statement computes, a constant of the file, or whole numbers that are
known while tracing (sizes, mostly): those become Python numbers. Code refers to tensors by marks:
⟦%3⟧ is what a statement computes, ⟦b.0.weight⟧ a parameter or buffer, ⟦$2⟧ a constant without a
name of its own, and ⟦@b.0⟧ a module. Names come once the statements are in their modules.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from p2bw.compiler.onnx.files import Stored
from p2bw.compiler.onnx.names import Paths
from p2bw.compiler.onnx.shapes import Shapes, Size

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]
Role = Literal["literal", "parameter", "buffer"]


class UnsupportedError(Exception):
    """A use of an operator that cannot be translated; the message says which."""


@dataclass(frozen=True, slots=True)
class Local:
    """A tensor that a statement computes, or an input."""

    mark: str


@dataclass(slots=True)
class Constant:
    """A tensor of the file, or what follows from such tensors alone."""

    name: str
    role: Role
    stored: Stored | None = None
    computed: Array | None = None

    @property
    def array(self) -> Array:
        if self.computed is None:
            assert self.stored is not None
            self.computed = self.stored.read()
        return self.computed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape if self.stored else self.array.shape

    @property
    def dtype(self) -> str:
        return self.stored.dtype if self.stored else str(self.array.dtype)


@dataclass(frozen=True, slots=True)
class Numbers:
    """A vector (or, `scalar`, one) of integers, some of which only the traced sizes tell."""

    items: tuple[int | str, ...]
    scalar: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """What a tensor was split into: ONNX's sequences, as far as they are needed."""

    items: tuple[Local, ...]


Value = Local | Constant | Numbers | Parts


@dataclass(frozen=True, slots=True)
class Leaf:
    """A torch.nn module that does what a statement does with the parameters below one path."""

    path: tuple[str, ...]
    constructor: str
    owns: frozenset[str]  # the last parts of its parameters' and buffers' names
    call: str


@dataclass(slots=True)
class Statement:
    """`results = code`. `hint` is what a person might call the first result."""

    results: tuple[str, ...]
    code: str
    hint: str
    scope: tuple[str, ...]
    leaf: Leaf | None = None


@dataclass(slots=True)
class Translation:
    """What the graph has become."""

    statements: list[Statement]
    inputs: Mapping[str, str]  # mark -> name in the file
    outputs: tuple[str, ...]  # marks
    tensors: Mapping[tuple[str, ...], Constant]  # parameters and buffers by path
    literals: tuple[Constant, ...]
    limits: Mapping[str, int]  # mark of an input -> what its values index has so many rows
    classes: Mapping[tuple[str, ...], str]  # module path -> name of its class in the source
    helpers: frozenset[str]


Translate = Callable[["Node"], None]


@dataclass(slots=True)
class Translator:
    """The state of one translation."""

    path: Path
    model: "onnx.ModelProto"
    shapes: Shapes
    names: Paths
    values: dict[str, Value] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    tensors: dict[tuple[str, ...], Constant] = field(default_factory=dict)
    # Paths that tensors lie below, and whether they are lists.
    lists: dict[tuple[str, ...], bool] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)  # constant -> its path
    uses: Counter[str] = field(default_factory=Counter)
    sources: dict[str, str] = field(default_factory=dict)  # mark -> the input that it reshapes
    limits: dict[str, int] = field(default_factory=dict)
    classes: dict[tuple[str, ...], str] = field(default_factory=dict)
    made: dict[str, Statement] = field(default_factory=dict)  # mark -> what computes it
    helpers: set[str] = field(default_factory=set)
    literals: dict[str, Constant] = field(default_factory=dict)  # those that are used as tensors
    numbers: dict[str, int] = field(default_factory=dict)  # of the literals
    transposed: dict[str, tuple[str, ...]] = field(default_factory=dict)  # mark -> of what
    linear: dict[str, tuple[str, ...]] = field(default_factory=dict)  # without bias yet: weight

    def mark(self) -> str:
        return f"⟦%{len(self.made) + len(self.sources)}⟧"

    def of_constant(self, constant: Constant) -> str:
        """A mark for a constant as an attribute of the model."""
        if constant.role == "literal":  # it has its place where it is used
            if constant.name not in self.literals:
                self.numbers[constant.name] = len(self.literals)
                self.literals[constant.name] = constant
            return f"⟦${self.numbers[constant.name]}⟧"
        path = self.paths.get(constant.name)
        if path is None:
            path = self._place(constant, self.names.path(constant.name))
            self.paths[constant.name] = path
        return f"⟦{'.'.join(path)}⟧"

    def _place(self, constant: Constant, path: tuple[str, ...]) -> tuple[str, ...]:
        """Give a constant that path, or one with numbers where its names are taken."""
        found: tuple[str, ...] = ()
        for part, inner in zip(path, (*path[1:], ""), strict=True):
            number, fresh = 0, (*found, part)
            while not self._fits(fresh, inner):
                number += 1
                other = str(int(part) + number) if part.isdigit() else f"{part}_{number}"
                fresh = (*found, other)
            found = fresh
            if inner:
                self.lists[found] = inner.isdigit()
        self.tensors[found] = constant
        return found

    def _fits(self, path: tuple[str, ...], inner: str) -> bool:
        """Whether a tensor can lie at a path or, with `inner`, a module that has that child.

        A list has numbers alone, so what has other names is another module.
        """
        if path in self.tensors or path not in self.lists:
            return path not in self.tensors
        return bool(inner) and self.lists[path] == inner.isdigit()


@dataclass(frozen=True, slots=True)
class Node:
    """One node, as a translation sees it: what goes in, and a way to say what comes out."""

    translator: Translator
    proto: Any
    attributes: Mapping[str, Any]
    scope: tuple[str, ...]
    opset: int

    @property
    def op(self) -> str:
        return str(self.proto.op_type)

    def has(self, index: int) -> bool:
        return index < len(self.proto.input) and bool(self.proto.input[index])

    def wants(self, index: int) -> bool:
        """Whether anything uses this output."""
        outputs = self.proto.output
        return index < len(outputs) and self.translator.uses[outputs[index]] > 0

    @property
    def count(self) -> int:
        return len(self.proto.input)

    def value(self, index: int) -> Value:
        return self.translator.values[self.proto.input[index]]

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            raise UnsupportedError(what)

    def sizes(self, index: int) -> tuple[Size | None, ...]:
        """The shape of an input; it must be known in part at least."""
        return self._sizes(self.proto.input[index], self.value(index))

    def out_sizes(self, index: int = 0) -> tuple[Size | None, ...] | None:
        return self.translator.shapes.sizes.get(self.proto.output[index])

    def _sizes(self, name: str, value: Value | None) -> tuple[Size | None, ...]:
        if isinstance(value, Constant):
            return tuple(Size(0, size) for size in value.shape)
        if isinstance(value, Numbers):
            return () if value.scalar else (Size(0, len(value.items)),)
        found = self.translator.shapes.sizes.get(name)
        if found is None:
            raise UnsupportedError("an input of unknown shape")
        return found

    def rank(self, index: int) -> int:
        return len(self.sizes(index))

    def fixed(self, index: int) -> tuple[int, ...]:
        """The shape of an input that does not depend on the batch."""
        sizes = [None if size is None else size.fixed for size in self.sizes(index)]
        if None in sizes:
            raise UnsupportedError("an input whose shape depends on the batch")
        return tuple(size for size in sizes if size is not None)

    def axis(self, default: int) -> int:
        return int(self.attribute("axis", default)) % max(self.rank(0), 1)

    def dtype(self, index: int) -> str:
        value = self.value(index)
        if isinstance(value, Constant):
            return value.dtype
        if isinstance(value, Numbers):
            return "int64"
        return self.translator.shapes.dtypes.get(self.proto.input[index], "float32")

    def tensor(self, index: int) -> str:
        """Code for an input as a tensor."""
        value = self.value(index)
        if isinstance(value, Local):
            return value.mark
        if isinstance(value, Numbers):
            items = ", ".join(map(str, value.items))
            return f"torch.tensor({items if value.scalar else f'[{items}]'})"
        if isinstance(value, Parts):
            raise UnsupportedError("a sequence of tensors")
        return self.translator.of_constant(value)

    def operand(self, index: int) -> str:
        """An input as a tensor, or as a number where that means the same."""
        value = self.value(index)
        if isinstance(value, Constant) and value.role == "literal" and prod(value.shape) == 1:
            others = [i for i in range(self.count) if i != index and self.has(i)]
            known = self.translator.shapes.sizes
            ranks = [
                len(known.get(self.proto.input[i], ()))
                for i in others
                if isinstance(self.value(i), Local)
            ]
            if ranks and max(ranks) >= len(value.shape) and value.dtype != "bfloat16":
                return number(value.array)
        if isinstance(value, Numbers) and value.scalar:
            return f"({value.items[0]})" if isinstance(value.items[0], str) else str(value.items[0])
        return self.tensor(index)

    def is_number(self, index: int) -> bool:
        return "⟦" not in self.operand(index)

    def constant(self, index: int) -> Array:
        """The values of an input that the file fixes."""
        value = self.value(index)
        if isinstance(value, Constant):
            return value.array
        if isinstance(value, Numbers) and all(isinstance(item, int) for item in value.items):
            return np.array(value.items[0] if value.scalar else value.items, np.int64)
        raise UnsupportedError(f"input {index} is not a constant")

    def integers(self, index: int) -> tuple[int | str, ...]:
        """An input as Python integers, or code for such."""
        value = self.value(index)
        if isinstance(value, Numbers):
            return value.items
        return tuple(int(item) for item in self.constant(index).reshape(-1))

    def parameter(self, index: int) -> tuple[str, ...] | None:
        """The path of an input that is a parameter or a buffer."""
        value = self.value(index)
        if not isinstance(value, Constant) or value.role == "literal":
            return None
        self.translator.of_constant(value)
        return self.translator.paths[value.name]

    def gives(self, text: str, hint: str = "", leaf: Leaf | None = None) -> Statement:
        """Say that the first output is the result of some code; `hint` is for naming."""
        return self.gives_all(self.proto.output[:1], text, hint=hint, leaf=leaf)

    def gives_all(
        self, names: Sequence[str], text: str, hint: str = "", leaf: Leaf | None = None
    ) -> Statement:
        """The same for several outputs, in order; "" is one that the file has no name for."""
        translator = self.translator
        statement = Statement((), text, hint or snake(self.op), self.scope, leaf)
        marks = []
        for name in names:
            marks.append(mark := translator.mark())
            translator.made[mark] = statement
            if name:
                translator.values[name] = Local(mark)
        statement.results = tuple(marks)
        translator.statements.append(statement)
        return statement

    def step(self, text: str, hint: str = "") -> str:
        """An intermediate result that the file has no name for; its mark."""
        return self.gives_all([""], text, hint).results[0]

    def gives_parts(self, marks: Sequence[str]) -> None:
        """Say that the output is a sequence of these."""
        self.translator.values[self.proto.output[0]] = Parts(tuple(map(Local, marks)))

    def is_value(self, value: Value, dtype: str = "int64") -> None:
        """Say that the output is a value that there is already; numbers that are known fold."""
        name = self.proto.output[0]
        if isinstance(value, Numbers) and all(isinstance(item, int) for item in value.items):
            array = np.array(value.items[0] if value.scalar else value.items, dtype)
            value = Constant(name, "literal", computed=array)
        self.translator.values[name] = value

    def leaf(self, constructor: str, call: str, *inputs: int) -> Leaf | None:
        """A torch.nn module for this node, if those inputs are all that lies below one path."""
        paths = [self.parameter(i) for i in inputs if self.has(i)]
        if not paths or None in paths:
            return None
        parents = {path[:-1] for path in paths if path}
        if len(parents) != 1 or parents == {()}:
            return None
        owns = frozenset(path[-1] for path in paths if path)
        dtypes = {self.translator.tensors[path].dtype for path in paths if path}
        if len(dtypes) != 1:
            return None
        return Leaf(parents.pop(), typed(constructor, dtypes.pop()), owns, call)


def typed(constructor: str, dtype: str) -> str:
    """A torch.nn module whose parameters are of that type."""
    return constructor if dtype == "float32" else f"{constructor[:-1]}, dtype=torch.{dtype})"


def number(array: Array) -> str:
    """A one-element array as a Python literal."""
    value = array.reshape(-1)[0]
    if isinstance(value, np.bool_):
        return str(bool(value))
    if isinstance(value, np.integer):
        return str(int(value))
    if not isfinite(value):
        return f'float("{float(value)}")'
    shortest = float(str(value))  # that reads back as this float32
    return repr(
        shortest if abs(shortest) <= abs(float(np.finfo(value.dtype).max)) else float(value)
    )


def snake(name: str) -> str:
    """BatchNormalization -> batch_normalization."""
    name = name.replace("NaN", "Nan")
    letters = []
    for i, letter in enumerate(name):
        before = name[i - 1 : i]
        after = name[i + 1 : i + 2]
        if letter.isupper() and i and (before.islower() or after.islower()):
            letters.append("_")
        letters.append(letter.lower())
    return "".join(letters)
