"""Full precision through the same path: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qjl.methods.base import Arrays, Codec, LayerContext, Quantizer
from qjl.packed import BLOCK, Blocks, Field, Layout, blocks_of_tokens


@dataclass(frozen=True)
class Identity(Quantizer):
    """Tokens in the model's own dtype."""

    method: ClassVar[str] = "identity"
    source: ClassVar[str] = "-"

    @property
    def is_exact(self) -> bool:
        return True

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return {"tokens": Field((BLOCK, head_dim), dtype)}

    def build(self, context: LayerContext, learned: Arrays) -> IdentityCodec:
        return IdentityCodec(self.layout(context.head_dim, context.dtype))


@dataclass(frozen=True, eq=False)
class IdentityCodec(Codec):
    layout: Layout

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        return {"tokens": blocks_of_tokens(x).to(self.layout["tokens"].dtype)}

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        return blocks["tokens"].flatten(2, 3).float()
