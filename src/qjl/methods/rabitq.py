"""RaBitQ: the nearest point of a rotated grid to a token's direction, and an exact rescale (arXiv 2405.12497).

With o = (x - c) / ||x - c|| and o_bar the grid point at the least angle to it after a random rotation, normalised,
``<o_bar, q> / <o_bar, o>`` estimates ``<o, q>`` without bias over the rotation. The grid has one bit per coordinate
(signs) or more (the extended RaBitQ, arXiv 2409.09913).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qjl.codebook import NIBBLE, NibbleCode, uniform_code
from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer, require_packable
from qjl.methods.bitpacking import repack, top_code
from qjl.methods.nibble import HalfScale, Mean, NibbleCodec, nibble_layout, unbiased_scale
from qjl.packed import Layout
from qjl.sketch import haar_rotation

MAX_BITS = 4
TOKENS_AT_ONCE = 256  # in the search for the nearest grid point, which takes 2**num_bits * head_dim numbers a token


@dataclass(frozen=True)
class RaBitQ(Quantizer):
    """Codes of ``num_bits`` per rotated coordinate, and one float16 scale per token.

    - ``centre``: the c that is subtracted first is the mean of the statistics, the one centroid of a head (of keys
      before RoPE, turned to each position); its share of a score is added back exactly. False takes c = 0.

    The two scalars of the paper, ``||x - c||`` and ``<o_bar, o>``, meet an inner product only as their ratio, which is
    what is stored. True bits of a coordinate: num_bits + 16 / d.
    """

    num_bits: int = 1
    centre: bool = True
    seed: int = 0

    method: ClassVar[str] = "rabitq"
    source: ClassVar[str] = "arXiv:2405.12497"

    def __post_init__(self) -> None:
        if self.num_bits not in range(1, MAX_BITS + 1):
            raise QJLError(f"RaBitQ takes 1 to {MAX_BITS} whole bits, not {self.num_bits}.")

    @property
    def needs_statistics(self) -> bool:
        return self.centre

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        return nibble_layout(head_dim * self.num_bits // NIBBLE, HalfScale.FIELD)

    def learn(self, context: LayerContext) -> Arrays:
        return Mean.learn(context) if self.centre else {}

    def build(self, context: LayerContext, learned: Arrays) -> RaBitQCodec:
        self.layout(context.head_dim)
        centroid = Mean.build(context, learned) if self.centre else None
        rotation = haar_rotation(context.head_dim, self.seed, context.device)
        code = uniform_code(context.head_dim, self.num_bits).to(context.device)
        return RaBitQCodec(self.num_bits, rotation.expand(context.heads, -1, -1), code, centroid)


class RaBitQCodec(NibbleCodec):
    def __init__(self, num_bits: int, rotation: Tensor, code: NibbleCode, centroid: Mean | None) -> None:
        super().__init__(rotation, code, HalfScale(), centroid)
        self.num_bits = num_bits

    def encode(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = residual @ self.query_map.transpose(1, 2)
        codes = torch.cat([nearest_grid_codes(part, self.num_bits) for part in y.split(TOKENS_AT_ONCE, 2)], dim=2)
        point = codes.float() - top_code(self.num_bits) / 2
        return repack(codes, self.num_bits, NIBBLE), unbiased_scale(y, point)


def nearest_grid_codes(y: Tensor, num_bits: int) -> Tensor:
    """Codes ``uint8 [..., D]`` of the grid point ``codes - (2**num_bits - 1) / 2`` at the least angle to ``y``.

    The nearest point to t y changes, as t grows, one coordinate at a time, where t |y_i| is an integer k; all of
    these points are compared, as in the extended RaBitQ, by running sums over the crossings in their order.
    """
    magnitude, dim = y.abs(), y.shape[-1]
    steps = torch.arange(1, 2 ** (num_bits - 1), device=y.device)  # k
    crossings = (steps[:, None] / magnitude[..., None, :]).flatten(-2)
    order = crossings.argsort(dim=-1, stable=True)
    coordinate, step = order % dim, order // dim + 1
    inner = torch.cat([magnitude.sum(-1, keepdim=True) / 2, magnitude.gather(-1, coordinate)], dim=-1).cumsum(-1)
    squared_norm = torch.cat([torch.full_like(inner[..., :1], dim / 4), 2.0 * step], dim=-1).cumsum(-1)
    crossed = (inner / squared_norm.sqrt()).argmax(-1, keepdim=True)
    taken = torch.arange(order.shape[-1], device=y.device) < crossed
    above = torch.zeros_like(magnitude).scatter_add_(-1, coordinate, taken.float())  # of |y|: 0 to 2**(bits - 1) - 1
    middle = 2 ** (num_bits - 1)
    return torch.where(y >= 0, middle + above, middle - 1 - above).to(torch.uint8)
