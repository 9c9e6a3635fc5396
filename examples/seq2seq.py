"""An LSTM encoder-decoder with attention, after GNMT (arXiv:1609.08144).

p2bw compile examples/seq2seq.py --gpus 8
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shapes in the comments: B samples, S source tokens, T target tokens, C channels.
SOURCE, TARGET = 50, 48


class Encoder(nn.Module):
    """A two-way layer, then one-way layers with residual connections."""

    def __init__(self, layers: int, width: int, vocab: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.drop = nn.Dropout(dropout)
        self.first = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.rest = nn.ModuleList(
            nn.LSTM(width, width, batch_first=True) for _ in range(layers - 1)
        )

    def forward(self, source: Tensor) -> Tensor:
        x, _ = self.first(self.drop(self.embed(source)))  # (B, S, C)
        for lstm in self.rest:
            y, _ = lstm(self.drop(x))
            x = x + y
        return x


class Decoder(nn.Module):
    """The first layer asks; every later layer hears the answer beside its input."""

    def __init__(self, layers: int, width: int, vocab: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.drop = nn.Dropout(dropout)
        self.first = nn.LSTM(width, width, batch_first=True)
        self.query = nn.Linear(width, width, bias=False)
        self.rest = nn.ModuleList(
            nn.LSTM(2 * width, width, batch_first=True) for _ in range(layers - 1)
        )
        self.head = nn.Linear(width, vocab)

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        x, _ = self.first(self.drop(self.embed(target)))  # (B, T, C)
        scores = self.query(x) @ memory.transpose(1, 2)  # (B, T, S)
        answer = scores.softmax(dim=-1) @ memory  # (B, T, C)
        for lstm in self.rest:
            y, _ = lstm(torch.cat([self.drop(x), answer], dim=-1))
            x = x + y
        return self.head(x)  # (B, T, vocab)


class Seq2Seq(nn.Module):
    def __init__(self, layers: int, width: int, vocab: int, dropout: float) -> None:
        super().__init__()
        self.encoder = Encoder(layers, width, vocab, dropout)
        self.decoder = Decoder(layers, width, vocab, dropout)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decoder(target, self.encoder(source))


# `inputs` and `targets` are not told which factory built the model: it leaves here what they need.
vocabulary: int


def model(layers: int = 8, width: int = 1024, vocab: int = 32000, dropout: float = 0.2) -> Seq2Seq:
    """GNMT with eight layers a side, 0.26B parameters."""
    global vocabulary
    vocabulary = vocab
    return Seq2Seq(layers, width, vocab, dropout)


def tiny(layers: int = 3, width: int = 16, vocab: int = 64, dropout: float = 0.2) -> Seq2Seq:
    return model(layers, width, vocab, dropout)


def inputs(batch_size: int) -> tuple[Tensor, ...]:
    """A sentence, and its translation moved right by one: the decoder sees the tokens so far."""
    source = torch.randint(vocabulary, (batch_size, SOURCE))
    target = torch.randint(vocabulary, (batch_size, TARGET))
    return source, target


def targets(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(vocabulary, (batch_size, TARGET)),)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
