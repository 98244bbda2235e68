"""Numbered places that rows take, share and give back: slots of exact tokens, and pages of codes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qjl.errors import QJLError

ENDLESS = 1 << 62  # as a number of tokens or places
_FIRST = 16  # places that there are room for, at first


class Places:
    """Each place has as many owners as took or share it; without one it is free.

    ``capacity`` is what layers keep room for. It grows by a quarter, but not beyond ``ample`` for that, unless there is
    a ``limit``.
    """

    def __init__(self, what: str, limit: int | None = None) -> None:
        self._what = what
        self.limit = limit
        self.ample = ENDLESS
        self.capacity = limit or 0
        self.reset()

    def reset(self) -> None:
        """Free all."""
        self.capacity = self.limit or 0
        self._owners = np.zeros(max(self.capacity, _FIRST), np.int32)
        self._given_back: list[int] = []
        self._used = 0  # of the places so far, whoever has them now

    @property
    def in_use(self) -> int:
        return self._used - len(self._given_back)

    def take(self, count: int) -> list[int]:
        """Free places, the same number following each other where there are such.

        Raises:
            QJLError: if there are not as many.
        """
        again = min(count, len(self._given_back))
        last = self._used + count - again
        if self.limit is not None and last > self.limit:
            raise QJLError(
                f"the cache has room for {self.limit} {self._what} and needs {self.in_use + count}: make it larger, or "
                "drop some of its rows."
            )
        taken = [self._given_back.pop() for _ in range(again)] + list(range(self._used, last))
        self._used = last
        if last > self.capacity:
            self.capacity = max(last, min(self.capacity + self.capacity // 4, self.ample))
        if last > len(self._owners):
            self._owners = np.pad(self._owners, (0, max(last, 2 * len(self._owners)) - len(self._owners)))
        self._owners[taken] = 1
        return taken

    def room_with(self, more: int) -> int:
        """The least capacity with so many more in use; places stay where they are."""
        return max(self.capacity, self.in_use + more)

    def renumber(self, held: np.ndarray) -> None:
        """Let all that are in use have the first numbers, in the order of ``held``; there is room for no more then."""
        self.capacity = self.limit or len(held)
        owners = self._owners[held]
        self._owners = np.pad(owners, (0, max(self.capacity, _FIRST) - len(held)))
        self._given_back, self._used = [], len(held)

    def share(self, places: Iterable[int]) -> None:
        """One more owner for each."""
        np.add.at(self._owners, np.asarray(places, np.int64), 1)

    def release(self, places: Iterable[int]) -> None:
        """One owner fewer for each; those without one are free."""
        released = np.asarray(places, np.int64)
        if not len(released):
            return
        np.subtract.at(self._owners, released, 1)
        free = np.unique(released)[::-1]
        self._given_back += free[self._owners[free] == 0].tolist()
