"""Transform coding of keys: the Karhunen-Loeve transform in the metric of the queries, bits by water-filling.

With C_k the covariance of the centred keys, C_q the second moment of the queries of a KV head and T = C_q^(1/2), an
error e of a key costs a score E <q, e>^2 = |T e|^2. U diag(lambda) U^T = T C_k T gives uncorrelated coordinates

    y = lambda^(-1/2) U^T T (k - mu)

of unit variance whose errors count lambda, and each bit goes where it lowers the sum of lambda_i D(b_i) most (Huang
and Schultheiss 1963). Queries are mapped by the inverse transpose: codes change the variance of a score, never its
mean. Before RoPE (``CacheConfig.pre_rope``) lambda is more uneven than after it, and as many bits buy more.

A token far from all others ("massive" keys, which draw attention) lies outside the levels of its largest
coordinates. The gain of each token, which costs no bits, brings it back: before RoPE it takes two thirds off the KL
at 3 bits.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

import torch

from qjl.codebook import MAX_BITS, NIBBLE, scalar_code, scalar_distortion
from qjl.errors import QJLError
from qjl.methods.base import Arrays, LayerContext, Quantizer, code_bits
from qjl.methods.mapped import MappedCodec, learned_maps, mapped_keys, power
from qjl.methods.nibble import LogScale, Mean, nibble_layout
from qjl.packed import Layout

GAINS = (0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


@dataclass(frozen=True)
class Transform(Quantizer):
    """Keys in ``num_bits`` per coordinate on average, 0 to 8 on each; 8-bit exact rescale per token.

    True bits of a coordinate: num_bits + 8 / head_dim.
    """

    num_bits: float = 3

    method: ClassVar[str] = "transform"
    source: ClassVar[str] = "this project"

    def __post_init__(self) -> None:
        if not 0 < self.num_bits <= MAX_BITS:
            raise QJLError(f"num_bits must lie between 0 and {MAX_BITS}, not {self.num_bits}.")

    @property
    def needs_statistics(self) -> bool:
        return True

    @property
    def needs_queries(self) -> bool:
        return True

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        return nibble_layout(code_bits(self.num_bits, head_dim) // NIBBLE, LogScale.FIELD)

    def learn(self, context: LayerContext) -> Arrays:
        """The maps, the ``bits`` of each coordinate and the ``weights`` of its errors, lambda over their sum."""
        _require_keys(context)
        key_moment, query_moment = context.key_moments()
        root = power(query_moment, 0.5)
        eigenvalues, vectors = torch.linalg.eigh(root @ key_moment @ root)
        eigenvalues, vectors = eigenvalues.flip(-1), vectors.flip(-1)  # descending
        key_map = eigenvalues.rsqrt()[:, :, None] * (vectors.transpose(1, 2) @ root)
        bits = code_bits(self.num_bits, context.head_dim)
        widths = torch.tensor([water_fill(head.tolist(), bits) for head in eigenvalues], dtype=torch.uint8)
        shares = eigenvalues / eigenvalues.sum(-1, keepdim=True)
        weights = (shares * (widths > 0)).float()
        return Mean.learn(context) | learned_maps(key_map) | {"bits": widths, "weights": weights}

    def build(self, context: LayerContext, learned: Arrays) -> MappedCodec:
        _require_keys(context)
        shape = (context.heads, context.head_dim)
        widths = context.require_learned(learned, "bits", shape, torch.uint8)
        weights = context.require_learned(learned, "weights", shape)
        code = scalar_code(widths.tolist()).to(context.device)
        return mapped_keys(context, learned, code, Mean.build(context, learned), GAINS, weights)


def _require_keys(context: LayerContext) -> None:
    if context.role != "key":
        raise QJLError("transform is for keys, in the metric of the queries: give values another method.")


def water_fill(variances: list[float], bits: int) -> tuple[int, ...]:
    """Bits per coordinate by greedy water-filling: each bit goes where it lowers the total distortion most.

    A coordinate of variance v with b bits costs v D(b), D the distortion of its levels on N(0, 1); b is at most 8.
    """
    costs = [scalar_distortion(width) for width in range(MAX_BITS + 1)]
    widths = [0] * len(variances)
    gains = [(-variance * (costs[0] - costs[1]), i) for i, variance in enumerate(variances)]
    heapq.heapify(gains)
    for _ in range(bits):
        _, i = heapq.heappop(gains)
        widths[i] += 1
        if widths[i] < MAX_BITS:
            heapq.heappush(gains, (-variances[i] * (costs[widths[i]] - costs[widths[i] + 1]), i))
    return tuple(widths)
