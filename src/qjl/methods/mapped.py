"""What our own methods share: centred tokens, mapped by a matrix per head, coded at the best of a few gains, and
rescaled so that the estimate is exact along the stored vector. The parts and their worth: docs/balanced.md."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from qjl.codebook import Encoder
from qjl.methods.base import Arrays, LayerContext
from qjl.methods.nibble import LogScale, Mean, NibbleCodec, unbiased_scale
from qjl.ops.recipe import DenseMap, Recipe
from qjl.packed import to_device


class MappedCodec(NibbleCodec):
    """``key_map [H, D', D]`` takes a centred token to the space of the codes.

    ``weights [H, D']`` is what an error in each coordinate counts (the lambda of the KLT, 0 where a coordinate gets
    no bits); None for an isotropic code. ``gains`` are tried on each token before it is coded.
    """

    scale: LogScale

    def __init__(
        self,
        key_map: Tensor,
        query_map: Tensor,
        encoder: Encoder,
        scale: LogScale,
        mean: Mean | None,
        gains: tuple[float, ...],
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(query_map, encoder.decoder, scale, mean)
        self.key_map = key_map
        self.encoder = encoder
        self.gains = gains
        self.weights = weights

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        weights = () if self.weights is None else (self.weights,)
        return (*super().tensors, self.key_map, *self.encoder.tensors, *weights)

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(
            DenseMap.of(self.key_map),
            self.encoder.parts,
            mean=None if self.mean is None else self.mean.vector.float().contiguous(),
            gains=self.gains if self.encoder.depends_on_gain else (1.0,),
            weights=None if self.weights is None else self.weights.contiguous(),
            units=self.scale.unit.float().contiguous(),
        )

    def encode(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = residual @ self.key_map.float().transpose(1, 2)
        weights = torch.ones_like(y[:1, :, :1]) if self.weights is None else self.weights[None, :, None]
        active = (weights > 0).float()
        rms = ((y * y * active).sum(-1, keepdim=True) / active.sum(-1, keepdim=True)).sqrt()
        root = weights.sqrt()
        z = y / rms.clamp(min=1e-30)
        nibbles, decoded = self.encoder.encode(z * self._best_gain(z, root))
        return nibbles, unbiased_scale(y * root, decoded * root)

    def _best_gain(self, z: Tensor, root: Tensor) -> Tensor:
        """The gain of each token whose code is at the least angle to it: the scale is free, so its error is least."""
        if not self.encoder.depends_on_gain:
            return z.new_ones(1)
        cosines = [cosine(z * root, self.encoder.nearest(gain * z) * root) for gain in self.gains]
        gains = to_device(torch.tensor(self.gains, dtype=torch.float32), z.device)
        return gains[torch.stack(cosines).argmax(0)][..., None]


def cosine(target: Tensor, decoded: Tensor) -> Tensor:
    """Cosine of the angle along the last dimension, up to the norm of the target."""
    return (target * decoded).sum(-1) / decoded.square().sum(-1).sqrt().clamp(min=1e-30)


def learned_maps(key_map: Tensor) -> Arrays:
    """``key_map [H, D', D]`` and its inverse transpose, the query map, with which codes change no mean of a score.

    The maps are kept in half precision: their rounding, .05 %, is far below that of the codes.
    """
    query_map = torch.linalg.pinv(key_map).transpose(1, 2)
    return {"key_map": key_map.half().contiguous(), "query_map": query_map.half().contiguous()}


def mapped_keys(
    context: LayerContext,
    learned: Arrays,
    encoder: Encoder,
    mean: Mean | None,
    gains: tuple[float, ...],
    weights: Tensor | None = None,
) -> MappedCodec:
    """The codec of keys by ``learned_maps``."""
    shape = (context.heads, encoder.decoder.dim, context.head_dim)
    key_map, query_map = (
        context.require_learned(learned, name, shape, torch.float16) for name in ("key_map", "query_map")
    )
    scale = LogScale(torch.ones(context.heads, device=context.device, dtype=torch.float32))
    return MappedCodec(key_map, query_map, encoder, scale, mean, gains, weights)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Power of symmetric positive definite matrices ``[H, D, D]``."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    floor = eigenvalues.amax(-1, keepdim=True) * 1e-12
    return (vectors * eigenvalues.clamp(min=floor).pow(exponent)[:, None, :]) @ vectors.transpose(1, 2)
