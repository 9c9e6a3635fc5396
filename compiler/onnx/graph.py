"""The translation of a graph, node by node, to statements of Python."""

import ast
from collections import Counter
from collections.abc import Mapping
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from p2bw.compiler.onnx.files import DTYPES, Stored, counted, quote, stored
from p2bw.compiler.onnx.names import Paths, class_name
from p2bw.compiler.onnx.shapes import Shapes
from p2bw.compiler.onnx.values import (
    Constant,
    Local,
    Node,
    Role,
    Translate,
    Translation,
    Translator,
    UnsupportedError,
)
from p2bw.contract.errors import InputFileError

if TYPE_CHECKING:
    import onnx

_FOLDED = 1 << 24  # elements of the largest constant that is computed ahead
_NUMPY = set(DTYPES.values()) - {"bfloat16"}
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def translate(
    path: Path, model: "onnx.ModelProto", shapes: Shapes, table: Mapping[str, Translate]
) -> Translation:
    """Translate a checked graph by a table of operators.

    All that cannot be translated is listed in one InputFileError.
    """
    _check_operators(path, model, table)
    t = Translator(path, model, shapes, Paths(i.name for i in model.graph.initializer))
    for node in model.graph.node:
        t.uses.update(node.input)
    t.uses.update(output.name for output in model.graph.output)
    _read_constants(t)
    inputs = {}
    for value in shapes.inputs:
        mark = t.mark()
        t.values[value.name], t.sources[mark], inputs[mark] = Local(mark), mark, value.name
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    problems: Counter[str] = Counter()
    for proto in model.graph.node:
        if any(name and name not in t.values for name in proto.input):
            continue  # after what could not be translated
        node = Node(t, proto, _attributes(proto), _scope(t, proto), opset)
        try:
            if not _fold(node):
                table[proto.op_type](node)
                _follow_source(node)
        except UnsupportedError as error:
            problems[f"{proto.op_type} with {error}"] += 1
    if problems:
        raise InputFileError(
            f"{path.name} uses operators in ways that cannot be translated: {counted(problems)}"
        )
    outputs = tuple(_output(t, value.name) for value in model.graph.output)
    return Translation(
        statements=t.statements,
        inputs=inputs,
        outputs=outputs,
        tensors=t.tensors,
        literals=tuple(t.literals.values()),
        limits=t.limits,
        classes=t.classes,
        helpers=frozenset(t.helpers),
    )


def _check_operators(path: Path, model: "onnx.ModelProto", table: Mapping[str, Translate]) -> None:
    unknown = Counter(quote(n.op_type) for n in model.graph.node if n.op_type not in table)
    if unknown:
        raise InputFileError(
            f"{path.name} uses operators that p2bw does not know: {counted(unknown)}; it knows "
            f"{len(table)} operators for training, and no control flow or quantisation"
        )


def _read_constants(t: Translator) -> None:
    """What each initialiser is: a parameter, a buffer or a number."""
    kinds = {
        value.name: prop.value
        for value in t.model.graph.value_info
        for prop in value.metadata_props
        if prop.key == _KIND
    }
    statistics = {
        name
        for node in t.model.graph.node
        if node.op_type == "BatchNormalization"
        for name in node.input[3:5]
    }
    for proto in t.model.graph.initializer:
        tensor = stored(t.path, proto)
        kind = kinds.get(proto.name, "")
        role: Role = "literal"
        if kind == "PARAMETER" and tensor.is_float:
            role = "parameter"
        elif kind == "BUFFER" or proto.name in statistics:
            role = "buffer"
        elif not kind and tensor.is_float and tensor.shape:
            # A mask of infinities is no weight.
            role = "parameter" if _all_finite(tensor) else "literal"
        t.values[proto.name] = Constant(proto.name, role, tensor)


def _all_finite(tensor: Stored) -> bool:
    return tensor.dtype == "bfloat16" or bool(np.isfinite(tensor.read()).all())


