"""Operators that move, select and make values without computing with them."""

from collections.abc import Mapping
from math import prod

from p2bw.compiler.onnx.files import DTYPES
from p2bw.compiler.onnx.pointwise import axes_of
from p2bw.compiler.onnx.values import (
    Constant,
    Local,
    Node,
    Numbers,
    Parts,
    Translate,
    UnsupportedError,
)

_END = 1 << 31  # slices up to here or further end at the end


def _identity(node: Node) -> None:
    node.is_value(node.value(0))


def _cast(node: Node) -> None:
    if node.op == "CastLike":
        to = node.dtype(1)
    else:
        node.require(node.attribute("to") in DTYPES, "a type that is neither a number nor bool")
        to = DTYPES[node.attribute("to")]
    value = node.value(0)
    if node.dtype(0) == to or (isinstance(value, Numbers) and to == "int32"):
        node.is_value(value)
    elif (
        isinstance(value, Constant)
        and value.role == "literal"
        and "bfloat16"
        not in (
            to,
            value.dtype,
        )
    ):
        array = value.array.astype(to)
        node.is_value(Constant(node.proto.output[0], "literal", computed=array))
    else:
        node.gives(f"{node.tensor(0)}.to(torch.{to})", hint="cast")


def _shape(node: Node) -> None:
    sizes = node.sizes(0)
    span = slice(node.attribute("start", 0), node.attribute("end"))
    places = range(len(sizes))[span]
    node.is_value(Numbers(tuple(_size(node, 0, place) for place in places)))


def _size(node: Node, index: int, place: int) -> int | str:
    """A dimension of an input: a number, or code for it."""
    size = node.sizes(index)[place]
    if size is not None and size.fixed is not None:
        return size.fixed
    return f"{node.tensor(index)}.shape[{place}]"


def _count(node: Node) -> None:
    sizes = [_size(node, 0, place) for place in range(node.rank(0))]
    known = prod(size for size in sizes if isinstance(size, int))
    open_ = [size for size in sizes if isinstance(size, str)]
    total = " * ".join([str(known), *open_])
    node.is_value(Numbers((f"({total})" if open_ else known,), scalar=True))


def _new_shape(node: Node, wanted: tuple[int | str, ...]) -> str:
    """The shape of an output as arguments: fixed sizes as numbers, one that is not as -1."""
    sizes = node.out_sizes()
    if sizes is None:
        return ", ".join(map(str, wanted))
    items: list[int | str | None] = [None if size is None else size.fixed for size in sizes]
    if items.count(None) == 1 and 0 not in items:
        items[items.index(None)] = -1
    elif None in items:
        node.require(len(wanted) == len(items), "a shape of unknown length")
        items = [w if item is None else item for w, item in zip(wanted, items, strict=True)]
    return ", ".join(map(str, items))


def _reshape(node: Node) -> None:
    value = node.value(0)
    if isinstance(value, Numbers):
        rank = node.fixed(1)[0]
        node.require(rank < 2, "a matrix of sizes")
        node.is_value(Numbers(value.items, scalar=rank == 0))
        return
    wanted = list(node.integers(1))
    if not node.attribute("allowzero", 0):
        for place, item in enumerate(wanted):
            if item == 0:
                wanted[place] = _size(node, 0, place)
    shape = _new_shape(node, tuple(wanted)) or "()"
    node.gives(f"{node.tensor(0)}.reshape({shape})")


def _flatten(node: Node) -> None:
    axis, rank = node.attribute("axis", 1), node.rank(0)
    axis = axis + rank if axis < 0 else axis
    if axis == 1 and rank > 1:
        node.gives(f"{node.tensor(0)}.flatten(1)")
        return
    sizes = node.out_sizes()
    node.require(sizes is not None, "an output of unknown shape")
    node.gives(f"{node.tensor(0)}.reshape({_new_shape(node, ())})")


def _transpose(node: Node) -> None:
    rank = node.rank(0)
    order = list(node.attribute("perm") or reversed(range(rank)))
    moved = [place for place in range(rank) if order[place] != place]
    if not moved:
        node.is_value(node.value(0))
        return
    call = f"transpose({moved[0]}, {moved[1]})" if len(moved) == 2 else f"permute{tuple(order)}"
    path = node.parameter(0)
    statement = node.gives(f"{node.tensor(0)}.{call}")
    if path is not None and order == [1, 0]:
        node.translator.transposed[statement.results[0]] = path


def _squeeze(node: Node) -> None:
    value, axes = node.value(0), axes_of(node)
    if isinstance(value, Numbers):
        node.require(len(value.items) == 1, "several sizes")
        node.is_value(Numbers(value.items, scalar=True))
        return
    if axes is None:
        axes = tuple(i for i, size in enumerate(node.sizes(0)) if size and size.fixed == 1)
    code = node.tensor(0)
    for axis in sorted(axes, reverse=True):
        code = f"{code}.squeeze({axis})"
    node.gives(code) if axes else node.is_value(value)


