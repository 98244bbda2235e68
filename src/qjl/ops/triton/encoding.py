"""encode in Triton: a launch per job and some blocks, from the exact pool straight to pages; two if signs are refined.

Between its phases a program leaves numbers in scratch memory, which only as many blocks as are encoded at once need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from qjl.ops import reference
from qjl.ops.forms import EncodeJob, Rotation, once
from qjl.ops.recipe import GridRecipe, LevelsPart, Map, Part, Recipe, SignsPart, SketchMap, TrellisPart
from qjl.ops.reference import TILE_BLOCKS
from qjl.ops.triton import encoding_kernels as kernels
from qjl.packed import BLOCK

NIBBLE = 4
LEAST = 16  # what a matrix product takes


def encode(jobs: Sequence[EncodeJob], slots: Tensor, first: Tensor, pages: Tensor) -> Tensor:
    """Whether all tokens of each job are finite, ``bool [jobs]``: kernels put that on record as they read."""
    are_finite = torch.ones(len(jobs), dtype=torch.bool, device=slots.device)
    tiles = _tiles(slots.contiguous(), first.contiguous(), pages.contiguous())
    for place, job in enumerate(jobs):
        if job.recipe is None:
            are_finite[place] = reference.encode_by(job.quantize, job, slots, first, pages)
        else:
            for tile in tiles:
                _encode(job, tile, are_finite, place)
    return are_finite


def _tiles(slots: Tensor, first: Tensor, pages: Tensor) -> list[kernels.Targets]:
    """Some blocks each, so that a long prompt takes little room."""
    split = slots.split(TILE_BLOCKS * BLOCK), first.split(TILE_BLOCKS), pages.split(TILE_BLOCKS)
    return [kernels.Targets(*tile) for tile in zip(*split, strict=True)]


def _encode(job: EncodeJob, targets: kernels.Targets, are_finite: Tensor, place: int) -> None:
    if isinstance(job.recipe, GridRecipe):
        _encode_on_grids(job, job.recipe, targets, are_finite, place)
        return
    assert job.recipe is not None
    recipe, rope = job.recipe, job.rope
    plan, tokens = once(recipe, "triton", _plan), _tokens(job)
    room, grid = _room(recipe, job, plan, targets), _grid(job, targets)
    codes, scale = _field(job.fields["codes"]), _field(job.fields["scale"])
    turn = None if rope is None else _turn(rope, job.tokens.device)
    is_interleaved, widths = rope is not None and rope.interleaved, tuple(map(_width, recipe.parts))
    if not any(_is_refined(part) for part in recipe.parts):
        kernels.encode[grid](
            tokens, targets, plan, turn, room, codes, scale, are_finite, place,
            INTERLEAVED=is_interleaved, WIDTHS=widths,
        )  # fmt: skip
        return
    kernels.map_tokens[grid](tokens, targets, plan, turn, room, are_finite, place, INTERLEAVED=is_interleaved)
    plan = _with_refined(plan, recipe, room.mapped)
    kernels.code_tokens[grid](plan, room, targets, codes, scale, tokens.dim, WIDTHS=widths)


def _encode_on_grids(
    job: EncodeJob, recipe: GridRecipe, targets: kernels.Targets, are_finite: Tensor, place: int
) -> None:
    tokens, grid = _tokens(job), _grid(job, targets)
    width = tokens.dim // recipe.groups
    places = _side_by_side(tokens.dim * recipe.num_bits, recipe.num_bits, job.tokens.device)
    widest = max(LEAST, triton.next_power_of_2(width))
    kernels.encode_on_grids[grid](
        tokens, targets, kernels.Grid(recipe.size, recipe.size**-0.5, recipe.clip, recipe.groups, width, places),
        _scratch(job, targets, tokens.dim, torch.float32), _scratch(job, targets, tokens.dim, torch.uint8),
        *(_field(job.fields[name]) for name in ("codes", "step", "middle")), are_finite, place,
        WIDTH=widest, TOP=2**recipe.num_bits - 1, num_warps=8 if widest > 64 else 4,
    )  # fmt: skip


# What kernels read and write


def _grid(job: EncodeJob, targets: kernels.Targets) -> tuple[int, int]:
    """A program for each block of each head."""
    return targets.pages.shape[0], job.tokens.shape[1]


def _tokens(job: EncodeJob) -> kernels.Tokens:
    tokens = job.tokens
    return kernels.Tokens(tokens, tokens.stride(0), tokens.stride(1), tokens.shape[2])


def _field(field: Tensor) -> kernels.Field:
    return kernels.Field(field, field.stride(0), field.stride(1))


def _scratch(job: EncodeJob, targets: kernels.Targets, rows: int, dtype: torch.dtype) -> Tensor:
    """Of each program, so many numbers for each token: ``[H, n, rows, 64]``."""
    blocks, heads = _grid(job, targets)
    return job.tokens.new_empty((heads, blocks, rows, BLOCK), dtype=dtype)


def _room(recipe: Recipe, job: EncodeJob, plan: kernels.Plan, targets: kernels.Targets) -> kernels.Room:
    scratch = partial(_scratch, job, targets)
    many, steps = sum(map(_numbers, recipe.parts)), sum(map(_steps, recipe.parts))
    return kernels.Room(
        centred=scratch(job.tokens.shape[2], torch.float32),
        mapped=scratch(plan.rows, torch.float32),
        numbers=scratch(many, torch.uint8),
        came=scratch(steps * kernels.STATES.value, torch.uint8),
        many=many,
        steps=steps,
    )


# What a recipe is to kernels


def _plan(recipe: Recipe) -> kernels.Plan:
    device = _device(recipe.map)
    return kernels.Plan(
        mean=recipe.mean,
        map=_map(recipe.map),
        rows=recipe.map.rows,
        weights=recipe.weights,
        gains=torch.tensor(recipe.gains, device=device, dtype=torch.float32),
        tried=len(recipe.gains),
        parts=_parts(recipe.parts),
        places=_places(recipe.parts, device),
        units=recipe.units,
        norm_factor=recipe.norm_factor,
    )


def _device(chosen: Map) -> torch.device:
    return (chosen.flips if isinstance(chosen, SketchMap) else chosen.matrix).device


@lru_cache(maxsize=256)
def _turn(rope: Rotation, device: torch.device) -> kernels.Turn:
    """Layers share it."""
    angles = rope.exact_angles(torch.arange(BLOCK, device=device)).T
    cos, sin = ((x * rope.scaling).contiguous() for x in (angles.cos(), angles.sin()))
    return kernels.Turn(rope.inv_freq.to(device).float(), cos, sin, cos.shape[0])


def _map(chosen: Map) -> kernels.Transform:
    if isinstance(chosen, SketchMap):
        return kernels.Transform(None, (0, 0, 0), chosen.flips, chosen.order, chosen.size)
    head = chosen.matrix.stride(0) if chosen.matrix.shape[0] > 1 else 0
    return kernels.Transform(chosen.matrix, (head, *chosen.matrix.stride()[1:]), None, None, 0)


def _parts(parts: Sequence[Part]) -> tuple[kernels.Part, ...]:
    starts = (_starts(size, parts) for size in (_coordinates, _numbers, _steps))
    return tuple(
        kernels.Part(part.dim, first, number, step, _search(part), _points(part), None)
        for part, first, number, step in zip(parts, *starts, strict=True)
    )


def _starts(size: Callable[[Part], int], parts: Sequence[Part]) -> list[int]:
    """Where each part begins, among what each has so many of."""
    return [0, *accumulate(map(size, parts))][:-1]


def _coordinates(part: Part) -> int:
    return part.dim


def _numbers(part: Part) -> int:
    """How many the bits of a part's nibbles are taken from."""
    return part.nibbles if isinstance(part, TrellisPart) else part.dim


