"""Stage 1 of 2: ResNet on rank 1.

blocks.1.conv2, blocks.1.bn2, blocks.1.conv3, blocks.1.bn3, blocks.2, fc, loss

parameters  29.0 k
forward     140 us, 693 kFLOP
backward    111 us, 1.39 MFLOP, busy 99.8 % of the period
memory      1004 MiB of 16.0 GiB = weights 226 KiB + gradients 113 KiB + optimizer 113 KiB +
            stash 62.2 KiB + buffers 51.2 KiB + transient 74.4 KiB + reserve 1004 MiB

receives    blocks_1_relu: f32[2, 16, 8, 8], 8.00 KiB from stage 0
receives    blocks_1_downsample: f32[2, 64, 4, 4], 8.00 KiB from stage 0

Written by p2bw 0.1.0 from examples/resnet.py:tiny. Imports only torch; yours to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BottleneckTail(nn.Module):  # the end of blocks.1 (resnet.py:36)
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(16, 64, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        x = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x))))) + x2  # f32[2, 64, 4, 4]
        return self.relu(x)


class Bottleneck(nn.Module):  # blocks.2 (resnet.py:35)
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(64, 32, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 128, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
        self.downsample = nn.Sequential(
            nn.Conv2d(64, 128, 1, stride=2, bias=False), nn.BatchNorm2d(128)
        )

    def forward(self, x: Tensor) -> Tensor:
        conv2 = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(conv2)) + self.downsample(x))  # f32[2, 128, 2, 2]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"1": BottleneckTail(), "2": Bottleneck()})
        self.fc = nn.Linear(128, 10)

    def forward(self, labels: Tensor, blocks_1_relu: Tensor, blocks_1_downsample: Tensor) -> Tensor:
        x = self.blocks["1"](blocks_1_relu, blocks_1_downsample)  # f32[2, 64, 4, 4]
        fc = self.fc(self.blocks["2"](x).mean((2, 3)))  # f32[2, 10]
        return F.cross_entropy(fc, labels, label_smoothing=0.1)  # f32[]
