"""The cache of one layer: what is exact, what is packed, and that neither depends on how tokens came."""

import os
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qjl.attention import Scoring, attend
from qjl.cache import CacheLayer, LayerSource
from qjl.methods.base import LayerContext, storage_bytes
from qjl.methods.identity import Identity
from qjl.methods.qjl import QJL
from qjl.methods.uniform import TokenUniform
from qjl.packed import BLOCK, block_bits
from qjl.presets import PRESETS
from qjl.statistics import MIN_TOKENS
from stamp import Stamp, StampCodec

every_preset = pytest.mark.parametrize("name", PRESETS)
LENGTH = 430


def _layer(config, source=None, layer=20):
    key, value = config.for_layer(layer)
    windows = {"sinks": config.sinks, "recent": config.recent}
    return CacheLayer(key, value, **windows, pre_rope=config.pre_rope, source=source, name="layer 3")


def _short(config):
    """With few exact tokens, so that most of a short sequence is packed."""
    return replace(config, sinks=min(config.sinks, 8), recent=min(config.recent, 64))


def _part(tokens, rows=slice(None), columns=slice(None)):
    tensors = (tokens.keys, tokens.values, tokens.queries)
    return type(tokens)(*(x[rows, :, columns] for x in tensors), tokens.rope)


def _assert_same_bytes(layer, other, row=slice(None), other_row=slice(None)):
    assert layer.packed_tokens[row] == other.packed_tokens[other_row]
    for packed, twin in zip(layer.packed, other.packed, strict=True):
        for name, tensor in packed.view().items():
            assert torch.equal(tensor[row], twin.view()[name][other_row, :, : tensor.shape[2]])


@pytest.fixture(scope="module")
def tokens(model_of):
    return model_of().first_tokens(LENGTH, batch=2)


# Same tokens, any arrival, same bytes


