"""Attention over a layer against the formula, and against torch where nothing is packed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracles
from qjl import attention
from qjl.attention import Scoring, attend, attend_dense, causal_mask, merge
from qjl.cache import CacheLayer, LayerSource
from qjl.methods.balanced import Balanced
from qjl.methods.identity import Identity
from qjl.methods.qjl import QJL
from qjl.methods.transform import Transform
from qjl.methods.uniform import TokenUniform
from qjl.presets import PRESETS

HEADS = pytest.mark.parametrize(("heads", "group"), [(2, 1), (2, 3), (1, 4)], ids=["MHA", "GQA", "MQA"])
LENGTH = 300


def _layer(config_or_pair, model, sinks=4, recent=32):
    key, value = config_or_pair
    return CacheLayer(key, value, sinks=sinks, recent=recent, source=LayerSource(model.rope))


@pytest.fixture(params=[attention.FUSE_FROM_TOKENS, 2], ids=["parts", "torch"])
def either_way(request, monkeypatch):
    """By parts, and by torch's kernel, which takes many query tokens only."""
    monkeypatch.setattr(attention, "FUSE_FROM_TOKENS", request.param)


EITHER_WAY = pytest.mark.usefixtures("either_way", "reference_backend")


@pytest.fixture
def packed(model_of, run_through):
    """``packed(key, value, ...)``: a layer of 300 tokens, most of them packed, and the tokens."""

    def build(key, value, heads=2, group=3, padding=None, batch=2, sinks=4, recent=32):
        model = model_of(heads=heads, head_dim=64, group=group)
        tokens = model.first_tokens(LENGTH, batch)
        layer = run_through(_layer((key, value), model, sinks, recent), tokens, [LENGTH], padding)
        assert min(layer.packed_tokens) > 100
        return layer, tokens

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


def _assert_close(out, expected, atol=1e-4):
    np.testing.assert_allclose(out.double().numpy(), expected, atol=atol)


def _padded(mask, padding):
    """``mask [1, 1, Q, T]`` with the padding of each row shut."""
    return mask & (torch.arange(mask.shape[3]) >= torch.tensor(padding)[:, None])[:, None, None, :]


# Identity equals torch


@EITHER_WAY
@HEADS
@pytest.mark.parametrize("queries", [1, 2, 40, LENGTH])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "per head"])
def test_identity_equals_torch(heads, group, queries, kind, packed, generator):
    layer, tokens = packed(Identity(), Identity(), heads, group)
    query = tokens.queries[:, :, -queries:]
    mask = causal_mask(queries, LENGTH, torch.device("cpu"))
    if kind == "bool":
        mask = mask & (torch.rand(2, 1, queries, LENGTH, generator=generator) > 0.3)
        mask[..., 0] = True
    elif kind == "additive":
        mask = torch.zeros(2, 1, queries, LENGTH).masked_fill(~mask, -torch.inf)
        mask = mask + torch.randn(2, 1, queries, LENGTH, generator=generator)
    elif kind == "per head":
        mask = torch.randn(2, heads * group, queries, LENGTH, generator=generator).masked_fill(~mask, -torch.inf)
    keys, values = (x.repeat_interleave(group, 1) for x in (tokens.keys, tokens.values))
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.1)
    scoring = Scoring(0.1, None if kind == "causal" else mask)
    out = attend(query, layer, scoring)
    assert out.shape == query.shape
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(attend_dense(query, tokens.keys, tokens.values, scoring), expected, atol=2e-5, rtol=1e-5)


