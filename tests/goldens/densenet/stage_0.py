"""Stage 0 of 2: DenseNet on rank 0.

stem, blocks.0, transitions.0, blocks.1.layers.0, blocks.1.layers.1.norm1, blocks.1.layers.1.conv1

parameters  12.8 k
forward     216 us, 4.28 MFLOP
backward    172 us, 6.14 MFLOP, busy 98.1 % of the period
memory      1005 MiB of 16.0 GiB = weights 99.9 KiB + gradients 49.9 KiB + optimizer 49.9 KiB +
            stash 803 KiB + buffers 22.8 KiB + transient 79.7 KiB + reserve 1004 MiB

sends       transitions_0: f32[2, 16, 4, 4], 2.00 KiB to stage 1
sends       blocks_1_layers_0: f32[2, 8, 4, 4], 1.00 KiB to stage 1
sends       blocks_1_layers_1_conv1: f32[2, 32, 4, 4], 4.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/densenet.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sequential(nn.Module):  # stem (densenet.py:81)
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.norm(self.conv(x))))  # f32[2, 16, 8, 8]


class DenseLayer(nn.Module):  # blocks.0.layers.0-1 and 1 more (densenet.py:25)
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_features)
        self.conv1 = nn.Conv2d(num_features, 32, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseBlock(nn.Module):  # blocks.0 (densenet.py:39)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DenseLayer(num_features=16), DenseLayer(num_features=24)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](torch.cat((x,), dim=1))  # f32[2, 8, 8, 8]
        return torch.cat((x, y, self.layers[1](torch.cat((x, y), dim=1))), dim=1)


class DenseLayerHead(nn.Module):  # the beginning of blocks.1.layers.1 (densenet.py:25)
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(24)
        self.conv1 = nn.Conv2d(24, 32, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.norm1(x)))  # f32[2, 32, 4, 4]


class DenseBlockHead(nn.Module):  # the beginning of blocks.1 (densenet.py:39)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DenseLayer(num_features=16), DenseLayerHead()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers[0](torch.cat((x,), dim=1))  # f32[2, 8, 4, 4]
        return y, self.layers[1](torch.cat((x, y), dim=1))


class Transition(nn.Module):  # transitions.0 (densenet.py:84)
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(32, 16, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.relu(self.norm(x))))  # f32[2, 16, 4, 4]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Sequential()
        self.blocks = nn.ModuleList([DenseBlock(), DenseBlockHead()])
        self.transitions = nn.ModuleList([Transition()])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.blocks[0](self.stem(images))  # f32[2, 32, 8, 8]
        x = self.transitions[0](x)  # f32[2, 16, 4, 4]
        y, z = self.blocks[1](x)
        return x, y, z
