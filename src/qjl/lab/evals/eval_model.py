"""The model that evaluations are about: its caches, fitted to one text, and what a result must say of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl import calibration
from qjl.fingerprints import digest, fingerprint_or_none
from qjl.hf import KVCache
from qjl.lab import machine
from qjl.lab.results import Row
from qjl.presets import CacheConfig
from qjl.statistics import LayerStatistics
from qjl.teacher_forcing import calibrated_cache


@dataclass(frozen=True, eq=False)
class EvalModel:
    """A model by the name that results give it; codecs are fitted to ``text`` and to nothing else."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str

    @functools.cached_property
    def statistics(self) -> Mapping[int, LayerStatistics]:
        return calibration.model_statistics(self.model, self._fitted)

    @functools.cached_property
    def _fitted(self) -> Tensor:
        return calibration.rows_of(self.model, self.tokenizer, self.text)

    def cache(self, config: CacheConfig) -> KVCache:
        """An empty one, ready to quantize.

        Raises:
            QJLError: if the model cannot have it.
        """
        return calibrated_cache(self.model, config, lambda: self.statistics)

    def tokens(self, text: str) -> Tensor:
        """``int64 [1, T]``, as part of a longer text."""
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids

    def unseen(self, text: str) -> Tensor:
        """``int64 [T]``: a text without what codecs are fitted to, if that is its beginning."""
        tokens = self.tokens(text)[0]
        return tokens[self._fitted.numel() :] if text == self.text else tokens

    @functools.cached_property
    def _weights(self) -> str | None:
        return fingerprint_or_none(self.model)

    def identity(self, config: CacheConfig) -> Row:
        """All of the model and the preset that an answer depends on."""
        return {
            "model": self.name,
            "fingerprint": self._weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "preset": config.name,
            "settings": config.settings,
            "fitted_to": digest(self.text),
            "versions": machine.versions(machine.MODEL_PACKAGES),
        }

    def facts(self, config: CacheConfig, cache: KVCache) -> Row:
        """What a row tells of a preset besides."""
        keys, values = cache.bits
        return {
            "bits_keys": keys,
            "bits_values": values,
            "bits": (keys + values) / 2,
            "recent": config.recent,
            "sinks": config.sinks,
            "method_keys": config.key.method,
            "method_values": config.value.method,
            "source": config.source,
            "machine": machine.describe(self.model.device),
        }