@HEADS
@pytest.mark.parametrize("queries", [1, 7, 30])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_short_prompt_that_is_not_packed_equals_torch(heads, group, queries, with_mask, model_of, run_through):
    model = model_of(heads=heads, head_dim=16, group=group)
    tokens = model.first_tokens(30, 2)
    layer = run_through(_layer((QJL(), TokenUniform()), model), tokens, [20, 10])
    assert layer.packed is None
    query = tokens.queries[:, :, -queries:]
    mask = causal_mask(queries, 30, torch.device("cpu"))
    keys, values = (x.repeat_interleave(group, 1) for x in (tokens.keys, tokens.values))
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.25)
    out = attend(query, layer, Scoring(0.25, mask if with_mask else None))
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_query(dtype, model_of, run_through):
    model = model_of(head_dim=64)
    tokens = model.first_tokens(LENGTH)
    half = type(tokens)(*(x.to(dtype) for x in (tokens.keys, tokens.values, tokens.queries)), tokens.rope)
    for queries in (1, 5):
        for length in (30, LENGTH):
            part = type(half)(*(x[:, :, :length] for x in (half.keys, half.values, half.queries)), half.rope)
            layer = run_through(_layer((Identity(), Identity()), model), part, [length])
            query = part.queries[:, :, -queries:]
            out = attend(query, layer, Scoring(0.125))
            assert out.dtype == dtype
            keys, values = (x.float().repeat_interleave(2, 1) for x in (part.keys, part.values))
            mask = causal_mask(queries, length, torch.device("cpu"))
            expected = F.scaled_dot_product_attention(query.float(), keys, values, attn_mask=mask, scale=0.125)
            torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)


# Packed tokens: the formula over decoded tokens


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("queries", [1, 9, 40])
def test_every_preset_attends_as_its_decoded_tokens_do(name, queries, packed):
    config = PRESETS[name]
    layer, tokens = packed(*config.for_layer(20), sinks=min(config.sinks, 8), recent=min(config.recent, 64))
    query = tokens.queries[:, :, -queries:]
    _assert_close(attend(query, layer, Scoring(0.125)), _expected(query, layer, Scoring(0.125)), atol=2e-3)


METHODS = pytest.mark.parametrize(
    ("key", "value"),
    [(Identity(), Identity()), (QJL(), TokenUniform()), (Transform(3), Balanced(2, metric=False))],
    ids=["identity", "qjl", "balanced"],
)


@METHODS
@HEADS
def test_heads_share_packed_tokens(key, value, heads, group, packed):
    layer, tokens = packed(key, value, heads, group)
    query = tokens.queries[:, :, -5:]
    _assert_close(attend(query, layer, Scoring(0.125)), _expected(query, layer, Scoring(0.125)), atol=2e-3)


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("kind", ["bool", "additive", "per head"])
def test_masks_reach_packed_tokens(key, value, queries, kind, packed, generator):
    layer, tokens = packed(key, value)
    query = tokens.queries[:, :, -queries:]
    heads = 6 if kind == "per head" else 1
    mask = torch.randn(2, heads, queries, LENGTH, generator=generator)
    if kind == "bool":
        mask = mask > 0
    _assert_close(attend(query, layer, Scoring(0.125, mask)), _expected(query, layer, Scoring(0.125, mask)), atol=2e-3)


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("padding", [(0, 37), (5, 5), (70, 3)])
def test_left_padding_gets_no_weight(key, value, queries, padding, packed):
    layer, tokens = packed(key, value, padding=list(padding))
    query = tokens.queries[:, :, -queries:]
    mask = _padded(causal_mask(queries, LENGTH, torch.device("cpu")), padding)
    expected = _expected(query, layer, Scoring(0.125, mask))
    _assert_close(attend(query, layer, Scoring(0.125, mask)), expected, atol=2e-3)
    if len(set(padding)) > 1:
        wrong = _expected(query, layer, Scoring(0.125, causal_mask(queries, LENGTH, torch.device("cpu"))))
        assert np.abs(wrong - expected).max() > 0.01


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 12])
def test_padding_is_left_out_even_where_the_mask_says_nothing(key, value, queries, packed):
    """The layer knows its padding: a mask that forgets it changes nothing."""
    padding = [0, 50]
    layer, tokens = packed(key, value, padding=padding)
    query = tokens.queries[:, :, -queries:]
    mask = _padded(causal_mask(queries, LENGTH, torch.device("cpu")), padding)
    _assert_close(attend(query, layer, Scoring(0.125)), _expected(query, layer, Scoring(0.125, mask)), atol=2e-3)


