"""From an ATen call to the expression that a person would have written for it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from p2bw.compiler.emit.expr import (
    Attr,
    Binary,
    Call,
    Device,
    Index,
    Node,
    Raw,
    Seq,
    Unary,
    call,
    method,
    quoted,
)
from p2bw.compiler.emit.op import Op
from p2bw.compiler.emit.tables import AUGMENTED, FUNCTIONAL, METHODS, OPERATORS, Signature

_END = 2**63 - 1  # the end of a slice that has none
_REDUCTIONS = ("none", "mean", "sum")


def render(op: Op) -> Node:
    """The idiom for a call if there is one that means exactly the same, else the overload."""
    base = op.name.partition(".")[0]
    if outs := [a.name for a in op.schema if a.out]:
        return _into(op, base) if outs == ["out"] and _is_function(base) else _overload(op)
    special = _SPECIAL.get(op.name) or _SPECIAL.get(base)
    found = special(op) if special else None
    if found is None and op.name in OPERATORS:
        found = _operator(op, OPERATORS[op.name])
    if found is None and op.name in FUNCTIONAL:
        found = functional(op, FUNCTIONAL[op.name])
    if found is None and _is_method(base) and op.name not in _NOT_METHODS:
        found = _method(op, base)
    return found if found is not None else _overload(op)


def augmented(op: Op) -> str:
    """ "+=" for an in-place call that Python has an operator for, else ""."""
    return AUGMENTED.get(op.name, "") if op.changed() <= {"self", "other"} else ""


def _is_method(base: str) -> bool:
    return base in METHODS or (base.endswith("_") and base[:-1] in METHODS)


def _is_function(base: str) -> bool:
    """Whether torch has it as it is, and not as Python code around it."""
    return hasattr(torch._C._VariableFunctions, base)


# Overloads that the method of the same name does not take.
_NOT_METHODS = {"view.dtype", "to.prim_Device", "index_put_.hacked_twin"}


def _operator(op: Op, symbol: str) -> Node | None:
    names = [a.name for a in op.schema]
    if not op.changed() <= set(names[:2]):
        return None  # add with alpha
    left, right = op.expr(names[0]), op.expr(names[1])
    if isinstance(op[names[1]], bool):
        return None
    if symbol == "r-":
        return Binary("-", right, left)
    return Binary(symbol, left, right)


def _rest(op: Op, after: int) -> tuple[list[Node], dict[str, Node]]:
    """The arguments from position `after` on: positional up to the first default, then by name."""
    args: list[Node] = []
    kwargs: dict[str, Node] = {}
    changed = op.changed() - _implied(op)
    for argument in op.schema[after:]:
        if argument.name not in changed or argument.name in _IGNORED:
            positional = False
        else:
            positional = not kwargs and not argument.keyword_only
            positional &= not isinstance(op[argument.name], bool)
            positional &= len(args) == op.schema.index(argument) - after
            if positional:
                args.append(op.expr(argument.name))
            else:
                kwargs[argument.name] = op.expr(argument.name)
    return args, kwargs


# What a fake CPU trace says about every new tensor; the stage's device decides these.
_IGNORED = {"pin_memory", "layout", "cudnn_enable", "cudnn_enabled", "non_blocking"}


def _implied(op: Op) -> set[str]:
    """Arguments that say again what the call's first tensor says."""
    base = op.name.partition(".")[0]
    return {"device"} if base.startswith("new_") or base.endswith("_like") else set()


_VARIADIC = {"view", "reshape", "permute", "expand", "repeat", "new_zeros", "new_ones", "new_empty"}
_ONE_DIM = {"mean", "sum", "amax", "amin", "var", "std", "squeeze", "logsumexp", "prod", "flip"}


def _method(op: Op, base: str) -> Node | None:
    if not op.schema or not isinstance(op[op.schema[0].name], fx.Node):
        return None
    args, kwargs = _rest(op, 1)
    if args and isinstance(args[0], Seq):
        if base in _VARIADIC and args[0].items:
            args[:1] = args[0].items
        elif base in _ONE_DIM and len(args[0].items) == 1:
            args[0] = args[0].items[0]
    return Call(Attr(op.expr(op.schema[0].name), base), tuple(args), tuple(kwargs.items()))


def _into(op: Op, base: str) -> Node:
    """torch.div(a, b, out=c): no method takes `out`."""
    args, kwargs = _rest(op, 0)
    return Call(Raw(f"torch.{base}"), tuple(args), tuple(kwargs.items()))


def _overload(op: Op) -> Node:
    """The call by its overload's full name: always right."""
    args: list[Node] = []
    kwargs: dict[str, Node] = {}
    for argument in op.schema:
        if argument.name not in op.given or argument.name in _IGNORED:
            continue
        if argument.keyword_only or kwargs or len(args) < op.schema.index(argument):
            kwargs[argument.name] = op.expr(argument.name)
        else:
            args.append(op.expr(argument.name))
    return Call(Raw(f"torch.ops.{_path(op)}"), tuple(args), tuple(kwargs.items()))


