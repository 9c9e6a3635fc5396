"""A small model with everything that is hard for a pipeline, and its artifact, written by hand.

Tied embedding and head, two groups of parameters, dropout, BatchNorm, a frozen parameter, a
parameter without a gradient, a skip connection that fans out to two later stages, a tensor that
travels transposed, one that is expanded and one of booleans. So the runtime's tests depend on no
other part of p2bw.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path

MODEL = """\
import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = 4
AUTOCAST = False
made_with = "sgd"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.down = nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
            y = F.gelu(self.norm(self.up(self.ln(x)))) + self.unused.detach().sum() * 0
            return x + F.dropout(self.down(y), 0.2) * self.gain


class Net(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.h = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.wte.weight
        else:  # for the reference, which must tell the uses apart
            self.head.weight = nn.Parameter(self.wte.weight.detach().clone())
        self.enter = lambda block: None

    def forward(self, tokens):
        self.enter(0)
        x = x0 = F.dropout(self.wte(tokens), 0.1).sum(1)
        x0t = x0.t()
        mask = (tokens[:, :1] > 2).expand(-1, 8)
        for i, block in enumerate(self.h):
            self.enter(i)
            x = block(x) + x0t.t().view(-1).view(-1, 8) if i == 2 else block(x)
        x = x + torch.where(mask, x0t.t(), 0.0)
        return self.head(x) * 0.2


def model(tied=True, optimizer="sgd", dtype="float32"):
    global made_with
    made_with = optimizer
    return Net(tied).to(getattr(torch, dtype))


def inputs(batch_size):
    return (torch.randint(11, (batch_size, 5)),)


def targets(batch_size):
    return (torch.randint(11, (batch_size,)),)


def loss(logits, labels):
    return F.cross_entropy(logits, labels)


def optimizer(params):
    params = list(params)
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "lr": 0.03},
    ]
    if made_with == "sgd":
        return torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)


def scheduler(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + 0.1 * update))
"""

_STAGE = """\
import torch
import torch.nn.functional as F
from torch import nn

AUTOCAST = {autocast}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.down = nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
            y = F.gelu(self.norm(self.up(self.ln(x)))) + self.unused.detach().sum() * 0
            return x + F.dropout(self.down(y), 0.2) * self.gain


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
{init}

    def forward(self, {arguments}):
{body}
        return {results}
"""


def stage_of_block(block: int, depth: int) -> int:
    return block * depth // 4


def write_artifact(
    folder: Path,
    *,
    depth: int,
    width: int = 1,
    microbatches: int | None = None,
    microbatch: int = 3,
    extra: int = 0,
    recompute: Collection[int] = (),
    optimizer: str = "sgd",
    schedule: str = "2bw",
    tied: bool = True,
    autocast: bool = False,
    dtype: str = "float32",
    edit: Callable[[str], str] = str,
) -> Path:
    """Write the model file (after an edit), plan.json and the stages to a folder."""
    model = edit(MODEL).replace("AUTOCAST = False", f"AUTOCAST = {autocast}")
    (folder / "stages").mkdir(parents=True)
    (folder / "source").mkdir()
    (folder / "source" / "handmade.py").write_text(model)
    last = depth - 1
    middle = stage_of_block(2, depth)
    edges = [("x", k, k + 1, (microbatch, 8), dtype, True) for k in range(last)]
    if middle > 0:
        edges.append(("x0t", 0, middle, (8, microbatch), dtype, True))
    if last > middle:
        edges.append(("x0t", 0, last, (8, microbatch), dtype, True))
    if last > 0:
        edges.append(("mask", 0, last, (microbatch, 8), "bool", False))
    stages = []
    for k in range(depth):
        blocks = [b for b in range(4) if stage_of_block(b, depth) == k]
        init = [f"self.h = nn.ModuleDict({{str(i): Block() for i in {blocks}}})"]
        body, inputs = [], []
        sends = [e for e in edges if e[1] == k]
        receives = sorted((e for e in edges if e[2] == k), key=lambda e: e[0])
        if k == 0:
            inputs.append("tokens")
            init.append("self.wte = nn.Embedding(11, 8)")
            body += ["x = x0 = F.dropout(self.wte(tokens), 0.1).sum(1)"]
            body += ["x0t = x0.t()", "mask = (tokens[:, :1] > 2).expand(-1, 8)"]
        for b in blocks:
            skip = " + x0t.t().view(-1).view(-1, 8)" if b == 2 else ""
            body.append(f'x = self.h["{b}"](x){skip}')
        if k == last:
            inputs.append("labels")
            init.append("self.head = nn.Linear(8, 11, bias=False)")
            if k == 0 and tied:
                init.append("self.head.weight = self.wte.weight")
            body.append("x = x + torch.where(mask, x0t.t(), 0.0)")
            body.append("loss = F.cross_entropy(self.head(x) * 0.2, labels)")
        init.append(f"self.to(torch.{dtype})")
        arguments = [*inputs, *(e[0] for e in receives)]
        results = list(dict.fromkeys(e[0] for e in sends)) + (["loss"] if k == last else [])
        text = _STAGE.format(
            autocast=autocast,
            init="\n".join(f"        {line}" for line in init),
            arguments=", ".join(arguments),
            body="\n".join(f"        {line}" for line in body),
            results=", ".join(results),
        )
        (folder / "stages" / f"stage_{k}.py").write_text(text)
        stages.append(
            {
                "index": k,
                "recompute": k in recompute,
                "inputs": inputs,
                "arguments": arguments,
                "results": results,
                "sends": [_transfer(e, e[2]) for e in sends],
                "receives": [_transfer(e, e[1]) for e in receives],
                "devices": list(range(k * width, (k + 1) * width)),
            }
        )
    plan = {
        "schema": 1,
        "model": {
            "file": "handmade.py",
            "factory": "model",
            "settings": {"optimizer": optimizer, "tied": tied, "dtype": dtype},
            "sha256": hashlib.sha256(model.encode()).hexdigest(),
        },
        "schedule": schedule,
        "depth": depth,
        "width": width,
        "microbatch": microbatch,
        "microbatches_per_update": microbatches or depth,
        "extra_in_flight": extra,
        "inputs": [
            {"name": "tokens", "shape": [microbatch, 5], "dtype": "int64"},
            {"name": "labels", "shape": [microbatch], "dtype": "int64"},
        ],
        "tied": [{"names": ["wte.weight", "head.weight"], "stages": sorted({0, last})}] * tied,
        "stages": stages,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def _transfer(
    edge: tuple[str, int, int, tuple[int, ...], str, bool], peer: int
) -> dict[str, object]:
    tensor, _, _, shape, dtype, gradient = edge
    return {
        "tensor": tensor,
        "peer": peer,
        "shape": list(shape),
        "dtype": dtype,
        "bytes": 0,
        "gradient": gradient,
    }
