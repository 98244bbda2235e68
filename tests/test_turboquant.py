"""TurboQuant against the paper: levels, outlier channels, and the residual that makes scores unbiased."""

from functools import cache

import numpy as np
import pytest
import torch

import oracles
from method_cases import float64, of_type, scores_of, sized, sums_of_entries, token_major
from qjl.codebook import MAX_BITS, NIBBLE, sign_sum
from qjl.methods.base import POSITIONS, LayerContext, storage_bytes
from qjl.methods.bitpacking import unpack_tokens
from qjl.methods.qjl import QJL
from qjl.methods.turboquant import TurboQuant
from qjl.packed import BLOCK
from qjl.presets import PRESETS
from qjl.sketch import Sketch, haar_rotation

CPU = torch.device("cpu")
FIRST = torch.zeros(1, 1, dtype=torch.int64)
WHOLE = [case for case in of_type(TurboQuant, variant="mse") if case.values[1].num_bits % 1 == 0]
SPLIT = [case for case in of_type(TurboQuant) if case.values[1].num_bits % 1]
PROD = of_type(TurboQuant, variant="prod")
OUTLIERS = {64: 16, 80: 16, 96: 24, 128: 32, 256: 64}


@cache
def _levels(is_split, width):
    return oracles.SignSum.levels(sign_sum(width)) if is_split else oracles.LloydMax(width).levels


def _oracle(encoder, rotation):
    """Which coordinates of 3 bits lie in several nibbles, and decode as a sum of signs, is the nibble code's."""
    kinds = encoder.kinds[0].tolist()
    return oracles.TurboQuant(float64(rotation), [_levels(*divmod(kind, MAX_BITS + 1)) for kind in kinds])


def _chosen(codec, codes):
    """The levels that codes stand for, ``[B, H, T, d]``."""
    return float64(sums_of_entries(codec.code, unpack_tokens(codes, NIBBLE)))


def _assert_levels(codec, codes, oracle, x, margin):
    expected, distance = oracle.encode(x)
    clear = distance > margin
    assert clear.mean() > 0.97
    np.testing.assert_allclose(_chosen(codec, codes)[clear], expected[clear], atol=2e-3)


