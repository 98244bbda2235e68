"""A folder of prompt caches: what is found, what is thrown away, and several processes at once."""

import dataclasses
import os
import random
import time

import pytest
import torch

import qjl
from models_for_tests import generate, left_padded, prompt, tiny
from qjl import prefix_store
from qjl.compat import cache_argument
from qjl.container import PARTIAL, SUFFIX
from qjl.hf import KVCache
from stored_cases import mutated

PROMPT = 300


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def caches(tmp_path):
    return qjl.PromptCaches(tmp_path / "prompts", max_bytes=10**9)


def prefilled(model, ids, preset="b3", **settings):
    cache = KVCache(model, preset)
    with torch.no_grad():
        model(ids, **cache_argument(cache), **settings)
    return cache


def put(caches, model, ids, **settings):
    return caches.put(prefilled(model, ids, **settings), ids)


def and_then(ids, length=40, seed=9):
    return torch.cat([ids, prompt(length, seed=seed)], dim=1)


def test_the_longest_beginning_is_found(caches, model):
    ids = prompt(500)
    for length in (300, 420, 350):
        put(caches, model, ids[:, :length])
    put(caches, model, prompt(450, seed=1))
    cache = caches.longest(model, ids)
    assert cache.get_seq_length() == 420
    assert cache.prompt_ids.equal(ids[:, :420])
    direct = prefilled(model, ids[:, :420])
    assert generate(model, ids, 20, cache=cache).equal(generate(model, ids, 20, cache=direct))


def test_a_prompt_that_goes_another_way_is_cropped(caches, model):
    ids = prompt(400)
    kept = prefilled(model, ids)
    caches.put(kept, ids)
    turned = and_then(ids[:, :333])
    cache = caches.longest(model, turned)
    assert cache.get_seq_length() == cache.prompt_ids.shape[1] == 333
    kept.crop(333 - 400)
    assert generate(model, turned, 20, cache=cache).equal(generate(model, turned, 20, cache=kept))


def test_a_token_is_left_to_read(caches, model):
    ids = prompt(PROMPT)
    put(caches, model, ids)
    for shorter in (0, 50):
        asked = ids[:, : PROMPT - shorter]
        cache = caches.longest(model, asked)
        assert cache.get_seq_length() == asked.shape[1] - 1
        assert generate(model, asked, 3, cache=cache).shape == (1, 3)


def test_what_a_list_and_what_generate_return_are_tokens_too(caches, model):
    ids, cache = prompt(PROMPT), KVCache(model, "b3")
    output = model.generate(ids, **cache_argument(cache), max_new_tokens=5, do_sample=False)
    caches.put(cache, output[0].tolist())
    assert caches.longest(model, and_then(output)[0].tolist()).get_seq_length() == PROMPT + 4


def test_a_conversation_goes_on_from_turn_to_turn(caches, model):
    ids, held = prompt(PROMPT), []
    for turn in range(3):
        cache = caches.longest(model, ids) or KVCache(model, "b3")
        held.append(cache.get_seq_length())
        output = model.generate(ids, **cache_argument(cache), max_new_tokens=20, do_sample=False)
        caches.put(cache, output)
        ids = and_then(output, seed=turn)
    assert held == [0, PROMPT + 19, PROMPT + 19 + 60]


def test_what_is_not_found(caches, model):
    ids = prompt(PROMPT)
    assert caches.longest(model, ids) is None
    put(caches, model, ids)
    longer = and_then(ids)
    assert caches.longest(model, prompt(PROMPT, seed=1)) is None
    assert caches.longest(model, longer, "b2") is None
    assert caches.longest(tiny(seed=1), longer) is None
    assert caches.longest(tiny(dtype=torch.bfloat16), longer) is None
    assert caches.longest(model, longer, at_least=PROMPT + 1) is None
    assert caches.longest(model, and_then(ids[:, :63])) is None
    assert caches.longest(model, longer, at_least=PROMPT).get_seq_length() == PROMPT


