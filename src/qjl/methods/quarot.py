"""QuaRot's cache: a Walsh-Hadamard rotation, then a clipped uniform grid per token (arXiv 2404.00456)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer
from qjl.methods.grid import Extremes, RotatedGridCodec, block_hadamard, block_size, grid_layout
from qjl.packed import Layout


@dataclass(frozen=True)
class QuaRot(Quantizer):
    """``y = k H`` after RoPE, rounded to 2^num_bits levels from ``clip_ratio min(y)`` to ``clip_ratio max(y)``.

    A group is ``group_size`` channels of a token, the whole token where that does not divide head_dim; it keeps the
    step and the middle of its grid as float16. H is orthonormal: of size head_dim, or blocks of the largest power of
    two that divides it. True bits of a coordinate: num_bits + 32 / group.
    """

    num_bits: int = 4
    group_size: int = 128
    clip_ratio: float = 0.95

    method: ClassVar[str] = "quarot"
    source: ClassVar[str] = "arXiv:2404.00456"

    def __post_init__(self) -> None:
        if self.num_bits not in (2, 3, 4):
            raise QJLError(f"QuaRot takes 2, 3 or 4 bits, not {self.num_bits}.")
        if self.group_size <= 0 or self.group_size % 8:
            raise QJLError(f"group_size must be a positive multiple of 8, not {self.group_size}.")
        if not 0 < self.clip_ratio <= 1:
            raise QJLError(f"clip_ratio must lie above 0 and be at most 1, not {self.clip_ratio}.")

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return grid_layout(head_dim, self.num_bits, self.group_size)

    def build(self, context: LayerContext, learned: Arrays) -> RotatedGridCodec:
        layout = self.layout(context.head_dim)
        size = block_size(context.head_dim)
        rotation = block_hadamard(context.head_dim, size, context.device).expand(context.heads, -1, -1)
        return RotatedGridCodec(layout, rotation, self.num_bits, Extremes(self.clip_ratio), size)
