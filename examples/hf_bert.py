"""BERT of Hugging Face transformers, guessing masked words; random weights, no download.

p2bw compile examples/hf_bert.py --gpus 8            # BERT-large, 0.3B parameters
"""

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

# `inputs` is not told which factory built the model: it leaves its configuration here.
config: BertConfig


def model(
    layers: int = 24, width: int = 1024, heads: int = 16, context: int = 512, vocab: int = 30522
) -> BertForMaskedLM:
    global config
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=context,
        vocab_size=vocab,
    )
    return BertForMaskedLM(config)


def tiny(
    layers: int = 2, width: int = 32, heads: int = 4, context: int = 16, vocab: int = 64
) -> BertForMaskedLM:
    return model(layers, width, heads, context, vocab)


def inputs(batch_size: int) -> dict[str, Tensor]:
    """Every seventh word is masked; a label of -100 asks for nothing."""
    words = torch.randint(config.vocab_size, (batch_size, config.max_position_embeddings))
    masked = torch.arange(config.max_position_embeddings) % 7 == 0
    return {
        "input_ids": words.masked_fill(masked, 0),
        "attention_mask": torch.ones_like(words),
        "labels": words.masked_fill(~masked, -100),
    }
