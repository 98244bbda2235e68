"""The decode step in Triton for forms with a scale per token: two launches, on integer tensor cores (``slots``).

Its workspace depends on batch, heads, query rows and the capacity of the tables, and it waits for nothing: lengths and
counts are read on the device, so that a captured CUDA graph serves all of them up to that capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from qjl.modes import in_own_precision
from qjl.ops import checks
from qjl.ops.forms import ExactPool, NibbleForm, Pool, Rows, Turn, once, shared_strides
from qjl.ops.triton import runtime
from qjl.ops.triton import step_kernels as kernels
from qjl.ops.triton.slots import WORDS, KeyWords, ValueTables, key_words, room_of, value_tables
from qjl.packed import BLOCK

CHUNK, DIMS, FUNCTIONS = kernels.BLOCKS.value, kernels.DIMS.value, kernels.FUNCTIONS.value
MOST_WORDS = 64
MOST_TABLES = 8
MOST_SUMS = 4096  # by four query rows: what a program's registers hold
FEW_ROWS, MANY_ROWS = 4, 8  # query rows of a program
REGISTERS = ((1024, 128), (2048, 168))  # of a thread, for so many sums of a program at most
MOST_REGISTERS = 255
FILE = 65536 // 32  # registers of a processor, for each thread of a warp
LEAST_UNITS = 4  # of a program
LOG2_E = 1.4426950408889634
TOP = 16000  # what stands for the largest number of a function
MOST_LEFT = 1e-4  # of a cosine or sine, that the functions of a block may not hold


def serves(pool: Pool) -> bool:
    """Whether these kernels have the forms of a pool: no groups, few tables, and a mean that turns as RoPE turns it."""
    return once(pool, "triton step", _sides) is not None


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
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    step = _Step(by_head(query, queries), pool, exact, rows, queries, scaling, softcap, bias)
    step.run(by_head(out, queries), lse, None)
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
    """Reads and writes the model's types where they lie."""
    checks.require_append(query, keys, values, pool, exact, rows)
    batch, query_heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, query_heads, exact.values.shape[2]))
    step = _Step(query, pool, exact, rows, queries, scaling, softcap, None)
    step.run(out.transpose(1, 2), None, kernels.Fresh(keys, keys.stride(), values, values.stride()))
    return out


