"""Stage 1 of 2: ViTForImageClassification on rank 1.

vit.layers.1, vit.layernorm, classifier

parameters  13.1 k
forward     90.4 us, 911 kFLOP
backward    95.6 us, 1.82 MFLOP, busy 99.8 % of the period
memory      1004 MiB of 16.0 GiB = weights 102 KiB + gradients 51.2 KiB + optimizer 102 KiB +
            stash 88.6 KiB + buffers 21.3 KiB + transient 73.9 KiB + reserve 1004 MiB

receives    layers_0_add: f32[2, 17, 32], 4.25 KiB from stage 0
receives    layers_0_dropout_2: f32[2, 17, 32], 4.25 KiB from stage 0

Written by p2bw 0.1.0 from examples/hf_vit.py:tiny. Imports only torch; yours to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ViTAttention(nn.Module):  # vit.layers.1.attention (modeling_vit.py:216)
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


class ViTMLP(nn.Module):  # vit.layers.1.mlp (modeling_vit.py:250)
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(32, 128)
        self.fc2 = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # f32[2, 17, 32]


class ViTLayer(nn.Module):  # vit.layers.1 (modeling_vit.py:274)
    def __init__(self) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(32, eps=1e-12)
        self.attention = ViTAttention()
        self.dropout = nn.Dropout(0.1)
        self.layernorm_after = nn.LayerNorm(32, eps=1e-12)
        self.mlp = ViTMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.attention(self.layernorm_before(x))) + x  # f32[2, 17, 32]
        return self.dropout(self.mlp(self.layernorm_after(x))) + x


class ViTModelTail(nn.Module):  # the end of vit (modeling_vit.py:284)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"1": ViTLayer()})
        self.layernorm = nn.LayerNorm(32, eps=1e-12)

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        return self.layernorm(self.layers["1"](x + x2))  # f32[2, 17, 32]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = ViTModelTail()
        self.classifier = nn.Linear(32, 10)

    def forward(self, labels: Tensor, layers_0_add: Tensor, layers_0_dropout_2: Tensor) -> Tensor:
        classifier = self.classifier(self.vit(layers_0_dropout_2, layers_0_add)[:, 0])  # f32[2, 10]
        return F.cross_entropy(classifier, labels)  # f32[]
