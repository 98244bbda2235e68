"""KVQuant against the paper."""

import dataclasses

import numpy as np
import pytest
import torch

import oracles
from method_cases import float64, named, of_type, sized
from qjl.methods.base import LayerContext, Unrotated
from qjl.methods.kvquant import KVQuant
from qjl.packed import BLOCK
from qjl.presets import PRESETS

CPU = torch.device("cpu")


def _codec(case):
    """Of the tokens that the levels are for: keys before RoPE."""
    return case.codec.codec if isinstance(case.codec, Unrotated) else case.codec


def _tokens(case, role, row, head):
    x = float64(case.x[row, head])
    if role == "value":
        return x
    return oracles.Rope(case.rope.inv_freq.numpy()).unrotate(x, case.positions[row].numpy())


def _codes(case, row, head, num_bits):
    """``[T, D]``; 64 tokens of a channel side by side."""
    bits = np.unpackbits(case.blocks["codes"][row, head].numpy(), axis=-1, bitorder="little")
    codes = bits.reshape(*bits.shape[:2], BLOCK, num_bits) @ 2 ** np.arange(num_bits)
    return codes.swapaxes(1, 2).reshape(-1, codes.shape[1])


def _outliers(case, row, head):
    """``bool [T, D]``."""
    index = case.blocks["outlier_index"][row, head].long().numpy()
    mask = np.zeros((len(index), BLOCK * case.x.shape[3]), dtype=bool)
    np.put_along_axis(mask, index, True, axis=1)
    assert (mask.sum(1) == index.shape[1]).all()
    return mask.reshape(-1, case.x.shape[3])


def _ranges(case, quantizer, role, row, head):
    """Middle and reach, by the oracle for channels and as stored for tokens."""
    if quantizer.axis == "token":
        return (float64(case.blocks[name][row, head]).reshape(-1, 1) for name in ("middle", "reach"))
    statistics = case.statistics
    quantiles = statistics.key_quantiles if role == "key" else statistics.value_quantiles
    return oracles.KVQuant.thresholds(float64(quantiles[head]), quantizer.outliers)


def _parts(case, quantizer, role):
    """Per row and head: tokens, which are outliers, their middle and reach."""
    for row in range(2):
        for head in range(2):
            x, outlier = _tokens(case, role, row, head), _outliers(case, row, head)
            yield row, head, x, outlier, *_ranges(case, quantizer, role, row, head)


