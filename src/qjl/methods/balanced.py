"""Centred codes in the balanced metric: an isotropic code for keys as they are, and for values.

Keys are centred by their mean before RoPE (its exact contribution is added back to the score), mapped by a matrix
that balances key and query covariances, rotated, coded, and rescaled so that the estimate is exact along the stored
vector. Our own method; the parts and their worth are in docs/balanced.md.

With C_k the covariance of the centred keys and C_q the second moment of the queries of a KV head, an isotropic
quantizer in the metric A costs tr(A C_k) tr(A^-1 C_q). The minimiser is the geometric mean A = C_k^-1 # C_q.
y = O A^(1/2) (k - mu), queries O A^(-1/2) q with O Haar-random; every coordinate of y takes the same bits. The query
map is the inverse transpose of the key map, so codes change the variance of a score, never its mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qjl.codebook import MAX_BITS, NIBBLE, Encoder, SignCode, even_code, refined_sign_code
from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer, code_bits
from qjl.methods.mapped import MappedCodec, learned_maps, mapped_keys, power
from qjl.methods.nibble import LogScale, Mean, nibble_layout
from qjl.packed import Layout
from qjl.sketch import Sketch, haar_rotation
from qjl.trellis import even_trellis

GAINS = (0.88, 0.94, 1.0, 1.06, 1.12)  # take 8 % off the error of 3-bit levels


@dataclass(frozen=True)
class Balanced(Quantizer):
    """Keys or values centred, mapped, coded with ``num_bits`` per coordinate, 8-bit exact rescale per token.

    - ``code``: ``levels`` (Lloyd-Max), ``trellis`` (1 to 4 bits; 10 to 30 % less distortion on the coordinates that
      take 1, 2 or 4) or ``signs`` (of an orthogonal sketch with m = num_bits * d, refined where m > d).
    - ``metric``: whether to balance with the queries; values have none, and only rotate.

    True bits of a coordinate: num_bits + 8 / head_dim.
    """

    num_bits: float = 3
    code: Literal["levels", "trellis", "signs"] = "levels"
    metric: bool = True
    centre: bool = True
    seed: int = 0

    method: ClassVar[str] = "balanced"
    source: ClassVar[str] = "this project"

    def __post_init__(self) -> None:
        if self.code not in ("levels", "trellis", "signs"):
            raise QJLError(f"balanced takes code levels, trellis or signs, not {self.code}.")
        if self.code == "trellis" and not 1 <= self.num_bits <= NIBBLE:
            raise QJLError(f"code trellis takes 1 to 4 bits, not {self.num_bits}.")
        if not 0 < self.num_bits <= MAX_BITS:
            raise QJLError(f"num_bits must lie between 0 and {MAX_BITS}, not {self.num_bits}.")

    @property
    def needs_statistics(self) -> bool:
        return self.centre or self.metric

    @property
    def needs_queries(self) -> bool:
        return self.metric

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return nibble_layout(code_bits(self.num_bits, head_dim) // NIBBLE, LogScale.FIELD)

    def learn(self, context: LayerContext) -> Arrays:
        learned = Mean.learn(context) if self.centre else {}
        if context.role == "value":
            return learned | {"unit": context.require_statistics().value_rms} if self.centre else {}
        return learned | self._balanced_maps(context) if self.metric else learned

    def _balanced_maps(self, context: LayerContext) -> Arrays:
        key_moment, query_moment = context.key_moments()
        metric = _inverse_mean(key_moment, query_moment)
        spread = torch.einsum("hij,hji->h", metric, key_moment) / context.head_dim
        balance = power(metric, 0.5) / spread.sqrt()[:, None, None]
        _, rotation = self._isotropic(context)
        return learned_maps(rotation.double().cpu() @ balance)

    def build(self, context: LayerContext, learned: Arrays) -> MappedCodec:
        mean = Mean.build(context, learned) if self.centre else None
        code, rotation = self._isotropic(context)
        if self.metric and context.role == "key":
            return mapped_keys(context, learned, code, mean, GAINS)
        query_map = rotation / rotation.shape[0] if self.code == "signs" else rotation
        heads = (context.heads, -1, -1)
        scale = LogScale(self._unit(context, learned))
        return MappedCodec(rotation.expand(heads), query_map.expand(heads), code, scale, mean, GAINS)

    def _unit(self, context: LayerContext, learned: Arrays) -> Tensor:
        if context.role == "value" and self.centre:
            return context.require_learned(learned, "unit", (context.heads,))
        return torch.ones(context.heads, dtype=torch.float32, device=context.device)

    def _isotropic(self, context: LayerContext) -> tuple[Encoder, Tensor]:
        """A code with equal bits per coordinate and the map ``[D', D]`` before it, both shared by all layers."""
        head_dim, device = context.head_dim, context.device
        bits = code_bits(self.num_bits, head_dim)
        if self.code == "signs":
            return _signs(bits, head_dim, self.seed, device)
        rotation = haar_rotation(head_dim, self.seed, device)
        if self.code == "trellis":
            return even_trellis(bits, head_dim, device), rotation
        return even_code(bits, head_dim, device), rotation


@lru_cache(maxsize=64)
def _signs(m: int, head_dim: int, seed: int, device: torch.device) -> tuple[SignCode, Tensor]:
    matrix = Sketch(m, head_dim, "orthogonal", seed).matrix
    return refined_sign_code(matrix).to(device), matrix.to(device)


def _inverse_mean(key_moment: Tensor, query_moment: Tensor) -> Tensor:
    """A = C_k^-1 # C_q, the geometric mean: ``C_k^-1/2 (C_k^1/2 C_q C_k^1/2)^1/2 C_k^-1/2``."""
    root, inverse_root = power(key_moment, 0.5), power(key_moment, -0.5)
    return inverse_root @ power(root @ query_moment @ root, 0.5) @ inverse_root
