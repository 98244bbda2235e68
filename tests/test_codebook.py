"""Levels of scalar codes, and how coordinates of any width fill nibbles."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from method_cases import sums_of_entries
from qjl.codebook import MAX_BITS, distortion, lloyd_max, scalar_code, scalar_distortion, sign_code, sign_sum


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_lloyd_max_levels_match_the_oracle(bits):
    np.testing.assert_allclose(lloyd_max(bits), oracles.LloydMax(bits).levels, atol=5e-5)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.363), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_distortions_are_the_published_ones(bits, published):
    assert distortion(lloyd_max(bits)) == pytest.approx(published, abs=5e-4 if bits < 4 else 5e-5)
    assert distortion(lloyd_max(bits)) == pytest.approx(
        oracles.gaussian_distortion(np.array(lloyd_max(bits))), rel=1e-4
    )


def test_known_levels_of_one_and_two_bits():
    assert lloyd_max(1) == pytest.approx((-0.7979, 0.7979), abs=1e-4)
    assert lloyd_max(2) == pytest.approx((-1.5104, -0.4528, 0.4528, 1.5104), abs=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_levels_ascend_and_are_exactly_symmetric(bits):
    levels = np.array(lloyd_max(bits))
    assert (np.diff(levels) > 0).all()
    assert (levels == -levels[::-1]).all()


def test_two_bits_are_a_sum_of_two_signs_without_loss():
    assert sign_sum(2) == pytest.approx((0.9816, 0.5288), abs=1e-4)
    np.testing.assert_allclose(oracles.SignSum.levels(sign_sum(2)), lloyd_max(2), atol=1e-6)


def test_three_bits_as_a_sum_of_signs_lose_seven_percent():
    assert oracles.gaussian_distortion(oracles.SignSum.levels(sign_sum(3))) == pytest.approx(0.0369, abs=1e-4)


@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
def test_no_other_sums_of_signs_are_better(bits):
    reached = distortion(oracles.SignSum.levels(sign_sum(bits)))
    assert reached == pytest.approx(oracles.SignSum(bits).distortion, rel=1e-4 if bits < 7 else 3e-3)


def test_a_coordinate_costs_what_its_levels_do():
    """Lloyd-Max levels in a nibble, sums of signs beyond; each bit gains less than the one before."""
    costs = [scalar_distortion(bits) for bits in range(MAX_BITS + 1)]
    np.testing.assert_allclose(costs, oracles.TransformCode.distortions(MAX_BITS), rtol=3e-3)
    assert (np.diff(costs, 2) > 0).all()


@st.composite
def packable_widths(draw):
    """Widths of 0 to 8 bits that fill bytes; the last coordinates take what is missing."""
    widths = draw(st.lists(st.integers(0, MAX_BITS), min_size=8, max_size=40))
    missing = -sum(widths) % 8
    return [*widths, *[1] * missing] if any(widths) else [*widths, *[1] * 8]


@settings(max_examples=150)
@given(widths=packable_widths(), seed=st.integers(0, 999))
def test_any_widths_encode_to_the_nearest_level_and_decode_to_it(widths, seed):
    code = scalar_code([widths])
    z = torch.randn(1, 1, 64, len(widths), generator=torch.Generator().manual_seed(seed))
    nibbles, chosen = code.encode(z)
    assert nibbles.shape == (1, 1, 64, sum(widths) // 4)
    assert nibbles.max() < 16
    decoded = sums_of_entries(code.decoder, nibbles)
    torch.testing.assert_close(decoded, chosen, atol=2e-3, rtol=1e-3)
    split = code.kinds[0] > MAX_BITS
    assert not chosen[..., torch.tensor(widths) == 0].any()
    for i, width in ((i, width) for i, width in enumerate(widths) if width):
        levels = oracles.SignSum.levels(sign_sum(width)) if split[i] else np.array(lloyd_max(width))
        z_i = z[0, 0, :, i].double().numpy()
        clear = oracles.edge_margin(z_i, levels) > 2e-3
        np.testing.assert_allclose(chosen[0, 0, :, i].numpy()[clear], oracles.nearest(z_i, levels)[clear], atol=2e-3)


@pytest.mark.parametrize(("width", "dim"), [(1, 64), (2, 64), (4, 80), (3, 64), (6, 128), (5, 72), (8, 64)])
def test_equal_widths_waste_no_bit(width, dim):
    code = scalar_code([[width] * dim])
    used = {
        (i, bit)
        for i, bit in zip(code.bit_coordinate.flatten().tolist(), code.bit_index.flatten().tolist(), strict=True)
    }
    assert used == set(itertools.product(range(dim), range(width)))


def test_whole_coordinates_are_coded_by_lloyd_max_and_only_leftovers_as_sums():
    assert (scalar_code([[2] * 64]).kinds == 2).all()
    assert int((scalar_code([[3] * 64]).kinds > MAX_BITS).sum()) == 16


def test_heads_may_spend_their_bits_differently():
    code = scalar_code([[4, 4, 0, 0, 0, 0, 0, 0], [1] * 8])
    z = torch.linspace(-3, 3, 64).view(1, 1, 64, 1).expand(1, 2, 64, 8)
    nibbles, chosen = code.encode(z)
    assert torch.equal(chosen[0, 0, :, 2:], torch.zeros(64, 6))
    assert chosen[0, 0, :, 0].unique().numel() == 16
    assert chosen[0, 1].abs().unique().numel() == 1
    decoded = sums_of_entries(code.decoder, nibbles)
    torch.testing.assert_close(decoded, chosen, atol=2e-3, rtol=1e-3)


def test_a_sign_code_decodes_four_signs_per_nibble_lowest_first():
    code = sign_code(8).decoder
    nibbles = torch.tensor([0b0001, 0b1110], dtype=torch.uint8).expand(1, 1, 64, 2)
    decoded = sums_of_entries(code, nibbles)
    assert decoded[0, 0, 0].tolist() == [1, -1, -1, -1, -1, 1, 1, 1]


def test_a_sign_code_takes_zero_for_a_plus():
    nibbles, signs = sign_code(4).encode(torch.tensor([0.0, -0.0, -1e-9, 3.0]).expand(1, 1, 64, 4))
    assert signs[0, 0, 0].tolist() == [1, 1, -1, 1]
    assert (nibbles == 0b1011).all()


def test_widths_out_of_range_are_refused(refuses):
    with refuses("a coordinate takes 0 to 8 bits"):
        scalar_code([[9, 7]])


def test_bits_that_do_not_fill_bytes_are_refused(refuses):
    with refuses("12 bits per token do not fill whole bytes"):
        scalar_code([[4, 4, 4]])


def test_heads_with_unequal_totals_are_refused(refuses):
    with refuses("all heads of a layer must spend the same number of bits"):
        scalar_code([[4, 4], [4, 4, 4, 4]])