@METHODS
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("softcap", [3.0, 50.0])
def test_soft_caps_follow_the_formula(key, value, queries, softcap, packed):
    layer, tokens = packed(key, value)
    query = tokens.queries[:, :, -queries:]
    scoring = Scoring(0.125, softcap=softcap)
    _assert_close(attend(query, layer, scoring), _expected(query, layer, scoring), atol=2e-3)
    _assert_close(attend_dense(query, *layer.dense(), scoring), _expected(query, layer, scoring), atol=2e-3)


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 12])
def test_sink_logits_take_weight_and_give_nothing(key, value, queries, packed):
    layer, tokens = packed(key, value)
    query = tokens.queries[:, :, -queries:]
    scoring = Scoring(0.125, sink_logits=torch.linspace(-3, 12, 6))
    expected = _expected(query, layer, scoring)
    _assert_close(attend(query, layer, scoring), expected, atol=2e-3)
    _assert_close(attend_dense(query, *layer.dense(), scoring), expected, atol=2e-3)
    without = _expected(query, layer, Scoring(0.125))
    assert np.abs(expected[:, -1]).max() < 0.9 * np.abs(without[:, -1]).max()


def test_soft_caps_and_sinks_hold_before_anything_is_packed(model_of, run_through):
    model = model_of(head_dim=16, group=3)
    tokens = model.first_tokens(30)
    layer = run_through(_layer((QJL(), TokenUniform()), model), tokens, [30])
    for queries in (1, 30):
        query = tokens.queries[:, :, -queries:]
        for scoring in (Scoring(0.25, softcap=2.0), Scoring(0.25, sink_logits=torch.arange(6.0))):
            _assert_close(attend(query, layer, scoring), _expected(query, layer, scoring))


@METHODS
def test_everything_at_once(key, value, packed, generator):
    padding = [11, 64]
    layer, tokens = packed(key, value, padding=padding)
    query = tokens.queries[:, :, -20:]
    mask = torch.randn(2, 6, 20, LENGTH, generator=generator)
    mask = mask.masked_fill(~_padded(causal_mask(20, LENGTH, torch.device("cpu")), padding), -torch.inf)
    scoring = Scoring(0.125, mask, softcap=20.0, sink_logits=torch.linspace(-1, 3, 6))
    _assert_close(attend(query, layer, scoring), _expected(query, layer, scoring), atol=2e-3)


@EITHER_WAY
@METHODS
def test_a_chunk_of_queries_sees_packed_tokens_and_not_its_own_future(key, value, packed):
    """Each query of a chunk gives what it gives alone, over the tokens up to its own."""
    layer, tokens = packed(key, value)
    chunk = attend(tokens.queries[:, :, -20:], layer, Scoring(0.125))
    for place in range(20):
        column = LENGTH - 20 + place
        mask = (torch.arange(LENGTH) <= column)[None, None, None]
        alone = attend(tokens.queries[:, :, column : column + 1], layer, Scoring(0.125, mask))
        torch.testing.assert_close(chunk[:, :, place : place + 1], alone, atol=1e-3, rtol=0)


@EITHER_WAY
@METHODS
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_may_see_nothing_gives_finite_numbers(key, value, queries, kind, packed, model_of, run_through):
    model = model_of(head_dim=64, group=3)
    short = model.first_tokens(20, 2)
    for layer, tokens in (packed(key, value), (run_through(_layer((key, value), model), short, [20]), short)):
        mask = torch.ones(2, 1, queries, layer.length, dtype=torch.bool)
        mask[0, :, 0] = False
        if kind == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        for softcap in (None, 30.0):
            out = attend(tokens.queries[:, :, -queries:], layer, Scoring(0.125, mask, softcap))
            assert torch.isfinite(out).all()
            assert (out[1] != 0).any()


def test_many_queries_go_to_torch_over_tiles_of_decoded_tokens(packed, monkeypatch):
    layer, tokens = packed(QJL(), TokenUniform())
    seen, fused = [], attention._fused_part

    def spy(query, keys, *others, **settings):
        seen.append((query.shape[2], keys.shape[2]))
        return fused(query, keys, *others, **settings)

    monkeypatch.setattr(attention, "_fused_part", spy)
    monkeypatch.setattr(attention, "TILE_NUMBERS", 1)
    many = attention.FUSE_FROM_TOKENS
    scoring = Scoring(0.125, causal_mask(many, LENGTH, torch.device("cpu")))
    attend(tokens.queries[:, :, -many + 1 :], layer, Scoring(0.125))
    assert not seen
    out = attend(tokens.queries[:, :, -many:], layer, Scoring(0.125))
    assert seen.count((1, 64)) == many * layer.packed[0].blocks
    _assert_close(out, _expected(tokens.queries[:, :, -many:], layer, scoring), atol=2e-3)


