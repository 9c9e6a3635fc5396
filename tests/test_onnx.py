"""ONNX files of real models: imported, compiled into stages, verified against ONNX Runtime."""

import contextlib
import importlib
import io
import json
import logging
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
from p2bw.contract.errors import ModelError, UsageError
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
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
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
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.silu(self.first(x))
        x = F.silu(self.norm(self.middle(self.down(skip))))
        x = F.interpolate(self.up(x), scale_factor=1.0)
        return self.last(torch.cat((x, skip), dim=1))


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
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, inputs, str(path), dynamo=True, optimize=optimize, external_data=False,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip
    return model


quick = ("mlp", "gpt")


@pytest.mark.parametrize(
    "name", [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
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
    # The names are the original's, so its checkpoints fit.
    theirs = dict(original.named_parameters())
    assert dict(model.named_parameters()).keys() == theirs.keys()
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[parameter_name])

    result = verify(out)
    assert result.problems == ()
    assert result.compared == len(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_optimised_export_computes_the_same_under_other_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.onnx"
    export(name, path, optimize=True)
    file = imported(path, tmp_path / "out")
    feeds = [i.numpy() for i in MODELS[name].inputs()]
    for got, want in zip(by_torch(file, feeds), by_runtime(path, feeds), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-5, atol=1e-5)
