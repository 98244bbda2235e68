"""Attention over a layer against the formula, and against torch where nothing is packed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracles
from budget import assert_within_budget, trades
from method_cases import one_of_each_codec
from one_layer import OneLayer
from qjl import attention, ops
from qjl.attention import Scoring, attend_dense, causal_mask, merge
from qjl.cache.pool import Pages
from qjl.methods.balanced import Balanced
from qjl.methods.identity import Identity
from qjl.methods.kivi import KIVI
from qjl.methods.qjl import QJL
from qjl.methods.transform import Transform
from qjl.methods.uniform import TokenUniform
from qjl.presets import PRESETS

HEADS = pytest.mark.parametrize(("heads", "group"), [(2, 1), (2, 3), (1, 4)], ids=["MHA", "GQA", "MQA"])
LENGTH = 300  # tokens before those that ask


@pytest.fixture(params=[attention.FUSE_FROM_TOKENS, 2], ids=["parts", "torch"])
def either_way(request, monkeypatch):
    """By parts, and by torch's kernel, which takes many query tokens only."""
    monkeypatch.setattr(attention, "FUSE_FROM_TOKENS", request.param)


EITHER_WAY = pytest.mark.usefixtures("either_way", "reference_backend")


def _ask(layer, tokens, queries):
    """Begin a pass over the last tokens: their queries ``[B, Hq, Q, D]``."""
    last = slice(tokens.keys.shape[2] - queries, None)
    layer.append(tokens.keys[:, :, last], tokens.values[:, :, last])
    return tokens.queries[:, :, last]


@pytest.fixture
def packed(model_of, run_through):
    """``packed(key, value, queries, ...)``: a layer of 300 tokens, most of them packed, in a pass over more of them."""

    def build(key, value, queries, heads=2, group=3, padding=None, batch=2, sinks=4, recent=32):
        model = model_of(heads=heads, head_dim=64, group=group)
        tokens = model.first_tokens(LENGTH + queries, batch)
        layer = OneLayer(key, value, sinks, recent, rope=model.rope)
        run_through(layer, tokens, [LENGTH], padding)
        assert min(layer.packed_tokens) > 100
        return layer, _ask(layer, tokens, queries), tokens

    return build


def _expected(query, layer, scoring):
    """The formula over what every token decodes to."""
    mask, sinks = scoring.mask, scoring.sink_logits
    return oracles.Attention.out(
        query.double().numpy(),
        *(x.double().numpy() for x in layer.dense()),
        scoring.scaling,
        None if mask is None else mask.numpy(),
        scoring.softcap,
        None if sinks is None else sinks.double().numpy(),
    )


def _attend(layer, query, scoring):
    return layer.attend(query, scoring.scaling, scoring.mask, scoring.softcap, scoring.sink_logits)


def _assert_close(out, expected, atol=2e-3):
    np.testing.assert_allclose(out.double().numpy(), expected, atol=atol)


def _assert_right(layer, out, expected, atol=2e-3):
    pool = _read_as_codes(layer)
    if pool is not None and trades():
        assert_within_budget(out.double(), torch.from_numpy(expected), pool)
    else:
        _assert_close(out, expected, atol)


def _read_as_codes(layer):
    """The pool of what is packed, where kernels read it."""
    return None if layer.core.pages is None else layer.core.pages.operand


def _require(layer, query, scoring, atol=2e-3):
    _assert_right(layer, _attend(layer, query, scoring), _expected(query, layer, scoring), atol)


def _causal(queries, padding=(0, 0), length=None):
    """``bool [B, 1, Q, T]`` with the padding of each row shut."""
    columns = (LENGTH if length is None else length) + queries
    mask = causal_mask(queries, columns, torch.device("cpu"))
    return mask & (torch.arange(columns) >= torch.tensor(padding)[:, None])[:, None, None, :]


# Identity equals torch


