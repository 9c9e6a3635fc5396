"""Stage 0 of 2: UNet on rank 0.

down.0-2, bottom.0-4

parameters  74.1 k
forward     131 us, 3.47 MFLOP
backward    132 us, 6.71 MFLOP, busy 95.7 % of the period
memory      1006 MiB of 16.0 GiB = weights 579 KiB + gradients 289 KiB + optimizer 579 KiB +
            stash 612 KiB + buffers 62.0 KiB + transient 260 KiB + reserve 1004 MiB

sends       down_0: f32[2, 8, 16, 16], 16.0 KiB to stage 1
sends       down_1: f32[2, 16, 8, 8], 8.00 KiB to stage 1
sends       down_2: f32[2, 32, 4, 4], 4.00 KiB to stage 1
sends       bottom_4: f32[2, 64, 2, 2], 2.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/unet.py:tiny. Imports only torch; yours to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3, 8, 3, padding=1),
                    nn.GroupNorm(8, 8),
                    nn.SiLU(),
                    nn.Conv2d(8, 8, 3, padding=1),
                    nn.GroupNorm(8, 8),
                    nn.SiLU(),
                ),
                nn.Sequential(
                    nn.Conv2d(8, 16, 3, padding=1),
                    nn.GroupNorm(8, 16),
                    nn.SiLU(),
                    nn.Conv2d(16, 16, 3, padding=1),
                    nn.GroupNorm(8, 16),
                    nn.SiLU(),
                ),
                nn.Sequential(
                    nn.Conv2d(16, 32, 3, padding=1),
                    nn.GroupNorm(8, 32),
                    nn.SiLU(),
                    nn.Conv2d(32, 32, 3, padding=1),
                    nn.GroupNorm(8, 32),
                    nn.SiLU(),
                ),
            ]
        )
        self.bottom = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.down[0](image)  # f32[2, 8, 16, 16]
        y = self.down[1](F.max_pool2d(x, 2))  # f32[2, 16, 8, 8]
        z = self.down[2](F.max_pool2d(y, 2))  # f32[2, 32, 4, 4]
        return x, y, z, self.bottom(F.max_pool2d(z, 2))
