"""The fused decode step in Triton, over blocks of a cache or over pages of a pool.

It fills a workspace whose size depends on batch, heads and query rows, never on the context, and waits for nothing:
lengths of pages are read on the device, so that a captured CUDA graph serves all lengths up to a capacity. Numbers are
multiplied as the exact tokens lie: in float16 on tensor cores beside half precision (2e-3 of a row's norm off the
reference), as float32 otherwise (1e-4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from qjl.ops.forms import ExactTokens, NibbleForm, PackedTokens, PagedTokens, Turn, once, shared_strides
from qjl.ops.triton import runtime, step
from qjl.ops.triton.pairs import Pairs, pairs_of
from qjl.packed import BLOCK, Blocks

MOST_SPLITS = 64  # of one KV head
MOST_NUMBERS = 64 * 128  # of a tile of tokens in half precision, so that shared memory holds what a program needs
MOST_ROWS = 64  # that share what a program decodes
LEAST = 16  # what a matrix product takes


def attend_packed(
    query: Tensor,
    packed: PackedTokens,
    bias: Tensor | None,
    exact: Sequence[ExactTokens],
    queries: int,
    scaling: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return _attend(query, packed, packed.first.shape[1], bias, exact, queries, scaling, softcap)


def attend_paged(
    query: Tensor,
    packed: PagedTokens,
    bias: Tensor | None,
    exact: Sequence[ExactTokens],
    queries: int,
    scaling: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``attend_packed`` over pages, with the same arguments; a row of no tokens weighs nothing."""
    blocks = triton.cdiv(packed.table.shape[1] * packed.page, BLOCK)
    return _attend(query, packed, blocks, bias, exact, queries, scaling, softcap)


