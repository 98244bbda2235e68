"""TurboESM against the paper and its public code: singular vectors, levels from data, the sign of the residual."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

import oracles
from method_cases import every_head_dim, float64, of_type, sized
from qjl.methods.base import POSITIONS, LayerContext
from qjl.methods.bitpacking import unpack_channels
from qjl.methods.kmeans import lloyd
from qjl.methods.turboesm import TurboESM
from qjl.presets import PRESETS

CPU = torch.device("cpu")


def _moment(case, head):
    """Uncentred second moment of the keys as cached."""
    mean = float64(case.statistics.key_mean[head])
    moment = float64(case.statistics.key_covariance[head]) + np.outer(mean, mean)
    return oracles.Rope(case.rope.inv_freq.numpy()).averaged(moment, POSITIONS.numpy())


def _samples(case, role, head):
    """129 quantiles of each coordinate that is coded."""
    if role == "value":
        return np.sort(float64(case.statistics.value_quantiles[head]).ravel())
    deviations = np.sqrt(np.linalg.eigvalsh(_moment(case, head)))
    quantiles = [NormalDist().inv_cdf((i + 0.5) / 129) for i in range(129)]
    return np.sort(np.outer(deviations, quantiles).ravel())


def _levels(codec, head):
    """The 8 levels, and what the sign of the residual adds."""
    stored = float64(codec.levels[head])
    if len(stored) == 8:
        return stored, 0
    pairs = stored.reshape(8, 2)
    return pairs.mean(1), np.ptp(pairs, 1).mean() / 2


@every_head_dim
@pytest.mark.parametrize("residual", [True, False])
def test_keys_are_turned_to_their_singular_vectors_after_rope(residual, head_dim, fitted):
    case = fitted("key", TurboESM(residual), head_dim)
    for head in range(2):
        rotation, moment = float64(case.codec.rotation[head]), _moment(case, head)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(head_dim), atol=2e-3)
        turned = rotation @ moment @ rotation.T
        np.testing.assert_allclose(turned, np.diag(turned.diagonal()), atol=2e-3 * np.trace(moment))
        spectrum = np.linalg.eigvalsh(moment)
        np.testing.assert_allclose(np.sort(turned.diagonal()), spectrum, atol=2e-3 * spectrum.max())


def test_values_are_not_turned(fitted):
    assert torch.equal(fitted("value", TurboESM(False), 64).codec.rotation[1].float(), torch.eye(64))


@sized(of_type(TurboESM))
def test_levels_and_residual_are_the_means_of_the_data(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    for head in range(2):
        levels, residual = _levels(case.codec, head)
        samples = _samples(case, role, head)
        spread = samples.std()
        np.testing.assert_allclose(levels, oracles.KMeans.levels(samples, levels, 1), atol=3e-3 * spread)
        left = np.abs(samples - oracles.nearest(samples, levels)).mean()
        assert residual == pytest.approx(left if quantizer.residual else 0, abs=3e-3 * spread)
        error = np.square(samples - oracles.nearest(samples, levels)).mean()
        ours = oracles.LloydMax(3).levels * spread + samples.mean()
        assert error < np.square(samples - oracles.nearest(samples, ours)).mean()


@sized(of_type(TurboESM))
def test_codes_are_the_nearest_level_and_the_sign_of_what_it_leaves(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    codes = unpack_channels(case.blocks["codes"], quantizer.num_bits).numpy()
    decoded = float64(case.codec.dequantize(case.blocks, case.first))
    for head in range(2):
        rotation = float64(case.codec.rotation[head])
        y = float64(case.x[:, head]) @ rotation.T
        levels, residual = _levels(case.codec, head)
        nearest = oracles.nearest(y, levels)
        margin = 1e-3 * np.abs(levels).max()
        clear = oracles.edge_margin(y, levels) > margin
        if quantizer.residual:
            clear &= np.abs(y - nearest) > margin
        assert clear.mean() > 0.9
        expected = np.searchsorted(levels, nearest - 1e-9)
        if quantizer.residual:
            expected = 2 * expected + (y > nearest)
        assert (codes[:, head] == expected)[clear].all()
        table = float64(case.codec.levels[head])
        np.testing.assert_allclose(decoded[:, head], table[codes[:, head]] @ rotation, atol=1e-4 * np.abs(y).max())
        assert np.abs(nearest + residual * np.sign(y - nearest) - table[codes[:, head]])[clear].max() < margin


def test_the_sign_of_the_residual_lowers_the_error(fitted):
    errors = []
    for residual in (False, True):
        case = fitted("key", TurboESM(residual), 128)
        errors.append(float((case.codec.dequantize(case.blocks, case.first) - case.x).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_lloyds_iteration_is_that_of_the_oracle(generator):
    samples = torch.randn(3, 500, generator=generator).double().sort(dim=1).values
    start = torch.tensor([[-1.0, 0.1, 0.7, 2.0]], dtype=torch.float64).expand(3, -1)
    found = lloyd(samples, torch.ones_like(samples), start)
    for head in range(3):
        expected = oracles.KMeans.levels(samples[head].numpy(), start[head].numpy(), 300)
        np.testing.assert_allclose(found[head], expected, atol=1e-9)


def test_lloyds_iteration_keeps_the_level_of_an_empty_cell():
    samples = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    levels = lloyd(samples, torch.ones_like(samples), torch.tensor([[1.5, 50.0]], dtype=torch.float64))
    assert levels.tolist() == [[1.0, 50.0]]


def test_true_bits_are_those_of_the_docstring():
    assert [TurboESM(residual).bits(dim) for residual in (True, False) for dim in (64, 128)] == [4, 4, 3, 3]
    config = PRESETS["turboesm"]
    assert (config.key, config.value) == (TurboESM(), TurboESM(residual=False))
    assert (config.sinks, config.recent) == (0, 0)


def test_what_it_needs_is_said(refuses):
    assert TurboESM().needs_statistics
    assert not TurboESM().needs_queries
    with refuses("this method needs statistics"):
        TurboESM().fit(LayerContext("key", 2, 64, CPU, torch.float32))
    with refuses("head_dim 100 does not pack into bytes"):
        TurboESM().layout(100)
