"""The 8-bit caches of engines."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import float64, of_type, sized, token_major
from qjl.methods.base import LayerContext
from qjl.methods.int8_fp8 import Fp8, Int8
from qjl.presets import PRESETS

CPU = torch.device("cpu")


@sized(of_type(Int8))
def test_int8_codes_are_scaled_by_the_largest_of_their_token(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    x = float64(case.x)
    scale = float64(case.blocks["scale"].flatten(2))
    np.testing.assert_allclose(scale, np.abs(x).max(-1) / 127, rtol=1e-3)
    levels = x / scale[..., None]
    clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
    codes = token_major(case.blocks["codes"])
    assert (codes == np.clip(np.rint(levels), -127, 127))[clear].all()
    assert np.abs(codes).max() == 127
    decoded = case.codec.dequantize(case.blocks, case.first)
    np.testing.assert_allclose(decoded, codes * scale[..., None], rtol=1e-6)


@sized(of_type(Fp8))
def test_fp8_numbers_are_the_nearest_e4m3(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    decoded = float64(case.codec.dequantize(case.blocks, case.first))
    np.testing.assert_array_equal(decoded, oracles.E4M3.nearest(float64(case.x)))
    np.testing.assert_array_equal(oracles.E4M3.decode(token_major(case.blocks["codes"])), decoded)


@pytest.mark.parametrize("value", [448.0, 460.0, 1e6, -1e6, 2.0**-9, 2.0**-11, 0.0, -0.3, 17.0])
def test_fp8_saturates_and_reaches_down_to_its_least_number(value):
    codec = Fp8().fit(LayerContext("key", 1, 8, CPU, torch.float32))
    first = torch.zeros(1, 1, dtype=torch.int64)
    decoded = codec.dequantize(codec.quantize(torch.full((1, 1, 64, 8), value), first), first)
    assert (float64(decoded) == oracles.E4M3.nearest(np.array(value))).all()


def test_true_bits_are_those_of_the_docstrings():
    assert PRESETS["int8"].bits(64) == (8.25, 8.25)
    assert PRESETS["int8"].bits(128) == (8.125, 8.125)
    assert PRESETS["fp8"].bits(64) == PRESETS["fp8"].bits(128) == (8, 8)


@pytest.mark.parametrize("quantizer", [Int8(), Fp8()], ids=str)
def test_a_head_dim_that_does_not_pack_is_refused(quantizer, refuses):
    with refuses("head_dim 60 does not pack into bytes"):
        quantizer.layout(60)
