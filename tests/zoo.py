"""Architectures of Hugging Face transformers in sizes for tests, with random weights.

p2bw compile zoo.py --set kind=mistral --gpus 3
"""

import torch
import transformers as hf
from torch import Tensor, nn

TOKENS, VOCABULARY, PIXELS = 16, 64, 32

TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
PICTURE = {"image_size": PIXELS, "patch_size": 8, "num_labels": 5}
LLAMA = TEXT | {"num_key_value_heads": 2}
HEADS8 = {"head_dim": 8}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
T5 |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
BART |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 1}
BART |= {"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
MOE = LLAMA | {"num_experts_per_tok": 2, "head_dim": 8}

# What it is called, what it does, its type in transformers, what makes it small.
KINDS: dict[str, tuple[str, str, dict]] = {
    "GPT-2": ("causal", "gpt2", GPT),
    "GPT-Neo": (
        "causal",
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "window_size": 8,
        },
    ),
    "GPT-NeoX": ("causal", "gpt_neox", TEXT),
    "GPT-J": ("causal", "gptj", GPT | {"rotary_dim": 4}),
    "Llama": ("causal", "llama", LLAMA),
    "Llama, no mask": ("plain", "llama", LLAMA),
    "Mistral": ("causal", "mistral", LLAMA | HEADS8 | {"sliding_window": 8}),
    "Qwen2": ("causal", "qwen2", LLAMA),
    "Qwen3": ("causal", "qwen3", LLAMA | HEADS8),
    "Gemma": ("causal", "gemma", LLAMA | HEADS8),
    "Gemma2": ("causal", "gemma2", LLAMA | HEADS8),
    "Gemma3": ("causal", "gemma3_text", LLAMA | HEADS8),
    "Phi": ("causal", "phi", LLAMA),
    "Phi-3": ("causal", "phi3", LLAMA | {"pad_token_id": 0}),
    "OPT": (
        "causal",
        "opt",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "BLOOM": (
        "causal",
        "bloom",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY},
    ),
    "Falcon": (
        "causal",
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
        },
    ),
    "MPT": (
        "causal",
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": VOCABULARY, "max_seq_len": 64},
    ),
    "StableLM": ("causal", "stablelm", LLAMA),
    "StarCoder2": ("causal", "starcoder2", LLAMA),
    "OLMo2": ("causal", "olmo2", LLAMA),
    "Granite": ("causal", "granite", LLAMA),
    "Cohere": ("causal", "cohere", LLAMA),
    "SmolLM3": ("causal", "smollm3", LLAMA | {"pad_token_id": 0}),
    "Mamba": (
        "causal",
        "mamba",
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "vocab_size": VOCABULARY},
    ),
    "Mixtral": ("causal", "mixtral", MOE | {"num_local_experts": 4}),
    "Qwen2-MoE": (
        "causal",
        "qwen2_moe",
        MOE
        | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "Qwen3-MoE": ("causal", "qwen3_moe", MOE | {"num_experts": 4, "moe_intermediate_size": 32}),
    "OLMoE": ("causal", "olmoe", MOE | {"num_experts": 4}),
    "BERT": ("masked", "bert", TEXT),
    "RoBERTa": ("masked", "roberta", TEXT | {"pad_token_id": 0}),
    "DistilBERT": (
        "masked",
        "distilbert",
        {
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
        },
    ),
    "DeBERTa": (
        "masked",
        "deberta",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "DeBERTa-v2": (
        "masked",
        "deberta-v2",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "ALBERT": ("masked", "albert", TEXT | {"embedding_size": 16}),
    "ELECTRA": ("masked", "electra", TEXT | {"embedding_size": 16}),
    "MPNet": ("masked", "mpnet", TEXT),
    "ModernBERT": (
        "masked",
        "modernbert",
        TEXT
        | {
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "XLM-RoBERTa": ("masked", "xlm-roberta", TEXT | {"pad_token_id": 0}),
    "T5": ("seq2seq", "t5", T5),
    "mT5": ("seq2seq", "mt5", T5),
    "BART": ("seq2seq", "bart", BART),
    "mBART": ("seq2seq", "mbart", BART),
    "Pegasus": ("seq2seq", "pegasus", BART),
    "Marian": ("seq2seq", "marian", BART),
    "Whisper": (
        "speech",
        "whisper",
        BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
    ),
    "Wav2Vec2": (
        "audio",
        "wav2vec2",
        TEXT
        | {
            "conv_dim": (32, 32),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "num_labels": 5,
            "mask_time_prob": 0.0,
            "classifier_proj_size": 16,
        },
    ),
    "ViT": ("picture", "vit", TEXT | PICTURE),
    "DeiT": ("picture", "deit", TEXT | PICTURE | {"architectures": ["DeiTForImageClassification"]}),
    "BEiT": ("picture", "beit", TEXT | PICTURE),
    "DINOv2": ("picture", "dinov2", TEXT | PICTURE),
    "Swin": (
        "picture",
        "swin",
        {
            "image_size": PIXELS,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 5,
        },
    ),
    "ConvNeXt": (
        "picture",
        "convnext",
        {"depths": [1, 2, 1], "hidden_sizes": [8, 16, 32], "num_stages": 3, "num_labels": 5},
    ),
    "ConvNeXt-v2": (
        "picture",
        "convnextv2",
        {"depths": [1, 2, 1], "hidden_sizes": [8, 16, 32], "num_stages": 3, "num_labels": 5},
    ),
    "ResNet": (
        "picture",
        "resnet",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 2, 1], "num_labels": 5},
    ),
    "RegNet": (
        "picture",
        "regnet",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 32],
            "depths": [1, 2, 1],
            "groups_width": 8,
            "num_labels": 5,
        },
    ),
    "MobileNetV2": (
        "picture",
        "mobilenet_v2",
        {"depth_multiplier": 0.25, "num_labels": 5, "image_size": 64},
    ),
    "EfficientNet": (
        "picture",
        "efficientnet",
        {
            "image_size": 64,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.25,
            "hidden_dim": 320,
            "num_labels": 5,
        },
    ),
    "SegFormer": (
        "picture",
        "segformer",
        {
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "num_attention_heads": [1, 2],
            "sr_ratios": [4, 2],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "num_labels": 5,
        },
    ),
    "PoolFormer": (
        "picture",
        "poolformer",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_labels": 5},
    ),
    "CLIP": (
        "pair",
        "clip",
        {
            "text_config": TEXT | {"eos_token_id": 2},
            "vision_config": TEXT | PICTURE,
            "projection_dim": 16,
        },
    ),
    "SigLIP": ("pair", "siglip", {"text_config": TEXT, "vision_config": TEXT | PICTURE}),
}
MAKERS = {
    "causal": hf.AutoModelForCausalLM,
    "plain": hf.AutoModelForCausalLM,
    "masked": hf.AutoModelForMaskedLM,
    "seq2seq": hf.AutoModelForSeq2SeqLM,
    "speech": hf.AutoModelForSpeechSeq2Seq,
    "audio": hf.AutoModelForSequenceClassification,
    "picture": hf.AutoModelForImageClassification,
    "pair": hf.AutoModel,
}
task = ""  # of the factory that ran last, as is its configuration
config: hf.PreTrainedConfig


