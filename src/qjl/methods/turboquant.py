"""TurboQuant: a random rotation and one scalar quantizer for all coordinates (arXiv 2504.19874).

After a random rotation a coordinate of a unit vector has a known density, near N(0, 1/d), so the Lloyd-Max levels of
that density are right for every token: ``mse`` (Algorithm 1). They shrink inner products; ``prod`` (Algorithm 2)
gives one of the bits to a QJL sketch of the residual, which makes them unbiased over the sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qjl.codebook import NIBBLE, even_code
from qjl.errors import QJLError
from qjl.methods.base import Arrays, Codec, LayerContext, Quantizer, require_packable
from qjl.methods.nibble import HalfScale, NibbleCodec, nibble_layout
from qjl.methods.qjl import QJL
from qjl.ops import reference
from qjl.packed import Blocks, Layout
from qjl.sketch import haar_rotation


@dataclass(frozen=True)
class TurboQuant(Quantizer):
    """Norm in float16 and ``num_bits`` (1 to 4) per rotated coordinate.

    - ``variant="mse"``: every coordinate of ``sqrt(d) Pi x / ||x||`` becomes the nearest of 2^b Lloyd-Max levels.
    - ``variant="prod"``: b - 1 bits so; the residual r keeps ``sign(S r)`` and ``||r||``, and its share of a score is
      ``sqrt(pi/2)/d ||r|| <S q, sign(S r)>`` with S d x d Gaussian. At 1 bit only that share is left.
    - ``num_bits`` b + 1/2 (mse): two independent quantizers, of b + 1 bits for the outliers, the quarter of the
      channels with the largest second moment, and of b bits for the rest (section 4.3: 32 of 128 channels). A layer
      and head's statistics fix the channels.

    True bits of a coordinate: num_bits + 16 / d, prod of 2 bits or more num_bits + 32 / d. With outliers
    b + 1/4 + 32 / d, which is num_bits at d = 128.
    """

    num_bits: float = 3
    variant: Literal["mse", "prod"] = "mse"
    seed: int = 0

    method: ClassVar[str] = "turboquant"
    source: ClassVar[str] = "arXiv:2504.19874"

    def __post_init__(self) -> None:
        if self.variant not in ("mse", "prod"):
            raise QJLError(f"turboquant takes variant mse or prod, not {self.variant!r}.")
        if self.num_bits not in (1, 1.5, 2, 2.5, 3, 3.5, 4):
            raise QJLError(f"turboquant takes 1 to 4 bits in steps of one half, not {self.num_bits}.")
        if self.variant == "prod" and self._is_split:
            raise QJLError(f"turboquant's variant prod takes whole bits: use variant mse for {self.num_bits}.")

    @property
    def needs_statistics(self) -> bool:
        return self._is_split

    @property
    def _is_split(self) -> bool:
        return self.num_bits != int(self.num_bits)

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        bits = int(self.num_bits)
        if self._is_split:
            outliers, others = _split(head_dim)
            return _joined({"outlier_": _levels_layout(bits + 1, outliers), "": _levels_layout(bits, others)})
        if self.variant == "mse":
            return _levels_layout(bits, head_dim)
        signs = self._residual.layout(head_dim)
        return signs if bits == 1 else _joined({"": _levels_layout(bits - 1, head_dim), "residual_": signs})

    def learn(self, context: LayerContext) -> Arrays:
        return {"channels": _channels_by_energy(context)} if self._is_split else {}

    def build(self, context: LayerContext, learned: Arrays) -> Codec:
        self.layout(context.head_dim)
        bits = int(self.num_bits)
        if self._is_split:
            channels = context.require_learned(learned, "channels", (context.heads, context.head_dim), torch.int64)
            outliers, others = channels.split(_split(context.head_dim), dim=1)
            return Cascade(
                {
                    "outlier_": LevelCodec(bits + 1, _rotated_channels(outliers, self.seed, context)),
                    "": LevelCodec(bits, _rotated_channels(others, self.seed + 1, context)),
                }
            )
        rotation = haar_rotation(context.head_dim, self.seed, context.device).expand(context.heads, -1, -1)
        if self.variant == "mse":
            return LevelCodec(bits, rotation)
        signs = self._residual.build(context, {})
        return signs if bits == 1 else Cascade({"": LevelCodec(bits - 1, rotation), "residual_": signs})

    @property
    def _residual(self) -> QJL:
        return QJL(1, "gaussian", seed=self.seed + 1)  # not the seed of the rotation: the two are independent


class LevelCodec(NibbleCodec):
    """Lloyd-Max levels of the coordinates of ``query_map x``, whose rows are orthonormal, and their rms."""

    def __init__(self, num_bits: int, query_map: Tensor) -> None:
        dim = query_map.shape[1]
        self.encoder = even_code(num_bits * dim, dim, query_map.device)
        super().__init__(query_map, self.encoder.decoder, HalfScale(), None)

    def encode(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = residual @ self.query_map.float().transpose(1, 2)
        rms = y.square().mean(-1, keepdim=True).sqrt()
        return self.encoder.encode(y / rms.clamp(min=1e-30))[0], rms.squeeze(-1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*super().tensors, *self.encoder.tensors)


class Cascade(Codec):
    """Codecs by the prefix of their fields, each of what those before it left; a token is the sum of its parts."""

    def __init__(self, parts: Mapping[str, Codec]) -> None:
        self.parts = dict(parts)
        self.layout = _joined({prefix: part.layout for prefix, part in self.parts.items()})

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        rest, blocks = x.float(), Blocks()
        for prefix, part in self.parts.items():
            coded = part.encode_tokens(rest, first)
            rest = rest - _decoded(part, coded, first)
            blocks |= {prefix + name: tensor for name, tensor in coded.items()}
        return blocks

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        decoded = [part.dequantize(_of(prefix, part, blocks), first) for prefix, part in self.parts.items()]
        return torch.stack(decoded).sum(0)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts.values() for tensor in part.tensors)


def _decoded(part: Codec, coded: Blocks, first: Tensor) -> Tensor:
    """In torch on every backend, and scaled last: no kernel's rounding decides what is left for the next part."""
    assert part.form is not None
    unscaled = reference.decode(coded | {"scale": torch.ones_like(coded["scale"])}, part.form, first)
    return unscaled * coded["scale"].flatten(2).float()[..., None]