@sized(of_type(KVQuant))
def test_outliers_are_the_numbers_farthest_out_of_each_block(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    count = int(np.ceil(quantizer.outliers * BLOCK * head_dim))
    for row, head, x, outlier, middle, reach in _parts(case, quantizer, role):
        if quantizer.axis == "token":
            distance = np.abs(x - x.mean(-1, keepdims=True)) / x.std(-1, ddof=1, keepdims=True)
            for stored, exact in zip((middle, reach), oracles.KVQuant.ranges(x, outlier), strict=True):
                np.testing.assert_allclose(stored, exact, rtol=1e-3, atol=1e-3)
        else:
            distance = np.abs(x - middle) / reach
        for block in range(2):
            tokens = slice(block * BLOCK, (block + 1) * BLOCK)
            threshold = np.sort(distance[tokens], axis=None)[-count]
            assert (distance[tokens][outlier[tokens]] >= threshold * (1 - 1e-4)).all()
            index = case.blocks["outlier_index"][row, head, block].long().numpy()
            exact = x[tokens].flatten()[index]
            np.testing.assert_allclose(case.blocks["outlier_value"][row, head, block], exact, rtol=1e-3, atol=1e-3)


@sized(of_type(KVQuant))
def test_codes_are_the_nearest_levels(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    codec, decoded = _codec(case), case.codec.dequantize(case.blocks, case.first)
    for row, head, x, outlier, middle, reach in _parts(case, quantizer, role):
        edges, levels = float64(codec.edges[head]), float64(codec.levels[head])
        if not quantizer.q_norm:
            np.testing.assert_allclose(edges, (levels[1:] + levels[:-1]) / 2, atol=1e-6)
        z = (x - middle) / reach
        clear = np.abs(z[..., None] - edges).min(-1) > 2e-4  # keys before RoPE are of float32, and machines differ
        assert clear.mean() > 0.99
        codes = _codes(case, row, head, quantizer.num_bits)
        assert (codes == np.searchsorted(edges, z))[clear].all()
        expected = np.where(outlier, x, middle + reach * levels[codes])
        if role == "key":
            expected = oracles.Rope(case.rope.inv_freq.numpy()).rotate(expected, case.positions[row].numpy())
        np.testing.assert_allclose(decoded[row, head], expected, rtol=1e-3, atol=1e-3 * np.abs(x).max())


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(("role", "axis"), [("key", "channel"), ("value", "channel"), ("value", "token")])
def test_levels_are_as_good_as_k_means_on_the_tokens_themselves(role, axis, head_dim, fitted):
    """Which calibration has not seen: other tokens of the same distribution."""
    quantizer = KVQuant(3, axis)
    case = fitted(role, quantizer, head_dim)
    for _, head, x, outlier, middle, reach in _parts(case, quantizer, role):
        samples = ((x - middle) / reach)[~outlier]
        errors = [
            np.mean((samples - oracles.nearest(samples, levels)) ** 2)
            for levels in (float64(_codec(case).levels[head]), oracles.KVQuant.k_means(samples, 8))
        ]
        assert errors[0] < 1.06 * errors[1]


@pytest.mark.parametrize(("role", "axis"), [("key", "channel"), ("value", "token")])
def test_q_norm_keeps_the_variance_that_coding_takes(role, axis, fitted):
    ratios = []
    for q_norm in (False, True):
        quantizer = KVQuant(2, axis, q_norm=q_norm)
        case = fitted(role, quantizer, 128)
        spread = []
        for row, head, x, outlier, middle, reach in _parts(case, quantizer, role):
            levels = float64(_codec(case).levels[head])[_codes(case, row, head, 2)]
            spread.append(levels[~outlier].var() / ((x - middle) / reach)[~outlier].var())
        ratios.append(np.mean(spread))
    assert ratios[0] < 0.93
    assert abs(ratios[1] - 1) < 0.03


@pytest.mark.parametrize(("role", "quantizer"), named([("key", KVQuant(2)), ("value", KVQuant(2, "token"))]))
def test_a_spike_is_exact_and_harms_no_other_number(role, quantizer, fitted):
    case = fitted(role, quantizer, 64)
    codec = _codec(case)
    first = case.first[:1, :1]
    plain = case.x[:1, :, :BLOCK].clone()
    plain[0, 0, 5, 7] = 0.0
    spiked = plain.clone()
    spiked[0, 0, 5, 7] = 1000.0
    before, after = (codec.dequantize(codec.quantize(x, first), first) for x in (plain, spiked))
    assert after[0, 0, 5, 7] == 1000.0
    after[0, 0, 5, 7] = before[0, 0, 5, 7]
    errors = [float((decoded - plain)[0, 0, 5].square().mean()) for decoded in (before, after)]
    assert errors[1] < 2 * errors[0]


def test_keys_are_coded_before_rope_whoever_undoes_it(fitted):
    case = fitted("key", KVQuant(3), 96)
    context = LayerContext("key", 2, 96, CPU, torch.float32, case.statistics, rope=None, undone=case.rope)
    codec = KVQuant(3).fit(context)
    assert not isinstance(codec, Unrotated)
    blocks = codec.quantize(case.rope.unrotate(case.x, case.positions), case.first)
    assert all(torch.equal(blocks[name], case.blocks[name]) for name in blocks)


def test_keys_whose_statistics_are_as_cached_are_coded_as_cached(fitted):
    case = fitted("key", KVQuant(3), 64)
    plain = dataclasses.replace(case.statistics, is_rotary=False)
    codec = KVQuant(3).fit(LayerContext("key", 2, 64, CPU, torch.float32, plain, case.rope))
    assert not isinstance(codec, Unrotated)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_channels_that_never_vary_decode_to_finite_numbers(axis, fitted):
    case = fitted("value", KVQuant(2, axis), 64)
    constant = dataclasses.replace(case.statistics, value_quantiles=torch.ones_like(case.statistics.value_quantiles))
    codec = KVQuant(2, axis, q_norm=True).fit(LayerContext("value", 2, 64, CPU, torch.float32, constant))
    for x in (case.x, torch.ones_like(case.x)):
        assert torch.isfinite(codec.dequantize(codec.quantize(x, case.first), case.first)).all()


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_true_bits_are_those_of_the_docstring(num_bits):
    config = PRESETS[f"kvquant-{num_bits}"]
    assert (config.sinks, config.recent, config.pre_rope) == (1, 0, True)
    assert KVQuant(num_bits).outlier_count(64) == 41
    assert KVQuant(num_bits).outlier_count(128) == 82
    for head_dim, count in ((64, 41), (128, 82)):
        keys = num_bits + 32 * count / (64 * head_dim)
        assert config.bits(head_dim) == (keys, keys + 32 / head_dim)
        assert round(keys, 2) == num_bits + 0.32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVQuant(1), "KVQuant takes 2, 3 or 4 bits, not 1"),
        (lambda: KVQuant(axis="head"), "KVQuant normalises per channel or per token, not per head"),
        (lambda: KVQuant(outliers=0.0), "outliers is a share, above 0 and below 1, not 0.0"),
        (lambda: KVQuant(outliers=1.0), "outliers is a share, above 0 and below 1, not 1.0"),
        (lambda: KVQuant(outliers=0.02).layout(64), "82 outliers per block are too many for head_dim 64"),
        (lambda: KVQuant().layout(520), "outliers of head_dim 520 have no 16-bit index"),
        (lambda: KVQuant().layout(60), "head_dim 60 does not pack into bytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()


@pytest.mark.parametrize("role", ["key", "value"])
def test_it_needs_statistics_and_no_queries(role, refuses):
    assert KVQuant().needs_statistics
    assert not KVQuant().needs_queries
    with refuses("this method needs statistics"):
        KVQuant().fit(LayerContext(role, 2, 64, CPU, torch.float32))
