"""KIVI's keys: asymmetric uniform quantization of each channel in groups of tokens (arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer
from qjl.methods.per_channel import ChannelCodec, channel_layout, require_group_size
from qjl.packed import Layout


@dataclass(frozen=True)
class KIVI(Quantizer):
    """``round((k - min) / step)`` with step = (max - min) / (2^bits - 1) over ``group_size`` tokens of a channel.

    Equation 2, per channel and after RoPE; KIVI's values, per token, are ``TokenUniform``. Stored per channel and
    group: float16 step and mid-point (not the minimum: a mid-point keeps the codes centred, so that rounding them
    does not add up), so ``bits + 32 / group_size`` true bits.
    """

    num_bits: int = 2
    group_size: int = 32

    method: ClassVar[str] = "kivi"
    source: ClassVar[str] = "arXiv:2402.02750"

    def __post_init__(self) -> None:
        if self.num_bits not in (1, 2, 4):
            raise QJLError(f"KIVI keys take 1, 2 or 4 bits, not {self.num_bits}.")
        require_group_size(self.group_size)

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return channel_layout(head_dim, self.num_bits, self.group_size)

    def build(self, context: LayerContext, learned: Arrays) -> ChannelCodec:
        return ChannelCodec(self.layout(context.head_dim), self.num_bits, self.group_size)
