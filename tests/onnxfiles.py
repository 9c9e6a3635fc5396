"""Small ONNX files for tests, and what ONNX Runtime says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from p2bw.compiler.onnx.importer import import_onnx
from p2bw.modelfile.load import ModelFile, load_model_file

Array = np.ndarray[Any, Any]
TYPES = {np.dtype(kind): number for kind, number in (
    ("float32", TensorProto.FLOAT), ("float64", TensorProto.DOUBLE), ("int64", TensorProto.INT64),
    ("int32", TensorProto.INT32), ("bool", TensorProto.BOOL), ("float16", TensorProto.FLOAT16),
)}  # fmt: skip


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str],
    weights: Mapping[str, Array] | None = None,
    opset: int = 20,
    types: Mapping[str, int] | None = None,
    declared: Mapping[str, Sequence[int | str]] | None = None,
) -> Path:
    """Write a model; inputs are shapes by name, float32 unless `types` says otherwise.

    `declared` are shapes of outputs that cannot be inferred.
    """
    types = types or {}
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), list(shape))
            for name, shape in inputs.items()
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, (declared or {}).get(name))
            for name in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8 if opset < 19 else 9 if opset < 21 else 10
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    del model.graph.output[:]  # the checker wants them to have a shape
    model.graph.output.extend(inferred.graph.output)
    path.write_bytes(model.SerializeToString())
    return path


def mlp(path: Path, opset: int = 20) -> Path:
    """x -> linear -> relu -> linear, with an open batch."""
    rng = np.random.default_rng(0)
    weights = {
        "first.weight": rng.normal(size=(8, 4)).astype(np.float32),
        "first.bias": rng.normal(size=8).astype(np.float32),
        "second.weight": rng.normal(size=(2, 8)).astype(np.float32),
        "second.bias": rng.normal(size=2).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "first.weight", "first.bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "second.weight", "second.bias"], ["y"], transB=1),
    ]
    return save(path, nodes, {"x": ["batch", 4]}, ["y"], weights, opset)


def imported(path: Path, folder: Path) -> ModelFile:
    return load_model_file(import_onnx(path, folder).file)


def by_runtime(path: Path, feeds: Sequence[Array]) -> list[Array]:
    """The outputs that ONNX Runtime computes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return list(session.run(None, dict(zip(names, feeds, strict=True))))


def by_torch(file: ModelFile, feeds: Sequence[Array]) -> list[torch.Tensor]:
    """The outputs of an imported model in evaluation mode."""
    model = file.model().eval()
    outputs = model(*(torch.from_numpy(feed) for feed in feeds))
    return list(outputs if isinstance(outputs, tuple) else (outputs,))
