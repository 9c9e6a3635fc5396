"""Stage 0 of 2: LlamaForCausalLM on rank 0.

model.embed_tokens, model.rotary_emb, model.layers.0.input_layernorm, model.layers.0.self_attn,
model.layers.0.post_attention_layernorm, model.layers.0.mlp

parameters  14.4 k
forward     281 us, 852 kFLOP
backward    211 us, 1.70 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB = weights 112 KiB + gradients 56.2 KiB + optimizer 112 KiB +
            stash 276 KiB + buffers 20.5 KiB + transient 44.2 KiB + reserve 1004 MiB

sends       mask: bool[2, 1, 16, 16], 512 B to stage 1
sends       rotary_emb_cos: f32[1, 16, 8], 512 B to stage 1
sends       rotary_emb_sin: f32[1, 16, 8], 512 B to stage 1
sends       layers_0_add: f32[2, 16, 32], 4.00 KiB to stage 1
sends       layers_0_mlp: f32[2, 16, 32], 4.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_llama.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LlamaRotaryEmbedding(nn.Module):  # model.rotary_emb (modeling_llama.py:111)
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.zeros(4), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        x = positions.unsqueeze(2).to(torch.float32)  # f32[1, 16, 1]
        x = x * self.inv_freq.to(torch.float32)  # f32[1, 16, 4]
        x = torch.cat((x, x), dim=-1)  # f32[1, 16, 8]
        return x.cos(), x.sin()


class LlamaRMSNorm(nn.Module):  # model.layers.0.input_layernorm and 1 more (modeling_llama.py:65)
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * ((x**2).mean(-1, keepdim=True) + 1e-06).rsqrt())  # f32[2, 16, 32]


class LlamaAttention(nn.Module):  # model.layers.0.self_attn (modeling_llama.py:244)
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32, bias=False)
        self.k_proj = nn.Linear(32, 16, bias=False)
        self.v_proj = nn.Linear(32, 16, bias=False)
        self.o_proj = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q = self.q_proj(x).view(2, 16, -1, 8).transpose(1, 2)  # f32[2, 4, 16, 8]
        k = self.k_proj(x).view(2, 16, -1, 8).transpose(1, 2)  # f32[2, 2, 16, 8]
        v = self.v_proj(x).view(2, 16, -1, 8).transpose(1, 2)
        cos = cos.unsqueeze(1)  # f32[1, 1, 16, 8]
        sin = sin.unsqueeze(1)
        q = q * cos + torch.cat((-q[..., 4:], q[..., :4]), dim=-1) * sin  # f32[2, 4, 16, 8]
        k = k * cos + torch.cat((-k[..., 4:], k[..., :4]), dim=-1) * sin  # f32[2, 2, 16, 8]
        k = k.unsqueeze(2).expand(2, 2, 2, 16, 8).reshape(2, 4, 16, 8)  # f32[2, 4, 16, 8]
        v = v.unsqueeze(2).expand(2, 2, 2, 16, 8).reshape(2, 4, 16, 8)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3535533905932738)
        return self.o_proj(y.transpose(1, 2).reshape(2, 16, -1))  # f32[2, 16, 32]


class LlamaMLP(nn.Module):  # model.layers.0.mlp (modeling_llama.py:164)
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 96, bias=False)
        self.up_proj = nn.Linear(32, 96, bias=False)
        self.down_proj = nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # f32[2, 16, 32]


class LlamaDecoderLayerHead(nn.Module):  # the beginning of model.layers.0 (modeling_llama.py:65)
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm()
        self.self_attn = LlamaAttention()
        self.post_attention_layernorm = LlamaRMSNorm()
        self.mlp = LlamaMLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)  # f32[2, 16, 32]
        return x, self.mlp(self.post_attention_layernorm(x))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(64, 32)
        self.model.rotary_emb = LlamaRotaryEmbedding()
        self.model.layers = nn.ModuleList([LlamaDecoderLayerHead()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        embed_tokens = self.model.embed_tokens(input_ids)  # f32[2, 16, 32]
        positions = torch.arange(16, device=input_ids.device).unsqueeze(0)  # i64[1, 16]
        mask = attention_mask.to(torch.bool)  # bool[2, 16]
        batch = torch.arange(2, device=input_ids.device)[:, None, None, None]  # i64[2, 1, 1, 1]
        rows = torch.arange(16, device=input_ids.device)[None, None, :, None]  # i64[1, 1, 16, 1]
        columns = torch.arange(16, device=input_ids.device)[None, None, None]  # i64[1, 1, 1, 16]
        mask = (columns <= rows) & mask[batch, columns]  # bool[2, 1, 16, 16]
        cos, sin = self.model.rotary_emb(positions)  # f32[1, 16, 8] each
        x, mlp = self.model.layers[0](embed_tokens, cos, sin, mask)  # f32[2, 16, 32] each
        return mask, cos, sin, x, mlp
