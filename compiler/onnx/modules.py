"""From flat statements to nested modules: classes with a forward, and torch.nn where it fits.

A module of the source that ran once, in one go, gets a class of its own, and modules with the same
code share one class. Where the file does not tell its modules, one forward does it all.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from p2bw.compiler.onnx.names import class_name, identifier, unique
from p2bw.compiler.onnx.values import Constant, Leaf, Statement, Translation

Path = tuple[str, ...]
_MARK = re.compile("⟦([^⟧]+)⟧")
_LOCALS = ("x", "y", "z", "u", "v", "w")
_LITERALS = {"bool": "mask", "int64": "indices", "int32": "indices"}


@dataclass(slots=True)
class Modules:
    """The classes of a model file, the last of them the model, and its tensors by name."""

    classes: list[str]
    name: str
    tensors: dict[str, Constant | None]  # None: a counter of torch's own that starts at 0


def build(translation: Translation, inputs: Mapping[str, str], name: str) -> Modules:
    """Nest a translation. `inputs` are identifiers by mark, `name` is the model's class."""
    return _Builder(translation, dict(inputs), name).build()


@dataclass(slots=True)
class _Builder:
    translation: Translation
    inputs: dict[str, str]
    name: str
    statements: list[Statement] = field(default_factory=list)
    leaves: dict[Path, Leaf] = field(default_factory=dict)
    tensors: dict[Path, Constant] = field(default_factory=dict)
    outlined: dict[Path, range] = field(default_factory=dict)  # positions of its statements
    users: dict[str, list[int]] = field(default_factory=dict)  # mark -> positions of statements
    bodies: dict[str, str] = field(default_factory=dict)  # text of a class -> its name
    made: dict[Path, str] = field(default_factory=dict)  # what constructs a module

    def build(self) -> Modules:
        self.statements = _live(self.translation)
        self._find_leaves()
        used = {m for s in self.statements for m in _marks(s.code)} | self._owned_by_leaves()
        used |= set(self.translation.outputs)
        self.tensors = {
            path: constant
            for path, constant in self.translation.tensors.items()
            if _tensor_mark(path) in used
        }
        self._outline()
        self._place_literals()
        for place, statement in enumerate(self.statements):
            for mark in _marks(statement.code):
                self.users.setdefault(mark, []).append(place)
        everything = range(len(self.statements))
        self._write_class((), everything, list(self.inputs), list(self.translation.outputs))
        return Modules(
            classes=[f"class {n}(nn.Module):\n{text}" for text, n in self.bodies.items()],
            name=next(reversed(self.bodies.values())),
            tensors=self._named_tensors(),
        )

    def _named_tensors(self) -> dict[str, Constant | None]:
        named: dict[str, Constant | None] = {
            ".".join(path): constant for path, constant in self.tensors.items()
        }
        for path, leaf in self.leaves.items():
            if leaf.constructor.startswith("nn.BatchNorm"):
                named[".".join((*path, "num_batches_tracked"))] = None
        return named

    def _owned_by_leaves(self) -> set[str]:
        return {
            _tensor_mark((*path, own)) for path, leaf in self.leaves.items() for own in leaf.owns
        }

    def _find_leaves(self) -> None:
        """Use a torch.nn module where all that lies below its path is what that module has."""
        below: dict[Path, set[str]] = {}
        for path in self.translation.tensors:
            for depth in range(len(path)):
                below.setdefault(path[:depth], set()).add(".".join(path[depth:]))
        for statement in self.statements:
            leaf = statement.leaf
            if leaf is None or below.get(leaf.path) != set(leaf.owns):
                continue
            known = self.leaves.setdefault(leaf.path, leaf)
            if known.constructor == leaf.constructor:
                statement.code = f"{_module_mark(leaf.path)}({leaf.call})"
                statement.scope = _common(statement.scope, leaf.path[:-1])

    def _outline(self) -> None:
        """Find the modules that get a forward of their own."""
        places: dict[Path, list[int]] = {}
        for place, statement in enumerate(self.statements):
            for depth in range(1, len(statement.scope) + 1):
                places.setdefault(statement.scope[:depth], []).append(place)
        held = {path[:depth] for path in self.tensors for depth in range(len(path))}
        lists = {
            path[:depth] for path in held for depth in range(len(path)) if _is_index(path, depth)
        }
        for path, found in places.items():
            once = found[-1] - found[0] + 1 == len(found)
            if path in self.leaves or path in lists or path not in held or not once:
                continue
            if path in self.translation.classes:
                self.outlined[path] = range(found[0], found[-1] + 1)

    def _owner(self, scope: Path) -> Path:
        """The innermost module with a forward that a statement is part of."""
        while scope and scope not in self.outlined:
            scope = scope[:-1]
        return scope

    def _place_literals(self) -> None:
        """Give the other constants to the modules that use them, as buffers."""
        owners: dict[str, Path] = {}
        for statement in self.statements:
            for mark in _marks(statement.code):
                if mark[1] == "$":
                    owner = self._owner(statement.scope)
                    owners[mark] = self._owner(_common(owners.get(mark, owner), owner))
        for mark in self.translation.outputs:
            if mark[1] == "$":
                owners[mark] = ()
        paths: dict[str, Path] = {}
        for mark, owner in owners.items():
            constant = self.translation.literals[int(mark[2:-1])]
            taken = {p[len(owner)] for p in self.tensors if p[: len(owner)] == owner}
            name = unique(_LITERALS.get(constant.dtype, "constant"), taken)
            paths[mark] = (*owner, name)
            self.tensors[paths[mark]] = constant
        for statement in self.statements:
            statement.code = _MARK.sub(
                lambda m: _tensor_mark(paths[m[0]]) if m[0] in paths else m[0], statement.code
            )
        outputs = tuple(
            _tensor_mark(paths[mark]) if mark in paths else mark
            for mark in self.translation.outputs
        )
        self.translation.outputs = outputs

    def _write_class(self, path: Path, span: range, inputs: list[str], outputs: list[str]) -> None:
        """Write the class of a module, after those of its children; remember how to make one."""
        lines = _Names(path)
        for index, mark in enumerate(inputs):
            default = _LOCALS[index] if index < len(_LOCALS) else f"x{index}"
            lines.take(mark, self.inputs[mark] if not path else default)
        arguments = list(lines.names.values())
        place = span.start
        while place < span.stop:
            child = self._child(path, place)
            if child is None:
                lines.add(self.statements[place])
                place += 1
            elif repeated := self._repeated(child):
                place = self._loop(lines, repeated)
            else:
                place = self._call(lines, child)
        results = ", ".join(lines.render(mark) for mark in outputs)
        annotation = "Tensor" if len(outputs) == 1 else "tuple[Tensor, ...]"
        takes_text = ", ".join(["self", *(f"{a}: Tensor" for a in arguments)])
        forward = [
            f"    def forward({takes_text}) -> {annotation}:",
            *(f"        {line}" for line in lines.lines),
            f"        return {results}",
        ]
        default = self.name if not path else class_name(path[-1], "Layer")
        self.made[path] = self._class(path, [*self._init(path), "", *forward], default)

    def _call(self, lines: "_Names", child: Path) -> int:
        """Write a call of a module's own forward; the position behind its statements."""
        span = self.outlined[child]
        takes, gives = self._boundary(child, span)
        self._write_class(child, span, takes, gives)
        call = f"{_module_mark(child)}({', '.join(takes)})"
        lines.add(Statement(tuple(gives), call, identifier(child[-1], "x"), child))
        return span.stop

    def _loop(self, lines: "_Names", layers: list["_Layer"]) -> int:
        """Write a loop over a list of modules; the position behind their statements."""
        for layer in layers:
            self._write_class(layer.path, layer.span, layer.takes, [layer.gives])
        first, last = layers[0], layers[-1]
        given, item = first.takes[first.fed], unique("layer", lines.names.values())
        if given[1] == "%" and self._is_used_in(given, first.span):
            name = lines.names[given]  # for nothing else: it can have the next values
        else:
            name = unique("x", lines.names.values())
            lines.lines.append(f"{name} = {lines.render(given)}")
        lines.names[last.gives] = name
        arguments = [lines.render(mark) for mark in first.takes]
        arguments[first.fed] = name
        lines.lines.append(f"for {item} in {lines.render(_module_mark(first.path[:-1]))}:")
        lines.lines.append(f"    {name} = {item}({', '.join(arguments)})")
        return last.span.stop

    def _repeated(self, child: Path) -> list["_Layer"]:
        """The modules of a list, if each takes what the one before it gives; else nothing."""
        siblings = [(*child[:-1], key) for key in self._children(child[:-1])]
        if [path[-1] for path in siblings] != [str(i) for i in range(len(siblings))]:
            return []
        layers: list[_Layer] = []
        for path in siblings:
            span = self.outlined.get(path)
            if span is None or (layers and layers[-1].span.stop != span.start):
                return []
            takes, gives = self._boundary(path, span)
            if len(gives) != 1:
                return []
            layers.append(_Layer(path, span, takes, gives[0], 0))
        if len(layers) < 2 or layers[0].path != child:
            return []
        for before, layer in pairwise(layers):
            if layer.takes.count(before.gives) != 1 or len(layer.takes) != len(before.takes):
                return []
            layer.fed = layer.takes.index(before.gives)
            same = list(before.takes)
            same[layer.fed : layer.fed + 1] = [before.gives]
            if same != layer.takes or not self._is_used_in(before.gives, layer.span):
                return []
        layers[0].fed = layers[1].fed
        return layers if len({layer.fed for layer in layers}) == 1 else []

    def _is_used_in(self, mark: str, span: range) -> bool:
        """Whether nothing else uses a value."""
        if mark in self.translation.outputs:
            return False
        return all(place in span for place in self.users.get(mark, ()))

    def _child(self, path: Path, place: int) -> Path | None:
        """The outlined module directly below `path` that a statement belongs to."""
        scope = self.statements[place].scope
        for depth in range(len(path) + 1, len(scope) + 1):
            if scope[:depth] in self.outlined:
                return scope[:depth]
        return None

    def _boundary(self, path: Path, span: range) -> tuple[list[str], list[str]]:
        """What a module's statements take from outside, and what of theirs is used outside."""
        inside = {mark for i in span for mark in self.statements[i].results}
        takes: dict[str, None] = {}
        for i in span:
            for mark in _marks(self.statements[i].code):
                foreign = mark[1] not in "%@" and _path(mark)[: len(path)] != path
                if foreign or (mark[1] == "%" and mark not in inside):
                    takes[mark] = None
        made = (mark for i in span for mark in self.statements[i].results)
        return list(takes), [mark for mark in made if not self._is_used_in(mark, span)]

    def _init(self, path: Path) -> list[str]:
        """The lines of __init__: tensors of the module's own, and its children."""
        lines = ["    def __init__(self) -> None:", "        super().__init__()"]
        for key in self._children(path):
            below = (*path, key)
            constant = self.tensors.get(below)
            if constant is None:
                lines.append(f"        self.{key} = {self._made(below)}")
                continue
            sizes = ", ".join(map(str, constant.shape)) or "()"
            dtype = "" if constant.dtype == "float32" else f", dtype=torch.{constant.dtype}"
            empty = f"torch.empty({sizes}{dtype})"
            if constant.role == "parameter":
                lines.append(f"        self.{key} = nn.Parameter({empty})")
            else:
                lines.append(f'        self.register_buffer("{key}", {empty})')
        return lines

    def _children(self, path: Path) -> list[str]:
        found = {p[len(path)]: None for p in self.tensors if p[: len(path)] == path}
        return list(found)

    def _made(self, path: Path) -> str:
        """Code that constructs the module at a path."""
        if path in self.leaves:
            return self.leaves[path].constructor
        if path not in self.made:
            keys = self._children(path)
            if all(key.isdigit() for key in keys):
                self.made[path] = self._list(path, keys)
            else:
                self.made[path] = self._class(path, self._init(path), class_name(path[-1], "Layer"))
        return self.made[path]

    def _list(self, path: Path, keys: list[str]) -> str:
        """A list; modules without tensors, such as activations, leave gaps in its numbers."""
        present = {int(key): self._made((*path, key)) for key in keys}
        items = [present.get(i, "nn.Identity()") for i in range(max(present) + 1)]
        if len(items) > 1 and len(set(items)) == 1:
            return f"nn.ModuleList({items[0]} for _ in range({len(items)}))"
        return f"nn.ModuleList([{', '.join(items)}])"

    def _class(self, path: Path, lines: list[str], default: str) -> str:
        """The call of a class with these lines, which is written unless there is one already."""
        text = "\n".join(lines)
        if text not in self.bodies or not path:
            name = self.translation.classes.get(path, default)
            self.bodies[text] = unique(name, self.bodies.values())
        return f"{self.bodies[text]}()"


