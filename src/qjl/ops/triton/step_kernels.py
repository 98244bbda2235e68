"""Kernels of the decode step for forms that ``slots`` describes: two launches, ``prepare`` and ``step``.

Codes become 8-bit operands of integer matrix products in registers: a byte permutation looks up four nibbles at once.
Queries and weights are two digits of 7 bits each. So sums of products are exact; what is rounded are queries and
weights, to 14 bits of the largest.

A program is one warp. It takes 64 packed tokens at a time. Eight of them, 8 g to 8 g + 7, are two words of each byte
row; token ``8 g + 4 h + phase`` has place ``16 phase + 8 h + g``.

All work of a step is one row of units: 64 packed tokens of one KV head and some query rows, or all exact tokens of
these. Programs take equal shares of it, however long sequences are. What several programs found of one head is merged
by the last of them.

Scores are in powers of two, log-sum-exps are binary until the end.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qjl.ops.triton import runtime
from qjl.packed import BLOCK

INTERPRETED = tl.constexpr(runtime.is_interpreted())
TOKENS = tl.constexpr(BLOCK)
EIGHTS = tl.constexpr(BLOCK // 8)  # of a tile's tokens
CHUNK = tl.constexpr(4)  # words of keys at once
DIMS = tl.constexpr(32)  # coordinates of a map at once
FUNCTIONS = tl.constexpr(32)  # that stand for all turns of a mean within a block
BLOCKS = tl.constexpr(8)  # whose means a program prepares
GROUP = tl.constexpr(16)  # parts that one program merges
EXACT = tl.constexpr(16)  # exact tokens at once
EXACT_DIMS = tl.constexpr(64)  # numbers of their values at once
LEAST = tl.constexpr(16)  # rows of a matrix product
MIDDLE = tl.constexpr(64)  # of table entries
DIGIT = tl.constexpr(128)
LARGEST = tl.constexpr(16000.0)  # what stands for the largest number of a query or a mean
LARGEST_WEIGHT = tl.constexpr(16256.0)
NO_SCALE = tl.constexpr(-40.0)  # the logarithm that stands for that of 0
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TAU = tl.constexpr(6.283185307179586)
TINY = tl.constexpr(1e-30)

_TWO_WORDS = tl.constexpr("ld.global.v2.b32 {$0, $1}, [$2];")
_FETCH = tl.constexpr("prefetch.global.L1 [$1]; mov.b32 $0, 0;")
_FOUR_WORDS = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
_TRANSPOSE = tl.constexpr(
    "{ .reg .b32 a, b, c, d;"
    "prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $6, $7, 0x5140; prmt.b32 c, $4, $5, 0x7362; prmt.b32 d, $6, $7, 0x7362;"
    "prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; prmt.b32 $2, c, d, 0x5410; prmt.b32 $3, c, d, 0x7632; }"
)
# A product with 1 is an OR on a pipe that has less to do.
_LOOK_UP = tl.constexpr("{ .reg .b32 a, b; prmt.b32 a, $1, $2, $5; prmt.b32 b, $3, $4, $6; mad.lo.u32 $0, a, $7, b; }")
_UNZIP = tl.constexpr(
    "{ .reg .b32 a, b; shr.u32 a, $1, 4; xor.b32 a, a, $1; and.b32 a, a, 0x00F000F0; shl.b32 b, a, 4;"
    "xor.b32 a, a, b; xor.b32 a, a, $1; prmt.b32 $0, a, a, 0x3120; }"
)
_SAME = tl.constexpr("mov.b32 $0, $1;")


class Keys(NamedTuple):
    """Packed keys as words of four tokens, and how they are looked up (``KeyWords``); strides in elements."""

    codes: Tensor
    codes_stride: tuple[int, ...]  # of page, head, byte row
    scale: Tensor
    scale_stride: tuple[int, ...]  # of page, head
    unit: Tensor | None
    rows: Tensor
    tables: Tensor
    coordinates: Tensor
    factors: Tensor
    per_head: int  # 1 where heads have codes of their own


class Values(NamedTuple):
    """Packed values likewise (``ValueTables``)."""

    codes: Tensor
    codes_stride: tuple[int, ...]
    scale: Tensor
    scale_stride: tuple[int, ...]
    unit: Tensor | None
    tables: tuple[Tensor, ...]  # of each run
    places: Tensor
    weights: Tensor
    per_head: int


class Map(NamedTuple):
    """``[H, D', D]`` from the space of the codes."""

    data: Tensor
    stride: tuple[int, ...]
    code_dim: int
    head_dim: int


class Turned(NamedTuple):
    """The part of a mean that RoPE turns, by pairs of coordinates ``[H, F]``, and what all turns in a block share.

    ``down float32 [2 F, 32]`` gives the coefficients of functions of the token, which ``functions int32 [2, 64, 8]``
    holds as two digits, in the order of a tile and of ``_place``.
    """

    first: Tensor
    second: Tensor
    mean_first: Tensor
    mean_second: Tensor
    inv_freq: Tensor
    down: Tensor
    functions: Tensor


class Asked(NamedTuple):
    """Queries as the codes meet them, of each of ``[B, H, T]`` tiles of R rows: N = 2 R digits, four in a word, as
    ``_place`` has them.

    - ``mapped float32 [.., R, 16 W]``: queries by look-up, before they are rounded.
    - ``digits int32 [.., W / 4, 2, N, 8]``, ``offsets int32 [.., N]``, ``factors float32 [.., R]``: of the scores.
    - ``rest float32 [.., R]``: what a mean that does not turn adds.
    - ``means int32 [.., blocks, N, 8]``, ``mean_factors float32 [.., blocks, R]``: of that which does.
    """

    mapped: Tensor
    digits: Tensor
    offsets: Tensor
    factors: Tensor
    rest: Tensor
    means: Tensor | None
    mean_factors: Tensor | None


class Shares(NamedTuple):
    """How the work is dealt out: ``begins int64 [B + 1]``, the units before each sequence; ``tickets int32``, how many
    have come to each merge: two of each program, then one of each tile of query rows."""

    begins: Tensor
    tickets: Tensor
    tiles: int  # of query rows
    programs: int  # as ``_number`` reads it


class Parts(NamedTuple):
    """What programs found: ``sums float32 [2 programs, P R]`` and ``lse [2 programs, R]`` of packed tokens, of exact
    ones ``scores [B, H, T, R, E]``, ``out [B, H, T, R, Dv]``, ``exact_lse [B, H, T, R]``."""

    sums: Tensor
    lse: Tensor
    scores: Tensor
    out: Tensor
    exact_lse: Tensor


class ByQuery(NamedTuple):
    """``[B, Hq, Q, ...]``: queries, outputs, or what is added to scores; a stride of 0 where one serves all."""

    data: Tensor
    stride: tuple[int, ...]


class Rows(NamedTuple):
    """Which tokens of the pools each row has (``qjl.ops.forms.Rows``); tables are contiguous."""

    table: Tensor
    capacity: int  # pages of a row in the table, as ``_number`` reads it
    lengths: Tensor
    skip: Tensor
    origins: Tensor
    slots: Tensor
    room: int  # slots of a row in the table, likewise
    counts: Tensor


class Exact(NamedTuple):
    """Tokens ``[slots, H, D]``; strides in elements, of slot and head."""

    key: Tensor
    key_stride: tuple[int, ...]
    key_dim: int
    value: Tensor
    value_stride: tuple[int, ...]
    value_dim: int


class Fresh(NamedTuple):
    """Tokens ``[B, H, Q, D]`` that are not in their slots yet."""

    key: Tensor
    key_stride: tuple[int, ...]
    value: Tensor
    value_stride: tuple[int, ...]


def coded(number: int) -> int:
    """A number that changes with lengths, as kernels are given it: neither 1 nor a multiple of 16, for each of which
    Triton compiles another one."""
    return 2 * number + 1


@triton.jit
def _number(coded):
    return coded >> 1


# What programs are of


@triton.jit
def _row_head_tile(place, heads, tiles):
    """Of one of ``[B, H, T]``."""
    return (place // (heads * tiles)).to(tl.int64), ((place // tiles) % heads).to(tl.int64), place % tiles


@triton.jit
def by_query(of, row, head, query_row, count, queries):
    """Where what belongs to some query rows of a KV head begins, ``int64 [R]``."""
    query_head = head * (count // queries) + query_row // queries
    return row * of.stride[0] + query_head * of.stride[1] + (query_row % queries).to(tl.int64) * of.stride[2]


@triton.jit
def _blocks_of(of_rows, row):
    """The first block of 64 packed tokens that a row reads, and where they end."""
    skip, length = tl.load(of_rows.skip + row), tl.load(of_rows.lengths + row)
    first = skip // TOKENS
    return first, tl.maximum((length + TOKENS - 1) // TOKENS, first)


# prepare


@triton.jit(do_not_specialize=["batch", "heads", "count", "queries", "blocks"])
def prepare(
    query, keys, map, mean, turned, asked, shares, exact, fresh, of_rows, batch, heads, count, queries, blocks, scale,
    R: tl.constexpr, W: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """``grid (B * H * T, 1 + blocks / 8)``: all that does not depend on codes.

    The first of each tile of query rows maps the queries and stores fresh tokens; the others prepare means.
    ``scale`` is what scores are multiplied with, ``count`` how many query rows a KV head has.
    """
    place = tl.program_id(0)
    row, head, tile = _row_head_tile(place, heads, shares.tiles)
    query_row = tile * R + tl.arange(0, LEAST)
    is_row = (query_row < count) & (tl.arange(0, LEAST) < R)
    of_rows_of_query = query.data + by_query(query, row, head, query_row, count, queries)
    if tl.program_id(1) == 0:
        _clear(shares.tickets, 2 * _number(shares.programs) + tl.num_programs(0))
        if place == 0:
            _deal(shares, of_rows, batch, heads)
        _ask(of_rows_of_query, query.stride[3], is_row, keys, map, mean, asked, place, head, scale, R, W)
        if fresh is not None:  # noqa: SIM102
            if tile == 0:
                _put(
                    fresh.key,
                    fresh.key_stride,
                    exact.key,
                    exact.key_stride,
                    exact.key_dim,
                    of_rows,
                    row,
                    head,
                    queries,
                    DIM,
                )
                _put(
                    fresh.value,
                    fresh.value_stride,
                    exact.value,
                    exact.value_stride,
                    exact.value_dim,
                    of_rows,
                    row,
                    head,
                    queries,
                    DIM,
                )
    elif turned is not None:
        first, stop = _blocks_of(of_rows, row)
        begin = (tl.program_id(1) - 1) * BLOCKS
        if (begin < stop) & (begin + BLOCKS > first):
            origin = tl.load(of_rows.origins + row)
            _turn(query, row, head, tile, count, queries, turned, asked, place, origin, begin, blocks, scale, R, F)


@triton.jit
def _clear(tickets, count):
    step: tl.constexpr = 128
    for begin in range(tl.program_id(0) * step, count, tl.num_programs(0) * step):
        at = begin + tl.arange(0, step)
        tl.store(tickets + at, tl.zeros([step], tl.int32), mask=at < count)


@triton.jit
def _deal(shares, of_rows, batch, heads):
    """Units before each sequence."""
    total = tl.zeros([], tl.int64)
    for row in range(batch):
        tl.store(shares.begins + row, total)
        first, stop = _blocks_of(of_rows, row)
        total += (stop - first + 1).to(tl.int64) * heads * shares.tiles
    tl.store(shares.begins + batch, total)


@triton.jit
def _ask(queries, stride, is_row, keys, map, mean, asked, place, head, scale, R: tl.constexpr, W: tl.constexpr):
    """Queries by look-up, as two digits of 7 bits."""
    i, r = tl.arange(0, DIMS), tl.arange(0, LEAST)
    look_ups: tl.constexpr = 16 * W
    mapped = asked.mapped + place.to(tl.int64) * (R * look_ups)
    largest = tl.zeros([LEAST], tl.float32)
    for part in range(0, look_ups, DIMS):
        at = head * keys.per_head * look_ups + part + i
        coordinate, factor = tl.load(keys.coordinates + at), tl.load(keys.factors + at)
        product = tl.zeros([LEAST, DIMS], tl.float32)
        for begin in range(0, map.head_dim, DIMS):
            dim = begin + i
            is_dim = dim < map.head_dim
            q = tl.load(queries[:, None] + dim[None, :] * stride, mask=is_row[:, None] & is_dim[None, :], other=0.0)
            of_map = (
                map.data + head * map.stride[0] + coordinate[None, :] * map.stride[1] + dim[:, None] * map.stride[2]
            )
            entries = tl.load(of_map, mask=(coordinate >= 0)[None, :] & is_dim[:, None], other=0.0).to(tl.float32)
            product = tl.dot(q.to(tl.float32), entries, product, input_precision="tf32x3")
        product *= factor[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(product), axis=1))
        tl.store(mapped + r[:, None] * look_ups + part + i[None, :], product, mask=(r < R)[:, None])
    largest = tl.maximum(largest, TINY)
    tl.debug_barrier()  # other threads read than wrote
    high_sum = tl.zeros([LEAST], tl.int32)
    low_sum = tl.zeros([LEAST], tl.int32)
    digits = asked.digits.to(tl.pointer_type(tl.int8)) + place.to(tl.int64) * (2 * R * look_ups)
    for part in range(0, look_ups, DIMS):
        product = tl.load(mapped + r[:, None] * look_ups + part + i[None, :], mask=(r < R)[:, None], other=0.0)
        high, low = _digits(product * LARGEST / largest[:, None])
        to = digits + part * (2 * R) + 2 * r[:, None] * DIMS + _place(i)[None, :]
        tl.store(to, high.to(tl.int8), mask=(r < R)[:, None])
        tl.store(to + DIMS, low.to(tl.int8), mask=(r < R)[:, None])
        high_sum += tl.sum(high, axis=1)
        low_sum += tl.sum(low, axis=1)
    to = asked.offsets + place * (2 * R) + 2 * r
    tl.store(to, high_sum * MIDDLE, mask=r < R)
    tl.store(to + 1, low_sum * MIDDLE, mask=r < R)
    unit = scale / LARGEST
    if keys.unit is not None:
        unit *= tl.load(keys.unit + head)
    tl.store(asked.factors + place * R + r, largest * unit, mask=r < R)
    rest = tl.zeros([LEAST], tl.float32)
    if mean is not None:
        for begin in range(0, map.head_dim, DIMS):
            dim = begin + i
            is_dim = dim < map.head_dim
            q = tl.load(queries[:, None] + dim[None, :] * stride, mask=is_row[:, None] & is_dim[None, :], other=0.0)
            mu = tl.load(mean + head * map.head_dim + dim, mask=is_dim, other=0.0)
            rest += tl.sum(q.to(tl.float32) * mu[None, :], axis=1)
    tl.store(asked.rest + place * R + r, rest * scale, mask=r < R)


@triton.jit
def _digits(x):
    """The nearest whole number as ``128 * high + low``; both have either sign, so that what is left out evens out."""
    whole = tl.floor(x + 0.5).to(tl.int32)
    high = (whole + 64) >> 7
    return high, whole - (high << 7)


@triton.jit
def _put(fresh, fresh_stride, pool, pool_stride, dim, of_rows, row, head, queries, DIM: tl.constexpr):
    """Fresh tokens of a row and head to the slots of their places, where there are any."""
    i = tl.arange(0, DIM)
    for token in range(queries):
        place = tl.load(of_rows.counts + row) - queries + token
        slot = tl.load(of_rows.slots + row * _number(of_rows.room) + place, mask=place >= 0, other=-1).to(tl.int64)
        at = fresh + row * fresh_stride[0] + head * fresh_stride[1] + (token + tl.zeros([], tl.int64)) * fresh_stride[2]
        numbers = tl.load(at + i * fresh_stride[3], mask=i < dim, other=0.0)
        to = pool + slot * pool_stride[0] + head * pool_stride[1] + i
        if slot >= 0:
            tl.store(to, numbers.to(pool.dtype.element_ty), mask=i < dim)


@triton.jit
def _turn(
    query, row, head, tile, count, queries, turned, asked, place, origin, begin, blocks, scale,
    R: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Coefficients of the mean for some blocks: <q, R_n mu> = a cos(n theta) + b sin(n theta), summed over pairs."""
    rows: tl.constexpr = BLOCKS * R
    i, k = tl.arange(0, rows), tl.arange(0, FUNCTIONS)
    block, r = begin + i // R, i % R
    query_row = tile * R + r
    present = (query_row < count)[:, None]
    of_query = query.data + by_query(query, row, head, query_row, count, queries)
    sums = tl.zeros([rows, FUNCTIONS], tl.float32)
    for first in range(0, F, DIMS):
        f = first + tl.arange(0, DIMS)
        at_first, at_second = tl.load(turned.first + f) * query.stride[3], tl.load(turned.second + f) * query.stride[3]
        q_first = tl.load(of_query[:, None] + at_first[None, :], mask=present, other=0.0).to(tl.float32)
        q_second = tl.load(of_query[:, None] + at_second[None, :], mask=present, other=0.0).to(tl.float32)
        m_first = tl.load(turned.mean_first + head * F + f)[None, :]
        m_second = tl.load(turned.mean_second + head * F + f)[None, :]
        along, across = q_first * m_first + q_second * m_second, q_second * m_first - q_first * m_second
        turns = (origin + block * TOKENS).to(tl.float64)[:, None] * tl.load(turned.inv_freq + f)[None, :]
        angle = ((turns - tl.floor(turns)) * TAU).to(tl.float32)
        cos, sin = tl.cos(angle), tl.sin(angle)
        down = turned.down + f[:, None] * FUNCTIONS + k[None, :]
        sums = tl.dot(along * cos + across * sin, tl.load(down), sums, input_precision="tf32x3")
        sums = tl.dot(across * cos - along * sin, tl.load(down + F * FUNCTIONS), sums, input_precision="tf32x3")
    largest = tl.maximum(tl.max(tl.abs(sums), axis=1), TINY)
    high, low = _digits(sums * LARGEST / largest[:, None])
    inside = block < blocks
    at_block = place.to(tl.int64) * blocks + block
    to = asked.means.to(tl.pointer_type(tl.int8)) + (at_block * R + r)[:, None] * (2 * FUNCTIONS) + _place(k)[None, :]
    tl.store(to, high.to(tl.int8), mask=inside[:, None])
    tl.store(to + FUNCTIONS, low.to(tl.int8), mask=inside[:, None])
    tl.store(asked.mean_factors + at_block * R + r, largest * (scale * DIGIT / (LARGEST * LARGEST)), mask=inside)


# Words in registers. Where they lie among threads follows from the shapes [8 n, 4], as matrix products want them; an
# ordinary load would choose for itself.


@triton.jit
def _two_words(at):
    """Those from each address on, which are 8 bytes."""
    if INTERPRETED:
        return tl.load(at), tl.load(at + 1)
    else:
        return tl.inline_asm_elementwise(
            _TWO_WORDS, "=r,=r,l", [at.to(tl.int64)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def _four_words(at):
    """Likewise, which are 16 bytes."""
    if INTERPRETED:
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    else:
        return tl.inline_asm_elementwise(
            _FOUR_WORDS,
            "=r,=r,=r,=r,l",
            [at.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _byte(x, place):
    return (x >> (8 * place)) & 255


@triton.jit
def _gathered(a, b, c, d, place: tl.constexpr):
    """Byte ``place`` of four words, as a word."""
    low = _byte(a, place) | (_byte(b, place) << 8)
    return low | (_byte(c, place) << 16) | (_byte(d, place) << 24)


@triton.jit
def _transposed(a, b, c, d):
    """Four words of four bytes the other way round."""
    if INTERPRETED:
        return _gathered(a, b, c, d, 0), _gathered(a, b, c, d, 1), _gathered(a, b, c, d, 2), _gathered(a, b, c, d, 3)
    else:
        return tl.inline_asm_elementwise(
            _TRANSPOSE,
            "=&r,=&r,=&r,=&r,r,r,r,r",
            [a, b, c, d],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _looked_up(table, nibbles, flipped, one):
    """The entries that four nibbles select, as a word; ``flipped`` are the nibbles with their top bits the other way,
    ``one`` is 1."""
    if INTERPRETED:
        found = tl.zeros_like(nibbles)
        for i in tl.static_range(4):
            nibble = (nibbles >> (4 * i)) & 15
            low = tl.where(nibble < 4, table[0], table[1])
            high = tl.where(nibble < 12, table[2], table[3])
            found |= _byte(tl.where(nibble < 8, low, high), nibble % 4) << (8 * i)
        return found
    else:
        return tl.inline_asm_elementwise(
            _LOOK_UP,
            "=&r,r,r,r,r,r,r,r",
            [table[0], table[1], table[2], table[3], nibbles, flipped, one],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _unzipped(x):
    """The low nibbles of four bytes, then the high ones."""
    if INTERPRETED:
        found = tl.zeros_like(x)
        for i in tl.static_range(4):
            byte = _byte(x, i)
            found |= ((byte & 15) << (4 * i)) | ((byte >> 4) << (16 + 4 * i))
        return found
    else:
        return tl.inline_asm_elementwise(_UNZIP, "=&r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _as_bytes(x):
    """``int32 [M, K] -> int8 [M, 4 K]``: the four bytes of a word are four numbers of one thread."""
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], 4))
    if INTERPRETED:
        wide = _byte(wide, tl.arange(0, 4)[None, None, :]).to(tl.int8)
        return wide.reshape(x.shape[0], 4 * x.shape[1])
    else:
        wide = wide.reshape(x.shape[0], 4 * x.shape[1])
        return tl.inline_asm_elementwise(_SAME, "=r,r,r,r,r", [wide], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _one_below_another(a, b, c, d):
    """Four ``[16, N]`` as ``[64, N]``."""
    return tl.join(tl.join(a, c), tl.join(b, d)).permute(2, 3, 0, 1).reshape(4 * a.shape[0], a.shape[1])


@triton.jit
def _apart(x):
    """The inverse of ``_one_below_another``."""
    folded = x.reshape(2, 2, x.shape[0] // 4, x.shape[1]).permute(2, 3, 0, 1)
    first, second = tl.split(folded)
    a, c = tl.split(first)
    b, d = tl.split(second)
    return a, b, c, d


@triton.jit
def _side_by_side(a, b):
    """Two ``[M, N]`` as ``[M, 2 N]``."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def _below(a, b):
    """Two ``[M, N]`` as ``[2 M, N]``."""
    return tl.join(a, b).permute(2, 0, 1).reshape(2 * a.shape[0], a.shape[1])


@triton.jit
def _operand(at, N: tl.constexpr):
    """``int8 [32, N]`` for the right side of a matrix product, whose columns lie one behind the other (``_place``)."""
    return tl.trans(_bytes_at(at, N))


@triton.jit
def _bytes_at(at, M: tl.constexpr):
    """``int8 [M, 32]``, each row as ``_place`` has it."""
    first, second = _two_words(at + tl.arange(0, M)[:, None] * 8 + 2 * tl.arange(0, 4)[None, :])
    return _as_bytes(_side_by_side(first, second))


@triton.jit
def _place(k):
    """Where byte k of 32 lies: a thread's two words side by side."""
    return (k // 4 % 4 * 2 + k // 16) * 4 + k % 4


@triton.jit
def _no_tensors():
    return ()


@triton.jit
def _for_rows(x, R: tl.constexpr):
    """``[M, 4]`` of equal columns as ``[M, R]``."""
    return x if R == 4 else _side_by_side(x, x)


# step


@triton.jit
def _at_page(side_stride, page, head):
    """Where a head's codes or scales of a page begin, ``int64``; of some page where there is none."""
    return tl.maximum(page, 0) * side_stride[0] + head * side_stride[1]


@triton.jit
def _scales(side, page, head, first_word):
    """The logarithms of the scales of a tile's tokens, ``float32 [64, 4]`` of equal columns."""
    at = side.scale + _at_page(side.scale_stride, page, head)
    if side.unit is not None:
        codes = _below(*_two_words(at + first_word))
        code = _one_below_another(_byte(codes, 0), _byte(codes, 1), _byte(codes, 2), _byte(codes, 3))
        return tl.where(code == 0, NO_SCALE, (code - 128).to(tl.float32) * (1.0 / 12))
    else:
        a, b, c, d = _four_words(at + 2 * first_word)
        first, second = _below(a, c), _below(b, d)
        halves = _one_below_another(first & 0xFFFF, (first >> 16) & 0xFFFF, second & 0xFFFF, (second >> 16) & 0xFFFF)
        scale = halves.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return tl.where((scale > 0) & (scale < float("inf")), tl.log2(tl.maximum(scale, TINY)), NO_SCALE)


@triton.jit(do_not_specialize=["batch", "heads", "count", "queries", "blocks", "one"])
def step(
    query, keys, values, map, mean, functions, asked, shares, exact, of_rows, bias, parts, out, lse, batch, heads,
    count, queries, blocks, scale, softcap, one,
    R: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, ROOM: tl.constexpr,
    PLANES: tl.constexpr, BEGIN: tl.constexpr, SUMS: tl.constexpr, SOURCES: tl.constexpr, PAGE: tl.constexpr,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``grid (programs,)``: a share of all units, then what parts are complete.

    Of each run of the values' tables: its FIRST byte row, how many ROWS, the ROOM for these, how many PLANES (tables),
    and where its sums BEGIN. KEY_BYTES and VALUE_BYTES are those of a head's codes in a page. SUMS are
    all of them together, SOURCES those of one coordinate at most.
    """
    program = tl.program_id(0).to(tl.int64)
    total = tl.load(shares.begins + batch)
    programs = tl.minimum(_number(shares.programs), total)  # each has a unit
    begin = tl.minimum(program, programs) * total // programs
    stop = tl.minimum(program + 1, programs) * total // programs
    row = _sequence_of(shares.begins, batch, begin)
    at = begin
    while at < stop:
        first, last = _blocks_of(of_rows, row)
        units = last - first + 1
        of_row = at - tl.load(shares.begins + row)
        pair, unit = (of_row // units).to(tl.int32), (of_row % units).to(tl.int32)
        until = tl.minimum(units, unit + (stop - at)).to(tl.int32)
        head, tile, place = pair // shares.tiles, pair % shares.tiles, row * heads * shares.tiles + pair
        slot = 2 * program + tl.where(at == begin, 0, 1)
        _packed(
            keys, values, functions, asked, of_rows, bias, parts, slot, place, row, head.to(tl.int64), tile, count,
            queries, blocks, first + unit, first + tl.minimum(until, units - 1), softcap, one,
            R, W, FIRST, ROWS, ROOM, PLANES, BEGIN, SUMS, PAGE, KEY_BYTES, VALUE_BYTES,
        )  # fmt: skip
        if until == units:
            _exact(
                query,
                exact,
                of_rows,
                bias,
                parts,
                place,
                row,
                head.to(tl.int64),
                tile,
                count,
                queries,
                scale,
                softcap,
                R,
                PAGE,
                PRECISION,
            )
        tl.debug_barrier()  # what other threads wrote belongs to what this program tells
        pair_begin = at - unit
        own_first = ((pair_begin + 1) * programs - 1) // total
        own_last = ((pair_begin + units) * programs - 1) // total
        if _is_last(shares, parts, program, programs, pair_begin, own_first, own_last, total, place, R, SUMS):
            slot = _slot(own_first, own_first, pair_begin, total, programs)
            _close(
                values,
                map,
                mean,
                parts,
                out,
                lse,
                slot,
                place,
                row,
                head.to(tl.int64),
                tile,
                shares.tiles,
                count,
                queries,
                R,
                SUMS,
                SOURCES,
            )
        at += until - unit
        row += tl.where(at >= tl.load(shares.begins + row + 1), 1, 0)


@triton.jit
def _sequence_of(begins, batch, at):
    """To which a unit belongs."""
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        is_behind = tl.load(begins + middle) <= at
        low, high = tl.where(is_behind, middle, low), tl.where(is_behind, high, middle)
    return low


@triton.jit
def _packed(
    keys, values, functions, asked, of_rows, bias, parts, slot, place, row, head, tile, count, queries, blocks, start,
    stop, softcap, one,
    R: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, ROOM: tl.constexpr,
    PLANES: tl.constexpr, BEGIN: tl.constexpr, SUMS: tl.constexpr, PAGE: tl.constexpr, KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
):  # fmt: skip
    """Attention to some blocks of packed tokens: sums of table entries, and their log-sum-exp."""
    n, r, w = tl.arange(0, 2 * R), tl.arange(0, R), tl.arange(0, 4)
    eight = tl.arange(0, EIGHTS)[:, None]
    words = (head * keys.per_head * W + w)[None, :]
    of_digits = asked.digits + place.to(tl.int64) * (W * R * 8)
    above = tl.zeros([TOKENS, 2 * R], tl.int32) - tl.load(asked.offsets + place * 2 * R + n)[None, :]
    factor, rest = tl.load(asked.factors + place * R + r)[None, :], tl.load(asked.rest + place * R + r)[None, :]
    skip, length = tl.load(of_rows.skip + row), tl.load(of_rows.lengths + row)
    most = tl.full([R], LOWEST, tl.float32)
    total = tl.zeros([R], tl.float32)
    weight_sum = tl.zeros([R], tl.float32)
    sums = _no_tensors()
    for run in tl.static_range(len(PLANES)):
        for _ in tl.static_range(2 * PLANES[run]):
            sums += (tl.zeros([ROOM[run], R], tl.float32),)

    for block in range(start, stop):
        page, first = _page(of_rows, row, block, eight, skip, length, PAGE)
        first_word = first % PAGE // 4 + 0 * w[None, :]
        nothing = block * (one - 1)  # so that what registers have no room for is loaded again
        scores = above
        if PAGE >= TOKENS:
            _fetch_next(keys, values, of_rows, row, head, block + 1, stop, KEY_BYTES, VALUE_BYTES, PAGE)
        codes = keys.codes + _at_page(keys.codes_stride, page, head)
        for chunk in tl.static_range(W // CHUNK):
            a, b, c, d = _four_words(keys.rows + 4 * (words + chunk * CHUNK) + nothing)
            a, b = _below(*_two_words(codes + (a + first_word))), _below(*_two_words(codes + (b + first_word)))
            c, d = _below(*_two_words(codes + (c + first_word))), _below(*_two_words(codes + (d + first_word)))
            a, b, c, d = _transposed(a, b, c, d)
            nibbles = _one_below_another(a, b, c, d)
            flipped = nibbles ^ -2004318072  # 0x88888888
            tables = keys.tables + 16 * (words + chunk * CHUNK) + nothing
            for half in tl.static_range(2):
                own, other = nibbles >> (16 * half), flipped >> (16 * half)
                early = _looked_up(_four_words(tables + 8 * half), own, other, one)
                late = _looked_up(_four_words(tables + 8 * half + 4), own, other, one)
                digits = _operand(of_digits + ((2 * chunk + half) * (2 * R * 8) + nothing), 2 * R)
                scores = tl.dot(_as_bytes(_side_by_side(early, late)), digits, scores, out_dtype=tl.int32)
        high, low = tl.split(scores.reshape(TOKENS, R, 2))
        scale = _for_rows(tl.exp2(_scales(keys, page, head, first_word)), R)
        score = (high * DIGIT + low).to(tl.float32) * (scale * factor)
        if asked.means is not None:
            score += _mean_scores(asked, functions + nothing, place.to(tl.int64) * blocks + block, R)
        score = _capped(score + rest, softcap)
        if bias is not None:
            query_row = tile * R + r
            column = _columns(block)
            at = bias.data + by_query(bias, row, head, query_row, count, queries)[None, :] + column * bias.stride[3]
            wanted = (query_row < count)[None, :] & (column < length)
            score += tl.load(at, mask=wanted, other=0.0) * LOG2_E
        if PAGE < TOKENS:
            of_half = _below(page, page)
            is_held = _one_below_another(of_half, of_half, of_half, of_half) >= 0
            score = tl.where(is_held & _is_within(block, skip, length), score, float("-inf"))
        elif (block * TOKENS < skip) | (block * TOKENS + TOKENS > length) | (page < 0):
            score = tl.where((page >= 0) & _is_within(block, skip, length), score, float("-inf"))

        logarithm = _for_rows(_scales(values, page, head, first_word), R)
        scaled = score + logarithm
        peak = tl.maximum(tl.max(scaled, axis=0), LOWEST)
        weight = tl.exp2(scaled - peak[None, :])
        new = tl.maximum(most, peak)
        keep, part = tl.exp2(most - new), tl.exp2(peak - new)
        most = new
        total = total * keep + tl.sum(weight * tl.exp2(-logarithm), axis=0) * part
        whole = (weight * LARGEST_WEIGHT + 0.5).to(tl.int32)
        weight_sum = weight_sum * keep + tl.sum(whole, axis=0).to(tl.float32) * part
        weights = _weight_digits(whole)
        keep, part = keep[None, :], part[None, :]
        added = _no_tensors()
        for run in tl.static_range(len(PLANES)):
            at_row = FIRST[run] + tl.minimum(tl.arange(0, ROOM[run]), ROWS[run] - 1)[:, None]
            nibbles = _value_words(values, of_rows, page, head, row, block, at_row, w[None, :], skip, length, PAGE)
            for plane in tl.static_range(PLANES[run]):
                table = _four_words(values.tables[run] + 4 * plane + nothing * w[None, :])
                for half in tl.static_range(2):
                    product = tl.dot(
                        _value_entries(table, nibbles[0], nibbles[1], one, half), weights[0], out_dtype=tl.int32
                    )
                    product = tl.dot(
                        _value_entries(table, nibbles[2], nibbles[3], one, half),
                        weights[1],
                        product,
                        out_dtype=tl.int32,
                    )
                    high, low = tl.split(product.reshape(ROOM[run], R, 2))
                    so_far = sums[len(added)]
                    added += (so_far * keep + (high * DIGIT + low).to(tl.float32) * part,)
        sums = added

    is_seen = total > 0
    unit = 1.0 / (tl.maximum(total, TINY) * LARGEST_WEIGHT)
    to = parts.sums + slot * (SUMS * R)
    stored = _no_tensors()
    for run in tl.static_range(len(PLANES)):
        for plane in tl.static_range(2 * PLANES[run]):
            value_row = BEGIN[run] + plane * ROOM[run] + tl.arange(0, ROOM[run])
            found = (sums[len(stored)] - MIDDLE * weight_sum[None, :]) * unit[None, :]
            tl.store(to + value_row[:, None] * R + r[None, :], found)
            stored += (run,)
    tl.store(parts.lse + slot * R + r, tl.where(is_seen, most + tl.log2(tl.maximum(total, TINY)), float("-inf")))


@triton.jit
def _fetch_next(
    keys, values, of_rows, row, head, block, stop,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Codes of the block that comes next on their way to the nearest cache, where it begins a page."""
    if (block < stop) & (block * TOKENS % PAGE == 0):
        page = tl.load(of_rows.table + row * _number(of_rows.capacity) + block * TOKENS // PAGE).to(tl.int64)
        _fetch(keys.codes + _at_page(keys.codes_stride, page, head), KEY_BYTES)
        _fetch(values.codes + _at_page(values.codes_stride, page, head), VALUE_BYTES)


@triton.jit
def _fetch(at, BYTES: tl.constexpr):
    """Lines of 128 bytes, one for each thread at a time."""
    if not INTERPRETED:
        for first in tl.static_range(0, BYTES // 4, 1024):
            line = tl.minimum(first + tl.arange(0, 32) * 32, BYTES // 4 - 1)
            tl.inline_asm_elementwise(_FETCH, "=r,l", [(at + line).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _columns(block):
    """The tokens of a tile, ``[64, 1]``."""
    first = block * TOKENS + 8 * tl.arange(0, EIGHTS)[:, None]
    first = _below(first, first + 4)
    return _one_below_another(first, first + 1, first + 2, first + 3)


@triton.jit
def _is_within(block, skip, length):
    column = _columns(block)
    return (column >= skip) & (column < length)


@triton.jit
def _page(of_rows, row, block, eight, skip, length, PAGE: tl.constexpr):
    """The page of each eight tokens of a tile, ``int64 [8, 1]``, -1 for none, and the first of these tokens; one page
    for all of them where pages are that large."""
    first = block * TOKENS + 8 * eight
    if PAGE < TOKENS:
        return _page_of(of_rows, row, first, skip, length, PAGE), first
    else:
        at = of_rows.table + row * _number(of_rows.capacity) + block * TOKENS // PAGE
        return tl.load(at).to(tl.int64), first


@triton.jit
def _page_of(of_rows, row, first, skip, length, PAGE: tl.constexpr):
    """The pages of eight tokens each from ``first`` on; -1 where a row has none of these."""
    at = of_rows.table + row * _number(of_rows.capacity) + first // PAGE
    return tl.load(at, mask=(first + 7 >= skip) & (first < length), other=-1).to(tl.int64)


@triton.jit
def _capped(scores, softcap):
    """``softcap * tanh(scores / softcap)`` in powers of two, where there is one."""
    if softcap is None:
        return scores
    else:
        folded = tl.exp2(tl.minimum(2 * LOG2_E * scores / softcap, 126.0))
        return softcap * (1 - 2 / (folded + 1)) * LOG2_E


@triton.jit
def _mean_scores(asked, functions, at_block, R: tl.constexpr):
    """What a mean that turns gives to the scores of a tile, ``[64, R]``."""
    coefficients = _operand(asked.means + at_block * (2 * R * 8), 2 * R)
    high = tl.dot(_bytes_at(functions, TOKENS), coefficients, out_dtype=tl.int32)
    low = tl.dot(_bytes_at(functions + 8 * TOKENS, TOKENS), coefficients, out_dtype=tl.int32)
    high_high, high_low = tl.split(high.reshape(TOKENS, R, 2))
    low_high, _ = tl.split(low.reshape(TOKENS, R, 2))
    factor = tl.load(asked.mean_factors + at_block * R + tl.arange(0, R))[None, :]
    return (high_high * DIGIT + high_low + low_high).to(tl.float32) * factor


@triton.jit
def _weight_digits(whole):
    """``int32 [64, R]`` of 14 bits as two digits in the order of tokens, twice ``int8 [32, 2 R]``."""
    a, b, c, d = _apart(whole)
    first, second = a | (b << 16), c | (d << 16)
    high = _even_bytes((first >> 7) & 0x7F007F, (second >> 7) & 0x7F007F)
    low = _even_bytes(first & 0x7F007F, second & 0x7F007F)
    words = tl.join(high, low).reshape(2, whole.shape[0] // 8, 2 * whole.shape[1])
    early, late = tl.split(words.permute(1, 2, 0))
    return tl.trans(_as_bytes(tl.trans(early))), tl.trans(_as_bytes(tl.trans(late)))


@triton.jit
def _even_bytes(a, b):
    """Bytes 0 and 2 of two words, as a word."""
    return (a & 255) | ((a >> 8) & 0xFF00) | ((b & 255) << 16) | ((b << 8) & -16777216)


@triton.jit
def _value_words(values, of_rows, page, head, row, block, at_row, w, skip, length, PAGE: tl.constexpr):
    """The nibbles of some byte rows, ``int32 [M, 4]``: words 2 t, 8 + 2 t, 2 t + 1 and 9 + 2 t of a tile; of a word
    the low ones first."""
    of_row = values.codes + at_row * values.codes_stride[2]
    first = block * TOKENS + 8 * w
    if PAGE >= TOKENS:
        at = of_row + (_at_page(values.codes_stride, page, head) + first % PAGE // 4)
        a, c = _two_words(at)
        b, d = _two_words(at + 8)
    else:
        a, c = _two_words(of_row + _value_page(values, of_rows, row, head, first, skip, length, PAGE))
        b, d = _two_words(of_row + _value_page(values, of_rows, row, head, first + 32, skip, length, PAGE))
    return _unzipped(a), _unzipped(b), _unzipped(c), _unzipped(d)


@triton.jit
def _value_page(values, of_rows, row, head, first, skip, length, PAGE: tl.constexpr):
    """Where words of the page of some tokens lie in a byte row."""
    page = _page_of(of_rows, row, first, skip, length, PAGE)
    return _at_page(values.codes_stride, page, head) + first % PAGE // 4


@triton.jit
def _value_entries(table, first, second, one, half: tl.constexpr):
    """What the low or the high nibbles of two times four words select, ``int8 [M, 32]``."""
    first = _looked_up(table, first >> (16 * half), (first ^ -2004318072) >> (16 * half), one)
    second = _looked_up(table, second >> (16 * half), (second ^ -2004318072) >> (16 * half), one)
    return _as_bytes(_side_by_side(first, second))


# Exact tokens


@triton.jit
def _exact(
    query, exact, of_rows, bias, parts, place, row, head, tile, count, queries, scale, softcap,
    R: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention to the exact tokens of a row: query i of Q sees those before place ``counts - (Q - 1 - i)``."""
    r, t, d = tl.arange(0, LEAST), tl.arange(0, EXACT), tl.arange(0, EXACT_DIMS)
    query_row = tile * R + r
    is_row = (query_row < count) & (r < R)
    of_query = query.data + by_query(query, row, head, query_row, count, queries)
    of_slots, held = of_rows.slots + row * _number(of_rows.room), tl.load(of_rows.counts + row)
    end = held - (queries - 1 - query_row % queries)
    to_scores = parts.scores + (place * R + r).to(tl.int64)[:, None] * _number(of_rows.room)
    most = tl.full([LEAST], LOWEST, tl.float32)
    for first in range(0, held, EXACT):
        slot = tl.load(of_slots + first + t, mask=first + t < held, other=-1).to(tl.int64)
        scores = tl.zeros([LEAST, EXACT], tl.float32)
        for begin in range(0, exact.key_dim, EXACT_DIMS):
            dim = begin + d
            is_dim = dim < exact.key_dim
            q = tl.load(
                of_query[:, None] + dim[None, :] * query.stride[3], mask=is_row[:, None] & is_dim[None, :], other=0.0
            )
            at = exact.key + slot[None, :] * exact.key_stride[0] + head * exact.key_stride[1] + dim[:, None]
            key = tl.load(at, mask=is_dim[:, None] & (slot >= 0)[None, :], other=0.0)
            scores = tl.dot(q.to(tl.float32), key.to(tl.float32), scores, input_precision=PRECISION)
        scores = _capped(scores * scale, softcap)
        if bias is not None:
            column = _number(of_rows.capacity) * PAGE + first + t
            at = (
                bias.data
                + by_query(bias, row, head, query_row, count, queries)[:, None]
                + column[None, :] * bias.stride[3]
            )
            scores += tl.load(at, mask=is_row[:, None] & (first + t < held)[None, :], other=0.0) * LOG2_E
        scores = tl.where((slot >= 0)[None, :] & ((first + t)[None, :] < end[:, None]), scores, float("-inf"))
        tl.store(to_scores + (first + t)[None, :], scores, mask=(r < R)[:, None] & (first + t < held)[None, :])
        most = tl.maximum(most, tl.max(scores, axis=1))
    tl.debug_barrier()  # other threads read than wrote
    total = tl.zeros([LEAST], tl.float32)
    for begin in range(0, exact.value_dim, EXACT_DIMS):
        dim = begin + d
        is_dim = dim < exact.value_dim
        total = tl.zeros([LEAST], tl.float32)
        sums = tl.zeros([LEAST, EXACT_DIMS], tl.float32)
        for first in range(0, held, EXACT):
            is_token = first + t < held
            slot = tl.load(of_slots + first + t, mask=is_token, other=-1).to(tl.int64)
            scores = tl.load(
                to_scores + (first + t)[None, :], mask=(r < R)[:, None] & is_token[None, :], other=float("-inf")
            )
            weights = tl.exp2(scores - most[:, None])
            total += tl.sum(weights, axis=1)
            at = exact.value + slot[:, None] * exact.value_stride[0] + head * exact.value_stride[1] + dim[None, :]
            of_values = tl.load(at, mask=(slot >= 0)[:, None] & is_dim[None, :], other=0.0)
            sums = tl.dot(weights, of_values.to(tl.float32), sums, input_precision=PRECISION)
        to = parts.out + (place * R + r).to(tl.int64)[:, None] * exact.value_dim + dim[None, :]
        tl.store(to, sums / tl.maximum(total, TINY)[:, None], mask=(r < R)[:, None] & is_dim[None, :])
    lse = tl.where(total > 0, most + tl.log2(tl.maximum(total, TINY)), float("-inf"))
    tl.store(parts.exact_lse + place * R + r, lse, mask=r < R)


# Merging


@triton.jit
def _slot(program, own_first, pair_begin, total, programs):
    """Where a program left its part of a pair: the first of all that it did, or not."""
    begins_before = own_first * total // programs < pair_begin
    return 2 * program + tl.where((program == own_first) & begins_before, 1, 0)


@triton.jit
def _is_last(
    shares, parts, program, programs, pair_begin, own_first, own_last, total, place,
    R: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Whether all other parts of a pair are there, which are merged then, in groups first, to the slot of the first."""
    group = own_first + (program - own_first) // GROUP * GROUP
    members = tl.minimum(own_last - group + 1, GROUP)
    groups = (own_last - own_first) // GROUP + 1
    slot = _slot(group, own_first, pair_begin, total, programs)
    is_last = _has_come(shares.tickets + slot, members)
    if is_last & (members > 1):
        _merge(parts, slot, 2 * (group + 1), 2, members, R, SUMS)
    if is_last & (groups > 1):
        is_last = _has_come(shares.tickets + 2 * programs + place, groups)
        if is_last:
            slot = _slot(own_first, own_first, pair_begin, total, programs)
            _merge(parts, slot, 2 * (own_first + GROUP), 2 * GROUP, groups, R, SUMS)
    return is_last


@triton.jit
def _has_come(ticket, wanted):
    """Whether this is the last of so many."""
    last = wanted <= 1
    if wanted > 1:
        last = tl.atomic_add(ticket, 1, sem="acq_rel") == wanted - 1
        tl.debug_barrier()  # nothing is read before
    return last


@triton.jit
def _merge(parts, slot, next_slot, stride, count, R: tl.constexpr, SUMS: tl.constexpr):
    """Parts at ``slot``, and at ``next_slot`` and each ``stride`` from there on, ``count`` in all, to the first."""
    r, i = tl.arange(0, R), tl.arange(0, DIMS)
    most = tl.load(parts.lse + slot * R + r, cache_modifier=".cg")
    for part in range(count - 1):
        at = parts.lse + (next_slot + part * stride) * R + r
        most = tl.maximum(most, tl.load(at, cache_modifier=".cg"))
    shift = tl.where(most == float("-inf"), 0.0, most)
    own = tl.exp2(tl.load(parts.lse + slot * R + r, cache_modifier=".cg") - shift)
    total = own
    for part in range(count - 1):
        at = parts.lse + (next_slot + part * stride) * R + r
        total += tl.exp2(tl.load(at, cache_modifier=".cg") - shift)
    for begin in range(0, SUMS, DIMS):
        inside = (begin + i)[:, None] * R + r[None, :]
        to = parts.sums + slot * (SUMS * R) + inside
        sums = own[None, :] * tl.load(to, cache_modifier=".cg")
        for part in range(count - 1):
            other = next_slot + part * stride
            share = tl.exp2(tl.load(parts.lse + other * R + r, cache_modifier=".cg") - shift)
            sums += share[None, :] * tl.load(parts.sums + other * (SUMS * R) + inside, cache_modifier=".cg")
        tl.store(to, sums / tl.maximum(total, TINY)[None, :])
    tl.debug_barrier()  # all have read what one writes
    tl.store(parts.lse + slot * R + r, tl.where(total > 0, shift + tl.log2(tl.maximum(total, TINY)), float("-inf")))
    tl.debug_barrier()


@triton.jit
def _close(
    values, map, mean, parts, out, lse, slot, place, row, head, tile, tiles, count, queries,
    R: tl.constexpr, SUMS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Sums of codes to coordinates, mapped back, beside exact tokens: what attention gives."""
    r, i = tl.arange(0, LEAST), tl.arange(0, DIMS)
    is_own = r < R
    query_row = tile * R + r
    of_packed = tl.load(parts.lse + slot * R + r, mask=is_own, other=float("-inf"), cache_modifier=".cg")
    of_exact = tl.load(parts.exact_lse + place * R + r, mask=is_own, other=float("-inf"), cache_modifier=".cg")
    most = tl.maximum(of_packed, of_exact)
    shift = tl.where(most == float("-inf"), 0.0, most)
    packed, alone = tl.exp2(of_packed - shift), tl.exp2(of_exact - shift)
    total = packed + alone
    unit = packed
    if values.unit is not None:
        unit *= tl.load(values.unit + head)
    of_sums = parts.sums + slot * (SUMS * R) + r[:, None]
    to = out.data + by_query(out, row, head, query_row, count, queries)
    for begin in range(0, map.head_dim, DIMS):
        dim = begin + i
        is_dim = dim < map.head_dim
        sums = tl.zeros([LEAST, DIMS], tl.float32)
        for first in range(0, map.code_dim, DIMS):
            coordinate = first + i
            is_coordinate = coordinate < map.code_dim
            code = tl.zeros([LEAST, DIMS], tl.float32)
            for source in tl.static_range(SOURCES):
                at = (head * values.per_head * SOURCES + source) * map.code_dim + coordinate
                where = tl.load(values.places + at, mask=is_coordinate, other=-1)
                weight = tl.load(values.weights + at, mask=is_coordinate, other=0.0)
                wanted = is_own[:, None] & (where >= 0)[None, :]
                code += weight[None, :] * tl.load(
                    of_sums + where[None, :] * R, mask=wanted, other=0.0, cache_modifier=".cg"
                )
            at = map.data + head * map.stride[0] + coordinate[:, None] * map.stride[1] + dim[None, :] * map.stride[2]
            entries = tl.load(at, mask=is_coordinate[:, None] & is_dim[None, :], other=0.0).to(tl.float32)
            sums = tl.dot(code, entries, sums, input_precision="tf32x3")
        sums *= unit[:, None]
        if mean is not None:
            sums += packed[:, None] * tl.load(mean + head * map.head_dim + dim, mask=is_dim, other=0.0)[None, :]
        at = parts.out + (place * R + r).to(tl.int64)[:, None] * map.head_dim + dim[None, :]
        beside = tl.load(
            at, mask=is_own[:, None] & is_dim[None, :] & (alone > 0)[:, None], other=0.0, cache_modifier=".cg"
        )
        found = (sums + alone[:, None] * beside) / tl.maximum(total, TINY)[:, None]
        wanted = (is_own & (query_row < count))[:, None] & is_dim[None, :]
        tl.store(to[:, None] + dim[None, :] * out.stride[3], found.to(out.data.dtype.element_ty), mask=wanted)
    if lse is not None:
        joined = tl.where(total > 0, (shift + tl.log2(tl.maximum(total, TINY))) * LN_2, float("-inf"))
        to_lse = lse + (place // tiles).to(tl.int64) * count + query_row
        tl.store(to_lse, joined, mask=is_own & (query_row < count))
