"""The claims of the papers, with confidence intervals over seeds."""

import itertools
import math
from functools import lru_cache

import numpy as np
import pytest
import torch

import oracles
from method_cases import scores_of
from qjl.codebook import MAX_BITS, distortion, lloyd_max, scalar_distortion
from qjl.methods.balanced import Balanced
from qjl.methods.base import LayerContext
from qjl.methods.qjl import QJL
from qjl.methods.transform import water_fill
from qjl.sketch import Sketch, hadamard

DIM = 64
CPU = torch.device("cpu")


@lru_cache(maxsize=2)
def _pairs(related=True):
    """Queries and keys ``float64 [400, 64]`` whose directions are as uneven as a model's; related ones have cosines
    from -1 to 1."""
    rng = np.random.default_rng(0)
    root = (np.arange(1, DIM + 1) ** -0.5)[:, None] * np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    keys = rng.normal(size=(400, DIM)) @ root + 0.2 * rng.normal(size=DIM)
    mix = rng.uniform(-1, 1, size=(400, 1)) if related else 0
    return (1 - np.abs(mix)) * (rng.normal(size=(400, DIM)) @ root) + 1.5 * mix * keys, keys


@lru_cache(maxsize=4)
def _estimates(kind, m, seeds, related=True):
    """What the library's sketch says of every pair, ``[seeds, pairs]``."""
    queries, keys = (torch.tensor(x, dtype=torch.float32) for x in _pairs(related))
    out = []
    for seed in range(seeds):
        sketch = Sketch(m, DIM, kind, seed)
        signs = torch.where(keys @ sketch.matrix.T >= 0, 1.0, -1.0)
        out.append(sketch.sign_scale * keys.norm(dim=1) * ((queries @ sketch.matrix.T) * signs).sum(1))
    return torch.stack(out).double().numpy()


def _slope(estimates):
    """Regression of the estimates on the truth for each seed: one number per seed, 1 without bias."""
    queries, keys = _pairs()
    truth = (queries * keys).sum(1)
    return estimates @ truth / (truth @ truth)


def _interval(samples):
    """Mean and the half-width of its 4-sigma interval."""
    return samples.mean(), 4 * samples.std(ddof=1) / math.sqrt(len(samples))


# Lemma 3.2: unbiased


@pytest.mark.parametrize(("kind", "m", "seeds"), [("gaussian", 512, 900), ("orthogonal", 256, 900)])
def test_the_estimator_is_unbiased(kind, m, seeds):
    mean, width = _interval(_slope(_estimates(kind, m, seeds)))
    assert width < 0.0025  # narrow enough to tell the two constants, .39 % apart
    assert abs(mean - 1) < width


def test_the_wrong_constant_would_be_seen():
    """Of the test above: sqrt(pi/2)/m on orthogonal rows is outside the interval."""
    slopes = _slope(_estimates("orthogonal", 256, 900))
    mean, width = _interval(slopes * math.sqrt(math.pi / 2) / 256 / Sketch(256, DIM).sign_scale)
    assert mean - 1 > width


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_every_single_pair_is_estimated_without_bias(kind):
    """Not only on average over pairs: z-scores of 400 pairs look like those of chance."""
    queries, keys = _pairs()
    estimates = _estimates(kind, 64, 600)
    errors = estimates.mean(0) - (queries * keys).sum(1)
    z = errors / (estimates.std(0, ddof=1) / math.sqrt(len(estimates)))
    assert np.abs(z).max() < 5
    assert 0.6 < z.std() < 1.5


def test_the_library_estimates_without_bias_through_its_codes():
    """The same through quantize and score, norms in half precision and all."""
    queries, keys = (torch.tensor(x, dtype=torch.float32) for x in _pairs())
    first = torch.zeros(1, 5, dtype=torch.int64)
    slopes = []
    for seed in range(150):
        codec = QJL(2, seed=seed).fit(LayerContext("key", 1, DIM, CPU, torch.float32))
        blocks = codec.quantize(keys[None, None, :320], first)
        scores = scores_of(codec, queries[None, None, :320], blocks, first)[0, 0]
        truth = queries[:320] @ keys[:320].T
        slopes.append(float((scores * truth).sum() / truth.square().sum()))
    mean, width = _interval(np.array(slopes))
    assert width < 0.012
    assert abs(mean - 1) < width