@dataclass(slots=True)
class _Layer:
    """One of a list of modules that run one after the other."""

    path: Path
    span: range
    takes: list[str]
    gives: str
    fed: int  # which of `takes` the module before it gives


class _Names:
    """The body of one forward, with a name for each mark."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, str] = {}
        self.lines: list[str] = []

    def take(self, mark: str, name: str) -> None:
        if mark[1] != "%":
            name = identifier("_".join(_path(mark)[-2:]))
        self.names[mark] = unique(name, self.names.values())

    def add(self, statement: Statement) -> None:
        code = self.render(statement.code)
        for index, mark in enumerate(statement.results):
            hint = statement.hint if not index else f"{statement.hint}_{index}"
            self.names[mark] = unique(identifier(hint), self.names.values())
        results = ", ".join(self.names[mark] for mark in statement.results)
        self.lines.append(f"{results} = {code}")

    def render(self, text: str) -> str:
        return _MARK.sub(self._name, text)

    def _name(self, match: re.Match[str]) -> str:
        mark = match[0]
        if mark in self.names:
            return self.names[mark]
        assert mark[1] != "%", "a value is used before it is made"
        rest = _path(mark)[len(self.path) :]
        return "self" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in rest)


def _live(translation: Translation) -> list[Statement]:
    """The statements that the outputs depend on."""
    needed = set(translation.outputs)
    kept = []
    for statement in reversed(translation.statements):
        if needed.intersection(statement.results):
            kept.append(statement)
            needed.update(_marks(statement.code))
    return kept[::-1]


def _marks(code: str) -> Iterator[str]:
    return (match[0] for match in _MARK.finditer(code))


def _path(mark: str) -> Path:
    return tuple(mark.strip("⟦⟧@").split("."))


def _tensor_mark(path: Path) -> str:
    return f"⟦{'.'.join(path)}⟧"


def _module_mark(path: Path) -> str:
    return f"⟦@{'.'.join(path)}⟧"


def _common(a: Path, b: Path) -> Path:
    depth = 0
    while depth < min(len(a), len(b)) and a[depth] == b[depth]:
        depth += 1
    return a[:depth]


def _is_index(path: Iterable[str], depth: int) -> bool:
    return tuple(path)[depth].isdigit()
