"""encode in Triton: a few kernels over the new tokens, with numbers between them in scratch memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import triton
from torch import Tensor

from qjl.ops import reference
from qjl.ops.forms import EncodeJob, Rotation
from qjl.ops.recipe import GridRecipe, LevelsPart, Map, Part, Recipe, SignsPart, SketchMap, TrellisPart
from qjl.ops.triton import encoding_kernels as kernels
from qjl.packed import BLOCK, Blocks, block_positions

NIBBLE = 4
LEAST = 16  # what a matrix product takes


def encode(jobs: Sequence[EncodeJob], slots: Tensor, first: Tensor, pages: Tensor) -> Tensor:
    """Whether all tokens of each job are finite, ``bool [jobs]``."""
    return torch.stack([reference.encode_by(_quantizer(job), job, slots, first, pages) for job in jobs])


def _quantizer(job: EncodeJob) -> Callable[[Tensor, Tensor], Blocks]:
    """What takes tokens ``[1, H, T, D]`` and the positions of their blocks ``[1, T / 64]`` to codes."""
    if job.recipe is None:
        return job.quantize
    if isinstance(job.recipe, GridRecipe):
        return partial(_on_grids, job.recipe)
    return partial(_encoded, job.recipe, job.rope)


def _encoded(recipe: Recipe, rope: Rotation | None, tokens: Tensor, first: Tensor) -> Blocks:
    batch, heads, length, dim = tokens.shape
    sites, rows = (batch, heads, length // BLOCK), recipe.map.rows
    grid = sites[2], batch * heads
    mapped = tokens.new_empty((*sites, rows, BLOCK), dtype=torch.float32)
    norms = None if recipe.units is not None else tokens.new_empty((*sites, BLOCK), dtype=torch.float32)
    kernels.transform[(*grid, triton.cdiv(rows, kernels.CHUNK.value))](
        kernels.Rows.of(tokens), _mean(recipe.mean, rope, first), _map(recipe.map), mapped, norms, heads, rows, dim
    )
    sizes = kernels.Sizes(*(torch.empty_like(mapped[:, :, :, 0]) for _ in range(3)))
    kernels.sizes[grid](mapped, recipe.weights, sizes, heads, rows)
    codes = _encode_parts(mapped, recipe, sizes)
    if recipe.units is None:
        scale = mapped.new_empty((*sites, BLOCK), dtype=torch.float16)
        kernels.half_scales[grid](norms, recipe.norm_factor, scale)
    else:
        scale = mapped.new_empty((*sites, BLOCK), dtype=torch.uint8)
        kernels.log_scales[grid](sizes, recipe.units, scale, heads)
    return {"codes": codes, "scale": scale}


def _on_grids(recipe: GridRecipe, tokens: Tensor, first: Tensor) -> Blocks:
    batch, heads, length, dim = tokens.shape
    sites, width = (batch, heads, length // BLOCK), dim // recipe.groups
    numbers = tokens.new_empty((*sites, dim, BLOCK), dtype=torch.uint8)
    steps, middles = (tokens.new_empty((*sites, recipe.groups, BLOCK), dtype=torch.float16) for _ in range(2))
    room = max(LEAST, triton.next_power_of_2(width))
    kernels.grids[(sites[2], batch * heads, recipe.groups)](
        kernels.Rows.of(tokens), numbers, steps, middles, heads, dim, recipe.size, recipe.size**-0.5, recipe.clip,
        width, WIDTH=room, TOP=2**recipe.num_bits - 1, num_warps=8 if room > 64 else 4,
    )  # fmt: skip
    codes = tokens.new_empty((*sites, dim * recipe.num_bits // 8, BLOCK), dtype=torch.uint8)
    _pack(numbers, _side_by_side(dim * recipe.num_bits, recipe.num_bits, tokens.device), codes, 0)
    return {"codes": codes, "step": steps, "middle": middles}


def _mean(vector: Tensor | None, rope: Rotation | None, first: Tensor) -> kernels.Mean | None:
    if vector is None:
        return None
    if rope is None:
        return kernels.Mean(vector, None, None, 0, 0)
    angles = rope.exact_angles(block_positions(first)).transpose(1, 2)
    cos, sin = ((x * rope.scaling).contiguous() for x in (angles.cos(), angles.sin()))
    return kernels.Mean(vector, cos, sin, cos.shape[1], int(rope.interleaved))


def _map(chosen: Map) -> kernels.Transform:
    if isinstance(chosen, SketchMap):
        return kernels.Transform(None, (0, 0, 0), chosen.flips, chosen.order, chosen.size)
    head = chosen.matrix.stride(0) if chosen.matrix.shape[0] > 1 else 0
    return kernels.Transform(chosen.matrix, (head, *chosen.matrix.stride()[1:]), None, None, 0)


def _encode_parts(mapped: Tensor, recipe: Recipe, sizes: kernels.Sizes) -> Tensor:
    count = sum(part.nibbles for part in recipe.parts) // 2
    codes = mapped.new_empty((*mapped.shape[:3], count, BLOCK), dtype=torch.uint8)
    coordinate, byte = 0, 0
    for part in recipe.parts:
        numbers = _numbers(part, mapped, recipe, sizes, coordinate)
        _pack(numbers, _places(part, mapped.device), codes, byte)
        coordinate, byte = coordinate + part.dim, byte + part.nibbles // 2
    return codes


def _numbers(part: Part, mapped: Tensor, recipe: Recipe, sizes: kernels.Sizes, first: int) -> Tensor:
    """What the bits of a part's nibbles are taken from, ``uint8 [B, H, blocks, numbers, 64]``."""
    if isinstance(part, LevelsPart):
        return _levels(part, mapped, recipe, sizes, first)
    if isinstance(part, TrellisPart):
        return _trellis(part, mapped, recipe, sizes, first)
    return _signs(part, mapped, recipe, sizes, first)


