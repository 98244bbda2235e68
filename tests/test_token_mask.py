"""Token masks: blocks of a row's grid are quantized if all of their tokens are marked; all others stay exact."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache

import oracles
import qjl
from budget import assert_within_budget, trades
from models_for_tests import (
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
from one_layer import OneLayer, same_tokens
from qjl.attention import causal_mask
from qjl.compat import cache_argument
from qjl.methods.balanced import Balanced
from qjl.methods.identity import Identity
from qjl.methods.kivi import KIVI
from qjl.methods.qjl import QJL
from qjl.methods.transform import Transform
from qjl.methods.uniform import TokenUniform
from qjl.presets import PRESETS
from stamp import Stamp

LENGTH = 430


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def tokens(model_of):
    return model_of().first_tokens(LENGTH, batch=2)


def marked(length, *spans):
    """``bool [1, length]``, True in the spans."""
    mask = torch.zeros(1, length, dtype=torch.bool)
    for first, stop in spans:
        mask[:, first:stop] = True
    return mask


def layer_of(key=None, value=None, **settings):
    return OneLayer(key or QJL(), value or TokenUniform(), **settings)


def random_tokens(length, batch=1, head_dim=8, seed=0):
    return torch.randn(batch, 1, length, head_dim, generator=torch.Generator().manual_seed(seed))


def put(layer, x, mask=None):
    if mask is not None:
        layer.cache.mark(mask)
    layer.append(x, -x)
    layer.settle()
    return layer


def coded_blocks(index, row=0):
    """Blocks of a row that are pages."""
    return [block for block in range(index.blocks[row]) if index.table[row, block] >= 0]


# What is packed: blocks of a row's grid all of whose tokens are marked. Which tokens a block has is told by
# tests/test_cache_index.py, in numbers.


@pytest.mark.parametrize("sinks", [0, 4, 10])
@pytest.mark.parametrize("recent", [0, 8, 30])
def test_whole_blocks_of_an_image_are_packed_and_the_texts_are_exact(sinks, recent):
    """An image may begin anywhere: up to 63 of its tokens at each end share a block with text."""
    x = random_tokens(10 + 576 + 30)
    layer = put(layer_of(sinks=sinks, recent=recent), x, marked(616, (10, 586)))
    assert coded_blocks(layer.index) == list(range(1, 9))
    exact_tokens = (layer.dense()[0] == x)[0].all(-1).all(0)
    assert exact_tokens[:64].all()
    assert exact_tokens[576:].all()
    assert not exact_tokens[64:576].any()
    assert layer.core.exact_nbytes == (64 + 40) * 2 * 8 * 4


def test_no_mask_and_a_mask_of_everything_are_the_same():
    x = random_tokens(300)
    layers = [put(layer_of(), x, mask) for mask in (None, marked(300, (0, 300)))]
    assert same_tokens(*layers)
    assert layers[0].packed_tokens == [252]


@pytest.mark.parametrize("name", ["b3", "qjl-2", "kivi-2", "int8"])
@pytest.mark.parametrize("padding", [(0, 0), (0, 37)], ids=str)
def test_what_is_held_does_not_depend_on_how_tokens_came(name, padding, tokens, run_through):
    """Two images in one row, a longer one in the other; given with the first chunk, with each, and row by row."""
    config = dataclasses.replace(PRESETS[name], recent=16)
    mask = torch.cat([marked(LENGTH, (20, 131), (140, 275)), marked(LENGTH, (39, 300))])
    codecs = run_through(OneLayer(config.key, config.value, rope=tokens.rope), tokens, [LENGTH]).codecs
    whole = OneLayer.of(config, codecs)
    whole.cache.mark(mask)
    run_through(whole, tokens, [LENGTH], padding)
    assert [len(coded_blocks(whole.index, row)) for row in range(2)] == [2, 3]
    for size in (1, 50, 100):
        chunked = OneLayer.of(config, codecs)
        chunked.cache.set_padding(padding, [0, 0])
        for start in range(0, LENGTH, size):
            chunked.cache.mark(mask[:, start : start + size])
            chunked.step(tokens, slice(start, start + size))
        assert all(same_tokens(chunked, whole, row, row) for row in range(2))
    for row, pad in enumerate(padding):
        alone = OneLayer.of(config, codecs)
        alone.cache.mark(mask[row : row + 1, pad:])
        alone.append(tokens.keys[row : row + 1, :, pad:], tokens.values[row : row + 1, :, pad:])
        alone.settle()
        assert same_tokens(alone, whole, 0, row)


@pytest.mark.parametrize("draft", [1, 7, 40])
def test_drafts_that_are_taken_back_leave_no_trace(draft):
    """A draft after each token of an image, marked or not, cropped again within the window."""
    x, noise = random_tokens(300), random_tokens(draft, seed=1)
    straight, drafted = (layer_of(Stamp(), Stamp(), sinks=2, recent=40) for _ in range(2))
    mask = marked(300, (10, 210))
    put(straight, x, mask)
    for column in range(300):
        put(drafted, x[:, :, column : column + 1], mask[:, column : column + 1])
        put(drafted, noise, marked(draft, (0, draft * (column % 2))))
        drafted.cache.crop(column + 1)
    assert coded_blocks(straight.index) == [1, 2]
    assert same_tokens(straight, drafted)


def test_a_crop_before_the_pass_ends_ends_it():
    """What was decided stays so, whatever other rows do."""
    x = random_tokens(300, batch=2)
    layer = layer_of(sinks=0, recent=0)
    layer.cache.mark(torch.cat([marked(300, (10, 100), (110, 290)), marked(300, (0, 300))]))
    layer.append(x, -x)
    layer.cache.crop(280)
    assert layer.length == 280
    assert [coded_blocks(layer.index, row) for row in range(2)] == [[2, 3], [0, 1, 2, 3]]


# Memory


def test_all_bytes_are_those_of_packed_and_exact_tokens():
    """Two rows, a long text and a long image: what is packed in one leaves the window, whatever the other does."""
    x = random_tokens(4000, batch=2)
    mask = torch.cat([marked(4000, (3900, 3990)), marked(4000, (0, 4000))])
    whole = put(layer_of(sinks=0), x, mask)
    chunked = layer_of(sinks=0)
    chunked.cache.mark(mask)
    for part in x.split(100, dim=2):
        put(chunked, part)
    for layer in (whole, chunked):
        assert layer.packed_tokens == [64, 3968]
        assert layer.core.exact_nbytes == (4000 - 64 + 32) * 2 * 8 * 4
        assert layer.core.nbytes == layer.core.exact_nbytes + 63 * layer.core.pages.page_bytes
    assert whole.core.allocated_nbytes < 1.3 * whole.core.nbytes


def test_text_after_an_image_is_not_copied_at_every_token():
    layer = put(layer_of(), random_tokens(600), marked(600, (0, 600)))
    places = set()
    for _ in range(500):
        put(layer, random_tokens(1))
        places.add(layer.core.exact.keys.data_ptr())
    assert len(places) < 14


# Attention


def _masks(generator, length):
    yield marked(length).expand(2, -1)
    yield torch.cat([marked(length, (0, 70), (71, 200)), marked(length, (5, 299))])
    yield torch.rand(2, length, generator=generator) > 0.002
    yield torch.cat([marked(length, (100, 270)), marked(length)])


@pytest.mark.parametrize("queries", [1, 7, 290])
@pytest.mark.parametrize("padding", [(0, 0), (5, 5), (40, 0)], ids=str)
@pytest.mark.parametrize("recent", [0, 16])
def test_identity_equals_torch_under_any_mask(queries, padding, recent, tokens, run_through, generator):
    past = 430 - queries
    mask = causal_mask(queries, 430, torch.device("cpu"))
    mask = mask & (torch.arange(430) >= torch.tensor(padding)[:, None])[:, None, None]
    keys, values = (x.repeat_interleave(2, 1) for x in (tokens.keys, tokens.values))
    expected = F.scaled_dot_product_attention(tokens.queries[:, :, past:], keys, values, attn_mask=mask, scale=0.1)
    for token_mask in _masks(generator, 430):
        layer = layer_of(Identity(), Identity(), recent=recent)
        layer.cache.mark(token_mask)
        run_through(layer, tokens, [past - 40, 40], padding)
        out = layer.step(tokens, slice(past, 430), scaling=0.1, mask=mask)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("kind", ["causal", "additive"])
@pytest.mark.parametrize(
    ("key", "value"),
    [(QJL(), TokenUniform()), (Transform(3), Balanced(2, "trellis", metric=False)), (KIVI(2), TokenUniform())],
    ids=["qjl", "ours", "channels"],
)
def test_attention_is_that_over_decoded_tokens(key, value, kind, queries, tokens, run_through, generator):
    layer = layer_of(key, value, rope=tokens.rope)
    layer.cache.mark(torch.cat([marked(LENGTH, (20, 140), (150, 275)), marked(LENGTH, (39, 320))]))
    run_through(layer, tokens, [LENGTH - queries])
    assert [coded_blocks(layer.index, row) for row in range(2)] == [[1, 3], [1, 2, 3, 4]]
    mask = causal_mask(queries, LENGTH, torch.device("cpu"))
    if kind == "additive":
        mask = torch.randn(2, 4, queries, LENGTH, generator=generator).masked_fill(~mask, -torch.inf)
    last = slice(LENGTH - queries, LENGTH)
    layer.append(tokens.keys[:, :, last], tokens.values[:, :, last])
    query, dense = tokens.queries[:, :, last], [x.double().numpy() for x in layer.dense()]
    out = layer.attend(query, mask=mask if kind == "additive" else None)
    expected = oracles.Attention.out(query.double().numpy(), *dense, 0.125, mask.numpy(), None, None)
    if layer.core.pages.operand is not None and trades():
        assert_within_budget(out.double(), torch.from_numpy(expected), layer.core.pages.operand)
    else:
        np.testing.assert_allclose(out.double().numpy(), expected, atol=2e-3)


# What is refused; masks of another kind are by tests/test_cache_index.py


def test_masks_for_other_rows_are_refused(refuses):
    layer = put(layer_of(), random_tokens(5, batch=2))
    with refuses("the cache holds 2 rows, and the token mask is for 1"):
        layer.cache.mark(marked(5))
    early = layer_of(number=3)
    early.cache.mark(marked(5))
    with refuses("the token mask given to layer 3 is for 1 rows and 3 come"):
        put(early, random_tokens(5, batch=3))
    assert early.length == 0


# In transformers


@pytest.fixture(scope="module")
def fitted():
    """A model whose codecs for b3 come from one prompt."""
    model = tiny()
    read(model, prompt(300, seed=7), qjl.KVCache(model, "b3"), sizes=(300,))
    return model


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 70}, {"num_beams": 3}], ids=str)
def test_full_generates_like_the_dynamic_cache(fitted, settings):
    ids, texts = prompt(300), []
    for cache in (DynamicCache(config=fitted.config), qjl.KVCache(fitted, "full")):
        if isinstance(cache, qjl.KVCache):
            cache.mark(marked(300, (20, 230)).expand(settings.get("num_beams", 1), -1))
        texts.append(generate(fitted, ids, tokens=100, cache=cache, **settings))
    assert texts[1].equal(texts[0])
    assert set(cache.packed_tokens) == {128}


def test_generation_keeps_text_exact(fitted):
    """Keys of the first layer depend on the tokens alone: those of text are to the bit transformers' own."""
    ids, reference = prompt(300), DynamicCache(config=fitted.config)
    cache = qjl.KVCache(fitted, "b3")
    cache.mark(marked(300, (20, 230)))
    new = generate(fitted, ids, tokens=150, cache=cache)
    assert cache.get_seq_length() == 449
    assert cache.packed_tokens == [128]
    read(fitted, torch.cat([ids, new], dim=1)[:, :449], reference, sizes=(300,))
    exact_tokens = torch.isclose(cache.layers[0].keys, reference.layers[0].keys, atol=1e-5).all(-1).all(1)[0]
    assert (~exact_tokens).nonzero().flatten().tolist() == list(range(64, 192))


