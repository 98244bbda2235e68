"""Scalar codebooks, and their arrangement into nibbles.

Every nibble form in the project is the same thing: nibble j of a token selects one of 16 entries, each a
short vector that is added onto a few coordinates. Four signs, two 2-bit coordinates, a 3-bit coordinate
beside one bit of another, and one 4-bit coordinate all fit (design: "a key is a row of nibbles").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.ops.recipe import LevelsPart, LevelTables, Part, SignsPart

CPU = torch.device("cpu")
NIBBLE = 4
MAX_BITS = 8
REFINEMENTS = 6  # sweeps over the blocks of a sketch


@cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """Ascending levels of the Lloyd-Max quantizer of N(0, 1) with ``2**bits`` levels."""
    uniform = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = math.sqrt(3) * torch.special.ndtri(uniform)  # the high-rate density, close to the answer
    for _ in range(3000):
        mass, first = _cell_moments(_edges(levels))
        updated = first / mass
        if torch.allclose(updated, levels, rtol=0, atol=1e-11):
            break
        levels = updated
    return tuple(((levels - levels.flip(0)) / 2).tolist())  # exactly symmetric


@cache
def sign_sum(bits: int) -> tuple[float, ...]:
    """Amplitudes a_1 > a_2 > ... for which the levels sum(+-a_i) have the least distortion on N(0, 1).

    A coordinate whose bits lie in different nibbles can only be decoded as such a sum. Two bits lose nothing
    against Lloyd-Max; three bits lose 7 % (.0369 against .0345).
    """
    halvings = torch.tensor([2.0 ** (bits - 1 - i) for i in range(bits)], dtype=torch.float64)
    outermost = 1.7 * math.sqrt(bits) - 0.88  # near where it ends up: the iteration moves it slowly
    amplitudes = halvings * outermost / halvings.sum()
    signs = _sign_patterns(bits).double()
    for _ in range(400):
        levels, order = (signs @ amplitudes).sort()
        edges = _edges(levels)
        mass, first = _cell_moments(edges)
        patterns = signs[order]
        gram = patterns.T @ (mass[:, None] * patterns)
        updated = torch.linalg.solve(gram, patterns.T @ first)
        if torch.allclose(updated, amplitudes, rtol=0, atol=1e-9):
            break
        amplitudes = updated
    return tuple(amplitudes.tolist())


def distortion(levels: Sequence[float]) -> float:
    """Mean squared error of the nearest-level quantizer on N(0, 1)."""
    ascending = torch.tensor(sorted(levels), dtype=torch.float64)
    mass, first = _cell_moments(_edges(ascending))
    return float(1 - 2 * (ascending * first).sum() + (ascending**2 * mass).sum())


@cache
def scalar_distortion(bits: int) -> float:
    """Mean squared error on N(0, 1) of a coordinate of 0 to 8 bits: Lloyd-Max within a nibble, sums of signs beyond."""
    if bits <= NIBBLE:
        return distortion(lloyd_max(bits))
    return distortion((_sign_patterns(bits).double() @ torch.tensor(sign_sum(bits), dtype=torch.float64)).tolist())


def _sign_patterns(bits: int) -> Tensor:
    labels = torch.arange(2**bits)
    return ((labels[:, None] >> torch.arange(bits)) & 1) * 2 - 1


def _edges(levels: Tensor) -> Tensor:
    inf = torch.tensor([math.inf], dtype=torch.float64)
    return torch.cat([-inf, (levels[1:] + levels[:-1]) / 2, inf])


def _cell_moments(edges: Tensor) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(edges / math.sqrt(2)))
    pdf = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    return cdf.diff(), -pdf.diff()


@dataclass(frozen=True, eq=False)
class NibbleCode:
    """How rows of N nibbles decode to R^D, for each head (or one for all: a leading dimension of 1).

    ``coordinates`` int16 [H, N, w]: the coordinates that nibble j adds to.
    ``entries`` float16 [H, N, 16, w]: what each of its 16 values adds to them.
    """

    coordinates: Tensor
    entries: Tensor
    dim: int

    @property
    def nibbles(self) -> int:
        return self.coordinates.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.coordinates, self.entries)

    def to(self, device: torch.device) -> NibbleCode:
        return NibbleCode(self.coordinates.to(device), self.entries.to(device), self.dim)


@dataclass(frozen=True, eq=False)
class ScalarCode:
    """Encoder of real coordinates, each with its own number of bits, into nibbles; and its ``NibbleCode``.

    ``kinds`` uint8 [H, D]: the row of the scalar quantizer tables that a coordinate uses.
    ``bit_coordinate``, ``bit_index`` int16 [H, N, 4]: which bit of which coordinate each nibble bit is.
    ``widest``: the most bits that a coordinate has.
    """

    kinds: Tensor
    bit_coordinate: Tensor
    bit_index: Tensor
    decoder: NibbleCode
    widest: int

    depends_on_gain: ClassVar[bool] = True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.kinds, self.bit_coordinate, self.bit_index, *self.decoder.tensors)

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest level of each coordinate of ``z [B, H, T, D]``.

        Returns nibbles ``uint8 [B, H, T, N]`` and the levels chosen ``float32 [B, H, T, D]``.
        """
        cells = self._cells(z)
        kinds = self.kinds.long()[None, :, None]
        patterns = _scalar_tables(z.device)[1][kinds, cells]
        nibbles = torch.zeros((*z.shape[:3], self.decoder.nibbles), dtype=torch.uint8, device=z.device)
        for place in range(NIBBLE):
            coordinate = self.bit_coordinate[..., place].long()[None, :, None]
            bit = patterns.gather(3, coordinate.expand(*z.shape[:3], -1)) >> self.bit_index[None, :, None, :, place].to(
                torch.uint8
            )
            nibbles |= (bit & 1) << place
        return nibbles, self._levels_of(cells)

    def nearest(self, z: Tensor) -> Tensor:
        """The nearest levels alone."""
        return self._levels_of(self._cells(z))

    def _cells(self, z: Tensor) -> Tensor:
        """Index of the nearest level of each coordinate, ``int64 [B, H, T, D]``."""
        edges = (self._levels[..., 1:] + self._levels[..., :-1]) / 2
        edges = edges.expand(z.shape[0], z.shape[1], -1, -1).contiguous()
        return torch.searchsorted(edges, z.transpose(2, 3).contiguous()).transpose(2, 3)

    def _levels_of(self, cells: Tensor) -> Tensor:
        levels = self._levels.expand(*cells.shape[:2], -1, -1)
        return levels.gather(3, cells.transpose(2, 3)).transpose(2, 3)

    @property
    def parts(self) -> tuple[Part, ...]:
        tables = _level_tables(self.kinds.device)
        places = self.bit_coordinate.contiguous(), self.bit_index.contiguous()
        return (LevelsPart(self.kinds.contiguous(), *places, tables, self.widest),)

    @property
    def _levels(self) -> Tensor:
        """Ascending levels of each coordinate, ``[H, D, widest]``."""
        return _scalar_tables(self.kinds.device)[0][self.kinds.long(), : 2**self.widest]

    def to(self, device: torch.device) -> ScalarCode:
        places = self.bit_coordinate.to(device), self.bit_index.to(device)
        return ScalarCode(self.kinds.to(device), *places, self.decoder.to(device), self.widest)


