"""The cache in transformers: every way to generate, what it costs in memory, and what users may do around it."""

import contextlib
import copy
import dataclasses
import gc
import logging
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import qjl
from method_cases import one_of_each_codec
from models_for_tests import (
    OWN,
    agreement,
    build,
    config_of,
    difference,
    exact,
    generate,
    left_padded,
    packed_bytes,
    prompt,
    read,
    tiny,
)
from one_layer import codec_tensors
from qjl.cache.layer import Layer
from qjl.cache.paged import PagedCache
from qjl.compat import CACHE, CROP_TAKES_LENGTHS, cache_argument
from qjl.hf import own_codecs
from qjl.hf.promises import ENABLED
from qjl.methods.balanced import Balanced
from qjl.packed import BLOCK
from qjl.presets import DEFAULT_PRESET

NOISE = 1e-2  # of the logits: a few codes at an edge; quantization itself is ten times as much
TINY_HEADS, TINY_DIM = 2, 32
KEEP_ALL = qjl.CacheConfig(Balanced(), Balanced(2, metric=False), recent=400)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def fitted():
    """A model whose codecs for b3 come from one prompt."""
    model = tiny()
    read(model, prompt(300, seed=7), qjl.KVCache(model, "b3"), sizes=(300,))
    return model


@pytest.fixture
def model(fitted):
    """The same for all tests, under sdpa and with transformers' generate."""
    yield fitted
    fitted.set_attn_implementation("sdpa")
    vars(fitted).pop(ENABLED, None)


def generated(model, ids, **settings):
    """What plain ``generate`` returns, cache included."""
    return model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **settings)


# Ways to generate

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 70},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "assisted": {"assistant_model": 1},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_full_generates_like_the_dynamic_cache(model, mode, attention):
    """45 tokens, over the edge of a block."""
    settings, ids, texts = dict(MODES[mode]), prompt(200), []
    if "assistant_model" in settings:
        settings["assistant_model"] = tiny(layers=1)
    model.set_attn_implementation(attention)
    for cache in (DynamicCache(config=model.config), qjl.KVCache(model, "full")):
        torch.manual_seed(0)
        texts.append(generate(model, ids, tokens=45, cache=cache, **settings))
    assert texts[1].equal(texts[0])
    assert min(cache.packed_tokens) >= 188
    assert not cache.is_compileable


@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_cache_generates_in_every_mode(model, mode):
    settings = dict(MODES[mode])
    if "assistant_model" in settings:
        settings["assistant_model"] = qjl.enable(tiny(layers=1), "full")
    cache = qjl.KVCache(model, "b3")
    new = generate(model, prompt(200), tokens=45, cache=cache, **settings)
    assert new.shape[1] == 45
    assert cache.get_seq_length() in (244, 245)
    assert min(cache.packed_tokens) >= 188
    assert all(torch.isfinite(tensor).all() for layer in cache.layers for tensor in (layer.keys, layer.values))


def test_an_enabled_model_assists():
    """Its drafts are rolled back, in sliding windows too."""
    assistant, model, ids = tiny("gemma2"), tiny("gemma2", layers=2, seed=1), prompt(200)
    expected = generate(model, ids, tokens=30)
    assert generate(model, ids, tokens=30, assistant_model=qjl.enable(assistant, "full")).equal(expected)


def test_a_conversation_continues_on_one_cache(model):
    ours, reference = qjl.KVCache(model, "full"), DynamicCache(config=model.config)
    text = prompt(120)
    for turn in range(3):
        text = torch.cat([text, prompt(90, seed=turn)], dim=1)
        answers = [generate(model, text, cache=cache) for cache in (ours, reference)]
        assert answers[0].equal(answers[1])
        text = torch.cat([text, answers[0]], dim=1)
    assert ours.get_seq_length() == reference.get_seq_length() == text.shape[1] - 1


def test_what_is_packed_stays_as_it_is(model):
    cache, text = qjl.KVCache(model, "b3"), prompt(200)
    generate(model, text, cache=cache)
    before = packed_bytes(cache)
    generate(model, torch.cat([text, prompt(90)], dim=1), cache=cache)
    assert cache.packed_tokens == [252]
    after = [tensor[: len(old)] for tensor, old in zip(packed_bytes(cache), before, strict=True)]
    assert all(map(torch.equal, after, before))


@pytest.mark.parametrize("sizes", [(100, 100, 90), (1, 279, 10), (290,)], ids=str)
def test_codes_do_not_depend_on_how_tokens_arrive(model, sizes):
    caches = [qjl.KVCache(model, "b3") for _ in range(2)]
    read(model, prompt(300), caches[0], sizes=(300,))
    read(model, prompt(300), caches[1], sizes)
    assert agreement(packed_bytes(caches[1], layer=0), packed_bytes(caches[0], layer=0)) > 0.999


# Batches


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 70}], ids=["one prefill", "chunks"])
@pytest.mark.parametrize("lengths", [(300, 150), (5, 300), (220, 290, 221)], ids=str)
def test_a_padded_row_is_the_row_alone(model, lengths, settings):
    """With chunks of 70, the first chunks of the shorter rows are nothing but padding."""
    rows = [prompt(length, seed=length) for length in lengths]
    batch = left_padded(rows)
    cache = qjl.KVCache(model, "b3")
    mask = batch["attention_mask"]
    together = generate(model, batch["input_ids"], attention_mask=mask, cache=cache, **settings)
    assert cache.index.padding == [max(lengths) - length for length in lengths]
    for index, row in enumerate(rows):
        alone = qjl.KVCache(model, "b3")
        assert together[index].equal(generate(model, row, cache=alone, **settings)[0])
        assert cache.packed_tokens[index] == alone.packed_tokens[0]
        if alone.packed_tokens[0]:
            assert agreement(packed_bytes(cache, row=index), packed_bytes(alone)) > 0.999