@sized(WHOLE)
def test_codes_are_the_nearest_levels_and_the_norm_is_kept(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    oracle, x = _oracle(case.codec.encoder, haar_rotation(head_dim)), float64(case.x)
    codes, scale = case.blocks["codes"], float64(case.blocks["scale"].flatten(2))
    _assert_levels(case.codec, codes, oracle, x, 1e-3)
    norms = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(scale * np.sqrt(head_dim), norms, rtol=1e-3)
    decoded = oracle.decode(_chosen(case.codec, codes), norms)
    np.testing.assert_allclose(
        case.codec.dequantize(case.blocks, case.first), decoded, atol=2e-3 * np.abs(decoded).max()
    )


def _energies(case, role, head):
    """Second moment of each channel of the tokens that the codec sees."""
    mean, covariance = (float64(getattr(case.statistics, f"{role}_{name}")[head]) for name in ("mean", "covariance"))
    moment = covariance + np.outer(mean, mean)
    if role == "key":
        moment = oracles.Rope(case.rope.inv_freq.numpy()).averaged(moment, POSITIONS.numpy())
    return moment.diagonal()


def _channels(part, rotation, head):
    """The channel behind each column of the rotation in a part's map."""
    rows = float64(part.query_map[head])
    return [int(np.abs(rows - column[:, None]).sum(0).argmin()) for column in rotation.T]


@sized(SPLIT)
def test_outliers_are_the_channels_of_most_energy(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    for head in range(2):
        energies, own = _energies(case, role, head), {}
        for prefix, part in case.codec.parts.items():
            own[prefix] = np.flatnonzero(float64(part.query_map[head]).any(0))
            assert (part.encoder.kinds % (MAX_BITS + 1) == int(quantizer.num_bits) + (prefix == "outlier_")).all()
        assert len(own["outlier_"]) == OUTLIERS[head_dim]
        assert sorted([*own["outlier_"], *own[""]]) == list(range(head_dim))
        assert energies[own["outlier_"]].min() > energies[own[""]].max() * (1 - 1e-6)


@sized(SPLIT)
def test_outliers_and_others_are_coded_apart(role, quantizer, head_dim, fitted):
    """Up to the half precision of their maps."""
    case = fitted(role, quantizer, head_dim)
    decoded = float64(case.codec.dequantize(case.blocks, case.first))
    for seed, (prefix, part) in enumerate(case.codec.parts.items()):
        rotation = haar_rotation(part.query_map.shape[1], seed)
        oracle = _oracle(part.encoder, rotation)
        chosen = _chosen(part, case.blocks[prefix + "codes"])
        for head in range(2):
            columns = _channels(part, rotation.numpy(), head)
            own = float64(case.x[:, head][..., columns])
            expected, distance = oracle.encode(own)
            clear = distance > 5e-3
            assert clear.mean() > 0.95
            np.testing.assert_allclose(chosen[:, head][clear], expected[clear], atol=2e-3)
            expected = oracle.decode(chosen[:, head], np.linalg.norm(own, axis=-1))
            np.testing.assert_allclose(decoded[:, head][..., columns], expected, atol=4e-3 * np.abs(own).max())


@sized([case for case in PROD if case.values[1].num_bits > 1])
def test_one_bit_goes_to_a_sketch_of_the_residual(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    x, query = float64(case.x), float64(case.query[:, :, :3])[:, :, :, None]
    levels = case.codec.parts[""]
    oracle = _oracle(levels.encoder, haar_rotation(head_dim))
    _assert_levels(levels, case.blocks["codes"], oracle, x, 1e-3)
    chosen, norms = _chosen(levels, case.blocks["codes"]), np.linalg.norm(x, axis=-1)
    residual = x / norms[..., None] - oracle.decode(chosen, np.ones_like(norms))
    matrix = float64(Sketch(head_dim, head_dim, "gaussian", seed=1).matrix)
    sketched = residual @ matrix.T
    signs = np.unpackbits(token_major(case.blocks["residual_codes"]), axis=-1, bitorder="little")
    clear = np.abs(sketched) > 2e-2 * np.linalg.norm(residual, axis=-1, keepdims=True)
    assert clear.mean() > 0.95
    assert (signs == (sketched >= 0))[clear].all()
    gamma = np.linalg.norm(residual, axis=-1)
    stored = float64(case.blocks["residual_scale"].flatten(2)) / np.sqrt(np.pi / 2) * head_dim
    np.testing.assert_allclose(stored, norms * gamma, rtol=5e-3)
    code = (part[:, :, None] for part in (chosen, norms))
    estimate = oracle.estimate(query, *code, matrix, signs[:, :, None], gamma[:, :, None])
    scores = scores_of(case.codec, case.query[:, :, :3], case.blocks, case.first)
    np.testing.assert_allclose(scores, estimate, atol=4e-3 * np.abs(estimate).max())


def test_one_bit_of_prod_is_qjl_alone(fitted):
    ours, qjl = fitted("key", TurboQuant(1, "prod"), 64), fitted("key", QJL(1, "gaussian", seed=1), 64)
    assert ours.blocks.keys() == qjl.blocks.keys()
    assert all(torch.equal(ours.blocks[name], qjl.blocks[name]) for name in qjl.blocks)


def _unit_tokens(generator, count, dim=64):
    x = torch.randn(1, 1, count, dim, generator=generator)
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.36), (2, 0.117), (3, 0.034), (4, 0.009)])
def test_the_distortion_of_unit_vectors_is_the_published_one(bits, published, generator):
    """Theorem 1; 3 bits pay 2 % because every fourth coordinate lies across three nibbles."""
    x = _unit_tokens(generator, 10 * BLOCK, 128)
    codec = TurboQuant(bits).fit(LayerContext("key", 1, 128, CPU, torch.float32))
    first = torch.zeros(1, 10, dtype=torch.int64)
    error = (codec.dequantize(codec.quantize(x, first), first) - x).square().sum(-1).mean()
    assert error == pytest.approx(oracles.LloydMax(bits).distortion, rel=0.03)
    assert error == pytest.approx(published, rel=0.07)


