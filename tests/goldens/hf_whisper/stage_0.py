"""Stage 0 of 2: WhisperForConditionalGeneration on rank 0.

model.encoder, model.decoder.embed_tokens, model.decoder.embed_positions,
model.decoder.layers.0.self_attn_layer_norm, model.decoder.layers.0.self_attn.q_proj,
model.decoder.layers.0.self_attn.k_proj, model.decoder.layers.0.self_attn.v_proj,
model.decoder.layers.0.encoder_attn.k_proj and 3 more

parameters  46.7 k
forward     326 us, 4.12 MFLOP
backward    267 us, 7.01 MFLOP, busy 99.2 % of the period
memory      1005 MiB of 16.0 GiB
            = weights 364 KiB + gradients 180 KiB + optimizer 360 KiB + stash 479 KiB +
            buffers 64.2 KiB + transient 40.0 KiB + reserve 1004 MiB

sends       model_decoder_repeat: i64[2, 12], 192 B to stage 1
sends       model_decoder_dropout: f32[2, 12, 32], 3.00 KiB to stage 1
sends       model_decoder_unsqueeze_4: i64[2, 1, 1, 1], 16 B to stage 1
sends       model_decoder_layers_0_self_attn_q_proj: f32[2, 12, 32], 3.00 KiB to stage 1
sends       model_decoder_layers_0_self_attn_view_2: f32[2, 12, 4, 8], 3.00 KiB to stage 1
sends       model_decoder_layers_0_self_attn_view_3: f32[2, 12, 4, 8], 3.00 KiB to stage 1
sends       model_decoder_layers_0_encoder_attn_view_2: f32[2, 20, 4, 8], 5.00 KiB to stage 1
sends       model_decoder_layers_0_encoder_attn_view_3: f32[2, 20, 4, 8], 5.00 KiB to stage 1
sends       model_decoder_layers_1_encoder_attn_contiguous_2: f32[2, 4, 20, 8], 5.00 KiB to stage 1
sends       model_decoder_layers_1_encoder_attn_contiguous_3: f32[2, 4, 20, 8], 5.00 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_whisper.py:tiny.
Imports only torch; yours to read, change and run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WhisperAttention(nn.Module):
    """model.encoder.layers.0.self_attn .. model.encoder.layers.1.self_attn
    (modeling_whisper.py:310).
    """

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
    """model.encoder.layers.0 .. model.encoder.layers.1 (modeling_whisper.py:394)."""

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


class WhisperEncoder(nn.Module):
    """model.encoder (modeling_whisper.py:615)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(80, 32, 3, padding=1)
        self.conv2 = nn.Conv1d(32, 32, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(20, 32).requires_grad_(False)
        self.layers = nn.ModuleList(WhisperEncoderLayer() for _ in range(2))
        self.layer_norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        conv2 = F.gelu(self.conv2(F.gelu(self.conv1(x)))).permute(0, 2, 1)  # f32[2, 20, 32]
        x = conv2 + self.embed_positions(torch.arange(20, device=x.device))
        x = F.dropout(x, 0.0)
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class WhisperPositionalEmbedding(nn.Module):
    """model.decoder.embed_positions (modeling_whisper.py:213)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(12, 32))

    def forward(self, positions: Tensor) -> Tensor:
        return self.weight[positions]  # f32[2, 12, 32]


class WhisperAttentionHead(nn.Module):
    """The beginning of model.decoder.layers.0.self_attn (modeling_whisper.py:310)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.k_proj = nn.Linear(32, 32, bias=False)
        self.v_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_proj = self.q_proj(x)  # f32[2, 12, 32]
        k_proj = self.k_proj(x).view(2, -1, 4, 8)  # f32[2, 12, 4, 8]
        v_proj = self.v_proj(x).view(2, -1, 4, 8)
        return q_proj, k_proj, v_proj


class WhisperAttentionMiddle(nn.Module):
    """The middle of model.decoder.layers.0.encoder_attn (modeling_whisper.py:334)."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(32, 32, bias=False)
        self.v_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k_proj = self.k_proj(x).view(2, -1, 4, 8)  # f32[2, 20, 4, 8]
        v_proj = self.v_proj(x).view(2, -1, 4, 8)
        return k_proj, v_proj


class WhisperDecoderLayerHead(nn.Module):
    """The beginning of model.decoder.layers.0 (modeling_whisper.py:472)."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(32)
        self.self_attn = WhisperAttentionHead()
        self.encoder_attn = WhisperAttentionMiddle()

    def forward(self, x: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        q_proj, k_proj, v_proj = self.self_attn(self.self_attn_layer_norm(x))
        k_proj2, v_proj2 = self.encoder_attn(x2)  # f32[2, 20, 4, 8] each
        return q_proj, k_proj, v_proj, k_proj2, v_proj2


class WhisperAttentionMiddle2(nn.Module):
    """The middle of model.decoder.layers.1.encoder_attn (modeling_whisper.py:334)."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(32, 32, bias=False)
        self.v_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k_proj = self.k_proj(x).view(2, -1, 4, 8).transpose(1, 2).contiguous()  # f32[2, 4, 20, 8]
        v_proj = self.v_proj(x).view(2, -1, 4, 8).transpose(1, 2).contiguous()
        return k_proj, v_proj


class WhisperDecoderLayerMiddle(nn.Module):
    """The middle of model.decoder.layers.1 (modeling_whisper.py:334)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_attn = WhisperAttentionMiddle2()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k_proj, v_proj = self.encoder_attn(x)  # f32[2, 4, 20, 8] each
        return k_proj, v_proj


class WhisperDecoderHead(nn.Module):
    """The beginning of model.decoder (modeling_whisper.py:734)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32, padding_idx=63)
        self.embed_positions = WhisperPositionalEmbedding()
        self.layers = nn.ModuleList([WhisperDecoderLayerHead(), WhisperDecoderLayerMiddle()])

    def forward(self, zeros: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        embed_tokens = self.embed_tokens(zeros)  # f32[2, 12, 32]
        positions = (torch.arange(12, device=zeros.device) + 0).unsqueeze(0).repeat(2, 1)
        y = F.dropout(embed_tokens + self.embed_positions(positions), 0.0)  # f32[2, 12, 32]
        positions2 = torch.arange(2, device=zeros.device).unsqueeze(1).unsqueeze(2)  # i64[2, 1, 1]
        positions2 = positions2.unsqueeze(3)  # i64[2, 1, 1, 1]
        q_proj, k_proj, v_proj, k_proj2, v_proj2 = self.layers[0](y, x)
        k_proj3, v_proj3 = self.layers[1](x)  # f32[2, 4, 20, 8] each
        return positions, y, positions2, q_proj, k_proj, v_proj, k_proj2, v_proj2, k_proj3, v_proj3


class WhisperModelHead(nn.Module):
    """The beginning of model (modeling_whisper.py:615)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = WhisperEncoder()
        self.decoder = WhisperDecoderHead()

    def forward(self, x: Tensor, zeros: Tensor) -> tuple[Tensor, ...]:
        (
            positions,
            x,
            positions2,
            q_proj,
            k_proj,
            v_proj,
            k_proj2,
            v_proj2,
            k_proj3,
            v_proj3,
        ) = self.decoder(zeros, self.encoder(x))
        return positions, x, positions2, q_proj, k_proj, v_proj, k_proj2, v_proj2, k_proj3, v_proj3


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
            model_decoder_repeat,
            model_decoder_dropout,
            model_decoder_unsqueeze_4,
            model_decoder_layers_0_self_attn_q_proj,
            model_decoder_layers_0_self_attn_view_2,
            model_decoder_layers_0_self_attn_view_3,
            model_decoder_layers_0_encoder_attn_view_2,
            model_decoder_layers_0_encoder_attn_view_3,
            model_decoder_layers_1_encoder_attn_contiguous_2,
            model_decoder_layers_1_encoder_attn_contiguous_3,
        ) = self.model(input_features, zeros)
        return (
            model_decoder_repeat,
            model_decoder_dropout,
            model_decoder_unsqueeze_4,
            model_decoder_layers_0_self_attn_q_proj,
            model_decoder_layers_0_self_attn_view_2,
            model_decoder_layers_0_self_attn_view_3,
            model_decoder_layers_0_encoder_attn_view_2,
            model_decoder_layers_0_encoder_attn_view_3,
            model_decoder_layers_1_encoder_attn_contiguous_2,
            model_decoder_layers_1_encoder_attn_contiguous_3,
        )
