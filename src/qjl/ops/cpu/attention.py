"""The fused decode step in C++ (``csrc/step.inl``)."""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_int64
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.ops import checks
from qjl.ops.cpu import library, structs
from qjl.ops.cpu.quads import mean_energy, quads_of
from qjl.ops.cpu.structs import CPU
from qjl.ops.forms import ExactPool, NibbleForm, Pool, Rows, once, shared_strides
from qjl.packed import BLOCK, Blocks

SPLIT_BLOCKS = 32  # at least, whatever the threads: splitting alike makes results alike
MOST_SPLITS = 32  # of a row, so that room does not grow with the context
SPAN = 4 * BLOCK  # tokens for which the mean is turned at once
ANCHOR = 8  # such turns in float32 follow one in double precision
RANK = 16  # functions that slow frequencies share
TOLERANCE = 3e-4  # of those that stand for slow frequencies, as integers
TABLE_TOP = 1 << 14  # what stands for 1 in tables of functions
INTEGER_TOP = (1 << 15) - 1
COEFFICIENT_TOP, SUM_TOP = 32000, 92000  # of coefficients of a row and part, and of all of them together
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, eq=False)
class _Made:
    """A struct, and the arrays that it points to."""

    struct: Any
    kept: Any


def _packed_part(pool: Pool) -> _Made:
    """What is the same whatever exact tokens and rows there are."""
    keys, values = once(pool.key_form, "side", _constants), once(pool.value_form, "side", _constants)
    step = structs.Step(keys=_side(keys, pool.key_form, pool.keys), values=_side(values, pool.value_form, pool.values))
    step.keys.tolerance = step.values.tolerance = pool.error_budget
    step.page_tokens, step.page_count = pool.page, pool.keys["codes"].shape[0]
    turn = None
    if pool.key_form.turn is not None:
        turn = once(pool.key_form, "turn", _turn)
        step.turn = ctypes.pointer(turn.struct)
    return _Made(step, (keys, values, turn))


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
    """A row's result does not depend on the other rows, nor on threads."""
    query = query.contiguous()
    out = torch.empty((*query.shape[:3], exact.values.shape[2]), dtype=torch.float32, device=CPU)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=CPU)
    step = _grouped_step(query, out, pool, exact, rows, queries)
    step.scaling, step.softcap, step.lse = scaling, softcap, lse.data_ptr()
    if bias is not None:
        step.bias, step.bias_stride = bias.data_ptr(), (c_int64 * 4)(*shared_strides(bias))
    _run(step)
    return out, lse


def score(query: Tensor, pool: Pool, exact: ExactPool, rows: Rows) -> Tensor:
    """``<q, k_hat>`` of packed tokens alone, ``float32 [B, H, R, n P]`` by the places of the table.

    A benchmark's: no cache needs it. What a row does not have holds anything.
    """
    query = query.contiguous()
    scores = torch.empty((*query.shape[:3], rows.table.shape[1] * pool.page), dtype=torch.float32, device=CPU)
    step = _grouped_step(query, query, pool, exact, rows, 1)
    step.scores = scores.data_ptr()
    _run(step)
    return scores


def _grouped_step(query: Tensor, out: Tensor, pool: Pool, exact: ExactPool, rows: Rows, queries: int) -> structs.Step:
    """Of contiguous ``query [B, H, R, D]`` and ``out [B, H, R, Dv]``."""
    batch, heads, count, dim = query.shape
    value_dim = out.shape[3]
    step = structs.Step.from_buffer_copy(_layer(pool, exact).struct)
    step.describe(
        *_NO_FRESH,
        *(once(rows, "struct", _rows).address, batch, count, queries),
        *(_DTYPES[query.dtype], heads * count * dim, queries * dim, dim),
        *(_DTYPES[out.dtype], heads * count * value_dim, queries * value_dim, value_dim),
    )
    step.point(*_room.place, _splits(rows.longest), query.data_ptr(), out.data_ptr(), *_NO_FRESH[:2])
    return step


