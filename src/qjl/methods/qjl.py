"""QJL: 1-bit quantized Johnson-Lindenstrauss transform (arXiv 2406.03482).

A token k is stored as ``sign(S k)`` and ``||k||``; a query is projected but not quantized, and
``c ||k|| <S q, sign(S k)>`` estimates ``<q, k>`` without bias (Definition 3.1, Lemma 3.2; c is
``Sketch.sign_scale``). No zero points, no scales per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from qjl.codebook import NIBBLE, sign_code
from qjl.errors import QJLError
from qjl.methods.base import Arrays, Codec, LayerContext, Quantizer, require_packable
from qjl.methods.bitpacking import as_half, pack_tokens, unpack_tokens
from qjl.methods.nibble import HalfScale, NibbleCodec, nibble_layout
from qjl.ops.recipe import DenseMap, Map, Recipe, SketchMap
from qjl.packed import BLOCK, Blocks, Field, Layout, blocks_of_tokens
from qjl.sketch import Sketch, SketchKind, hadamard_draws


@dataclass(frozen=True)
class QJL(Quantizer):
    """The paper's quantizer; on values too, where the same code estimates every coordinate.

    - ``sketch_ratio``: m / d, bits per coordinate of the inlier sketch.
    - ``outliers``: channels of largest norm per group of ``group_size`` tokens, found in the tokens themselves and
      sketched apart with ``outlier_ratio * d`` bits (section 4.1 and the public code). The estimate of each part
      uses only the query's channels of that part.

    True bits of a coordinate: m/d + 16/d, with outliers also outlier_ratio + 16/d + 8 outliers/(group_size d).
    """

    sketch_ratio: float = 2.0
    sketch: SketchKind = "orthogonal"
    outliers: int = 0
    outlier_ratio: float = 2.0
    group_size: int = 32
    seed: int = 0

    method: ClassVar[str] = "qjl"
    source: ClassVar[str] = "arXiv:2406.03482"

    def __post_init__(self) -> None:
        if self.outliers < 0 or self.group_size <= 0 or BLOCK % self.group_size:
            raise QJLError("QJL needs outliers >= 0 and a group_size that divides 64.")
        if self.outliers and self.outlier_ratio > self.sketch_ratio:
            raise QJLError("the outlier sketch takes the first rows of S, so outlier_ratio <= sketch_ratio.")

    def sketch_for(self, head_dim: int) -> Sketch:
        """S for this head_dim.

        Raises:
            QJLError: if m does not pack into bytes or head_dim is not a multiple of 8.
        """
        require_packable(head_dim)
        return Sketch(_rows(self.sketch_ratio, head_dim), head_dim, self.sketch, self.seed)

    def outlier_rows(self, head_dim: int) -> int:
        return Sketch(_rows(self.outlier_ratio, head_dim), head_dim).m

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        layout = dict(nibble_layout(self.sketch_for(head_dim).m // NIBBLE, HalfScale.FIELD))
        if self.outliers:
            if not self.outliers < head_dim <= 256:
                raise QJLError(f"{self.outliers} outlier channels do not fit head_dim {head_dim} (at most 256).")
            layout["outlier_codes"] = Field((self.outlier_rows(head_dim) // 8, BLOCK), torch.uint8)
            layout["outlier_scale"] = HalfScale.FIELD
            layout["outlier_index"] = Field((BLOCK // self.group_size, self.outliers), torch.uint8)
        return layout

    def build(self, context: LayerContext, learned: Arrays) -> Codec:
        sketch = self.sketch_for(context.head_dim)
        matrix = sketch.matrix.to(context.device)
        if not self.outliers:
            return SignCodec(sketch, matrix, context.heads)
        return OutlierCodec(self, self.layout(context.head_dim), sketch, matrix)


class SignCodec(NibbleCodec):
    """Norm (times c) and signs of the sketch; ``query_map`` is S, shared by all heads and layers."""

    def __init__(self, sketch: Sketch, matrix: Tensor, heads: int) -> None:
        query_map = matrix.expand(heads, -1, -1)
        self._code = sign_code(sketch.m).to(matrix.device)
        super().__init__(query_map, self._code.decoder, HalfScale(), None)
        self._sketch = sketch
        self._matrix = matrix
        self._sign_scale = sketch.sign_scale

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(self._map, self._code.parts, norm_factor=self._sign_scale)

    @property
    def _map(self) -> Map:
        if self._sketch.kind != "hadamard":
            return DenseMap.of(self.query_map)
        flips, order, size = hadamard_draws(self._sketch)
        return SketchMap(flips.to(self._matrix.device), order.to(self._matrix.device), size)

    def encode(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self._code.encode(residual @ self._matrix.T)[0], residual.norm(dim=-1) * self._sign_scale


class OutlierCodec(Codec):
    """Two sketches per token, of its inlier and of its outlier channels.

    Which channels are outliers changes with the group, so the query's share of each sketch does too: there is no
    one table per query, and scores go through ``dequantize``.
    """

    def __init__(self, quantizer: QJL, layout: Layout, sketch: Sketch, matrix: Tensor) -> None:
        self.layout = layout
        self.quantizer = quantizer
        self._matrix = matrix
        self._scale = sketch.sign_scale
        rows = quantizer.outlier_rows(sketch.d)
        self._outlier_matrix = matrix[:rows]
        self._code, self._outlier_code = (sign_code(m).to(matrix.device) for m in (sketch.m, rows))
        self._outlier_scale = Sketch(rows, sketch.d, sketch.kind).sign_scale

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self._matrix,)

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        x = x.float()
        groups = x.unflatten(2, (-1, self.quantizer.group_size))
        index = groups.norm(dim=3).topk(self.quantizer.outliers, dim=-1).indices  # [B, H, groups, outliers]
        mask = self._outlier_mask(index)
        inlier, outlier = x * ~mask, x * mask
        return {
            "codes": pack_tokens(self._code.encode(inlier @ self._matrix.T)[0], NIBBLE),
            "scale": _norms(inlier),
            "outlier_codes": pack_tokens(self._outlier_code.encode(outlier @ self._outlier_matrix.T)[0], NIBBLE),
            "outlier_scale": _norms(outlier),
            "outlier_index": index.to(torch.uint8).unflatten(2, (-1, BLOCK // self.quantizer.group_size)),
        }

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        mask = self._outlier_mask(blocks["outlier_index"].flatten(2, 3).long())
        inlier = _signs(blocks["codes"]) @ (self._matrix * self._scale)
        outlier = _signs(blocks["outlier_codes"]) @ (self._outlier_matrix * self._outlier_scale)
        inlier = inlier * blocks["scale"].flatten(2).float()[..., None]
        outlier = outlier * blocks["outlier_scale"].flatten(2).float()[..., None]
        return torch.where(mask, outlier, inlier)

    def _outlier_mask(self, index: Tensor) -> Tensor:
        """``int64 [B, H, groups, outliers] -> bool [B, H, T, D]``."""
        mask = torch.zeros((*index.shape[:3], self._matrix.shape[1]), dtype=torch.bool, device=index.device)
        mask.scatter_(3, index, True)
        return mask.repeat_interleave(self.quantizer.group_size, dim=2)


def _rows(ratio: float, head_dim: int) -> int:
    rows = ratio * head_dim
    if rows != int(rows):
        raise QJLError(f"a sketch of {ratio} x head_dim {head_dim} has no whole number of rows.")
    return int(rows)


def _norms(x: Tensor) -> Tensor:
    return blocks_of_tokens(as_half(x.norm(dim=-1))[..., None]).squeeze(-1)


def _signs(codes: Tensor) -> Tensor:
    """Packed signs as ``float32 [B, H, T, m]``."""
    return unpack_tokens(codes, 1).float() * 2 - 1
