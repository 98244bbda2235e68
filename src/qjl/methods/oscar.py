"""OSCAR: a rotation by what attention consumes, Hadamard, bit reversal, clipped 2-bit grids (arXiv 2605.17757)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer
from qjl.methods.grid import RotatedGridCodec, block_hadamard, block_size, grid_layout, min_max
from qjl.packed import Layout

GROUP = 128


@dataclass(frozen=True)
class OSCAR(Quantizer):
    """``y = k R`` with ``R = U H P``, clipped, rounded to 2^num_bits levels from min(y) to max(y).

    U are the eigenvectors, largest eigenvalue first, of Q^T Q for keys and of (S V)^T (S V), the second moment of the
    attention's outputs, for values; H is Hadamard and P reverses the bits of the index. A group of 128 channels (the
    token where head_dim is no multiple of it) is clipped at the quantile ``key_clip`` or ``value_clip`` of its |y|
    and keeps a float16 step and middle. True bits of a coordinate: num_bits + 32 / group; 2.28 with the paper's 320
    exact tokens of 131072.
    """

    num_bits: int = 2
    key_clip: float = 0.96
    value_clip: float = 0.92

    method: ClassVar[str] = "oscar"
    source: ClassVar[str] = "arXiv:2605.17757"

    def __post_init__(self) -> None:
        if self.num_bits not in (2, 3, 4):
            raise QJLError(f"OSCAR takes 2, 3 or 4 bits, not {self.num_bits}.")
        if not (0 < self.key_clip <= 1 and 0 < self.value_clip <= 1):
            raise QJLError("key_clip and value_clip are quantiles: above 0 and at most 1.")

    @property
    def needs_statistics(self) -> bool:
        return True

    @property
    def needs_queries(self) -> bool:
        return True

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return grid_layout(head_dim, self.num_bits, GROUP)

    def learn(self, context: LayerContext) -> Arrays:
        if context.role == "key":
            _, moment = context.key_moments()
        else:
            moment = context.require_statistics().output_moment
        return {"rotation": composed_rotation(moment.double().cpu()).float().contiguous()}

    def build(self, context: LayerContext, learned: Arrays) -> RotatedGridCodec:
        layout = self.layout(context.head_dim)
        rotation = context.require_learned(learned, "rotation", (context.heads, context.head_dim, context.head_dim))
        quantile = self.key_clip if context.role == "key" else self.value_clip
        return RotatedGridCodec(layout, rotation, self.num_bits, partial(clipped_min_max, quantile=quantile))


def composed_rotation(moment: Tensor) -> Tensor:
    """``U H P`` of second moments ``[H, D, D]``.

    Where D takes several Hadamard blocks, the eigenvectors are dealt to them in turn: each mixes large and small ones.
    """
    dim = moment.shape[-1]
    largest_first = torch.linalg.eigh(moment).eigenvectors.flip(-1)
    size = block_size(dim)
    dealt = torch.arange(dim).view(size, -1).T.flatten()
    mixed = largest_first[:, :, dealt] @ block_hadamard(dim, size, moment.device).to(moment.dtype)
    return mixed[:, :, _bit_reversed(dim)]


def clipped_min_max(y: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """The extremes of y clipped to the quantile of its magnitudes, interpolated between two of them."""
    ascending = y.abs().sort(dim=-1).values
    rank = quantile * (y.shape[-1] - 1)
    below = int(rank)
    above = min(below + 1, y.shape[-1] - 1)
    threshold = torch.lerp(ascending[..., below], ascending[..., above], rank - below)[..., None]
    low, high = min_max(y)
    return low.maximum(-threshold), high.minimum(threshold)


def _bit_reversed(dim: int) -> list[int]:
    """Indices by their binary digits read backwards; a permutation for any dim."""
    width = (dim - 1).bit_length()
    return sorted(range(dim), key=lambda i: int(f"{i:0{width}b}"[::-1], 2))
