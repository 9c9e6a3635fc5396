"""ONNX files of real models: imported, compiled into stages, verified against ONNX Runtime."""

import contextlib
import io
import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnxfiles import by_runtime, by_torch, imported, mlp, save
from torch import Tensor, nn

from p2bw.compiler.driver import compile_model
from p2bw.compiler.onnx.importer import import_onnx
from p2bw.compiler.verify import verify
from p2bw.contract.errors import InputFileError, ModelError, UsageError
from p2bw.contract.stages import find_model_file


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.relu(layer(x))
        return x


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(c, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder with a head that shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        self.positions = nn.Embedding(8, 32)
        self.blocks = nn.ModuleList(Block(32, 4, True) for _ in range(3))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Bert(nn.Module):
    """Encoder with segments, a pooler and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.kinds = nn.Embedding(2, 32)
        self.norm = nn.LayerNorm(32)
        self.layers = nn.ModuleList(Block(32, 2, False) for _ in range(2))
        self.pooler = nn.Linear(32, 32)

    def forward(self, ids: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.words(ids) + self.kinds(kinds))
        for layer in self.layers:
            x = layer(x)
        return x, torch.tanh(self.pooler(x[:, 0]))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(ids))[0])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.silu(self.first(x))
        x = F.silu(self.norm(self.middle(self.down(skip))))
        x = x + F.interpolate(self.deep(F.avg_pool2d(x, 2)), scale_factor=2.0)
        return self.last(torch.cat((self.up(x), skip), dim=1))


@dataclass(frozen=True)
class Exported:
    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]


MODELS = {
    "mlp": Exported(MLP, lambda: (torch.randn(3, 16),)),
    "convnet": Exported(ConvNet, lambda: (torch.randn(3, 3, 8, 8),)),
    "gpt": Exported(GPT, lambda: (torch.randint(50, (3, 8)),)),
    "bert": Exported(Bert, lambda: (torch.randint(40, (3, 6)), torch.randint(2, (3, 6)))),
    "lstm": Exported(Recurrent, lambda: (torch.randint(20, (3, 5)),)),
    "unet": Exported(UNet, lambda: (torch.randn(3, 1, 8, 8),)),
}


def export(name: str, path: Path, *, optimize: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model, inputs = MODELS[name].model().eval(), MODELS[name].inputs()
    export_model(model, inputs, path, optimize=optimize)
    return model


def export_model(
    model: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, optimize: bool
) -> None:
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, inputs, str(path), dynamo=True, optimize=optimize, external_data=False,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n == "gpt" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_a_model_comes_back_from_onnx_and_trains_in_stages(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.onnx"
    original = export(name, path)
    out = tmp_path / "artifact"
    compile_model(path, gpus=2, depth=2, microbatch=2, out=out)

    file = find_model_file(out)
    torch.manual_seed(1)
    feeds = [i.numpy() for i in MODELS[name].inputs()]
    for got, want in zip(by_torch(file, feeds), by_runtime(path, feeds), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-5, atol=1e-5)

    model = file.model()
    file.call(model, file.inputs(2), file.targets(2)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
    # The names are the original's (a tied weight has one of its names), so its checkpoints fit.
    theirs = dict(original.named_parameters(remove_duplicate=False))
    ours = dict(model.named_parameters())
    assert len(ours) == len(list(original.parameters()))
    for parameter_name, parameter in ours.items():
        assert torch.equal(parameter, theirs[parameter_name])

    result = verify(out)
    assert result.problems == ()
    assert result.compared == len(ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_optimised_export_computes_the_same_under_other_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.onnx"
    export(name, path, optimize=True)
    file = imported(path, tmp_path / "out")
    feeds = [i.numpy() for i in MODELS[name].inputs()]
    for got, want in zip(by_torch(file, feeds), by_runtime(path, feeds), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-5, atol=1e-5)


class Logits(nn.Module):
    """A language model of Hugging Face, from token ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def hugging_face(name: str) -> nn.Module:
    import transformers

    sizes = {"vocab_size": 90, "max_position_embeddings": 16, "use_cache": False}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, **sizes)
        return Logits(transformers.GPT2LMHeadModel(config))
    sizes |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    if name == "bert":
        return Logits(transformers.BertForMaskedLM(
            transformers.BertConfig(num_attention_heads=2, **sizes)))  # fmt: skip
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return Logits(transformers.LlamaForCausalLM(config))


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_hugging_face_model_comes_back(name: str, optimize: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    torch.manual_seed(0)
    ids = torch.randint(90, (3, 8))
    export_model(hugging_face(name).eval(), (ids,), path, optimize=optimize)
    out = tmp_path / "artifact"
    compile_model(path, gpus=2, depth=2, microbatch=2, out=out)
    (got,) = by_torch(find_model_file(out), [ids.numpy()])
    (want,) = by_runtime(path, [ids.numpy()])
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-5, atol=1e-5)
    assert verify(out).problems == ()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    out = folder / "artifact"
    compile_model(mlp(folder / "model.onnx"), gpus=2, depth=2, microbatch=2, out=out)
    return out


