"""ResNet (arXiv:1512.03385) with batch normalisation, whose running statistics are state.

p2bw compile examples/resnet.py --gpus 4                         # ResNet-50
p2bw compile examples/resnet.py:resnet152 --gpus 8 --microbatch 16
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, and the input added back."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = 4 * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, depths: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
                bn=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        blocks: list[nn.Module] = []
        channels = width
        for level, depth in enumerate(depths):  # each level halves the image and doubles the width
            for i in range(depth):
                stride = 2 if level > 0 and i == 0 else 1
                blocks.append(Bottleneck(channels, width << level, stride))
                channels = 4 * (width << level)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)  # (B, width, size/4, size/4)
        x = self.blocks(x)  # (B, channels, size/32, size/32)
        return self.fc(x.mean(dim=(2, 3)))  # (B, classes)


# `inputs` and `targets` are not told which factory built the model: it leaves here what they need.
sample: tuple[int, int]  # (image size, classes)


def _build(depths: tuple[int, ...], width: int, size: int, classes: int) -> ResNet:
    global sample
    sample = (size, classes)
    return ResNet(depths, width, classes)


def model(width: int = 64, size: int = 224, classes: int = 1000) -> ResNet:
    """ResNet-50, 25.6M parameters."""
    return _build((3, 4, 6, 3), width, size, classes)


def resnet152(width: int = 64, size: int = 224, classes: int = 1000) -> ResNet:
    """ResNet-152, 60.2M parameters."""
    return _build((3, 8, 36, 3), width, size, classes)


def tiny(width: int = 8, size: int = 32, classes: int = 10) -> ResNet:
    return _build((1, 1, 1), width, size, classes)


def inputs(batch_size: int) -> tuple[Tensor, ...]:
    size, _ = sample
    return (torch.randn(batch_size, 3, size, size),)


def targets(batch_size: int) -> tuple[Tensor, ...]:
    _, classes = sample
    return (torch.randint(classes, (batch_size,)),)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