def scalar_code(widths: Sequence[Sequence[int]]) -> ScalarCode:
    """The code that spends ``widths[h][i]`` bits (0 to 8) on coordinate i of head h.

    Raises:
        QJLError: if a width is out of range or a head's bits do not fill whole bytes, equally many per head.
    """
    if len({sum(head) for head in widths}) > 1:
        raise QJLError("all heads of a layer must spend the same number of bits per token.")
    heads = [_head_code(tuple(int(width) for width in head)) for head in widths]
    kinds, bits, coordinates, entries = (list(parts) for parts in zip(*heads, strict=True))
    width = max(head.shape[1] for head in coordinates)
    padded = [
        torch.stack([torch.nn.functional.pad(head, (0, width - head.shape[-1])) for head in part])
        for part in (coordinates, entries)
    ]
    slots = torch.stack(bits)
    decoder = NibbleCode(padded[0], padded[1], dim=len(widths[0]))
    return ScalarCode(torch.stack(kinds), slots[..., 0], slots[..., 1], decoder, max(map(max, widths)))


@lru_cache(maxsize=64)
def even_code(bits: int, dim: int, device: torch.device) -> ScalarCode:
    """The code that spreads the bits of a token evenly; the first coordinates get one more where some are left."""
    width, left = divmod(bits, dim)
    return scalar_code([[width + (i < left) for i in range(dim)]]).to(device)