@EITHER_WAY
@HEADS
@pytest.mark.parametrize("queries", [1, 2, 40, LENGTH])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "per head"])
def test_identity_equals_torch(heads, group, queries, kind, packed, generator):
    layer, query, tokens = packed(Identity(), Identity(), queries, heads, group)
    columns = LENGTH + queries
    mask = causal_mask(queries, columns, torch.device("cpu"))
    if kind == "bool":
        mask = mask & (torch.rand(2, 1, queries, columns, generator=generator) > 0.3)
        mask[..., 0] = True
    elif kind == "additive":
        mask = torch.zeros(2, 1, queries, columns).masked_fill(~mask, -torch.inf)
        mask = mask + torch.randn(2, 1, queries, columns, generator=generator)
    elif kind == "per head":
        mask = torch.randn(2, heads * group, queries, columns, generator=generator).masked_fill(~mask, -torch.inf)
    keys, values = (x.repeat_interleave(group, 1) for x in (tokens.keys, tokens.values))
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.1)
    scoring = Scoring(0.1, None if kind == "causal" else mask)
    out = _attend(layer, query, scoring)
    assert out.shape == query.shape
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(attend_dense(query, tokens.keys, tokens.values, scoring), expected, atol=2e-5, rtol=1e-5)


@HEADS
@pytest.mark.parametrize("queries", [1, 7, 30])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_short_prompt_that_is_not_packed_equals_torch(heads, group, queries, with_mask, model_of, run_through):
    model = model_of(heads=heads, head_dim=16, group=group)
    tokens = model.first_tokens(30, 2)
    layer = run_through(OneLayer(QJL(), TokenUniform()), tokens, [size for size in (30 - queries,) if size])
    query = _ask(layer, tokens, queries)
    mask = causal_mask(queries, 30, torch.device("cpu"))
    keys, values = (x.repeat_interleave(group, 1) for x in (tokens.keys, tokens.values))
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.25)
    out = layer.attend(query, 0.25, mask if with_mask else None)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    layer.settle()
    assert layer.core.pages is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("length", [30, LENGTH])
@pytest.mark.parametrize(
    ("key", "value"), [(Identity(), Identity()), (QJL(8), TokenUniform(8, 8))], ids=["exact", "codes"]
)
def test_the_output_has_the_dtype_of_the_query(key, value, length, queries, dtype, model_of, run_through):
    tokens = model_of(head_dim=64).first_tokens(length)
    half = type(tokens)(*(x.to(dtype) for x in (tokens.keys, tokens.values, tokens.queries)), tokens.rope)
    layer = run_through(OneLayer(key, value), half, [length - queries])
    query = _ask(layer, half, queries)
    keys, values = (x.float().repeat_interleave(2, 1) for x in layer.dense())
    out = layer.attend(query)
    assert out.dtype == dtype
    mask = causal_mask(queries, length, torch.device("cpu"))
    expected = F.scaled_dot_product_attention(query.float(), keys, values, attn_mask=mask, scale=0.125)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)


# Packed tokens: the formula over decoded tokens


@pytest.mark.parametrize("name", one_of_each_codec())
@pytest.mark.parametrize("queries", [1, 9, 40])
def test_every_codec_attends_as_its_decoded_tokens_do(name, queries, packed):
    config = PRESETS[name]
    windows = {"sinks": min(config.sinks, 8), "recent": min(config.recent, 64)}
    layer, query, _ = packed(*config.for_layer(20), queries, **windows)
    _require(layer, query, Scoring(0.125))


METHODS = pytest.mark.parametrize(
    ("key", "value"),
    [(Identity(), Identity()), (QJL(), TokenUniform()), (Transform(3), Balanced(2, metric=False))],
    ids=["identity", "qjl", "balanced"],
)


