"""Finds the compiled kernels and chooses the instruction set that they use.

The best one of this machine, or what ``QJL_CPU_ISA=scalar|avx2|avxvnni|avx512|neon|neondot`` names.
``QJL_CPU_LIBRARY`` is the path of another build of the kernels, for example one with sanitizers.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int64, c_uint64
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.ops.cpu import structs

FILE_NAME = "_cpu.so"
ISA_VARIABLE = "QJL_CPU_ISA"
PATH_VARIABLE = "QJL_CPU_LIBRARY"
_REINSTALL = "`pip install --force-reinstall --no-cache-dir --no-deps qjl`"
_RETURNS = {
    **dict.fromkeys(("qjl_supported", "qjl_selected", "qjl_refusal"), c_char_p),
    **dict.fromkeys((f"qjl_{name}" for name in ("encode", "decode", "step")), c_int64),
    **dict.fromkeys((f"qjl_{name}" for name in ("flash_decode", "popcount_scan", "read")), c_int64),
}


def is_installed() -> bool:
    return bool(_copies())


@cache
def load() -> ctypes.CDLL:
    """The newest library that has the structs of this version, with its instruction set chosen.

    Raises:
        QJLError: if it is not there, does not load, belongs to another version, or lacks what ``QJL_CPU_ISA`` names.
    """
    copies = _copies()
    if not copies:
        raise QJLError(
            "the cpu backend is not here, because no compiler was found when qjl was installed: "
            f"install GCC 12 or Clang and run {_REINSTALL}."
        )
    library = _first_that_fits(reversed(copies))
    if name := os.environ.get(ISA_VARIABLE):
        _select(library, name, f"{ISA_VARIABLE}={name}")
    return library


def _first_that_fits(paths: Any) -> ctypes.CDLL:
    """Where none does, what is wrong with the first."""
    refused = []
    for path in paths:
        try:
            return _opened(path)
        except QJLError as error:
            refused.append(error)
    raise refused[0]


def _opened(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise QJLError(f"{path} does not load ({error}): run {_REINSTALL}.") from error
    if not fits(library):
        raise QJLError(f"{path} was built from another version of qjl: run {_REINSTALL}.")
    declare(library)
    return library


def fits(library: Any) -> bool:
    """Whether the structs of the library are those of this version."""
    if not hasattr(library, "qjl_abi"):
        return False
    library.qjl_abi.restype = c_uint64
    return library.qjl_abi() % 2**64 == structs.abi()


def declare(library: Any) -> None:
    """Tell ctypes what the functions return."""
    for name, kind in _RETURNS.items():
        getattr(library, name).restype = kind


@cache
def limits() -> structs.Limits:
    """What is the most that the library takes."""
    most = structs.Limits()
    load().qjl_limits(byref(most))
    return most


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


def call(function: str, operation: ctypes.Structure) -> int:
    """Run one operation with as many threads as torch uses: 0, or the bytes of room that it lacks.

    Raises:
        QJLError: if the sizes in the operation do not fit each other.
    """
    library = load()
    returned = getattr(library, function)(byref(operation), c_int64(torch.get_num_threads()))
    if returned < 0:
        reason = library.qjl_refusal(c_int64(returned)).decode()
        raise QJLError(f"the cpu backend does not take this ({reason}): set QJL_BACKEND=reference to do without it.")
    return returned


def call_in_room(function: str, operation: Any, room_of: Callable[[int], Tensor]) -> None:
    """``call`` with room from ``room_of(bytes)``, kept until it is done."""
    while needed := call(function, operation):
        room = room_of(needed)
        operation.room, operation.room_bytes = room.data_ptr(), room.nbytes


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