def model(kind: str) -> nn.Module:
    global task, config
    task, name, settings = KINDS[kind]
    config = hf.AutoConfig.for_model(name, **settings)
    if task in ("causal", "plain", "seq2seq", "speech"):
        config.use_cache = False
    if task == "audio":
        return hf.AutoModelForAudioClassification.from_config(config)
    return MAKERS[task].from_config(config)


def inputs(batch_size: int) -> dict[str, Tensor | bool]:
    return globals()[task](batch_size)


def causal(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (batch_size, TOKENS))
    lengths = TOKENS - 1 - torch.arange(batch_size) % (TOKENS // 2)
    mask = torch.arange(TOKENS) < lengths[:, None]
    labels = tokens.masked_fill(~mask, -100)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


masked = causal


def plain(batch_size: int) -> dict[str, Tensor]:
    """As for training on text that fills every sequence: nothing is padding."""
    tokens = torch.randint(VOCABULARY, (batch_size, TOKENS))
    return {"input_ids": tokens, "labels": tokens.clone()}


def seq2seq(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (batch_size, TOKENS))
    return {"input_ids": tokens, "labels": torch.randint(3, VOCABULARY, (batch_size, 6))}


def speech(batch_size: int) -> dict[str, Tensor]:
    labels = torch.randint(3, VOCABULARY, (batch_size, 6))
    return {"input_features": torch.randn(batch_size, 8, 32), "labels": labels}


def audio(batch_size: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch_size, 800), "labels": torch.randint(5, (batch_size,))}


def picture(batch_size: int) -> dict[str, Tensor]:
    size = getattr(config, "image_size", PIXELS)
    pixels = torch.randn(batch_size, 3, size, size)
    return {"pixel_values": pixels, "labels": torch.randint(5, (batch_size,))}


def pair(batch_size: int) -> dict[str, Tensor | bool]:
    tokens = torch.randint(3, VOCABULARY, (batch_size, TOKENS))
    return {
        "input_ids": tokens,
        "pixel_values": torch.randn(batch_size, 3, PIXELS, PIXELS),
        "return_loss": True,
    }