def test_padding_is_known_without_hooks():
    """From the mask that attention is given: a cache of a configuration has no model to watch."""
    rows = [prompt(300), prompt(270, seed=1)]
    unwatched, watched = tiny(), tiny()
    caches = [qjl.KVCache(unwatched.config), qjl.KVCache(watched)]
    texts = [
        model.generate(**left_padded(rows), cache=cache, max_new_tokens=4)
        for model, cache in zip((unwatched, watched), caches, strict=True)
    ]
    assert not unwatched._forward_pre_hooks
    assert texts[0].equal(texts[1])
    assert caches[0].index.padding == [0, 30]
    for row in range(2):
        assert agreement(packed_bytes(caches[0], row=row), packed_bytes(caches[1], row=row)) == 1


@pytest.mark.parametrize(
    ("positions", "origin"), [(None, [0, 30]), (torch.arange(100, 160), [100, 130])], ids=["columns", "given"]
)
def test_positions_of_the_first_real_tokens(model, positions, origin):
    """Without position_ids a model numbers columns, padding included."""
    cache = qjl.KVCache(model, "b3")
    batch = left_padded([prompt(60), prompt(30, seed=1)])
    ids = positions if positions is None else positions[None]
    for step in (slice(0, 20), slice(20, 60)):
        mask = batch["attention_mask"][:, : step.stop]
        step_ids = None if ids is None else ids[:, step]
        inputs = {"input_ids": batch["input_ids"][:, step], "attention_mask": mask, "position_ids": step_ids}
        with torch.no_grad():
            model(**inputs, **cache_argument(cache))
    assert cache.index.padding == [0, 30]
    assert cache.index.origins.tolist() == origin


def test_rows_are_selected_and_repeated(model):
    rows = [prompt(200, seed=seed) for seed in range(3)]
    cache = qjl.KVCache(model, "b3")
    read(model, torch.cat(rows), cache, sizes=(200,))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    next_tokens = prompt(3, seed=9)
    logits = read(model, next_tokens.expand(4, -1), cache, sizes=(2,))
    for index, row in enumerate((2, 2, 0, 0)):
        alone = qjl.KVCache(model, "b3")
        read(model, rows[row], alone, sizes=(200,))
        assert difference(logits[index], read(model, next_tokens, alone, sizes=(2,))[0]) < NOISE


# Going back


@pytest.mark.parametrize("removed", [5, 60, 150, 197, 200])
def test_crop_and_read_again(model, removed):
    """Within the window, into packed blocks, into the sinks, and everything."""
    ids = prompt(200)
    cache = qjl.KVCache(model, "full")
    logits = read(model, ids, cache, sizes=(200,))
    cache.crop(-removed)
    assert cache.get_seq_length() == 200 - removed
    again = read(model, ids[:, 200 - removed :], cache, sizes=(removed,))
    torch.testing.assert_close(again, logits[:, 200 - removed :], atol=2e-5, rtol=1e-4)
    assert cache.packed_tokens[0] + cache.index.sinks <= 200 - 32


def test_crop_leaves_packed_codes_alone(model):
    cache = qjl.KVCache(model, "b3")
    read(model, prompt(200), cache, sizes=(200,))
    before = cache.layers[1].keys[:, :, :100].clone()
    cache.crop(-90)
    assert cache.packed_tokens == [106]
    read(model, prompt(40, seed=3), cache, sizes=(30,))
    torch.testing.assert_close(cache.layers[1].keys[:, :, :100], before)


def test_crop_of_nothing_is_nothing(model):
    cache = qjl.KVCache(model, "b3")
    read(model, prompt(200), cache, sizes=(200,))
    before = cache.nbytes, packed_bytes(cache)
    cache.crop(0)
    assert (cache.get_seq_length(), cache.nbytes) == (200, before[0])
    assert all(map(torch.equal, packed_bytes(cache), before[1]))
    if CROP_TAKES_LENGTHS:
        cache.crop(3)
        assert cache.get_seq_length() == 3
    else:
        with pytest.raises(ValueError, match="negative"):
            cache.crop(3)


def test_a_reset_cache_is_a_fresh_one(model):
    caches = [qjl.KVCache(model, "b3") for _ in range(2)]
    read(model, prompt(210, seed=5).expand(2, -1), caches[0], sizes=(210,))
    caches[0].reset()
    assert (caches[0].get_seq_length(), caches[0].nbytes) == (0, caches[0].codec_nbytes)
    assert read(model, prompt(), caches[0]).equal(read(model, prompt(), caches[1]))


def test_a_copied_cache_goes_its_own_way(model):
    """Prefix caching: one prompt, many continuations."""
    prefix, ids = qjl.KVCache(model, "b3"), prompt(200)
    read(model, ids, prefix, sizes=(200,))
    branch = copy.deepcopy(prefix)
    read(model, prompt(100, seed=8), branch, sizes=(100,))
    assert branch.codecs is prefix.codecs
    assert prefix.get_seq_length() == 200
    expected = qjl.KVCache(model, "b3")
    read(model, ids, expected, sizes=(200,))
    more = prompt(100, seed=9)
    assert read(model, more, prefix, sizes=(90,)).equal(read(model, more, expected, sizes=(90,)))