@METHODS
@HEADS
def test_heads_share_packed_tokens(key, value, heads, group, packed):
    layer, query, _ = packed(key, value, 5, heads, group)
    _require(layer, query, Scoring(0.125))


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("kind", ["bool", "additive", "per head"])
def test_masks_reach_packed_tokens(key, value, queries, kind, packed, generator):
    layer, query, _ = packed(key, value, queries)
    mask = torch.randn(2, 6 if kind == "per head" else 1, queries, LENGTH + queries, generator=generator)
    _require(layer, query, Scoring(0.125, mask > 0 if kind == "bool" else mask))


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("padding", [(0, 37), (5, 5), (70, 3)], ids=str)
def test_left_padding_gets_no_weight(key, value, queries, padding, packed):
    """Nor where the mask says nothing of it: the layer knows its padding."""
    layer, query, _ = packed(key, value, queries, padding=list(padding))
    mask = _causal(queries, padding)
    expected = _expected(query, layer, Scoring(0.125, mask))
    for told in (mask, None):
        _assert_close(_attend(layer, query, Scoring(0.125, told)), expected)
    if len(set(padding)) > 1:
        wrong = _expected(query, layer, Scoring(0.125, causal_mask(queries, LENGTH + queries, torch.device("cpu"))))
        assert np.abs(wrong - expected).max() > 0.01


@METHODS
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("softcap", [3.0, 50.0])
def test_soft_caps_follow_the_formula(key, value, queries, softcap, packed):
    layer, query, _ = packed(key, value, queries)
    scoring = Scoring(0.125, softcap=softcap)
    _require(layer, query, scoring)
    _assert_close(attend_dense(query, *layer.dense(), scoring), _expected(query, layer, scoring))


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 12])
def test_sink_logits_take_weight_and_give_nothing(key, value, queries, packed):
    layer, query, _ = packed(key, value, queries)
    scoring = Scoring(0.125, sink_logits=torch.linspace(-3, 12, 6))
    expected = _expected(query, layer, scoring)
    _require(layer, query, scoring)
    _assert_close(attend_dense(query, *layer.dense(), scoring), expected)
    without = _expected(query, layer, Scoring(0.125))
    assert np.abs(expected[:, -1]).max() < 0.9 * np.abs(without[:, -1]).max()


@pytest.mark.parametrize("queries", [1, 30])
def test_soft_caps_and_sinks_hold_before_anything_is_packed(queries, model_of, run_through):
    tokens = model_of(head_dim=16, group=3).first_tokens(30)
    layer = run_through(OneLayer(QJL(), TokenUniform()), tokens, [size for size in (30 - queries,) if size])
    query = _ask(layer, tokens, queries)
    for scoring in (Scoring(0.25, softcap=2.0), Scoring(0.25, sink_logits=torch.arange(6.0))):
        _require(layer, query, scoring, 1e-4)


@METHODS
@pytest.mark.parametrize("queries", [1, 20])
def test_everything_at_once(key, value, queries, packed, generator):
    padding = [11, 64]
    layer, query, _ = packed(key, value, queries, padding=padding)
    mask = torch.randn(2, 6, queries, LENGTH + queries, generator=generator)
    mask = mask.masked_fill(~_causal(queries, padding), -torch.inf)
    _require(layer, query, Scoring(0.125, mask, softcap=20.0, sink_logits=torch.linspace(-1, 3, 6)))


@METHODS
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("padding", [(0, 0), (0, 37)], ids=str)
def test_pages_that_were_cropped_into_are_read_as_far_as_they_are_filled(key, value, queries, padding, packed):
    """And those of which the beginning is codes and the rest exact, as of codecs that cannot add to a page."""
    for codec in ((key, value), (KIVI(2), TokenUniform())):
        layer, _, tokens = packed(*codec, queries, padding=list(padding))
        layer.settle()
        layer.cache.crop(100)
        for columns in (slice(100, 110), slice(110, 250), slice(250, 280)):
            layer.step(tokens, columns)
        last = slice(LENGTH, LENGTH + queries)
        layer.append(tokens.keys[:, :, last], tokens.values[:, :, last])
        query, mask = tokens.queries[:, :, last], _causal(queries, padding, 280)
        expected = _expected(query, layer, Scoring(0.125, mask))
        for told in (None, mask):
            _assert_right(layer, _attend(layer, query, Scoring(0.125, told)), expected)


