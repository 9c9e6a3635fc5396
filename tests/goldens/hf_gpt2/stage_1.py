"""Stage 1 of 2: GPT2LMHeadModel on rank 1.

transformer.h.0.mlp.c_proj, transformer.h.0.mlp.dropout, transformer.h.1, transformer.ln_f, lm_head,
loss

parameters  18.9 k
forward     141 us, 1.25 MFLOP
backward    146 us, 2.49 MFLOP, busy 96.9 % of the period
memory      1004 MiB of 16.0 GiB = weights 148 KiB + gradients 74.0 KiB + optimizer 148 KiB +
            stash 203 KiB + buffers 125 KiB + transient 59.5 KiB + reserve 1004 MiB

receives    mask: bool[2, 1, 16, 16], 512 B from stage 0
receives    h_0_add: f32[2, 16, 32], 4.00 KiB from stage 0
receives    h_0_mlp_act_mul_3: f32[2, 16, 128], 16.0 KiB from stage 0
receives    h_0_mlp_act_tanh: f32[2, 16, 128], 16.0 KiB from stage 0

Written by p2bw 0.1.0 from examples/hf_gpt2.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv1D(nn.Module):  # transformer.h.0.mlp.c_proj and 4 more (pytorch_utils.py:119)
    def __init__(self, size: int, size2: int) -> None:
        super().__init__()
        self.size = size
        self.size2 = size2
        self.bias = nn.Parameter(torch.empty(size2))
        self.weight = nn.Parameter(torch.empty(size, size2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, self.size), self.weight)
        return y.view(2, 16, self.size2)


class GPT2BlockTail(nn.Module):  # the end of transformer.h.0 (activations.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.c_proj = Conv1D(size=128, size2=32)
        self.mlp.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
        return x3 + self.mlp.dropout(self.mlp.c_proj(x2 * (x + 1.0)))  # f32[2, 16, 32]


class GPT2Attention(nn.Module):  # transformer.h.1.attn (pytorch_utils.py:119)
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(size=32, size2=96)
        self.c_proj = Conv1D(size=32, size2=32)
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


class NewGELUActivation(nn.Module):  # transformer.h.1.mlp.act (activations.py:66)
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (((x + x**3.0 * 0.044715) * 0.7978845608028654).tanh() + 1.0)


class GPT2MLP(nn.Module):  # transformer.h.1.mlp (pytorch_utils.py:119)
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = Conv1D(size=32, size2=128)
        self.act = NewGELUActivation()
        self.c_proj = Conv1D(size=128, size2=32)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))  # f32[2, 16, 32]


class GPT2Block(nn.Module):  # transformer.h.1 (modeling_gpt2.py:276)
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(32)
        self.attn = GPT2Attention()
        self.ln_2 = nn.LayerNorm(32)
        self.mlp = GPT2MLP()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attn(self.ln_1(x), mask) + x  # f32[2, 16, 32]
        return x + self.mlp(self.ln_2(x))


class GPT2ModelTail(nn.Module):  # the end of transformer (activations.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([GPT2BlockTail(), GPT2Block()])
        self.ln_f = nn.LayerNorm(32)

    def forward(self, x: Tensor, x2: Tensor, x3: Tensor, mask: Tensor) -> Tensor:
        x = self.h[0](x, x2, x3)  # f32[2, 16, 32]
        return self.ln_f(self.h[1](x, mask))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = GPT2ModelTail()
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(
        self,
        labels: Tensor,
        mask: Tensor,
        h_0_add: Tensor,
        h_0_mlp_act_mul_3: Tensor,
        h_0_mlp_act_tanh: Tensor,
    ) -> Tensor:
        transformer = self.transformer(h_0_mlp_act_tanh, h_0_mlp_act_mul_3, h_0_add, mask)
        lm_head = self.lm_head(transformer).flatten(0, 1)  # f32[32, 64]
        return F.cross_entropy(lm_head, labels.flatten())  # f32[]