# Statistics


def test_tokens_are_exact_until_the_statistics_are_there():
    model, ids = tiny(), prompt(300)
    cache, reference = qjl.KVCache(model, "b3"), exact(model, ids, sizes=(240,))
    logits = read(model, ids[:, :255], cache, sizes=(240,))
    torch.testing.assert_close(logits, reference[:, :255], atol=2e-5, rtol=1e-4)
    assert cache.wants_queries
    assert not any(cache.packed_tokens)
    logits = read(model, ids[:, 255:], cache, sizes=(1,))
    assert cache.packed_tokens == [252]
    assert difference(logits[:, 1:], reference[:, 256:]) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_statistics_serve_all_caches_and_are_told_once(attention, caplog):
    model = tiny(layers=3)
    qjl.KVCache(model)
    model.set_attn_implementation(attention)
    with caplog.at_level(logging.INFO, logger="qjl"):
        for length in (300, 120, 300):
            cache = qjl.KVCache(model)
            generate(model, prompt(length), cache=cache, tokens=2)
            assert min(cache.packed_tokens) >= 60, "a short prompt is packed with known statistics"
        generate(model, prompt(300), cache=qjl.KVCache(model, "qjl-2"), tokens=2)
    messages = [record.getMessage() for record in caplog.records if record.name == "qjl"]
    assert messages == ["llama: statistics taken from the first prompt, 296 tokens"]


def test_padding_does_not_count():
    """Statistics of a padded batch are those of its rows together."""
    rows = [prompt(300), prompt(200, seed=1)]
    batch = left_padded(rows) | {
        "position_ids": left_padded([torch.arange(row.shape[1])[None] for row in rows])["input_ids"]
    }
    *alone, together = [
        first_layer_statistics(inputs) for inputs in ({"input_ids": rows[0]}, {"input_ids": rows[1]}, batch)
    ]
    sinks = 4
    assert together.count == 500 - 2 * sinks
    for name, weights in {"query_moment": (300, 200), "key_mean": (300 - sinks, 200 - sinks)}.items():
        pooled = sum(weight * getattr(row, name) for weight, row in zip(weights, alone, strict=True)) / sum(weights)
        torch.testing.assert_close(getattr(together, name), pooled, atol=1e-5, rtol=1e-4)


def first_layer_statistics(inputs):
    model = tiny()
    cache = qjl.KVCache(model, KEEP_ALL)
    with torch.no_grad():
        model(**inputs, **cache_argument(cache))
    return measured_in(cache)[0]


def measured_in(cache):
    """Statistics of each layer, of tokens that all are exact."""
    (source,), (store,) = cache.sources, cache.stores
    return [source.measure(core, store) for core in cache.cores]


def queries_in(cache):
    """How many were seen of each KV head, and their moments, by layer."""
    found = [cache.sources[0]._queries.moments(core.number) for core in cache.cores]
    return [(moments.count, moments.queries(True), moments.outputs()) for moments in found]


@pytest.mark.parametrize("kept", [270, 200, 150, 40])
def test_queries_go_with_the_tokens_that_are_cropped(model, kept):
    ids = prompt(300, batch=2)
    cropped, expected = qjl.KVCache(model, KEEP_ALL), qjl.KVCache(model, KEEP_ALL)
    read(model, ids[:, :270], cropped, sizes=(150, 50, 70))
    cropped.crop(kept - 270) if kept < 270 else None
    read(model, ids[:, kept:], cropped, sizes=(300 - kept,))
    read(model, ids, expected, sizes=(300,))
    for found, other in zip(queries_in(cropped), queries_in(expected), strict=True):
        assert found[0] == other[0] == 2 * 300 * 2  # rows, tokens, queries of a KV head
        torch.testing.assert_close(found[1:], other[1:], rtol=1e-4, atol=1e-5)


def test_a_sum_of_queries_goes_as_a_whole(model):
    """Those of a long prompt are not held one by one."""
    cache = qjl.KVCache(model, dataclasses.replace(KEEP_ALL, recent=1000))
    read(model, prompt(620), cache, sizes=(560, 30, 30))
    assert cache.sources[0]._queries.passes == {0: [], 1: []}
    cache.crop(-40)
    assert cache.sources[0]._queries.sums == {}
    read(model, prompt(10), cache, sizes=(10,))
    assert [count for count, _, _ in queries_in(cache)] == [20, 20]


