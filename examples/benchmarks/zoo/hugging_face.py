"""Transformers: one small random configuration of every family, as its users would make it."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TWO = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100}
TWO |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SPEECH = {**SIZES, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
Model = tuple[str, str, dict[str, Any]]  # the kind of inputs, the prefix of the configuration, its arguments

MODELS: dict[str, Model] = {
    # encoders
    "bert": ("text", "Bert", SIZES),
    "roberta": ("text", "Roberta", {**SIZES, "pad_token_id": 0}),
    "distilbert": ("text", "DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 100}),
    "electra": ("text", "Electra", {**SIZES, "embedding_size": 32}),
    "albert": ("text", "Albert", {**SIZES, "embedding_size": 16}),
    "mpnet": ("text", "MPNet", SIZES),
    "deberta": ("text", "Deberta", {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta-v2": ("text", "DebertaV2", {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "modernbert": ("text", "ModernBert", {**SIZES, "pad_token_id": 0}),
    "camembert": ("text", "Camembert", {**SIZES, "pad_token_id": 0}),
    "layoutlm": ("text", "LayoutLM", SIZES),
    "squeezebert": ("text", "SqueezeBert", {**SIZES, "embedding_size": 32}),
    "funnel": (
        "text",
        "Funnel",
        {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "vocab_size": 100}
        | {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1, "architectures": ["FunnelModel"]},
    ),
    "xlnet": ("text", "XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 100}),
    "roformer": ("text", "RoFormer", {**SIZES, "embedding_size": 32}),
    "fnet": ("text", "FNet", SIZES),
    "nystromformer": ("text", "Nystromformer", SIZES),
    # decoders
    "gpt2": ("causal", "GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}),
    "gpt-neo": (
        "causal",
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"vocab_size": 100},
    ),
    "gpt-neox": ("causal", "GPTNeoX", SIZES),
    "gpt-j": ("causal", "GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 100}),
    "opt": ("causal", "OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("causal", "Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}),
    "falcon": ("causal", "Falcon", {**SIZES, "ffn_hidden_size": 48, "alibi": False}),
    "falcon-new": (
        "causal",
        "Falcon",
        {**SIZES, "ffn_hidden_size": 48, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "llama": ("causal", "Llama", GROUPED),
    "llama-mha": ("causal", "Llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("causal", "Llama", {**SIZES, "num_key_value_heads": 1}),
    "mistral": ("causal", "Mistral", GROUPED),
    "mixtral": ("causal", "Mixtral", {**GROUPED, "num_local_experts": 4}),
    "qwen2": ("causal", "Qwen2", GROUPED),
    "qwen2-moe": (
        "causal",
        "Qwen2Moe",
        {**GROUPED, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "qwen3": ("causal", "Qwen3", {**GROUPED, "head_dim": 8}),
    "smollm3": ("causal", "SmolLM3", {**GROUPED, "pad_token_id": 0}),
    "phi": ("causal", "Phi", SIZES),
    "phi3": ("causal", "Phi3", {**GROUPED, "pad_token_id": 0}),
    "gemma": ("causal", "Gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("causal", "Gemma2", {**GROUPED, "head_dim": 8}),
    "olmo2": ("causal", "Olmo2", GROUPED),
    "stablelm": ("causal", "StableLm", GROUPED),
    "starcoder2": ("causal", "Starcoder2", GROUPED),
    "cohere": ("causal", "Cohere", GROUPED),
    "codegen": ("causal", "CodeGen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 100}),
    "gpt-oss": ("causal", "GptOss", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("causal", "Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4}),
    # encoders with decoders
    "t5": ("both", "T5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100}),
    "bart": ("both", "Bart", {**TWO, "max_position_embeddings": 64}),
    "pegasus": ("both", "Pegasus", {**TWO, "max_position_embeddings": 64}),
    "m2m100": ("both", "M2M100", {**TWO, "max_position_embeddings": 64}),
    # vision and speech
    "vit": ("image", "ViT", VISION),
    "deit": ("image", "DeiT", VISION),
    "beit": ("image", "Beit", VISION),
    "dinov2": ("image", "Dinov2", {**VISION, "mlp_ratio": 2}),
    "siglip": ("image", "SiglipVision", VISION),
    "clip": ("image", "CLIPVision", VISION),
    "swin": ("image", "Swin", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1]}
             | {"num_heads": [2, 4], "window_size": 4}),
    "convnext": ("image", "ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "resnet": ("image", "ResNet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}),
    "wav2vec2": ("sound", "Wav2Vec2", SPEECH),
    "whisper": ("mel", "Whisper", {**TWO, "max_source_positions": 16, "num_mel_bins": 8, "max_target_positions": 32}),
}  # fmt: skip


def transformer(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model, and inputs as a tokenizer or a processor returns them."""
    kind, prefix, arguments = MODELS[name]
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = getattr(transformers, f"{prefix}Config")(**{**ends, **arguments})
    config._experts_implementation = "eager"  # the others have no double precision
    auto: Any = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
    model: nn.Module = auto.from_config(config)
    return model, INPUTS[kind]()


def _text() -> dict[str, Any]:
    ids = torch.randint(3, 100, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _both() -> dict[str, Any]:
    return {**_text(), "decoder_input_ids": torch.randint(3, 100, (2, 5))}


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "text": _text,
    "causal": _text,
    "both": _both,
    "image": lambda: {"pixel_values": torch.randn(2, 3, 32, 32).double()},
    "sound": lambda: {"input_values": torch.randn(2, 400).double()},
    "mel": lambda: {"input_features": torch.randn(2, 8, 32).double(), "decoder_input_ids": torch.ones(2, 4).long()},
}
