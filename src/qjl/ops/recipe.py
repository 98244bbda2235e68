"""What ``encode`` does to tokens, as plain arrays: a linear map, parts that code its coordinates, and a scale.

Tensors lie on one device, contiguous but for heads that share theirs (a stride of 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qjl.errors import QJLError


class Derived(dict[str, Any]):
    """What a backend makes of something at its first use; copies and files begin without it."""

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


@dataclass(frozen=True, eq=False)
class DenseMap:
    """``matrix [H, D', D]``, float16 or float32; products are float32."""

    matrix: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> DenseMap:
        """That of a matrix whose rows may not lie together."""
        heads = matrix.shape[0]
        is_shared = heads > 1 and matrix.stride(0) == 0
        return cls(matrix[:1].contiguous().expand(heads, -1, -1) if is_shared else matrix.contiguous())

    @property
    def rows(self) -> int:
        return self.matrix.shape[1]

    def takes(self, heads: int, dim: int) -> bool:
        """Whether it maps so many heads of this dimension."""
        return self.matrix.shape[0] in (1, heads) and self.matrix.shape[2] == dim


@dataclass(frozen=True, eq=False)
class SketchMap:
    """A randomised Hadamard sketch: row r is row ``order[r]`` of H, not normalised, with the signs of its copy.

    ``flips`` float32 [copies, D], ``order`` int32 [m]; H is of ``size``, D padded to a power of two.
    """

    flips: Tensor
    order: Tensor
    size: int

    @property
    def rows(self) -> int:
        return self.order.shape[0]

    def takes(self, heads: int, dim: int) -> bool:
        """Whether it maps tokens of this dimension."""
        return self.flips.shape == (-(-self.rows // self.size), dim) and dim <= self.size


Map = DenseMap | SketchMap


@dataclass(frozen=True, eq=False)
class LevelTables:
    """Search trees of scalar quantizers: ``tree`` and ``levels`` float32, ``patterns`` int32, all [kinds, 256].

    Bit d of the path to a level tells whether a number lies above the edge at depth d. The edges at depth d are
    ``tree[2**d + path so far]``; level and pattern of bits lie at the whole path.
    """

    tree: Tensor
    levels: Tensor
    patterns: Tensor


@dataclass(frozen=True, eq=False)
class LevelsPart:
    """The nearest level of each coordinate, of up to ``widest`` bits; the fields are those of ``ScalarCode``."""

    kinds: Tensor
    bit_coordinate: Tensor
    bit_index: Tensor
    tables: LevelTables
    widest: int

    @property
    def dim(self) -> int:
        return self.kinds.shape[1]

    @property
    def nibbles(self) -> int:
        return self.bit_coordinate.shape[1]

    def takes(self, heads: int) -> bool:
        """Whether it codes so many heads."""
        return self.kinds.shape[0] in (1, heads) and self.bit_coordinate.shape[0] in (1, heads)


@dataclass(frozen=True, eq=False)
class TrellisPart:
    """The nibbles of the nearest path; ``own`` and ``next`` are those of ``TrellisCode``."""

    dim: int
    own: Tensor
    next: Tensor

    @property
    def nibbles(self) -> int:
        return self.dim // self.own.shape[1]

    def takes(self, heads: int) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class SignsPart:
    """Signs, refined in so many ``sweeps`` where there is a ``gram``: the fields are those of ``SignCode``."""

    dim: int
    gram: Tensor | None
    block: int
    sweeps: int

    @property
    def nibbles(self) -> int:
        return self.dim // 4

    def takes(self, heads: int) -> bool:
        return True


Part = LevelsPart | TrellisPart | SignsPart


@dataclass(frozen=True, eq=False)
class Recipe:
    """``mean`` is subtracted, ``map`` applied, and the parts code the coordinates side by side.

    - ``gains``: tried on each token, if more than one; ``weights [H, D']``: what the error of a coordinate counts.
    - ``units [H]``: the scale is ``|y|^2 / <y, y_hat>``, as a ``LogScale`` of these units; the parts see y of rms 1.
    - ``norm_factor``: without units, the scale is the norm of the token times this, as float16.
    """

    map: Map
    parts: tuple[Part, ...]
    mean: Tensor | None = None
    gains: tuple[float, ...] = (1.0,)
    weights: Tensor | None = None
    units: Tensor | None = None
    norm_factor: float = 1.0
    derived: dict[str, Any] = field(default_factory=Derived, init=False)

    def __post_init__(self) -> None:
        rows = self.map.rows
        if sum(part.dim for part in self.parts) != rows:
            raise QJLError(f"the parts of a recipe do not make up the {rows} coordinates of its map.")
        if not self.gains:
            raise QJLError("a recipe has no gain to try.")

    def takes(self, heads: int, dim: int) -> bool:
        """Whether it is for so many heads of this dimension."""
        by_head = (self.mean, self.weights, self.units)
        sizes = ((heads, dim), (heads, self.map.rows), (heads,))
        fit = all(x is None or x.shape == size for x, size in zip(by_head, sizes, strict=True))
        return fit and self.map.takes(heads, dim) and all(part.takes(heads) for part in self.parts)


@dataclass(frozen=True)
class GridRecipe:
    """Orthonormal Hadamard matrices of ``size`` along the diagonal, then a grid per group.

    It has ``2**num_bits`` levels, from ``clip`` times the least to ``clip`` times the greatest channel of the group.
    """

    size: int
    groups: int
    num_bits: int
    clip: float