def test_presets_are_known_by_their_settings(caches, model):
    ids = prompt(PROMPT)
    put(caches, model, ids)
    renamed = dataclasses.replace(qjl.PRESETS["b3"], name="mine", summary="other words")
    assert caches.longest(model, and_then(ids), renamed) is not None


def test_layers_that_cannot_be_cropped_serve_whole_prompts(caches):
    model, ids = tiny("gemma3"), prompt(PROMPT)
    put(caches, model, ids)
    assert caches.longest(model, and_then(ids[:, :250])) is None
    assert caches.longest(model, ids) is None
    assert caches.longest(model, and_then(ids)).get_seq_length() == PROMPT


def test_what_a_folder_does_not_keep(caches, model, refuses):
    batch = left_padded([prompt(300), prompt(280, seed=1)])
    masked = KVCache(model, "b3")
    masked.mark(torch.ones(1, PROMPT, dtype=torch.bool))
    with torch.no_grad():
        model(prompt(PROMPT), **cache_argument(masked))
    for cache, ids in (
        (prefilled(model, batch["input_ids"], attention_mask=batch["attention_mask"]), batch["input_ids"]),
        (prefilled(model, batch["input_ids"][1:], attention_mask=batch["attention_mask"][1:]), batch["input_ids"][1:]),
        (masked, prompt(PROMPT)),
    ):
        with refuses("a folder keeps caches of one row without padding and token mask"):
            caches.put(cache, ids)
    with refuses("the cache holds 1 x 300 tokens, and token_ids are [1, 299]"):
        caches.put(prefilled(model, prompt(PROMPT)), prompt(PROMPT)[:, 1:])
    assert not caches.folder.exists()


def test_the_least_recently_used_go_first(tmp_path, model):
    ids = [prompt(PROMPT, seed=seed) for seed in range(4)]
    size = put(qjl.PromptCaches(tmp_path / "one", 10**9), model, ids[0]).stat().st_size
    caches = qjl.PromptCaches(tmp_path / "some", max_bytes=int(3.5 * size))
    for one in ids[:3]:
        put(caches, model, one)
        time.sleep(0.02)
    assert caches.longest(model, and_then(ids[0])) is not None
    put(caches, model, ids[3])
    assert [caches.longest(model, and_then(one)) is not None for one in ids] == [True, False, True, True]
    assert sum(path.stat().st_size for path in caches.folder.iterdir()) <= caches.max_bytes


def test_files_of_others_are_not_deleted(tmp_path, model):
    """Nor are they what makes the folder too large."""
    caches = qjl.PromptCaches(tmp_path, max_bytes=10**9)
    path = tmp_path / f"manual{SUFFIX}"
    prefilled(model, prompt(PROMPT)).save(path)
    size = put(caches, model, prompt(PROMPT, seed=1)).stat().st_size
    caches.max_bytes = int(1.5 * size)
    kept = put(caches, model, prompt(PROMPT, seed=2))
    assert sorted(tmp_path.glob(f"*{SUFFIX}")) == sorted([path, kept])


def test_the_newest_stays_whatever_clocks_say(tmp_path, model):
    caches = qjl.PromptCaches(tmp_path, max_bytes=10**9)
    older = put(caches, model, prompt(PROMPT))
    os.utime(older, (time.time() + 1000,) * 2)
    caches.max_bytes = int(1.5 * older.stat().st_size)
    assert put(caches, model, prompt(PROMPT, seed=1)).exists()
    assert not older.exists()


def test_a_folder_that_may_only_be_read_serves(caches, model, monkeypatch):
    ids = prompt(PROMPT)
    put(caches, model, ids)

    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    assert caches.longest(model, and_then(ids)).get_seq_length() == PROMPT