def _attributes(proto: Any) -> dict[str, Any]:
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}


def _scope(t: Translator, proto: Any) -> tuple[str, ...]:
    """The module that a node was exported from, where the exporter has said so."""
    known = {prop.key: prop.value for prop in proto.metadata_props}
    scopes = _strings(known.get("pkg.torch.onnx.name_scopes", ""))[:-1]
    kinds = _strings(known.get("pkg.torch.onnx.class_hierarchy", ""))
    found: tuple[str, ...] = ()
    for name, kind in zip(scopes, kinds, strict=False):
        path = t.names.path(name, module=True) if name else ()
        if path[: len(found)] != found:
            break
        found = path
        t.classes.setdefault(found, class_name(kind, "Module"))
    return found


def _strings(text: str) -> list[str]:
    """A list of strings as Python prints it."""
    if not text.startswith("[") or len(text) > 4096:
        return []
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if all(isinstance(item, str) for item in value) else []


_GROWING = {"Expand", "Tile", "ConstantOfShape", "Range", "Pad", "OneHot", "Resize", "Trilu"}


def _fold(node: Node) -> bool:
    """Compute what follows from constants alone, unless it is large; whether that was done."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    proto, feeds = node.proto, {}
    for name in filter(None, proto.input):
        value = node.translator.values[name]
        if not isinstance(value, Constant) or value.role != "literal":
            return False
        if value.dtype == "bfloat16" or prod(value.shape) > _FOLDED:
            return False
        feeds[name] = value
    if node.op == "Dropout" or (not feeds and node.op != "Constant"):
        return False
    for index in range(len(proto.output)):
        sizes = node.out_sizes(index)
        known = sizes is not None and all(s is not None and s.fixed is not None for s in sizes)
        if not known and node.op in _GROWING and not _is_short_range(node):
            return False
        if known and prod(s.plus for s in sizes or () if s) > _FOLDED:
            return False
    graph = helper.make_graph(
        [proto],
        "folded",
        [helper.make_tensor_value_info(name, 1, None) for name in feeds],
        [helper.make_tensor_value_info(name, 1, None) for name in filter(None, proto.output)],
    )
    opset = helper.make_opsetid("", node.opset)
    model = helper.make_model(graph, opset_imports=[opset])
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(model).run(
                None, {name: constant.array for name, constant in feeds.items()}
            )
    except Exception:  # as it is no fault of the model, the translation may still work
        return False
    arrays = [np.asarray(result) for result in results]
    if any(str(array.dtype) not in _NUMPY for array in arrays):
        return False
    for name, array in zip(filter(None, proto.output), arrays, strict=True):
        node.translator.values[name] = Constant(name, "literal", computed=array)
    return True


def _is_short_range(node: Node) -> bool:
    """Whether a Range of constants, whose length nobody infers, is one that can be computed."""
    if node.op != "Range":
        return False
    start, limit, step = (float(node.constant(i).reshape(-1)[0]) for i in range(3))
    return step != 0 and isfinite(start + limit + step) and abs((limit - start) / step) <= _FOLDED


_RESHAPING = {"Reshape", "Cast", "Squeeze", "Unsqueeze", "Slice", "Transpose", "Flatten", "Expand"}


def _follow_source(node: Node) -> None:
    """Remember that a tensor holds an input's values in another shape."""
    made = node.translator.values.get(node.proto.output[0])
    given = node.value(0) if node.has(0) else None
    if node.op in _RESHAPING and isinstance(made, Local) and isinstance(given, Local):
        source = node.translator.sources.get(given.mark)
        if source is not None and made.mark in node.translator.made:
            node.translator.sources[made.mark] = source


def _output(t: Translator, name: str) -> str:
    value = t.values[name]
    if isinstance(value, Local):
        return value.mark
    if isinstance(value, Constant):
        return t.of_constant(value)
    raise InputFileError(f"{t.path.name}: output {quote(name)} is a shape and not a tensor")