@every_preset
@pytest.mark.parametrize("layer_index", [0, 20])
def test_packed_bytes_do_not_depend_on_how_tokens_came(name, layer_index, tokens, run_through):
    config, source = _short(PRESETS[name]), LayerSource(tokens.rope)
    whole = run_through(_layer(config, source, layer_index), tokens, [LENGTH])
    assert min(whole.packed_tokens) >= 4 * BLOCK
    for sizes in ([7] * (LENGTH // 7) + [LENGTH % 7], [1] * LENGTH, [300, 1, 64, 65]):
        other = run_through(_layer(config, source, layer_index), tokens, sizes)
        _assert_same_bytes(whole, other)
        for ours, theirs in zip(whole.dense(), other.dense(), strict=True):
            assert torch.equal(ours, theirs)


def _with_padding(tokens, padding, generator):
    """Each row of tokens, padded on the left with noise, cut to a common length."""
    length = LENGTH - max(padding)
    rows = []
    for row, pad in enumerate(padding):
        part = _part(tokens, slice(row, row + 1), slice(0, length + max(padding) - pad))
        noise = [5 * torch.randn(*x.shape[:2], pad, x.shape[3], generator=generator) for x in _tensors(part)]
        rows.append([torch.cat(pair, 2) for pair in zip(noise, _tensors(part), strict=True)])
    return type(tokens)(*(torch.cat(column) for column in zip(*rows, strict=True)), tokens.rope)


def _tensors(tokens):
    return tokens.keys, tokens.values, tokens.queries


@every_preset
@pytest.mark.parametrize("padding", [(0, 37), (64, 3), (130, 0)])
@pytest.mark.parametrize("sizes", [[LENGTH], [7, 1, 64, 100]], ids=["whole", "chunks"])
def test_a_padded_row_packs_the_bytes_it_packs_alone(name, padding, sizes, tokens, run_through, generator):
    config, source = _short(PRESETS[name]), LayerSource(tokens.rope)
    padded = _with_padding(tokens, padding, generator)
    run_through(_layer(config, source), tokens, [LENGTH])  # fits the codecs
    steps, left = [], padded.keys.shape[2]
    for size in cycle(sizes):
        steps.append(min(size, left))
        left -= steps[-1]
        if not left:
            break
    layer = run_through(_layer(config, source), padded, steps, padding)
    for row, pad in enumerate(padding):
        alone = _part(padded, slice(row, row + 1), slice(pad, None))
        single = run_through(_layer(config, source), alone, [alone.keys.shape[2]])
        held = single.packed[0].blocks
        assert layer.packed_tokens[row] == single.packed_tokens[0] > 0
        for packed, twin in zip(layer.packed, single.packed, strict=True):
            for field, tensor in twin.view().items():
                assert torch.equal(packed.view()[field][row, :, :held], tensor[0])
        for ours, theirs in zip(layer.dense(), single.dense(), strict=True):
            assert torch.equal(ours[row, :, pad:], theirs[0])
            assert not ours[row, :, :pad].any()


@pytest.mark.parametrize("name", ["b3", "qjl-2"])
def test_statistics_of_a_padded_prompt_leave_the_padding_out(name, tokens, run_through, generator):
    padded = _with_padding(_part(tokens, slice(0, 1)), (60,), generator)
    alone = _part(padded, columns=slice(60, None))
    layers = [
        run_through(_layer(PRESETS[name], LayerSource(tokens.rope)), part, [part.keys.shape[2]], padding)
        for part, padding in ((padded, [60]), (alone, [0]))
    ]
    decoded, expected = (layer.dense()[0] for layer in layers)
    assert (decoded[:, :, 60:] - expected).std() < 0.005 * expected.std()


def test_rope_positions_start_where_the_engine_says(tokens, run_through):
    """A row whose first token has position 100 is centred by the mean as turned to 100."""
    source = LayerSource(tokens.rope)
    run_through(_layer(PRESETS["b3"], source), tokens, [LENGTH])
    late = _part(tokens, slice(0, 1), slice(100, 400))
    right, wrong = (_layer(PRESETS["b3"], source) for _ in range(2))
    right.set_padding([0], origin=[100])
    for layer in (right, wrong):
        run_through(layer, late, [300])
    errors = [float((layer.dense()[0] - late.keys).square().mean()) for layer in (right, wrong)]
    assert errors[0] < 0.1 * errors[1]


# What is exact


@every_preset
def test_sinks_and_the_recent_window_are_exact_and_the_rest_is_packed(name, tokens, run_through):
    config = PRESETS[name]
    layer = run_through(_layer(config, LayerSource(tokens.rope)), tokens, [300, *[1] * (LENGTH - 300)])
    (held,) = set(layer.packed_tokens)
    assert config.recent <= LENGTH - config.sinks - held < config.recent + BLOCK
    assert held % BLOCK == 0
    for decoded, true in zip(layer.dense(), (tokens.keys, tokens.values), strict=True):
        same = (decoded == true).all(-1).all(1).all(0)
        assert same[: config.sinks].all()
        assert same[config.sinks + held :].all()
        if name != "full":
            assert not same[config.sinks : config.sinks + held].any()


@pytest.mark.parametrize("length", [1, 63, 4 + 32 + 63])
def test_nothing_is_packed_before_a_block_has_left_the_window(length, tokens, run_through):
    layer = run_through(CacheLayer(QJL(), TokenUniform()), _part(tokens, columns=slice(0, length)), [length])
    assert layer.packed is None
    assert layer.packed_tokens == [0, 0]
    assert all(
        torch.equal(a, b[:, :, :length]) for a, b in zip(layer.dense(), (tokens.keys, tokens.values), strict=True)
    )


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (0, 5), (3, 0), (70, 100)])
def test_any_sinks_and_window(sinks, recent, tokens, run_through):
    layer = CacheLayer(QJL(), TokenUniform(), sinks=sinks, recent=recent)
    run_through(layer, tokens, [1, 200, 1, 64, 1, 100])
    held = (367 - sinks - recent) // BLOCK * BLOCK
    assert layer.packed_tokens == [held] * 2
    keys = layer.dense()[0]
    assert torch.equal(keys[:, :, :sinks], tokens.keys[:, :, :sinks])
    assert torch.equal(keys[:, :, sinks + held :], tokens.keys[:, :, sinks + held : 367])
    out = attend(tokens.queries[:, :, 366:367], layer, Scoring(0.125))
    assert torch.isfinite(out).all()


