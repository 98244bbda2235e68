"""The transformers integration: caches for ``generate``, and the attention that reads them.

- ``wrapped_attention``: handles in place of tensors, and attention over the codes behind them.
- ``promises``: a model uses the cache it was given, or says so.
- ``sources``: what all caches of one model share. ``first_prompt``: codecs fitted to what a cache reads first.
- ``kv_cache``: ``KVCache``. ``generate_hook``: ``enable`` and ``disable``.
"""

from qjl.hf.generate_hook import disable, enable
from qjl.hf.kv_cache import KVCache
from qjl.hf.sources import forget_statistics, own_codecs, statistics_path
from qjl.hf.wrapped_attention import QuantizedLayer, attention_over, attention_watched

__all__ = [
    "KVCache",
    "QuantizedLayer",
    "attention_over",
    "attention_watched",
    "disable",
    "enable",
    "forget_statistics",
    "own_codecs",
    "statistics_path",
]
