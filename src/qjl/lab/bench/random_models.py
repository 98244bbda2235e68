"""Models of a known shape with weights at random: speed and memory do not depend on what weights say."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from qjl.errors import QJLError

_LLAMA_3_1: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_3_1
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "toy": _LLAMA_3_1
    | {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def make(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model in evaluation mode, the same for the same seed of torch.

    Raises:
        QJLError: if the name is none of ``SHAPES``.
    """
    if name not in SHAPES:
        raise QJLError(f"no shape is known by the name {name!r}: choose from {', '.join(SHAPES)}.")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[name]), dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]
