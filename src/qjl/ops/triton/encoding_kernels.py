"""The encoder, whose programs take the 64 tokens of one block of one head from the exact pool to a page.

A program works in phases, and what one leaves for the next lies in scratch memory as codes do, token-minor: the tokens
less their mean, the coordinates that they are mapped to, and the number that codes each of them. ``debug_barrier``
stands where threads read what others wrote. Signs that are refined need products of all tokens between two phases:
``map_tokens`` and ``code_tokens`` are the halves of ``encode`` around them.
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
TAU = tl.constexpr(6.283185307179586)


class Targets(NamedTuple):
    """Of n blocks: ``slots int32 [n * 64]``, ``first int64 [n]`` and ``pages int32 [n]``."""

    slots: Tensor
    first: Tensor
    pages: Tensor


class Tokens(NamedTuple):
    """``[slots, H, dim]`` with strides in elements; numbers of a token lie side by side."""

    data: Tensor
    slot: int
    head: int
    dim: int


class Field(NamedTuple):
    """``[pages, H, ...]`` with strides in elements; those of a page and head lie together."""

    data: Tensor
    page: int
    head: int


class Turn(NamedTuple):
    """RoPE of ``pairs`` coordinates: ``inv_freq [F]``; ``cos``, ``sin [F, 64]`` turn from a block's first token on."""

    inv_freq: Tensor
    cos: Tensor
    sin: Tensor
    pairs: int


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


class Part(NamedTuple):
    """So many coordinates, the first of them, of their numbers, and of the steps of a trellis.

    Signs have neither search nor points; ``refined [H, n, dim, 64]`` are those that were found already.
    """

    dim: int
    first: int
    number: int
    step: int
    search: Search | None
    points: Points | None
    refined: Tensor | None


class Places(NamedTuple):
    """Where bit b of nibble j comes from: which number, which of its bits; both int16 ``[H', nibbles, 4]``."""

    number: Tensor
    bit: Tensor
    per_head: int
    nibbles: int


class Plan(NamedTuple):
    """The arrays of a ``Recipe`` whose map has so many ``rows``."""

    mean: Tensor | None
    map: Transform
    rows: int
    weights: Tensor | None
    gains: Tensor
    tried: int
    parts: tuple[Part, ...]
    places: Places
    units: Tensor | None
    norm_factor: float


class Grid(NamedTuple):
    """A ``GridRecipe`` with groups of so many channels (``width``); ``root`` is 1 over that of ``size``."""

    size: int
    root: float
    clip: float
    groups: int
    width: int
    places: Places


class Room(NamedTuple):
    """Scratch memory of all programs: float32 ``centred [H, n, D, 64]``, ``mapped [H, n, D', 64]``; uint8 ``numbers
    [H, n, many, 64]``; and where each step of a trellis came from, uint8 ``came [H, n, steps, 16, 64]``."""

    centred: Tensor
    mapped: Tensor
    numbers: Tensor
    came: Tensor
    many: int
    steps: int


@triton.jit
def _site():
    """The number of this program's block among all."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _tile(base, rows, first, row):
    """Where rows ``first + row`` of this program's ``[rows, 64]`` lie."""
    return base + (_site() * rows + first + row)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]


@triton.jit
def _of_page(field, targets):
    """Where this program's page and head begin."""
    page = tl.load(targets.pages + tl.program_id(0)).to(tl.int64)
    return field.data + page * field.page + tl.program_id(1).to(tl.int64) * field.head


