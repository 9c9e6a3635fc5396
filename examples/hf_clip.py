"""CLIP of Hugging Face transformers: two towers, one for images and one for texts, that meet.

The towers do not depend on each other, so a pipeline may run them side by side.

p2bw compile examples/hf_clip.py --gpus 8            # CLIP ViT-L/14, 0.4B parameters, no download
"""

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

# `inputs` is not told which factory built the model: it leaves its configuration here.
config: CLIPConfig


def model(
    image_layers: int = 24,
    image_width: int = 1024,
    image_heads: int = 16,
    size: int = 224,
    patch: int = 14,
    text_layers: int = 12,
    text_width: int = 768,
    text_heads: int = 12,
    context: int = 77,
    vocab: int = 49408,
) -> CLIPModel:
    global config
    config = CLIPConfig(
        vision_config={
            "num_hidden_layers": image_layers,
            "hidden_size": image_width,
            "num_attention_heads": image_heads,
            "intermediate_size": 4 * image_width,
            "image_size": size,
            "patch_size": patch,
        },
        text_config={
            "num_hidden_layers": text_layers,
            "hidden_size": text_width,
            "num_attention_heads": text_heads,
            "intermediate_size": 4 * text_width,
            "max_position_embeddings": context,
            "vocab_size": vocab,
            "bos_token_id": vocab - 2,
            "eos_token_id": vocab - 1,
            "pad_token_id": vocab - 1,
        },
        projection_dim=text_width,
    )
    return CLIPModel(config)


def tiny(
    image_layers: int = 2,
    image_width: int = 32,
    image_heads: int = 4,
    size: int = 32,
    patch: int = 8,
    text_layers: int = 2,
    text_width: int = 24,
    text_heads: int = 4,
    context: int = 12,
    vocab: int = 64,
) -> CLIPModel:
    return model(
        image_layers,
        image_width,
        image_heads,
        size,
        patch,
        text_layers,
        text_width,
        text_heads,
        context,
        vocab,
    )


def inputs(batch_size: int) -> dict[str, Tensor | bool]:
    """Pairs of an image and its text; the loss asks which belongs to which."""
    text, image = config.text_config, config.vision_config
    return {
        "input_ids": torch.randint(text.vocab_size, (batch_size, text.max_position_embeddings)),
        "pixel_values": torch.randn(batch_size, 3, image.image_size, image.image_size),
        "return_loss": True,
    }
