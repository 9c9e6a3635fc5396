"""What tracing fixes for ever is found when the model is run twice, and named."""

from pathlib import Path

import pytest

from p2bw.compiler.driver import compile_model
from p2bw.compiler.verify import Verification, verify

NET = """
import torch
import torch.nn.functional as F
from torch import nn


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        y = self.fc(x)
        return BODY


def model():
    return nn.Sequential(nn.Linear(8, 8), Part(), nn.Linear(8, 8))


def inputs(batch_size):
    return (torch.randn(batch_size, 8),)


def targets(batch_size):
    return (torch.randn(batch_size, 8),)


def loss(outputs, wanted):
    return F.mse_loss(outputs, wanted)
"""
LINE = NET.splitlines().index("        return BODY") + 1


def found(tmp_path: Path, body: str) -> Verification:
    path = tmp_path / "net.py"
    path.write_text(NET.replace("BODY", body))
    compile_model(path, device="cpu", gpus=2, depth=2, microbatch=2, out=tmp_path / "out")
    return verify(tmp_path / "out", model=path)


@pytest.mark.parametrize(
    ("body", "operation"),
    [
        ("y * self.calls", "mul in 1"),
        ("F.dropout(y, 1 / (1 + self.calls)) + 1", "dropout in 1"),
        ("y + y.sin() if self.calls % 4 == 1 else y", ""),
    ],
)
def test_a_count_in_python_is_named(tmp_path: Path, body: str, operation: str) -> None:
    result = found(tmp_path, body)
    assert not result.ok
    assert f"something else is net.py:{LINE}: {operation}" in result.problems[-1]


@pytest.mark.parametrize("body", ["y * self.seen", "F.dropout(y, 0.5)", "y * torch.rand(8)"])
def test_counts_in_buffers_and_random_numbers_are_in_order(tmp_path: Path, body: str) -> None:
    result = found(tmp_path, body)
    assert result.ok, result.problems
    assert result.problems == ()
