"""pack, unpack, scan and expand in Triton."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qjl.packed import BLOCK

SHARE: tl.constexpr = tl.constexpr(16)  # nibbles that one program takes, or takes at once
TOKENS: tl.constexpr = tl.constexpr(BLOCK)


class Codes(NamedTuple):
    """Packed codes ``[B, H, blocks, bytes, 64]`` where they lie, with strides in elements."""

    data: Tensor
    batch: int
    head: int
    block: int
    byte: int
    token: int

    @classmethod
    def of(cls, codes: Tensor) -> Codes:
        return cls(codes, *codes.stride())


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


def pack(nibbles: Tensor) -> Tensor:
    batch, heads, tokens, count = nibbles.shape
    codes = nibbles.new_empty((batch, heads, tokens // BLOCK, count // 2, BLOCK))
    _pack[_grid(codes, count)](Rows.of(nibbles), Codes.of(codes), heads, count // 2)
    return codes


def unpack(codes: Tensor) -> Tensor:
    batch, heads, blocks, count, _ = codes.shape
    nibbles = codes.new_empty((batch, heads, blocks * BLOCK, 2 * count))
    _unpack[_grid(codes, 2 * count)](Codes.of(codes), Rows.of(nibbles), heads, count)
    return nibbles


def scan(tables: Tensor, codes: Tensor) -> Tensor:
    tables = tables.float().contiguous()
    batch, heads, rows, nibbles, _ = tables.shape
    scores = tables.new_empty((batch, heads, rows, codes.shape[2] * BLOCK))
    _scan[(codes.shape[2], batch * heads, rows)](tables, Codes.of(codes), scores, heads, nibbles)
    return scores


def expand(entries: Tensor, codes: Tensor) -> Tensor:
    entries = entries.float()
    heads, nibbles, _, width = entries.shape
    expanded = entries.new_empty((codes.shape[0], heads, codes.shape[2] * BLOCK, nibbles * width))
    _expand[_grid(codes, nibbles)](entries, entries.stride(), Codes.of(codes), Rows.of(expanded), heads, nibbles, width)
    return expanded


def _grid(codes: Tensor, nibbles: int) -> tuple[int, int, int]:
    batch, heads, blocks = codes.shape[:3]
    return blocks, batch * heads, triton.cdiv(nibbles, SHARE.value)


@triton.jit
def _place(codes, heads):
    """Where the codes of this program's block begin."""
    row, head, block = tl.program_id(1) // heads, tl.program_id(1) % heads, tl.program_id(0).to(tl.int64)
    return codes.data + row.to(tl.int64) * codes.batch + head.to(tl.int64) * codes.head + block * codes.block


@triton.jit
def _numbers_at(rows, heads, columns):
    """Pointers ``[64, columns]`` to the numbers of this program's tokens."""
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    begin = rows.data + row.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head
    return begin + token[:, None] * rows.token + columns[None, :] * rows.column


@triton.jit
def _nibbles_at(begin, codes, nibbles, present):
    """Nibbles of all tokens of a block, ``int32 [64, nibbles]``."""
    token = tl.arange(0, TOKENS)
    at = begin + (nibbles // 2)[None, :] * codes.byte + token[:, None] * codes.token
    byte = tl.load(at, mask=present[None, :], other=0).to(tl.int32)
    return (byte >> ((nibbles % 2) * 4)[None, :]) & 15


@triton.jit
def _pack(nibbles, codes, heads, count):
    byte = tl.program_id(2) * (SHARE // 2) + tl.arange(0, SHARE // 2)
    present = (byte < count)[None, :]
    low = tl.load(_numbers_at(nibbles, heads, 2 * byte), mask=present, other=0)
    high = tl.load(_numbers_at(nibbles, heads, 2 * byte + 1), mask=present, other=0)
    token = tl.arange(0, TOKENS)
    to = _place(codes, heads) + byte[None, :] * codes.byte + token[:, None] * codes.token
    tl.store(to, low | (high << 4), mask=present)


@triton.jit
def _unpack(codes, nibbles, heads, count):
    nibble = tl.program_id(2) * SHARE + tl.arange(0, SHARE)
    present = nibble < 2 * count
    unpacked = _nibbles_at(_place(codes, heads), codes, nibble, present)
    tl.store(_numbers_at(nibbles, heads, nibble), unpacked.to(tl.uint8), mask=present[None, :])


@triton.jit
def _scan(tables, codes, scores, heads, count):
    begin = _place(codes, heads)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    sums = tl.zeros([TOKENS], tl.float32)
    for start in range(0, count, SHARE):
        nibble = start + tl.arange(0, SHARE)
        present = nibble < count
        chosen = (row * count + nibble)[None, :] * 16 + _nibbles_at(begin, codes, nibble, present)
        sums += tl.sum(tl.load(tables + chosen, mask=present[None, :], other=0.0), axis=1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    tl.store(scores + row * tl.num_programs(0) * TOKENS + token, sums)


@triton.jit
def _expand(entries, stride, codes, expanded, heads, count, width):
    nibble = tl.program_id(2) * SHARE + tl.arange(0, SHARE)
    present = nibble < count
    entry = _nibbles_at(_place(codes, heads), codes, nibble, present)
    table = entries + (tl.program_id(1) % heads) * stride[0] + nibble[None, :] * stride[1] + entry * stride[2]
    for slot in range(width):
        looked_up = tl.load(table + slot * stride[3], mask=present[None, :], other=0.0)
        tl.store(_numbers_at(expanded, heads, nibble * width + slot), looked_up, mask=present[None, :])