@triton.jit
def _tokens(tokens, slot, dims):
    """Those of 64 slots, float32 ``[dims, 64]``."""
    begin = tokens.data + tl.program_id(1).to(tl.int64) * tokens.head
    at = begin + dims[:, None] + (slot * tokens.slot)[None, :]
    return tl.load(at, mask=(dims < tokens.dim)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _mean_of(mean, turn, first, dims, dim, INTERLEAVED: tl.constexpr):
    """What is subtracted from the tokens of a block at position ``first``, ``[dims, 64]``."""
    vector = mean + tl.program_id(1) * dim
    mu = tl.load(vector + dims, mask=dims < dim, other=0.0)[:, None] + tl.zeros([1, TOKENS], tl.float32)
    if turn is not None:
        if INTERLEAVED:
            pair, is_first, partner = dims // 2, dims % 2 == 0, dims ^ 1
        else:
            is_first = dims < turn.pairs
            pair = tl.where(is_first, dims, dims - turn.pairs)
            partner = tl.where(is_first, dims + turn.pairs, dims - turn.pairs)
        turns = dims < 2 * turn.pairs
        other = tl.load(vector + partner, mask=turns, other=0.0)[:, None]
        cos, sin = _turned(turn, first, pair, turns)
        mu = mu * cos + other * sin * tl.where(is_first, -1.0, 1.0)[:, None]
    return mu


@triton.jit
def _turned(turn, first, pair, turns):
    """Cosines and sines of pairs at all tokens, ``[pair, 64]``: exact angles of the first one, then a table."""
    whole = first.to(tl.float64) * tl.load(turn.inv_freq + pair, mask=turns, other=0.0).to(tl.float64) / TAU
    angle = ((whole - tl.floor(whole)) * TAU).to(tl.float32)
    cos, sin = tl.cos(angle)[:, None], tl.sin(angle)[:, None]
    at = pair[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    cos_on = tl.load(turn.cos + at, mask=turns[:, None], other=1.0)
    sin_on = tl.load(turn.sin + at, mask=turns[:, None], other=0.0)
    return cos * cos_on - sin * sin_on, sin * cos_on + cos * sin_on


@triton.jit
def _centre(tokens, targets, mean, turn, centred, are_finite, job, INTERLEAVED: tl.constexpr):
    """Tokens less their mean, those numbers that are not finite counting as 0, and whether there are such."""
    first = tl.load(targets.first + tl.program_id(0))
    slot = tl.load(targets.slots + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    bad = tl.zeros([TOKENS], tl.int32)
    for start in range(0, tokens.dim, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        x = _tokens(tokens, slot, dims)
        is_finite = tl.abs(x) < float("inf")
        bad += tl.sum(tl.where(is_finite, 0, 1), axis=0)
        x = tl.where(is_finite, x, 0.0)
        if mean is not None:
            x -= _mean_of(mean, turn, first, dims, tokens.dim, INTERLEAVED)
        tl.store(_tile(centred, tokens.dim, 0, dims), x, mask=(dims < tokens.dim)[:, None])
    tl.store(are_finite + job, False, mask=tl.sum(bad) > 0)


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
def _matrix(map, row, rows, dims, dim):
    """Of the map, ``[rows, dims]``."""
    inside = (row < rows)[:, None] & (dims < dim)[None, :]
    if map.matrix is not None:
        begin = map.matrix + tl.program_id(1).to(tl.int64) * map.stride[0]
        at = begin + row[:, None] * map.stride[1] + dims[None, :] * map.stride[2]
        entries = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        flip = tl.load(map.flips + (row // map.size)[:, None] * dim + dims[None, :], mask=inside, other=0.0)
        entries = flip * _hadamard(tl.load(map.order + row, mask=row < rows, other=0), dims)
    return entries


@triton.jit
def _some(base, rows, first, row, dim):
    """Coordinates ``first + row`` of the tokens, ``[row, 64]``, zero from ``dim`` on."""
    return tl.load(_tile(base, rows, first, row), mask=(row < dim)[:, None], other=0.0)


@triton.jit
def _map(plan, room, dim):
    """Centred tokens to coordinates."""
    for begin in range(0, plan.rows, CHUNK):
        row = begin + tl.arange(0, CHUNK)
        product = tl.zeros([CHUNK, TOKENS], tl.float32)
        for start in range(0, dim, CHUNK):
            dims = start + tl.arange(0, CHUNK)
            entries = _matrix(plan.map, row, plan.rows, dims, dim)
            product = tl.dot(entries, _some(room.centred, dim, 0, dims, dim), product, input_precision="ieee")
        tl.store(_tile(room.mapped, plan.rows, 0, row), product, mask=(row < plan.rows)[:, None])


@triton.jit
def _weights(plan, first, row, dim):
    """What an error of each coordinate counts, ``[row, 1]``."""
    if plan.weights is None:
        weight = tl.where(row < dim, 1.0, 0.0)
    else:
        weight = tl.load(plan.weights + tl.program_id(1) * plan.rows + first + row, mask=row < dim, other=0.0)
    return weight[:, None]


@triton.jit
def _sizes(plan, room):
    """Rms of each token as a divisor, and its weighted square."""
    squares = tl.zeros([TOKENS], tl.float32)
    weighted = tl.zeros([TOKENS], tl.float32)
    active = tl.zeros([TOKENS], tl.float32)
    for start in range(0, plan.rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        y = _some(room.mapped, plan.rows, 0, row, plan.rows)
        weight = _weights(plan, 0, row, plan.rows)
        counts = tl.where(weight > 0, 1.0, 0.0)
        squares += tl.sum(y * y * counts, axis=0)
        weighted += tl.sum(y * y * weight, axis=0)
        active += tl.sum(counts, axis=0)
    return tl.maximum(tl.sqrt(squares / active), TINY), weighted


@triton.jit
def _nearest(search, z, row, dim, DEPTH: tl.constexpr):
    """Where the nearest level of each coordinate lies in the tables, int32 ``[row, 64]``."""
    head = tl.program_id(1) * search.per_head
    kind = tl.load(search.kinds + head * dim + row, mask=row < dim, other=0).to(tl.int32)[:, None]
    bits = kind % 9
    path = tl.zeros([CHUNK, TOKENS], tl.int32)
    for depth in tl.static_range(DEPTH):
        edge = tl.load(search.tree + kind * PATHS + (1 << depth) + path)
        path |= tl.where((depth < bits) & (z > edge), 1 << depth, 0)
    return kind * PATHS + path


@triton.jit
def _best_gain(plan, part, room, size, DEPTH: tl.constexpr):
    """Of each token, the one whose levels are at the least angle."""
    best = tl.full([TOKENS], float("-inf"), tl.float32)
    chosen = tl.zeros([TOKENS], tl.float32) + tl.load(plan.gains)
    for trial in range(tl.where(plan.tried > 1, plan.tried, 0)):
        gain = tl.load(plan.gains + trial)
        along = tl.zeros([TOKENS], tl.float32)
        square = tl.zeros([TOKENS], tl.float32)
        for start in range(0, part.dim, CHUNK):
            row = start + tl.arange(0, CHUNK)
            z = _some(room.mapped, plan.rows, part.first, row, part.dim) / size[None, :]
            weight = _weights(plan, part.first, row, part.dim)
            level = tl.load(part.search.levels + _nearest(part.search, gain * z, row, part.dim, DEPTH))
            along += tl.sum(z * level * weight, axis=0)
            square += tl.sum(level * level * weight, axis=0)
        cosine = along / tl.maximum(tl.sqrt(square), TINY)
        chosen = tl.where(cosine > best, gain, chosen)
        best = tl.maximum(best, cosine)
    return chosen


@triton.jit
def _levels(plan, part, room, size, DEPTH: tl.constexpr):
    """Bit patterns of the nearest levels; what these have in common with the tokens."""
    gain = _best_gain(plan, part, room, size, DEPTH)
    along = tl.zeros([TOKENS], tl.float32)
    for start in range(0, part.dim, CHUNK):
        row = start + tl.arange(0, CHUNK)
        y = _some(room.mapped, plan.rows, part.first, row, part.dim)
        place = _nearest(part.search, y / size[None, :] * gain[None, :], row, part.dim, DEPTH)
        along += tl.sum(y * tl.load(part.search.levels + place) * _weights(plan, part.first, row, part.dim), axis=0)
        to = _tile(room.numbers, room.many, part.number, row)
        tl.store(to, tl.load(part.search.patterns + place).to(tl.uint8), mask=(row < part.dim)[:, None])
    return along


@triton.jit
def _coordinate(plan, part, room, place):
    """One coordinate of the tokens, ``[64]``."""
    return tl.load(room.mapped + (_site() * plan.rows + part.first + place) * TOKENS + tl.arange(0, TOKENS))


@triton.jit
def _way(part, room, nibble):
    """Where it is kept which state of the nibble before each came from, ``[16, 64]``."""
    return room.came + (_site() * room.steps + part.step + nibble) * STATES * TOKENS


@triton.jit
def _forth(plan, part, room, size, WIDTH: tl.constexpr):
    """Viterbi's algorithm over 16 states: it keeps where the best way to each came from, and tells what they cost.

    The costs are those of ``qjl.trellis.best_nibbles``, in the same order.
    """
    state, token = tl.arange(0, STATES), tl.arange(0, TOKENS)
    nibbles = part.dim // WIDTH
    to_state = state[:, None] * TOKENS + token[None, :]
    pair_cost = tl.load(part.points.pair_cost + state[:, None] * STATES + state[None, :])
    cost = tl.zeros([STATES, TOKENS], tl.float32)
    for nibble in range(nibbles):
        to_own = tl.zeros([STATES, TOKENS], tl.float32)
        to_next = tl.zeros([STATES, TOKENS], tl.float32)
        square = tl.zeros([STATES], tl.float32)
        for i in tl.static_range(WIDTH):
            z = _coordinate(plan, part, room, nibble * WIDTH + i) / size
            own = tl.load(part.points.own + state * WIDTH + i)
            to_own += -2 * z[None, :] * own[:, None]
            to_next += -2 * z[None, :] * tl.load(part.points.next + state * WIDTH + i)[:, None]
            square += own * own
        way = _way(part, room, nibble) + to_state
        if nibble == 0:
            cost = to_own + square[:, None]
            tl.store(way, tl.full([STATES, TOKENS], STATES, tl.uint8))
        else:
            total = (cost + to_next)[:, None, :] + pair_cost[:, :, None]  # [previous, current, 64]
            cost = tl.min(total, axis=0) + to_own
            tl.store(way, tl.argmin(total, axis=0).to(tl.uint8))
    return cost


@triton.jit
def _trellis(plan, part, room, size, WIDTH: tl.constexpr):
    """Nibbles of the nearest path; what it has in common with the tokens."""
    cost = _forth(plan, part, room, size, WIDTH)
    tl.debug_barrier()
    token, nibbles = tl.arange(0, TOKENS), part.dim // WIDTH
    best = tl.argmin(cost, axis=0)
    along = tl.zeros([TOKENS], tl.float32)
    for back in range(nibbles):
        nibble = nibbles - 1 - back
        tl.store(room.numbers + (_site() * room.many + part.number + nibble) * TOKENS + token, best.to(tl.uint8))
        before = tl.load(_way(part, room, nibble) + best * TOKENS + token).to(tl.int32)
        for i in tl.static_range(WIDTH):
            place = nibble * WIDTH + i
            decoded = tl.load(part.points.own + best * WIDTH + i) + tl.load(part.points.next + before * WIDTH + i)
            weight = 1.0
            if plan.weights is not None:
                weight = tl.load(plan.weights + tl.program_id(1) * plan.rows + part.first + place)
            along += _coordinate(plan, part, room, place) * decoded * weight
        best = before
    return along


@triton.jit
def _signs(plan, part, room):
    """Signs, or those that were refined, 1 for +; what they have in common with the tokens."""
    along = tl.zeros([TOKENS], tl.float32)
    for start in range(0, part.dim, CHUNK):
        row = start + tl.arange(0, CHUNK)
        y = _some(room.mapped, plan.rows, part.first, row, part.dim)
        positive = y >= 0
        if part.refined is not None:
            positive = _some(part.refined, part.dim, 0, row, part.dim) > 0
        along += tl.sum(tl.where(positive, y, -y) * _weights(plan, part.first, row, part.dim), axis=0)
        to = _tile(room.numbers, room.many, part.number, row)
        tl.store(to, positive.to(tl.uint8), mask=(row < part.dim)[:, None])
    return along


@triton.jit
def _pack(numbers, many, places, to):
    """The bits of the nibbles, where the code wants them."""
    token = tl.arange(0, TOKENS)[None, :]
    head = tl.program_id(1) * places.per_head
    for start in range(0, places.nibbles // 2, CHUNK):
        byte = start + tl.arange(0, CHUNK)
        inside = byte < places.nibbles // 2
        packed = tl.zeros([CHUNK, TOKENS], tl.int32)
        for place in tl.static_range(8):
            at = (head * places.nibbles + 2 * byte + place // 4) * 4 + place % 4
            number = tl.load(places.number + at, mask=inside, other=0).to(tl.int64)
            bit = tl.load(places.bit + at, mask=inside, other=0).to(tl.int32)
            chosen = tl.load(_tile(numbers, many, 0, number)).to(tl.int32)
            packed |= ((chosen >> bit[:, None]) & 1) << place
        tl.store(to + byte[:, None] * TOKENS + token, packed.to(tl.uint8), mask=inside[:, None])


@triton.jit
def _half(x):
    return tl.minimum(tl.maximum(x, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)


@triton.jit
def _log_scale(aligned, squared, unit):
    """|y|^2 / <y, y_hat> as an 8-bit logarithm."""
    scale = squared / tl.maximum(aligned, TINY) / unit
    is_positive = (aligned > 0) & (scale > 0)
    octaves = tl.log2(tl.where(is_positive, scale, 1.0))
    code = tl.floor(octaves * STEPS_PER_OCTAVE + UNIT_CODE + 0.5)
    return tl.where(is_positive, tl.minimum(tl.maximum(code, 1), 255), 0).to(tl.uint8)


@triton.jit
def _half_scale(centred, dim, factor):
    """Norms times a factor, as float16."""
    squares = tl.zeros([TOKENS], tl.float32)
    for start in range(0, dim, CHUNK):
        x = _some(centred, dim, 0, start + tl.arange(0, CHUNK), dim)
        squares += tl.sum(x * x, axis=0)
    return _half(tl.sqrt(squares) * factor)


@triton.jit
def _code(plan, room, targets, codes, scale, dim, WIDTHS: tl.constexpr):
    """Coordinates to codes and scales of a page."""
    size, squared = _sizes(plan, room)
    aligned = tl.zeros([TOKENS], tl.float32)
    for i in tl.static_range(len(plan.parts)):
        part = plan.parts[i]
        if part.search is not None:
            aligned += _levels(plan, part, room, size, WIDTHS[i])
        elif part.points is not None:
            aligned += _trellis(plan, part, room, size, WIDTHS[i])
        else:
            aligned += _signs(plan, part, room)
    tl.debug_barrier()
    _pack(room.numbers, room.many, plan.places, _of_page(codes, targets))
    if plan.units is None:
        stored = _half_scale(room.centred, dim, plan.norm_factor)
    else:
        stored = _log_scale(aligned, squared, tl.load(plan.units + tl.program_id(1)))
    tl.store(_of_page(scale, targets) + tl.arange(0, TOKENS), stored)


@triton.jit
def _centre_and_map(tokens, targets, plan, turn, room, are_finite, job, INTERLEAVED: tl.constexpr):
    _centre(tokens, targets, plan.mean, turn, room.centred, are_finite, job, INTERLEAVED)
    tl.debug_barrier()
    _map(plan, room, tokens.dim)


@triton.jit(do_not_specialize=["job"])
def encode(
    tokens, targets, plan, turn, room, codes, scale, are_finite, job, INTERLEAVED: tl.constexpr, WIDTHS: tl.constexpr
):
    """``grid (blocks, H)``: everything. ``WIDTHS``: of each part, depth of its search or coordinates per nibble."""
    _centre_and_map(tokens, targets, plan, turn, room, are_finite, job, INTERLEAVED)
    tl.debug_barrier()
    _code(plan, room, targets, codes, scale, tokens.dim, WIDTHS)


@triton.jit(do_not_specialize=["job"])
def map_tokens(tokens, targets, plan, turn, room, are_finite, job, INTERLEAVED: tl.constexpr):
    """``grid (blocks, H)``: all that comes before signs are refined."""
    _centre_and_map(tokens, targets, plan, turn, room, are_finite, job, INTERLEAVED)


@triton.jit
def code_tokens(plan, room, targets, codes, scale, dim, WIDTHS: tl.constexpr):
    """``grid (blocks, H)``: all that comes after."""
    _code(plan, room, targets, codes, scale, dim, WIDTHS)


@triton.jit
def _on_grid(centred, dim, grid, group, WIDTH: tl.constexpr):
    """One group of channels, rotated by Hadamard matrices along the diagonal, ``[WIDTH, 64]``."""
    row = group * grid.width + tl.arange(0, WIDTH)
    y = tl.zeros([WIDTH, TOKENS], tl.float32)
    for start in range(0, dim, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        entries = _hadamard(row % grid.size, dims % grid.size) * grid.root
        entries = tl.where((row // grid.size)[:, None] == (dims // grid.size)[None, :], entries, 0.0)
        y = tl.dot(entries, _some(centred, dim, 0, dims, dim), y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["job"])
def encode_on_grids(
    tokens, targets, grid, centred, numbers, codes, steps, middles, are_finite, job,
    WIDTH: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """``grid (blocks, H)``: everything, with the room ``centred`` and ``numbers [H, n, D, 64]``."""
    _centre(tokens, targets, None, None, centred, are_finite, job, False)
    tl.debug_barrier()
    token, inside = tl.arange(0, TOKENS), tl.arange(0, WIDTH) < grid.width
    for group in range(grid.groups):
        y = _on_grid(centred, tokens.dim, grid, group, WIDTH)
        low = grid.clip * tl.min(tl.where(inside[:, None], y, float("inf")), axis=0)
        high = grid.clip * tl.max(tl.where(inside[:, None], y, float("-inf")), axis=0)
        step, middle = _half((high - low) / TOP), _half((high + low) / 2)
        divisor = tl.where(step > 0, step.to(tl.float32), 1.0)
        code = tl.floor((y - middle.to(tl.float32)[None, :]) / divisor[None, :] + TOP / 2 + 0.5)
        code = tl.minimum(tl.maximum(code, 0), TOP).to(tl.uint8)
        tl.store(_tile(numbers, tokens.dim, group * grid.width, tl.arange(0, WIDTH)), code, mask=inside[:, None])
        tl.store(_of_page(steps, targets) + group * TOKENS + token, step)
        tl.store(_of_page(middles, targets) + group * TOKENS + token, middle)
    tl.debug_barrier()
    _pack(numbers, tokens.dim, grid.places, _of_page(codes, targets))
