"""Modules of torch.nn are rebuilt with the arguments that they were built with."""

import ast
from pathlib import Path

import pytest
from staged import compare, cut, program_of, texts_of

# As emitted: only arguments that differ from the defaults, by keyword where a person would.
LEAVES = {
    "vector": """
        nn.Linear(8, 4)
        nn.Linear(8, 4, bias=False)
        nn.LayerNorm(8)
        nn.LayerNorm(8, eps=1e-06)
        nn.LayerNorm(8, elementwise_affine=False)
        nn.LayerNorm(8, bias=False)
        nn.RMSNorm(8)
        nn.RMSNorm(8, eps=1e-06)
        nn.RMSNorm(8, elementwise_affine=False)
        nn.BatchNorm1d(8)
        nn.Dropout(0.5)
        nn.Dropout(0.25, inplace=True)
        nn.AlphaDropout(0.5)
        nn.ReLU()
        nn.ReLU(inplace=True)
        nn.ReLU6()
        nn.GELU()
        nn.GELU(approximate="tanh")
        nn.SiLU()
        nn.SiLU(inplace=True)
        nn.Mish()
        nn.SELU()
        nn.ELU()
        nn.ELU(alpha=0.5)
        nn.CELU(alpha=0.5)
        nn.LeakyReLU()
        nn.LeakyReLU(negative_slope=0.2)
        nn.Hardtanh()
        nn.Hardtanh(min_val=-2.0, max_val=0.5)
        nn.Hardswish()
        nn.Hardsigmoid()
        nn.Sigmoid()
        nn.Tanh()
        nn.Softplus()
        nn.Softplus(beta=2.0, threshold=5.0)
        nn.LogSigmoid()
        nn.GLU()
        nn.Softmax(dim=-1)
        nn.LogSoftmax(dim=1)
        nn.PReLU()
        nn.PReLU(num_parameters=8)
    """,
    "sequence": """
        nn.Conv1d(8, 4, 3)
        nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=4)
        nn.Conv1d(8, 4, 3, padding="same")
        nn.ConvTranspose1d(8, 4, 3, stride=2, output_padding=1)
        nn.MaxPool1d(2)
        nn.AvgPool1d(2)
        nn.AdaptiveAvgPool1d(4)
        nn.BatchNorm1d(8, momentum=0.2)
        nn.LSTM(16, 4)
        nn.LSTM(16, 4, num_layers=2, batch_first=True, dropout=0.5, bidirectional=True)
        nn.GRU(16, 4, batch_first=True)
        nn.RNN(16, 4, bias=False)
        nn.RNN(16, 4, nonlinearity="relu")
    """,
    "image": """
        nn.Conv2d(8, 4, 3)
        nn.Conv2d(8, 4, 3, stride=2, padding=1, bias=False)
        nn.Conv2d(8, 4, (1, 3), padding=(0, 1))
        nn.Conv2d(8, 8, 1, groups=8)
        nn.ConvTranspose2d(8, 4, 2, stride=2)
        nn.ConvTranspose2d(8, 4, 3, padding=1, groups=2, bias=False)
        nn.BatchNorm2d(8)
        nn.BatchNorm2d(8, eps=0.001, affine=False)
        nn.BatchNorm2d(8, track_running_stats=False)
        nn.InstanceNorm2d(8)
        nn.InstanceNorm2d(8, affine=True)
        nn.GroupNorm(2, 8)
        nn.GroupNorm(2, 8, affine=False)
        nn.Dropout2d(0.5)
        nn.MaxPool2d(2)
        nn.MaxPool2d(3, stride=2, padding=1)
        nn.MaxPool2d(2, ceil_mode=True)
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        nn.AdaptiveAvgPool2d(1)
        nn.AdaptiveAvgPool2d((2, 4))
        nn.Upsample(scale_factor=2.0)
        nn.Upsample(size=8)
        nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True)
        nn.PixelShuffle(upscale_factor=2)
        nn.Flatten()
        nn.Flatten(start_dim=2)
    """,
    "volume": """
        nn.Conv3d(8, 4, 2)
        nn.BatchNorm3d(8)
        nn.MaxPool3d(2)
    """,
    "token": """
        nn.Embedding(16, 4)
        nn.Embedding(16, 4, padding_idx=0)
        nn.EmbeddingBag(16, 4)
        nn.EmbeddingBag(16, 4, mode="sum")
    """,
}

MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.m = nn.ModuleList([{leaves}])

    def forward(self, x, ids):
        vector = self.first(x)
        sequence = vector.unsqueeze(2).expand(4, 8, 16) * 1.5
        image = sequence.unsqueeze(3).expand(4, 8, 16, 16) * 1.5
        volume = image[:, :, :4, :4].unsqueeze(4).expand(4, 8, 4, 4, 4) * 1.5
        token = ids
        total = vector.sum()
        for module in self.m:
            y = module({kind}{clone})
            y = y[0] if isinstance(y, tuple) else y
            total = total + y.pow(2).mean()
        return total


def model():
    return Model()


def inputs(batch_size):
    return torch.randn(4, 8), torch.randint(0, 16, (4, 5))
"""


@pytest.mark.parametrize("kind", LEAVES)
def test_leaves_come_back_as_they_were_built(kind: str, tmp_path: Path) -> None:
    leaves = [line.strip() for line in LEAVES[kind].strip().splitlines()]
    clone = "" if kind == "token" else " * 1"  # some write in place
    path = tmp_path / "model.py"
    path.write_text(MODEL.format(leaves=", ".join(leaves), kind=kind, clone=clone))
    file, program = program_of(path, "model")
    (text,) = texts_of(program, cut(program, 1))
    assert "torch.ops" not in text
    stage = ast.parse(text).body[-1]
    lists = [n for n in ast.walk(stage) if isinstance(n, ast.List) and len(n.elts) == len(leaves)]
    assert [ast.unparse(leaf) for leaf in lists[0].elts] == [_parsed(leaf) for leaf in leaves]
    compare(file, program, cut(program, 3))


def _parsed(text: str) -> str:
    return ast.unparse(ast.parse(text))
