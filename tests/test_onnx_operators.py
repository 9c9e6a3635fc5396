"""Every operator of the ONNX importer against ONNX Runtime, and the attributes that change it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnxfiles import TYPES, Array, by_runtime, by_torch, imported, save

from p2bw.compiler.onnx.files import OPSETS
from p2bw.compiler.onnx.importer import OPERATORS
from p2bw.contract.errors import InputFileError


@dataclass(frozen=True)
class Case:
    """One node: inputs that are fed, then constants (by position), attributes, outputs."""

    op: str
    feeds: tuple[Array, ...]
    constants: dict[int, Array] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 20
    attributes: dict[str, Any] = field(default_factory=dict)


def real(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(*shape: int) -> Array:
    """Between 0 and 1, for functions that are defined there alone."""
    return np.random.default_rng(1).uniform(0.05, 0.95, size=shape).astype(np.float32)


def whole(*shape: int, high: int = 3, low: int = 0) -> Array:
    return np.random.default_rng(2).integers(low, high, size=shape)


def flags(*shape: int) -> Array:
    return whole(*shape, high=2).astype(bool)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def case(op: str, *feeds: Array, at: dict[int, Array] | None = None, outputs: int = 1,
         opset: int = 20, **attributes: Any) -> Case:  # fmt: skip
    return Case(op, feeds, at or {}, outputs, opset, attributes)


X = real(2, 3, 4)
IMAGE = real(2, 3, 6, 6)
CASES = [
    *(case(op, X) for op in (
        "Abs", "Atan", "Asinh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "HardSwish", "Mish",
        "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
        "Softsign", "Tan", "Tanh", "Celu", "Elu", "HardSigmoid", "LeakyRelu", "Selu",
        "ThresholdedRelu", "Gelu", "Identity", "IsNaN", "IsInf", "Softmax", "LogSoftmax",
        "GlobalAveragePool", "GlobalMaxPool", "Flatten", "Transpose", "Dropout", "Mean", "Sum",
        "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
        "ReduceSumSquare", "ReduceLogSumExp", "ArgMax", "ArgMin", "Max", "Min",
    )),
    *(case(op, unit(2, 3)) for op in ("Acos", "Asin", "Atanh", "Log", "Sqrt", "ReduceLogSum")),
    case("Acosh", unit(2, 3) + 1),
    case("Swish", X, opset=24, alpha=1.5),
    case("Gelu", X, approximate="tanh"),
    case("Elu", X, alpha=0.3), case("LeakyRelu", X, alpha=0.2), case("Celu", X, alpha=2.0),
    case("HardSigmoid", X, alpha=0.1, beta=0.6),
    case("Not", flags(2, 3)),
    *(case(op, X, real(2, 3, 4, seed=3)) for op in (
        "Add", "Sub", "Mul", "Div", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max",
        "Min", "Mean", "Sum", "Equal",
    )),
    *(case(op, X, at={1: real(4, seed=3)}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Sum")),
    *(case(op, X, at={1: np.float32(0.5)}) for op in ("Add", "Pow", "Div", "Max", "Min", "Less")),
    case("Sub", X, at={0: np.float32(1.0)}),
    case("Pow", unit(2, 3), unit(2, 3)),
    case("Div", whole(2, 3, low=-9, high=9), at={1: ints(2)}),
    case("Mod", whole(2, 3, low=-9, high=9), at={1: ints(4)}),
    case("Mod", X, real(2, 3, 4, seed=3), fmod=1),
    *(case(op, flags(2, 3), flags(2, 3)[::-1].copy()) for op in ("And", "Or", "Xor")),
    case("Where", flags(2, 3), real(2, 3), real(2, 3, seed=1)),
    case("Where", flags(2, 3), at={1: np.float32(0), 2: np.float32(-np.inf)}),
    case("PRelu", X, at={1: real(3, 1)}),
    case("Clip", X, at={1: np.float32(-0.5), 2: np.float32(0.5)}),
    case("CumSum", X, at={1: ints(1)}), case("CumSum", X, at={1: ints(-1)}, reverse=1),
    case("Softmax", X, axis=1),
    case("ReduceMean", X, at={1: ints(1, -1)}, keepdims=0),
    case("ReduceMean", X, opset=13, axes=[1]),
    case("ReduceSum", X, at={1: ints(2)}, opset=13),
    case("ReduceMax", X, opset=13, axes=[0, 2], keepdims=0),
    case("ReduceProd", X, at={1: ints(0, 2)}, keepdims=0),
    case("ArgMax", X, axis=1, keepdims=0),
    case("Cast", X, to=TensorProto.INT64), case("Cast", X, to=TensorProto.FLOAT16),
    case("CastLike", whole(2, 3), real(2, 3)),
    case("Shape", X), case("Size", X), case("Shape", X, start=1),
    case("Reshape", X, at={1: ints(0, -1, 2)}), case("Reshape", X, at={1: ints(6, 4)}),
    case("Flatten", X, axis=2), case("Flatten", X, axis=0),
    case("Transpose", X, perm=[1, 2, 0]),
    case("Squeeze", real(2, 1, 3, 1), at={1: ints(1, -1)}), case("Squeeze", real(3, 1, 4)),
    case("Unsqueeze", X, at={1: ints(0, -1)}),
    case("Concat", X, real(2, 3, 4, seed=1), axis=-1), case("Concat", X, axis=0),
    case("Split", X, at={1: ints(1, 3)}, outputs=2, axis=2),
    case("Split", X, outputs=3, axis=1, num_outputs=3),
    case("Split", X, outputs=1, axis=1, num_outputs=1),
    case("Slice", X, at={1: ints(1), 2: ints(3), 3: ints(-1)}),
    case("Slice", X, at={1: ints(0, 1), 2: ints(2**63 - 1, -1), 3: ints(1, 2), 4: ints(2, 1)}),
    case("Slice", X, at={1: ints(-1), 2: ints(-(2**63)), 3: ints(2), 4: ints(-1)}),
    case("Gather", real(5, 4), whole(2, 3)), case("Gather", X, at={1: ints(2, 0)}, axis=2),
    case("Gather", X, at={1: np.int64(-1)}, axis=1), case("Gather", X, whole(2, 2), axis=1),
    case("Gather", whole(2, 3), at={0: real(5, 4)}),
    case("GatherND", X, ints(1, 0, 0, 2).reshape(2, 2)),
    case("Where", flags(2, 3), real(2, 3), at={2: np.finfo(np.float32).min}),
    case("GatherElements", X, whole(2, 2, 4), axis=1),
    case("ScatterElements", X, whole(2, 1, 4), real(2, 1, 4, seed=5), axis=1),
    case("ScatterElements", X, whole(2, 2, 4), real(2, 2, 4, seed=5), axis=1, reduction="add"),
    case("ScatterND", X, ints(0, 1).reshape(1, 2), real(1, 4, seed=5)),
    case("Expand", real(2, 1, 4), at={1: ints(3, 1)}),
    case("Expand", real(3, 1), at={1: ints(2, 1, 4)}),
    case("Tile", X, at={1: ints(1, 2, 1)}),
    case("ConstantOfShape", at={0: ints(2, 3)}),
    case("Range", at={0: np.int64(1), 1: np.int64(9), 2: np.int64(3)}),
    case("Pad", IMAGE, at={1: ints(0, 0, 1, 2, 0, 0, 3, 0)}),
    case("Pad", IMAGE, at={1: ints(0, 0, 1, 1, 0, 0, 1, 1), 2: np.float32(2.5)}),
    case("Pad", IMAGE, at={1: ints(0, 0, 1, 1, 0, 0, 1, 1)}, mode="reflect"),
    case("Pad", IMAGE, at={1: ints(0, 0, 1, 1, 0, 0, 1, 1)}, mode="edge"),
    case("Trilu", X), case("Trilu", X, at={1: ints(1)[0]}, upper=0),
    case("TopK", X, at={1: ints(2)}, outputs=2), case("TopK", X, at={1: ints(1)}, outputs=2,
                                                       largest=0, axis=1),
    case("DepthToSpace", real(2, 8, 2, 3), blocksize=2),
    case("DepthToSpace", real(2, 8, 2, 3), blocksize=2, mode="CRD"),
    case("MatMul", X, real(2, 4, 5)), case("MatMul", X, at={1: real(4, 5)}),
    case("Gemm", real(2, 4), at={1: real(5, 4), 2: real(5)}, transB=1),
    case("Gemm", real(2, 4), at={1: real(5, 4)}, transB=1),
    case("Gemm", real(4, 2), at={1: real(4, 5), 2: real(1)}, transA=1, alpha=0.5, beta=2.0),
    case("Gemm", real(2, 4), at={1: real(5, 4), 2: real(1)}, transB=1),
    case("Einsum", X, real(2, 4, 5), equation="bij,bjk->bik"),
    case("Conv", IMAGE, at={1: real(4, 3, 3, 3), 2: real(4)}),
    case("Conv", IMAGE, at={1: real(6, 1, 3, 3)}, group=3, strides=[2, 2], pads=[1, 1, 1, 1]),
    case("Conv", IMAGE, at={1: real(4, 3, 2, 2)}, pads=[0, 1, 2, 1], dilations=[2, 2]),
    case("Conv", IMAGE, at={1: real(4, 3, 3, 3)}, auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", IMAGE, at={1: real(4, 3, 2, 2)}, auto_pad="SAME_LOWER"),
    case("Conv", real(2, 3, 8), at={1: real(4, 3, 3), 2: real(4)}, pads=[1, 1]),
    case("Conv", real(2, 3, 4, 4, 4), at={1: real(4, 3, 2, 2, 2)}),
    case("ConvTranspose", IMAGE, at={1: real(3, 4, 2, 2), 2: real(4)}, strides=[2, 2]),
    case("ConvTranspose", IMAGE, at={1: real(3, 4, 3, 3)}, strides=[2, 2], pads=[1, 1, 1, 1],
         output_padding=[1, 1]),
    case("MaxPool", IMAGE, kernel_shape=[2, 2], strides=[2, 2]),
    case("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    case("MaxPool", IMAGE, kernel_shape=[2, 2], dilations=[2, 2]),
    case("AveragePool", IMAGE, kernel_shape=[2, 2], strides=[2, 2]),
    case("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    case("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    case("BatchNormalization", IMAGE, at={1: real(3), 2: real(3), 3: real(3), 4: unit(3)}),
    case("BatchNormalization", real(4, 3), at={1: real(3), 2: real(3), 3: real(3), 4: unit(3)},
         epsilon=1e-3, momentum=0.8),
    case("InstanceNormalization", IMAGE, at={1: real(3), 2: real(3)}),
    case("LayerNormalization", X, at={1: real(4), 2: real(4)}),
    case("LayerNormalization", X, at={1: real(3, 4)}, axis=1, epsilon=1e-3),
    case("GroupNormalization", real(2, 4, 5), at={1: real(4), 2: real(4)}, num_groups=2, opset=21),
    case("RMSNormalization", X, at={1: real(4)}, opset=23),
    case("Attention", real(2, 4, 5, 8), real(2, 4, 6, 8), real(2, 4, 6, 8), opset=23),
    case("Attention", real(2, 4, 5, 8), real(2, 2, 5, 8), real(2, 2, 5, 8), opset=23, is_causal=1,
         scale=0.3),
    case("Resize", IMAGE, at={2: np.array([1, 1, 2, 2], np.float32)}, mode="nearest",
         coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    case("Resize", IMAGE, at={2: np.array([1, 1, 2, 3], np.float32)}),
    case("Resize", IMAGE, at={3: ints(2, 3, 9, 12)}, mode="linear"),
    case("Resize", IMAGE, at={3: ints(2, 3, 11, 11)}, mode="linear",
         coordinate_transformation_mode="align_corners"),
    case("Resize", IMAGE, at={2: np.array([1, 1, 2, 2], np.float32)}, mode="cubic"),
    case("LSTM", real(5, 2, 3), at={1: real(1, 16, 3), 2: real(1, 16, 4), 3: real(1, 32)},
         outputs=3, hidden_size=4),
    case("LSTM", real(5, 2, 3), at={1: real(2, 16, 3), 2: real(2, 16, 4)}, outputs=3, hidden_size=4,
         direction="bidirectional"),
    case("GRU", real(5, 2, 3), at={1: real(1, 12, 3), 2: real(1, 12, 4), 3: real(1, 24)}, outputs=2,
         hidden_size=4, linear_before_reset=1),
    case("RNN", real(5, 2, 3), at={1: real(1, 4, 3), 2: real(1, 4, 4), 3: real(1, 8)}, outputs=2,
         hidden_size=4),
]  # fmt: skip


def name(case: Case) -> str:
    return "-".join([case.op, *map(str, case.constants), *case.attributes])


def write(case: Case, path: Path) -> None:
    """The node between the inputs and a weight that every output is multiplied by."""
    feeds = list(case.feeds)
    count = len(case.feeds) + len(case.constants)
    while len(set(range(count)) - set(case.constants)) < len(case.feeds):
        count += 1
    count = max(count, 1 + max(case.constants, default=0))
    names, inputs, types, weights = [], {}, {}, {}
    waiting = list(range(len(feeds)))
    for position in range(count):
        if position in case.constants:
            names.append(f"c{position}")
            weights[f"c{position}"] = np.asarray(case.constants[position])
        elif waiting:
            feed = feeds[waiting.pop(0)]
            names.append(f"x{position}")
            # One dimension is the batch, where the operator does not fix all of them.
            inputs[f"x{position}"] = ["batch" if feed.shape[0] == 2 else feed.shape[0],
                                      *feed.shape[1:]]  # fmt: skip
            types[f"x{position}"] = TYPES[feed.dtype]
        else:
            names.append("")
    made = [f"made{i}" for i in range(case.outputs)]
    nodes = [helper.make_node(case.op, names, made, name="node", **case.attributes)]
    weights["scale"] = np.array([1.5], np.float32)
    inputs["always"], types["always"] = ["batch", 1], TensorProto.FLOAT
    for i in range(case.outputs):
        nodes += [
            helper.make_node("Cast", [f"made{i}"], [f"float{i}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"float{i}", "scale"], [f"y{i}"]),
        ]
    nodes.append(helper.make_node("Mul", ["always", "scale"], ["z"]))
    save(path, nodes, inputs, [*(f"y{i}" for i in range(case.outputs)), "z"], weights, case.opset,
         types,
         {"y0": ["batch", 4, 5]} if case.op == "GroupNormalization" else None)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=name)
def test_an_operator_does_what_onnx_runtime_does(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(case, path)
    feeds = [*case.feeds, real(2, 1)]
    wanted = by_runtime(path, feeds)
    file = imported(path, tmp_path / "out")
    torch.manual_seed(0)
    for got, want in zip(by_torch(file, feeds), wanted, strict=True):
        assert tuple(got.shape) == want.shape
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
def test_operators_of_every_opset(opset: int, tmp_path: Path) -> None:
    """Each case that is valid in an opset, and that ONNX Runtime has too."""
    compared = 0
    for number, case in enumerate(CASES):
        path = tmp_path / f"{number}.onnx"
        feeds = [*case.feeds, real(2, 1)]
        try:
            write(replace(case, opset=opset), path)
            wanted = by_runtime(path, feeds)
        except Exception:
            continue
        try:
            got = by_torch(imported(path, tmp_path / "out"), feeds)
        except InputFileError:
            continue  # an older form of an operator: refused, never taken for the newer one
        for ours, theirs in zip(got, wanted, strict=True):
            message = f"{name(case)} in opset {opset}"
            np.testing.assert_allclose(
                ours.detach().numpy(), theirs, rtol=1e-5, atol=1e-5, err_msg=message
            )
        compared += 1
    assert compared > 100


@pytest.mark.parametrize(("split", "width"), [(np.int64(2), 1), (ints(1, 4), 4), (np.int64(9), 5)])
def test_a_sequence_of_parts(split: Array, width: int, tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", real(2, 5)
    nodes = [
        helper.make_node("SplitToSequence", ["x", "split"], ["parts"], axis=1),
        helper.make_node("Constant", [], ["last"], value_int=-1),
        helper.make_node("SequenceAt", ["parts", "last"], ["part"]),
        helper.make_node("Mul", ["part", "scale"], ["y"]),
    ]
    weights = {"split": np.asarray(split), "scale": real(1)}
    save(path, nodes, {"x": ["batch", 5]}, ["y"], weights, declared={"y": ["batch", width]})
    (got,) = by_torch(imported(path, tmp_path / "out"), [x])
    (want,) = by_runtime(path, [x])
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-6)


def test_every_operator_has_a_case() -> None:
    elsewhere = {"Constant", "SplitToSequence", "SequenceAt"}
    assert set(OPERATORS) - {case.op for case in CASES} == elsewhere
