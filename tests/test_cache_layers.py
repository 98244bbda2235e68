"""Layers of a cache: what is exact, what is coded, and that neither depends on how tokens came."""

import copy
import random
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from method_cases import float64, one_of_each_codec
from one_layer import OneLayer, codec_tensors, same_tokens
from qjl.cache.paged import Fitted, PagedCache, as_coded
from qjl.codecs import Codecs
from qjl.errors import QJLError
from qjl.methods.base import storage_bytes
from qjl.methods.identity import Identity
from qjl.methods.int8_fp8 import Int8
from qjl.methods.kivi import KIVI
from qjl.methods.qjl import QJL
from qjl.methods.uniform import TokenUniform
from qjl.packed import BLOCK, block_bits
from qjl.presets import PRESETS, CacheConfig
from qjl.statistics import MIN_TOKENS
from stamp import Stamp

LENGTH = 430
KINDS = ("b3", "qjl-2", "kivi-2", "int8")  # nibbles with statistics, and without; constants of a block; bytes
every_preset = pytest.mark.parametrize("name", PRESETS)
every_kind = pytest.mark.parametrize("name", KINDS)


def _short(name):
    """With few exact tokens, so that most of a short sequence is coded."""
    config = PRESETS[name]
    return replace(config, sinks=min(config.sinks, 8), recent=min(config.recent, 64))


def _layer(config, rope, codecs=None, number=20):
    key, value = config.for_layer(number)
    return OneLayer(key, value, config.sinks, config.recent, codecs, rope, config.pre_rope, number)


def _part(tokens, rows=slice(None), columns=slice(None)):
    return type(tokens)(*(x[rows, :, columns] for x in _tensors(tokens)), tokens.rope)


def _tensors(tokens):
    return tokens.keys, tokens.values, tokens.queries


@pytest.fixture(scope="module")
def tokens(model_of):
    return model_of().first_tokens(LENGTH, batch=2)


@pytest.fixture
def layer_of(tokens, run_through):
    """``layer_of(config)``: layers with codecs that are the same at each call, fitted to the tokens."""
    kept = {}

    def make(config, number=20, **settings):
        if (config, number) not in kept:
            kept[config, number] = run_through(_layer(config, tokens.rope, number=number), tokens, [LENGTH]).codecs
        return _layer(replace(config, **settings), tokens.rope, kept[config, number], number)

    return make


# Same tokens, any arrival, same bytes


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, number) for name in one_of_each_codec() for number in ((0, 20) if PRESETS[name].overrides else (20,))],
)
def test_what_is_held_does_not_depend_on_how_tokens_came(name, number, tokens, layer_of, run_through):
    config = _short(name)
    whole = run_through(layer_of(config, number), tokens, [LENGTH])
    assert min(whole.index.blocks) >= 5
    for sizes in ([300, 1, 64, 65], [200, *[1] * 100, 130]):
        other = run_through(layer_of(config, number), tokens, sizes)
        assert all(same_tokens(whole, other, row, row) for row in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole.dense(), other.dense(), strict=True))


@every_kind
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [7] * 61 + [3]], ids=["one by one", "sevens"])
def test_what_is_held_does_not_depend_on_how_tokens_came_in_small_steps(name, sizes, tokens, layer_of, run_through):
    layers = [run_through(layer_of(_short(name)), tokens, steps) for steps in ([LENGTH], sizes)]
    assert all(same_tokens(*layers, row, row) for row in range(2))


def _with_padding(tokens, padding, generator):
    """Each row of tokens, padded on the left with noise, cut to a common length."""
    length = LENGTH - max(padding)
    rows = []
    for row, pad in enumerate(padding):
        part = _part(tokens, slice(row, row + 1), slice(0, length + max(padding) - pad))
        noise = [5 * torch.randn(*x.shape[:2], pad, x.shape[3], generator=generator) for x in _tensors(part)]
        rows.append([torch.cat(pair, 2) for pair in zip(noise, _tensors(part), strict=True)])
    return type(tokens)(*(torch.cat(column) for column in zip(*rows, strict=True)), tokens.rope)


def _steps(sizes, total):
    steps = []
    for size in cycle(sizes):
        steps.append(min(size, total - sum(steps)))
        if sum(steps) == total:
            return steps


