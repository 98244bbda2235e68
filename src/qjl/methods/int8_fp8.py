"""The caches of engines: 8-bit integers with a scale per token, and 8-bit floats without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qjl.methods.base import Arrays, Codec, LayerContext, Quantizer, require_packable
from qjl.methods.bitpacking import as_half, token_major, token_minor
from qjl.packed import BLOCK, Blocks, Field, Layout, blocks_of_tokens

INT8_MAX = 127
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Int8(Quantizer):
    """``round(x / scale)``, scale = max |x| / 127 of a token and head, as float16. True bits: 8 + 16 / head_dim."""

    method: ClassVar[str] = "int8"
    source: ClassVar[str] = "engines"

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        return {"codes": Field((head_dim, BLOCK), torch.int8), "scale": Field((BLOCK,), torch.float16)}

    def build(self, context: LayerContext, learned: Arrays) -> Int8Codec:
        return Int8Codec(self.layout(context.head_dim))


@dataclass(frozen=True, eq=False)
class Int8Codec(Codec):
    layout: Layout

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        x = x.float()
        scale = as_half(x.abs().amax(-1, keepdim=True) / INT8_MAX)
        codes = (x / torch.where(scale > 0, scale, 1).float()).round().clamp(-INT8_MAX, INT8_MAX)
        return {"codes": token_minor(codes.to(torch.int8)), "scale": blocks_of_tokens(scale).squeeze(-1)}

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        return token_major(blocks["codes"]).float() * blocks["scale"].flatten(2).float()[..., None]


@dataclass(frozen=True)
class Fp8(Quantizer):
    """Each number as the nearest float8 e4m3 (4 bits of exponent, 3 of mantissa), at most 448. True bits: 8.

    The scale is fixed at 1, what vLLM and SGLang do where a checkpoint brings none.
    """

    method: ClassVar[str] = "fp8"
    source: ClassVar[str] = "engines"

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        return {"codes": Field((head_dim, BLOCK), torch.uint8)}

    def build(self, context: LayerContext, learned: Arrays) -> Fp8Codec:
        return Fp8Codec(self.layout(context.head_dim))


@dataclass(frozen=True, eq=False)
class Fp8Codec(Codec):
    """The bytes of the floats: torch compares and copies these everywhere, float8 itself not yet."""

    layout: Layout

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        largest = torch.finfo(FP8).max
        return {"codes": token_minor(x.float().clamp(-largest, largest).to(FP8).view(torch.uint8))}

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        return token_major(blocks["codes"]).contiguous().view(FP8).float()
