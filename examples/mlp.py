"""The smallest useful model file: a multilayer perceptron.

p2bw compile examples/mlp.py --gpus 4
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES = 784, 10


class MLP(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))  # (B, width)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.last(x)  # (B, CLASSES)


def model(layers: int = 16, width: int = 8192) -> MLP:
    """1.1B parameters."""
    return MLP(layers, width)


def tiny(layers: int = 4, width: int = 32) -> MLP:
    return MLP(layers, width)


def inputs(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch_size, FEATURES),)


def targets(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(CLASSES, (batch_size,)),)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)