def _channels_by_energy(context: LayerContext) -> Tensor:
    """Channels of each head, those of the largest second moment first, ``int64 [H, D]``."""
    return context.second_moment().diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def _rotated_channels(channels: Tensor, seed: int, context: LayerContext) -> Tensor:
    """A Haar rotation of the ``channels [H, d']`` of each head alone, ``float16 [H, d', D]``."""
    heads, dim = channels.shape
    columns = channels.cpu()[:, None].expand(-1, dim, -1)  # where rotations are made
    rotation = haar_rotation(dim, seed).expand(heads, -1, -1)
    rows = rotation.new_zeros(heads, dim, context.head_dim).scatter_(2, columns, rotation)
    return rows.to(context.device, torch.float16)


def _split(head_dim: int) -> list[int]:
    """Numbers of outlier channels, a quarter in whole bytes, and of others.

    Raises:
        QJLError: if there are too few channels for that.
    """
    outliers = head_dim // 32 * 8
    if not outliers:
        raise QJLError(f"head_dim {head_dim} is too small to be split: it must be 32 or more.")
    return [outliers, head_dim - outliers]


def _levels_layout(bits: int, dim: int) -> Layout:
    return nibble_layout(bits * dim // NIBBLE, HalfScale.FIELD)


def _joined(layouts: Mapping[str, Layout]) -> Layout:
    return {prefix + name: field for prefix, layout in layouts.items() for name, field in layout.items()}


def _of(prefix: str, part: Codec, blocks: Blocks) -> Blocks:
    return {name: blocks[prefix + name] for name in part.layout}
