"""The core against a naive model: random passes, crops, beams, masks and paddings over plain lists of tokens."""

import copy
import random

import numpy as np
import pytest
import torch

from qjl.cache.index import HOLE, TokenIndex
from qjl.cache.paged import Fitted, PagedCache
from qjl.codecs import Codecs
from qjl.errors import QJLError
from qjl.methods.identity import Identity
from qjl.methods.kivi import KIVI
from qjl.methods.plain import Int8
from qjl.methods.uniform import TokenUniform
from qjl.packed import BLOCK
from qjl.presets import CacheConfig

HEADS, DIM = 2, 8


class Naive:
    """What a cache should hold: rows of numbers, each with whether it may be packed."""

    def __init__(self, sinks, recent):
        self.sinks, self.recent = sinks, recent
        self.rows = []

    def append(self, tokens, marks):
        self.rows = self.rows or [[] for _ in tokens]
        for row, more, allowed in zip(self.rows, tokens, marks, strict=True):
            row += list(zip(more, allowed, strict=True))

    def crop(self, lengths):
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def select(self, rows):
        self.rows = [list(self.rows[row]) for row in rows]

    def packed_blocks(self, row):
        """Blocks that are codes, if nothing was ever cropped into one."""
        tokens = self.rows[row]
        last = max(0, len(tokens) - self.recent) // BLOCK
        blocks = [tokens[block * BLOCK : (block + 1) * BLOCK] for block in range(last)]
        return [all(allowed for _, allowed in block) for block in blocks]


def cache_of(key=None, value=None, sinks=4, recent=32):
    config = CacheConfig(key or Identity(), value or Identity(), sinks, recent)
    return PagedCache([0, 1], sinks, recent, Fitted(Codecs(config)))


def states_of(tokens, layer, dtype=torch.float32):
    """Keys and values ``[B, H, T, D]`` that tell which token they are of."""
    numbers = torch.tensor(tokens, dtype=torch.float32)
    keys = numbers[:, None, :, None] + torch.arange(HEADS)[:, None, None] * 0.25 + torch.arange(DIM) / 64 + layer
    return keys.to(dtype), (-keys - 1).to(dtype)


def feed(cache, tokens):
    for number, layer in cache.layers.items():
        cache.append(layer, *states_of(tokens, number))
    cache.settle()


def require_whole(cache):
    """Every token of each row is held once: in a page, or in a slot; sinks in both."""
    index = cache.index
    for row in range(index.batch):
        held = []
        for block in range(index.blocks[row]):
            if index.table[row, block] != HOLE:
                held += range(block * BLOCK, block * BLOCK + index.partial[row].get(block, BLOCK))
        exact = index.token_of[row, : index.counts[row]].tolist()
        assert exact == sorted(set(exact))
        assert all(token in exact for token in range(min(index.sinks, index.lengths[row])))
        assert sorted([*[token for token in held if token >= index.sinks], *exact]) == list(range(index.lengths[row]))
    in_use = len(index.slots_held()), len(index.pages_held())
    assert (index.slots.in_use, index.pages.in_use) == in_use


def require_holds(cache, naive, error=0.0):
    require_whole(cache)
    index = cache.index
    assert index.lengths == [len(row) for row in naive.rows]
    for number, layer in cache.layers.items():
        for found, sign in zip(cache.dense(layer), (1, -1), strict=True):
            assert found.shape[2] == index.columns
            for row, tokens in enumerate(naive.rows):
                expected = states_of([[token for token, _ in tokens]], number)[0 if sign > 0 else 1][0]
                own = found[row, :, index.padding[row] :]
                torch.testing.assert_close(own, expected, rtol=0, atol=error)