@every_kind
@pytest.mark.parametrize("padding", [(0, 37), (64, 3), (130, 0)], ids=str)
@pytest.mark.parametrize("sizes", [[LENGTH], [7, 1, 64, 100]], ids=["whole", "chunks"])
def test_a_padded_row_holds_what_it_holds_alone(name, padding, sizes, tokens, layer_of, run_through, generator):
    config, padded = _short(name), _with_padding(tokens, padding, generator)
    layer = run_through(layer_of(config), padded, _steps(sizes, padded.keys.shape[2]), padding)
    for row, pad in enumerate(padding):
        alone = _part(padded, slice(row, row + 1), slice(pad, None))
        single = run_through(layer_of(config), alone, [alone.keys.shape[2]])
        assert single.packed_tokens[0] == layer.packed_tokens[row] > 0
        assert same_tokens(layer, single, row, 0)
        for ours, theirs in zip(layer.dense(), single.dense(), strict=True):
            assert torch.equal(ours[row, :, pad:], theirs[0])
            assert not ours[row, :, :pad].any()


@pytest.mark.parametrize("name", ["b3", "qjl-2"])
def test_statistics_of_a_padded_prompt_leave_the_padding_out(name, tokens, run_through, generator):
    padded = _with_padding(_part(tokens, slice(0, 1)), (60,), generator)
    alone = _part(padded, columns=slice(60, None))
    decoded, expected = (
        run_through(_layer(PRESETS[name], tokens.rope), part, [part.keys.shape[2]], padding).dense()[0]
        for part, padding in ((padded, [60]), (alone, [0]))
    )
    assert (decoded[:, :, 60:] - expected).std() < 0.005 * expected.std()


def test_rope_positions_start_where_the_engine_says(tokens, layer_of, run_through):
    """A row whose first token has position 100 is centred by the mean as turned to 100."""
    late = _part(tokens, slice(0, 1), slice(100, 400))
    right, wrong = layer_of(PRESETS["b3"]), layer_of(PRESETS["b3"])
    right.cache.set_padding([0], [100])
    for layer in (right, wrong):
        run_through(layer, late, [300])
    errors = [float((layer.dense()[0] - late.keys).square().mean()) for layer in (right, wrong)]
    assert errors[0] < 0.1 * errors[1]


@every_kind
def test_tokens_that_are_cropped_and_read_again_give_the_same_pages(name, tokens, layer_of, run_through):
    """Codes of single tokens are added to the page that has the others; other codecs leave that block exact."""
    once, again = (run_through(layer_of(_short(name)), tokens, [LENGTH]) for _ in range(2))
    fills = again.core.pages.can_be_filled
    again.cache.crop(100)
    assert again.index.partial == [{1: 36}] * 2
    run_through(again, _part(tokens, columns=slice(100, None)), [LENGTH - 100])
    assert fills == (name in ("b3", "qjl-2"))
    if fills:
        assert all(same_tokens(once, again, row, row) for row in range(2))
    else:
        assert again.index.partial == [{1: 36}] * 2
        assert all(
            torch.equal(a[:, :, 100:128], b[:, :, 100:128])
            for a, b in zip(again.dense(), _tensors(tokens)[:2], strict=True)
        )
        assert torch.equal(again.dense()[0][:, :, 128:], once.dense()[0][:, :, 128:])


# What is exact


@every_preset
def test_sinks_and_the_recent_window_are_exact_and_the_rest_is_coded(name, tokens, run_through):
    config = PRESETS[name]
    layer = run_through(_layer(config, tokens.rope), tokens, [300, *[1] * 20, LENGTH - 320])
    (blocks,) = set(layer.index.blocks)
    assert blocks == (LENGTH - config.recent) // BLOCK
    for decoded, true in zip(layer.dense(), (tokens.keys, tokens.values), strict=True):
        same = (decoded == true).all(-1).all(1).all(0)
        assert same[: config.sinks].all()
        assert same[blocks * BLOCK :].all()
        if name != "full":
            assert not same[config.sinks : blocks * BLOCK].any()


