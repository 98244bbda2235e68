"""A decode step as an engine asks for it: over pages in no order, and over sequences of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qjl import ops
from qjl.attention import Scoring
from qjl.errors import QJLError
from qjl.lab.bench.synthetic import FilledLayer
from qjl.ops.forms import ExactPool, Pool, Rows
from qjl.packed import BLOCK, Blocks

PAGES = (16, 32, 64)


def require_page(page: int | None) -> None:
    """Raises QJLError unless blocks can be laid in pages of so many tokens."""
    if page is not None and page not in PAGES:
        raise QJLError(f"pages of {page} tokens cannot be made here: choose {', '.join(map(str, PAGES))}.")


@dataclass(frozen=True, eq=False)
class PagedStep:
    """The last token of each sequence, its queries ``[B, H * group, 1, D]``, and the pools that they attend to."""

    query: Tensor
    fresh: tuple[Tensor, Tensor]
    pool: Pool
    exact: ExactPool
    rows: Rows
    lengths: tuple[int, ...]  # of packed tokens

    @classmethod
    @torch.no_grad()
    def of(cls, subject: FilledLayer, page: int, lengths: Sequence[int], scoring: Scoring) -> PagedStep:
        """The first ``lengths`` tokens of a filled layer's sequences, the last of which are exact.

        Raises:
            QJLError: if a sequence is so short that none of its tokens is packed, or no kernel reads the codes.
        """
        subject.attend(scoring)  # stores the fresh token
        pool, fresh, exact = subject.pool, subject.layer.fresh, subject.layer.exact
        if pool is None:
            raise QJLError("the preset has codes that no kernel reads, so that they lie in no pages: choose another.")
        assert fresh is not None
        assert exact is not None
        rows = subject.cache.reading(subject.query.device).operand
        tail = max(lengths) - rows.longest
        packed = tuple(length - tail for length in lengths)
        if min(packed) < BLOCK:
            raise QJLError(
                f"the shortest sequence, of {min(lengths)} tokens, would have too few to pack: "
                "give more tokens or a smaller batch."
            )
        order = torch.randperm(rows.table.numel() * (BLOCK // page), generator=torch.Generator().manual_seed(0))
        order = order.to(rows.table.device)
        keys, values = (_scattered(side, rows.table, page, order) for side in (pool.keys, pool.values))
        return cls(
            subject.query,
            fresh,
            Pool(keys, values, pool.key_form, pool.value_form),
            exact.operand,
            Rows(
                order.view(len(rows.table), -1).int(),
                torch.tensor(packed, dtype=torch.int32, device=rows.table.device),
                rows.skip.clone(),
                rows.origins.clone(),
                rows.slots.clone(),
                rows.counts.clone(),
                max(packed),
            ),
            packed,
        )

    def attend(self, scoring: Scoring) -> Tensor:
        """Attention of the last tokens, which are stored on the way: ``[B, 1, H * group, D]``."""
        given = (self.query, *self.fresh, self.pool, self.exact, self.rows)
        return ops.append_attend(*given, scoring.scaling, scoring.softcap or 0.0)

    def copies(self, count: int) -> list[PagedStep]:
        """Steps over bytes of their own."""
        return [self, *(self._copied() for _ in range(count - 1))]

    def _copied(self) -> PagedStep:
        pool = self.pool
        keys, values = ({name: x.clone() for name, x in side.items()} for side in (pool.keys, pool.values))
        exact = ExactPool(self.exact.keys.clone(), self.exact.values.clone())
        return replace(self, pool=Pool(keys, values, pool.key_form, pool.value_form), exact=exact)

    @property
    def nbytes(self) -> int:
        """That a step reads."""
        exact = sum(x[0].nbytes for x in (self.exact.keys, self.exact.values))
        return self.packed_bytes + exact * self.exact_tokens * len(self.lengths)

    @property
    def packed_bytes(self) -> int:
        """Of the codes of all sequences."""
        sides = self.pool.keys, self.pool.values
        return sum(x[0].nbytes for side in sides for x in side.values()) * sum(self.lengths) // self.pool.page

    @property
    def exact_tokens(self) -> int:
        """Of each sequence."""
        return int(self.rows.counts[0])


def _scattered(fields: Blocks, table: Tensor, page: int, order: Tensor) -> Blocks:
    """Pages of ``page`` tokens at the places that ``order`` gives them, for blocks by row."""
    blocks, found = table.flatten().long(), {}
    for name, field in fields.items():
        parts = field[blocks].unflatten(-1, (-1, page)).movedim(-2, 1).flatten(0, 1)
        found[name] = torch.empty_like(parts, memory_format=torch.contiguous_format)
        found[name][order] = parts
    return found