@pytest.mark.parametrize("error", [RuntimeError, qjl.QJLError])
def test_queries_of_a_pass_that_cannot_end_do_not_count(model, monkeypatch, error):
    cache = qjl.KVCache(model, KEEP_ALL)
    read(model, prompt(100), cache, sizes=(100,))
    before = queries_in(cache)

    def fail(*arguments):
        raise error("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(cache.stores[0], "_require_all", fail)
        with pytest.raises(error, match="out of luck"):
            read(model, prompt(50), cache, sizes=(50,))
    assert cache.get_seq_length() == 100
    assert all(torch.equal(a, b) for a, b in zip(queries_in(cache)[0][1:], before[0][1:], strict=True))
    assert [count for count, _, _ in queries_in(cache)] == [count for count, _, _ in before]


def test_caches_of_one_model_share_codecs(model):
    caches = [
        qjl.KVCache(model),
        qjl.KVCache(model),
        qjl.KVCache(model, codecs=own_codecs(model, qjl.PRESETS[DEFAULT_PRESET])),
    ]
    for cache in caches:
        read(model, prompt(270), cache, sizes=(270,))
    maps = [codec_tensors(cache.cores[0])[0].data_ptr() for cache in caches]
    assert maps[0] == maps[1] != maps[2]


@pytest.mark.parametrize("preset", one_of_each_codec())
def test_a_monotonous_prompt_does_no_harm(preset):
    """Statistics of one token repeated: no direction varies, and real text follows."""
    model = tiny()
    cache = qjl.KVCache(model, preset)
    text = torch.cat([torch.full((1, 300), 5), prompt(150)], dim=1)
    logits = read(model, text, cache, sizes=(300, 140))
    assert torch.isfinite(logits).all()
    exact_tokens = cache.config.sinks + cache.config.recent
    assert cache.packed_tokens[0] > 440 - exact_tokens - 64
    assert difference(logits, exact(model, text, sizes=(300, 140))) < 1


def test_not_a_number_is_refused(refuses):
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = torch.nan
    with refuses("keys of layer 0 contain NaN"):
        read(model, prompt(), qjl.KVCache(model))


# Memory


def numbers_held(core: Layer):
    """Tokens that a layer keeps exactly, fresh ones of the pass at hand too."""
    fresh = 0 if core.fresh is None else core.fresh[0].shape[2]
    return fresh + core.exact_nbytes // (2 * TINY_HEADS * TINY_DIM * 4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefill_keeps_one_layer_exact_at_most(attention):
    """The first prompt, which gives the statistics, and one after it."""
    model = tiny(layers=4)
    qjl.KVCache(model)
    model.set_attn_implementation(attention)
    for _ in range(2):
        cache, held = qjl.KVCache(model), []
        watch = model.model.layers[-1].mlp.register_forward_pre_hook(
            lambda *_, cores=cache.cores, held=held: held.extend(numbers_held(core) for core in cores)
        )
        read(model, prompt(300), cache, sizes=(300,))
        watch.remove()
        most = cache.config.sinks + cache.config.recent + BLOCK - 1
        assert max(held[:-1]) <= most
        assert max(numbers_held(core) for core in cache.cores) <= most


def test_every_byte_is_counted(model):
    cache = qjl.KVCache(model, "b3")
    read(model, prompt(300), cache)
    packed = [tensor for core in cache.cores for side in core.pages.storage for tensor in side.values()]
    windows = [tensor for core in cache.cores for tensor in (core.exact.keys, core.exact.values)]
    codecs = [tensor for core in cache.cores for tensor in codec_tensors(core)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in codecs}
    assert cache.codec_nbytes == sum(storage.nbytes() for storage in storages.values()) > 0
    held = sum(tensor.untyped_storage().nbytes() for tensor in packed + windows)
    assert cache.allocated_nbytes == held + cache.codec_nbytes

    tokens = 256
    assert cache.packed_tokens == [tokens - 4], "sinks are exact and in codes"
    numbers = 2 * TINY_HEADS * TINY_DIM  # layers x heads x head_dim
    packed_nbytes = tokens * numbers * sum(cache.bits) / 8
    exact_nbytes = 2 * (300 - tokens + 4) * numbers * 4
    assert cache.nbytes == packed_nbytes + exact_nbytes + cache.codec_nbytes
    assert cache.full_nbytes == 2 * 300 * numbers * 4
    assert cache.bits_with_window == pytest.approx(8 * cache.nbytes / (2 * 300 * numbers))


def test_sliding_windows_are_counted_too():
    model = tiny("gemma2")
    cache = qjl.KVCache(model, "full")
    read(model, prompt(300), cache)
    numbers = 2 * TINY_HEADS * TINY_DIM * 4
    assert cache.nbytes == (300 + 4 + 127) * numbers + cache.codec_nbytes
    assert cache.full_nbytes == (300 + 127) * numbers


def test_states_of_linear_attention_are_counted_too():
    model = tiny("qwen3-next")
    cache = qjl.KVCache(model, "full")
    read(model, prompt(300), cache)
    linear = cache.layers[0]
    states = linear.conv_states[0].nbytes + linear.recurrent_states[0].nbytes
    assert cache.nbytes == (300 + 4) * 2 * TINY_HEADS * TINY_DIM * 4 + states + cache.codec_nbytes


def test_the_window_is_not_copied_at_every_token(model):
    cache, places = qjl.KVCache(model, "b3"), set()
    read(model, prompt(200), cache, sizes=(200,))
    for token in prompt(128).split(1, dim=1):
        read(model, token, cache, sizes=(1,))
        places.add(cache.cores[0].exact.keys.data_ptr())
    assert len(places) <= 4
    assert numbers_held(cache.cores[0]) < 4 + 32 + BLOCK


def test_a_layer_is_decoded_once_for_each_step(model, monkeypatch):
    cache, decoded = qjl.KVCache(model, "b3"), []
    model.set_attn_implementation(OWN)
    dense = PagedCache.dense
    monkeypatch.setattr(
        PagedCache, "dense", lambda store, core, *fresh: decoded.append(core.name) or dense(store, core, *fresh)
    )
    read(model, prompt(203), cache, sizes=(200,))
    assert decoded == ["layer 0", "layer 1"] * 4


@pytest.mark.parametrize("length", [50, 220])
def test_no_gradient_is_kept(model, length):
    cache, ids = qjl.KVCache(model, "b3"), prompt(length)
    with_gradient = model(ids, **cache_argument(cache)).logits
    assert not any(x.requires_grad for core in cache.cores for x in (core.exact.keys, core.exact.values))
    assert with_gradient.equal(read(model, ids, qjl.KVCache(model, "b3"), sizes=(length,)))


def test_inference_mode_does_not_stick():
    """A prompt read under inference_mode, and generate after it, which writes to the same buffers."""
    model, ids = tiny(), prompt(300)
    cache = qjl.KVCache(model, "b3")
    with torch.inference_mode():
        model(ids, **cache_argument(cache))
    for more in (5, 70):
        ids = torch.cat([ids, prompt(more)], dim=1)
        generate(model, ids, cache=cache, tokens=1)
    assert cache.packed_tokens == [316]
    model(prompt(3), **cache_argument(cache)).logits.sum().backward()


# Around the model


def test_enable_gives_each_call_a_fresh_cache(model):
    assert qjl.enable(model, "full") is model
    plain = generate(model, prompt(), cache=DynamicCache(config=model.config), tokens=3)
    results = [generated(model, prompt()) for _ in range(2)]
    caches = [result[CACHE] for result in results]
    assert [type(cache) for cache in caches] == [qjl.KVCache] * 2
    assert caches[0] is not caches[1]
    assert caches[1].get_seq_length() == 302
    assert results[1].sequences[:, 300:].equal(plain)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"cache_implementation": "static"}, StaticCache),
        ({"cache_implementation": "dynamic"}, DynamicCache),
        ({"use_cache": False}, type(None)),
        ({"prefill_chunk_size": 70}, qjl.KVCache),
        ({"num_beams": 2}, qjl.KVCache),
    ],
    ids=str,
)
def test_what_the_user_asks_for_wins(model, settings, kind):
    expected = generated(model, prompt(150), **settings)
    result = generated(qjl.enable(model, "full"), prompt(150), **settings)
    assert type(getattr(result, CACHE)) is kind
    assert result.sequences.equal(expected.sequences)


