"""Uniform grids, and how numbers of a few bits lie in bytes and in blocks."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import bit_stream, float64
from qjl.methods.bitpacking import (
    as_half,
    channel_field,
    pack_channels,
    pack_tokens,
    repack,
    token_major,
    token_minor,
    uniform_grid,
    unpack_channels,
    unpack_tokens,
)

every_width = pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])


def _codes(width, channels, generator):
    return torch.randint(0, 2**width, (2, 3, 128, channels), generator=generator).to(torch.uint8)


@every_width
def test_a_tokens_numbers_lie_side_by_side_lowest_bit_first(width, generator):
    codes = _codes(width, 24, generator)
    packed = pack_tokens(codes, width)
    assert packed.shape == (2, 3, 2, 3 * width, 64)
    assert packed.is_contiguous()
    assert (bit_stream(packed, width) == codes.numpy()).all()
    assert torch.equal(unpack_tokens(packed, width), codes)
    assert torch.equal(repack(repack(codes, width, 4), 4, width), codes)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_packed_nibbles_are_the_same_bytes(width, generator):
    codes = _codes(width, 24, generator)
    assert torch.equal(pack_tokens(repack(codes, width, 4), 4), pack_tokens(codes, width))


@every_width
def test_any_number_of_channels_fills_bytes_with_its_tokens(width, generator):
    codes = _codes(width, 7, generator)
    packed = pack_channels(codes, width)
    assert tuple(packed.shape[3:]) == channel_field(7, width).shape == (7, 8 * width)
    assert torch.equal(unpack_channels(packed, width), codes)
    bits = np.unpackbits(packed.numpy(), axis=-1, bitorder="little").reshape(2, 3, 2, 7, 64, width)
    numbers = (bits @ 2 ** np.arange(width)).swapaxes(3, 4).reshape(2, 3, 128, 7)
    assert (numbers == codes.numpy()).all()


def test_tokens_go_last_in_a_block_and_come_back(generator):
    x = torch.randn(2, 3, 128, 5, generator=generator)
    minor = token_minor(x)
    assert minor.shape == (2, 3, 2, 5, 64)
    assert minor[1, 2, 1, 4, 3] == x[1, 2, 67, 4]
    assert torch.equal(token_major(minor), x)


def test_what_float16_cannot_hold_is_clipped():
    assert as_half(torch.tensor([1e9, -1e9, 0.1])).tolist() == [65504, -65504, torch.tensor(0.1).half().item()]


@pytest.mark.parametrize("spread", [1.0, 0.3])
@pytest.mark.parametrize("num_bits", [1, 2, 4])
def test_codes_on_a_grid_are_those_of_kivis_equation(num_bits, spread, generator):
    x = torch.randn(50, 32, generator=generator)
    codes, step, middle = uniform_grid(x, x.amin(1, True), x.amax(1, True), num_bits, spread)
    oracle = oracles.TokenUniform(num_bits, 1)
    exact_step, exact_middle = oracle.constants(float64(x))
    np.testing.assert_allclose(step, spread * exact_step, rtol=1e-3)
    np.testing.assert_allclose(middle, exact_middle, rtol=1e-3, atol=1e-6)
    levels = oracle.levels(float64(x), float64(step), float64(middle))[:, 0]
    clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
    assert (codes.numpy() == oracle.codes(levels))[clear].all()


def test_a_grid_of_one_number_has_no_step():
    codes, step, middle = uniform_grid(torch.full((3, 8), 2.5), *torch.full((2, 3, 1), 2.5), num_bits=2)
    assert not step.any()
    assert (middle == 2.5).all()
    assert (codes.unique().numel()) == 1
