"""What a benchmark must know of the device that it runs on: how to time work there, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qjl.lab import machine
from qjl.lab.bench import flashinfer
from qjl.lab.bench.baselines import BF16, FLASH, FLEX, FP16, FP32, Reader, multiply
from qjl.lab.bench.flashinfer import FLASHINFER
from qjl.lab.bench.timing import Work, stopwatch_of

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE_BYTES = 32 << 20  # where the system does not tell
COPIED_BYTES = 1 << 30
_UNITS = {"K": 1 << 10, "M": 1 << 20}


class Limit(Protocol):
    """Work that moves ``nbytes`` and does nothing else: the bandwidth that nothing can exceed."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self) -> object: ...


class Place(Protocol):
    """A device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def baselines(self) -> Sequence[str]:
        """The strongest there; the first keep their place in memory."""

    def ready(self, work: Work) -> Work:
        """The same without what is not the device's own time."""

    def stopwatch(self, work: Work) -> float:
        """Milliseconds of a piece of work."""

    def finish(self) -> None:
        """Wait until all work is done."""

    def limit(self) -> Limit:
        """Moving memory."""

    def peak(self) -> tuple[Work, int]:
        """Arithmetic, and how many operations it is."""

    @property
    def cache_bytes(self) -> int:
        """Of the last-level cache."""

    @property
    def name(self) -> str:
        """Of the machine."""


def place_of(device: torch.device, threads: int) -> Place:
    return OnGPU(device) if device.type == "cuda" else OnCPU(threads)


def copies_for(nbytes: int, place: Place) -> int:
    """How many copies of ``nbytes`` must be read in turn for each to have left the caches."""
    return -(-2 * place.cache_bytes // max(nbytes, 1))


@dataclass(frozen=True)
class OnCPU:
    """Some threads of the processor; one of them is timed by its own time."""

    threads: int
    device: torch.device = field(default=torch.device("cpu"), init=False)
    baselines: Sequence[str] = field(default=(FP16, BF16, FP32), init=False)

    def ready(self, work: Work) -> Work:
        return work

    def stopwatch(self, work: Work) -> float:
        return stopwatch_of(self.threads)(work)

    def finish(self) -> None:
        """It is, whenever Python goes on."""

    def limit(self) -> Limit:
        return Reader()

    def peak(self) -> tuple[Work, int]:
        return multiply(768, torch.float32, self.device)

    @property
    def cache_bytes(self) -> int:
        sizes = (path.read_text().strip() for path in CACHES.glob("index*/size"))
        return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes), default=ASSUMED_CACHE_BYTES)

    @property
    def name(self) -> str:
        return machine.describe()


def _baselines_on_gpu() -> Sequence[str]:
    return (FLASH, FLEX, FLASHINFER) if flashinfer.is_installed() else (FLASH, FLEX)


@dataclass(frozen=True)
class OnGPU:
    """A CUDA device, timed by events around graphs that are replayed, so that no time of Python's is in it."""

    device: torch.device
    baselines: Sequence[str] = field(default_factory=_baselines_on_gpu, init=False)

    def ready(self, work: Work) -> Work:
        return Captured(work)

    def stopwatch(self, work: Work) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)

    def limit(self) -> Limit:
        return Copier(self.device)

    def peak(self) -> tuple[Work, int]:
        return multiply(8192, torch.bfloat16, self.device)

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    @property
    def name(self) -> str:
        return machine.describe(self.device)


class Captured:
    """Work as a CUDA graph; replaying it starts all of its kernels at once."""

    def __init__(self, work: Work) -> None:
        self.work = work  # keeps what the graph reads
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            work()  # compiles what must be compiled
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.out = work()

    def __call__(self) -> object:
        self.graph.replay()
        return self.out


class Copier:
    """Copies memory on a device, which reads and writes it."""

    def __init__(self, device: torch.device, nbytes: int = COPIED_BYTES) -> None:
        self._source = torch.ones(nbytes // 4, device=device)
        self._target = torch.empty_like(self._source)

    @property
    def nbytes(self) -> int:
        return 2 * self._source.nbytes

    def __call__(self) -> Tensor:
        return self._target.copy_(self._source)