@pytest.mark.parametrize("make", [lambda model: DynamicCache(), lambda model: qjl.KVCache(model, "full")])
def test_a_given_cache_wins(model, make):
    qjl.enable(model, "b3")
    cache = make(model)
    assert generated(model, prompt(), **cache_argument(cache))[CACHE] is cache


def test_disable_undoes_everything():
    model = tiny(attention="eager")
    untouched = set(vars(model))
    qjl.enable(model, "b3")
    qjl.enable(model, "full")
    assert model.config._attn_implementation == "eager"
    assert generated(model, prompt())[CACHE].config.name == "full"
    assert len(model._forward_pre_hooks) == 1
    assert qjl.disable(model) is model
    assert model.config._attn_implementation == "eager"
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert set(vars(model)) == untouched
    assert type(generated(model, prompt())[CACHE]) is DynamicCache
    qjl.disable(model)


def test_disable_leaves_a_later_choice_of_attention_alone():
    model = qjl.enable(tiny(attention="eager"), "full")
    model.set_attn_implementation("sdpa")
    assert qjl.disable(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_enabled_model_is_its_own(duplicate):
    model = qjl.enable(tiny(attention="eager"), "full")
    twin = duplicate(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert type(generated(twin, prompt(120))[CACHE]) is qjl.KVCache
    assert not generated(twin, prompt(120)).sequences.equal(generated(model, prompt(120)).sequences)
    qjl.disable(twin)
    assert twin.config._attn_implementation == "eager"
    assert type(generated(twin, prompt(120))[CACHE]) is DynamicCache
    assert type(generated(model, prompt(120))[CACHE]) is qjl.KVCache


def test_nothing_of_ours_is_saved_with_a_model(tmp_path):
    qjl.enable(tiny(), "full").save_pretrained(tmp_path)
    assert "qjl" not in (tmp_path / "config.json").read_text()
    assert "qjl" not in (tmp_path / "generation_config.json").read_text()


def test_other_caches_are_served_as_by_sdpa(model):
    ids = prompt(150)
    ours = exact(model, ids, sizes=(100, 40))
    model.set_attn_implementation("sdpa")
    assert ours.equal(exact(model, ids, sizes=(100, 40)))


def test_two_models_in_two_threads():
    models = [tiny(seed=seed) for seed in (1, 2)]
    expected = [
        generate(model, prompt(), cache=qjl.KVCache(model, codecs=own_codecs(model, qjl.PRESETS[DEFAULT_PRESET])))
        for model in models
    ]
    results = {}

    def work(index):
        model = models[index]
        results[index] = [generate(model, prompt(), cache=qjl.KVCache(model)) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(text.equal(expected[index]) for index in range(2) for text in results[index])


def test_dropout_acts_on_what_is_decoded():
    model, ids = tiny(attention_dropout=0.5), prompt(230)
    cache = qjl.KVCache(model, "full")
    read(model, ids[:, :220], cache, sizes=(220,))
    branch = copy.deepcopy(cache)
    evaluated = read(model, ids[:, 220:], cache, sizes=(5,))
    model.train()
    assert difference(read(model, ids[:, 220:], branch, sizes=(5,)), evaluated) > 0.05
    assert branch.get_seq_length() == 230


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "qwen3-next"])
def test_attention_weights_are_given_as_by_transformers(family):
    """By eager, which reads what is decoded for them; the text is the same with them and without."""
    model = tiny(family, attention="eager")
    stock = generated(model, prompt(150), output_attentions=True)
    results = [
        generated(model, prompt(150), cache=qjl.KVCache(model, preset), output_attentions=True)
        for preset in ("full", "b3")
    ]
    for step in range(3):
        for full, packed, theirs in zip(*(result.attentions[step] for result in (*results, stock)), strict=True):
            torch.testing.assert_close(full, theirs)
            assert packed.shape == theirs.shape
    assert results[1].sequences.equal(generated(model, prompt(150), cache=qjl.KVCache(model, "b3")).sequences)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_configuration_is_enough(attention):
    """Nothing is attached to the model that reads, and nothing is shared."""
    model = tiny(attention=attention)
    texts = []
    for cache in (qjl.KVCache(model.config), qjl.KVCache(model.config, "b3")):
        texts.append(generate(model, prompt(), cache=cache))
        assert cache.packed_tokens == [252]
    assert not model._forward_pre_hooks
    assert texts[0].equal(texts[1])
    assert texts[0].equal(generate(model, prompt(), cache=qjl.KVCache(model)))


def test_queries_that_are_not_shown_are_missed(refuses):
    """A configuration does not tell that BLOOM's attention cannot be watched."""
    model = build(transformers.BloomConfig(vocab_size=128, hidden_size=128, n_layer=2, n_head=4))
    generate(model, prompt(), cache=qjl.KVCache(model.config, "kivi-2"))
    with refuses("the statistics need the queries of the first prompt, and this model's attention does not show them"):
        generate(model, prompt(), cache=qjl.KVCache(model.config, "b3"))


@pytest.mark.parametrize(
    ("family", "settings", "is_rotary"),
    [
        ("qwen2", {}, [True, True]),
        ("smollm3", {"attention_bias": True}, [True, False]),
        ("gpt2", {}, [False, False]),
    ],
)
def test_the_mean_is_taken_before_rope_where_there_is_one(family, settings, is_rotary):
    """Keys with a large bias; the second layer of this SmolLM3 has no RoPE, GPT-2 has none at all."""
    model = tiny(family, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("k_proj.bias", "c_attn.bias")):
                parameter.normal_(std=3)
    cache = qjl.KVCache(model, KEEP_ALL)
    read(model, prompt(), cache, sizes=(300,))
    assert [statistics.is_rotary for statistics in measured_in(cache)] == is_rotary


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MambaConfig(), "mamba has no attention layers"),
        (transformers.T5Config(), "t5 is an encoder-decoder model"),
        (transformers.BartConfig(), "bart is an encoder-decoder model"),
        (transformers.DeepseekV3Config(), "deepseek_v3 caches latents"),
        (config_of("llama", head_dim=20), "head_dim 20 does not pack"),
        (config_of("mistral", sliding_window=64), "mistral has no full-attention layers (only sliding_attention)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.model_type,
)
def test_what_cannot_be_quantized_is_refused_at_once(config, message, refuses):
    with refuses(message):
        qjl.KVCache(config)


