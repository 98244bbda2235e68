"""encode in C++ (``csrc/encode.inl``, ``csrc/encode/grid.inl``)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_float
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl.ops import reference
from qjl.ops.cpu import library, structs
from qjl.ops.cpu.structs import CPU
from qjl.ops.forms import EncodeJob, once
from qjl.ops.recipe import (
    DenseMap,
    GridRecipe,
    LevelsPart,
    Map,
    Part,
    Recipe,
    SignsPart,
    TrellisPart,
)
from qjl.packed import block_positions

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # QjlType
_LEVELS, _TRELLIS, _SIGNS = range(3)  # QjlPartKind


def encode(jobs: Sequence[EncodeJob], slots: Tensor, first: Tensor, pages: Tensor) -> Tensor:
    """One call for all jobs with a recipe, which gathers tokens as it reads them and writes into the pages."""
    finite: list[Tensor | bool] = [
        job.recipe is not None or reference.encode_by(job.quantize, job, slots, first, pages) for job in jobs
    ]
    of_kernels = [place for place, job in enumerate(jobs) if job.recipe is not None]
    if of_kernels:
        not_finite = _encode([jobs[place] for place in of_kernels], slots.contiguous(), first, pages.contiguous())
        if not_finite >= 0:
            finite[of_kernels[not_finite]] = False
    return torch.tensor(finite, dtype=torch.bool, device=CPU)


def _encode(jobs: Sequence[EncodeJob], slots: Tensor, first: Tensor, pages: Tensor) -> int:
    """The first job with tokens that are not finite, or -1."""
    array, turns = (structs.Job * len(jobs))(), _Turns(first)
    for place, job in enumerate(jobs):
        made = once(job, "struct", _job)
        array[place] = made.struct
        if made.rope is not None:
            array[place].cos, array[place].sin = turns.of(job, made.rope)
    operation = structs.Encode(array, len(jobs), slots.data_ptr(), pages.data_ptr(), len(pages), -1)
    library.call_in_room("qjl_encode", operation, _room)
    return operation.not_finite


@dataclass(frozen=True, eq=False)
class _MadeJob:
    """A job's struct, that it points to, and what tells its RoPE from others where its mean turns."""

    struct: structs.Job
    operation: structs.Recipe | structs.GridRecipe
    rope: tuple[bytes, float, bool] | None


def _job(job: EncodeJob) -> _MadeJob:
    fields, tokens, recipe = job.fields, job.tokens, job.recipe
    assert recipe is not None
    codes = fields["codes"]
    heads, dim = tokens.shape[1:]
    target = structs.Codes(
        codes.data_ptr(), 1, heads, codes.shape[0], codes.shape[2], 0, codes.stride(1), codes.stride(0)
    )
    source = structs.Tokens(
        tokens.data_ptr(), _TYPES[tokens.dtype], dim, tokens.stride(1), tokens.stride(0), tokens.shape[0]
    )
    if isinstance(recipe, GridRecipe):
        grid = _grid_encoder(recipe)
        grid.codes, grid.tokens = target, source
        grid.steps, grid.step_stride = fields["step"].data_ptr(), _page_strides(fields["step"])
        grid.middles, grid.middle_stride = fields["middle"].data_ptr(), _page_strides(fields["middle"])
        return _MadeJob(structs.Job(grid=addressof(grid)), grid, None)
    encoder = _encoder(recipe)
    encoder.codes, encoder.tokens, encoder.mean = target, source, structs.Mean(vector=_pointer(recipe.mean))
    encoder.scales, encoder.scale_stride = fields["scale"].data_ptr(), _page_strides(fields["scale"])
    rope = None if recipe.mean is None else job.rope
    if rope is None:
        return _MadeJob(structs.Job(recipe=addressof(encoder)), encoder, None)
    encoder.mean.pairs, encoder.mean.interleaved = rope.inv_freq.shape[0], rope.interleaved
    key = (rope.inv_freq.cpu().numpy().tobytes(), rope.scaling, rope.interleaved)
    return _MadeJob(structs.Job(recipe=addressof(encoder)), encoder, key)


def _page_strides(field: Tensor) -> tuple[int, int]:
    """Over head and page."""
    return field.stride(1), field.stride(0)


class _Turns:
    """Cosines and sines of every RoPE for the tokens of some blocks, which jobs share."""

    def __init__(self, first: Tensor) -> None:
        self._positions = block_positions(first[None])
        self._made: dict[tuple[bytes, float, bool], tuple[Tensor, Tensor]] = {}

    def of(self, job: EncodeJob, key: tuple[bytes, float, bool]) -> tuple[int, int]:
        """Where they lie, ``float32 [F, n * 64]`` each."""
        if key not in self._made:
            assert job.rope is not None
            angles, scaling = job.rope.exact_angles(self._positions).transpose(1, 2).contiguous(), job.rope.scaling
            self._made[key] = angles.cos().mul_(scaling), angles.sin().mul_(scaling)
        cos, sin = self._made[key]
        return cos.data_ptr(), sin.data_ptr()


def _encoder(recipe: Recipe) -> structs.Recipe:
    """What a recipe does, whatever the tokens."""
    return structs.Recipe(
        map=_map(recipe.map),
        parts=(structs.Part * len(recipe.parts))(*map(_part, recipe.parts)),
        part_count=len(recipe.parts),
        gains=(c_float * len(recipe.gains))(*recipe.gains),
        gain_count=len(recipe.gains),
        weights=_pointer(recipe.weights),
        units=_pointer(recipe.units),
        norm_factor=recipe.norm_factor,
    )


def _grid_encoder(recipe: GridRecipe) -> structs.GridRecipe:
    return structs.GridRecipe(size=recipe.size, groups=recipe.groups, bits=recipe.num_bits, clip=recipe.clip)


def _room(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=CPU)


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
