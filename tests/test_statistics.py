"""Moments of a layer against numpy, and the file that keeps them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import oracles
from qjl import statistics
from qjl.rope import Rope
from qjl.statistics import QUANTILES, AttentionMoments, LayerStatistics, StatisticsFile, layer_statistics

TENSORS = (
    "key_mean",
    "key_covariance",
    "query_moment",
    "key_quantiles",
    "value_mean",
    "value_covariance",
    "output_moment",
    "value_quantiles",
)


def _measure(tokens, rope, valid=None, positions=None):
    batch, _, length, _ = tokens.keys.shape
    positions = torch.arange(length).expand(batch, -1) if positions is None else positions
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    return layer_statistics(tokens.keys, tokens.values, positions, valid, None, rope)


@pytest.fixture
def layer(model_of):
    return model_of(head_dim=32).statistics()


def test_moments_match_the_oracle(model_of):
    tokens = model_of(head_dim=32).first_tokens(300)
    measured = _measure(tokens, tokens.rope)
    rope, positions = oracles.Rope(tokens.rope.inv_freq.numpy()), np.arange(300)
    for head in range(2):
        keys, values = (x[0, head].double().numpy() for x in (tokens.keys, tokens.values))
        mean = rope.mean_before(keys, positions)
        unrotated = rope.unrotate(keys, positions)
        np.testing.assert_allclose(measured.key_mean[head], mean, atol=1e-4)
        np.testing.assert_allclose(measured.key_covariance[head], np.cov(unrotated.T, bias=True), atol=1e-3)
        np.testing.assert_allclose(measured.value_mean[head], values.mean(0), atol=1e-5)
        np.testing.assert_allclose(measured.value_covariance[head], np.cov(values.T, bias=True), atol=1e-4)
        for x, quantiles in ((unrotated, measured.key_quantiles), (values, measured.value_quantiles)):
            levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
            expected = np.quantile(x, levels, axis=0, method="hazen").T
            np.testing.assert_allclose(quantiles[head], expected, atol=2e-3)
        spread = np.sqrt(((values - values.mean(0)) ** 2).mean())
        assert float(measured.value_rms[head]) == pytest.approx(spread, rel=1e-5)
    assert measured.count == 300


def test_keys_with_a_mean_before_rope_are_centred_before_it(model_of):
    tokens = model_of().first_tokens(300)
    measured = _measure(tokens, tokens.rope)
    assert measured.is_rotary
    after = _measure(tokens, None)
    assert (
        measured.key_covariance.diagonal(dim1=1, dim2=2).sum()
        < 0.7 * after.key_covariance.diagonal(dim1=1, dim2=2).sum()
    )


def test_a_layer_that_has_no_rope_is_found_by_itself(generator):
    keys = torch.randn(1, 2, 400, 32, generator=generator) + 3 * torch.randn(1, 2, 1, 32, generator=generator)
    positions, valid = torch.arange(400)[None], torch.ones(1, 400, dtype=torch.bool)
    rope = Rope(10000.0 ** (-torch.arange(0, 32, 2) / 32))
    measured = layer_statistics(keys, keys, positions, valid, None, rope)
    assert not measured.is_rotary
    torch.testing.assert_close(measured.key_mean, keys[0].mean(1), atol=1e-5, rtol=1e-4)


def test_tokens_that_are_not_valid_do_not_count(model_of):
    tokens = model_of(head_dim=32).first_tokens(300)
    valid = torch.arange(300)[None] >= 20
    tokens.keys[:, :, :20] = 1e4
    tokens.values[:, :, :20] = 1e4
    measured = _measure(tokens, tokens.rope, valid)
    tokens.keys[:, :, :20] = 0
    tokens.values[:, :, :20] = 0
    again = _measure(tokens, tokens.rope, valid)
    assert measured.count == 280
    for name in TENSORS:
        torch.testing.assert_close(getattr(measured, name), getattr(again, name), atol=2e-3, rtol=1e-3)


def test_rows_of_a_batch_count_alike(model_of):
    tokens = model_of(head_dim=32).first_tokens(300)
    twice = type(tokens)(*(x.repeat(2, 1, 1, 1) for x in (tokens.keys, tokens.values, tokens.queries)), tokens.rope)
    once, both = _measure(tokens, tokens.rope), _measure(twice, tokens.rope)
    assert both.count == 2 * once.count
    for name in TENSORS:
        atol = 0.5 if "quantiles" in name else 1e-4  # the outermost lie between other tokens
        torch.testing.assert_close(getattr(both, name), getattr(once, name), atol=atol, rtol=1e-4)


def test_without_queries_their_moment_is_the_identity(model_of):
    tokens = model_of(head_dim=32).first_tokens(50)
    assert torch.equal(_measure(tokens, None).query_moment, torch.eye(32).expand(2, -1, -1))


def test_constant_values_have_a_positive_spread(model_of):
    tokens = model_of(head_dim=32).first_tokens(50)
    tokens.values[:] = 0
    assert (_measure(tokens, None).value_rms > 0).all()


def _moments(parts, rope, heads=2):
    attention = AttentionMoments()
    for query, out, positions, real in parts:
        attention.add(query, out, positions, real, rope, heads)
    return attention


@pytest.fixture
def attended(generator):
    """Queries of two heads of three each, outputs, positions of two rows, one of them padded; and their RoPE."""
    query, out = (torch.randn(2, 6, 50, 16, generator=generator) for _ in range(2))
    positions = torch.stack([torch.arange(50), torch.arange(50) - 20])
    return query, out, positions, positions >= 0, Rope(10000.0 ** (-torch.arange(0, 16, 2) / 16))


def test_moments_of_attention_are_those_of_all_real_tokens_however_they_come(attended):
    *tensors, rope = attended
    query, out, positions, real = (x.numpy() for x in tensors)
    oracle = oracles.Rope(rope.inv_freq.numpy())
    whole = _moments([tensors], rope)
    pieces = zip(*(x.split([1, 30, 19], dim=2 if x.dim() == 4 else 1) for x in tensors), strict=True)
    parts = _moments(list(pieces), rope)
    before = np.stack([oracle.unrotate(query[row].astype(np.float64), positions[row]) for row in range(2)])
    for head in range(2):
        group = slice(3 * head, 3 * head + 3)
        for moments in (whole, parts):
            assert moments.count == 3 * 80
            for x, moment in (
                (query, moments.queries(is_rotary=False)),
                (before, moments.queries(is_rotary=True)),
                (out, moments.outputs()),
            ):
                rows = x[:, group].astype(np.float64).transpose(0, 2, 1, 3)[real].reshape(-1, 16)
                np.testing.assert_allclose(moment[head], rows.T @ rows / 240, atol=1e-4)


def test_without_rope_queries_before_it_are_the_queries(attended):
    *tensors, _ = attended
    moments = _moments([tensors], None)
    assert torch.equal(moments.queries(is_rotary=True), moments.queries(is_rotary=False))


def test_quantiles_of_many_tokens_come_from_evenly_spread_ones(generator):
    keys = torch.randn(1, 1, 10000, 8, generator=generator)
    positions, valid = torch.arange(10000)[None], torch.ones(1, 10000, dtype=torch.bool)
    measured = layer_statistics(keys, keys, positions, valid, None, None)
    expected = np.quantile(keys[0, 0, ::3].numpy(), (np.arange(QUANTILES) + 0.5) / QUANTILES, axis=0, method="hazen").T
    np.testing.assert_allclose(measured.key_quantiles[0], expected, atol=1e-3)


def test_a_moment_of_no_queries_says_where_to_get_them(refuses):
    with refuses("the statistics need the queries of the first prompt"):
        AttentionMoments().queries(is_rotary=True)


def test_bytes_are_those_of_the_tensors(layer):
    assert layer.nbytes == 4 * 2 * 32 * (2 + 4 * 32 + 2 * QUANTILES)


def test_a_saved_file_gives_back_every_layer(layer, tmp_path, model_of):
    other = model_of(head_dim=32, seed=5).statistics()
    path = tmp_path / "folder" / "model.safetensors"
    statistics.save(path, {0: layer, 7: other}, "fingerprint")
    file = StatisticsFile(path, "fingerprint")
    for index, expected in ((0, layer), (7, other)):
        read = file.layer(index)
        assert (read.count, read.is_rotary) == (expected.count, expected.is_rotary)
        assert all(torch.equal(getattr(read, name), getattr(expected, name)) for name in TENSORS)
    assert file.layer(3) is None
    assert list(path.parent.iterdir()) == [path]


def test_a_layer_without_rope_stays_one_on_disk(layer, tmp_path):
    plain = LayerStatistics(5, False, *(getattr(layer, name) for name in TENSORS))
    statistics.save(tmp_path / "s.safetensors", {0: plain}, "f")
    assert not StatisticsFile(tmp_path / "s.safetensors", "f").layer(0).is_rotary


def test_a_folder_that_cannot_be_written_says_so(layer, tmp_path, refuses):
    (tmp_path / "file").write_text("")
    with refuses("statistics cannot be written to"):
        statistics.save(tmp_path / "file" / "s.safetensors", {0: layer}, "f")


def test_statistics_of_another_model_are_refused(layer, tmp_path, refuses):
    statistics.save(tmp_path / "s.safetensors", {0: layer}, "mine")
    with refuses("belongs to another model"):
        StatisticsFile(tmp_path / "s.safetensors", "yours")


def test_a_file_of_another_format_is_refused(tmp_path, refuses):
    save_file({"weight": torch.zeros(2)}, tmp_path / "s.safetensors")
    with refuses("is not a statistics file of this version"):
        StatisticsFile(tmp_path / "s.safetensors", "f")


def test_a_missing_file_is_refused(tmp_path, refuses):
    with refuses("is damaged"):
        StatisticsFile(tmp_path / "absent.safetensors", "f")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5])
def test_a_cut_file_is_refused(keep, layer, tmp_path, refuses):
    path = tmp_path / "s.safetensors"
    statistics.save(path, {0: layer}, "f")
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with refuses("is damaged"):
        StatisticsFile(path, "f")


@pytest.mark.parametrize("layers", ["{not json", None])
def test_a_file_without_readable_layers_is_refused(layers, tmp_path, refuses):
    metadata = {"format": statistics.FORMAT, "fingerprint": "f"} | ({"layers": layers} if layers else {})
    save_file({"0.key_mean": torch.zeros(2)}, tmp_path / "s.safetensors", metadata)
    with refuses("is damaged"):
        StatisticsFile(tmp_path / "s.safetensors", "f")


def test_a_layer_that_lacks_a_tensor_is_refused(tmp_path, refuses):
    metadata = {
        "format": statistics.FORMAT,
        "fingerprint": "f",
        "layers": json.dumps({"0": {"count": 1, "is_rotary": True}}),
    }
    save_file({"0.key_mean": torch.zeros(2)}, tmp_path / "s.safetensors", metadata)
    file = StatisticsFile(tmp_path / "s.safetensors", "f")
    with refuses("is damaged"):
        file.layer(0)
