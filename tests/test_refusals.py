"""No size overruns anything in C: what does not fit is refused, by Python before the call and by the library itself."""

import ctypes
from dataclasses import replace

import pytest
import torch

from pages import Extent, expected, operands, paged
from qjl import ops
from qjl.methods.uniform import TokenUniform
from qjl.ops.cpu import decoding, library, structs
from qjl.ops.forms import Derived, NibbleForm
from qjl.ops.recipe import DenseMap, GridRecipe, Recipe, SignsPart, Turn
from qjl.packed import BLOCK
from qjl.presets import PRESETS

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
    out, _ = paged(made, page, extent, generator).attend(scaling=0.1)
    truth, _ = expected(made, extent, scaling=0.1)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-3 * float(truth.abs().max()))


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


def test_codes_and_tables_of_other_shapes(backend, refuses):
    nibbles = torch.zeros(1, 2, BLOCK, 8, dtype=torch.uint8)
    codes = ops.pack(nibbles)
    for wrong in (nibbles[:, :, :60], nibbles[..., :7], nibbles.int(), nibbles[0]):
        with refuses("nibbles should be"):
            ops.pack(wrong)
    with refuses("codes should be"):
        ops.unpack(codes[..., :32])
    for shape in ((1, 2, 3, 6, 16), (1, 1, 3, 8, 16), (1, 2, 3, 8, 15)):
        with refuses("tables of scores should be"):
            ops.scan(torch.zeros(shape), codes)
    for shape in ((1, 8, 16, 2), (2, 6, 16, 2), (2, 8, 16)):
        with refuses("entries of codes should be"):
            ops.expand(torch.zeros(shape), codes)


def test_tokens_that_do_not_fit_their_recipe(kernels, refuses):
    recipe = Recipe(DenseMap(torch.ones(2, 16, 8)), (SignsPart(16, None, 0, 0),))
    for shape in ((1, 2, BLOCK, 16), (1, 3, BLOCK, 8)):
        with refuses("the recipe is not for"):
            ops.encode(torch.zeros(shape), recipe)
    with refuses("tokens to encode should be"):
        ops.encode(torch.zeros(1, 2, BLOCK + 1, 8), recipe)
    with refuses("angles of the mean should be"):
        ops.encode(torch.zeros(1, 2, BLOCK, 8), recipe, Turn(torch.zeros(1, 4, 32), torch.zeros(1, 4, 32), False))
    for grid in (GridRecipe(8, 3, 4, 1.0), GridRecipe(16, 1, 4, 1.0), GridRecipe(8, 0, 4, 1.0)):
        with refuses("the grids do not divide head_dim 8"):
            ops.encode_grid(torch.zeros(1, 2, BLOCK, 8), grid)


def test_parts_that_do_not_make_up_a_map(refuses):
    with refuses("do not make up the 16 coordinates"):
        Recipe(DenseMap(torch.ones(2, 16, 8)), (SignsPart(8, None, 0, 0),))


def test_more_coordinates_than_the_library_takes(cpu_kernels, refuses):
    most = library.limits().dim
    coordinates, entries = torch.zeros(1, 2, 1, dtype=torch.int16), torch.zeros(1, 2, 16, 1)
    form = NibbleForm(None, coordinates, entries, code_dim=most + 1, scale="scale")
    with refuses(f"use at most {most}"):
        decoding._constants(form)


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


def _encode(**changes):
    part = structs.Part(kind=2, dim=32, nibbles=8)
    operation = structs.Encode(codes=_codes(), gain_count=1, part_count=1)
    operation.tokens.dim, operation.map.rows, operation.map.size = 32, 32, 32
    for place, value in changes.items():
        at, _, name = place.rpartition("__")
        setattr(part if at == "part" else getattr(operation, at) if at else operation, name, value)
    operation.parts = ctypes.pointer(part)
    return operation


def _grid(**changes):
    operation = structs.EncodeGrid(codes=_codes(16), size=32, groups=4, bits=4)
    operation.tokens.dim = 32
    for name, value in changes.items():
        setattr(operation, name, value)
    return operation


REFUSED = {
    "groups": ("qjl_step", _step(values__groups=3)),
    "no groups": ("qjl_step", _step(keys__groups=0)),
    "half bytes": ("qjl_step", _step(keys__groups=16)),
    "no map": ("qjl_step", _step(values__head_dim=32)),
    "too wide": ("qjl_step", _step(keys__code_dim=1 << 16, keys__head_dim=1 << 16)),
    "negative": ("qjl_step", _step(values__pair_count=-1)),
    "queries": ("qjl_step", _step(rows=3, queries=2)),
    "splits": ("qjl_step", _step(blocks_per_split=0)),
    "slots": ("qjl_step", _step(exact__slots=-1)),
    "exact type": ("qjl_step", _step(exact__dtype=3)),
    "page size": ("qjl_step", _step(page_tokens=48)),
    "query type": ("qjl_step", _step(query_type=3)),
    "no encoder": ("qjl_encode_pages", structs.EncodePages(ctypes.pointer(structs.Job()), 1)),
    "unaligned": ("qjl_step", _step(room=8)),
    "trellis of three": ("qjl_encode", _encode(part__kind=1, part__width=3)),
    "trellis of four": ("qjl_encode", _encode(part__kind=1, part__width=2)),
    "no part": ("qjl_encode", _encode(part__kind=7)),
    "parts": ("qjl_encode", _encode(map__rows=64)),
    "bytes": ("qjl_encode", _encode(codes=_codes(5))),
    "sketch": ("qjl_encode", _encode(map__size=16)),
    "no gains": ("qjl_encode", _encode(gain_count=0)),
    "type": ("qjl_encode", _encode(tokens__type=3)),
    "pairs": ("qjl_encode", _encode(mean__pairs=17)),
    "bits": ("qjl_encode_grid", _grid(bits=9)),
    "grid groups": ("qjl_encode_grid", _grid(groups=5)),
    "grid size": ("qjl_encode_grid", _grid(size=12)),
    "grid bytes": ("qjl_encode_grid", _grid(codes=_codes(15))),
    "blocks": ("qjl_pack", structs.Pack(codes=structs.Codes(blocks=-1))),
    "rows": ("qjl_scan", structs.Scan(rows=-1)),
    "width": ("qjl_expand", structs.Expand(width=-1)),
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


IN_ROOM = {"qjl_step": _step, "qjl_encode": _encode, "qjl_encode_grid": _grid}


@pytest.mark.parametrize("function", IN_ROOM)
def test_the_library_tells_the_room_that_it_lacks_and_does_nothing(cpu_kernels, function):
    operation = IN_ROOM[function]()
    needed = _runs(function, operation)
    assert needed > 0
    operation.room, operation.room_bytes = 64, needed - 1
    assert _runs(function, operation) == needed
