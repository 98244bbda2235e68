"""A tensor through a preset's codes: for a look at a method, without a model and without a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl.codecs import Codecs, TokenShape
from qjl.errors import QJLError
from qjl.methods.base import Codec, require_finite
from qjl.packed import BLOCK, Blocks
from qjl.presets import DEFAULT_PRESET, CacheConfig, resolve
from qjl.statistics import AttentionMoments, LayerStatistics, layer_statistics


@dataclass(frozen=True, eq=False)
class Quantized:
    """Tokens in codes.

    - ``blocks``: a tensor ``[B, H, T / 64, *shape]`` per field, as pages of a cache hold them.
    - ``codec``: what decodes them.
    """

    blocks: Blocks
    codec: Codec
    _shape: torch.Size
    _dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the codes with every constant; of the codec itself none, which a model's tokens share."""
        return sum(field.nbytes for field in self.blocks.values())

    @property
    def bits(self) -> float:
        """True bits per number, those of a last block that is not full counted too."""
        return 8 * self.nbytes / self._shape.numel()

    def dequantize(self) -> Tensor:
        """The tokens again, in the shape and dtype that they came in."""
        some = next(iter(self.blocks.values()))
        decoded = self.codec.dequantize(self.blocks, _positions(some.shape[0], some.shape[2], some.device))
        return decoded[:, :, : self._shape[-2]].reshape(self._shape).to(self._dtype)


def quantize(
    x: Tensor,
    preset: str | Path | CacheConfig = DEFAULT_PRESET,
    role: Literal["key", "value"] = "key",
    *,
    queries: Tensor | None = None,
) -> Quantized:
    """Code keys or values ``[..., T, D]`` as a preset does.

    >>> coded = qjl.quantize(torch.randn(8, 1024, 128), "qjl-2")
    >>> error = coded.dequantize() - x

    Dimensions before the last two are heads, and rows of a batch before these. Methods that are fitted take their
    statistics from ``x`` itself. Those of keys that ask for queries take them from ``queries [..., Q, D]``, of as many
    rows and a multiple of the heads; without any, all directions count alike. Tokens count as before RoPE.

    Raises:
        QJLError: for an unknown preset, a dimension that does not pack, numbers that are not finite, or queries that
            are not those of keys.
    """
    _require_floats(x, "tokens to code are floats [..., T, D]")
    if role not in ("key", "value"):
        raise QJLError(f"role {role!r} is not known: give 'key' or 'value'.")
    require_finite(x, f"the {role}s")
    if queries is not None:
        if role == "value":
            raise QJLError("queries tell which errors of keys count, and say nothing of values: leave them out.")
        _require_floats(queries, "queries are floats [..., Q, D]")
        require_finite(queries, "the queries")
    tokens = _by_head(x)
    config = replace(resolve(preset), overrides=())  # which are for some layers of a model
    statistics = _statistics(tokens, None if queries is None else _by_head(queries))
    codecs = Codecs(config, statistics=lambda layer: statistics).of(0, TokenShape.of(tokens, tokens))
    assert codecs is not None
    codec = codecs[role == "value"]
    padded = F.pad(tokens, (0, 0, 0, -tokens.shape[2] % BLOCK), mode="replicate")
    first = _positions(padded.shape[0], padded.shape[2] // BLOCK, x.device)
    return Quantized(codec.encode_tokens(padded, first), codec, x.shape, x.dtype)


def _require_floats(x: Tensor, what: str) -> None:
    if x.dim() < 2 or not x.numel() or not x.is_floating_point():
        raise QJLError(f"{what}, not {x.dtype} {list(x.shape)}.")


def _by_head(x: Tensor) -> Tensor:
    """``[B, H, T, D]``."""
    return x.detach().reshape(-1, x.shape[-3] if x.dim() > 2 else 1, *x.shape[-2:])


def _positions(batch: int, blocks: int, device: torch.device) -> Tensor:
    """Of each block's first token, ``int64 [B, blocks]``."""
    return (torch.arange(blocks, device=device) * BLOCK).expand(batch, -1)


def _statistics(tokens: Tensor, queries: Tensor | None) -> LayerStatistics:
    def positions(of: Tensor) -> Tensor:
        return torch.arange(of.shape[2], device=of.device).expand(of.shape[0], -1)

    moments = None
    if queries is not None:
        are_theirs = queries.shape[0] == tokens.shape[0] and queries.shape[3] == tokens.shape[3]
        if not are_theirs or queries.shape[1] % tokens.shape[1]:
            raise QJLError(f"queries {list(queries.shape)} are not those of tokens {list(tokens.shape)}.")
        moments, where = AttentionMoments(), positions(queries)
        moments.add(queries, queries, where, torch.ones_like(where, dtype=torch.bool), None, tokens.shape[1])
    where = positions(tokens)
    return layer_statistics(tokens, tokens, where, torch.ones_like(where, dtype=torch.bool), moments, None)
