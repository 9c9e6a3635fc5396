"""Stage 1 of 2: T5ForConditionalGeneration on rank 1.

decoder.block.0.layer.0.SelfAttention.v,
decoder.block.0.layer.0.SelfAttention.relative_attention_bias,
decoder.block.0.layer.0.SelfAttention.o and 14 more

parameters  20.8 k
forward     526 us, 819 kFLOP
backward    416 us, 1.64 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB = weights 162 KiB + gradients 81.2 KiB + optimizer 162 KiB +
            stash 135 KiB + buffers 137 KiB + transient 45.1 KiB + reserve 1004 MiB

receives    dropout: f32[2, 8, 32], 2.00 KiB from stage 0
receives    block_0_layer_0_layer_norm_mul: f32[2, 8, 32], 2.00 KiB from stage 0
receives    block_0_layer_0_SelfAttention_view_3: f32[2, 8, 4, 8], 2.00 KiB from stage 0
receives    block_0_layer_0_SelfAttention_view_2: f32[2, 8, 4, 8], 2.00 KiB from stage 0
receives    block_0_layer_0_SelfAttention_sub: i64[8, 8], 512 B from stage 0
receives    block_0_layer_1_EncDecAttention_view_2: f32[2, 32, 4, 8], 8.00 KiB from stage 0
receives    block_0_layer_1_EncDecAttention_view: f32[2, 32, 4, 8], 8.00 KiB from stage 0
receives    block_1_layer_1_EncDecAttention_view_2: f32[2, 32, 4, 8], 8.00 KiB from stage 0
receives    block_1_layer_1_EncDecAttention_view: f32[2, 32, 4, 8], 8.00 KiB from stage 0

Written by p2bw 0.1.0 from examples/hf_t5.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# the end of decoder.block.0.layer.0 (modeling_t5.py:306)
class T5LayerSelfAttentionTail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.SelfAttention = nn.Module()
        self.SelfAttention.v = nn.Linear(32, 32, bias=False)
        self.SelfAttention.relative_attention_bias = nn.Embedding(32, 4)
        self.SelfAttention.o = nn.Linear(32, 32, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(
        self, q: Tensor, k: Tensor, x: Tensor, x2: Tensor, x3: Tensor
    ) -> tuple[Tensor, Tensor]:
        q2 = q.transpose(1, 2)  # f32[2, 4, 8, 8]
        k = k.transpose(1, 2)
        v = self.SelfAttention.v(x).view(2, 8, -1, 8).transpose(1, 2)
        x = -torch.min(x2, torch.zeros_like(x2))  # i64[8, 8]
        mask = x < 16  # bool[8, 8]
        y = (x.to(torch.float32) / 16).log() / 2.0794415416798357 * 16  # f32[8, 8]
        index = y.to(torch.int64) + 16  # i64[8, 8]
        x = torch.where(mask, x, torch.min(index, torch.full_like(index, 31)))
        relative_attention_bias = self.SelfAttention.relative_attention_bias(x)  # f32[8, 8, 4]
        relative_attention_bias = relative_attention_bias.permute(2, 0, 1).unsqueeze(0)
        positions = torch.arange(8, device=q.device).unsqueeze(1)  # i64[8, 1]
        mask = positions >= torch.arange(8, device=q.device).unsqueeze(0)  # bool[8, 8]
        mask = mask.view(1, 1, 8, 8)  # bool[1, 1, 8, 8]
        x = torch.where(mask, relative_attention_bias, torch.finfo(torch.float32).min)
        x = x.contiguous()
        y = F.scaled_dot_product_attention(q2, k, v, attn_mask=x, dropout_p=0.1, scale=1.0)
        o = self.SelfAttention.o(y.transpose(1, 2).contiguous().reshape(2, 8, -1))  # f32[2, 8, 32]
        return relative_attention_bias, x3 + self.dropout(o)


class T5LayerNorm(nn.Module):  # decoder.block.0.layer.1-2.layer_norm and 2 more (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * ((x**2).mean(-1, keepdim=True) + 1e-06).rsqrt())  # f32[2, 8, 32]


# the beginning of decoder.block.0.layer.1 (modeling_t5.py:66)
class T5LayerCrossAttentionHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = T5LayerNorm()
        self.EncDecAttention = nn.Module()
        self.EncDecAttention.q = nn.Linear(32, 32, bias=False)
        self.EncDecAttention.o = nn.Linear(32, 32, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q = self.EncDecAttention.q(self.layer_norm(x)).view(2, 8, -1, 8)  # f32[2, 8, 4, 8]
        q = q.transpose(1, 2)  # f32[2, 4, 8, 8]
        k = k.transpose(1, 2)  # f32[2, 4, 32, 8]
        v = v.transpose(1, 2)
        zeros = torch.zeros(1, 4, 8, 32, dtype=torch.float32, device=x.device)  # f32[1, 4, 8, 32]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=zeros, dropout_p=0.1, scale=1.0)
        o = self.EncDecAttention.o(y.transpose(1, 2).contiguous().reshape(2, 8, -1))
        return zeros, x + self.dropout(o)


class T5DenseActDense(nn.Module):  # decoder.block.0-1.layer.2.DenseReluDense (modeling_t5.py:85)
    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(32, 64, bias=False)
        self.act = nn.ReLU()
        self.dropout = nn.Dropout(0.1)
        self.wo = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(self.act(self.wi(x))))  # f32[2, 8, 32]


class T5LayerFF(nn.Module):  # decoder.block.0-1.layer.2 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = T5LayerNorm()
        self.DenseReluDense = T5DenseActDense()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x)))  # f32[2, 8, 32]


class T5BlockTail(nn.Module):  # the end of decoder.block.0 (modeling_t5.py:306)
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [T5LayerSelfAttentionTail(), T5LayerCrossAttentionHead(), T5LayerFF()]
        )

    def forward(
        self, x: Tensor, x2: Tensor, x3: Tensor, x4: Tensor, x5: Tensor, x6: Tensor, x7: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        relative_attention_bias, x = self.layer[0](x, x2, x3, x4, x5)
        zeros, x = self.layer[1](x, x6, x7)
        return relative_attention_bias, zeros, self.layer[2](x)


class T5Attention(nn.Module):  # decoder.block.1.layer.0.SelfAttention (modeling_t5.py:306)
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32, bias=False)
        self.k = nn.Linear(32, 32, bias=False)
        self.v = nn.Linear(32, 32, bias=False)
        self.o = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, relative_attention_bias: Tensor) -> Tensor:
        q = self.q(x).view(2, 8, -1, 8).transpose(1, 2)  # f32[2, 4, 8, 8]
        k = self.k(x).view(2, 8, -1, 8).transpose(1, 2)
        v = self.v(x).view(2, 8, -1, 8).transpose(1, 2)
        positions = torch.arange(8, device=x.device).unsqueeze(1)  # i64[8, 1]
        mask = positions >= torch.arange(8, device=x.device).unsqueeze(0)  # bool[8, 8]
        mask = mask.view(1, 1, 8, 8)  # bool[1, 1, 8, 8]
        relative_attention_bias = torch.where(
            mask, relative_attention_bias, torch.finfo(torch.float32).min
        )  # f32[1, 4, 8, 8]
        relative_attention_bias = relative_attention_bias.contiguous()
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=relative_attention_bias, dropout_p=0.1, scale=1.0
        )  # f32[2, 4, 8, 8]
        return self.o(y.transpose(1, 2).contiguous().reshape(2, 8, -1))  # f32[2, 8, 32]


class T5LayerSelfAttention(nn.Module):  # decoder.block.1.layer.0 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = T5LayerNorm()
        self.SelfAttention = T5Attention()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, relative_attention_bias: Tensor) -> Tensor:
        self_attention = self.SelfAttention(self.layer_norm(x), relative_attention_bias)
        return x + self.dropout(self_attention)


# the beginning of decoder.block.1.layer.1 (modeling_t5.py:66)
class T5LayerCrossAttentionHead2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = T5LayerNorm()
        self.EncDecAttention = nn.Module()
        self.EncDecAttention.q = nn.Linear(32, 32, bias=False)
        self.EncDecAttention.o = nn.Linear(32, 32, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, zeros: Tensor) -> Tensor:
        q = self.EncDecAttention.q(self.layer_norm(x)).view(2, 8, -1, 8)  # f32[2, 8, 4, 8]
        q = q.transpose(1, 2)  # f32[2, 4, 8, 8]
        k = k.transpose(1, 2)  # f32[2, 4, 32, 8]
        v = v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=zeros, dropout_p=0.1, scale=1.0)
        o = self.EncDecAttention.o(y.transpose(1, 2).contiguous().reshape(2, 8, -1))
        return x + self.dropout(o)


class T5BlockHead(nn.Module):  # the beginning of decoder.block.1 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [T5LayerSelfAttention(), T5LayerCrossAttentionHead2(), T5LayerFF()]
        )

    def forward(
        self, x: Tensor, relative_attention_bias: Tensor, x2: Tensor, x3: Tensor, zeros: Tensor
    ) -> Tensor:
        x = self.layer[0](x, relative_attention_bias)  # f32[2, 8, 32]
        x = self.layer[1](x, x2, x3, zeros)
        return self.layer[2](x)


class T5StackTail(nn.Module):  # the end of decoder (modeling_t5.py:306)
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([T5BlockTail(), T5BlockHead()])
        self.final_layer_norm = T5LayerNorm()
        self.dropout = nn.Dropout(0.1)

    def forward(
        self,
        x: Tensor,
        x2: Tensor,
        x3: Tensor,
        x4: Tensor,
        x5: Tensor,
        x6: Tensor,
        x7: Tensor,
        x8: Tensor,
        x9: Tensor,
    ) -> Tensor:
        relative_attention_bias, zeros, x = self.block[0](x, x2, x3, x4, x5, x6, x7)
        x = self.block[1](x, relative_attention_bias, x8, x9, zeros)  # f32[2, 8, 32]
        return self.dropout(self.final_layer_norm(x))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = T5StackTail()
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(
        self,
        labels: Tensor,
        dropout: Tensor,
        block_0_layer_0_layer_norm_mul: Tensor,
        block_0_layer_0_SelfAttention_view_3: Tensor,
        block_0_layer_0_SelfAttention_view_2: Tensor,
        block_0_layer_0_SelfAttention_sub: Tensor,
        block_0_layer_1_EncDecAttention_view_2: Tensor,
        block_0_layer_1_EncDecAttention_view: Tensor,
        block_1_layer_1_EncDecAttention_view_2: Tensor,
        block_1_layer_1_EncDecAttention_view: Tensor,
    ) -> Tensor:
        decoder = self.decoder(
            block_0_layer_0_SelfAttention_view_3,
            block_0_layer_0_SelfAttention_view_2,
            block_0_layer_0_layer_norm_mul,
            block_0_layer_0_SelfAttention_sub,
            dropout,
            block_0_layer_1_EncDecAttention_view_2,
            block_0_layer_1_EncDecAttention_view,
            block_1_layer_1_EncDecAttention_view_2,
            block_1_layer_1_EncDecAttention_view,
        )  # f32[2, 8, 32]
        lm_head = self.lm_head(decoder * 0.1767766952966369).view(-1, 64)  # f32[16, 64]
        return F.cross_entropy(lm_head, labels.view(-1))  # f32[]
