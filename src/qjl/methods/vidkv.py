"""VidKV: keys of 1.x bits by channel and in the frequency domain, ternary values (arXiv 2503.16257)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods.base import Arrays, Codec, LayerContext, Quantizer, require_packable
from qjl.methods.bitpacking import as_half, pack_tokens, repack, top_code, unpack_tokens
from qjl.methods.per_channel import channel_grid, require_group_size
from qjl.packed import BLOCK, Blocks, Field, Layout, blocks_of_tokens

WIDE_BITS = 2
TRITS_PER_BYTE = 5


@dataclass(frozen=True)
class VidKVKeys(Quantizer):
    """Two bits for the channels of widest range, one bit in the frequency domain for the others (section 4.2).

    - ``wide_share``: the part of the channels that takes two bits, rounded down to a multiple of 8 channels: those
      of largest max - min in a block of 64 tokens. They are coded as KIVI's keys (equation 4).
    - The other C channels of a token are Fourier transformed together; of each of the C real numbers of the spectrum
      the sign is kept, and its mean magnitude over ``group_size`` tokens (equation 5).

    Stored per block: which channels are wide, one bit each; per group: float16 step and middle of a wide channel,
    float16 scale of a frequency. With share w, ``(1 + w) + (32 w + 16 (1 - w)) / group_size + 1/64`` true bits.
    """

    wide_share: float = 0.5
    group_size: int = 32

    method: ClassVar[str] = "vidkv-keys"
    source: ClassVar[str] = "arXiv:2503.16257"

    def __post_init__(self) -> None:
        if not 0 < self.wide_share < 1:
            raise QJLError(f"wide_share must lie between 0 and 1, not {self.wide_share}.")
        require_group_size(self.group_size)

    def wide_channels(self, head_dim: int) -> int:
        """Channels that take two bits.

        Raises:
            QJLError: if there are none.
        """
        require_packable(head_dim)
        wide = int(self.wide_share * head_dim) // 8 * 8
        if not wide:
            raise QJLError(
                f"a wide_share of {self.wide_share} is less than 8 of {head_dim} channels: use a larger one."
            )
        return wide

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        wide = self.wide_channels(head_dim)
        groups, others = BLOCK // self.group_size, head_dim - wide
        return {
            "wide": Field((head_dim // 8,), torch.uint8),
            "codes": Field((wide * WIDE_BITS // 8, BLOCK), torch.uint8),
            "step": Field((groups, wide), torch.float16),
            "middle": Field((groups, wide), torch.float16),
            "signs": Field((others // 8, BLOCK), torch.uint8),
            "scale": Field((groups, others), torch.float16),
        }

    def build(self, context: LayerContext, learned: Arrays) -> VidKVKeyCodec:
        layout = self.layout(context.head_dim)
        return VidKVKeyCodec(layout, self.wide_channels(context.head_dim), self.group_size)


@dataclass(frozen=True, eq=False)
class VidKVKeyCodec(Codec):
    layout: Layout
    wide: int
    group_size: int

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        channels = blocks_of_tokens(x.float()).transpose(3, 4)  # [B, H, blocks, D, 64]
        is_wide = _largest(channels.amax(4) - channels.amin(4), self.wide)
        wide, others = (part.transpose(3, 4) for part in _set_apart(channels, is_wide, self.wide))
        codes, step, middle = channel_grid(self._grouped(wide), WIDE_BITS)
        spectrum = to_spectrum(others)
        return {
            "wide": repack(is_wide.to(torch.uint8), 1, 8),
            "codes": pack_tokens(codes.flatten(2, 4), WIDE_BITS),
            "step": step,
            "middle": middle,
            "signs": pack_tokens((spectrum >= 0).to(torch.uint8).flatten(2, 3), 1),
            "scale": as_half(self._grouped(spectrum).abs().mean(4)),
        }

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        step, middle, scale = (blocks[name].float()[..., None, :] for name in ("step", "middle", "scale"))
        wide = self._levels(blocks["codes"], WIDE_BITS) * step + middle
        spectrum = 2 * self._levels(blocks["signs"], num_bits=1) * scale
        channels = torch.cat([wide, from_spectrum(spectrum)], dim=5).flatten(3, 4).transpose(3, 4)
        is_wide = repack(blocks["wide"], 8, 1).bool()
        return _put_back(channels, is_wide).transpose(3, 4).flatten(2, 3)

    def _grouped(self, tokens: Tensor) -> Tensor:
        """``[B, H, blocks, 64, C] -> [B, H, blocks, G, g, C]``."""
        return tokens.unflatten(3, (-1, self.group_size))

    def _levels(self, packed: Tensor, num_bits: int) -> Tensor:
        """Centred levels, ``float32 [B, H, blocks, G, g, C]``."""
        return self._grouped(blocks_of_tokens(unpack_tokens(packed, num_bits).float() - top_code(num_bits) / 2))


@dataclass(frozen=True)
class VidKVValues(Quantizer):
    """Ternary values of each channel: ``sgn(v)`` where |v| > threshold * mean |v|, else 0 (section 4.3, equation 6).

    Over ``group_size`` tokens of a channel; the scale is the mean of the |v| above the threshold, the one of least
    error (Ternary Weight Networks, arXiv 1605.04711), as float16. Five trits fill a byte.

    ``salient_share`` of the 64 tokens of a block, those of largest norm, take two bits instead: the levels +-1/2 and
    +-3/2 of the same scale. Which ones is stored, one bit per token. True bits with share p of salient tokens:
    ``(1 - p) * 8 ceil(d/5) / d + 2 p + 16 / group_size``, and 1 / d where p > 0.
    """

    threshold: float = 0.7
    group_size: int = 32
    salient_share: float = 0.0

    method: ClassVar[str] = "vidkv-values"
    source: ClassVar[str] = "arXiv:2503.16257"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise QJLError(f"threshold must be at least 0 and below 1, not {self.threshold}.")
        if not 0 <= self.salient_share < 1:
            raise QJLError(f"salient_share must be at least 0 and below 1, not {self.salient_share}.")
        if self.salient_share and not self.salient:
            raise QJLError(f"a salient_share of {self.salient_share} is less than one of 64 tokens: use a larger one.")
        require_group_size(self.group_size)

    @property
    def salient(self) -> int:
        """Tokens of a block that take two bits."""
        return int(self.salient_share * BLOCK)

    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        require_packable(head_dim)
        layout = {
            "trits": Field((-(-head_dim // TRITS_PER_BYTE), BLOCK - self.salient), torch.uint8),
            "scale": Field((BLOCK // self.group_size, head_dim), torch.float16),
        }
        if self.salient:
            layout["codes"] = Field((head_dim * WIDE_BITS // 8, self.salient), torch.uint8)
            layout["salient"] = Field((BLOCK // 8,), torch.uint8)
        return layout

    def build(self, context: LayerContext, learned: Arrays) -> VidKVValueCodec:
        return VidKVValueCodec(self.layout(context.head_dim), self.threshold, self.group_size, self.salient)


@dataclass(frozen=True, eq=False)
class VidKVValueCodec(Codec):
    layout: Layout
    threshold: float
    group_size: int
    salient: int

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        tokens = blocks_of_tokens(x.float())  # [B, H, blocks, 64, D]
        magnitude = tokens.abs().unflatten(3, (-1, self.group_size))
        above = magnitude > self.threshold * magnitude.mean(4, keepdim=True)
        scale = as_half((magnitude * above).sum(4) / above.sum(4).clamp(min=1))
        trits = (tokens.sign() * above.flatten(3, 4) + 1).to(torch.uint8)
        if not self.salient:
            return {"trits": trits_to_bytes(trits).transpose(3, 4).contiguous(), "scale": scale}
        is_salient = _largest(tokens.norm(dim=4), self.salient)
        unit = self._of_tokens(torch.where(scale > 0, scale, 1).float())
        codes = (tokens / unit + top_code(WIDE_BITS) / 2).round().clamp(0, top_code(WIDE_BITS)).to(torch.uint8)
        trits = trits_to_bytes(_set_apart(trits, is_salient, self.salient)[1])
        codes = repack(_set_apart(codes, is_salient, self.salient)[0], WIDE_BITS, 8)
        return {
            "trits": trits.transpose(3, 4).contiguous(),
            "scale": scale,
            "codes": codes.transpose(3, 4).contiguous(),
            "salient": repack(is_salient.to(torch.uint8), 1, 8),
        }

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        head_dim = blocks["scale"].shape[-1]
        levels = trits_of_bytes(blocks["trits"].transpose(3, 4), head_dim).float() - 1
        if self.salient:
            codes = repack(blocks["codes"].transpose(3, 4), 8, WIDE_BITS).float()
            levels = torch.cat([codes - top_code(WIDE_BITS) / 2, levels], dim=3)
            levels = _put_back(levels, repack(blocks["salient"], 8, 1).bool())
        return (levels * self._of_tokens(blocks["scale"].float())).flatten(2, 3)

    def _of_tokens(self, scale: Tensor) -> Tensor:
        """The scale of every token: ``[B, H, blocks, G, D] -> [B, H, blocks, 64, D]``."""
        return scale.repeat_interleave(self.group_size, dim=3)


def to_spectrum(x: Tensor) -> Tensor:
    """The C real numbers of the orthonormal Fourier transform of rows of C, an even number: real parts, imaginary."""
    spectrum = torch.fft.rfft(x, norm="ortho")
    return torch.cat([spectrum.real, spectrum.imag[..., 1:-1]], dim=-1)


def from_spectrum(spectrum: Tensor) -> Tensor:
    """The inverse of ``to_spectrum``."""
    count = spectrum.shape[-1]
    real, imaginary = spectrum.split([count // 2 + 1, count // 2 - 1], dim=-1)
    return torch.fft.irfft(torch.complex(real, F.pad(imaginary, (1, 1))), n=count, norm="ortho")


def trits_to_bytes(trits: Tensor) -> Tensor:
    """Digits of base 3, the first one lowest, five to a byte: ``[..., C] -> uint8``."""
    padded = F.pad(trits, (0, -trits.shape[-1] % TRITS_PER_BYTE))
    return (padded.unflatten(-1, (-1, TRITS_PER_BYTE)) * _powers(trits.device)).sum(-1, dtype=torch.uint8)


def trits_of_bytes(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` trits of rows of bytes."""
    trits = packed[..., None].div(_powers(packed.device), rounding_mode="floor") % 3
    return trits.flatten(-2)[..., :count]


def _powers(device: torch.device) -> Tensor:
    return 3 ** torch.arange(TRITS_PER_BYTE, dtype=torch.uint8, device=device)


def _largest(values: Tensor, count: int) -> Tensor:
    """Which are the ``count`` largest of each row, ``bool``; of equal ones the first."""
    index = values.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, index, True)


def _set_apart(rows: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` chosen rows of ``[B, H, blocks, N, C]``, and the others, both in their order."""
    chosen_rows, others = rows.gather(3, _order(rows, chosen)).split([count, rows.shape[3] - count], dim=3)
    return chosen_rows, others


def _put_back(rows: Tensor, chosen: Tensor) -> Tensor:
    """The inverse of ``_set_apart``, of both parts together."""
    return torch.empty_like(rows).scatter(3, _order(rows, chosen), rows)


def _order(rows: Tensor, chosen: Tensor) -> Tensor:
    """Index of each row of ``rows``, the chosen ones first."""
    return (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[..., None].expand_as(rows)