def test_hadamard_is_reported_biased_and_is():
    """A vector with one entry: every projection has the same size, and sqrt(pi/2) overrates it by a quarter."""
    spike = torch.eye(DIM)[5]
    ratios = []
    for seed in range(50):
        sketch = Sketch(DIM, DIM, "hadamard", seed)
        assert not sketch.is_unbiased
        projected = sketch.matrix @ spike
        ratios.append(float(sketch.sign_scale * projected.abs().sum()))
    assert np.allclose(ratios, math.sqrt(math.pi / 2), rtol=1e-5)


def test_hadamard_is_biased_on_two_entries_too_and_the_others_are_not():
    key = torch.zeros(DIM)
    key[3], key[40] = 3.0, 1.0
    query = torch.eye(DIM)[3]
    slopes = {}
    for kind in ("gaussian", "orthogonal", "hadamard"):
        found = []
        for seed in range(400):
            sketch = Sketch(256, DIM, kind, seed)
            signs = torch.where(sketch.matrix @ key >= 0, 1.0, -1.0)
            estimate = sketch.sign_scale * key.norm() * ((sketch.matrix @ query) * signs).sum()
            found.append(float(estimate / (query @ key)))
        slopes[kind] = _interval(np.array(found))
    for kind in ("gaussian", "orthogonal"):
        mean, width = slopes[kind]
        assert abs(mean - 1) < width < 0.03
    mean, width = slopes["hadamard"]
    assert mean - 1 > 0.25 > width


def test_hadamard_is_right_on_average_over_directions():
    slopes = _slope(_estimates("hadamard", 64, 300))
    assert _interval(slopes)[0] == pytest.approx(1, abs=0.1)
    assert hadamard(DIM).abs().eq(1).all()


# Variance


def _variance_per_row(kind, squared_cosine):
    """Derived for large d, in units of ||q||^2 ||k||^2 / d.

    Of orthogonal rows the share across the key is that of Gaussian rows less what the fixed length of sign(S k) takes
    away; along the key only the spread of ||S k||_1 on the sphere is left: pi/2 (1 - 2/pi - 1/pi).
    """
    if kind == "gaussian":
        return math.pi / 2 - squared_cosine
    return (math.pi / 2 - 1) * (1 - squared_cosine) + (math.pi / 2 - 3 / 2) * squared_cosine


def _scaled_variance(kind, m, seeds, related=True):
    """Variance x d of the error in units of ||q||^2 ||k||^2, and the mean squared cosine."""
    queries, keys = _pairs(related)
    norms = np.linalg.norm(queries, axis=1) * np.linalg.norm(keys, axis=1)
    truth = (queries * keys).sum(1)
    measured = (((_estimates(kind, m, seeds, related) - truth) / norms) ** 2).mean() * DIM
    return measured, ((truth / norms) ** 2).mean()


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("related", [False, True])
def test_the_variance_is_the_derived_one_within_five_percent(related, kind, ratio):
    measured, squared_cosine = _scaled_variance(kind, ratio * DIM, 300, related)
    assert measured == pytest.approx(_variance_per_row(kind, squared_cosine) / ratio, rel=0.05)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_unrelated_pairs_have_the_simpler_variance_of_the_notes(ratio):
    """(pi/2 - 1)(1 - cos^2) d/m leaves out a term that counts only near cosines of 1."""
    measured, squared_cosine = _scaled_variance("orthogonal", ratio * DIM, 300, related=False)
    assert squared_cosine < 0.1
    assert measured == pytest.approx((math.pi / 2 - 1) * (1 - squared_cosine) / ratio, rel=0.05)


def test_orthogonal_rows_lower_the_variance_of_unrelated_pairs_by_2_75():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 500, DIM, generator=generator)
    key = key - (key * query).sum(1, keepdim=True) / query.square().sum(1, keepdim=True) * query
    variances = []
    for kind in ("gaussian", "orthogonal"):
        errors = []
        for seed in range(150):
            sketch = Sketch(DIM, DIM, kind, seed)
            signs = torch.where(key @ sketch.matrix.T >= 0, 1.0, -1.0)
            errors.append(sketch.sign_scale * ((query @ sketch.matrix.T) * signs).sum(1) / query.norm(dim=1))
        variances.append(float(torch.stack(errors).square().mean()))
    assert variances[0] / variances[1] == pytest.approx((math.pi / 2) / (math.pi / 2 - 1), rel=0.05)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_the_error_decays_with_the_root_of_the_sketch(kind):
    sizes = [64, 128, 256, 512, 1024]
    deviations = [math.sqrt(_scaled_variance(kind, m, 60)[0]) for m in sizes]
    slope = np.polyfit(np.log(sizes), np.log(deviations), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.04)


