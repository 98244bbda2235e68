"""A plan as tensors, made once for all layers: what rows read is kept from step to step, and changes where they do."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.ops.forms import Rows
from qjl.packed import to_device
from qjl.vllm.block_planner import BlockPlan, BlockPlanner, Bools, Encoding, Integers, PoolShape, Requests
from qjl.vllm.host_tables import Pages

_MOST_OPERANDS = 16
MOST_NUMBERS = 1 << 17  # of 4 bytes, that go to a device at once
STAGES = 4  # of copies under way; engines are one or two steps ahead of their device


@dataclass(frozen=True, eq=False)
class Targets:
    """An ``Encoding`` as tensors: where 64 tokens at a time come from, and where their codes go.

    Whole pages have no ``columns``, and one of ``pages`` for each 64 tokens; their numbers are ``int32``, as ``encode``
    takes them, but for ``first``.
    """

    sources: Tensor
    first: Tensor
    columns: Tensor | None
    pages: Tensor
    offsets: Tensor | None

    @classmethod
    def of(cls, encoding: Encoding, numbers: StepNumbers) -> Targets | None:
        if not len(encoding):
            return None
        first = numbers.take(encoding.first)
        if (whole := encoding.whole_pages) is not None:
            return cls(numbers.take(encoding.sources, np.int32), first, None, numbers.take(whole, np.int32), None)
        of_tokens = (encoding.columns, encoding.pages, encoding.offsets)
        return cls(numbers.take(encoding.sources), first, *(numbers.take(of) for of in of_tokens))


@dataclass(frozen=True, eq=False)
class Together:
    """Sequences with ``queries`` fresh tokens each that attend in one call: which of the batch, and what they read."""

    tokens: slice | Tensor
    queries: int
    rows: Rows


@dataclass(frozen=True, eq=False)
class Alone:
    """A sequence whose fresh tokens ``[begin, stop)`` of the batch attend by themselves: a chunk of a prompt.

    Of its context, tokens ``skip`` to ``packed`` are read from ``pages``, the first ``skip`` and those from ``packed``
    on from ``slots`` of the pool.
    """

    begin: int
    stop: int
    context: int
    skip: int
    packed: int
    pages: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class Puts:
    """``tokens`` of the batch, and the ``slots`` of the pool that they are copied to."""

    tokens: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class LayerStep:
    """What layers do in a step; ``puts`` are of tokens that attention does not put to slots itself.

    ``is_apart``: sequences that attend together put their tokens themselves, before ``filled`` is encoded.
    """

    rescued: Targets | None
    puts: Puts | None
    filled: Targets | None
    direct: Targets | None
    together: list[Together]
    alone: list[Alone]
    is_apart: bool


class Steps:
    """Plans each step of an engine, and keeps on the device what rows read.

    Args:
        shape: of the exact pool.
        recent, most_queries: as the planner takes them.
        sequences: how many a step has at most.
        device: of the layers.
    """

    def __init__(self, shape: PoolShape, recent: int, most_queries: int, sequences: int, device: torch.device) -> None:
        self.planner = BlockPlanner(shape, recent, most_queries)
        self._kept = _KeptRows(shape, sequences, self.planner.most_exact, device)
        self._numbers = StepNumbers(device)

    def next(self, totals: Integers, starts: Integers, table: Tensor, pages: Pages | None = None) -> LayerStep:
        """A step with tokens ``starts[b]`` to ``starts[b + 1]`` of the batch for row b, the last of its ``totals[b]``.

        ``table int32 [R, n]`` of pages lies on the layers' device, and keeps its contents as long as the step.
        ``pages`` reads it on the host; without it a table of another device is read back, which waits for that. Tensors
        of the step before are written anew, but on a CPU.

        Raises:
            QJLError: for more rows than there is room for.
        """
        fresh = np.diff(starts)
        requests = Requests(totals - fresh, fresh, pages or _pages_of(table))
        plan = self.planner.plan(requests)
        row_of = np.repeat(np.arange(len(fresh)), fresh)
        is_put = plan.own & plan.is_together[row_of[plan.put_tokens]]
        self._kept.update(plan, requests, row_of, is_put)
        step = LayerStep(
            Targets.of(plan.rescued, self._numbers),
            self._puts(plan, ~is_put if plan.is_apart else np.ones_like(is_put)),
            Targets.of(plan.filled, self._numbers),
            Targets.of(plan.direct, self._numbers),
            list(self._together(plan, requests, table)),
            list(self._alone(plan, requests, table)),
            plan.is_apart,
        )
        self._numbers.send()
        return step

    def _puts(self, plan: BlockPlan, chosen: Bools) -> Puts | None:
        if not chosen.any():
            return None
        return Puts(self._numbers.take(plan.put_tokens[chosen]), self._numbers.take(plan.put_slots[chosen]))

    def _together(self, plan: BlockPlan, requests: Requests, table: Tensor) -> Iterator[Together]:
        rows = plan.is_together.nonzero()[0]
        fresh, starts = requests.fresh[rows], requests.starts[rows]
        for queries in np.unique(fresh).tolist():
            of_group = fresh == queries
            group, begin = rows[of_group], starts[of_group]
            if group[-1] - group[0] == len(group) - 1:  # they follow each other, and so do their tokens
                tokens: slice | Tensor = slice(int(begin[0]), int(begin[-1]) + queries)
            else:
                tokens = self._numbers.take((begin[:, None] + np.arange(queries)).ravel())
            yield Together(tokens, queries, self._kept.operand(group, table))

    def _alone(self, plan: BlockPlan, requests: Requests, table: Tensor) -> Iterator[Alone]:
        size, starts = self.planner.shape.page_tokens, requests.starts
        for row in (~plan.is_together & (requests.fresh > 0)).nonzero()[0].tolist():
            begin, count, context = int(starts[row]), int(requests.fresh[row]), int(requests.context[row])
            skip, packed = int(plan.skip[row]), int(plan.packed[row])
            pages, slots = table[row, : -(-packed // size)].long(), plan.slots(row, context, size)
            yield Alone(begin, begin + count, context, skip, packed, pages, self._numbers.take(slots))


class _KeptRows:
    """Exact tokens of each row of the batch, and operands over them: rows that go on get their new tokens only.

    All lie in one buffer of the host and one of the device, both made once: for so many ``sequences`` of ``exact``
    tokens each.
    """

    def __init__(self, shape: PoolShape, sequences: int, exact: int, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._key = np.zeros((0, 0), np.int64)  # of each row: what its slots follow from
        self._upto = np.full(sequences, -1, np.int64)  # tokens of which a row's slots are right
        buffer = np.zeros(sequences * (3 + exact), np.int32)
        self._numbers = buffer[: 3 * sequences].reshape(3, sequences)  # packed, skip, counts
        self._slots = buffer[3 * sequences :].reshape(sequences, exact)
        self._mirror = _Mirror(buffer, device)
        numbers, slots = self._mirror.there.split([self._numbers.size, self._slots.size])
        self._numbers_there, self._slots_there = numbers.view(3, sequences), slots.view(sequences, exact)
        self._origins = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._operands: dict[tuple[int, int], Rows] = {}

    def update(self, plan: BlockPlan, requests: Requests, row_of: Integers, is_put: Bools) -> None:
        """To what rows that attend together read in a step; ``is_put``: which of the tokens that are put are theirs."""
        context, fresh = requests.context, requests.fresh
        count = len(context)
        if count > len(self._slots):
            raise QJLError(f"a step of {count} sequences, where there is room for {len(self._slots)}.")
        before = plan.skip + context - plan.packed
        key = np.concatenate([np.stack([plan.sinks, plan.skip, plan.packed], 1), plan.lines], 1)
        if self._key.shape[1] == key.shape[1] and len(self._key) >= count:
            is_changed = (self._key[:count] != key).any(1) | (self._upto[:count] < context)
        else:
            is_changed = np.ones(count, bool)
        self._key, old = key, is_changed & plan.is_together
        if old.any():
            self._describe(old.nonzero()[0], plan, context)
        numbers = self._numbers[:, :count]
        numbers[0], numbers[1], numbers[2] = plan.packed, plan.skip, before + fresh
        tokens = plan.put_tokens[is_put]
        rows = row_of[tokens]
        self._slots[rows, before[rows] + tokens - requests.starts[rows]] = plan.put_slots[is_put]
        self._upto[:count] = np.where(plan.is_together, context + fresh, -1)
        self._upto[count:] = -1
        if plan.is_together.any():
            self._mirror.push(self._numbers.size + self._slots[:count].size)

    def _describe(self, rows: Integers, plan: BlockPlan, context: Integers) -> None:
        """Slots of the contexts of some rows."""
        size, lines = self._shape.page_tokens, plan.lines[rows]
        place = np.arange(self._slots.shape[1])
        token = (plan.packed - plan.skip)[rows, None] + place
        from_last = ((context[rows, None] - 1) // size - token // size).clip(0, lines.shape[1] - 1)
        slots = np.take_along_axis(lines, from_last, 1) * size + token % size
        self._slots[rows] = np.where(place < plan.skip[rows, None], plan.sinks[rows, None] + place, slots)

    def operand(self, rows: Integers, table: Tensor) -> Rows:
        """Of some rows; kept for those that follow each other."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        longest = int(self._numbers[0, rows].max())
        if last - first != len(rows):
            chosen = on(self._device, rows)
            return self._rows(table[chosen], chosen, longest)
        of_rows = table[first:last]
        kept = self._operands.get((first, last))
        if kept is None or not _is_same(kept.table, of_rows):
            if len(self._operands) > _MOST_OPERANDS:
                self._operands.clear()
            kept = self._operands[first, last] = self._rows(of_rows.contiguous(), slice(first, last), longest)
        kept.longest = longest
        return kept

    def _rows(self, table: Tensor, rows: slice | Tensor, longest: int) -> Rows:
        packed, skip, counts = self._numbers_there[:, rows]
        return Rows(table, packed, skip, self._origins[rows], self._slots_there[rows], counts, longest)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same place in memory; what does not lie in one piece is read from a copy."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and other.is_contiguous()


