"""A cache layer full of tokens as language models make them, without a model and at any length.

Keys and queries have a mean before RoPE and uneven directions. Only ``DISTINCT`` tokens are made and encoded; longer
sequences repeat them, each block at a position of its own: reading them takes as long as if all were different.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl.attention import Scoring
from qjl.cache.layer import Layer
from qjl.cache.paged import Fitted, PagedCache
from qjl.codecs import Codecs, Pair, TokenShape
from qjl.errors import QJLError
from qjl.methods.base import Codec
from qjl.ops.forms import Pool
from qjl.packed import BLOCK, Blocks
from qjl.presets import CacheConfig
from qjl.rope import Rope
from qjl.statistics import AttentionMoments, LayerStatistics, layer_statistics

CPU = torch.device("cpu")
DISTINCT = 2048
MEASURED = 600  # tokens that statistics come from


@dataclass(frozen=True)
class Shape:
    """Of one attention layer, and of how many sequences."""

    head_dim: int = 128
    kv_heads: int = 8
    group: int = 4
    batch: int = 1

    @property
    def scaling(self) -> float:
        return self.head_dim**-0.5


class Maker:
    """Makes the tokens of one layer; the same ones for the same shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._generator = torch.Generator().manual_seed(0)
        heads, dim = shape.kv_heads, shape.head_dim
        self.rope = Rope(10000.0 ** (-torch.arange(0, dim, 2) / dim))
        self._key_root, self._query_root = self._root(heads), self._root(heads * shape.group)
        self._key_mean, self._query_mean = 3 * self._normal(heads, 1, dim), self._normal(heads * shape.group, 1, dim)
        self._value_mean = 0.5 * self._normal(heads, 1, dim)

    def keys(self, positions: Tensor) -> Tensor:
        """After RoPE, for ``positions [1, T]``: ``[1, H, T, D]``."""
        shape = (1, self.shape.kv_heads, positions.shape[1], self.shape.head_dim)
        return self.rope.rotate(self._normal(*shape) @ self._key_root + self._key_mean, positions)

    def values(self, count: int) -> Tensor:
        return self._normal(1, self.shape.kv_heads, count, self.shape.head_dim) + self._value_mean

    def queries(self, positions: Tensor) -> Tensor:
        """``[1, H * group, T, D]``."""
        shape = (1, self.shape.kv_heads * self.shape.group, positions.shape[1], self.shape.head_dim)
        return self.rope.rotate(self._normal(*shape) @ self._query_root + self._query_mean, positions)

    def statistics(self) -> LayerStatistics:
        positions = torch.arange(MEASURED)[None]
        keys, values, queries = self.keys(positions), self.values(MEASURED), self.queries(positions)
        scores = queries.unflatten(1, (self.shape.kv_heads, -1)) @ keys[:, :, None].transpose(3, 4)
        out = (scores.mul(self.shape.scaling).softmax(-1) @ values[:, :, None]).flatten(1, 2)
        valid, attention = torch.ones(1, MEASURED, dtype=torch.bool), AttentionMoments()
        attention.add(queries, out, positions, valid, self.rope, self.shape.kv_heads)
        return layer_statistics(keys, values, positions, valid, attention, self.rope)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _root(self, count: int) -> Tensor:
        dim = self.shape.head_dim
        directions = torch.linalg.qr(self._normal(count, dim, dim)).Q
        return (1 + torch.arange(dim))[None, :, None] ** -0.5 * 2 * directions


@dataclass(frozen=True, eq=False)
class FilledLayer:
    """A filled layer in the pass that reads its last token, and that token's queries ``[B, H * group, 1, D]``."""

    cache: PagedCache
    query: Tensor

    @property
    def layer(self) -> Layer:
        (layer,) = self.cache.layers.values()
        return layer

    @property
    def pool(self) -> Pool | None:
        """What kernels read; None where no codes are nibbles."""
        assert self.layer.pages is not None
        return self.layer.pages.operand

    @property
    def nbytes(self) -> int:
        """Of all that the layer holds."""
        return self.cache.nbytes

    @property
    def packed_bytes(self) -> int:
        """Of its codes."""
        return self.layer.nbytes - self.layer.exact_nbytes

    @property
    def exact_tokens(self) -> int:
        """Of each sequence."""
        return int(self.cache.index.counts[0])

    def attend(self, scoring: Scoring) -> Tensor:
        """Attention of the last token, which is stored on the way: ``[B, 1, H * group, D]``."""
        fresh = self.layer.fresh
        assert fresh is not None
        return self.cache.attend(self.layer, self.query, scoring, fresh)

    def copies(self, count: int) -> list[FilledLayer]:
        """Layers with bytes of their own; the codecs are shared."""
        return [self, *(FilledLayer(copy.deepcopy(self.cache), self.query) for _ in range(count - 1))]


@torch.no_grad()
def fill(config: CacheConfig, tokens: int, shape: Shape, dtype: torch.dtype, device: torch.device = CPU) -> FilledLayer:
    """A layer that holds ``tokens`` tokens, the same in each row of the batch, each row with bytes of its own.

    Raises:
        QJLError: if none of them would be packed, or the preset does not take this head_dim.
    """
    least = config.recent + BLOCK + 1
    if tokens < least:
        raise QJLError(f"{config.name} keeps the last of {tokens} tokens exact and packs none: give {least} or more.")
    maker = Maker(shape)
    codecs, fitted = _codecs(config, maker, dtype, device)
    cache = PagedCache([0], config.sinks, config.recent, Fitted(codecs))
    (layer,) = cache.layers.values()
    for first in range(0, tokens - 1, DISTINCT):
        count = min(DISTINCT, tokens - 1 - first)
        if first <= DISTINCT:  # what is encoded must have been made where it stands; all else is in its place
            positions = torch.arange(first, first + count)[None]
            keys, values = (x.to(device, dtype) for x in (maker.keys(positions), maker.values(count)))
        cache.append(layer, *(x[:, :, :count].expand(shape.batch, -1, -1, -1) for x in (keys, values)))
        cache.settle()
    assert layer.pages is not None
    layer.pages.codecs = fitted
    last = torch.tensor([[tokens - 1]])
    query, *fresh = (x.to(device, dtype) for x in (maker.queries(last), maker.keys(last), maker.values(1)))
    cache.append(layer, *(x.repeat(shape.batch, 1, 1, 1) for x in fresh))
    return FilledLayer(cache, query.repeat(shape.batch, 1, 1, 1))


def _codecs(config: CacheConfig, maker: Maker, dtype: torch.dtype, device: torch.device) -> tuple[Codecs, Pair]:
    """Codecs that give the same codes again and again, and what they are made of."""
    shape = TokenShape(maker.shape.kv_heads, maker.shape.head_dim, maker.shape.head_dim, device, dtype)
    statistics = maker.statistics()
    fitted = Codecs(config, {0: maker.rope}, lambda layer: statistics).of(0, shape)
    assert fitted is not None
    repeating = Codecs(config, {0: maker.rope})
    repeating.give(0, shape, (_Repeating(fitted[0]), _Repeating(fitted[1])))
    return repeating, fitted


class _Repeating(Codec):
    """Encodes the first stretch of each length, and gives its codes again for all others of that length."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.layout = codec.layout
        self._known: dict[int, Blocks] = {}

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        if x.shape[2] not in self._known:
            self._known[x.shape[2]] = self.codec.encode_tokens(x, first)
        return self._known[x.shape[2]]

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        return self.codec.dequantize(blocks, first)
