"""PolarQuant: a random rotation, then the angles of a recursive polar transform (arXiv 2502.02617).

Pairs of coordinates become a radius and an angle, pairs of those radii again, and so on (Definition 1). After a
random rotation the angles are independent of each other and of the last radius, with known densities (Lemma 2): one
codebook per level serves every token, and only the last radii are stored beside the codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer, require_packable
from qjl.methods.bitpacking import as_half, channel_field, pack_channels, token_major, token_minor, unpack_channels
from qjl.methods.kmeans import lloyd, midpoints
from qjl.methods.rotated import TurnedCodec
from qjl.packed import BLOCK, Blocks, Field, Layout
from qjl.sketch import haar_rotation

GRID = 2**18  # cells that a density is integrated over


@dataclass(frozen=True)
class PolarQuant(Quantizer):
    """Every ``2**levels`` rotated coordinates as one float16 radius and ``2**levels - 1`` angles.

    - ``first_bits``: of an angle of level 1, which is uniform on [0, 2 pi).
    - ``upper_bits``: of an angle of level l > 1, whose density on [0, pi/2] goes as sin(2 psi)^(2^(l-1) - 1).

    True bits of a coordinate: (2^(levels-1) first_bits + (2^(levels-1) - 1) upper_bits + 16) / 2^levels: 3.875.
    """

    levels: int = 4
    first_bits: int = 4
    upper_bits: int = 2
    seed: int = 0

    method: ClassVar[str] = "polarquant"
    source: ClassVar[str] = "arXiv:2502.02617"

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise QJLError(f"polarquant needs two levels or more, not {self.levels}.")
        if not (1 <= self.first_bits <= 8 and 1 <= self.upper_bits <= 8):
            raise QJLError("polarquant takes 1 to 8 bits for the angles of a level.")

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        radii, rest = divmod(head_dim, 2**self.levels)
        if rest:
            raise QJLError(f"head_dim {head_dim} must be a multiple of {2**self.levels} for {self.levels} levels.")
        return {
            "angles": channel_field(head_dim // 2, self.first_bits),
            "upper_angles": channel_field(head_dim // 2 - radii, self.upper_bits),
            "radii": Field((radii, BLOCK), torch.float16),
        }

    def build(self, context: LayerContext, learned: Arrays) -> PolarCodec:
        rotation = haar_rotation(context.head_dim, self.seed, context.device)[None]
        return PolarCodec(self.layout(context.head_dim), rotation, self)


class PolarCodec(TurnedCodec):
    """``edges`` between the angles of each level, and their ``turns [2**bits, 2]``: cosine and sine."""

    def __init__(self, layout: Layout, rotation: Tensor, quantizer: PolarQuant) -> None:
        self.layout = layout
        self.rotation = rotation
        self.quantizer = quantizer
        widths = [quantizer.first_bits, *[quantizer.upper_bits] * (quantizer.levels - 1)]
        codebooks = [torch.tensor(angle_codebook(*one), dtype=torch.float64) for one in enumerate(widths, 1)]
        self.edges = [midpoints(angles).to(rotation) for angles in codebooks]
        self.turns = [torch.stack([angles.cos(), angles.sin()], dim=1).to(rotation) for angles in codebooks]

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        radii, codes = self.turn(x), []
        for edges in self.edges:
            angles = torch.atan2(radii[..., 1::2], radii[..., 0::2]).remainder(2 * math.pi)
            codes.append(torch.bucketize(angles, edges).to(torch.uint8))
            radii = torch.hypot(radii[..., 0::2], radii[..., 1::2])
        return {
            "angles": pack_channels(codes[0], self.quantizer.first_bits),
            "upper_angles": pack_channels(torch.cat(codes[1:], dim=-1), self.quantizer.upper_bits),
            "radii": token_minor(as_half(radii)),
        }

    def decode(self, blocks: Blocks) -> Tensor:
        radii = token_major(blocks["radii"]).float()
        upper = unpack_channels(blocks["upper_angles"], self.quantizer.upper_bits)
        first = unpack_channels(blocks["angles"], self.quantizer.first_bits)
        sizes = [first.shape[3] >> level for level in range(1, self.quantizer.levels)]
        for codes, turns in zip([*upper.split(sizes, 3)[::-1], first], self.turns[::-1], strict=True):
            radii = (radii[..., None] * turns[codes.long()]).flatten(3)
        return radii

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rotation, *self.edges, *self.turns)


@cache
def angle_codebook(level: int, bits: int) -> tuple[float, ...]:
    """Ascending angles with the least mean squared error under the density of a level, by Lloyd's iteration."""
    uniform = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    if level == 1:
        return tuple((2 * math.pi * uniform).tolist())
    psi = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (math.pi / 2 / GRID)
    density = (2 * psi).sin() ** (2 ** (level - 1) - 1)
    high_rate = density.pow(1 / 3).cumsum(0)  # levels of many bits have this density: a start close to the answer
    start = psi[torch.searchsorted(high_rate, uniform * high_rate[-1])]
    return tuple(lloyd(psi[None], density[None], start[None])[0].tolist())
