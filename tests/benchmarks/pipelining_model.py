"""The transformer that the pipelining benchmark trains: a model file like any user's."""

from collections.abc import Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # little beside the blocks, so that equal cuts are balanced
sample = 0  # tokens, as the factory that ran last has made it


class Embedding(nn.Module):
    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, dim=-1)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(x))


class Part(nn.Module):
    """Blocks number first .. last-1, under the names that they have in the whole model."""

    def __init__(self, first: int, last: int, *, blocks: int, width: int, tokens: int) -> None:
        super().__init__()
        if first == 0:
            self.embedding = Embedding(width, tokens)
        self.blocks = nn.ModuleDict({str(i): Block(width) for i in range(first, last)})
        if last == blocks:
            self.head = Head(width)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "embedding"):
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x) if hasattr(self, "head") else x


def model(blocks: int, width: int, tokens: int, tied: bool = False) -> Part:
    global sample
    sample = tokens
    whole = Part(0, blocks, blocks=blocks, width=width, tokens=tokens)
    if tied:
        whole.head.logits.weight = whole.embedding.tokens.weight
    return whole


def inputs(batch_size: int) -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (batch_size, sample)),)


def targets(batch_size: int) -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (batch_size, sample)),)


def data(batch_size: int, seed: int) -> Iterator[tuple[tuple[Tensor], tuple[Tensor]]]:
    """Endless pairs of a few microbatches that lie in memory, as the peer is given them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (16, batch_size, sample)
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    wanted = torch.randint(VOCABULARY, shape, generator=generator)
    for i in cycle(range(16)):
        yield (ids[i],), (wanted[i],)


def loss(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)
