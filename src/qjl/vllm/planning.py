"""Which tokens of a batch are read packed and which exactly, and what is written where: numbers only, no tensors.

A *page* holds the codes of ``page_tokens`` tokens of one sequence. A *line* of the exact pool holds the exact tokens
of one page: those at the end of a running sequence. Fresh tokens go to the line of their page; when the page is full,
or its line is needed for another page, they are encoded into the page. So every token is in its page or in a line, and
a page that is full is always in codes, as those who share it expect. First tokens of a sequence (``sinks``) are also
kept in *sink lines*, by the sequence's first page.

Pages are named by whoever owns them. A write to a page's first token says that the page has a new owner.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from qjl.errors import QJLError
from qjl.packed import BLOCK

Integers = np.ndarray


@dataclass(frozen=True)
class PoolShape:
    """Where exact tokens are: ``lines`` of ``page_tokens`` slots, then ``sink_lines`` of ``sinks`` slots."""

    page_tokens: int
    sinks: int
    lines: int
    sink_lines: int

    @property
    def slots(self) -> int:
        return self.lines * self.page_tokens + self.sink_lines * self.sinks

    def line_slot(self, line: int, offset: int) -> int:
        return line * self.page_tokens + offset

    def sink_slot(self, sink_line: int, token: int) -> int:
        return self.lines * self.page_tokens + sink_line * self.sinks + token


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence of a step: its pages, its tokens before the step, its tokens in the step."""

    pages: Sequence[int]
    context: int
    fresh: int


@dataclass(frozen=True, eq=False)
class Reading:
    """How the context of one sequence is read.

    Tokens ``skip`` to ``packed`` are read from pages, the first ``skip`` and those from ``packed`` on from ``slots``
    of the pool, in this order.
    """

    skip: int
    packed: int
    slots: list[int]


@dataclass(eq=False)
class Encoding:
    """Tokens to be encoded, 64 at a time.

    ``sources [n * 64]`` are slots of the pool, or tokens of the batch; ``first [n]`` is the position of the first of
    each 64. Of these tokens ``columns [m]`` are kept: codes of ``columns[i]`` belong to ``pages[i]`` at ``offsets[i]``.
    """

    sources: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.first)

    def add(self, sources: Sequence[int], position: int, kept: int, page: int, offset: int) -> None:
        """Tokens that follow each other from ``position`` on; from the ``kept``-th on they belong to the page."""
        begin = len(self.sources)
        padding = -len(sources) % BLOCK
        self.sources += [*sources, *[sources[-1]] * padding]
        self.first += range(position, position + len(sources) + padding, BLOCK)
        self.columns += range(begin + kept, begin + len(sources))
        self.pages += [page] * (len(sources) - kept)
        self.offsets += range(offset, offset + len(sources) - kept)


@dataclass(eq=False)
class Plan:
    """What one step does, in this order: ``rescued`` is encoded from the pool, tokens ``put_tokens`` of the batch are
    copied to ``put_slots`` of the pool, ``filled`` is encoded from the pool and ``direct`` from the batch, and every
    sequence is read as ``readings`` say.
    """

    rescued: Encoding = field(default_factory=Encoding)
    put_tokens: list[int] = field(default_factory=list)
    put_slots: list[int] = field(default_factory=list)
    filled: Encoding = field(default_factory=Encoding)
    direct: Encoding = field(default_factory=Encoding)
    readings: list[Reading] = field(default_factory=list)


@dataclass(eq=False)
class _Line:
    """Offsets ``start`` to ``fill`` of a page are exact here; those before ``packed`` have codes in the page."""

    index: int
    position: int
    start: int
    fill: int
    packed: int
    step: int = 0


@dataclass(eq=False)
class _SinkLine:
    """The first ``fill`` tokens of the sequences that begin with a page."""

    index: int
    fill: int
    step: int = 0


