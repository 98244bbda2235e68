"""QJL: a key-value cache in 2 to 4 true bits per number, scored directly on its packed codes.

>>> import qjl
>>> model, tokenizer = qjl.load("smollm2")
>>> cache = qjl.KVCache(model, "b3")
>>> model.generate(**tokenizer("Hello", return_tensors="pt"), cache=cache)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qjl.errors import QJLError

if TYPE_CHECKING:
    from qjl.bit_allocation import choose
    from qjl.calibration import calibrate
    from qjl.codecs import Codecs
    from qjl.hf import KVCache, disable, enable
    from qjl.models import load
    from qjl.prefix_store import PromptCaches
    from qjl.presets import DEFAULT_PRESET, PRESETS, CacheConfig
    from qjl.quantization import Quantized, quantize
    from qjl.sketch import Sketch

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "CacheConfig",
    "Codecs",
    "KVCache",
    "PromptCaches",
    "QJLError",
    "Quantized",
    "Sketch",
    "calibrate",
    "choose",
    "disable",
    "enable",
    "load",
    "quantize",
]

_HOMES = {
    "KVCache": "hf",
    "enable": "hf",
    "disable": "hf",
    "calibrate": "calibration",
    "choose": "bit_allocation",
    "load": "models",
    "CacheConfig": "presets",
    "Codecs": "codecs",
    "DEFAULT_PRESET": "presets",
    "PRESETS": "presets",
    "PromptCaches": "prefix_store",
    "Quantized": "quantization",
    "quantize": "quantization",
    "Sketch": "sketch",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, ``qjl --help`` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qjl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qjl.{_HOMES[name]}"), name)
