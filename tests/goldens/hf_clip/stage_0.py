"""Stage 0 of 2: CLIPModel on rank 0.

vision_model, visual_projection, text_model.embeddings, text_model.encoder.layers.0.layer_norm1,
text_model.encoder.layers.0.self_attn.q_proj and 2 more

parameters  36.7 k
forward     216 us, 2.33 MFLOP
backward    227 us, 4.26 MFLOP, busy 99.2 % of the period
memory      1005 MiB of 16.0 GiB = weights 287 KiB + gradients 143 KiB + optimizer 287 KiB +
            stash 658 KiB + buffers 9.79 KiB + transient 149 KiB + reserve 1004 MiB

sends       visual_projection: f32[2, 24], 192 B to stage 1
sends       input_ids_2: i64[2, 12], 192 B to stage 1
sends       text_model_embeddings: f32[2, 12, 24], 2.25 KiB to stage 1
sends       text_model_encoder_layers_0_self_attn_reshape: f32[2, 12, 24], 2.25 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_clip.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CLIPVisionEmbeddings(nn.Module):  # vision_model.embeddings (modeling_clip.py:209)
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(32))
        self.register_buffer(
            "position_ids", torch.zeros(1, 17, dtype=torch.int64), persistent=False
        )
        self.patch_embedding = nn.Conv2d(3, 32, 8, stride=8, bias=False)
        self.position_embedding = nn.Embedding(17, 32)

    def forward(self, x: Tensor) -> Tensor:
        patch_embedding = self.patch_embedding(x).flatten(2).transpose(1, 2)  # f32[2, 16, 32]
        x = self.class_embedding.expand(2, 1, -1)  # f32[2, 1, 32]
        x = torch.cat((x, patch_embedding), dim=1)  # f32[2, 17, 32]
        return x + self.position_embedding(self.position_ids)


class CLIPAttention(nn.Module):  # vision_model.encoder.layers.0-1.self_attn (modeling_clip.py:309)
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.k_proj = nn.Linear(32, 32)
        self.v_proj = nn.Linear(32, 32)
        self.out_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)  # f32[2, 17, 32]
        k = self.k_proj(x)
        v = self.v_proj(x)
        q = q.view(2, 17, -1, 8).transpose(1, 2)  # f32[2, 4, 17, 8]
        k = k.view(2, 17, -1, 8).transpose(1, 2)
        v = v.view(2, 17, -1, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3535533905932738)
        return self.out_proj(y.transpose(1, 2).reshape(2, 17, -1))  # f32[2, 17, 32]


# vision_model.encoder.layers.0-1.mlp.activation_fn (activations.py:123)
class QuickGELUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x * 1.702).sigmoid()  # f32[2, 17, 128]


class CLIPMLP(nn.Module):  # vision_model.encoder.layers.0-1.mlp (modeling_clip.py:347)
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(32, 128)
        self.activation_fn = QuickGELUActivation()
        self.fc2 = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))  # f32[2, 17, 32]


class CLIPEncoderLayer(nn.Module):  # vision_model.encoder.layers.0-1 (modeling_clip.py:370)
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(32)
        self.self_attn = CLIPAttention()
        self.layer_norm2 = nn.LayerNorm(32)
        self.mlp = CLIPMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))  # f32[2, 17, 32]
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):  # vision_model.encoder (modeling_clip.py:370)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)  # f32[2, 17, 32]
        return x


class CLIPVisionModel(nn.Module):  # vision_model (modeling_clip.py:209)
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings()
        self.pre_layrnorm = nn.LayerNorm(32)
        self.encoder = CLIPEncoder()
        self.post_layernorm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        encoder = self.encoder(self.pre_layrnorm(self.embeddings(x)))[:, 0]  # f32[2, 32]
        return self.post_layernorm(encoder)


class CLIPTextEmbeddings(nn.Module):  # text_model.embeddings (modeling_clip.py:248)
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "position_ids", torch.zeros(1, 12, dtype=torch.int64), persistent=False
        )
        self.token_embedding = nn.Embedding(64, 24)
        self.position_embedding = nn.Embedding(12, 24)

    def forward(self, input_ids: Tensor) -> Tensor:
        index = self.position_ids[:]  # i64[1, 12]
        token_embedding = self.token_embedding(input_ids)  # f32[2, 12, 24]
        return token_embedding + self.position_embedding(index)


# the beginning of text_model.encoder.layers.0 (modeling_clip.py:370)
class CLIPEncoderLayerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(24)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(24, 24)
        self.self_attn.k_proj = nn.Linear(24, 24)
        self.self_attn.v_proj = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm1(x)  # f32[2, 12, 24]
        q = self.self_attn.q_proj(x)
        k = self.self_attn.k_proj(x)
        v = self.self_attn.v_proj(x)
        q = q.view(2, 12, -1, 6).transpose(1, 2)  # f32[2, 4, 12, 6]
        k = k.view(2, 12, -1, 6).transpose(1, 2)
        v = v.view(2, 12, -1, 6).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.408248290463863)
        return y.transpose(1, 2).reshape(2, 12, -1)  # f32[2, 12, 24]


class CLIPTextModelHead(nn.Module):  # the beginning of text_model (modeling_clip.py:248)
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([CLIPEncoderLayerHead()])

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.embeddings(input_ids)  # f32[2, 12, 24]
        return embeddings, self.encoder.layers[0](embeddings)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel()
        self.visual_projection = nn.Linear(32, 24, bias=False)
        self.text_model = CLIPTextModelHead()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        visual_projection = self.visual_projection(self.vision_model(pixel_values))  # f32[2, 24]
        embeddings, x = self.text_model(input_ids)  # f32[2, 12, 24] each
        return visual_projection, input_ids, embeddings, x