def test_the_tokens_of_the_engine_are_never_written_to(tokens, run_through):
    mine = _part(tokens)
    mine = type(mine)(*(x.clone() for x in _tensors(mine)), mine.rope)
    layer = run_through(CacheLayer(QJL(), TokenUniform(), recent=8), mine, [200, 50, 1, 1, 100])
    layer.crop(210)
    layer.append(torch.zeros(2, 2, 30, 64), torch.zeros(2, 2, 30, 64))
    assert torch.equal(mine.keys, tokens.keys)
    assert torch.equal(mine.values, tokens.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoded_tokens_have_the_dtype_of_the_model(dtype, tokens, run_through):
    half = type(tokens)(*(x.to(dtype) for x in _tensors(tokens)), tokens.rope)
    layer = run_through(_layer(PRESETS["b4"], LayerSource(tokens.rope)), half, [LENGTH])
    keys, values = layer.dense()
    assert keys.dtype == values.dtype == dtype
    assert (keys - half.keys).float().std() < 0.1 * half.keys.float().std()


# Bytes


@every_preset
def test_bytes_are_the_declared_bits_and_the_exact_tokens(name, tokens, run_through):
    config = PRESETS[name]
    layer = run_through(_layer(config, LayerSource(tokens.rope)), tokens, [LENGTH])
    held = sum(layer.packed_tokens) * 2
    quantizers = config.for_layer(20)
    bits = sum(block_bits(one.layout(64, torch.float32)) for one in quantizers) / BLOCK
    declared = sum(one.bits(64) * 64 for one in quantizers)
    assert bits == declared * (2 if name == "full" else 1)
    exact = (LENGTH - layer.packed_tokens[0]) * 2 * 2 * 2 * 64 * 4
    assert layer.exact_nbytes == exact
    assert layer.nbytes == exact + held * bits / 8
    assert layer.nbytes <= layer.allocated_nbytes < 2 * layer.nbytes


def test_codecs_are_counted_apart(tokens, run_through):
    layer = run_through(_layer(PRESETS["b3"], LayerSource(tokens.rope)), tokens, [LENGTH])
    assert storage_bytes(layer.codec_tensors) > layer.packed[0].nbytes / 10
    assert layer.nbytes == layer.exact_nbytes + sum(packed.nbytes for packed in layer.packed)


def test_storage_stays_near_what_is_used(model_of, run_through):
    long = model_of(head_dim=16).first_tokens(4000)
    layer = run_through(CacheLayer(QJL(), TokenUniform()), long, [100] * 40)
    assert layer.allocated_nbytes < 1.4 * layer.nbytes


# Statistics


def test_a_layer_waits_for_a_prompt_long_enough_to_measure(tokens, run_through):
    counts = []
    layer = _layer(PRESETS["b3"], LayerSource(tokens.rope, announce=counts.append))
    run_through(layer, _part(tokens, columns=slice(0, MIN_TOKENS - 1)), [MIN_TOKENS - 1])
    assert layer.packed is None
    assert layer.wants_queries
    run_through(layer, _part(tokens, columns=slice(MIN_TOKENS - 1, LENGTH)), [1, LENGTH - MIN_TOKENS])
    assert min(layer.packed_tokens) > 200
    assert not layer.wants_queries
    assert counts == [2 * (MIN_TOKENS - 4)]


def test_methods_without_statistics_wait_for_nothing(tokens, run_through):
    layer = run_through(CacheLayer(QJL(), TokenUniform()), _part(tokens, columns=slice(0, 100)), [100])
    assert not layer.wants_queries
    assert layer.packed_tokens == [64, 64]


def test_calibrated_statistics_serve_from_the_first_block(tokens, model_of, run_through):
    statistics = model_of().statistics()
    layer = _layer(PRESETS["b3"], LayerSource(tokens.rope, calibrated=lambda: statistics))
    run_through(layer, _part(tokens, columns=slice(0, 100)), [100])
    assert layer.packed_tokens == [64, 64]


def test_all_caches_of_a_model_share_their_codecs(tokens, run_through):
    source = LayerSource(tokens.rope)
    first = run_through(_layer(PRESETS["b3"], source), tokens, [LENGTH])
    second = run_through(_layer(PRESETS["b3"], source), _part(tokens, columns=slice(200, 300)), [100])
    assert second.packed_tokens == [64, 64]
    assert all(a is b for a, b in zip(first.codec_tensors, second.codec_tensors, strict=True))
    other = _layer(PRESETS["b4"], source)
    other.append(tokens.keys, tokens.values)
    assert other.wants_queries


def test_keys_that_need_queries_and_saw_none_say_so(tokens, refuses):
    layer = _layer(PRESETS["b3"], LayerSource(tokens.rope))
    layer.append(tokens.keys, tokens.values)
    with refuses("the statistics need the queries of the first prompt"):
        layer.settle()


def test_reset_forgets_tokens_and_keeps_codecs(tokens, run_through):
    layer = run_through(_layer(PRESETS["b3"], LayerSource(tokens.rope)), tokens, [LENGTH])
    bytes_ = {name: tensor.clone() for name, tensor in layer.packed[0].view().items()}
    layer.reset()
    assert (layer.length, layer.nbytes, layer.packed) == (0, 0, None)
    run_through(layer, tokens, [100] * 4 + [30])
    assert all(torch.equal(bytes_[name], tensor) for name, tensor in layer.packed[0].view().items())


# Cropping and selecting


@every_preset
@pytest.mark.parametrize("keep", [LENGTH - 1, 350, 200, 68, 67, 5, 4, 2, 0])
def test_a_crop_never_changes_what_it_keeps(name, keep, tokens, run_through):
    layer = run_through(_layer(PRESETS[name], LayerSource(tokens.rope)), tokens, [LENGTH])
    before = [x[:, :, :keep].clone() for x in layer.dense()]
    layer.crop(keep)
    assert layer.length == keep
    assert all(torch.equal(a, b) for a, b in zip(layer.dense(), before, strict=True))
    rest = _part(tokens, columns=slice(keep, None))
    layer.append(rest.keys, rest.values)
    layer.settle()
    assert layer.length == LENGTH
    for decoded, kept, true in zip(layer.dense(), before, (tokens.keys, tokens.values), strict=True):
        assert torch.equal(decoded[:, :, :keep], kept)
        recent = slice(LENGTH - PRESETS[name].recent, None)
        assert torch.equal(decoded[:, :, recent], true[:, :, recent])
    expected = attend(tokens.queries[:, :, -1:], layer, Scoring(0.125))
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("fresh", [1, 5])
def test_a_crop_into_the_padding_leaves_the_columns_in_place(sinks, fresh, tokens, run_through):
    layer = CacheLayer(QJL(), TokenUniform(), sinks=sinks, recent=2)
    run_through(layer, tokens, [200], padding=[5, 5])
    layer.crop(5)
    assert layer.dense()[0].shape[2] == 5
    run_through(layer, _part(tokens, columns=slice(0, fresh)), [fresh])
    keys, values = layer.dense()
    assert not keys[:, :, :5].any()
    assert torch.equal(keys[:, :, 5:], tokens.keys[:, :, :fresh])
    mask = torch.arange(5 + fresh)[None, None, None] >= 5
    out = attend(tokens.queries[:, :, :1], layer, Scoring(0.125, mask))
    scores = tokens.queries[:, :, :1] @ keys[:, :, 5:].repeat_interleave(2, 1).transpose(2, 3)
    expected = (scores * 0.125).softmax(-1) @ values[:, :, 5:].repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_a_crop_to_more_than_there_is_changes_nothing(tokens, run_through):
    layer = run_through(CacheLayer(QJL(), TokenUniform()), tokens, [LENGTH])
    layer.crop(LENGTH + 5)
    assert layer.length == LENGTH
    empty = CacheLayer(QJL(), TokenUniform())
    empty.crop(0)
    empty.select(torch.tensor([0]))
    assert empty.length == 0


@pytest.mark.parametrize("indices", [[1, 0], [0, 0, 1], [1], [1, 1, 0, 0]])
def test_selected_rows_keep_their_tokens(indices, tokens, run_through):
    layer = run_through(CacheLayer(QJL(), TokenUniform(), recent=8), tokens, [LENGTH], padding=[0, 40])
    before = layer.dense()
    layer.select(torch.tensor(indices))
    assert layer.batch == len(indices)
    assert layer.padding == [[0, 40][row] for row in indices]
    assert all(torch.equal(a, b[indices]) for a, b in zip(layer.dense(), before, strict=True))


def test_repeated_rows_go_their_own_ways(tokens, run_through):
    layer = run_through(CacheLayer(QJL(), TokenUniform(), recent=8), _part(tokens, slice(0, 1)), [LENGTH])
    before = [x.clone() for x in layer.dense()]
    layer.select(torch.tensor([0, 0]))
    run_through(layer, _part(tokens, columns=slice(0, 100)), [100])
    for decoded, old, true in zip(layer.dense(), before, (tokens.keys, tokens.values), strict=True):
        assert torch.equal(decoded[:, :, :388], old[:, :, :388].expand(2, -1, -1, -1))  # 4 sinks, 6 blocks
        assert torch.equal(decoded[:, :, -8:], true[:, :, 92:100])
        assert not torch.equal(decoded[0, :, -100:], decoded[1, :, -100:])


# Random sequences of operations against a plain tensor model


class PlainCache:
    """The same as one tensor of what each token decodes to; ``decode(x, first)`` is what quantizing does to blocks.

    Tokens are looked at one by one: 64 marked ones in a row are a block, one that can be in no block stays exact.
    """

    def __init__(self, padding, sinks, recent, decode):
        self.padding, self.sinks, self.recent, self.decode = list(padding), sinks, recent, decode
        self.decided = list(padding)
        self.marks, self.is_marked_by_default = [[] for _ in padding], True
        self.tokens = torch.zeros(len(padding), 1, 0, HEAD_DIM)
        self.is_packed = torch.zeros(len(padding), 0, dtype=torch.bool)

    @property
    def length(self):
        return self.tokens.shape[2]

    @property
    def packed(self):
        return self.is_packed.sum(1).tolist()

    def mark(self, mask):
        self.is_marked_by_default = False
        self.marks = [old[: self.length] + new for old, new in zip(self.marks, mask.tolist(), strict=True)]

    def append(self, x):
        self.tokens = torch.cat([self.tokens, x], 2)
        self.is_packed = torch.cat([self.is_packed, torch.zeros(*x.shape[::2], dtype=torch.bool)], 1)
        for row, marks in enumerate(self.marks):
            marks += [self.is_marked_by_default] * (self.length - len(marks))
            while self._decide_next(row):
                pass

    def _decide_next(self, row):
        at, first = self.decided[row], self.padding[row] + self.sinks
        stop = min(at + BLOCK, max(at, self.length - self.recent))
        marks = [self.marks[row][column] and column >= first for column in range(at, stop)]
        if all(marks):
            if len(marks) == BLOCK:
                self._pack(row, slice(at, stop))
            return len(marks) == BLOCK
        self.decided[row] += 1
        return True

    def _pack(self, row, columns):
        first = torch.tensor([[columns.start - self.padding[row]]])
        self.tokens[row, :, columns] = self.decode(self.tokens[row : row + 1, :, columns], first)[0]
        self.is_packed[row, columns] = True
        self.decided[row] = columns.stop

    def crop(self, length):
        if length >= self.length:
            return
        self.tokens, self.is_packed = self.tokens[:, :, :length].clone(), self.is_packed[:, :length].clone()
        self.marks = [marks[:length] for marks in self.marks]
        self.padding = [min(pad, length) for pad in self.padding]
        self.decided = [min(column, length) for column in self.decided]

    def select(self, rows):
        self.tokens, self.is_packed = self.tokens[rows], self.is_packed[rows]
        self.marks = [list(self.marks[row]) for row in rows]
        self.padding, self.decided = [self.padding[row] for row in rows], [self.decided[row] for row in rows]

    def dense(self):
        out = self.tokens.clone()
        for row, pad in enumerate(self.padding):
            out[row, :, :pad] = 0
        return out


HEAD_DIM = 8
_POOL = 40 * torch.randn(4, 1, 3000, HEAD_DIM, generator=torch.Generator().manual_seed(0))
# Each operation and each start is one draw: hypothesis takes longer to draw than the cache to act
PLAIN_OPERATIONS = (
    *[("append", length) for length in (1, 2, 63, 64, 65, 130)] * 20,
    *[("select", rows) for size in (1, 2, 3, 4) for rows in product(range(3), repeat=size)],
    *[("crop back", count) for count in range(1, 71)],
    *[("crop", length) for length in range(0, 300, 3)],
)
SPANS = [(first, first + length) for first in (0, 1, 30) for length in (0, 5, 63, 64, 90, 128, 200)]
OPERATIONS = st.lists(st.sampled_from(PLAIN_OPERATIONS), min_size=1, max_size=5)
MARKED_OPERATIONS = st.lists(
    st.sampled_from([*PLAIN_OPERATIONS, *[("mark", span) for span in SPANS] * 10]), min_size=1, max_size=7
)
PADDINGS = ((0,), (3,), (0, 0), (0, 1), (64, 0), (80, 17), (7, 0, 70), (2, 66, 2))
STARTS = st.sampled_from(list(product((5, 66, 67, 70, 140, 210), PADDINGS)))
SEQUENCES = 20_000 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 5_000


def _marks(span, batch):
    """Marked columns ``span`` of the next ones, 7 later in each further row."""
    columns = torch.arange(span[1] + 7 * batch) - 7 * torch.arange(batch)[:, None]
    return (columns >= span[0]) & (columns < span[1])


def _run_both(layer, plain, operations, check):
    """The same operations on both; ``check`` after each. Keys are the tokens, values their negatives."""
    taken = 0
    for operation, argument in operations:
        if operation == "mark":
            mask = _marks(argument, len(plain.padding))
            layer.mark(mask)
            plain.mark(mask)
        elif operation == "append":
            x = _POOL[: len(plain.padding), :, taken : taken + argument]
            taken += argument
            layer.append(x, -x)
            layer.settle()
            plain.append(x)
        elif operation == "select":
            rows = [row % len(plain.padding) for row in argument]
            layer.select(torch.tensor(rows))
            plain.select(rows)
        else:
            length = argument if operation == "crop" else layer.length - argument
            length = max(0, min(length, layer.length))
            layer.crop(length)
            plain.crop(length)
        check()


@settings(max_examples=SEQUENCES)
@given(start=STARTS, operations=OPERATIONS, sinks=st.sampled_from([0, 1, 4]))
def test_any_sequence_of_operations_matches_a_plain_tensor(start, operations, sinks):
    first, padding = start
    _compare_with_a_plain_tensor(padding, sinks, [("append", first), *operations])


@settings(max_examples=SEQUENCES)
@given(
    start=STARTS,
    span=st.sampled_from([None, *SPANS]),
    operations=MARKED_OPERATIONS,
    sinks=st.sampled_from([0, 1, 4]),
    recent=st.sampled_from([0, 2, 40]),
)
def test_any_sequence_of_operations_with_token_masks_matches_a_plain_tensor(start, span, operations, sinks, recent):
    first, padding = start
    mark = [] if span is None else [("mark", span)]
    _compare_with_a_plain_tensor(padding, sinks, [*mark, ("append", first), *operations], recent)


def _compare_with_a_plain_tensor(padding, sinks, operations, recent=2):
    source = LayerSource()
    layer = CacheLayer(Stamp(), Stamp(), sinks=sinks, recent=recent, source=source)
    layer.set_padding(padding)
    codec = StampCodec({})
    plain = PlainCache(padding, sinks, recent, lambda x, at: codec.dequantize(codec.quantize(x, at), at))

    def check():
        assert layer.length == plain.length
        assert layer.padding == plain.padding
        assert layer.packed_tokens == plain.packed

    _run_both(layer, plain, operations, check)
    keys, values = layer.dense()
    expected = plain.dense()
    assert torch.equal(keys, expected)
    positions = torch.arange(layer.length) - torch.tensor(layer.padding)[:, None]
    sign = torch.where(plain.is_packed, 2 * positions, 0)[:, None, :, None]  # a value decodes to -round(x) + position
    assert torch.equal(values, sign - expected)


@settings(max_examples=300)
@given(start=STARTS, operations=MARKED_OPERATIONS)
def test_any_sequence_of_operations_on_real_codes_matches_a_plain_tensor(start, operations):
    first, padding = start
    layer = CacheLayer(QJL(1, "gaussian"), TokenUniform(4, 8), sinks=1, recent=2)
    layer.set_padding(padding)
    plains = [_plain_of(layer.key, padding, 1), _plain_of(layer.value, padding, -1)]
    both = _Both(plains)

    def check():
        for decoded, plain, sign in zip(layer.dense(), plains, (1, -1), strict=True):
            assert torch.equal(decoded, sign * plain.dense())

    _run_both(layer, both, [("append", first), *operations], check)
    if layer.length and max(layer.padding) < layer.length:
        query = _POOL[: layer.batch, :, -3:]
        mask = torch.arange(layer.length) >= torch.tensor(layer.padding)[:, None]
        scoring = Scoring(0.0005, mask[:, None, None].expand(-1, -1, 3, -1))
        keys, values = layer.dense()
        scores = (query @ keys.transpose(2, 3) * 0.0005).masked_fill(~scoring.mask, -torch.inf)
        torch.testing.assert_close(attend(query, layer, scoring), scores.softmax(-1) @ values, atol=0.02, rtol=0)


def _plain_of(quantizer, padding, sign):
    """A plain cache of ``sign * token``, kept with the sign undone."""
    codec = quantizer.fit(LayerContext("key", 1, HEAD_DIM, torch.device("cpu"), torch.float32))

    def decode(x, first):
        return sign * codec.dequantize(codec.quantize(sign * x, first), first)

    return PlainCache(padding, 1, 2, decode)


class _Both:
    """Plain keys and plain values as one."""

    def __init__(self, plains):
        self._plains = plains

    @property
    def padding(self):
        return self._plains[0].padding

    def mark(self, mask):
        for plain in self._plains:
            plain.mark(mask)

    def append(self, x):
        for plain in self._plains:
            plain.append(x)

    def crop(self, length):
        for plain in self._plains:
            plain.crop(length)

    def select(self, rows):
        for plain in self._plains:
            plain.select(rows)


# What is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_numbers_that_are_not_finite_are_refused(bad, which, refuses):
    layer = CacheLayer(QJL(), TokenUniform(), name="layer 3")
    keys, values = torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 5, 64)
    (keys if which == "keys" else values)[0, 1, 3, 7] = bad
    with refuses(f"{which} of layer 3 contain NaN or Inf"):
        layer.append(keys, values)
    assert layer.length == 0


