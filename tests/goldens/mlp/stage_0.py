"""Stage 0 of 2: MLP on rank 0.

first, hidden.0-1

parameters  27.2 k
forward     30.2 us, 109 kFLOP
backward    30.2 us, 117 kFLOP, busy 99.1 % of the period
memory      1004 MiB of 16.0 GiB = weights 213 KiB + gradients 106 KiB + optimizer 106 KiB +
            stash 20.6 KiB + buffers 512 B + transient 106 KiB + reserve 1004 MiB

sends       relu_3: f32[2, 32], 256 B to stage 1

Written by p2bw 0.1.0 from examples/mlp.py:tiny. Imports only torch; yours to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(784, 32)
        self.hidden = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden[0](F.relu(self.first(x))))  # f32[2, 32]
        return F.relu(self.hidden[1](x))  # relu_3: f32[2, 32]
