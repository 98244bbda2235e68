"""KIVI's keys against the paper's equation."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import every_head_dim, float64, of_type, sized, token_major
from qjl.methods.base import LayerContext
from qjl.methods.kivi import KIVI
from qjl.presets import PRESETS


@sized(of_type(KIVI))
def test_codes_are_the_papers(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    oracle = oracles.ChannelUniform(quantizer.num_bits, quantizer.group_size)
    bits = np.unpackbits(token_major(case.blocks["codes"]), axis=-1, bitorder="little")
    stored = bits.reshape(*case.x.shape, quantizer.num_bits) @ 2 ** np.arange(quantizer.num_bits)
    decoded = case.codec.dequantize(case.blocks, case.first)
    for row in range(2):
        for head in range(2):
            keys = float64(case.x[row, head])
            step, middle = (float64(case.blocks[name][row, head].flatten(0, 1)) for name in ("step", "middle"))
            low, high = oracle.extremes(keys)
            np.testing.assert_allclose(step, (high - low) / oracle.top, rtol=1e-3)
            np.testing.assert_allclose(middle, (high + low) / 2, rtol=1e-3, atol=1e-6)
            stored_low = middle - step * oracle.top / 2
            levels = oracle.levels(keys, stored_low, step)
            clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
            assert clear.mean() > 0.99
            assert (stored[row, head] == oracle.codes(levels))[clear].all()
            expected = oracle.decode(stored[row, head], stored_low, step)
            np.testing.assert_allclose(decoded[row, head], expected, atol=1e-4)


@every_head_dim
def test_every_code_is_within_half_a_step(head_dim, fitted):
    case = fitted("key", KIVI(2), head_dim)
    error = (case.codec.dequantize(case.blocks, case.first) - case.x).unflatten(2, (-1, 32)).abs().amax(3)
    assert (error <= 0.503 * case.blocks["step"].flatten(2, 3)).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rounding_does_not_add_up(bits, generator):
    """The mean error of decoded keys is 0 within its noise, far from 0 too."""
    keys = torch.randn(1, 1, 64 * 64, 64, generator=generator) + 5
    codec = KIVI(bits).fit(LayerContext("key", 1, 64, torch.device("cpu"), torch.float32))
    first = torch.zeros(1, 64, dtype=torch.int64)
    error = codec.dequantize(codec.quantize(keys, first), first) - keys
    assert abs(float(error.mean())) < 4 * float(error.std()) / keys.numel() ** 0.5


def test_a_channel_of_one_number_is_exact(fitted):
    codec = fitted("key", KIVI(2), 64).codec
    keys = torch.arange(64.0).expand(1, 2, 64, 64)
    first = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(codec.dequantize(codec.quantize(keys, first), first), keys)


def test_numbers_beyond_float16_stay_finite(fitted):
    codec = fitted("key", KIVI(2), 64).codec
    keys = torch.full((1, 2, 64, 64), 1e6)
    keys[:, :, ::2] = -1e6
    first = torch.zeros(1, 1, dtype=torch.int64)
    assert codec.dequantize(codec.quantize(keys, first), first).isfinite().all()


@every_head_dim
def test_true_bits_are_those_of_the_docstring(head_dim):
    assert [KIVI(bits).bits(head_dim) for bits in (1, 2, 4)] == [2, 3, 5]
    assert KIVI(2, 64).bits(head_dim) == 2.5


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_preset_is_the_papers(bits):
    config = PRESETS[f"kivi-{bits}"]
    assert config.bits(128, 32) == (bits + 1, bits + 1)
    assert (config.sinks, config.recent) == (0, 128)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KIVI(3), "KIVI keys take 1, 2 or 4 bits, not 3"),
        (lambda: KIVI(2, 48), "a group_size of 48 tokens does not cut 64 evenly"),
        (lambda: KIVI(2, 0), "a group_size of 0 tokens does not cut 64 evenly"),
        (lambda: KIVI(2, 128), "a group_size of 128 tokens does not cut 64 evenly"),
        (lambda: KIVI().layout(60), "head_dim 60 does not pack into bytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
