"""Stage 1 of 2: WhisperForConditionalGeneration on rank 1.

model.encoder.layers.1.self_attn.k_proj, model.encoder.layers.1.self_attn.v_proj,
model.encoder.layers.1.self_attn.out_proj and 15 more

parameters  42.2 k
forward     296 us, 2.72 MFLOP
backward    297 us, 5.44 MFLOP, busy 99.1 % of the period
memory      1005 MiB of 16.0 GiB = weights 330 KiB + gradients 165 KiB + optimizer 330 KiB +
            stash 240 KiB + buffers 79.6 KiB + transient 110 KiB + reserve 1004 MiB

receives    encoder_layers_0: f32[2, 20, 32], 5.00 KiB from stage 0
receives    encoder_layers_1_self_attn_layer_norm: f32[2, 20, 32], 5.00 KiB from stage 0
receives    encoder_layers_1_self_attn_contiguous_4: f32[2, 4, 20, 8], 5.00 KiB from stage 0
receives    decoder_mask: bool[2, 1, 12, 12], 288 B from stage 0
receives    decoder_layers_0_add_2: f32[2, 12, 32], 3.00 KiB from stage 0
receives    decoder_layers_0_encoder_attn_contiguous_4: f32[2, 4, 12, 8], 3.00 KiB from stage 0

Written by p2bw 0.1.0 from examples/hf_whisper.py:tiny. Imports only torch; yours to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn


# the end of model.encoder.layers.1 (modeling_whisper.py:336)
class WhisperEncoderLayerTail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.k_proj = nn.Linear(32, 32, bias=False)
        self.self_attn.v_proj = nn.Linear(32, 32)
        self.self_attn.out_proj = nn.Linear(32, 32)
        self.final_layer_norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 128)
        self.fc2 = nn.Linear(128, 32)

    def forward(self, x: Tensor, q: Tensor, x2: Tensor) -> Tensor:
        k = self.self_attn.k_proj(x).view(2, -1, 4, 8).transpose(1, 2).contiguous()
        v = self.self_attn.v_proj(x).view(2, -1, 4, 8).transpose(1, 2).contiguous()
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)  # f32[2, 20, 4, 8]
        out_proj = self.self_attn.out_proj(y.contiguous().reshape(2, 20, -1))  # f32[2, 20, 32]
        x = x2 + F.dropout(out_proj, 0.0)
        fc2 = self.fc2(F.dropout(F.gelu(self.fc1(self.final_layer_norm(x))), 0.0))
        return x + F.dropout(fc2, 0.0)


class WhisperEncoderTail(nn.Module):  # the end of model.encoder (modeling_whisper.py:336)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"1": WhisperEncoderLayerTail()})
        self.layer_norm = nn.LayerNorm(32)

    def forward(self, x: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
        return self.layer_norm(self.layers["1"](x, x2, x3))  # f32[2, 20, 32]


# the end of model.decoder.layers.0 (modeling_whisper.py:336)
class WhisperDecoderLayerTail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_attn = nn.Module()
        self.encoder_attn.k_proj = nn.Linear(32, 32, bias=False)
        self.encoder_attn.v_proj = nn.Linear(32, 32)
        self.encoder_attn.out_proj = nn.Linear(32, 32)
        self.final_layer_norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 128)
        self.fc2 = nn.Linear(128, 32)

    def forward(self, encoder: Tensor, q: Tensor, x: Tensor) -> Tensor:
        k = self.encoder_attn.k_proj(encoder).view(2, -1, 4, 8).transpose(1, 2)  # f32[2, 4, 20, 8]
        k = k.contiguous()
        v = self.encoder_attn.v_proj(encoder).view(2, -1, 4, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v.contiguous(), scale=1.0)  # f32[2, 4, 12, 8]
        y = y.transpose(1, 2).contiguous().reshape(2, 12, -1)  # f32[2, 12, 32]
        x = x + F.dropout(self.encoder_attn.out_proj(y), 0.0)
        fc2 = self.fc2(F.dropout(F.gelu(self.fc1(self.final_layer_norm(x))), 0.0))
        return x + F.dropout(fc2, 0.0)


class WhisperAttention(nn.Module):  # model.decoder.layers.1.self_attn (modeling_whisper.py:312)
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


class WhisperAttention2(nn.Module):  # model.decoder.layers.1.encoder_attn (modeling_whisper.py:312)
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.k_proj = nn.Linear(32, 32, bias=False)
        self.v_proj = nn.Linear(32, 32)
        self.out_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor, encoder: Tensor) -> Tensor:
        q = (self.q_proj(x) * 0.3535533905932738).view(2, 12, -1, 8).transpose(1, 2)
        q = q.contiguous()
        k = self.k_proj(encoder).view(2, -1, 4, 8).transpose(1, 2).contiguous()  # f32[2, 4, 20, 8]
        v = self.v_proj(encoder).view(2, -1, 4, 8).transpose(1, 2).contiguous()
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)  # f32[2, 12, 4, 8]
        return self.out_proj(y.contiguous().reshape(2, 12, -1))  # f32[2, 12, 32]


class WhisperDecoderLayer(nn.Module):  # model.decoder.layers.1 (modeling_whisper.py:475)
    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(32)
        self.self_attn = WhisperAttention()
        self.encoder_attn_layer_norm = nn.LayerNorm(32)
        self.encoder_attn = WhisperAttention2()
        self.final_layer_norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 128)
        self.fc2 = nn.Linear(128, 32)

    def forward(self, x: Tensor, mask: Tensor, encoder: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.self_attn_layer_norm(x), mask), 0.0)  # f32[2, 12, 32]
        encoder_attn = self.encoder_attn(self.encoder_attn_layer_norm(x), encoder)
        x = x + F.dropout(encoder_attn, 0.0)
        fc2 = self.fc2(F.dropout(F.gelu(self.fc1(self.final_layer_norm(x))), 0.0))
        return x + F.dropout(fc2, 0.0)


class WhisperDecoderTail(nn.Module):  # the end of model.decoder (modeling_whisper.py:336)
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([WhisperDecoderLayerTail(), WhisperDecoderLayer()])
        self.layer_norm = nn.LayerNorm(32)

    def forward(self, encoder: Tensor, x: Tensor, x2: Tensor, mask: Tensor) -> Tensor:
        x = self.layers[0](encoder, x, x2)  # f32[2, 12, 32]
        return self.layer_norm(self.layers[1](x, mask, encoder))


class WhisperModelTail(nn.Module):  # the end of model (modeling_whisper.py:336)
    def __init__(self) -> None:
        super().__init__()
        self.encoder = WhisperEncoderTail()
        self.decoder = WhisperDecoderTail()

    def forward(
        self, x: Tensor, x2: Tensor, x3: Tensor, x4: Tensor, x5: Tensor, mask: Tensor
    ) -> Tensor:
        return self.decoder(self.encoder(x, x2, x3), x4, x5, mask)  # f32[2, 12, 32]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = WhisperModelTail()
        self.proj_out = nn.Linear(32, 64, bias=False)

    def forward(
        self,
        labels: Tensor,
        encoder_layers_0: Tensor,
        encoder_layers_1_self_attn_layer_norm: Tensor,
        encoder_layers_1_self_attn_contiguous_4: Tensor,
        decoder_mask: Tensor,
        decoder_layers_0_add_2: Tensor,
        decoder_layers_0_encoder_attn_contiguous_4: Tensor,
    ) -> Tensor:
        model = self.model(
            encoder_layers_1_self_attn_layer_norm,
            encoder_layers_1_self_attn_contiguous_4,
            encoder_layers_0,
            decoder_layers_0_encoder_attn_contiguous_4,
            decoder_layers_0_add_2,
            decoder_mask,
        )  # f32[2, 12, 32]
        return F.cross_entropy(self.proj_out(model).view(-1, 64), labels.reshape(-1))  # f32[]
