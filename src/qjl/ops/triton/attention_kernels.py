"""Kernels of the fused decode step. Each program takes one KV head and a tile of its query rows.

``put`` stores fresh tokens, ``project`` maps the queries to the space of the codes, ``packed_part`` and ``exact_part``
attend to a share of the tokens, ``join`` merges the parts and maps the sums of codes back. Weights are powers of two:
scores are multiplied by log2(e), and log-sum-exps are binary until the end.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qjl.ops.triton.step_kernels import by_query
from qjl.packed import BLOCK

TOKENS = tl.constexpr(BLOCK)  # of a block; TILE, of one or half of one, are taken at once
CHUNK = tl.constexpr(32)  # coordinates of a map at once
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TAU = tl.constexpr(6.283185307179586)
TINY = tl.constexpr(1e-30)


class Side(NamedTuple):
    """Packed keys or values of a pool, and how they decode (``Pairs``); strides in elements."""

    codes: Tensor
    codes_stride: tuple[int, ...]  # of page, head, byte, token
    scale: Tensor
    scale_stride: tuple[int, ...]  # of page, head, group, token
    middle: Tensor | None
    middle_stride: tuple[int, ...]
    unit: Tensor | None
    sources: Tensor
    tables: Tensor
    coordinates: Tensor
    groups: Tensor
    per_head: int  # 1 where heads have codes of their own


class Map(NamedTuple):
    """``[H, D', D]`` from the space of the codes."""

    data: Tensor
    stride: tuple[int, ...]
    head_dim: int


class Turned(NamedTuple):
    """The mean by pairs of coordinates ``[H, F]``, and the turn from a tile's first token to the others ``[F, 64]``."""

    first: Tensor
    second: Tensor
    mean_first: Tensor
    mean_second: Tensor
    inv_freq: Tensor
    cos: Tensor
    sin: Tensor


class Projected(NamedTuple):
    """Queries as the codes meet them: ``mapped [B, H, R, 2, P]``, their products with the mean (``[B, H, R, 2, F]``
    for what turns, ``rest [B, H, R]``)."""

    mapped: Tensor
    turning: Tensor | None
    rest: Tensor | None


class Parts(NamedTuple):
    """What splits of the tokens give: ``out [B, H, S, R, ...]``, binary log-sum-exp ``[B, H, S, R]``."""

    out: Tensor
    lse: Tensor
    splits: int


class Rows(NamedTuple):
    """Which tokens of the pools each row has (``qjl.ops.forms.Rows``); tables are contiguous."""

    table: Tensor
    capacity: int  # pages of a row in the table
    lengths: Tensor
    skip: Tensor
    origins: Tensor
    slots: Tensor
    room: int  # slots of a row in the table
    counts: Tensor


class Exact(NamedTuple):
    """Tokens ``[slots, H, D]``; strides in elements, of slot and head."""

    key: Tensor
    key_stride: tuple[int, ...]
    value: Tensor  # not values, which Triton's tuples have
    value_stride: tuple[int, ...]


@triton.jit
def _row_and_head(heads):
    return (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)


@triton.jit
def _rows(tile, ROWS: tl.constexpr):
    return tile * ROWS + tl.arange(0, ROWS)


@triton.jit
def _map_rows(side, map, head, half, pairs, dims, PAIRS: tl.constexpr):
    """Rows of a map that belong to one half of the pairs, float32 ``[pairs, dims]``."""
    coordinate = tl.load(side.coordinates + (head * side.per_head * 2 + half) * PAIRS + pairs)
    at = map.data + head * map.stride[0] + coordinate[:, None] * map.stride[1] + dims[None, :] * map.stride[2]
    return tl.load(at, mask=(coordinate >= 0)[:, None] & (dims < map.head_dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def project(
    query,
    side,
    map,
    mean,
    turned,
    out,
    heads,
    rows,
    queries,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    F: tl.constexpr,
):
    """``grid (row tiles, B * H, 2 P / CHUNK)``; what the mean gives is left to the first of each."""
    batch_row, head = _row_and_head(heads)
    row = _rows(tl.program_id(0), ROWS)
    of_rows = query.data + by_query(query, batch_row, head, row, rows, queries)
    begin = tl.program_id(1).to(tl.int64) * rows
    half = tl.program_id(2) % 2
    pair = (tl.program_id(2) // 2) * (CHUNK // 2) + tl.arange(0, CHUNK // 2)
    mapped = tl.zeros([ROWS, CHUNK // 2], tl.float32)
    rest = tl.zeros([ROWS], tl.float32)
    for start in range(0, map.head_dim, CHUNK):
        dim = start + tl.arange(0, CHUNK)
        at = of_rows[:, None] + dim[None, :] * query.stride[3]
        q = tl.load(at, mask=(row < rows)[:, None] & (dim < map.head_dim)[None, :], other=0.0).to(tl.float32)
        of_map = _map_rows(side, map, head, half, pair, dim, PAIRS)
        mapped = tl.dot(q, tl.trans(of_map), mapped, input_precision="tf32x3")
        if mean is not None:
            mu = tl.load(mean + head * map.head_dim + dim, mask=dim < map.head_dim, other=0.0)
            rest += tl.sum(q * mu[None, :], axis=1)
    to = out.mapped + ((begin + row)[:, None] * 2 + half) * PAIRS + pair[None, :]
    tl.store(to, mapped, mask=(row < rows)[:, None])
    if tl.program_id(2) == 0:
        if mean is not None:
            tl.store(out.rest + begin + row, rest, mask=row < rows)
        if turned is not None:
            _project_turned(of_rows, query.stride[3], head, turned, out, begin, row, rows, F)


@triton.jit
def _project_turned(query, stride, head, turned, out, begin, row, rows, F: tl.constexpr):
    """With ``R_n mu`` of a pair, <q, R_n mu> = a cos(n theta) + b sin(n theta): stores a and b."""
    f = tl.arange(0, F)
    present = (row < rows)[:, None]
    first, second = tl.load(turned.first + f) * stride, tl.load(turned.second + f) * stride
    q_first = tl.load(query[:, None] + first[None, :], mask=present, other=0.0).to(tl.float32)
    q_second = tl.load(query[:, None] + second[None, :], mask=present, other=0.0).to(tl.float32)
    m_first = tl.load(turned.mean_first + head * F + f)[None, :]
    m_second = tl.load(turned.mean_second + head * F + f)[None, :]
    to = out.turning + (begin + row)[:, None] * (2 * F) + f[None, :]
    tl.store(to, q_first * m_first + q_second * m_second, mask=present)
    tl.store(to + F, q_second * m_first - q_first * m_second, mask=present)


@triton.jit
def _decoded(side, head, codes, present, PAIRS: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr):
    """Both halves of all pairs, float32 ``[P, TILE]`` each; ``codes`` points to the first byte of each token."""
    pair = tl.arange(0, PAIRS)
    low = tl.zeros([PAIRS, TILE], tl.float32)
    high = tl.zeros([PAIRS, TILE], tl.float32)
    for term in tl.static_range(TERMS):
        place = (head * side.per_head * TERMS + term) * PAIRS + pair
        source = tl.load(side.sources + place)
        wanted = (source >= 0)[:, None] & present[None, :]
        byte = tl.load(codes[None, :] + (source // 2)[:, None] * side.codes_stride[2], mask=wanted, other=0)
        nibble = (byte.to(tl.int32) >> ((source % 2) * 4)[:, None]) & 15
        both = tl.load(side.tables + place[:, None] * 16 + nibble, mask=wanted, other=0)
        low += (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high += (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _at(stride, head, page, place):
    """Where the tokens of a tile begin, ``int64 [TILE]``."""
    return page * stride[0] + head * stride[1] + place * stride[3]


@triton.jit
def _scales(side, head, at, present):
    """Decoded scales, of the shape of ``at``."""
    stored = tl.load(side.scale + at, mask=present, other=0).to(tl.float32)
    if side.unit is None:
        scale = stored
    else:
        scale = tl.where(stored == 0, 0.0, tl.exp2((stored - 128) / 12)) * tl.load(side.unit + head)
    return scale


@triton.jit
def _dequantized(low, high, side, head, scale_at, middle_at, present, PAIRS: tl.constexpr):
    """Both halves times the scales of their groups, plus the middles."""
    group = tl.load(side.groups + head * side.per_head * PAIRS + tl.arange(0, PAIRS))[:, None]
    scale = _scales(side, head, scale_at[None, :] + group * side.scale_stride[2], present[None, :])
    low, high = low * scale, high * scale
    if side.middle is not None:
        at = side.middle + middle_at[None, :] + group * side.middle_stride[2]
        middle = tl.load(at, mask=present[None, :], other=0.0).to(tl.float32)
        low, high = low + middle, high + middle
    return low, high


@triton.jit
def _capped(scores, softcap):
    """``softcap * tanh(scores / softcap)``, where there is one."""
    folded = tl.exp2(tl.minimum(2 * LOG2_E * scores / tl.where(softcap == 0, 1.0, softcap), 126.0))
    return tl.where(softcap == 0, scores, softcap * (1 - 2 / (folded + 1)))


@triton.jit
def _biased(scores, bias, row, head, query_row, rows, queries, column, seen):
    """With what is added to the scores of tokens in these columns; minus infinity for those that are not seen."""
    if bias is not None:
        at = by_query(bias, row, head, query_row, rows, queries)[:, None] + column[None, :] * bias.stride[3]
        wanted = (query_row < rows)[:, None] & seen
        scores += tl.load(bias.data + at, mask=wanted, other=float("-inf"))
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _weights(scores, most, total):
    """Weights ``2^(score - most)`` with the new maximum, their sum, and what earlier sums are multiplied with."""
    scores *= LOG2_E
    new = tl.maximum(most, tl.max(scores, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(most - shift)
    return weights, new, total * keep + tl.sum(weights, axis=1), keep


@triton.jit
def _store_lse(parts, place, most, total, present):
    lse = tl.where(total > 0, most + tl.log2(tl.maximum(total, TINY)), float("-inf"))
    tl.store(parts.lse + place, lse, mask=present)


@triton.jit
def _share(skip, tokens, splits, TILE: tl.constexpr):
    """Tiles of this program's split of the tokens from ``skip`` on: the first, and where the next begins."""
    whole = skip // TILE
    tiles = tl.maximum((tokens + TILE - 1) // TILE - whole, 0)
    share = (tiles + splits - 1) // splits
    start = tl.program_id(0) * share
    return whole + start, whole + tl.minimum(start + share, tiles)


@triton.jit
def packed_part(
    keys,
    values,
    projected,
    turned,
    of_rows,
    bias,
    parts,
    heads,
    rows,
    queries,
    scaling,
    softcap,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    KEY_PAIRS: tl.constexpr,
    KEY_TERMS: tl.constexpr,
    KEYS_GROUPED: tl.constexpr,
    VALUE_PAIRS: tl.constexpr,
    VALUE_TERMS: tl.constexpr,
    VALUES_GROUPED: tl.constexpr,
    F: tl.constexpr,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``grid (splits, B * H, row tiles)``: sums of codes ``[2, P]`` over a split of the packed tokens.

    Tiles are of ``DTYPE``, products with the mean of ``PRECISION``: means may be far larger than what they centre.
    """
    row, head = _row_and_head(heads)
    query_row = _rows(tl.program_id(2), ROWS)
    is_row = query_row < rows
    at_row = tl.program_id(1).to(tl.int64) * rows + query_row
    pair = tl.arange(0, KEY_PAIRS)[None, :]
    f = tl.arange(0, F)

    at = projected.mapped + at_row[:, None] * (2 * KEY_PAIRS) + pair
    q_low = tl.load(at, mask=is_row[:, None], other=0.0)
    q_high = tl.load(at + KEY_PAIRS, mask=is_row[:, None], other=0.0)
    size = tl.maximum(tl.maximum(tl.max(tl.abs(q_low), 1), tl.max(tl.abs(q_high), 1)), TINY)
    q_low = (q_low / size[:, None]).to(DTYPE)
    q_high = (q_high / size[:, None]).to(DTYPE)
    rest = tl.zeros([ROWS], tl.float32)
    if projected.rest is not None:
        rest = tl.load(projected.rest + at_row, mask=is_row, other=0.0)
    if turned is not None:
        at = projected.turning + at_row[:, None] * (2 * F) + f[None, :]
        along = tl.load(at, mask=is_row[:, None], other=0.0)
        across = tl.load(at + F, mask=is_row[:, None], other=0.0)
        inv_freq = tl.load(turned.inv_freq + f)
        at = f[:, None] * TOKENS + tl.arange(0, TILE)[None, :]
        cos_table, sin_table = tl.load(turned.cos + at), tl.load(turned.sin + at)

    skip, tokens = tl.load(of_rows.skip + row), tl.load(of_rows.lengths + row)
    start, stop = _share(skip, tokens, parts.splits, TILE)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    unit = 1e-30  # the largest scale so far
    low_sums = tl.zeros([ROWS, VALUE_PAIRS], tl.float32)
    high_sums = tl.zeros([ROWS, VALUE_PAIRS], tl.float32)
    for tile in range(start, stop):
        token = tile * TILE + tl.arange(0, TILE)
        present = (token >= skip) & (token < tokens)
        at_page = of_rows.table + row * of_rows.capacity + token // PAGE
        page = tl.load(at_page, mask=present, other=0).to(tl.int64)
        place = token % PAGE
        present = present & (page >= 0)

        codes = keys.codes + _at(keys.codes_stride, head, page, place)
        low, high = _decoded(keys, head, codes, present, KEY_PAIRS, KEY_TERMS, TILE)
        scale_at = _at(keys.scale_stride, head, page, place)
        if KEYS_GROUPED:
            middle_at = _at(keys.middle_stride, head, page, place)
            low, high = _dequantized(low, high, keys, head, scale_at, middle_at, present, KEY_PAIRS)
        scores = tl.dot(q_low, low.to(DTYPE), input_precision="tf32x3")
        scores = tl.dot(q_high, high.to(DTYPE), scores, input_precision="tf32x3") * size[:, None]
        if not KEYS_GROUPED:
            scores *= _scales(keys, head, scale_at, present)[None, :]
        if turned is not None:
            position = tl.load(of_rows.origins + row) + tile * TILE
            turns = position.to(tl.float64) * inv_freq.to(tl.float64) / TAU
            angle = ((turns - tl.floor(turns)) * TAU).to(tl.float32)
            cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
            scores = tl.dot(along * cos + across * sin, cos_table, scores, input_precision=PRECISION)
            scores = tl.dot(across * cos - along * sin, sin_table, scores, input_precision=PRECISION)
        scores = _capped((scores + rest[:, None]) * scaling, softcap)
        scores = _biased(scores, bias, row, head, query_row, rows, queries, token, present[None, :])
        weights, most, total, keep = _weights(scores, most, total)

        codes = values.codes + _at(values.codes_stride, head, page, place)
        low, high = _decoded(values, head, codes, present, VALUE_PAIRS, VALUE_TERMS, TILE)
        scale_at = _at(values.scale_stride, head, page, place)
        if VALUES_GROUPED:
            middle_at = _at(values.middle_stride, head, page, place)
            low, high = _dequantized(low, high, values, head, scale_at, middle_at, present, VALUE_PAIRS)
        else:
            scale = _scales(values, head, scale_at, present)
            larger = tl.maximum(unit, tl.max(scale, axis=0))
            weights *= (scale / larger)[None, :]
            keep *= unit / larger
            unit = larger
        weights = weights.to(DTYPE)
        low_sums = tl.dot(weights, tl.trans(low.to(DTYPE)), low_sums * keep[:, None], input_precision="tf32x3")
        high_sums = tl.dot(weights, tl.trans(high.to(DTYPE)), high_sums * keep[:, None], input_precision="tf32x3")

    if VALUES_GROUPED:
        unit = 1.0
    factor = (unit / tl.maximum(total, TINY))[:, None]
    place = (tl.program_id(1).to(tl.int64) * parts.splits + tl.program_id(0)) * rows + query_row
    to = parts.out + place[:, None] * (2 * VALUE_PAIRS) + tl.arange(0, VALUE_PAIRS)[None, :]
    tl.store(to, low_sums * factor, mask=is_row[:, None])
    tl.store(to + VALUE_PAIRS, high_sums * factor, mask=is_row[:, None])
    _store_lse(parts, place, most, total, is_row)


@triton.jit
def exact_part(
    query,
    exact,
    of_rows,
    bias,
    parts,
    heads,
    rows,
    queries,
    first_column,
    key_dim,
    value_dim,
    scaling,
    softcap,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``grid (splits, B * H, row tiles)``: attention over a split of the exact tokens that a row has.

    Query i of Q sees those before place ``counts - (Q - 1 - i)``. They stand in a bias from ``first_column`` on.
    """
    row, head = _row_and_head(heads)
    query_row = _rows(tl.program_id(2), ROWS)
    is_row = query_row < rows
    dim, value = tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    at = query.data + by_query(query, row, head, query_row, rows, queries)[:, None] + dim[None, :] * query.stride[3]
    q = tl.load(at, mask=is_row[:, None] & (dim < key_dim)[None, :], other=0.0).to(tl.float32)
    keys = exact.key + head * exact.key_stride[1]
    values = exact.value + head * exact.value_stride[1]
    count = tl.load(of_rows.counts + row)
    end = count - (queries - 1 - query_row % queries)
    start, stop = _share(0, count, parts.splits, TILE)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_DIM], tl.float32)
    for tile in range(start, stop):
        place = tile * TILE + tl.arange(0, TILE)
        slot = tl.load(of_rows.slots + row * of_rows.room + place, mask=place < count, other=-1).to(tl.int64)
        present = slot >= 0
        key_at = keys + slot[None, :] * exact.key_stride[0] + dim[:, None]
        key = tl.load(key_at, mask=(dim < key_dim)[:, None] & present[None, :], other=0.0)
        scores = tl.dot(q, key.to(tl.float32), input_precision=PRECISION)
        scores = _capped(scores * scaling, softcap)
        seen = present[None, :] & (place[None, :] < end[:, None])
        scores = _biased(scores, bias, row, head, query_row, rows, queries, first_column + place, seen)
        weights, most, total, keep = _weights(scores, most, total)
        value_at = values + slot[:, None] * exact.value_stride[0] + value[None, :]
        tile_values = tl.load(value_at, mask=present[:, None] & (value < value_dim)[None, :], other=0.0)
        sums = tl.dot(weights, tile_values.to(tl.float32), sums * keep[:, None], input_precision=PRECISION)
    place = (tl.program_id(1).to(tl.int64) * parts.splits + tl.program_id(0)) * rows + query_row
    to = parts.out + place[:, None] * value_dim + value[None, :]
    out = sums / tl.maximum(total, TINY)[:, None]
    tl.store(to, out, mask=is_row[:, None] & (value < value_dim)[None, :])
    _store_lse(parts, place, most, total, is_row)


@triton.jit
def _most(parts, most, row, rows, is_row):
    """The largest log-sum-exp of all parts, by row."""
    for split in range(parts.splits):
        place = (tl.program_id(1).to(tl.int64) * parts.splits + split) * rows + row
        most = tl.maximum(most, tl.load(parts.lse + place, mask=is_row, other=float("-inf")))
    return most


@triton.jit
def _share_of(parts, split, row, rows, is_row, shift):
    """The weight of a part before it is divided by the sum of all, and where the part lies."""
    place = (tl.program_id(1).to(tl.int64) * parts.splits + split) * rows + row
    return tl.exp2(tl.load(parts.lse + place, mask=is_row, other=float("-inf")) - shift), place


@triton.jit
def join(packed, exact, side, map, mean, out, lse, heads, rows, queries, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """``grid (row tiles, B * H, D / CHUNK)``: all parts merged, the sums of codes mapped back."""
    batch_row, head = _row_and_head(heads)
    row = _rows(tl.program_id(0), ROWS)
    is_row = row < rows
    pair, dim = tl.arange(0, PAIRS), tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    is_dim = dim < map.head_dim
    most = tl.full([ROWS], float("-inf"), tl.float32)
    most = _most(packed, most, row, rows, is_row)
    if exact is not None:
        most = _most(exact, most, row, rows, is_row)
    shift = tl.where(most == float("-inf"), 0.0, most)
    low = tl.zeros([ROWS, PAIRS], tl.float32)
    high = tl.zeros([ROWS, PAIRS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for split in range(packed.splits):
        weight, place = _share_of(packed, split, row, rows, is_row, shift)
        low_at = packed.out + place[:, None] * (2 * PAIRS) + pair[None, :]
        low += weight[:, None] * tl.load(low_at, mask=is_row[:, None], other=0.0)
        high += weight[:, None] * tl.load(low_at + PAIRS, mask=is_row[:, None], other=0.0)
        total += weight
    sums = tl.dot(low, _map_rows(side, map, head, 0, pair, dim, PAIRS), input_precision="tf32x3")
    sums = tl.dot(high, _map_rows(side, map, head, 1, pair, dim, PAIRS), sums, input_precision="tf32x3")
    if mean is not None:
        mu = tl.load(mean + head * map.head_dim + dim, mask=is_dim, other=0.0)
        sums += total[:, None] * mu[None, :]
    if exact is not None:
        for split in range(exact.splits):
            weight, place = _share_of(exact, split, row, rows, is_row, shift)
            out_at = exact.out + place[:, None] * map.head_dim + dim[None, :]
            sums += weight[:, None] * tl.load(out_at, mask=is_row[:, None] & is_dim[None, :], other=0.0)
            total += weight
    to = out.data + by_query(out, batch_row, head, row, rows, queries)[:, None] + dim[None, :]
    means = sums / tl.maximum(total, TINY)[:, None]
    tl.store(to, means.to(out.data.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])
    if tl.program_id(2) == 0:
        joined = tl.where(total > 0, (most + tl.log2(tl.maximum(total, TINY))) * LN_2, float("-inf"))
        tl.store(lse + tl.program_id(1).to(tl.int64) * rows + row, joined, mask=is_row)


@triton.jit
def put(fresh, fresh_stride, pool, pool_stride, of_rows, queries, dim, DIM: tl.constexpr):
    """``grid (B * Q, H)``: a token to the slot of its place, where there is one."""
    row, token = (tl.program_id(0) // queries).to(tl.int64), tl.program_id(0) % queries
    head, i = tl.program_id(1).to(tl.int64), tl.arange(0, DIM)
    place = tl.load(of_rows.counts + row) - queries + token
    slot = tl.load(of_rows.slots + row * of_rows.room + place, mask=place >= 0, other=-1).to(tl.int64)
    at = fresh + row * fresh_stride[0] + head * fresh_stride[1] + token.to(tl.int64) * fresh_stride[2]
    numbers = tl.load(at + i * fresh_stride[3], mask=i < dim, other=0.0)
    to = pool + slot * pool_stride[0] + head * pool_stride[1] + i
    if slot >= 0:
        tl.store(to, numbers.to(pool.dtype.element_ty), mask=i < dim)
