"""Prompt caches as files: what is read is what was written, and what was not written is refused."""

import copy
import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.cache_utils import StaticLayer

import qjl
from models_for_tests import attending_across, config_of, generate, left_padded, packed_bytes, prompt, read, tiny
from one_layer import taken
from qjl import container
from qjl.cache import file as files
from qjl.cache.file import CACHES, CacheFile
from qjl.compat import cache_argument
from qjl.hf import forget_statistics
from qjl.presets import PRESETS
from stored_cases import mutated, save_until_killed

LENGTH = 330
MAPS = Path("/proc/self/maps")
MUTATIONS, KILLS = int(os.environ.get("QJL_MUTATIONS", "300")), int(os.environ.get("QJL_KILLS", "6"))
DECODED = ("b3", "b2-pre", "qjl-paper", "kivi-2", "full")  # tests/test_cache_file.py knows every method


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
    for number, (one, other) in enumerate(zip(first.quantized_layers, second.quantized_layers, strict=True)):
        for row in range(first.index.batch if one.has_text and one.is_initialized else 0):
            pages = [packed_bytes(cache, number, row) for cache in (first, second)]
            assert all(torch.equal(*pair) for pair in zip(*pages, strict=True))
        assert one.is_initialized == other.is_initialized
        if one.is_initialized:
            assert one.keys.equal(other.keys)
            assert one.values.equal(other.values)


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
    assert other.codecs is not stranger.codecs
    assert qjl.KVCache(model, "b3").codecs is stranger.codecs


def test_codecs_that_are_alike_are_shared(path, model):
    cache = prefilled(model)
    other = loaded(cache, path, model)
    assert other.codecs is cache.codecs


def test_what_is_saved_twice_is_the_same_file(path, tmp_path, model):
    cache = prefilled(model)
    loaded(cache, path, model).save(tmp_path / "again.qjl")
    assert path.read_bytes() == (tmp_path / "again.qjl").read_bytes()


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


def test_cross_attention_has_an_index_of_its_own(path):
    model, states = attending_across(280), torch.randn(1, 401, 128)
    mask = torch.ones(1, LENGTH, 1, 1, dtype=torch.long)
    cache = prefilled(model, ids=prompt(LENGTH), cross_attention_states=states, cross_attention_mask=mask)
    other = loaded(cache, path, model)
    assert CacheFile(path).header.groups == {"text": [0, 2], "cross": [1]}
    assert [store.index.lengths for store in other.stores] == [[LENGTH], [401]]
    assert_same(cache, other)
    assert cache.stores[1].index.packed_tokens == other.stores[1].index.packed_tokens != [0]
    more = {"input_ids": prompt(5, seed=1), "cross_attention_mask": mask[:, :5]}
    with torch.no_grad():
        logits = [model(**more, **cache_argument(one)).logits for one in (cache, other)]
    assert logits[0].equal(logits[1])


def test_text_alone_leaves_cross_attention_out(path):
    model = attending_across()
    other = loaded(prefilled(model, "kivi-2"), path, model)
    assert CacheFile(path).header.groups == {"text": [0, 2]}
    assert other.get_seq_length() == LENGTH


def test_beams_share_pages_in_the_file_too(path, model):
    cache = prefilled(model)
    size = cache.save(path)
    cache.batch_repeat_interleave(4)
    assert cache.save(path) < 1.2 * size
    other = qjl.KVCache.load(path, model)
    for one in (cache, other):
        one.reorder_cache(torch.tensor([0, 0, 3, 1]))
    logits = [read(model, prompt(80, batch=4, seed=1), one, sizes=(80,)) for one in (cache, other)]
    assert logits[0].equal(logits[1])
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
    header = CacheFile(path).header
    assert size == path.stat().st_size == len(CacheFile(path))
    assert header.bf16_bytes == cache.full_nbytes == 2 * 2 * 2 * 1900 * 64 * 2
    assert header.cache_bytes == cache.nbytes
    assert size < 1.1 * cache.nbytes
    assert (header.tokens, header.rows, header.dtype, header.configuration["name"]) == (1900, 1, "bfloat16", "b3")


