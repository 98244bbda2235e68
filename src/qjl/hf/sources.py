"""What all caches of one model share: the codecs of each configuration, its RoPE, and its statistics on disk."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from qjl import statistics
from qjl.architecture import ropes_of
from qjl.codecs import Codecs
from qjl.fingerprints import fingerprint_or_none
from qjl.presets import CacheConfig

_shared: weakref.WeakKeyDictionary[PreTrainedModel, _Shared] = weakref.WeakKeyDictionary()
_making = threading.Lock()


class _Shared:
    """Of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.ropes = ropes_of(model.config)
        self.statistics = _calibrated_statistics(model)
        self.codecs: list[tuple[CacheConfig, Codecs]] = []
        self.announced = threading.Event()

    def codecs_of(self, config: CacheConfig) -> Codecs:
        """The same for configurations that code alike."""
        wanted = config.coding
        for known, codecs in self.codecs:
            if known.coding == wanted:
                return codecs
        codecs = Codecs(config, self.ropes, self.statistics, self.announced)
        self.codecs.append((config, codecs))
        return codecs


def shared_codecs(model: PreTrainedModel, config: CacheConfig) -> Codecs:
    """Those of all caches of a model with this configuration; the same for all threads."""
    with _making:
        if model not in _shared:
            _shared[model] = _Shared(model)
        return _shared[model].codecs_of(config)


def own_codecs(
    model: PreTrainedModel | PreTrainedConfig,
    cache_config: CacheConfig,
    statistics_of: statistics.StatisticsOf = statistics.none,
) -> Codecs:
    """Codecs that are shared with no other cache, fitted to these statistics, or else to the first prompt."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return Codecs(cache_config, ropes_of(config), statistics_of)


def forget_statistics(model: PreTrainedModel) -> None:
    """New caches of this model read its statistics again; caches that exist keep theirs."""
    with _making:
        _shared.pop(model, None)


def statistics_path(model: PreTrainedModel) -> Path | None:
    """Where ``qjl calibrate`` keeps this model's statistics; None for a model without a fingerprint."""
    name = fingerprint_or_none(model)
    return None if name is None else statistics.path_of(name)


def _calibrated_statistics(model: PreTrainedModel) -> statistics.StatisticsOf:
    path = statistics_path(model)
    if path is None or not path.exists():
        return statistics.none
    return statistics.StatisticsFile(path, path.stem).layer