def test_an_artifact_has_all_that_it_needs(artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(artifact, moved)
    plan = json.loads((moved / "plan.json").read_text())
    assert plan["model"]["file"] == "model.py"
    assert {p.name for p in (moved / "source").iterdir()} == {"model.py", "weights.safetensors"}
    result = verify(moved)
    assert result.ok
    assert result.compared == 4


def test_weights_that_were_changed_are_refused(artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(artifact, moved)
    weights = moved / "source" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="not the file that was made with this one"):
        verify(moved)


@pytest.mark.slow
def test_an_onnx_file_trains_from_its_own_weights(artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(artifact, moved)
    p2bw = [sys.executable, "-m", "p2bw"]
    done = subprocess.run(
        [*p2bw, "run", str(moved), "--steps", "3", "--json"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["losses"]) == 3


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    path = mlp(tmp_path / "model.onnx")
    made = [import_onnx(path, tmp_path / name) for name in ("a", "b")]
    assert made[0].file.read_bytes() == made[1].file.read_bytes()
    assert made[0].weights.read_bytes() == made[1].weights.read_bytes()


def test_the_model_file_looks_written_by_hand(tmp_path: Path) -> None:
    text = import_onnx(mlp(tmp_path / "model.onnx"), tmp_path / "out").file.read_text()
    assert (
        """
class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        linear = self.first(x)
        relu = F.relu(linear)
        linear_1 = self.second(relu)
        return linear_1
"""
        in text
    )


def test_a_fixed_batch_fixes_the_microbatch(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    weights = {"w": np.ones((4, 2), np.float32)}
    save(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [3, 4]}, ["y"], weights)
    assert import_onnx(path, tmp_path / "out").batch == 3
    with pytest.raises(UsageError, match="fixes the batch at 3"):
        compile_model(path, gpus=2, microbatch=2, out=tmp_path / "artifact")
    assert compile_model(path, gpus=1, out=tmp_path / "artifact").plan.microbatch == 3


def test_an_open_dimension_is_given_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    weights = {"w": np.ones((4, 2), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    save(path, nodes, {"x": ["batch", "length", 4]}, ["y"], weights)
    made = import_onnx(path, tmp_path / "out", {"length": 6})
    assert "torch.randn((batch_size, 6, 4))" in made.file.read_text()
    for bad in ({"width": 6}, {"length": 0}, {"length": "six"}):
        with pytest.raises(UsageError, match="--set"):
            import_onnx(path, tmp_path / "out", bad)


def test_what_trains_and_what_does_not(tmp_path: Path) -> None:
    """The exporter's own word counts; without it, floats with dimensions train."""
    path = tmp_path / "model.onnx"
    weights = {
        "weight": np.ones(4, np.float32),
        "scale": np.float32(2).reshape(()),
        "eps": np.float32(0.1).reshape(()),
        "table": np.arange(4, dtype=np.float32),
        "hidden": np.array([0, 0, -np.inf, -np.inf], np.float32),
    }
    ops = zip(["Mul", "Mul", "Add", "Add", "Add"], weights, strict=True)
    nodes, value = [], "x"
    for i, (op, name) in enumerate(ops):
        nodes.append(helper.make_node(op, [value, name], [f"v{i}"]))
        value = f"v{i}"
    save(path, nodes, {"x": ["batch", 4]}, [value], weights)
    model = onnx.load(str(path))
    for name, kind in (("scale", "PARAMETER"), ("table", "BUFFER")):
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, weights[name].shape)
        info.metadata_props.add(key="pkg.torch.export.graph_signature.InputSpec.kind", value=kind)
        model.graph.value_info.append(info)
    path.write_bytes(model.SerializeToString())
    made = imported(path, tmp_path / "out").model()
    assert {name for name, _ in made.named_parameters()} == {"weight", "scale"}
    assert {name for name, _ in made.named_buffers()} == {"table", "constant"}
    x = np.zeros((2, 4), np.float32)
    assert np.array_equal(by_runtime(path, [x])[0], made(torch.from_numpy(x)).detach().numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_stay_what_they_are(dtype: str, tmp_path: Path) -> None:
    kind = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}
    number = kind.get(dtype, TensorProto.DOUBLE)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "a.weight", "a.bias"], ["h"], transB=1),
            helper.make_node("Add", ["h", "b"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", number, ["batch", 3])],
        [helper.make_tensor_value_info("y", number, ["batch", 2])],
        [
            helper.make_tensor("a.weight", number, [2, 3], [1, 2, 3, 4, 5, 6.5]),
            helper.make_tensor("a.bias", number, [2], [0.5, -1]),
            helper.make_tensor("b", number, [1], [2]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 9
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    file = imported(path, tmp_path / "out")
    net = file.model()
    assert isinstance(net.a, nn.Linear)
    assert {str(p.dtype) for p in net.parameters()} == {f"torch.{dtype}"}
    made = net(torch.ones(1, 3, dtype=getattr(torch, dtype)))
    assert made.tolist() == [[8.5, 16.5]]
    file.call(net, file.inputs(2), file.targets(2)).backward()


def test_batch_norm_and_dropout_train(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    names = ("weight", "bias", "running_mean", "running_var")
    weights = {f"norm.{name}": np.ones(3, np.float32) for name in names}
    weights |= {"ratio": np.float32(0.5).reshape(()), "training": np.array(True)}
    nodes = [
        helper.make_node("BatchNormalization", ["x", *(f"norm.{name}" for name in names)], ["n"]),
        helper.make_node("Dropout", ["n", "ratio", "training"], ["y"]),
    ]
    save(path, nodes, {"x": ["batch", 3]}, ["y"], weights)
    model = imported(path, tmp_path / "out").model()
    assert isinstance(model.norm, nn.BatchNorm1d)
    x = torch.randn(64, 3)
    y = model.train()(x)
    assert (y == 0).sum() > 40
    assert not torch.equal(model.norm.running_mean, torch.ones(3))
    assert (model.eval()(x) != 0).all()


@pytest.mark.parametrize(
    "names",
    [("a", "a.b", "a.b.c", "a_"), ("x", "0.0.0", "{0.y}"), ("0", "0.0", "0.0.0"), ("a.1", "a.b.0")],
)
def test_names_that_meet_are_kept_apart(names: tuple[str, ...], tmp_path: Path) -> None:
    """A tensor, a list and a module of one name: found by the test of hostile names."""
    path = tmp_path / "model.onnx"
    weights = {name: np.full(2, 2.0**i, np.float32) for i, name in enumerate(names)}
    nodes, value = [], "input"
    for name in weights:
        nodes.append(helper.make_node("Add", [value, name], [f"sum.{name}"]))
        value = f"sum.{name}"
    save(path, nodes, {"input": ["batch", 2]}, [value], weights)
    model = imported(path, tmp_path / "out").model()
    assert torch.equal(model(torch.zeros(1, 2)), torch.full((1, 2), 2.0 ** len(names) - 1))
    assert len(dict(model.named_parameters())) == len(names)


def test_all_that_cannot_be_translated_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["v"]),
        *(helper.make_node("CumSum", ["v", "axis"], [f"c{i}"], exclusive=1) for i in range(2)),
        helper.make_node("Pad", ["v", "pads"], ["y"], mode="wrap"),
    ]
    weights = {
        "w": np.ones(4, np.float32), "axis": np.array(1), "pads": np.array([0, 1, 0, 1])
    }  # fmt: skip
    save(path, nodes, {"x": ["batch", 4]}, ["c0", "c1", "y"], weights)
    says = r"CumSum with exclusive \(2\), Pad with mode 'wrap' \(1\)"
    with pytest.raises(InputFileError, match=says):
        import_onnx(path, tmp_path / "out")


def test_without_the_package_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mlp(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"pip install 'p2bw\[onnx\]'"):
        compile_model(path, gpus=2, out=tmp_path / "artifact")


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    path = mlp(tmp_path / "model.onnx", opset)
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    (got,) = by_torch(imported(path, tmp_path / "out"), [x])
    np.testing.assert_allclose(got.detach().numpy(), by_runtime(path, [x])[0], rtol=1e-6)