def test_any_reader_of_safetensors_can_look_inside(path, model):
    cache = prefilled(model)
    cache.save(path, prompt(LENGTH))
    with safe_open(path, framework="pt") as file:
        assert (file.metadata()["format"], file.metadata()["version"]) == ("qjl-cache", "3")
        assert file.get_tensor("token_ids").equal(prompt(LENGTH).int())
        table = cache.index.table[0, : cache.index.blocks[0]]
        pages = taken(cache.cores[1].pages, table)[0]["codes"]
        assert file.get_tensor("layers.1.pages.keys.codes").equal(pages)


def test_pages_lie_in_the_file_where_vector_instructions_want_them(path, model):
    prefilled(model).save(path)
    arrays = CacheFile(path).arrays()
    assert all(array.data_ptr() % 64 == 0 for name, array in arrays.items() if ".pages." in name)


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not tell what is mapped where")
def test_codes_stay_in_the_file_until_a_layer_grows(path, model):
    other = loaded(prefilled(model), path, model)
    pages, before = other.cores[0].pages, path.read_bytes()
    assert _is_mapped(pages.storage[0]["codes"], path)
    assert _is_mapped(other.cores[0].exact.keys, path)
    read(model, prompt(70, seed=1), other, sizes=(70,))
    assert not _is_mapped(pages.storage[0]["codes"], path)
    assert not _is_mapped(other.cores[0].exact.keys, path)
    assert path.read_bytes() == before


def test_what_is_written_to_mapped_pages_does_not_reach_the_file(path, model):
    """A cropped cache has free pages and slots, which are written where they lie."""
    other = loaded(prefilled(model), path, model)
    before = path.read_bytes()
    other.crop(-150)
    read(model, prompt(100, seed=1), other, sizes=(100,))
    assert _is_mapped(other.cores[0].pages.storage[0]["codes"], path)
    assert path.read_bytes() == before


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
    with refuses("the cache holds no tokens that could be saved"):
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
    "content", [b"", b"qjl", b"\x00" * 500, b'\xff{"__metadata__":{"format":"qjl-cache","version":"3"' * 9]
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
    monkeypatch.setattr(files, "CACHES", dataclasses.replace(CACHES, version=4))
    cache.save(path)
    assert qjl.KVCache.load(path, model).get_seq_length() == LENGTH
    monkeypatch.undo()
    with refuses("is of another version of qjl: build it again with `qjl cache build`"):
        qjl.KVCache.load(path, model)


def test_the_files_of_version_0_1(path, model, refuses):
    path.write_bytes(b'\xff\0\0\0\0\0\0\0{"__metadata__":{"format":"qjl-prompt-cache-2","sha256":"' + b"0" * 500)
    with refuses("is of another version of qjl: build it again with `qjl cache build`"):
        qjl.KVCache.load(path, model)


def test_settings_that_this_version_does_not_know(path, model, refuses, monkeypatch):
    cache = prefilled(model)
    monkeypatch.setattr(
        "qjl.hf.kv_cache.to_dict", lambda config: {"key": {"method": "magic"}, "value": {"method": "qjl"}}
    )
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


CHANGES = {
    "a longer row": lambda arrays: arrays["text.lengths"].add_(100),
    "a page that there is not": lambda arrays: arrays["text.table"].add_(1),
    "a slot that there is not": lambda arrays: arrays["text.slots"].add_(1),
    "tokens twice": lambda arrays: arrays["text.tokens"].fill_(3),
    "a block too few": lambda arrays: arrays["text.blocks"].sub_(1),
    "a row more": lambda arrays: arrays.update({"text.padding": torch.zeros(2, dtype=torch.int64)}),
    "no table": lambda arrays: arrays.pop("text.table"),
    "another dtype": lambda arrays: arrays.update(_of_each(arrays, "pages.keys.codes", torch.Tensor.short)),
    "another shape": lambda arrays: arrays.update(_of_each(arrays, "pages.values.codes", lambda x: x[..., :32])),
    "a page too few": lambda arrays: arrays.update(_of_each(arrays, "layers.1.pages", lambda x: x[1:])),
    "no exact tokens": lambda arrays: arrays.pop("layers.1.exact.keys"),
    "other exact tokens": lambda arrays: arrays.update(_of_each(arrays, "layers.1.exact.values", torch.Tensor.half)),
    "no pages": lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith("layers.0.pages")],
    "no learned array": lambda arrays: arrays.pop("layers.0.codec.key.mean"),
    "no flag": lambda arrays: arrays.pop("layers.0.codec.is_undone"),
    "half a RoPE": lambda arrays: arrays.pop("layers.0.rope.scaling"),
}