@pytest.mark.parametrize("length", [1, 63, 32 + 63])
def test_nothing_is_coded_before_a_block_has_left_the_window(length, tokens, run_through):
    layer = run_through(OneLayer(QJL(), TokenUniform()), _part(tokens, columns=slice(0, length)), [length])
    assert layer.core.pages is None
    assert layer.packed_tokens == [0, 0]
    for held, true in zip(layer.dense(), (tokens.keys, tokens.values), strict=True):
        assert torch.equal(held, true[:, :, :length])


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (0, 5), (3, 0), (70, 100)])
def test_any_sinks_and_window(sinks, recent, tokens, run_through):
    layer = OneLayer(QJL(), TokenUniform(), sinks, recent)
    run_through(layer, tokens, [1, 200, 1, 64, 1, 100])
    coded = (367 - recent) // BLOCK * BLOCK
    assert layer.packed_tokens == [coded - sinks] * 2
    keys = layer.dense()[0]
    assert torch.equal(keys[:, :, :sinks], tokens.keys[:, :, :sinks])
    assert torch.equal(keys[:, :, coded:], tokens.keys[:, :, coded:367])


def test_the_tokens_of_the_engine_are_never_written_to(tokens, run_through):
    mine = type(tokens)(*(x.clone() for x in _tensors(tokens)), tokens.rope)
    layer = run_through(OneLayer(QJL(), TokenUniform(), recent=8), mine, [200, 50, 1, 1, 100])
    layer.cache.crop(210)
    layer.append(torch.zeros(2, 2, 30, 64), torch.zeros(2, 2, 30, 64))
    layer.settle()
    assert torch.equal(mine.keys, tokens.keys)
    assert torch.equal(mine.values, tokens.values)


