"""Which tokens of a layer may be quantized, as runs of columns: (first column, column behind the last)."""

from __future__ import annotations

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Run = tuple[int, int]
Runs = list[Run]
ENDLESS = sys.maxsize


def runs_of(mask: Tensor, column: int) -> list[Runs]:
    """Runs of True in each row of ``bool [B, T]``, whose first column is ``column``."""
    edges = [row.nonzero().flatten().add(column).tolist() for row in F.pad(mask.cpu().int(), (1, 1)).diff(dim=1)]
    return [list(zip(row[::2], row[1::2], strict=True)) for row in edges]


def until(runs: Runs, column: int) -> Runs:
    """The part before ``column``."""
    return [(first, min(stop, column)) for first, stop in runs if first < column]


def since(runs: Runs, column: int) -> Runs:
    """The part from ``column`` on."""
    return [(max(first, column), stop) for first, stop in runs if stop > column]


def joined(runs: Runs, later: Runs) -> Runs:
    """One after the other; runs that touch become one."""
    if runs and later and runs[-1][1] == later[0][0]:
        return [*runs[:-1], (runs[-1][0], later[0][1]), *later[1:]]
    return [*runs, *later]


def gaps(runs: Runs, first: int, stop: int) -> Runs:
    """What lies from ``first`` to ``stop`` outside of the runs."""
    firsts, stops = [first, *(end for _, end in runs)], [*(start for start, _ in runs), stop]
    return [(start, end) for start, end in zip(firsts, stops, strict=True) if start < end]


class Marks:
    """Runs of columns of each row that may be quantized and are not settled yet.

    Without a mask they are all columns; once a mask was given, only those that a mask names.
    """

    def __init__(self, batch: int) -> None:
        self._rows: list[Runs] = [[(0, ENDLESS)]] * batch
        self._has_mask = False

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Marks:
        """The inverse of ``state``."""
        marks = cls(0)
        marks._rows = [[(int(first), int(stop)) for first, stop in runs] for runs in state["rows"]]
        marks._has_mask = bool(state["has_mask"])
        return marks

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"rows": [[[first, stop] for first, stop in runs] for runs in self._rows], "has_mask": self._has_mask}

    @property
    def batch(self) -> int:
        return len(self._rows)

    @property
    def has_mask(self) -> bool:
        """Whether a mask was given."""
        return self._has_mask

    def of(self, row: int) -> Runs:
        return self._rows[row]

    def give(self, mask: Tensor, column: int) -> None:
        """``mask bool [B, T]`` tells of T columns from ``column`` on; behind them nothing is marked."""
        fresh = runs_of(mask, column)
        self._rows = [joined(until(old, column), new) for old, new in zip(self._rows, fresh, strict=True)]
        self._has_mask = True

    def settle(self, row: int, column: int) -> None:
        """Forget the marks before ``column``."""
        self._rows[row] = since(self._rows[row], column)

    def crop(self, column: int) -> None:
        """Forget the marks from ``column`` on."""
        self._rows = [
            until(runs, column) if self._has_mask else [(min(first, column), stop) for first, stop in runs]
            for runs in self._rows
        ]

    def select(self, rows: list[int]) -> None:
        self._rows = [self._rows[row] for row in rows]
