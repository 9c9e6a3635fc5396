"""bfloat16 autocast: in the model's own forward, and around it by compile --autocast."""

from pathlib import Path

import pytest
from test_runtime_compiled import differing

from p2bw.compiler.driver import compile_model
from p2bw.compiler.plan import read_plan
from p2bw.compiler.verify import verify
from p2bw.contract.errors import UsageError
from p2bw.contract.job import Job
from p2bw.runtime.local import train_in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))

class Net(nn.Module):
    def __init__(self, casts, width=16):
        super().__init__()
        self.casts = casts
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        with torch.autocast(words.device.type, dtype=torch.bfloat16, enabled=self.casts):
            x = self.embed(words)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

def model(casts=True):
    return Net(casts)

def inputs(batch_size):
    return (torch.randint(32, (batch_size, 8)),)

def targets(batch_size):
    return (torch.randint(32, (batch_size, 8)),)

def loss(outputs, words):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), words.flatten())

def optimizer(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)
"""

OUTER = MODEL.replace("dtype=torch.bfloat16, enabled=self.casts", "enabled=False").replace(
    "with torch.autocast(words.device.type, enabled=False):", "if True:"
)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_autocast_is_bitwise_that_of_the_model(
    tmp_path: Path, depth: int, autocast: str | None
) -> None:
    """Under --autocast the model itself casts nothing."""
    (tmp_path / "amp.py").write_text(OUTER if autocast else MODEL)
    compiled = compile_model(
        tmp_path / "amp.py",
        gpus=depth,
        depth=depth,
        width=1,
        microbatch=2,
        device="cpu",
        autocast=autocast,
        out=tmp_path / "out",
    )
    assert read_plan(compiled.artifact).model.autocast == ("bfloat16" if autocast else None)
    for stage in compiled.plan.stages:
        code = (compiled.artifact / "stages" / f"stage_{stage.index}.py").read_text()
        assert "torch.autocast(" in code
    result = verify(compiled.artifact)
    assert result.problems == ()
    assert result.loss_bitwise
    assert result.bitwise == result.compared
    for clip_norm in (None, 0.5):
        job = Job(artifact=compiled.artifact, steps=3, clip_norm=clip_norm)
        assert differing(job, train_in_threads(job)) == []


def test_only_bfloat16_is_taken(tmp_path: Path) -> None:
    (tmp_path / "amp.py").write_text(MODEL)
    with pytest.raises(UsageError, match="--autocast fp16: give bf16"):
        compile_model(tmp_path / "amp.py", gpus=1, autocast="fp16", out=tmp_path / "out")
