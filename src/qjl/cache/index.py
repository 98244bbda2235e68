"""Which tokens a cache holds, and where: numbers only, one index for all layers of a cache.

A row's tokens lie on a grid of blocks of 64. A token enters as an exact one, in a *slot*. Once a block is older than
the last ``recent`` tokens it is decided: all of its tokens go into a *page* of codes, or, where a token mask does not
allow that, they stay exact for ever: a *hole* in the row's table of pages. The first ``sinks`` tokens are kept exact
beside their codes. Slots and pages have the same numbers in all layers; rows may share them (beams, copies of a
prompt), and a page is copied before one of several owners writes to it.

A forward pass is a ``Step``: begun with its first tokens, planned once, carried out by each layer, and committed when
the pass is over. Until then nothing that was held before is touched, so a pass that fails is rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qjl.cache.places import Places
from qjl.errors import QJLError
from qjl.packed import BLOCK, to_device

HOLE = -1
Integers = np.ndarray
_SPARE_SLOTS, _SPARE_PAGES = 64, 8  # columns that tables grow by, at least


@dataclass(frozen=True)
class Capacity:
    """Room for so many rows of so many tokens each."""

    rows: int
    tokens: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.tokens < 1:
            raise QJLError("a cache has room for at least one row of one token: give larger numbers.")

    @property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.tokens // BLOCK)


@dataclass(eq=False)
class Blocks:
    """Blocks of 64 tokens to be encoded: where their tokens are, their positions, and their pages.

    ``sources``: slots, or fresh tokens of the pass, 64 for each block; ``first``: RoPE position of each block's first
    token. Of the first ``kept`` tokens of a block the page has codes already, which stay.
    """

    sources: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    _on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.pages)

    def add(self, sources: Iterable[int], first: int, page: int, kept: int) -> None:
        """One more block."""
        self.sources += sources
        self.first.append(first)
        self.pages.append(page)
        self.kept.append(kept)
        self._on.clear()

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Sources int32 ``[n * 64]``, first positions int64 ``[n]``, pages int32 ``[n]``; one for all layers."""
        if device not in self._on:
            dtypes = ((self.sources, torch.int32), (self.first, torch.int64), (self.pages, torch.int32))
            sources, first, pages = (to_device(torch.tensor(x, dtype=dtype), device) for x, dtype in dtypes)
            self._on[device] = sources, first, pages
        return self._on[device]

    @property
    def are_whole(self) -> bool:
        """Whether no page has codes yet."""
        return not any(self.kept)


