"""CalibQuant against the paper and its public code."""

import numpy as np
import pytest

import oracles
from method_cases import every_head_dim, float64, of_type, scores_of, sized, token_major
from qjl.methods.calibquant import CalibQuant
from qjl.packed import BLOCK
from qjl.presets import PRESETS, from_dict

WITH_G = {"key": {"method": "calibquant", "tau": 3.0}, "value": {"method": "calibquant"}}


@sized(of_type(CalibQuant))
def test_bits_and_scores_are_the_papers(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    oracle = oracles.CalibQuant(quantizer.spread)
    stored = np.unpackbits(token_major(case.blocks["codes"]), axis=-1, bitorder="little").astype(bool)
    decoded = case.codec.dequantize(case.blocks, case.first)
    queries = case.query[:, :, :7]
    scores = scores_of(case.codec, queries, case.blocks, case.first)
    for row in range(2):
        for head in range(2):
            for block in range(2):
                own = slice(block * BLOCK, (block + 1) * BLOCK)
                tokens = float64(case.x[row, head, own])
                bits, alpha, beta = oracle.encode(tokens)
                clear = np.abs(tokens - (alpha + beta) / 2) > 2e-3 * np.abs(tokens).max(0)
                assert clear.mean() > 0.97
                assert (stored[row, head, own] == bits)[clear].all()
                expected = oracle.decode(stored[row, head, own], alpha, beta)
                np.testing.assert_allclose(decoded[row, head, own], expected, rtol=2e-3, atol=5e-3)
                estimate = oracle.post_scaled(float64(queries[row, head]), stored[row, head, own], alpha, beta)
                np.testing.assert_allclose(scores[row, head, :, own], estimate, atol=4e-3 * np.abs(estimate).max())


@every_head_dim
@pytest.mark.parametrize(("role", "spread"), [("key", 0.5), ("value", 0.3)])
def test_narrowed_extremes_halve_the_error_of_the_plain_ones(role, spread, head_dim, fitted):
    errors = []
    for one in (spread, 1.0):
        case = fitted(role, CalibQuant(one), head_dim)
        errors.append(float((case.codec.dequantize(case.blocks, case.first) - case.x).square().mean().sqrt()))
    assert errors[0] < 0.6 * errors[1]


@every_head_dim
def test_true_bits_are_those_of_the_docstring(head_dim):
    assert CalibQuant().bits(head_dim) == CalibQuant(0.3).bits(head_dim) == 1.5


def test_the_preset_is_the_public_codes():
    config = PRESETS["calibquant"]
    assert (config.key, config.value) == (CalibQuant(0.5), CalibQuant(0.3))
    assert (config.sinks, config.recent) == (0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibQuant(0), "spread must lie above 0 and be at most 1, not 0"),
        (lambda: CalibQuant(1.5), "spread must lie above 0 and be at most 1, not 1.5"),
        (lambda: from_dict(WITH_G, "own"), "method 'calibquant' in preset 'own' has no field 'tau': it takes spread"),
        (lambda: CalibQuant().layout(60), "head_dim 60 does not pack into bytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
