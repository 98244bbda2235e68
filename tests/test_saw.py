"""SAW-INT4 against the paper."""

import numpy as np
import pytest

import oracles
from method_cases import bit_stream, float64, of_type, sized, token_major
from qjl.methods.saw import SAW
from qjl.presets import PRESETS


@sized(of_type(SAW))
def test_codes_are_the_papers(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    rotation = oracles.Hadamard.blocks(head_dim, quantizer.order)
    grid = oracles.TokenUniform(4, 1)
    y = float64(case.x) @ rotation
    step, middle = (token_major(case.blocks[name]).astype(np.float64) for name in ("step", "middle"))
    for stored, exact in zip((step, middle), grid.constants(y), strict=True):
        np.testing.assert_allclose(stored, exact, rtol=1e-3, atol=1e-5)
    levels = grid.levels(y, step, middle)
    clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
    assert clear.mean() > 0.97
    codes = bit_stream(case.blocks["codes"], 4).reshape(levels.shape)
    assert (codes == grid.codes(levels))[clear].all()
    decoded = grid.decode(codes, step, middle) @ rotation.T
    np.testing.assert_allclose(case.codec.dequantize(case.blocks, case.first), decoded, atol=2e-5 * np.abs(y).max())


def test_a_rotation_of_order_1_leaves_the_token(fitted):
    case = fitted("value", SAW(order=1), 96)
    error = (case.codec.dequantize(case.blocks, case.first) - case.x).abs()
    assert (error <= 0.51 * case.blocks["step"].transpose(3, 4).flatten(2, 3).float()).all()


def test_true_bits_are_those_of_the_docstring():
    assert SAW().bits(128) == 4.25
    assert SAW().bits(256) == 4 + 32 / 256
    assert PRESETS["saw-int4"].bits(64) == (4.5, 4.5)
    assert PRESETS["saw-int4"].bits(128) == (4.25, 4.25)


@pytest.mark.parametrize("order", [0, -2, 3, 96])
def test_an_order_that_is_no_power_of_two_is_refused(order, refuses):
    with refuses(f"the order of a Hadamard block is a power of two, not {order}"):
        SAW(order)


def test_a_head_dim_that_does_not_pack_is_refused(refuses):
    with refuses("head_dim 60 does not pack into bytes"):
        SAW().layout(60)
