"""What a person would call a value: read off the operator, the module, and where it goes."""

import re
from collections.abc import Sequence

import torch

from p2bw.compiler.emit.expr import Attr, Binary, Call, Index, Node, Own, Ref, refs
from p2bw.compiler.emit.op import Op
from p2bw.compiler.emit.tree import Body, Module, Statement, Value
from p2bw.compiler.program import TensorType

# Modules whose result is still what went in, a little changed.
_TRANSPARENT = re.compile(
    r"norm|drop|ln|bn|relu|gelu|silu|act|pool|flatten|sigmoid|tanh|softmax", re.I
)

OPERATOR_NAMES = {
    "scaled_dot_product_attention": "y",
    "arange": "positions",
    "softmax": "weights",
    "log_softmax": "log_probs",
    "matmul": "scores",
    "bmm": "scores",
    "addmm": "y",
    "mean": "mean",
    "var": "var",
    "rsqrt": "scale",
    "cos": "cos",
    "sin": "sin",
    "exp": "exp",
    "log": "log",
    "sum": "total",
    "argmax": "index",
    "cat": "x",
    "stack": "x",
    "zeros": "zeros",
    "ones": "ones",
    "new_zeros": "zeros",
    "new_ones": "ones",
    "embedding": "emb",
    "cumsum": "sums",
    "linear": "y",
    "pow": "power",
}


_ARITHMETIC = {"add", "sub", "mul", "div", "where"}


def base_name(op: Op, expr: Node, body: Body) -> str:
    """A name for the result of one operator."""
    base = op.name.partition(".")[0]
    out = op.types(op.node)
    if "loss" in base or base.startswith("binary_cross_entropy"):
        return "loss"
    if out.dtype == torch.bool:
        return "mask"
    if base == "unsqueeze" and not out.dtype.is_floating_point:
        return _axis(out) or inherited(expr, body, out)
    if base in OPERATOR_NAMES:
        return OPERATOR_NAMES[base]
    if base in _ARITHMETIC and out.dtype.is_floating_point:
        operands = [body.values[i] for i in refs(expr) if 0 <= i < body.arguments]
        same = [value.hint for value in operands if value.type == out]
        return same[0] if same else "x"
    name = inherited(expr, body, out)
    return "index" if name in _AXES and name != _axis(out) else name


_AXES = ("batch", "heads", "rows", "columns")


def _axis(kind: TensorType) -> str:
    """What numbers along one of four axes are called, which is how masks of attention are made."""
    long = [axis for axis, size in enumerate(kind.shape) if size != 1]
    if len(kind.shape) != 4 or len(long) != 1:
        return ""
    return _AXES[long[0]]


def inherited(expr: Node, body: Body, out: TensorType | None) -> str:
    """The name of the operand that the result is most like."""
    known = [body.values[index] for index in refs(expr) if 0 <= index < len(body.values)]
    floating = out is None or out.dtype.is_floating_point
    alike = [v for v in known if v.type is None or out is None or _kind(v.type) == _kind(out)]
    same = [v for v in alike if v.type == out]
    for choice in (same, alike):
        if any(value.hint == "x" for value in choice):
            return "x"
        if choice:
            return choice[0].hint
    return "x" if floating else "index"


def is_float(kind: TensorType | None) -> bool:
    return kind is not None and kind.dtype.is_floating_point


def _kind(kind: TensorType) -> str:
    if kind.dtype is torch.bool:
        return "bool"
    return "float" if kind.dtype.is_floating_point else "int"


def call_name(
    path: str, module: Module, args: Sequence[Node], out: TensorType | None, body: Body
) -> str:
    """A name for the result of a module call."""
    parts = [part for part in path.split(".") if part.isidentifier()]
    last = parts[-1] if parts else ""
    first = args[0] if args else None
    value = body.values[first.index] if isinstance(first, Ref) and first.index >= 0 else None
    numbered = not path.rpartition(".")[2].isidentifier()
    if value is not None and value.type is not None and out is not None:
        transparent = _TRANSPARENT.search(last) or _TRANSPARENT.search(module.class_name)
        if transparent and value.type.dtype == out.dtype:
            return value.hint
    if numbered:
        return "x"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).lower()


def unpacked_names(op: Op, expr: Node, body: Body) -> list[str]:
    """Names for the results of an operator that has several."""
    base = op.name.partition(".")[0]
    fixed = {
        "max": ["values", "indices"],
        "min": ["values", "indices"],
        "topk": ["values", "indices"],
        "sort": ["values", "indices"],
        "lstm": ["output", "hidden", "cell"],
        "gru": ["output", "hidden"],
        "rnn_tanh": ["output", "hidden"],
        "rnn_relu": ["output", "hidden"],
        "embedding_bag": ["emb", "offsets", "sizes", "indices"],
    }
    return fixed.get(base) or [inherited(expr, body, None)]


def name_queries(body: Body) -> None:
    """Call the operands of attention q, k and v, back to where they come from."""
    made: dict[int, Statement] = {}
    for statement in body.statements:
        for target in statement.targets:
            if target is not None:
                made[target] = statement
    named: dict[int, str] = {}
    for statement in body.statements:
        match statement.expr:
            case Call(func, args, _) if len(args) >= 3 and "scaled_dot_product" in str(func):
                for name, operand in zip("qkv", args[:3], strict=False):
                    if isinstance(operand, Ref):
                        _name_back(body, made, named, operand.index, name)
    for index, name in named.items():
        body.values[index] = Value(body.values[index].type, name)


def _name_back(
    body: Body, made: dict[int, Statement], named: dict[int, str], index: int, name: str
) -> None:
    """Name a value, and those that it is another view of."""
    while index not in named and (index >= body.arguments or not body.values[index].name):
        named[index] = name
        if index < body.arguments:
            return
        statement = made[index]
        if len(statement.targets) != 1:
            return
        match statement.expr:
            case Call(Attr(Ref(before), _), _, _) | Index(Ref(before), _):
                index = before
            case Binary(_, Ref(before), _) if body.values[before].type == body.values[index].type:
                index = before
            case Call(Own(), (Ref(before), *_), _) if _TRANSPARENT.search(str(statement.expr.func)):
                index = before
            case _:
                return
