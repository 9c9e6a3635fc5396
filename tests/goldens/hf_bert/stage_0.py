"""Stage 0 of 2: BertForMaskedLM on rank 0.

bert.embeddings, bert.encoder.layer.0.attention, bert.encoder.layer.0.intermediate

parameters  11.2 k
forward     150 us, 590 kFLOP
backward    90.5 us, 1.18 MFLOP, busy 99.6 % of the period
memory      1004 MiB of 16.0 GiB = weights 87.5 KiB + gradients 43.8 KiB + optimizer 87.5 KiB +
            stash 160 KiB + buffers 64.8 KiB + transient 80.4 KiB + reserve 1004 MiB

sends       mask: bool[2, 1, 16, 16], 512 B to stage 1
sends       encoder_layer_0_attention: f32[2, 16, 32], 4.00 KiB to stage 1
sends       encoder_layer_0_intermediate: f32[2, 16, 128], 16.0 KiB to stage 1

Written by p2bw 0.1.0 from examples/hf_bert.py:tiny. Imports only torch; yours to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BertEmbeddings(nn.Module):  # bert.embeddings (modeling_bert.py:85)
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "position_ids", torch.zeros(1, 16, dtype=torch.int64), persistent=False
        )
        self.register_buffer(
            "token_type_ids", torch.zeros(1, 16, dtype=torch.int64), persistent=False
        )
        self.word_embeddings = nn.Embedding(64, 32, padding_idx=0)
        self.token_type_embeddings = nn.Embedding(2, 32)
        self.position_embeddings = nn.Embedding(16, 32)
        self.LayerNorm = nn.LayerNorm(32, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids: Tensor) -> Tensor:
        index = self.position_ids[:]  # i64[1, 16]
        index2 = self.token_type_ids.expand(1, -1).gather(1, index).expand(2, 16)  # i64[2, 16]
        word_embeddings = self.word_embeddings(input_ids)  # f32[2, 16, 32]
        x = word_embeddings + self.token_type_embeddings(index2)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(index)))


class BertSelfAttention(nn.Module):  # bert.encoder.layer.0.attention.self (modeling_bert.py:177)
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(32, 32)
        self.key = nn.Linear(32, 32)
        self.value = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.query(x).view(2, 16, -1, 8).transpose(1, 2)  # f32[2, 4, 16, 8]
        k = self.key(x).view(2, 16, -1, 8).transpose(1, 2)
        v = self.value(x).view(2, 16, -1, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=0.1, scale=0.3535533905932738
        )
        return y.transpose(1, 2).contiguous().reshape(2, 16, -1)  # f32[2, 16, 32]


class BertSelfOutput(nn.Module):  # bert.encoder.layer.0.attention.output (modeling_bert.py:291)
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 32)
        self.dropout = nn.Dropout(0.1)
        self.LayerNorm = nn.LayerNorm(32, eps=1e-12)

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + x2)  # f32[2, 16, 32]


class BertAttention(nn.Module):  # bert.encoder.layer.0.attention (modeling_bert.py:177)
    def __init__(self) -> None:
        super().__init__()
        self.self = BertSelfAttention()
        self.output = BertSelfOutput()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.self(x, mask), x)  # f32[2, 16, 32]


class BertIntermediate(nn.Module):  # bert.encoder.layer.0.intermediate (modeling_bert.py:337)
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 128)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))  # f32[2, 16, 128]


class BertLayerHead(nn.Module):  # the beginning of bert.encoder.layer.0 (modeling_bert.py:177)
    def __init__(self) -> None:
        super().__init__()
        self.attention = BertAttention()
        self.intermediate = BertIntermediate()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.attention(x, mask)  # f32[2, 16, 32]
        return attention, self.intermediate(attention)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = nn.Module()
        self.bert.embeddings = BertEmbeddings()
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList([BertLayerHead()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embeddings = self.bert.embeddings(input_ids)  # f32[2, 16, 32]
        mask = attention_mask.to(torch.bool)  # bool[2, 16]
        batch = torch.arange(2, device=input_ids.device)[:, None, None, None]  # i64[2, 1, 1, 1]
        rows = torch.arange(16, device=input_ids.device)[None, None, :, None]  # i64[1, 1, 16, 1]
        columns = torch.arange(16, device=input_ids.device)[None, None, None]  # i64[1, 1, 1, 16]
        mask = (rows >= 0) & mask[batch, columns]  # bool[2, 1, 16, 16]
        attention, intermediate = self.bert.encoder.layer[0](embeddings, mask)
        return mask, attention, intermediate
