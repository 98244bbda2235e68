"""Which tokens of a batch are read packed and which exactly, and what is written where: numbers only, no tensors.

A *page* holds the codes of ``page_tokens`` tokens of one sequence. A *line* of the exact pool holds the exact tokens
of one page: those at the end of a running sequence. Fresh tokens go to the line of their page; when the page is full,
or its line is needed for another page, they are encoded into the page. So every token is in its page or in a line, and
a page that is full is always in codes, as those who share it expect. First tokens of a sequence (``sinks``) are also
kept in *sink lines*, by the sequence's first page.

Pages are named by whoever owns them. A write to a page's first token says that the page has a new owner. All rows of a
step are planned at once, over arrays, so that a step of many rows costs little more than one of few; tables of pages
are read only where a row writes or may read exact tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qjl.errors import QJLError
from qjl.packed import BLOCK
from qjl.vllm.host_tables import Integers, Pages

Bools = np.ndarray
NONE = -1
_FIRST_PAGES = 1024  # that there is room for, at first


@dataclass(frozen=True)
class PoolShape:
    """Where exact tokens are: ``lines`` of ``page_tokens`` slots, then ``sink_lines`` of ``sinks`` slots."""

    page_tokens: int
    sinks: int
    lines: int
    sink_lines: int

    @classmethod
    def of(cls, page_tokens: int, sinks: int, recent: int, sequences: int, most_queries: int) -> PoolShape:
        """Lines enough for so many sequences at once, also for those with ``most_queries`` fresh tokens."""
        lines = sequences * (1 + -(-(recent + most_queries - 1) // page_tokens))
        return cls(page_tokens, sinks, lines, 2 * sequences if sinks else 0)

    @property
    def slots(self) -> int:
        return self.lines * self.page_tokens + self.sink_lines * self.sinks

    @property
    def first_sink_slot(self) -> int:
        return self.lines * self.page_tokens


@dataclass(frozen=True, eq=False)
class Requests:
    """The sequences of a step, their fresh tokens one behind the other in a batch.

    ``context [R]``: tokens before the step; ``fresh [R]``: tokens in the step; ``pages(rows, places)``: which page
    is that of a row at each of some places in its table.
    """

    context: Integers
    fresh: Integers
    pages: Pages

    @cached_property
    def starts(self) -> Integers:
        """Where in the batch the tokens of each row begin."""
        return self.fresh.cumsum() - self.fresh


@dataclass(frozen=True, eq=False)
class Encoding:
    """Tokens to be encoded, 64 at a time.

    ``sources [n * 64]`` are slots of the pool, or tokens of the batch; ``first [n]`` is the position of the first of
    each 64. Of these tokens ``columns [m]`` are kept: codes of ``columns[i]`` belong to ``pages[i]`` at ``offsets[i]``.
    """

    sources: Integers
    first: Integers
    columns: Integers
    pages: Integers
    offsets: Integers

    @classmethod
    def of(
        cls, begin: Integers, counts: Integers, positions: Integers, kept: Integers, pages: Integers, offsets: Integers
    ) -> Encoding:
        """Runs of ``counts`` sources from ``begin`` and positions from ``positions`` on.

        Of a run all but the first ``kept`` tokens have codes to be kept, in ``pages`` at ``offsets``, one for each.
        """
        blocks = -(-counts // BLOCK)
        inside = ranges(np.zeros_like(blocks), blocks * BLOCK)
        last = np.repeat(counts - 1, blocks * BLOCK)
        return cls(
            np.repeat(begin, blocks * BLOCK) + np.minimum(inside, last),
            np.repeat(positions, blocks) + BLOCK * ranges(np.zeros_like(blocks), blocks),
            ranges((np.cumsum(blocks) - blocks) * BLOCK + kept, counts - kept),
            pages,
            offsets,
        )

    @classmethod
    def none(cls) -> Encoding:
        return cls(*(np.zeros(0, np.int64) for _ in range(5)))

    def __len__(self) -> int:
        return len(self.first)

    @property
    def whole_pages(self) -> Integers | None:
        """The page of each 64 tokens, where every 64 are one page, all of whose codes are kept."""
        if len(self.columns) < len(self.sources):
            return None
        offsets, pages = self.offsets.reshape(-1, BLOCK), self.pages.reshape(-1, BLOCK)
        is_whole = (offsets == np.arange(BLOCK)).all() and (pages == pages[:, :1]).all()
        return pages[:, 0] if is_whole else None


@dataclass(eq=False)
class BlockPlan:
    """What one step does, in this order: ``rescued`` is encoded from the pool, tokens ``put_tokens`` of the batch are
    copied to ``put_slots`` of the pool, ``filled`` is encoded from the pool and ``direct`` from the batch, and every
    row is read: tokens ``skip`` to ``packed`` from pages; the first ``skip`` from slots of the pool that follow
    ``sinks``, those from ``packed`` to its context from ``lines [R, n]``, that of the last page first.

    ``is_together [R]``: rows with few fresh tokens, all of which have slots in lines. ``is_apart``: whether no row
    reads what another one writes in this step, so that these rows may put their tokens when they attend. ``own``: which
    of the tokens that are put go to their line.
    """

    rescued: Encoding = field(default_factory=Encoding.none)
    put_tokens: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    put_slots: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    filled: Encoding = field(default_factory=Encoding.none)
    direct: Encoding = field(default_factory=Encoding.none)
    own: Bools = field(default_factory=lambda: np.zeros(0, bool))
    skip: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    packed: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    sinks: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    lines: Integers = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    is_together: Bools = field(default_factory=lambda: np.zeros(0, bool))
    is_apart: bool = True

    def slots(self, row: int, context: int, page_tokens: int) -> Integers:
        """Of the exact tokens of a row's context, in order."""
        tokens = np.arange(self.packed[row], context)
        lines = self.lines[row, (context - 1) // page_tokens - tokens // page_tokens]
        return np.concatenate([self.sinks[row] + np.arange(self.skip[row]), lines * page_tokens + tokens % page_tokens])


@dataclass(frozen=True, eq=False)
class _Writes:
    """Parts of pages that a step writes, in the order of the batch: tokens ``offset`` to ``stop`` of ``pages``."""

    rows: Integers
    places: Integers
    pages: Integers
    offset: Integers
    stop: Integers
    tokens: Integers  # where in the batch each part begins

    @property
    def counts(self) -> Integers:
        return self.stop - self.offset


@dataclass(frozen=True, eq=False)
class _Windows:
    """``places [R, n]`` in tables, the last first, and their ``pages``, NONE beside the window; ``first [R]`` pages."""

    places: Integers
    pages: Integers
    first: Integers


class BlockPlanner:
    """The state of the exact pool, and one plan per step.

    ``recent``: a page is read packed once all of its tokens are older than the last ``recent`` of the context. Lines
    are used again least recently used first, and never those that the step at hand reads or writes. Rows with a context
    and at most ``most_queries`` fresh tokens attend together, if there are lines for these.

    Raises:
        QJLError: if the sinks do not fit the first page, which is all that sequences surely share.
    """

    def __init__(self, shape: PoolShape, recent: int, most_queries: int = 1) -> None:
        if shape.sinks > shape.page_tokens:
            raise QJLError(
                f"{shape.sinks} exact first tokens do not fit pages of {shape.page_tokens}: give vLLM a --block-size "
                f"of at least {shape.sinks}, or choose a preset with fewer sinks."
            )
        self.shape = shape
        self.recent = recent
        self.most_queries = most_queries
        self.step = 0
        self.missed_sinks = 0  # readings of first tokens from codes, because their sink line was used again
        self._lines = _Lines(shape.lines)
        self._sinks = _Lines(shape.sink_lines)
        # of the line's page: where it begins, which of its tokens are exact here, and from which on it lacks codes
        self._position, self._start, self._fill, self._packed = (np.zeros(shape.lines, np.int64) for _ in range(4))
        self._sink_fill = np.zeros(shape.sink_lines, np.int64)

    @property
    def most_exact(self) -> int:
        """Exact tokens, its fresh ones with them, that a row which attends together with others reads at most."""
        return self.shape.sinks + self.recent + self.shape.page_tokens - 1 + self.most_queries

    def plan(self, requests: Requests) -> BlockPlan:
        """What the next step does."""
        self.step += 1
        plan = BlockPlan()
        context, size = requests.context, self.shape.page_tokens
        total = context + requests.fresh
        places, is_in_window = self._windows(context)
        rows, written = _written(context, total, size)
        every = np.arange(len(context))
        pages = requests.pages(
            np.concatenate([every, rows, np.repeat(every, places.shape[1])]),
            np.concatenate([np.zeros_like(context), written, places.ravel()]),
        )
        for of in (self._lines, self._sinks):
            of.reserve(int(pages.max(initial=0)) + 1)
        first, of_writes, around = np.split(pages, [len(context), len(context) + len(rows)])
        around = around.reshape(places.shape)
        windows = _Windows(places, np.where(is_in_window, around, NONE), np.where(context > 0, first, NONE))
        self._lines.touch(windows.pages, self.step)
        self._sinks.touch(windows.first, self.step)
        begin = written * size
        offset, stop = np.maximum(context[rows] - begin, 0), np.minimum(total[rows] - begin, size)
        tokens = (requests.starts - context)[rows] + begin + offset
        writes = _Writes(rows, written, of_writes, offset, stop, tokens)
        may_be = (context > 0) & (requests.fresh > 0) & (requests.fresh <= self.most_queries)
        has_line = self._write(writes, total, may_be, plan)
        self._write_sinks(writes, plan)
        plan.is_together = may_be & (np.bincount(rows[~has_line], minlength=len(context)) == 0)
        self._read(context, windows, plan)  # of a page that another row fills right now, too
        # pages before a row's last one are older: of a cached prefix, the end is forgotten first
        filled = of_writes[stop == size]
        plan.is_apart = not len(filled) or not np.isin(around[(context > 0) & (context % size == 0), 0], filled).any()
        return plan

    def _windows(self, context: Integers) -> tuple[Integers, Bools]:
        """Places in the table from that of a row's last token backwards, and which are read exactly if they can be."""
        size = self.shape.page_tokens
        last, first = (context - 1) // size, np.maximum(context - self.recent, 0) // size
        places = last[:, None] - np.arange(max(int((last - first).max(initial=0)) + 1, 1))
        return places.clip(min=0), (places >= first[:, None]) & (context > 0)[:, None]

    # Writing

    def _write(self, writes: _Writes, total: Integers, may_attend_together: Bools, plan: BlockPlan) -> Bools:
        """Which of the parts have a line."""
        size, pages = self.shape.page_tokens, writes.pages
        renamed = pages[writes.offset == 0]
        self._lines.forget(renamed)
        self._sinks.forget(renamed)
        self._lines.touch(pages, self.step)
        lines = self._lines.of(pages)
        is_late = (writes.places + 1) * size > (total - self.recent)[writes.rows]
        wanted = ((lines == NONE) & (is_late | may_attend_together[writes.rows])).nonzero()[0]
        if len(wanted):
            lines[wanted] = self._new_lines(writes, wanted, plan)
        has_line = lines != NONE
        held, offset, stop = lines[has_line], writes.offset[has_line], writes.stop[has_line]
        self._start[held] = np.minimum(self._start[held], offset)
        self._packed[held] = np.minimum(self._packed[held], offset)
        self._fill[held] = stop
        plan.put_tokens = ranges(writes.tokens[has_line], stop - offset)
        plan.put_slots = ranges(held * size + offset, stop - offset)
        plan.own = np.ones(len(plan.put_slots), bool)
        full = held[stop == size]
        if len(full):
            plan.filled = self._encoded(full)
        if not has_line.all():
            plan.direct = _direct(writes, ~has_line, size)
        return has_line

    def _new_lines(self, writes: _Writes, wanted: Integers, plan: BlockPlan) -> Integers:
        """Lines for these parts; NONE for the last ones if the step at hand uses all there are."""
        evicted = self._lines.oldest(len(wanted) - len(self._lines.free), self.step)
        lacking = evicted[self._packed[evicted] < self._fill[evicted]]
        if len(lacking):
            plan.rescued = self._encoded(lacking)
        self._lines.give_back(evicted)
        lines = self._lines.take(writes.pages[wanted], self.step)
        taken, placed = lines[lines != NONE], wanted[lines != NONE]
        self._position[taken] = writes.places[placed] * self.shape.page_tokens
        for of in (self._start, self._fill, self._packed):
            of[taken] = writes.offset[placed]
        return lines

    def _encoded(self, lines: Integers) -> Encoding:
        """What lines have that their pages lack."""
        kept, fill = self._packed[lines], self._fill[lines]
        pages, offsets = np.repeat(self._lines.pages[lines], fill - kept), ranges(kept, fill - kept)
        self._packed[lines] = fill
        return Encoding.of(lines * self.shape.page_tokens, fill, self._position[lines], kept, pages, offsets)

    def _write_sinks(self, writes: _Writes, plan: BlockPlan) -> None:
        """First tokens of sequences, of which few are written in most steps."""
        sinks = self.shape.sinks
        tokens, slots = [], []
        for part in ((writes.places == 0) & (writes.offset < sinks)).nonzero()[0].tolist():
            page, start = int(writes.pages[part]), int(writes.offset[part])
            stop = min(int(writes.stop[part]), sinks)
            line = self._new_sink_line(page) if start == 0 else int(self._sinks.of(np.array([page]))[0])
            if line == NONE or self._sink_fill[line] < start:
                continue
            self._sinks.used[line] = self.step
            self._sink_fill[line] = stop
            first_slot = self.shape.first_sink_slot + line * sinks
            tokens.append(writes.tokens[part] + np.arange(stop - start))
            slots.append(np.arange(first_slot + start, first_slot + stop))
        if tokens:
            plan.put_tokens = np.concatenate([plan.put_tokens, *tokens])
            plan.put_slots = np.concatenate([plan.put_slots, *slots])
            plan.own = np.arange(len(plan.put_slots)) < len(plan.own)

    def _new_sink_line(self, page: int) -> int:
        if not self._sinks.free:
            self._sinks.give_back(self._sinks.oldest(1, self.step))
        line = int(self._sinks.take(np.array([page]), self.step)[0])
        if line != NONE:
            self._sink_fill[line] = 0
        return line

    # Reading

    def _read(self, context: Integers, windows: _Windows, plan: BlockPlan) -> None:
        size, lines = self.shape.page_tokens, self._lines.of(windows.pages)
        start = _at(self._start, lines)
        has_some = (lines != NONE) & (start < context[:, None] - windows.places * size)
        goes_on = np.ones_like(has_some)
        goes_on[:, 1:] = (start == 0)[:, :-1]
        is_read = np.logical_and.accumulate(has_some & goes_on, 1)
        count = is_read.sum(1)
        last = (np.arange(len(context)), (count - 1).clip(min=0))
        plan.packed = np.where(count > 0, windows.places[last] * size + start[last], context)
        plan.lines = np.where(is_read, lines, NONE)
        sinks = self._sinks.of(windows.first)
        plan.skip = np.where(sinks != NONE, np.minimum(_at(self._sink_fill, sinks), plan.packed), 0)
        plan.sinks = self.shape.first_sink_slot + sinks * self.shape.sinks
        self.missed_sinks += int(((sinks == NONE) & (np.minimum(plan.packed, self.shape.sinks) > 0)).sum())


class _Lines:
    """Lines that pages have, one each, found by the page."""

    def __init__(self, count: int) -> None:
        self.pages = np.full(count, NONE, np.int64)
        self.used = np.zeros(count, np.int64)  # the last step that used it
        self.free = list(range(count - 1, -1, -1))
        self._of = np.full(_FIRST_PAGES, NONE, np.int64)  # the last one is no page

    def of(self, pages: Integers) -> Integers:
        """The line of each page, or NONE."""
        return self._of[pages]  # NONE is the last one

    def reserve(self, pages: int) -> None:
        """Make room for so many pages."""
        if pages >= len(self._of):
            more = max(pages + 1 - len(self._of), len(self._of))
            self._of = np.pad(self._of, (0, more), constant_values=NONE)

    def touch(self, pages: Integers, step: int) -> None:
        """The lines of these pages are used in a step."""
        lines = self.of(pages)
        self.used[lines[lines != NONE]] = step

    def forget(self, pages: Integers) -> None:
        """These pages have new owners."""
        lines = self.of(pages)
        self.give_back(lines[lines != NONE])

    def give_back(self, lines: Integers) -> None:
        """They are free."""
        if len(lines):
            self._of[self.pages[lines]] = NONE
            self.pages[lines] = NONE
            self.free += lines.tolist()

    def oldest(self, count: int, step: int) -> Integers:
        """So many lines that were not used in a step, least recently used first; fewer if there are no more."""
        if count <= 0:
            return np.zeros(0, np.int64)
        lines = ((self.pages != NONE) & (self.used < step)).nonzero()[0]
        return lines[np.argsort(self.used[lines], kind="stable")[:count]]

    def take(self, pages: Integers, step: int) -> Integers:
        """A line for each page; NONE for the last ones if there are too few."""
        lines = np.full(len(pages), NONE, np.int64)
        count = min(len(pages), len(self.free))
        taken = [self.free.pop() for _ in range(count)]
        lines[:count] = taken
        self._of[pages[:count]], self.pages[taken], self.used[taken] = taken, pages[:count], step
        return lines


def _at(values: Integers, lines: Integers) -> Integers:
    """Of each line, and anything where there is none."""
    return values[lines] if len(values) else np.zeros_like(lines)


def ranges(begin: Integers, counts: Integers) -> Integers:
    """``begin[i], begin[i] + 1, ...``: ``counts[i]`` numbers of each, one behind the other."""
    if (counts == 1).all():
        return begin
    ends = counts.cumsum()
    return (begin - ends + counts).repeat(counts) + np.arange(ends[-1])


def _written(context: Integers, total: Integers, size: int) -> tuple[Integers, Integers]:
    """Rows, and places in their tables, of all pages that a step writes."""
    first = context // size
    counts = np.where(total > context, (total - 1) // size - first + 1, 0)
    return np.repeat(np.arange(len(context)), counts), ranges(first, counts)


def _direct(writes: _Writes, chosen: Bools, size: int) -> Encoding:
    """Codes of parts without a line; those that follow each other in a row are encoded together."""
    rows, places, counts = writes.rows[chosen], writes.places[chosen], writes.counts[chosen]
    begins = np.ones(len(rows), bool)
    begins[1:] = (np.diff(rows) != 0) | (np.diff(places) != 1)
    run = np.cumsum(begins) - 1
    run_counts = np.bincount(run, counts).astype(np.int64)
    position = (places * size + writes.offset[chosen])[begins]
    pages, offsets = np.repeat(writes.pages[chosen], counts), ranges(writes.offset[chosen], counts)
    return Encoding.of(writes.tokens[chosen][begins], run_counts, position, np.zeros_like(run_counts), pages, offsets)