def test_a_refused_model_is_left_as_it_was(refuses):
    model = tiny(head_dim=20)
    with refuses("head_dim 20"):
        qjl.enable(model)
    with refuses("unknown preset 'b9'"):
        qjl.enable(model, "b9")
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    assert type(generated(model, prompt(20))[CACHE]) is DynamicCache


@pytest.mark.parametrize("use", [qjl.KVCache, qjl.enable])
def test_a_wrapper_is_refused(use, model, refuses):
    with refuses("Sequential is no transformers model"):
        use(torch.nn.Sequential(model))


def test_offloading_is_refused(model, refuses):
    with refuses("not offloaded"):
        qjl.KVCache(model).layers[0].offload()


def test_handles_look_like_tensors(model):
    cache = qjl.KVCache(model, "b3")
    read(model, prompt(200), cache, sizes=(200,))
    fresh = torch.randn(1, TINY_HEADS, 1, TINY_DIM)
    keys, values = cache.update(fresh, fresh, 0)
    assert keys.shape == values.shape == (1, TINY_HEADS, 201, TINY_DIM)
    assert keys.dtype == torch.float32
    assert "keys of layer 0, 201 tokens" in repr(keys)
    assert (keys * 1)[:, :, -1].equal(fresh[:, :, 0])
    assert (keys + values).equal(cache.layers[0].keys + cache.layers[0].values)


def test_a_handle_of_earlier_tokens_is_refused(model, refuses):
    """It would be longer than it says; what was read in time stays."""
    cache = qjl.KVCache(model, "full")
    fresh = torch.randn(1, TINY_HEADS, 3, TINY_DIM)
    read_in_time, too_late = (cache.update(fresh, fresh, 0)[0] for _ in range(2))
    with refuses("the model reads layer 0 as it was at 3 tokens, and it holds 6"):
        read_in_time * 1
    decoded = too_late * 1
    cache.update(fresh, fresh, 0)
    assert (too_late * 1).equal(decoded)


# What transformers' own caches can do


def test_a_cache_is_iterated_as_a_dynamic_cache_is(model):
    caches = qjl.KVCache(model, "full"), DynamicCache(config=model.config)
    for cache in caches:
        assert [layer[0] for layer in cache] == [None, None]
        read(model, prompt(200), cache, sizes=(200,))
    for ours, theirs in zip(*caches, strict=True):
        assert len(ours) == len(theirs) == 3
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize(
    "indices",
    [(0, 2), [0, 2], torch.tensor([0, 2]), torch.tensor([True, False, True]), slice(0, None, 2), range(0, 3, 2)],
    ids=str,
)
def test_rows_are_selected_by_all_that_selects_rows_of_a_tensor(model, indices):
    rows = torch.cat([prompt(200, seed=seed) for seed in range(3)])
    cache = qjl.KVCache(model, "full")
    read(model, rows, cache, sizes=(200,))
    expected = cache.layers[0].keys[[0, 2]]
    cache.batch_select_indices(indices)
    assert cache.layers[0].keys.equal(expected)


