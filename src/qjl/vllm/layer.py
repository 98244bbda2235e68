"""One layer of the vLLM plugin: carries out plans on tensors. It knows pages and pools, and nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qjl import ops
from qjl.attention import Scoring, attend_segments
from qjl.cache import ExactSegment, PackedSegment
from qjl.errors import QJLError
from qjl.methods.base import Codec
from qjl.ops.forms import ExactTokens, PagedTokens
from qjl.packed import BLOCK, Blocks, Layout
from qjl.vllm.planning import Encoding, Plan, PoolShape, Reading, Request

TILE_BLOCKS = 32  # decoded at once


@dataclass(frozen=True, eq=False)
class Targets:
    """An ``Encoding`` as tensors: where 64 tokens at a time come from, and where their codes go."""

    sources: Tensor
    first: Tensor
    columns: Tensor
    pages: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, encoding: Encoding, device: torch.device) -> Targets:
        numbers = (encoding.sources, encoding.first, encoding.columns, encoding.pages, encoding.offsets)
        return cls(*(on(device, of) for of in numbers))


@dataclass(frozen=True, eq=False)
class Together:
    """B sequences with Q fresh tokens each that attend in one call.

    ``tokens [B, Q]`` of the batch; ``pages [B, n]``, of which tokens ``skip [B]`` to ``packed [B]`` are read, the first
    at position ``origins [B]``, 0; ``slots [B, t]`` of the pool and ``bias [B, 1, 1, t]``, -inf where a sequence has
    fewer; ``causal [1, 1, Q, Q]``.
    """

    tokens: Tensor
    pages: Tensor
    skip: Tensor
    packed: Tensor
    origins: Tensor
    slots: Tensor
    bias: Tensor
    causal: Tensor | None


@dataclass(frozen=True, eq=False)
class Alone:
    """A sequence whose fresh tokens ``[begin, stop)`` of the batch attend by themselves: a chunk of a prompt."""

    begin: int
    stop: int
    context: int
    reading: Reading
    pages: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """A plan as tensors, made once for all layers."""

    rescued: Targets | None
    put_tokens: Tensor
    put_slots: Tensor
    filled: Targets | None
    direct: Targets | None
    together: list[Together]
    alone: list[Alone]

    @classmethod
    def of(
        cls, plan: Plan, requests: Sequence[Request], page_tokens: int, most_queries: int, device: torch.device
    ) -> Step:
        """Sequences with a context and at most ``most_queries`` fresh tokens attend together."""
        groups: dict[int, list[tuple[int, Request, Reading]]] = {}
        alone, begin = [], 0
        for request, reading in zip(requests, plan.readings, strict=True):
            if request.context and request.fresh <= most_queries:
                groups.setdefault(request.fresh, []).append((begin, request, reading))
            else:
                pages = on(device, request.pages[: -(-reading.packed // page_tokens)])
                slots = on(device, reading.slots)
                alone.append(Alone(begin, begin + request.fresh, request.context, reading, pages, slots))
            begin += request.fresh
        encodings = (plan.rescued, plan.filled, plan.direct)
        rescued, filled, direct = (Targets.of(one, device) if len(one) else None for one in encodings)
        together = [_together(rows, page_tokens, device) for rows in groups.values()]
        puts = (on(device, plan.put_tokens), on(device, plan.put_slots))
        return cls(rescued, *puts, filled, direct, together, alone)


def _together(rows: list[tuple[int, Request, Reading]], page_tokens: int, device: torch.device) -> Together:
    queries = rows[0][1].fresh
    readings = [reading for _, _, reading in rows]
    slots = _padded([reading.slots for reading in readings])
    used = np.arange(slots.shape[1]) < [[len(reading.slots)] for reading in readings]
    causal = np.tri(queries, dtype=bool)
    return Together(
        tokens=on(device, [range(begin, begin + queries) for begin, _, _ in rows]),
        pages=on(device, _padded([request.pages[: -(-one.packed // page_tokens)] for _, request, one in rows])).int(),
        skip=on(device, [reading.skip for reading in readings]).int(),
        packed=on(device, [reading.packed for reading in readings]).int(),
        origins=on(device, [0] * len(rows)),
        slots=on(device, slots),
        bias=_bias(used, device)[:, None, None],
        causal=_bias(causal, device)[None, None] if queries > 1 else None,
    )


def _bias(seen: np.ndarray, device: torch.device) -> Tensor:
    """0, and -inf where nothing is seen."""
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))).to(device)


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    padded = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def on(device: torch.device, numbers: Sequence[Any] | np.ndarray) -> Tensor:
    """``int64`` on a device, whatever torch's defaults are."""
    return torch.from_numpy(np.asarray(numbers, np.int64)).to(device)