@pytest.mark.parametrize("length", [30, LENGTH])
def test_what_the_engine_writes_to_its_tokens_afterwards_changes_nothing(length, tokens, run_through):
    part = _part(tokens, columns=slice(0, length))
    mine = type(part)(*(x.clone() for x in _tensors(part)), part.rope)
    layer, expected = (run_through(OneLayer(QJL(), TokenUniform()), x, [length]) for x in (mine, part))
    mine.keys.fill_(torch.nan)
    assert torch.equal(layer.dense()[0], expected.dense()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_decoded_tokens_have_the_dtype_of_the_model(dtype, tokens, run_through):
    other = type(tokens)(*(x.to(dtype) for x in _tensors(tokens)), tokens.rope)
    layer = run_through(_layer(PRESETS["b4"], tokens.rope), other, [LENGTH])
    keys, values = layer.dense()
    assert keys.dtype == values.dtype == layer.core.exact.keys.dtype == dtype
    assert (keys - other.keys).float().std() < 0.1 * other.keys.float().std()


def test_keys_and_values_of_two_dtypes_are_kept_in_the_wider_one(tokens):
    """As under autocast."""
    layer = OneLayer(QJL(), TokenUniform())
    layer.append(tokens.keys, tokens.values.bfloat16())
    layer.settle()
    assert [x.dtype for x in layer.dense()] == [torch.float32] * 2
    assert torch.equal(layer.dense()[1][:, :, -32:], tokens.values.bfloat16().float()[:, :, -32:])


# Bytes


@every_preset
def test_bytes_are_the_declared_bits_and_the_exact_tokens(name, tokens, run_through):
    config = PRESETS[name]
    layer = run_through(_layer(config, tokens.rope), tokens, [LENGTH])
    quantizers = config.for_layer(20)
    bits = sum(block_bits(one.layout(64, torch.float32)) for one in quantizers) / BLOCK
    declared = sum(one.bits(64) * 64 for one in quantizers)
    assert bits == declared * (2 if name == "full" else 1)
    blocks = (LENGTH - config.recent) // BLOCK
    exact_tokens = LENGTH - blocks * BLOCK + min(config.sinks, blocks * BLOCK)
    core = layer.core
    assert core.exact_nbytes == 2 * exact_tokens * 2 * 2 * 64 * 4
    assert core.nbytes == core.exact_nbytes + 2 * blocks * BLOCK * 2 * bits / 8
    tensors = [core.exact.keys, core.exact.values, *(x for side in core.pages.storage for x in side.values())]
    assert core.allocated_nbytes == sum(x.untyped_storage().nbytes() for x in tensors)
    assert core.nbytes <= core.allocated_nbytes < 2 * core.nbytes


def test_codecs_are_counted_apart(tokens, run_through):
    core = run_through(_layer(PRESETS["b3"], tokens.rope), tokens, [LENGTH]).core
    assert storage_bytes(codec_tensors(core)) > core.pages.nbytes / 10
    assert core.nbytes <= core.exact_nbytes + core.pages.nbytes


def test_storage_stays_near_what_is_used(model_of, run_through):
    long = model_of(head_dim=16).first_tokens(8000)
    for sizes in ([100] * 80, [8000]):
        layer = run_through(OneLayer(QJL(), TokenUniform()), long, sizes)
        assert layer.core.allocated_nbytes < 1.4 * layer.core.nbytes


def test_a_step_moves_no_token(tokens, layer_of, run_through):
    """But where pages grow by a quarter; slots that are given back are taken again."""
    layer = run_through(layer_of(_short("b3")), tokens, [LENGTH])
    run_through(layer, tokens, [1] * 70)
    slots, pages = set(), set()
    for column in range(130):
        layer.step(tokens, slice(column, column + 1))
        slots.add(layer.core.exact.keys.data_ptr())
        pages.add(layer.core.pages.fields[0]["codes"].data_ptr())
    assert len(slots) == 1
    assert len(pages) <= 3


def test_a_copied_row_takes_no_memory(tokens, layer_of, run_through):
    layer = run_through(layer_of(_short("b3")), tokens, [LENGTH])
    before = layer.core.nbytes, layer.core.allocated_nbytes
    layer.cache.select([0, 1] * 8)
    assert (layer.core.nbytes, layer.core.allocated_nbytes) == before


# Statistics


def test_a_layer_waits_for_a_prompt_long_enough_to_measure(tokens, run_through, caplog):
    caplog.set_level("INFO", "qjl")
    layer = _layer(PRESETS["b3"], tokens.rope)
    run_through(layer, _part(tokens, columns=slice(0, MIN_TOKENS - 1)), [MIN_TOKENS - 1])
    assert layer.core.pages is None
    assert layer.cache.source.wants_queries(layer.core)
    run_through(layer, _part(tokens, columns=slice(MIN_TOKENS - 1, LENGTH)), [1, LENGTH - MIN_TOKENS])
    assert min(layer.packed_tokens) > 200
    assert not layer.cache.source.waits
    assert [record.getMessage() for record in caplog.records] == [
        f"test: statistics taken from the first prompt, {2 * (MIN_TOKENS - 4)} tokens"
    ]


def test_methods_without_statistics_wait_for_nothing(tokens, run_through):
    layer = run_through(OneLayer(QJL(), TokenUniform()), _part(tokens, columns=slice(0, 100)), [100])
    assert not layer.cache.source.waits
    assert layer.packed_tokens == [60, 60]


def test_calibrated_statistics_serve_from_the_first_block(tokens, model_of, run_through):
    statistics = model_of().statistics()
    codecs = Codecs(PRESETS["b3"], {20: tokens.rope}, lambda layer: statistics)
    layer = run_through(_layer(PRESETS["b3"], None, codecs), _part(tokens, columns=slice(0, 100)), [100])
    assert layer.packed_tokens == [60, 60]


def test_caches_with_the_same_codecs_fit_them_once(tokens, layer_of, run_through):
    first = run_through(layer_of(PRESETS["b3"]), tokens, [LENGTH])
    second = run_through(layer_of(PRESETS["b3"]), _part(tokens, columns=slice(200, 300)), [100])
    assert second.packed_tokens == [60, 60]
    assert first.core.codecs is second.core.codecs


def test_keys_that_need_queries_and_saw_none_say_so(tokens, refuses):
    layer = _layer(PRESETS["b3"], tokens.rope)
    layer.append(tokens.keys, tokens.values)
    with refuses("the statistics need the queries of the first prompt"):
        layer.settle()
    assert layer.length == 0


def test_codecs_without_their_statistics_are_told_of(tokens, refuses):
    cache = PagedCache([0], 4, 32, Fitted(Codecs(PRESETS["b3"])))
    cache.append(cache.layers[0], tokens.keys, tokens.values)
    with refuses("the codecs that the cache was given have no statistics of layer 0"):
        cache.settle()


def test_reset_forgets_tokens_and_keeps_codecs(tokens, run_through):
    layer = run_through(_layer(_short("b3"), tokens.rope), tokens, [LENGTH])
    before, codecs = [x.clone() for x in layer.pages()], layer.core.codecs
    layer.cache.reset()
    assert (layer.length, layer.core.nbytes, layer.core.pages) == (0, 0, None)
    run_through(layer, tokens, [100] * 4 + [30])
    assert layer.core.codecs is codecs
    assert all(map(torch.equal, before, layer.pages()))


# Cropping and selecting


@every_kind
@pytest.mark.parametrize("keep", [LENGTH - 1, 350, 200, 68, 64, 5, 4, 2, 0])
def test_a_crop_never_changes_what_it_keeps(name, keep, tokens, layer_of, run_through):
    config = _short(name)
    layer = run_through(layer_of(config), tokens, [LENGTH])
    before = [x[:, :, :keep].clone() for x in layer.dense()]
    layer.cache.crop(keep)
    assert layer.length == keep
    if keep:
        assert all(torch.equal(a, b) for a, b in zip(layer.dense(), before, strict=True))
    rest = slice(keep, None)
    out = layer.step(tokens, rest)
    assert torch.isfinite(out).all()
    assert layer.length == LENGTH
    for decoded, kept, true in zip(layer.dense(), before, (tokens.keys, tokens.values), strict=True):
        assert torch.equal(decoded[:, :, :keep], kept)
        assert torch.equal(decoded[:, :, LENGTH - config.recent :], true[:, :, LENGTH - config.recent :])


@pytest.mark.parametrize("draft", [1, 7, 40])
def test_drafts_that_are_taken_back_leave_no_trace(draft, tokens, layer_of, run_through):
    """Cropped again within the window, after each token."""
    config, noise = _short("b3"), _part(tokens, columns=slice(LENGTH - draft, LENGTH))
    straight, drafted = (layer_of(config) for _ in range(2))
    run_through(straight, tokens, [200, *[1] * 100])
    run_through(drafted, tokens, [200])
    for column in range(200, 300):
        drafted.step(tokens, slice(column, column + 1))
        drafted.step(noise, slice(0, draft))
        drafted.cache.crop(column + 1)
    assert all(same_tokens(straight, drafted, row, row) for row in range(2))


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("fresh", [1, 5])
def test_a_crop_into_the_padding_leaves_the_columns_in_place(sinks, fresh, tokens, run_through):
    layer = OneLayer(QJL(), TokenUniform(), sinks, 2)
    run_through(layer, tokens, [200], padding=[5, 5])
    layer.cache.crop(5)
    assert layer.dense()[0].shape[2] == 5
    mask = (torch.arange(5 + fresh) >= 5) & (torch.arange(5 + fresh) <= torch.arange(5, 5 + fresh)[:, None])
    out = layer.step(tokens, slice(0, fresh), mask=mask[None, None])
    keys, values = layer.dense()
    assert not keys[:, :, :5].any()
    assert torch.equal(keys[:, :, 5:], tokens.keys[:, :, :fresh])
    scores = tokens.queries[:, :, :fresh] @ keys[:, :, 5:].repeat_interleave(2, 1).transpose(2, 3) * 0.125
    weights = scores.masked_fill(~mask[:, 5:], -torch.inf).softmax(-1)
    torch.testing.assert_close(out, weights @ values[:, :, 5:].repeat_interleave(2, 1), atol=1e-5, rtol=0)


def test_a_crop_to_more_than_there_is_changes_nothing(tokens, run_through):
    layer = run_through(OneLayer(QJL(), TokenUniform()), tokens, [LENGTH])
    layer.cache.crop(LENGTH + 5)
    assert layer.length == LENGTH
    empty = OneLayer(QJL(), TokenUniform())
    empty.cache.crop(0)
    empty.cache.select([])
    assert empty.length == 0


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1], [1], [1, 1, 0, 0]], ids=str)
def test_selected_rows_keep_their_tokens(rows, tokens, run_through):
    layer = run_through(OneLayer(QJL(), TokenUniform(), recent=8), tokens, [LENGTH], padding=[0, 40])
    before = layer.dense()
    layer.cache.select(rows)
    assert layer.index.batch == len(rows)
    assert layer.index.padding == [[0, 40][row] for row in rows]
    assert all(torch.equal(a, b[rows]) for a, b in zip(layer.dense(), before, strict=True))


