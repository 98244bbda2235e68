"""The codec of methods that rotate each token and round it to a uniform grid of its own.

With R orthogonal, y = k R and per group of channels ``y_hat = step (code - top / 2) + middle``, so a score is
``<q, k_hat> = <q R, y_hat>``: the query is turned once, no token is. Sums over the codes are table look-ups; the
middle meets the sum of the turned query's channels. Values are the mirror image, turned back once, on the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from qjl.codebook import uniform_code
from qjl.methods.base import Codec, require_packable
from qjl.methods.bitpacking import pack_tokens, token_minor, uniform_grid
from qjl.ops.forms import NibbleForm
from qjl.ops.recipe import GridRecipe
from qjl.packed import BLOCK, Blocks, Field, Layout
from qjl.sketch import hadamard

Bounds = Callable[[Tensor], tuple[Tensor, Tensor]]  # least and greatest level [..., 1] of the last dimension's channels


def grid_layout(head_dim: int, num_bits: int, group_size: int) -> Layout:
    """Codes, and a float16 step and middle per token and group: ``num_bits + 32 / group`` true bits.

    A group is ``group_size`` channels where that divides head_dim, otherwise the whole token.
    """
    require_packable(head_dim)
    groups = head_dim // group_size if head_dim % group_size == 0 else 1
    constants = Field((groups, BLOCK), torch.float16)
    return {"codes": Field((head_dim * num_bits // 8, BLOCK), torch.uint8), "step": constants, "middle": constants}


@dataclass(frozen=True)
class Extremes:
    """A grid from ``clip`` times the least to ``clip`` times the greatest channel."""

    clip: float = 1.0

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        low, high = min_max(y)
        return self.clip * low, self.clip * high


class RotatedGridCodec(Codec):
    """``rotation [H, D, D]``; ``bounds`` says between which numbers the grid of each group lies.

    ``hadamard_size`` tells that the rotation is a ``block_hadamard`` of that size.
    """

    def __init__(
        self, layout: Layout, rotation: Tensor, num_bits: int, bounds: Bounds, hadamard_size: int | None = None
    ) -> None:
        self.layout = layout
        self.rotation = rotation
        self.num_bits = num_bits
        self.bounds = bounds
        self.groups = layout["step"].shape[0]
        self.hadamard_size = hadamard_size
        self.code = uniform_code(rotation.shape[-1] // self.groups, num_bits).to(rotation.device)

    @cached_property
    def recipe(self) -> GridRecipe | None:
        if self.hadamard_size is None or not isinstance(self.bounds, Extremes):
            return None
        return GridRecipe(self.hadamard_size, self.groups, self.num_bits, self.bounds.clip)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rotation, *self.code.tensors)

    @cached_property
    def form(self) -> NibbleForm:  # type: ignore[override]
        return NibbleForm(
            map=self.rotation.transpose(1, 2),
            coordinates=self.code.coordinates,
            entries=self.code.entries,
            code_dim=self.rotation.shape[-1],
            scale="step",
            middle="middle",
            groups=self.groups,
        )

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        y = (x.float() @ self.rotation).unflatten(3, (self.groups, -1))  # [B, H, T, G, D / G]
        low, high = self.bounds(y)
        codes, step, middle = uniform_grid(y, low, high, self.num_bits)
        return {
            "codes": pack_tokens(codes.flatten(3), self.num_bits),
            "step": token_minor(step.squeeze(-1)),
            "middle": token_minor(middle.squeeze(-1)),
        }


def min_max(y: Tensor) -> tuple[Tensor, Tensor]:
    """A grid from the least to the greatest channel."""
    return y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)


def block_size(head_dim: int) -> int:
    """The largest power of two that divides head_dim."""
    return head_dim & -head_dim


@lru_cache(maxsize=64)
def block_hadamard(head_dim: int, size: int, device: torch.device) -> Tensor:
    """Orthonormal Walsh-Hadamard matrices of a size that divides head_dim, along the diagonal."""
    return torch.block_diag(*[hadamard(size) * size**-0.5] * (head_dim // size)).to(device)
