"""Stage 0 of 2: DLRM on rank 0.

bottom.0-4, tables.0-5

parameters  3.51 k
forward     55.0 us, 4.22 kFLOP
backward    55.0 us, 6.78 kFLOP, busy 95.6 % of the period
memory      1004 MiB of 16.0 GiB = weights 27.4 KiB + gradients 13.7 KiB + stash 1.71 KiB +
            buffers 1.31 KiB + transient 32.3 KiB + reserve 1004 MiB

sends       bottom_4: f32[2, 8], 64 B to stage 1
sends       tables_0: f32[2, 8], 64 B to stage 1
sends       tables_1: f32[2, 8], 64 B to stage 1
sends       tables_2: f32[2, 8], 64 B to stage 1
sends       tables_3: f32[2, 8], 64 B to stage 1
sends       tables_4: f32[2, 8], 64 B to stage 1
sends       tables_5: f32[2, 8], 64 B to stage 1

Written by p2bw 0.1.0 from examples/dlrm.py:tiny. Imports only torch; yours to change.
"""

from torch import Tensor, nn


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(
            nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)
        )
        self.tables = nn.ModuleList(nn.Embedding(50, 8) for _ in range(6))

    def forward(self, dense: Tensor, sparse: Tensor) -> tuple[Tensor, ...]:
        bottom = self.bottom(dense)  # f32[2, 8]
        x = self.tables[0](sparse[:, 0])
        y = self.tables[1](sparse[:, 1])
        z = self.tables[2](sparse[:, 2])
        w = self.tables[3](sparse[:, 3])
        x2 = self.tables[4](sparse[:, 4])
        return bottom, x, y, z, w, x2, self.tables[5](sparse[:, 5])
