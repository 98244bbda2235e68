"""Prompt caches as files: what is read is what was written, and what was not written is refused."""

import copy
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import qjl
from models_for_tests import config_of, generate, left_padded, packed_bytes, prompt, read, tiny
from qjl import stored, trees
from qjl.compat import cache_argument
from qjl.hf import forget_statistics
from qjl.presets import PRESETS
from qjl.stored import StoredFile
from stored_cases import mutated, save_until_killed

LENGTH = 330
MAPS = Path("/proc/self/maps")
MUTATIONS, KILLS = int(os.environ.get("QJL_MUTATIONS", "300")), int(os.environ.get("QJL_KILLS", "6"))
DECODED = ("b3", "b2-pre", "qjl-2", "qjl-paper", "kivi-2", "kvquant-2", "oscar", "turboquant-3.5", "polarquant", "full")


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompt.qjl"


@pytest.fixture(scope="module")
def model():
    return tiny()


def prefilled(model, preset="b3", ids=None, **settings):
    """A cache that holds the prompt."""
    cache = qjl.KVCache(model, preset)
    with torch.no_grad():
        model(prompt(LENGTH) if ids is None else ids, **cache_argument(cache), **settings)
    return cache


def loaded(cache, path, model, ids=None):
    cache.save(path, ids)
    return qjl.KVCache.load(path, model)


def assert_same(first, second):
    """The same bytes in every layer."""
    assert first.nbytes == second.nbytes
    assert first.full_nbytes == second.full_nbytes
    for one, other in zip(first.cores, second.cores, strict=True):
        for row in range(one.batch):
            layers = [
                packed_bytes(cache, cache.cores.index(core), row) for cache, core in ((first, one), (second, other))
            ]
            assert all(torch.equal(*pair) for pair in zip(*layers, strict=True))
        assert all(torch.equal(*pair) for pair in zip(one.dense(), other.dense(), strict=True))


# What is read is what was written


@pytest.mark.parametrize("preset", DECODED)
def test_a_loaded_cache_continues_as_if_it_had_never_been_away(preset, path):
    model = tiny(head_dim=64)
    cache = prefilled(model, preset)
    other = loaded(cache, path, model)
    ids = torch.cat([prompt(LENGTH), prompt(30, seed=1)], dim=1)
    texts = [generate(model, ids, 70, cache=one) for one in (cache, other)]
    assert texts[0].equal(texts[1])
    assert_same(cache, other)


def test_another_process_with_other_statistics_reads_the_same_codes(path, model):
    cache = prefilled(model)
    cache.save(path)
    forget_statistics(model)
    stranger = prefilled(model, ids=prompt(300, seed=5))
    other = qjl.KVCache.load(path, model)
    assert_same(cache, other)
    assert other.cores[0].codecs[0] is not stranger.cores[0].codecs[0]
    assert qjl.KVCache(model, "b3").cores[0].codecs[0] is stranger.cores[0].codecs[0]


def test_what_is_saved_twice_is_the_same_file(path, tmp_path, model):
    cache = prefilled(model)
    loaded(cache, path, model).save(tmp_path / "again.qjl")
    tensors = [StoredFile(one).state(torch.device("cpu")) for one in (path, tmp_path / "again.qjl")]
    assert trees.digest(tensors[0][0]["core"]["window"]) == trees.digest(tensors[1][0]["core"]["window"])
    assert StoredFile(path).header == StoredFile(tmp_path / "again.qjl").header


