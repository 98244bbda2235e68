"""A cache as a file: its configuration as JSON, and named arrays (docs/prompt-caches.md has the table of names).

A file has one or more groups of layers that hold the same tokens (``text``, ``cross``), each with its index, and the
exact tokens, pages and codecs of each layer. Pages are those of the pool, byte by byte, in the order of rows; what rows
share is kept once.

>>> file.save("conversation.qjl", cache)
>>> cache = file.load("conversation.qjl", codecs=codecs)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qjl import container
from qjl.cache.index import Integers
from qjl.cache.layer import Layer
from qjl.cache.paged import Fitted, PagedCache
from qjl.cache.pool import run_of
from qjl.codecs import Codecs
from qjl.container import ArrayFile, FileKind
from qjl.errors import QJLError
from qjl.methods.base import Arrays
from qjl.packed import require_tensor
from qjl.presets import CacheConfig, from_dict, to_dict
from qjl.rope import Rope
from qjl.statistics import StatisticsOf, none
from qjl.versions import installed_version

CACHES = FileKind("qjl-cache", 3, "prompt cache", "build it again with `qjl cache build`", before=("qjl-prompt-cache",))
TEXT, CROSS = "text", "cross"
_SIDES = ("keys", "values")
_MISFITS = (QJLError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Header:
    """What a file says of the cache inside.

    - ``configuration``: as ``presets.to_dict`` has it. ``groups``: the layers of each group that hold tokens.
    - ``rows``, ``tokens``: rows of the first group and tokens of the longest, padding included.
    - ``codecs``: SHA-256 of what codecs have learned.
    - ``cache_bytes``, ``bf16_bytes``: of the cache in memory, and of the same tokens at 16 bits per number.
    - ``model``, ``fingerprint``, ``dtype``: the kind of model, for people, what it computes, and what it ran in; None
      where no model was told. ``token_sha256``: of the token ids as little-endian int32, where they are known.
    - ``own_layers``: numbers of the layers that are transformers' own, by layer.
    """

    configuration: dict[str, Any]
    groups: dict[str, list[int]]
    rows: int
    tokens: int
    codecs: str
    cache_bytes: int
    bf16_bytes: int
    model: str | None = None
    fingerprint: str | None = None
    dtype: str | None = None
    token_sha256: str | None = None
    own_layers: dict[str, Any] = field(default_factory=dict)
    qjl: str = field(default_factory=lambda: installed_version("qjl") or "")


def save(path: str | Path, cache: PagedCache) -> int:
    """Write a cache and its codecs; the file appears whole or not at all. Returns its bytes.

    Raises:
        QJLError: if the cache holds no tokens, or the file cannot be written.
    """
    cache.settle()
    codecs, index = cache.source.codecs, cache.index
    config = dataclasses.replace(codecs.config, sinks=index.sinks, recent=index.recent)
    numbers = sum(
        index.lengths[row] * layer.shape.heads * (layer.shape.key_dim + layer.shape.value_dim)
        for layer in cache.layers.values()
        if layer.shape is not None
        for row in range(index.batch)
    )
    header = Header(
        configuration=to_dict(config),
        groups=groups_of({TEXT: cache}),
        rows=index.batch,
        tokens=max(index.lengths, default=0),
        codecs=codecs.digest(cache.layers),
        cache_bytes=cache.nbytes,
        bf16_bytes=2 * numbers,
    )
    return write(Path(path), header, {TEXT: cache}, codecs)


def load(path: str | Path, device: torch.device | str = "cpu", codecs: Codecs | None = None) -> PagedCache:
    """The cache that ``save`` wrote, on a device; on the CPU its tokens stay memory-mapped until a layer grows.

    Args:
        codecs: those that its tokens were coded with, where they are at hand; None builds them from the file.

    Raises:
        QJLError: if the file is missing, damaged, no cache, of another version, or was coded with other codecs.
    """
    file = CacheFile(Path(path))
    file.verify()
    header = file.header
    layers = header.groups.get(TEXT, [])
    if codecs is None:
        codecs = file.codecs()
    elif codecs.digest(layers) != header.codecs or codecs.config.coding != file.configuration.coding:
        raise QJLError(f"prompt cache {path} was coded with other codecs: load it with those, or with none given.")
    config = file.configuration
    cache = PagedCache(layers, config.sinks, config.recent, Fitted(codecs))
    file.restore({TEXT: cache}, torch.device(device))
    return cache


def groups_of(caches: Mapping[str, PagedCache]) -> dict[str, list[int]]:
    """The layers of each group that hold tokens."""
    return {
        group: [number for number, layer in cache.layers.items() if layer.shape is not None]
        for group, cache in caches.items()
        if cache.index.batch
    }


def write(
    path: Path,
    header: Header,
    caches: Mapping[str, PagedCache],
    codecs: Codecs,
    more: Mapping[str, Tensor] | None = None,
) -> int:
    """Write groups of layers between two passes, their codecs, and ``more`` arrays. Returns the file's bytes.

    Raises:
        QJLError: if there are no tokens, or the file cannot be written.
    """
    if not any(header.groups.values()):
        raise QJLError("the cache holds no tokens that could be saved: let a model read a prompt first.")
    arrays = dict(more or {}) | codecs.arrays(layer for layers in header.groups.values() for layer in layers)
    for group in header.groups:
        arrays |= _arrays_of(caches[group], group)
    return container.write(path, CACHES, asdict(header), arrays)


def sha256_of_tokens(token_ids: Tensor) -> str:
    """Of ``int32 [B, T]``."""
    return hashlib.sha256(token_ids.cpu().contiguous().numpy().astype("<i4").tobytes()).hexdigest()


class CacheFile(ArrayFile):
    """A file of ``write``; what it says is only sure once ``verify`` was called.

    Raises:
        QJLError: if it is missing, no cache, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, CACHES)

    @cached_property
    def header(self) -> Header:  # type: ignore[override]
        found = super().header
        try:
            header = Header(**{one.name: found[one.name] for one in fields(Header)})
            layers = [layer for group in header.groups.values() for layer in group]
        except (KeyError, TypeError, AttributeError) as error:
            raise self.damaged() from error
        if not all(isinstance(layer, int) for layer in layers):
            raise self.damaged()
        return header

    @property
    def token_ids(self) -> Tensor | None:
        """``int32 [B, T]``; None where they are not known."""
        if "token_ids" not in self.names:
            return None
        ids = self.array("token_ids")
        if ids.dim() != 2 or ids.dtype != torch.int32:
            raise self.damaged()
        return ids

    @cached_property
    def configuration(self) -> CacheConfig:
        """Raises QJLError if it has settings that this version does not know."""
        try:
            return from_dict(self.header.configuration)
        except QJLError as error:
            reason = str(error).rstrip(".")
            raise QJLError(f"prompt cache {self.path} has a preset that is not known here: {reason}.") from error

    def codecs(self, ropes: Mapping[int, Rope | None] | None = None, statistics: StatisticsOf = none) -> Codecs:
        """Those that the tokens were coded with; layers that have learned nothing are fitted to the statistics.

        Raises:
            QJLError: if they do not fit the configuration.
        """
        with self.fitting():
            return Codecs.from_arrays(self.configuration, self.arrays(), ropes, statistics)

    def restore(self, caches: Mapping[str, PagedCache], device: torch.device) -> None:
        """Let new caches hold what was written of each group, on a device; on the CPU arrays stay memory-mapped.

        Raises:
            QJLError: if arrays are missing, or do not fit each other, the codecs or the layers.
        """
        arrays = self.arrays()
        with self.fitting():
            for group, layers in self.header.groups.items():
                if group not in caches or not set(layers) <= caches[group].layers.keys():
                    raise QJLError(f"there are no layers {layers} of {group}.")
                _restore(caches[group], group, layers, arrays, device)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """A block in which what is refused tells of this file."""
        try:
            yield
        except _MISFITS as error:
            reason = str(error).rstrip(".")
            raise QJLError(
                f"prompt cache {self.path} does not fit the model or its own index ({reason}): {CACHES.again}."
            ) from error


