"""Stage 0 of 2: ResNet on rank 0.

stem, blocks.0, blocks.1.conv1, blocks.1.bn1, blocks.1.downsample

parameters  5.22 k
forward     141 us, 1.76 MFLOP
backward    106 us, 2.32 MFLOP, busy 98.1 % of the period
memory      1004 MiB of 16.0 GiB = weights 40.8 KiB + gradients 20.4 KiB + optimizer 20.4 KiB +
            stash 472 KiB + buffers 41.4 KiB + transient 92.6 KiB + reserve 1004 MiB

sends       blocks_1_relu: f32[2, 16, 8, 8], 8.00 KiB to stage 1
sends       blocks_1_downsample: f32[2, 64, 4, 4], 8.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/resnet.py:tiny. Imports only torch; yours to change.
"""

from torch import Tensor, nn


class Sequential(nn.Module):  # stem (resnet.py:63)
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.bn(self.conv(x))))  # f32[2, 8, 8, 8]


class Bottleneck(nn.Module):  # blocks.0 (resnet.py:35)
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 32, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.downsample = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32))

    def forward(self, x: Tensor) -> Tensor:
        conv2 = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(conv2)) + self.downsample(x))  # f32[2, 32, 8, 8]


class BottleneckHead(nn.Module):  # the beginning of blocks.1 (resnet.py:35)
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(32, 16, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(32, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.relu(self.bn1(self.conv1(x))), self.downsample(x)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Sequential()
        self.blocks = nn.ModuleList([Bottleneck(), BottleneckHead()])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks[0](self.stem(images))  # f32[2, 32, 8, 8]
        return self.blocks[1](x)
