"""Exact tokens of a layer: the window at the end of the sequence, and those kept exact for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl.errors import QJLError
from qjl.packed import require_tensor, to_device


class Window:
    """Exact tokens ``[B, H, t, D]`` at the end of the sequence, in a buffer that is reused."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        self._room = room
        self._keys, self._values = keys, values
        self._is_ours = False  # the first tokens stay where the model put them, until something is added
        self.length = keys.shape[2]

    @classmethod
    def from_state(cls, state: dict[str, Any], room: int) -> Window:
        """The inverse of ``state``."""
        _require_alike(state["keys"], state["values"])
        return cls(state["keys"], state["values"], room)

    def state(self) -> dict[str, Any]:
        """The tokens held, as named tensors."""
        return {"keys": self.keys.contiguous(), "values": self.values.contiguous()}

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self.length]

    @property
    def device(self) -> torch.device:
        return self._keys.device

    @property
    def dtype(self) -> torch.dtype:
        return self._keys.dtype

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def allocated_nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether tokens have the batch, the heads and the dimensions of those held."""
        pairs = ((keys, self._keys), (values, self._values))
        return all(new.shape[:2] == old.shape[:2] and new.shape[3] == old.shape[3] for new, old in pairs)

    def append(self, keys: Tensor, values: Tensor) -> None:
        stop = self.length + keys.shape[2]
        if stop > self._keys.shape[2] or not self._is_ours:
            self._move(0, max(stop, 2 * self.length))
        self._keys[:, :, self.length : stop] = keys
        self._values[:, :, self.length : stop] = values
        self.length = stop

    def drop_first(self, count: int) -> None:
        if count:
            self._move(count, max(self._room, self.length - count))

    def drop_last(self, count: int) -> None:
        self.length -= count

    def select(self, indices: Tensor) -> None:
        """Keep (or repeat, or reorder) the rows ``indices [B']``, a tensor on the CPU."""
        on_device = to_device(indices, self.device)
        self._keys = self._keys.index_select(0, on_device)
        self._values = self._values.index_select(0, on_device)
        self._is_ours = True

    def _move(self, first: int, capacity: int) -> None:
        """Keep tokens from ``first`` on, in buffers of ``capacity`` tokens of our own."""
        kept = self.length - first
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
            new[:, :, :kept] = old[:, :, first : self.length]
            setattr(self, name, new)
        self.length = kept
        self._is_ours = True


class Kept:
    """Exact tokens that are never quantized: the sinks, and those that a token mask leaves exact.

    Rows hold different numbers of tokens, each with its index within the row, growing. Storage grows by a quarter.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Empty, for tokens such as these ``[B, H, T, D]``."""
        self._keys, self._values = (like.new_zeros((*like.shape[:2], 0, like.shape[3])) for like in (keys, values))
        self._indices = torch.zeros((keys.shape[0], 0), dtype=torch.int64)
        self._counts = [0] * keys.shape[0]

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Kept:
        """The inverse of ``state``.

        Raises:
            QJLError: if its tensors are not of the same tokens.
        """
        keys, values, indices, counts = (state[name] for name in ("keys", "values", "indices", "counts"))
        _require_alike(keys, values)
        require_tensor(indices, (keys.shape[0], keys.shape[2]), torch.int64, "indices")
        if len(counts) != keys.shape[0] or max(counts) != keys.shape[2] or min(counts) < 0:
            raise QJLError(f"counts {counts} are not those of {list(keys.shape)}.")
        kept = cls(keys, values)
        kept._keys, kept._values, kept._indices, kept._counts = keys, values, indices.cpu(), list(counts)
        return kept

    def state(self) -> dict[str, Any]:
        """The tokens held, as named tensors and numbers."""
        return {
            "keys": self.keys.contiguous(),
            "values": self.values.contiguous(),
            "indices": self.indices.contiguous(),
            "counts": self.tokens,
        }

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self.length]

    @property
    def indices(self) -> Tensor:
        """Index of each token within its row, ``int64 [B, t]`` on the CPU."""
        return self._indices[:, : self.length]

    @property
    def tokens(self) -> list[int]:
        """Tokens held, per row."""
        return list(self._counts)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self._counts, default=0)

    @property
    def is_dense(self) -> bool:
        """Whether all rows hold equally many tokens."""
        return min(self._counts, default=0) == self.length

    @property
    def nbytes(self) -> int:
        numbers_per_token = self._keys.shape[1] * (self._keys.shape[3] + self._values.shape[3])
        return sum(self._counts) * numbers_per_token * self._keys.itemsize

    @property
    def allocated_nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def slot_mask(self) -> Tensor:
        """Which slots hold a token, ``bool [B, t]`` on the CPU."""
        return torch.arange(self.length) < torch.tensor(self._counts, dtype=torch.int64)[:, None]

    def append(self, row: int, index: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens ``[H, n, D]`` to one row, the first of which is its token ``index``."""
        start = self._counts[row]
        stop = start + keys.shape[1]
        self._reserve(stop)
        self._keys[row, :, start:stop] = keys
        self._values[row, :, start:stop] = values
        self._indices[row, start:stop] = torch.arange(index, index + keys.shape[1])
        self._counts[row] = stop

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the tokens whose index is below ``lengths[row]``."""
        is_held = self.slot_mask() & (self.indices < torch.tensor(lengths, dtype=torch.int64)[:, None])
        self._counts = is_held.sum(1).tolist()

    def select(self, indices: Tensor) -> None:
        """Keep (or repeat, or reorder) the rows ``indices [B']``, a tensor on the CPU."""
        on_device = to_device(indices, self._keys.device)
        self._keys = self._keys.index_select(0, on_device)
        self._values = self._values.index_select(0, on_device)
        self._indices = self._indices.index_select(0, indices)
        self._counts = [self._counts[row] for row in indices.tolist()]

    def _reserve(self, tokens: int) -> None:
        capacity = self._indices.shape[1]
        if tokens <= capacity:
            return
        more = max(tokens, capacity + capacity // 4) - capacity
        # zeros: slots that shorter rows leave open are masked, and must stay finite
        self._keys, self._values = (F.pad(x, (0, 0, 0, more)) for x in (self._keys, self._values))
        self._indices = F.pad(self._indices, (0, more))


def _require_alike(keys: Tensor, values: Tensor) -> None:
    require_tensor(values, (*keys.shape[:3], values.shape[-1]), keys.dtype, "values")
