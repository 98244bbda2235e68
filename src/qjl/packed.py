"""Bundles of packed tensors along the token axis, in blocks of 64 tokens.

Every field is stored as ``[B, H, blocks, *shape]``; a field with a value per token has 64 as its last
dimension (token-minor), which is what a CPU scan wants, a coalesced load on a GPU, and a page in vLLM.
Rows of a batch may hold different numbers of tokens, blocks need not follow each other within a row, and a block
may be partly filled after a crop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
Rows = Tensor | slice


def block_bits(layout: Layout) -> int:
    """Bits that one full block of 64 tokens of one head occupies."""
    return 8 * sum(field.nbytes for field in layout.values())


class Packed:
    """Growing storage for the packed blocks of one layer.

    Storage is preallocated and grows by a quarter, so appending is amortised O(new tokens) and never
    copies more than it must. Each block knows the index of its first token within its row; indices grow along a row.
    """

    def __init__(self, layout: Layout, batch: int, heads: int, device: torch.device) -> None:
        self.layout = dict(layout)
        self.heads = heads
        self.device = device
        self._storage = {
            name: torch.empty((batch, heads, 0, *field.shape), dtype=field.dtype, device=device)
            for name, field in self.layout.items()
        }
        self._first = torch.zeros((batch, 0), dtype=torch.int64)
        self._fill = torch.zeros((batch, 0), dtype=torch.int64)
        self._counts = [0] * batch
        self._tokens = [0] * batch

    @classmethod
    def from_state(cls, state: dict[str, Any], layout: Layout, batch: int, heads: int, device: torch.device) -> Packed:
        """The inverse of ``state``.

        Raises:
            QJLError: if a tensor is not what this layout takes.
        """
        packed = cls(layout, batch, heads, device)
        blocks = state["first"].shape[1]
        for name, field in layout.items():
            require_tensor(state["fields"][name], (batch, heads, blocks, *field.shape), field.dtype, name)
        for name in ("first", "fill"):
            require_tensor(state[name], (batch, blocks), torch.int64, name)
        packed._storage = {name: state["fields"][name] for name in layout}
        packed._first, packed._fill = state["first"].cpu(), state["fill"].cpu()
        packed._count()
        return packed

    def state(self) -> dict[str, Any]:
        """The blocks in use, as named tensors."""
        return {
            "fields": {name: tensor.contiguous() for name, tensor in self.view().items()},
            "first": self.first_tokens().contiguous(),
            "fill": self._fill[:, : self.blocks].contiguous(),
        }

    @property
    def batch(self) -> int:
        return len(self._counts)

    @property
    def capacity(self) -> int:
        """Blocks per row that are allocated."""
        return self._fill.shape[1]

    @property
    def block_counts(self) -> list[int]:
        """Blocks in use, per row."""
        return list(self._counts)

    @property
    def blocks(self) -> int:
        """Blocks in use in the longest row."""
        return max(self._counts, default=0)

    @property
    def tokens(self) -> list[int]:
        """Stored tokens, per row."""
        return list(self._tokens)

    @property
    def is_dense(self) -> bool:
        """Whether every row holds the same number of blocks and all of them are full."""
        return min(self._tokens, default=0) == self.blocks * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks in use."""
        return sum(self._counts) * self.heads * sum(field.nbytes for field in self.layout.values())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the whole storage, room for growth included."""
        return sum(tensor.nbytes for tensor in self._storage.values())

    def view(self) -> Blocks:
        """The blocks in use, ``[B, H, blocks, *shape]`` per field, without a copy."""
        return {name: tensor[:, :, : self.blocks] for name, tensor in self._storage.items()}

    def slot_mask(self) -> Tensor:
        """Which slots hold a token, ``bool [B, blocks * 64]``."""
        fill = self._fill[:, : self.blocks, None]
        return to_device((torch.arange(BLOCK) < fill).flatten(1), self.device)

    def slot_tokens(self) -> Tensor:
        """Index of the token in each slot within its row, ``int64 [B, blocks * 64]`` on the CPU."""
        return (self.first_tokens()[..., None] + torch.arange(BLOCK)).flatten(1)

    def first_tokens(self) -> Tensor:
        """Index of the first token of each block within its row, ``int64 [B, blocks]`` on the CPU."""
        return self._first[:, : self.blocks]

    def reserve(self, blocks: int) -> None:
        """Make room for ``blocks`` blocks per row."""
        if blocks <= self.capacity:
            return
        capacity = max(blocks, self.capacity + max(2, self.capacity // 4)) if self.capacity else blocks
        for name, tensor in self._storage.items():
            # zeros: slots that shorter rows leave open are masked, and must stay finite
            grown = tensor.new_zeros((self.batch, self.heads, capacity, *self.layout[name].shape))
            grown[:, :, : self.blocks] = tensor[:, :, : self.blocks]
            self._storage[name] = grown
        room = (0, capacity - self.capacity)
        self._first, self._fill = F.pad(self._first, room), F.pad(self._fill, room)

    def append(self, blocks: Blocks, first_tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        """Append full blocks ``[len(rows), H, n, *shape]`` that begin at ``first_tokens int64 [len(rows), n]``.

        The rows must hold equally many blocks.
        """
        chosen = list(range(self.batch)) if rows is None else list(rows)
        start = self._counts[chosen[0]]
        stop = start + next(iter(blocks.values())).shape[2]
        self.reserve(stop)
        where: Rows = slice(None) if rows is None else to_device(torch.tensor(chosen, dtype=torch.int64), self.device)
        for name, tensor in blocks.items():
            self._storage[name][where, :, start:stop] = tensor
        self._first[chosen, start:stop] = first_tokens
        self._fill[chosen, start:stop] = BLOCK
        for row in chosen:
            self._counts[row] = stop
            self._tokens[row] += (stop - start) * BLOCK

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the tokens whose index is below ``lengths[row]``; kept codes are not touched."""
        room = (torch.tensor(lengths, dtype=torch.int64)[:, None] - self._first).clamp(min=0)
        self._fill = torch.minimum(self._fill, room)
        self._count()

    def select(self, indices: Tensor) -> None:
        """Keep (or repeat, or reorder) the rows ``indices [B']``, a tensor on the CPU."""
        on_device = to_device(indices, self.device)
        used = self.blocks
        self._storage = {name: tensor[:, :, :used].index_select(0, on_device) for name, tensor in self._storage.items()}
        self._first = self._first[:, :used].index_select(0, indices)
        self._fill = self._fill[:, :used].index_select(0, indices)
        self._counts = [self._counts[row] for row in indices.tolist()]
        self._tokens = [self._tokens[row] for row in indices.tolist()]

    def _count(self) -> None:
        self._counts = (self._fill > 0).sum(1).tolist()
        self._tokens = self._fill.sum(1).tolist()


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
