"""Where one layer's tokens lie: exact ones in slots, codes in pages of 64 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl.errors import QJLError
from qjl.ops.forms import ExactPool, Pool
from qjl.packed import BLOCK, Blocks, Layout, require_tensor, to_device

if TYPE_CHECKING:
    from qjl.codecs import Pair, TokenShape


class ExactTokens:
    """Keys ``[slots, H, D]`` and values ``[slots, H, Dv]`` of one layer."""

    def __init__(self, shape: TokenShape, capacity: int) -> None:
        # zeros: a block that has some codes already is encoded with whatever stands beside its tokens
        self.adopt(
            shape.zeros(capacity, shape.heads, shape.key_dim), shape.zeros(capacity, shape.heads, shape.value_dim)
        )

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Hold these in place of what there is, where they lie; growth copies them."""
        self.keys, self.values, self.capacity = keys, values, keys.shape[0]
        self.operand = ExactPool(keys, values)  # what operations take; another one after each growth

    @property
    def token_bytes(self) -> int:
        """Of a key and a value, of all heads."""
        return sum(x[0].nbytes if len(x) else x.new_empty(1, *x.shape[1:]).nbytes for x in (self.keys, self.values))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens."""
        if capacity > self.capacity:
            self.adopt(_grown(self.keys, capacity), _grown(self.values, capacity))

    def keep(self, slots: Tensor) -> None:
        """Only these, in this order."""
        self.adopt(self.keys[slots], self.values[slots])

    def put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep ``keys``, ``values [n, H, D]``."""
        self.keys[slots] = keys.to(self.keys.dtype)
        self.values[slots] = values.to(self.values.dtype)

    def read(self, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """``[B, H, t, D]`` of ``slots [B, t]``, or of a slice for one row, which copies nothing."""
        if isinstance(slots, slice):
            keys, values = self.keys[None, slots], self.values[None, slots]
        else:
            keys, values = self.keys[slots], self.values[slots]
        return keys.transpose(1, 2), values.transpose(1, 2)


class Pages:
    """Packed keys and values of one layer: each field ``[pages, H, *shape]``, one head behind the other in memory."""

    def __init__(self, codecs: Pair, heads: int, capacity: int, device: torch.device) -> None:
        self.codecs = codecs
        self.heads = heads
        self._device = device
        self.storage = [
            {
                name: torch.zeros((heads, capacity, *field.shape), dtype=field.dtype, device=device)
                for name, field in codec.layout.items()
            }
            for codec in codecs
        ]

    @property
    def capacity(self) -> int:
        return next(iter(self.storage[0].values())).shape[1]

    @property
    def fields(self) -> tuple[Blocks, Blocks]:
        """Of keys and of values."""
        keys, values = ({name: x.transpose(0, 1) for name, x in side.items()} for side in self.storage)
        return keys, values

    @cached_property
    def operand(self) -> Pool | None:
        """What the fused step reads; None where keys or values are no nibble codes. Another one after each growth."""
        key, value = self.codecs[0].form, self.codecs[1].form
        if key is None or value is None or not value.has_shared_code:
            return None
        return Pool(*self.fields, key, value)

    @property
    def can_be_filled(self) -> bool:
        """Whether codes of single tokens can be added to a page: they are nibbles, with constants of their own."""
        return all(codec.form is not None for codec in self.codecs)

    @property
    def page_bytes(self) -> int:
        """Of one page, keys and values of all heads."""
        return self.heads * sum(field.nbytes for codec in self.codecs for field in codec.layout.values())

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for side in self.storage for x in side.values())

    def reserve(self, capacity: int) -> None:
        """Make room for so many pages."""
        if capacity > self.capacity:
            self.storage = [{name: _grown(x, capacity, dim=1) for name, x in side.items()} for side in self.storage]
            vars(self).pop("operand", None)

    def keep(self, pages: Tensor) -> None:
        """Only these, in this order."""
        self.storage = [{name: x[:, pages] for name, x in side.items()} for side in self.storage]
        vars(self).pop("operand", None)

    def adopt(self, keys: Blocks, values: Blocks) -> None:
        """Hold these pages, ``[pages, H, *shape]`` per field, in place of what there is, where they lie; growth copies.

        Raises:
            QJLError: if a field is missing or not what the codecs take.
        """
        count = next(iter(keys.values())).shape[0] if keys else 0
        for codec, side in zip(self.codecs, (keys, values), strict=True):
            if side.keys() != codec.layout.keys():
                raise QJLError(f"pages of these codecs have {sorted(codec.layout)}, not {sorted(side)}.")
            for name, field in codec.layout.items():
                require_tensor(side[name], (count, self.heads, *field.shape), field.dtype, f"{name} of pages")
        sides = zip(self.codecs, (keys, values), strict=True)
        self.storage = [{name: side[name].transpose(0, 1) for name in codec.layout} for codec, side in sides]
        vars(self).pop("operand", None)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Pages from where they are to others."""
        sources, targets = (
            to_device(torch.tensor(x, dtype=torch.int64), self._device) for x in zip(*pairs, strict=True)
        )
        for side in self.storage:
            for field in side.values():
                field[:, targets] = field[:, sources]

    def fill(self, side: int, blocks: Blocks, pages: Sequence[int], kept: Sequence[int]) -> None:
        """``blocks [1, H, n, *shape]`` of keys (0) or values (1) to pages whose first ``kept`` tokens stay."""
        for place, (page, first) in enumerate(zip(pages, kept, strict=True)):
            for name, field in self.storage[side].items():
                field[:, page, ..., first:] = blocks[name][0, :, place, ..., first:]

    def decode(self, table: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``float32 [B, H, n * 64, D]`` of pages ``table [B, n]`` that begin at positions ``first``."""
        keys, values = (
            {name: field[table].transpose(1, 2) for name, field in fields.items()} for fields in self.fields
        )
        return self.codecs[0].dequantize(keys, first), self.codecs[1].dequantize(values, first)


