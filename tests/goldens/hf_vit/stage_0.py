"""Stage 0 of 2: ViTForImageClassification on rank 0.

vit.embeddings, vit.layers.0.layernorm_before, vit.layers.0.attention, vit.layers.0.dropout,
vit.layers.0.layernorm_after, vit.layers.0.mlp

parameters  19.5 k
forward     85.4 us, 1.30 MFLOP
backward    90.7 us, 2.21 MFLOP, busy 94.5 % of the period
memory      1004 MiB of 16.0 GiB = weights 152 KiB + gradients 76.0 KiB + optimizer 152 KiB +
            stash 289 KiB + buffers 21.2 KiB + transient 95.0 KiB + reserve 1004 MiB

sends       layers_0_add: f32[2, 17, 32], 4.25 KiB to stage 1
sends       layers_0_dropout_2: f32[2, 17, 32], 4.25 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_vit.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ViTPatchEmbeddings(nn.Module):  # vit.embeddings.patch_embeddings (modeling_vit.py:69)
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 32, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).flatten(2).transpose(1, 2)  # f32[2, 16, 32]


class ViTEmbeddings(nn.Module):  # vit.embeddings (modeling_vit.py:69)
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, 32))
        self.position_embeddings = nn.Parameter(torch.empty(1, 17, 32))
        self.patch_embeddings = ViTPatchEmbeddings()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        patch_embeddings = self.patch_embeddings(x)  # f32[2, 16, 32]
        x = self.cls_token.expand(2, -1, -1)  # f32[2, 1, 32]
        x = torch.cat((x, patch_embeddings), dim=1) + self.position_embeddings  # f32[2, 17, 32]
        return self.dropout(x)


class ViTAttention(nn.Module):  # vit.layers.0.attention (modeling_vit.py:216)
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.k_proj = nn.Linear(32, 32)
        self.v_proj = nn.Linear(32, 32)
        self.o_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).view(2, 17, -1, 8).transpose(1, 2)  # f32[2, 4, 17, 8]
        k = self.k_proj(x).view(2, 17, -1, 8).transpose(1, 2)
        v = self.v_proj(x).view(2, 17, -1, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3535533905932738)
        return self.o_proj(y.transpose(1, 2).reshape(2, 17, -1))  # f32[2, 17, 32]


class ViTMLP(nn.Module):  # vit.layers.0.mlp (modeling_vit.py:250)
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(32, 128)
        self.fc2 = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # f32[2, 17, 32]


class ViTLayerHead(nn.Module):  # the beginning of vit.layers.0 (modeling_vit.py:274)
    def __init__(self) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(32, eps=1e-12)
        self.attention = ViTAttention()
        self.dropout = nn.Dropout(0.1)
        self.layernorm_after = nn.LayerNorm(32, eps=1e-12)
        self.mlp = ViTMLP()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.dropout(self.attention(self.layernorm_before(x))) + x  # f32[2, 17, 32]
        return x, self.dropout(self.mlp(self.layernorm_after(x)))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = nn.Module()
        self.vit.embeddings = ViTEmbeddings()
        self.vit.layers = nn.ModuleList([ViTLayerHead()])

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.vit.layers[0](self.vit.embeddings(pixel_values))  # f32[2, 17, 32] each
