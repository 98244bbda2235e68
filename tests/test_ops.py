"""Every op against its equation, written as loops."""

import numpy as np
import pytest
import torch

from qjl import ops

SHAPES = [(1, 1, 1, 2), (2, 3, 1, 16), (1, 2, 3, 50), (3, 1, 2, 6)]  # B, H, blocks, nibbles


def _nibbles(shape, generator):
    batch, heads, blocks, nibbles = shape
    size = (batch, heads, 64 * blocks, nibbles)
    return torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)


@pytest.fixture(params=ops.backends(), autouse=True)
def backend(request):
    before = ops.active_backend()
    ops.use_backend(request.param)
    yield
    ops.use_backend(before)


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_puts_two_nibbles_in_a_byte_low_first_and_tokens_last(shape, generator):
    nibbles = _nibbles(shape, generator)
    codes = ops.pack(nibbles)
    batch, heads, blocks, count = shape
    assert codes.shape == (batch, heads, blocks, count // 2, 64)
    assert codes.is_contiguous()
    token_major = codes.numpy().transpose(0, 1, 2, 4, 3).reshape(batch, heads, 64 * blocks, count // 2)
    assert (token_major == nibbles.numpy()[..., 0::2] + 16 * nibbles.numpy()[..., 1::2]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_is_the_inverse_of_pack(shape, generator):
    nibbles = _nibbles(shape, generator)
    assert torch.equal(ops.unpack(ops.pack(nibbles)), nibbles)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_scan_sums_one_table_entry_per_nibble(shape, rows, generator):
    nibbles = _nibbles(shape, generator)
    batch, heads, _, count = shape
    tables = torch.randn(batch, heads, rows, count, 16, generator=generator)
    picked = np.take_along_axis(
        tables.double().numpy()[:, :, :, None], nibbles.numpy()[:, :, None, :, :, None].astype(int), axis=5
    )
    scores = ops.scan(tables, ops.pack(nibbles))
    assert scores.shape == (batch, heads, rows, nibbles.shape[2])
    np.testing.assert_allclose(scores.numpy(), picked[..., 0].sum(-1), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_expand_looks_up_every_entry(shape, width, generator):
    nibbles = _nibbles(shape, generator)
    _, heads, _, count = shape
    entries = torch.randn(heads, count, 16, width, generator=generator).half()
    expanded = ops.expand(entries, ops.pack(nibbles)).unflatten(3, (count, width))
    for head in range(heads):
        for j in range(count):
            assert torch.equal(expanded[:, head, :, j], entries[head, j].float()[nibbles[:, head, :, j].long()])


def test_codes_of_part_of_the_blocks_scan_as_they_do_among_all(generator):
    """A tile is a view that is not contiguous."""
    nibbles = _nibbles((2, 2, 5, 8), generator)
    tables = torch.randn(2, 2, 3, 8, 16, generator=generator)
    codes = ops.pack(nibbles)
    assert torch.equal(ops.scan(tables, codes[:, :, 1:4]), ops.scan(tables, codes)[..., 64 : 4 * 64])


def test_a_missing_backend_fails_loudly(refuses):
    with refuses("backend 'abacus' is not available here"):
        ops.use_backend("abacus")


def test_the_reference_is_always_there():
    assert "reference" in ops.backends()