@every_kind
def test_repeated_rows_go_their_own_ways(name, tokens, layer_of, run_through):
    """Into the block that they share the beginning of, and over its end."""
    config = replace(_short(name), recent=8)
    layer = run_through(layer_of(_short(name), recent=8), _part(tokens, slice(0, 1)), [LENGTH])
    before = [x.clone() for x in layer.dense()]
    layer.cache.select([0, 0])
    run_through(layer, _part(tokens, columns=slice(0, 100)), [100])
    coded = (LENGTH - config.recent) // BLOCK * BLOCK
    for decoded, old, true in zip(layer.dense(), before, (tokens.keys, tokens.values), strict=True):
        assert torch.equal(decoded[:, :, :coded], old[:, :, :coded].expand(2, -1, -1, -1))
        assert torch.equal(decoded[:, :, -8:], true[:, :, 92:100])
        assert not torch.equal(decoded[0, :, -100:], decoded[1, :, -100:])


@every_kind
def test_each_beam_holds_what_it_would_alone(name, tokens, layer_of, run_through):
    """Rows that are cropped, repeated and go on by tokens of their own, into a page that all of them share."""
    layer = run_through(layer_of(_short(name)), _part(tokens, slice(0, 1)), [200])
    layer.cache.select([0, 0])
    layer.cache.crop(100)
    run_through(layer, _part(tokens, columns=slice(100, LENGTH)), [50, *[1] * 80, LENGTH - 230])
    for row in range(2):
        alone = run_through(layer_of(_short(name)), _part(tokens, slice(0, 1)), [200])
        alone.cache.crop(100)
        run_through(alone, _part(tokens, slice(row, row + 1), slice(100, LENGTH)), [LENGTH - 100])
        assert same_tokens(layer, alone, row, 0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: copy.deepcopy(copy.copy(layer))])
