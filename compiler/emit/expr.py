"""Expressions of emitted code: small immutable trees, printed as a careful person would.

The arguments of long calls go on a line of their own, or else each on one with a trailing comma,
as do the items of long collections; so the text is a fixed point of `ruff format`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch

WIDTH = 100


@dataclass(frozen=True, slots=True)
class Node:
    """Base of all expressions."""


@dataclass(frozen=True, slots=True)
class Raw(Node):
    """Text that stands as it is: a dotted name, True, a quoted string, a slice."""

    text: str


@dataclass(frozen=True, slots=True)
class Num(Node):
    """An int, float or str; where isomorphic modules differ in it, a parameter of their class."""

    value: int | float | str
    name: str = "value"


@dataclass(frozen=True, slots=True)
class Ref(Node):
    """A local value of the function, by its number."""

    index: int


@dataclass(frozen=True, slots=True)
class Own(Node):
    """An attribute of self, by its path below the module: "attn.qkv.weight"."""

    path: str


@dataclass(frozen=True, slots=True)
class Device(Node):
    """The device that the stage runs on, read off any tensor at hand."""


@dataclass(frozen=True, slots=True)
class Attr(Node):
    base: Node
    name: str


@dataclass(frozen=True, slots=True)
class Call(Node):
    func: Node
    args: tuple[Node, ...] = ()
    kwargs: tuple[tuple[str, Node], ...] = ()


@dataclass(frozen=True, slots=True)
class Binary(Node):
    op: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Unary(Node):
    op: str
    operand: Node


@dataclass(frozen=True, slots=True)
class Index(Node):
    base: Node
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Store(Node):
    """A statement, x[:, 1:] = value; or x.copy_(value), where the place has a name of its own."""

    place: Node  # some slice of a tensor, or its name
    value: Node
    method: str  # "copy_" or "fill_"


@dataclass(frozen=True, slots=True)
class Seq(Node):
    """A tuple "()" or a list "[]"."""

    brackets: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Dict(Node):
    """A dict display with string keys, already quoted; an empty key for what is unpacked."""

    items: tuple[tuple[str, Node], ...]


@dataclass(frozen=True, slots=True)
class Each(Node):
    """A generator that makes the same several times, the only argument of a call."""

    item: Node
    count: int

    @property
    def loop(self) -> str:
        return f"for _ in range({self.count})"


def method(receiver: Node, name: str, *args: Node, **kwargs: Node) -> Call:
    return Call(Attr(receiver, name), args, tuple(kwargs.items()))


def call(function: str, *args: Node, **kwargs: Node) -> Call:
    return Call(Raw(function), args, tuple(kwargs.items()))


def children(node: Node) -> tuple[Node, ...]:
    """The operands of an expression, in the order in which Python evaluates them."""
    match node:
        case Attr(base, _):
            return (base,)
        case Call(func, args, kwargs):
            return (func, *args, *(value for _, value in kwargs))
        case Binary(_, left, right):
            return (left, right)
        case Unary(_, operand):
            return (operand,)
        case Index(base, items):
            return (base, *items)
        case Store(place, value, _):
            return (value, place)
        case Seq(_, items):
            return items
        case Dict(pairs):
            return tuple(value for _, value in pairs)
    return ()


def walk(node: Node) -> Iterator[Node]:
    """All parts of an expression, operands in the order of evaluation."""
    yield node
    for child in children(node):
        yield from walk(child)


def refs(node: Node) -> tuple[int, ...]:
    """The local values that an expression reads, in the order of evaluation."""
    return tuple(part.index for part in walk(node) if isinstance(part, Ref))


def rebuild(node: Node, change: Callable[[Node], Node]) -> Node:
    """The expression with `change` applied to every part, operands first and in order."""
    match node:
        case Attr(base, name):
            node = Attr(rebuild(base, change), name)
        case Call(func, args, kwargs):
            func = rebuild(func, change)
            args = tuple(rebuild(arg, change) for arg in args)
            node = Call(func, args, tuple((k, rebuild(v, change)) for k, v in kwargs))
        case Binary(op, left, right):
            left = rebuild(left, change)
            node = Binary(op, left, rebuild(right, change))
        case Unary(op, operand):
            node = Unary(op, rebuild(operand, change))
        case Index(base, items):
            base = rebuild(base, change)
            node = Index(base, tuple(rebuild(item, change) for item in items))
        case Store(place, value, name):
            value = rebuild(value, change)
            node = Store(rebuild(place, change), value, name)
        case Seq(brackets, items):
            node = Seq(brackets, tuple(rebuild(item, change) for item in items))
        case Dict(pairs):
            node = Dict(tuple((key, rebuild(value, change)) for key, value in pairs))
    return change(node)


# What masks put where nobody is to look.
_LIMITS = {
    getattr(torch.finfo(dtype), end): f"torch.finfo({dtype}).{end}"
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for end in ("min", "max")
}


def number(value: int | float | str) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "torch.nan" if math.isnan(value) else "torch.inf" if value > 0 else "-torch.inf"
    if isinstance(value, float) and value in _LIMITS:
        return _LIMITS[value]
    return repr(value).replace("e+", "e")


def quoted(text: str) -> str:
    """A string literal with the quotes that `ruff format` prefers."""
    literal = repr(text)
    if literal.startswith("'") and '"' not in text:
        return '"' + literal[1:-1].replace("\\'", "'") + '"'
    return literal


# Binding strength, as in Python's grammar.
_COMPARE, _OR, _XOR, _AND, _SUM, _PRODUCT, _UNARY, _POWER, _ATOM = range(9)
_BINARY = {
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">="), _COMPARE),
    **{"|": _OR, "^": _XOR, "&": _AND, "+": _SUM, "-": _SUM},
    **dict.fromkeys(("*", "/", "//", "%", "@"), _PRODUCT),
    "**": _POWER,
}


def _strength(node: Node) -> int:
    match node:
        case Binary(op, _, _):
            return _BINARY[op]
        case Unary(_, _):
            return _UNARY
        case Num(int() | float() as value, _) if number(value).startswith("-"):
            return _UNARY
        case Raw(text) if text.startswith("-"):
            return _UNARY
    return _ATOM


def flat(node: Node) -> str:
    """The expression on one line."""
    match node:
        case Raw(text):
            return text
        case Num(value, _):
            return number(value)
        case Attr(base, name):
            return f"{_operand(base, _ATOM)}.{name}"
        case Call(func, _, _):
            return f"{_operand(func, _ATOM)}({', '.join(_arguments(node))})"
        case Binary():
            return _binary(node)
        case Unary(op, operand):
            return op + _operand(operand, _UNARY)
        case Index(base, items):
            return f"{_operand(base, _ATOM)}[{', '.join(map(flat, items))}]"
        case Store():
            return "".join(_store(node))
        case Dict(pairs):
            inside = (f"{key}: {flat(value)}" if key else flat(value) for key, value in pairs)
            return f"{{{', '.join(inside)}}}"
        case Each(item, _):
            return f"{flat(item)} {node.loop}"
        case Seq("[]", items):
            return f"[{', '.join(map(flat, items))}]"
        case Seq(_, items):
            return f"({', '.join(map(flat, items))}{',' if len(items) == 1 else ''})"
    raise AssertionError(f"{node} has no name yet")


def _operand(node: Node, strength: int) -> str:
    text = flat(node)
    return f"({text})" if _strength(node) < strength else text


def _binary(node: Binary) -> str:
    strength = _BINARY[node.op]
    if node.op == "**":  # binds to the right, and hugs simple operands
        left, right = _operand(node.left, _ATOM), _operand(node.right, _UNARY)
        hugs = _simple(node.left) and _simple(node.right) and not left.startswith("(")
        return f"{left}**{right}" if hugs else f"{left} ** {right}"
    # Comparisons do not associate: a == b == c is a chain.
    left = _operand(node.left, strength + (strength == _COMPARE))
    return f"{left} {node.op} {_operand(node.right, strength + 1)}"


def _store(node: Store) -> tuple[str, str, str]:
    """What stands before the value, the value, and what stands behind it."""
    if isinstance(node.place, Index):
        return f"{flat(node.place)} = ", flat(node.value), ""
    return f"{_operand(node.place, _ATOM)}.{node.method}(", flat(node.value), ")"


def _simple(node: Node) -> bool:
    """Whether `ruff format` hugs ** around this operand: a name, a dotted name, a number."""
    match node:
        case Raw(text):
            plain = text.removeprefix("-")
            dotted = all(part.isidentifier() for part in plain.split("."))
            return dotted or plain.replace("e-", "").replace(".", "").isalnum()
        case Num():
            return True
        case Attr(base, _):
            return not isinstance(base, Num) and _simple(base)
        case Unary("-", operand):
            return _simple(operand)
    return False


def _arguments(node: Call) -> list[str]:
    return [*map(flat, node.args), *(f"{name}={flat(value)}" for name, value in node.kwargs)]


def lay_out(prefix: str, node: Node, indent: int) -> list[str]:
    """Lines of `prefix` followed by the expression, none wider than WIDTH where that can be."""
    line = " " * indent + prefix + flat(node)
    if len(line) <= WIDTH:
        return [line]
    match node:
        case Store(Index(), value, _):
            return lay_out(prefix + _store(node)[0], value, indent)
        case Call(func, args, kwargs) if args or kwargs:
            opening, closing = f"{_operand(func, _ATOM)}(", ")"
            items = [("", arg) for arg in args] + [(f"{name}=", v) for name, v in kwargs]
            together = " " * (indent + 4) + ", ".join(name + flat(item) for name, item in items)
            if len(together) <= WIDTH:
                return [" " * indent + prefix + opening, together, " " * indent + closing]
            if args and isinstance(each := args[-1], Each):
                made = [*lay_out("", each.item, indent + 4), " " * (indent + 4) + each.loop]
                return [" " * indent + prefix + opening, *made, " " * indent + closing]
        case Dict(pairs) if pairs:
            opening, closing = "{", "}"
            items = [(f"{key}: " if key else "", value) for key, value in pairs]
        case Seq(brackets, seq) if seq:
            opening, closing = brackets[0], brackets[1]
            items = [("", item) for item in seq]
        case Binary() if len(line) - len(prefix) + 4 <= WIDTH and prefix:
            return [
                " " * indent + prefix + "(",
                " " * (indent + 4) + flat(node),
                " " * indent + ")",
            ]
        case _:
            return [line]
    inner = [lay_out(name, item, indent + 4) for name, item in items]
    sole = len(items) == 1 and isinstance(items[0][1], (Seq, Dict))
    comma = "" if sole and isinstance(node, Call) else ","
    body = [text for lines in inner for text in (*lines[:-1], lines[-1] + comma)]
    return [" " * indent + prefix + opening, *body, " " * indent + closing]


def short(node: Node) -> Node:
    """The expression with `x.unsqueeze(0).unsqueeze(2)` as x[None, :, None], which is the same."""

    def shorter(part: Node) -> Node:
        match part:
            case Call(Attr(Call() | Index() as base, "unsqueeze"), (Raw(dim),), ()):
                added = _axes(base)
                if added is not None and dim.isdecimal():
                    return _with_axis(*added, int(dim))
        return part

    return rebuild(node, shorter)


def _axes(node: Node) -> tuple[Node, list[str]] | None:
    """What axes are added to, and the index that adds them."""
    match node:
        case Call(Attr(base, "unsqueeze"), (Raw(dim),), ()) if dim.isdecimal():
            return base, [":"] * int(dim) + ["None"]
        case Index(base, items) if all(item in (Raw(":"), Raw("None")) for item in items):
            return base, [flat(item) for item in items]
    return None


def _with_axis(base: Node, items: list[str], dim: int) -> Node:
    items = items + [":"] * (dim - len(items))
    items.insert(dim, "None")
    return Index(base, tuple(map(Raw, items)))


def skeleton(node: object, numbers: list[Num]) -> object:
    """A hashable form in which all numbers are alike; `numbers` receives them in order."""
    if isinstance(node, Num):
        numbers.append(node)
        return (Num, type(node.value))
    if isinstance(node, Node):
        values = (getattr(node, f.name) for f in fields(node))
        return (type(node), *(skeleton(value, numbers) for value in values))
    if isinstance(node, tuple):
        return tuple(skeleton(item, numbers) for item in node)
    return node


def with_refs(node: Node, names: Callable[[int], Node]) -> Node:
    """The expression with local values replaced by what `names` says."""
    return rebuild(node, lambda part: names(part.index) if isinstance(part, Ref) else part)
