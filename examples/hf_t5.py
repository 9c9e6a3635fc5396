"""T5 of Hugging Face transformers: every decoder layer reads the encoder's last output.

p2bw compile examples/hf_t5.py --gpus 8              # T5-large, 0.7B parameters, no download
"""

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

# `inputs` is not told which factory built the model: it leaves its configuration here.
config: T5Config


def model(
    layers: int = 24, width: int = 1024, hidden: int = 4096, heads: int = 16, vocab: int = 32128
) -> T5ForConditionalGeneration:
    global config
    config = T5Config(
        num_layers=layers,
        d_model=width,
        d_ff=hidden,
        d_kv=width // heads,
        num_heads=heads,
        vocab_size=vocab,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def tiny(
    layers: int = 2, width: int = 32, hidden: int = 64, heads: int = 4, vocab: int = 64
) -> T5ForConditionalGeneration:
    return model(layers, width, hidden, heads, vocab)


def inputs(batch_size: int) -> dict[str, Tensor]:
    """The decoder's own input is made of the labels, by the model itself."""
    length = min(512, config.d_model)  # short for a small model
    return {
        "input_ids": torch.randint(config.vocab_size, (batch_size, length)),
        "labels": torch.randint(config.vocab_size, (batch_size, length // 4)),
    }