def test_a_copy_goes_its_own_way(duplicate, tokens, layer_of, run_through):
    layer = run_through(layer_of(_short("b3")), tokens, [200])
    twin = duplicate(layer)
    assert twin.core.codecs is layer.core.codecs
    run_through(twin, _part(tokens, columns=slice(100, 300)), [1] * 20 + [180])
    assert layer.length == 200
    layer.step(tokens, slice(200, LENGTH))
    expected = run_through(layer_of(_short("b3")), tokens, [200, LENGTH - 200])
    assert all(same_tokens(layer, expected, row, row) for row in range(2))


def test_a_copy_within_a_pass_ends_it_by_itself(tokens, layer_of, run_through):
    layer = run_through(layer_of(_short("b3")), tokens, [200])
    layer.append(tokens.keys[:, :, 200:300], tokens.values[:, :, 200:300])
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        one.settle()
        one.step(tokens, slice(300, LENGTH))
    assert all(same_tokens(layer, twin, row, row) for row in range(2))


# Random sequences of operations, on the tokens of two layers


DIM = 8
POOL = 40 * torch.randn(4, 1, 3000, DIM, generator=torch.Generator().manual_seed(0))


def _two_layers(sinks, recent, key, value):
    config = CacheConfig(key, value, sinks, recent)
    return PagedCache([0, 1], sinks, recent, Fitted(Codecs(config)))


def _feed(cache, x):
    """Layer 1 holds the negatives of layer 0."""
    for number, sign in ((0, 1), (1, -1)):
        cache.append(cache.layers[number], sign * x, -sign * x)
    cache.settle()


PAIRS = {  # with the error of a token at most
    "exact": (Identity(), Identity(), 0),
    "stamped": (Stamp(), Stamp(), None),
    "bytes": (Int8(), TokenUniform(8, 8), 2.5),
    "channels": (KIVI(4, 64), TokenUniform(4, 8), 40),
}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("key", "value", "error"), PAIRS.values(), ids=PAIRS)
def test_any_order_of_operations_holds_what_a_tensor_would(key, value, error, seed):
    """Each row as if it had been read alone; a token out of place, or coded twice, shows by its stamp."""
    for number in range(10):
        _compare_with_a_tensor(random.Random(1000 * seed + number), key, value, error)


def _compare_with_a_tensor(chance, key, value, error):
    padding = chance.choice([(0,), (3,), (0, 1), (64, 0), (80, 17), (7, 0, 70)])
    cache = _two_layers(chance.choice([0, 1, 4, 70]), chance.choice([0, 2, 40]), key, value)
    cache.set_padding(padding, [0] * len(padding))
    pads, tokens, taken = list(padding), torch.zeros(len(padding), 1, 0, DIM), 0
    for turn in range(6):
        what = chance.choice(["append"] * 3 + ["select", "crop", "copy", "mark", "fail"])
        if what == "append" or not turn:
            count = chance.choice([1, 2, 63, 64, 65, 130, 210])
            x = POOL[: len(pads), :, taken : taken + count]
            taken += count
            _feed(cache, x)
            tokens = torch.cat([tokens, x], 2)
        elif what == "select":
            rows = [chance.randrange(len(pads)) for _ in range(chance.randint(1, 4))]
            cache.select(rows)
            pads, tokens = [pads[row] for row in rows], tokens[rows]
        elif what == "crop":
            columns = max(0, tokens.shape[2] - chance.choice([1, 5, 64, 100, 300]))
            cache.crop(columns)
            pads, tokens = [min(pad, columns) for pad in pads], tokens[:, :, :columns]
        elif what == "copy":
            cache = copy.deepcopy(cache)
        elif what == "mark":
            cache.mark(torch.tensor([[chance.random() < 0.99 for _ in range(100)]] * len(pads)))
        else:
            cache.append(cache.layers[0], *[torch.full((len(pads), 1, 130, DIM), 7.0)] * 2)
            cache.store(cache.layers[0])
            cache.roll_back()
        _require_tokens(cache, pads, tokens, error)