@dataclass(eq=False)
class Step:
    """What one forward pass adds to each row.

    Fresh tokens are numbered through the pass: those of row b are ``starts[b]`` to ``starts[b] + counts[b]``. When it
    is planned, ``put_tokens`` of them go to ``put_slots``; once all is read, ``pooled`` blocks are encoded from slots
    and ``direct`` ones from fresh tokens, after pages were copied as ``copies`` say.
    """

    starts: list[int]
    counts: list[int]
    columns: int  # that the pass adds, padding included; 0 for rows that have none
    before: list[int]  # exact tokens of each row, before the pass
    left_out: int = 0  # columns that the model read and that are not kept
    is_planned: bool = False
    put_tokens: list[int] = field(default_factory=list)
    put_slots: list[int] = field(default_factory=list)
    pooled: Blocks = field(default_factory=Blocks)
    direct: Blocks = field(default_factory=Blocks)
    copies: list[tuple[int, int]] = field(default_factory=list)
    decided: list[list[int]] = field(default_factory=list)  # page or hole of each block that is decided, per row
    firsts: list[int] = field(default_factory=list)  # which block of a row that begins with
    taken: list[int] = field(default_factory=list)  # pages that are new

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and tokens of the tensors that layers are given: the rows, or one with all tokens behind each other."""
        return (len(self), self.columns) if self.columns else (1, sum(self.counts))

    def clear(self) -> None:
        """Forget what was planned."""
        self.put_tokens, self.put_slots, self.copies, self.taken = [], [], [], []
        self.pooled, self.direct, self.decided, self.firsts = Blocks(), Blocks(), [], []
        self.is_planned = False

    def __len__(self) -> int:
        return len(self.counts)


class TokenIndex:
    """The tokens of some rows, each with its own length.

    Args:
        sinks, recent: exact tokens at the start and at the end of each row.
        capacity: what there is room for; None grows as needed. With one no array is ever made anew.
    """

    def __init__(self, sinks: int, recent: int, capacity: Capacity | None = None) -> None:
        self.sinks, self.recent = sinks, recent
        self.capacity = capacity
        self.slots = Places("exact tokens", None if capacity is None else capacity.rows * self._slots_of_row)
        self.pages = Places("pages", None if capacity is None else capacity.rows * capacity.blocks)
        self.fills_pages = True  # whether codes of single tokens can be added to a page
        self.packs = True  # whether blocks are decided; not as long as codecs wait for statistics
        self.reset()

    @property
    def _slots_of_row(self) -> int:
        """Exact tokens of a row at most, with those of the pass before, where nothing masks them."""
        return self.sinks + 2 * self.recent + 3 * BLOCK

    def reset(self) -> None:
        """Forget all rows."""
        self.step: Step | None = None
        self.columns = 0  # of an attention mask, padding included
        self.left_out = 0  # that the model has read besides: which ones, is not known
        self.marks: np.ndarray | None = None
        self.slots.reset()
        self.pages.reset()
        self.version = 0  # of the arrays: another number, other arrays
        self._set_no_rows()

    def _set_no_rows(self) -> None:
        self.padding: list[int] = []
        self.lengths: list[int] = []
        self.blocks: list[int] = []  # decided, per row
        self.partial: list[dict[int, int]] = []  # tokens in codes, of blocks that have fewer than 64
        self.origins: Integers = np.zeros(0, np.int64)
        self.table: Integers = np.zeros((0, 0), np.int32)
        self.counts: Integers = np.zeros(0, np.int32)
        self.ends: Integers = np.zeros(0, np.int32)  # of the table of each row, in tokens
        self.slot_of: Integers = np.zeros((0, 0), np.int32)
        self.token_of: Integers = np.zeros((0, 0), np.int64)
        self.version += 1

    # Rows

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def add_rows(self, count: int) -> None:
        """Empty rows behind those there are."""
        if self.capacity is not None and self.batch + count > self.capacity.rows:
            raise QJLError(
                f"the cache has room for {self.capacity.rows} rows, not for {self.batch + count}: make it for more."
            )
        self.padding += [0] * count
        self.lengths += [0] * count
        self.blocks += [0] * count
        self.partial += [{} for _ in range(count)]
        self._set_arrays(np.concatenate([of, np.zeros((count, *of.shape[1:]), of.dtype)]) for of in self._arrays)
        if self.capacity is not None:
            self._widen_table(self.capacity.blocks)
            self._widen_exact(self._slots_of_row)

    @property
    def _arrays(self) -> tuple[Integers, ...]:
        return self.origins, self.counts, self.ends, self.table, self.slot_of, self.token_of

    def _set_arrays(self, arrays: Iterable[Any]) -> None:
        self.origins, self.counts, self.ends, self.table, self.slot_of, self.token_of = arrays
        self.version += 1

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat, reorder or drop rows: no token moves."""
        for row in rows:
            self.slots.share(self.slot_of[row, : self.counts[row]])
            self.pages.share(self._pages_of(row))
        for row in range(self.batch):
            self.slots.release(self.slot_of[row, : self.counts[row]])
            self.pages.release(self._pages_of(row))
        chosen = np.asarray(rows, np.int64)
        self.padding, self.lengths, self.blocks = (
            [of[row] for row in rows] for of in (self.padding, self.lengths, self.blocks)
        )
        self.partial = [dict(self.partial[row]) for row in rows]
        if len(rows) == len(self.counts):
            for of in self._arrays:
                of[:] = of[chosen]
        else:
            self._set_arrays(of[chosen] for of in self._arrays)
        if self.marks is not None:
            self.marks = self.marks[chosen]

    def _pages_of(self, row: int) -> Integers:
        pages = self.table[row, : self.blocks[row]]
        return pages[pages != HOLE]

    # A pass

    def begin(self, starts: Sequence[int], counts: Sequence[int], columns: int) -> Step:
        """A pass with ``counts[b]`` fresh tokens for row b, in ``columns`` columns of each row."""
        assert self.step is None
        self.step = Step(list(starts), list(counts), columns, self.counts.tolist())
        return self.step

    def begin_columns(self, columns: int) -> Step:
        """A pass over a batch ``[B, columns]``, of which the beginning of a row that has no token yet may be padding.

        Padding that is not known yet is told by ``set_padding``, before anything is planned.
        """
        return self.begin(*self._fresh(columns), columns)

    def begin_ragged(self, counts: Sequence[int]) -> Step:
        """A pass over the fresh tokens of all rows, one row behind the other: as many of each as ``counts`` say."""
        starts = np.cumsum([0, *counts])[:-1]
        return self.begin(starts.tolist(), counts, 0)

    def _fresh(self, columns: int) -> tuple[list[int], list[int]]:
        """Where the fresh tokens of each row start, and how many there are."""
        rows = zip(self.padding, self.lengths, strict=True)
        counts = [columns if held else columns - min(max(pad - self.columns, 0), columns) for pad, held in rows]
        return [(row + 1) * columns - count for row, count in enumerate(counts)], counts

    def set_padding(self, padding: Sequence[int], origins: Sequence[int]) -> None:
        """Left padding of rows in columns, and the RoPE position of their first token.

        Rows that hold tokens keep what they have.

        Raises:
            QJLError: if it is for another number of rows.
        """
        if len(padding) != self.batch:
            raise QJLError(f"the cache holds {self.batch} rows, and {len(padding)} paddings were given.")
        for row, length in enumerate(self.lengths):
            if not length:
                self.padding[row], self.origins[row] = padding[row], origins[row]
        if self.step is not None and not self.step.is_planned:
            self.step.starts, self.step.counts = self._fresh(self.step.columns)

    def plan(self) -> Step:
        """Decide what the pass at hand does, and give its tokens and blocks their places.

        Raises:
            QJLError: if the capacity does not suffice; nothing has changed then.
        """
        step = self.step
        assert step is not None
        if step.is_planned:
            return step
        self._require_room(step)
        try:
            self._decide(step)
            self._place_fresh(step)
            self._take_pages(step)
        except QJLError:
            self._undo(step)
            raise
        step.is_planned = True
        return step

    def _require_room(self, step: Step) -> None:
        longest = max((length + count for length, count in zip(self.lengths, step.counts, strict=True)), default=0)
        if self.capacity is not None and longest > self.capacity.tokens:
            raise QJLError(
                f"the cache has room for {self.capacity.tokens} tokens of a row and is given {longest}: make it larger."
            )

    def _decide(self, step: Step) -> None:
        """Which blocks are old enough; True for those that are packed, for now."""
        for row, count in enumerate(step.counts):
            due = self._due(row, count)
            step.firsts.append(due.start)
            step.decided.append([0 if self._may_pack(row, block) else HOLE for block in due])

    def _due(self, row: int, count: int) -> range:
        """Blocks that are decided in a pass with ``count`` fresh tokens of a row."""
        first = self._next_block(row)
        last = (self.lengths[row] + count - self.recent) // BLOCK
        return range(first, max(first, last) if self.packs else first)

    def need(self, counts: Sequence[int]) -> tuple[int, int]:
        """Slots and pages that a pass with so many fresh tokens of each row takes at most, until it is over."""
        slots = pages = 0
        for row, count in enumerate(counts):
            packed = [block for block in self._due(row, count) if self._may_pack(row, block)] if count else []
            direct = [block for block in packed if block * BLOCK >= self.lengths[row]]
            slots += count - sum(BLOCK - min(max(self.sinks - block * BLOCK, 0), BLOCK) for block in direct)
            pages += len(packed)
        return slots, pages

    def _next_block(self, row: int) -> int:
        """The first one to be decided: where pages can be filled, one that has some codes is decided again.

        Not if it has tokens that a mask leaves exact: its codes stay, and they alone.
        """
        last = self.blocks[row] - 1
        is_open = self.fills_pages and last in self.partial[row] and self._may_pack(row, last)
        return last if is_open else last + 1

    def _may_pack(self, row: int, block: int) -> bool:
        if self.marks is None:
            return True
        first = self.padding[row] + block * BLOCK
        marked = self.marks[row, first : first + BLOCK]
        return len(marked) == BLOCK and bool(marked.all())

    def _place_fresh(self, step: Step) -> None:
        """Slots for all fresh tokens but those whose whole block is fresh and packed at the end of this very pass."""
        places = []
        for row, (start, count) in enumerate(zip(step.starts, step.counts, strict=True)):
            length = self.lengths[row]
            tokens = np.arange(length, length + count)
            if decided := step.decided[row]:
                ours = tokens // BLOCK - step.firsts[row]
                is_packed = np.array(decided) != HOLE
                is_direct = (ours < len(decided)) & is_packed[ours.clip(max=len(decided) - 1)]
                is_direct &= (tokens // BLOCK * BLOCK >= length) & (tokens >= self.sinks)
                tokens = tokens[~is_direct]
            step.put_tokens += (tokens - length + start).tolist()
            places.append(tokens)
        step.put_slots = self.slots.take(len(step.put_tokens))
        self._append_exact(places, step.put_slots)

    def _append_exact(self, places: Sequence[Integers], slots: Sequence[int]) -> None:
        need = max((int(count) + len(tokens) for count, tokens in zip(self.counts, places, strict=True)), default=0)
        if need > self.slot_of.shape[1]:
            self._widen_exact(need)
        begin = 0
        for row, tokens in enumerate(places):
            count, stop = int(self.counts[row]), int(self.counts[row]) + len(tokens)
            self.slot_of[row, count:stop] = slots[begin : begin + len(tokens)]
            self.token_of[row, count:stop] = tokens
            self.counts[row] = stop
            begin += len(tokens)

    def _widen_exact(self, need: int) -> None:
        spare = max(_SPARE_SLOTS, need // 4) if self.capacity is None else 0
        more = need + spare - self.slot_of.shape[1]
        self.slot_of, self.token_of = (np.pad(of, ((0, 0), (0, more))) for of in (self.slot_of, self.token_of))
        self.version += 1

    def _take_pages(self, step: Step) -> None:
        """Pages for the blocks that are packed; rows whose tokens are the same share one."""
        shared: dict[tuple[int, ...], int] = {}
        for row, decided in enumerate(step.decided):
            for place, state in enumerate(decided):
                if state != HOLE:
                    decided[place] = self._page_for(step, row, step.firsts[row] + place, shared)

    def _page_for(self, step: Step, row: int, block: int, shared: dict[tuple[int, ...], int]) -> int:
        first, kept = block * BLOCK, self.partial[row].get(block, 0)
        position = int(self.origins[row]) + first
        if first >= self.lengths[row] and not kept:
            page = self._new_page(step)
            start = step.starts[row] + first - self.lengths[row]
            step.direct.add(range(start, start + BLOCK), position, page, 0)
            return page
        slots = self._slots_of_block(row, first, kept)
        key = (*slots, position, kept, int(self.table[row, block]) if kept else HOLE)
        if key in shared:
            self.pages.share([shared[key]])
            step.taken.append(shared[key])
            return shared[key]
        shared[key] = page = self._new_page(step)
        if kept:  # others keep the page with these codes, and a pass that fails leaves it as it was
            step.copies.append((int(self.table[row, block]), page))
        step.pooled.add(slots, position, page, kept)
        return page

    def _new_page(self, step: Step) -> int:
        page = self.pages.take(1)[0]
        step.taken.append(page)
        return page

    def _slots_of_block(self, row: int, first: int, kept: int) -> list[int]:
        """Of 64 tokens; in place of those that are only in codes stands any other."""
        count = self.counts[row]
        inside = slice(*np.searchsorted(self.token_of[row, :count], (first + kept, first + BLOCK)))
        slots = self.slot_of[row, inside].tolist()
        assert len(slots) == BLOCK - kept
        return [slots[0]] * kept + slots

    def commit(self) -> None:
        """The pass is over: its tokens are held, and what its blocks no longer need is free."""
        step = self.step
        assert step is not None
        self.plan()
        self.step = None
        self.columns += step.columns
        self.left_out += step.left_out
        for row, count in enumerate(step.counts):
            self.lengths[row] += count
            if not self.lengths[row]:
                self.padding[row] = max(self.padding[row], self.columns)
            if step.decided[row]:
                self._enter(row, step.firsts[row], step.decided[row])

    def _enter(self, row: int, first: int, decided: Sequence[int]) -> None:
        blocks = first + len(decided)
        if blocks > self.table.shape[1]:
            self._widen_table(blocks)
        if self.blocks[row] > first:  # the page that was filled
            self.pages.release(self.table[row, first : first + 1])
            del self.partial[row][first]
        self.table[row, first:blocks] = decided
        self.blocks[row] = blocks
        self.ends[row] = self._end_of(row)
        count = int(self.counts[row])
        tokens, slots = self.token_of[row, :count], self.slot_of[row, :count]
        inside = (tokens // BLOCK - first).clip(0, len(decided) - 1)
        is_old = (tokens // BLOCK >= first) & (tokens < blocks * BLOCK) & (tokens >= self.sinks)
        is_old &= np.asarray(decided)[inside] != HOLE
        self.slots.release(slots[is_old])
        kept = int(count - is_old.sum())
        self.slot_of[row, :kept], self.token_of[row, :kept] = slots[~is_old], tokens[~is_old]
        self.counts[row] = kept

    def _widen_table(self, blocks: int) -> None:
        spare = max(_SPARE_PAGES, blocks // 4) if self.capacity is None else 0
        more = blocks + spare - self.table.shape[1]
        self.table = np.pad(self.table, ((0, 0), (0, more)), constant_values=HOLE)
        self.version += 1

    def roll_back(self) -> None:
        """The pass at hand never was."""
        step = self.step
        if step is not None:
            if step.is_planned:
                self._undo(step)
            self.step = None

    def forget_padding(self) -> None:
        """What is known of rows that hold no token yet: that all columns so far are padding; without any no row."""
        if not self.columns:
            self._set_no_rows()
        for row, length in enumerate(self.lengths):
            if not length:
                self.padding[row], self.origins[row] = self.columns, 0

    def _undo(self, step: Step) -> None:
        self.slots.release(step.put_slots)
        self.pages.release(step.taken)
        self.counts[:] = step.before
        step.clear()

    # Marks

    def mark(self, mask: np.ndarray) -> None:
        """Say which tokens of the next T columns may be packed, ``bool [B, T]``: see ``KVCache.mark``.

        Raises:
            QJLError: if it is for another number of rows.
        """
        if self.batch and len(mask) != self.batch:
            raise QJLError(f"the cache holds {self.batch} rows, and the token mask is for {len(mask)}.")
        known = np.ones((len(mask), self.columns), bool)
        if self.marks is not None:
            known[:, : self.marks.shape[1]] = self.marks[:, : self.columns]
            known[:, self.marks.shape[1] :] = False
        self.marks = np.concatenate([known, mask], axis=1)

    # Cropping

    def crop(self, columns: int) -> None:
        """Keep the first columns, and touch none of their tokens; if any go, marks of later columns are forgotten."""
        if columns >= self.columns:
            return
        self.columns = max(columns, 0)
        self.left_out = self.left_out if self.columns else 0
        for row in range(self.batch):
            self.padding[row] = min(self.padding[row], self.columns)
            self.crop_row(row, self.columns - self.padding[row])
        if self.marks is not None:
            self.marks = self.marks[:, : self.columns]

    def crop_row(self, row: int, length: int) -> None:
        """Keep the first tokens of a row; by itself for rows that were never given as columns."""
        if length >= self.lengths[row]:
            return
        self.lengths[row] = length
        count = int(np.searchsorted(self.token_of[row, : self.counts[row]], length))
        self.slots.release(self.slot_of[row, count : self.counts[row]])
        self.counts[row] = count
        blocks = min(self.blocks[row], -(-length // BLOCK))
        if blocks and length % BLOCK and blocks * BLOCK > length:
            if self.table[row, blocks - 1] == HOLE:  # its tokens are exact: it may be decided anew
                blocks -= 1
            else:
                inside = self.partial[row].get(blocks - 1, BLOCK)
                self.partial[row][blocks - 1] = min(inside, length - (blocks - 1) * BLOCK)
        dropped = self.table[row, blocks : self.blocks[row]]
        self.pages.release(dropped[dropped != HOLE])
        self.table[row, blocks : self.blocks[row]] = HOLE
        self.blocks[row] = blocks
        self.partial[row] = {block: inside for block, inside in self.partial[row].items() if block < blocks}
        self.ends[row] = self._end_of(row)

    # What is held

    def _end_of(self, row: int) -> int:
        last = self.blocks[row] - 1
        return last * BLOCK + self.partial[row].get(last, BLOCK) if last >= 0 else 0

    @property
    def packed_tokens(self) -> list[int]:
        """Tokens that are read as codes, per row."""
        return [self._packed_tokens(row) for row in range(self.batch)]

    def _packed_tokens(self, row: int) -> int:
        blocks = self.blocks[row]
        inside = np.full(blocks, BLOCK)
        for block, count in self.partial[row].items():
            inside[block] = count
        inside -= (self.sinks - np.arange(blocks) * BLOCK).clip(0, inside)
        return int(inside[self.table[row, :blocks] != HOLE].sum())

    @property
    def has_uneven_pages(self) -> bool:
        """Whether a page within a row has codes of fewer than 64 tokens: lengths alone do not tell what is read."""
        return any(block < blocks - 1 for blocks, of in zip(self.blocks, self.partial, strict=True) for block in of)

    @property
    def tokens_until_due(self) -> int:
        """How many tokens may come at once with the result of one by one: until a block is decided."""
        if not self.batch or not self.packs:
            return 1
        ends = [(self._next_block(row) + 1) * BLOCK + self.recent for row in range(self.batch)]
        return max(1, min(end - length for end, length in zip(ends, self.lengths, strict=True)))

    def held(self, rows: Sequence[int] | None = None) -> tuple[Integers, Integers]:
        """Slots and pages in use, by some rows or by all: each once, in the order of rows and their tokens."""
        some = range(self.batch) if rows is None else rows
        return _once(self.slot_of[row, : self.counts[row]] for row in some), _once(map(self._pages_of, some))

    def renumber(self) -> tuple[Integers, Integers]:
        """Number the slots and the pages that are in use without gaps; returns which they were."""
        assert self.step is None
        slots, pages = self.held()
        is_exact = np.arange(self.slot_of.shape[1]) < self.counts[:, None]
        self.slot_of[:] = _renumbered(self.slot_of, is_exact, slots, 0)
        is_page = np.arange(self.table.shape[1]) < np.array(self.blocks, np.int64)[:, None]
        self.table[:] = _renumbered(self.table, is_page & (self.table != HOLE), pages, HOLE)
        self.slots.renumber(slots)
        self.pages.renumber(pages)
        return slots, pages

    # Files

    def arrays(self) -> dict[str, np.ndarray]:
        """All rows by name; slots and pages have the numbers of their places in ``held``.

        - ``columns`` int64 []. ``lengths``, ``padding``, ``origins``, ``blocks``, ``counts`` int64 [B]: of each row its
          tokens, left padding, RoPE position of token 0, blocks in its table, and exact tokens.
        - ``table`` int32 [B, blocks]: pages, -1 for a hole. ``partial`` int64 [n, 3]: row, block and how many tokens of
          it are in codes, where these are fewer than 64.
        - ``slots`` int32 and ``tokens`` int64 [B, most exact tokens]: where exact tokens are, and which they are; 0
          beyond ``counts``.
        - ``marks`` bool [B, T]: which columns may be packed; only if there was a mask.
        - ``left_out`` int64 []: columns that were read besides and are not held; only if there are any.
        """
        exact, blocks = max(self.counts.tolist(), default=0), max(self.blocks, default=0)
        slots, pages = self.held()
        is_exact = np.arange(exact) < self.counts[:, None]
        is_page = (np.arange(blocks) < np.array(self.blocks)[:, None]) & (self.table[:, :blocks] != HOLE)
        partial = [(row, block, count) for row, of in enumerate(self.partial) for block, count in sorted(of.items())]
        held = {} if self.marks is None else {"marks": self.marks}
        if self.left_out:
            held["left_out"] = np.array(self.left_out, np.int64)
        return held | {
            "columns": np.array(self.columns, np.int64),
            "lengths": np.array(self.lengths, np.int64),
            "padding": np.array(self.padding, np.int64),
            "origins": self.origins.copy(),
            "blocks": np.array(self.blocks, np.int64),
            "counts": self.counts.astype(np.int64),
            "table": _renumbered(self.table[:, :blocks], is_page, pages, HOLE),
            "partial": np.array(partial, np.int64).reshape(-1, 3),
            "slots": _renumbered(self.slot_of[:, :exact], is_exact, slots, 0),
            "tokens": np.where(is_exact, self.token_of[:, :exact], 0),
        }

    def restore(self, arrays: Mapping[str, np.ndarray], slots: int, pages: int) -> None:
        """Hold the rows that ``arrays`` told of, in the first ``slots`` and ``pages``; the index is a new one.

        Raises:
            QJLError: if an array is missing or of another shape or type, or a row does not hold each token once.
        """
        rows = _Rows(arrays)
        self.columns = int(rows.columns)
        self.padding, self.lengths, self.blocks = (
            [int(number) for number in of] for of in (rows.padding, rows.lengths, rows.blocks)
        )
        self.partial = [dict(of) for of in rows.partial]
        self.marks, self.left_out = rows.marks, int(rows.left_out)
        self._set_arrays(
            (
                rows.origins,
                rows.counts.astype(np.int32),
                np.zeros(len(rows.counts), np.int32),
                rows.table,
                rows.slots,
                rows.tokens,
            )
        )
        for row in range(self.batch):
            self._require_row(row, slots, pages)
            self.ends[row] = self._end_of(row)
        self._own(self.slots, slots, [self.slot_of[row, : self.counts[row]] for row in range(self.batch)])
        self._own(self.pages, pages, [self._pages_of(row) for row in range(self.batch)])

    @staticmethod
    def _own(places: Places, count: int, owned: Iterable[Integers]) -> None:
        """Give places the owners that they have; those without one are free."""
        taken = places.take(count)
        for of_row in owned:
            places.share(of_row)
        places.release(taken)

    def _require_row(self, row: int, slots: int, pages: int) -> None:
        """Raises QJLError unless each token of a row is held once, and sinks as exact ones."""
        length, blocks, count = self.lengths[row], self.blocks[row], int(self.counts[row])
        numbers, tokens, table = self.slot_of[row, :count], self.token_of[row, :count], self.table[row, :blocks]
        sizes = (length, self.padding[row], blocks, count)
        fits = min(sizes) >= 0 and blocks <= self.table.shape[1] and count <= self.slot_of.shape[1]
        fits = fits and not (self.columns and length and self.padding[row] + length > self.columns)
        fits = fits and bool(((numbers >= 0) & (numbers < slots)).all() and ((table >= HOLE) & (table < pages)).all())
        fits = fits and all(0 <= block < blocks and 0 < part < BLOCK for block, part in self.partial[row].items())
        if not fits or not _are_held_once(length, self.sinks, tokens, table, self.partial[row]):
            raise QJLError(f"row {row} does not hold each of {length} tokens once.")


class _Rows:
    """The arrays of ``TokenIndex.restore``, of the types and shapes that they should have."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.columns = self._array("columns", np.int64)
        self.lengths = self._array("lengths", np.int64, -1)
        batch = len(self.lengths)
        self.padding, self.origins, self.blocks, self.counts = (
            self._array(name, np.int64, batch) for name in ("padding", "origins", "blocks", "counts")
        )
        self.table = self._array("table", np.int32, batch, -1)
        self.slots = self._array("slots", np.int32, batch, -1)
        self.tokens = self._array("tokens", np.int64, *self.slots.shape)
        self.marks = self._array("marks", np.bool_, batch, -1) if "marks" in arrays else None
        self.left_out = self._array("left_out", np.int64) if "left_out" in arrays else 0
        self.partial: list[dict[int, int]] = [{} for _ in range(batch)]
        for row, block, count in self._array("partial", np.int64, -1, 3).tolist():
            if not 0 <= row < batch:
                raise QJLError(f"there is no row {row} with a block of {count} tokens in codes.")
            self.partial[row][block] = count

    def _array(self, name: str, dtype: type, *shape: int) -> Any:
        """A copy; a size of -1 may be any."""
        array = self._arrays.get(name)
        if array is None:
            raise QJLError(f"there is no array {name!r} of the index.")
        sizes = zip(array.shape, shape, strict=False)
        if array.dtype != dtype or array.ndim != len(shape) or any(want not in (-1, size) for size, want in sizes):
            raise QJLError(f"the array {name!r} of the index is {array.dtype} {list(array.shape)}.")
        return np.array(array, order="C")


def _once(of_rows: Iterable[Integers]) -> Integers:
    """Each number once, in the order in which they come first."""
    numbers = np.concatenate([np.zeros(0, np.int32), *of_rows])
    _, first = np.unique(numbers, return_index=True)
    return numbers[np.sort(first)]


def _renumbered(numbers: Integers, is_one: np.ndarray, places: Integers, otherwise: int) -> Integers:
    """The place of each number in ``places``; another number where there is none."""
    place_of = np.zeros(int(places.max(initial=-1)) + 1, np.int32)
    place_of[places] = np.arange(len(places))
    out = np.full(numbers.shape, otherwise, np.int32)
    out[is_one] = place_of[numbers[is_one]]
    return out


def _are_held_once(length: int, sinks: int, tokens: Integers, table: Integers, partial: Mapping[int, int]) -> bool:
    """Whether each token is an exact one or in a page, sinks exact, and exact ones ascend."""
    inside = np.where(table == HOLE, 0, BLOCK)
    for block, count in partial.items():
        inside[block] = min(inside[block], count)
    is_coded = (np.arange(BLOCK) < inside[:, None]).reshape(-1)
    if is_coded[length:].any() or (len(tokens) and not (tokens[0] >= 0 and tokens[-1] < length)):
        return False
    is_held = np.zeros(length, np.int32)
    is_held[: len(is_coded)] = is_coded[:length]
    is_held[:sinks] = 0
    is_held[tokens] += 1
    return bool((np.diff(tokens) > 0).all() and (is_held == 1).all())


def bool_rows(mask: Tensor) -> np.ndarray:
    """``bool [B, T]`` as numbers.

    Raises:
        QJLError: if the mask is of another kind.
    """
    if mask.dim() != 2 or str(mask.dtype) != "torch.bool":
        raise QJLError(f"a token mask is bool [B, T], not {mask.dtype} {list(mask.shape)}.")
    return mask.cpu().numpy()
