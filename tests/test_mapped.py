"""What our own methods share: the best gain, the nearest levels, an exact scale, maps that undo each other."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import centred, decoded_codes, float64, levels_of, of_type, sized
from qjl.codebook import MAX_BITS
from qjl.methods.balanced import Balanced
from qjl.methods.transform import Transform

THREE_BITS = of_type(Balanced, code="trellis", num_bits=3)  # which the trellis does not have
LEVELS = [*of_type(Balanced, code="levels"), *THREE_BITS, *of_type(Transform)]


def _per_coordinate(function, x, levels):
    return np.stack([function(x[:, i], levels[i]) for i in range(x.shape[1])], -1)


def _of_rows_and_heads():
    return ((row, head) for row in range(2) for head in range(2))


def _weights(codec, head, dim):
    return np.ones(dim) if codec.weights is None else float64(codec.weights[head])


@sized(LEVELS)
def test_codes_are_the_nearest_levels_and_their_scale_is_exact(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    codec = case.codec
    decoded = decoded_codes(case)
    scales = case.blocks["scale"].flatten(2).numpy()
    for row, head in _of_rows_and_heads():
        y = centred(case, role, head, row, codec.mean is not None) @ float64(codec.key_map[head]).T
        weights = _weights(codec, head, head_dim)
        root = np.sqrt(weights)
        z = y / np.sqrt((y[:, weights > 0] ** 2).mean(-1, keepdims=True))
        levels = [levels_of(kind) for kind in codec.encoder.kinds[head % len(codec.encoder.kinds)]]
        found, loss = oracles.GainSearch(codec.gains, root).judge(
            z,
            decoded[row, head],
            lambda x, levels=levels: _per_coordinate(oracles.nearest, x, levels),
            lambda x, levels=levels: _per_coordinate(oracles.edge_margin, x, levels) > 1e-3,
            atol=4e-3,
        )
        assert found.all()
        assert loss.max() < 2e-3  # a coordinate at an edge may go either way
        assert np.quantile(loss, 0.9) < 1e-4
        scale = oracles.ExactRescale.scale(y * root, decoded[row, head] * root)
        assert np.abs(scales[row, head] - oracles.LogScale.levels(scale, float(codec.scale.unit[head]))).max() < 0.55


@sized([*of_type(Balanced), *of_type(Transform)])
def test_estimates_are_exact_along_the_token_itself(role, quantizer, head_dim, fitted):
    """In the metric of the code, up to the 2.9 % of an 8-bit scale."""
    case = fitted(role, quantizer, head_dim)
    decoded = case.codec.dequantize(case.blocks, case.first)
    for head in range(2):
        residual = centred(case, role, head, 0, case.codec.mean is not None)
        estimate = residual + float64(decoded[0, head] - case.x[0, head])
        y, y_hat = (x @ float64(case.codec.key_map[head]).T for x in (residual, estimate))
        weights = _weights(case.codec, head, y.shape[1])
        ratio = (y * y_hat * weights).sum(-1) / (y * y * weights).sum(-1)
        assert np.abs(ratio - 1).max() < 0.04
        assert abs(ratio.mean() - 1) < 0.02


@sized([*of_type(Balanced, code="levels"), *of_type(Balanced, code="trellis"), *of_type(Transform)])
def test_the_query_map_undoes_the_key_map(role, quantizer, head_dim, fitted):
    codec = fitted(role, quantizer, head_dim).codec
    product = codec.query_map.float().transpose(1, 2) @ codec.key_map.float()
    torch.testing.assert_close(product, torch.eye(head_dim).expand(2, -1, -1), atol=0.01, rtol=0)


def test_true_bits_are_those_of_the_docstrings():
    assert Transform(3).bits(64) == 3 + 8 / 64
    assert Transform(0.5).bits(128) == 0.5 + 8 / 128
    assert Balanced(2, "signs").bits(128) == 2 + 8 / 128
    assert Balanced(1.5, "trellis").bits(64) == 1.5 + 8 / 64


@pytest.mark.parametrize("method", [Balanced, Transform])
@pytest.mark.parametrize("num_bits", [0, -1, 8.5, float("nan")])
def test_bits_out_of_range_are_refused(method, num_bits, refuses):
    with refuses(f"num_bits must lie between 0 and {MAX_BITS}, not {num_bits}"):
        method(num_bits)


@pytest.mark.parametrize("method", [Balanced, Transform])
def test_bits_that_do_not_fill_bytes_are_refused(method, refuses):
    with refuses("2.55 bits x head_dim 64 do not fill bytes"):
        method(2.55).layout(64)
