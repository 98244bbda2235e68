"""The fitted quantizers of a model: what a cache codes its tokens with."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qjl import container
from qjl.container import ArrayFile, FileKind
from qjl.errors import QJLError
from qjl.methods.base import Arrays, Codec, LayerContext, Quantizer, Unrotated
from qjl.presets import CacheConfig, from_dict, to_dict
from qjl.rope import Rope
from qjl.statistics import LayerStatistics, StatisticsOf, none

Pair = tuple[Codec, Codec]
CODECS = FileKind("qjl-codecs", 2, "codecs file", "fit and save them again")


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

    def zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, eq=False)
class Learned:
    """What the codecs of one layer are built from: the arrays that its key and its value quantizer give as learned.

    ``is_undone`` tells whether keys are coded as they were before RoPE.
    """

    key: Arrays
    value: Arrays
    is_undone: bool

    def arrays(self) -> Arrays:
        """By name: ``key.mean``, ``value.mean``, ``is_undone``."""
        named = {f"{role}.{name}": x for role in ("key", "value") for name, x in getattr(self, role).items()}
        return named | {"is_undone": torch.tensor(self.is_undone, dtype=torch.bool)}

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Learned:
        """The inverse of ``arrays``.

        Raises:
            QJLError: if it is not told whether RoPE is undone.
        """
        is_undone = arrays.get("is_undone")
        if is_undone is None or is_undone.shape != () or is_undone.dtype != torch.bool:
            raise QJLError("codecs have no is_undone, bool []: fit them again.")
        return cls(_under("key.", arrays), _under("value.", arrays), bool(is_undone))


@dataclass(eq=False)
class Codecs:
    """Codecs of keys and values for each layer of one model under one configuration.

    They are fitted when a layer first needs them, once and for all devices and dtypes, and are the same for all caches
    that are given this object, in whatever thread.

    >>> cache.codecs.save("codecs.qjl")
    >>> cache = qjl.KVCache(model, codecs=qjl.Codecs.load("codecs.qjl"))

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
    _learned: dict[int, Learned] = field(default_factory=dict, init=False)
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
        if not self.needs_statistics(layer) or layer in self._learned or self.known(layer) is not None:
            return True
        return self.statistics(layer) is not None

    def has_learned(self, layer: int) -> bool:
        """Whether a layer's codecs have been fitted."""
        return layer in self._learned

    def known(self, layer: int) -> Pair | None:
        """Codecs of a layer on some device, if it has any yet."""
        return next((pair for (number, _), pair in list(self._fitted.items()) if number == layer), None)

    def of(self, layer: int, shape: TokenShape) -> Pair | None:
        """Codecs of a layer, fitted now if need be; None as long as their statistics are not there."""
        found = self._fitted.get((layer, shape))
        if found is not None:
            return found
        if layer in self._learned or not self.needs_statistics(layer):
            return self.fit(layer, shape, None)
        statistics = self.statistics(layer)
        return None if statistics is None else self.fit(layer, shape, statistics)

    def fit(self, layer: int, shape: TokenShape, statistics: LayerStatistics | None) -> Pair:
        """Codecs of a layer, fitted to these statistics unless it has learned from others."""
        with self.fitting:
            if (layer, shape) not in self._fitted:
                if layer not in self._learned:
                    self._learned[layer] = self._learn(layer, shape, statistics)
                self._fitted[layer, shape] = self._build(layer, shape, self._learned[layer])
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

    def _learn(self, layer: int, shape: TokenShape, statistics: LayerStatistics | None) -> Learned:
        key, value = self.quantizers(layer)
        has_rope = self.ropes.get(layer) is not None
        is_undone = self.config.pre_rope and has_rope and (statistics is None or statistics.is_rotary)
        of_keys, of_values = self._contexts(layer, shape, is_undone, statistics)
        return Learned(key.learn(of_keys), value.learn(of_values), is_undone)

    def _build(self, layer: int, shape: TokenShape, learned: Learned) -> Pair:
        key, value = self.quantizers(layer)
        of_keys, of_values = self._contexts(layer, shape, learned.is_undone, None)
        codec = key.build(of_keys, learned.key)
        if of_keys.undone is not None:
            codec = Unrotated(codec, of_keys.undone)
        return codec, value.build(of_values, learned.value)

    def _contexts(
        self, layer: int, shape: TokenShape, is_undone: bool, statistics: LayerStatistics | None
    ) -> tuple[LayerContext, LayerContext]:
        rope = self.rope(layer, shape.device)
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
        return of_keys, LayerContext("value", shape.heads, shape.value_dim, shape.device, shape.dtype, statistics)

    # Files

    def arrays(self, layers: Iterable[int]) -> Arrays:
        """What these layers have learned and their RoPE, by name: ``layers.3.codec.key.mean``.

        They are all that codecs are built from, on this machine or another, beside the configuration.
        """
        named: Arrays = {}
        for layer in sorted(set(layers) & self._learned.keys()):
            named |= _above(f"layers.{layer}.codec.", self._learned[layer].arrays())
            rope = self.ropes.get(layer)
            if rope is not None:
                named |= _above(f"layers.{layer}.rope.", rope.arrays())
        return named

    @classmethod
    def from_arrays(
        cls,
        config: CacheConfig,
        arrays: Mapping[str, Tensor],
        ropes: Mapping[int, Rope | None] | None = None,
        statistics: StatisticsOf = none,
    ) -> Codecs:
        """The inverse of ``arrays``, from copies of them; layers that have learned nothing are fitted later.

        Raises:
            QJLError: if an array that all layers have is missing or not as it should be.
        """
        of_ropes, learned = dict(ropes or {}), {}
        for layer, own in _by_layer(arrays).items():
            learned[layer] = Learned.of(_under("codec.", own))
            of_rope = _under("rope.", own)
            of_ropes[layer] = Rope.of(of_rope) if of_rope else None
        codecs = cls(config, of_ropes, statistics)
        codecs._learned = learned
        return codecs

    def digest(self, layers: Iterable[int]) -> str:
        """The same for layers that code alike: SHA-256 of their arrays in hexadecimal digits."""
        return container.digest(self.arrays(layers))

    def save(self, path: str | Path) -> int:
        """Write what layers have learned, and the configuration; ``load`` reads it. Returns its bytes.

        Raises:
            QJLError: if no layer has learned anything, or the file cannot be written.
        """
        if not self._learned:
            raise QJLError(
                "codecs that have learned nothing cannot be saved: let a cache of theirs read a prompt first."
            )
        header = {"configuration": to_dict(self.config)}
        return container.write(Path(path), CODECS, header, self.arrays(self._learned))

    @classmethod
    def load(cls, path: str | Path) -> Codecs:
        """The codecs that ``save`` wrote: on any machine they read the same numbers out of the same codes.

        Raises:
            QJLError: if the file is missing, damaged, of another kind or version, or names settings that this version
                does not know.
        """
        file = ArrayFile(Path(path), CODECS)
        file.verify()
        try:
            return cls.from_arrays(from_dict(file.header.get("configuration")), file.arrays())
        except (QJLError, TypeError, AttributeError) as error:
            reason = str(error).rstrip(".")
            raise QJLError(f"codecs file {path} cannot be used ({reason}): fit and save them again.") from error


def _by_layer(arrays: Mapping[str, Tensor]) -> dict[int, Arrays]:
    """Copies of the arrays of codecs and RoPE, ``layers.3.codec.key.mean`` as ``codec.key.mean`` of layer 3."""
    found: dict[int, Arrays] = {}
    for name, array in arrays.items():
        top, layer, rest = [*name.split(".", 2), "", ""][:3]
        if top == "layers" and layer.isdecimal() and rest.startswith(("codec.", "rope.")):
            found.setdefault(int(layer), {})[rest] = array.clone()
    return found


def _under(prefix: str, arrays: Mapping[str, Tensor]) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _above(prefix: str, arrays: Mapping[str, Tensor]) -> Arrays:
    return {f"{prefix}{name}": array for name, array in arrays.items()}
