"""The fitted quantizers of a model: what a cache codes its tokens with."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qjl.methods.base import Codec, LayerContext, Quantizer, Unrotated
from qjl.presets import CacheConfig
from qjl.rope import Rope
from qjl.statistics import LayerStatistics, StatisticsOf, none

Pair = tuple[Codec, Codec]


@dataclass(frozen=True)
class TokenShape:
    """What the tokens of one layer are: KV heads, numbers of a key and of a value, where they are and in what type."""

    heads: int
    key_dim: int
    value_dim: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> TokenShape:
        """That of ``[B, H, T, D]``."""
        return cls(keys.shape[1], keys.shape[3], values.shape[3], keys.device, keys.dtype)


@dataclass(eq=False)
class Codecs:
    """Codecs of keys and values for each layer of one model under one configuration.

    They are fitted when a layer first needs them, once for every device and dtype, and the same for all caches that
    are given this object, in whatever thread.

    Args:
        config: the quantizers of each layer.
        ropes: the RoPE of each layer that has one.
        statistics: of a layer, None for one that has none yet; then ``fit`` must be given some.
        announced: set once it was said where statistics came from, for all codecs that are given the same.
    """

    config: CacheConfig
    ropes: Mapping[int, Rope | None] = field(default_factory=dict)
    statistics: StatisticsOf = none
    announced: threading.Event = field(default_factory=threading.Event)
    _fitted: dict[tuple[int, TokenShape], Pair] = field(default_factory=dict, init=False)
    _ropes_on: dict[tuple[int, torch.device], Rope] = field(default_factory=dict, init=False)
    fitting: threading.RLock = field(default_factory=threading.RLock, init=False)  # one thread fits, for all of them

    def __deepcopy__(self, memo: dict[int, object]) -> Codecs:
        """Copies of a cache code as it does."""
        return self

    def quantizers(self, layer: int) -> tuple[Quantizer, Quantizer]:
        """Of keys and of values."""
        return self.config.for_layer(layer)

    def needs_statistics(self, layer: int) -> bool:
        return any(quantizer.needs_statistics for quantizer in self.quantizers(layer))

    def needs_queries(self, layer: int) -> bool:
        return any(quantizer.needs_queries for quantizer in self.quantizers(layer))

    def is_ready(self, layer: int) -> bool:
        """Whether a layer has codecs, or all that they are fitted to."""
        if not self.needs_statistics(layer) or self.known(layer) is not None:
            return True
        return self.statistics(layer) is not None

    def known(self, layer: int) -> Pair | None:
        """Codecs of a layer on some device, if it has any yet."""
        return next((pair for (number, _), pair in self._fitted.items() if number == layer), None)

    def of(self, layer: int, shape: TokenShape) -> Pair | None:
        """Codecs of a layer, fitted now if need be; None as long as their statistics are not there."""
        found = self._fitted.get((layer, shape))
        if found is not None:
            return found
        if not self.needs_statistics(layer):
            return self.fit(layer, shape, None)
        statistics = self.statistics(layer)
        return None if statistics is None else self.fit(layer, shape, statistics)

    def fit(self, layer: int, shape: TokenShape, statistics: LayerStatistics | None) -> Pair:
        """Codecs of a layer, fitted to these statistics unless it has some."""
        with self.fitting:
            if (layer, shape) not in self._fitted:
                self._fitted[layer, shape] = self._fit(layer, shape, statistics)
            return self._fitted[layer, shape]

    def give(self, layer: int, shape: TokenShape, codecs: Pair) -> None:
        """Use these for a layer."""
        self._fitted[layer, shape] = codecs

    def rope(self, layer: int, device: torch.device) -> Rope | None:
        """The RoPE of a layer, moved to the device once."""
        rope = self.ropes.get(layer)
        if rope is None:
            return None
        if (layer, device) not in self._ropes_on:
            self._ropes_on[layer, device] = rope.to(device)
        return self._ropes_on[layer, device]

    def _fit(self, layer: int, shape: TokenShape, statistics: LayerStatistics | None) -> Pair:
        key, value = self.quantizers(layer)
        rope = self.rope(layer, shape.device)
        is_undone = self.config.pre_rope and rope is not None and (statistics is None or statistics.is_rotary)
        of_keys = LayerContext(
            "key",
            shape.heads,
            shape.key_dim,
            shape.device,
            shape.dtype,
            statistics,
            rope=None if is_undone else rope,
            undone=rope if is_undone else None,
        )
        codec = key.fit(of_keys)
        if rope is not None and is_undone:
            codec = Unrotated(codec, rope)
        of_values = LayerContext("value", shape.heads, shape.value_dim, shape.device, shape.dtype, statistics)
        return codec, value.fit(of_values)