# Lemma 3.5, with the derived constant


def _rows_needed(epsilon, delta):
    rows = (math.pi + 4 * epsilon / 3) / epsilon**2 * math.log(2 / delta)
    return 8 * math.ceil(rows / 8)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.3), (0.5, 0.05), (0.25, 0.1), (0.2, 0.01)])
def test_large_errors_are_as_rare_as_the_derived_bound_says(kind, epsilon, delta):
    queries, keys = _pairs()
    norms = np.linalg.norm(queries, axis=1) * np.linalg.norm(keys, axis=1)
    estimates = _estimates(kind, _rows_needed(epsilon, delta), 60)
    failed = (np.abs(estimates - (queries * keys).sum(1)) > epsilon * norms).mean(1)
    mean, width = _interval(failed)
    assert mean + width < delta


def test_a_sketch_of_a_tenth_of_the_bound_fails_often():
    """Of the test above: the bound is within an order of magnitude of what is needed."""
    queries, keys = _pairs()
    norms = np.linalg.norm(queries, axis=1) * np.linalg.norm(keys, axis=1)
    estimates = _estimates("gaussian", _rows_needed(0.25, 0.1) // 80 * 8, 60)
    failed = np.abs(estimates - (queries * keys).sum(1)) > 0.25 * norms
    assert failed.mean() > 0.1


# Codes with an exact rescale


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rescaled_lloyd_max_codes_have_the_derived_variance(bits, monkeypatch):
    """D / (1 - D) per coordinate: what is left once the estimate is exact along the key. A search does better."""
    monkeypatch.setattr("qjl.methods.balanced.GAINS", (1.0,))
    errors = []
    generator = torch.Generator().manual_seed(0)
    first = torch.zeros(1, 1, dtype=torch.int64)
    for seed in range(40):
        codec = Balanced(bits, metric=False, centre=False, seed=seed).fit(
            LayerContext("key", 1, DIM, CPU, torch.float32)
        )
        keys, queries = torch.randn(2, 1, 1, 64, DIM, generator=generator)
        keys, queries = (x / x.norm(dim=-1, keepdim=True) for x in (keys, queries))
        scores = scores_of(codec, queries, codec.quantize(keys, first), first)
        errors.append(scores - queries @ keys.transpose(2, 3))
    variance = float(torch.cat(errors).square().mean()) * DIM
    loss = distortion(lloyd_max(bits))
    assert variance == pytest.approx(loss / (1 - loss), rel=0.06 if bits < 3 else 0.13)


@pytest.mark.parametrize("code", ["levels", "trellis", "signs"])
def test_a_rescaled_code_is_unbiased_over_rotations(code):
    queries, keys = (torch.tensor(x, dtype=torch.float32)[None, None, :320] for x in _pairs())
    first = torch.zeros(1, 5, dtype=torch.int64)
    truth = queries @ keys.transpose(2, 3)
    slopes = []
    for seed in range(100):
        codec = Balanced(2, code, metric=False, centre=False, seed=seed).fit(
            LayerContext("key", 1, DIM, CPU, torch.float32)
        )
        scores = scores_of(codec, queries, codec.quantize(keys, first), first)
        slopes.append(float((scores * truth).sum() / truth.square().sum()))
    mean, width = _interval(np.array(slopes))
    assert width < 0.008
    assert abs(mean - 1) < width + 0.001  # the 8-bit scale rounds in the logarithm, not the mean


def test_a_norm_in_place_of_the_exact_rescale_would_shrink_scores():
    """Of the test above: two-bit codes scaled by the norm alone underrate every score by D, 12 %."""
    y = np.random.default_rng(0).normal(size=(300, 2048))
    y /= np.sqrt((y**2).mean(1, keepdims=True))
    decoded = oracles.nearest(y, np.array(lloyd_max(2)))
    assert ((y * decoded).sum(1) / (y * y).sum(1)).mean() == pytest.approx(1 - distortion(lloyd_max(2)), abs=0.002)
    scale = oracles.ExactRescale.scale(y, decoded)
    np.testing.assert_allclose(scale * (y * decoded).sum(1), (y * y).sum(1))


# The balanced metric and water-filling are optimal


@lru_cache(maxsize=1)
def _covariances():
    rng = np.random.default_rng(3)
    roots = [rng.normal(size=(12, 12)) * np.arange(1, 13) ** -1.0 for _ in range(2)]
    return [root @ root.T + 0.05 * np.eye(12) for root in roots]


def test_the_geometric_mean_solves_its_equation():
    key, query = _covariances()
    metric = oracles.BalancedMetric.geometric_mean(key, query)
    np.testing.assert_allclose(metric @ key @ metric, query, atol=1e-9)
    np.testing.assert_allclose(metric, metric.T, atol=1e-9)


def test_no_other_metric_costs_less_than_the_balanced_one():
    key, query = _covariances()
    cost = oracles.BalancedMetric.cost
    best = oracles.BalancedMetric.geometric_mean(key, query)
    least = cost(best, key, query)
    assert least < 0.95 * cost(np.eye(12), key, query)
    rng = np.random.default_rng(0)
    others = [np.eye(12), query, np.linalg.inv(key)]
    for size in (0.02, 0.3, 1):
        for _ in range(100):
            step = rng.normal(size=(12, 12)) * size
            others.append(best + 0.05 * step @ step.T)
    assert min(cost(other, key, query) for other in others) >= least


@pytest.mark.parametrize("bits", [1, 4, 7, 10])
def test_greedy_water_filling_is_optimal(bits):
    """Against every way to spend the bits on four coordinates."""
    costs = [scalar_distortion(width) for width in range(MAX_BITS + 1)]
    for seed in range(5):
        variances = np.exp(2 * np.random.default_rng(seed).normal(size=4))
        spent = water_fill(variances.tolist(), bits)
        assert sum(spent) == bits
        totals = {
            widths: sum(v * costs[w] for v, w in zip(variances, widths, strict=True))
            for widths in itertools.product(range(MAX_BITS + 1), repeat=4)
            if sum(widths) == bits
        }
        assert totals[spent] == pytest.approx(min(totals.values()), rel=1e-12)


# A real model


@pytest.fixture(scope="module")
def real_pairs():
    """Keys and queries of one layer of the embedded model, as they meet in attention: ``[heads, T, 64]`` each."""
    from qjl import corpora, models
    from qjl.architecture import find_rope

    model, tokenizer = models.load("smollm2")
    inputs = tokenizer(corpora.essays()[:6000], return_tensors="pt").input_ids[:, :600]
    layer = model.model.layers[12].self_attn
    caught = {}
    hooks = [
        getattr(layer, name).register_forward_hook(lambda _, __, out, name=name: caught.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    with torch.inference_mode():
        model(inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    rope, positions = find_rope(model.config), torch.arange(600)[None]
    queries, keys = (
        rope.rotate(caught[name].float().unflatten(2, (-1, DIM)).transpose(1, 2), positions)[0]
        for name in ("q_proj", "k_proj")
    )
    return queries[:: len(queries) // len(keys)], keys


@pytest.mark.model
@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_the_variance_on_a_real_models_keys_is_the_derived_one(kind, ratio, real_pairs):
    queries, keys = (x[:, ::3] for x in real_pairs)
    truth = queries @ keys.transpose(1, 2)
    norms = queries.norm(dim=-1)[:, :, None] * keys.norm(dim=-1)[:, None]
    measured = []
    for seed in range(60):
        sketch = Sketch(ratio * DIM, DIM, kind, seed)
        signs = torch.where(keys @ sketch.matrix.T >= 0, 1.0, -1.0)
        scores = (queries @ sketch.matrix.T) @ signs.transpose(1, 2)
        estimate = sketch.sign_scale * keys.norm(dim=-1)[:, None] * scores
        measured.append(float(((estimate - truth) / norms).square().mean()) * DIM)
    cosine = float((truth / norms).square().mean())
    assert np.mean(measured) == pytest.approx(_variance_per_row(kind, cosine) / ratio, rel=0.05)
