"""RaBitQ and its extension against the papers: the nearest grid point, the exact scale, no bias."""

import itertools

import numpy as np
import pytest
import torch

import oracles
from method_cases import bit_stream, centred, float64, of_type, scores_of, sized
from qjl.methods.base import LayerContext
from qjl.methods.rabitq import RaBitQ, nearest_grid_codes
from qjl.packed import BLOCK
from qjl.presets import PRESETS
from qjl.sketch import haar_rotation

CPU = torch.device("cpu")


def _rotated(case, role, quantizer):
    """Tokens less the centroid that the statistics say, rotated, in float64."""
    x = np.stack([[centred(case, role, head, row, quantizer.centre) for head in range(2)] for row in range(2)])
    return x @ float64(haar_rotation(x.shape[-1])).T


def _points(case, quantizer):
    top = 2**quantizer.num_bits - 1
    return bit_stream(case.blocks["codes"], quantizer.num_bits) - top / 2


@sized(of_type(RaBitQ, num_bits=1))
def test_one_bit_is_the_sign(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    y = _rotated(case, role, quantizer)
    clear = np.abs(y) > 1e-4 * np.linalg.norm(y, axis=-1, keepdims=True)
    assert clear.mean() > 0.99
    assert ((_points(case, quantizer) > 0) == (y >= 0))[clear].all()


@sized([case for case in of_type(RaBitQ) if case.values[1].num_bits > 1])
def test_codes_are_the_grid_point_at_the_least_angle(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    y, points = _rotated(case, role, quantizer), _points(case, quantizer)
    oracle = oracles.RaBitQ(quantizer.num_bits)
    same = []
    for token in range(0, y.shape[2], 9):
        mine, stored = y[token % 2, token // 2 % 2, token], points[token % 2, token // 2 % 2, token]
        best = oracle.best(mine)
        assert oracle.cosine(mine, stored) > oracle.cosine(mine, best) - 1e-6
        same.append((best == stored).all())
    assert np.mean(same) > 0.9  # others are as near, up to rounding


@sized(of_type(RaBitQ))
def test_the_scale_is_the_ratio_of_the_papers_two_scalars(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    y, points = _rotated(case, role, quantizer), _points(case, quantizer)
    norms, cosine = np.linalg.norm(y, axis=-1), oracles.RaBitQ.cosine(y, points)
    ratio = norms / cosine / np.linalg.norm(points, axis=-1)
    np.testing.assert_allclose(case.blocks["scale"].flatten(2), ratio, rtol=1e-3)
    query = case.query[:, :, :3]
    turned = float64(query) @ float64(haar_rotation(head_dim)).T
    estimate = oracles.RaBitQ.estimate(turned[:, :, :, None], y[:, :, None], points[:, :, None])
    estimate += float64(query) @ np.swapaxes(float64(case.x) - y @ float64(haar_rotation(head_dim)), 2, 3)
    scores = scores_of(case.codec, query, case.blocks, case.first)
    np.testing.assert_allclose(scores, estimate, atol=2e-3 * np.abs(estimate).max())


@pytest.mark.parametrize(("bits", "dim"), [(1, 8), (2, 6), (3, 4), (4, 3)])
def test_no_point_of_the_whole_grid_is_nearer(bits, dim, generator):
    y = torch.randn(50, dim, generator=generator)
    levels = np.arange(2**bits) - (2**bits - 1) / 2
    grid = np.array(list(itertools.product(levels, repeat=dim)))
    best = (float64(y) @ grid.T / np.linalg.norm(grid, axis=-1)).max(-1) / np.linalg.norm(y, axis=-1)
    points = nearest_grid_codes(y, bits).numpy() - (2**bits - 1) / 2
    np.testing.assert_allclose(oracles.RaBitQ.cosine(float64(y), points), best, atol=1e-6)


def test_coordinates_of_zero_stay_next_to_zero():
    y = torch.tensor([[0.0, 3.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    points = nearest_grid_codes(y, 3) - 3.5
    assert (points[0, [0, 2]].abs() == 0.5).all()
    assert points[0, 1] == 3.5
    assert points[0, 3] == -1.5


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_estimates_have_no_bias_over_rotations(bits, generator):
    """Theorem 3.2: of <q, k>, for a query that is not along the key."""
    key = torch.randn(1, 1, BLOCK, 64, generator=generator)
    query = key + 2 * torch.randn(1, 1, BLOCK, 64, generator=generator)
    first, exact = torch.zeros(1, 1, dtype=torch.int64), (query * key).sum(-1)[0, 0]
    errors = []
    for seed in range(60):
        codec = RaBitQ(bits, centre=False, seed=seed).fit(LayerContext("key", 1, 64, CPU, torch.float32))
        scores = scores_of(codec, query, codec.quantize(key, first), first).diagonal(dim1=2, dim2=3)[0, 0]
        errors.append(float((scores / exact.abs().mean() - exact / exact.abs().mean()).mean()))
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(60) + 2e-4
    assert np.std(errors) / np.sqrt(60) < 0.01


def test_true_bits_are_those_of_the_docstring():
    for bits in (1, 2, 3, 4):
        assert RaBitQ(bits).bits(128) == bits + 16 / 128
        config = PRESETS[f"rabitq-{bits}"]
        assert config.key == config.value == RaBitQ(bits)
        assert (config.sinks, config.recent) == (0, 0)


def test_only_a_centroid_needs_statistics():
    assert RaBitQ().needs_statistics
    assert not RaBitQ().needs_queries
    assert not RaBitQ(centre=False).needs_statistics


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RaBitQ(0), "RaBitQ takes 1 to 4 whole bits, not 0"),
        (lambda: RaBitQ(5), "RaBitQ takes 1 to 4 whole bits, not 5"),
        (lambda: RaBitQ().layout(100), "head_dim 100 does not pack into bytes"),
        (lambda: RaBitQ().fit(LayerContext("key", 2, 64, CPU, torch.float32)), "this method needs statistics"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
