"""Stage 1 of 2: DenseNet on rank 1.

blocks.1.layers.1.norm2, blocks.1.layers.1.conv2, blocks.1.layers.2, transitions.1, blocks.2, norm,
classifier, loss

parameters  13.5 k
forward     220 us, 511 kFLOP
backward    175 us, 1.02 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB = weights 106 KiB + gradients 52.8 KiB + optimizer 52.8 KiB +
            stash 51.3 KiB + buffers 23.3 KiB + transient 58.7 KiB + reserve 1004 MiB

receives    transitions_0: f32[2, 16, 4, 4], 2.00 KiB from stage 0
receives    blocks_1_layers_0: f32[2, 8, 4, 4], 1.00 KiB from stage 0
receives    blocks_1_layers_1_conv1: f32[2, 32, 4, 4], 4.00 KiB from stage 0

Written by p2bw 0.1.0 from examples/densenet.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayerTail(nn.Module):  # the end of blocks.1.layers.1 (densenet.py:26)
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm2(x)))  # f32[2, 8, 4, 4]


class DenseLayer(nn.Module):  # blocks.1.layers.2 and 1 more (densenet.py:25)
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_features)
        self.conv1 = nn.Conv2d(num_features, 32, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseBlockTail(nn.Module):  # the end of blocks.1 (densenet.py:26)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"1": DenseLayerTail(), "2": DenseLayer(num_features=32)})

    def forward(self, x: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
        x = self.layers["1"](x)  # f32[2, 8, 4, 4]
        y = self.layers["2"](torch.cat((x2, x3, x), dim=1))
        return torch.cat((x2, x3, x, y), dim=1)  # f32[2, 40, 4, 4]


class DenseBlock(nn.Module):  # blocks.2 (densenet.py:39)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DenseLayer(num_features=20), DenseLayer(num_features=28)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](torch.cat((x,), dim=1))  # f32[2, 8, 2, 2]
        return torch.cat((x, y, self.layers[1](torch.cat((x, y), dim=1))), dim=1)


class Transition(nn.Module):  # transitions.1 (densenet.py:84)
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(40)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(40, 20, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.relu(self.norm(x))))  # f32[2, 20, 2, 2]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"1": DenseBlockTail(), "2": DenseBlock()})
        self.transitions = nn.ModuleDict({"1": Transition()})
        self.norm = nn.BatchNorm2d(36)
        self.classifier = nn.Linear(36, 10)

    def forward(
        self,
        labels: Tensor,
        transitions_0: Tensor,
        blocks_1_layers_0: Tensor,
        blocks_1_layers_1_conv1: Tensor,
    ) -> Tensor:
        x = self.blocks["1"](blocks_1_layers_1_conv1, transitions_0, blocks_1_layers_0)
        x = self.transitions["1"](x)  # f32[2, 20, 2, 2]
        classifier = self.classifier(F.relu(self.norm(self.blocks["2"](x))).mean((2, 3)))
        return F.cross_entropy(classifier, labels)  # f32[]