def test_a_loaded_cache_knows_its_tokens(caches, model, refuses):
    ids = prompt(PROMPT)
    put(caches, model, ids)
    loaded = caches.longest(model, and_then(ids))
    caches.put(loaded, ids)
    with refuses("the cache was loaded with other tokens"):
        caches.put(loaded, prompt(PROMPT, seed=1))


def test_a_cache_larger_than_the_folder(tmp_path, model, refuses):
    caches = qjl.PromptCaches(tmp_path / "prompts", max_bytes=1000)
    with refuses("does not fit a folder of 1000"):
        put(caches, model, prompt(PROMPT))
    assert not list(caches.folder.iterdir())


def test_a_damaged_file_is_passed_over(caches, model, caplog):
    ids = prompt(400)
    put(caches, model, ids[:, :350])
    longer = put(caches, model, ids)
    content = bytearray(longer.read_bytes())
    content[-1] ^= 1
    longer.write_bytes(content)
    assert caches.longest(model, and_then(ids)).get_seq_length() == 350
    longer.write_bytes(content[:5])
    assert caches.longest(model, and_then(ids)).get_seq_length() == 350
    assert caplog.text.count("is damaged") + caplog.text.count("is no prompt cache") == 2


def test_no_mutation_in_a_folder_is_believed(caches, model):
    path = put(caches, model, prompt(PROMPT))
    content, generator = path.read_bytes(), random.Random(0)
    for _ in range(150):
        path.write_bytes(mutated(content, generator))
        assert caches.longest(model, and_then(prompt(PROMPT))) is None


def test_a_file_that_disappears_is_a_miss(caches, model, monkeypatch, caplog):
    path = put(caches, model, prompt(PROMPT))
    load = KVCache.load

    def load_too_late(file, model):
        path.unlink()
        return load(file, model)

    monkeypatch.setattr(KVCache, "load", load_too_late)
    assert caches.longest(model, and_then(prompt(PROMPT))) is None
    assert not caplog.text


def test_what_killed_processes_leave_is_cleaned_up(caches, model, monkeypatch):
    cache = prefilled(model, prompt(PROMPT))
    caches.folder.mkdir(exist_ok=True)
    left = [caches.folder / f".killed{SUFFIX}.0{PARTIAL}"]
    left[0].write_bytes(b"half of a file")
    caches.put(cache, prompt(PROMPT))
    assert list(caches.folder.glob(".*")) == left
    monkeypatch.setattr(prefix_store, "ABANDONED", -1)
    caches.put(cache, prompt(PROMPT))
    assert not list(caches.folder.glob(".*"))


def test_processes_share_a_folder(tmp_path, model):
    """Two write and throw away, two read: whatever is found is right."""
    ids = [prompt(PROMPT, seed=seed) for seed in range(4)]
    full = [prefilled(model, one) for one in ids]
    size = full[0].save(tmp_path / "one.qjl", ids[0])
    caches = qjl.PromptCaches(tmp_path / "prompts", max_bytes=int(2.5 * size))
    first = [cache.quantized_layers[0].keys for cache in full]
    children = [_child(_write, caches, full, ids, seed) for seed in range(2)]
    children += [_child(_read, caches, model, first, ids, seed) for seed in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    caches.put(full[0], ids[0])
    assert sum(path.stat().st_size for path in caches.folder.iterdir()) <= caches.max_bytes


def _child(work, *arguments):
    child = os.fork()
    if not child:
        try:
            work(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def _write(caches, full, ids, seed):
    generator = random.Random(seed)
    for _ in range(30):
        which = generator.randrange(len(ids))
        caches.put(full[which], ids[which])


def _read(caches, model, first, ids, seed):
    generator, hits = random.Random(seed), 0
    stop = time.monotonic() + 60
    while hits < 10 and time.monotonic() < stop:
        which = generator.randrange(len(ids))
        cache = caches.longest(model, and_then(ids[which]))
        if cache is not None:
            hits += 1
            assert cache.quantized_layers[0].keys.equal(first[which])
    assert hits == 10
