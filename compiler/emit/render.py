"""The text of classes: constructors, docstrings and forwards."""

from collections.abc import Iterator, Sequence

from p2bw.compiler.emit.classes import Class, Classes
from p2bw.compiler.emit.comments import plain, spans
from p2bw.compiler.emit.expr import (
    WIDTH,
    Call,
    Dict,
    Each,
    Node,
    Num,
    Own,
    Raw,
    Seq,
    call,
    flat,
    lay_out,
    number,
    quoted,
    rebuild,
)
from p2bw.compiler.emit.function import Function, signature
from p2bw.compiler.emit.names import is_plain
from p2bw.compiler.emit.tree import Kind, Module, Statement, Tensor
from p2bw.compiler.program import TensorType


def access(module: Module, path: str, text: str = "self") -> str:
    """How to reach a module or tensor below `module`: self.h["3"].attn.weight."""
    current: Module | None = module
    names = path.split(".") if path else []
    for position, part in enumerate(names):
        assert current is not None
        if current.kind is Kind.OPAQUE:
            owner = ".".join(names[position:-1])
            text += f".get_submodule({quoted(owner)})" if owner else ""
            plain = is_plain(part := names[-1])
            return f"{text}.{part}" if plain else f"{text}.get_parameter({quoted(part)})"
        child = current.children.get(part)
        if child is None:
            text += f".{part}" if is_plain(part) else f".{_getter(current, part)}({quoted(part)})"
        elif current.kind is Kind.SEQUENTIAL or (current.is_container and current.is_list):
            text += f"[{list(current.children).index(part)}]"
        elif current.is_container:
            text += f"[{quoted(part)}]"
        else:
            text += f".{part}" if is_plain(part) else f".get_submodule({quoted(part)})"
        current = child
    return text


def _getter(module: Module, name: str) -> str:
    return "get_parameter" if module.tensors[name].parameter else "get_buffer"


