"""What operands must hold, asked before a kernel sees them: kernels read where shapes say, and nothing warns them.

What stays the same is asked once for each form, pool and ``Rows``, so that a step compares a few shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.ops.forms import EncodeJob, ExactPool, NibbleForm, Pool, Rows, once
from qjl.ops.recipe import GridRecipe, Recipe
from qjl.packed import BLOCK, Blocks, require_tensor

READABLE = (torch.float32, torch.bfloat16, torch.float16)


def require(holds: bool, what: str) -> None:
    """Raises QJLError that tells what should hold."""
    if not holds:
        raise QJLError(f"{what}.")


def require_shape(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raises QJLError unless the tensor has this shape."""
    if tensor.shape != shape:
        raise QJLError(f"{what} should be {list(shape)}, not {list(tensor.shape)}.")


# Encoding


def _require_grid(recipe: GridRecipe, dim: int) -> None:
    divides = recipe.groups > 0 and dim % recipe.groups == 0 and dim % recipe.size == 0
    require(divides and dim * recipe.num_bits % 8 == 0, f"the grids do not divide head_dim {dim} into whole bytes")


def require_pages(jobs: Sequence[EncodeJob], slots: Tensor, first: Tensor, pages: Tensor) -> None:
    """Slots, positions and pages of as many blocks, and jobs whose pools fit their recipes."""
    blocks = pages.shape[0]
    require_tensor(slots, (blocks * BLOCK,), torch.int32, "slots of blocks to encode")
    require_tensor(first, (blocks,), torch.int64, "positions of blocks to encode")
    require_tensor(pages, (blocks,), torch.int32, "pages for blocks to encode")
    for job in jobs:
        once(job, "fits", _require_job)


def _require_job(job: EncodeJob) -> bool:
    """True, so that it is known."""
    tokens, recipe = job.tokens, job.recipe
    require(tokens.dim() == 3 and tokens.is_floating_point(), f"{job.what} should be floats [slots, H, D]")
    if recipe is None:
        return True
    heads, dim = tokens.shape[1:]
    codes = job.fields["codes"]
    fits = tokens.dtype in READABLE and tokens.stride(2) == 1
    require(fits, f"{job.what} should be float32, bfloat16 or float16 that lie side by side")
    if job.rope is not None:
        pairs = job.rope.inv_freq.shape[0]
        require(2 * pairs <= dim, f"a mean of dimension {dim} cannot turn in {pairs} pairs")
    constants: dict[str, tuple[tuple[int, ...], torch.dtype]]
    if isinstance(recipe, Recipe):
        require(recipe.takes(heads, dim), f"the recipe is not for {heads} heads of dimension {dim}")
        count = sum(part.nibbles for part in recipe.parts) // 2
        constants = {"scale": ((), torch.float16 if recipe.units is None else torch.uint8)}
    else:
        _require_grid(recipe, dim)
        count = dim * recipe.num_bits // 8
        constants = dict.fromkeys(("step", "middle"), ((recipe.groups,), torch.float16))
    require_tensor(codes, (codes.shape[0], heads, count, BLOCK), torch.uint8, f"codes of {job.what}")
    for name, (inner, dtype) in constants.items():
        require_tensor(job.fields[name], (codes.shape[0], heads, *inner, BLOCK), dtype, f"{name} of {job.what}")
    for field in job.fields.values():
        require(not field.numel() or field[0, 0].is_contiguous(), f"a page of {job.what} should lie together in memory")
    return True


# Decoding


def require_decodable(blocks: Blocks, form: NibbleForm, first: Tensor) -> None:
    """Blocks ``[B, H, n, *shape]`` of this form, and a position for each."""
    codes = blocks["codes"]
    require(codes.dim() == 5, "codes of packed tokens should be [B, H, n, bytes, 64]")
    batch, heads, count = codes.shape[:3]
    require_tensor(first, (batch, count), torch.int64, "positions of blocks to decode")
    _require_fields(form, blocks, (batch, heads, count), BLOCK)
    once(form, f"head_dim of {heads}", partial(_head_dim, heads))