def _levels(part: LevelsPart, mapped: Tensor, recipe: Recipe, sizes: kernels.Sizes, first: int) -> Tensor:
    numbers, heads, rows = _room(mapped, part.dim), mapped.shape[1], mapped.shape[3]
    tables, per_head = part.tables, int(part.kinds.shape[0] > 1)
    search = kernels.Search(part.kinds, tables.tree, tables.levels, tables.patterns, per_head)
    kernels.levels[_blocks(mapped)](
        mapped, recipe.weights, sizes, search, _gains(recipe.gains, mapped.device), len(recipe.gains), numbers, heads,
        first, rows, part.dim, DEPTH=part.widest,
    )  # fmt: skip
    return numbers


def _trellis(part: TrellisPart, mapped: Tensor, recipe: Recipe, sizes: kernels.Sizes, first: int) -> Tensor:
    numbers, heads, rows = _room(mapped, part.nibbles), mapped.shape[1], mapped.shape[3]
    came = _room(mapped, part.nibbles * len(part.own))
    kernels.trellis[_blocks(mapped)](
        mapped, recipe.weights, sizes, _points(part), came, numbers, heads, first, rows, part.nibbles,
        WIDTH=part.own.shape[1],
    )  # fmt: skip
    return numbers


def _signs(part: SignsPart, mapped: Tensor, recipe: Recipe, sizes: kernels.Sizes, first: int) -> Tensor:
    numbers, heads, rows = _room(mapped, part.dim), mapped.shape[1], mapped.shape[3]
    refined = None if part.gram is None else _refined(mapped[:, :, :, first : first + part.dim], part)
    kernels.signs[_blocks(mapped)](mapped, recipe.weights, sizes, refined, numbers, heads, first, rows, part.dim)
    return numbers


def _blocks(mapped: Tensor) -> tuple[int, int]:
    """A program for each block of each head."""
    batch, heads, blocks = mapped.shape[:3]
    return blocks, batch * heads


def _room(mapped: Tensor, count: int) -> Tensor:
    """For so many small numbers of each token."""
    return mapped.new_empty((*mapped.shape[:3], count, BLOCK), dtype=torch.uint8)


def _refined(y: Tensor, part: SignsPart) -> Tensor:
    """The signs of ``SignCode.refined``, of coordinates ``[B, H, blocks, m, 64]``: products large enough for cuBLAS."""
    assert part.gram is not None
    signs = torch.where(y >= 0, 1.0, -1.0)
    for _ in range(part.sweeps):
        decoded = part.gram @ signs
        c = (y * signs).sum(3, keepdim=True) / (decoded * signs).sum(3, keepdim=True)
        target = y / c.clamp(min=torch.finfo(y.dtype).tiny)
        for first in range(0, part.dim, part.block):
            own = slice(first, first + part.block)
            others = part.gram[own] @ signs - signs[:, :, :, own]
            signs[:, :, :, own] = torch.where(target[:, :, :, own] >= others, 1.0, -1.0)
    return signs


def _pack(numbers: Tensor, places: kernels.Places, codes: Tensor, first: int) -> None:
    batch, heads, blocks, count, _ = numbers.shape
    nibbles = places.number.shape[1]
    kernels.pack_bits[(blocks, batch * heads, triton.cdiv(nibbles // 2, kernels.CHUNK.value))](
        numbers, places, codes, heads, count, first, nibbles, codes.shape[3]
    )


def _places(part: Part, device: torch.device) -> kernels.Places:
    if isinstance(part, LevelsPart):
        return kernels.Places(part.bit_coordinate, part.bit_index, int(part.bit_coordinate.shape[0] > 1))
    if isinstance(part, TrellisPart):
        return _side_by_side(NIBBLE * part.nibbles, NIBBLE, device)
    return _side_by_side(part.dim, 1, device)


@lru_cache(maxsize=64)
def _side_by_side(bits: int, width: int, device: torch.device) -> kernels.Places:
    """Of numbers of ``width`` bits, one after the other."""
    stream = torch.arange(bits, device=device).view(1, -1, NIBBLE)
    return kernels.Places((stream // width).short(), (stream % width).short(), 0)


@lru_cache(maxsize=64)
def _gains(gains: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(gains, device=device, dtype=torch.float32)


@lru_cache(maxsize=64)
def _points(part: TrellisPart) -> kernels.Points:
    pair_cost = (part.own[None] + part.next[:, None]).square().sum(-1)  # [previous, current]
    return kernels.Points(part.own, torch.nn.functional.pad(part.next, (0, 0, 0, 1)), pair_cost)