class _Mirror:
    """``there``: a buffer of the host as it was when it was pushed last; on a CPU the buffer itself.

    A push is one copy from pinned memory, which nothing waits for. Such memory is written again only once its last
    copy, some pushes ago, is done.
    """

    def __init__(self, buffer: Integers, device: torch.device) -> None:
        self._here = torch.from_numpy(buffer)
        self.there = self._here
        self._stages: deque[tuple[Tensor, torch.Event]] = deque()
        if device.type == "cpu":
            return
        self.there = torch.zeros(len(buffer), dtype=torch.int32, device=device)
        for _ in range(STAGES):
            pinned = torch.zeros(len(buffer), dtype=torch.int32, device="cpu", pin_memory=True)
            self._stages.append((pinned, torch.Event(device)))

    def push(self, count: int) -> None:
        """The first so many numbers."""
        if not self._stages:
            return
        pinned, is_read = self._stages[0]
        self._stages.rotate(-1)
        is_read.synchronize()
        pinned[:count].copy_(self._here[:count])
        self.there[:count].copy_(pinned[:count], non_blocking=True)
        is_read.record()


class StepNumbers:
    """Numbers of a step on a device, by one copy: views of a buffer that each step writes anew.

    On a CPU, and where the buffer is full, they are tensors of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._used = device, 0
        self._buffer = np.zeros(0 if device.type == "cpu" else MOST_NUMBERS, np.int32)
        self._mirror = _Mirror(self._buffer, device)

    def take(self, numbers: Integers, dtype: type[np.signedinteger] = np.int64) -> Tensor:
        """Where these will be once ``send`` was called."""
        made = np.ascontiguousarray(numbers, dtype)
        first, stop = self._used, self._used + made.nbytes // self._buffer.itemsize
        if not first < stop <= len(self._buffer):
            return to_device(torch.from_numpy(made), self._device)
        self._buffer[first:stop] = made.view(np.int32)
        self._used = stop + stop % 2  # the next ones may be int64
        there = self._mirror.there[first:stop]
        return there.view(torch.int64) if made.dtype == np.int64 else there

    def send(self) -> None:
        """Those that were taken since the last time."""
        if self._used:
            self._mirror.push(self._used)
        self._used = 0


def _pages_of(table: Tensor) -> Pages:
    """How the planner reads a table; one that lies elsewhere is read once in a step, where it is asked for."""

    def of_host(rows: Integers, places: Integers) -> Integers:
        return array[rows, places].astype(np.int64)

    def of_device(rows: Integers, places: Integers) -> Integers:
        return table[on(table.device, rows), on(table.device, places)].cpu().numpy().astype(np.int64)

    if table.device.type != "cpu":
        return of_device
    array = table.numpy()
    return of_host


def on(device: torch.device, numbers: Integers) -> Tensor:
    """``int64`` on a device, whatever torch's defaults are."""
    return to_device(torch.from_numpy(np.ascontiguousarray(numbers, np.int64)), device)
