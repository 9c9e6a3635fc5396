"""Llama 3 of Hugging Face transformers, with random weights: nothing is downloaded.

p2bw compile examples/hf_llama.py --gpus 8 --device h100        # 8B parameters
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

# `inputs` is not told which factory built the model: it leaves its configuration here.
config: LlamaConfig


def model(
    layers: int = 32,
    width: int = 4096,
    hidden: int = 14336,
    heads: int = 32,
    kv_heads: int = 8,
    context: int = 2048,
    vocab: int = 128256,
) -> LlamaForCausalLM:
    global config
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        vocab_size=vocab,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def tiny(
    layers: int = 2,
    width: int = 32,
    hidden: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 16,
    vocab: int = 64,
) -> LlamaForCausalLM:
    return model(layers, width, hidden, heads, kv_heads, context, vocab)


def inputs(batch_size: int) -> dict[str, Tensor]:
    """Texts of several lengths, filled up at the end; the model shifts the labels itself."""
    context = config.max_position_embeddings
    tokens = torch.randint(config.vocab_size, (batch_size, context))
    lengths = context - 1 - torch.arange(batch_size) % (context // 2)
    mask = torch.arange(context) < lengths[:, None]
    labels = tokens.masked_fill(~mask, -100)  # no loss where there is no text
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}
