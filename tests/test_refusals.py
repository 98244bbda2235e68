"""No size overruns anything in C: what does not fit is refused, by Python before the call and by the library itself."""

import ctypes
from dataclasses import replace

import pytest
import torch

from budget import assert_within_budget
from pages import Extent, expected, operands, paged
from qjl import ops
from qjl.methods.uniform import TokenUniform
from qjl.ops.cpu import attention, library, structs
from qjl.ops.forms import Derived, EncodeJob, NibbleForm
from qjl.ops.recipe import DenseMap, GridRecipe, Recipe, SignsPart
from qjl.packed import BLOCK
from qjl.presets import PRESETS
from qjl.rope import Rope

pytestmark = pytest.mark.skipif(not library.is_installed(), reason="the kernels were not compiled")


@pytest.fixture
def step(generator):
    made = operands(PRESETS["b3"].key, PRESETS["b3"].value)
    return paged(made, 64, Extent.of([300]), generator)


# Many groups: what crashed


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(("head_dim", "group_size"), [(256, 2), (512, 4), (1024, 8), (256, 4)])
def test_any_number_of_groups(cpu_kernels, generator, page, head_dim, group_size):
    made = operands(PRESETS["quarot-4"].key, TokenUniform(4, group_size), tokens=200, head_dim=head_dim)
    assert made.packed.value_codec.form.groups == head_dim // group_size
    extent = Extent.of([BLOCK * made.packed.blocks])
    step = paged(made, page, extent, generator)
    out, _ = step.attend(scaling=0.1)
    truth, _ = expected(made, extent, scaling=0.1)
    assert_within_budget(out, truth, step.pool)


# Operands that do not fit, refused whatever the backend


def test_pages_that_do_not_fit_their_form(step, refuses):
    pool = step.pool
    for name in pool.keys:
        short = {**pool.keys, name: pool.keys[name][..., :32].contiguous()}
        with refuses("should be"):
            replace(step, pool=replace(pool, keys=short)).attend()
    other = {**pool.keys, "codes": pool.keys["codes"].view(torch.int8)}
    with refuses("codes of packed tokens should be torch.uint8"):
        replace(step, pool=replace(pool, keys=other)).attend()
    turned = {**pool.keys, "codes": pool.keys["codes"].transpose(2, 3).contiguous().transpose(2, 3)}
    with refuses("should lie together in memory"):
        replace(step, pool=replace(pool, keys=turned)).attend()


@pytest.mark.parametrize("place", [-1, 64, 300])
def test_a_form_that_adds_to_coordinates_beside_it(step, refuses, place):
    coordinates = step.pool.value_form.coordinates.clone()
    coordinates[0, 0, 0] = place
    form = replace(step.pool.value_form, coordinates=coordinates, derived=Derived())
    with refuses("a form of 64 coordinates adds to those from"):
        replace(step, pool=replace(step.pool, value_form=form)).attend()


def test_blocks_that_decode_does_not_take(backend, fitted, refuses):
    case = fitted("key", PRESETS["b3"].key, 64)
    form, blocks, codes, first = case.codec.form, case.blocks, case.blocks["codes"], case.first
    short = {name: field[..., :32].contiguous() for name, field in blocks.items()}
    for given, positions, what in (
        (blocks, first[:, 1:], "positions of blocks to decode should be"),
        (blocks, first.int(), "positions of blocks to decode should be"),
        (blocks | {"codes": codes[0]}, first, "codes of packed tokens should be [B, H, n, bytes, 64]"),
        (blocks | {"codes": codes[:, :, :, 2:]}, first, "codes of packed tokens should be"),
        (short, first, "codes of packed tokens should be"),
    ):
        with refuses(what):
            ops.decode(given, form, positions)


def _job(recipe, shape=(BLOCK, 2, 8), rope=None, dtype=torch.float32):
    codes, constants = torch.zeros(1, 2, 4, BLOCK, dtype=torch.uint8), torch.zeros(1, 2, 1, BLOCK, dtype=torch.half)
    fields = {"codes": codes, "scale": constants[:, :, 0], "step": constants, "middle": constants}
    return EncodeJob(torch.zeros(shape, dtype=dtype), fields, None, "keys", recipe, rope)


