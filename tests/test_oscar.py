"""OSCAR against the paper."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import bit_stream, every_head_dim, float64, of_type, sized, token_major
from qjl.methods.base import POSITIONS, LayerContext
from qjl.methods.oscar import OSCAR, composed_rotation
from qjl.presets import PRESETS


@every_head_dim
@pytest.mark.parametrize("role", ["key", "value"])
def test_the_rotation_diagonalises_what_attention_consumes(role, head_dim, fitted):
    case = fitted(role, OSCAR(), head_dim)
    for head in range(2):
        rotation = float64(case.codec.rotation[head])
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(head_dim), atol=1e-5)
        if role == "key":
            rope = oracles.Rope(case.rope.inv_freq.numpy())
            moment = rope.averaged(float64(case.statistics.query_moment[head]), POSITIONS.numpy())
        else:
            moment = float64(case.statistics.output_moment[head])
        directions = oracles.OSCAR.directions(rotation)
        diagonal = directions.T @ moment @ directions
        variances = np.linalg.eigvalsh(moment)[::-1]
        np.testing.assert_allclose(diagonal, np.diag(variances), atol=2e-5 * variances[0])


@every_head_dim
def test_hadamard_blocks_spread_the_variance_over_all_coordinates(head_dim):
    moment = torch.arange(1.0, head_dim + 1, dtype=torch.float64).diag()[None]
    rotation = composed_rotation(moment)
    variances = (rotation.transpose(1, 2) @ moment @ rotation)[0].diagonal()
    torch.testing.assert_close(variances, variances.mean().expand(head_dim), rtol=0.05, atol=0)


@sized(of_type(OSCAR))
def test_codes_are_the_papers(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    groups = 2 if head_dim == 256 else 1
    grid = oracles.TokenUniform(quantizer.num_bits, groups)
    rotation = float64(case.codec.rotation)
    y = float64(case.x) @ rotation
    quantile = quantizer.key_clip if role == "key" else quantizer.value_clip
    clipped = oracles.OSCAR.clipped(y.reshape(*y.shape[:-1], groups, -1), quantile).reshape(y.shape)
    step, middle = (token_major(case.blocks[name]).astype(np.float64) for name in ("step", "middle"))
    for stored, exact in zip((step, middle), grid.constants(clipped), strict=True):
        np.testing.assert_allclose(stored, exact, rtol=1e-3, atol=1e-5)
    levels = grid.levels(clipped, step, middle)
    clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
    assert clear.mean() > 0.97
    codes = bit_stream(case.blocks["codes"], quantizer.num_bits).reshape(levels.shape)
    assert (codes == grid.codes(levels))[clear].all()
    decoded = grid.decode(codes, step, middle) @ rotation.swapaxes(1, 2)
    np.testing.assert_allclose(case.codec.dequantize(case.blocks, case.first), decoded, atol=2e-5 * np.abs(y).max())


def test_clipping_lowers_the_error_of_two_bits(fitted):
    errors = []
    for quantizer in (OSCAR(), OSCAR(key_clip=1.0)):
        case = fitted("key", quantizer, 128)
        error = case.query @ (case.codec.dequantize(case.blocks, case.first) - case.x).transpose(2, 3)
        errors.append(float(error.square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_true_bits_are_the_papers():
    config = PRESETS["oscar"]
    assert (config.sinks, config.recent) == (64, 256)
    assert config.bits(64) == (2.5, 2.5)
    assert config.bits(128) == (2.25, 2.25)
    context, exact = 2**17, 64 + 256
    assert round((2.25 * (context - exact) + 16 * exact) / context, 2) == 2.28


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OSCAR(1), "OSCAR takes 2, 3 or 4 bits, not 1"),
        (lambda: OSCAR(key_clip=0.0), "key_clip and value_clip are quantiles"),
        (lambda: OSCAR(value_clip=1.5), "key_clip and value_clip are quantiles"),
        (lambda: OSCAR().layout(60), "head_dim 60 does not pack into bytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()


@pytest.mark.parametrize("role", ["key", "value"])
def test_it_needs_statistics_and_queries(role, refuses):
    assert OSCAR().needs_statistics
    assert OSCAR().needs_queries
    with refuses("this method needs statistics"):
        OSCAR().fit(LayerContext(role, 2, 64, torch.device("cpu"), torch.float32))
