"""Stage 0 of 2: LlamaForCausalLM on rank 0.

model.embed_tokens, model.rotary_emb, model.layers.0.input_layernorm, model.layers.0.self_attn,
model.layers.0.post_attention_layernorm, model.layers.0.mlp

parameters  14.4 k
forward     281 us, 852 kFLOP
backward    211 us, 1.70 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB
            = weights 112 KiB + gradients 56.2 KiB + optimizer 112 KiB + stash 276 KiB +
            buffers 25.5 KiB + transient 36.0 KiB + reserve 1004 MiB

sends       model_expand: bool[2, 1, 16, 16], 512 B to stage 1
sends       model_rotary_emb_to_3: f32[1, 16, 8], 512 B to stage 1
sends       model_rotary_emb_to_4: f32[1, 16, 8], 512 B to stage 1
sends       model_layers_0_post_attention_layernorm_to: f32[2, 16, 32], 4.00 KiB to stage 1
sends       model_layers_0_mlp: f32[2, 16, 32], 4.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_llama.py:tiny.
Imports only torch; yours to read, change and run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LlamaRotaryEmbedding(nn.Module):
    """model.rotary_emb (modeling_llama.py:111)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.zeros(4), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        x = positions.unsqueeze(2).to(torch.float32)  # f32[1, 16, 1]
        x = x * self.inv_freq.to(torch.float32)  # f32[1, 16, 4]
        x = torch.cat((x, x), dim=-1)  # f32[1, 16, 8]
        y = x.cos() * 1.0
        x = x.sin() * 1.0
        return y, x


class LlamaRMSNorm(nn.Module):
    """model.layers.0.input_layernorm and 1 more (modeling_llama.py:64)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * ((x**2).mean(-1, keepdim=True) + 1e-06).rsqrt())  # f32[2, 16, 32]


class LlamaAttention(nn.Module):
    """model.layers.0.self_attn (modeling_llama.py:243)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32, bias=False)
        self.k_proj = nn.Linear(32, 16, bias=False)
        self.v_proj = nn.Linear(32, 16, bias=False)
        self.o_proj = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, x2: Tensor, x3: Tensor, mask: Tensor) -> Tensor:
        q_proj = self.q_proj(x).view(2, 16, -1, 8).transpose(1, 2)  # f32[2, 4, 16, 8]
        k_proj = self.k_proj(x).view(2, 16, -1, 8).transpose(1, 2)  # f32[2, 2, 16, 8]
        v = self.v_proj(x).view(2, 16, -1, 8).transpose(1, 2)
        x = x2.unsqueeze(1)  # f32[1, 1, 16, 8]
        y = x3.unsqueeze(1)
        z = q_proj * x  # f32[2, 4, 16, 8]
        q_proj2 = q_proj[..., :4]  # f32[2, 4, 16, 4]
        q_proj = -q_proj[..., 4:]
        q = z + torch.cat((q_proj, q_proj2), dim=-1) * y  # f32[2, 4, 16, 8]
        x = k_proj * x  # f32[2, 2, 16, 8]
        k_proj2 = k_proj[..., :4]  # f32[2, 2, 16, 4]
        k_proj = -k_proj[..., 4:]
        k = (x + torch.cat((k_proj, k_proj2), dim=-1) * y).unsqueeze(2)  # f32[2, 2, 1, 16, 8]
        k = k.expand(2, 2, 2, 16, 8).reshape(2, 4, 16, 8)  # f32[2, 4, 16, 8]
        v = v.unsqueeze(2).expand(2, 2, 2, 16, 8).reshape(2, 4, 16, 8)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3535533905932738)
        return self.o_proj(y.reshape(2, -1, 16, 8).transpose(1, 2).reshape(2, 16, -1))


class LlamaMLP(nn.Module):
    """model.layers.0.mlp (modeling_llama.py:164)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 96, bias=False)
        self.up_proj = nn.Linear(32, 96, bias=False)
        self.down_proj = nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # f32[2, 16, 32]


class LlamaDecoderLayerHead(nn.Module):
    """The beginning of model.layers.0 (modeling_llama.py:64)."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm()
        self.self_attn = LlamaAttention()
        self.post_attention_layernorm = LlamaRMSNorm()
        self.mlp = LlamaMLP()

    def forward(self, x: Tensor, x2: Tensor, x3: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), x2, x3, mask)  # f32[2, 16, 32]
        mlp = self.mlp(self.post_attention_layernorm(x))
        return x, mlp


class LlamaModelHead(nn.Module):
    """The beginning of model (modeling_llama.py:370)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32)
        self.rotary_emb = LlamaRotaryEmbedding()
        self.layers = nn.ModuleList([LlamaDecoderLayerHead()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        embed_tokens = self.embed_tokens(input_ids)  # f32[2, 16, 32]
        positions = (torch.arange(16, device=input_ids.device) + 0).unsqueeze(0)  # i64[1, 16]
        mask = attention_mask.to(torch.bool)  # bool[2, 16]
        positions2 = torch.arange(2, device=input_ids.device)  # i64[2]
        positions3 = torch.arange(16, device=input_ids.device) + 0  # i64[16]
        positions4 = torch.arange(16, device=input_ids.device) + 0
        positions2 = positions2.unsqueeze(1).unsqueeze(2).unsqueeze(3)  # i64[2, 1, 1, 1]
        positions3 = positions3.unsqueeze(0).unsqueeze(1).unsqueeze(3)  # i64[1, 1, 16, 1]
        positions4 = positions4.unsqueeze(0).unsqueeze(1).unsqueeze(2)  # i64[1, 1, 1, 16]
        mask2 = positions3.new_ones((), dtype=torch.bool) & (positions4 <= positions3)
        mask = (mask2 & mask[positions2, positions4]).expand(2, -1, 16, 16)  # bool[2, 1, 16, 16]
        with torch.no_grad():
            x, y = self.rotary_emb(positions)  # f32[1, 16, 8] each
        z, mlp = self.layers[0](embed_tokens, x, y, mask)  # f32[2, 16, 32] each
        return mask, x, y, z, mlp


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaModelHead()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        (
            model_expand,
            model_rotary_emb_mul_2,
            model_rotary_emb,
            model_layers_0_add,
            model_layers_0_mlp,
        ) = self.model(input_ids, attention_mask)
        return (
            model_expand,
            model_rotary_emb_mul_2,
            model_rotary_emb,
            model_layers_0_add,
            model_layers_0_mlp,
        )