def _encode(job, slots=BLOCK):
    ops.encode([job], torch.zeros(slots, dtype=torch.int32), torch.zeros(1).long(), torch.zeros(1, dtype=torch.int32))


def test_tokens_that_do_not_fit_their_recipe(backend, refuses):
    recipe, parts = Recipe(DenseMap(torch.ones(2, 16, 8)), (SignsPart(16, None, 0, 0),)), "the recipe is not for"
    for job, what in (
        (_job(recipe, (BLOCK, 2, 16)), parts),
        (_job(recipe, (BLOCK, 3, 8)), parts),
        (_job(recipe, (1, BLOCK, 2, 8)), "keys should be floats [slots, H, D]"),
        (_job(recipe, dtype=torch.int64), "keys should be floats [slots, H, D]"),
        (_job(recipe, dtype=torch.float64), "keys should be float32, bfloat16 or float16 that lie side by side"),
        (_job(recipe, rope=Rope(torch.ones(5))), "a mean of dimension 8 cannot turn in 5 pairs"),
        (_job(recipe), "codes of keys should be"),
        *((_job(grid), "the grids do not divide head_dim 8") for grid in BAD_GRIDS),
    ):
        with refuses(what):
            _encode(job)
    with refuses("slots of blocks to encode should be"):
        _encode(_job(recipe), slots=BLOCK + 1)


BAD_GRIDS = [GridRecipe(8, 3, 4, 1.0), GridRecipe(16, 1, 4, 1.0), GridRecipe(8, 0, 4, 1.0)]


def test_parts_that_do_not_make_up_a_map(refuses):
    with refuses("do not make up the 16 coordinates"):
        Recipe(DenseMap(torch.ones(2, 16, 8)), (SignsPart(8, None, 0, 0),))


def test_more_coordinates_than_the_library_takes(cpu_kernels, refuses):
    most = library.limits().dim
    coordinates, entries = torch.zeros(1, 2, 1, dtype=torch.int16), torch.zeros(1, 2, 16, 1)
    form = NibbleForm(None, coordinates, entries, code_dim=most + 1, scale="scale")
    with refuses(f"use at most {most}"):
        attention._constants(form)


# The library itself, whoever calls it


def _runs(function, operation):
    return getattr(library.load(), function)(ctypes.byref(operation), ctypes.c_int64(1))


def _codes(count=4):
    return structs.Codes(batch=1, heads=1, blocks=1, bytes=count)


def _step(**changes):
    side = {"nibbles": 16, "groups": 1, "code_dim": 16, "head_dim": 16, "slots": 1}
    step = structs.Step(keys=structs.Side(**side), values=structs.Side(**side), page_tokens=64)
    for name in ("blocks_per_split", "splits", "heads", "rows", "queries"):
        setattr(step, name, 1)
    for place, value in changes.items():
        at, _, name = place.rpartition("__")
        setattr(getattr(step, at) if at else step, name, value)
    return step


def _changed(struct, changes, **parts):
    """With other fields, as ``part__field`` where the part is a struct."""
    for place, value in changes.items():
        at, _, name = place.rpartition("__")
        setattr(parts[at] if at in parts else getattr(struct, at) if at else struct, name, value)
    return struct


def _of_job(**recipes):
    """One block, of a recipe that nothing else keeps."""
    job = structs.Job(**{name: ctypes.addressof(recipe) for name, recipe in recipes.items()})
    numbers = (ctypes.c_int32 * BLOCK)()
    operation = structs.Encode(ctypes.pointer(job), 1, *[ctypes.addressof(numbers)] * 2, blocks=1)
    operation.kept = (recipes, numbers)
    return operation


def _recipe(**changes):
    part = structs.Part(kind=2, dim=32, nibbles=8)
    recipe = structs.Recipe(codes=_codes(), gain_count=1, part_count=1, parts=ctypes.pointer(part))
    recipe.tokens.dim, recipe.tokens.slot_count, recipe.map.rows, recipe.map.size = 32, 1, 32, 32
    return _of_job(recipe=_changed(recipe, changes, part=part))


