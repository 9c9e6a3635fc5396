"""Stage 0 of 2: WhisperForConditionalGeneration on rank 0.

model.encoder.conv1, model.encoder.conv2, model.encoder.embed_positions, model.encoder.layers.0,
model.encoder.layers.1.self_attn_layer_norm and 7 more

parameters  33.1 k
forward     371 us, 2.92 MFLOP
backward    226 us, 4.62 MFLOP, busy 99.9 % of the period
memory      1005 MiB of 16.0 GiB = weights 256 KiB + gradients 127 KiB + optimizer 253 KiB +
            stash 527 KiB + buffers 58.3 KiB + transient 114 KiB + reserve 1004 MiB

sends       encoder_layers_0: f32[2, 20, 32], 5.00 KiB to stage 1
sends       encoder_layers_1_self_attn_layer_norm: f32[2, 20, 32], 5.00 KiB to stage 1
sends       encoder_layers_1_self_attn_contiguous_4: f32[2, 4, 20, 8], 5.00 KiB to stage 1
sends       decoder_mask: bool[2, 1, 12, 12], 288 B to stage 1
sends       decoder_layers_0_add_2: f32[2, 12, 32], 3.00 KiB to stage 1
sends       decoder_layers_0_encoder_attn_contiguous_4: f32[2, 4, 12, 8], 3.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_whisper.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WhisperAttention(nn.Module):  # model.encoder.layers.0.self_attn (modeling_whisper.py:312)
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.k_proj = nn.Linear(32, 32, bias=False)
        self.v_proj = nn.Linear(32, 32)
        self.out_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = (self.q_proj(x) * 0.3535533905932738).view(2, 20, -1, 8).transpose(1, 2)
        q = q.contiguous()
        k = self.k_proj(x).view(2, -1, 4, 8).transpose(1, 2).contiguous()
        v = self.v_proj(x).view(2, -1, 4, 8).transpose(1, 2).contiguous()
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)  # f32[2, 20, 4, 8]
        return self.out_proj(y.contiguous().reshape(2, 20, -1))  # f32[2, 20, 32]


class WhisperEncoderLayer(nn.Module):  # model.encoder.layers.0 (modeling_whisper.py:396)
    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(32)
        self.self_attn = WhisperAttention()
        self.final_layer_norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 128)
        self.fc2 = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.self_attn_layer_norm(x)), 0.0)  # f32[2, 20, 32]
        fc2 = self.fc2(F.dropout(F.gelu(self.fc1(self.final_layer_norm(x))), 0.0))
        return x + F.dropout(fc2, 0.0)


# the beginning of model.encoder.layers.1 (modeling_whisper.py:396)
class WhisperEncoderLayerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(32)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.self_attn_layer_norm(x)  # f32[2, 20, 32]
        y = (self.self_attn.q_proj(x) * 0.3535533905932738).view(2, 20, -1, 8)  # f32[2, 20, 4, 8]
        return x, y.transpose(1, 2).contiguous()


class WhisperEncoderHead(nn.Module):  # the beginning of model.encoder (modeling_whisper.py:617)
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(80, 32, 3, padding=1)
        self.conv2 = nn.Conv1d(32, 32, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(20, 32).requires_grad_(False)
        self.layers = nn.ModuleList([WhisperEncoderLayer(), WhisperEncoderLayerHead()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        conv2 = F.gelu(self.conv2(F.gelu(self.conv1(x)))).permute(0, 2, 1)  # f32[2, 20, 32]
        x = conv2 + self.embed_positions(torch.arange(20, device=x.device))
        x = self.layers[0](F.dropout(x, 0.0))
        y, z = self.layers[1](x)
        return x, y, z


# model.decoder.embed_positions (modeling_whisper.py:214)
class WhisperPositionalEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(12, 32))

    def forward(self, positions: Tensor) -> Tensor:
        return self.weight[positions]  # f32[2, 12, 32]


class WhisperAttention2(nn.Module):  # model.decoder.layers.0.self_attn (modeling_whisper.py:312)
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.k_proj = nn.Linear(32, 32, bias=False)
        self.v_proj = nn.Linear(32, 32)
        self.out_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = (self.q_proj(x) * 0.3535533905932738).view(2, 12, -1, 8).transpose(1, 2)
        q = q.contiguous()
        k = self.k_proj(x).view(2, -1, 4, 8).transpose(1, 2).contiguous()
        v = self.v_proj(x).view(2, -1, 4, 8).transpose(1, 2).contiguous()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.out_proj(y.transpose(1, 2).contiguous().reshape(2, 12, -1))  # f32[2, 12, 32]


# the beginning of model.decoder.layers.0 (modeling_whisper.py:475)
class WhisperDecoderLayerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(32)
        self.self_attn = WhisperAttention2()
        self.encoder_attn_layer_norm = nn.LayerNorm(32)
        self.encoder_attn = nn.Module()
        self.encoder_attn.q_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + F.dropout(self.self_attn(self.self_attn_layer_norm(x), mask), 0.0)  # f32[2, 12, 32]
        q_proj = self.encoder_attn.q_proj(self.encoder_attn_layer_norm(x))
        y = (q_proj * 0.3535533905932738).view(2, 12, -1, 8).transpose(1, 2)  # f32[2, 4, 12, 8]
        return x, y.contiguous()


class WhisperDecoderHead(nn.Module):  # the beginning of model.decoder (modeling_whisper.py:737)
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32, padding_idx=63)
        self.embed_positions = WhisperPositionalEmbedding()
        self.layers = nn.ModuleList([WhisperDecoderLayerHead()])

    def forward(self, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embed_tokens = self.embed_tokens(zeros)  # f32[2, 12, 32]
        positions = torch.arange(12, device=zeros.device).unsqueeze(0).repeat(2, 1)  # i64[2, 12]
        x = F.dropout(embed_tokens + self.embed_positions(positions), 0.0)  # f32[2, 12, 32]
        sums = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)  # i64[2, 12]
        positions2 = torch.arange(12, device=zeros.device)  # i64[12]
        positions3 = torch.arange(12, device=zeros.device)
        batch = torch.arange(2, device=zeros.device)[:, None, None, None]  # i64[2, 1, 1, 1]
        rows = positions2[None, None, :, None]  # i64[1, 1, 12, 1]
        columns = positions3[None, None, None]  # i64[1, 1, 1, 12]
        positions2 = positions[batch, rows]  # i64[2, 1, 12, 1]
        positions = positions[batch, columns]  # i64[2, 1, 1, 12]
        mask = (positions <= positions2) & (sums[batch, rows] == sums[batch, columns])
        x, y = self.layers[0](x, mask)
        return mask, x, y


class WhisperModelHead(nn.Module):  # the beginning of model (modeling_whisper.py:617)
    def __init__(self) -> None:
        super().__init__()
        self.encoder = WhisperEncoderHead()
        self.decoder = WhisperDecoderHead()

    def forward(self, x: Tensor, zeros: Tensor) -> tuple[Tensor, ...]:
        x, y, z = self.encoder(x)
        mask, w, x2 = self.decoder(zeros)
        return x, y, z, mask, w, x2


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = WhisperModelHead()

    def forward(self, input_features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        zeros = labels.new_zeros(2, 12)  # i64[2, 12]
        zeros[:, 1:] = labels[:, :-1].clone()
        zeros[:, 0] = 62
        return self.model(input_features, zeros.masked_fill_(zeros == -100, 63))
