"""Stage 0 of 2: GPT2LMHeadModel on rank 0.

transformer.wte, transformer.wpe, transformer.drop, transformer.h.0.ln_1, transformer.h.0.attn,
transformer.h.0.ln_2, transformer.h.0.mlp.c_fc

parameters  11.1 k
forward     196 us, 590 kFLOP
backward    101 us, 1.18 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB = weights 87.0 KiB + gradients 43.5 KiB + optimizer 87.0 KiB +
            stash 208 KiB + buffers 96.5 KiB + transient 130 KiB + reserve 1004 MiB

sends       mask: bool[2, 1, 16, 16], 512 B to stage 1
sends       h_0_add: f32[2, 16, 32], 4.00 KiB to stage 1
sends       h_0_mlp_act_mul_3: f32[2, 16, 128], 16.0 KiB to stage 1
sends       h_0_mlp_act_tanh: f32[2, 16, 128], 16.0 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_gpt2.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv1D(nn.Module):  # transformer.h.0.attn.c_attn and 2 more (pytorch_utils.py:119)
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.bias = nn.Parameter(torch.empty(size))
        self.weight = nn.Parameter(torch.empty(32, size))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, 32), self.weight)
        return y.view(2, 16, self.size)


class GPT2Attention(nn.Module):  # transformer.h.0.attn (pytorch_utils.py:119)
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(size=96)
        self.c_proj = Conv1D(size=32)
        self.resid_dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(32, dim=2)  # f32[2, 16, 32] each
        k = k.view(2, 16, -1, 8).transpose(1, 2)  # f32[2, 4, 16, 8]
        v = v.view(2, 16, -1, 8).transpose(1, 2)
        q = q.view(2, 16, -1, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=0.1, scale=0.3535533905932738
        )
        c_proj = self.c_proj(y.transpose(1, 2).contiguous().reshape(2, 16, -1))  # f32[2, 16, 32]
        return self.resid_dropout(c_proj)


class GPT2BlockHead(nn.Module):  # the beginning of transformer.h.0 (modeling_gpt2.py:276)
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(32)
        self.attn = GPT2Attention()
        self.ln_2 = nn.LayerNorm(32)
        self.mlp = nn.Module()
        self.mlp.c_fc = Conv1D(size=128)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.attn(self.ln_1(x), mask) + x  # f32[2, 16, 32]
        c_fc = self.mlp.c_fc(self.ln_2(x))  # f32[2, 16, 128]
        y = c_fc * 0.5
        return x, y, ((c_fc + c_fc**3.0 * 0.044715) * 0.7978845608028654).tanh()


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(64, 32)
        self.transformer.wpe = nn.Embedding(16, 32)
        self.transformer.drop = nn.Dropout(0.1)
        self.transformer.h = nn.ModuleList([GPT2BlockHead()])

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wte = self.transformer.wte(input_ids)  # f32[2, 16, 32]
        positions = torch.arange(16, device=input_ids.device).unsqueeze(0)  # i64[1, 16]
        x = wte + self.transformer.wpe(positions)  # f32[2, 16, 32]
        positions2 = positions.expand(2, -1)  # i64[2, 16]
        sums = (positions2.diff(prepend=positions2[:, :1] - 1) != 1).cumsum(-1)
        positions = positions.expand(2, -1)
        positions2 = torch.arange(16, device=input_ids.device)  # i64[16]
        positions3 = torch.arange(16, device=input_ids.device)
        batch = torch.arange(2, device=input_ids.device)[:, None, None, None]  # i64[2, 1, 1, 1]
        rows = positions2[None, None, :, None]  # i64[1, 1, 16, 1]
        columns = positions3[None, None, None]  # i64[1, 1, 1, 16]
        positions2 = positions[batch, rows]  # i64[2, 1, 16, 1]
        positions = positions[batch, columns]  # i64[2, 1, 1, 16]
        mask = (positions <= positions2) & (sums[batch, rows] == sums[batch, columns])
        x, y, z = self.transformer.h[0](self.transformer.drop(x), mask)
        return mask, x, y, z