# The fused decode step


class _Sizes(NamedTuple):
    heads: int
    key_dim: int
    value_dim: int


def require_fit(pool: Pool, exact: ExactPool, rows: Rows) -> _Sizes:
    """Sizes of pools and rows that fit each other.

    Raises:
        QJLError: if they do not.
    """
    sizes, of_exact = once(pool, "sizes", _sizes), once(exact, "sizes", _exact_sizes)
    if sizes != of_exact:
        raise QJLError(f"exact tokens have heads and dimensions {list(of_exact)}, packed ones {list(sizes)}.")
    once(rows, "fits", _require_rows)
    return sizes


def require_step(
    query: Tensor, pool: Pool, exact: ExactPool, rows: Rows, queries: int, bias: Tensor | None
) -> Tensor | None:
    """The bias as float32, where all fits.

    Raises:
        QJLError: if an operand of ``attend`` has another shape or type.
    """
    sizes = require_fit(pool, exact, rows)
    batch, count = rows.batch, query.shape[-2]
    require_shape(query, (batch, sizes.heads, count, sizes.key_dim), "queries")
    _require_readable(query, "queries")
    if queries <= 0 or count % queries:
        raise QJLError(f"{count} query rows are no multiple of {queries} queries.")
    if bias is None:
        return None
    columns = rows.table.shape[1] * pool.page + rows.slots.shape[1]
    return _readable_bias(bias, (batch, sizes.heads * count // queries, queries, columns))


def require_append(query: Tensor, keys: Tensor, values: Tensor, pool: Pool, exact: ExactPool, rows: Rows) -> None:
    """What ``append_attend`` takes.

    Raises:
        QJLError: if an operand has another shape or type.
    """
    heads, key_dim, value_dim = require_fit(pool, exact, rows)
    batch, query_heads, queries, dim = query.shape
    if query_heads % heads or dim != key_dim or batch != rows.batch:
        raise QJLError(
            f"queries should be {[rows.batch, f'a multiple of {heads}', queries, key_dim]}, not {list(query.shape)}."
        )
    require_shape(keys, (batch, heads, queries, key_dim), "fresh keys")
    require_shape(values, (batch, heads, queries, value_dim), "fresh values")
    for tensor, what in ((query, "queries"), (keys, "fresh keys"), (values, "fresh values")):
        if tensor.dtype not in READABLE:
            _require_readable(tensor, what)


def _require_readable(tensor: Tensor, what: str) -> None:
    require(tensor.dtype in READABLE, f"{what} should be float32, bfloat16 or float16, not {tensor.dtype}")


def _exact_sizes(exact: ExactPool) -> tuple[int, int, int]:
    keys, values = exact.keys, exact.values
    require(keys.dim() == values.dim() == 3, "exact tokens should be [slots, H, D]")
    require_shape(values, (*keys.shape[:2], values.shape[2]), "values of exact tokens")
    require(keys.dtype == values.dtype, "exact keys and values should be of one type")
    _require_readable(keys, "exact tokens")
    require(keys.stride(2) == values.stride(2) == 1, "the numbers of an exact token should lie side by side")
    return keys.shape[1], keys.shape[2], values.shape[2]


def _require_rows(rows: Rows) -> bool:
    """True, so that it is known."""
    batch = rows.batch
    for name, shape, dtype in (
        ("table", (batch, rows.table.shape[-1]), torch.int32),
        ("lengths", (batch,), torch.int32),
        ("skip", (batch,), torch.int32),
        ("origins", (batch,), torch.int64),
        ("slots", (batch, rows.slots.shape[-1]), torch.int32),
        ("counts", (batch,), torch.int32),
    ):
        tensor = getattr(rows, name)
        require_tensor(tensor, shape, dtype, f"{name} of rows")
        require(tensor.is_contiguous(), f"{name} of rows should be contiguous")
    return True


def _readable_bias(bias: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``[B, Hq, Q, columns]``, any of the first three 1 where one serves all, as float32."""
    fits = bias.dim() == 4 and bias.shape[3] == sizes[3]
    if not fits or any(one not in (1, most) for one, most in zip(bias.shape, sizes, strict=True)):
        raise QJLError(f"a bias should be {list(sizes)}, or 1 where one serves all, not {list(bias.shape)}.")
    return bias if bias.dtype == torch.float32 else bias.float()


def _sizes(pool: Pool) -> _Sizes:
    """Of pages that fit their forms."""
    codes = pool.keys["codes"]
    outer = tuple(codes.shape[:2])
    for form, fields in ((pool.key_form, pool.keys), (pool.value_form, pool.values)):
        _require_fields(form, fields, outer, codes.shape[-1])
    key_dim, value_dim = (
        once(form, f"head_dim of {outer[1]}", partial(_head_dim, outer[1])) for form in (pool.key_form, pool.value_form)
    )
    return _Sizes(outer[1], key_dim, value_dim)


def _require_fields(form: NibbleForm, blocks: Blocks, outer: tuple[int, ...], tokens: int) -> None:
    constants = (form.groups, tokens)
    fields = {"codes": ((form.entries.shape[1] * form.groups // 2, tokens), torch.uint8)}
    fields[form.scale] = (constants, torch.float16 if form.unit is None else torch.uint8)
    if form.middle is not None:
        fields[form.middle] = (constants, torch.float16)
    for name, (inner, dtype) in fields.items():
        field = blocks[name]
        shape = tuple(field.shape)
        if name != "codes" and form.groups == 1 and field.dim() == len(outer) + 1:  # without a dimension for one group
            shape = (*shape[:-1], 1, shape[-1])
        require(
            shape == (*outer, *inner) and field.dtype == dtype,
            f"{name} of packed tokens should be {dtype} {[*outer, *inner]}, not {field.dtype} {list(field.shape)}",
        )
        lies = field[(0,) * len(outer)] if 0 not in shape else field
        require(lies.is_contiguous(), f"{name} of a block should lie together in memory")


def _head_dim(heads: int, form: NibbleForm) -> int:
    """Of the tokens that this form decodes to, all of whose parts fit each other."""
    code_heads, nibbles, entries, slots = form.entries.shape
    require(code_heads in (1, heads) and entries == 16 and nibbles % 2 == 0, "a form has codes for 1 or all heads")
    require(form.groups > 0 and form.code_dim % form.groups == 0, "the groups of a form should divide its coordinates")
    require_shape(form.coordinates, (code_heads, nibbles, slots), "coordinates of a form")
    if form.coordinates.numel():
        least, most = (int(x) for x in form.coordinates.aminmax())
        fits = least >= 0 and most < form.code_dim // form.groups
        require(fits, f"a form of {form.code_dim // form.groups} coordinates adds to those from {least} to {most}")
    head_dim = form.code_dim
    if form.map is not None:
        head_dim = form.map.shape[2]
        require_shape(form.map, (heads if form.map.shape[0] > 1 else 1, form.code_dim, head_dim), "the map of a form")
        require(form.map.dtype in (torch.float16, torch.float32), "the map of a form should be float16 or float32")
    if form.unit is not None:
        require(form.unit.numel() == heads, "a form has a unit for each head")
    if form.mean is not None:
        require_shape(form.mean, (heads, head_dim), "the mean of a form")
    if form.turn is not None:
        _require_turn(form, head_dim)
    return head_dim


def _require_turn(form: NibbleForm, head_dim: int) -> None:
    turn = form.turn
    assert turn is not None
    require(form.mean is not None, "a form without a mean has nothing to turn")
    for places in (turn.first, turn.second):
        require_shape(places, turn.inv_freq.shape, "coordinates of the pairs that turn")
        fits = not places.numel() or (int(places.min()) >= 0 and int(places.max()) < head_dim)
        require(fits, f"a mean of dimension {head_dim} turns by coordinates beside it")
