"""Trellis codes: the best nibbles, what they decode to, and points that training does not better."""

import itertools

import numpy as np
import pytest
import torch

import oracles
from method_cases import float64, sums_of_entries
from qjl.trellis import POINTS, WIDTHS, best_nibbles, decode, even_trellis, points, train, trellis_code

every_width = pytest.mark.parametrize("width", WIDTHS)


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _losses(groups, own, following):
    """Mean squared error of each sequence at its best nibbles."""
    return (groups - decode(best_nibbles(groups, own, following), own, following)).square().mean((1, 2))


def _interval(samples):
    """Mean and the half-width of its 4-sigma interval."""
    return float(samples.mean()), 4 * float(samples.std()) / len(samples) ** 0.5


# The best nibbles


@pytest.mark.parametrize("length", [1, 2, 3])
@every_width
def test_no_sequence_of_nibbles_is_nearer(width, length):
    own, following = points(width)
    groups = _normal(40, length, width)
    every = torch.tensor(list(itertools.product(range(POINTS), repeat=length)))
    distances = (groups[:, None] - decode(every, own, following)).square().flatten(2).sum(-1)
    nibbles = best_nibbles(groups, own, following)
    assert nibbles.shape == (40, length)
    reached = (groups - decode(nibbles, own, following)).square().flatten(1).sum(-1)
    torch.testing.assert_close(reached, distances.amin(1), atol=1e-5, rtol=0)


@every_width
def test_the_nibbles_are_those_of_viterbis_algorithm(width):
    own, following = points(width)
    groups = _normal(300, 32, width)
    oracle = oracles.Trellis(float64(own), float64(following))
    nibbles, best = best_nibbles(groups, own, following), oracle.encode(float64(groups.flatten(1)))
    same = (nibbles.numpy() == best).all(1)
    assert same.mean() > 0.98
    mine, least = (((float64(groups.flatten(1)) - oracle.decode(x)) ** 2).mean(1) for x in (nibbles.numpy(), best))
    np.testing.assert_allclose(mine, least, rtol=0, atol=1e-6)  # the others tie


def test_the_nearest_point_of_each_group_alone_is_not_the_best_way():
    """Of the tests above: a search that looks at one nibble at a time loses."""
    own, following = points(1)
    groups = _normal(300, 32, 1)
    greedy = torch.zeros(300, 32, dtype=torch.int64)
    shift = torch.zeros(300, 1)
    for j in range(32):
        greedy[:, j] = torch.cdist(groups[:, j] - shift, own).argmin(1)
        shift = following[greedy[:, j]]
    loss = (groups - decode(greedy, own, following)).square().mean()
    assert loss > 1.5 * _losses(groups, own, following).mean()


# What they decode to


@pytest.mark.parametrize("dim", [64, 72, 80])
@every_width
def test_packed_nibbles_expand_to_what_was_chosen(width, dim):
    code = trellis_code(dim, width)
    z = _normal(2, 3, 128, dim)
    nibbles, chosen = code.encode(z)
    assert nibbles.shape == (2, 3, 128, dim // width)
    assert nibbles.dtype == torch.uint8
    assert nibbles.max() < POINTS
    decoded = sums_of_entries(code.decoder, nibbles)
    torch.testing.assert_close(decoded, chosen, atol=1e-6, rtol=0)
    assert torch.equal(code.nearest(z), chosen)
    oracle = oracles.Trellis(*(float64(x) for x in points(width)))
    np.testing.assert_allclose(chosen[0, 1], oracle.decode(nibbles[0, 1].numpy()), atol=1e-6)


@every_width
def test_a_nibble_moves_its_own_coordinates_and_the_next_ones(width):
    code = trellis_code(64, width).decoder
    nibbles = torch.full((1, 1, 64, 64 // width), 3, dtype=torch.uint8)
    decoded = []
    for value in (3, 9):
        for place in (2, 64 // width - 1):  # one amid the others, and the last, which nothing follows
            nibbles[:, :, :, place] = value
        decoded.append(sums_of_entries(code, nibbles)[0, 0, 0])
    moved = torch.nonzero(decoded[0] != decoded[1]).flatten().tolist()
    assert moved == [*range(2 * width, 4 * width), *range(64 - width, 64)]


@every_width
def test_a_token_is_coded_alike_in_any_company(width):
    code = trellis_code(64, width)
    z = _normal(1, 2, 640, 64)
    nibbles, _ = code.encode(z)
    assert torch.equal(code.encode(z[:, 1:, 100:164])[0], nibbles[:, 1:, 100:164])


@pytest.mark.parametrize(("dim", "width"), [(63, 1), (66, 2), (68, 4)])
def test_nibbles_that_do_not_fill_bytes_are_refused(dim, width, refuses):
    with refuses(f"{dim} coordinates, {width} to a nibble, do not fill bytes: use a multiple of {2 * width}"):
        trellis_code(dim, width)


@pytest.mark.parametrize(("bits", "widths"), [(64, (1, 1)), (96, (2, 1)), (160, (3, 2)), (200, (4, 3)), (256, (4, 4))])
def test_bits_are_spread_evenly_the_first_coordinates_get_those_left(bits, widths):
    code = even_trellis(bits, 64, torch.device("cpu"))
    z = _normal(1, 2, 640, 64)
    nibbles, chosen = code.encode(z)
    assert nibbles.shape == (1, 2, 640, bits // 4)
    decoded = sums_of_entries(code.decoder, nibbles)
    torch.testing.assert_close(decoded, chosen, atol=2e-3, rtol=0)
    assert torch.equal(code.nearest(z), chosen)
    left = bits % 64
    losses = (z - chosen).square().flatten(0, 2)
    ends = ((slice(0, left or 64), widths[0]), (slice(left, 64), widths[1]))
    for coordinates, width in ends:
        lloyd_max = oracles.LloydMax(width).distortion
        loss = float(losses[:, coordinates].mean())
        assert loss == pytest.approx(lloyd_max, rel=0.15) if width == 3 else loss < lloyd_max


# The points


@pytest.mark.parametrize(("width", "documented"), [(1, 0.0066), (2, 0.0878), (4, 0.3248)])
def test_distortions_are_the_documented_ones_and_below_lloyd_max(width, documented):
    mean, interval = _interval(_losses(_normal(3000, 128 // width, width), *points(width)))
    assert interval < 0.02 * documented
    assert mean == pytest.approx(documented, abs=interval + 5e-5)
    assert mean < 0.9 * oracles.LloydMax(4 // width).distortion


@every_width
def test_points_are_those_that_half_precision_holds(width):
    for table in points(width):
        assert table.shape == (POINTS, width)
        assert torch.equal(table, table.half().float())


@every_width
def test_one_more_step_of_training_changes_nothing_beyond_noise(width):
    own, following = points(width)
    *trained, before = train(own, following, _normal(4000, 32, width, seed=1))
    fresh = _normal(4000, 32, width, seed=2)
    change, interval = _interval(_losses(fresh, *trained) - _losses(fresh, own, following))
    assert abs(change) < interval + 5e-4 * before
    assert before == pytest.approx(float(_losses(fresh, own, following).mean()), rel=0.05)


@every_width
def test_training_takes_disturbed_points_back_down(width):
    """Of the test above: had the points been off by a little, one step would have shown it."""
    own, following = (x + 0.1 * _normal(POINTS, width, seed=3) for x in points(width))
    samples = _normal(1000, 32, width, seed=1)
    losses = []
    for _ in range(4):
        own, following, loss = train(own, following, samples)
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.995 * losses[0]
