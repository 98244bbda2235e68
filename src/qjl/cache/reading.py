"""What rows of a cache read in one forward pass: made once for all layers, on the layers' device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qjl.attention import Seen
from qjl.cache.index import HOLE, Step, TokenIndex
from qjl.cache.pool import run_of
from qjl.ops.forms import Rows
from qjl.packed import BLOCK, to_device


class Reading:
    """What some rows read that ask with equally many fresh tokens each; ``rows`` None for all rows of the index.

    Made when the pass is planned: fresh tokens have their slots, and blocks that this pass decides are still exact.
    """

    def __init__(
        self, index: TokenIndex, device: torch.device, kept: KeptRows, rows: Sequence[int] | None = None
    ) -> None:
        self.index, self.device = index, device
        self.rows = list(range(index.batch)) if rows is None else list(rows)
        step = index.step
        self._is_all = rows is None
        self.queries = self._queries()
        self._kept = kept
        self._held = index.counts.tolist() if step is None else step.before
        self.begin = index.columns if step is None or step.columns else index.lengths[self.rows[0]]
        self.is_short = step is not None and self._is_even(step) and self.queries < BLOCK
        self.is_whole = step is not None and sum(step.counts[row] for row in self.rows) == sum(step.counts)
        self._has_uneven_pages = index.has_uneven_pages
        self._plain: tuple[Tensor, bool] | None = None
        self._bias: tuple[Tensor | None, Tensor] | None = None

    def _queries(self) -> int:
        """Fresh columns of each row, padding included; in a pass without columns, fresh tokens."""
        step = self.index.step
        if step is None:
            return 0
        return step.columns or max((step.counts[row] for row in self.rows), default=0)

    def _is_even(self, step: Step) -> bool:
        """Whether every row has as many fresh tokens, and none of them is padding."""
        counts = {step.counts[row] for row in self.rows}
        return counts == {step.columns or self.queries}

    @property
    def batch(self) -> int:
        return len(self.rows)

    def _of_rows(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if self._is_all else numbers[self.rows]

    # For the fused step

    @cached_property
    def operand(self) -> Rows:
        """Which tokens of the pools each row has, fresh ones too."""
        return self._kept.rows(self)

    @cached_property
    def packed_operand(self) -> Rows:
        """The same with no exact token."""
        rows = self.operand
        nothing = rows.slots[:, :0].contiguous(), torch.zeros_like(rows.counts)
        return Rows(rows.table, rows.lengths, rows.skip, rows.origins, *nothing, rows.longest)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Of ``operand``: table, lengths, origins, slots and counts."""
        index = self.index
        whole = (index.table, index.ends, index.origins, index.slot_of, index.counts)
        return whole if self._is_all else tuple(of[self.rows] for of in whole)

    def is_plain(self, mask: Tensor | None) -> bool:
        """Whether a mask says no more than that attention is causal, and what is padding; asked once for each mask.

        Looking would stall a device other than a CPU, so there only no mask is plain. Nor is one where pages are
        partly filled, since lengths do not tell which tokens are read.
        """
        if self._has_uneven_pages:
            return False
        if mask is None:
            return True
        if mask.device.type != "cpu" or self.device.type != "cpu":
            return False
        if self._plain is None or self._plain[0] is not mask:
            self._plain = mask, self._says_no_more(mask)
        return self._plain[1]

    def _says_no_more(self, mask: Tensor) -> bool:
        columns = self.begin + self.queries
        if mask.shape[3] < columns:
            return False
        sees = (mask if mask.dtype == torch.bool else mask == 0)[..., :columns]
        is_hidden = ~sees if mask.dtype == torch.bool else mask[..., :columns] < torch.finfo(mask.dtype).min / 2
        if not bool((sees | is_hidden).all()):
            return False
        numbers = torch.arange(columns)
        expected = numbers <= torch.arange(self.begin, columns)[:, None]
        is_padding = numbers < torch.tensor(self._padding, dtype=torch.int64)[:, None]
        return bool(((sees == expected) | is_padding[:, None, None]).all())

    def bias(self, mask: Tensor | None) -> Tensor:
        """What a mask, and pages that are partly filled, add to the fused step: ``float32 [B, h, Q, n * 64 + E]``."""
        if self._bias is None or self._bias[0] is not mask:
            self._bias = mask, self._bias_of(mask)
        return self._bias[1]

    def _bias_of(self, mask: Tensor | None) -> Tensor:
        exact = self._columns(self._of_rows(self.index.token_of))
        columns = np.concatenate([self._table_columns, exact], 1)
        valid = np.concatenate([self._table_valid, np.ones(exact.shape, bool)], 1)
        hidden = to_device(torch.from_numpy(~valid), self.device)[:, None, None]
        nothing = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device=self.device)
        if mask is None:
            return nothing.masked_fill(hidden, -torch.inf)
        return Seen(to_device(torch.from_numpy(columns), self.device), None).of(mask).masked_fill(hidden, -torch.inf)

    # For attention over decoded tokens

    @cached_property
    def before(self) -> tuple[Tensor | slice, Seen] | None:
        """Slots of exact tokens that were there before the pass, ``[B, t]``, and which of them each row has."""
        counts = np.array([self._held[row] for row in self.rows])
        most = int(counts.max(initial=0))
        if not most:
            return None
        slots = self._of_rows(self.index.slot_of)[:, :most]
        columns = self._columns(self._of_rows(self.index.token_of)[:, :most])
        seen = self._seen(columns, np.arange(most) < counts[:, None])
        run = run_of(slots[0].tolist()) if self.batch == 1 else None
        return (run or to_device(torch.from_numpy(slots.astype(np.int64)), self.device)), seen

    @cached_property
    def own(self) -> Seen:
        """Which columns are those of the fresh tokens."""
        begin = self.begin
        pads = [max(0, pad - begin) for pad in self._padding]
        if not any(pads):
            return Seen(begin, None)
        return Seen(
            begin, to_device(torch.arange(self.queries) >= torch.tensor(pads, dtype=torch.int64)[:, None], self.device)
        )

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Seen] | None:
        """Pages ``[B, n]``, positions of their first tokens, and which tokens of them each row has."""
        blocks = max((self.index.blocks[row] for row in self.rows), default=0)
        table = self._of_rows(self.index.table)[:, :blocks].astype(np.int64)
        if not (table != HOLE).any():
            return None
        first = self._of_rows(self.index.origins)[:, None] + np.arange(blocks) * BLOCK
        tokens = blocks * BLOCK
        seen = self._seen(self._table_columns[:, :tokens], self._table_valid[:, :tokens])
        pages, positions = (to_device(torch.from_numpy(x), self.device) for x in (table.clip(min=0), first))
        return pages, positions, seen

    def _seen(self, columns: np.ndarray, valid: np.ndarray) -> Seen:
        hidden = None if valid.all() else to_device(torch.from_numpy(valid), self.device)
        first = int(columns[0, 0])
        is_one_run = (columns == first + np.arange(columns.shape[1])).all()
        return Seen(first if is_one_run else to_device(torch.from_numpy(columns), self.device), hidden)

    @cached_property
    def _padding(self) -> list[int]:
        return [self.index.padding[row] for row in self.rows]

    def _columns(self, tokens: np.ndarray) -> np.ndarray:
        columns = np.array(self._padding)[:, None] + tokens
        return columns.clip(max=max(self.begin + self.queries - 1, 0))

    @cached_property
    def _table_columns(self) -> np.ndarray:
        width = self.index.table.shape[1] * BLOCK
        return self._columns(np.broadcast_to(np.arange(width), (self.batch, width)))

    @cached_property
    def _table_valid(self) -> np.ndarray:
        """Which tokens of the tables are read as codes, ``bool [B, n * 64]``."""
        table = self._of_rows(self.index.table)
        width = table.shape[1]
        inside = np.full((self.batch, width), BLOCK)
        for place, row in enumerate(self.rows):
            inside[place, self.index.blocks[row] :] = 0
            for block, count in self.index.partial[row].items():
                inside[place, block] = count
        inside[table == HOLE] = 0
        valid = (np.arange(BLOCK) < inside[..., None]).reshape(self.batch, width * BLOCK)
        valid[:, : self.index.sinks] = False
        return valid


class KeptRows:
    """The operand of all rows of an index, kept from pass to pass as long as its arrays are the same."""

    def __init__(self) -> None:
        self._rows: Rows | None = None
        self._version = -1

    def rows(self, reading: Reading) -> Rows:
        """That of this reading: on a CPU tensors are views of the index's arrays."""
        index, kept, arrays = reading.index, self._rows, reading.arrays()
        table, ends, origins, slots, counts = arrays
        if kept is None or self._version != index.version or kept.table.device != reading.device:
            skip = np.full(ends.shape, index.sinks, np.int32)
            taken = (table, ends, skip, origins, slots, counts)
            of_rows = (to_device(torch.from_numpy(x), reading.device) for x in taken)
            kept = self._rows = Rows(*of_rows, 0)  # type: ignore[misc, arg-type, call-arg]
            self._version = index.version
        elif reading.device.type != "cpu":
            held = (kept.table, kept.lengths, kept.origins, kept.slots, kept.counts)
            for there, here in zip(held, arrays, strict=True):
                there.copy_(torch.from_numpy(here), non_blocking=True)
        kept.longest = int(ends.max())
        return kept
