"""The balanced metric, and its codes of signs and of a trellis; codes of levels are in test_mapped.py."""

import numpy as np
import pytest

import oracles
from method_cases import (
    bit_stream,
    centred,
    decoded_codes,
    every_head_dim,
    float64,
    levels_of,
    moments,
    of_type,
    sized,
    token_major,
)
from qjl.codebook import REFINEMENTS
from qjl.methods.balanced import Balanced
from qjl.sketch import Sketch
from qjl.trellis import points

TRELLIS = [case for case in of_type(Balanced, code="trellis") if case.values[1].num_bits != 3]  # 3: test_mapped.py
ROWS_AND_HEADS = [(row, head) for row in range(2) for head in range(2)]


@every_head_dim
@pytest.mark.parametrize(("code", "rows"), [("levels", 1), ("trellis", 1), ("signs", 2)])
def test_the_key_map_is_the_root_of_the_balanced_metric(code, rows, head_dim, fitted):
    case = fitted("key", Balanced(2, code), head_dim)
    for head in range(2):
        metric = oracles.BalancedMetric.geometric_mean(*moments(case, head))
        key_map = float64(case.codec.key_map[head])
        gram = key_map.T @ key_map
        scale = np.trace(gram) / np.trace(metric)
        np.testing.assert_allclose(gram / scale, metric, atol=3e-3 * np.abs(metric).max())
        assert key_map.shape[0] == rows * head_dim


@sized(of_type(Balanced, code="signs"))
def test_signs_are_those_of_the_mapped_tokens(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    stored = np.unpackbits(token_major(case.blocks["codes"]), axis=-1, bitorder="little")
    for row, head in ROWS_AND_HEADS:
        y = centred(case, role, head, row) @ float64(case.codec.key_map[head]).T
        if y.shape[1] > head_dim:
            matrix = Sketch(y.shape[1], head_dim, "orthogonal", quantizer.seed).matrix
            expected = oracles.RefinedSigns(float64(matrix), REFINEMENTS).encode(y)
            assert (stored[row, head] == expected).mean() > 0.98
        else:
            clear = np.abs(y) > 2e-3 * np.abs(y).mean()
            assert (stored[row, head] == (y >= 0))[clear].all()
        assert _scale_error(case, row, head, y, 2.0 * stored[row, head] - 1) < 0.51


@sized(TRELLIS)
def test_nibbles_are_the_best_way_through_the_trellis(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    stored, decoded = bit_stream(case.blocks["codes"], 4), decoded_codes(case)
    for row, head in ROWS_AND_HEADS:
        y = centred(case, role, head, row) @ float64(case.codec.key_map[head]).T
        z = y / np.sqrt((y**2).mean(-1, keepdims=True))
        for bits, coordinates, nibbles in _parts(quantizer, head_dim):
            if bits == 3:
                continue
            oracle = oracles.Trellis(*(float64(x) for x in points(4 // bits)))
            mine, best = stored[row, head][:, nibbles], oracle.encode(z[:, coordinates])
            own = z[:, coordinates]
            loss, least = (((own - oracle.decode(x)) ** 2).mean(-1) for x in (mine, best))
            np.testing.assert_allclose(loss, least, rtol=0, atol=1e-5)
            assert (mine == best).all(-1).mean() > 0.95
            np.testing.assert_allclose(decoded[row, head][:, coordinates], oracle.decode(mine), atol=2e-3)
        assert _scale_error(case, row, head, y, decoded[row, head]) < 0.55


@sized(TRELLIS)
def test_coordinates_of_three_bits_keep_their_levels_beside_a_trellis(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    decoded = decoded_codes(case)
    for index, (bits, coordinates, _) in enumerate(_parts(quantizer, head_dim)):
        if bits != 3:
            continue
        kinds = (case.codec.encoder.first, case.codec.encoder.rest)[index].kinds[0]
        for row, head in ROWS_AND_HEADS:
            y = centred(case, role, head, row) @ float64(case.codec.key_map[head]).T
            own = (y / np.sqrt((y**2).mean(-1, keepdims=True)))[:, coordinates]
            for i, levels in enumerate(map(levels_of, kinds)):
                clear = oracles.edge_margin(own[:, i], levels) > 1e-3
                nearest = oracles.nearest(own[:, i], levels)
                np.testing.assert_allclose(decoded[row, head][clear, coordinates.start + i], nearest[clear], atol=4e-3)


def _parts(quantizer, head_dim):
    """Bits of a coordinate, the coordinates and the nibbles that take them; the first coordinates take one bit more."""
    bits, left = divmod(int(quantizer.num_bits * head_dim), head_dim)
    nibbles = left * (bits + 1) // 4
    parts = [(bits + 1, slice(0, left), slice(0, nibbles)), (bits, slice(left, head_dim), slice(nibbles, None))]
    return parts if left else parts[1:]


def _scale_error(case, row, head, y, decoded):
    """Of the stored scale against the exact rescale, in steps of 1/12 octave: half a step is rounding."""
    exact = oracles.LogScale.levels(oracles.ExactRescale.scale(y, decoded), float(case.codec.scale.unit[head]))
    return np.abs(case.blocks["scale"].flatten(2).numpy()[row, head] - exact).max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Balanced(2, "polar"), "balanced takes code levels, trellis or signs, not polar"),
        (lambda: Balanced(0.5, "trellis"), "code trellis takes 1 to 4 bits, not 0.5"),
        (lambda: Balanced(5, "trellis"), "code trellis takes 1 to 4 bits, not 5"),
        (lambda: Balanced(float("nan"), "trellis"), "code trellis takes 1 to 4 bits, not nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