def _of_each(arrays, part, change):
    return {name: change(array) for name, array in arrays.items() if part in name}


@pytest.mark.parametrize("change", CHANGES)
def test_a_sealed_file_of_other_arrays_is_refused(change, saved, path, model, refuses):
    """Past the digest, arrays are checked against each other and what the layers take."""
    forget_statistics(model)  # the codecs of the file are asked for
    file = CacheFile(saved)
    arrays = {name: array.clone() for name, array in file.arrays().items()}
    CHANGES[change](arrays)
    container.write(path, CACHES, dataclasses.asdict(file.header), arrays)
    with refuses("does not fit the model"):
        qjl.KVCache.load(path, model)


def test_layers_of_another_kind_are_neither_saved_nor_restored(path, refuses):
    model = tiny("gemma3")
    cache = prefilled(model)
    cache.layers[0].more = "something new"
    with refuses("layer 0, a DynamicSlidingWindowLayer, holds a str as more"):
        cache.save(path)
    del cache.layers[0].more
    cache.save(path)
    file = CacheFile(path)
    for name, value in (("kind", "DynamicLayer"), ("cumulative_length", "3"), ("keys", [True]), ("eval", 1)):
        header = json.loads(json.dumps(dataclasses.asdict(file.header)))
        header["own_layers"]["0"][name] = value
        container.write(path.with_name("changed.qjl"), CACHES, header, file.arrays())
        with refuses("does not fit the model"):
            qjl.KVCache.load(path.with_name("changed.qjl"), model)
    cache.layers[0] = StaticLayer(500)
    with refuses("layer 0 is a StaticLayer, which files of prompt caches do not know"):
        cache.save(path)


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
                torch.equal(cache.quantized_layers[0].keys, other.quantized_layers[0].keys) << i
                for i, cache in enumerate(caches)
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


def test_names_are_part_of_the_format(path):
    """Whoever changes them raises the version of ``CACHES``: files of before would be read as something else."""
    model, found = tiny(head_dim=64), set()
    for name in PRESETS:
        cache = prefilled(model, name)
        cache.save(path, prompt(LENGTH))
        found |= set(CacheFile(path).names)
    one = {name.replace("layers.0.", "layers.N.") for name in found if not name.startswith("layers.1.")}
    assert {name for name in one if ".codec." not in name and ".pages." not in name} == {
        "token_ids",
        *(f"text.{name}" for name in INDEX.split()),
        *(f"layers.N.{name}" for name in LAYER.split()),
    }
    assert {name.removeprefix("layers.N.pages.").split(".")[0] for name in one if ".pages." in name} == {
        "keys",
        "values",
    }
    assert " ".join(sorted({name.split(".")[-1] for name in one if ".codec." in name})) == LEARNED


INDEX = "blocks columns counts lengths origins padding partial slots table tokens"
LAYER = "exact.keys exact.values rope.interleaved rope.inv_freq rope.scaling"
LEARNED = "bits channels edges is_rotary is_undone key_map levels mean middle query_map reach rotation unit weights"


def test_the_page_of_the_file_names_every_array(path):
    """docs/prompt-caches.md."""
    page = (Path(__file__).parent.parent / "docs" / "prompt-caches.md").read_text(encoding="utf-8")
    for name in (*INDEX.split(), "marks"):
        assert f"`text.{name}`" in page
    for name in (*LAYER.split(), "pages.keys.", "codec.key.", "codec.is_undone", "seen.count", "own."):
        assert f"`layers.N.{name}" in page
