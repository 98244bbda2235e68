"""Blocks of 64 packed tokens: one tensor per field.

Blocks of a batch are ``[B, H, blocks, *shape]`` per field. A field with a value per token has 64 as its last dimension
(token-minor), which is what a CPU scan wants, a coalesced load on a GPU, and a page in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl.errors import QJLError

BLOCK = 64


@dataclass(frozen=True)
class Field:
    """One tensor of a packed block: its shape within the block and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of this field in one block of one head."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = Mapping[str, Field]
Blocks = dict[str, Tensor]  # one tensor [B, H, blocks, *shape] per field


def block_bits(layout: Layout) -> int:
    """Bits that one full block of 64 tokens of one head occupies."""
    return 8 * sum(field.nbytes for field in layout.values())


def require_tensor(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, what: str) -> None:
    """Raises QJLError unless the tensor has this shape and dtype."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise QJLError(f"{what} should be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}.")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host there, without waiting until the device has done its work.

    What is not pinned is read before this returns.
    """
    return tensor.to(device, non_blocking=True)


def blocks_of_tokens(x: Tensor) -> Tensor:
    """``[B, H, T, D]`` with T a multiple of 64, viewed as ``[B, H, T / 64, 64, D]``."""
    return x.unflatten(2, (x.shape[2] // BLOCK, BLOCK))


def block_positions(first: Tensor) -> Tensor:
    """Position of every token from that of each block's first: ``[B, blocks] -> [B, blocks * 64]``."""
    return (first[..., None] + torch.arange(BLOCK, device=first.device)).flatten(1)
