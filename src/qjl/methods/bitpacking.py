"""What the methods' files have in common: a uniform grid, and how numbers of a few bits lie in bytes and in blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qjl.packed import BLOCK, Field, blocks_of_tokens


def uniform_grid(
    x: Tensor, low: Tensor, high: Tensor, num_bits: int, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``uint8`` of x on the grid from ``low`` to ``high``, and its step and middle as float16.

    ``x ~ step * (code - (2**num_bits - 1) / 2) + middle``; ``spread`` narrows the grid around its middle.
    """
    top = top_code(num_bits)
    step, middle = as_half(spread * (high - low) / top), as_half((high + low) / 2)
    levels = (x - middle.float()) / torch.where(step > 0, step, 1).float() + top / 2
    return levels.round().clamp(0, top).to(torch.uint8), step, middle


def top_code(num_bits: int) -> int:
    """The largest code."""
    return 2**num_bits - 1


def as_half(x: Tensor) -> Tensor:
    """float16, clipped to its range."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).half()


def token_minor(x: Tensor) -> Tensor:
    """``[B, H, T, C] -> [B, H, T / 64, C, 64]``."""
    return blocks_of_tokens(x).transpose(3, 4).contiguous()


def token_major(x: Tensor) -> Tensor:
    """``[B, H, blocks, C, 64] -> [B, H, T, C]``."""
    return x.transpose(3, 4).flatten(2, 3)


def repack(numbers: Tensor, width: int, into: int) -> Tensor:
    """The same bits, lowest first, as numbers of another width: ``uint8 [..., N] -> [..., N * width / into]``."""
    unit = math.gcd(width, into)
    parts = ((numbers[..., None] >> _places(width, unit, numbers.device)) & (2**unit - 1)).flatten(-2)
    if into == unit:
        return parts
    return (parts.unflatten(-1, (-1, into // unit)) << _places(into, unit, numbers.device)).sum(-1, dtype=torch.uint8)


def _places(width: int, unit: int, device: torch.device) -> Tensor:
    return torch.arange(0, width, unit, dtype=torch.uint8, device=device)


def pack_tokens(codes: Tensor, width: int) -> Tensor:
    """Each token's numbers in bytes of its own: ``uint8 [B, H, T, C] -> [B, H, T / 64, C * width / 8, 64]``."""
    return token_minor(repack(codes, width, 8))


def unpack_tokens(packed: Tensor, width: int) -> Tensor:
    """The inverse of ``pack_tokens``."""
    return repack(token_major(packed), 8, width)


def channel_field(channels: int, width: int) -> Field:
    """Numbers of ``width`` bits packed by ``pack_channels``: any number of channels fills bytes."""
    return Field((channels, BLOCK * width // 8), torch.uint8)


def pack_channels(codes: Tensor, width: int) -> Tensor:
    """64 tokens of a channel side by side: ``uint8 [B, H, T, C] -> [B, H, T / 64, C, 8 * width]``."""
    return repack(token_minor(codes), width, 8)


def unpack_channels(packed: Tensor, width: int) -> Tensor:
    """The inverse of ``pack_channels``."""
    return token_major(repack(packed, 8, width))
