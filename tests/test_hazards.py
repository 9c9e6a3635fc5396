"""What tracing would get wrong without a word, and what a model holds beside trained weights."""

from pathlib import Path

import pytest

from p2bw.compiler.driver import compile_model
from p2bw.compiler.plan import Plan
from p2bw.compiler.verify import verify

NET = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 32)
        self.back = nn.Linear(32, 8)

    def forward(self, x):
        return self.back(F.dropout(self.fc(x).tanh(), 0.3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Part()
        self.second = Part()
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        BODY
        return self.second(x)


def model():
    return Net()


def frozen():
    net = Net()
    net.first.requires_grad_(False)
    return net


def inputs(batch_size):
    return (torch.randn(batch_size, 8),)


def targets(batch_size):
    return (torch.randn(batch_size, 8),)


def loss(outputs, wanted):
    return F.mse_loss(outputs, wanted)
"""


def verified(tmp_path: Path, body: str = "x = x + 1", factory: str = "model") -> Plan:
    """The plan in three stages, which compute what the model does."""
    path = tmp_path / "net.py"
    path.write_text(NET.replace("BODY", body))
    made = compile_model(
        path, factory=factory, device="cpu", gpus=3, depth=3, microbatch=2, out=tmp_path / factory
    )
    found = verify(made.artifact, model=path)
    assert found.ok, found.problems
    assert found.compared == found.bitwise
    return made.plan


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_in_the_model_are_plain_calls_and_said(tmp_path: Path, reentrant: bool) -> None:
    body = f"x = checkpoint(self.second, x, use_reentrant={reentrant})"
    plan = verified(tmp_path, body)
    line = NET.splitlines().index("        BODY") + 1
    (note,) = plan.notes
    assert note.startswith(f"net.py:{line}: torch.utils.checkpoint does nothing")
    assert verified(tmp_path, factory="frozen").notes == ()


def test_what_is_written_in_place_at_a_cut_is_what_eager_writes(tmp_path: Path) -> None:
    verified(tmp_path, "y = x * 2; z = y.exp(); y.mul_(3); y[:, :4] += 1; x = y + z")


def test_frozen_and_unused_weights_have_no_gradient_and_no_state(tmp_path: Path) -> None:
    plan = verified(tmp_path)
    frozen = verified(tmp_path, factory="frozen")
    first = 2 * (8 * 32) + 32 + 8  # elements of a Part

    def held(plan: Plan, kind: str) -> int:
        return sum(getattr(stage.memory, kind) for stage in plan.stages)

    assert held(plan, "gradients") == 4 * 2 * first  # and none for what the model does not use
    assert held(frozen, "gradients") == 4 * first
    assert held(frozen, "optimizer") == 2 * held(frozen, "gradients")
    assert sum(stage.parameters for stage in frozen.stages) == 2 * first
