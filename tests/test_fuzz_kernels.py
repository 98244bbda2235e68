"""Kernels on arrays that lie flush against pages which must not be touched: one byte too far ends the process."""

import ctypes
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guarded import PAGE, Guarded
from qjl import ops
from qjl.ops import reference

pytest_plugins = "guarded"
pytestmark = pytest.mark.usefixtures("compiled")

batches = st.integers(0, 3)
heads = st.integers(1, 3)
blocks = st.integers(0, 5)
rows = st.integers(1, 9)
nibbles = st.one_of(st.integers(1, 20), st.integers(1, 256)).map(lambda half: 2 * half)
widths = st.integers(1, 9)
seeds = st.integers(0, 2**32)


def _nibbles(*shape, seed):
    batch, heads, blocks, count = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (batch, heads, 64 * blocks, count), dtype=torch.uint8, generator=generator)


@given(batches, heads, blocks, nibbles, seeds)
def test_pack_and_unpack(guarded, batch, heads, blocks, count, seed):
    plain = guarded(_nibbles(batch, heads, blocks, count, seed=seed))
    codes = ops.pack(plain)
    assert torch.equal(codes, reference.pack(plain))
    assert torch.equal(ops.unpack(codes), plain)


@given(batches, heads, blocks, nibbles, rows, seeds)
def test_scan(guarded, batch, heads, blocks, count, rows, seed):
    codes = guarded(reference.pack(_nibbles(batch, heads, blocks, count, seed=seed)))
    tables = guarded(torch.randn(batch, heads, rows, count, 16, generator=torch.Generator().manual_seed(seed)))
    expected = reference.scan(tables, codes)
    largest = float(expected.abs().max()) if expected.numel() else 0
    torch.testing.assert_close(ops.scan(tables, codes), expected, rtol=0, atol=1e-5 * largest)


@given(batches, heads, blocks, nibbles, widths, seeds)
def test_expand(guarded, batch, heads, blocks, count, width, seed):
    codes = guarded(reference.pack(_nibbles(batch, heads, blocks, count, seed=seed)))
    entries = guarded(torch.randn(heads, count, 16, width, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(ops.expand(entries, codes), reference.expand(entries, codes))


@given(heads, blocks, nibbles, seeds)
def test_a_tile_at_the_end_of_its_storage(guarded, heads, blocks, count, seed):
    storage = guarded(reference.pack(_nibbles(2, heads, blocks + 2, count, seed=seed)))
    tile = storage[1:, :, 2:]
    assert torch.equal(ops.unpack(tile), reference.unpack(tile))


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