def page_bytes(layouts: Iterable[Layout]) -> int:
    """Bytes per token and head of pages with these fields.

    Raises:
        QJLError: if a field has no value per token.
    """
    total = 0
    for layout in layouts:
        for name, field in layout.items():
            if not field.shape or field.shape[-1] != BLOCK:
                raise QJLError(f"{name} is not kept per token: such codes do not fit pages.")
            total += field.nbytes
    return total // BLOCK


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


class PagedLayer:
    """Keys and values of one layer: pages of codes, which vLLM owns, and a pool of exact tokens.

    Args:
        codecs: of keys and values, both with a nibble form.
        shape: of the pool.
        heads, head_dim, dtype, device: of the exact tokens.

    Raises:
        QJLError: for codes that are not nibbles with a scale per token.
    """

    def __init__(
        self,
        codecs: tuple[Codec, Codec],
        shape: PoolShape,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.codecs = codecs
        self.shape = shape
        self.heads = heads
        # zeros: slots beside the exact tokens of a line are encoded with them, and must be finite
        self.keys = torch.zeros(shape.slots, heads, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self._fields: list[Blocks] = []
        self._derived: dict[str, Any] = {}
        self._bound: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's codes, of all heads."""
        return self.heads * page_bytes(self.layouts)

    @cached_property
    def layouts(self) -> list[Layout]:
        return [codec.layout for codec in self.codecs]

    def bind(self, cache: Tensor) -> None:
        """Use the pages ``uint8 [pages, H, page_tokens, bytes per token]``, the bytes of a head in one piece."""
        if self._bound is not cache:
            self._bound, self._derived = cache, {}
            self._fields = page_fields(cache.flatten(2), self.layouts, self.shape.page_tokens)

    def write(self, step: Step, keys: Tensor, values: Tensor) -> None:
        """Keep the fresh tokens ``[tokens, H, D]`` of a step."""
        pool = (self.keys, self.values)
        if step.rescued is not None:
            self._encode(step.rescued, pool)
        if len(step.put_tokens):
            self.keys[step.put_slots] = keys[step.put_tokens]
            self.values[step.put_slots] = values[step.put_tokens]
        if step.filled is not None:
            self._encode(step.filled, pool)
        if step.direct is not None:
            self._encode(step.direct, (keys, values))

    def _encode(self, targets: Targets, tokens: tuple[Tensor, Tensor]) -> None:
        for codec, source, fields in zip(self.codecs, tokens, self._fields, strict=True):
            chosen = source.index_select(0, targets.sources).unflatten(0, (-1, BLOCK)).transpose(1, 2)
            encoded = codec.quantize(chosen, targets.first[:, None])
            for name, codes in encoded.items():
                by_token = codes[:, :, 0].movedim(-1, 1).flatten(0, 1)  # [n * 64, H, *shape]
                fields[name].movedim(-1, 1)[targets.pages, targets.offsets] = by_token[targets.columns]

    def attend(self, step: Step, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, out: Tensor) -> None:
        """Attention of all fresh tokens: ``query``, ``out [tokens, Hq, D]``; ``keys``, ``values [tokens, H, D]``."""
        self.attend_together(step, query, keys, values, scoring, out)
        for one in step.alone:
            self._attend_alone(one, query, keys, values, scoring, out)

    def attend_together(
        self, step: Step, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, out: Tensor
    ) -> None:
        """The same without the sequences that attend by themselves."""
        for rows in step.together:
            self._attend_together(rows, query, keys, values, scoring, out)

    def before(self, one: Alone) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values ``[t, H, D]`` of tokens before a sequence's fresh ones, part by part: exact, or decoded."""
        reading = one.reading
        sinks, window = one.slots[: reading.skip], one.slots[reading.skip :]
        yield self.keys[sinks], self.values[sinks]
        if reading.packed > reading.skip:
            segment = self._segment(one, one.context)
            for start in range(0, segment.blocks, TILE_BLOCKS):
                tile = segment.tile(start, min(start + TILE_BLOCKS, segment.blocks))
                read = slice(max(0, reading.skip - start * BLOCK), reading.packed - start * BLOCK)
                keys = tile.key_codec.dequantize(tile.keys, tile.first)[0, :, read]
                values = tile.value_codec.dequantize(tile.values, tile.first)[0, :, read]
                yield keys.transpose(0, 1).to(self.keys.dtype), values.transpose(0, 1).to(self.keys.dtype)
        yield self.keys[window], self.values[window]

    def _attend_together(
        self, rows: Together, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, out: Tensor
    ) -> None:
        batch, queries = rows.tokens.shape
        asked = query[rows.tokens].transpose(1, 2).float()  # [B, Hq, Q, D]
        grouped = asked.reshape(batch, self.heads, -1, asked.shape[3])
        exact = [_exact(keys, values, rows.tokens, rows.causal)]
        if rows.slots.shape[1]:
            exact.append(_exact(self.keys, self.values, rows.slots, rows.bias))
        softcap = scoring.softcap or 0.0
        result = ops.attend_paged(grouped, self._paged(rows), None, exact, queries, scoring.scaling, softcap)[0]
        out[rows.tokens] = result.reshape(batch, -1, queries, asked.shape[3]).transpose(1, 2).to(out.dtype)

    def _attend_alone(
        self, one: Alone, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, out: Tensor
    ) -> None:
        reading, fresh = one.reading, slice(one.begin, one.stop)
        exact = [ExactSegment(_row(keys[fresh]), _row(values[fresh]), one.context, None)]
        for part, column in ((one.slots[: reading.skip], 0), (one.slots[reading.skip :], reading.packed)):
            if len(part):
                exact.insert(0, ExactSegment(_row(self.keys[part]), _row(self.values[part]), column, None))
        columns = one.context + one.stop - one.begin
        packed = self._segment(one, columns) if reading.packed > reading.skip else None
        result = attend_segments(_row(query[fresh]), exact, packed, scoring, columns)
        out[fresh] = result[0].transpose(0, 1)

    def _paged(self, rows: Together) -> PagedTokens:
        key, value = (codec.form for codec in self.codecs)
        assert key is not None
        assert value is not None
        pages = (rows.pages, rows.packed, rows.skip, rows.origins)
        return PagedTokens(self._fields[0], self._fields[1], key, value, *pages, self._derived)

    def _segment(self, one: Alone, columns: int) -> PackedSegment:
        keys, values, first = self._gathered(one.pages[None])
        slots = torch.arange(first.shape[1] * BLOCK, dtype=torch.int64, device=first.device)
        valid = (slots >= one.reading.skip) & (slots < one.reading.packed)
        places = 0 if len(slots) <= columns else slots.clamp(max=columns - 1)[None]
        return PackedSegment(keys, values, *self.codecs, first, places, valid[None])

    def _gathered(self, pages: Tensor) -> tuple[Blocks, Blocks, Tensor]:
        """Blocks of 64 tokens ``[B, H, blocks, *shape]`` from ``pages [B, n]``, and their first positions."""
        together = BLOCK // self.shape.page_tokens
        pages = F.pad(pages, (0, -pages.shape[1] % together)).unflatten(1, (-1, together))  # [B, blocks, together]
        blocks = torch.arange(pages.shape[1], dtype=torch.int64, device=pages.device)
        first = (blocks * BLOCK).expand(len(pages), -1)
        keys, values = (
            {name: field[pages].movedim((3, 2), (1, -2)).flatten(-2).contiguous() for name, field in fields.items()}
            for fields in self._fields
        )
        return keys, values, first


def _exact(keys: Tensor, values: Tensor, chosen: Tensor, bias: Tensor | None) -> ExactTokens:
    """Tokens ``chosen [B, t]`` of ``[tokens, H, D]``."""
    return ExactTokens(keys[chosen].transpose(1, 2), values[chosen].transpose(1, 2), bias)


def _row(x: Tensor) -> Tensor:
    """``[T, H, D] -> [1, H, T, D]``."""
    return x.transpose(0, 1)[None]
