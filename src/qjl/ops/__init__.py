"""The operations on packed codes: signatures, shapes and equations. Backends implement them.

Notation: B batch, H key-value heads, R query rows per key-value head (group x query tokens), N nibbles per
token, w coordinates per nibble, 64 tokens per block.

- ``pack(nibbles)``: ``uint8 [B, H, T, N] -> uint8 [B, H, T / 64, N / 2, 64]``. Byte j of a token holds
  nibble 2j in its low half and nibble 2j + 1 in its high half; bytes are token-minor.
- ``unpack(codes)``: its inverse, ``[B, H, T, N]``.
- ``scan(tables, codes)``: ``float32 [B, H, R, N, 16], codes -> float32 [B, H, R, T]``,
  ``out[r, t] = sum_j tables[r, j, nibble_j(t)]``.
- ``expand(entries, codes)``: ``float32 [H, N, 16, w], codes -> float32 [B, H, T, N * w]``,
  ``out[t, j] = entries[j, nibble_j(t)]``; the transient tile that serves many queries, or values, at once.

``reference`` (torch) is the living definition of every op.
"""

from __future__ import annotations

from types import ModuleType

from qjl.errors import QJLError
from qjl.ops import reference

_BACKENDS: dict[str, ModuleType] = {"reference": reference}
_active: ModuleType = reference


def backends() -> list[str]:
    """Names of the backends that this installation can run."""
    return sorted(_BACKENDS)


def use_backend(name: str) -> None:
    """Select the backend of all following calls.

    Raises:
        QJLError: if that backend is not there.
    """
    global _active
    if name not in _BACKENDS:
        raise QJLError(f"backend {name!r} is not available here: choose one of {', '.join(backends())}.")
    _active = _BACKENDS[name]


def active_backend() -> str:
    return next(name for name, module in _BACKENDS.items() if module is _active)


def pack(nibbles):
    """Pack nibbles into blocks of 64 tokens; T must be a multiple of 64 and N even."""
    return _active.pack(nibbles)


def unpack(codes):
    """Nibbles of packed blocks, one per byte."""
    return _active.unpack(codes)


def scan(tables, codes):
    """Sum of table look-ups for every query row and token."""
    return _active.scan(tables, codes)


def expand(entries, codes):
    """Codebook entries of every token in slot order."""
    return _active.expand(entries, codes)
