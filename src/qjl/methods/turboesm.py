"""TurboESM: TurboQuant with calibrated parts (arXiv 2603.26110; details as in github.com/YueHuLab/TurboESM).

Keys are turned by each head's singular vectors after RoPE, keys and values have tables of levels of their own, and one
more bit keeps the sign of what the level leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qjl.codebook import lloyd_max
from qjl.methods.base import Arrays, LayerContext, Quantizer, require_packable
from qjl.methods.bitpacking import channel_field, pack_channels, unpack_channels
from qjl.methods.kmeans import lloyd, midpoints
from qjl.methods.rotated import TurnedCodec
from qjl.packed import Blocks, Layout
from qjl.statistics import QUANTILES

LEVEL_BITS = 3


@dataclass(frozen=True)
class TurboESM(Quantizer):
    """Each coordinate as the nearest of a head's 8 levels, the means of their cells over calibration data.

    Keys are turned by the right singular vectors of the keys as cached (the eigenvectors of their uncentred second
    moment); values stay as they are. Nothing is stored per token.

    - ``residual``: also the sign of what the level leaves, decoded as the mean of its magnitude: the authors' 1-bit
      QJL, though nothing is projected. They have it on keys alone.

    True bits of a coordinate: 3, with the residual 4.
    """

    residual: bool = True

    method: ClassVar[str] = "turboesm"
    source: ClassVar[str] = "arXiv:2603.26110"

    @property
    def needs_statistics(self) -> bool:
        return True

    @property
    def num_bits(self) -> int:
        return LEVEL_BITS + self.residual

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        return {"codes": channel_field(head_dim, self.num_bits)}

    def learn(self, context: LayerContext) -> Arrays:
        if context.role == "value":
            return self._learned_tables(context.require_statistics().value_quantiles.double().cpu())
        variances, vectors = torch.linalg.eigh(context.second_moment())
        rotation = vectors.transpose(1, 2).half().contiguous()
        return {"rotation": rotation} | self._learned_tables(_normal_samples(variances))

    def _learned_tables(self, samples: Tensor) -> Arrays:
        samples = samples.flatten(1).sort(dim=1).values
        levels = _levels(samples)
        edges = midpoints(levels)
        if self.residual:
            nearest = levels.gather(1, torch.searchsorted(edges, samples))
            left = (samples - nearest).abs().mean(1)[:, None, None] * torch.tensor([-1, 1], dtype=torch.int64)
            edges = torch.cat([edges, levels], dim=1).sort(dim=1).values
            levels = (levels[..., None] + left).flatten(1)
        return {"edges": edges.half(), "levels": levels.half()}

    def build(self, context: LayerContext, learned: Arrays) -> TurboESMCodec:
        heads, head_dim, count = context.heads, context.head_dim, 2**self.num_bits
        edges = context.require_learned(learned, "edges", (heads, count - 1), torch.float16)
        levels = context.require_learned(learned, "levels", (heads, count), torch.float16)
        if context.role == "value":
            rotation = torch.eye(head_dim, dtype=torch.float16, device=context.device).expand(heads, -1, -1)
        else:
            rotation = context.require_learned(learned, "rotation", (heads, head_dim, head_dim), torch.float16)
        return TurboESMCodec(self.layout(head_dim), rotation, edges, levels)


class TurboESMCodec(TurnedCodec):
    """Code i lies between ``edges[i - 1]`` and ``edges[i]``, ``[H, 2**bits - 1]``, and decodes to ``levels[i]``."""

    def __init__(self, layout: Layout, rotation: Tensor, edges: Tensor, levels: Tensor) -> None:
        self.layout = layout
        self.rotation = rotation
        self.edges = edges
        self.levels = levels

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        y = self.turn(x)
        edges = self.edges.float().expand(y.shape[0], -1, -1).contiguous()
        codes = torch.searchsorted(edges, y.flatten(2)).view(y.shape)
        return {"codes": pack_channels(codes.to(torch.uint8), self._width)}

    def decode(self, blocks: Blocks) -> Tensor:
        codes = unpack_channels(blocks["codes"], self._width).long()
        levels = self.levels.float().expand(codes.shape[0], -1, -1)
        return levels.gather(2, codes.flatten(2)).view(codes.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rotation, self.edges, self.levels)

    @property
    def _width(self) -> int:
        return self.levels.shape[1].bit_length() - 1


def _normal_samples(variances: Tensor) -> Tensor:
    """Quantiles of a normal variable for each variance, ``[H, D] -> [H, D, 129]``, as the statistics have of values."""
    uniform = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    return variances.clamp(min=0).sqrt()[..., None] * torch.special.ndtri(uniform)


def _levels(samples: Tensor) -> Tensor:
    """The 8 levels of each head's ascending samples ``[H, N]``, by Lloyd's iteration from those of a normal density."""
    mean, deviation = samples.mean(1, keepdim=True), samples.std(1, keepdim=True)
    start = mean + deviation * torch.tensor(lloyd_max(LEVEL_BITS), dtype=torch.float64)
    return lloyd(samples, torch.ones_like(samples), start)
