"""The vLLM plugin: an attention backend whose pages hold packed keys and values (docs/vllm.md).

vLLM calls ``register`` in each of its processes. The environment variable ``QJL_VLLM_PRESET`` names a preset, or a
preset's JSON file; without it, or with ``full``, vLLM stays exactly as it is.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("vllm.qjl")
PRESET = "QJL_VLLM_PRESET"
UNCHANGED = "full"
BACKEND = "qjl.vllm.backend.QuantizedBackend"


def chosen_preset() -> str:
    """What the environment asks for."""
    return os.environ.get(PRESET) or UNCHANGED


def register() -> None:
    """Put our backend where vLLM looks for its own, if a preset is asked for.

    Nothing is checked here, because vLLM only logs what a plugin raises, and goes on with its own backend.
    """
    if chosen_preset() == UNCHANGED:
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not current_platform.is_cpu():
        logger.warning("qjl: quantized pages need --attention-backend CUSTOM here, without which vLLM keeps its own.")
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)  # on a CPU vLLM takes no other
