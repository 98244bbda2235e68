"""Finds the compiled kernels and chooses the instruction set that they use.

The best one of this machine, or what ``QJL_CPU_ISA=scalar|avx2|avx512|neon`` names. ``QJL_CPU_LIBRARY`` is the path of
another build of the kernels, for example one with sanitizers.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from qjl.errors import QJLError

FILE_NAME = "_cpu.so"
ISA_VARIABLE = "QJL_CPU_ISA"
PATH_VARIABLE = "QJL_CPU_LIBRARY"


def is_installed() -> bool:
    return bool(_copies())


@cache
def load() -> ctypes.CDLL:
    """The library, with its instruction set chosen.

    Raises:
        QJLError: if it is not there, does not load, or lacks what ``QJL_CPU_ISA`` names.
    """
    copies = _copies()
    if not copies:
        raise QJLError(
            "the cpu backend is not here, because no compiler was found when qjl was installed: "
            "install GCC 12 or Clang and run `pip install --force-reinstall --no-cache-dir --no-deps qjl`."
        )
    try:
        library = ctypes.CDLL(str(copies[-1]))
    except OSError as error:
        raise QJLError(f"{copies[-1]} does not load ({error}): reinstall qjl.") from error
    library.qjl_supported.restype = ctypes.c_char_p
    library.qjl_selected.restype = ctypes.c_char_p
    if name := os.environ.get(ISA_VARIABLE):
        _select(library, name, f"{ISA_VARIABLE}={name}")
    return library


def instruction_sets() -> list[str]:
    """Names of those that the library has and this machine can run, best last."""
    return _supported(load())


def instruction_set() -> str:
    """Name of the one in use."""
    return load().qjl_selected().decode()


def use_instruction_set(name: str) -> None:
    """Use another one from now on, in the whole process.

    Raises:
        QJLError: if it is not there.
    """
    _select(load(), name, f"instruction set {name!r}")


def call(function: str, operation: ctypes.Structure) -> None:
    """Run one operation with as many threads as torch uses."""
    getattr(load(), function)(ctypes.byref(operation), ctypes.c_int64(torch.get_num_threads()))


def _copies() -> list[Path]:
    """Where it lies, newest last: a checkout may hold one copy and what pip installed another."""
    if chosen := os.environ.get(PATH_VARIABLE):
        return [Path(chosen)]
    found = [path for folder in _folders() if (path := folder / FILE_NAME).is_file()]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _folders() -> list[Path]:
    package = find_spec("qjl")
    return [Path(folder) for folder in package.submodule_search_locations or []] if package else []


def _supported(library: ctypes.CDLL) -> list[str]:
    return library.qjl_supported().decode().split()


def _select(library: ctypes.CDLL, name: str, asked: str) -> None:
    if library.qjl_select(name.encode()):
        raise QJLError(f"{asked} is not available here: choose one of {', '.join(_supported(library))}.")
