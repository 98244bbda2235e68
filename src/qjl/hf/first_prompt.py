"""Codecs from the first prompt: fitted to the exact tokens of a prompt of at least 256, where no others are there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qjl.cache.index import Step
from qjl.cache.layer import Layer
from qjl.cache.paged import PagedCache
from qjl.codecs import Codecs, Pair
from qjl.copies import Copied
from qjl.errors import QJLError
from qjl.methods.base import Arrays, require_finite
from qjl.statistics import MIN_TOKENS, AttentionMoments, LayerStatistics, layer_statistics

logger = logging.getLogger("qjl")


class FirstPrompt(Copied):
    """Gives one cache the codecs of its model, and fits those that are missing to what the cache reads.

    All caches that share ``codecs`` have them then.
    """

    def __init__(self, codecs: Codecs, model_type: str) -> None:
        self.codecs = codecs
        self._model_type = model_type
        self._moments: dict[int, AttentionMoments] = {}
        self._before: dict[int, AttentionMoments] = {}  # the pass at hand, as far as it was observed
        self._step: Step | None = None
        self.waits = True

    def reset(self) -> None:
        """Forget the queries that were seen."""
        self._moments, self.waits = {}, True

    def arrays(self) -> Arrays:
        """The queries and outputs that were seen, by name: ``layers.3.seen.count``, ``layers.3.seen.output``."""
        return {
            f"layers.{number}.seen.{name}": array
            for number, moments in self._moments.items()
            for name, array in moments.arrays().items()
        }

    def restore(self, arrays: Mapping[str, Tensor], layers: Iterable[int], device: torch.device) -> None:
        """The inverse of ``arrays``, for these layers.

        Raises:
            QJLError: if an array is not as it should be.
        """
        for number in layers:
            prefix = f"layers.{number}.seen."
            seen = {name.removeprefix(prefix): x.to(device) for name, x in arrays.items() if name.startswith(prefix)}
            if seen:
                self._moments[number] = AttentionMoments.of(seen)

    def keep(self) -> None:
        """The pass at hand is over: what was observed of it counts."""
        self._step = None

    def abandon(self) -> None:
        """The pass at hand has failed: what was observed of it does not count."""
        if self._step is not None:
            self._moments, self._step = self._before, None

    def can_code(self, cache: PagedCache) -> bool:
        self.waits = not all(self.codecs.is_ready(number) for number in cache.layers)
        if not self.waits:
            self._moments = {}
            return True
        return self._tokens(cache) >= MIN_TOKENS

    @staticmethod
    def _tokens(cache: PagedCache) -> int:
        """Of the longest row, those of the pass at hand too."""
        index = cache.index
        fresh = index.step.counts if index.step is not None else [0] * index.batch
        return max((length + count for length, count in zip(index.lengths, fresh, strict=True)), default=0)

    def wants_queries(self, layer: Layer) -> bool:
        """Whether ``observe`` is needed: codecs wait for statistics of the queries."""
        return self.waits and self.codecs.needs_queries(layer.number) and not self.codecs.is_ready(layer.number)

    def observe(self, layer: Layer, cache: PagedCache, query: Tensor, out: Tensor) -> None:
        """Count the queries ``[B, Hq, Q, D]`` of the fresh tokens, and what attention gave them, ``[B, Hq, Q, Dv]``."""
        shape = layer.shape
        if shape is None or not self.wants_queries(layer) or out.shape[-1] != shape.value_dim:
            return
        index = cache.index
        if index.step is not self._step:
            self._step = index.step
            self._before = {number: moments.copy() for number, moments in self._moments.items()}
        tokens = torch.arange(index.columns, index.columns + query.shape[2], device=query.device)
        tokens = tokens - _column(index.padding, query.device)
        positions = tokens + _column(index.origins.tolist(), query.device)
        moments = self._moments.setdefault(layer.number, AttentionMoments())
        moments.add(query, out, positions, tokens >= 0, self.codecs.rope(layer.number, query.device), shape.heads)

    def of(self, layer: Layer, cache: PagedCache) -> Pair:
        assert layer.shape is not None
        found = layer.codecs or self.codecs.of(layer.number, layer.shape)
        if found is not None:
            return found
        if self._tokens(cache) < MIN_TOKENS:
            raise QJLError(
                f"{layer.name} has no codecs for {layer.shape.dtype} on {layer.shape.device} yet: give it a prompt of "
                f"{MIN_TOKENS} tokens there, or run `qjl calibrate`."
            )
        with self.codecs.fitting:
            if (found := self.codecs.of(layer.number, layer.shape)) is not None:  # another thread was first
                return found
            statistics = self.measure(layer, cache)
            if not self.codecs.announced.is_set():
                self.codecs.announced.set()
                logger.info("%s: statistics taken from the first prompt, %d tokens", self._model_type, statistics.count)
            return self.codecs.fit(layer.number, layer.shape, statistics)

    def measure(self, layer: Layer, cache: PagedCache) -> LayerStatistics:
        """Statistics of the exact tokens of a layer; sinks and padding do not count.

        Raises:
            QJLError: if a key is NaN or infinite, or the key quantizer needs queries and none were observed.
        """
        index = cache.index
        assert layer.shape is not None
        keys, values, columns, valid = layer.exact_tokens(cache.reading(layer.shape.device))
        require_finite(keys * valid[:, None, :, None], f"keys of {layer.name}")
        tokens = columns - _column(index.padding, keys.device)
        needs_queries = self.codecs.needs_queries(layer.number)
        return layer_statistics(
            keys,
            values,
            positions=tokens + _column(index.origins.tolist(), keys.device),
            valid=valid & (tokens >= index.sinks),
            attention=self._moments.pop(layer.number, AttentionMoments()) if needs_queries else None,
            rope=self.codecs.rope(layer.number, keys.device),
        )


def _column(of_rows: list[int], device: torch.device) -> Tensor:
    """A number of each row, ``int64 [B, 1]``."""
    return torch.tensor(of_rows, dtype=torch.int64, device=device)[:, None]
