"""Interleaved repeats: what is compared is timed in turn, so that a busy machine slows all of it alike.

Every piece of work comes as several copies on buffers of their own, taken in rotation, so that what a run reads has
left the caches since it was read last. A stopwatch runs a piece of work and gives its milliseconds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from qjl.errors import QJLError
from qjl.ops.cpu import library

Work = Callable[[], object]
Stopwatch = Callable[[Work], float]
Clock = Callable[[], int]  # nanoseconds


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each piece of work, one per round."""

    rounds: Mapping[str, Sequence[float]]

    def ms(self, name: str) -> float:
        """The median."""
        return statistics.median(self.rounds[name])

    def least_ms(self, name: str) -> float:
        return min(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> Spread | None:
        """How many times as long one takes as the other, round by round; None where one was not timed."""
        if not {slow, fast} <= self.rounds.keys():
            return None
        return spread([a / b for a, b in zip(self.rounds[slow], self.rounds[fast], strict=True)])

    def difference(self, long: str, short: str) -> Spread:
        """How many milliseconds more one takes than the other, round by round."""
        return spread([a - b for a, b in zip(self.rounds[long], self.rounds[short], strict=True)])


def spread(numbers: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else 3 * [*numbers]
    return Spread(low, median, high)


def interleave(
    works: Mapping[str, Sequence[Work]],
    repeats: int,
    threads: int,
    on_round: Callable[[], None] = lambda: None,
    stopwatch: Stopwatch | None = None,
) -> Timings:
    """Time each work once per round, in an order that changes; a first round does not count."""
    stopwatch = stopwatch or stopwatch_of(threads)
    shuffled = random.Random(0)
    rounds: dict[str, list[float]] = {name: [] for name in works}
    with use_threads(threads), torch.no_grad():
        for turn in range(repeats + 1):
            for name in shuffled.sample(list(works), len(works)):
                rounds[name].append(stopwatch(works[name][turn % len(works[name])]))
            on_round()
    return Timings({name: times[1:] for name, times in rounds.items()})


def stopwatch_of(threads: int) -> Stopwatch:
    """CPU time of one thread, which other programs disturb least; the wall clock for several."""
    return partial(_ms, clock_of(threads))


def clock_of(threads: int) -> Clock:
    return time.thread_time_ns if threads == 1 else time.perf_counter_ns


def wall_ms(work: Work) -> float:
    return _ms(time.perf_counter_ns, work)


def _ms(clock: Clock, work: Work) -> float:
    start = clock()
    work()
    return (clock() - start) / 1e6


@contextmanager
def kernels_timed(clock: Clock) -> Iterator[list[float]]:
    """Milliseconds of every call into the compiled library."""
    own, found = library.call, []

    def call(*arguments: Any) -> int:
        start = clock()
        returned = own(*arguments)
        found.append((clock() - start) / 1e6)
        return returned

    with mock.patch.object(library, "call", call):
        yield found


def add_kernels(rounds: list[float], clock: Clock, work: Work) -> None:
    """Do the work, and append the milliseconds of its calls into the compiled library."""
    with kernels_timed(clock) as calls:
        work()
    rounds.append(sum(calls))


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The e of ``time ~ size ** e``, by least squares on logarithms.

    Raises:
        QJLError: if all sizes are the same.
    """
    if len(set(sizes)) < 2:
        raise QJLError("an exponent needs times at two sizes or more.")
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, times))
    x = x - x.mean()
    return float((x @ y) / (x @ x))
