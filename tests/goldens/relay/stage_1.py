"""Stage 1 of 3: UNet on rank 1.

bottom, widen.0, up.0, widen.1

parameters  93.8 k
forward     228 us, 2.92 MFLOP
backward    299 us, 5.83 MFLOP, busy 78.0 % of the period
memory      750 MiB of 16.0 GiB = weights 733 KiB + gradients 366 KiB + optimizer 733 KiB +
            stash 220 KiB + buffers 163 KiB + transient 294 KiB + reserve 748 MiB

receives    down_0: f32[2, 8, 16, 16], 16.0 KiB from stage 0
receives    down_1: f32[2, 16, 8, 8], 8.00 KiB from stage 0
receives    down_2: f32[2, 32, 4, 4], 4.00 KiB from stage 0
receives    max_pool2d: f32[2, 32, 2, 2], 1.00 KiB from stage 0
sends       down_0: f32[2, 8, 16, 16], 16.0 KiB passed on to stage 2
sends       down_1: f32[2, 16, 8, 8], 8.00 KiB passed on to stage 2
sends       widen_1: f32[2, 16, 8, 8], 8.00 KiB to stage 2

Written by p2bw 0.1.0 from examples/unet.py:tiny. Imports only torch; yours to change.
"""

import torch
from torch import Tensor, nn


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
        )
        self.widen = nn.ModuleList(
            [nn.ConvTranspose2d(64, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)]
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
            ]
        )

    def forward(
        self, down_0: Tensor, down_1: Tensor, down_2: Tensor, max_pool2d: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.cat((down_2, self.widen[0](self.bottom(max_pool2d))), dim=1)  # f32[2, 64, 4, 4]
        x = self.up[0](x)  # f32[2, 32, 4, 4]
        # down_0, down_1: passed on to the next stage as received
        return down_0, down_1, self.widen[1](x)