def _attend(
    query: Tensor,
    packed: PackedTokens | PagedTokens,
    blocks: int,
    bias: Tensor | None,
    exact: Sequence[ExactTokens],
    queries: int,
    scaling: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    keys, values = (once(form, "triton", _constants) for form in (packed.key_form, packed.value_form))
    widest = max(keys.pairs.count, values.pairs.count, keys.map.head_dim // 2, values.map.head_dim // 2) * 2
    most_rows = MOST_ROWS if widest * _tile_type(exact).itemsize <= 256 else LEAST
    tile = min(most_rows, max(LEAST, triton.next_power_of_2(rows)))
    work = _Work(query.contiguous(), heads, rows, queries, scaling, softcap, tile)
    parts = _packed_parts(work, packed, blocks, keys, values, bias, _tile_type(exact))
    exact_parts = _exact_parts(work, exact, values.map.head_dim)
    out = query.new_empty((batch, heads, rows, values.map.head_dim))
    lse = query.new_empty((batch, heads, rows))
    side = _side(packed.value_form, packed.values, values)
    step.join[(work.tiles, batch * heads, triton.cdiv(values.map.head_dim, step.CHUNK.value))](
        parts, exact_parts, side, values.map, values.mean, out, lse, heads, rows, ROWS=tile, PAIRS=values.pairs.count
    )
    return out, lse


@dataclass(frozen=True, eq=False)
class _Work:
    """The queries of a step, in tiles of ``tile`` rows."""

    query: Tensor
    heads: int
    rows: int
    queries: int
    scaling: float
    softcap: float
    tile: int

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.rows, self.tile)

    def splits(self, blocks: int) -> int:
        """Into how many parts the tokens go, so that all processors work; it depends on shapes alone."""
        programs = self.query.shape[0] * self.heads * self.tiles
        wanted = triton.cdiv(2 * _processors(self.query.device), max(1, programs))
        return max(1, min(wanted, blocks, MOST_SPLITS))

    def parts(self, splits: int, *width: int) -> step.Parts:
        """Room for what splits give."""
        size = (self.query.shape[0], self.heads, splits, self.rows)
        return step.Parts(self.query.new_empty((*size, *width)), self.query.new_empty(size), splits)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _tile_type(exact: Sequence[ExactTokens]) -> torch.dtype:
    """What codes are decoded to: float16, which holds them exactly, where exact tokens are in half precision."""
    return torch.float16 if any(tokens.keys.itemsize == 2 for tokens in exact) else torch.float32


def _tokens_at_once(dims: int, dtype: torch.dtype) -> int:
    """A block of 64, or half of one where its numbers take too much room."""
    return BLOCK if dims * BLOCK * dtype.itemsize <= 2 * MOST_NUMBERS else BLOCK // 2


def _precision(is_half: bool) -> str:
    """How float32 numbers are multiplied on tensor cores, 16 or 21 bits of each; the interpreter knows the latter."""
    return "bf16x3" if is_half and not runtime.is_interpreted() else "tf32x3"


def _packed_parts(
    work: _Work,
    packed: PackedTokens | PagedTokens,
    blocks: int,
    keys: _Constants,
    values: _Constants,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> step.Parts:
    batch = work.query.shape[0]
    key_side = _side(packed.key_form, packed.keys, keys)
    projected = _projected(work, key_side, keys)
    parts = work.parts(work.splits(blocks), 2, values.pairs.count)
    is_half = dtype == torch.float16
    pages, first = _places(packed)
    step.packed_part[(parts.splits, batch * work.heads, work.tiles)](
        key_side,
        _side(packed.value_form, packed.values, values),
        projected,
        keys.turned,
        first,
        pages,
        _bias(bias),
        parts,
        work.heads,
        work.rows,
        work.queries,
        blocks,
        work.scaling,
        work.softcap,
        ROWS=work.tile,
        TILE=_tokens_at_once(2 * max(keys.pairs.count, values.pairs.count), dtype),
        KEY_PAIRS=keys.pairs.count,
        KEY_TERMS=keys.pairs.terms,
        KEYS_GROUPED=keys.is_grouped,
        VALUE_PAIRS=values.pairs.count,
        VALUE_TERMS=values.pairs.terms,
        VALUES_GROUPED=values.is_grouped,
        F=keys.frequencies,
        PAGE=packed.keys["codes"].shape[-1],
        DTYPE=tl.float16 if is_half else tl.float32,
        PRECISION=_precision(is_half),
        num_warps=8 if max(keys.pairs.count, values.pairs.count, work.tile) > 64 else 4,
        num_stages=1,  # looking ahead would copy every look-up through shared memory
    )
    return parts


def _projected(work: _Work, side: step.Side, keys: _Constants) -> step.Projected:
    size, pairs = work.query.shape[:3], keys.pairs.count
    projected = step.Projected(
        mapped=work.query.new_empty((*size, 2, pairs)),
        turning=None if keys.turned is None else work.query.new_empty((*size, 2, keys.frequencies)),
        rest=None if keys.still_mean is None else work.query.new_empty(size),
    )
    step.project[(work.tiles, size[0] * size[1], 4 * pairs // step.CHUNK.value)](
        work.query, side, keys.map, keys.still_mean, keys.turned, projected, work.heads, work.rows,
        ROWS=work.tile, PAIRS=pairs, F=keys.frequencies,
    )  # fmt: skip
    return projected


def _places(packed: PackedTokens | PagedTokens) -> tuple[step.Pages | None, Tensor | None]:
    """Pages, or the positions of blocks."""
    if isinstance(packed, PackedTokens):
        return None, packed.first.contiguous()
    table = packed.table.contiguous()
    lengths, skip, origins = (x.contiguous() for x in (packed.lengths, packed.skip, packed.origins))
    return step.Pages(table, table.stride(0), lengths, skip, origins), None


def _exact_parts(work: _Work, exact: Sequence[ExactTokens], value_dim: int) -> step.Parts | None:
    if not exact:
        return None
    splits = [work.splits(triton.cdiv(tokens.keys.shape[2], BLOCK)) for tokens in exact]
    parts = work.parts(sum(splits), value_dim)
    for place, tokens in enumerate(exact):
        key_dim = tokens.keys.shape[3]
        step.exact_part[(splits[place], work.query.shape[0] * work.heads, work.tiles)](
            work.query,
            step.Exact(tokens.keys, tokens.keys.stride(), tokens.values, tokens.values.stride()),
            _bias(tokens.bias),
            parts,
            work.heads,
            work.rows,
            work.queries,
            tokens.keys.shape[2],
            key_dim,
            value_dim,
            work.scaling,
            work.softcap,
            sum(splits[:place]),
            parts.splits,
            ROWS=work.tile,
            TILE=_tokens_at_once(max(key_dim, value_dim), torch.float32),
            KEY_DIM=max(LEAST, triton.next_power_of_2(key_dim)),
            VALUE_DIM=max(LEAST, triton.next_power_of_2(value_dim)),
            PRECISION=_precision(tokens.keys.dtype == torch.bfloat16),
            num_warps=8 if max(key_dim, value_dim) > 128 else 4,
            num_stages=1,  # ahead of the products there is no room
        )
    return parts


def _bias(bias: Tensor | None) -> step.Bias | None:
    return None if bias is None else step.Bias(bias, shared_strides(bias))


# What is the same in all steps


@dataclass(frozen=True, eq=False)
class _Constants:
    """Of a form; ``still_mean [H, D]`` is the mean without what turns."""

    pairs: Pairs
    map: step.Map
    unit: Tensor | None
    mean: Tensor | None
    still_mean: Tensor | None
    turned: step.Turned | None
    frequencies: int
    is_grouped: bool


def _constants(form: NibbleForm) -> _Constants:
    maps = form.map
    if maps is None:
        maps = torch.eye(form.code_dim, device=form.entries.device, dtype=torch.float32)[None]
    strides = (maps.stride(0) if maps.shape[0] > 1 else 0, *maps.stride()[1:])
    mean = None if form.mean is None else form.mean.float().contiguous()
    still, turned = mean, None
    if form.turn is not None and mean is not None:
        still, turned = _turned(form.turn, mean)
    return _Constants(
        pairs=pairs_of(form),
        map=step.Map(maps, strides, maps.shape[2]),
        unit=None if form.unit is None else form.unit.float().contiguous(),
        mean=mean,
        still_mean=still,
        turned=turned,
        frequencies=LEAST if turned is None else turned.inv_freq.shape[0],
        is_grouped=form.groups > 1 or form.middle is not None,
    )


def _turned(turn: Turn, mean: Tensor) -> tuple[Tensor, step.Turned]:
    """What does not turn, and what does: padded to a power of two with pairs of no mean."""
    device = mean.device
    first, second = (x.to(device, torch.int64) for x in (turn.first, turn.second))
    room = max(LEAST, triton.next_power_of_2(len(first))) - len(first)
    still = mean.clone()
    still[:, first] = still[:, second] = 0
    inv_freq = pad(turn.inv_freq.to(device).float(), (0, room))
    angles = inv_freq[:, None] * torch.arange(BLOCK, device=device)
    return still, step.Turned(
        first=pad(first, (0, room)).int(),
        second=pad(second, (0, room)).int(),
        mean_first=pad(mean[:, first] * turn.scaling, (0, room)),
        mean_second=pad(mean[:, second] * turn.scaling, (0, room)),
        inv_freq=inv_freq,
        cos=angles.cos(),
        sin=angles.sin(),
    )


def _side(form: NibbleForm, blocks: Blocks, constants: _Constants) -> step.Side:
    """Packed tensors where they lie, ``[B, H, blocks, ...]`` or ``[pages, H, ...]``."""
    scale, middle = blocks[form.scale], None if form.middle is None else blocks[form.middle]
    is_paged = blocks["codes"].dim() == 4
    pairs = constants.pairs
    return step.Side(
        codes=blocks["codes"],
        codes_stride=_strides(blocks["codes"], is_paged),
        scale=scale,
        scale_stride=_strides(scale, is_paged),
        middle=middle,
        middle_stride=_strides(middle, is_paged),
        unit=constants.unit,
        sources=pairs.sources,
        tables=pairs.tables,
        coordinates=pairs.coordinates,
        groups=pairs.groups,
        per_head=int(pairs.sources.shape[0] > 1),
    )


def _strides(tensor: Any, is_paged: bool) -> tuple[int, ...]:
    """Of batch, head, block, group and token."""
    if tensor is None:
        return (0,) * 5
    strides = tensor.stride()
    places = (0, strides[1], strides[0]) if is_paged else strides[:3]
    inner = strides[2 if is_paged else 3 :]
    return (*places, *((0,) if len(inner) == 1 else ()), *inner)
