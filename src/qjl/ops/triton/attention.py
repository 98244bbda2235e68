"""The decode step in Triton for forms that ``step`` does not serve: scales in groups, or very many tables.

It fills a workspace whose size depends on batch, heads and query rows, never on the context, and waits for nothing:
lengths and counts are read on the device, so that a captured CUDA graph serves all of them up to the capacity of the
tables. Numbers are multiplied as the exact tokens lie: in float16 on tensor cores beside half precision (2e-3 of a
row's norm off the reference), as float32 otherwise (1e-4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from qjl.modes import in_own_precision
from qjl.ops import checks
from qjl.ops.forms import ExactPool, NibbleForm, Pool, Rows, Turn, once, shared_strides
from qjl.ops.triton import attention_kernels as kernels
from qjl.ops.triton import runtime
from qjl.ops.triton.pairs import Pairs, pairs_of
from qjl.ops.triton.step import by_head, precision
from qjl.ops.triton.step_kernels import ByQuery
from qjl.packed import BLOCK, Blocks

MOST_SPLITS = 64  # of one KV head
MOST_NUMBERS = 64 * 128  # of a tile of tokens in half precision, so that shared memory holds what a program needs
MOST_ROWS = 64  # that share what a program decodes
LEAST = 16  # what a matrix product takes


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
    out = query.new_empty((*query.shape[:3], exact.values.shape[2]), dtype=torch.float32)
    work = _Work(by_head(query, queries), pool, exact, rows, queries, scaling, softcap, bias)
    return out, work.into(by_head(out, queries))


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
    """Reads and writes the model's types where they lie."""
    checks.require_append(query, keys, values, pool, exact, rows)
    batch, query_heads, queries, _ = query.shape
    work = _Work(query, pool, exact, rows, queries, scaling, softcap, None)
    work.put(keys, exact.keys)
    work.put(values, exact.values)
    out = query.new_empty((batch, queries, query_heads, exact.values.shape[2]))
    work.into(out.transpose(1, 2))
    return out


