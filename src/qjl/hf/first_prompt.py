"""Codecs from the first prompt: fitted to the exact tokens of a prompt of at least 256, where no others are there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qjl.cache.index import Step
from qjl.cache.layer import Layer
from qjl.cache.paged import CodecsOf, PagedCache
from qjl.codecs import Codecs, Pair
from qjl.copies import Copied
from qjl.errors import QJLError
from qjl.methods.base import Arrays, require_finite
from qjl.rope import Rope
from qjl.statistics import MIN_TOKENS, AttentionMoments, LayerStatistics, layer_statistics

logger = logging.getLogger("qjl")
MOST_HELD = 2 * MIN_TOKENS  # columns whose queries are held; those of more are summed


@dataclass(frozen=True, eq=False)
class _Pass:
    """Queries of a layer in one pass, ``[B, Hq, Q, D]``, of the tokens from column ``begin`` on, and their outputs.

    ``positions`` int64 and ``real`` bool, ``[B, Q]``; ``heads`` of the layer's keys.
    """

    begin: int
    query: Tensor
    out: Tensor
    positions: Tensor
    real: Tensor
    rope: Rope | None
    heads: int

    @property
    def columns(self) -> int:
        return self.real.shape[1]

    def own(self) -> _Pass:
        """The same in tensors of its own."""
        return replace(self, query=self.query.clone(), out=self.out.clone())

    def before(self, column: int) -> _Pass:
        """Those of the tokens before a column."""
        count = max(column - self.begin, 0)
        positions, real = self.positions[:, :count], self.real[:, :count]
        return replace(self, query=self.query[:, :, :count], out=self.out[:, :, :count], positions=positions, real=real)

    def add_to(self, moments: AttentionMoments) -> None:
        moments.add(self.query, self.out, self.positions, self.real, self.rope, self.heads)


class _Queries:
    """What was seen of attention, by layer: ``sums`` over the tokens of the first columns, ``summed`` of them, and the
    passes behind these one by one, so that tokens which are cropped can be taken out."""

    def __init__(self) -> None:
        self.sums: dict[int, AttentionMoments] = {}
        self.summed = 0
        self.passes: dict[int, list[_Pass]] = {}

    def copy(self) -> _Queries:
        other = _Queries()
        other.sums = {number: moments.copy() for number, moments in self.sums.items()}
        other.passes = {number: list(passes) for number, passes in self.passes.items()}
        other.summed = self.summed
        return other

    def add(self, number: int, seen: _Pass) -> None:
        passes = self.passes.setdefault(number, [])
        if number not in self.sums and seen.columns + sum(one.columns for one in passes) <= MOST_HELD:
            passes.append(seen.own())
            return
        moments = self.sums[number] = self.moments(number)
        seen.add_to(moments)
        self.passes[number], self.summed = [], seen.begin + seen.columns

    def crop(self, columns: int) -> None:
        """Keep what was seen of the first columns; of sums over more nothing."""
        if columns < self.summed:
            self.sums, self.summed = {}, 0
        for number, passes in self.passes.items():
            self.passes[number] = [one.before(columns) for one in passes if one.begin < columns]

    def moments(self, number: int) -> AttentionMoments:
        """Of all queries of a layer."""
        moments = self.sums[number].copy() if number in self.sums else AttentionMoments()
        for seen in self.passes.get(number, ()):
            seen.add_to(moments)
        return moments

    def take(self, number: int) -> AttentionMoments:
        """The same, and forget them."""
        moments = self.moments(number)
        self.sums.pop(number, None)
        self.passes.pop(number, None)
        return moments

    def arrays(self) -> Arrays:
        return {
            f"layers.{number}.seen.{name}": array
            for number in sorted(self.sums.keys() | self.passes.keys())
            for name, array in self.moments(number).arrays().items()
        }


class FirstPrompt(CodecsOf, Copied):
    """Gives one cache the codecs of its model, and fits those that are missing to what the cache reads.

    All caches that share ``codecs`` have them then.
    """

    def __init__(self, codecs: Codecs, model_type: str) -> None:
        super().__init__(codecs)
        self._model_type = model_type
        self.reset()

    def reset(self) -> None:
        self._queries = self._before = _Queries()
        self._step: Step | None = None  # the pass at hand, as far as it was observed; ``_before`` is without it
        self.waits = True

    def arrays(self) -> Arrays:
        """The queries and outputs that were seen, by name: ``layers.3.seen.count``, ``layers.3.seen.output``."""
        return self._queries.arrays()

    def restore(self, arrays: Mapping[str, Tensor], cache: PagedCache, device: torch.device) -> None:
        """The inverse of ``arrays``, for the layers and the tokens of a cache.

        Raises:
            QJLError: if an array is not as it should be.
        """
        self._queries.summed = cache.index.columns
        for number in cache.layers:
            prefix = f"layers.{number}.seen."
            seen = {name.removeprefix(prefix): x.to(device) for name, x in arrays.items() if name.startswith(prefix)}
            if seen:
                self._queries.sums[number] = AttentionMoments.of(seen)

    def keep(self) -> None:
        self._step, self._before = None, self._queries

    def undo(self) -> None:
        if self._step is not None:
            self._queries, self._step = self._before, None

    def crop(self, columns: int) -> None:
        self._queries.crop(columns)

    def can_code(self, cache: PagedCache) -> bool:
        self.waits = not all(self.codecs.is_ready(number) for number in cache.layers)
        if not self.waits:
            self._queries = _Queries()
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
        index, number = cache.index, layer.number
        if index.step is not self._step:
            self._step, self._before = index.step, self._queries.copy()
        tokens = torch.arange(index.columns, index.columns + query.shape[2], device=query.device)
        tokens = tokens - _column(index.padding, query.device)
        positions = tokens + _column(index.origins.tolist(), query.device)
        rope = self.codecs.rope(number, query.device)
        self._queries.add(number, _Pass(index.columns, query, out, positions, tokens >= 0, rope, shape.heads))

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
            attention=self._queries.take(layer.number) if needs_queries else None,
            rope=self.codecs.rope(layer.number, keys.device),
        )


def _column(of_rows: list[int], device: torch.device) -> Tensor:
    """A number of each row, ``int64 [B, 1]``."""
    return torch.tensor(of_rows, dtype=torch.int64, device=device)[:, None]
