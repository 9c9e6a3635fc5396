"""DLRM (arXiv:1906.00091): a recommender with big tables, small layers and inputs by name.

p2bw compile examples/dlrm.py --gpus 8
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSE = 13  # features that are numbers, as in the Criteo data set; the others are table rows


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with a ReLU after each."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers)


class DLRM(nn.Module):
    def __init__(self, tables: int, rows: int, width: int, top: tuple[int, ...]) -> None:
        super().__init__()
        self.bottom = mlp((DENSE, 4 * width, 2 * width, width))
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        pairs = (tables + 1) * tables // 2
        self.top = mlp((width + pairs, *top))
        self.score = nn.Linear(top[-1], 1)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)  # (B, width)
        rows = [table(sparse[:, i]) for i, table in enumerate(self.tables)]
        features = torch.stack([x, *rows], dim=1)  # (B, N, width), N = tables + 1
        products = features @ features.transpose(1, 2)  # (B, N, N): every pair of features
        i, j = torch.tril_indices(features.shape[1], features.shape[1], offset=-1)
        x = torch.cat([x, products[:, i, j]], dim=1)  # (B, width + pairs)
        return self.score(self.top(x)).squeeze(1)  # (B,)


# `inputs` is not told which factory built the model: it leaves here what is needed.
sample: tuple[int, int]  # (tables, rows of each)


def _build(tables: int, rows: int, width: int, top: tuple[int, ...]) -> DLRM:
    global sample
    sample = (tables, rows)
    return DLRM(tables, rows, width, top)


def model(tables: int = 26, rows: int = 1_000_000, width: int = 128) -> DLRM:
    """3.3B parameters, nearly all of them in tables."""
    return _build(tables, rows, width, top=(1024, 1024, 512, 256))


def tiny(tables: int = 6, rows: int = 50, width: int = 8) -> DLRM:
    return _build(tables, rows, width, top=(32, 16))


def inputs(batch_size: int) -> dict[str, Tensor]:
    """Inputs by name: the arguments of `DLRM.forward`."""
    tables, rows = sample
    return {
        "dense": torch.randn(batch_size, DENSE),
        "sparse": torch.randint(rows, (batch_size, tables)),
    }


def targets(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(2, (batch_size,)).float(),)


def loss(scores: Tensor, clicked: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, clicked)


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)