@pytest.mark.parametrize("seed", range(60))
def test_any_order_of_operations_holds_what_a_list_would(seed):
    chance = random.Random(seed)
    batch, sinks, recent = chance.choice([1, 1, 2, 3]), chance.choice([0, 4, 70]), chance.choice([0, 5, 32, 100])
    key, tolerance = chance.choice([(Identity(), 0.0), (Int8(), 0.02), (KIVI(4, 32), 0.2)])
    cache, naive = cache_of(key, Identity(), sinks, recent), Naive(sinks, recent)
    has_mask = chance.random() < 0.4
    number = 0
    for _ in range(14):
        what = chance.choice(["append"] * 5 + ["crop", "select", "copy"])
        if what == "append" or not naive.rows:
            count = chance.choice([1, 1, 3, 40, 64, 130, 300])
            tokens = [[number + count * row + i for i in range(count)] for row in range(batch)]
            number += count * batch
            marks = [[True] * count] * batch
            if has_mask:
                runs = [chance.random() < 0.8 for _ in range(-(-count // 50))]
                marks = [[runs[i // 50] for i in range(count)]] * batch
                cache.mark(torch.tensor(marks))
            feed(cache, tokens)
            naive.append(tokens, marks)
        elif what == "crop":
            columns = max(0, cache.index.columns - chance.choice([1, 10, 64, 100, 400]))
            cache.crop(columns)
            naive.crop([columns - pad for pad in cache.index.padding])
        elif what == "select":
            rows = [chance.randrange(batch) for _ in range(batch)]
            cache.select(rows)
            naive.select(rows)
        else:
            cache = copy.deepcopy(cache)
        require_holds(cache, naive, tolerance * (number + 1))
    cache.crop(0)
    assert (cache.index.slots.in_use, cache.index.pages.in_use) == (0, 0)


@pytest.mark.parametrize("recent", [0, 32, 64])
@pytest.mark.parametrize("seed", range(5))
def test_pages_do_not_depend_on_how_tokens_arrive(seed, recent):
    chance = random.Random(seed)
    total = chance.choice([200, 333, 512])
    whole, pieces = (cache_of(TokenUniform(4, 4), TokenUniform(4, 8), recent=recent) for _ in range(2))
    tokens = list(range(total))
    feed(whole, [tokens])
    while tokens:
        count = min(len(tokens), chance.choice([1, 2, 63, 64, 65, 128]))
        feed(pieces, [tokens[:count]])
        tokens = tokens[count:]
    assert whole.index.blocks == pieces.index.blocks == [max(0, total - recent) // BLOCK]
    for number in whole.layers:
        one, other = (
            cache.layers[number].pages.taken(cache.index.table[0, : cache.index.blocks[0]]) for cache in (whole, pieces)
        )
        for side, same in zip(one, other, strict=True):
            assert all(side[name].equal(same[name]) for name in side)
    assert np.array_equal(
        whole.index.token_of[0, : whole.index.counts[0]], pieces.index.token_of[0, : pieces.index.counts[0]]
    )


def test_tokens_cropped_and_read_again_give_the_same_pages():
    """Codes of single tokens are added to the page that has the others already."""
    once, again = (cache_of(TokenUniform(4, 4), TokenUniform(4, 8)) for _ in range(2))
    tokens = list(range(300))
    feed(once, [tokens])
    feed(again, [tokens])
    again.crop(100)
    assert again.index.partial == [{1: 36}]
    feed(again, [tokens[100:]])
    assert again.index.partial == [{}]
    for number in once.layers:
        one, other = (cache.layers[number].pages.taken(cache.index.table[0, :4]) for cache in (once, again))
        for side, same in zip(one, other, strict=True):
            assert all(side[name].equal(same[name]) for name in side)


def test_rows_share_pages_until_one_writes():
    cache = cache_of(TokenUniform(4, 4), TokenUniform(4, 8))
    feed(cache, [list(range(300))])
    cache.select([0, 0, 0])
    assert cache.index.pages.in_use == 4
    assert cache.index.slots.in_use == 300 - 256 + 4
    cache.crop(100)
    feed(cache, [[1000 + 200 * row + i for i in range(200)] for row in range(3)])
    naive = Naive(4, 32)
    naive.append([[*range(100), *(1000 + 200 * row + i for i in range(200))] for row in range(3)], [[True] * 300] * 3)
    assert cache.index.pages.in_use == 1 + 3 * 3
    require_holds(cache, naive, 100)


def test_rows_that_stay_alike_share_what_they_pack():
    cache = cache_of(TokenUniform(4, 4), TokenUniform(4, 8))
    feed(cache, [list(range(64))])
    cache.select([0, 0])
    feed(cache, [[64 + i for i in range(32)]] * 2)
    assert cache.index.pages.in_use == 1


def test_a_pass_that_fails_leaves_everything_as_it_was():
    cache = cache_of(TokenUniform(4, 4), TokenUniform(4, 8))
    feed(cache, [list(range(300))])
    before = copy.deepcopy(cache)
    layer = cache.layers[0]
    cache.append(layer, *states_of([list(range(300, 500))], 0))
    cache.store(layer)
    cache.roll_back()
    feed(cache, [list(range(300, 500))])
    feed(before, [list(range(300, 500))])
    for number in cache.layers:
        assert all(
            a.equal(b)
            for a, b in zip(cache.dense(cache.layers[number]), before.dense(before.layers[number]), strict=True)
        )


def test_layers_that_are_left_out_are_told_of():
    cache = cache_of()
    feed(cache, [list(range(10))])
    cache.append(cache.layers[0], *states_of([[10]], 0))
    with pytest.raises(QJLError, match="layer 1 was given no tokens in a pass"):
        cache.append(cache.layers[0], *states_of([[11]], 0))
    assert cache.index.columns == 10
    feed(cache, [[10]])


def test_numbers_that_are_not_finite_are_told_when_they_are_coded():
    cache = cache_of()
    keys, values = states_of([list(range(100))], 0)
    keys[0, 0, 10, 0] = float("nan")
    cache.append(cache.layers[0], keys, values)
    with pytest.raises(QJLError, match="keys of layer 0 contain NaN"):
        cache.append(cache.layers[1], *states_of([list(range(100))], 1))
    assert cache.index.columns == cache.index.pages.in_use == cache.index.slots.in_use == 0
    feed(cache, [list(range(100))])


def test_a_fixed_capacity_is_not_exceeded():
    index = TokenIndex(4, 32, slots=100, pages=2)
    index.add_rows(1)
    index.begin_columns(90)
    index.commit()
    index.begin_columns(20)
    with pytest.raises(QJLError, match="room for 100 exact tokens"):
        index.plan()
    index.roll_back()
    assert index.lengths == [90]
