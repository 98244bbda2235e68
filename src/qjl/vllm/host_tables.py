"""Tables of pages as the host knows them, so that no step reads them back from a device. Nothing of vLLM in here.

What the host knows of a table is kept with the tensor: an engine passes it on as it is, and a copy of it is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

Integers = np.ndarray
Pages = Callable[[Integers, Integers], Integers]  # of some rows, each at a place in its table
_KEPT = "qjl_host_table"  # an attribute of tensors


@dataclass(frozen=True, eq=False)
class HostTable:
    """``pages int [n, most]``: of the rows of a batch or, ``is_by_request``, of all requests that a runner knows.

    Where a page is cut into ``parts``, part j of page p is page ``p * stride + j``, and has a place of its own.
    """

    pages: Integers
    is_by_request: bool = False
    parts: int = 1
    stride: int = 1

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


def keep(table: Tensor, host: HostTable) -> None:
    """From now on ``table`` is known to the host."""
    setattr(table, _KEPT, host)


def keep_cut(table: Tensor, whole: Tensor, parts: int, stride: int) -> None:
    """So is ``table``, if ``whole`` is whose pages it has in parts."""
    host = getattr(whole, _KEPT, None)
    if host is not None:
        keep(table, replace(host, parts=parts, stride=stride))


def known_pages(table: Tensor, rows: int, requests: Integers | None) -> Pages | None:
    """How to read a table on the host, as ``HostTable.of`` tells; None if the host does not know it."""
    host = getattr(table, _KEPT, None)
    return None if host is None else host.of(rows, requests)


class _Given:
    """The pages that requests were given: ``pages int32 [requests, most]``."""

    def __init__(self, requests: int, most: int) -> None:
        self.pages = np.zeros((requests, most), np.int32)
        self._counts = np.zeros(requests, np.int64)

    def add(self, request: int, pages: Sequence[int], is_new: bool) -> None:
        start = 0 if is_new else int(self._counts[request])
        self.pages[request, start : start + len(pages)] = pages
        self._counts[request] = start + len(pages)


_given: WeakKeyDictionary[object, list[_Given]] = WeakKeyDictionary()


def give(owner: object, tables: Sequence[Tensor], request: int, pages: Sequence[Sequence[int]], is_new: bool) -> None:
    """More pages of each of an owner's ``tables [requests, most]`` to a request, or the first ones to a new one."""
    for given, more in zip(_given_by(owner, tables), pages, strict=True):
        given.add(request, more, is_new)


def keep_given(owner: object, tables: Sequence[Tensor], gathered: Sequence[Tensor]) -> None:
    """What was gathered from an owner's tables for the rows of a batch is known by what it gave."""
    for table, given in zip(gathered, _given_by(owner, tables), strict=True):
        keep(table, HostTable(given.pages, is_by_request=True))


def _given_by(owner: object, tables: Sequence[Tensor]) -> list[_Given]:
    if owner not in _given:
        _given[owner] = [_Given(*table.shape) for table in tables]
    return _given[owner]