def test_queries_of_padding_give_finite_numbers(packed):
    layer, tokens = packed(QJL(), TokenUniform(), padding=[0, 90])
    mask = _padded(causal_mask(LENGTH, LENGTH, torch.device("cpu")), [0, 90])
    out = attend(tokens.queries, layer, Scoring(0.125, mask))
    assert torch.isfinite(out).all()


@METHODS
@pytest.mark.parametrize("numbers", [1, 2000, 60000])
@pytest.mark.parametrize("padding", [None, [0, 37]])
def test_tiles_change_nothing(key, value, numbers, padding, packed, monkeypatch):
    layer, tokens = packed(key, value, padding=padding)
    for queries in (1, 25):
        query = tokens.queries[:, :, -queries:]
        scoring = Scoring(0.125, softcap=20.0, sink_logits=torch.zeros(6))
        whole = attend(query, layer, scoring)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "TILE_NUMBERS", numbers)
            tiled = attend(query, layer, scoring)
        torch.testing.assert_close(tiled, whole, atol=2e-3 if queries == 25 else 1e-5, rtol=0)


def test_tiles_do_cut(packed, monkeypatch, reference_backend):
    """Of the test above: with one number in flight each query and each block comes alone."""
    layer, tokens = packed(QJL(), TokenUniform())
    seen = []
    dequantize = layer.segments()[1].key_codec.__class__.dequantize

    def spy(codec, blocks, first):
        seen.append(first.shape[1])
        return dequantize(codec, blocks, first)

    monkeypatch.setattr(layer.segments()[1].key_codec.__class__, "dequantize", spy)
    monkeypatch.setattr(attention, "TILE_NUMBERS", 1)
    attend(tokens.queries[:, :, -5:], layer, Scoring(0.125))
    assert set(seen) == {1}
    assert len(seen) == 5 * layer.packed[0].blocks


def test_values_may_have_another_width(generator):
    layer = CacheLayer(QJL(1), TokenUniform(4, 8), sinks=2, recent=8)
    keys, values = torch.randn(1, 2, 150, 16, generator=generator), torch.randn(1, 2, 150, 24, generator=generator)
    layer.append(keys, values)
    layer.settle()
    query = torch.randn(1, 4, 3, 16, generator=generator)
    out = attend(query, layer, Scoring(0.25))
    assert out.shape == (1, 4, 3, 24)
    _assert_close(out, _expected(query, layer, Scoring(0.25)))


# Encoders


@pytest.mark.parametrize(
    ("key", "value"), [(Identity(), Identity()), (QJL(), TokenUniform()), (QJL(), Identity())], ids=str
)
@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize("padding", [(0, 0), (0, 37)], ids=str)
def test_an_encoder_attends_both_ways_over_packed_codes(key, value, length, padding, model_of, run_through):
    """No window, no sinks, no causal mask: all tokens are queries, over codes of tokens before and after."""
    model = model_of(head_dim=64, group=3)
    tokens = model.first_tokens(length, 2)
    layer = run_through(_layer((key, value), model, sinks=0, recent=0), tokens, [length], padding)
    assert layer.packed_tokens == [(length - pad) // 64 * 64 for pad in padding]
    everywhere = torch.ones(1, 1, 1, length).bool().expand(-1, -1, length, -1)
    out = attend(tokens.queries, layer, Scoring(0.125, everywhere))
    expected = _expected(tokens.queries, layer, Scoring(0.125, _padded(everywhere, padding)))
    _assert_close(out, expected, atol=2e-3)
    causal = attend(tokens.queries, layer, Scoring(0.125))
    assert (causal - out)[:, :, max(padding) : max(padding) + 20].abs().max() > 0.1


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
