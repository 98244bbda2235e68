"""The codec of every method with a nibble form: a linear map, nibble codes, one scale per token.

A token decodes as ``k_hat = mean_n + scale * query_map^T z_hat(codes)``, so its score is
``<q, mean_n> + scale * <query_map q, z_hat(codes)>``: the fused step reads the ``form`` and looks up tables in the
space of the codes. Values are the mirror image: codes are summed in that space and mapped back once.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qjl.codebook import NIBBLE, NibbleCode
from qjl.methods.base import Arrays, Codec, LayerContext
from qjl.methods.bitpacking import as_half, pack_tokens
from qjl.ops import forms
from qjl.ops.recipe import Recipe
from qjl.packed import BLOCK, Blocks, Field, Layout, block_positions, blocks_of_tokens
from qjl.rope import Rope

STEPS_PER_OCTAVE = 12
ZERO_CODE = 0
UNIT_CODE = 128


@dataclass(frozen=True, eq=False)
class LogScale:
    """A positive scale in 8 bits: log2 in steps of 1/12 octave around ``unit [H]``; code 0 is zero.

    The range is ``unit * 2**+-10.6`` and the largest relative error 2.9 %, far below that of the codes; rounding
    is unbiased in the logarithm.
    """

    unit: Tensor

    FIELD = Field((BLOCK,), torch.uint8)

    def encode(self, scale: Tensor) -> Tensor:
        """``float [B, H, T] -> uint8``."""
        octaves = (scale / self.unit[None, :, None]).log2()
        codes = (octaves * STEPS_PER_OCTAVE + UNIT_CODE).round().clamp(ZERO_CODE + 1, 255)
        return torch.where(scale > 0, codes, ZERO_CODE).to(torch.uint8)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.unit,)


@dataclass(frozen=True, eq=False)
class HalfScale:
    """A scale as float16, as the papers store norms."""

    FIELD = Field((BLOCK,), torch.float16)

    def encode(self, scale: Tensor) -> Tensor:
        return as_half(scale)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean per head, ``vector [H, D]``, rotated to each token's position where ``rope`` is given.

    RoPE turns a constant component of the keys with the position, so the mean is taken before RoPE and
    ``R_n mu`` is what quantizing subtracts and decoding adds back, exactly.
    """

    vector: Tensor
    rope: Rope | None = None

    @staticmethod
    def learn(context: LayerContext) -> Arrays:
        """That of the layer's keys or values."""
        statistics = context.require_statistics()
        if context.role == "value":
            return {"mean": statistics.value_mean.contiguous()}
        return {"mean": statistics.key_mean.contiguous()} | context.learned_rope()

    @classmethod
    def build(cls, context: LayerContext, learned: Arrays) -> Mean:
        """That of the keys or values which the codec sees."""
        vector = context.require_learned(learned, "mean", (context.heads, context.head_dim))
        return cls(vector, context.rope_from(learned) if context.role == "key" else None)

    def at(self, positions: Tensor) -> Tensor:
        """``R_n mu`` for ``positions [B, T]``: ``[B, H, T, D]``."""
        mean = self.vector.float()[None, :, None, :]
        if self.rope is None:
            return mean
        return self.rope.rotate_exactly(mean.expand(positions.shape[0], -1, positions.shape[1], -1), positions)

    def turned(self) -> forms.Turn | None:
        """How the fused decode step turns mu."""
        if self.rope is None:
            return None
        coordinates = torch.arange(self.vector.shape[1], dtype=torch.int32)
        first, second, _ = self.rope.split(coordinates)
        return forms.Turn(self.rope.inv_freq, first, second, self.rope.scaling)


class NibbleCodec(Codec):
    """Decodes nibble codes; a method adds how to encode.

    ``query_map [H, D', D]`` takes a query to the space of the codes and, transposed, the codes back.
    """

    def __init__(
        self,
        query_map: Tensor,
        code: NibbleCode,
        scale: LogScale | HalfScale,
        mean: Mean | None,
    ) -> None:
        self.query_map = query_map
        self.code = code
        self.scale = scale
        self.mean = mean

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return nibble_layout(self.code.nibbles, self.scale.FIELD)

    @property
    def recipe(self) -> Recipe | None:
        return None

    @property
    def rope_of_mean(self) -> Rope | None:
        return None if self.mean is None else self.mean.rope

    @cached_property
    def form(self) -> forms.NibbleForm:  # type: ignore[override]
        return forms.NibbleForm(
            map=self.query_map,
            coordinates=self.code.coordinates,
            entries=self.code.entries,
            code_dim=self.code.dim,
            scale="scale",
            unit=self.scale.unit if isinstance(self.scale, LogScale) else None,
            mean=self.mean.vector if self.mean else None,
            turn=self.mean.turned() if self.mean else None,
        )

    @abstractmethod
    def encode(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Nibbles ``uint8 [B, H, T, N]`` and scales ``float [B, H, T]`` of centred tokens."""

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        residual = x.float() - self.mean.at(block_positions(first)) if self.mean else x.float()
        nibbles, scale = self.encode(residual)
        return {
            "codes": pack_tokens(nibbles, NIBBLE),
            "scale": blocks_of_tokens(self.scale.encode(scale)[..., None]).squeeze(-1),
        }

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        mean = (self.mean.vector,) if self.mean else ()
        return (self.query_map, *self.code.tensors, *self.scale.tensors, *mean)


def nibble_layout(nibbles: int, scale: Field) -> Layout:
    """Codes of N nibbles and one scale per token."""
    return {"codes": Field((nibbles // 2, BLOCK), torch.uint8), "scale": scale}


def unbiased_scale(y: Tensor, decoded: Tensor) -> Tensor:
    """a = ||y||^2 / <y, y_hat>, with which a y_hat is exact along y itself; 0 for a zero token."""
    squared = (y * y).sum(-1)
    aligned = (y * decoded).sum(-1)
    return torch.where(aligned > 0, squared / aligned.clamp(min=1e-30), torch.zeros_like(squared))
