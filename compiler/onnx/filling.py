"""Operators that make tensors, or larger ones of what there is."""

from collections.abc import Mapping

from p2bw.compiler.onnx.files import DTYPES
from p2bw.compiler.onnx.values import Constant, Node, Numbers, Translate, number


def _expand(node: Node) -> None:
    sizes = node.out_sizes()
    node.require(sizes is not None, "an output of unknown shape")
    assert sizes is not None
    wanted = node.integers(1)
    wanted = (1,) * (len(sizes) - len(wanted)) + tuple(wanted)
    ours = (None,) * (len(sizes) - node.rank(0)) + node.sizes(0)
    items: list[int | str] = []
    for have, want, size in zip(ours, wanted, sizes, strict=True):
        if size is not None and size.fixed is not None:
            items.append(size.fixed)
        elif have is not None and have == size:
            items.append(-1)
        else:
            node.require(want != 1, "an output of unknown shape")
            items.append(want)
    value = node.value(0)
    if isinstance(value, Constant) and value.role == "literal" and value.array.size == 1:
        _full(node, items, number(value.array), value.dtype)
    elif not items:
        node.is_value(value)
    else:
        node.gives(f"{node.tensor(0)}.expand({', '.join(map(str, items))})")


def _full(node: Node, items: list[int | str], value: str, dtype: str) -> None:
    comma = "," if len(items) == 1 else ""
    shape = f"({', '.join(map(str, items))}{comma})"
    node.gives(f"torch.full({shape}, {value}, dtype=torch.{dtype})")


def _constant_of_shape(node: Node) -> None:
    given = node.attribute("value")
    dtype = DTYPES.get(given.data_type, "") if given is not None else "float32"
    node.require(bool(dtype) and dtype != "bfloat16", "a type that is neither a number nor bool")
    text = "0.0"
    if given is not None:
        from onnx import numpy_helper

        text = number(numpy_helper.to_array(given))
    _full(node, list(node.integers(0)), text, dtype)


def _range(node: Node) -> None:
    items = []
    for index in range(3):
        value = node.value(index)
        if isinstance(value, Numbers):
            items.append(str(value.items[0]))
        else:
            items.append(number(node.constant(index)))
    node.gives(f"torch.arange({', '.join(items)}, dtype=torch.{node.dtype(0)})", hint="arange")


def _tile(node: Node) -> None:
    node.gives(f"{node.tensor(0)}.repeat({', '.join(map(str, node.integers(1)))})")


def _pad(node: Node) -> None:
    mode = node.attribute("mode", b"constant").decode()
    node.require(mode in ("constant", "reflect", "edge"), f"mode {mode[:20]!a}")
    rank = node.rank(0)
    pads = [int(pad) for pad in node.constant(1)]
    axes = list(range(rank))
    if node.has(3):
        axes = [int(axis) % rank for axis in node.constant(3)]
    ends = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    flat: list[int] = []
    for axis in reversed(range(rank)):
        flat += ends.get(axis, (0, 0))
    while flat and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    if not flat:
        node.is_value(node.value(0))
        return
    extra = ""
    if mode != "constant":
        extra = f', mode="{"replicate" if mode == "edge" else mode}"'
    elif node.has(2) and node.constant(2).reshape(-1)[0] != 0:
        extra = f", value={number(node.constant(2))}"
    node.gives(f"F.pad({node.tensor(0)}, {tuple(flat)}{extra})")


def _trilu(node: Node) -> None:
    method = "triu" if node.attribute("upper", 1) else "tril"
    diagonal = int(node.constant(1).reshape(-1)[0]) if node.has(1) else 0
    node.gives(f"{node.tensor(0)}.{method}({diagonal or ''})")


FILLING: Mapping[str, Translate] = {
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Pad": _pad,
    "Range": _range,
    "Tile": _tile,
    "Trilu": _trilu,
}
