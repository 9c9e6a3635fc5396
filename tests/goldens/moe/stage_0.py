"""Stage 0 of 2: Mixture on rank 0.

wte, wpe, h.0-1

parameters  62.3 k
forward     591 us, 2.24 MFLOP
backward    1.30 ms, 4.49 MFLOP, busy 99.9 % of the period
memory      1006 MiB of 16.0 GiB = weights 487 KiB + gradients 244 KiB + optimizer 487 KiB +
            stash 789 KiB + buffers 12.0 KiB + transient 190 KiB + reserve 1004 MiB

opaque      h.0-1.moe: moe.MoE as it is, not traced, its costs counted in a run: moe.py:76: the
            model decides by the values in a tensor

sends       h_1: f32[2, 16, 32], 4.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/moe.py:tiny. Imports torch, and p2bw for your own modules; yours
to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2bw import opaque


class Attention(nn.Module):  # h.0-1.attn (moe.py:43)
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96, bias=False)
        self.proj = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.proj(y.reshape(2, 16, 32))  # f32[2, 16, 32]


class Block(nn.Module):  # h.0-1 (moe.py:92)
    def __init__(self, moe_path: str) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(32)
        self.attn = Attention()
        self.norm_2 = nn.RMSNorm(32)
        self.moe = opaque(__file__, moe_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))  # f32[2, 16, 32]
        return x + self.moe(self.norm_2(x))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(128, 32)
        self.wpe = nn.Embedding(16, 32)
        self.h = nn.ModuleList([Block(moe_path="h.0.moe"), Block(moe_path="h.1.moe")])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(16, device=tokens.device))  # f32[2, 16, 32]
        for block in self.h:
            x = block(x)
        return x  # h_1: f32[2, 16, 32]