@pytest.mark.parametrize(
    ("method", "argument", "expected"),
    [
        ("batch_select_indices", (0, 2), lambda tokens: tokens[[0, 2]]),
        ("batch_select_indices", torch.tensor([False, True, True]), lambda tokens: tokens[1:]),
        ("batch_repeat_interleave", 2, lambda tokens: tokens.repeat_interleave(2, 0)),
        ("reorder_cache", torch.tensor([2, 0]), lambda tokens: tokens[[2, 0]]),
        ("crop", -4, lambda tokens: tokens[:, :, :-4]),
        ("crop", 0, lambda tokens: tokens),
    ],
)
def test_an_empty_layer_has_no_rows_and_no_tokens(model, method, argument, expected):
    """Those of a new cache, and one beside a layer that was filled."""
    cache, tokens = qjl.KVCache(model, "full"), torch.randn(3, 2, 10, 32)
    getattr(cache, method)(argument)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0]
    cache.update(tokens, tokens, 0)
    getattr(cache, method)(argument)
    assert cache.layers[0].keys.equal(expected(tokens))
    assert cache.layers[1].get_seq_length() == 0


@pytest.mark.parametrize("preset", ["full", "b3"])
def test_a_pickle_is_refused_by_naming_save(model, preset, refuses, tmp_path):
    cache = qjl.KVCache(model, preset)
    result = generated(model, prompt(), cache=cache)
    for thing in (cache, result, cache.layers[0], [cache.cores[0]]):
        with refuses("cache.save(path)"):
            pickle.dumps(thing)
    with refuses("cache.save(path)"):
        torch.save(cache, tmp_path / "cache.pt")
    twin = copy.copy(cache)
    assert twin.layers is cache.layers


@pytest.mark.parametrize("how", ["cache", "enable", "generate", "disable"])
def test_a_deleted_model_is_freed_at_once(how):
    model = tiny()
    if how == "cache":
        read(model, prompt(), qjl.KVCache(model, "b3"))
    else:
        qjl.enable(model, "b3")
    if how == "generate":
        generate(model, prompt())
    if how == "disable":
        qjl.disable(model)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_continuous_batching_is_as_it_was():
    model = tiny()
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [prompt(60)[0].tolist(), prompt(30, seed=1)[0].tolist()]
    room = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=128)  # and not all memory there is

    def texts():
        rows = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=room)
        return [row.generated_tokens for row in rows.values()]

    expected = texts()
    cache = qjl.KVCache(model, "b3")
    assert texts() == expected
    del cache
    qjl.enable(model, "b3")
    assert texts() == expected


def test_with_a_fixed_length_tensors_keep_their_places(model):
    """What engines need that capture graphs: a step changes contents alone; its text is that of a cache that grows."""
    ids = prompt(300)
    generate(model, ids, cache=qjl.KVCache(model))  # so that codecs are there
    expected = generate(model, ids, 200, cache=qjl.KVCache(model))
    cache = qjl.KVCache(model, max_cache_len=600)
    places = []

    def look(input_ids, scores):
        core, store = cache.cores[0], cache.stores[0]
        tensors = [core.exact.keys, core.exact.values, *core.pages.storage[0].values(), *core.pages.storage[1].values()]
        rows = store._kept._rows
        if rows is not None:
            tensors += [rows.table, rows.lengths, rows.slots, rows.counts, rows.origins]
        places.append(tuple((tensor.data_ptr(), tuple(tensor.shape)) for tensor in tensors))
        return scores

    assert generate(model, ids, 200, cache=cache, logits_processor=[look]).equal(expected)
    assert len(set(places[2:])) == 1
    assert cache.get_max_length() == 600


def test_what_does_not_fit_a_fixed_length_is_refused(model, refuses):
    generate(model, prompt(300), cache=qjl.KVCache(model))
    cache = qjl.KVCache(model, max_cache_len=320)
    with refuses("room for 320 tokens of a row and is given 321"):
        generate(model, prompt(300), 200, cache=cache)
    with refuses("room for 1 rows, not for 2"):
        generate(model, prompt(300, batch=2), cache=qjl.KVCache(model, max_cache_len=320))


# Presses (kvpress), which keep some tokens of a prompt


@contextlib.contextmanager
def press(model, keep):
    """After a layer has read a prompt, its heads keep the tokens ``keep(number, keys)``, ``int64 [B, H, t]``."""

    def hook(module, args, kwargs, output):
        cache = next(thing for name, thing in kwargs.items() if name in (CACHE, "past_key_values"))
        number, layer = module.layer_idx, cache.layers[module.layer_idx]
        if kwargs["hidden_states"].shape[1] > 1:
            keys, values = layer.keys, layer.values
            kept = keep(number, keys)[..., None].expand(-1, -1, -1, keys.shape[3])
            layer.keys, layer.values = keys.gather(2, kept), values.gather(2, kept)
            assert cache.get_seq_length(number) == layer.keys.shape[2] == kept.shape[2]

    hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def small_keys(number, keys, share=0.5):
    """Those of the smallest norm, which each head chooses for itself, in the order of their norms."""
    return keys.norm(dim=-1).topk(int(share * keys.shape[2]), largest=False).indices


