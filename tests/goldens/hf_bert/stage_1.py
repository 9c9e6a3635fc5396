"""Stage 1 of 2: BertForMaskedLM on rank 1.

bert.encoder.layer.0.output, bert.encoder.layer.1, cls

parameters  20.1 k
forward     121 us, 1.31 MFLOP
backward    121 us, 2.62 MFLOP, busy 99.8 % of the period
memory      1004 MiB of 16.0 GiB = weights 157 KiB + gradients 78.6 KiB + optimizer 157 KiB +
            stash 119 KiB + buffers 77.0 KiB + transient 70.1 KiB + reserve 1004 MiB

receives    mask: bool[2, 1, 16, 16], 512 B from stage 0
receives    encoder_layer_0_attention: f32[2, 16, 32], 4.00 KiB from stage 0
receives    encoder_layer_0_intermediate: f32[2, 16, 128], 16.0 KiB from stage 0

Written by p2bw 0.1.0 from examples/hf_bert.py:tiny. Imports only torch; yours to change.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BertOutput(nn.Module):  # bert.encoder.layer.0-1.output (modeling_bert.py:350)
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(128, 32)
        self.dropout = nn.Dropout(0.1)
        self.LayerNorm = nn.LayerNorm(32, eps=1e-12)

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + x2)  # f32[2, 16, 32]


class BertLayerTail(nn.Module):  # the end of bert.encoder.layer.0 (modeling_bert.py:350)
    def __init__(self) -> None:
        super().__init__()
        self.output = BertOutput()

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        return self.output(x, x2)  # f32[2, 16, 32]


class BertSelfAttention(nn.Module):  # bert.encoder.layer.1.attention.self (modeling_bert.py:177)
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


class BertSelfOutput(nn.Module):  # bert.encoder.layer.1.attention.output (modeling_bert.py:291)
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 32)
        self.dropout = nn.Dropout(0.1)
        self.LayerNorm = nn.LayerNorm(32, eps=1e-12)

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + x2)  # f32[2, 16, 32]


class BertAttention(nn.Module):  # bert.encoder.layer.1.attention (modeling_bert.py:177)
    def __init__(self) -> None:
        super().__init__()
        self.self = BertSelfAttention()
        self.output = BertSelfOutput()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.self(x, mask), x)  # f32[2, 16, 32]


class BertIntermediate(nn.Module):  # bert.encoder.layer.1.intermediate (modeling_bert.py:337)
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 128)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))  # f32[2, 16, 128]


class BertLayer(nn.Module):  # bert.encoder.layer.1 (modeling_bert.py:177)
    def __init__(self) -> None:
        super().__init__()
        self.attention = BertAttention()
        self.intermediate = BertIntermediate()
        self.output = BertOutput()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attention = self.attention(x, mask)  # f32[2, 16, 32]
        return self.output(self.intermediate(attention), attention)


class BertModelTail(nn.Module):  # the end of bert (modeling_bert.py:350)
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([BertLayerTail(), BertLayer()])

    def forward(self, x: Tensor, x2: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder.layer[0](x, x2)  # f32[2, 16, 32]
        return self.encoder.layer[1](x, mask)


class BertPredictionHeadTransform(nn.Module):  # cls.predictions.transform (modeling_bert.py:481)
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 32)
        self.LayerNorm = nn.LayerNorm(32, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))  # f32[2, 16, 32]


class BertLMPredictionHead(nn.Module):  # cls.predictions (modeling_bert.py:481)
    def __init__(self) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform()
        self.decoder = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))  # f32[2, 16, 64]


class BertOnlyMLMHead(nn.Module):  # cls (modeling_bert.py:481)
    def __init__(self) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead()

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)  # f32[2, 16, 64]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModelTail()
        self.cls = BertOnlyMLMHead()

    def forward(
        self,
        labels: Tensor,
        mask: Tensor,
        encoder_layer_0_attention: Tensor,
        encoder_layer_0_intermediate: Tensor,
    ) -> Tensor:
        bert = self.bert(encoder_layer_0_intermediate, encoder_layer_0_attention, mask)
        return F.cross_entropy(self.cls(bert).view(-1, 64), labels.view(-1))  # f32[]
