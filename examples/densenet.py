"""DenseNet (arXiv:1608.06993): every layer reads the outputs of all layers before it in its block.

p2bw compile examples/densenet.py --gpus 4                       # DenseNet-161
p2bw compile examples/densenet.py:densenet121 --gpus 4 --microbatch 16
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Makes `growth` new channels of all channels so far: 1x1 to four times as many, then 3x3."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(y)))


class DenseBlock(nn.Module):
    def __init__(self, layers: int, channels: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(channels + i * growth, growth) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return torch.cat(features, dim=1)  # (B, channels + layers * growth, H, W)


class Transition(nn.Sequential):
    """Half as many channels, and an image of half the size."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(),
                conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                pool=nn.AvgPool2d(2),
            )
        )


class DenseNet(nn.Module):
    def __init__(self, layers: tuple[int, ...], growth: int, classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for count in layers:
            if self.blocks:
                self.transitions.append(Transition(channels))
                channels //= 2
            self.blocks.append(DenseBlock(count, channels, growth))
            channels += count * growth
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)  # (B, 2 * growth, size/4, size/4)
        x = self.blocks[0](x)
        for transition, block in zip(self.transitions, self.blocks[1:], strict=True):
            x = block(transition(x))
        x = F.relu(self.norm(x))  # (B, channels, size/32, size/32)
        return self.classifier(x.mean(dim=(2, 3)))  # (B, classes)


# `inputs` and `targets` are not told which factory built the model: it leaves here what they need.
sample: tuple[int, int]  # (image size, classes)


def _build(layers: tuple[int, ...], growth: int, size: int, classes: int) -> DenseNet:
    global sample
    sample = (size, classes)
    return DenseNet(layers, growth, classes)


def model(growth: int = 48, size: int = 224, classes: int = 1000) -> DenseNet:
    """DenseNet-161, 28.7M parameters."""
    return _build((6, 12, 36, 24), growth, size, classes)


def densenet121(growth: int = 32, size: int = 224, classes: int = 1000) -> DenseNet:
    """DenseNet-121, 8.0M parameters."""
    return _build((6, 12, 24, 16), growth, size, classes)


def tiny(growth: int = 8, size: int = 32, classes: int = 10) -> DenseNet:
    return _build((2, 3, 2), growth, size, classes)


def inputs(batch_size: int) -> tuple[Tensor, ...]:
    size, _ = sample
    return (torch.randn(batch_size, 3, size, size),)


def targets(batch_size: int) -> tuple[Tensor, ...]:
    _, classes = sample
    return (torch.randint(classes, (batch_size,)),)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