class BoundPages:
    """Packed keys and values of one layer in pages of P = 16, 32 or 64 tokens that an engine owns.

    ``cache uint8 [pages, H, P, bytes of a token]``: the bytes of a page and head lie in one piece, field by field.
    """

    def __init__(self, codecs: Pair, cache: Tensor) -> None:
        self.codecs = codecs
        self.page_tokens = cache.shape[2]
        keys, values = page_fields(cache.flatten(2), [codec.layout for codec in codecs], self.page_tokens)
        self.fields = keys, values

    @cached_property
    def operand(self) -> Pool:
        """What the fused step reads."""
        key, value = (codec.form for codec in self.codecs)
        assert key is not None
        assert value is not None
        return Pool(*self.fields, key, value)

    def write_tokens(self, side: int, blocks: Blocks, columns: Tensor, pages: Tensor, offsets: Tensor) -> None:
        """Tokens ``columns [m]`` of blocks ``[1, H, n, *shape]`` to places ``offsets [m]`` of ``pages [m]``."""
        for name, field in self.fields[side].items():
            by_token = blocks[name][0].movedim(-1, 2).flatten(1, 2)  # [H, n * 64, *shape]
            field.movedim(-1, 1)[pages, offsets] = by_token[:, columns].transpose(0, 1)

    def decode(self, table: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``float32 [B, H, t, D]`` of blocks of 64, from ``start`` to ``stop``.

        Rows begin at position 0, and ``table [B, n]`` names their pages.
        """
        each = BLOCK // self.page_tokens
        chosen = table[:, start * each : stop * each]
        pages = F.pad(chosen, (0, (stop - start) * each - chosen.shape[1])).unflatten(1, (-1, each)).long()
        first = torch.arange(start, stop, dtype=torch.int64, device=pages.device) * BLOCK
        keys, values = (
            codec.dequantize(
                {name: x[pages].movedim((3, 2), (1, -2)).flatten(-2).contiguous() for name, x in fields.items()},
                first.expand(len(pages), -1),
            )
            for codec, fields in zip(self.codecs, self.fields, strict=True)
        )
        return keys, values


def page_fields(cache: Tensor, layouts: Sequence[Layout], page_tokens: int) -> list[Blocks]:
    """Fields ``[pages, H, *shape]``, with the page's tokens in place of 64, as views of ``uint8 [pages, H, bytes]``."""
    fields, begin = [], 0
    for layout in layouts:
        views = {}
        for name, field in layout.items():
            stop = begin + field.nbytes * page_tokens // BLOCK
            views[name] = cache[..., begin:stop].view(field.dtype).unflatten(-1, (*field.shape[:-1], page_tokens))
            begin = stop
        fields.append(views)
    return fields


def run_of(numbers: Sequence[int]) -> slice | None:
    """The slice that they are, if each is one more than the last."""
    first, last = numbers[0], numbers[-1]
    is_run = last - first == len(numbers) - 1 and all(b - a == 1 for a, b in pairwise(numbers))
    return slice(first, last + 1) if is_run else None


def page_bytes(layouts: Sequence[Layout]) -> int:
    """Bytes of a block of 64 tokens of one head."""
    return sum(field.nbytes for layout in layouts for field in layout.values())


def _grown(x: Tensor, capacity: int, dim: int = 0) -> Tensor:
    size = list(x.shape)
    held = size[dim]
    size[dim] = capacity
    grown = x.new_zeros(size)
    grown.narrow(dim, 0, held).copy_(x)
    return grown
