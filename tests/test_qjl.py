"""QJL against the paper: signs and norms, and outlier channels sketched apart."""

import numpy as np
import pytest

import oracles
from method_cases import float64, of_type, scores_of, sized, token_major
from qjl.methods.qjl import QJL


@sized(of_type(QJL, outliers=0))
def test_codes_are_the_signs_of_the_papers_sketch(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    sketch = quantizer.sketch_for(head_dim)
    constant = oracles.SignConstant
    row = constant.orthogonal(head_dim) if quantizer.sketch == "orthogonal" else constant.gaussian
    oracle = oracles.QJLEstimator(sketch.matrix.numpy(), row)
    x = float64(case.x)
    signs, norms = oracle.encode(x)
    clear = oracle.margin(x) > 1e-5
    assert clear.mean() > 0.99
    stored = np.unpackbits(token_major(case.blocks["codes"]), axis=-1, bitorder="little")
    assert (stored == signs)[clear].all()
    np.testing.assert_allclose(float64(case.blocks["scale"]).reshape(norms.shape), norms * oracle.scale, rtol=1e-3)
    query = case.query[:, :, :3]
    estimate = oracle.estimate(float64(query)[:, :, :, None], stored[:, :, None], norms[:, :, None])
    tolerance = 2e-3 * np.abs(estimate).max()
    np.testing.assert_allclose(scores_of(case.codec, query, case.blocks, case.first), estimate, atol=tolerance)


@sized([case for case in of_type(QJL) if case.values[1].outliers])
def test_outlier_channels_are_sketched_apart_as_in_the_public_code(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    rows = quantizer.outlier_rows(head_dim)
    sketch = quantizer.sketch_for(head_dim)
    oracle = oracles.OutlierQJL(
        sketch.matrix.numpy(),
        oracles.SignConstant.orthogonal(head_dim),
        quantizer.outliers,
        rows,
        quantizer.group_size,
    )
    scores = scores_of(case.codec, case.query, case.blocks, case.first)
    for row in range(2):
        for head in range(2):
            keys = float64(case.x[row, head])
            (signs, norms), (outlier_signs, outlier_norms), mask = oracle.encode(keys)
            index = case.blocks["outlier_index"][row, head].flatten(0, 1)
            for group, channels in enumerate(index.tolist()):
                assert sorted(channels) == np.flatnonzero(mask[group * quantizer.group_size]).tolist()
            clear = np.ones(len(keys), dtype=bool)  # no projection so near zero that machines differ in its sign
            for name, part, expected, x in (
                ("codes", oracle.inlier, signs, np.where(mask, 0, keys)),
                ("outlier_codes", oracle.outlier, outlier_signs, np.where(mask, keys, 0)),
            ):
                stored = np.unpackbits(token_major(case.blocks[name])[row, head], axis=-1, bitorder="little")
                assert (stored == expected)[part.margin(x) > 1e-5].all()
                clear &= (part.margin(x) > 1e-5).all(-1)
            assert clear.mean() > 0.9
            for name, expected in (("scale", norms), ("outlier_scale", outlier_norms)):
                np.testing.assert_allclose(case.blocks[name][row, head].flatten().float(), expected, rtol=1e-3)
            np.testing.assert_allclose(norms**2 + outlier_norms**2, (keys**2).sum(-1))
            code = oracle.encode(keys)
            expected = np.stack([oracle.estimate(query, code) for query in float64(case.query[row, head, :3])])
            tolerance = 2e-3 * np.abs(expected).max()
            np.testing.assert_allclose(scores[row, head, :3][:, clear], expected[:, clear], atol=tolerance)


def test_true_bits_are_those_of_the_docstring():
    assert QJL(2).bits(64) == 2 + 16 / 64
    assert QJL(2, outliers=8, outlier_ratio=2).bits(128) == 4 + 32 / 128 + 8 * 8 / (32 * 128)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QJL(outliers=-1), "QJL needs outliers >= 0"),
        (lambda: QJL(group_size=48), "a group_size that divides 64"),
        (lambda: QJL(group_size=0), "a group_size that divides 64"),
        (lambda: QJL(group_size=-32), "a group_size that divides 64"),
        (lambda: QJL(1, outliers=8, outlier_ratio=2), "outlier_ratio <= sketch_ratio"),
        (lambda: QJL(2, outliers=64).layout(64), "64 outlier channels do not fit head_dim 64"),
        (lambda: QJL(2, outliers=8).layout(264), "8 outlier channels do not fit head_dim 264"),
        (lambda: QJL(2, "sparse").layout(64), "unknown sketch 'sparse'"),
        (lambda: QJL(0.5).layout(72), "m=36 does not pack into bytes"),
        (lambda: QJL(0.3).layout(64), "has no whole number of rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
