"""encode and encode_grid in C++ (``csrc/encode.inl``, ``csrc/encode/grid.inl``)."""

from __future__ import annotations

from ctypes import c_float
from dataclasses import replace

import torch
from torch import Tensor

from qjl.ops.cpu import library, structs
from qjl.ops.cpu.structs import CPU
from qjl.ops.recipe import (
    DenseMap,
    GridRecipe,
    LevelsPart,
    Map,
    Part,
    Recipe,
    SignsPart,
    TrellisPart,
    Turn,
)
from qjl.packed import BLOCK

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # QjlType
_LEVELS, _TRELLIS, _SIGNS = range(3)  # QjlPartKind


def encode(tokens: Tensor, recipe: Recipe, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    tokens = _readable(tokens)
    if turn is not None:
        turn = replace(turn, cos=turn.cos.contiguous(), sin=turn.sin.contiguous())
    codes = _empty_codes(tokens, sum(part.nibbles for part in recipe.parts) // 2)
    dtype = torch.float16 if recipe.units is None else torch.uint8
    scales = torch.empty((*codes.shape[:3], BLOCK), dtype=dtype, device=CPU)
    operation = structs.Encode(
        codes=structs.Codes.of(codes),
        tokens=_tokens(tokens),
        mean=_mean(recipe.mean, turn),
        map=_map(recipe.map),
        parts=(structs.Part * len(recipe.parts))(*map(_part, recipe.parts)),
        part_count=len(recipe.parts),
        gains=(c_float * len(recipe.gains))(*recipe.gains),
        gain_count=len(recipe.gains),
        weights=_pointer(recipe.weights),
        units=_pointer(recipe.units),
        norm_factor=recipe.norm_factor,
        scales=scales.data_ptr(),
    )
    library.call_in_room("qjl_encode", operation, _room)
    return codes, scales


def encode_grid(tokens: Tensor, recipe: GridRecipe) -> tuple[Tensor, Tensor, Tensor]:
    tokens = _readable(tokens)
    codes = _empty_codes(tokens, tokens.shape[3] * recipe.num_bits // 8)
    steps = torch.empty((*codes.shape[:3], recipe.groups, BLOCK), dtype=torch.float16, device=CPU)
    middles = torch.empty(steps.shape, dtype=torch.float16, device=CPU)
    operation = structs.EncodeGrid(
        codes=structs.Codes.of(codes),
        tokens=_tokens(tokens),
        size=recipe.size,
        groups=recipe.groups,
        bits=recipe.num_bits,
        clip=recipe.clip,
        steps=steps.data_ptr(),
        middles=middles.data_ptr(),
    )
    library.call_in_room("qjl_encode_grid", operation, _room)
    return codes, steps, middles


def _room(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=CPU)


def _readable(tokens: Tensor) -> Tensor:
    """The same numbers, copied where a token's do not lie together or are of another type."""
    if tokens.dtype not in _TYPES:
        tokens = tokens.float()
    return tokens if tokens.stride(3) == 1 else tokens.contiguous()


def _empty_codes(tokens: Tensor, count: int) -> Tensor:
    batch, heads, length, _ = tokens.shape
    return torch.empty((batch, heads, length // BLOCK, count, BLOCK), dtype=torch.uint8, device=CPU)


def _tokens(tokens: Tensor) -> structs.Tokens:
    return structs.Tokens(tokens.data_ptr(), _TYPES[tokens.dtype], tokens.shape[3], *tokens.stride()[:3])


def _mean(vector: Tensor | None, turn: Turn | None) -> structs.Mean:
    if turn is None:
        return structs.Mean(vector=_pointer(vector))
    return structs.Mean(_pointer(vector), turn.cos.data_ptr(), turn.sin.data_ptr(), turn.cos.shape[1], turn.interleaved)


def _map(chosen: Map) -> structs.Map:
    if isinstance(chosen, DenseMap):
        matrix = chosen.matrix
        is_half = matrix.dtype == torch.float16
        return structs.Map(chosen.rows, matrix.data_ptr(), is_half, _head_stride(matrix))
    flips, order = chosen.flips.data_ptr(), chosen.order.data_ptr()
    return structs.Map(rows=chosen.rows, flips=flips, order=order, size=chosen.size)


def _part(part: Part) -> structs.Part:
    if isinstance(part, LevelsPart):
        return structs.Part(
            kind=_LEVELS,
            dim=part.dim,
            nibbles=part.nibbles,
            kind_stride=_head_stride(part.kinds),
            place_stride=_head_stride(part.bit_coordinate),
            **{name: getattr(part, name).data_ptr() for name in ("kinds", "bit_coordinate", "bit_index")},
            **{name: tensor.data_ptr() for name, tensor in vars(part.tables).items()},
        )
    if isinstance(part, TrellisPart):
        own, following = part.own.data_ptr(), part.next.data_ptr()
        width = part.own.shape[1]
        return structs.Part(kind=_TRELLIS, dim=part.dim, nibbles=part.nibbles, own=own, next=following, width=width)
    assert isinstance(part, SignsPart)
    gram = _pointer(part.gram)
    return structs.Part(
        kind=_SIGNS, dim=part.dim, nibbles=part.nibbles, gram=gram, block=part.block, sweeps=part.sweeps
    )


def _head_stride(tensor: Tensor) -> int:
    """Elements from one head to the next; 0 where all share the first."""
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
