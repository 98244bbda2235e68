"""Kernels on arrays that lie flush against pages which must not be touched: one byte too far ends the process."""

import ctypes
import os
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guarded import PAGE, Guarded
from qjl import ops
from qjl.codebook import refined_sign_code, scalar_code
from qjl.ops.forms import EncodeJob
from qjl.ops.recipe import DenseMap, GridRecipe, Recipe
from qjl.packed import BLOCK
from qjl.rope import Rope
from qjl.sketch import Sketch
from qjl.trellis import even_trellis

pytest_plugins = "guarded"
pytestmark = pytest.mark.usefixtures("compiled")

CPU = torch.device("cpu")
heads = st.integers(1, 3)
seeds = st.integers(0, 2**32)


# Encoders: what they leave in their own arrays, whatever lies beside them


def _in_guarded_memory(guarded, value):
    """The same recipe, part or mean, all of whose tensors lie there."""
    if isinstance(value, torch.Tensor):
        return guarded(value.contiguous())
    if isinstance(value, tuple):
        return tuple(_in_guarded_memory(guarded, one) for one in value)
    if is_dataclass(value):
        given = [f.name for f in fields(value) if f.init]
        return replace(value, **{name: _in_guarded_memory(guarded, getattr(value, name)) for name in given})
    return value


def _signs(dim):
    """Refined ones of two orthogonal blocks."""
    return refined_sign_code(Sketch(2 * dim, dim).matrix)


ENCODERS = {
    "levels": lambda dim: scalar_code([[3 if i % 2 else 1 for i in range(dim)]]),
    "wide levels": lambda dim: scalar_code([[8 if i % 8 == 0 else 0 for i in range(dim)]]),
    "trellis": lambda dim: even_trellis(dim, dim, CPU),
    "signs": _signs,
}
dims = st.one_of(st.integers(1, 20), st.sampled_from([64, 128])).map(lambda eighth: 8 * eighth)


def _encoded(recipe, tokens, slots, first, pages, rope, fields):
    """What a pool of poison holds then."""
    job = EncodeJob(tokens, fields, None, "tokens", recipe, rope)
    ops.encode([job], slots, first, pages)
    return fields


def _pool(make, heads, pages, shapes):
    """Fields ``[pages, heads, *shape]``, as ``make`` places them."""
    return {name: make(torch.zeros(pages, heads, *shape, 64, dtype=dtype)) for name, (shape, dtype) in shapes.items()}


def _assert_guarded(guarded, recipe, tokens, rope, shapes, generator):
    """Codes from guarded memory to guarded memory are those of memory of any kind, which test_encoding.py compares."""
    slots, heads = tokens.shape[:2]
    blocks = slots // BLOCK
    chosen = torch.randperm(slots, generator=generator)[: blocks * BLOCK].int()
    first = torch.randint(0, 10**6, (blocks,), generator=generator)
    pages = torch.randperm(blocks + 1, generator=generator)[:blocks].int()
    expected = _encoded(recipe, tokens, chosen, first, pages, rope, _pool(lambda x: x, heads, blocks + 1, shapes))
    given = (guarded(x) for x in (tokens, chosen, first, pages))
    found = _encoded(_in_guarded_memory(guarded, recipe), *given, rope, _pool(guarded, heads, blocks + 1, shapes))
    assert all(torch.equal(found[name], field) for name, field in expected.items())


@given(st.sampled_from(sorted(ENCODERS)), heads, st.integers(0, 200), dims, st.booleans(), seeds)
def test_encode(guarded, encoder, heads, slots, dim, is_exact, seed):
    dim = dim if encoder != "signs" else min(dim, 256)  # whose gram is [2 dim, 2 dim]
    generator = torch.Generator().manual_seed(seed)
    code = ENCODERS[encoder](dim)
    rows = sum(part.dim for part in code.parts)
    matrix = torch.randn(heads, rows, dim, generator=generator) * dim**-0.5
    recipe = Recipe(
        DenseMap(matrix.half() if seed % 2 else matrix),
        code.parts,
        mean=torch.randn(heads, dim, generator=generator),
        gains=(0.8, 1.0) if encoder == "levels" else (1.0,),
        units=torch.ones(heads) if is_exact else None,
    )
    tokens = torch.randn(slots, heads, dim, generator=generator)
    rope = Rope(torch.rand(dim // 2, generator=generator), 1.1, bool(seed % 3))
    shapes = {
        "codes": ((code.decoder.nibbles // 2,), torch.uint8),
        "scale": ((), torch.uint8 if is_exact else torch.half),
    }
    _assert_guarded(guarded, recipe, tokens, rope, shapes, generator)


@given(heads, st.integers(0, 200), dims, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 8]), seeds)
def test_encode_on_grids(guarded, heads, slots, dim, bits, width, seed):
    """Up to 512 groups, of as few as two channels."""
    generator = torch.Generator().manual_seed(seed)
    recipe = GridRecipe(dim & -dim, dim // (width if width > 1 else dim), bits, 0.9)
    tokens = torch.randn(slots, heads, dim, generator=generator)
    constants = ((recipe.groups,), torch.half)
    shapes = {"codes": ((dim * bits // 8,), torch.uint8), "step": constants, "middle": constants}
    _assert_guarded(guarded, recipe, tokens, None, shapes, generator)


@pytest.mark.parametrize("edge", ["first", "last"])
def test_the_guards_stand_where_they_should(edge):
    """The edge of an array lies at the edge of a page, and its neighbours refuse to be read."""
    array = Guarded(edge).empty(100, dtype=torch.uint8)
    edges = {"first": array.data_ptr(), "last": array.data_ptr() + 100}
    assert edges[edge] % PAGE == 0
    beyond = edges["first"] - 1 if edge == "first" else edges["last"]
    assert not _is_readable(beyond)
    assert _is_readable(array.data_ptr())


def _is_readable(address):
    """Asked of the system, which refuses to write such a byte anywhere."""
    receiver, sender = os.pipe()
    try:
        return os.write(sender, (ctypes.c_char * 1).from_address(address)) == 1
    except OSError:
        return False
    finally:
        os.close(receiver)
        os.close(sender)
