"""Distortion: errors are those of the codes, layer by layer, and follow theory where there is one."""

import dataclasses

import pytest
import torch

from models_for_tests import tiny
from qjl.cache.paged import Fitted, PagedCache
from qjl.codecs import Codecs
from qjl.compat import CACHE
from qjl.lab.evals import distortion, perplexity, seeds
from qjl.lab.evals.distortion import DistortionProtocol, expected_error
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.fidelity import FidelityProtocol as Fidelity
from qjl.methods.identity import Identity
from qjl.methods.qjl import QJL
from qjl.methods.turboquant import TurboQuant
from qjl.presets import CacheConfig
from tiny_checkpoint import CONTEXT, byte_tokenizer

FIT = "Call me Ishmael, some years ago, never mind how long precisely. " * 35
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 35
SMALL = DistortionProtocol(tokens=300, rows=2)


def keys_only(key, name="keys only"):
    return CacheConfig(key, Identity(), name=name)


@pytest.fixture(scope="module")
def subject():
    model = tiny(vocab_size=len(byte_tokenizer()), max_position_embeddings=CONTEXT)
    return EvalModel("tiny", model, byte_tokenizer(), FIT)


def test_a_row_for_every_layer_and_role(subject):
    rows = list(distortion.measure_distortion(subject, ["turboquant-2", "turboquant-4"], TEXT, SMALL))
    layers = subject.model.config.num_hidden_layers
    assert [(row["layer"], row["role"]) for row in rows[: 2 * layers]] == [
        (layer, role) for layer in range(layers) for role in ("score", "output")
    ]
    coarse, fine = rows[: 2 * layers], rows[2 * layers :]
    for rough, good in zip(coarse, fine, strict=True):
        assert good["error"] < rough["error"] / 2
        assert good["error_se"] > 0
        assert (good["theory"] is None) is (good["role"] == "output")


def test_full_precision_errs_nowhere(subject):
    exact = keys_only(Identity())
    assert all(row["error"] < 1e-5 for row in distortion.measure_distortion(subject, [exact], TEXT, SMALL))


@pytest.mark.parametrize(
    "key",
    [QJL(2.0), QJL(1.0), QJL(4.0, sketch="gaussian"), TurboQuant(1), TurboQuant(2), TurboQuant(3), TurboQuant(4)],
    ids=str,
)
def test_theory_tells_the_error_of_directions_at_random(key, generator):
    """Over many seeds: a layer's own keys may lie well or badly to one projection."""
    keys, query = torch.randn(1, 2, 512, 64, generator=generator), torch.randn(1, 2, 64, 64, generator=generator)
    layer = distortion.States(query, keys, torch.randn(1, 2, 512, 64, generator=generator), 0.125)
    errors, theory = [], 0.0
    for seed in range(8):
        config = keys_only(dataclasses.replace(key, seed=seed))
        store = PagedCache([0], 4, 32, Fitted(Codecs(config)))
        (_, error, theory), _ = distortion._errors(store, layer, config.key)
        errors.append(error.square().mean())
    assert torch.stack(errors).mean().sqrt() == pytest.approx(theory, rel=0.05)


@pytest.mark.parametrize(
    "key", [QJL(2.0, outliers=8), QJL(0.5), QJL(1.0, sketch="hadamard"), TurboQuant(2.5), Identity()]
)
def test_what_has_no_formula_has_no_theory(key):
    assert expected_error(key, 64, 0.0) is None


def test_states_are_what_the_model_attends_to(subject):
    ids = subject.tokens(TEXT)[:, :200]
    layers = distortion.states(subject.model, ids)
    cache = subject.model(input_ids=ids, use_cache=True)[CACHE]
    for index, layer in layers.items():
        torch.testing.assert_close(layer.keys, cache.layers[index].keys)
        torch.testing.assert_close(layer.values, cache.layers[index].values)
        assert layer.query.shape[2] == distortion.QUERIES


def test_runs_that_are_known_are_not_measured_again(subject, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    measures = {
        "distortion": lambda: distortion.measure_distortion(subject, ["turboquant-3"], TEXT, SMALL, path),
        "perplexity": lambda: perplexity.measure_perplexity(subject, ["turboquant-3"], TEXT, [600, 512], 1, 32, path),
        "seeds": lambda: seeds.measure_seeds(
            subject, ["turboquant-3", "kivi-2"], TEXT, Fidelity(256, 70, 1, 3, 32, False), path
        ),
    }
    first = {name: list(measure()) for name, measure in measures.items()}
    content = path.read_bytes()
    for module in (perplexity, seeds):
        monkeypatch.setattr(module, "Evaluation", _unexpected)
    monkeypatch.setattr(distortion, "states", _unexpected)
    assert {name: list(measure()) for name, measure in measures.items()} == first
    assert path.read_bytes() == content
    assert [row["context"] for row in first["perplexity"]] == [512, 600]
    assert [(row["preset"], row["seed"]) for row in first["seeds"]] == [
        ("turboquant-3", 0), ("turboquant-3", 1), ("turboquant-3", 2), ("kivi-2", 0)
    ]  # fmt: skip
    assert len({row["kl"] for row in first["seeds"]}) == 4


def _unexpected(*arguments):
    raise AssertionError("this is known already")


def test_too_little_text_or_window_is_refused(subject, refuses):
    with refuses("fewer than 5000"):
        list(distortion.measure_distortion(subject, ["b3"], TEXT, DistortionProtocol(tokens=5000)))
    with refuses("no token of 300 is a code"):
        list(distortion.measure_distortion(subject, ["turboquant-2"], TEXT, DistortionProtocol(tokens=300, recent=290)))
    with refuses("rows of more than 128 tokens"):
        DistortionProtocol(tokens=128)
