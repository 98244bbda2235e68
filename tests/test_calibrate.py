"""Statistics on disk: written once, used by all later runs, and never those of another model."""

import logging

import pytest
import torch
from transformers import BatchEncoding

import qjl
from models_for_tests import VOCABULARY, difference, exact, generate, packed_bytes, prompt, read, tiny
from one_layer import codec_tensors
from qjl import download, ops
from qjl.calibration import calibrate, model_statistics
from qjl.fingerprints import fingerprint
from qjl.hf import statistics_path
from qjl.statistics import StatisticsFile

TEXT = "".join(chr(33 + token % 90) for token in prompt(2500, seed=3)[0].tolist())


class ByteTokenizer:
    """A token per character."""

    def __call__(self, text, return_tensors, verbose):
        return BatchEncoding({"input_ids": torch.tensor([[ord(one) % VOCABULARY for one in text]])})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Set by QJL_CACHE."""
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "folder"))
    return tmp_path / "folder"


def test_the_file_is_named_by_the_weights_and_lies_in_the_cache_folder(folder):
    model = tiny()
    path = calibrate(model, ByteTokenizer(), TEXT)
    assert path == statistics_path(model) == folder / "statistics" / f"{fingerprint(model)}.safetensors"
    assert download.cache_dir() == folder
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    layers = [StatisticsFile(path, path.stem).layer(index) for index in range(3)]
    assert layers[2] is None
    for layer in layers[:2]:
        assert layer.count == 2 * (1024 - 4)  # whole rows, sinks left out
        assert layer.key_covariance.shape == layer.query_moment.shape == (2, 32, 32)
        assert torch.linalg.eigvalsh(layer.query_moment).min() > -1e-4


@pytest.mark.parametrize("attention", ["sdpa"])
def test_caches_use_it_without_waiting(attention, caplog):
    calibrate(tiny(), ByteTokenizer(), TEXT)
    model = tiny()
    cache = qjl.KVCache(model)
    model.set_attn_implementation(attention)
    ops.backend_of(torch.device("cpu"))  # which is told once, in whatever test comes first
    with caplog.at_level(logging.INFO, logger="qjl"):
        generate(model, prompt(110), cache=cache, tokens=2)
    assert cache.packed_tokens == [60]
    assert not caplog.records


def test_it_serves_the_same_model_at_once_and_leaves_older_caches_alone():
    model = tiny()
    older = qjl.KVCache(model)
    read(model, prompt(), older)
    before = codec_tensors(older.cores[0])[0]
    calibrate(model, ByteTokenizer(), TEXT)
    newer = qjl.KVCache(model)
    read(model, prompt(110), newer, sizes=(110,))
    assert newer.packed_tokens == [60]
    assert codec_tensors(older.cores[0])[0] is before
    assert not codec_tensors(newer.cores[0])[0].equal(before)


def test_it_serves_every_copy_of_the_weights():
    calibrate(tiny(), ByteTokenizer(), TEXT)
    cache = qjl.KVCache(tiny(dtype=torch.bfloat16))
    assert cache.codecs.statistics(0) is not None
    other = qjl.KVCache(tiny(seed=1))
    assert other.codecs.statistics(0) is None


def test_calibrating_twice_gives_the_same_codes():
    codes = []
    for _ in range(2):
        calibrate(tiny(), ByteTokenizer(), TEXT)
        model = tiny()
        cache = qjl.KVCache(model)
        read(model, prompt(), cache)
        codes.append(packed_bytes(cache))
    assert all(map(torch.equal, *codes))


def test_calibration_is_worth_as_much_as_the_prompt_itself():
    model, ids = tiny(), prompt()
    reference = exact(model, ids)
    errors = [difference(read(model, ids, qjl.KVCache(model)), reference)]
    calibrate(model, ByteTokenizer(), TEXT)
    errors.append(difference(read(model, ids, qjl.KVCache(model)), reference))
    assert errors[1] < 1.5 * errors[0]


def test_measuring_leaves_nothing_packed_and_counts_every_token():
    model = tiny("gemma2")
    statistics = model_statistics(model, prompt(300, batch=2))
    assert list(statistics) == [1]
    assert statistics[1].count == 2 * 296


def test_a_short_context_is_respected():
    model = tiny(max_position_embeddings=300)
    path = calibrate(model, ByteTokenizer(), TEXT)
    assert StatisticsFile(path, path.stem).layer(0).count == 8 * 296


def test_a_short_text_is_refused(folder, refuses):
    with refuses("at least 256 tokens, this one has 200"):
        calibrate(tiny(), ByteTokenizer(), TEXT[:200])
    assert not folder.exists()


def damaged(path):
    path.write_bytes(path.read_bytes()[:100])


def of_another_model(path):
    calibrate(tiny(seed=1), ByteTokenizer(), TEXT).replace(path)


def of_another_program(path):
    path.write_text("not a safetensors file")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "is damaged"),
        (of_another_program, "is damaged"),
        (of_another_model, "belongs to another model"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(spoil, message, refuses):
    model = tiny()
    spoil(calibrate(model, ByteTokenizer(), TEXT))
    with refuses(message):
        qjl.KVCache(tiny())
    qjl.disable(model)
    with refuses(message):
        qjl.enable(model)


def test_a_folder_that_cannot_be_written_is_refused(folder, refuses):
    folder.write_text("a file in its place")
    with refuses("cannot be written"):
        calibrate(tiny(), ByteTokenizer(), TEXT)
