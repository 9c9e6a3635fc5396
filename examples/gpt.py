"""A GPT in plain PyTorch, from a toy to GPT-3, trained on the source code of Python itself.

Nothing here knows of p2bw: it is the kind of file that you would write anyway, with a few
module-level functions under agreed names.

    p2bw compile examples/gpt.py --gpus 8                   # 2.2B parameters into 8 stages
    p2bw compile examples/gpt.py --set layers=24 --gpus 8   # any argument of a factory

Trained on this machine, on CPUs if need be:

    p2bw compile examples/gpt.py:small --gpus 2 --depth 2 --microbatch 8 --out build/small
    p2bw run build/small --steps 500
"""

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shapes in the comments: B samples, T tokens, C channels (width), H heads, V vocabulary.


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    context: int
    vocab: int
    dropout: float


class Attention(nn.Module):
    """Causal self-attention: every token looks at itself and at those before it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, T, C) each
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)  # (B, H, T, C/H)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.drop(self.proj(y))


class MLP(nn.Module):
    """Each token by itself: four times as wide, a bend, and back."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, 4 * config.width)
        self.proj = nn.Linear(4 * config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.proj(F.gelu(self.fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.wte.weight  # one matrix reads tokens and predicts them
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):  # 2 * layers of them add up along the residual path
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))  # (B, T, V)


# Factories. `inputs`, `targets` and `data` are not told which one built the model, so it leaves
# its configuration here; a factory always runs before them.
config: Config


def model(
    layers: int = 32,
    width: int = 2304,
    heads: int = 32,
    context: int = 512,
    vocab: int = 50304,
    dropout: float = 0.1,
    dtype: str = "float32",
) -> GPT:
    """2.2B parameters: the GPT of the PipeDream-2BW paper (arXiv:2006.09503)."""
    global config, factored
    config, factored = Config(layers, width, heads, context, vocab, dropout), False
    return GPT(config).to(getattr(torch, dtype))


def tiny(
    layers: int = 4,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
    vocab: int = 256,
    dropout: float = 0.1,
) -> GPT:
    """0.2M parameters, for tests."""
    return model(layers, width, heads, context, vocab, dropout)


def small(
    layers: int = 4,
    width: int = 256,
    heads: int = 8,
    context: int = 128,
    vocab: int = 256,
    dropout: float = 0.1,
) -> GPT:
    """3.3M parameters: learns to write something like Python within minutes on two CPU cores."""
    return model(layers, width, heads, context, vocab, dropout)


def gpt2_medium(
    layers: int = 24,
    width: int = 1024,
    heads: int = 16,
    context: int = 1024,
    vocab: int = 50304,
    dropout: float = 0.1,
) -> GPT:
    """355M parameters."""
    return model(layers, width, heads, context, vocab, dropout)


def gpt2_xl(
    layers: int = 48,
    width: int = 1600,
    heads: int = 25,
    context: int = 1024,
    vocab: int = 50304,
    dropout: float = 0.1,
) -> GPT:
    """1.6B parameters."""
    return model(layers, width, heads, context, vocab, dropout)


def gpt3_175b(
    layers: int = 96,
    width: int = 12288,
    heads: int = 96,
    context: int = 2048,
    vocab: int = 50304,
    dropout: float = 0.0,
) -> GPT:
    """175B parameters."""
    return model(layers, width, heads, context, vocab, dropout)


def gpt_1t(
    layers: int = 128,
    width: int = 25600,
    heads: int = 160,
    context: int = 1024,
    vocab: int = 51200,
    dropout: float = 0.0,
    dtype: str = "bfloat16",
) -> GPT:
    """1008B parameters: the largest of Megatron-LM (arXiv:2104.04473), on 3,072 GPUs.

    With Adafactor, whose state is a row and a column of each matrix, half of its context, and
    --schedule flush: neither AdamW's moments beside masters in float32, nor twice the activations,
    nor two versions of the weights with gradients that wait for other replicas fit into 80 GB.
    """
    global factored
    built = model(layers, width, heads, context, vocab, dropout, dtype)
    factored = True
    return built


def large_vocabulary(
    layers: int = 32,
    width: int = 4096,
    heads: int = 32,
    context: int = 2048,
    vocab: int = 128256,
    dropout: float = 0.0,
) -> GPT:
    """7.0B parameters, with as many words as Llama 3: the head costs as much as 2.6 layers."""
    return model(layers, width, heads, context, vocab, dropout)


def inputs(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(config.vocab, (batch_size, config.context)),)


def targets(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(config.vocab, (batch_size, config.context)),)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def data(batch_size: int, seed: int) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Random windows of the standard library's source files, byte by byte, each byte a token."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(config.context)
    while True:
        starts = torch.randint(
            len(tokens) - config.context, (batch_size, 1), generator=generator
        )  # (B, 1)
        yield (
            (tokens[starts + window].long(),),  # (B, T)
            (tokens[starts + window + 1].long(),),  # the token after each
        )


factored = False  # until gpt_1t says otherwise


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW that decays matrices, and leaves biases and norms alone.

    A gradient that is one update late calls for a lower learning rate: three times this one
    trains well without the delay and badly with it.
    """
    matrices = {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1}
    others = {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}
    if factored:
        return torch.optim.Adafactor([matrices, others], lr=1e-3)
    return torch.optim.AdamW([matrices, others], lr=1.5e-4, betas=(0.9, 0.95))


def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear warm-up over 50 updates, then a cosine down to a tenth at update 500."""

    def factor(update: int) -> float:
        if update < 50:
            return (update + 1) / 50
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (update - 50) / 450))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
