"""Uniform codes per token against KIVI's equation."""

import numpy as np
import pytest

import oracles
from method_cases import float64, of_type, sized, token_major
from qjl.methods.uniform import TokenUniform


@sized(of_type(TokenUniform))
def test_codes_are_kivis(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    groups, bits = quantizer.groups(head_dim), quantizer.num_bits
    oracle = oracles.TokenUniform(bits, groups)
    x = float64(case.x)
    step, middle = (token_major(case.blocks[name]).astype(np.float64) for name in ("step", "middle"))
    exact_step, exact_middle = oracle.constants(x)
    np.testing.assert_allclose(step, exact_step, rtol=1e-3)
    np.testing.assert_allclose(middle, exact_middle, rtol=1e-3, atol=1e-6)
    levels = oracle.levels(x, step, middle)
    clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
    assert clear.mean() > 0.97
    bytes_ = token_major(case.blocks["codes"])
    stored = np.stack([bytes_ >> shift & oracle.top for shift in range(0, 8, bits)], -1).reshape(levels.shape)
    assert (stored == oracle.codes(levels))[clear].all()
    decoded = case.codec.dequantize(case.blocks, case.first)
    np.testing.assert_allclose(decoded, oracle.decode(stored, step, middle), atol=1e-4)


@pytest.mark.parametrize(("head_dim", "groups"), [(64, 2), (80, 4), (96, 3), (128, 4), (256, 8)])
def test_groups_of_channels_cut_a_head_evenly(head_dim, groups):
    assert TokenUniform(2, 32).groups(head_dim) == groups


def test_true_bits_are_those_of_the_docstring():
    assert TokenUniform(2, 32).bits(128) == 3
    assert TokenUniform(4, 16).bits(64) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenUniform(3), "values take 1, 2, 4 or 8 bits"),
        (lambda: TokenUniform(2, 0), "group_size must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