def test_what_is_exact_does_good(fitted):
    """Less of the prompt quantized, less lost; nothing marked, nothing lost."""
    ids = prompt(300)
    reference, losses = exact(fitted, ids), []
    for mask in (None, marked(280, (0, 140)), marked(280)):
        cache = qjl.KVCache(fitted, "b3")
        if mask is not None:
            cache.mark(mask)
        losses.append(difference(read(fitted, ids, cache), reference))
    assert losses[0] > 1.2 * losses[1] > 100 * losses[2]


def test_images_at_other_places_in_each_row_of_a_padded_batch(fitted):
    rows, spans = [prompt(300), prompt(230, seed=1), prompt(120, seed=2)], [(20, 230), (5, 140), (0, 0)]
    masks = [marked(row.shape[1], span) for row, span in zip(rows, spans, strict=True)]
    batch = left_padded(rows)
    cache = qjl.KVCache(fitted, "b3")
    cache.mark(torch.cat([F.pad(mask, (300 - mask.shape[1], 0)) for mask in masks]))
    together = generate(fitted, batch["input_ids"], attention_mask=batch["attention_mask"], cache=cache)
    assert cache.packed_tokens == [128, 64, 0]
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        alone = qjl.KVCache(fitted, "b3")
        alone.mark(mask)
        assert together[index].equal(generate(fitted, row, cache=alone)[0])
        if alone.packed_tokens[0]:
            ours, theirs = packed_bytes(cache, layer=0, row=index), packed_bytes(alone, layer=0)
            assert all(map(torch.equal, ours, theirs))


