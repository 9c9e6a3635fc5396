"""Stage 0 of 2: T5ForConditionalGeneration on rank 0.

encoder, decoder.embed_tokens, decoder.block.0.layer.0.layer_norm,
decoder.block.0.layer.0.SelfAttention.q, decoder.block.0.layer.0.SelfAttention.k and 4 more

parameters  24.9 k
forward     547 us, 3.21 MFLOP
backward    393 us, 6.42 MFLOP, busy 99.7 % of the period
memory      1005 MiB of 16.0 GiB = weights 194 KiB + gradients 97.2 KiB + optimizer 194 KiB +
            stash 1.02 MiB + buffers 125 KiB + transient 106 KiB + reserve 1004 MiB

sends       dropout: f32[2, 8, 32], 2.00 KiB to stage 1
sends       block_0_layer_0_layer_norm_mul: f32[2, 8, 32], 2.00 KiB to stage 1
sends       block_0_layer_0_SelfAttention_view_3: f32[2, 8, 4, 8], 2.00 KiB to stage 1
sends       block_0_layer_0_SelfAttention_view_2: f32[2, 8, 4, 8], 2.00 KiB to stage 1
sends       block_0_layer_0_SelfAttention_sub: i64[8, 8], 512 B to stage 1
sends       block_0_layer_1_EncDecAttention_view_2: f32[2, 32, 4, 8], 8.00 KiB to stage 1
sends       block_0_layer_1_EncDecAttention_view: f32[2, 32, 4, 8], 8.00 KiB to stage 1
sends       block_1_layer_1_EncDecAttention_view_2: f32[2, 32, 4, 8], 8.00 KiB to stage 1
sends       block_1_layer_1_EncDecAttention_view: f32[2, 32, 4, 8], 8.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_t5.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class T5LayerNorm(nn.Module):  # encoder.block.0.layer.0-1.layer_norm and 3 more (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * ((x**2).mean(-1, keepdim=True) + 1e-06).rsqrt())


class T5Attention(nn.Module):  # encoder.block.0.layer.0.SelfAttention (modeling_t5.py:306)
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32, bias=False)
        self.k = nn.Linear(32, 32, bias=False)
        self.v = nn.Linear(32, 32, bias=False)
        self.relative_attention_bias = nn.Embedding(32, 4)
        self.o = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).view(2, 32, -1, 8).transpose(1, 2)  # f32[2, 4, 32, 8]
        k = self.k(x).view(2, 32, -1, 8).transpose(1, 2)
        v = self.v(x).view(2, 32, -1, 8).transpose(1, 2)
        positions = torch.arange(32, dtype=torch.int64, device=x.device).unsqueeze(1)  # i64[32, 1]
        positions2 = torch.arange(32, dtype=torch.int64, device=x.device).unsqueeze(0)  # i64[1, 32]
        positions = positions2 - positions  # i64[32, 32]
        index = (positions > 0).to(torch.int64) * 16 + 0
        positions = positions.abs()
        mask = positions < 8  # bool[32, 32]
        x = (positions.to(torch.float32) / 8).log() / 2.772588722239781 * 8  # f32[32, 32]
        index2 = x.to(torch.int64) + 8  # i64[32, 32]
        index2 = torch.min(index2, torch.full_like(index2, 15))
        index += torch.where(mask, positions, index2)
        relative_attention_bias = self.relative_attention_bias(index).permute(2, 0, 1).unsqueeze(0)
        relative_attention_bias2 = relative_attention_bias.contiguous()
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=relative_attention_bias2, dropout_p=0.1, scale=1.0
        )  # f32[2, 4, 32, 8]
        o = self.o(y.transpose(1, 2).contiguous().reshape(2, 32, -1))  # f32[2, 32, 32]
        return relative_attention_bias, o


class T5LayerSelfAttention(nn.Module):  # encoder.block.0.layer.0 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = T5LayerNorm()
        self.SelfAttention = T5Attention()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        relative_attention_bias, o = self.SelfAttention(self.layer_norm(x))
        return relative_attention_bias, x + self.dropout(o)


class T5DenseActDense(nn.Module):  # encoder.block.0-1.layer.1.DenseReluDense (modeling_t5.py:85)
    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(32, 64, bias=False)
        self.act = nn.ReLU()
        self.dropout = nn.Dropout(0.1)
        self.wo = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(self.act(self.wi(x))))  # f32[2, 32, 32]


class T5LayerFF(nn.Module):  # encoder.block.0-1.layer.1 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = T5LayerNorm()
        self.DenseReluDense = T5DenseActDense()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x)))  # f32[2, 32, 32]


class T5Block(nn.Module):  # encoder.block.0 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(), T5LayerFF()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        relative_attention_bias, x = self.layer[0](x)
        return relative_attention_bias, self.layer[1](x)


class T5Attention2(nn.Module):  # encoder.block.1.layer.0.SelfAttention (modeling_t5.py:306)
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32, bias=False)
        self.k = nn.Linear(32, 32, bias=False)
        self.v = nn.Linear(32, 32, bias=False)
        self.o = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, relative_attention_bias: Tensor) -> Tensor:
        q = self.q(x).view(2, 32, -1, 8).transpose(1, 2)  # f32[2, 4, 32, 8]
        k = self.k(x).view(2, 32, -1, 8).transpose(1, 2)
        v = self.v(x).view(2, 32, -1, 8).transpose(1, 2)
        relative_attention_bias = relative_attention_bias.contiguous()  # f32[1, 4, 32, 32]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=relative_attention_bias, dropout_p=0.1, scale=1.0
        )  # f32[2, 4, 32, 8]
        return self.o(y.transpose(1, 2).contiguous().reshape(2, 32, -1))  # f32[2, 32, 32]


class T5LayerSelfAttention2(nn.Module):  # encoder.block.1.layer.0 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = T5LayerNorm()
        self.SelfAttention = T5Attention2()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, relative_attention_bias: Tensor) -> Tensor:
        self_attention = self.SelfAttention(self.layer_norm(x), relative_attention_bias)
        return x + self.dropout(self_attention)


class T5Block2(nn.Module):  # encoder.block.1 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention2(), T5LayerFF()])

    def forward(self, x: Tensor, relative_attention_bias: Tensor) -> Tensor:
        x = self.layer[0](x, relative_attention_bias)  # f32[2, 32, 32]
        return self.layer[1](x)


class T5Stack(nn.Module):  # encoder (modeling_t5.py:683)
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32)
        self.dropout = nn.Dropout(0.1)
        self.block = nn.ModuleList([T5Block(), T5Block2()])
        self.final_layer_norm = T5LayerNorm()

    def forward(self, input_ids: Tensor) -> Tensor:
        relative_attention_bias, x = self.block[0](self.dropout(self.embed_tokens(input_ids)))
        x = self.final_layer_norm(self.block[1](x, relative_attention_bias))  # f32[2, 32, 32]
        return self.dropout(x)


# the beginning of decoder.block.0.layer.0 (modeling_t5.py:66)
class T5LayerSelfAttentionHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = T5LayerNorm()
        self.SelfAttention = nn.Module()
        self.SelfAttention.q = nn.Linear(32, 32, bias=False)
        self.SelfAttention.k = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = self.layer_norm(x)  # f32[2, 8, 32]
        q = self.SelfAttention.q(y).view(2, 8, -1, 8)  # f32[2, 8, 4, 8]
        k = self.SelfAttention.k(y).view(2, 8, -1, 8)
        positions = torch.arange(8, dtype=torch.int64, device=x.device).unsqueeze(1)  # i64[8, 1]
        positions2 = torch.arange(8, dtype=torch.int64, device=x.device).unsqueeze(0)  # i64[1, 8]
        return y, q, k, positions2 - positions


# the middle of decoder.block.0-1.layer.1 (modeling_t5.py:327)
class T5LayerCrossAttentionMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.EncDecAttention = nn.Module()
        self.EncDecAttention.k = nn.Linear(32, 32, bias=False)
        self.EncDecAttention.v = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.EncDecAttention.k(x).view(2, 32, -1, 8)  # f32[2, 32, 4, 8]
        return k, self.EncDecAttention.v(x).view(2, 32, -1, 8)


class T5BlockHead(nn.Module):  # the beginning of decoder.block.0 (modeling_t5.py:66)
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttentionHead(), T5LayerCrossAttentionMiddle()])

    def forward(self, x: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        x, q, k, positions = self.layer[0](x)
        k2, v = self.layer[1](x2)  # f32[2, 32, 4, 8] each
        return x, q, k, positions, k2, v


class T5BlockMiddle(nn.Module):  # the middle of decoder.block.1 (modeling_t5.py:327)
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({"1": T5LayerCrossAttentionMiddle()})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer["1"](x)  # f32[2, 32, 4, 8] each


class T5StackHead(nn.Module):  # the beginning of decoder (modeling_t5.py:683)
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32)
        self.dropout = nn.Dropout(0.1)
        self.block = nn.ModuleList([T5BlockHead(), T5BlockMiddle()])

    def forward(self, zeros: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        embed_tokens = self.dropout(self.embed_tokens(zeros))  # f32[2, 8, 32]
        y, q, k, positions, k2, v = self.block[0](embed_tokens, x)
        k3, v2 = self.block[1](x)  # f32[2, 32, 4, 8] each
        return embed_tokens, y, q, k, positions, k2, v, k3, v2


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = T5Stack()
        self.decoder = T5StackHead()
        self.decoder.embed_tokens.weight = self.encoder.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder(input_ids)  # f32[2, 32, 32]
        zeros = labels.new_zeros(2, 8)  # i64[2, 8]
        zeros[:, 1:] = labels[:, :-1].clone()
        zeros[:, 0] = 0
        return self.decoder(zeros.masked_fill_(zeros == -100, 0), encoder)
