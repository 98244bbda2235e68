"""Johnson-Lindenstrauss sketches S: R^d -> R^m, regenerated from a seed and never stored per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from qjl.errors import QJLError

CPU = torch.device("cpu")
SketchKind = Literal["gaussian", "orthogonal", "hadamard"]


@dataclass(frozen=True)
class Sketch:
    """A linear map S with rows of expected norm sqrt(d).

    - ``gaussian``: iid N(0, 1) entries, QJL (arXiv 2406.03482) section 3.
    - ``orthogonal``: stacked Haar-random orthogonal blocks times sqrt(d), QJL section 4.1; its variance is
      about 2.8 times lower at m = d.
    - ``hadamard``: random sign flips before a Walsh-Hadamard transform (d padded to a power of two), one
      flip per block. Fast, but **biased** for signs: its constant is exact only on average over directions.

    Raises:
        QJLError: if m is not a positive multiple of 8, d is not positive, or the kind is unknown.
    """

    m: int
    d: int
    kind: SketchKind = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.m <= 0 or self.m % 8:
            raise QJLError(f"sketch dimension m={self.m} does not pack into bytes: use a multiple of 8.")
        if self.d <= 0:
            raise QJLError(f"sketch input dimension d={self.d} must be positive.")
        if self.kind not in ("gaussian", "orthogonal", "hadamard"):
            raise QJLError(f"unknown sketch {self.kind!r}: use gaussian, orthogonal or hadamard.")

    @property
    def matrix(self) -> Tensor:
        """S, ``float32 [m, d]``."""
        return _matrix(self)

    @property
    def is_unbiased(self) -> bool:
        """Whether ``sign_scale`` makes the sign estimator exactly unbiased over seeds."""
        return self.kind != "hadamard"

    @property
    def sign_scale(self) -> float:
        """The c for which ``c ||k|| <S q, sign(S k)>`` has expectation ``<q, k>`` over S.

        sqrt(pi/2)/m for Gaussian rows (Lemma 3.2). An orthogonal row is sqrt(d) times a uniform unit vector
        u, so c = 1 / (m sqrt(d) E|u_1|) with E|u_1| = Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)).
        """
        if self.kind == "orthogonal":
            return 1.0 / (self.m * math.sqrt(self.d) * mean_abs_coordinate(self.d))
        return math.sqrt(math.pi / 2) / self.m

    @property
    def nbytes(self) -> int:
        """Bytes of S in float32, held once per model."""
        return self.m * self.d * 4


def mean_abs_coordinate(d: int) -> float:
    """E|u_1| for u uniform on the unit sphere of R^d."""
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


@lru_cache(maxsize=64)
def haar_rotation(d: int, seed: int = 0, device: torch.device = CPU) -> Tensor:
    """A Haar-random orthogonal matrix, ``float32 [d, d]``, one for all layers."""
    return _haar(d, torch.Generator().manual_seed(seed)).float().contiguous().to(device)


@lru_cache(maxsize=64)
def _matrix(sketch: Sketch) -> Tensor:
    generator = torch.Generator().manual_seed(sketch.seed)
    if sketch.kind == "gaussian":
        return torch.randn(sketch.m, sketch.d, generator=generator, dtype=torch.float32)
    if sketch.kind == "orthogonal":
        blocks = [_haar(sketch.d, generator) for _ in range(-(-sketch.m // sketch.d))]
        return (torch.cat(blocks)[: sketch.m] * math.sqrt(sketch.d)).float()
    flips, order, size = hadamard_draws(sketch)
    rows = hadamard(size)[order.long(), : sketch.d]
    return rows * flips.repeat_interleave(size, 0)[: sketch.m]


def _haar(d: int, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()  # without the signs of R, Q is not Haar-distributed


@lru_cache(maxsize=64)
def hadamard_draws(sketch: Sketch) -> tuple[Tensor, Tensor, int]:
    """What is random in a ``hadamard`` sketch.

    The signs before the transform of each copy, ``float32 [copies, d]``; the rows chosen of each, ``int32 [m]``; and
    the size of the transform.
    """
    generator = torch.Generator().manual_seed(sketch.seed)
    size = 1 << (sketch.d - 1).bit_length()
    flips, order = [], []
    for _ in range(-(-sketch.m // size)):
        flips.append(torch.randint(0, 2, (sketch.d,), generator=generator) * 2 - 1)
        order.append(torch.randperm(size, generator=generator))
    return torch.stack(flips).float(), torch.cat(order)[: sketch.m].int(), size


def hadamard(size: int) -> Tensor:
    """The Walsh-Hadamard matrix of a power-of-two size, entries +-1, ``float32 [size, size]``."""
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