class Writer:
    """Writes one class."""

    def __init__(self, classes: Classes, cls: Class) -> None:
        self.classes = classes
        self.cls = cls
        self.module = cls.sample
        self.columns = iter(cls.columns)
        self.stored: dict[str, None] = {}  # parameters that forwards need

    def text(self, ties: Sequence[tuple[str, str]] = (), label: str = "") -> list[str]:
        """The lines of the class; `label` is what the world calls its forward's result."""
        forwards: list[str] = []
        for index, body in enumerate(self.module.bodies):
            statements = [self._settled(statement) for statement in body.statements]
            body.statements[:] = statements
            types = self._types(index)
            function = Function(body, self.module, types, self._resolve, label)
            forwards += ["", *function.lines("forward" if index == 0 else f"forward_{index + 1}")]
        init = self._init(ties)
        return [*self._head(), *(init or []), *(forwards if init else forwards[1:])]

    # Numbers that instances differ in.

    def _number(self, node: Num, stored: bool) -> Node:
        name = next(self.columns)
        if not name:
            return Raw(number(node.value))
        if stored:
            self.stored[name] = None
            return Raw(f"self.{name}")
        return Raw(name)

    def _settled(self, statement: Statement) -> Statement:
        def settle(part: Node) -> Node:
            return self._number(part, stored=True) if isinstance(part, Num) else part

        statement.expr = rebuild(statement.expr, settle)
        statement.context = tuple(rebuild(context, settle) for context in statement.context)
        return statement

    def _constructor(self, node: Node) -> Node:
        def settle(part: Node) -> Node:
            return self._number(part, stored=False) if isinstance(part, Num) else part

        return rebuild(node, settle)

    def _resolve(self, node: Node) -> Node:
        def resolve(part: Node) -> Node:
            return Raw(access(self.module, part.path)) if isinstance(part, Own) else part

        return rebuild(node, resolve)

    def _types(self, index: int) -> list[TensorType | None]:
        """The type of every value, None where instances disagree."""
        rows = [
            [value.type for value in module.bodies[index].values] for module in self.cls.instances
        ]
        return [types[0] if len(set(types)) == 1 else None for types in zip(*rows, strict=True)]

    # Construction.

    def _init(self, ties: Sequence[tuple[str, str]]) -> list[str]:
        lines = list(self._held(self.module, "self"))
        for new, old in ties:
            lines.append(f"        {access(self.module, new)} = {access(self.module, old)}")
        lines = [f"        self.{name} = {name}" for name in self.stored] + lines
        if not lines:
            return []
        kinds = {name: self._kind(column) for name, column in self.cls.parameters.items()}
        arguments = [f"{name}: {kind}" for name, kind in kinds.items()]
        return [*signature("__init__", arguments, "None"), "        super().__init__()", *lines]

    def _kind(self, column: int) -> str:
        return type(self.classes.numbers[id(self.module)][column].value).__name__

    def _held(self, module: Module, text: str) -> Iterator[str]:
        """Statements that give a module its tensors and children."""
        for name, tensor in module.tensors.items():
            yield from self._tensor(text, name, tensor)
        for name, child in module.children.items():
            more: list[str] = []
            expr = self._built(child, more, access(module, name, text))
            if is_plain(name):
                yield from lay_out(f"{text}.{name} = ", expr, 8)
            else:
                yield from lay_out("", call(f"{text}.add_module", Raw(quoted(name)), expr), 8)
            yield from more

    def _tensor(self, owner: str, name: str, tensor: Tensor) -> Iterator[str]:
        sizes = tuple(self._constructor(Num(size, "size")) for size in tensor.type.shape)
        dtype: dict[str, Node] = {}
        if str(tensor.type.dtype) != "torch.float32":
            dtype["dtype"] = Raw(str(tensor.type.dtype))
        if tensor.literal is not None:
            value = call("torch.tensor", tensor.literal, dtype=Raw(str(tensor.type.dtype)))
        else:
            fill = "torch.empty" if tensor.parameter else "torch.zeros"
            value = call(fill, *(sizes or (Raw("()"),)), **dtype)
        if tensor.parameter:
            frozen: dict[str, Node] = {} if tensor.trainable else {"requires_grad": Raw("False")}
            value = call("nn.Parameter", value, **frozen)
            if is_plain(name):
                yield from lay_out(f"{owner}.{name} = ", value, 8)
            else:
                yield from lay_out(
                    "", call(f"{owner}.register_parameter", Raw(quoted(name)), value), 8
                )
            return
        kept: dict[str, Node] = {} if tensor.persistent else {"persistent": Raw("False")}
        yield from lay_out(
            "", call(f"{owner}.register_buffer", Raw(quoted(name)), value, **kept), 8
        )

    def _built(self, module: Module, more: list[str], text: str) -> Node:
        """The expression that makes a child; `more` receives what has to follow it."""
        if module.kind is Kind.CLASS:
            cls = self.classes.of[id(module)]
            own = self.classes.numbers[id(module)]
            numbers = [Num(own[column].value, name) for name, column in cls.parameters.items()]
            values = [self._constructor(value) for value in numbers]
            return Call(Raw(cls.name), (), tuple(zip(cls.parameters, values, strict=True)))
        if module.kind in (Kind.LEAF, Kind.OPAQUE):
            assert module.constructor is not None
            expr = self._constructor(module.constructor)
            more += self._held(module, text)
            return expr
        if module.kind is Kind.HOLDER and not module.is_container:
            more += self._held(module, text)
            return call("nn.Module")
        for name, tensor in module.tensors.items():
            more += self._tensor(text, name, tensor)
        built = [
            (name, self._built(child, more, access(module, name, text)))
            for name, child in module.children.items()
        ]
        made = self._collection(module, built)
        if module.kind is Kind.HOLDER and not module.is_list and len(text) + len(flat(made)) > 89:
            return self._long_dict(built, more, text)
        return made

    def _collection(self, module: Module, built: list[tuple[str, Node]]) -> Node:
        items = tuple(expr for _, expr in built)
        if module.kind is Kind.SEQUENTIAL:
            if module.is_list:
                return call("nn.Sequential", *items)
            named = tuple(Seq("()", (Raw(quoted(name)), expr)) for name, expr in built)
            return call("nn.Sequential", call("OrderedDict", Seq("[]", named)))
        runs = _runs(built)
        if module.is_list:
            if len(runs) == 1 and len(built) > 1:
                return call("nn.ModuleList", Each(items[0], len(built)))
            listed: list[Node] = []
            for run in runs:
                if len(run) > 2:
                    listed.append(Raw(f"*({flat(run[0][1])} for _ in range({len(run)}))"))
                else:
                    listed += [expr for _, expr in run]
            return call("nn.ModuleList", Seq("[]", tuple(listed)))
        each = [_comprehension(run) for run in runs]
        if len(runs) == 1 and len(built) > 1:
            return call("nn.ModuleDict", Raw(each[0]))
        pairs: list[tuple[str, Node]] = []
        for text, run in zip(each, runs, strict=True):
            pairs += [("", Raw(f"**{text}"))] if len(run) > 2 else [(quoted(n), e) for n, e in run]
        return call("nn.ModuleDict", Dict(tuple(pairs)))

    def _long_dict(self, built: list[tuple[str, Node]], more: list[str], text: str) -> Node:
        """A ModuleDict of layers that are not all alike, filled run by run."""
        first, *rest = _runs(built)
        for run in rest:
            if len(run) > 2:
                more.append(f"        {text}.update({_comprehension(run)})")
            else:
                more += [f"        {text}[{quoted(name)}] = {flat(expr)}" for name, expr in run]
        if len(first) > 2:
            return call("nn.ModuleDict", Raw(_comprehension(first)))
        return call("nn.ModuleDict", Dict(tuple((quoted(name), expr) for name, expr in first)))

    # Words.

    def _head(self) -> list[str]:
        """The class statement and a comment on what in the user's model it is."""
        line = f"class {self.cls.name}(nn.Module):"
        if self.cls.name == "Stage":
            return [line]
        part = ""
        if not self.module.whole:
            which = "beginning" if self.module.opens else "end" if self.module.closes else "middle"
            part = f"the {which} of "
        source = f" ({plain(self.module.source)})" if self.module.source else ""
        paths = list(dict.fromkeys(module.path for module in self.cls.instances))
        room = WIDTH - len(f"{line}  # {part}, and 999 more{source}")
        comment = f"# {part}{spans(paths, width=room)}{source}"
        if len(line) + 2 + len(comment) <= WIDTH:
            return [f"{line}  {comment}"]
        return [comment[:WIDTH], line]


Built = list[tuple[str, Node]]  # modules of a container by name


def _runs(built: Built) -> list[Built]:
    """Neighbours that are made alike and numbered on."""
    runs: list[Built] = []
    for name, expr in built:
        last, before = runs[-1][-1] if runs else ("", None)
        numbered = name.isdecimal() and last.isdecimal() and int(name) == int(last) + 1
        if numbered and before == expr:
            runs[-1].append((name, expr))
        else:
            runs.append([(name, expr)])
    return runs


def _comprehension(run: Built) -> str:
    return f"{{str(i): {flat(run[0][1])} for i in {_range(run)}}}"


def _range(run: Built) -> str:
    return f"range({run[0][0]}, {int(run[-1][0]) + 1})" if run[0][0].isdecimal() else ""
