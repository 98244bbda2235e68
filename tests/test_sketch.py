"""Sketches: their shapes, their rows, and the constants that make signs unbiased."""

import math

import numpy as np
import pytest
import torch

import oracles
from qjl.sketch import Sketch, haar_rotation, hadamard, mean_abs_coordinate

KINDS = ("gaussian", "orthogonal", "hadamard")
SIZES = [(8, 64), (64, 64), (100 * 8, 80), (24, 63), (200, 100), (512, 128)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_a_sketch_has_m_rows_of_expected_norm_root_d(kind, m, d):
    matrix = Sketch(m, d, kind).matrix
    assert matrix.shape == (m, d)
    assert matrix.dtype == torch.float32
    assert matrix.norm(dim=1).square().mean() == pytest.approx(d, rel=1e-4 if kind != "gaussian" else 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_is_regenerated_from_its_seed(kind):
    first = Sketch(64, 64, kind, seed=3)
    kept = first.matrix.clone()
    torch.manual_seed(99)
    assert torch.equal(Sketch(64, 64, kind, seed=3).matrix, kept)
    assert not torch.equal(Sketch(64, 64, kind, seed=4).matrix, kept)


@pytest.mark.parametrize(("m", "d"), [(64, 64), (160, 80), (40, 80), (256, 128)])
def test_each_block_of_an_orthogonal_sketch_has_orthogonal_rows_of_length_root_d(m, d):
    for block in Sketch(m, d, "orthogonal").matrix.double().split(d):
        torch.testing.assert_close(block @ block.T, d * torch.eye(len(block)).double(), atol=1e-4, rtol=0)


def test_blocks_of_an_orthogonal_sketch_are_independent():
    first, second = Sketch(128, 64, "orthogonal").matrix.split(64)
    assert (first @ second.T).abs().max() > 4


def test_gaussian_rows_are_standard_normal():
    entries = Sketch(4096, 64, "gaussian").matrix
    assert entries.mean().abs() < 4 / math.sqrt(entries.numel())
    assert entries.square().mean() == pytest.approx(1, abs=4 * math.sqrt(2 / entries.numel()))
    assert (entries**4).mean() == pytest.approx(3, abs=0.1)


def test_a_haar_rotation_is_orthogonal_and_has_no_preferred_direction():
    rotations = torch.stack([haar_rotation(16, seed) for seed in range(2000)])
    assert torch.allclose(rotations @ rotations.transpose(1, 2), torch.eye(16), atol=1e-5)
    assert rotations.mean(0).abs().max() < 5 * 0.25 / math.sqrt(2000)


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_hadamard_matrices_have_orthogonal_rows_of_signs(size):
    matrix = hadamard(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


def test_a_hadamard_sketch_of_an_odd_dimension_still_has_entries_of_one():
    assert torch.equal(Sketch(80, 80, "hadamard").matrix.abs(), torch.ones(80, 80))


@pytest.mark.parametrize("d", [8, 63, 64, 128, 256])
def test_the_orthogonal_constant_is_exact(d):
    expected = oracles.SignConstant.orthogonal(d)
    assert Sketch(64, d, "orthogonal").sign_scale * 64 == pytest.approx(expected, rel=1e-9)
    assert mean_abs_coordinate(d) == pytest.approx(1 / (math.sqrt(d) * expected), rel=1e-9)


def test_root_of_half_pi_would_be_too_large_for_orthogonal_rows():
    """By .39 % at d = 64 and .20 % at d = 128: the two constants must not be confused."""
    gaussian, orthogonal = Sketch(64, 64, "gaussian").sign_scale, Sketch(64, 64, "orthogonal").sign_scale
    assert gaussian / orthogonal - 1 == pytest.approx(0.0039, abs=5e-5)
    wider = Sketch(64, 128, "orthogonal").sign_scale
    assert Sketch(64, 128, "gaussian").sign_scale / wider - 1 == pytest.approx(0.0020, abs=5e-5)


def test_the_gaussian_constant_is_that_of_lemma_3_2():
    assert Sketch(512, 64, "gaussian").sign_scale == pytest.approx(oracles.SignConstant.gaussian / 512)


def test_bytes_of_a_sketch_are_those_of_its_matrix():
    assert Sketch(96, 64).nbytes == Sketch(96, 64).matrix.nbytes


@pytest.mark.parametrize("m", [0, -8, 12, 63])
def test_rows_that_do_not_fill_bytes_are_refused(m, refuses):
    with refuses(f"m={m} does not pack into bytes"):
        Sketch(m, 64)


def test_an_empty_dimension_is_refused(refuses):
    with refuses("d=0 must be positive"):
        Sketch(8, 0)


def test_an_unknown_kind_is_refused(refuses):
    with refuses("unknown sketch 'sparse'"):
        Sketch(8, 8, "sparse")


def test_only_hadamard_is_reported_biased():
    assert [Sketch(64, 64, kind).is_unbiased for kind in KINDS] == [True, True, False]


def test_the_matrix_equals_the_oracles_view_of_it():
    """The estimate of a key against itself is exact enough to tell rows from columns."""
    sketch = Sketch(512, 64, "orthogonal")
    key = np.random.default_rng(0).normal(size=64)
    estimator = oracles.QJLEstimator(sketch.matrix.numpy(), oracles.SignConstant.orthogonal(64))
    signs, norm = estimator.encode(key)
    assert estimator.estimate(key, signs, norm) == pytest.approx(key @ key, rel=0.05)
