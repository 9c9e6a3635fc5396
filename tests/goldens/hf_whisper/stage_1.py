"""Stage 1 of 2: WhisperForConditionalGeneration on rank 1.

model.decoder.layers.0.self_attn.out_proj, model.decoder.layers.0.encoder_attn_layer_norm,
model.decoder.layers.0.encoder_attn.q_proj, model.decoder.layers.0.encoder_attn.out_proj,
model.decoder.layers.0.final_layer_norm, model.decoder.layers.0.fc1,
model.decoder.layers.0.activation_fn and 12 more

parameters  28.6 k
forward     341 us, 1.52 MFLOP
backward    256 us, 3.05 MFLOP, busy 99.9 % of the period
memory      1004 MiB of 16.0 GiB
            = weights 224 KiB + gradients 112 KiB + optimizer 224 KiB + stash 185 KiB +
            buffers 64.2 KiB + transient 24.0 KiB + reserve 1004 MiB

receives    model_decoder_repeat: i64[2, 12], 192 B from stage 0
receives    model_decoder_dropout: f32[2, 12, 32], 3.00 KiB from stage 0
receives    model_decoder_unsqueeze_4: i64[2, 1, 1, 1], 16 B from stage 0
receives    model_decoder_layers_0_self_attn_q_proj: f32[2, 12, 32], 3.00 KiB from stage 0
receives    model_decoder_layers_0_self_attn_view_2: f32[2, 12, 4, 8], 3.00 KiB from stage 0
receives    model_decoder_layers_0_self_attn_view_3: f32[2, 12, 4, 8], 3.00 KiB from stage 0
receives    model_decoder_layers_0_encoder_attn_view_2: f32[2, 20, 4, 8], 5.00 KiB from stage 0
receives    model_decoder_layers_0_encoder_attn_view_3: f32[2, 20, 4, 8], 5.00 KiB from stage 0
receives    model_decoder_layers_1_encoder_attn_contiguous_2: f32[2, 4, 20, 8], 5.00 KiB from stage
            0
receives    model_decoder_layers_1_encoder_attn_contiguous_3: f32[2, 4, 20, 8], 5.00 KiB from stage
            0

Written by p2bw 0.1.0 from examples/hf_whisper.py:tiny.
Imports only torch; yours to read, change and run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WhisperAttentionTail(nn.Module):
    """The end of model.decoder.layers.0.self_attn (modeling_whisper.py:310)."""

    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q = (x * 0.3535533905932738).view(2, 12, -1, 8).transpose(1, 2).contiguous()
        k = k.transpose(1, 2).contiguous()
        v = v.transpose(1, 2).contiguous()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        y = y.reshape(2, -1, 12, 8).transpose(1, 2).contiguous().reshape(2, 12, -1)
        return self.out_proj(y)


class WhisperAttentionHead(nn.Module):
    """The beginning of model.decoder.layers.0.encoder_attn (modeling_whisper.py:310)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.out_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = (self.q_proj(x) * 0.3535533905932738).view(2, 12, -1, 8).transpose(1, 2)
        q = q.contiguous()
        k = k.transpose(1, 2).contiguous()  # f32[2, 4, 20, 8]
        v = v.transpose(1, 2).contiguous()
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0).reshape(2, -1, 12, 8)
        return self.out_proj(y.transpose(1, 2).contiguous().reshape(2, 12, -1))  # f32[2, 12, 32]


class WhisperDecoderLayerTail(nn.Module):
    """The end of model.decoder.layers.0 (modeling_whisper.py:310)."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = WhisperAttentionTail()
        self.encoder_attn_layer_norm = nn.LayerNorm(32)
        self.encoder_attn = WhisperAttentionHead()
        self.final_layer_norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 128)
        self.fc2 = nn.Linear(128, 32)

    def forward(
        self,
        x: Tensor,
        x2: Tensor,
        x3: Tensor,
        mask: Tensor,
        x4: Tensor,
        x5: Tensor,
        x6: Tensor,
    ) -> Tensor:
        x = x4 + F.dropout(self.self_attn(x, x2, x3, mask), 0.0)  # f32[2, 12, 32]
        encoder_attn = self.encoder_attn(self.encoder_attn_layer_norm(x), x5, x6)
        x = x + F.dropout(encoder_attn, 0.0)
        fc2 = self.fc2(F.dropout(F.gelu(self.fc1(self.final_layer_norm(x))), 0.0))
        return x + F.dropout(fc2, 0.0)


class WhisperAttention(nn.Module):
    """model.decoder.layers.1.self_attn (modeling_whisper.py:310)."""

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


class WhisperAttentionHead2(nn.Module):
    """The beginning of model.decoder.layers.1.encoder_attn (modeling_whisper.py:310)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.out_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = (self.q_proj(x) * 0.3535533905932738).view(2, 12, -1, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q.contiguous(), k, v, scale=1.0)
        y = y.reshape(2, -1, 12, 8).transpose(1, 2).contiguous().reshape(2, 12, -1)
        return self.out_proj(y)


