"""Fields of configurations that a tiny model needs beside the general rules of ``qjl.lab.evals.tiny``."""

from __future__ import annotations

from typing import Any

_SLIDING_FULL = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SHARED = {"num_hidden_layers": 4, "layer_types": _SLIDING_FULL * 2, "num_kv_shared_layers": 2}
_GEMMA3N = _SHARED | {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [256] * 4}
_COMPASS = {
    "layer_types": _SLIDING_FULL,
    "rope_parameters": dict.fromkeys(_SLIDING_FULL, _ROPE | {"mrope_section": [12, 10, 10]}),
}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 512,
    "split_ngram_parts": 8,
}
_DOTS3 = {
    "num_hidden_layers": 2,
    "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "head_dim": 128,
    "per_layer_config": {1: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16}},
}
_MUP = {"logits_mup_width_multiplier": 1.0}
_IMAGE_WORDS = {"<image>": 192, "<|extra_200|>": 193}

CORRECTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config": {"codebook_size": 16},
        "audio_config": {"codebook_size": 16, "codebook_dim": 256},
        "image_token_offset": 200,
        "audio_token_offset": 216,
    },
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 256},
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 256}},
    "dory": {
        "ngpt_alpha_init": 0.5,
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "emu3": {"vocabulary_map": _IMAGE_WORDS},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [11, 11, 10]}}},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_text": _SHARED | {"per_layer_config": {1: {"head_dim": 128}, 3: {"head_dim": 128}}},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [0, 1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "hy_v4_vl": {"text_config": {"rope_parameters": {"mrope_section": [12, 10, 10]}}},
    "inkling2": {"text_config": _MUP},
    "inkling2_loop": {"text_config": _MUP},
    "inkling2_loop_text": _MUP,
    "inkling2_text": _MUP,
    "inkling_mm_model": {"text_config": _MUP},
    "inkling_text": _MUP,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"layer_types": _SLIDING_FULL},
    "mistral": {"sliding_window": None},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 512,
        "attention_head_dim": 128,
    },
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 512, "attention_head_dim": 128},
}

# Without these there is no default configuration.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
}
