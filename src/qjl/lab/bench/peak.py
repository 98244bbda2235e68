"""The most memory that a piece of work holds at any time."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # of what Linux takes at CLEAR


class Peak:
    """Bytes held on a device beyond those held now; on a CPU those of this process, None where it cannot be told."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        _give_back()
        self._start = self._held()

    def restart(self) -> None:
        """Forget what was the most so far; what was held at first still does not count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.exists():
            _give_back()
            CLEAR.write_text(_FORGET_PEAK)

    @property
    def nbytes(self) -> int | None:
        """The most since the last start."""
        most = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return None if most is None or self._start is None else max(0, most - self._start)

    def _held(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")


def resident_bytes(process: int) -> int | None:
    """What another process holds now; None where it cannot be told."""
    return _status("VmRSS", Path(f"/proc/{process}/status"))


def _give_back() -> None:
    """What was freed goes back to Linux, which would count it as held."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _status(name: str, place: Path = STATUS) -> int | None:
    lines = place.read_text().splitlines() if place.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else None
