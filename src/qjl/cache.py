"""One layer's cache: sinks (exact) | packed | recent (exact), independent of any engine.

A token enters the recent window; once ``recent + 64`` tokens are there, the oldest 64 are quantized, once, as a block.
Each row of the batch counts from its own first real token, so the packed bytes depend only on a row's tokens and the
layer's statistics: not on how the tokens arrived, nor on the padding beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods.base import Codec, LayerContext, Quantizer, require_finite, storage_bytes
from qjl.packed import BLOCK, Blocks, Packed
from qjl.rope import Rope
from qjl.statistics import MIN_TOKENS, LayerStatistics, QueryMoment, measure


@dataclass(eq=False)
class LayerSource:
    """What all caches of a model share for one layer: its RoPE, its statistics on disk, its fitted codecs.

    ``announce`` hears how many tokens the statistics came from, where they come from a prompt.
    """

    rope: Rope | None = None
    calibrated: Callable[[], LayerStatistics | None] = lambda: None
    announce: Callable[[int], None] = lambda count: None
    codecs: dict[tuple[Hashable, ...], tuple[Codec, Codec]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, object]) -> LayerSource:
        """A copied cache shares it too."""
        return self


@dataclass(frozen=True, eq=False)
class ExactSegment:
    """Exact tokens ``[B, H, t, D]``; their columns in the attention mask, ``int64 [B, t]`` or a first column shared
    by all rows; which of them count, ``bool [B, t]`` or None for all."""

    keys: Tensor
    values: Tensor
    columns: Tensor | int
    valid: Tensor | None


@dataclass(frozen=True, eq=False)
class PackedSegment:
    """Packed blocks of keys and values with their codecs; ``first [B, blocks]`` are RoPE positions."""

    keys: Blocks
    values: Blocks
    key_codec: Codec
    value_codec: Codec
    first: Tensor
    columns: Tensor | int
    valid: Tensor | None

    @property
    def blocks(self) -> int:
        return self.first.shape[1]

    def tile(self, start: int, stop: int) -> PackedSegment:
        """Blocks ``start`` to ``stop``."""
        tokens = slice(start * BLOCK, stop * BLOCK)
        columns = self.columns + tokens.start if isinstance(self.columns, int) else self.columns[:, tokens]
        return PackedSegment(
            {name: tensor[:, :, start:stop] for name, tensor in self.keys.items()},
            {name: tensor[:, :, start:stop] for name, tensor in self.values.items()},
            self.key_codec,
            self.value_codec,
            self.first[:, start:stop],
            columns,
            None if self.valid is None else self.valid[:, tokens],
        )


class _Window:
    """Exact tokens ``[B, H, t, D]`` at the end of the sequence, in a buffer that is reused."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        self._room = room
        self._keys, self._values = keys, values
        self._is_ours = False  # the first tokens stay where the model put them, until something is added
        self.length = keys.shape[2]

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def allocated_nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

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
        self._keys = self._keys.index_select(0, indices)
        self._values = self._values.index_select(0, indices)
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