@lru_cache(maxsize=4096)
def _head_code(widths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kinds [D], bit places [N, 4, 2], coordinates [N, w] and entries [N, 16, w] of one head."""
    if not all(0 <= width <= MAX_BITS for width in widths):
        raise QJLError(f"a coordinate takes 0 to {MAX_BITS} bits, not {sorted(set(widths))}.")
    if sum(widths) % (2 * NIBBLE):
        raise QJLError(f"{sum(widths)} bits per token do not fill whole bytes: use a multiple of 8.")
    nibbles, split = _arrange(widths)
    kinds = [width + (MAX_BITS + 1) * (i in split) for i, width in enumerate(widths)]
    coordinates, entries = _entries(nibbles, widths, split)
    places = torch.tensor(nibbles, dtype=torch.int16)
    return torch.tensor(kinds, dtype=torch.uint8), places, coordinates.short(), entries.half()


@cache
def _scalar_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Ascending levels and bit patterns of each kind: Lloyd-Max by width, then sums of signs by width.

    float32 and uint8 ``[2 * (MAX_BITS + 1), 2**MAX_BITS]``, levels padded with +inf.
    """
    levels = torch.full((2 * (MAX_BITS + 1), 2**MAX_BITS), math.inf, dtype=torch.float32)
    labels = torch.zeros(levels.shape, dtype=torch.uint8)
    whole = [(width, False) for width in range(NIBBLE + 1)]
    for width, is_split in whole + [(width, True) for width in range(MAX_BITS + 1)]:
        row = width + (MAX_BITS + 1) * is_split
        ascending, patterns = _levels(width, is_split)
        levels[row, : len(ascending)] = ascending.half().float()
        labels[row, : len(patterns)] = patterns.to(torch.uint8)
    return levels.to(device), labels.to(device)


@cache
def _level_tables(device: torch.device) -> LevelTables:
    levels, patterns = _scalar_tables(CPU)
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    tree, levels_by_path = torch.zeros_like(levels), torch.zeros_like(levels)
    patterns_by_path = torch.zeros_like(patterns, dtype=torch.int32)
    for kind in range(len(levels)):
        width = kind % (MAX_BITS + 1)
        for depth in range(width):
            first, step = 2 ** (width - depth - 1) - 1, 2 ** (width - depth)
            tree[kind, 2**depth : 2 ** (depth + 1)] = edges[kind, first + step * _reversed_bits(depth)]
        cells = _reversed_bits(width)
        levels_by_path[kind, : 2**width] = levels[kind, cells]
        patterns_by_path[kind, : 2**width] = patterns[kind, cells].int()
    return LevelTables(*(table.to(device) for table in (tree, levels_by_path, patterns_by_path)))


def _reversed_bits(bits: int) -> Tensor:
    """Every number of so many bits, its bits in the reverse order."""
    places = torch.arange(bits)
    return ((torch.arange(2**bits)[:, None] >> places & 1) << (bits - 1 - places)).sum(-1)


def _levels(width: int, is_split: bool) -> tuple[Tensor, Tensor]:
    """Ascending levels of a coordinate and the bit pattern of each; zero where it has no bits."""
    if width == 0:
        return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    if not is_split:
        return torch.tensor(lloyd_max(width), dtype=torch.float64), torch.arange(2**width)
    amplitudes = torch.tensor(sign_sum(width), dtype=torch.float64)
    return (_sign_patterns(width).double() @ amplitudes).sort()


def _arrange(widths: tuple[int, ...]) -> tuple[list[list[tuple[int, int]]], set[int]]:
    """Fill nibbles with whole coordinates, alike side by side: 4 bits, 3 and 1, 2 and 2, at last single bits.

    So kernels look up neighbours in the same tables. Coordinates of more than 4 bits are spread bit by bit, beside
    3 bits first; so are as many of 2 bits, which lose nothing, or else of 3 bits, as must fill what is left.

    Returns the (coordinate, bit) pairs of each nibble and the set of coordinates that were spread.
    """
    of_width = {width: [i for i, own in enumerate(widths) if own == width] for width in range(1, NIBBLE + 1)}
    spread = [i for i, width in enumerate(widths) if width > NIBBLE or width == 1]
    lone = sum(widths[i] for i in spread)
    while lone < len(of_width[3]) or len(of_width[2]) % 2:
        taken = (of_width[2] or of_width[3]).pop()
        spread.append(taken)
        lone += widths[taken]
    bits = iter((i, bit) for i in spread for bit in range(widths[i]))
    nibbles = [_whole(i, widths) for i in of_width[4]]
    nibbles += [[*_whole(i, widths), next(bits)] for i in of_width[3]]
    pairs = zip(of_width[2][::2], of_width[2][1::2], strict=True)
    nibbles += [_whole(i, widths) + _whole(j, widths) for i, j in pairs]
    left = list(bits)
    nibbles += [left[first : first + NIBBLE] for first in range(0, len(left), NIBBLE)]
    return nibbles, {i for i in spread if widths[i] > 1}


def _whole(coordinate: int, widths: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(coordinate, bit) for bit in range(widths[coordinate])]


def _entries(nibbles: list[list[tuple[int, int]]], widths: tuple[int, ...], split: set[int]) -> tuple[Tensor, Tensor]:
    parts = [_parts(nibble) for nibble in nibbles]
    slots = max(len(part) for part in parts)
    coordinates = torch.zeros(len(nibbles), slots, dtype=torch.int64)
    entries = torch.zeros(len(nibbles), 16, slots, dtype=torch.float32)
    values = torch.arange(16)
    for j, part in enumerate(parts):
        for slot, (i, places) in enumerate(part.items()):
            coordinates[j, slot] = i
            bits = {bit: (values >> place) & 1 for place, bit in places}
            if i in split:
                amplitudes = sign_sum(widths[i])
                entries[j, :, slot] = sum((on * 2 - 1).float() * amplitudes[bit] for bit, on in bits.items())
            else:
                pattern = sum(on << bit for bit, on in bits.items())
                entries[j, :, slot] = torch.tensor(lloyd_max(widths[i]), dtype=torch.float32)[pattern]
    return coordinates, entries


def _parts(nibble: list[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    parts: dict[int, list[tuple[int, int]]] = {}
    for place, (i, bit) in enumerate(nibble):
        parts.setdefault(i, []).append((place, bit))
    return parts


@dataclass(frozen=True, eq=False)
class SignCode:
    """Encoder of signs, four to a nibble: bit 1 is +1 (zero too), bit 0 is -1.

    With the Gram matrix of a sketch of several orthogonal blocks, ``gram = S S^T [m, m]`` of unit rows, the signs are
    refined: those of each block in turn become the best ones beside the other blocks' (``refined``).
    """

    decoder: NibbleCode
    gram: Tensor | None = None
    block: int = 0

    depends_on_gain: ClassVar[bool] = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.decoder.tensors if self.gram is None else (*self.decoder.tensors, self.gram)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (SignsPart(self.decoder.dim, self.gram, self.block, REFINEMENTS),)

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Nibbles ``uint8 [B, H, T, m / 4]`` and signs ``float32`` of ``z [B, H, T, m]``."""
        signs = self.nearest(z)
        bits = (signs > 0).to(torch.uint8).unflatten(-1, (-1, NIBBLE))
        places = torch.arange(NIBBLE, dtype=torch.uint8, device=z.device)
        return (bits << places).sum(-1, dtype=torch.uint8), signs

    def nearest(self, z: Tensor) -> Tensor:
        """The signs alone."""
        signs = torch.where(z >= 0, 1.0, -1.0)
        return signs if self.gram is None else self.refined(z, signs)

    def refined(self, z: Tensor, signs: Tensor) -> Tensor:
        """Alternating minimisation of ``||y - c S^T s||`` over c and the signs of one block at a time.

        With ``z = S y``, and since the rows within a block are orthogonal, the minimum over block b is
        ``s_b = sign(z_b / c - sum_(a != b) G_ba s_a)``. The error of a Gaussian y at m = 2d falls from .280 to .117.
        """
        assert self.gram is not None
        signs = signs.clone()
        for _ in range(REFINEMENTS):
            decoded = signs @ self.gram
            c = (z * signs).sum(-1, keepdim=True) / (decoded * signs).sum(-1, keepdim=True)
            target = z / c.clamp(min=torch.finfo(z.dtype).tiny)
            for first in range(0, z.shape[-1], self.block):
                own = slice(first, first + self.block)
                others = signs @ self.gram[:, own] - signs[..., own]
                signs[..., own] = torch.where(target[..., own] >= others, 1.0, -1.0)
        return signs

    def to(self, device: torch.device) -> SignCode:
        return SignCode(self.decoder.to(device), None if self.gram is None else self.gram.to(device), self.block)


def sign_code(m: int) -> SignCode:
    """The code of m signs."""
    coordinates = torch.arange(m, dtype=torch.int16).view(1, m // NIBBLE, NIBBLE)
    entries = _sign_patterns(NIBBLE).half().expand(1, m // NIBBLE, 16, NIBBLE)
    return SignCode(NibbleCode(coordinates, entries.contiguous(), dim=m))


@lru_cache(maxsize=64)
def uniform_code(dim: int, num_bits: int) -> NibbleCode:
    """How nibbles of codes decode to ``code - (2**num_bits - 1) / 2``, the levels of a grid of step 1 around 0.

    Codes of 1 to 4 bits lie side by side, and a level is the sum of its bits, +-2^(bit - 1) each: three bits may
    lie in two nibbles.
    """
    if num_bits == 1:
        plain = sign_code(dim).decoder
        return NibbleCode(plain.coordinates, plain.entries / 2, dim)
    stream = torch.arange(dim * num_bits).view(-1, NIBBLE)  # [N, 4]
    owners, places = stream // num_bits, stream % num_bits
    coordinates = owners[:, [0, -1]] if num_bits < NIBBLE else owners[:, :1]  # [N, w]
    signs = ((torch.arange(16)[:, None] >> torch.arange(NIBBLE)) & 1).float() - 0.5
    bits = signs * 2.0 ** places[:, None].float()  # [N, 16, 4]
    entries = bits @ (owners[:, :, None] == coordinates[:, None]).float()
    return NibbleCode(coordinates.short()[None], entries.half()[None], dim)


def refined_sign_code(matrix: Tensor) -> SignCode:
    """The code of the signs of a sketch ``[m, d]`` of orthogonal blocks; refined where there is more than one."""
    m, d = matrix.shape
    plain = sign_code(m)
    return plain if m <= d else SignCode(plain.decoder, matrix @ matrix.T / d, d)


class Encoder(Protocol):
    """Chooses the nibbles of tokens ``z [B, H, T, D]`` whose coordinates have unit variance."""

    @property
    def decoder(self) -> NibbleCode: ...

    @property
    def depends_on_gain(self) -> bool:
        """Whether ``g z`` may have a better code than z, beyond the factor g."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """The same as plain arrays, for a ``Recipe``."""

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Nibbles ``uint8 [B, H, T, N]`` and what they decode to, ``float32 [B, H, T, D]``."""

    def nearest(self, z: Tensor) -> Tensor:
        """What they decode to alone."""

    def to(self, device: torch.device) -> Encoder: ...


@dataclass(frozen=True, eq=False)
class JoinedCode:
    """One encoder for the first coordinates and another for the rest."""

    first: Encoder
    rest: Encoder
    decoder: NibbleCode

    depends_on_gain: ClassVar[bool] = False  # of half of the coordinates only

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.first.tensors, *self.rest.tensors, *self.decoder.tensors)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.first.parts, *self.rest.parts)

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Nibbles ``uint8 [B, H, T, N]`` and what they decode to, ``float32 [B, H, T, D]``."""
        parts = z.split([self.first.decoder.dim, self.rest.decoder.dim], dim=-1)
        encoded = [encoder.encode(part) for encoder, part in zip((self.first, self.rest), parts, strict=True)]
        return torch.cat([nibbles for nibbles, _ in encoded], -1), torch.cat([decoded for _, decoded in encoded], -1)

    def nearest(self, z: Tensor) -> Tensor:
        """What they decode to alone."""
        return self.encode(z)[1]

    def to(self, device: torch.device) -> JoinedCode:
        return JoinedCode(self.first.to(device), self.rest.to(device), self.decoder.to(device))


def joined_code(first: Encoder, rest: Encoder) -> JoinedCode:
    """``first`` on the first coordinates, ``rest`` on those behind them."""
    decoders = first.decoder, rest.decoder
    slots = max(decoder.coordinates.shape[-1] for decoder in decoders)
    coordinates, entries = (
        torch.cat(
            [
                torch.nn.functional.pad(getattr(decoder, name), (0, slots - decoder.coordinates.shape[-1]))
                for decoder in decoders
            ],
            dim=1,
        )
        for name in ("coordinates", "entries")
    )
    coordinates[:, first.decoder.nibbles :] += first.decoder.dim
    return JoinedCode(first, rest, NibbleCode(coordinates, entries, first.decoder.dim + rest.decoder.dim))
