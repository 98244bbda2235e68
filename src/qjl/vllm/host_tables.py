"""Tables of pages as the host knows them, so that no step reads them back from a device. Nothing of vLLM in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

Integers = np.ndarray
Pages = Callable[[Integers, Integers], Integers]  # of some rows, each at a place in its table


@dataclass(frozen=True, eq=False)
class HostTable:
    """``pages int [n, most]``: of the rows of a batch or, ``is_by_request``, of all requests that a runner knows.

    Where a page is cut into ``parts``, part j of page p is page ``p * stride + j``, and has a place of its own.
    """

    pages: np.ndarray
    is_by_request: bool = False
    parts: int = 1
    stride: int = 1

    def cut(self, parts: int, stride: int) -> HostTable:
        """The same table with pages cut into parts."""
        return replace(self, parts=parts, stride=stride)

    def of(self, rows: int, requests: Integers | None) -> Pages | None:
        """How to read it for so many rows, which belong to ``requests [rows]``; None if it does not tell of them."""
        if not self.is_by_request:
            return self._pages if rows <= len(self.pages) else None
        if requests is None or len(requests) < rows:
            return None
        return lambda row, place: self._pages(requests[row], place)

    def _pages(self, rows: Integers, places: Integers) -> Integers:
        whole, part = np.divmod(places, self.parts)
        return self.pages[rows, whole].astype(np.int64) * self.stride + part


class FollowedTable:
    """The pages that requests are given, as a runner tells of them: ``pages int32 [requests, most]``."""

    def __init__(self, requests: int, most: int) -> None:
        self.pages = np.zeros((requests, most), np.int32)
        self._counts = np.zeros(requests, np.int64)

    def give(self, request: int, pages: list[int], is_new: bool) -> None:
        """More pages of a request, or the first ones of a new one."""
        start = 0 if is_new else int(self._counts[request])
        self.pages[request, start : start + len(pages)] = pages
        self._counts[request] = start + len(pages)
