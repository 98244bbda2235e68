"""What all benchmarks share: the gate that comes first, what is told of timings, and the conditions they hold under."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl import ops
from qjl.cache.layer import Layer
from qjl.errors import QJLError
from qjl.lab import machine
from qjl.lab.bench.devices import Limit, Place, place_of
from qjl.lab.bench.synthetic import CPU, Shape
from qjl.lab.bench.timing import Timings
from qjl.lab.results import Row
from qjl.ops.forms import Pool

MOST_ERROR, MOST_ERROR_IN_HALF = 1e-4, 2e-3
WORST_ROW = 5  # budgets
REFERENCE = "reference"
OURS, LIMIT = "qjl", "limit"


class Inaccurate(QJLError):
    """What was to be timed is wrong, so that its speed does not count."""


@dataclass(frozen=True)
class BenchSettings:
    """How to measure. ``memory``: bytes that all baselines together may take; those that do not fit are left out.

    ``against``: baselines and peers, the strongest baselines of the device if not given. ``page``: tokens of a page, in
    place of the cache's own pages; ``is_ragged``: sequences of different lengths. Both are of decode steps.
    """

    shape: Shape
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    threads: int = 1
    repeats: int = 15
    memory: int = 3 << 30
    against: Sequence[str] = ()
    page: int | None = None
    is_ragged: bool = False

    def lengths(self, tokens: int) -> list[int]:
        """Tokens of each sequence: ``tokens``, or spread evenly up to that."""
        batch = self.shape.batch
        return [tokens * (row + 1) // batch if self.is_ragged else tokens for row in range(batch)]

    @property
    def place(self) -> Place:
        return place_of(self.device, self.threads)

    @property
    def backend(self) -> str:
        return ops.backend_of(self.device)

    @property
    def most_error(self) -> float:
        """Of a row of attention that trades no precision: tensor cores take numbers in half as they lie."""
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


@dataclass(frozen=True)
class RowErrors:
    """``||out - expected|| / ||expected||`` of rows of attention."""

    rms: float
    worst: float
    rows: int

    @classmethod
    def of(cls, out: Tensor, expected: Tensor) -> RowErrors:
        each = (out - expected).norm(dim=-1) / expected.norm(dim=-1)
        return cls(float(each.square().mean().sqrt()), float(each.max()), each.numel())

    @property
    def columns(self) -> Row:
        return {"max_error": self.worst, "rms_error": self.rms}


def error_budget(layer: Layer) -> float:
    """Of a cache's layer; where no kernel reads codes, what rounding takes."""
    pool = layer.pages and layer.pages.operand
    return pool.error_budget if pool else MOST_ERROR


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Of the worst row."""
    return RowErrors.of(out, expected).worst


def require_accurate(error: float, what: str, backend: str, most: float = MOST_ERROR) -> None:
    """Raises Inaccurate unless the error is small; NaN is not."""
    if not error <= most:
        raise Inaccurate(
            f"{what}: the {backend} backend is {error:.1e} off the reference, where {most:.2g} is "
            "allowed, so no speed is reported."
        )


def require_within_budget(errors: RowErrors, what: str, backend: str, budget: float) -> None:
    """Raises Inaccurate unless rows are; few of them may lie further off together than many."""
    require_accurate(errors.rms, what, backend, budget * max(1, WORST_ROW / errors.rows**0.5))
    require_accurate(errors.worst, f"{what}, in the worst row", backend, WORST_ROW * budget)


def require_right(errors: RowErrors, what: str, settings: BenchSettings, pool: Pool | None) -> None:
    """Raises Inaccurate unless attention is: over codes on a CPU within their budget, elsewhere up to rounding."""
    if pool is not None and settings.backend == "cpu":
        require_within_budget(errors, what, settings.backend, pool.error_budget)
    else:
        require_accurate(errors.worst, what, settings.backend, settings.most_error)


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