def _arrays_of(cache: PagedCache, group: str) -> Arrays:
    """The index of a group, and the tokens of its layers."""
    index = cache.index
    named = {f"{group}.{name}": torch.from_numpy(np.array(x, order="C")) for name, x in index.arrays().items()}
    slots, pages = index.held()
    for number, layer in cache.layers.items():
        if layer.exact is not None:
            named |= _tokens_of(layer, f"layers.{number}", slots, pages)
    return named


def _tokens_of(layer: Layer, name: str, slots: Integers, pages: Integers) -> Arrays:
    assert layer.exact is not None
    named = {f"{name}.exact.{side}": _chosen(getattr(layer.exact, side), slots) for side in _SIDES}
    if not len(pages):
        return named
    assert layer.pages is not None
    for side, blocks in zip(_SIDES, layer.pages.fields, strict=True):
        named |= {f"{name}.pages.{side}.{one}": _chosen(x, pages) for one, x in blocks.items()}
    return named


def _chosen(x: Tensor, places: Integers) -> Tensor:
    """Those places along the first axis; no copy where they follow each other."""
    numbers = places.tolist()
    run = run_of(numbers) if numbers else slice(0)
    return x[torch.tensor(numbers, dtype=torch.int64, device=x.device)] if run is None else x[run]


def _restore(
    cache: PagedCache, group: str, layers: Iterable[int], arrays: Mapping[str, Tensor], device: torch.device
) -> None:
    of_index = {name.removeprefix(f"{group}."): x for name, x in arrays.items() if name.startswith(f"{group}.")}
    slots, pages = set(), set()
    for number in layers:
        layer = cache.layers[number]
        keys, values = (arrays[f"layers.{number}.exact.{side}"] for side in _SIDES)
        _require_exact(keys, values)
        layer.hold_exact(keys.to(device), values.to(device))
        slots.add(len(keys))
        fields = [_fields(arrays, f"layers.{number}.pages.{side}.", device) for side in _SIDES]
        if any(fields):
            codecs = cache.source.codecs.of(number, layer.shape)  # type: ignore[arg-type]
            if codecs is None:
                raise QJLError(f"{layer.name} has pages and no codecs.")
            pages.add(layer.hold_pages(codecs, fields[0], fields[1]))
        else:
            pages.add(0)
    if len(slots) != 1 or len(pages) != 1:
        raise QJLError(f"layers of {group} hold different numbers of tokens.")
    cache.index.restore({name: x.numpy() for name, x in of_index.items()}, slots.pop(), pages.pop())
    for layer in cache.layers.values():
        layer.has_missed = layer.shape is None


def _fields(arrays: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x.to(device) for name, x in arrays.items() if name.startswith(prefix)}


def _require_exact(keys: Tensor, values: Tensor) -> None:
    if keys.dim() != 3 or keys.dtype not in _FLOATS:
        raise QJLError(f"exact keys are floats [slots, H, D], not {keys.dtype} {list(keys.shape)}.")
    require_tensor(values, (*keys.shape[:2], *values.shape[2:3]), keys.dtype, "exact values")
