"""Stage 0 of 2: WhisperForConditionalGeneration on rank 0.

model.encoder.conv1, model.encoder.conv2, model.encoder.embed_positions, model.encoder.layers.0,
model.encoder.layers.1.self_attn_layer_norm, model.encoder.layers.1.self_attn.q_proj,
model.decoder.embed_tokens, model.decoder.embed_positions,
model.decoder.layers.0.self_attn_layer_norm and 3 more

parameters  33.1 k
forward     371 us, 2.92 MFLOP
backward    226 us, 4.62 MFLOP, busy 99.9 % of the period
memory      1005 MiB of 16.0 GiB
            = weights 256 KiB + gradients 127 KiB + optimizer 253 KiB + stash 527 KiB +
            buffers 63.3 KiB + transient 40.0 KiB + reserve 1004 MiB

sends       model_encoder_layers_0: f32[2, 20, 32], 5.00 KiB to stage 1
sends       model_encoder_layers_1_self_attn_layer_norm: f32[2, 20, 32], 5.00 KiB to stage 1
sends       model_encoder_layers_1_self_attn_contiguous: f32[2, 4, 20, 8], 5.00 KiB to stage 1
sends       model_decoder_expand_2: bool[2, 1, 12, 12], 288 B to stage 1
sends       model_decoder_layers_0_add: f32[2, 12, 32], 3.00 KiB to stage 1
sends       model_decoder_layers_0_encoder_attn_contiguous: f32[2, 4, 12, 8], 3.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_whisper.py:tiny.
Imports only torch; yours to read, change and run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WhisperAttention(nn.Module):
    """model.encoder.layers.0.self_attn (modeling_whisper.py:310)."""

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
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0).reshape(2, -1, 20, 8)
        return self.out_proj(y.transpose(1, 2).contiguous().reshape(2, 20, -1))  # f32[2, 20, 32]


class WhisperEncoderLayer(nn.Module):
    """model.encoder.layers.0 (modeling_whisper.py:394)."""

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


class WhisperAttentionHead(nn.Module):
    """The beginning of model.encoder.layers.1.self_attn and 1 more (modeling_whisper.py:310)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.q_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.q_proj(x) * 0.3535533905932738).view(2, self.size, -1, 8)
        return x.transpose(1, 2).contiguous()


class WhisperEncoderLayerHead(nn.Module):
    """The beginning of model.encoder.layers.1 (modeling_whisper.py:394)."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(32)
        self.self_attn = WhisperAttentionHead(size=20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.self_attn_layer_norm(x)  # f32[2, 20, 32]
        self_attn = self.self_attn(x)  # f32[2, 4, 20, 8]
        return x, self_attn


class WhisperEncoderHead(nn.Module):
    """The beginning of model.encoder (modeling_whisper.py:615)."""

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
        y, self_attn = self.layers[1](x)
        return x, y, self_attn


class WhisperPositionalEmbedding(nn.Module):
    """model.decoder.embed_positions (modeling_whisper.py:213)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(12, 32))

    def forward(self, positions: Tensor) -> Tensor:
        return self.weight[positions]  # f32[2, 12, 32]


class WhisperAttention2(nn.Module):
    """model.decoder.layers.0.self_attn (modeling_whisper.py:310)."""

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
        y = y.reshape(2, -1, 12, 8).transpose(1, 2).contiguous().reshape(2, 12, -1)
        return self.out_proj(y)


class WhisperDecoderLayerHead(nn.Module):
    """The beginning of model.decoder.layers.0 (modeling_whisper.py:472)."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(32)
        self.self_attn = WhisperAttention2()
        self.encoder_attn_layer_norm = nn.LayerNorm(32)
        self.encoder_attn = WhisperAttentionHead(size=12)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + F.dropout(self.self_attn(self.self_attn_layer_norm(x), mask), 0.0)  # f32[2, 12, 32]
        encoder_attn = self.encoder_attn(self.encoder_attn_layer_norm(x))  # f32[2, 4, 12, 8]
        return x, encoder_attn


class WhisperDecoderHead(nn.Module):
    """The beginning of model.decoder (modeling_whisper.py:734)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32, padding_idx=63)
        self.embed_positions = WhisperPositionalEmbedding()
        self.layers = nn.ModuleList([WhisperDecoderLayerHead()])

    def forward(self, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embed_tokens = self.embed_tokens(zeros)  # f32[2, 12, 32]
        positions = (torch.arange(12, device=zeros.device) + 0).unsqueeze(0).repeat(2, 1)
        x = F.dropout(embed_tokens + self.embed_positions(positions), 0.0)  # f32[2, 12, 32]
        sums = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)  # i64[2, 12]
        positions = positions.expand(2, -1)
        positions2 = torch.arange(2, device=zeros.device)  # i64[2]
        positions3 = torch.arange(12, device=zeros.device) + 0  # i64[12]
        positions4 = torch.arange(12, device=zeros.device) + 0
        positions2 = positions2.unsqueeze(1).unsqueeze(2).unsqueeze(3)  # i64[2, 1, 1, 1]
        positions3 = positions3.unsqueeze(0).unsqueeze(1).unsqueeze(3)  # i64[1, 1, 12, 1]
        positions4 = positions4.unsqueeze(0).unsqueeze(1).unsqueeze(2)  # i64[1, 1, 1, 12]
        mask = positions3.new_ones((), dtype=torch.bool)  # bool[]
        mask = mask & (sums[positions2, positions3] == sums[positions2, positions4])
        positions3 = positions[positions2, positions3]  # i64[2, 1, 12, 1]
        positions = positions[positions2, positions4]  # i64[2, 1, 1, 12]
        mask = (mask & (positions <= positions3)).expand(2, -1, 12, 12)  # bool[2, 1, 12, 12]
        x, encoder_attn = self.layers[0](x, mask)
        return mask, x, encoder_attn


class WhisperModelHead(nn.Module):
    """The beginning of model (modeling_whisper.py:615)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = WhisperEncoderHead()
        self.decoder = WhisperDecoderHead()

    def forward(self, x: Tensor, zeros: Tensor) -> tuple[Tensor, ...]:
        x, y, self_attn = self.encoder(x)
        mask, z, encoder_attn = self.decoder(zeros)
        return x, y, self_attn, mask, z, encoder_attn


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant_0", torch.tensor(62, dtype=torch.int64), persistent=False)
        self.model = WhisperModelHead()

    def forward(self, input_features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        zeros = labels.new_zeros(2, 12)  # i64[2, 12]
        labels = labels[:, :-1].clone()  # i64[2, 11]
        zeros2 = zeros[:, 1:]
        zeros2.copy_(labels)
        zeros[:, 0].fill_(self.constant_0)
        zeros.masked_fill_(zeros == -100, 63)
        (
            model_encoder_layers_0,
            model_encoder_layers_1_self_attn_layer_norm,
            model_encoder_layers_1_self_attn_contiguous,
            model_decoder_expand_2,
            model_decoder_layers_0_add,
            model_decoder_layers_0_encoder_attn_contiguous,
        ) = self.model(input_features, zeros)
        return (
            model_encoder_layers_0,
            model_encoder_layers_1_self_attn_layer_norm,
            model_encoder_layers_1_self_attn_contiguous,
            model_decoder_expand_2,
            model_decoder_layers_0_add,
            model_decoder_layers_0_encoder_attn_contiguous,
        )