def _path(op: Op) -> str:
    namespace, _, name = op.name.rpartition("::")
    path = f"{namespace or 'aten'}.{name}"
    assert all(part.isidentifier() for part in path.split(".")), path
    return path


def functional(op: Op, signature: Signature) -> Node | None:
    """A call of torch.nn.functional or torch whose arguments are the schema's, reordered."""
    known = {name for name, _ in signature.arguments} | _IGNORED
    changed = op.changed() - _implied(op)
    if not changed <= known:
        return None
    args: list[Node] = []
    kwargs: list[tuple[str, Node]] = [(k, Raw(v)) for k, v in signature.constants]
    by_name = False
    for name, keyword in signature.arguments:
        if (name not in changed or op[name] is None) and keyword:
            by_name = True
        elif keyword and (by_name or keyword.startswith("=")):
            kwargs.append((keyword.removeprefix("="), _argument(op, name)))
            by_name = True
        elif by_name and not keyword:
            return None
        else:
            args.append(_argument(op, name))
    return Call(Raw(signature.function), tuple(args), tuple(kwargs))


def _argument(op: Op, name: str) -> Node:
    value = op[name]
    if name == "reduction":
        return Raw(quoted(_REDUCTIONS[value]))
    if isinstance(value, (list, tuple)) and name in _SIZES and len(set(value)) == 1:
        return op.literal(value[0], name)
    return op.expr(name)


# Lists with one entry per spatial dimension, for which one number means the same.
_SIZES = {"stride", "padding", "dilation", "output_padding", "kernel_size", "output_size"}


def _slice(op: Op) -> Node | None:
    dim, start, end, step = op["dim"], op["start"], op["end"], op["step"]
    text = f"{'' if start in (0, None) else start}:{'' if end in (_END, None) else end}"
    if step != 1:
        text += f":{step}"
    return _at(op, dim, Raw(text))


def _select(op: Op) -> Node | None:
    return _at(op, op["dim"], op.literal(op["index"], "index"))


def _at(op: Op, dim: int, item: Node) -> Node | None:
    rank = op.rank("self")
    dim = dim % rank
    if dim == rank - 1 and rank > 2:
        return Index(op.expr("self"), (Raw("..."), item))
    return Index(op.expr("self"), (*(Raw(":") for _ in range(dim)), item)) if dim < 3 else None


def _index(op: Op) -> Node | None:
    indices = op["indices"]
    for index in indices:
        # A tensor without dimensions would be taken for a number.
        if isinstance(index, fx.Node) and not op.types(index).shape:
            return None
    items = tuple(Raw(":") if i is None else op.literal(i) for i in indices)
    return Index(op.expr("self"), items)


def _tensors(function: str) -> Callable[[Op], Node | None]:
    def rendered(op: Op) -> Node | None:
        if not isinstance(op["tensors"], (list, tuple)):
            return None
        args, kwargs = [op.expr("tensors")], {}
        if op["dim"] != 0:
            kwargs["dim"] = op.expr("dim")
        return Call(Raw(function), tuple(args), tuple(kwargs.items()))

    return rendered


def _embedding(op: Op) -> Node | None:
    kwargs = {}
    if op["padding_idx"] != -1:
        kwargs["padding_idx"] = op.expr("padding_idx")
    for name in ("scale_grad_by_freq", "sparse"):
        if op[name]:
            kwargs[name] = Raw("True")
    return call("F.embedding", op.expr("indices"), op.expr("weight"), **kwargs)


def _dropout(op: Op) -> Node | None:
    kwargs = {} if op["train"] else {"training": Raw("False")}
    if op.name.startswith("dropout_"):
        kwargs["inplace"] = Raw("True")
    return call(
        "F.dropout", op.expr("input" if op.has("input") else "self"), op.expr("p"), **kwargs
    )


def _factory(function: str) -> Callable[[Op], Node | None]:
    def rendered(op: Op) -> Node | None:
        args, kwargs = _rest(op, 0)
        if function in ("torch.zeros", "torch.ones", "torch.rand", "torch.randn", "torch.empty"):
            size = args[0]
            assert isinstance(size, Seq)
            args[:1] = size.items or (Seq("()", ()),)
        kwargs["device"] = Device()
        return Call(Raw(function), tuple(args), tuple(kwargs.items()))

    return rendered


def _to(op: Op) -> Node | None:
    kwargs = {
        name: op.expr(name) for name in ("memory_format",) if op.has(name) and op[name] is not None
    }
    if op.has("copy") and op["copy"]:
        kwargs["copy"] = Raw("True")
    args = [op.expr("dtype")] if op.has("dtype") and op["dtype"] is not None else []
    if not args and not kwargs:
        return op.expr("self")
    return method(op.expr("self"), "to", *args, **kwargs)


