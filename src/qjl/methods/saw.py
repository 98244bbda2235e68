"""SAW-INT4: a block-diagonal Hadamard rotation, then 4-bit integers per token (arXiv 2604.19157)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer
from qjl.methods.grid import Extremes, RotatedGridCodec, block_hadamard, block_size, grid_layout
from qjl.packed import Layout

NUM_BITS = 4


@dataclass(frozen=True)
class SAW(Quantizer):
    """``y = k diag(H, ..., H)``, rounded to 16 levels from min(y) to max(y) of the token.

    ``order`` is the size of the blocks, at most the largest power of two that divides head_dim; 1 leaves the token as
    it is (the paper's values). Stored per token: a float16 step and the middle of its grid. True bits of a
    coordinate: 4 + 32 / head_dim.
    """

    order: int = 128

    method: ClassVar[str] = "saw"
    source: ClassVar[str] = "arXiv:2604.19157"

    def __post_init__(self) -> None:
        if self.order <= 0 or self.order & (self.order - 1):
            raise QJLError(f"the order of a Hadamard block is a power of two, not {self.order}.")

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return grid_layout(head_dim, NUM_BITS, group_size=head_dim)

    def build(self, context: LayerContext, learned: Arrays) -> RotatedGridCodec:
        layout = self.layout(context.head_dim)
        size = min(self.order, block_size(context.head_dim))
        rotation = block_hadamard(context.head_dim, size, context.device)
        return RotatedGridCodec(layout, rotation.expand(context.heads, -1, -1), NUM_BITS, Extremes(), size)