def _mean_scores(quantizer, x, seeds):
    """Estimates of <x, x> for each seed, ``[seeds, T]``."""
    scores = []
    for seed in range(seeds):
        codec = type(quantizer)(**(vars(quantizer) | {"seed": seed})).fit(LayerContext("key", 1, 64, CPU, x.dtype))
        scores.append(scores_of(codec, x, codec.quantize(x, FIRST), FIRST).diagonal(dim1=2, dim2=3)[0, 0])
    return float64(torch.stack(scores))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_mse_shrinks_scores_by_its_distortion_and_prod_leaves_none_of_it(bits, generator):
    x = _unit_tokens(generator, BLOCK)
    mse = _mean_scores(TurboQuant(bits), x, 40).mean(1)
    assert abs(mse.mean() - (1 - oracles.LloydMax(bits).distortion)) < 5 * mse.std() / np.sqrt(40) + 3e-3
    prod = _mean_scores(TurboQuant(bits, "prod"), x, 160).mean(1)
    assert abs(prod.mean() - 1) < 4 * prod.std() / np.sqrt(160)
    assert prod.std() / np.sqrt(160) < 0.01


def test_true_bits_are_those_of_the_docstring():
    for bits in (1, 2, 3, 4):
        assert TurboQuant(bits).bits(128) == bits + 16 / 128
        assert TurboQuant(bits, "prod").bits(64) == bits + (16 if bits == 1 else 32) / 64
    for bits in (1, 2, 3):
        assert [TurboQuant(bits + 0.5).bits(dim) for dim in (64, 128)] == [bits + 0.75, bits + 0.5]


@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 3.5, 4])
def test_presets_quantize_every_token_as_the_paper_does(bits):
    config = PRESETS[f"turboquant-{bits}"]
    assert config.key == config.value == TurboQuant(bits)
    assert (config.sinks, config.recent) == (0, 0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_presets_of_prod_leave_values_to_mse(bits):
    config = PRESETS[f"turboquant-prod-{bits}"]
    assert (config.key, config.value) == (TurboQuant(bits, "prod"), TurboQuant(bits))
    assert (config.sinks, config.recent) == (0, 0)


def test_layers_share_the_rotation_and_the_sketch_and_keep_their_own_outlier_channels(fitted):
    statistics = fitted("key", TurboQuant(2.5), 64).statistics
    context = LayerContext("value", 2, 64, CPU, torch.float32, statistics)
    rotation, sketch, maps = 64 * 64 * 4, Sketch(64, 64).nbytes, 2 * (16 * 64 + 48 * 64) * 2
    for quantizer, matrices, own in (
        (TurboQuant(2), rotation, 0),
        (TurboQuant(2, "prod"), rotation + sketch, 0),
        (TurboQuant(2.5), maps, maps),
    ):
        codecs = [quantizer.fit(context) for _ in range(2)]
        alone = storage_bytes(codecs[0].tensors)
        assert matrices < alone
        more = storage_bytes(tensor for codec in codecs for tensor in codec.tensors) - alone
        assert own <= more < own + 0.2 * alone


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TurboQuant(0), "turboquant takes 1 to 4 bits in steps of one half, not 0"),
        (lambda: TurboQuant(5), "turboquant takes 1 to 4 bits in steps of one half, not 5"),
        (lambda: TurboQuant(2.25), "turboquant takes 1 to 4 bits in steps of one half, not 2.25"),
        (lambda: TurboQuant(2.5, "prod"), "variant prod takes whole bits: use variant mse for 2.5"),
        (lambda: TurboQuant(2, "qjl"), "turboquant takes variant mse or prod, not 'qjl'"),
        (lambda: TurboQuant(2.5).layout(24), "head_dim 24 is too small to be split: it must be 32 or more"),
        (lambda: TurboQuant(2, "prod").layout(100), "head_dim 100 does not pack into bytes"),
        (lambda: TurboQuant(2.5).fit(LayerContext("key", 2, 64, CPU, torch.float32)), "this method needs statistics"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()


def test_only_outlier_channels_need_statistics():
    assert TurboQuant(2.5).needs_statistics
    assert not any(q.needs_statistics for q in (TurboQuant(2), TurboQuant(2, "prod")))
