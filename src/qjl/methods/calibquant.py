"""CalibQuant: 1-bit keys and values per channel, post-scaled and calibrated (arXiv 2502.14882)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer
from qjl.methods.channels import ChannelCodec, channel_layout
from qjl.packed import BLOCK, Blocks, Layout


@dataclass(frozen=True)
class CalibQuant(Quantizer):
    """One bit per coordinate: above or below the middle (min + max) / 2 of its channel in a block of 64 tokens.

    A bit decodes to ``middle +- spread (max - min) / 2``; the public code has spread .5 for keys and .3 for values.
    With ``tau`` > 0, scores are calibrated too, as logits s = <q, k> / sqrt(head_dim) of a query and a block:
    ``g(s) = low + (s - low) (high - tau - low) / (high - low)`` from their extremes, and never less than low. The
    public code has tau 3, and the extremes of all visual tokens.

    Stored per channel and block: float16 step and middle, so 1.5 true bits.
    """

    spread: float = 0.5
    tau: float = 0.0

    method: ClassVar[str] = "calibquant"
    source: ClassVar[str] = "arXiv:2502.14882"

    def __post_init__(self) -> None:
        if not 0 < self.spread <= 1:
            raise QJLError(f"spread must lie above 0 and be at most 1, not {self.spread}.")
        if not 0 <= self.tau < float("inf"):
            raise QJLError(f"tau must be a number of logits from 0 up, not {self.tau}.")

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return channel_layout(head_dim, num_bits=1, group_size=BLOCK)

    def build(self, context: LayerContext, learned: Arrays) -> CalibQuantCodec:
        return CalibQuantCodec(self.layout(context.head_dim), 1, BLOCK, self.spread, self.tau)


@dataclass(frozen=True, eq=False)
class CalibQuantCodec(ChannelCodec):
    tau: float = 0.0

    def score(self, query: Tensor, blocks: Blocks, first: Tensor) -> Tensor:
        scores = super().score(query, blocks, first)
        return self._calibrated(scores, self.tau * query.shape[3] ** 0.5) if self.tau else scores

    @staticmethod
    def _calibrated(scores: Tensor, shrinkage: float) -> Tensor:
        """Scores of each block with their range narrowed by ``shrinkage`` from above."""
        blocks = scores.unflatten(3, (-1, BLOCK))
        low = blocks.amin(-1, keepdim=True)
        span = blocks.amax(-1, keepdim=True) - low
        kept = (1 - shrinkage / span.clamp(min=torch.finfo(span.dtype).tiny)).clamp(min=0)
        return (low + kept * (blocks - low)).flatten(3)