def test_rows_with_padding(path, model):
    batch = left_padded([prompt(300), prompt(270, seed=1), prompt(120, seed=2)])
    cache = prefilled(model, ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    other = loaded(cache, path, model, batch["input_ids"])
    assert other.prompt_ids.equal(batch["input_ids"])
    fresh = torch.cat([batch["input_ids"], prompt(9, batch=3, seed=3)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    texts = [generate(model, fresh, 70, attention_mask=mask, cache=one) for one in (cache, other)]
    assert texts[0].equal(texts[1])
    assert_same(cache, other)


def test_a_token_mask(path, model):
    ids = prompt(LENGTH)
    cache = qjl.KVCache(model, "b3")
    cache.mark((torch.arange(500) < 250)[None] & (torch.arange(500) > 20))
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    other = loaded(cache, path, model)
    more = torch.cat([ids, prompt(90, seed=1)], dim=1)
    texts = [generate(model, more, 70, cache=one) for one in (cache, other)]
    assert texts[0].equal(texts[1])
    assert_same(cache, other)


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "qwen3-next", "lfm2", "gemma3n", "gpt2", "smollm3"])
def test_layers_of_transformers_itself_are_saved_too(family, path):
    model = tiny(family)
    cache = prefilled(model)
    other = loaded(cache, path, model)
    ids = torch.cat([prompt(LENGTH), prompt(20, seed=1)], dim=1)
    texts = [generate(model, ids, 20, cache=one) for one in (cache, other)]
    assert texts[0].equal(texts[1])
    assert_same(cache, other)


def test_a_prompt_too_short_for_statistics_goes_on_collecting(path):
    model, twin = tiny(), tiny()
    cache = prefilled(model, ids=prompt(150))
    cache.save(path)
    other = qjl.KVCache.load(path, twin)
    for one, of in ((cache, model), (other, twin)):
        read(of, prompt(200, seed=1), one, sizes=(200,))
    assert_same(cache, other)


def test_a_cropped_cache(path, model):
    cache = prefilled(model)
    cache.crop(-150)
    other = loaded(cache, path, model)
    assert other.get_seq_length() == LENGTH - 150
    logits = [read(model, prompt(80, seed=1), one, sizes=(80,)) for one in (cache, other)]
    assert logits[0].equal(logits[1])


def test_bfloat16_and_inference_mode(path):
    model = tiny(dtype=torch.bfloat16)
    with torch.inference_mode():
        cache = prefilled(model)
        cache.save(path)
        other = qjl.KVCache.load(path, model)
    assert read(model, prompt(80, seed=1), cache, sizes=(80,)).equal(
        read(model, prompt(80, seed=1), other, sizes=(80,))
    )


def test_a_loaded_cache_can_be_copied_and_started_over(path, model):
    cache = copy.deepcopy(loaded(prefilled(model), path, model, prompt(LENGTH)))
    assert_same(cache, qjl.KVCache.load(path, model))
    cache.reset()
    assert cache.prompt_ids is None
    read(model, prompt(LENGTH), cache, sizes=(LENGTH,))
    assert_same(cache, qjl.KVCache.load(path, model))


def test_the_file_is_smaller_than_what_it_stands_for(path):
    model = tiny(head_dim=64, dtype=torch.bfloat16)
    cache = prefilled(model, ids=prompt(1900))
    size = cache.save(path)
    header = StoredFile(path).header
    assert size == path.stat().st_size == len(StoredFile(path))
    assert header.bf16_bytes == cache.full_nbytes == 2 * 2 * 2 * 1900 * 64 * 2
    assert header.cache_bytes == cache.nbytes
    assert size < 1.1 * cache.nbytes
    assert (header.tokens, header.rows, header.dtype, header.preset["name"]) == (1900, 1, "bfloat16", "b3")


def test_any_reader_of_safetensors_can_look_inside(path, model):
    cache = prefilled(model)
    cache.save(path, prompt(LENGTH))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "qjl-prompt-cache-2"
        assert file.get_tensor("token_ids").equal(prompt(LENGTH).int())
        assert file.get_tensor("0.core.packed.0.fields.codes").equal(cache.cores[0].packed[0].view()["codes"])


def test_packed_tensors_lie_in_the_file_where_vector_instructions_want_them(path, model):
    prefilled(model).save(path)
    layers = StoredFile(path).state(torch.device("cpu"))
    fields = [field for layer in layers for packed in layer["core"]["packed"] for field in packed["fields"].values()]
    assert all(field.data_ptr() % 64 == 0 for field in fields)


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not tell what is mapped where")
def test_codes_stay_in_the_file_until_a_layer_grows(path, model):
    other = loaded(prefilled(model), path, model)
    packed = other.cores[0].packed[0]
    assert _is_mapped(packed.view()["codes"], path)
    read(model, prompt(70, seed=1), other, sizes=(70,))
    assert not _is_mapped(packed.view()["codes"], path)


def _is_mapped(tensor, path):
    lines = [line.split() for line in MAPS.read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return any(first <= tensor.data_ptr() < stop for first, stop in ranges)


def test_tokens_are_those_that_the_cache_holds(path, model, refuses):
    cache = prefilled(model)
    longer = [*prompt(LENGTH)[0].tolist(), 5, 6]
    assert loaded(cache, path, model, longer).prompt_ids.equal(prompt(LENGTH))
    assert loaded(cache, path, model).prompt_ids is None
    with refuses("the cache holds 1 x 330 tokens, and token_ids are [1, 329]"):
        cache.save(path, prompt(LENGTH)[:, 1:])


# What was not written is refused


def test_what_cannot_be_saved(path, tmp_path, model, refuses):
    with refuses("layer 0 holds no tokens that could be saved"):
        qjl.KVCache(model, "b3").save(path)
    with refuses("make it with the model"):
        qjl.KVCache(config_of("llama"), "b3").save(path)
    (tmp_path / "file").touch()
    with refuses("cannot be written"):
        prefilled(model).save(tmp_path / "file" / "prompt.qjl")
    assert not path.exists()


def test_another_model_or_dtype(path, model, refuses):
    prefilled(model).save(path)
    with refuses("belongs to another model, of type llama"):
        qjl.KVCache.load(path, tiny(seed=1))
    with refuses("belongs to another model"):
        qjl.KVCache.load(path, tiny("qwen2"))
    with refuses("is of the model in float32: load the model in it, not bfloat16"):
        qjl.KVCache.load(path, tiny().to(torch.bfloat16))


@pytest.mark.parametrize(
    "content", [b"", b"qjl", b"\x00" * 500, b'\xff{"__metadata__":{"format":"qjl-prompt-cache-1' * 9]
)
def test_a_file_of_another_kind(content, path, model, refuses):
    path.write_bytes(content)
    with refuses("prompt cache"):
        qjl.KVCache.load(path, model)


def test_a_missing_file_and_a_folder(path, tmp_path, model, refuses):
    with refuses("there is no prompt cache"):
        qjl.KVCache.load(path, model)
    with refuses("cannot be read"):
        qjl.KVCache.load(tmp_path, model)


def test_another_version(path, model, refuses, monkeypatch):
    cache = prefilled(model)
    monkeypatch.setattr(stored, "VERSION", 1)
    cache.save(path)
    assert qjl.KVCache.load(path, model).get_seq_length() == LENGTH
    monkeypatch.undo()
    with refuses("is of another version of qjl"):
        qjl.KVCache.load(path, model)


def test_settings_that_this_version_does_not_know(path, model, refuses, monkeypatch):
    cache = prefilled(model)
    monkeypatch.setattr("qjl.hf.cache.to_dict", lambda config: {"key": {"method": "magic"}, "value": {"method": "qjl"}})
    cache.save(path)
    with refuses("has a preset that is not known here: preset 'custom' needs a method for keys and values"):
        qjl.KVCache.load(path, model)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "prompt.qjl"
    prefilled(model).save(path, prompt(LENGTH))
    return path


@pytest.mark.parametrize("seed", range(4))
def test_no_mutation_is_believed(seed, saved, path, model, refuses):
    """10,000 of them: ``QJL_MUTATIONS=10000 pytest -k mutation``."""
    content, generator = saved.read_bytes(), random.Random(seed)
    for _ in range(MUTATIONS // 4):
        path.write_bytes(mutated(content, generator))
        with refuses("prompt cache"):
            qjl.KVCache.load(path, model)


def test_a_sealed_file_of_other_tensors_is_refused(saved, path, model, refuses):
    """Past the digest, the state is checked against what the layers take."""
    for change in (_longer, _of_other_dtype, _without_a_layer, _of_another_class):
        file = StoredFile(saved)
        states = file.state(torch.device("cpu"))
        change(states)
        stored.write(path, file.header, states)
        with refuses("does not fit the model"):
            qjl.KVCache.load(path, model)


def _longer(states):
    states[0]["core"]["length"] += 100


def _of_other_dtype(states):
    fields = states[1]["core"]["packed"][0]["fields"]
    fields["codes"] = fields["codes"].short()


def _without_a_layer(states):
    del states[1]


def _of_another_class(states):
    states[0]["core"]["codecs"] = None


def test_only_our_own_classes_are_built(refuses):
    for path in ("os:system", "builtins:eval", "qjl.hf:KVCache", "qjl.methods.base:torch", "qjl.methods.nothing:Codec"):
        with refuses("which is no part of this version"):
            trees.build({"object": path, "attributes": {"dict": []}}, {}, torch.device("cpu"))
    with refuses("cannot be stored"):
        trees.dump([object()])
    with refuses("cannot be built"):
        trees.build({"__class__": "x"}, {}, torch.device("cpu"))


def test_memory_that_tensors_share_is_kept_once_and_in_its_strides():
    whole = torch.arange(24.0).view(2, 3, 4)
    views = [whole, whole.transpose(0, 2), whole[:1].expand(5, -1, -1), whole[:, 1]]
    tree, tensors = trees.dump(views)
    assert len(tensors) == 1
    again = trees.build(json.loads(json.dumps(tree)), tensors, torch.device("cpu"))
    for view, other in zip(views, again, strict=True):
        assert view.equal(other)
        assert view.stride() == other.stride()
        assert other.untyped_storage().data_ptr() == again[0].untyped_storage().data_ptr()


# Saving is all or nothing


def test_a_process_killed_while_it_saves_leaves_a_whole_file(path, model):
    """200 moments: ``QJL_KILLS=200 pytest -k killed``."""
    caches = [prefilled(model, ids=prompt(LENGTH, seed=seed)) for seed in range(2)]
    generator, found = random.Random(0), set()
    for _ in range(KILLS):
        save_until_killed(caches, path, generator.uniform(0, 0.1))
        other = qjl.KVCache.load(path, model)
        found.add(
            sum(
                torch.equal(cache.cores[0].dense()[0], other.cores[0].dense()[0]) << i for i, cache in enumerate(caches)
            )
        )
    assert found <= {1, 2}


def test_a_failed_write_leaves_what_was_there(path, model, monkeypatch, refuses):
    cache = prefilled(model)
    cache.save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with refuses("cannot be written (No space left on device)"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir() if one.is_file()] == [path.name]


# The format


def test_attributes_of_codecs_are_part_of_the_format():
    """Whoever changes them raises ``stored.VERSION``: files of before would be read as something else."""
    found = {}
    model = tiny(head_dim=64)
    for name in PRESETS:
        for core in prefilled(model, name).cores:
            _collect(trees.dump(core.codecs)[0], found)
    assert found == ATTRIBUTES


def _collect(tree, found):
    if isinstance(tree, dict) and "object" in tree:
        found.setdefault(tree["object"].split(":")[1], " ".join(sorted(key for key, _ in tree["attributes"]["dict"])))
    for one in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _collect(one, found)


ATTRIBUTES = {
    "Cascade": "layout parts",
    "ChannelCodec": "group_size layout num_bits spread",
    "Extremes": "clip",
    "Field": "dtype shape",
    "Fp8Codec": "layout",
    "GridRecipe": "clip groups num_bits size",
    "HalfScale": "",
    "IdentityCodec": "layout",
    "Int8Codec": "layout",
    "JoinedCode": "decoder first rest",
    "KVQuantCodec": "channels edges layout levels num_bits",
    "LevelCodec": "code encoder mean query_map scale",
    "LogScale": "unit",
    "MappedCodec": "code encoder gains key_map mean query_map scale weights",
    "Mean": "rope vector",
    "NibbleCode": "coordinates dim entries",
    "OutlierCodec": "_code _matrix _outlier_code _outlier_matrix _outlier_scale _scale layout quantizer",
    "PolarCodec": "edges layout quantizer rotation turns",
    "PolarQuant": "first_bits levels seed upper_bits",
    "QJL": "group_size outlier_ratio outliers seed sketch sketch_ratio",
    "RaBitQCodec": "code mean num_bits query_map scale",
    "Rope": "interleaved inv_freq scaling",
    "RotatedGridCodec": "bounds code groups layout num_bits recipe rotation",
    "ScalarCode": "bit_coordinate bit_index decoder kinds widest",
    "SignCode": "block decoder gram",
    "SignCodec": "_code _matrix _sign_scale _sketch code mean query_map scale",
    "Sketch": "d kind m seed",
    "TokenUniformCodec": "device groups layout num_bits",
    "TrellisCode": "decoder next own",
    "TurboESMCodec": "edges layout levels rotation",
    "Unrotated": "codec layout rope",
    "VidKVKeyCodec": "group_size layout wide",
    "VidKVValueCodec": "group_size layout salient threshold",
}