@EITHER_WAY
@METHODS
def test_a_chunk_of_queries_sees_packed_tokens_and_not_its_own_future(key, value, packed):
    """Each query of a chunk gives what it gives alone, over the tokens up to its own."""
    layer, queries, _ = packed(key, value, 20)
    chunk = layer.attend(queries)
    for place in range(20):
        mask = (torch.arange(LENGTH + 20) <= LENGTH + place)[None, None, None].expand(-1, -1, 20, -1)
        alone = layer.attend(queries, mask=mask)
        torch.testing.assert_close(chunk[:, :, place], alone[:, :, place], atol=1e-3, rtol=0)


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_may_see_nothing_gives_finite_numbers(key, value, queries, kind, packed, model_of):
    short = model_of(head_dim=64, group=3).first_tokens(queries, 2)
    empty = OneLayer(key, value)
    for layer, query in (packed(key, value, queries)[:2], (empty, _ask(empty, short, queries))):
        mask = torch.ones(2, 1, queries, layer.length + queries, dtype=torch.bool)
        mask[0, :, 0] = False
        if kind == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        for softcap in (None, 30.0):
            out = layer.attend(query, mask=mask, softcap=softcap)
            assert torch.isfinite(out).all()
            assert (out[1] != 0).any()


@pytest.mark.parametrize("backend", ops.backends())
def test_many_queries_go_to_torch_over_tiles_of_decoded_tokens(backend, packed, monkeypatch):
    """Kernels of a CPU read packed tokens as codes, and leave the exact ones to torch."""
    monkeypatch.setattr(ops, "_chosen", backend)
    seen, fused = [], attention._fused_part

    def spy(query, keys, *others, **settings):
        seen.append((query.shape[2], keys.shape[2]))
        return fused(query, keys, *others, **settings)

    monkeypatch.setattr(attention, "_fused_part", spy)
    monkeypatch.setattr(attention, "TILE_NUMBERS", 1)
    many = attention.FUSE_FROM_TOKENS
    layer, query, _ = packed(QJL(), TokenUniform(), many - 1)
    layer.attend(query)
    assert not seen
    layer, query, _ = packed(QJL(), TokenUniform(), many)
    _require(layer, query, Scoring(0.125))
    assert seen
    assert seen.count((many, 64)) == (0 if backend == "cpu" else layer.index.blocks[0])


def test_queries_of_padding_give_finite_numbers(model_of):
    tokens = model_of(head_dim=64, group=3).first_tokens(LENGTH, 2)
    layer = OneLayer(QJL(), TokenUniform())
    layer.cache.set_padding([0, 90], [0, 0])
    out = layer.step(tokens, slice(None), mask=_causal(LENGTH, [0, 90], 0))
    assert torch.isfinite(out).all()


@METHODS
@pytest.mark.parametrize("numbers", [1, 2000, 60000])
@pytest.mark.parametrize("padding", [None, [0, 37]])
def test_tiles_change_nothing(key, value, numbers, padding, packed, monkeypatch):
    for queries in (1, 25):
        layer, query, _ = packed(key, value, queries, padding=padding)
        settings = {"softcap": 20.0, "sink_logits": torch.zeros(6)}
        whole = layer.attend(query, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "TILE_NUMBERS", numbers)
            tiled = layer.attend(query, **settings)
        torch.testing.assert_close(tiled, whole, atol=2e-3 if queries == 25 else 1e-5, rtol=0)


