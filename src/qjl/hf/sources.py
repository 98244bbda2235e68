"""What all caches of one model share: its RoPE, its statistics on disk, its fitted codecs."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from qjl import statistics
from qjl.architecture import find_rope, layer_shapes
from qjl.cache import LayerSource
from qjl.fingerprints import fingerprint_or_none

logger = logging.getLogger("qjl")
_sources_of: weakref.WeakKeyDictionary[PreTrainedModel, list[LayerSource]] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def shared_sources(model: PreTrainedModel) -> list[LayerSource]:
    """Those of all caches of a model, one for each layer; the same for all threads."""
    with _making:
        if model not in _sources_of:
            _sources_of[model] = sources_of(model.config, _calibrated_statistics(model))
        return _sources_of[model]


def forget_statistics(model: PreTrainedModel) -> None:
    """New caches of this model read its statistics again; caches that exist keep theirs."""
    with _making:
        _sources_of.pop(model, None)


def sources_of(config: PreTrainedConfig, on_disk: statistics.StatisticsFile | None = None) -> list[LayerSource]:
    """Fresh ones, one for each layer."""
    announce = _Announcement(config.model_type)
    return [
        LayerSource(
            find_rope(config, shape.kind) if shape.is_quantized else None,
            functools.partial(_layer_of, on_disk, shape.index),
            announce,
        )
        for shape in layer_shapes(config)
    ]


def _layer_of(file: statistics.StatisticsFile | None, index: int) -> statistics.LayerStatistics | None:
    return file.layer(index) if file is not None else None


class _Announcement:
    """Says where a model's statistics came from, once for all of its layers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_made = False

    def __call__(self, tokens: int) -> None:
        if not self.is_made:
            self.is_made = True
            logger.info("%s: statistics taken from the first prompt, %d tokens", self.name, tokens)


def statistics_path(model: PreTrainedModel) -> Path | None:
    """Where ``qjl calibrate`` keeps this model's statistics; None for a model without a fingerprint."""
    name = fingerprint_or_none(model)
    return None if name is None else statistics.path_of(name)


def _calibrated_statistics(model: PreTrainedModel) -> statistics.StatisticsFile | None:
    path = statistics_path(model)
    return statistics.StatisticsFile(path, path.stem) if path is not None and path.exists() else None
