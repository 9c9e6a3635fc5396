"""What tracing changes is told from what the partition does, and named."""

import re
from pathlib import Path

import pytest

from p2bw.compiler.driver import compile_model
from p2bw.compiler.verification import TRACING_TOLERANCE, Verification
from p2bw.compiler.verify import verify
from p2bw.tables import print_verification

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


ANOTHER_WAY = "F.log_softmax(y, -1) if torch.compiler.is_compiling() else y - y.logsumexp(-1, True)"


def test_another_way_when_traced_is_verified_within_a_tolerance_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = found(tmp_path, ANOTHER_WAY)
    assert result.ok, result.problems
    assert result.bitwise < result.compared  # else the test shows nothing
    assert all(d.reason == "tracing" for d in result.differences)
    assert result.tracing is not None
    assert 0 < result.tracing.max_rel <= TRACING_TOLERANCE
    assert result.tracing.operation == f"net.py:{LINE}: log_softmax in 1"
    print_verification(result)
    printed = capsys.readouterr().out
    assert f"other rounding: net.py:{LINE}: log_softmax in 1" in printed
    assert re.search(r"verified +within [\d.e-]+ relative, of the 1e-05 that tracing may", printed)


def test_an_error_in_a_stage_is_no_rounding_of_the_trace(tmp_path: Path) -> None:
    """One unit in the last place of one tensor: far less than what tracing itself may change."""
    assert found(tmp_path, ANOTHER_WAY).ok
    edited = tmp_path / "out" / "stages" / "stage_1.py"
    head, word, tail = edited.read_text().rpartition("return ")
    edited.write_text(f"{head}{word}(1 + 2**-22) * {tail}")
    result = verify(tmp_path / "out", model=tmp_path / "net.py")
    assert not result.ok
    assert result.tracing is None
    assert all("the program before it is cut" in problem for problem in result.problems)


def test_a_trace_that_differs_by_more_than_rounding_is_an_error(tmp_path: Path) -> None:
    result = found(tmp_path, "y * 1.0001 if torch.compiler.is_compiling() else y")
    assert not result.ok
    assert result.tracing is None
    assert re.search(
        rf"tracing made a difference of [\d.]+e-0[45] relative: .*net.py:{LINE}: mul in 1",
        result.problems[-1],
    )
