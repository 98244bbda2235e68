"""Whether Triton is there, and what it runs on."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from qjl.errors import QJLError

INTERPRET = "TRITON_INTERPRET"


def is_installed() -> bool:
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether kernels run on a CPU, under Triton's interpreter."""
    return os.environ.get(INTERPRET) == "1"


def is_usable() -> bool:
    """Whether the backend can run anything here."""
    return is_installed() and (is_interpreted() or torch.cuda.is_available())


def require() -> None:
    """Raises QJLError unless the backend can run here."""
    if not is_installed():
        raise QJLError("the triton backend needs Triton: run `pip install triton`.")
    if not is_usable():
        raise QJLError(f"the triton backend needs a GPU, or {INTERPRET}=1, which runs it on a CPU and very slowly.")


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; off a GPU few, so that work is still split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