class WhisperDecoderLayerHead(nn.Module):
    """The beginning of model.decoder.layers.1 (modeling_whisper.py:472)."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(32)
        self.self_attn = WhisperAttention()
        self.encoder_attn_layer_norm = nn.LayerNorm(32)
        self.encoder_attn = WhisperAttentionHead2()
        self.final_layer_norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 128)
        self.fc2 = nn.Linear(128, 32)

    def forward(self, x: Tensor, mask: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.self_attn_layer_norm(x), mask), 0.0)  # f32[2, 12, 32]
        encoder_attn = self.encoder_attn(self.encoder_attn_layer_norm(x), x2, x3)
        x = x + F.dropout(encoder_attn, 0.0)
        fc2 = self.fc2(F.dropout(F.gelu(self.fc1(self.final_layer_norm(x))), 0.0))
        return x + F.dropout(fc2, 0.0)


class WhisperDecoderTail(nn.Module):
    """The end of model.decoder (masking_utils.py:771)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([WhisperDecoderLayerTail(), WhisperDecoderLayerHead()])
        self.layer_norm = nn.LayerNorm(32)

    def forward(
        self,
        x: Tensor,
        x2: Tensor,
        x3: Tensor,
        x4: Tensor,
        x5: Tensor,
        x6: Tensor,
        x7: Tensor,
        x8: Tensor,
        x9: Tensor,
        x10: Tensor,
    ) -> Tensor:
        sums = (x.diff(prepend=x[:, :1] - 1) != 1).cumsum(-1)  # i64[2, 12]
        y = x.expand(2, -1)
        positions = torch.arange(12, device=x.device) + 0  # i64[12]
        positions2 = torch.arange(12, device=x.device) + 0
        positions = positions.unsqueeze(0).unsqueeze(1).unsqueeze(3)  # i64[1, 1, 12, 1]
        positions2 = positions2.unsqueeze(0).unsqueeze(1).unsqueeze(2)  # i64[1, 1, 1, 12]
        mask = positions.new_ones((), dtype=torch.bool)  # bool[]
        mask = mask & (sums[x2, positions] == sums[x2, positions2])  # bool[2, 1, 12, 12]
        x = y[x2, positions]  # i64[2, 1, 12, 1]
        y = y[x2, positions2]  # i64[2, 1, 1, 12]
        mask = (mask & (y <= x)).expand(2, -1, 12, 12)  # bool[2, 1, 12, 12]
        x = self.layers[0](x3, x4, x5, mask, x6, x7, x8)  # f32[2, 12, 32]
        return self.layer_norm(self.layers[1](x, mask, x9, x10))


class WhisperModelTail(nn.Module):
    """The end of model (masking_utils.py:771)."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = WhisperDecoderTail()

    def forward(
        self,
        x: Tensor,
        x2: Tensor,
        x3: Tensor,
        x4: Tensor,
        x5: Tensor,
        x6: Tensor,
        x7: Tensor,
        x8: Tensor,
        x9: Tensor,
        x10: Tensor,
    ) -> Tensor:
        return self.decoder(x, x2, x3, x4, x5, x6, x7, x8, x9, x10)  # f32[2, 12, 32]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = WhisperModelTail()
        self.proj_out = nn.Linear(32, 64, bias=False)

    def forward(
        self,
        labels: Tensor,
        model_decoder_repeat: Tensor,
        model_decoder_dropout: Tensor,
        model_decoder_unsqueeze_4: Tensor,
        model_decoder_layers_0_self_attn_q_proj: Tensor,
        model_decoder_layers_0_self_attn_view_2: Tensor,
        model_decoder_layers_0_self_attn_view_3: Tensor,
        model_decoder_layers_0_encoder_attn_view_2: Tensor,
        model_decoder_layers_0_encoder_attn_view_3: Tensor,
        model_decoder_layers_1_encoder_attn_contiguous_2: Tensor,
        model_decoder_layers_1_encoder_attn_contiguous_3: Tensor,
    ) -> Tensor:
        model = self.model(
            model_decoder_repeat,
            model_decoder_unsqueeze_4,
            model_decoder_layers_0_self_attn_q_proj,
            model_decoder_layers_0_self_attn_view_2,
            model_decoder_layers_0_self_attn_view_3,
            model_decoder_dropout,
            model_decoder_layers_0_encoder_attn_view_2,
            model_decoder_layers_0_encoder_attn_view_3,
            model_decoder_layers_1_encoder_attn_contiguous_2,
            model_decoder_layers_1_encoder_attn_contiguous_3,
        )  # f32[2, 12, 32]
        return F.cross_entropy(self.proj_out(model).view(-1, 64), labels.reshape(-1))  # f32[]
