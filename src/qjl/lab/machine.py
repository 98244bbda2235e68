"""Where and with what something was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from qjl import versions as installed
from qjl.ops.cpu import library

MODEL_PACKAGES = ("qjl", "torch", "transformers")  # which a model's answers depend on
PACKAGES = (*MODEL_PACKAGES, "triton")
CPU_INFO = Path("/proc/cpuinfo")


def describe(device: torch.device | None = None) -> str:
    """The GPU, if that is the device; otherwise processor, cores, and the operating system's kind."""
    if device is not None and device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    return installed.versions(packages)


def instruction_set() -> str | None:
    """That of the cpu backend."""
    return library.instruction_set() if library.is_installed() else None


def _processor() -> str:
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"
