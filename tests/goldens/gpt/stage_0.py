"""Stage 0 of 2: GPT on rank 0.

wte, wpe, drop, h.0, h.1.ln_1, h.1.attn, h.1.ln_2, h.1.mlp

parameters  120 k
forward     156 us, 29.4 MFLOP
backward    165 us, 58.7 MFLOP, busy 97.0 % of the period
memory      1010 MiB of 16.0 GiB = weights 941 KiB + gradients 470 KiB + optimizer 941 KiB +
            stash 3.15 MiB + buffers 224 KiB + transient 375 KiB + reserve 1004 MiB

sends       h_1_add: f32[2, 64, 64], 32.0 KiB to stage 1
sends       h_1_mlp: f32[2, 64, 64], 32.0 KiB to stage 1

Written by p2bw 0.1.0 from examples/gpt.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):  # h.0-1.attn (gpt.py:51)
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


class MLP(nn.Module):  # h.0-1.mlp (gpt.py:71)
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 256)
        self.proj = nn.Linear(256, 64)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.proj(F.gelu(self.fc(x), approximate="tanh")))  # f32[2, 64, 64]


class Block(nn.Module):  # h.0 (gpt.py:83)
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(64)
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm(64)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # f32[2, 64, 64]
        return x + self.mlp(self.ln_2(x))


class BlockHead(nn.Module):  # the beginning of h.1 (gpt.py:83)
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(64)
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm(64)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(self.ln_1(x))  # f32[2, 64, 64]
        return x, self.mlp(self.ln_2(x))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(256, 64)
        self.wpe = nn.Embedding(64, 64)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList([Block(), BlockHead()])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(tokens) + self.wpe(torch.arange(64, device=tokens.device))  # f32[2, 64, 64]
        x = self.h[0](self.drop(x))
        return self.h[1](x)
