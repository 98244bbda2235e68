"""One layer of the vLLM plugin: carries out steps on tensors. It knows pages and pools, and nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from qjl import ops
from qjl.attention import Scoring, Seen, Segment, attend
from qjl.cache.pool import BoundPages, ExactTokens
from qjl.codecs import Pair, TokenShape
from qjl.errors import QJLError
from qjl.packed import BLOCK, Layout
from qjl.vllm.block_planner import PoolShape
from qjl.vllm.steps import Alone, LayerStep, Targets, Together

TILE_BLOCKS = 32  # decoded at once
Tokens = tuple[Tensor, Tensor]  # keys and values


class AttendsAlone(Protocol):
    """What takes the sequences of a step that attend by themselves."""

    def attend(
        self, layer: PagedLayer, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, out: Tensor
    ) -> None: ...


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


@dataclass(frozen=True, eq=False)
class _Codes:
    """Pages of one sequence, as attention over decoded tokens reads them."""

    pages: BoundPages
    table: Tensor
    blocks: int
    seen: Seen

    def decode(self, start: int, stop: int) -> Tokens:
        return self.pages.decode(self.table, start, stop)


class PagedLayer:
    """Keys and values of one layer: pages of codes, which vLLM owns, and a pool of exact tokens.

    Args:
        codecs: of keys and values, both with a nibble form.
        pool: how many exact tokens there is room for.
        shape: of the exact tokens.

    Raises:
        QJLError: for codes that are not nibbles with a scale per token.
    """

    def __init__(self, codecs: Pair, pool: PoolShape, shape: TokenShape) -> None:
        self.codecs = codecs
        self.shape = shape
        self.exact = ExactTokens(shape, pool.slots)
        self._pages: BoundPages | None = None
        self._bound: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.exact.nbytes

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token's codes, of all heads."""
        return self.shape.heads * page_bytes([codec.layout for codec in self.codecs])

    def bind(self, cache: Tensor) -> None:
        """Use the pages ``uint8 [pages, H, page_tokens, bytes per token]``, the bytes of a head in one piece."""
        if self._bound is not cache:
            self._bound, self._pages = cache, BoundPages(self.codecs, cache)

    @property
    def pages(self) -> BoundPages:
        assert self._pages is not None
        return self._pages

    def attend(
        self,
        step: LayerStep,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scoring: Scoring,
        out: Tensor,
        prompts: AttendsAlone | None = None,
    ) -> None:
        """Keep all fresh tokens and attend: ``query``, ``out [tokens, Hq, D]``; ``keys``, ``values [tokens, H, D]``.

        ``prompts`` takes the sequences that attend by themselves, if there is one.
        """
        pool = (self.exact.keys, self.exact.values)
        self._encode(step.rescued, pool)
        if (puts := step.puts) is not None:
            self.exact.put(puts.slots, keys[puts.tokens], values[puts.tokens])
        self._encode(step.direct, (keys, values))
        if not step.is_apart:
            self._encode(step.filled, pool)
        for rows in step.together:
            self._attend_together(rows, query, keys, values, scoring, out, step.is_apart)
        if step.is_apart:
            self._encode(step.filled, pool)
        if prompts is not None:
            prompts.attend(self, query, keys, values, scoring, out)
            return
        for one in step.alone:
            self._attend_alone(one, query, keys, values, scoring, out)

    def _encode(self, targets: Targets | None, tokens: Tokens) -> None:
        if targets is None:
            return
        if targets.columns is None or targets.offsets is None:
            sides = zip(self.codecs, tokens, self.pages.fields, ("keys", "values"), strict=True)
            jobs = [codec.job(source, fields, what) for codec, source, fields, what in sides]
            ops.encode(jobs, targets.sources, targets.first, targets.pages, are_trusted=True)
            return
        for side, (codec, source) in enumerate(zip(self.codecs, tokens, strict=True)):
            chosen = source.index_select(0, targets.sources).transpose(0, 1)[None]
            blocks = codec.encode_tokens(chosen, targets.first[None])
            self.pages.write_tokens(side, blocks, targets.columns, targets.pages, targets.offsets)

    def before(self, one: Alone) -> Iterator[Tokens]:
        """Keys and values ``[t, H, D]`` of tokens before a sequence's fresh ones, part by part: exact, or decoded."""
        sinks, window = one.slots[: one.skip], one.slots[one.skip :]
        yield self.exact.keys[sinks], self.exact.values[sinks]
        for start in range(0, -(-one.packed // BLOCK) if one.packed > one.skip else 0, TILE_BLOCKS):
            stop = min(start + TILE_BLOCKS, -(-one.packed // BLOCK))
            read = slice(max(0, one.skip - start * BLOCK), one.packed - start * BLOCK)
            keys, values = (
                x[0, :, read].transpose(0, 1).to(self.shape.dtype)
                for x in self.pages.decode(one.pages[None], start, stop)
            )
            yield keys, values
        yield self.exact.keys[window], self.exact.values[window]

    def _attend_together(
        self, of: Together, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, out: Tensor, appends: bool
    ) -> None:
        asked, fresh_keys, fresh_values = (_by_row(x[of.tokens], of.queries) for x in (query, keys, values))
        pools = (self.pages.operand, self.exact.operand)
        softcap = scoring.softcap or 0.0
        if appends:
            found = ops.append_attend(asked, fresh_keys, fresh_values, *pools, of.rows, scoring.scaling, softcap)
        else:
            grouped = asked.reshape(of.rows.batch, self.shape.heads, -1, asked.shape[3])
            part, _ = ops.attend(grouped, *pools, of.rows, of.queries, scoring.scaling, softcap)
            found = part.reshape(*asked.shape[:3], -1).transpose(1, 2)
        out[of.tokens] = found.flatten(0, 1).to(out.dtype)

    def _attend_alone(
        self, one: Alone, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, out: Tensor
    ) -> None:
        fresh = slice(one.begin, one.stop)
        parts = ((one.slots[: one.skip], 0), (one.slots[one.skip :], one.packed))
        exact = [Segment(*self.exact.read(slots[None]), Seen(column, None)) for slots, column in parts if len(slots)]
        exact.append(Segment(_row(keys[fresh]), _row(values[fresh]), Seen(one.context, None)))
        coded = self._codes(one) if one.packed > one.skip else None
        out[fresh] = attend(_row(query[fresh]), exact, coded, scoring)[0].transpose(0, 1)

    def _codes(self, one: Alone) -> _Codes:
        blocks, columns = -(-one.packed // BLOCK), one.context + one.stop - one.begin
        tokens = torch.arange(blocks * BLOCK, dtype=torch.int64, device=one.pages.device)
        valid = (tokens >= one.skip) & (tokens < one.packed)
        places = 0 if len(tokens) <= columns else tokens.clamp(max=columns - 1)[None]
        return _Codes(self.pages, one.pages[None], blocks, Seen(places, valid[None]))


def _by_row(x: Tensor, queries: int) -> Tensor:
    """``[B * Q, H, D] -> [B, H, Q, D]``."""
    return x.unflatten(0, (-1, queries)).transpose(1, 2)


def _row(x: Tensor) -> Tensor:
    """``[T, H, D] -> [1, H, T, D]``."""
    return x.transpose(0, 1)[None]