class Planner:
    """The state of the exact pool, and one plan per step.

    ``recent``: a page is read packed once all of its tokens are older than the last ``recent`` of the context. Lines
    are used again least recently used first, and never those that the step at hand reads or writes.

    Raises:
        QJLError: if the sinks do not fit the first page, which is all that sequences surely share.
    """

    def __init__(self, shape: PoolShape, recent: int) -> None:
        if shape.sinks > shape.page_tokens:
            raise QJLError(
                f"{shape.sinks} exact first tokens do not fit pages of {shape.page_tokens}: give vLLM a --block-size "
                f"of at least {shape.sinks}, or choose a preset with fewer sinks."
            )
        self.shape = shape
        self.recent = recent
        self.step = 0
        self.rescues = 0  # lines taken from sequences that may still need them
        self.missed_sinks = 0  # readings of first tokens from codes, because their sink line was used again
        self._lines: OrderedDict[int, _Line] = OrderedDict()
        self._free = list(range(shape.lines - 1, -1, -1))
        self._sinks: OrderedDict[int, _SinkLine] = OrderedDict()
        self._free_sinks = list(range(shape.sink_lines - 1, -1, -1))

    def plan(self, requests: Sequence[Request]) -> Plan:
        """What the next step does. Its tokens are those of the requests, one request after the other."""
        self.step += 1
        plan = Plan()
        for request in requests:
            self._pin(request)
        token = 0
        for request in requests:
            self._write(request, token, plan)
            token += request.fresh
        plan.readings = [self._read(request) for request in requests]  # of a page that another one fills right now, too
        return plan

    def _window(self, request: Request) -> Iterator[tuple[int, int]]:
        """Pages that are read exactly where they can be, the last one first: index in the sequence, and name."""
        page_tokens = self.shape.page_tokens
        first = max(0, request.context - self.recent) // page_tokens
        for index in range((request.context - 1) // page_tokens, first - 1, -1):
            yield index, request.pages[index]

    def _pin(self, request: Request) -> None:
        for _, page in self._window(request) if request.context else ():
            if page in self._lines:
                self._touch(self._lines, page)
        if request.context and request.pages[0] in self._sinks:
            self._touch(self._sinks, request.pages[0])

    def _touch(self, of: OrderedDict, page: int) -> None:
        of[page].step = self.step
        of.move_to_end(page)

    def _write(self, request: Request, token: int, plan: Plan) -> None:
        page_tokens, total = self.shape.page_tokens, request.context + request.fresh
        position = request.context
        while position < total:
            index, offset = divmod(position, page_tokens)
            count = min(page_tokens - offset, total - position)
            self._write_page(request.pages[index], position, count, total, token, plan)
            if index == 0:
                self._write_sinks(request, offset, offset + count, token, plan)
            position, token = position + count, token + count

    def _write_page(self, page: int, position: int, count: int, total: int, token: int, plan: Plan) -> None:
        page_tokens = self.shape.page_tokens
        offset = position % page_tokens
        if offset == 0:
            self._forget(page)
        end_of_page = position - offset + page_tokens
        line = self._lines.get(page)
        if line is None and end_of_page > total - self.recent:
            line = self._new_line(page, position, plan)
        if line is None:
            plan.direct.add(range(token, token + count), position, 0, page, offset)
            return
        self._touch(self._lines, page)
        line.start, line.packed = min(line.start, offset), min(line.packed, offset)
        line.fill = offset + count
        plan.put_tokens += range(token, token + count)
        plan.put_slots += range(self.shape.line_slot(line.index, offset), self.shape.line_slot(line.index, line.fill))
        if line.fill == page_tokens:
            self._encode_line(page, line, plan.filled)

    def _write_sinks(self, request: Request, start: int, stop: int, token: int, plan: Plan) -> None:
        """Tokens ``start`` to ``stop`` of a sequence, the first of which is a ``token`` of the batch."""
        stop = min(stop, self.shape.sinks)
        if start >= stop:
            return
        page = request.pages[0]
        sink = self._new_sink_line(page) if start == 0 else self._sinks.get(page)
        if sink is None or sink.fill < start:
            return
        self._touch(self._sinks, page)
        sink.fill = stop
        plan.put_tokens += range(token, token + stop - start)
        plan.put_slots += range(self.shape.sink_slot(sink.index, start), self.shape.sink_slot(sink.index, stop))

    def _read(self, request: Request) -> Reading:
        if not request.context:
            return Reading(0, 0, [])
        packed, window = request.context, []
        for index, page in self._window(request):
            line = self._lines.get(page)
            stop = min(request.context - index * self.shape.page_tokens, self.shape.page_tokens)
            if line is None or line.start >= stop:
                break
            window.append(range(self.shape.line_slot(line.index, line.start), self.shape.line_slot(line.index, stop)))
            packed = index * self.shape.page_tokens + line.start
            if line.start:
                break
        sinks = self._read_sinks(request, packed)
        return Reading(len(sinks), packed, [*sinks, *(slot for part in reversed(window) for slot in part)])

    def _read_sinks(self, request: Request, packed: int) -> Sequence[int]:
        sink = self._sinks.get(request.pages[0])
        if sink is None:
            self.missed_sinks += min(packed, self.shape.sinks) > 0
            return ()
        begin = self.shape.sink_slot(sink.index, 0)
        return range(begin, begin + min(sink.fill, packed))

    def _forget(self, page: int) -> None:
        """The page has a new owner."""
        if page in self._lines:
            self._free.append(self._lines.pop(page).index)
        if page in self._sinks:
            self._free_sinks.append(self._sinks.pop(page).index)

    def _new_line(self, page: int, position: int, plan: Plan) -> _Line | None:
        """A line for tokens of a page from ``position`` on; None if the step at hand uses all of them."""
        if not self._free:
            self._evict(plan)
        if not self._free:
            return None
        offset = position % self.shape.page_tokens
        line = _Line(self._free.pop(), position - offset, start=offset, fill=offset, packed=offset)
        self._lines[page] = line
        return line

    def _evict(self, plan: Plan) -> None:
        page, line = next(iter(self._lines.items()), (0, None))
        if line is None or line.step == self.step:
            return
        if line.packed < line.fill:
            self._encode_line(page, line, plan.rescued)
            self.rescues += 1
        del self._lines[page]
        self._free.append(line.index)

    def _encode_line(self, page: int, line: _Line, into: Encoding) -> None:
        slots = range(self.shape.line_slot(line.index, 0), self.shape.line_slot(line.index, line.fill))
        into.add(slots, line.position, line.packed, page, line.packed)
        line.packed = line.fill

    def _new_sink_line(self, page: int) -> _SinkLine | None:
        if not self._free_sinks and self._sinks:
            oldest, sink = next(iter(self._sinks.items()))
            if sink.step < self.step:
                del self._sinks[oldest]
                self._free_sinks.append(sink.index)
        if not self._free_sinks:
            return None
        self._sinks[page] = _SinkLine(self._free_sinks.pop(), 0)
        return self._sinks[page]