def _unsqueeze(node: Node) -> None:
    value = node.value(0)
    given = node.attribute("axes")
    if given is None:
        given = [int(axis) for axis in node.constant(1).reshape(-1)]
    if isinstance(value, Numbers):
        node.require(value.scalar and len(given) == 1, "a vector of sizes")
        node.is_value(Numbers(value.items))
        return
    rank = node.rank(0) + len(given)
    code = node.tensor(0)
    for axis in sorted(axis % rank for axis in given):
        code = f"{code}.unsqueeze({axis})"
    node.gives(code)


def _concat(node: Node) -> None:
    values = [node.value(i) for i in range(node.count)]
    if not any(isinstance(value, Local) for value in values) and any(
        isinstance(value, Numbers) for value in values
    ):
        items = tuple(item for i in range(node.count) for item in node.integers(i))
        node.is_value(Numbers(items))
        return
    tensors = ", ".join(node.tensor(i) for i in range(node.count))
    comma = "," if node.count == 1 else ""
    node.gives(f"torch.cat(({tensors}{comma}), dim={node.axis(0)})", hint="cat")


def _split(node: Node) -> None:
    axis, names = node.axis(0), list(node.proto.output)
    if len(names) == 1:
        node.is_value(node.value(0))
        return
    if node.has(1):
        parts = [int(part) for part in node.constant(1)]
    elif node.attribute("split"):
        parts = list(node.attribute("split"))
    else:
        size = _along(node, axis)
        parts = _pieces(size, -(-size // len(names)))
        parts += [0] * (len(names) - len(parts))
    node.require(len(parts) == len(names), "other parts than outputs")
    node.gives_all(names, f"{node.tensor(0)}.split({parts}, dim={axis})", hint="part")


def _along(node: Node, axis: int) -> int:
    """The size of the first input along an axis."""
    size = node.sizes(0)[axis]
    if size is None or size.fixed is None:
        raise UnsupportedError("an axis whose size depends on the batch")
    return size.fixed


def _pieces(size: int, each: int) -> list[int]:
    return [min(each, size - start) for start in range(0, size, each)]


def _split_to_sequence(node: Node) -> None:
    node.require(node.has(1) and bool(node.attribute("keepdims", 1)), "parts without their axis")
    axis, given = node.axis(0), node.constant(1)
    if given.ndim == 0:
        parts = _pieces(_along(node, axis), max(int(given), 1))
    else:
        parts = [int(part) for part in given]
    if len(parts) == 1:
        node.gives_parts([node.tensor(0)])
        return
    text = f"{node.tensor(0)}.split({parts}, dim={axis})"
    node.gives_parts(node.gives_all([""] * len(parts), text, hint="part").results)


def _sequence_at(node: Node) -> None:
    value = node.value(0)
    place = int(node.constant(1).reshape(-1)[0])
    known = isinstance(value, Parts) and -len(value.items) <= place < len(value.items)
    node.require(known, "a sequence of unknown parts")
    assert isinstance(value, Parts)
    node.is_value(value.items[place])


def _slice(node: Node) -> None:
    starts, ends = node.integers(1), node.integers(2)
    count = len(starts)
    axes = _known(node, node.integers(3)) if node.has(3) else list(range(count))
    steps = _known(node, node.integers(4)) if node.has(4) else [1] * count
    value = node.value(0)
    if isinstance(value, Numbers):
        (low,), (high,) = _known(node, starts), _known(node, ends)
        node.is_value(Numbers(value.items[low : high : steps[0]]))
        return
    rank = node.rank(0)
    texts = [":"] * rank
    flips = ""
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis % rank
        if step == -1 and start == -1 and isinstance(end, int) and end <= -_END:
            flips += f".flip({place})"
            continue
        node.require(step > 0, "a negative step")
        low_text = "" if start == 0 else str(start)
        high_text = "" if isinstance(end, int) and end >= _END else str(end)
        texts[place] = f"{low_text}:{high_text}" + (f":{step}" if step != 1 else "")
    while texts and texts[-1] == ":":
        texts.pop()
    if texts or flips:
        part = f"[{', '.join(texts)}]" if texts else ""
        node.gives(f"{node.tensor(0)}{part}{flips}", hint="part")
    else:
        node.is_value(value)


def _known(node: Node, items: tuple[int | str, ...]) -> list[int]:
    """Numbers that may not depend on the traced sizes."""
    known = [item for item in items if isinstance(item, int)]
    node.require(len(known) == len(items), "bounds that depend on the batch")
    return known


def _gather(node: Node) -> None:
    value, indices = node.value(0), node.value(1)
    axis = node.axis(0)
    if isinstance(value, Numbers):
        places = node.constant(1)
        picked = tuple(value.items[int(place)] for place in places.reshape(-1))
        node.is_value(Numbers(picked, scalar=places.ndim == 0))
        return
    if isinstance(indices, Constant) and indices.role == "literal" and indices.shape == ():
        place = int(indices.array)
        node.gives(f"{node.tensor(0)}[{':, ' * axis}{place}]", hint="select")
        return
    _limit(node)
    path = node.parameter(0)
    tensor, at = node.tensor(0), node.tensor(1)
    if path is not None and axis == 0 and node.rank(0) == 2:
        rows, columns = node.fixed(0)
        leaf = node.leaf(f"nn.Embedding({rows}, {columns})", at, 0)
        code = f"F.embedding({at}, {tensor})"
        node.gives(code, hint="embedding", leaf=leaf if path[-1] == "weight" else None)
    else:
        node.gives(f"{tensor}[{':, ' * axis}{at}]")


def _limit(node: Node) -> None:
    """An input that is used as an index: example inputs must stay below the number of rows."""
    indices = node.value(1)
    if isinstance(indices, Local) and indices.mark in node.translator.sources:
        size = node.sizes(0)[node.axis(0)]
        if size is not None and size.fixed is not None:
            limits, source = node.translator.limits, node.translator.sources[indices.mark]
            limits[source] = min(size.fixed, limits.get(source, size.fixed))


def _gather_elements(node: Node) -> None:
    node.gives(f"{node.tensor(0)}.gather({node.axis(0)}, {node.tensor(1)})", hint="gather")


def _gather_nd(node: Node) -> None:
    node.require(not node.attribute("batch_dims", 0), "batch_dims")
    _limit(node)
    node.gives(f"{node.tensor(0)}[tuple({node.tensor(1)}.unbind(-1))]", hint="gather")


def _scatter_elements(node: Node) -> None:
    reduction = node.attribute("reduction", b"none")
    node.require(reduction in (b"none", b"add"), "a reduction other than add")
    method = "scatter_add" if reduction == b"add" else "scatter"
    node.gives(
        f"{node.tensor(0)}.{method}({node.axis(0)}, {node.tensor(1)}, {node.tensor(2)})",
        hint="scatter",
    )


def _scatter_nd(node: Node) -> None:
    reduction = node.attribute("reduction", b"none")
    node.require(reduction in (b"none", b"add"), "a reduction other than add")
    add = ", accumulate=True" if reduction == b"add" else ""
    indices = f"tuple({node.tensor(1)}.unbind(-1))"
    node.gives(f"{node.tensor(0)}.index_put({indices}, {node.tensor(2)}{add})", hint="scatter")


def _top_k(node: Node) -> None:
    k = int(node.constant(1).reshape(-1)[0])
    largest = "" if node.attribute("largest", 1) else ", largest=False"
    names = list(node.proto.output)
    node.gives_all(names, f"{node.tensor(0)}.topk({k}, dim={node.axis(-1)}{largest})")


def _depth_to_space(node: Node) -> None:
    size = node.attribute("blocksize")
    if node.attribute("mode", b"DCR") == b"CRD":
        node.gives(f"F.pixel_shuffle({node.tensor(0)}, {size})")
        return
    known = [s.fixed for s in node.sizes(0)[1:] if s is not None and s.fixed is not None]
    node.require(len(known) == 3, "an input of unknown shape")
    channels, height, width = known[0] // size**2, known[1], known[2]
    inner = f"reshape(-1, {size}, {size}, {channels}, {height}, {width})"
    outer = f"reshape(-1, {channels}, {height * size}, {width * size})"
    node.gives(f"{node.tensor(0)}.{inner}.permute(0, 3, 4, 1, 5, 2).{outer}")


def _dropout(node: Node) -> None:
    """Only where the file says that it is a training graph."""
    node.require(not node.wants(1), "its mask")
    ratio = float(node.constant(1)) if node.has(1) else 0.5
    if node.has(2) and bool(node.constant(2)) and ratio:
        node.gives(f"F.dropout({node.tensor(0)}, {ratio:.9g}, self.training)")
    else:
        node.is_value(node.value(0))


def _constant(node: Node) -> None:
    raise UnsupportedError("a value that is no dense tensor of numbers")


LAYOUT: Mapping[str, Translate] = {
    "Cast": _cast,
    "CastLike": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _identity,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "SequenceAt": _sequence_at,
    "Shape": _shape,
    "Size": _count,
    "Slice": _slice,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
