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


def chosen_preset() -> str:
    """What the environment asks for."""
    return os.environ.get(PRESET) or UNCHANGED


def register() -> None:
    """Put our backend where vLLM looks for its own, if a preset is asked for.

    Raises:
        QJLError: if vLLM lacks what the backend uses; vLLM stops then, where it would serve its own pages otherwise.
    """
    if chosen_preset() == UNCHANGED:
        return
    from qjl.vllm import compat

    compat.require(compat.SERVING)
    from qjl.vllm.backend import QuantizedBackend

    if not compat.is_on_cpu():
        logger.warning("qjl: quantized pages need --attention-backend CUSTOM here, without which vLLM keeps its own.")
        compat.follow_tables()
    compat.register(QuantizedBackend)
