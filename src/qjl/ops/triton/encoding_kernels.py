"""Kernels of the encoders. Each program takes the 64 tokens of one block of one head.

Between kernels numbers lie as codes do, token-minor: ``[B, H, blocks, numbers, 64]``. ``transform`` maps the tokens,
``sizes`` measures them, ``levels``, ``trellis`` and ``signs`` choose the numbers of one part of the coordinates,
``pack_bits`` puts their bits where the code wants them, and ``scales`` closes with the scale of each token.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qjl.packed import BLOCK

TOKENS = tl.constexpr(BLOCK)
CHUNK = tl.constexpr(32)  # coordinates at once
STATES = tl.constexpr(16)
PATHS = tl.constexpr(256)  # room of a search tree
STEPS_PER_OCTAVE = tl.constexpr(12)
UNIT_CODE = tl.constexpr(128)
TINY = tl.constexpr(1e-30)
LARGEST_HALF = tl.constexpr(65504.0)


class Rows(NamedTuple):
    """Numbers per token, ``[B, H, T, N]``, with strides in elements."""

    data: Tensor
    batch: int
    head: int
    token: int
    column: int

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        return cls(rows, *rows.stride())


class Mean(NamedTuple):
    """``vector [H, D]``, turned by ``cos`` and ``sin [B, F, T]`` where there are any."""

    vector: Tensor
    cos: Tensor | None
    sin: Tensor | None
    pairs: int
    interleaved: int


class Transform(NamedTuple):
    """A matrix ``[H, D', D]``; or signs ``flips [copies, D]`` before the rows ``order`` of Hadamard matrices."""

    matrix: Tensor | None
    stride: tuple[int, ...]
    flips: Tensor | None
    order: Tensor | None
    size: int


class Search(NamedTuple):
    """The fields of a ``LevelsPart``; ``per_head`` is 1 where heads have kinds of their own."""

    kinds: Tensor
    tree: Tensor
    levels: Tensor
    patterns: Tensor
    per_head: int


class Points(NamedTuple):
    """``own`` float32 [16, w], ``next`` [17, w], of which the last is before the first nibble and nothing; the costs
    ``[previous, current]`` of two states."""

    own: Tensor
    next: Tensor
    pair_cost: Tensor


class Sizes(NamedTuple):
    """Of tokens ``[B, H, blocks, 64]``: their rms, their weighted square, and its share along the code."""

    rms: Tensor
    squared: Tensor
    aligned: Tensor


class Places(NamedTuple):
    """Where bit b of nibble j comes from: which number, which of its bits; both int16 ``[H', N, 4]``."""

    number: Tensor
    bit: Tensor
    per_head: int


@triton.jit
def _site():
    """The number of this program's block among all."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _tokens(tokens: Rows, heads, dims, dim):
    """Float32 ``[dims, 64]``."""
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    begin = tokens.data + row * tokens.batch + head * tokens.head
    at = begin + dims[:, None] * tokens.column + token[None, :] * tokens.token
    return tl.load(at, mask=(dims < dim)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _mean_of(mean, heads, dims, dim):
    """What is subtracted from the tokens, ``[dims, 64]``."""
    vector = mean.vector + (tl.program_id(1) % heads) * dim
    mu = tl.load(vector + dims, mask=dims < dim, other=0.0)[:, None] + tl.zeros([1, TOKENS], tl.float32)
    if mean.cos is not None:
        if mean.interleaved:
            pair, is_first, partner = dims // 2, dims % 2 == 0, dims ^ 1
        else:
            is_first = dims < mean.pairs
            pair = tl.where(is_first, dims, dims - mean.pairs)
            partner = tl.where(is_first, dims + mean.pairs, dims - mean.pairs)
        turns = dims < 2 * mean.pairs
        other = tl.load(vector + partner, mask=turns, other=0.0)[:, None]
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        row = (tl.program_id(1) // heads).to(tl.int64) * mean.pairs
        at = (row + pair)[:, None] * (tl.num_programs(0) * TOKENS) + token[None, :]
        cos = tl.load(mean.cos + at, mask=turns[:, None], other=1.0)
        sin = tl.load(mean.sin + at, mask=turns[:, None], other=0.0)
        mu = mu * cos + other * sin * tl.where(is_first, -1.0, 1.0)[:, None]
    return mu


@triton.jit
def _hadamard(row, column):
    """Entries +-1 of a Hadamard matrix, ``[rows, columns]``."""
    common = row[:, None] & column[None, :]
    common ^= common >> 8
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return 1.0 - 2.0 * (common & 1).to(tl.float32)


@triton.jit
def _matrix(map, heads, row, rows, dims, dim):
    """Of the map, ``[rows, dims]``."""
    inside = (row < rows)[:, None] & (dims < dim)[None, :]
    if map.matrix is not None:
        begin = map.matrix + (tl.program_id(1) % heads).to(tl.int64) * map.stride[0]
        at = begin + row[:, None] * map.stride[1] + dims[None, :] * map.stride[2]
        entries = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        flip = tl.load(map.flips + (row // map.size)[:, None] * dim + dims[None, :], mask=inside, other=0.0)
        entries = flip * _hadamard(tl.load(map.order + row, mask=row < rows, other=0), dims)
    return entries


@triton.jit
def transform(tokens, mean, map, mapped, norms, heads, rows, dim):
    """``grid (blocks, B * H, D' / CHUNK)``: centred tokens mapped, and their norms where they are wanted."""
    row = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    product = tl.zeros([CHUNK, TOKENS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for start in range(0, dim, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        x = _tokens(tokens, heads, dims, dim)
        if mean is not None:
            x -= _mean_of(mean, heads, dims, dim)
        product = tl.dot(_matrix(map, heads, row, rows, dims, dim), x, product, input_precision="ieee")
        squares += tl.sum(x * x, axis=0)
    token = tl.arange(0, TOKENS)
    to = mapped + (_site() * rows + row)[:, None] * TOKENS + token[None, :]
    tl.store(to, product, mask=(row < rows)[:, None])
    if norms is not None and tl.program_id(2) == 0:
        tl.store(norms + _site() * TOKENS + token, tl.sqrt(squares))


@triton.jit
def _mapped(mapped, first, rows, row, count):
    """Coordinates ``first + row`` of the tokens, ``[row, 64]``, zero from ``count`` on."""
    at = mapped + (_site() * rows + first + row)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    return tl.load(at, mask=(row < count)[:, None], other=0.0)


@triton.jit
def _weights(weights, heads, first, rows, row, count):
    """What an error of each coordinate counts, ``[row, 1]``."""
    if weights is None:
        weight = tl.where(row < count, 1.0, 0.0)
    else:
        weight = tl.load(weights + (tl.program_id(1) % heads) * rows + first + row, mask=row < count, other=0.0)
    return weight[:, None]


@triton.jit
def sizes(mapped, weights, out, heads, rows):
    """``grid (blocks, B * H)``; nothing is aligned yet."""
    squares = tl.zeros([TOKENS], tl.float32)
    weighted = tl.zeros([TOKENS], tl.float32)
    active = tl.zeros([TOKENS], tl.float32)
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        y = _mapped(mapped, 0, rows, row, rows)
        weight = _weights(weights, heads, 0, rows, row, rows)
        counts = tl.where(weight > 0, 1.0, 0.0)
        squares += tl.sum(y * y * counts, axis=0)
        weighted += tl.sum(y * y * weight, axis=0)
        active += tl.sum(counts, axis=0)
    at = _site() * TOKENS + tl.arange(0, TOKENS)
    tl.store(out.rms + at, tl.sqrt(squares / active))
    tl.store(out.squared + at, weighted)
    tl.store(out.aligned + at, tl.zeros([TOKENS], tl.float32))


@triton.jit
def _size_of(sizes):
    """Rms of each token as a divisor."""
    return tl.maximum(tl.load(sizes.rms + _site() * TOKENS + tl.arange(0, TOKENS)), TINY)


@triton.jit
def _align(sizes, along):
    """Add what a part's code has in common with the tokens."""
    at = sizes.aligned + _site() * TOKENS + tl.arange(0, TOKENS)
    tl.store(at, tl.load(at) + along)


@triton.jit
def _nearest(search, heads, z, row, count, DEPTH: tl.constexpr):
    """Where the nearest level of each coordinate lies in the tables, int32 ``[row, 64]``."""
    head = (tl.program_id(1) % heads) * search.per_head
    kind = tl.load(search.kinds + head * count + row, mask=row < count, other=0).to(tl.int32)[:, None]
    bits = kind % 9
    path = tl.zeros([CHUNK, TOKENS], tl.int32)
    for depth in tl.static_range(DEPTH):
        edge = tl.load(search.tree + kind * PATHS + (1 << depth) + path)
        path |= tl.where((depth < bits) & (z > edge), 1 << depth, 0)
    return kind * PATHS + path


@triton.jit
def levels(mapped, weights, sizes, search, gains, tried, numbers, heads, first, rows, count, DEPTH: tl.constexpr):
    """``grid (blocks, B * H)``: the bit patterns of the nearest levels, at the gain of the least angle."""
    size = _size_of(sizes)
    best = tl.full([TOKENS], float("-inf"), tl.float32)
    chosen = tl.zeros([TOKENS], tl.float32) + tl.load(gains)
    for trial in range(tl.where(tried > 1, tried, 0)):
        gain = tl.load(gains + trial)
        along = tl.zeros([TOKENS], tl.float32)
        square = tl.zeros([TOKENS], tl.float32)
        for start in range(0, count, CHUNK):
            row = start + tl.arange(0, CHUNK)
            z = _mapped(mapped, first, rows, row, count) / size[None, :]
            weight = _weights(weights, heads, first, rows, row, count)
            level = tl.load(search.levels + _nearest(search, heads, gain * z, row, count, DEPTH))
            along += tl.sum(z * level * weight, axis=0)
            square += tl.sum(level * level * weight, axis=0)
        cosine = along / tl.maximum(tl.sqrt(square), TINY)
        chosen = tl.where(cosine > best, gain, chosen)
        best = tl.maximum(best, cosine)
    along = tl.zeros([TOKENS], tl.float32)
    for start in range(0, count, CHUNK):
        row = start + tl.arange(0, CHUNK)
        y = _mapped(mapped, first, rows, row, count)
        place = _nearest(search, heads, y / size[None, :] * chosen[None, :], row, count, DEPTH)
        weight = _weights(weights, heads, first, rows, row, count)
        along += tl.sum(y * tl.load(search.levels + place) * weight, axis=0)
        to = numbers + (_site() * count + row)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(to, tl.load(search.patterns + place).to(tl.uint8), mask=(row < count)[:, None])
    _align(sizes, along)


@triton.jit
def _coordinate(mapped, first, rows, place):
    """One coordinate of the tokens, ``[64]``."""
    return tl.load(mapped + (_site() * rows + first + place) * TOKENS + tl.arange(0, TOKENS))


@triton.jit
def trellis(mapped, weights, sizes, points, came, numbers, heads, first, rows, nibbles, WIDTH: tl.constexpr):
    """``grid (blocks, B * H)``: Viterbi's algorithm over 16 states; ``came [site, N, 16, 64]`` is its way back.

    The costs are those of ``qjl.trellis.best_nibbles``, in the same order.
    """
    size = _size_of(sizes)
    state, token = tl.arange(0, STATES), tl.arange(0, TOKENS)
    to_state = state[:, None] * TOKENS + token[None, :]
    pair_cost = tl.load(points.pair_cost + state[:, None] * STATES + state[None, :])
    cost = tl.zeros([STATES, TOKENS], tl.float32)
    for nibble in range(nibbles):
        to_own = tl.zeros([STATES, TOKENS], tl.float32)
        to_next = tl.zeros([STATES, TOKENS], tl.float32)
        square = tl.zeros([STATES], tl.float32)
        for i in tl.static_range(WIDTH):
            z = _coordinate(mapped, first, rows, nibble * WIDTH + i) / size
            own = tl.load(points.own + state * WIDTH + i)
            to_own += -2 * z[None, :] * own[:, None]
            to_next += -2 * z[None, :] * tl.load(points.next + state * WIDTH + i)[:, None]
            square += own * own
        way = came + (_site() * nibbles + nibble) * STATES * TOKENS + to_state
        if nibble == 0:
            cost = to_own + square[:, None]
            tl.store(way, tl.full([STATES, TOKENS], STATES, tl.uint8))
        else:
            total = (cost + to_next)[:, None, :] + pair_cost[:, :, None]  # [previous, current, 64]
            cost = tl.min(total, axis=0) + to_own
            tl.store(way, tl.argmin(total, axis=0).to(tl.uint8))
    tl.debug_barrier()  # other threads read the way back than wrote it
    best = tl.argmin(cost, axis=0)
    along = tl.zeros([TOKENS], tl.float32)
    for back in range(nibbles):
        nibble = nibbles - 1 - back
        tl.store(numbers + (_site() * nibbles + nibble) * TOKENS + token, best.to(tl.uint8))
        before = tl.load(came + (_site() * nibbles + nibble) * STATES * TOKENS + best * TOKENS + token).to(tl.int32)
        for i in tl.static_range(WIDTH):
            place = nibble * WIDTH + i
            decoded = tl.load(points.own + best * WIDTH + i) + tl.load(points.next + before * WIDTH + i)
            weight = 1.0
            if weights is not None:
                weight = tl.load(weights + (tl.program_id(1) % heads) * rows + first + place)
            along += _coordinate(mapped, first, rows, place) * decoded * weight
        best = before
    _align(sizes, along)


@triton.jit
def signs(mapped, weights, sizes, refined, numbers, heads, first, rows, count):
    """``grid (blocks, B * H)``: signs of the coordinates, or those that were ``refined``: 1 for +."""
    along = tl.zeros([TOKENS], tl.float32)
    for start in range(0, count, CHUNK):
        row = start + tl.arange(0, CHUNK)
        y = _mapped(mapped, first, rows, row, count)
        positive = y >= 0
        if refined is not None:
            positive = _mapped(refined, 0, count, row, count) > 0
        along += tl.sum(tl.where(positive, y, -y) * _weights(weights, heads, first, rows, row, count), axis=0)
        to = numbers + (_site() * count + row)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(to, positive.to(tl.uint8), mask=(row < count)[:, None])
    _align(sizes, along)


@triton.jit
def pack_bits(numbers, places, codes, heads, count, first, nibbles, bytes):
    """``grid (blocks, B * H, bytes / CHUNK)``: the bits of a part's nibbles, from byte ``first`` on."""
    byte = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    inside = byte < nibbles // 2
    token = tl.arange(0, TOKENS)[None, :]
    packed = tl.zeros([CHUNK, TOKENS], tl.int32)
    head = (tl.program_id(1) % heads) * places.per_head
    for place in tl.static_range(8):
        at = (head * nibbles + 2 * byte + place // 4) * 4 + place % 4
        number = tl.load(places.number + at, mask=inside, other=0).to(tl.int64)
        bit = tl.load(places.bit + at, mask=inside, other=0).to(tl.int32)
        chosen = tl.load(numbers + (_site() * count + number)[:, None] * TOKENS + token).to(tl.int32)
        packed |= ((chosen >> bit[:, None]) & 1) << place
    to = codes + (_site() * bytes + first + byte)[:, None] * TOKENS + token
    tl.store(to, packed.to(tl.uint8), mask=inside[:, None])


@triton.jit
def log_scales(sizes, units, out, heads):
    """``grid (blocks, B * H)``: |y|^2 / <y, y_hat> as an 8-bit logarithm."""
    at = _site() * TOKENS + tl.arange(0, TOKENS)
    aligned = tl.load(sizes.aligned + at)
    scale = tl.load(sizes.squared + at) / tl.maximum(aligned, TINY) / tl.load(units + tl.program_id(1) % heads)
    is_positive = (aligned > 0) & (scale > 0)
    octaves = tl.log2(tl.where(is_positive, scale, 1.0))
    code = tl.floor(octaves * STEPS_PER_OCTAVE + UNIT_CODE + 0.5)
    tl.store(out + at, tl.where(is_positive, tl.minimum(tl.maximum(code, 1), 255), 0).to(tl.uint8))


@triton.jit
def _half(x):
    return tl.minimum(tl.maximum(x, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)


@triton.jit
def half_scales(norms, factor, out):
    """``grid (blocks, B * H)``: norms times a factor, as float16."""
    at = _site() * TOKENS + tl.arange(0, TOKENS)
    tl.store(out + at, _half(tl.load(norms + at) * factor))


@triton.jit
def grids(tokens, numbers, steps, middles, heads, dim, size, root, clip, width, WIDTH: tl.constexpr, TOP: tl.constexpr):
    """``grid (blocks, B * H, groups)``: codes on the grid of one group of ``width`` rotated channels."""
    inside = tl.arange(0, WIDTH) < width
    row = tl.program_id(2) * width + tl.arange(0, WIDTH)
    y = tl.zeros([WIDTH, TOKENS], tl.float32)
    for start in range(0, dim, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        entries = _hadamard(row % size, dims % size) * root
        entries = tl.where((row // size)[:, None] == (dims // size)[None, :], entries, 0.0)
        y = tl.dot(entries, _tokens(tokens, heads, dims, dim), y, input_precision="ieee")
    low = clip * tl.min(tl.where(inside[:, None], y, float("inf")), axis=0)
    high = clip * tl.max(tl.where(inside[:, None], y, float("-inf")), axis=0)
    step, middle = _half((high - low) / TOP), _half((high + low) / 2)
    divisor = tl.where(step > 0, step.to(tl.float32), 1.0)
    code = tl.floor((y - middle.to(tl.float32)[None, :]) / divisor[None, :] + TOP / 2 + 0.5)
    code = tl.minimum(tl.maximum(code, 0), TOP).to(tl.uint8)
    token = tl.arange(0, TOKENS)
    to = numbers + (_site() * dim + row)[:, None] * TOKENS + token[None, :]
    tl.store(to, code, mask=inside[:, None])
    at = (_site() * tl.num_programs(2) + tl.program_id(2)) * TOKENS + token
    tl.store(steps + at, step)
    tl.store(middles + at, middle)