def by_head(x: Tensor, queries: int) -> Tensor:
    """``[B, H, R, D] -> [B, Hq, Q, D]``."""
    return x.unflatten(2, (-1, queries)).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _Step:
    """One step of ``query [B, Hq, Q, D]``."""

    query: Tensor
    pool: Pool
    exact: ExactPool
    rows: Rows
    queries: int
    scaling: float
    softcap: float
    bias: Tensor | None

    def run(self, out: Tensor, lse: Tensor | None, fresh: kernels.Fresh | None) -> None:
        """Leave what comes out in ``[B, Hq, Q, Dv]``, and the log-sum-exps in ``float32 [B, H, R]``."""
        sides, rows, exact = self.sides, _rows(self.rows), _exact(self.exact)
        batch, heads, count = self.query.shape[0], self.exact.keys.shape[1], self.count
        if not batch * heads * count:
            return
        shares, asked, parts = self._shares(), self._asked(), self._parts()
        query = kernels.ByQuery(self.query, self.query.stride())
        scale = self.scaling if self.softcap else self.scaling * LOG2_E
        turned = sides.turned
        kernels.prepare[(self.places, 1 + (0 if turned is None else _ceil(self.blocks, CHUNK)))](
            query, sides.keys, sides.key_map, sides.still_mean, turned, asked, shares, exact, fresh, rows, batch, heads,
            count, self.queries, self.blocks, scale, R=self.tile, W=sides.words,
            F=DIMS if turned is None else turned.inv_freq.shape[0],
            DIM=_next_power_of_2(max(exact.key_dim, exact.value_dim)), num_warps=1, num_stages=1,
        )  # fmt: skip
        added = None if self.bias is None else kernels.ByQuery(self.bias, shared_strides(self.bias))
        kernels.step[(self.programs,)](
            query, sides.keys, sides.values, sides.value_map, sides.value_mean,
            None if turned is None else turned.functions, asked, shares, exact, rows, added, parts,
            kernels.ByQuery(out, out.stride()), lse, batch, heads, count, self.queries, self.blocks, scale,
            self.softcap or None, 1, R=self.tile, W=sides.words, **sides.runs, PAGE=self.pool.page,
            PRECISION=precision(self.exact.keys.dtype == torch.bfloat16), num_warps=1, num_stages=1,
            maxnreg=self.registers,
        )  # fmt: skip

    @cached_property
    def sides(self) -> _Sides:
        return once(self.pool, "triton step", _sides)

    @cached_property
    def count(self) -> int:
        """Query rows of a KV head."""
        return self.query.shape[1] // self.exact.keys.shape[1] * self.queries

    @cached_property
    def tile(self) -> int:
        """Those that a program takes."""
        return FEW_ROWS if self.count <= FEW_ROWS or 2 * self.sides.sums > MOST_SUMS else MANY_ROWS

    @cached_property
    def tiles(self) -> int:
        return _ceil(self.count, self.tile)

    @cached_property
    def places(self) -> int:
        """Tiles of query rows, of all KV heads."""
        return self.query.shape[0] * self.exact.keys.shape[1] * self.tiles

    @cached_property
    def blocks(self) -> int:
        """Of packed tokens that there is room for in a row of the table."""
        return _ceil(self.rows.table.shape[1] * self.pool.page, BLOCK)

    @property
    def registers(self) -> int:
        """Of a thread: with few of them more programs share a processor, and some of what is seldom used is spilled."""
        sums = self.sides.sums * self.tile
        return next((registers for most, registers in REGISTERS if sums <= most), MOST_REGISTERS)

    @cached_property
    def programs(self) -> int:
        wanted = _ceil(self.places * (self.blocks + 1), LEAST_UNITS)
        return max(1, min(wanted, runtime.processors(self.query.device) * (FILE // self.registers)))

    def _empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.query.new_empty(size, dtype=dtype)

    def _shares(self) -> kernels.Shares:
        begins = self._empty(self.query.shape[0] + 1, dtype=torch.int64)
        tickets = self._empty(2 * self.programs + self.places, dtype=torch.int32)
        return kernels.Shares(begins, tickets, self.tiles, kernels.coded(self.programs))

    def _asked(self) -> kernels.Asked:
        sides, places, tile, words = self.sides, self.places, self.tile, self.sides.words
        has_turn = sides.turned is not None
        return kernels.Asked(
            mapped=self._empty(places, tile, 16 * words),
            digits=self._empty(places, words // WORDS, 2, 2 * tile, 8, dtype=torch.int32),
            offsets=self._empty(places, 2 * tile, dtype=torch.int32),
            factors=self._empty(places, tile),
            rest=self._empty(places, tile),
            means=self._empty(places, self.blocks, 2 * tile, FUNCTIONS // 4, dtype=torch.int32) if has_turn else None,
            mean_factors=self._empty(places, self.blocks, tile) if has_turn else None,
        )

    def _parts(self) -> kernels.Parts:
        slots, places, tile = 2 * self.programs, self.places, self.tile
        return kernels.Parts(
            sums=self._empty(slots, self.sides.sums, tile),
            lse=self._empty(slots, tile),
            scores=self._empty(places, tile, max(1, self.rows.slots.shape[1])),
            out=self._empty(places, tile, self.exact.values.shape[2]),
            exact_lse=self._empty(places, tile),
        )


def _ceil(number: int, step: int) -> int:
    """Steps that cover a number; Triton's own takes microseconds."""
    return -(-number // step)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def precision(is_bfloat16: bool) -> str:
    """How exact tokens are multiplied on tensor cores, with 16 or 21 bits of each; the interpreter knows the latter."""
    return "bf16x3" if is_bfloat16 and not runtime.is_interpreted() else "tf32x3"


def _rows(rows: Rows) -> kernels.Rows:
    return once(rows, "triton rows", _made_rows)


def _made_rows(rows: Rows) -> kernels.Rows:
    capacity, room = (kernels.coded(table.shape[1]) for table in (rows.table, rows.slots))
    return kernels.Rows(rows.table, capacity, rows.lengths, rows.skip, rows.origins, rows.slots, room, rows.counts)


def _exact(exact: ExactPool) -> kernels.Exact:
    keys, values = exact.keys, exact.values
    return kernels.Exact(keys, keys.stride(), keys.shape[2], values, values.stride(), values.shape[2])


# What is the same in all steps of a pool


@dataclass(frozen=True, eq=False)
class _Sides:
    """Both sides of a pool as kernels read them. ``still_mean [H, D]`` is the keys' without what turns."""

    keys: kernels.Keys
    values: kernels.Values
    key_map: kernels.Map
    value_map: kernels.Map
    still_mean: Tensor | None
    turned: kernels.Turned | None
    value_mean: Tensor | None
    words: int
    sums: int
    runs: dict[str, int | tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _KeyConstants:
    words: KeyWords | None
    map: kernels.Map
    unit: Tensor | None
    still_mean: Tensor | None
    turned: kernels.Turned | None


@dataclass(frozen=True, eq=False)
class _ValueConstants:
    tables: ValueTables | None
    map: kernels.Map
    unit: Tensor | None
    mean: Tensor | None


def _sides(pool: Pool) -> _Sides | None:
    keys = once(pool.key_form, "triton keys", _key_constants)
    values = once(pool.value_form, "triton values", _value_constants)
    of_keys = _fields(pool.keys["codes"], pool.keys[pool.key_form.scale])
    of_values = _fields(pool.values["codes"], pool.values[pool.value_form.scale])
    if keys.words is None or values.tables is None or of_keys is None or of_values is None:
        return None
    words, tables = keys.words, values.tables
    rooms = tuple(room_of(run.rows) for run in tables.runs)
    of_runs = [2 * run.planes * room for run, room in zip(tables.runs, rooms, strict=True)]
    sums = sum(of_runs)
    if words.words > MOST_WORDS or sums > MOST_SUMS:
        return None
    return _Sides(
        keys=kernels.Keys(
            *of_keys, keys.unit, words.rows * of_keys[1][2], words.tables, words.coordinates, words.factors,
            _per_head(words.rows),
        ),
        values=kernels.Values(
            *of_values, values.unit, tuple(run.tables for run in tables.runs), tables.places, tables.weights,
            _per_head(tables.places),
        ),
        key_map=keys.map, value_map=values.map, still_mean=keys.still_mean, turned=keys.turned, value_mean=values.mean,
        words=words.words, sums=sums,
        runs={
            "FIRST": tuple(run.first for run in tables.runs), "ROWS": tuple(run.rows for run in tables.runs),
            "ROOM": rooms, "PLANES": tuple(run.planes for run in tables.runs),
            "BEGIN": tuple(sum(of_runs[:i]) for i in range(len(of_runs))), "SUMS": sums,
            "SOURCES": tables.places.shape[1],
            "KEY_BYTES": _bytes_of_page(pool.keys["codes"]), "VALUE_BYTES": _bytes_of_page(pool.values["codes"]),
        },
    )  # fmt: skip


def _bytes_of_page(codes: Tensor) -> int:
    """Of one head, from the first to the last."""
    return (codes.shape[2] - 1) * codes.stride(2) + codes.shape[3]


def _per_head(tensor: Tensor) -> int:
    return int(tensor.shape[0] > 1)


def _fields(codes: Tensor, scale: Tensor) -> tuple[Tensor, tuple[int, ...], Tensor, tuple[int, ...]] | None:
    """Codes and scales as words of 4 bytes, with their strides; None where they do not lie so."""
    if not (_is_of_words(codes, 2) and _is_of_words(scale, 2 * scale.itemsize)):
        return None
    of_codes, of_scale = codes.view(torch.int32), scale.view(torch.int32)
    return of_codes, of_codes.stride()[:3], of_scale, of_scale.stride()[:2]


def _is_of_words(field: Tensor, count: int) -> bool:
    """Whether so many words of a token minor field can be read at once."""
    places = (field.storage_offset(), field.shape[-1], *field.stride()[:-1])
    return field.stride(-1) == 1 and not any(place * field.itemsize % (4 * count) for place in places)


def _is_simple(form: NibbleForm) -> bool:
    """Whether a token has one scale and no middle."""
    return form.groups == 1 and form.middle is None


def _key_constants(form: NibbleForm) -> _KeyConstants:
    mean = None if form.mean is None else form.mean.float().contiguous()
    turned, left = None, 0.0
    if form.turn is not None and mean is not None:
        mean, turned, left = _turned(form.turn, mean)
    words = key_words(form) if _is_simple(form) and left <= MOST_LEFT else None
    return _KeyConstants(words, _map(form), _unit(form), mean, turned)


def _value_constants(form: NibbleForm) -> _ValueConstants:
    tables = value_tables(form, MOST_TABLES) if _is_simple(form) else None
    return _ValueConstants(
        tables, _map(form), _unit(form), None if form.mean is None else form.mean.float().contiguous()
    )


def _unit(form: NibbleForm) -> Tensor | None:
    return None if form.unit is None else form.unit.float().contiguous()


def _map(form: NibbleForm) -> kernels.Map:
    maps = form.map
    if maps is None:
        maps = torch.eye(form.code_dim, device=form.entries.device, dtype=torch.float32)[None]
    strides = (maps.stride(0) if maps.shape[0] > 1 else 0, *maps.stride()[1:])
    return kernels.Map(maps, strides, maps.shape[1], maps.shape[2])


def _turned(turn: Turn, mean: Tensor) -> tuple[Tensor, kernels.Turned, float]:
    """What does not turn, and what does, padded to whole chunks with pairs of no mean; how far off a turn may be."""
    device = mean.device
    first, second = (x.to(device, torch.int64) for x in (turn.first, turn.second))
    room = -len(first) % DIMS
    still = mean.clone()
    still[:, first] = still[:, second] = 0
    inv_freq = pad(turn.inv_freq.double().cpu(), (0, room))
    down, functions, left = _functions(inv_freq.numpy())
    turned = kernels.Turned(
        first=pad(first, (0, room)).int(),
        second=pad(second, (0, room)).int(),
        mean_first=pad(mean[:, first] * turn.scaling, (0, room)),
        mean_second=pad(mean[:, second] * turn.scaling, (0, room)),
        inv_freq=(inv_freq / (2 * np.pi)).to(device),
        down=torch.from_numpy(down).to(device),
        functions=torch.from_numpy(functions).to(device),
    )
    return still, turned, left


def _functions(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Functions whose sums are cos and sin of all frequencies at the tokens of a block: how these are made of them,
    ``float32 [2 F, 32]``, they in two digits, ``int32 [2, 64, 8]`` by phase and word, and what they may be off: far
    below 1e-6 for the frequencies of RoPE, all of it for as many that lie evenly."""
    angles = frequencies[:, None] * np.arange(BLOCK)
    left, sizes, right = np.linalg.svd(np.concatenate([np.cos(angles), np.sin(angles)]), full_matrices=False)
    rank = min(FUNCTIONS, len(sizes))
    shared = right[:rank] / np.abs(right[:rank]).max(1, keepdims=True)
    down = left[:, :rank] * sizes[:rank] * np.abs(right[:rank]).max(1)
    whole = np.zeros((BLOCK, FUNCTIONS), np.int64)
    whole[:, :rank] = np.rint(shared.T * TOP)
    tiled = whole.reshape(BLOCK // 8, 2, 4, FUNCTIONS).transpose(2, 1, 0, 3)
    placed = tiled.reshape(BLOCK, 2, 4, 4).swapaxes(1, 2).reshape(BLOCK, FUNCTIONS)  # halves, words and bytes of words
    high = (placed + 64) >> 7
    digits = np.stack([high, placed - 128 * high]).astype(np.int8)
    made_of = np.pad(down, ((0, 0), (0, FUNCTIONS - rank))).astype(np.float32)
    return made_of, np.ascontiguousarray(digits).view(np.int32), float(sizes[rank:].sum())
