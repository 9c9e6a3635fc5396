"""Whisper of Hugging Face transformers: from the spectrogram of a speech to its text.

p2bw compile examples/hf_whisper.py --gpus 8         # Whisper large, 1.5B parameters, no download
"""

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

# `inputs` is not told which factory built the model: it leaves its configuration here.
config: WhisperConfig


def model(
    layers: int = 32,
    width: int = 1280,
    heads: int = 20,
    frames: int = 3000,
    tokens: int = 448,
    vocab: int = 51865,
) -> WhisperForConditionalGeneration:
    global config
    config = WhisperConfig(
        encoder_layers=layers,
        decoder_layers=layers,
        d_model=width,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=frames // 2,  # the second convolution halves them
        max_target_positions=tokens,
        vocab_size=vocab,
        bos_token_id=vocab - 1,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
        decoder_start_token_id=vocab - 2,
        use_cache=False,
    )
    return WhisperForConditionalGeneration(config)


def tiny(
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    frames: int = 40,
    tokens: int = 12,
    vocab: int = 64,
) -> WhisperForConditionalGeneration:
    return model(layers, width, heads, frames, tokens, vocab)


def inputs(batch_size: int) -> dict[str, Tensor]:
    """The decoder's own input is made of the labels, by the model itself."""
    frames = 2 * config.max_source_positions
    return {
        "input_features": torch.randn(batch_size, config.num_mel_bins, frames),
        "labels": torch.randint(config.vocab_size, (batch_size, config.max_target_positions)),
    }
