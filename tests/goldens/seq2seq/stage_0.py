"""Stage 0 of 2: Seq2Seq on rank 0.

encoder, decoder.embed, decoder.first

parameters  10.2 k
forward     100 us, 1.52 MFLOP
backward    61.1 us, 3.02 MFLOP, busy 99.7 % of the period
memory      1005 MiB of 16.0 GiB = weights 80.0 KiB + gradients 40.0 KiB + optimizer 80.0 KiB +
            stash 1.54 MiB + buffers 30.8 KiB + transient 87.1 KiB + reserve 1004 MiB

sends       encoder: f32[2, 50, 16], 6.25 KiB to stage 1
sends       first: f32[2, 48, 16], 6.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/seq2seq.py:tiny. Imports only torch; yours to change.
"""

from torch import Tensor, nn


class Encoder(nn.Module):  # encoder (seq2seq.py:27)
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.drop = nn.Dropout(0.2)
        self.first = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
        self.rest = nn.ModuleList(nn.LSTM(16, 16, batch_first=True) for _ in range(2))

    def forward(self, source: Tensor) -> Tensor:
        first, _ = self.first(self.drop(self.embed(source)))  # f32[2, 50, 16]
        x, _ = self.rest[0](self.drop(first))
        x = first + x
        y, _ = self.rest[1](self.drop(x))
        return x + y


class DecoderHead(nn.Module):  # the beginning of decoder (seq2seq.py:49)
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.drop = nn.Dropout(0.2)
        self.first = nn.LSTM(16, 16, batch_first=True)

    def forward(self, target: Tensor) -> Tensor:
        first, _ = self.first(self.drop(self.embed(target)))  # f32[2, 48, 16]
        return first


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = DecoderHead()

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(source), self.decoder(target)
