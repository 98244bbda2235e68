"""CalibQuant: 1-bit keys and values per channel, their extremes narrowed (arXiv 2502.14882)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer
from qjl.methods.per_channel import ChannelCodec, channel_layout
from qjl.packed import BLOCK, Layout


@dataclass(frozen=True)
class CalibQuant(Quantizer):
    """One bit per coordinate: above or below the middle (min + max) / 2 of its channel in a block of 64 tokens.

    A bit decodes to ``middle +- spread (max - min) / 2``; the public code has spread .5 for keys and .3 for values.
    The calibration g of a query's logits, which the public code has too, is left out: with it, scores are not those
    of any decoded key.

    Stored per channel and block: float16 step and middle, so 1.5 true bits.
    """

    spread: float = 0.5

    method: ClassVar[str] = "calibquant"
    source: ClassVar[str] = "arXiv:2502.14882"

    def __post_init__(self) -> None:
        if not 0 < self.spread <= 1:
            raise QJLError(f"spread must lie above 0 and be at most 1, not {self.spread}.")

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return channel_layout(head_dim, num_bits=1, group_size=BLOCK)

    def build(self, context: LayerContext, learned: Arrays) -> ChannelCodec:
        return ChannelCodec(self.layout(context.head_dim), 1, BLOCK, self.spread)
