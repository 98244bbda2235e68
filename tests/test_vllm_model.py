"""What the vLLM plugin knows of a served model: its preset, its statistics, its codecs. None of it needs vLLM."""

import json

import pytest
import torch

from models_for_tests import prompt, tiny
from qjl import statistics
from qjl.calibration import model_statistics
from qjl.codecs import TokenShape
from qjl.hf import statistics_path
from qjl.hf.sources import shared_codecs
from qjl.presets import PRESETS, to_dict
from qjl.vllm import PRESET, chosen_preset
from qjl.vllm.paged_layer import page_bytes
from qjl.vllm.served_model import STATISTICS, ServedModel, bytes_per_token, chosen_config

HEAD_DIM = 32
CPU = torch.device("cpu")


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """``choose(preset)`` as a user does."""
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))
    monkeypatch.delenv(STATISTICS, raising=False)

    def preset(name):
        monkeypatch.setenv(PRESET, str(name))
        chosen_config.cache_clear()

    yield preset
    chosen_config.cache_clear()


@pytest.fixture
def folder(tmp_path):
    model = tiny(kv_heads=2, head_dim=HEAD_DIM)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def codecs(folder, heads=slice(0, 2), layer=0):
    shape = TokenShape(heads.stop - heads.start, HEAD_DIM, HEAD_DIM, CPU, torch.float32)
    return ServedModel(str(folder)).codecs(layer, heads, shape)


def _calibrate(model, path=None):
    path = path or statistics_path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = model_statistics(model, prompt(300))
    statistics.save(path, measured, path.stem)
    return measured


@pytest.mark.parametrize("value", [None, "", "full"])
def test_nothing_changes_unless_a_preset_is_asked_for(value, monkeypatch):
    monkeypatch.delenv(PRESET, raising=False)
    if value is not None:
        monkeypatch.setenv(PRESET, value)
    assert chosen_preset() == "full"


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("b3-pre", "preset b3-pre quantizes keys before RoPE, which vLLM's pages do not serve"),
        ("b33", "unknown preset 'b33'"),
    ],
)
def test_presets_that_pages_do_not_serve_are_refused(preset, message, choose, refuses):
    choose(preset)
    with refuses(message):
        chosen_config()


def test_codes_that_are_no_nibbles_are_refused(choose, folder, refuses):
    choose("int8")
    with refuses("int8 has no codes that are read as they are, as vLLM's pages need"):
        codecs(folder[0])


def test_a_model_without_statistics_tells_the_command(choose, folder, refuses):
    choose("b3")
    with refuses(f"yet: run `qjl calibrate {folder[0]}`."):
        codecs(folder[0])


@pytest.mark.parametrize("is_named", [False, True])
def test_statistics_are_those_of_the_model_and_each_rank_takes_its_heads(
    is_named, choose, folder, monkeypatch, tmp_path
):
    choose("b3")
    path, model = folder
    named = tmp_path / "elsewhere.safetensors"
    _calibrate(model, named if is_named else None)
    if is_named:
        monkeypatch.setenv(STATISTICS, str(named))
    both, second = codecs(path), codecs(path, slice(1, 2))
    for of_both, of_second in zip(both, second, strict=True):
        torch.testing.assert_close(of_second.query_map[0], of_both.query_map[1])


def test_a_served_model_codes_as_a_cache_in_transformers(choose, folder, generator):
    choose("b3")
    path, model = folder
    _calibrate(model)
    tokens = torch.randn(1, 2, 128, HEAD_DIM, generator=generator)
    first = torch.tensor([[0, 64]])
    shape = TokenShape(2, HEAD_DIM, HEAD_DIM, CPU, torch.float32)
    theirs = shared_codecs(model, PRESETS["b3"]).of(1, shape)
    for ours, other in zip(codecs(path, layer=1), theirs, strict=True):
        expected = other.quantize(tokens, first)
        assert all(field.equal(expected[name]) for name, field in ours.quantize(tokens, first).items())


def test_pages_have_room_for_the_widest_layer(choose, tmp_path):
    preset = to_dict(PRESETS["b2"])
    wide = preset["key"] | {"num_bits": 4}
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(preset | {"name": "mixed", "overrides": [{"first": 1, "stop": 2, "key": wide}]}))
    choose(path)
    narrow, widest = (chosen_config().for_layer(layer) for layer in (0, 1))
    sizes = [page_bytes([one.layout(HEAD_DIM) for one in pair]) for pair in (narrow, widest)]
    assert sizes[0] < sizes[1] == bytes_per_token(HEAD_DIM)
