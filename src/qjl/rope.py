"""Rotary position embedding as a linear map R_n of a key or query at position n."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl.errors import QJLError


@dataclass(frozen=True, eq=False)
class Rope:
    """R_n rotates pair f of the first ``2 F`` coordinates by ``n * inv_freq[f]`` and scales it.

    ``inv_freq`` float32 [F]. ``interleaved``: pair f is (2f, 2f+1), otherwise (f, f + F). ``scaling`` is the
    attention factor of yarn-like variants. Coordinates past ``2 F`` are left alone (partial rotary).
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[0]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """R_n x for ``x [B, H, T, D]`` and ``positions [B, T]``."""
        return self._apply(x, self.angles(positions)[:, None], self.scaling)

    def rotate_exactly(self, x: Tensor, positions: Tensor) -> Tensor:
        """The same by exact angles."""
        return self._apply(x, self.exact_angles(positions)[:, None], self.scaling)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """R_n^-1 x, the same shapes."""
        return self._apply(x, -self.angles(positions)[:, None], 1 / self.scaling)

    def angles(self, positions: Tensor) -> Tensor:
        """``[...] -> float32 [..., F]``, rounded as models round them."""
        return positions[..., None].float() * self.inv_freq.to(positions.device)

    def exact_angles(self, positions: Tensor) -> Tensor:
        """The same less whole turns, exact at any position; takes eighty times as long."""
        return (positions[..., None].double() * self.inv_freq.double().to(positions.device)).remainder(math.tau).float()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First and second coordinates of all pairs, ``[..., F]`` each, and the unrotated rest."""
        rotary, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.interleaved:
            return rotary[..., 0::2], rotary[..., 1::2], rest
        half = self.rotary_dim // 2
        return rotary[..., :half], rotary[..., half:], rest

    def join(self, first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
        """Inverse of ``split``."""
        if self.interleaved:
            return torch.cat([torch.stack([first, second], dim=-1).flatten(-2), rest], dim=-1)
        return torch.cat([first, second, rest], dim=-1)

    def averaged(self, moment: Tensor, positions: Tensor) -> Tensor:
        """Mean of R_n C R_n^T over ``positions [P]`` for ``C [..., D, D]``.

        With R_n = diag(c_n) + diag(s_n) J, J a quarter turn of every pair, only the means of c c^T, s c^T and s s^T
        over the positions are needed.
        """
        angles = self.angles(positions).to(moment.dtype)
        unrotated = moment.shape[-1] - self.rotary_dim
        zeros = angles.new_zeros(len(positions), unrotated)
        cos = self.join(angles.cos(), angles.cos(), zeros + 1 / self.scaling) * self.scaling
        sin = self.join(angles.sin(), angles.sin(), zeros) * self.scaling
        cos_cos, sin_cos, sin_sin = (a.T @ b / len(positions) for a, b in ((cos, cos), (sin, cos), (sin, sin)))
        right = self._quarter_turned(moment)  # C J^T
        left = self._quarter_turned(moment.transpose(-1, -2)).transpose(-1, -2)  # J C
        both = self._quarter_turned(left)
        return moment * cos_cos + left * sin_cos + right * sin_cos.T + both * sin_sin

    def _quarter_turned(self, x: Tensor) -> Tensor:
        first, second, rest = self.split(x)
        return self.join(-second, first, torch.zeros_like(rest))

    def arrays(self) -> dict[str, Tensor]:
        """As a file has it: ``inv_freq`` float32 [F], ``scaling`` float64 [], ``interleaved`` bool []."""
        scaling = torch.tensor(self.scaling, dtype=torch.float64)
        interleaved = torch.tensor(self.interleaved, dtype=torch.bool)
        return {"inv_freq": self.inv_freq, "scaling": scaling, "interleaved": interleaved}

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Rope:
        """The inverse of ``arrays``.

        Raises:
            QJLError: if one of them is missing or not as it should be.
        """
        expected = {"inv_freq": (1, torch.float32), "scaling": (0, torch.float64), "interleaved": (0, torch.bool)}
        if {name: (array.dim(), array.dtype) for name, array in arrays.items()} != expected:
            raise QJLError("a RoPE is inv_freq float32 [F], scaling float64 [] and interleaved bool []: save it again.")
        return cls(arrays["inv_freq"], float(arrays["scaling"]), bool(arrays["interleaved"]))

    def to(self, device: torch.device) -> Rope:
        return Rope(self.inv_freq.to(device), self.scaling, self.interleaved)

    def _apply(self, x: Tensor, angles: Tensor, scaling: float) -> Tensor:
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        first, second, rest = self.split(x)
        rotated_first = first * cos - second * sin
        return self.join(rotated_first, second * cos + first * sin, rest.expand(*rotated_first.shape[:-1], -1))
