"""GPT-2 of Hugging Face transformers, with random weights: nothing is downloaded.

p2bw compile examples/hf_gpt2.py --gpus 8            # GPT-2 XL, 1.6B parameters
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

# `inputs` and `targets` are not told which factory built the model: its configuration is here.
config: GPT2Config


def model(
    layers: int = 48, width: int = 1600, heads: int = 25, context: int = 1024, vocab: int = 50257
) -> GPT2LMHeadModel:
    global config
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_positions=context,
        vocab_size=vocab,
        bos_token_id=vocab - 1,
        eos_token_id=vocab - 1,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def tiny(
    layers: int = 2, width: int = 32, heads: int = 4, context: int = 16, vocab: int = 64
) -> GPT2LMHeadModel:
    return model(layers, width, heads, context, vocab)


def inputs(batch_size: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(config.vocab_size, (batch_size, config.n_positions))}


def targets(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(config.vocab_size, (batch_size, config.n_positions)),)


def loss(outputs: CausalLMOutputWithCrossAttentions, labels: Tensor) -> Tensor:
    """Without this function and with labels among the inputs, it would be the model's own loss."""
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
