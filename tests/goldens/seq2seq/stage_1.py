"""Stage 1 of 2: Seq2Seq on rank 1.

decoder.query, decoder.rest.0-1, decoder.head, loss

parameters  7.74 k
forward     90.5 us, 1.73 MFLOP
backward    71.1 us, 3.46 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB = weights 60.5 KiB + gradients 30.2 KiB + optimizer 60.5 KiB +
            stash 394 KiB + buffers 36.8 KiB + transient 64.6 KiB + reserve 1004 MiB

receives    encoder: f32[2, 50, 16], 6.25 KiB from stage 0
receives    first: f32[2, 48, 16], 6.00 KiB from stage 0

Written by p2bw 0.1.0 from examples/seq2seq.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecoderTail(nn.Module):  # the end of decoder (seq2seq.py:50)
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 16, bias=False)
        self.drop = nn.Dropout(0.2)
        self.rest = nn.ModuleList(nn.LSTM(32, 16, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 64)

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        scores = F.softmax(self.query(x) @ x2.transpose(1, 2), dim=-1) @ x2  # f32[2, 48, 16]
        y, _ = self.rest[0](torch.cat((self.drop(x), scores), dim=-1))
        x = x + y
        y, _ = self.rest[1](torch.cat((self.drop(x), scores), dim=-1))
        return self.head(x + y)  # f32[2, 48, 64]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = DecoderTail()

    def forward(self, labels: Tensor, encoder: Tensor, first: Tensor) -> Tensor:
        decoder = self.decoder(first, encoder).flatten(0, 1)  # f32[96, 64]
        return F.cross_entropy(decoder, labels.flatten(), label_smoothing=0.1)  # f32[]