def _require_tokens(cache, pads, tokens, error):
    assert cache.index.columns == tokens.shape[2]
    assert cache.index.padding == pads
    if not tokens.shape[2]:
        return
    first, second = (cache.dense(layer) for layer in cache.layers.values())
    for row, pad in enumerate(pads):
        expected = tokens[row, :, pad:]
        for sign, (keys, values) in ((1, first), (-1, second)):
            for found, its_sign in ((keys, sign), (values, -sign)):
                assert not found[row, :, :pad].any()
                own = its_sign * found[row, :, pad:]
                if error is None:
                    _require_stamps(own, expected, its_sign)
                elif own.numel():
                    assert float((own - expected).abs().max()) <= error


def _require_stamps(own, expected, sign):
    """A token decodes to itself, or to what it rounds to and its place."""
    places = torch.arange(own.shape[1])[:, None]
    stamped = (sign * expected).round() + places
    assert ((own == expected) | (own == sign * stamped)).all()


# Passes that fail


@every_kind
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("cropped", [None, 100])
def test_a_pass_that_is_rolled_back_never_was(name, stored, cropped, tokens, layer_of, run_through):
    layers = [run_through(layer_of(_short(name)), tokens, [200]) for _ in range(2)]
    for layer in layers:
        if cropped:
            layer.cache.crop(cropped)
    layers[0].append(tokens.keys[:, :, 230:], tokens.values[:, :, 230:])
    if stored:
        layers[0].cache.store(layers[0].core)
    layers[0].cache.roll_back()
    assert all(same_tokens(*layers, row, row) for row in range(2))
    for layer in layers:
        run_through(layer, _part(tokens, columns=slice(cropped or 200, None)), [LENGTH - (cropped or 200)])
    assert all(same_tokens(*layers, row, row) for row in range(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("sizes", [[100], [60, 35, 1]], ids=["of a prompt", "one by one"])
def test_numbers_that_are_not_finite_are_refused_when_they_are_coded(bad, which, sizes, refuses):
    """The pass that codes them is undone; those that keep them exact do not look."""
    layer = OneLayer(QJL(), TokenUniform(), number=3)
    keys, values = torch.zeros(1, 2, sum(sizes), 64), torch.zeros(1, 2, sum(sizes), 64)
    (keys if which == "keys" else values)[0, 1, 10, 7] = bad
    *before, last = zip(keys.split(sizes, 2), values.split(sizes, 2), strict=True)
    for part in before:
        layer.append(*part)
        layer.settle()
    layer.append(*last)
    with refuses(f"{which} of layer 3 contain NaN or Inf"):
        layer.settle()
    assert layer.length == sum(sizes[:-1])
    assert (layer.index.pages.in_use, layer.index.slots.in_use) == (0, sum(sizes[:-1]))


def test_a_layer_that_is_left_out_undoes_the_pass(refuses):
    cache = _two_layers(4, 32, Identity(), Identity())
    _feed(cache, POOL[:1, :, :10])
    cache.append(cache.layers[0], POOL[:1, :, 10:11], POOL[:1, :, 10:11])
    with refuses("layer 1 was given no tokens in a pass that layer 0 was given some in"):
        cache.append(cache.layers[0], POOL[:1, :, 11:12], POOL[:1, :, 11:12])
    assert cache.index.columns == 10
    _feed(cache, POOL[:1, :, 10:11])
    assert cache.index.columns == 11


def test_a_layer_that_never_joins_is_no_matter():
    """Of models that share keys and values between layers."""
    cache = _two_layers(4, 32, Identity(), Identity())
    for _ in range(3):
        cache.append(cache.layers[0], POOL[:1, :, :100], POOL[:1, :, :100])
        cache.settle()
    assert cache.index.columns == 300
    with pytest.raises(QJLError, match="layer 1 was given no tokens in an earlier pass"):
        cache.append(cache.layers[1], POOL[:1, :, :100], POOL[:1, :, :100])


# What is refused


@pytest.mark.parametrize("head_dim", [4, 36, 100])
def test_a_head_dim_that_does_not_pack_is_refused(head_dim, refuses):
    """When tokens are coded; ``KVCache`` asks before."""
    x = torch.zeros(1, 2, 200, head_dim)
    layer = OneLayer(QJL(), TokenUniform())
    layer.append(x, x)
    with refuses(f"head_dim {head_dim} does not pack into bytes"):
        layer.settle()
    assert layer.length == 0


def test_identity_takes_any_head_dim():
    x = torch.ones(1, 2, 200, 5)
    layer = OneLayer(Identity(), Identity())
    layer.append(x, x)
    layer.settle()
    assert layer.packed_tokens == [124]
    assert torch.equal(layer.dense()[0], x)


@pytest.mark.parametrize(
    ("keys", "values"),
    [((1, 2, 5), (1, 2, 5)), ((1, 2, 5, 8), (1, 2, 6, 8)), ((1, 2, 5, 8), (1, 1, 5, 8)), ((2, 2, 5, 8), (1, 2, 5, 8))],
)
def test_keys_and_values_of_different_shapes_are_refused(keys, values, refuses):
    with refuses("must be [B, H, T, D] with equal B, H and T"):
        OneLayer(QJL(), TokenUniform()).append(torch.zeros(keys), torch.zeros(values))


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((2, 2, 1, 8), (2, 2, 1, 8), "the cache holds 1 rows and cannot append 2"),
        ((1, 3, 1, 8), (1, 3, 1, 8), "layer 3 holds tokens of 2 heads with 8 numbers a key and cannot take"),
        ((1, 2, 1, 16), (1, 2, 1, 8), "layer 3 holds tokens of 2 heads with 8 numbers a key and cannot take"),
        ((1, 2, 1, 8), (1, 2, 1, 16), "layer 3 holds tokens of 2 heads with 8 numbers a key and cannot take"),
    ],
    ids=["batch", "heads", "key head_dim", "value head_dim"],
)
def test_tokens_that_do_not_fit_those_held_are_refused(keys, values, message, refuses):
    layer = OneLayer(QJL(), TokenUniform(), number=3)
    layer.append(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
    layer.settle()
    with refuses(message):
        layer.append(torch.zeros(keys), torch.zeros(values))
    assert layer.length == 5


def test_layers_of_one_pass_read_the_same_tokens(refuses):
    cache = _two_layers(4, 32, Identity(), Identity())
    cache.append(cache.layers[0], POOL[:1, :, :10], POOL[:1, :, :10])
    with refuses("layer 1 was given 1 x 9 tokens in a pass of 1 x 10"):
        cache.append(cache.layers[1], POOL[:1, :, :9], POOL[:1, :, :9])


@pytest.mark.parametrize("length", [10, 64, 200])
def test_tokens_as_they_are_coded_are_those_of_a_cache_without_a_window(length, tokens):
    codecs = Codecs(CacheConfig(QJL(), TokenUniform()))
    keys, values = as_coded(tokens.keys[:, :, :length], tokens.values[:, :, :length], codecs)
    whole = length // BLOCK * BLOCK
    for found, true in ((keys, tokens.keys), (values, tokens.values)):
        same = (found == true[:, :, :length]).all(-1).all(1).all(0)
        assert same.tolist() == [False] * whole + [True] * (length - whole)


def test_codes_are_those_of_the_codec(tokens, layer_of, run_through):
    """Against the codec alone, asked for each block."""
    layer = run_through(layer_of(_short("qjl-2")), tokens, [LENGTH])
    for codec, true, found in zip(layer.core.codecs, (tokens.keys, tokens.values), layer.dense(), strict=True):
        for block in range(1, layer.index.blocks[0]):
            first = torch.full((2, 1), block * BLOCK)
            x = true[:, :, block * BLOCK : (block + 1) * BLOCK]
            expected = codec.dequantize(codec.encode_tokens(x, first), first)
            assert (float64(found[:, :, block * BLOCK : (block + 1) * BLOCK]) == float64(expected)).all()
