"""Every op in plain torch, on any device: the living definition that other backends are tested against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl.modes import in_own_precision
from qjl.ops import checks
from qjl.ops.forms import EncodeJob, ExactPool, NibbleForm, Pool, Rows, Turn
from qjl.packed import BLOCK, Blocks, block_positions

TILE_BLOCKS = 64  # encoded at once


def decode(blocks: Blocks, form: NibbleForm, first: Tensor) -> Tensor:
    """Row by row."""
    codes = blocks["codes"]
    code = codes.new_empty((*codes.shape[:2], codes.shape[2] * BLOCK, form.code_dim), dtype=torch.float32)
    for row in range(codes.shape[0]):
        code[row] = _in_code_space(form, {name: x[row].movedim(1, -2).flatten(-2) for name, x in blocks.items()})
    return tokens_of(code, form, first)


def tokens_of(code: Tensor, form: NibbleForm, first: Tensor) -> Tensor:
    """``mean + map^T code`` of codes ``[B, H, T, D']`` that are scaled."""
    tokens = code if form.map is None else code @ form.map.float()
    if form.mean is None:
        return tokens
    positions = block_positions(first)
    if form.turn is None:
        return tokens + form.mean.float()[:, None]
    turned = [_turned(form.mean, form.turn, positions[row]) for row in range(len(positions))]
    return tokens + torch.stack(turned) if turned else tokens


def _looked_up(entries: Tensor, codes: Tensor) -> Tensor:
    """Entries of every token in slot order, ``[H, N, 16, w], [H, N / 2, t] -> [H, t, N w]``.

    Looks up whole bytes: a table of 256 pairs of nibbles halves the number of look-ups.
    """
    heads, nibbles, _, width = entries.shape
    pairs = _byte_entries(entries.float())  # [H, N / 2, 256, 2w]
    first = torch.arange(heads * nibbles // 2, device=codes.device, dtype=torch.int32) * 256
    index = codes.transpose(1, 2).int() + first.view(heads, 1, nibbles // 2)
    return F.embedding(index, pairs.view(-1, 2 * width)).flatten(2)


def _byte_entries(entries: Tensor) -> Tensor:
    heads, nibbles, _, width = entries.shape
    low = entries[:, 0::2, None, :, :].expand(heads, nibbles // 2, 16, 16, width)
    high = entries[:, 1::2, :, None, :].expand(heads, nibbles // 2, 16, 16, width)
    return torch.cat([low, high], dim=-1).view(heads, nibbles // 2, 256, 2 * width)


# Pools


def attend(
    query: Tensor,
    pool: Pool,
    exact: ExactPool,
    rows: Rows,
    queries: int,
    scaling: float,
    softcap: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Row by row, over decoded tokens."""
    query = query.float()
    batch, heads, count, _ = query.shape
    out = query.new_zeros((batch, heads, count, exact.values.shape[2]))
    lse = query.new_zeros((batch, heads, count))
    first_exact = rows.table.shape[1] * pool.page
    for row in range(batch):
        packed, places = _packed_tokens(pool, rows, row), _exact_tokens(rows, row)
        slots = rows.slots[row, places].long()
        of_keys, of_values = (exact.keys[slots].transpose(0, 1), exact.values[slots].transpose(0, 1))
        keys = torch.cat([_decoded_tokens(pool.keys, pool.key_form, rows, row, packed), of_keys.float()], 1)
        values = torch.cat([_decoded_tokens(pool.values, pool.value_form, rows, row, packed), of_values.float()], 1)
        columns = torch.cat([packed, first_exact + places])
        added = None if bias is None else bias[..., columns]
        scores = _scores(query[row], keys, added, row, queries, scaling, softcap)
        scores[..., len(packed) :].masked_fill_(_is_later(rows, row, places, queries, count), -torch.inf)
        out[row], lse[row] = _weighted(scores, values)
    return out, lse


@in_own_precision
def append_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pool: Pool,
    exact: ExactPool,
    rows: Rows,
    scaling: float,
    softcap: float,
) -> Tensor:
    checks.require_append(query, keys, values, pool, exact, rows)
    batch, query_heads, queries, dim = query.shape
    heads, value_dim = exact.values.shape[1:]
    for row in range(rows.batch):
        places = _exact_tokens(rows, row)
        places = places[places >= int(rows.counts[row]) - queries]
        slots, fresh = rows.slots[row, places].long(), places - int(rows.counts[row]) + queries
        exact.keys[slots] = keys[row, :, fresh].transpose(0, 1).to(exact.keys.dtype)
        exact.values[slots] = values[row, :, fresh].transpose(0, 1).to(exact.values.dtype)
    by_head = query.reshape(batch, heads, query_heads // heads * queries, dim)
    out, _ = attend(by_head, pool, exact, rows, queries, scaling, softcap, None)
    return out.view(batch, query_heads, queries, value_dim).transpose(1, 2).contiguous().to(query.dtype)


def encode(jobs: Sequence[EncodeJob], slots: Tensor, first: Tensor, pages: Tensor) -> Tensor:
    """Whether all tokens of each job are finite, ``bool [jobs]``."""
    return torch.stack([encode_by(job.quantize, job, slots, first, pages) for job in jobs])


def encode_by(
    quantize: Callable[[Tensor, Tensor], Blocks], job: EncodeJob, slots: Tensor, first: Tensor, pages: Tensor
) -> Tensor:
    """One job, some blocks at once, so that a long prompt takes little room: ``bool []``."""
    finite = []
    for of_slots, of_first, of_pages in zip(
        slots.long().split(TILE_BLOCKS * BLOCK), first.split(TILE_BLOCKS), pages.long().split(TILE_BLOCKS), strict=True
    ):
        tokens = job.tokens[of_slots].transpose(0, 1)[None]
        is_finite = tokens.isfinite()
        finite.append(is_finite.all())
        for name, field in quantize(tokens.where(is_finite, 0), of_first[None]).items():
            job.fields[name][of_pages] = field[0].transpose(0, 1)
    return torch.stack(finite).all()


def _packed_tokens(pool: Pool, rows: Rows, row: int) -> Tensor:
    """Indices of those that the row has, ``int64 [t]``."""
    tokens = torch.arange(
        int(rows.skip[row]), max(int(rows.skip[row]), int(rows.lengths[row])), device=rows.table.device
    )
    return tokens[rows.table[row, tokens // pool.page] >= 0]


def _exact_tokens(rows: Rows, row: int) -> Tensor:
    """Places of the slots that hold a token of the row, ``int64 [e]``."""
    return (rows.slots[row, : int(rows.counts[row])] >= 0).nonzero()[:, 0]


def _is_later(rows: Rows, row: int, places: Tensor, queries: int, count: int) -> Tensor:
    """Whether an exact token comes after a query, ``bool [R, e]``."""
    query = torch.arange(count, device=places.device) % queries
    return places >= rows.counts[row] - (queries - 1 - query)[:, None]


def _decoded_tokens(fields: Blocks, form: NibbleForm, rows: Rows, row: int, tokens: Tensor) -> Tensor:
    """Some packed tokens of a row as the form says: ``float32 [H, t, D]``."""
    page = fields["codes"].shape[3]
    pages = rows.table[row, tokens // page].long()
    one_block = {name: x.movedim(-1, 1)[pages, tokens % page].movedim(0, -1) for name, x in fields.items()}
    decoded = _decoded(form, one_block)
    return decoded if form.mean is None else decoded + _turned(form.mean, form.turn, rows.origins[row] + tokens)


def _scores(
    query: Tensor, keys: Tensor, bias: Tensor | None, row: int, queries: int, scaling: float, softcap: float
) -> Tensor:
    """``[H, R, D], [H, t, D] -> [H, R, t]``; the bias is that of all rows of the batch."""
    scores = query @ keys.transpose(1, 2) * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is None:
        return scores
    heads, rows, tokens = scores.shape
    of_row = bias[row if bias.shape[0] > 1 else 0].expand(heads * rows // queries, queries, tokens)
    return scores + of_row.reshape(heads, rows, tokens)


def _weighted(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp()
    return weights @ values, lse


def _decoded(form: NibbleForm, block: Blocks) -> Tensor:
    """``map^T (scale * code + middle)`` of a block of any size, without batch: ``[H, t, D]``."""
    code = _in_code_space(form, block)
    return code if form.map is None else code @ form.map.float()


def _in_code_space(form: NibbleForm, block: Blocks) -> Tensor:
    """``scale * code + middle`` of a block of any size, without batch: ``[H, t, D']``."""
    codes = block["codes"]
    heads, _, tokens = codes.shape
    by_group = (heads, form.groups, tokens, 1)
    code = _code(form, codes) * _scale(form, block[form.scale]).reshape(by_group)
    if form.middle is not None:
        code = code + block[form.middle].float().reshape(by_group)
    return code.transpose(1, 2).flatten(2)


def _code(form: NibbleForm, codes: Tensor) -> Tensor:
    """Sums of entries by coordinate, ``[H, bytes, t] -> [H, groups, t, D' / groups]``."""
    heads, _, tokens = codes.shape
    of_groups = codes.unflatten(1, (form.groups, -1)).flatten(0, 1)
    entries, places = (
        x.expand(heads, *x.shape[1:]).repeat_interleave(form.groups, 0) for x in (form.entries, form.coordinates)
    )
    terms = _looked_up(entries, of_groups)
    sums = terms.new_zeros((heads * form.groups, tokens, form.code_dim // form.groups))
    index = places.flatten(1).long()[:, None].expand(-1, tokens, -1)
    return sums.scatter_add_(2, index, terms).unflatten(0, (heads, form.groups))


def _scale(form: NibbleForm, stored: Tensor) -> Tensor:
    """Decoded: twelve steps of a logarithm are an octave, 128 is the unit, and 0 is zero."""
    if form.unit is None:
        return stored.float()
    unit = form.unit.float().reshape(-1, *[1] * (stored.dim() - 1))
    return torch.where(stored == 0, 0.0, ((stored.float() - 128) / 12).exp2()) * unit


def _turned(mean: Tensor, turn: Turn | None, positions: Tensor) -> Tensor:
    """``[H, D]`` at positions ``[t]``, by exact angles: ``[H, t, D]``."""
    turned = mean.float()[:, None].repeat(1, positions.shape[0], 1)
    if turn is None:
        return turned
    cos, sin = turns(turn, positions)
    first, second = (x.to(positions.device).long() for x in (turn.first, turn.second))
    one, other = turned[..., first], turned[..., second]
    turned[..., first], turned[..., second] = one * cos - other * sin, other * cos + one * sin
    return turned


def turns(turn: Turn, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled cosines and sines ``float32 [..., F]`` of exact angles at positions ``[...]``."""
    angles = positions.double()[..., None] * turn.inv_freq.to(positions.device).double()
    angles = angles.remainder(math.tau).float()
    return angles.cos() * turn.scaling, angles.sin() * turn.scaling
