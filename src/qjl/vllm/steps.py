"""A plan as tensors, made once for all layers: what rows read is kept from step to step, and changes where they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qjl.ops.forms import Rows
from qjl.packed import to_device
from qjl.vllm.block_planner import BlockPlan, BlockPlanner, Bools, Encoding, Integers, PoolShape, Requests

_SPARE = 16  # rows that there is room for, at least


@dataclass(frozen=True, eq=False)
class Targets:
    """An ``Encoding`` as tensors: where 64 tokens at a time come from, and where their codes go.

    Whole pages have no ``columns``, and one of ``pages`` for each 64 tokens.
    """

    sources: Tensor
    first: Tensor
    columns: Tensor | None
    pages: Tensor
    offsets: Tensor | None

    @classmethod
    def of(cls, encoding: Encoding, device: torch.device) -> Targets | None:
        if not len(encoding):
            return None
        sources, first = on(device, encoding.sources), on(device, encoding.first)
        if (whole := encoding.whole_pages) is not None:
            return cls(sources, first, None, on(device, whole), None)
        numbers = (encoding.columns, encoding.pages, encoding.offsets)
        return cls(sources, first, *(on(device, of) for of in numbers))


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
class LayerStep:
    """What layers do in a step; ``put_tokens`` are those that attention does not put to slots itself.

    ``is_apart``: sequences that attend together put their tokens themselves, before ``filled`` is encoded.
    """

    rescued: Targets | None
    put_tokens: Tensor
    put_slots: Tensor
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
        device: of the layers.
    """

    def __init__(self, shape: PoolShape, recent: int, most_queries: int, device: torch.device) -> None:
        self.planner = BlockPlanner(shape, recent, most_queries)
        self._kept = _KeptRows(shape, device)
        self._device = device

    def next(self, totals: Integers, starts: Integers, table: Tensor) -> LayerStep:
        """A step with tokens ``starts[b]`` to ``starts[b + 1]`` of the batch for row b, the last of its ``totals[b]``.

        ``table int32 [R, n]`` of pages lies on the layers' device, and keeps its contents as long as the step.
        """
        fresh = np.diff(starts)
        requests = Requests(totals - fresh, fresh, _pages_of(table))
        plan = self.planner.plan(requests)
        row_of = np.repeat(np.arange(len(fresh)), fresh)
        is_put = plan.own & plan.is_together[row_of[plan.put_tokens]]
        self._kept.update(plan, requests, row_of, is_put)
        is_explicit = ~is_put if plan.is_apart else np.ones_like(is_put)
        device = self._device
        rescued, filled, direct = (Targets.of(of, device) for of in (plan.rescued, plan.filled, plan.direct))
        return LayerStep(
            rescued,
            on(device, plan.put_tokens[is_explicit]),
            on(device, plan.put_slots[is_explicit]),
            filled,
            direct,
            list(self._together(plan, requests, table)),
            list(self._alone(plan, requests, table)),
            plan.is_apart,
        )

    def _together(self, plan: BlockPlan, requests: Requests, table: Tensor) -> Iterator[Together]:
        rows = plan.is_together.nonzero()[0]
        fresh, starts = requests.fresh[rows], requests.starts[rows]
        for queries in np.unique(fresh).tolist():
            of_group = fresh == queries
            group, begin = rows[of_group], starts[of_group]
            if group[-1] - group[0] == len(group) - 1:  # they follow each other, and so do their tokens
                tokens: slice | Tensor = slice(int(begin[0]), int(begin[-1]) + queries)
            else:
                tokens = on(self._device, (begin[:, None] + np.arange(queries)).ravel())
            yield Together(tokens, queries, self._kept.operand(group, table))

    def _alone(self, plan: BlockPlan, requests: Requests, table: Tensor) -> Iterator[Alone]:
        size, starts = self.planner.shape.page_tokens, requests.starts
        for row in (~plan.is_together & (requests.fresh > 0)).nonzero()[0].tolist():
            begin, count, context = int(starts[row]), int(requests.fresh[row]), int(requests.context[row])
            skip, packed = int(plan.skip[row]), int(plan.packed[row])
            pages, slots = table[row, : -(-packed // size)].long(), plan.slots(row, context, size)
            yield Alone(begin, begin + count, context, skip, packed, pages, on(self._device, slots))


class _KeptRows:
    """Exact tokens of each row of the batch, and operands over them: rows that go on get their new tokens only."""

    def __init__(self, shape: PoolShape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._key = np.zeros((0, 0), np.int64)  # of each row: what its slots follow from
        self._upto = np.zeros(0, np.int64)  # tokens of which a row's slots are right
        self._numbers = np.zeros((3, 0), np.int32)  # packed, skip, counts
        self._slots = np.zeros((0, 0), np.int32)
        self._operands: dict[tuple[int, int], _Operand] = {}

    def update(self, plan: BlockPlan, requests: Requests, row_of: Integers, is_put: Bools) -> None:
        """To what rows that attend together read in a step; ``is_put``: which of the tokens that are put are theirs."""
        context, fresh = requests.context, requests.fresh
        count = len(context)
        before = plan.skip + context - plan.packed
        counts = before + fresh
        self._reserve(count, int(counts[plan.is_together].max(initial=0)))
        key = np.concatenate([np.stack([plan.sinks, plan.skip, plan.packed], 1), plan.lines], 1)
        if self._key.shape[1] == key.shape[1] and len(self._key) >= count:
            is_changed = (self._key[:count] != key).any(1) | (self._upto[:count] < context)
        else:
            is_changed = np.ones(count, bool)
        self._key, old = key, is_changed & plan.is_together
        if old.any():
            self._describe(old.nonzero()[0], plan, context)
        numbers = self._numbers[:, :count]
        numbers[0], numbers[1], numbers[2] = plan.packed, plan.skip, counts
        tokens = plan.put_tokens[is_put]
        rows = row_of[tokens]
        self._slots[rows, before[rows] + tokens - requests.starts[rows]] = plan.put_slots[is_put]
        self._upto[:count] = np.where(plan.is_together, context + fresh, -1)
        self._upto[count:] = -1

    def _reserve(self, count: int, exact: int) -> None:
        rows, width = self._slots.shape
        if count <= rows and exact <= width:
            return
        rows, width = max(rows, count + _SPARE), max(width, exact)
        self._upto = np.full(rows, -1, np.int64)
        self._numbers, self._slots = np.zeros((3, rows), np.int32), np.zeros((rows, width), np.int32)
        self._operands.clear()

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
        if last - first != len(rows):
            return _Operand(self._device, table[on(self._device, rows)], *self._parts(rows)).rows
        kept = self._operands.get((first, last))
        of_rows, parts = table[first:last], self._parts(slice(first, last))
        if kept is None:
            if len(self._operands) > _SPARE:
                self._operands.clear()
            kept = self._operands[first, last] = _Operand(self._device, of_rows, *parts)
        else:
            kept.update(of_rows, *parts)
        return kept.rows

    def _parts(self, rows: Integers | slice) -> tuple[Integers, Integers]:
        numbers, slots = self._numbers[:, rows], self._slots[rows]
        return (numbers, slots) if isinstance(rows, slice) else (np.ascontiguousarray(numbers), slots)


class _Operand:
    """``Rows`` of some rows: on a CPU views of the host's arrays, elsewhere of one copy of all of them."""

    def __init__(self, device: torch.device, table: Tensor, numbers: Integers, slots: Integers) -> None:
        self._is_view = device.type == "cpu"
        if self._is_view:
            packed, skip, counts, of_slots = (torch.from_numpy(x) for x in (*numbers, slots))
        else:
            self._there = torch.zeros(numbers.size + slots.size, dtype=torch.int32, device=device)
            of_numbers, rest = self._there.split([numbers.size, slots.size])
            packed, skip, counts = of_numbers.view(numbers.shape)
            of_slots = rest.view(slots.shape)
        origins = torch.zeros(len(slots), dtype=torch.int64, device=device)
        self.rows = Rows(table.contiguous(), packed, skip, origins, of_slots, counts, 0)
        self._table = table
        self.update(table, numbers, slots)

    def update(self, table: Tensor, numbers: Integers, slots: Integers) -> None:
        if (table.data_ptr(), table.shape) != (self._table.data_ptr(), self._table.shape) or not table.is_contiguous():
            self._table, self.rows.table = table, table.contiguous()
        if not self._is_view:
            self._there.copy_(torch.from_numpy(np.concatenate([numbers.ravel(), slots.ravel()])), non_blocking=True)
        self.rows.longest = int(numbers[0].max())


def _pages_of(table: Tensor) -> Callable[[Integers, Integers], Integers]:
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
