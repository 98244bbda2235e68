"""decode in Triton: codes to the space of the codes; torch's matrix product maps them back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qjl.ops import reference
from qjl.ops.forms import NibbleForm, once
from qjl.ops.triton.pairs import pairs_of
from qjl.packed import BLOCK, Blocks

SHARE: tl.constexpr = tl.constexpr(16)  # pairs of coordinates of one program
TOKENS: tl.constexpr = tl.constexpr(BLOCK)


class Coded(NamedTuple):
    """A field of packed blocks where it lies, ``[B, H, n, rows, 64]``, with strides in elements."""

    data: Tensor
    batch: int
    head: int
    block: int
    row: int

    @classmethod
    def of(cls, field: Tensor) -> Coded:
        """Of one without rows too."""
        batch, head, block, *inner = field.stride()
        return cls(field, batch, head, block, inner[0] if len(inner) > 1 else 0)


class PairTables(NamedTuple):
    """The fields of ``Pairs``; ``per_head`` is 1 where heads have codes of their own."""

    sources: Tensor
    tables: Tensor
    coordinates: Tensor
    groups: Tensor
    width: int  # P
    per_head: int


def decode(blocks: Blocks, form: NibbleForm, first: Tensor) -> Tensor:
    codes, pairs = blocks["codes"], once(form, "pairs", pairs_of)
    batch, heads, count = codes.shape[:3]
    # zeros: coordinates without bits are no pairs
    code = codes.new_zeros((batch, heads, count * BLOCK, form.code_dim), dtype=torch.float32)
    tables = PairTables(
        pairs.sources, pairs.tables, pairs.coordinates, pairs.groups, pairs.count, int(pairs.sources.shape[0] > 1)
    )
    middle = None if form.middle is None else Coded.of(blocks[form.middle])
    if code.numel():
        _decode[(count, batch * heads, triton.cdiv(pairs.count, SHARE.value))](
            Coded.of(codes), Coded.of(blocks[form.scale]), middle, form.unit, tables, code, heads, form.code_dim,
            TERMS=pairs.terms,
        )  # fmt: skip
    return reference.tokens_of(code, form, first)


@triton.jit
def _begin(field, heads):
    """Where this program's block begins."""
    row, head, block = tl.program_id(1) // heads, tl.program_id(1) % heads, tl.program_id(0).to(tl.int64)
    return field.data + row.to(tl.int64) * field.batch + head.to(tl.int64) * field.head + block * field.block


@triton.jit
def _decode(codes, scale, middle, unit, pairs, code, heads, dim, TERMS: tl.constexpr):
    """``grid (blocks, B * H, pairs / SHARE)``: both coordinates of some pairs, scaled."""
    pair = tl.program_id(2) * SHARE + tl.arange(0, SHARE)
    token = tl.arange(0, TOKENS)
    is_pair = pair < pairs.width
    of_head = (tl.program_id(1) % heads) * pairs.per_head
    low = tl.zeros([SHARE, TOKENS], tl.float32)
    high = tl.zeros([SHARE, TOKENS], tl.float32)
    for term in range(TERMS):
        place = (of_head * TERMS + term) * pairs.width + pair
        source = tl.load(pairs.sources + place, mask=is_pair, other=-1)
        wanted = (source >= 0)[:, None]
        at = _begin(codes, heads) + (source // 2)[:, None] * codes.row + token[None, :]
        byte = tl.load(at, mask=wanted, other=0).to(tl.int32)
        nibble = (byte >> ((source % 2) * 4)[:, None]) & 15
        both = tl.load(pairs.tables + place[:, None] * 16 + nibble, mask=wanted, other=0)
        low += (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high += (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    group = tl.load(pairs.groups + of_head * pairs.width + pair, mask=is_pair, other=0)[:, None]
    stored = tl.load(_begin(scale, heads) + group * scale.row + token[None, :]).to(tl.float32)
    if unit is not None:
        of_unit = tl.load(unit + tl.program_id(1) % heads)
        stored = tl.where(stored == 0, 0.0, tl.exp2((stored - 128) / 12)) * of_unit
    low, high = low * stored, high * stored
    if middle is not None:
        added = tl.load(_begin(middle, heads) + group * middle.row + token[None, :]).to(tl.float32)
        low, high = low + added, high + added
    to = code + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * TOKENS * dim
    for half in tl.static_range(2):
        coordinate = tl.load(pairs.coordinates + (of_head * 2 + half) * pairs.width + pair, mask=is_pair, other=-1)
        numbers = low if half == 0 else high
        tl.store(to + token[None, :] * dim + coordinate[:, None], numbers, mask=(coordinate >= 0)[:, None])
