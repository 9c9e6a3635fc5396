"""Stage 1 of 2: UNet on rank 1.

bottom.5, widen.0, up.0, widen.1, up.1, widen.2, up.2, head, loss

parameters  47.5 k
forward     136 us, 5.73 MFLOP
backward    137 us, 11.5 MFLOP, busy 99.6 % of the period
memory      1005 MiB of 16.0 GiB = weights 371 KiB + gradients 185 KiB + optimizer 371 KiB +
            stash 269 KiB + buffers 118 KiB + transient 85.6 KiB + reserve 1004 MiB

receives    down_0: f32[2, 8, 16, 16], 16.0 KiB from stage 0
receives    down_1: f32[2, 16, 8, 8], 8.00 KiB from stage 0
receives    down_2: f32[2, 32, 4, 4], 4.00 KiB from stage 0
receives    bottom_4: f32[2, 64, 2, 2], 2.00 KiB from stage 0

Written by p2bw 0.1.0 from examples/unet.py:tiny. Imports only torch; yours to change.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(OrderedDict([("5", nn.SiLU())]))
        self.widen = nn.ModuleList(
            [
                nn.ConvTranspose2d(64, 32, 2, stride=2),
                nn.ConvTranspose2d(32, 16, 2, stride=2),
                nn.ConvTranspose2d(16, 8, 2, stride=2),
            ]
        )
        self.up = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(64, 32, 3, padding=1),
                    nn.GroupNorm(8, 32),
                    nn.SiLU(),
                    nn.Conv2d(32, 32, 3, padding=1),
                    nn.GroupNorm(8, 32),
                    nn.SiLU(),
                ),
                nn.Sequential(
                    nn.Conv2d(32, 16, 3, padding=1),
                    nn.GroupNorm(8, 16),
                    nn.SiLU(),
                    nn.Conv2d(16, 16, 3, padding=1),
                    nn.GroupNorm(8, 16),
                    nn.SiLU(),
                ),
                nn.Sequential(
                    nn.Conv2d(16, 8, 3, padding=1),
                    nn.GroupNorm(8, 8),
                    nn.SiLU(),
                    nn.Conv2d(8, 8, 3, padding=1),
                    nn.GroupNorm(8, 8),
                    nn.SiLU(),
                ),
            ]
        )
        self.head = nn.Conv2d(8, 4, 1)

    def forward(
        self, labels: Tensor, down_0: Tensor, down_1: Tensor, down_2: Tensor, bottom_4: Tensor
    ) -> Tensor:
        x = torch.cat((down_2, self.widen[0](self.bottom(bottom_4))), dim=1)  # f32[2, 64, 4, 4]
        x = self.up[0](x)  # f32[2, 32, 4, 4]
        x = torch.cat((down_1, self.widen[1](x)), dim=1)  # f32[2, 32, 8, 8]
        x = self.up[1](x)  # f32[2, 16, 8, 8]
        x = torch.cat((down_0, self.widen[2](x)), dim=1)  # f32[2, 16, 16, 16]
        return F.cross_entropy(self.head(self.up[2](x)), labels)  # f32[]
