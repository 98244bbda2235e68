"""Trellis codes of N(0, 1) whose decoder is still a sum of nibble look-ups.

Nibble j adds one point to its own ``w`` coordinates and another to those of nibble j + 1:
``y_hat_j = own[n_j] + next[n_(j-1)]``. So each group of coordinates has 256 points to choose from and pays for 16; the
best nibbles of a token are found by the Viterbi algorithm over 16 states (trellis coded quantization, Marcellin and
Fischer 1990). Distortion of 128 coordinates on N(0, 1), beside that of Lloyd-Max levels of the same bits:

====  ==========  =======  =========
w     bits        trellis  Lloyd-Max
====  ==========  =======  =========
1     4           .0066    .0095
2     2           .0878    .1175
4     1           .3248    .3634
====  ==========  =======  =========

The points in ``trellis.json`` come from ``train``; ``scripts/train_trellis.py`` makes them again. They are multiples of
1/32, so that kernels sum them as 8-bit integers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import ClassVar

import torch
from torch import Tensor

from qjl.codebook import NIBBLE, Encoder, NibbleCode, joined_code, scalar_code
from qjl.errors import QJLError
from qjl.ops.recipe import Part, TrellisPart

POINTS = 2**NIBBLE
WIDTHS = (1, 2, 4)
_TOKENS_AT_ONCE = 512  # whose costs stay in the processor's cache


@dataclass(frozen=True, eq=False)
class TrellisCode:
    """Encoder of ``dim`` coordinates, ``w`` to a nibble: 4 / w bits each."""

    own: Tensor  # float32 [16, w]
    next: Tensor
    decoder: NibbleCode

    depends_on_gain: ClassVar[bool] = False  # it does a little: 1 %, at the price of another search per gain

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.own, self.next, *self.decoder.tensors)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (TrellisPart(self.decoder.dim, self.own.contiguous(), self.next.contiguous()),)

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Nibbles ``uint8 [B, H, T, D / w]`` and what they decode to, ``float32 [B, H, T, D]``."""
        groups = z.unflatten(-1, (-1, self.own.shape[1]))
        nibbles = torch.cat([self._best(part) for part in groups.flatten(0, 2).split(_TOKENS_AT_ONCE)])
        decoded = decode(nibbles, self.own, self.next)
        return nibbles.to(torch.uint8).view(*z.shape[:3], -1), decoded.view(z.shape)

    def nearest(self, z: Tensor) -> Tensor:
        """What they decode to alone."""
        return self.encode(z)[1]

    def _best(self, groups: Tensor) -> Tensor:
        return best_nibbles(groups, self.own, self.next)

    def to(self, device: torch.device) -> TrellisCode:
        return TrellisCode(self.own.to(device), self.next.to(device), self.decoder.to(device))


def trellis_code(dim: int, width: int) -> TrellisCode:
    """The code of ``dim`` coordinates, ``width`` of them (1, 2 or 4) to a nibble.

    Raises:
        QJLError: if they do not fill whole bytes.
    """
    if dim % (2 * width):
        raise QJLError(f"{dim} coordinates, {width} to a nibble, do not fill bytes: use a multiple of {2 * width}.")
    own, following = points(width)
    nibbles = dim // width
    first = torch.arange(0, dim, width, dtype=torch.int16)[:, None] + torch.arange(width, dtype=torch.int16)
    coordinates = torch.cat([first, first.roll(-1, 0)], dim=1)
    entries = torch.cat([own, following], dim=1).expand(nibbles, -1, -1).clone()
    entries[-1, :, width:] = 0  # nothing follows the last nibble
    decoder = NibbleCode(coordinates[None], entries.half()[None], dim)
    return TrellisCode(own, following, decoder)


@lru_cache(maxsize=64)
def even_trellis(bits: int, dim: int, device: torch.device) -> Encoder:
    """The code that spreads the bits of a token evenly; the first coordinates get one more where some are left.

    Coordinates of 3 bits, which divide no nibble, keep Lloyd-Max levels.
    """
    width, left = divmod(bits, dim)
    parts = [_even_part(width + 1, left)] if left else []
    parts.append(_even_part(width, dim - left))
    return (parts[0] if len(parts) == 1 else joined_code(*parts)).to(device)


def _even_part(bits: int, dim: int) -> Encoder:
    return scalar_code([[bits] * dim]) if NIBBLE % bits else trellis_code(dim, NIBBLE // bits)


@lru_cache(maxsize=len(WIDTHS))
def points(width: int) -> tuple[Tensor, Tensor]:
    """``own`` and ``next``, ``float32 [16, width]``, as half precision holds them."""
    stored = json.loads(files("qjl").joinpath("trellis.json").read_text(encoding="utf-8"))[str(width)]
    own, following = (torch.tensor(stored[name], dtype=torch.float32).half().float() for name in ("own", "next"))
    return own, following


def decode(nibbles: Tensor, own: Tensor, following: Tensor) -> Tensor:
    """``int64 [N, L] -> float32 [N, L, w]``."""
    decoded = own[nibbles]
    decoded[:, 1:] += following[nibbles[:, :-1]]
    return decoded


def best_nibbles(groups: Tensor, own: Tensor, following: Tensor) -> Tensor:
    """The nibbles ``int64 [N, L]`` that decode nearest to ``groups [N, L, w]``: Viterbi's algorithm.

    With |y - own_c - next_p|^2 = |y|^2 - 2 y own_c - 2 y next_p + |own_c + next_p|^2, only the last term needs the
    256 pairs of states. The way back looks for each best predecessor again, which is cheaper than to keep them.
    """
    pair_cost = (own[None] + following[:, None]).square().sum(-1)  # [previous, current]
    to_own, to_next = -2 * groups @ own.T, -2 * groups @ following.T  # [N, L, 16]
    cost = to_own[:, 0] + own.square().sum(-1)
    reached = []
    for j in range(1, groups.shape[1]):
        reached.append(cost + to_next[:, j])
        cost = (reached[-1][:, :, None] + pair_cost).amin(1) + to_own[:, j]
    best = [cost.argmin(1)]
    for before in reversed(reached):
        best.append((before + pair_cost.T[best[-1]]).argmin(1))
    return torch.stack(best[::-1], dim=1)


def train(own: Tensor, following: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, float]:
    """One step of Lloyd's iteration on ``samples [N, L, w]``: encode, then the points of least squares.

    Returns the points and the distortion before the step.
    """
    nibbles = torch.cat([best_nibbles(part, own, following) for part in samples.split(_TOKENS_AT_ONCE)])
    error = samples - decode(nibbles, own, following)
    chosen = torch.nn.functional.one_hot(nibbles, POINTS).float()
    previous = torch.nn.functional.pad(chosen[:, :-1], (0, 0, 1, 0))
    design = torch.cat([chosen, previous], dim=-1).flatten(0, 1)
    gram = design.T @ design + 1e-3 * torch.eye(2 * POINTS, dtype=torch.float32)
    own, following = torch.linalg.solve(gram, design.T @ samples.flatten(0, 1)).split(POINTS)
    shared = following.mean(0)  # moves between the two without a difference, but at the ends
    return own + shared, following - shared, float(error.square().mean())
