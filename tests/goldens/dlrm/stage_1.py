"""Stage 1 of 2: DLRM on rank 1.

bottom.5, top, score, loss

parameters  1.50 k
forward     60.0 us, 7.39 kFLOP
backward    55.0 us, 14.8 kFLOP, busy 100.0 % of the period
memory      1004 MiB of 16.0 GiB = weights 11.8 KiB + gradients 5.88 KiB + stash 1.88 KiB +
            buffers 1.38 KiB + transient 23.1 KiB + reserve 1004 MiB

receives    bottom_4: f32[2, 8], 64 B from stage 0
receives    tables_0: f32[2, 8], 64 B from stage 0
receives    tables_1: f32[2, 8], 64 B from stage 0
receives    tables_2: f32[2, 8], 64 B from stage 0
receives    tables_3: f32[2, 8], 64 B from stage 0
receives    tables_4: f32[2, 8], 64 B from stage 0
receives    tables_5: f32[2, 8], 64 B from stage 0

Written by p2bw 0.1.0 from examples/dlrm.py:tiny. Imports only torch; yours to change.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(OrderedDict([("5", nn.ReLU())]))
        self.top = nn.Sequential(nn.Linear(29, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.score = nn.Linear(16, 1)

    def forward(
        self,
        clicked: Tensor,
        bottom_4: Tensor,
        tables_0: Tensor,
        tables_1: Tensor,
        tables_2: Tensor,
        tables_3: Tensor,
        tables_4: Tensor,
        tables_5: Tensor,
    ) -> Tensor:
        bottom = self.bottom(bottom_4)  # f32[2, 8]
        x = torch.stack((bottom, tables_0, tables_1, tables_2, tables_3, tables_4, tables_5), dim=1)
        scores = x @ x.transpose(1, 2)  # f32[2, 7, 7]
        index, index2 = torch.tril_indices(7, 7, -1, device=clicked.device).unbind()  # i64[21] each
        top = self.top(torch.cat((bottom, scores[:, index, index2]), dim=1))  # f32[2, 16]
        return F.binary_cross_entropy_with_logits(self.score(top).squeeze(1), clicked)  # f32[]