def _grid(**changes):
    grid = structs.GridRecipe(codes=_codes(16), size=32, groups=4, bits=4)
    grid.tokens.dim, grid.tokens.slot_count = 32, 1
    return _of_job(grid=_changed(grid, changes))


def _decode(**changes):
    return _changed(structs.Decode(codes=_codes(), dim=8, groups=1, head_dim=8), changes)


REFUSED = {
    "groups": ("qjl_step", _step(values__groups=3)),
    "no groups": ("qjl_step", _step(keys__groups=0)),
    "half bytes": ("qjl_step", _step(keys__groups=16)),
    "no map": ("qjl_step", _step(values__head_dim=32)),
    "too wide": ("qjl_step", _step(keys__code_dim=1 << 16, keys__head_dim=1 << 16)),
    "negative": ("qjl_step", _step(values__quad_count=-1)),
    "queries": ("qjl_step", _step(rows=3, queries=2)),
    "splits": ("qjl_step", _step(blocks_per_split=0)),
    "slots": ("qjl_step", _step(exact__slots=-1)),
    "exact type": ("qjl_step", _step(exact__dtype=3)),
    "page size": ("qjl_step", _step(page_tokens=48)),
    "query type": ("qjl_step", _step(query_type=3)),
    "no recipe": ("qjl_encode", _of_job()),
    "slots of tokens": ("qjl_encode", _recipe(tokens__slot_count=0)),
    "pages": ("qjl_encode", _recipe(codes__blocks=0)),
    "unaligned": ("qjl_step", _step(room=8)),
    "trellis of three": ("qjl_encode", _recipe(part__kind=1, part__width=3)),
    "trellis of four": ("qjl_encode", _recipe(part__kind=1, part__width=2)),
    "no part": ("qjl_encode", _recipe(part__kind=7)),
    "parts": ("qjl_encode", _recipe(map__rows=64)),
    "bytes": ("qjl_encode", _recipe(codes=_codes(5))),
    "sketch": ("qjl_encode", _recipe(map__size=16)),
    "no gains": ("qjl_encode", _recipe(gain_count=0)),
    "type": ("qjl_encode", _recipe(tokens__type=3)),
    "pairs": ("qjl_encode", _recipe(mean__pairs=17)),
    "bits": ("qjl_encode", _grid(bits=9)),
    "grid groups": ("qjl_encode", _grid(groups=5)),
    "grid size": ("qjl_encode", _grid(size=12)),
    "grid bytes": ("qjl_encode", _grid(codes=_codes(15))),
    "blocks": ("qjl_decode", _decode(codes__blocks=-1)),
    "groups that cut a byte": ("qjl_decode", _decode(groups=3)),
    "no map back": ("qjl_decode", _decode(head_dim=32)),
    "slots of a code": ("qjl_decode", _decode(slots=-1)),
    "a turn without a mean": ("qjl_decode", _decode(pairs=1)),
    "head_dim": ("qjl_flash_decode", structs.FlashDecode(heads=1, group=1, tokens=4, head_dim=12)),
    "m": ("qjl_popcount_scan", structs.PopcountScan(heads=1, group=1, tokens=4, m=4096)),
    "count": ("qjl_read", structs.Read(count=-1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_library_refuses_by_a_code_and_python_by_words(case, refuses):
    function, operation = REFUSED[case]
    assert _runs(function, operation) < 0
    with refuses("the cpu backend does not take this ("):
        library.call(function, operation)


IN_ROOM = {"qjl_step": [_step], "qjl_encode": [_recipe, _grid], "qjl_decode": [_decode]}


@pytest.mark.parametrize(("function", "make"), [(name, make) for name, makers in IN_ROOM.items() for make in makers])
def test_the_library_tells_the_room_that_it_lacks_and_does_nothing(cpu_kernels, function, make):
    operation = make()
    needed = _runs(function, operation)
    assert needed > 0
    operation.room, operation.room_bytes = 64, needed - 1
    assert _runs(function, operation) == needed
