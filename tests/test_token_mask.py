"""Token masks: only marked tokens are quantized, in whole blocks; all others stay exact."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache

import oracles
import qjl
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
from qjl.attention import Scoring, attend, causal_mask
from qjl.cache import CacheLayer, LayerSource
from qjl.compat import cache_argument
from qjl.methods.balanced import Balanced
from qjl.methods.identity import Identity
from qjl.methods.qjl import QJL
from qjl.methods.transform import Transform
from qjl.methods.uniform import TokenUniform
from qjl.packed import BLOCK
from qjl.presets import PRESETS
from qjl.runs import ENDLESS
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
    return CacheLayer(key or QJL(), value or TokenUniform(), **settings)


def random_tokens(length, batch=1, head_dim=8, seed=0):
    return torch.randn(batch, 1, length, head_dim, generator=torch.Generator().manual_seed(seed))


def put(layer, x, mask=None):
    if mask is not None:
        layer.mark(mask)
    layer.append(x, -x)
    layer.settle()
    return layer


def is_exact(layer, x, row=0):
    """Which tokens of a row are held as they came, ``bool [T]``."""
    return (layer.dense()[0][row] == x[row]).all(-1).all(0)


# What is packed


@pytest.mark.parametrize("sinks", [0, 4, 10])
@pytest.mark.parametrize("recent", [0, 8, 30])
def test_an_image_between_texts_is_packed_and_the_texts_are_exact(sinks, recent):
    x = random_tokens(10 + 576 + 30)
    layer = put(layer_of(sinks=sinks, recent=recent), x, marked(616, (10, 586)))
    assert layer.packed_tokens == [9 * BLOCK]
    exact_tokens = is_exact(layer, x)
    assert exact_tokens[:10].all()
    assert exact_tokens[586:].all()
    assert not exact_tokens[10:586].any()
    assert layer.exact_nbytes == 40 * 2 * 8 * 4


def test_the_window_holds_the_end_of_an_image_until_text_follows():
    x = random_tokens(616)
    layer = put(layer_of(sinks=4, recent=32), x, marked(616, (10, 586)))
    assert layer.packed_tokens == [8 * BLOCK]
    for size, blocks in ((1, 8), (1, 9), (300, 9)):
        put(layer, random_tokens(size))
        assert layer.packed_tokens == [blocks * BLOCK]


def test_the_rest_of_a_run_stays_exact():
    x = random_tokens(400)
    layer = put(layer_of(sinks=0, recent=0), x, marked(400, (3, 103), (104, 160), (200, 328)))
    exact_tokens = is_exact(layer, x)
    assert (~exact_tokens).nonzero().flatten().tolist() == [*range(3, 67), *range(200, 328)]
    assert layer.packed[0].first_tokens().tolist() == [[3, 200, 264]]


def test_sinks_are_exact_even_where_they_are_marked():
    x = random_tokens(200)
    layer = put(layer_of(sinks=5, recent=0), x, marked(200, (2, 133)))
    assert layer.packed[0].first_tokens().tolist() == [[5, 69]]


def test_no_mask_and_a_mask_of_everything_are_the_same():
    x = random_tokens(300)
    layers = [put(layer_of(), x, mask) for mask in (None, marked(300, (0, 300)))]
    assert layers[0].packed_tokens == layers[1].packed_tokens == [256]
    assert torch.equal(*(layer.dense()[0] for layer in layers))


def test_tokens_that_no_mask_speaks_of():
    """They may be quantized as long as there was no mask, and stay exact from then on."""
    x = random_tokens(1000)
    layer = layer_of(sinks=0, recent=0)
    put(layer, x[:, :, :100])
    assert layer.packed_tokens == [64]
    put(layer, x[:, :, 100:300], marked(50, (0, 40)))
    assert layer.packed_tokens == [128], "36 of before and 28 of the mask are a block"
    put(layer, x[:, :, 300:600])
    put(layer, x[:, :, 600:], marked(400, (0, 70)))
    assert layer.packed[0].first_tokens().tolist() == [[0, 64, 600]]
    layer.reset()
    assert put(layer, x).packed_tokens == [960]


def test_a_mask_may_be_given_ahead_and_again():
    x = random_tokens(400)
    ahead = layer_of(sinks=0, recent=0)
    ahead.mark(marked(400, (0, 400)))
    ahead.mark(marked(400, (50, 250)))
    for part in x.split(33, dim=2):
        put(ahead, part)
    assert ahead.packed[0].first_tokens().tolist() == [[50, 114, 178]]


# Same tokens and mask, any arrival, same bytes


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("padding", [(0, 0), (0, 37)], ids=str)
def test_packed_bytes_do_not_depend_on_how_tokens_came(name, padding, tokens, run_through):
    """Two images in one row, a longer one in the other; given with the first chunk, with each, and row by row."""
    config, source = PRESETS[name], LayerSource(tokens.rope)
    mask = torch.cat([marked(LENGTH, (20, 120), (140, 275)), marked(LENGTH, (39, 300))])

    def layer():
        key, value = config.for_layer(20)
        return CacheLayer(key, value, sinks=config.sinks, recent=16, pre_rope=config.pre_rope, source=source)

    run_through(layer(), tokens, [LENGTH])  # fits the codecs
    whole = layer()
    whole.mark(mask)
    run_through(whole, tokens, [LENGTH], padding)
    assert min(whole.packed_tokens) >= 2 * BLOCK
    for size in (1, 50, 100):
        chunked = layer()
        chunked.set_padding(padding)
        for start in range(0, LENGTH, size):
            step = slice(start, start + size)
            chunked.mark(mask[:, step])
            chunked.append(tokens.keys[:, :, step], tokens.values[:, :, step])
            chunked.settle()
        _assert_same_bytes(chunked, whole)
    for row, pad in enumerate(padding):
        alone = layer()
        alone.mark(mask[row : row + 1, pad:])
        alone.append(tokens.keys[row : row + 1, :, pad:], tokens.values[row : row + 1, :, pad:])
        alone.settle()
        _assert_same_bytes(alone, whole, slice(0, 1), slice(row, row + 1))


def _assert_same_bytes(layer, other, rows=slice(None), other_rows=slice(None)):
    assert layer.packed_tokens[rows] == other.packed_tokens[other_rows]
    for packed, twin in zip(layer.packed, other.packed, strict=True):
        blocks = packed.blocks
        assert torch.equal(packed.first_tokens()[rows], twin.first_tokens()[other_rows, :blocks])
        for name, tensor in packed.view().items():
            assert torch.equal(tensor[rows], twin.view()[name][other_rows, :, :blocks])


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
        drafted.crop(column + 1)
    assert straight.packed_tokens == drafted.packed_tokens == [192]
    assert torch.equal(straight.dense()[0], drafted.dense()[0])


@pytest.mark.parametrize("other", [(0, 0), (0, 200)], ids=["waiting", "kept"])
def test_what_was_decided_is_so_after_a_crop(other):
    """The end of a run stays exact, even if a crop takes away what ended it, and whatever another row does."""
    x = random_tokens(300, batch=2)
    mask = torch.cat([marked(200, (0, 30)), marked(200, other)])
    layer = put(layer_of(Stamp(), Stamp(), sinks=0, recent=0), x[:, :, :200], mask)
    layer.crop(20)
    put(layer, x[:, :, 20:], marked(280, (0, 100)).expand(2, -1))
    assert layer.packed[0].block_counts[0] == 1
    assert layer.packed[0].first_tokens()[0, 0] == 20
    assert is_exact(layer, x).nonzero().flatten().tolist() == [*range(20), *range(84, 300)]


def test_a_crop_before_settling_decides_nothing():
    x = random_tokens(300)
    layer = layer_of(sinks=0, recent=0)
    layer.mark(marked(300, (10, 100), (110, 290)))
    layer.append(x, -x)
    layer.crop(280)
    layer.settle()
    assert layer.packed[0].first_tokens().tolist() == [[10, 110, 174]]


def test_rows_of_which_tokens_left_the_window_keep_their_padding():
    """Packed tokens, or kept ones only."""
    mask = torch.cat([marked(200), marked(200, (0, 200))])
    layer = put(layer_of(sinks=0, recent=0), random_tokens(200, batch=2), mask)
    layer.set_padding([1, 2])
    assert layer.padding == [0, 0]


def test_tokens_until_due_counts_to_the_next_block():
    x = random_tokens(700)
    mask = marked(700, (20, 100), (150, 170), (300, 450))
    layer = layer_of(sinks=4, recent=16)
    layer.mark(mask)
    assert layer.tokens_until_due == 1
    put(layer, x[:, :, :1])
    due = []
    while layer.length < 600:
        count = min(layer.tokens_until_due, 600 - layer.length)
        before = layer.packed_tokens[0]
        put(layer, x[:, :, layer.length : layer.length + count - 1])
        assert layer.packed_tokens == [before]
        put(layer, x[:, :, layer.length : layer.length + 1])
        due.append((layer.length, layer.packed_tokens[0] - before))
    assert due == [(20 + 64 + 16, 64), (300 + 64 + 16, 64), (300 + 128 + 16, 64), (600, 0)]
    assert layer.tokens_until_due == ENDLESS


# Memory


def test_all_bytes_are_those_of_packed_and_exact_tokens():
    """Two rows, a long text and a long image: what is packed in one leaves the window, whatever the other does."""
    x = random_tokens(4000, batch=2)
    mask = torch.cat([marked(4000, (3900, 3990)), marked(4000, (0, 4000))])
    whole = put(layer_of(), x, mask)
    chunked = layer_of()
    chunked.mark(mask)
    for part in x.split(100, dim=2):
        put(chunked, part)
    for layer in (whole, chunked):
        assert layer.packed_tokens == [64, 3904]
        exact_tokens = sum(4000 - packed for packed in layer.packed_tokens)
        spare_tokens = layer.exact_nbytes / (2 * 8 * 4) - exact_tokens
        assert 0 <= spare_tokens <= 64, "of the other row, in the window"
        assert layer.nbytes == layer.exact_nbytes + sum(packed.nbytes for packed in layer.packed)
    assert put(layer_of(), x[:1], mask[:1]).allocated_nbytes < 1.1 * whole.allocated_nbytes / 2


def test_text_after_an_image_is_not_copied_at_every_token():
    layer = put(layer_of(), random_tokens(600), marked(600, (0, 600)))
    places = set()
    for _ in range(500):
        put(layer, random_tokens(1))
        places.add(tuple(segment.keys.data_ptr() for segment in layer.segments()[0]))
    assert len(places) < 12


# Attention


def _masks(generator, length):
    yield marked(length).expand(2, -1)
    yield torch.cat([marked(length, (0, 70), (71, 200)), marked(length, (5, 299))])
    yield torch.rand(2, length, generator=generator) > 0.01
    yield torch.cat([marked(length, (200, 270)), marked(length)])


@pytest.mark.parametrize("queries", [1, 7, 300])
@pytest.mark.parametrize("padding", [(0, 0), (5, 5), (40, 0)], ids=str)
@pytest.mark.parametrize("recent", [0, 16])
def test_identity_equals_torch_under_any_mask(queries, padding, recent, tokens, run_through, generator):
    query = tokens.queries[:, :, 300 - queries : 300]
    part = type(tokens)(*(x[:, :, :300] for x in (tokens.keys, tokens.values, tokens.queries)), tokens.rope)
    mask = causal_mask(queries, 300, torch.device("cpu"))
    mask = mask & (torch.arange(300) >= torch.tensor(padding)[:, None])[:, None, None]
    keys, values = (x.repeat_interleave(2, 1) for x in (part.keys, part.values))
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.1)
    is_real = mask.any(-1, keepdim=True)
    packed = []
    for token_mask in _masks(generator, 300):
        layer = CacheLayer(Identity(), Identity(), recent=recent)
        layer.mark(token_mask)
        run_through(layer, part, [150, 150], padding)
        out = attend(query, layer, Scoring(0.1, mask))
        torch.testing.assert_close(out * is_real, (expected * is_real).nan_to_num(), atol=2e-5, rtol=1e-5)
        packed.append(layer.packed_tokens)
    assert packed[0] == [0, 0]
    assert len({tuple(held) for held in packed}) == len(packed)


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("kind", ["causal", "additive"])
@pytest.mark.parametrize(
    ("key", "value"),
    [(QJL(), TokenUniform()), (Transform(3), Balanced(2, "trellis", metric=False))],
    ids=["qjl", "ours"],
)
def test_attention_is_that_over_decoded_tokens(key, value, kind, queries, tokens, run_through, generator):
    layer = CacheLayer(key, value, source=LayerSource(tokens.rope))
    layer.mark(torch.cat([marked(LENGTH, (20, 120), (140, 275)), marked(LENGTH, (39, 300))]))
    run_through(layer, tokens, [LENGTH])
    assert layer.packed_tokens == [192, 256]
    query = tokens.queries[:, :, -queries:]
    mask = causal_mask(queries, LENGTH, torch.device("cpu"))
    if kind == "additive":
        mask = torch.randn(2, 4, queries, LENGTH, generator=generator).masked_fill(~mask, -torch.inf)
    out = attend(query, layer, Scoring(0.125, mask if kind == "additive" else None))
    dense = (x.double().numpy() for x in layer.dense())
    expected = oracles.Attention.out(query.double().numpy(), *dense, 0.125, mask.numpy(), None, None)
    np.testing.assert_allclose(out.double().numpy(), expected, atol=2e-3)


def test_one_image_is_read_without_a_copy():
    """Blocks that follow each other in the same columns of all rows: the attention mask is sliced, not gathered."""
    x = random_tokens(300, batch=2)
    layer = put(layer_of(), x, marked(300, (10, 202)).expand(2, -1))
    packed = layer.segments()[1]
    assert packed.columns == 10
    assert packed.valid is None
    other = put(layer_of(), x, torch.cat([marked(300, (10, 202)), marked(300, (11, 203))]))
    assert other.segments()[1].columns.shape == (2, 192)
    assert other.segments()[1].valid is None


# What is refused


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 5), torch.ones(5, dtype=torch.bool), torch.ones(1, 5, dtype=torch.long)]
)
def test_masks_of_another_kind_are_refused(mask, refuses):
    with refuses("a token mask is bool [B, T]"):
        layer_of().mark(mask)


def test_masks_for_other_rows_are_refused(refuses):
    layer = put(layer_of(name="layer 3"), random_tokens(5, batch=2))
    with refuses("layer 3 holds 2 rows, and the token mask is for 1"):
        layer.mark(marked(5))
    early = layer_of(name="layer 3")
    early.mark(marked(5))
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
    assert set(cache.cores[0].packed_tokens) == {192}


def test_generation_keeps_text_exact(fitted):
    """Keys of the first layer depend on the tokens alone: those of text are to the bit transformers' own."""
    ids, reference = prompt(300), DynamicCache(config=fitted.config)
    cache = qjl.KVCache(fitted, "b3")
    cache.mark(marked(300, (20, 230)))
    new = generate(fitted, ids, tokens=150, cache=cache)
    assert cache.get_seq_length() == 449
    assert all(core.packed_tokens == [192] for core in cache.cores)
    read(fitted, torch.cat([ids, new], dim=1)[:, :449], reference, sizes=(300,))
    exact_tokens = torch.isclose(cache.layers[0].keys, reference.layers[0].keys, atol=1e-5).all(-1).all(1)[0]
    assert (~exact_tokens).nonzero().flatten().tolist() == list(range(20, 212))


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
    assert cache.cores[0].packed_tokens == [192, 128, 0]
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        alone = qjl.KVCache(fitted, "b3")
        alone.mark(mask)
        assert together[index].equal(generate(fitted, row, cache=alone)[0])
        if alone.cores[0].packed:
            ours, theirs = packed_bytes(cache, layer=0, row=index), packed_bytes(alone, layer=0)
            assert all(a[..., : b.shape[-1]].equal(b) for a, b in zip(ours, theirs, strict=True))


def test_a_conversation_with_an_image_in_each_turn(fitted):
    cache, text = qjl.KVCache(fitted, "b3"), prompt(0)
    for turn in range(2):
        text = torch.cat([text, prompt(200, seed=turn)], dim=1)
        fresh = text.shape[1] - cache.get_seq_length()
        cache.mark(marked(fresh, (fresh - 150, fresh - 40)))
        branch = copy.deepcopy(cache)
        text = torch.cat([text, generate(fitted, text, cache=cache, tokens=40)], dim=1)
        assert branch.get_seq_length() == cache.get_seq_length() - fresh - 39
    assert cache.cores[0].packed_tokens == [128]
    assert cache.cores[0].packed[0].first_tokens().tolist() == [[50, 290]]


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
            assert cache.cores[1].packed_tokens == [192]
            assert cache.cores[1].packed[0].first_tokens().tolist() == [[10, 74, 138]]
    assert texts[1].equal(texts[0])