class CacheLayer:
    """Keys and values of one attention layer.

    The order of a step is ``append`` (fresh tokens), attention over the segments, ``settle`` (quantize what has left
    the window). Tokens are addressed by column, as in an attention mask: 0 is the first token ever appended, padding
    included.

    Args:
        key, value: quantizers.
        sinks, recent: exact tokens at the start and at the end.
        source: what is shared with other caches of the same model.
        name: for messages, such as "layer 3".
    """

    def __init__(
        self,
        key: Quantizer,
        value: Quantizer,
        *,
        sinks: int = 4,
        recent: int = 32,
        source: LayerSource | None = None,
        name: str = "layer",
    ) -> None:
        self.key, self.value = key, value
        self.sinks, self.recent = sinks, recent
        self.source = source or LayerSource()
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forget all tokens; fitted codecs stay."""
        self.length = 0
        self.padding: list[int] = []
        self.origin: list[int] = []
        self._window: _Window | None = None
        self._sinks: tuple[Tensor, Tensor] | None = None
        self._sunk: list[int] = []  # sink tokens already set apart, per row
        self._packed: tuple[Packed, Packed] | None = None
        self._queries = QueryMoment()

    @property
    def batch(self) -> int:
        return len(self.padding)

    @property
    def packed_tokens(self) -> list[int]:
        """Quantized tokens, per row."""
        return self._packed[0].tokens if self._packed else [0] * self.batch

    @property
    def packed(self) -> tuple[Packed, Packed] | None:
        """Packed keys and values, None as long as all tokens are exact."""
        return self._packed

    @property
    def wants_queries(self) -> bool:
        """Whether ``observe`` is needed: the key codec waits for statistics of the queries."""
        return self.key.needs_queries and self._codecs() is None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add fresh tokens ``[B, H, T, D]``.

        Raises:
            QJLError: if shapes do not fit what is cached, or a number is NaN or infinite (checked here on a CPU, at
                quantization on other devices, where looking would stall every step).
        """
        self._check(keys, values)
        if self._window is None:
            self.padding = self.padding or [0] * keys.shape[0]
            self.origin = self.origin or [0] * keys.shape[0]
            self._sunk = [0] * keys.shape[0]
            self._window = _Window(keys, values, self.recent + BLOCK)
        elif self._window.length == 0 and keys.shape[2] > self.recent + BLOCK:
            self._window = _Window(keys, values, self.recent + BLOCK)
        else:
            self._window.append(keys, values)
        self.length += keys.shape[2]

    def set_padding(self, padding: Sequence[int], origin: Sequence[int] | None = None) -> None:
        """Left padding of each row in tokens, and the RoPE position of its first real token.

        To be called before ``settle`` sees the rows; rows that hold packed tokens keep what they had.
        """
        if self.batch and len(padding) != self.batch:
            raise QJLError(f"{self.name} holds {self.batch} rows, and {len(padding)} paddings were given.")
        origin = [0] * len(padding) if origin is None else origin
        if not self.batch:
            self.padding, self.origin = list(padding), list(origin)
        for row in (row for row, tokens in enumerate(self.packed_tokens) if not tokens):
            self.padding[row], self.origin[row] = padding[row], origin[row]

    def observe(self, query: Tensor) -> None:
        """Count query rows ``[B, H, R, D]`` into the statistics, while they are awaited; padding rows are zero."""
        self._queries.add(query)

    def settle(self) -> None:
        """Quantize every block of 64 tokens that has left the window."""
        if self._window is None or not self._due():
            return
        codecs = self._codecs() or self._measure_and_fit()
        if codecs is None:
            return
        if self._packed is None:
            batch, heads, _, _ = self._window.keys.shape
            device = self._window.keys.device
            self._packed = (
                Packed(codecs[0].layout, batch, heads, device),
                Packed(codecs[1].layout, batch, heads, device),
            )
        for rows, blocks in self._due():
            self._set_sinks_apart(rows)
            self._pack(rows, blocks, codecs)
        self._window.drop_first(min(self._window_starts()) - self._window_column)

    @property
    def tokens_until_due(self) -> int:
        """How many tokens may be appended at once with the result of one by one: until a block is quantized."""
        rows = zip(self.padding, self.packed_tokens, strict=True)
        return min((BLOCK + self.sinks + self.recent + pad + packed - self.length for pad, packed in rows), default=1)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` columns; kept tokens are not touched."""
        if length >= self.length or self._window is None:
            return
        window_column = self._window_column
        self.length = max(0, length)
        self.padding = [min(pad, self.length) for pad in self.padding]
        self._window.drop_last(self._window.length - max(0, self.length - window_column))
        kept = [self.length - pad for pad in self.padding]
        if self._packed:
            tokens = [max(0, min(held, n - self.sinks)) for held, n in zip(self.packed_tokens, kept, strict=True)]
            for packed in self._packed:
                packed.crop(tokens)
        self._sunk = [min(sunk, n) for sunk, n in zip(self._sunk, kept, strict=True)]

    def select(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows: ``int64 [B']``."""
        if self._window is None:
            return
        on_device = indices.to(self._window.keys.device)
        self._window.select(on_device)
        if self._sinks:
            self._sinks = (self._sinks[0].index_select(0, on_device), self._sinks[1].index_select(0, on_device))
        if self._packed:
            for packed in self._packed:
                packed.select(indices)
        rows = indices.tolist()
        self.padding = [self.padding[row] for row in rows]
        self.origin = [self.origin[row] for row in rows]
        self._sunk = [self._sunk[row] for row in rows]

    def segments(self) -> tuple[list[ExactSegment], PackedSegment | None]:
        """What attention reads: exact segments (sinks and window) and the packed one."""
        assert self._window is not None
        exact = [self._window_segment()]
        if self._sinks is not None and any(self._sunk):
            exact.insert(0, self._sink_segment())
        return exact, self._packed_segment()

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values decoded to the model's dtype, ``[B, H, length, D]`` by column; padding is zero."""
        exact, packed = self.segments()
        only = exact[0]
        if packed is None and len(exact) == 1 and only.valid is None and only.columns == 0:
            return only.keys, only.values
        out = tuple(
            tensor.new_zeros((*tensor.shape[:2], self.length, tensor.shape[3])) for tensor in (only.keys, only.values)
        )
        for segment in exact:
            _place(out, (segment.keys, segment.values), segment.columns, segment.valid)
        if packed is not None:
            keys = packed.key_codec.dequantize(packed.keys, packed.first)
            values = packed.value_codec.dequantize(packed.values, packed.first)
            _place(out, (keys, values), packed.columns, packed.valid)
        return out[0], out[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens held, exact and packed; codecs are apart (``codec_tensors``)."""
        return self.exact_nbytes + sum(packed.nbytes for packed in self._packed or ())

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the exact tokens: sinks and window."""
        window = self._window.nbytes if self._window else 0
        return window + storage_bytes(self._sinks or ())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        window = self._window.allocated_nbytes if self._window else 0
        packed = sum(packed.allocated_nbytes for packed in self._packed or ())
        return window + packed + storage_bytes(self._sinks or ())

    @property
    def codec_tensors(self) -> tuple[Tensor, ...]:
        """Fitted parameters of this layer; some are shared with other layers."""
        return tuple(tensor for codec in self._codecs() or () for tensor in codec.tensors)

    # Codecs and statistics

    def _codecs(self) -> tuple[Codec, Codec] | None:
        if self._window is None:
            pair = (self.key, self.value)
            return next((codecs for known, codecs in self.source.codecs.items() if known[:2] == pair), None)
        fitted = self.source.codecs.get(self._codec_key)
        if fitted is not None:
            return fitted
        if not (self.key.needs_statistics or self.value.needs_statistics):
            return self._fit(None)
        statistics = self.source.calibrated()
        return None if statistics is None else self._fit(statistics)

    def measure(self) -> LayerStatistics:
        """Statistics of the exact tokens at hand; sinks and padding do not count.

        Raises:
            QJLError: if a key is NaN or infinite, or the key quantizer needs queries and none were observed.
        """
        assert self._window is not None
        keys, values = self._window.keys, self._window.values
        device = keys.device
        columns = torch.arange(self._window_column, self.length, device=device)
        tokens = columns - torch.tensor(self.padding, device=device)[:, None]
        require_finite(keys * (tokens >= 0)[:, None, :, None], f"keys of {self.name}")
        return measure(
            keys,
            values,
            positions=tokens + torch.tensor(self.origin, device=device)[:, None],
            valid=tokens >= self.sinks,
            query_moment=self._queries.moment if self.key.needs_queries else None,
            rope=self.source.rope,
        )

    def _measure_and_fit(self) -> tuple[Codec, Codec] | None:
        """Fit to the first prompt, once a row of it is long enough."""
        if self.length - min(self.padding) < MIN_TOKENS:
            return None
        statistics = self.measure()
        self.source.announce(statistics.count)
        self._queries = QueryMoment()
        return self._fit(statistics)

    @property
    def _codec_key(self) -> tuple[Hashable, ...]:
        """A model may be moved to another device or dtype between two caches."""
        assert self._window is not None
        return self.key, self.value, self._window.keys.device, self._window.keys.dtype

    def _fit(self, statistics: LayerStatistics | None) -> tuple[Codec, Codec]:
        assert self._window is not None
        fitted = []
        for role, quantizer, tensor in (
            ("key", self.key, self._window.keys),
            ("value", self.value, self._window.values),
        ):
            heads, head_dim = tensor.shape[1], tensor.shape[3]
            rope = self.source.rope.to(tensor.device) if self.source.rope else None
            context = LayerContext(role, heads, head_dim, tensor.device, tensor.dtype, statistics, rope)
            fitted.append(quantizer.fit(context))
        self.source.codecs[self._codec_key] = (fitted[0], fitted[1])
        return fitted[0], fitted[1]

    # Rows and columns

    @property
    def _window_column(self) -> int:
        """Column of the first token in the window."""
        return self.length - (self._window.length if self._window else 0)

    def _window_starts(self) -> list[int]:
        """Column from which on the window counts, per row: what came before is packed, a sink, or padding."""
        rows = zip(self.padding, self._sunk, self.packed_tokens, strict=True)
        return [pad + sunk + packed for pad, sunk, packed in rows]

    def _due(self) -> list[tuple[list[int], int]]:
        """Rows that have blocks to quantize, grouped by equal state, and how many blocks."""
        groups: dict[tuple[int, ...], list[int]] = {}
        blocks_held = self._packed[0].block_counts if self._packed else [0] * self.batch
        for row, state in enumerate(zip(self.padding, self._sunk, self.packed_tokens, blocks_held, strict=True)):
            groups.setdefault(state, []).append(row)
        due = [
            (rows, (self.length - padding - self.sinks - packed - self.recent) // BLOCK)
            for (padding, _, packed, _), rows in groups.items()
        ]
        return [(rows, blocks) for rows, blocks in due if blocks > 0]

    def _set_sinks_apart(self, rows: Sequence[int]) -> None:
        """Copy what the rows lack of their sinks out of the window."""
        assert self._window is not None
        have = self._sunk[rows[0]]
        if have == self.sinks:
            return
        if self._sinks is None:
            keys, values = self._window.keys, self._window.values
            self._sinks = tuple(  # type: ignore[assignment]
                tensor.new_zeros((*tensor.shape[:2], self.sinks, tensor.shape[3])) for tensor in (keys, values)
            )
        first = self.padding[rows[0]] + have - self._window_column
        columns = slice(first, first + self.sinks - have)
        for sinks, window in zip(self._sinks or (), (self._window.keys, self._window.values), strict=True):
            sinks[rows, :, have:] = window[rows, :, columns]
        for row in rows:
            self._sunk[row] = self.sinks

    def _pack(self, rows: Sequence[int], blocks: int, codecs: tuple[Codec, Codec]) -> None:
        assert self._window is not None
        assert self._packed is not None
        row = rows[0]
        token = self.sinks + self.packed_tokens[row]  # within the row
        start = self.padding[row] + token - self._window_column
        columns = slice(start, start + blocks * BLOCK)
        everyone = len(rows) == self.batch
        origin = torch.tensor([self.origin[row] for row in rows], device=self._window.keys.device)
        first = origin[:, None] + token + torch.arange(blocks, device=origin.device) * BLOCK
        encoded = []
        for codec, tensor, what in zip(
            codecs, (self._window.keys, self._window.values), ("keys", "values"), strict=True
        ):
            tokens = tensor[:, :, columns] if everyone else tensor[list(rows), :, columns]
            require_finite(tokens, f"{what} of {self.name}")
            encoded.append(codec.quantize(tokens, first))
        for packed, fields in zip(self._packed, encoded, strict=True):
            packed.append(fields, None if everyone else rows)

    # Segments

    def _window_segment(self) -> ExactSegment:
        assert self._window is not None
        column = self._window_column
        starts = self._window_starts()
        valid = None
        if any(start > column for start in starts):
            columns = torch.arange(column, self.length)
            valid = (columns >= torch.tensor(starts)[:, None]).to(self._window.keys.device)
        return ExactSegment(self._window.keys, self._window.values, column, valid)

    def _sink_segment(self) -> ExactSegment:
        assert self._sinks is not None
        index = torch.arange(self.sinks)
        valid = None
        if any(sunk < self.sinks for sunk in self._sunk):
            valid = (index < torch.tensor(self._sunk)[:, None]).to(self._sinks[0].device)
        return ExactSegment(*self._sinks, self._columns(index), valid)

    def _packed_segment(self) -> PackedSegment | None:
        if self._packed is None or not self._packed[0].blocks:
            return None
        keys, values = self._packed
        codecs = self._codecs()
        assert codecs is not None
        origin = torch.tensor(self.origin, device=keys.device)[:, None]
        dense = keys.is_dense
        offset = self.sinks + (torch.arange(keys.blocks * BLOCK) if dense else keys.slot_tokens().cpu())
        return PackedSegment(
            keys.view(),
            values.view(),
            *codecs,
            first=keys.first_tokens() + self.sinks + origin,
            columns=self._columns(offset),
            valid=None if dense else keys.slot_mask(),
        )

    def _columns(self, tokens: Tensor) -> Tensor | int:
        """Mask columns of tokens ``[t]`` or ``[B, t]`` counted within their rows."""
        assert self._window is not None
        if tokens.dim() == 1 and len(set(self.padding)) == 1:
            return self.padding[0] + int(tokens[0])
        columns = torch.tensor(self.padding)[:, None] + tokens
        return columns.clamp(max=self.length - 1).to(self._window.keys.device)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise QJLError(
                f"keys {list(keys.shape)} and values {list(values.shape)} must be [B, H, T, D] with equal B, H and T."
            )
        for quantizer, tensor in ((self.key, keys), (self.value, values)):
            quantizer.layout(tensor.shape[3])
        if self._window is not None and (
            keys.shape[:2] != self._window.keys.shape[:2]
            or keys.shape[3] != self._window.keys.shape[3]
            or values.shape[3] != self._window.values.shape[3]
        ):
            raise QJLError(
                f"{self.name} holds {list(self._window.keys.shape)} and cannot append {list(keys.shape)}: batch, heads "
                "and head_dim must stay the same."
            )
        if keys.device.type == "cpu":
            require_finite(keys, f"keys of {self.name}")
            require_finite(values, f"values of {self.name}")


def _place(out: tuple[Tensor, ...], tokens: tuple[Tensor, Tensor], columns: Tensor | int, valid: Tensor | None) -> None:
    """Write tokens to their columns."""
    for target, source in zip(out, tokens, strict=True):
        source = source.to(target.dtype)
        if isinstance(columns, int) and valid is None:
            target[:, :, columns : columns + source.shape[2]] = source
            continue
        for row, column in _row_columns(columns, source.shape):
            chosen = slice(None) if valid is None else valid[row]
            target[row][:, column[chosen]] = source[row][:, chosen]


def _row_columns(columns: Tensor | int, shape: torch.Size) -> Iterator[tuple[int, Tensor]]:
    for row in range(shape[0]):
        if isinstance(columns, int):
            yield row, torch.arange(columns, columns + shape[2])
        else:
            yield row, columns[row]