def test_tiles_do_cut(packed, monkeypatch):
    """Of the test above: with one number in flight each query and each block comes alone."""
    layer, query, _ = packed(KIVI(2), TokenUniform(), 5)
    seen, decode = [], Pages.decode

    def spy(pages, table, first):
        seen.append(table.shape)
        return decode(pages, table, first)

    monkeypatch.setattr(Pages, "decode", spy)
    monkeypatch.setattr(attention, "TILE_NUMBERS", 1)
    layer.attend(query)
    assert seen == [(2, 1)] * 5 * layer.index.blocks[0]


def test_values_may_be_wider_than_keys(generator):
    layer = OneLayer(QJL(1), TokenUniform(4, 8), sinks=2, recent=8)
    keys, values = torch.randn(1, 2, 150, 16, generator=generator), torch.randn(1, 2, 150, 24, generator=generator)
    for columns in (slice(0, 147), slice(147, 150)):
        layer.append(keys[:, :, columns], values[:, :, columns])
        if columns.start == 0:
            layer.settle()
    query = torch.randn(1, 4, 3, 16, generator=generator)
    assert layer.attend(query, 0.25).shape == (1, 4, 3, 24)
    _require(layer, query, Scoring(0.25), 1e-4)


# Encoders


@pytest.mark.parametrize(("key", "value"), [(Identity(), Identity()), (QJL(), TokenUniform())], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (0, 37)], ids=str)
def test_an_encoder_attends_both_ways(key, value, padding, packed):
    """No causal mask: fresh tokens see each other, and codes of those before."""
    layer, query, _ = packed(key, value, 100, padding=list(padding))
    everywhere = torch.ones(1, 1, 1, LENGTH + 100).bool().expand(-1, -1, 100, -1)
    out = layer.attend(query, mask=everywhere)
    is_there = (torch.arange(LENGTH + 100) >= torch.tensor(padding)[:, None])[:, None, None]
    _assert_close(out, _expected(query, layer, Scoring(0.125, everywhere & is_there)))
    assert (layer.attend(query) - out)[:, :, :20].abs().max() > 0.05


# Merging


@pytest.mark.parametrize("cuts", [[5], [1, 2, 97], [33, 33, 34], [100]])
def test_merged_parts_are_exact(cuts, generator):
    scores = 5 * torch.randn(2, 3, sum(cuts), generator=generator, dtype=torch.float64)
    values = torch.randn(2, sum(cuts), 4, generator=generator, dtype=torch.float64)
    parts = [
        (part.softmax(-1) @ value, part.logsumexp(-1))
        for part, value in zip(scores.split(cuts, -1), values.split(cuts, 1), strict=True)
    ]
    out, lse = merge(parts)
    torch.testing.assert_close(out, scores.softmax(-1) @ values, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-12, rtol=0)


def test_merging_survives_scores_beyond_the_range_of_exp():
    parts = [(torch.ones(1, 2), torch.tensor([500.0])), (torch.zeros(1, 2), torch.tensor([498.0]))]
    out, lse = merge(parts)
    torch.testing.assert_close(out, torch.full((1, 2), 1 / (1 + np.exp(-2)), dtype=torch.float32))
    assert lse.item() == pytest.approx(500 + np.log1p(np.exp(-2)), rel=1e-6)


def test_an_empty_part_counts_for_nothing_and_two_empty_parts_stay_finite():
    nothing = (torch.zeros(1, 2), torch.tensor([-torch.inf]))
    something = (torch.ones(1, 2), torch.tensor([1.5]))
    for parts in ([nothing, something], [something, nothing]):
        out, lse = merge(parts)
        assert torch.equal(out, something[0])
        assert torch.equal(lse, something[1])
    out, lse = merge([nothing, nothing])
    assert torch.equal(out, torch.zeros(1, 2))
    assert lse.item() == -torch.inf


def test_the_causal_mask_puts_the_queries_last():
    assert causal_mask(2, 4, torch.device("cpu")).int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]
