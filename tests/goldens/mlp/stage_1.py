"""Stage 1 of 2: MLP on rank 1.

hidden.2-3, last, loss

parameters  2.44 k
forward     30.0 us, 9.47 kFLOP
backward    30.0 us, 18.9 kFLOP, busy 98.7 % of the period
memory      1004 MiB of 16.0 GiB = weights 19.1 KiB + gradients 9.54 KiB + optimizer 9.54 KiB +
            stash 868 B + buffers 772 B + transient 13.2 KiB + reserve 1004 MiB

receives    relu_3: f32[2, 32], 256 B from stage 0

Written by p2bw 0.1.0 from examples/mlp.py:tiny. Imports only torch; yours to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleDict({str(i): nn.Linear(32, 32) for i in range(2, 4)})
        self.last = nn.Linear(32, 10)

    def forward(self, labels: Tensor, relu_3: Tensor) -> Tensor:
        x = F.relu(self.hidden["2"](relu_3))  # f32[2, 32]
        return F.cross_entropy(self.last(F.relu(self.hidden["3"](x))), labels)  # f32[]
