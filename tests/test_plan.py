"""Planned sizes against real caches."""

from itertools import pairwise, product

import pytest
import torch
from transformers import DynamicCache

from method_cases import one_of_each_codec
from models_for_tests import FAMILIES, config_of, prompt, tiny
from qjl import KVCache, presets
from qjl.compat import cache_argument
from qjl.hf import own_codecs
from qjl.plan import Planner, parse_memory
from qjl.presets import PRESETS, resolve

GROWTH = (1, 35, 99, 100, 255, 256, 300, 356, 420, 700)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


def held_by(model, cache, tokens):
    with torch.no_grad():
        model(input_ids=prompt(tokens), **cache_argument(cache))
    return cache


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24G", 24 * 2**30),
        ("24GiB", 24 * 2**30),
        ("24 gb", 24 * 10**9),
        ("1.5G", 3 * 2**29),
        ("512M", 512 * 2**20),
        ("80GB", 80 * 10**9),
        ("2T", 2**41),
        ("64KB", 64000),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_memory_as_people_write_it(text, nbytes):
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["", "G", "much", "-1G", "0G", "24 X", "1e3G", "24GG"])
def test_memory_that_is_none(text, refuses):
    with refuses("is not a size"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("family", "preset"),
    [*(("llama", preset) for preset in PRESETS), *product(("gemma3", "gpt2"), one_of_each_codec())],
)
def test_planned_tokens_take_what_real_ones_take(family, preset):
    model = tiny(family)
    planner = Planner(model.config, torch.float32)
    config = resolve(preset)
    cache = KVCache(model, config, codecs=own_codecs(model, config))
    for before, tokens in pairwise((0, *GROWTH)):
        held_by(model, cache, tokens - before)
        assert planner.cache_bytes(config, tokens) == cache.nbytes - cache.codec_nbytes, tokens


@pytest.mark.parametrize("preset", PRESETS)
def test_planned_codecs_weigh_about_what_real_ones_weigh(preset):
    model = tiny(head_dim=64, layers=3)
    cache = held_by(model, KVCache(model, codecs=own_codecs(model, resolve(preset))), 400)
    planned = Planner(model.config).codec_bytes(resolve(preset))
    assert planned == pytest.approx(cache.codec_nbytes, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_precision_is_what_transformers_keeps(family):
    model = tiny(family)
    cache = held_by(model, DynamicCache(config=model.config), 300)
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    kept = sum(state.nbytes for state in states if isinstance(state, torch.Tensor))
    assert Planner(model.config, torch.float32).full_bytes(300) == kept


def test_what_is_planned_fits_and_one_token_more_does_not():
    planner = Planner(config_of("gemma3"))
    for preset in PRESETS.values():
        room = 2**18
        memory = planner.weights_bytes + planner.codec_bytes(preset) + room
        plan = planner.plan(preset, memory, context=200)
        sizes = [planner.cache_bytes(preset, tokens) for tokens in range(1, plan.tokens + 2)]
        assert max(sizes[:-1]) <= room < sizes[-1]
        assert plan.cache_bytes == max(sizes[:200])
        assert plan.users == room // plan.cache_bytes


def test_weights_count_in_the_dtype_asked_for():
    config = config_of("llama")
    wide, narrow = Planner(config, torch.float32), Planner(config, torch.bfloat16)
    assert wide.weights_bytes == 2 * narrow.weights_bytes


def test_layers_of_constant_size_are_named():
    assert Planner(config_of("qwen3-next")).uncounted_layers == 1
    assert Planner(config_of("gemma3")).uncounted_layers == 0


def test_weights_that_do_not_fit(refuses):
    with refuses("the weights alone take"):
        Planner(config_of("llama")).plan(presets.resolve("b3"), 1000, 512)
