"""What all benchmarks share: the gate that comes first, what is told of timings, and the conditions they hold under."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl import ops
from qjl.errors import QJLError
from qjl.lab import machine
from qjl.lab.bench.devices import Limit, Place, place_of
from qjl.lab.bench.synthetic import CPU, Shape
from qjl.lab.bench.timing import Timings
from qjl.lab.results import Row

MOST_ERROR, MOST_ERROR_IN_HALF = 1e-4, 2e-3
REFERENCE = "reference"
OURS, LIMIT = "qjl", "limit"


class Inaccurate(QJLError):
    """What was to be timed is wrong, so that its speed does not count."""


@dataclass(frozen=True)
class BenchSettings:
    """How to measure. ``memory``: bytes that all baselines together may take; those that do not fit are left out.

    ``against``: baselines and peers, the strongest baselines of the device if not given.
    """

    shape: Shape
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    threads: int = 1
    repeats: int = 15
    memory: int = 3 << 30
    against: Sequence[str] = ()

    @property
    def place(self) -> Place:
        return place_of(self.device, self.threads)

    @property
    def backend(self) -> str:
        return ops.backend_of(self.device)

    @property
    def most_error(self) -> float:
        """Of attention, relative to the reference's: tensor cores take numbers in half precision as they lie."""
        is_half = self.backend == "triton" and self.dtype.itemsize == 2
        return MOST_ERROR_IN_HALF if is_half else MOST_ERROR


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    before = ops.active_backend()
    ops.use_backend(name)
    try:
        yield
    finally:
        ops.use_backend(before)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| of the worst row."""
    return float(((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def require_accurate(error: float, what: str, backend: str, most: float = MOST_ERROR) -> None:
    """Raises Inaccurate unless the error is small; NaN is not."""
    if not error <= most:
        raise Inaccurate(
            f"{what}: the {backend} backend is {error:.1e} off the reference, where {most:g} is "
            "allowed, so no speed is reported."
        )


def head(case: str, preset: str, tokens: int, settings: BenchSettings) -> Row:
    """What comes first in every row."""
    return {
        "case": case,
        "backend": settings.backend,
        "preset": preset,
        "tokens": tokens,
        "head_dim": settings.shape.head_dim,
    }


def compared(timings: Timings, names: Sequence[str]) -> Row:
    """Our milliseconds, and those of others with the ratios and their quartiles; None for what was not timed."""
    ratios = {name: timings.ratio(name, OURS) for name in names}
    return (
        {"ms": timings.ms(OURS)}
        | {f"ratio_{name}": ratio and ratio.median for name, ratio in ratios.items()}
        | {f"spread_{name}": ratio and [ratio.low, ratio.high] for name, ratio in ratios.items()}
        | {f"ms_{name}": timings.ms(name) if name in timings.rounds else None for name in names}
    )


def of_the_limit(nbytes: int, ms: float, timings: Timings, limit: Limit) -> Row:
    """Bytes that must be read in ``ms``, and how near that comes to the best that memory gave in the same rounds."""
    most = limit.nbytes / timings.least_ms(LIMIT)  # bytes per millisecond
    return {
        "fraction_of_bandwidth": nbytes / ms / most,
        "bytes": nbytes,
        "bandwidth_gbs": most / 1e6,
    }


def conditions(settings: BenchSettings, packages: Sequence[str] = ()) -> Row:
    """``packages``: of others that were timed."""
    shape = settings.shape
    return {
        "batch": shape.batch,
        "kv_heads": shape.kv_heads,
        "group": shape.group,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": settings.device.type,
        "threads": settings.threads,
        "repeats": settings.repeats,
        "isa": machine.instruction_set() if settings.backend == "cpu" else None,
        "machine": settings.place.name,
        "versions": machine.versions((*machine.PACKAGES, *packages)),
    }
