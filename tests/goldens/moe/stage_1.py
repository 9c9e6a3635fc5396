"""Stage 1 of 2: Mixture on rank 1.

h.2-3, norm, head, loss

parameters  61.9 k
forward     586 us, 2.51 MFLOP
backward    1.30 ms, 5.01 MFLOP, busy 99.7 % of the period
memory      1005 MiB of 16.0 GiB = weights 483 KiB + gradients 242 KiB + optimizer 483 KiB +
            stash 291 KiB + buffers 12.0 KiB + transient 124 KiB + reserve 1004 MiB

opaque      h.2-3.moe: moe.MoE as it is, not traced, its costs counted in a run: moe.py:76: the
            model decides by the values in a tensor

receives    h_1: f32[2, 16, 32], 4.00 KiB from stage 0

Written by p2bw 0.1.0 from examples/moe.py:tiny. Imports torch, and p2bw for your own modules; yours
to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from p2bw import opaque


class Attention(nn.Module):  # h.2-3.attn (moe.py:43)
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96, bias=False)
        self.proj = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.proj(y.reshape(2, 16, 32))  # f32[2, 16, 32]


class Block(nn.Module):  # h.2-3 (moe.py:92)
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
        self.h = nn.ModuleDict({"2": Block(moe_path="h.2.moe"), "3": Block(moe_path="h.3.moe")})
        self.norm = nn.RMSNorm(32)
        self.head = nn.Linear(32, 128, bias=False)

    def forward(self, labels: Tensor, h_1: Tensor) -> Tensor:
        x = h_1
        for block in self.h.values():
            x = block(x)  # f32[2, 16, 32]
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())  # f32[]
