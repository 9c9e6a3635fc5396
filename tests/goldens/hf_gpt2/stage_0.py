"""Stage 0 of 2: GPT2LMHeadModel on rank 0.

transformer.wte, transformer.wpe, transformer.drop, transformer.h.0.ln_1, transformer.h.0.attn,
transformer.h.0.ln_2, transformer.h.0.mlp.c_fc

parameters  11.1 k
forward     196 us, 590 kFLOP
backward    101 us, 1.18 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB
            = weights 87.0 KiB + gradients 43.5 KiB + optimizer 87.0 KiB + stash 291 KiB +
            buffers 108 KiB + transient 48.0 KiB + reserve 1004 MiB

sends       transformer_expand_3: bool[2, 1, 16, 16], 512 B to stage 1
sends       transformer_h_0_add: f32[2, 16, 32], 4.00 KiB to stage 1
sends       transformer_h_0_mlp_act_mul: f32[2, 16, 128], 16.0 KiB to stage 1
sends       transformer_h_0_mlp_act_tanh: f32[2, 16, 128], 16.0 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_gpt2.py:tiny.
Imports only torch; yours to read, change and run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv1D(nn.Module):
    """transformer.h.0.attn.c_attn, transformer.h.0.attn.c_proj and 1 more
    (pytorch_utils.py:119).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.bias = nn.Parameter(torch.empty(size))
        self.weight = nn.Parameter(torch.empty(32, size))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, 32), self.weight)
        return y.view(2, 16, self.size)


class GPT2Attention(nn.Module):
    """transformer.h.0.attn (pytorch_utils.py:119)."""

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
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=0.1,
            scale=0.3535533905932738,
        )
        y = y.reshape(2, -1, 16, 8).transpose(1, 2).contiguous().reshape(2, 16, -1)
        return self.resid_dropout(self.c_proj(y))


class NewGELUActivationHead(nn.Module):
    """The beginning of transformer.h.0.mlp.act (activations.py:66)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 0.5  # f32[2, 16, 128]
        x = ((x + x**3.0 * 0.044715) * 0.7978845608028654).tanh()
        return y, x


class GPT2MLPHead(nn.Module):
    """The beginning of transformer.h.0.mlp (pytorch_utils.py:119)."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = Conv1D(size=128)
        self.act = NewGELUActivationHead()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.act(self.c_fc(x))  # f32[2, 16, 128] each
        return x, y


class GPT2BlockHead(nn.Module):
    """The beginning of transformer.h.0 (modeling_gpt2.py:273)."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(32)
        self.attn = GPT2Attention()
        self.ln_2 = nn.LayerNorm(32)
        self.mlp = GPT2MLPHead()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.attn(self.ln_1(x), mask) + x  # f32[2, 16, 32]
        y, z = self.mlp(self.ln_2(x))  # f32[2, 16, 128] each
        return x, y, z


class GPT2ModelHead(nn.Module):
    """The beginning of transformer (modeling_gpt2.py:547)."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(64, 32)
        self.wpe = nn.Embedding(16, 32)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList([GPT2BlockHead()])

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wte = self.wte(input_ids.view(-1, 16))  # f32[2, 16, 32]
        positions = (torch.arange(16, device=input_ids.device) + 0).unsqueeze(0)  # i64[1, 16]
        x = wte + self.wpe(positions)  # f32[2, 16, 32]
        positions2 = positions.expand(2, -1)  # i64[2, 16]
        sums = (positions2.diff(prepend=positions2[:, :1] - 1) != 1).cumsum(-1)
        positions = positions.expand(2, -1)
        positions2 = torch.arange(2, device=input_ids.device)  # i64[2]
        positions3 = torch.arange(16, device=input_ids.device) + 0  # i64[16]
        positions4 = torch.arange(16, device=input_ids.device) + 0
        positions2 = positions2.unsqueeze(1).unsqueeze(2).unsqueeze(3)  # i64[2, 1, 1, 1]
        positions3 = positions3.unsqueeze(0).unsqueeze(1).unsqueeze(3)  # i64[1, 1, 16, 1]
        positions4 = positions4.unsqueeze(0).unsqueeze(1).unsqueeze(2)  # i64[1, 1, 1, 16]
        mask = positions3.new_ones((), dtype=torch.bool)  # bool[]
        mask = mask & (sums[positions2, positions3] == sums[positions2, positions4])
        positions3 = positions[positions2, positions3]  # i64[2, 1, 16, 1]
        positions = positions[positions2, positions4]  # i64[2, 1, 1, 16]
        mask = (mask & (positions <= positions3)).expand(2, -1, 16, 16)  # bool[2, 1, 16, 16]
        x, y, z = self.h[0](self.drop(x), mask)
        return mask, x, y, z


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = GPT2ModelHead()

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (
            transformer_expand_3,
            transformer_h_0_add,
            transformer_h_0_mlp_act_mul,
            transformer_h_0_mlp_act_tanh,
        ) = self.transformer(input_ids)
        return (
            transformer_expand_3,
            transformer_h_0_add,
            transformer_h_0_mlp_act_mul,
            transformer_h_0_mlp_act_tanh,
        )