def test_a_conversation_with_an_image_in_each_turn(fitted):
    cache, text = qjl.KVCache(fitted, "b3"), prompt(0)
    for turn in range(2):
        text = torch.cat([text, prompt(200, seed=turn)], dim=1)
        fresh = text.shape[1] - cache.get_seq_length()
        cache.mark(marked(fresh, (fresh - 150, fresh - 40)))
        branch = copy.deepcopy(cache)
        text = torch.cat([text, generate(fitted, text, cache=cache, tokens=40)], dim=1)
        assert branch.get_seq_length() == cache.get_seq_length() - fresh - 39
    assert coded_blocks(cache.index) == [1, 5]


def test_an_image_of_llava():
    """As in docs/token-mask.md."""
    config = transformers.LlavaConfig(
        text_config=config_of("llama"),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=112,
            patch_size=8,
        ),
        image_token_index=3,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    patches = (112 // 8) ** 2 + 1
    text = prompt(40) + 4 - 4 * (prompt(40) > 100)
    inputs = {
        "input_ids": torch.cat([text[:, :10], torch.full((1, patches), 3), text[:, 10:]], dim=1),
        "pixel_values": torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)),
    }
    texts = []
    for preset in (None, "full", "qjl-paper"):
        cache = DynamicCache(config=model.config.text_config) if preset is None else qjl.KVCache(model, preset)
        if preset is not None:
            cache.mark(inputs["input_ids"] == model.config.image_token_id)
        texts.append(model.generate(**inputs, **cache_argument(cache), max_new_tokens=110, do_sample=False))
        if preset is not None:
            assert coded_blocks(cache.index) == [1, 2]
    assert texts[1].equal(texts[0])
