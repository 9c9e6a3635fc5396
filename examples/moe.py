"""A mixture of experts like Mixtral (arXiv:2401.04088), routed as one writes it in plain PyTorch.

Each token goes to the two experts that its router likes best, and each expert sees just its own
tokens: how many, and whether any, the data decides. No tracer can follow that, so `MoE` stays a
call of this very module in the stages' code, and everything around it is compiled as ever.

    p2bw compile examples/moe.py --gpus 8
    p2bw compile examples/moe.py:tiny --gpus 2 --depth 2 --microbatch 4 --out build/moe
    p2bw run build/moe --steps 20
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shapes in the comments: B samples, T tokens, C channels (width), H heads, E experts, V vocabulary.


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    hidden: int
    experts: int
    context: int
    vocab: int


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, C/H)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """Every token through its two best experts, weighted by how much the router likes them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (B*T, C)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)  # (B*T, 2) each
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token) == 0:  # nobody came
                continue
            share = weights[token, place].unsqueeze(-1)
            y.index_add_(0, token, (share * expert(tokens[token])).to(y.dtype))
        return y.view_as(x)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.width)
        self.attn = Attention(config)
        self.norm_2 = nn.RMSNorm(config.width)
        self.moe = MoE(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.moe(self.norm_2(x))


class Mixture(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.head(self.norm(x))  # (B, T, V)


config: Config  # of the model that a factory has built; `inputs` and `targets` follow it


def model(
    layers: int = 8,
    width: int = 512,
    heads: int = 8,
    hidden: int = 1024,
    experts: int = 8,
    context: int = 256,
    vocab: int = 32000,
) -> Mixture:
    """142M parameters, of which a token meets 66M."""
    global config
    config = Config(layers, width, heads, hidden, experts, context, vocab)
    return Mixture(config)


def tiny(
    layers: int = 4,
    width: int = 32,
    heads: int = 4,
    hidden: int = 64,
    experts: int = 4,
    context: int = 16,
    vocab: int = 128,
) -> Mixture:
    """For tests."""
    return model(layers, width, heads, hidden, experts, context, vocab)


def inputs(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(config.vocab, (batch_size, config.context)),)


def targets(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(config.vocab, (batch_size, config.context)),)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
