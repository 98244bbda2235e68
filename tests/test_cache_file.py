"""A ``PagedCache`` as a file, without a model: every method's pages and codecs, and every way in which rows share."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from method_cases import every_kind
from one_layer import taken
from qjl.cache import file
from qjl.cache.file import CacheFile
from qjl.cache.index import HOLE
from qjl.cache.paged import Fitted, PagedCache
from qjl.codecs import Codecs
from qjl.methods.balanced import Balanced
from qjl.methods.identity import Identity
from qjl.methods.int8_fp8 import Int8
from qjl.methods.kivi import KIVI
from qjl.methods.uniform import TokenUniform
from qjl.presets import CacheConfig

HEADS, DIM = 2, 64


def states_of(tokens, layer):
    """Keys and values ``[B, H, T, 64]`` that tell which token they are of."""
    numbers = torch.tensor(tokens, dtype=torch.float32)
    keys = numbers[:, None, :, None] + torch.arange(HEADS)[:, None, None] * 0.25 + torch.arange(DIM) / 64 + layer
    return keys, -keys - 1


def feed(cache, tokens):
    for number, layer in cache.layers.items():
        cache.append(layer, *states_of(tokens, number))
    cache.settle()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.qjl"


def fitted_cache(model, config, statistics=None, layers=(0, 3)):
    codecs = Codecs(config, dict.fromkeys(layers, model.rope), lambda layer: statistics)
    return PagedCache(layers, config.sinks, config.recent, Fitted(codecs))


def fill(cache, tokens):
    for layer in cache.layers.values():
        cache.append(layer, tokens.keys, tokens.values)
    cache.settle()


def assert_same(one, other):
    """Rows, exact tokens and pages, bit for bit; places have other numbers."""
    for name, array in one.index.arrays().items():
        assert np.array_equal(array, other.index.arrays()[name]), name
    for first, second in zip(one.layers.values(), other.layers.values(), strict=True):
        assert all(map(torch.equal, one.dense(first), other.dense(second)))
        assert (first.pages is None) == (second.pages is None)
        if first.pages is not None:
            held = [taken(layer.pages, layer.index.held()[1]) for layer in (first, second)]
            for side, again in zip(*held, strict=True):
                assert list(side) == list(again)
                assert all(side[field].equal(again[field]) for field in side)


@every_kind
def test_every_method(role, quantizer, model_of, path, tmp_path):
    """The file, alone or with the file of its codecs, gives the same pages, and codes what follows alike."""
    model = model_of(heads=HEADS, head_dim=DIM)
    key, value = (quantizer, Identity()) if role == "key" else (Identity(), quantizer)
    statistics = model.statistics() if quantizer.needs_statistics else None
    cache = fitted_cache(model, CacheConfig(key, value, 4, 32), statistics)
    fill(cache, model_of(head_dim=DIM, seed=1).first_tokens(200, batch=2))
    file.save(path, cache)
    cache.source.codecs.save(tmp_path / "codecs.qjl")
    loaded = [file.load(path), file.load(path, codecs=Codecs.load(tmp_path / "codecs.qjl"))]
    more = model_of(head_dim=DIM, seed=2).first_tokens(100, batch=2)
    for other in loaded:
        assert other.source.codecs is not cache.source.codecs
        assert_same(cache, other)
        fill(other, more)
    fill(cache, more)
    for other in loaded:
        assert_same(cache, other)


@pytest.mark.parametrize("is_rotary", [False, True])
def test_keys_before_rope(is_rotary, model_of, path):
    """The flag is what was decided when codecs were fitted, and RoPE is that of the file."""
    model = model_of(head_dim=DIM)
    statistics = replace(model.statistics(), is_rotary=is_rotary)
    cache = fitted_cache(model, CacheConfig(Balanced(2), KIVI(4, 32), 4, 32, pre_rope=True), statistics)
    fill(cache, model.first_tokens(300))
    file.save(path, cache)
    assert CacheFile(path).array("layers.3.codec.is_undone").item() == is_rotary
    assert_same(cache, file.load(path))


def cache_of(key=None, value=None, sinks=4, recent=32):
    config = CacheConfig(key or Identity(), value or Identity(), sinks, recent)
    return PagedCache([0, 1], sinks, recent, Fitted(Codecs(config)))


@pytest.mark.parametrize("seed", range(40))
def test_any_state_of_a_cache(seed, path):
    """Random passes, crops, beams, masks and paddings; a loaded cache goes on as the one that was saved."""
    chance = random.Random(seed)
    batch, sinks, recent = chance.choice([1, 2, 3]), chance.choice([0, 4, 70]), chance.choice([0, 5, 32, 100])
    cache = cache_of(chance.choice([Identity(), Int8(), KIVI(4, 32)]), TokenUniform(4), sinks, recent)
    if chance.random() < 0.4:
        padding = [0] + [chance.choice([0, 3, 70]) for _ in range(batch - 1)]
        cache.set_padding(padding, padding)
    number, twin = 0, None
    for _ in range(10):
        what = chance.choice(["append"] * 4 + ["crop", "select", "mark"]) if number else "append"
        count = chance.choice([1, 3, 64, 130]) if number else 200
        rows = [chance.randrange(batch) for _ in range(batch)]
        mask = torch.tensor([[chance.random() < 0.8] * 50 for _ in range(6)]).flatten().expand(batch, -1)
        for one in (cache, twin):
            if one is None:
                continue
            if what == "append":
                feed(one, [[number + count * row + i for i in range(count)] for row in range(batch)])
            elif what == "crop":
                one.crop(max(80, one.index.columns - count))
            elif what == "select":
                one.select(rows)
            else:
                one.mark(mask)
        number += count * batch
        if twin is not None:
            assert_same(cache, twin)
        file.save(path, cache)
        twin = file.load(path)
        assert_same(cache, twin)
        assert twin.nbytes == cache.nbytes


def test_shared_pages_are_kept_once_and_in_the_order_of_rows(path):
    cache = cache_of(KIVI(4, 32), KIVI(4, 32), 0, 0)
    feed(cache, [list(range(256)), list(range(1000, 1256))])
    cache.select([1, 1, 0, 1])
    file.save(path, cache)
    stored = CacheFile(path)
    assert stored.array("text.table").tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    pages = taken(cache.layers[1].pages, cache.index.table[[0, 2], :4].reshape(-1))
    for side, blocks in zip(("keys", "values"), pages, strict=True):
        for name, field in blocks.items():
            assert stored.array(f"layers.1.pages.{side}.{name}").equal(field)
    other = file.load(path)
    assert other.index.pages.in_use == 8
    for one in (cache, other):
        one.crop(100)
        feed(one, [list(range(row, row + 100)) for row in range(4)])
    assert_same(cache, other)


def test_holes_stay_exact(path):
    cache = cache_of(KIVI(4, 32), KIVI(4, 32), 0, 0)
    mask = torch.ones(1, 256, dtype=torch.bool)
    mask[0, 70] = False
    cache.mark(mask)
    feed(cache, [list(range(256))])
    file.save(path, cache)
    assert CacheFile(path).array("text.table").tolist() == [[0, HOLE, 1, 2]]
    other = file.load(path)
    exact = states_of([list(range(64, 128))], 1)[0]
    assert other.dense(other.layers[1])[0][:, :, 64:128].equal(exact)


def test_a_layer_that_held_nothing_holds_nothing(path, refuses):
    cache = cache_of()
    with refuses("the cache holds no tokens that could be saved"):
        file.save(path, cache)
    cache.append(cache.layers[1], *states_of([[1, 2, 3]], 1))
    cache.settle()
    file.save(path, cache)
    assert list(file.load(path).layers) == [1]


def test_other_codecs_are_refused(model_of, path, tmp_path, refuses):
    model = model_of(head_dim=DIM)
    config = CacheConfig(Balanced(2), KIVI(4, 32), 4, 32)
    cache = fitted_cache(model, config, model.statistics())
    fill(cache, model.first_tokens(300))
    file.save(path, cache)
    stranger = fitted_cache(model, config, model_of(head_dim=DIM, seed=5).statistics())
    fill(stranger, model.first_tokens(300))
    for codecs in (stranger.source.codecs, Codecs(replace(config, key=Balanced(3)))):
        with refuses("was coded with other codecs"):
            file.load(path, codecs=codecs)
    with refuses("codecs that have learned nothing cannot be saved"):
        Codecs(config).save(tmp_path / "codecs.qjl")


def test_a_file_of_codecs_is_whole_or_refused(model_of, path, refuses):
    model = model_of(head_dim=DIM)
    cache = fitted_cache(model, CacheConfig(Balanced(2), KIVI(4, 32), 4, 32), model.statistics())
    fill(cache, model.first_tokens(300))
    assert cache.source.codecs.save(path) == path.stat().st_size
    with refuses("is no prompt cache"):
        file.load(path)
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 50):
        changed = bytearray(content)
        changed[place] ^= 4
        path.write_bytes(changed)
        with refuses(str(path)):
            Codecs.load(path)
    with refuses("there is no codecs file"):
        Codecs.load(path.with_name("none.qjl"))


def test_a_loaded_cache_can_be_copied(path):
    cache = cache_of(KIVI(4, 32), KIVI(4, 32))
    feed(cache, [list(range(300))])
    file.save(path, cache)
    other = file.load(path)
    twin = copy.deepcopy(other)
    feed(other, [list(range(64))])
    assert_same(cache, twin)