@dataclass(frozen=True, eq=False)
class _Work:
    """One step of ``query [B, Hq, Q, D]``."""

    query: Tensor
    pool: Pool
    exact: ExactPool
    rows: Rows
    queries: int
    scaling: float
    softcap: float
    bias: Tensor | None

    def put(self, fresh: Tensor, pool: Tensor) -> None:
        """Store fresh keys or values ``[B, H, Q, D]`` in their slots."""
        batch, heads, queries, dim = fresh.shape
        if batch * queries:
            kernels.put[(batch * queries, heads)](
                fresh, fresh.stride(), pool, pool.stride(), self._of_rows, queries, dim, DIM=triton.next_power_of_2(dim)
            )

    def into(self, out: Tensor) -> Tensor:
        """Leave what comes out in ``[B, Hq, Q, Dv]``; returns the log-sum-exps ``float32 [B, H, R]``."""
        packed, exact = self._packed_parts(), self._exact_parts()
        values, value_dim = self.values, out.shape[3]
        lse = self._empty(*self._sizes)
        kernels.join[(self.tiles, self._programs, triton.cdiv(value_dim, kernels.CHUNK.value))](
            packed, exact, self._value_side, values.map, values.mean,
            ByQuery(out, out.stride()), lse, self.heads, self.count, self.queries,
            ROWS=self.tile, PAIRS=values.pairs.count,
        )  # fmt: skip
        return lse

    @cached_property
    def keys(self) -> _Constants:
        return once(self.pool.key_form, "triton", _constants)

    @cached_property
    def values(self) -> _Constants:
        return once(self.pool.value_form, "triton", _constants)

    @property
    def heads(self) -> int:
        return self.exact.keys.shape[1]

    @property
    def count(self) -> int:
        """Query rows of a KV head."""
        return self.query.shape[1] // self.heads * self.queries

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.query.shape[0], self.heads, self.count

    @property
    def _programs(self) -> int:
        return self.query.shape[0] * self.heads

    @property
    def is_half(self) -> bool:
        """Whether codes are decoded to float16, which holds them exactly: where exact tokens are in half precision."""
        return self.exact.keys.itemsize == 2

    @cached_property
    def tile(self) -> int:
        """Query rows that a program takes."""
        pairs = (self.keys.pairs.count, self.values.pairs.count)
        widest = max(*pairs, self.keys.map.head_dim // 2, self.values.map.head_dim // 2) * 2
        most_rows = MOST_ROWS if widest * (2 if self.is_half else 4) <= 256 else LEAST
        return min(most_rows, max(LEAST, triton.next_power_of_2(self.count)))

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.count, self.tile)

    def _empty(self, *size: int) -> Tensor:
        return self.query.new_empty(size, dtype=torch.float32)

    def _parts(self, tokens: int, *width: int) -> kernels.Parts:
        """Room for what splits of so many tokens give.

        There are so many that all processors work; how many depends on shapes alone.
        """
        wanted = triton.cdiv(2 * runtime.processors(self.query.device), max(1, self._programs * self.tiles))
        splits = max(1, min(wanted, triton.cdiv(tokens, BLOCK), MOST_SPLITS))
        batch, heads, count = self._sizes
        size = (batch, heads, splits, count)
        return kernels.Parts(self._empty(*size, *width), self._empty(*size), splits)

    def _grid(self, parts: kernels.Parts) -> tuple[int, int, int]:
        return parts.splits, self._programs, self.tiles

    @cached_property
    def _value_side(self) -> kernels.Side:
        return _side(self.pool.value_form, self.pool.values, self.values)

    @cached_property
    def _of_rows(self) -> kernels.Rows:
        return _rows(self.rows)

    @cached_property
    def _by_query(self) -> ByQuery:
        return ByQuery(self.query, self.query.stride())

    @cached_property
    def _added(self) -> ByQuery | None:
        return None if self.bias is None else ByQuery(self.bias, shared_strides(self.bias))

    @property
    def _columns(self) -> int:
        """Of packed tokens."""
        return self.rows.table.shape[1] * self.pool.page

    def _packed_parts(self) -> kernels.Parts:
        keys, values, pool = self.keys, self.values, self.pool
        key_side = _side(pool.key_form, pool.keys, keys)
        parts = self._parts(self._columns, 2, values.pairs.count)
        kernels.packed_part[self._grid(parts)](
            key_side,
            self._value_side,
            self._projected(key_side),
            keys.turned,
            self._of_rows,
            self._added,
            parts,
            self.heads,
            self.count,
            self.queries,
            self.scaling,
            self.softcap,
            ROWS=self.tile,
            TILE=_tokens_at_once(2 * max(keys.pairs.count, values.pairs.count), 2 if self.is_half else 4),
            KEY_PAIRS=keys.pairs.count,
            KEY_TERMS=keys.pairs.terms,
            KEYS_GROUPED=keys.is_grouped,
            VALUE_PAIRS=values.pairs.count,
            VALUE_TERMS=values.pairs.terms,
            VALUES_GROUPED=values.is_grouped,
            F=keys.frequencies,
            PAGE=pool.page,
            DTYPE=tl.float16 if self.is_half else tl.float32,
            PRECISION=precision(self.is_half),
            num_warps=8 if max(keys.pairs.count, values.pairs.count, self.tile) > 64 else 4,
            num_stages=1,  # looking ahead would copy every look-up through shared memory
        )
        return parts

    def _projected(self, side: kernels.Side) -> kernels.Projected:
        keys, pairs = self.keys, self.keys.pairs.count
        projected = kernels.Projected(
            mapped=self._empty(*self._sizes, 2, pairs),
            turning=None if keys.turned is None else self._empty(*self._sizes, 2, keys.frequencies),
            rest=None if keys.still_mean is None else self._empty(*self._sizes),
        )
        kernels.project[(self.tiles, self._programs, 4 * pairs // kernels.CHUNK.value)](
            self._by_query, side, keys.map, keys.still_mean, keys.turned, projected, self.heads, self.count,
            self.queries, ROWS=self.tile, PAIRS=pairs, F=keys.frequencies,
        )  # fmt: skip
        return projected

    def _exact_parts(self) -> kernels.Parts | None:
        keys, values = self.exact.keys, self.exact.values
        if not self.rows.slots.shape[1] or not keys.shape[0]:
            return None
        key_dim, value_dim = keys.shape[2], values.shape[2]
        parts = self._parts(self.rows.slots.shape[1], value_dim)
        kernels.exact_part[self._grid(parts)](
            self._by_query,
            kernels.Exact(keys, keys.stride(), values, values.stride()),
            self._of_rows,
            self._added,
            parts,
            self.heads,
            self.count,
            self.queries,
            self._columns,
            key_dim,
            value_dim,
            self.scaling,
            self.softcap,
            ROWS=self.tile,
            TILE=_tokens_at_once(max(key_dim, value_dim), 4),
            KEY_DIM=max(LEAST, triton.next_power_of_2(key_dim)),
            VALUE_DIM=max(LEAST, triton.next_power_of_2(value_dim)),
            PRECISION=precision(keys.dtype == torch.bfloat16),
            num_warps=8 if max(key_dim, value_dim) > 128 else 4,
            num_stages=1,  # ahead of the products there is no room
        )
        return parts


def _tokens_at_once(dims: int, itemsize: int) -> int:
    """A block of 64, or half of one where its numbers take too much room."""
    return BLOCK if dims * BLOCK * itemsize <= 2 * MOST_NUMBERS else BLOCK // 2


def _rows(rows: Rows) -> kernels.Rows:
    return kernels.Rows(
        rows.table,
        rows.table.shape[1],
        rows.lengths,
        rows.skip,
        rows.origins,
        rows.slots,
        rows.slots.shape[1],
        rows.counts,
    )


# What is the same in all steps


@dataclass(frozen=True, eq=False)
class _Constants:
    """Of a form; ``still_mean [H, D]`` is the mean without what turns."""

    pairs: Pairs
    map: kernels.Map
    unit: Tensor | None
    mean: Tensor | None
    still_mean: Tensor | None
    turned: kernels.Turned | None
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
        pairs=once(form, "pairs", pairs_of),
        map=kernels.Map(maps, strides, maps.shape[2]),
        unit=None if form.unit is None else form.unit.float().contiguous(),
        mean=mean,
        still_mean=still,
        turned=turned,
        frequencies=LEAST if turned is None else turned.inv_freq.shape[0],
        is_grouped=form.groups > 1 or form.middle is not None,
    )