_NO_FRESH = (0,) * (ctypes.sizeof(structs.Fresh) // 8)


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
    """One call, which copies the fresh tokens, and reads and writes the model's types where they lie.

    What is as it was in a pool's last call is neither asked nor described again.
    """
    form = (
        *(exact, once(rows, "struct", _rows), scaling, softcap),
        *(query.dtype, query.shape, query.stride()),
        *(keys.dtype, keys.device, keys.shape, keys.stride()),
        *(values.dtype, values.device, values.shape, values.stride()),
    )
    plan = pool.derived.pop("plan", None)  # threads that come at once have one each
    if plan is None or plan.form != form:
        checks.require_append(query, keys, values, pool, exact, rows)
        plan = _plan(form, (query, keys, values), pool, exact, rows, scaling, softcap)
    if not plan.takes_all:
        query, keys, values = _readable(query, keys, values, exact)
    out = torch.empty_strided(plan.size, plan.stride, dtype=query.dtype, device=CPU)
    addresses = (query.data_ptr(), out.data_ptr(), keys.data_ptr(), values.data_ptr())
    plan.step.point(*_room.place, _splits(rows.longest), *addresses)
    _run(plan.step)
    pool.derived["plan"] = plan
    return out


@dataclass(frozen=True, eq=False)
class _Plan:
    """A step for operands of one form, ``takes_all`` if it reads them as they are, and how its output lies."""

    form: tuple[Any, ...]
    step: structs.Step
    takes_all: bool
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _plan(
    form: tuple[Any, ...],
    given: tuple[Tensor, Tensor, Tensor],
    pool: Pool,
    exact: ExactPool,
    rows: Rows,
    scaling: float,
    softcap: float,
) -> _Plan:
    query, keys, values = read = _readable(*given, exact)
    batch, heads, queries, _ = query.shape
    dim, kind = values.shape[3], _DTYPES[query.dtype]
    step = structs.Step.from_buffer_copy(_layer(pool, exact).struct)
    stride = (queries * heads * dim, heads * dim, dim, 1)
    step.describe(
        *(0, 0, *keys.stride()[:3], *values.stride()[:3]),
        *(once(rows, "struct", _rows).address, batch, heads // step.heads * queries, queries),
        *(kind, *query.stride()[:3]),
        *(kind, stride[0], stride[2], stride[1]),
    )
    step.scaling, step.softcap = scaling, softcap
    takes_all = all(one is other for one, other in zip(given, read, strict=True))
    return _Plan(form, step, takes_all, (batch, queries, heads, dim), stride)


def _readable(query: Tensor, keys: Tensor, values: Tensor, exact: ExactPool) -> tuple[Tensor, Tensor, Tensor]:
    """The same, fresh tokens in the type of exact ones, copied where the numbers of a token do not lie together."""
    tokens = (query, keys.to(exact.keys.dtype), values.to(exact.keys.dtype))
    query, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in tokens)
    return query, keys, values


def _splits(longest: int) -> int:
    """Of a row, at most."""
    return min(MOST_SPLITS, -(-longest // (SPLIT_BLOCKS * BLOCK)))


def _layer(pool: Pool, exact: ExactPool) -> _Made:
    """A step over two pools, made anew where exact tokens have moved."""
    made = pool.derived.get("step")
    if made is None or made.kept[0] is not exact:
        part = once(pool, "packed part", _packed_part)
        step = structs.Step.from_buffer_copy(part.struct)
        step.heads, step.blocks_per_split, step.exact = exact.keys.shape[1], SPLIT_BLOCKS, _exact(exact)
        made = pool.derived["step"] = _Made(step, (exact, part))
    return made


def _exact(exact: ExactPool) -> structs.Exact:
    keys, values = exact.keys, exact.values
    strides = ((tokens.stride(1), tokens.stride(0)) for tokens in (keys, values))
    return structs.Exact(keys.data_ptr(), values.data_ptr(), *strides, keys.shape[0], _DTYPES[keys.dtype])


@dataclass(frozen=True, eq=False)
class _MadeRows:
    """A struct, and where it lies."""

    struct: structs.Rows
    address: int


def _rows(rows: Rows) -> _MadeRows:
    """Tensors keep their places while their contents change."""
    tensors = (rows.table, rows.lengths, rows.skip, rows.origins, rows.slots, rows.counts)
    struct = structs.Rows(*(x.data_ptr() for x in tensors), rows.table.shape[1], rows.slots.shape[1])
    return _MadeRows(struct, ctypes.addressof(struct))


def _run(step: structs.Step) -> None:
    library.call_in_room("qjl_step", step, _grown_room)


class _Room(threading.local):
    """What a thread keeps from step to step: ``place`` is its address and bytes."""

    held: Tensor | None = None
    place = (0, 0)


_room = _Room()


def _grown_room(nbytes: int) -> Tensor:
    _room.held = room = torch.empty(nbytes, dtype=torch.uint8, device=CPU)
    _room.place = room.data_ptr(), nbytes
    return room


def held_bytes() -> int:
    """Of the room that this thread keeps."""
    return _room.place[1]


def release() -> None:
    """Give that room back."""
    _room.held, _room.place = None, (0, 0)


def _side(constants: _Made, form: NibbleForm, fields: Blocks) -> structs.Side:
    side = structs.Side.from_buffer_copy(constants.struct)
    for place, name in (("codes", "codes"), ("scale", form.scale), ("middle", form.middle)):
        if name is not None:
            field = fields[name]
            setattr(side, place, field.data_ptr())
            strides = (field.stride(1) * field.itemsize, field.stride(0) * field.itemsize)
            setattr(side, f"{place}_stride", (c_int64 * 2)(*strides))
    return side


def _constants(form: NibbleForm) -> _Made:
    """What is the same in all steps."""
    code_heads, nibbles, _, slots = form.entries.shape
    if form.code_dim // form.groups > (most := library.limits().dim):
        raise QJLError(f"a code of {form.code_dim // form.groups} coordinates is not for kernels: use at most {most}.")
    kept: dict[str, Any] = {
        "coordinates": form.coordinates.contiguous(),
        "entries": form.entries.half().transpose(2, 3).contiguous(),
        "quads": quads_of(form) if form.has_shared_code else None,
    }
    side = structs.Side(
        code_stride=int(code_heads > 1), slots=slots, nibbles=nibbles * form.groups, groups=form.groups,
        code_dim=form.code_dim, head_dim=form.code_dim,
    )  # fmt: skip
    side.coordinates, side.entries = kept["coordinates"].data_ptr(), kept["entries"].data_ptr()
    if kept["quads"] is not None:
        side.quads, side.quad_count = kept["quads"].ctypes.data, len(kept["quads"])
        kept["mean_energy"] = mean_energy(form)
        side.mean_energy = None if kept["mean_energy"] is None else kept["mean_energy"].ctypes.data
    if form.map is not None:
        is_shared = form.map.stride(0) == 0 or form.map.shape[0] == 1
        kept["map"] = (form.map[:1] if is_shared else form.map).contiguous()
        side.map, side.map_is_half = kept["map"].data_ptr(), kept["map"].dtype == torch.float16
        side.head_dim = form.map.shape[2]
        side.map_stride = 0 if is_shared else form.map.shape[1] * form.map.shape[2]
    for name in ("unit", "mean"):
        if (tensor := getattr(form, name)) is not None:
            kept[name] = tensor.float().contiguous()
            setattr(side, name, kept[name].data_ptr())
    return _Made(side, kept)


# The mean that RoPE turns


def _turn(form: NibbleForm) -> _Made:
    """Fast frequencies come first, with a table each; the others share a product of two."""
    assert form.turn is not None
    order = np.argsort(-form.turn.inv_freq.double().abs().cpu().numpy(), kind="stable")
    frequencies = form.turn.inv_freq.double().cpu().numpy()[order]
    tables = _tables(frequencies)
    direct = _fast(tables)
    down, shared = _product(tables[:, direct:])
    up = np.concatenate([shared, tables[:, :direct]], axis=1)
    coordinates = np.stack([x.cpu().numpy()[order] for x in (form.turn.first, form.turn.second)])
    arrays = {
        "inv_freq": form.turn.inv_freq.float().cpu().numpy()[order],
        "step": _phasors(SPAN * frequencies).astype(np.float32),
        "anchor_step": _phasors(ANCHOR * SPAN * frequencies),
        "coordinates": coordinates.astype(np.int32),
        "down": _two_by_two(down),
        "up": _two_by_two(up),
        "bounds": np.concatenate([np.full(direct, 1 / COEFFICIENT_TOP), _bounds(down)]).astype(np.float32),
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    pointers = {name: array.ctypes.data for name, array in arrays.items()}
    return _Made(structs.Turn(**pointers, pairs=len(order), direct=direct, scaling=form.turn.scaling), arrays)


def _tables(frequencies: np.ndarray) -> np.ndarray:
    """Cosines and sines ``[2, F, SPAN / 2]`` at the distances from the centre of a span, each block by lanes."""
    distances = np.arange(SPAN // 2).reshape(-1, 4, 4, 4).swapaxes(1, 2).reshape(-1) + 0.5
    return _phasors(frequencies[:, None] * distances)


def _two_by_two(tables: np.ndarray) -> np.ndarray:
    """``[2, F, N]`` as 16-bit integers ``[F / 2, 2, N, 2]``, filled up with zeros."""
    filled = np.pad(tables, ((0, 0), (0, tables.shape[1] % 2), (0, 0)))
    by_twos = filled.reshape(2, -1, 2, tables.shape[2]).transpose(1, 0, 3, 2)
    return (_kept(by_twos) * TABLE_TOP).astype(np.int16)


def _kept(numbers: np.ndarray) -> np.ndarray:
    """As the nearest integers of 16 bits have them."""
    return (numbers * TABLE_TOP).round().clip(-INTEGER_TOP, INTEGER_TOP) / TABLE_TOP


def _phasors(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)])


def _fast(tables: np.ndarray) -> int:
    """How many frequencies need a table of their own, so that the product serves the others."""
    for count in range(0, tables.shape[1], 2):
        down, up = _product(tables[:, count:])
        if np.abs(down @ up - tables[:, count:]).max() < TOLERANCE:
            return count
    return tables.shape[1]


def _product(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[2, F, N]`` as ``[2, F, RANK] @ [2, RANK, N]``: their best approximation, as it is kept."""
    u, s, v = np.linalg.svd(tables, full_matrices=False)
    down, up = np.zeros((*tables.shape[:2], RANK)), np.zeros((2, RANK, tables.shape[2]))
    rank = min(RANK, s.shape[-1])
    largest = np.abs(v[..., :rank, :]).max(axis=-1, keepdims=True)
    down[..., :rank] = u[..., :rank] * (s[..., :rank, None] * largest).swapaxes(-1, -2)
    up[..., :rank, :] = v[..., :rank, :] / largest
    return _kept(down), _kept(up)


def _bounds(down: np.ndarray) -> np.ndarray:
    """What a modulus of 1 of a slow frequency takes, at most, of the range of a coefficient or of their sum."""
    size = np.abs(down).max(axis=0)
    return np.maximum(size.max(axis=-1, initial=0) / COEFFICIENT_TOP, size.sum(axis=-1) / SUM_TOP)