def asked_behind(model, cache, keep, tokens, of_inner_model):
    """Logits of a question and an answer behind a prompt, of which a press kept some tokens."""
    reader = model.model if of_inner_model else model  # which no cache is told of
    with torch.no_grad(), press(model, keep):
        reader(input_ids=prompt(tokens), **cache_argument(cache))
    kept = cache.get_seq_length()
    ids, steps = prompt(100, seed=3), []
    with torch.no_grad():
        for first, stop in [(0, 9), *((n, n + 1) for n in range(9, 100))]:
            positions = torch.arange(tokens + first, tokens + stop)[None]
            steps.append(model(input_ids=ids[:, first:stop], position_ids=positions, **cache_argument(cache)).logits)
    assert cache.get_seq_length() == kept + 100
    return torch.cat(steps, dim=1)


def every_token(number, keys):
    return torch.arange(keys.shape[2]).expand(keys.shape[:3])


@pytest.mark.parametrize("of_inner_model", [False, True])
def test_what_a_press_keeps_is_what_is_attended_to(of_inner_model):
    """Also where codecs are fitted to what it keeps of the first prompt."""
    model = tiny()
    expected, whole = (
        asked_behind(model, DynamicCache(config=model.config), keep, 600, of_inner_model)
        for keep in (small_keys, every_token)
    )
    assert difference(whole, expected) > 0.15
    for config, packed, most in (("full", 316, 1e-5), (KEEP_ALL, 0, 1e-5), ("b4", 316, 0.05)):
        cache = qjl.KVCache(model, config)
        logits = asked_behind(model, cache, small_keys, 600, of_inner_model)
        assert cache.packed_tokens == [packed]
        assert difference(logits, expected) < most


def test_generate_goes_on_from_what_a_press_keeps(model, refuses):
    cache = qjl.KVCache(model, "full")
    with press(model, small_keys):
        expected = generate(model, prompt(400), 20, cache=DynamicCache(config=model.config))
        assert generate(model, prompt(400), 20, cache=cache).equal(expected)
    assert not generate(model, prompt(400), 20).equal(expected)
    assert cache.get_seq_length() == 219
    with refuses("generate cannot tell which of its ids are new"):
        generate(model, prompt(500), cache=cache)
    cache.reset()
    generate(model, prompt(400), cache=cache)


def test_a_file_does_not_take_what_a_press_kept_for_the_start_of_the_prompt(model, tmp_path, refuses):
    cache, path, ids = qjl.KVCache(model, "b3"), tmp_path / "pressed.qjl", prompt(400)
    with torch.no_grad(), press(model, small_keys):
        model(input_ids=ids, **cache_argument(cache))
    cache.save(path)
    loaded = qjl.KVCache.load(path, model)
    for one in (cache, loaded):
        with refuses("save it without token_ids"):
            one.save(path, ids)
        one.crop(-200)
        read(model, ids, one, sizes=(400,))
        one.save(path, ids)


UNEVEN = {
    "some layers": lambda cache, number: number == 0 and shorten(cache, 0, 10),
    "other numbers": lambda cache, number: shorten(cache, number, 10 + number),
    "keys alone": lambda cache, number: setattr(cache.layers[number], "keys", cache.layers[number].keys[:, :, :10]),
}


def shorten(cache, number, tokens):
    layer = cache.layers[number]
    layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]


def read_with(model, cache, change, **inputs):
    """One pass in which ``change(cache, number)`` is called behind each attention."""

    def hook(module, args, output):
        change(cache, module.layer_idx)

    hooks = [layer.self_attn.register_forward_hook(hook) for layer in model.model.layers]
    try:
        with torch.no_grad():
            model(**inputs, **cache_argument(cache))
    finally:
        for one in hooks:
            one.remove()


@pytest.mark.parametrize("uneven", UNEVEN)
def test_tokens_are_replaced_in_all_layers_or_not_at_all(model, uneven, refuses):
    cache = qjl.KVCache(model, "full")
    with refuses("set all alike"):
        read_with(model, cache, UNEVEN[uneven], input_ids=prompt(100))
    assert [cache.get_seq_length(), *(layer.keys.shape[2] for layer in cache.layers)] == [0, 0, 0]
    expected = exact(model, prompt(100), sizes=(100,))
    assert difference(read(model, prompt(100), cache, sizes=(100,)), expected) < 1e-5


def test_a_press_that_comes_too_late_or_beside_padding_is_refused(model, refuses):
    cache = qjl.KVCache(model, "full")
    read(model, prompt(100), cache, sizes=(100,))
    with refuses("into an empty cache"):  # a chunk of a prompt, for example
        read_with(model, cache, lambda cache, number: shorten(cache, number, 10), input_ids=prompt(100))
    with refuses("drop last tokens by the cache's crop"):
        shorten(cache, 0, 10)
    padded = left_padded([prompt(100), prompt(90)])
    with refuses("cannot be set beside a token mask or padding"):
        read_with(model, qjl.KVCache(model, "full"), lambda cache, number: shorten(cache, number, 10), **padded)
    with refuses("nor where keys are coded before RoPE"):
        read_with(
            model, qjl.KVCache(model, "b3-pre"), lambda cache, number: shorten(cache, number, 10), input_ids=prompt(9)
        )