def _turned(turn: Turn, mean: Tensor) -> tuple[Tensor, kernels.Turned]:
    """What does not turn, and what does: padded to a power of two with pairs of no mean."""
    device = mean.device
    first, second = (x.to(device, torch.int64) for x in (turn.first, turn.second))
    room = max(LEAST, triton.next_power_of_2(len(first))) - len(first)
    still = mean.clone()
    still[:, first] = still[:, second] = 0
    inv_freq = pad(turn.inv_freq.to(device).float(), (0, room))
    angles = inv_freq[:, None] * torch.arange(BLOCK, device=device)
    return still, kernels.Turned(
        first=pad(first, (0, room)).int(),
        second=pad(second, (0, room)).int(),
        mean_first=pad(mean[:, first] * turn.scaling, (0, room)),
        mean_second=pad(mean[:, second] * turn.scaling, (0, room)),
        inv_freq=inv_freq,
        cos=angles.cos(),
        sin=angles.sin(),
    )


def _side(form: NibbleForm, fields: Blocks, constants: _Constants) -> kernels.Side:
    scale, middle = fields[form.scale], None if form.middle is None else fields[form.middle]
    pairs = constants.pairs
    return kernels.Side(
        codes=fields["codes"],
        codes_stride=_strides(fields["codes"]),
        scale=scale,
        scale_stride=_strides(scale),
        middle=middle,
        middle_stride=_strides(middle),
        unit=constants.unit,
        sources=pairs.sources,
        tables=pairs.tables,
        coordinates=pairs.coordinates,
        groups=pairs.groups,
        per_head=int(pairs.sources.shape[0] > 1),
    )


def _strides(field: Tensor | None) -> tuple[int, ...]:
    """Of page, head, byte or group, and token."""
    if field is None:
        return (0,) * 4
    page, head, *inner = field.stride()
    return (page, head, *((0,) if len(inner) == 1 else ()), *inner)
