"""GPT-2 of Hugging Face transformers, with random weights: nothing is downloaded.

p2bw compile examples/hf_gpt2.py --gpus 8            # GPT-2 XL, 1.6B parameters
"""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

# `inputs` is not told which factory built the model: it leaves its configuration here.
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
    """The model returns its own loss when it is given labels; it moves them by one itself."""
    tokens = torch.randint(config.vocab_size, (batch_size, config.n_positions))
    return {"input_ids": tokens, "labels": tokens}
