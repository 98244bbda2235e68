"""What is compared with: torch's attention, and good C++ of other kinds (``csrc/baselines.cpp``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from qjl.compat import TorchDynamoException
from qjl.errors import QJLError
from qjl.ops.cpu import library, structs

READ_BYTES = 1 << 28
BF16, FP32, FP16 = "torch_bf16", "torch_fp32", "fp16_avx2"
FLASH, FLEX = "flash_bf16", "flex_bf16"


def require_compiled() -> None:
    """Raises QJLError unless the compiled baselines run here."""
    if not library.load().qjl_baselines_run_here():
        raise QJLError("the compiled baselines need AVX2, FMA, F16C and BMI2: run the benchmarks on another machine.")


def flash_decode(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of ``query [B, H, group, D]`` over float16 ``keys, values [B, H, T, D]``, in float32."""
    query = query.float().contiguous()
    out = torch.empty_like(query)
    pointers = (x.data_ptr() for x in (query, keys, values, out))
    batch, heads, group, head_dim = query.shape
    sizes = (batch * heads, group, keys.shape[2], head_dim)
    library.call("qjl_flash_decode", structs.FlashDecode(*pointers, *sizes, scaling))
    return out


def grouped_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """torch's, of ``query [B, H, group, D]`` over ``keys, values [B, H, T, D]``: the group takes the tokens' place.

    With ``enable_gqa`` torch takes about ten times as long on a CPU.
    """
    return F.scaled_dot_product_attention(query, keys, values, scale=scaling)


def flash_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """The same by torch's flash backend and no other."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return grouped_attention(query, keys, values, scaling)


def flexible_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """The same by FlexAttention, compiled."""
    return _compiled_flex_attention()(query, keys, values, scale=scaling)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class Baseline:
    """Attention over keys and values in full, in this dtype."""

    dtype: torch.dtype
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    def runs_on(self, device: torch.device) -> bool:
        """Whether it can be compiled there."""
        tokens = torch.zeros(1, 1, 128, 64, dtype=self.dtype, device=device)
        try:
            self.attend(tokens[:, :, :16], tokens, tokens, 1.0)
        except TorchDynamoException:
            return False
        return True


BASELINES = {
    FP16: Baseline(torch.float16, flash_decode),
    BF16: Baseline(torch.bfloat16, grouped_attention),
    FP32: Baseline(torch.float32, grouped_attention),
    FLASH: Baseline(torch.bfloat16, flash_attention),
    FLEX: Baseline(torch.bfloat16, flexible_attention),
}


def multiply(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A product of square matrices: as much arithmetic as the machine can do, and how many operations it is."""
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    return partial(torch.matmul, a, b), 2 * size**3


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
    library.call("qjl_popcount_scan", structs.PopcountScan(*pointers, heads, group, rows.signs.shape[1], m))
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
        library.call("qjl_read", structs.Read(self._numbers.data_ptr(), self._numbers.numel(), sums.data_ptr()))
        return sums
