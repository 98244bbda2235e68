"""KVQuant: levels from k-means on calibrated distributions, and outliers kept sparse (arXiv 2401.18079).

Keys before RoPE are normalised per channel by the calibration's thresholds, values per token by their own range. The
paper's k-means weighs numbers by Fisher information, which takes gradients; here all count alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods.base import Arrays, Codec, LayerContext, Quantizer, Unrotated, require_packable
from qjl.methods.bitpacking import as_half, channel_field, pack_channels, unpack_channels
from qjl.methods.kmeans import lloyd, midpoints
from qjl.packed import BLOCK, Blocks, Field, Layout, blocks_of_tokens

INDICES = 2**15  # that an int16 tells apart
SAMPLED_TOKENS = 2 * BLOCK


@dataclass(frozen=True)
class KVQuant(Quantizer):
    """``x_hat = middle + reach * level``, the levels those of k-means on (x - middle) / reach without the outliers.

    - ``axis``: ``channel`` (the paper's keys) takes middle and reach from the quantiles ``outliers / 2`` and
      ``1 - outliers / 2`` of each channel; ``token`` (its values) from the least and greatest inlier of the token.
    - ``outliers``: share of a block's numbers that are stored in float16, with an int16 index: those farthest out, in
      units of their channel's reach or their token's standard deviation.
    - ``q_norm``: levels stretched to the mean and variance of the calibration (Q-Norm, the paper's 2 bits).

    True bits of a coordinate: num_bits + .32 for 1 % of outliers, and per token 32 / head_dim for a float16 middle
    and reach.
    """

    num_bits: int = 4
    axis: Literal["channel", "token"] = "channel"
    outliers: float = 0.01
    q_norm: bool = False

    method: ClassVar[str] = "kvquant"
    source: ClassVar[str] = "arXiv:2401.18079"

    def __post_init__(self) -> None:
        if self.num_bits not in (2, 3, 4):
            raise QJLError(f"KVQuant takes 2, 3 or 4 bits, not {self.num_bits}.")
        if self.axis not in ("channel", "token"):
            raise QJLError(f"KVQuant normalises per channel or per token, not per {self.axis}.")
        if not 0 < self.outliers < 1:
            raise QJLError(f"outliers is a share, above 0 and below 1, not {self.outliers}.")

    @property
    def needs_statistics(self) -> bool:
        return True

    def outlier_count(self, head_dim: int) -> int:
        """Outliers of a block: fewer than a token has channels, so that no token is without inliers.

        Raises:
            QJLError: if they are more, or their indices do not fit 16 bits.
        """
        count = math.ceil(self.outliers * BLOCK * head_dim)
        if count >= head_dim:
            raise QJLError(f"{count} outliers per block are too many for head_dim {head_dim}: keep them below it.")
        if BLOCK * head_dim > INDICES:
            raise QJLError(f"outliers of head_dim {head_dim} have no 16-bit index: it must be at most 512.")
        return count

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        count = self.outlier_count(head_dim)
        layout = {
            "codes": channel_field(head_dim, self.num_bits),
            "outlier_index": Field((count,), torch.int16),
            "outlier_value": Field((count,), torch.float16),
        }
        if self.axis == "token":
            layout |= {name: Field((BLOCK,), torch.float16) for name in ("middle", "reach")}
        return layout

    def learn(self, context: LayerContext) -> Arrays:
        statistics = context.require_statistics()
        quantiles = statistics.key_quantiles if context.role == "key" else statistics.value_quantiles
        quantiles = quantiles.double().cpu()
        if self.axis == "channel":
            x = quantiles.transpose(1, 2)[None]  # a token of each quantile
            middle, reach = _thresholds(quantiles, self.outliers / 2)
            is_inlier = (x - middle).abs() <= reach
        else:
            x = _sampled_tokens(quantiles)
            outliers, middle, reach = _token_ranges(x, self.outlier_count(context.head_dim))
            is_inlier = ~_mask(outliers, x)
        edges, levels = _trained(_normalised(x, middle, reach), is_inlier, self.num_bits, self.q_norm)
        learned = {"edges": edges, "levels": levels}
        if self.axis == "channel":
            learned |= {"middle": middle[0, :, 0], "reach": reach[0, :, 0]}
        learned = {name: array.float().contiguous() for name, array in learned.items()}
        return learned | context.learned_rope() if context.role == "key" else learned

    def build(self, context: LayerContext, learned: Arrays) -> Codec:
        count, channels = 2**self.num_bits, (context.heads, context.head_dim)
        edges = context.require_learned(learned, "edges", (context.heads, count - 1))
        levels = context.require_learned(learned, "levels", (context.heads, count))
        names = ("middle", "reach") if self.axis == "channel" else ()
        ranges = tuple(context.require_learned(learned, name, channels)[None, :, None] for name in names)
        codec = KVQuantCodec(self.layout(context.head_dim), self.num_bits, edges, levels, ranges)
        rope = context.rope_from(learned) if context.role == "key" else None
        return codec if rope is None else Unrotated(codec, rope)


@dataclass(frozen=True, eq=False)
class KVQuantCodec(Codec):
    """``edges [H, 2^bits - 1]`` of the cells and the ``levels [H, 2^bits]`` that they decode to.

    ``channels``: middle and reach ``[1, H, 1, D]``; empty where each token has its own.
    """

    layout: Layout
    num_bits: int
    edges: Tensor
    levels: Tensor
    channels: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.edges, self.levels, *self.channels)

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        x = x.float()
        count = self.layout["outlier_index"].shape[0]
        if self.channels:
            middle, reach = self.channels
            index, constants = _farthest(_normalised(x, middle, reach), count), {}
        else:
            index, middle, reach = _token_ranges(x, count)
            constants = {"middle": _per_token(middle), "reach": _per_token(reach)}
        codes = _cells(self.edges, _normalised(x, middle, reach))
        return {
            "codes": pack_channels(codes.to(torch.uint8), self.num_bits),
            "outlier_index": index.to(torch.int16),
            "outlier_value": as_half(blocks_of_tokens(x).flatten(3).gather(3, index)),
            **constants,
        }

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        codes = unpack_channels(blocks["codes"], self.num_bits).long()
        heads, count = self.levels.shape
        own = torch.arange(heads, device=codes.device)[:, None, None] * count
        middle, reach = self.channels or (blocks[name].flatten(2).float()[..., None] for name in ("middle", "reach"))
        decoded = blocks_of_tokens(self.levels.flatten()[codes + own] * reach + middle)
        index, exact = blocks["outlier_index"].long(), blocks["outlier_value"].float()
        return decoded.flatten(3).scatter(3, index, exact).view_as(decoded).flatten(2, 3)


def _thresholds(quantiles: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Middle and reach ``[1, H, 1, D]`` of the channels between their quantiles ``tail`` and ``1 - tail``."""
    count = quantiles.shape[-1]
    rank = min(max(tail * count - 0.5, 0), (count - 1) / 2)  # quantile i is that of (i + 1/2) / count
    below = int(rank)
    ends = (quantiles, quantiles.flip(-1))
    low, high = (torch.lerp(x[..., below], x[..., below + 1], rank - below)[None, :, None] for x in ends)
    return (high + low) / 2, (high - low) / 2


def _normalised(x: Tensor, middle: Tensor, reach: Tensor) -> Tensor:
    return (x - middle) / torch.where(reach > 0, reach, 1)


def _token_ranges(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outliers ``[B, H, blocks, count]``; middle and reach ``[B, H, T, 1]`` of the rest of each token, as float16."""
    deviation, mean = torch.std_mean(x, dim=-1, keepdim=True)
    index = _farthest((x - mean) / deviation.clamp(min=torch.finfo(torch.float32).tiny), count)
    outlier = _mask(index, x)
    low, high = (x.masked_fill(outlier, math.inf).amin(-1, True), x.masked_fill(outlier, -math.inf).amax(-1, True))
    return index, as_half((high + low) / 2).to(x.dtype), as_half((high - low) / 2).to(x.dtype)


def _farthest(z: Tensor, count: int) -> Tensor:
    """The largest magnitudes of each block, by index within it: ``[B, H, T, D] -> int64 [B, H, blocks, count]``."""
    return blocks_of_tokens(z.abs()).flatten(3).topk(count).indices


def _mask(index: Tensor, like: Tensor) -> Tensor:
    """``int64 [B, H, blocks, count] -> bool [B, H, T, D]``."""
    blocks = torch.zeros_like(blocks_of_tokens(like), dtype=torch.bool)
    return blocks.flatten(3).scatter(3, index, True).view_as(blocks).flatten(2, 3)


def _sampled_tokens(quantiles: Tensor) -> Tensor:
    """Tokens ``[1, H, 128, D]`` of channels that are independent and distributed as these quantiles."""
    order = torch.rand(quantiles.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).argsort(-1)
    return quantiles.gather(2, order)[None, :, :, :SAMPLED_TOKENS].transpose(2, 3)


def _trained(z: Tensor, is_inlier: Tensor, num_bits: int, q_norm: bool) -> tuple[Tensor, Tensor]:
    """Edges and levels for the inliers of ``z [1, H, T, D]``."""
    samples, order = z[0].flatten(1).sort(dim=1)
    weights = is_inlier[0].flatten(1).double().gather(1, order)
    ranks = (torch.arange(2**num_bits, dtype=torch.float32) + 0.5) / 2**num_bits * weights.sum(1, keepdim=True)
    start = samples.gather(1, torch.searchsorted(weights.cumsum(1), ranks))
    levels = lloyd(samples, weights, start)
    edges = midpoints(levels)
    if not q_norm:
        return edges, levels
    (mean, deviation), (code_mean, code_deviation) = (
        _mean_and_deviation(x, weights) for x in (samples, levels.gather(1, torch.searchsorted(edges, samples)))
    )
    stretch = torch.where(code_deviation > 0, deviation / code_deviation, 1)
    return edges, (levels - code_mean) * stretch + mean


def _mean_and_deviation(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    shares = weights / weights.sum(1, keepdim=True)
    mean = (x * shares).sum(1, keepdim=True)
    return mean, ((x - mean).square() * shares).sum(1, keepdim=True).sqrt()


def _cells(edges: Tensor, z: Tensor) -> Tensor:
    """Codes of ``z [B, H, T, D]`` by ``edges [H, cells - 1]``."""
    by_head = z.transpose(0, 1)
    return torch.searchsorted(edges, by_head.flatten(1)).view(by_head.shape).transpose(0, 1)


def _per_token(x: Tensor) -> Tensor:
    """``[B, H, T, 1] -> float16 [B, H, T / 64, 64]``."""
    return blocks_of_tokens(as_half(x)).squeeze(-1)