def _einsum(op: Op) -> Node | None:
    operands = op["tensors"]
    if len(operands) > 2:
        return None  # torch.einsum would choose its own order
    return call("torch.einsum", op.expr("equation"), *map(op.literal, operands))


def _broadcast(op: Op) -> Node | None:
    return call("torch.broadcast_tensors", *map(op.literal, op["tensors"]))


def _interpolate(mode: str) -> Callable[[Op], Node | None]:
    def rendered(op: Op) -> Node | None:
        kwargs: dict[str, Node] = {}
        if op["output_size"] is not None:
            kwargs["size"] = _uniform(op, op["output_size"], "size")
        if op["scale_factors"] is not None:
            kwargs["scale_factor"] = _uniform(op, op["scale_factors"], "scale_factor")
        kwargs["mode"] = Raw(quoted(mode))
        if op.has("align_corners") and op["align_corners"]:
            kwargs["align_corners"] = Raw("True")
        return call("F.interpolate", op.expr("input"), **kwargs)

    return rendered


def _uniform(op: Op, values: Sequence[Any], name: str) -> Node:
    return op.literal(values[0] if len(set(values)) == 1 else tuple(values), name)


def _split(op: Op) -> Node | None:
    sizes = op["split_size" if op.has("split_size") else "split_sizes"]
    kwargs = {"dim": op.expr("dim")} if op["dim"] != 0 else {}
    return method(op.expr("self"), "split", op.literal(sizes, "split_size"), **kwargs)


def _flatten(op: Op) -> Node | None:
    dims = [op.expr("start_dim"), op.expr("end_dim")]
    if op["end_dim"] == -1:
        dims = dims[:1] if op["start_dim"] else []
    return method(op.expr("self"), "flatten", *dims)


def _clamp(op: Op) -> Node | None:
    if op["min"] is not None and op["max"] is not None:
        return None
    side = "min" if op["max"] is None else "max"
    return method(op.expr("self"), "clamp", **{side: op.expr(side)})


def _roll(op: Op) -> Node | None:
    if len(op["shifts"]) != 1 or len(op["dims"]) != 1:
        return None
    shift, dim = op.literal(op["shifts"][0], "shift"), op.literal(op["dims"][0], "dim")
    return method(op.expr("self"), "roll", shift, dim)


def _chunk(op: Op) -> Node | None:
    kwargs = {"dim": op.expr("dim")} if op["dim"] != 0 else {}
    return method(op.expr("self"), "chunk", op.expr("chunks"), **kwargs)


_SPECIAL: dict[str, Callable[[Op], Node | None]] = {
    "slice.Tensor": _slice,
    "select.int": _select,
    "index.Tensor": _index,
    "cat.default": _tensors("torch.cat"),
    "concat.default": _tensors("torch.cat"),
    "stack.default": _tensors("torch.stack"),
    "dropout.default": _dropout,
    "dropout_.default": _dropout,
    "embedding.default": _embedding,
    "einsum.default": _einsum,
    "broadcast_tensors.default": _broadcast,
    "split.Tensor": _split,
    "split.sizes": _split,
    "split_with_sizes.default": _split,
    "chunk.default": _chunk,
    "clamp.default": _clamp,
    "roll.default": _roll,
    "flatten.using_ints": _flatten,
    "to.dtype": _to,
    "to.dtype_layout": _to,
    "to.device": _to,
    "alias.default": lambda op: Index(op.expr("self"), (Raw(":"),)),
    "neg.default": lambda op: Unary("-", op.expr("self")),
    "bitwise_not.default": lambda op: Unary("~", op.expr("self")),
    "mT.default": lambda op: Attr(op.expr("self"), "mT"),
    "mH.default": lambda op: Attr(op.expr("self"), "mH"),
    "matrix_H.default": lambda op: Attr(op.expr("self"), "H"),
    "numpy_T.default": lambda op: Attr(op.expr("self"), "T"),
    "upsample_nearest1d.vec": _interpolate("nearest"),
    "upsample_nearest2d.vec": _interpolate("nearest"),
    "upsample_nearest3d.vec": _interpolate("nearest"),
    "upsample_bilinear2d.vec": _interpolate("bilinear"),
    "upsample_trilinear3d.vec": _interpolate("trilinear"),
    "upsample_bicubic2d.vec": _interpolate("bicubic"),
    **{
        name: _factory(f"torch.{name.partition('.')[0]}")
        for name in (
            *("arange.default", "arange.start", "arange.start_step", "zeros.default"),
            *("ones.default", "full.default", "empty.memory_format", "eye.default", "eye.m"),
            *("linspace.default", "rand.default", "randn.default", "randint.default"),
            *("randint.low", "randperm.default", "tril_indices.default", "triu_indices.default"),
            *("scalar_tensor.default", "hann_window.default"),
        )
    },
}
