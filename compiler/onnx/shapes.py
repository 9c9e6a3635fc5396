"""Sizes of all values, with the batch dimension told apart from the fixed ones.

ONNX's own shape inference runs for two batch sizes: what is the same in both is fixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2bw.compiler.onnx.files import DTYPES, quote
from p2bw.contract.errors import InputFileError, UsageError

if TYPE_CHECKING:
    import onnx

_PROBES = (5, 7)  # batch sizes
_SMALL = 4096  # bytes; shape inference looks at the values of small tensors alone
_EXTERNAL = 1


@dataclass(frozen=True, slots=True)
class Size:
    """One dimension: `times` the batch size, plus `plus`. Fixed if times is 0."""

    times: int
    plus: int

    @property
    def fixed(self) -> int | None:
        return None if self.times else self.plus

    def __str__(self) -> str:
        if not self.times:
            return str(self.plus)
        text = "batch_size" if self.times == 1 else f"{self.times} * batch_size"
        return f"{text} + {self.plus}" if self.plus else text


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that the model is fed with each microbatch."""

    name: str
    sizes: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is known of the values. An unknown shape is missing, an unknown dimension None."""

    inputs: tuple[Input, ...]
    batch: int | None  # where the file fixes it
    sizes: Mapping[str, tuple[Size | None, ...]]
    dtypes: Mapping[str, str]


def infer(path: Path, model: "onnx.ModelProto", given: Mapping[str, Any]) -> Shapes:
    """The shapes of a checked model; `given` are sizes for its symbolic dimensions, by name."""
    constants = {tensor.name for tensor in model.graph.initializer}
    feeds = [value for value in model.graph.input if value.name not in constants]
    _check_given(path, feeds, given)
    inputs = tuple(_input(path, value, _batch_names(feeds), given) for value in feeds)
    if not inputs:
        raise InputFileError(f"{path.name} has no inputs: there is nothing to train it on")
    symbolic = any(size.times for value in inputs for size in value.sizes)
    first = next((value.sizes[0].plus for value in inputs if value.sizes), 1)
    known = {name: Size(0, _given(name, given)) for name in given}
    known |= {name: Size(1, 0) for name in _batch_names(feeds) - {""} if name not in given}
    found = [_infer(path, model, inputs, known, batch) for batch in (_PROBES if symbolic else (1,))]
    names = set.intersection(*(set(shapes) for shapes, _ in found))
    sizes = {name: _merge([shapes[name] for shapes, _ in found]) for name in names}
    return Shapes(
        inputs=inputs,
        batch=None if symbolic else first,
        sizes={name: size for name, size in sizes.items() if size is not None},
        dtypes=found[0][1],
    )


def _batch_names(feeds: list[Any]) -> set[str]:
    """The symbol of the first dimension of the first input that has one there."""
    for value in feeds:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            return {dims[0].dim_param}
    return set()


def _input(path: Path, value: Any, batch: set[str], given: Mapping[str, Any]) -> Input:
    what = f"{path.name}: input {quote(value.name)}"
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise InputFileError(f"{what} is no tensor of a known number of dimensions")
    if kind.elem_type not in DTYPES:
        raise InputFileError(f"{what} has a type that is neither a number nor bool")
    sizes = []
    for place, dim in enumerate(kind.shape.dim):
        if dim.HasField("dim_value"):
            if dim.dim_value < 1:
                raise InputFileError(f"{what} has the size {dim.dim_value} in dimension {place}")
            sizes.append(Size(0, dim.dim_value))
        elif dim.dim_param and dim.dim_param in given:
            sizes.append(Size(0, _given(dim.dim_param, given)))
        elif dim.dim_param in batch if dim.dim_param else place == 0:
            sizes.append(Size(1, 0))
        else:
            name = dim.dim_param if dim.dim_param.isidentifier() else ""
            cure = f"give it with --set {name}=128, or export" if name else "export"
            raise InputFileError(
                f"{what} leaves dimension {place} open ({quote(dim.dim_param)}), and only the "
                f"batch may be; {cure} the model with that size fixed"
            )
    return Input(value.name, tuple(sizes), DTYPES[kind.elem_type])


def _given(name: str, given: Mapping[str, Any]) -> int:
    size = given[name]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UsageError(f"--set {name}={size}: the size of a dimension is a number from 1 on")
    return size


def _check_given(path: Path, feeds: list[Any], given: Mapping[str, Any]) -> None:
    known = {dim.dim_param for value in feeds for dim in value.type.tensor_type.shape.dim} - {""}
    for name in given:
        if name not in known:
            has = ", ".join(sorted(quote(k) for k in known)) or "none"
            raise UsageError(
                f"--set {name}: {path.name} has no open dimension {name}; it has {has}"
            )


def _infer(
    path: Path,
    model: "onnx.ModelProto",
    inputs: tuple[Input, ...],
    known: Mapping[str, Size],
    batch: int,
) -> tuple[dict[str, tuple[int | None, ...]], dict[str, str]]:
    """Shapes and types at one batch size."""
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(
            _without_weights(model, inputs, known, batch), data_prop=True
        )
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise InputFileError(f"{path.name}: its shapes contradict each other: {line}") from None
    shapes: dict[str, tuple[int | None, ...]] = {}
    dtypes: dict[str, str] = {}
    graph = inferred.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type in DTYPES:
            dtypes[value.name] = DTYPES[kind.elem_type]
        if kind.HasField("shape"):
            shapes[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim
            )
    for tensor in model.graph.initializer:
        shapes[tensor.name], dtypes[tensor.name] = tuple(tensor.dims), DTYPES[tensor.data_type]
    return shapes, dtypes


def _declare(values: Any, declared: Any, known: Mapping[str, Size], batch: int) -> None:
    """What the file says of a value; open dimensions with the sizes that they have here."""
    kind = declared.type.tensor_type
    fresh = values.add(name=declared.name).type.tensor_type
    fresh.elem_type = kind.elem_type
    if not kind.HasField("shape"):
        return
    fresh.shape.SetInParent()
    for dim in kind.shape.dim:
        own = fresh.shape.dim.add()
        if dim.HasField("dim_value"):
            own.dim_value = dim.dim_value
        elif dim.dim_param in known:
            own.dim_value = known[dim.dim_param].times * batch + known[dim.dim_param].plus


def _without_weights(
    model: "onnx.ModelProto", inputs: tuple[Input, ...], known: Mapping[str, Size], batch: int
) -> "onnx.ModelProto":
    """The model with its inputs' sizes filled in, and no bytes of its large tensors."""
    import onnx

    slim = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    slim.graph.name = "graph"
    slim.graph.node.extend(model.graph.node)
    for value in inputs:
        fresh = slim.graph.input.add(name=value.name)
        kind = next(v for v in model.graph.input if v.name == value.name).type.tensor_type
        fresh.type.tensor_type.elem_type = kind.elem_type
        for size in value.sizes:
            fresh.type.tensor_type.shape.dim.add(dim_value=size.times * batch + size.plus)
        if not value.sizes:
            fresh.type.tensor_type.shape.SetInParent()
    for output in model.graph.output:
        _declare(slim.graph.output, output, known, batch)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.value_info:
        if value.name not in constants:
            _declare(slim.graph.value_info, value, known, batch)
    for tensor in model.graph.initializer:
        if tensor.data_location != _EXTERNAL and tensor.ByteSize() <= _SMALL:
            slim.graph.initializer.append(tensor)
        else:
            slim.graph.initializer.add(
                name=tensor.name,
                dims=tensor.dims,
                data_type=tensor.data_type,
                data_location=_EXTERNAL,
            )
    return slim


def _merge(found: list[tuple[int | None, ...]]) -> tuple[Size | None, ...] | None:
    """From the shapes at one or two batch sizes, as a line through them."""
    if len({len(shape) for shape in found}) > 1:
        return None
    return tuple(_line(dims) for dims in zip(*found, strict=True))


def _line(dims: tuple[int | None, ...]) -> Size | None:
    if None in dims:
        return None
    first, last = dims[0], dims[-1]
    assert first is not None
    assert last is not None
    if first == last:
        return Size(0, first)
    times, rest = divmod(last - first, _PROBES[1] - _PROBES[0])
    return None if rest else Size(times, first - times * _PROBES[0])