def _steps(part: Part) -> int:
    """How many a trellis takes."""
    return part.nibbles if isinstance(part, TrellisPart) else 0


def _width(part: Part) -> int:
    if isinstance(part, LevelsPart):
        return part.widest
    return part.own.shape[1] if isinstance(part, TrellisPart) else 1


def _search(part: Part) -> kernels.Search | None:
    if not isinstance(part, LevelsPart):
        return None
    tables = part.tables
    return kernels.Search(part.kinds, tables.tree, tables.levels, tables.patterns, int(part.kinds.shape[0] > 1))


def _points(part: Part) -> kernels.Points | None:
    if not isinstance(part, TrellisPart):
        return None
    pair_cost = (part.own[None] + part.next[:, None]).square().sum(-1)  # [previous, current]
    return kernels.Points(part.own, pad(part.next, (0, 0, 0, 1)), pair_cost)


def _places(parts: Sequence[Part], device: torch.device) -> kernels.Places:
    """Of the nibbles of all parts, in one stream."""
    of_parts = [_places_of(part, device) for part in parts]
    heads = max(places.number.shape[0] for places in of_parts)
    numbers = [places.number + first for places, first in zip(of_parts, _starts(_numbers, parts), strict=True)]
    number, bit = (
        torch.cat([x.expand(heads, -1, -1) for x in of_all], 1)
        for of_all in (numbers, [places.bit for places in of_parts])
    )
    return kernels.Places(number, bit, int(heads > 1), number.shape[1])


def _places_of(part: Part, device: torch.device) -> kernels.Places:
    if isinstance(part, LevelsPart):
        number, bit = part.bit_coordinate, part.bit_index
        return kernels.Places(number, bit, int(number.shape[0] > 1), part.nibbles)
    if isinstance(part, TrellisPart):
        return _side_by_side(NIBBLE * part.nibbles, NIBBLE, device)
    return _side_by_side(part.dim, 1, device)


@lru_cache(maxsize=64)
def _side_by_side(bits: int, width: int, device: torch.device) -> kernels.Places:
    """Of numbers of ``width`` bits, one after the other."""
    stream = torch.arange(bits, device=device).view(1, -1, NIBBLE)
    return kernels.Places((stream // width).short(), (stream % width).short(), 0, bits // NIBBLE)


# Refined signs


def _is_refined(part: Part) -> bool:
    return isinstance(part, SignsPart) and part.gram is not None


def _with_refined(plan: kernels.Plan, recipe: Recipe, mapped: Tensor) -> kernels.Plan:
    """A plan whose parts know signs that torch refined."""
    parts = (
        made._replace(refined=_refined(mapped[:, :, made.first : made.first + made.dim], part))
        if isinstance(part, SignsPart) and part.gram is not None
        else made
        for made, part in zip(plan.parts, recipe.parts, strict=True)
    )
    return plan._replace(parts=tuple(parts))


def _refined(y: Tensor, part: SignsPart) -> Tensor:
    """The signs of ``SignCode.refined``, of coordinates ``[H, blocks, m, 64]``: products large enough for cuBLAS."""
    assert part.gram is not None
    signs = torch.where(y >= 0, 1.0, -1.0)
    for _ in range(part.sweeps):
        decoded = part.gram @ signs
        c = (y * signs).sum(2, keepdim=True) / (decoded * signs).sum(2, keepdim=True)
        target = y / c.clamp(min=torch.finfo(y.dtype).tiny)
        for first in range(0, part.dim, part.block):
            own = slice(first, first + part.block)
            others = part.gram[own] @ signs - signs[:, :, own]
            signs[:, :, own] = torch.where(target[:, :, own] >= others, 1.0, -1.0)
    return signs
