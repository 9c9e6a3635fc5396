"""Stage 1 of 2: LlamaForCausalLM on rank 1.

model.layers.1, model.norm, lm_head

parameters  14.4 k
forward     236 us, 983 kFLOP
backward    256 us, 1.97 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB = weights 113 KiB + gradients 56.4 KiB + optimizer 113 KiB +
            stash 120 KiB + buffers 23.0 KiB + transient 29.0 KiB + reserve 1004 MiB

receives    mask: bool[2, 1, 16, 16], 512 B from stage 0
receives    rotary_emb_cos: f32[1, 16, 8], 512 B from stage 0
receives    rotary_emb_sin: f32[1, 16, 8], 512 B from stage 0
receives    layers_0_add: f32[2, 16, 32], 4.00 KiB from stage 0
receives    layers_0_mlp: f32[2, 16, 32], 4.00 KiB from stage 0

Written by p2bw 0.1.0 from examples/hf_llama.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LlamaRMSNorm(nn.Module):  # model.layers.1.input_layernorm and 2 more (modeling_llama.py:65)
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * ((x**2).mean(-1, keepdim=True) + 1e-06).rsqrt())  # f32[2, 16, 32]


class LlamaAttention(nn.Module):  # model.layers.1.self_attn (modeling_llama.py:244)
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


class LlamaMLP(nn.Module):  # model.layers.1.mlp (modeling_llama.py:164)
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 96, bias=False)
        self.up_proj = nn.Linear(32, 96, bias=False)
        self.down_proj = nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # f32[2, 16, 32]


class LlamaDecoderLayer(nn.Module):  # model.layers.1 (modeling_llama.py:65)
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm()
        self.self_attn = LlamaAttention()
        self.post_attention_layernorm = LlamaRMSNorm()
        self.mlp = LlamaMLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)  # f32[2, 16, 32]
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModelTail(nn.Module):  # the end of model (modeling_llama.py:314)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"1": LlamaDecoderLayer()})
        self.norm = LlamaRMSNorm()

    def forward(self, x: Tensor, x2: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.layers["1"](x + x2, cos, sin, mask))  # f32[2, 16, 32]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaModelTail()
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(
        self,
        labels: Tensor,
        mask: Tensor,
        rotary_emb_cos: Tensor,
        rotary_emb_sin: Tensor,
        layers_0_add: Tensor,
        layers_0_mlp: Tensor,
    ) -> Tensor:
        model = self.model(layers_0_add, layers_0_mlp, rotary_emb_cos, rotary_emb_sin, mask)
        lm_head = self.lm_head(model)  # f32[2, 16, 64]
        labels = F.pad(labels, (0, 1), value=-100.0)[:, 1:].contiguous()  # i64[2, 16]
        return F.cross_entropy(lm_head.view(-1, 64), labels.view(-1))  # f32[]
