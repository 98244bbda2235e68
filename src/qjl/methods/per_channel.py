"""What methods with constants per channel share: a uniform grid for each channel of a group of tokens.

With step s and middle m of a channel, a token decodes as ``k_hat = s * level + m``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods.base import Codec, require_packable
from qjl.methods.bitpacking import pack_tokens, top_code, uniform_grid, unpack_tokens
from qjl.packed import BLOCK, Blocks, Field, Layout


def channel_layout(head_dim: int, num_bits: int, group_size: int) -> Layout:
    """Codes, and a float16 step and middle per channel and group: ``num_bits + 32 / group_size`` true bits."""
    require_packable(head_dim)
    constants = Field((BLOCK // group_size, head_dim), torch.float16)
    return {"codes": Field((head_dim * num_bits // 8, BLOCK), torch.uint8), "step": constants, "middle": constants}


def require_group_size(group_size: int) -> None:
    """Raises QJLError unless a block of 64 tokens is cut into equal groups."""
    if group_size <= 0 or BLOCK % group_size:
        raise QJLError(f"a group_size of {group_size} tokens does not cut 64 evenly: use 8, 16, 32 or 64.")


@dataclass(frozen=True, eq=False)
class ChannelCodec(Codec):
    """``spread`` narrows the grids around their middles: 1 goes from the least to the greatest token."""

    layout: Layout
    num_bits: int
    group_size: int
    spread: float = 1.0

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        groups = x.float().unflatten(2, (-1, self.group_size))  # [B, H, G, g, D]
        codes, step, middle = channel_grid(groups, self.num_bits, self.spread)
        per_block = BLOCK // self.group_size
        return {
            "codes": pack_tokens(codes.flatten(2, 3), self.num_bits),
            "step": step.unflatten(2, (-1, per_block)),
            "middle": middle.unflatten(2, (-1, per_block)),
        }

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        step, middle = self._constants(blocks)
        return (self._levels(blocks) * step[:, :, :, None] + middle[:, :, :, None]).flatten(2, 3)

    def _levels(self, blocks: Blocks) -> Tensor:
        """Centred levels, ``float32 [B, H, G, g, D]``."""
        levels = unpack_tokens(blocks["codes"], self.num_bits).float() - top_code(self.num_bits) / 2
        return levels.unflatten(2, (-1, self.group_size))

    def _constants(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Step and middle, ``float32 [B, H, G, D]``."""
        return blocks["step"].flatten(2, 3).float(), blocks["middle"].flatten(2, 3).float()


def channel_grid(groups: Tensor, num_bits: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``uint8 [..., g, D]`` of tokens on their channels' grids, and float16 steps and middles ``[..., D]``.

    A grid goes from the least to the greatest token of the group, narrowed around its middle by ``spread``.
    """
    low, high = groups.amin(-2, keepdim=True), groups.amax(-2, keepdim=True)
    codes, step, middle = uniform_grid(groups, low, high, num_bits, spread)
    return codes, step.squeeze(-2), middle.squeeze(-2)