@pytest.mark.parametrize("head_dim", [4, 36, 100])
def test_a_head_dim_that_does_not_pack_is_refused(head_dim, refuses):
    x = torch.zeros(1, 2, 5, head_dim)
    with refuses(f"head_dim {head_dim} does not pack into bytes"):
        CacheLayer(QJL(), TokenUniform()).append(x, x)


def test_identity_takes_any_head_dim():
    x = torch.ones(1, 2, 200, 5)
    layer = CacheLayer(Identity(), Identity())
    layer.append(x, x)
    layer.settle()
    assert layer.packed_tokens == [128]
    assert torch.equal(layer.dense()[0], x)


@pytest.mark.parametrize(
    ("keys", "values"),
    [((1, 2, 5), (1, 2, 5)), ((1, 2, 5, 8), (1, 2, 6, 8)), ((1, 2, 5, 8), (1, 1, 5, 8)), ((2, 2, 5, 8), (1, 2, 5, 8))],
)
def test_keys_and_values_of_different_shapes_are_refused(keys, values, refuses):
    with refuses("must be [B, H, T, D] with equal B, H and T"):
        CacheLayer(QJL(), TokenUniform()).append(torch.zeros(keys), torch.zeros(values))


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ((2, 2, 1, 8), (2, 2, 1, 8)),
        ((1, 3, 1, 8), (1, 3, 1, 8)),
        ((1, 2, 1, 16), (1, 2, 1, 8)),
        ((1, 2, 1, 8), (1, 2, 1, 16)),
    ],
    ids=["batch", "heads", "key head_dim", "value head_dim"],
)
def test_tokens_that_do_not_fit_the_cached_ones_are_refused(keys, values, refuses):
    layer = CacheLayer(QJL(), TokenUniform(), name="layer 3")
    layer.append(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
    with refuses("layer 3 holds [1, 2, 5, 8] and cannot append"):
        layer.append(torch.zeros(keys), torch.zeros(values))
    assert layer.length == 5
