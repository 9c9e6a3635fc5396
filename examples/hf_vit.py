"""A vision transformer of Hugging Face transformers, with random weights.

p2bw compile examples/hf_vit.py --gpus 8             # ViT-L/16, 0.3B parameters
"""

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

# `inputs` is not told which factory built the model: it leaves its configuration here.
config: ViTConfig


def model(
    layers: int = 24,
    width: int = 1024,
    heads: int = 16,
    size: int = 224,
    patch: int = 16,
    classes: int = 1000,
    dropout: float = 0.1,
) -> ViTForImageClassification:
    global config
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=size,
        patch_size=patch,
        num_labels=classes,
        hidden_dropout_prob=dropout,
    )
    return ViTForImageClassification(config)


def tiny(
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    size: int = 32,
    patch: int = 8,
    classes: int = 10,
    dropout: float = 0.1,
) -> ViTForImageClassification:
    return model(layers, width, heads, size, patch, classes, dropout)


def inputs(batch_size: int) -> dict[str, Tensor]:
    """The model returns its own loss when it is given labels."""
    return {
        "pixel_values": torch.randn(batch_size, 3, config.image_size, config.image_size),
        "labels": torch.randint(config.num_labels, (batch_size,)),
    }
