"""Stage 1 of 2: GPT on rank 1.

h.2-3, ln_f, head, loss

parameters  116 k
forward     156 us, 33.6 MFLOP
backward    172 us, 67.1 MFLOP, busy 99.1 % of the period
memory      1008 MiB of 16.0 GiB = weights 910 KiB + gradients 455 KiB + optimizer 910 KiB +
            stash 1.29 MiB + buffers 288 KiB + transient 353 KiB + reserve 1004 MiB

receives    h_1_add: f32[2, 64, 64], 32.0 KiB from stage 0
receives    h_1_mlp: f32[2, 64, 64], 32.0 KiB from stage 0

Written by p2bw 0.1.0 from examples/gpt.py:tiny. Imports only torch; yours to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):  # h.2-3.attn (gpt.py:51)
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.proj = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # f32[2, 64, 64] each
        q = q.view(2, 64, 4, 16).transpose(1, 2)  # f32[2, 4, 64, 16]
        k = k.view(2, 64, 4, 16).transpose(1, 2)
        v = v.view(2, 64, 4, 16).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
        return self.drop(self.proj(y.transpose(1, 2).reshape(2, 64, 64)))  # f32[2, 64, 64]


class MLP(nn.Module):  # h.2-3.mlp (gpt.py:71)
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 256)
        self.proj = nn.Linear(256, 64)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.proj(F.gelu(self.fc(x), approximate="tanh")))  # f32[2, 64, 64]


class Block(nn.Module):  # h.2-3 (gpt.py:83)
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(64)
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm(64)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # f32[2, 64, 64]
        return x + self.mlp(self.ln_2(x))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleDict({str(i): Block() for i in range(2, 4)})
        self.ln_f = nn.LayerNorm(64)
        self.head = nn.Linear(64, 256, bias=False)

    def forward(self, labels: Tensor, h_1_add: Tensor, h_1_mlp: Tensor) -> Tensor:
        x = h_1_add + h_1_mlp  # f32[2, 64, 64]
        for block in self.h.values():
            x = block(x)
        return F.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1), labels.flatten())  # f32[]
