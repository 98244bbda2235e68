"""Asymmetric uniform quantization of each token in groups of channels: the values of QJL and KIVI."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from qjl.codebook import NIBBLE, uniform_code
from qjl.errors import QJLError
from qjl.methods.base import Arrays, Codec, LayerContext, Quantizer, require_packable
from qjl.methods.bitpacking import pack_tokens, token_major, token_minor, top_code, uniform_grid, unpack_tokens
from qjl.ops.forms import NibbleForm
from qjl.packed import BLOCK, Blocks, Field, Layout


@dataclass(frozen=True)
class TokenUniform(Quantizer):
    """``round((v - min) / step)`` with step = (max - min) / (2^bits - 1) over ``group_size`` channels of a token.

    QJL (arXiv 2406.03482) section 4.2, KIVI (arXiv 2402.02750) equation 2. Stored per group: float16 step and
    mid-point (not the minimum: a mid-point keeps the codes centred, so that rounding them does not add up), so
    ``bits + 32 / group_size`` true bits.
    """

    num_bits: int = 2
    group_size: int = 32

    method: ClassVar[str] = "uniform"
    source: ClassVar[str] = "arXiv:2402.02750"

    def __post_init__(self) -> None:
        if self.num_bits not in (1, 2, 4, 8):
            raise QJLError(f"values take 1, 2, 4 or 8 bits, not {self.num_bits}.")
        if self.group_size <= 0:
            raise QJLError(f"group_size must be positive, not {self.group_size}.")

    def groups(self, head_dim: int) -> int:
        """Groups per token; a group never spans tokens, so head_dim is cut into equal parts."""
        size = min(self.group_size, head_dim)
        while head_dim % size:
            size -= 1
        return head_dim // size

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        constants = Field((self.groups(head_dim), BLOCK), torch.float16)
        codes = Field((head_dim * self.num_bits // 8, BLOCK), torch.uint8)
        return {"codes": codes, "step": constants, "middle": constants}

    def build(self, context: LayerContext, learned: Arrays) -> TokenUniformCodec:
        layout = self.layout(context.head_dim)
        return TokenUniformCodec(layout, self.num_bits, self.groups(context.head_dim), context.device)


@dataclass(frozen=True, eq=False)
class TokenUniformCodec(Codec):
    layout: Layout
    num_bits: int
    groups: int
    device: torch.device

    @cached_property
    def form(self) -> NibbleForm | None:  # type: ignore[override]
        if self.num_bits > NIBBLE:
            return None
        dim = self.layout["codes"].shape[0] * 8 // self.num_bits
        if dim // self.groups * self.num_bits % 8:
            return None
        code = uniform_code(dim // self.groups, self.num_bits).to(self.device)
        return NibbleForm(
            map=None,
            coordinates=code.coordinates,
            entries=code.entries,
            code_dim=dim,
            scale="step",
            middle="middle",
            groups=self.groups,
        )

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        grouped = x.float().unflatten(3, (self.groups, -1))  # [B, H, T, G, D / G]
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        codes, step, middle = uniform_grid(grouped, low, high, self.num_bits)
        return {
            "codes": pack_tokens(codes.flatten(3), self.num_bits),
            "step": token_minor(step.squeeze(-1)),
            "middle": token_minor(middle.squeeze(-1)),
        }

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        if self.form is not None:
            return super().dequantize(blocks, first)
        codes = unpack_tokens(blocks["codes"], self.num_bits).float().unflatten(3, (self.groups, -1))
        step, middle = (token_major(blocks[name]).float()[..., None] for name in ("step", "middle"))
        return ((codes - top_code(self.num_bits) / 2) * step + middle).flatten(3)
