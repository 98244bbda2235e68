"""What is compared with: torch's attention, and good C++ of other kinds (``csrc/baselines.cpp``)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl.errors import QJLError
from qjl.ops.cpu import library

READ_BYTES = 1 << 28


class _FlashDecode(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "keys", "values", "out")),
        *((name, c_int64) for name in ("heads", "group", "tokens", "head_dim")),
        ("scaling", c_float),
    )


class _PopcountScan(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "signs", "scale", "ones", "scores")),
        *((name, c_int64) for name in ("heads", "group", "tokens", "m")),
    )


class _Read(ctypes.Structure):
    _fields_ = (("numbers", c_void_p), ("count", c_int64), ("sums", c_void_p))


def require_compiled() -> None:
    """Raises QJLError unless the compiled baselines run here."""
    if not library.load().qjl_baselines_run_here():
        raise QJLError("the compiled baselines need AVX2, FMA, F16C and BMI2: run the benchmarks on another machine.")


def flash_decode(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of ``query [H, group, D]`` over float16 ``keys, values [H, T, D]``: float32 ``[H, group, D]``."""
    query = query.float().contiguous()
    out = torch.empty_like(query)
    pointers = (x.data_ptr() for x in (query, keys, values, out))
    heads, group, head_dim = query.shape
    library.call("qjl_flash_decode", _FlashDecode(*pointers, heads, group, keys.shape[1], head_dim, scaling))
    return out


def grouped_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """torch's, of ``query [H, group, D]`` over ``keys, values [H, T, D]``: the group takes the place of the tokens.

    With ``enable_gqa`` torch takes about ten times as long on a CPU.
    """
    return F.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scaling)[0]


def multiply(size: int) -> Callable[[], Tensor]:
    """A product of square float32 matrices that stay in the caches: as much arithmetic as the machine can do."""
    a, b = torch.randn(2, size, size)
    return lambda: a @ b


@dataclass(frozen=True, eq=False)
class SignRows:
    """Sign codes as RaBitQ stores them: a token's m bits together, its scale, and how many of them are set."""

    signs: Tensor  # uint8 [H, T, m / 8]
    scale: Tensor  # float32 [H, T]
    ones: Tensor  # float32 [H, T]

    @classmethod
    def random(cls, heads: int, tokens: int, m: int) -> SignRows:
        signs = torch.randint(0, 256, (heads, tokens, m // 8), dtype=torch.uint8)
        ones = _ONES[signs.long()].sum(-1, dtype=torch.float32)
        return cls(signs, torch.rand(heads, tokens) + 0.5, ones)

    @property
    def nbytes(self) -> int:
        return self.signs.nbytes + self.scale.nbytes + self.ones.nbytes

    @staticmethod
    def takes(m: int) -> bool:
        """Whether the popcount scan is made for so many bits."""
        return m == 128 or (m % 256 == 0 and m <= 2048)


_ONES = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


def popcount_scan(query: Tensor, rows: SignRows) -> Tensor:
    """``scale * <q, signs>`` with four bits per coordinate of ``query [H, group, m]``: float32 ``[H, group, T]``."""
    query = query.contiguous()
    heads, group, m = query.shape
    scores = torch.empty(heads, group, rows.signs.shape[1])
    pointers = (x.data_ptr() for x in (query, rows.signs, rows.scale, rows.ones, scores))
    library.call("qjl_popcount_scan", _PopcountScan(*pointers, heads, group, rows.signs.shape[1], m))
    return scores


class Reader:
    """Reads memory and does nothing else: the bandwidth that nothing can exceed."""

    def __init__(self) -> None:
        self._numbers = torch.ones(READ_BYTES // 4)

    @property
    def nbytes(self) -> int:
        return self._numbers.nbytes

    def __call__(self) -> Tensor:
        sums = torch.empty(torch.get_num_threads(), 4)
        library.call("qjl_read", _Read(self._numbers.data_ptr(), self._numbers.numel(), sums.data_ptr()))
        return sums
