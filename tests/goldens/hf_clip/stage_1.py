"""Stage 1 of 2: CLIPModel on rank 1.

text_model.encoder.layers.0.self_attn.out_proj, text_model.encoder.layers.0.layer_norm2,
text_model.encoder.layers.0.mlp, text_model.encoder.layers.1 and 2 more

parameters  13.2 k
forward     240 us, 611 kFLOP
backward    206 us, 1.22 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB = weights 103 KiB + gradients 51.7 KiB + optimizer 103 KiB +
            stash 85.5 KiB + buffers 14.4 KiB + transient 83.8 KiB + reserve 1004 MiB

receives    visual_projection: f32[2, 24], 192 B from stage 0
receives    input_ids_2: i64[2, 12], 192 B from stage 0
receives    text_model_embeddings: f32[2, 12, 24], 2.25 KiB from stage 0
receives    text_model_encoder_layers_0_self_attn_reshape: f32[2, 12, 24], 2.25 KiB from stage 0

Written by p2bw 0.1.0 from examples/hf_clip.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# text_model.encoder.layers.0-1.mlp.activation_fn (activations.py:123)
class QuickGELUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x * 1.702).sigmoid()  # f32[2, 12, 96]


class CLIPMLP(nn.Module):  # text_model.encoder.layers.0-1.mlp (modeling_clip.py:347)
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(24, 96)
        self.activation_fn = QuickGELUActivation()
        self.fc2 = nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))  # f32[2, 12, 24]


# the end of text_model.encoder.layers.0 (modeling_clip.py:333)
class CLIPEncoderLayerTail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.out_proj = nn.Linear(24, 24)
        self.layer_norm2 = nn.LayerNorm(24)
        self.mlp = CLIPMLP()

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        x = x2 + self.self_attn.out_proj(x)  # f32[2, 12, 24]
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nn.Module):  # text_model.encoder.layers.1.self_attn (modeling_clip.py:309)
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 24)
        self.k_proj = nn.Linear(24, 24)
        self.v_proj = nn.Linear(24, 24)
        self.out_proj = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)  # f32[2, 12, 24]
        k = self.k_proj(x)
        v = self.v_proj(x)
        q = q.view(2, 12, -1, 6).transpose(1, 2)  # f32[2, 4, 12, 6]
        k = k.view(2, 12, -1, 6).transpose(1, 2)
        v = v.view(2, 12, -1, 6).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.408248290463863)
        return self.out_proj(y.transpose(1, 2).reshape(2, 12, -1))  # f32[2, 12, 24]


class CLIPEncoderLayer(nn.Module):  # text_model.encoder.layers.1 (modeling_clip.py:370)
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(24)
        self.self_attn = CLIPAttention()
        self.layer_norm2 = nn.LayerNorm(24)
        self.mlp = CLIPMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))  # f32[2, 12, 24]
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextModelTail(nn.Module):  # the end of text_model (modeling_clip.py:333)
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([CLIPEncoderLayerTail(), CLIPEncoderLayer()])
        self.final_layer_norm = nn.LayerNorm(24)

    def forward(self, x: Tensor, x2: Tensor, input_ids: Tensor) -> Tensor:
        y = self.encoder.layers[0](x, x2)  # f32[2, 12, 24]
        y = self.final_layer_norm(self.encoder.layers[1](y))
        positions = torch.arange(2, device=x.device)  # i64[2]
        index = (input_ids.to(torch.int32) == 63).to(torch.int32).argmax(-1)
        return y[positions, index]  # f32[2, 24]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.text_model = CLIPTextModelTail()
        self.text_projection = nn.Linear(24, 24, bias=False)

    def forward(
        self,
        visual_projection: Tensor,
        input_ids_2: Tensor,
        text_model_embeddings: Tensor,
        text_model_encoder_layers_0_self_attn_reshape: Tensor,
    ) -> Tensor:
        text_model = self.text_model(
            text_model_encoder_layers_0_self_attn_reshape, text_model_embeddings, input_ids_2
        )  # f32[2, 24]
        text_projection = self.text_projection(text_model)
        x = visual_projection / (visual_projection**2).sum(-1, keepdim=True) ** 0.5
        y = text_projection / (text_projection**2).sum(-1, keepdim=True) ** 0.5
        x = y @ x.t() * self.logit_scale.exp()  # f32[2, 2]
        loss = F.cross_entropy(x, torch.arange(2, device=visual_projection.device))  # f32[]
        loss2 = F.cross_entropy(x.T, torch.arange(2, device=visual_projection.device))
        return (loss + loss2) / 2.0
