"""One layer's cache: sinks (exact) | packed | recent (exact), independent of any engine.

A token enters the recent window; once ``recent + 64`` tokens are there, the oldest 64 are quantized, once, as a block.
With a token mask a block is 64 marked tokens in a row; all other tokens that leave the window are kept exact, as the
sinks are. Each row of the batch counts from its own first real token, so the packed bytes depend only on a row's
tokens, its mask and the layer's statistics: not on how the tokens arrived, nor on the padding beside them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qjl.copies import Copied
from qjl.errors import QJLError
from qjl.exact import Kept, Window
from qjl.methods.base import Codec, LayerContext, Quantizer, Unrotated, require_finite
from qjl.ops.forms import PackedTokens
from qjl.packed import BLOCK, Blocks, Packed, to_device
from qjl.rope import Rope
from qjl.runs import ENDLESS, Marks, Runs, gaps, since
from qjl.statistics import MIN_TOKENS, AttentionMoments, LayerStatistics, measure

CPU = torch.device("cpu")


@dataclass(eq=False)
class LayerSource:
    """What all caches of a model share for one layer: its RoPE, its statistics on disk, its fitted codecs.

    ``announce`` hears how many tokens the statistics came from, where they come from a prompt.
    """

    rope: Rope | None = None
    calibrated: Callable[[], LayerStatistics | None] = lambda: None
    announce: Callable[[int], None] = lambda count: None
    codecs: dict[tuple[Hashable, ...], tuple[Codec, Codec]] = field(default_factory=dict)
    fitting: threading.RLock = field(default_factory=threading.RLock, init=False)  # one thread fits, for all of them
    _ropes: dict[torch.device, Rope] = field(default_factory=dict, init=False)

    def rope_on(self, device: torch.device) -> Rope | None:
        """The RoPE on a device, moved there once."""
        if self.rope is None:
            return None
        if device not in self._ropes:
            self._ropes[device] = self.rope.to(device)
        return self._ropes[device]

    def __deepcopy__(self, memo: dict[int, object]) -> LayerSource:
        """A copied cache shares it too."""
        return self


class _Segment:
    """Some tokens of all rows."""

    valid: Tensor | None

    @cached_property
    def bias(self) -> Tensor | None:
        """What is added to the scores so that only tokens that count do, ``float32 [B, 1, 1, t]``; None for nothing."""
        if self.valid is None:
            return None
        nothing = torch.zeros(1, 1, 1, 1, device=self.valid.device, dtype=torch.float32)
        return nothing.masked_fill(~self.valid[:, None, None], -torch.inf)


@dataclass(frozen=True, eq=False)
class ExactSegment(_Segment):
    """Exact tokens ``[B, H, t, D]``; their columns in the attention mask, ``int64 [B, t]`` or a first column shared
    by all rows; which of them count, ``bool [B, t]`` or None for all."""

    keys: Tensor
    values: Tensor
    columns: Tensor | int
    valid: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.keys.device


@dataclass(frozen=True, eq=False)
class PackedSegment(_Segment):
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

    @property
    def device(self) -> torch.device:
        return self.first.device

    @cached_property
    def as_operand(self) -> PackedTokens | None:
        """What the fused decode step takes; None where keys or values are no nibble codes."""
        key, value = self.key_codec.form, self.value_codec.form
        if key is None or value is None or not value.has_shared_code:
            return None
        return PackedTokens(self.keys, self.values, key, value, self.first)

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


class CacheLayer(Copied):
    """Keys and values of one attention layer.

    The order of a step is ``append`` (fresh tokens), attention over the segments, ``settle`` (quantize what has left
    the window). Tokens are addressed by column, as in an attention mask: 0 is the first token ever appended, padding
    included.

    Args:
        key, value: quantizers.
        sinks, recent: exact tokens at the start and at the end.
        pre_rope: whether keys are quantized as they were before RoPE; needs a source with the layer's RoPE.
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
        pre_rope: bool = False,
        source: LayerSource | None = None,
        name: str = "layer",
    ) -> None:
        self.key, self.value = key, value
        self.sinks, self.recent = sinks, recent
        self.pre_rope = pre_rope
        self.source = source or LayerSource()
        self.name = name
        self.reset()

    def _copied(self) -> dict[str, object]:
        """A copy makes its own segments, on its own storage."""
        return vars(self) | {"_segment": None, "_kept_segment": None, "_first_in_window": None}

    def reset(self) -> None:
        """Forget all tokens; fitted codecs stay."""
        self.length = 0
        self.padding: list[int] = []
        self.origin: list[int] = []
        self._window: Window | None = None
        self._kept: Kept | None = None
        self._marks = Marks(0)
        self.is_settled = False  # whether nothing was added since all that is due was quantized
        self._packed: tuple[Packed, Packed] | None = None
        self._codecs_of_packed: tuple[Codec, Codec] | None = None
        self._forget_segments()
        self._attention = AttentionMoments()

    def state(self) -> dict[str, Any]:
        """All that the layer holds, as tensors, plain numbers and its two codecs: what ``restore`` takes.

        Raises:
            QJLError: if it holds nothing.
        """
        if self._window is None or self._kept is None:
            raise QJLError(f"{self.name} holds no tokens that could be saved: give it a prompt first.")
        return {
            "length": self.length,
            "padding": list(self.padding),
            "origin": list(self.origin),
            "is_settled": self.is_settled,
            "window": self._window.state(),
            "kept": self._kept.state(),
            "marks": self._marks.state(),
            "packed": None if self._packed is None else [packed.state() for packed in self._packed],
            "codecs": self.codecs,
            "attention": self._attention.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Hold what another layer held; its codecs are this cache's own, whatever others of the model have.

        Raises:
            QJLError: if the state is not that of a layer with these quantizers.
        """
        self.reset()
        self._window = Window.from_state(state["window"], self.recent + BLOCK)
        self._kept = Kept.from_state(state["kept"])
        self._marks = Marks.from_state(state["marks"])
        self.length = int(state["length"])
        self.padding, self.origin = ([int(number) for number in state[name]] for name in ("padding", "origin"))
        self._attention = AttentionMoments.from_state(state["attention"])
        if state["codecs"] is not None:
            key, value = state["codecs"]
            self.source = replace(self.source, codecs={self._codec_key: (key, value)})
            if state["packed"] is not None:
                keys, values = state["packed"]
                self._packed = self._restored(keys, key), self._restored(values, value)
                self._codecs_of_packed = key, value
        self.is_settled = bool(state["is_settled"])
        self._require_whole()

    def _restored(self, state: dict[str, Any], codec: Codec) -> Packed:
        assert self._window is not None
        batch, heads = self._window.keys.shape[:2]
        return Packed.from_state(state, codec.layout, batch, heads, self._window.device)

    def _require_whole(self) -> None:
        """Raises QJLError unless every column of every row is held once, or is padding."""
        assert self._window is not None
        assert self._kept is not None
        sizes = {len(self.padding), len(self.origin), self._marks.batch}
        is_whole = sizes == {self._window.keys.shape[0]} and self._window.fits(self._kept.keys, self._kept.values)
        if not is_whole or not all(self._window_column <= start <= self.length for start in self._window_starts()):
            raise QJLError(f"{self.name} does not hold each of {self.length} tokens once.")

    @property
    def batch(self) -> int:
        return len(self.padding)

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        assert self._window is not None
        return self._window.values.shape[3]

    @property
    def has_mask(self) -> bool:
        """Whether ``mark`` was called."""
        return self._marks.has_mask

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
        """Whether ``observe`` is needed: a codec waits for statistics of the queries."""
        return self._packed is None and self._needs_queries and self._codecs() is None

    @property
    def _needs_queries(self) -> bool:
        return self.key.needs_queries or self.value.needs_queries

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add fresh tokens ``[B, H, T, D]``.

        Raises:
            QJLError: if shapes do not fit what is cached, or a number is NaN or infinite (checked here on a CPU, at
                quantization on other devices, where looking would stall every step).
        """
        self._check(keys, values)
        keys, values = _of_one_dtype(keys, values)
        if self._window is None:
            self.padding = self.padding or [0] * keys.shape[0]
            self.origin = self.origin or [0] * keys.shape[0]
            self._marks = self._marks if self._marks.batch else Marks(keys.shape[0])
            self._kept = Kept(keys, values)
            self._window = Window(keys, values, self.recent + BLOCK)
        elif self._window.length == 0 and keys.shape[2] > self.recent + BLOCK:
            self._window = Window(keys, values, self.recent + BLOCK)
        else:
            self._window.append(keys, values)
        self.length += keys.shape[2]
        self.is_settled = False

    def set_padding(self, padding: Sequence[int], origin: Sequence[int] | None = None) -> None:
        """Left padding of each row in tokens, and the RoPE position of its first real token.

        To be called before ``settle`` sees the rows; rows of which tokens have left the window keep what they had.
        """
        if self.batch and len(padding) != self.batch:
            raise QJLError(f"{self.name} holds {self.batch} rows, and {len(padding)} paddings were given.")
        origin = [0] * len(padding) if origin is None else origin
        if not self.batch:
            self.padding, self.origin = list(padding), list(origin)
        for row in (row for row, tokens in enumerate(self._settled) if not tokens):
            self.padding[row], self.origin[row] = padding[row], origin[row]
        self._forget_segments()
        self.is_settled = False

    def mark(self, mask: Tensor) -> None:
        """Say which of the next T tokens may be quantized: ``bool [B, T]``, padding included.

        The others stay exact for ever, and so does what is left of 64 at the end of a marked run. Tokens that no mask
        speaks of may be quantized as long as there was no mask, and stay exact from the first one on: text that is
        generated after an image, for example. A mask replaces what an earlier one said of tokens yet to come.

        Raises:
            QJLError: if the mask is of another kind, or for another number of rows.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise QJLError(f"a token mask is bool [B, T], not {mask.dtype} {list(mask.shape)}.")
        if self.batch and mask.shape[0] != self.batch:
            raise QJLError(f"{self.name} holds {self.batch} rows, and the token mask is for {mask.shape[0]}.")
        if self._window is None:
            self._marks = Marks(mask.shape[0])
        self._marks.give(mask, self.length)

    def observe(self, query: Tensor, out: Tensor) -> None:
        """Count the queries ``[B, Hq, Q, D]`` of the last Q tokens, and what attention gave them, while awaited."""
        assert self._window is not None
        device = query.device
        tokens = torch.arange(self.length - query.shape[2], self.length, device=device)
        tokens = tokens - _column(self.padding, device)
        positions = tokens + _column(self.origin, device)
        self._attention.add(query, out, positions, tokens >= 0, self.source.rope_on(device), self._window.keys.shape[1])

    def settle(self) -> None:
        """Quantize every block of 64 tokens that has left the window; what cannot be part of one is kept exact."""
        if self._window is None or self.is_settled:
            return
        due = [self._due(row) for row in range(self.batch)]
        if any(due):
            self._quantize(due)
        self.is_settled = True

    def _quantize(self, due: list[Runs]) -> None:
        assert self._window is not None
        codecs = self._codecs() or self._measure_and_fit()
        if codecs is None:
            return
        self._codecs_of_packed = codecs
        starts = self._window_starts()
        for rows in self._alike(due):
            self._pack(rows, due[rows[0]], codecs)
        for row, blocks in enumerate(due):
            self._keep(row, gaps(blocks, starts[row], self._decide(row)))
        self._window.drop_first(min(self._window_starts()) - self._window_column)

    @property
    def tokens_until_due(self) -> int:
        """How many tokens may be appended at once with the result of one by one: until a block is quantized."""
        ends = [
            first + BLOCK for row in range(self.batch) for first, stop in self._undecided(row) if stop - first >= BLOCK
        ]
        return min((end + self.recent - self.length for end in ends), default=ENDLESS if self.batch else 1)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` columns, and touch none of their tokens; marks of later columns are forgotten."""
        if length >= self.length or self._window is None:
            return
        for row in range(self.batch):
            self._decide(row)
        window_column = self._window_column
        self._forget_segments()
        self.length = max(0, length)
        self.padding = [min(pad, self.length) for pad in self.padding]
        self._window.drop_last(self._window.length - max(0, self.length - window_column))
        self._marks.crop(self.length)
        for store in self._stores:
            store.crop([self.length - pad for pad in self.padding])

    def select(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows: ``int64 [B']``."""
        if self._window is None:
            return
        indices = indices.cpu()
        self._window.select(indices)
        self._forget_segments()
        for store in self._stores:
            store.select(indices)
        rows = indices.tolist()
        self._marks.select(rows)
        self.padding = [self.padding[row] for row in rows]
        self.origin = [self.origin[row] for row in rows]

    def _forget_segments(self) -> None:
        """To be called where packed or kept tokens, or their columns, change; in between segments serve again."""
        self._segment: PackedSegment | None = None
        self._kept_segment: ExactSegment | None = None
        self._first_in_window: Tensor | None = None

    def segments(self) -> tuple[list[ExactSegment], PackedSegment | None]:
        """What attention reads: exact segments (kept tokens and window) and the packed one."""
        assert self._window is not None
        assert self._kept is not None
        exact = [self._window_segment()]
        if self._kept.length:
            self._kept_segment = self._kept_segment or self._segment_of_kept(self._kept)
            exact.insert(0, self._kept_segment)
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
        """Bytes of the exact tokens: sinks, window, and those that a token mask leaves exact."""
        return sum(store.nbytes for store in (self._window, self._kept) if store)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        window = self._window.allocated_nbytes if self._window else 0
        return window + sum(store.allocated_nbytes for store in self._stores)

    @property
    def codecs(self) -> tuple[Codec, Codec] | None:
        """Of keys and values, fitted to this layer; None as long as they wait for statistics."""
        return self._codecs()

    @property
    def codec_tensors(self) -> tuple[Tensor, ...]:
        """Fitted parameters of this layer; some are shared with other layers."""
        return tuple(tensor for codec in self._codecs() or () for tensor in codec.tensors)

    # Codecs and statistics

    @property
    def lacks_statistics(self) -> bool:
        """Whether the first prompt would give the statistics that codecs are fitted to."""
        is_needed = self.key.needs_statistics or self.value.needs_statistics
        return is_needed and self._codecs() is None and self.source.calibrated() is None

    def _codecs(self) -> tuple[Codec, Codec] | None:
        """Those that tokens are packed with, or will be; what is packed stays with its own."""
        if self._codecs_of_packed is not None:
            return self._codecs_of_packed
        if self._window is None:
            wanted = (self.key, self.value, self.pre_rope)
            return next((codecs for known, codecs in self.source.codecs.items() if known[:3] == wanted), None)
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
        tokens = columns - _column(self.padding, device)
        require_finite(keys * (tokens >= 0)[:, None, :, None], f"keys of {self.name}")
        return measure(
            keys,
            values,
            positions=tokens + _column(self.origin, device),
            valid=tokens >= self.sinks,
            attention=self._attention if self._needs_queries else None,
            rope=self.source.rope_on(device),
        )

    def _measure_and_fit(self) -> tuple[Codec, Codec] | None:
        """Fit to the first prompt, once a row of it is long enough."""
        if self.length - min(self.padding) < MIN_TOKENS:
            return None
        with self.source.fitting:
            if fitted := self._codecs():  # another thread was first
                return fitted
            statistics = self.measure()
            self.source.announce(statistics.count)
            self._attention = AttentionMoments()
            return self._fit(statistics)

    @property
    def _codec_key(self) -> tuple[Hashable, ...]:
        """A model may be moved to another device or dtype between two caches."""
        assert self._window is not None
        return self.key, self.value, self.pre_rope, self._window.device, self._window.dtype

    def _fit(self, statistics: LayerStatistics | None) -> tuple[Codec, Codec]:
        with self.source.fitting:
            if self._codec_key not in self.source.codecs:
                self.source.codecs[self._codec_key] = self._fitted(statistics)
            return self.source.codecs[self._codec_key]

    def _fitted(self, statistics: LayerStatistics | None) -> tuple[Codec, Codec]:
        assert self._window is not None
        keys, values = self._window.keys, self._window.values
        rope = self.source.rope_on(keys.device)
        is_undone = self.pre_rope and rope is not None and (statistics is None or statistics.is_rotary)
        codec = self.key.fit(
            LayerContext(
                "key",
                keys.shape[1],
                keys.shape[3],
                keys.device,
                keys.dtype,
                statistics,
                rope=None if is_undone else rope,
                undone=rope if is_undone else None,
            )
        )
        if rope is not None and is_undone:
            codec = Unrotated(codec, rope)
        context = LayerContext("value", values.shape[1], values.shape[3], values.device, values.dtype, statistics)
        return codec, self.value.fit(context)

    # Rows and columns

    @property
    def _window_column(self) -> int:
        """Column of the first token in the window."""
        return self.length - (self._window.length if self._window else 0)

    @property
    def _stores(self) -> list[Kept | Packed]:
        """Where tokens go that leave the window."""
        return [*([self._kept] if self._kept else []), *(self._packed or ())]

    @property
    def _settled(self) -> list[int]:
        """Tokens that have left the window, per row: packed or kept."""
        kept = self._kept.tokens if self._kept else [0] * self.batch
        return [sum(pair) for pair in zip(kept, self.packed_tokens, strict=True)]

    def _window_starts(self) -> list[int]:
        """Column from which on the window counts, per row: what came before is packed, kept, or padding."""
        return [pad + settled for pad, settled in zip(self.padding, self._settled, strict=True)]

    def _undecided(self, row: int) -> Runs:
        """Runs of columns that may be quantized and are not yet."""
        return since(self._marks.of(row), self.padding[row] + self.sinks)

    def _due(self, row: int) -> Runs:
        """The blocks of a row that have left the window, as runs of columns."""
        limit = self.length - self.recent
        blocks = [(first, first + (min(stop, limit) - first) // BLOCK * BLOCK) for first, stop in self._undecided(row)]
        return [(first, stop) for first, stop in blocks if first < stop]

    def _decide(self, row: int) -> int:
        """Forget marks that cannot lead to a block any more; tokens up to the column returned are packed or stay exact.

        Only what has left the window decides, so that appending and cropping within the window leave no trace.
        """
        limit = self.length - self.recent
        firsts = [first for first, stop in self._undecided(row) if stop >= limit or stop - first >= BLOCK]
        column = min([limit, *firsts])
        self._marks.settle(row, column)
        return column

    def _alike(self, due: list[Runs]) -> Iterable[list[int]]:
        """Rows that can be quantized together: the same blocks are due, and equally many are held."""
        held = self._packed[0].block_counts if self._packed else [0] * self.batch
        groups: dict[tuple[Hashable, ...], list[int]] = {}
        for row, blocks in enumerate(due):
            if blocks:
                groups.setdefault((held[row], *blocks), []).append(row)
        return groups.values()

    def _pack(self, rows: Sequence[int], blocks: Runs, codecs: tuple[Codec, Codec]) -> None:
        assert self._window is not None
        keys, values = self._window.keys, self._window.values
        if self._packed is None:
            batch, heads, device = *keys.shape[:2], keys.device
            self._packed = (
                Packed(codecs[0].layout, batch, heads, device),
                Packed(codecs[1].layout, batch, heads, device),
            )
        everyone = len(rows) == self.batch
        padding, origin = (_column([of[row] for row in rows]) for of in (self.padding, self.origin))
        columns = torch.cat([torch.arange(*run) for run in blocks])
        tokens = columns[::BLOCK] - padding
        first = to_device(tokens + origin, keys.device)
        place = _place_of(columns, self._window_column, keys.device)
        chosen_rows = to_device(torch.tensor(rows, dtype=torch.int64), keys.device)
        encoded = []
        for codec, tensor, what in zip(codecs, (keys, values), ("keys", "values"), strict=True):
            chosen = tensor[:, :, place] if everyone else tensor[:, :, place][chosen_rows]
            require_finite(chosen, f"{what} of {self.name}")
            encoded.append(codec.quantize(chosen, first))
        self._forget_segments()
        for packed, fields in zip(self._packed, encoded, strict=True):
            packed.append(fields, tokens, None if everyone else rows)
        for row in rows:
            self._marks.settle(row, blocks[-1][1])

    def _keep(self, row: int, runs: Runs) -> None:
        """Copy tokens of the window to those that stay exact."""
        assert self._window is not None
        assert self._kept is not None
        self._forget_segments()
        for first, stop in runs:
            columns = slice(first - self._window_column, stop - self._window_column)
            keys, values = self._window.keys[row, :, columns], self._window.values[row, :, columns]
            self._kept.append(row, first - self.padding[row], keys, values)

    # Segments

    def _window_segment(self) -> ExactSegment:
        assert self._window is not None
        column = self._window_column
        starts = self._window_starts()
        valid = None
        if any(start > column for start in starts):
            if self._first_in_window is None:
                self._first_in_window = _column(starts, self._window.device)
            valid = torch.arange(column, self.length, device=self._window.device) >= self._first_in_window
        return ExactSegment(self._window.keys, self._window.values, column, valid)

    def _segment_of_kept(self, kept: Kept) -> ExactSegment:
        columns = self._run_start(kept.indices, 1) if kept.is_dense else None
        return ExactSegment(
            kept.keys,
            kept.values,
            columns=self._columns(kept.indices) if columns is None else columns,
            valid=None if kept.is_dense else to_device(kept.slot_mask(), kept.keys.device),
        )

    def _packed_segment(self) -> PackedSegment | None:
        if self._packed is None or not self._packed[0].blocks:
            return None
        if self._segment is None:
            self._segment = self._segment_of(*self._packed)
        return self._segment

    def _segment_of(self, keys: Packed, values: Packed) -> PackedSegment:
        codecs = self._codecs()
        assert codecs is not None
        first = keys.first_tokens()
        columns = self._run_start(first, BLOCK) if keys.is_dense else None
        return PackedSegment(
            keys.view(),
            values.view(),
            *codecs,
            first=to_device(first + _column(self.origin), keys.device),
            columns=self._columns(keys.slot_tokens()) if columns is None else columns,
            valid=None if keys.is_dense else keys.slot_mask(),
        )

    def _run_start(self, tokens: Tensor, step: int) -> int | None:
        """The column where tokens ``[B, n]`` begin, if in all rows they are the same run, ``step`` by ``step``."""
        starts = {pad + first for pad, first in zip(self.padding, tokens[:, 0].tolist(), strict=True)}
        lengths = set((tokens[:, -1] - tokens[:, 0]).tolist())
        is_one_run = len(starts) == 1 and lengths == {step * (tokens.shape[1] - 1)}
        return starts.pop() if is_one_run else None

    def _columns(self, tokens: Tensor) -> Tensor:
        """Mask columns of tokens ``[B, t]`` counted within their rows."""
        assert self._window is not None
        columns = _column(self.padding) + tokens
        return to_device(columns.clamp(max=self.length - 1), self._window.device)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise QJLError(
                f"keys {list(keys.shape)} and values {list(values.shape)} must be [B, H, T, D] with equal B, H and T."
            )
        if self._window is None:
            self.key.layout(keys.shape[3])
            self.value.layout(values.shape[3])
        elif not self._window.fits(keys, values):
            raise QJLError(
                f"{self.name} holds {list(self._window.keys.shape)} and cannot append {list(keys.shape)}: batch, heads "
                "and head_dim must stay the same."
            )
        if self._marks.batch not in (0, keys.shape[0]):
            raise QJLError(
                f"the token mask given to {self.name} is for {self._marks.batch} rows and {keys.shape[0]} come: repeat "
                "it for beams and samples."
            )
        if keys.device.type == "cpu":
            require_finite(keys, f"keys of {self.name}")
            require_finite(values, f"values of {self.name}")


def _of_one_dtype(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast a model's keys and values may differ in theirs."""
    dtype = torch.promote_types(keys.dtype, values.dtype)
    return keys.to(dtype), values.to(dtype)


def _column(of_rows: Sequence[int], device: torch.device = CPU) -> Tensor:
    """A number of each row, ``int64 [B, 1]``."""
    return to_device(torch.tensor(of_rows, dtype=torch.int64)[:, None], device)


def _place_of(columns: Tensor, window_column: int, device: torch.device) -> slice | Tensor:
    """Where columns are in the window; a slice, which copies nothing, if they are one run."""
    first, stop = int(columns[0]) - window_column, int(columns[-1]) + 1 - window_column
    return slice(first, stop) if stop - first == len(columns) else to_device(columns - window_column, device)


def _place(out: tuple[Tensor, ...], tokens: tuple[Tensor, Tensor], columns: Tensor | int, valid: Tensor | None) -> None:
    """Write tokens to their columns."""
    for target, source in zip(out, tokens, strict=True):
        source = source.to(target.dtype)
        if isinstance(columns, int) and valid is None:
            target[:, :, columns : columns + source.shape[2]] = source
            continue
        for row, column in _row_columns(columns, source):
            chosen = slice(None) if valid is None else valid[row]
            target[row][:, column[chosen]] = source[row][:, chosen]


def _row_columns(columns: Tensor | int, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    for row in range(tokens.shape[0]):
        if isinstance(columns, int):
            yield row, torch.arange(columns, columns + tokens.shape[2], device=tokens.device)
        else:
            yield row, columns[row]
