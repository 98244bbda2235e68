"""Keys stored as they were before RoPE: undone and done again by each token's own position, for any method."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

import oracles
import qjl
from method_cases import BUDGETS, every_head_dim, float64, scores_of
from models_for_tests import build, config_of, exact, generate, left_padded, packed_bytes, prompt, read, tiny
from one_layer import OneLayer, same_tokens
from qjl.architecture import find_rope
from qjl.codecs import Codecs
from qjl.compat import cache_argument
from qjl.hf import own_codecs
from qjl.methods.balanced import Balanced
from qjl.methods.base import POSITIONS, RIDGE, LayerContext, Unrotated
from qjl.methods.identity import Identity
from qjl.methods.kivi import KIVI
from qjl.methods.kvquant import KVQuant
from qjl.methods.transform import Transform
from qjl.packed import BLOCK
from qjl.presets import resolve
from test_architecture import GROWING, ROPES, one_layer, rotated_keys

EXACT = qjl.CacheConfig(Identity(), Identity(), pre_rope=True)
LENGTH = 300
PAGE = Path(__file__).resolve().parent.parent / "docs/pre-rope.md"
KINDS = {
    **{name: ("llama", {"rope_parameters": parameters}) for name, parameters in ROPES.items()},
    "longrope that is fixed": (
        "llama",
        {"rope_parameters": GROWING["longrope"] | {"long_factor": GROWING["longrope"]["short_factor"]}},
    ),
    "partial": ("phi", {}),
    "interleaved": ("cohere", {}),
    "partial and interleaved": ("glm", {}),
    "by kind of layer": ("gemma3", {}),
    "yarn of gpt-oss": ("gpt-oss", {}),
    "norms before it": ("qwen3", {}),
    "not in every layer": ("smollm3", {}),
}
WITHOUT = {"learned positions": ("gpt2", {}), "learned, with an offset": ("opt", {})}
every_kind = pytest.mark.parametrize(("family", "settings"), KINDS.values(), ids=KINDS)
BY_METHOD = {quantizer.method: quantizer for role, quantizer in BUDGETS if role == "key"}
every_method = pytest.mark.parametrize("quantizer", BY_METHOD.values(), ids=BY_METHOD)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


def is_undone(cache):
    """Layer by layer, whether keys are stored before RoPE."""
    return [isinstance(core.codecs[0], Unrotated) for core in cache.cores]


def assert_close(ours, truth):
    torch.testing.assert_close(ours, truth, atol=2e-5, rtol=1e-4)


# Exact, through models


@every_kind
def test_it_is_exact(family, settings):
    model, ids, sizes = tiny(family, **settings), prompt(LENGTH), (150, 100)
    cache = qjl.KVCache(model, EXACT)
    assert_close(read(model, ids, cache, sizes), exact(model, ids, sizes))
    assert cache.packed_tokens == [252]
    assert all(is_undone(cache))


@pytest.mark.parametrize(("family", "settings"), WITHOUT.values(), ids=WITHOUT)
def test_a_model_without_rope_has_nothing_to_undo(family, settings):
    model, ids, sizes = tiny(family, **settings), prompt(LENGTH), (150, 100)
    cache = qjl.KVCache(model, EXACT)
    assert_close(read(model, ids, cache, sizes), exact(model, ids, sizes))
    assert cache.packed_tokens == [252]
    assert not any(is_undone(cache))


POSITIONS_GIVEN = {
    "columns": lambda mask: None,
    "counted in each row": lambda mask: (mask.cumsum(1) - 1).clamp(min=0),
    "from 500 on": lambda mask: torch.arange(500, 500 + mask.shape[1])[None],
}


@pytest.mark.parametrize("positions", POSITIONS_GIVEN.values(), ids=POSITIONS_GIVEN)
@pytest.mark.parametrize("kind", ["default", "llama3", "yarn", "linear", "partial and interleaved"])
def test_what_is_stored_are_the_models_own_keys_before_rope(kind, positions):
    """Of a batch padded on the left, read in chunks; the truth are the keys of each row alone, all at position 0."""
    family, settings = KINDS[kind]
    model, rows = one_layer(family, **settings), [prompt(LENGTH), prompt(LENGTH - 77, seed=1)]
    batch, cache, rope = left_padded(rows), qjl.KVCache(model, EXACT), find_rope(model.config)
    position_ids = positions(batch["attention_mask"])
    for step in (slice(0, 50), slice(50, 200), slice(200, LENGTH)):
        with torch.no_grad():
            model(
                batch["input_ids"][:, step],
                attention_mask=batch["attention_mask"][:, : step.stop],
                position_ids=None if position_ids is None else position_ids[:, step],
                **cache_argument(cache),
            )
    for row, ids in enumerate(rows):
        _, truth = rotated_keys(model, ids)
        truth[..., : rope.rotary_dim] /= rope.scaling
        stored = packed_bytes(cache, row=row)[0].transpose(0, 1).flatten(1, 2)
        tokens = cache.index.blocks[row] * BLOCK
        assert tokens >= 2 * BLOCK
        torch.testing.assert_close(stored, truth[0, :, :tokens], atol=2e-4, rtol=1e-3)


MODES = {
    "one prefill": {},
    "chunked prefill": {"prefill_chunk_size": 70},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["default", "yarn", "partial and interleaved", "not in every layer"])
def test_it_generates_as_at_full_precision(kind, mode):
    """Rows of different lengths, over the edge of a block; guesses that are wrong are cropped."""
    family, settings = KINDS[kind]
    model = tiny(family, **settings)
    rows = [prompt(220), prompt(150, seed=1), prompt(5, seed=2)]
    batch = left_padded(rows[:1] if mode == "prompt lookup" else rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ours, truth = (
        generate(model, ids, tokens=40, attention_mask=mask, cache=cache, **MODES[mode])
        for cache in (qjl.KVCache(model, EXACT), DynamicCache(config=model.config))
    )
    assert ours.equal(truth)


@pytest.mark.parametrize("removed", [60, 150, 299])
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_what_is_cropped_is_read_again(kind, removed):
    family, settings = KINDS[kind]
    model, ids = tiny(family, **settings), prompt(LENGTH)
    cache, truth = qjl.KVCache(model, EXACT), exact(model, ids, (LENGTH,))
    read(model, ids, cache, (LENGTH,))
    cache.crop(-removed)
    assert_close(read(model, ids[:, -removed:], cache, (removed - 20,)), truth[:, -removed:])
    assert cache.packed_tokens[0] >= 3 * BLOCK


def test_decoded_keys_are_those_after_rope():
    """What transformers' own attention reads, and what users may look at."""
    model, ids = tiny(), prompt(LENGTH)
    cache, truth = qjl.KVCache(model, EXACT), DynamicCache(config=model.config)
    for one in (cache, truth):
        read(model, ids, one, (LENGTH,))
    assert_close(cache.layers[1].keys, truth.layers[1].keys)
    model.set_attn_implementation("eager")
    more = prompt(10, seed=5)
    assert_close(read(model, more, cache, (10,)), read(model, more, truth, (10,)))


# What cannot be undone

_SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
REFUSED = {
    "dynamic": config_of("llama", rope_parameters=GROWING["dynamic"]),
    "longrope that grows": config_of("llama", rope_parameters=GROWING["longrope"]),
    "M-RoPE of Qwen2-VL": transformers.Qwen2VLConfig(text_config=_SIZES | _SECTIONS),
    "M-RoPE of Qwen2.5-VL": transformers.Qwen2_5_VLConfig(text_config=_SIZES | _SECTIONS),
    "M-RoPE that the configuration does not name": transformers.Qwen3VLConfig(text_config=_SIZES | {"head_dim": 128}),
    "RoPE that the configuration does not describe": transformers.GPTJConfig(n_embd=128, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_rope_that_is_no_fixed_rotation_is_refused(config, refuses):
    with refuses(f"the RoPE of {config.model_type} is not known as a fixed rotation by position"):
        qjl.KVCache(config, EXACT)
    qjl.KVCache(config, "full")


def test_a_refused_model_is_left_as_it_was(refuses):
    model = build(REFUSED["dynamic"])
    with refuses("choose a preset without pre_rope"):
        qjl.enable(model, "kvquant-3")
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_layers_whose_kind_has_no_rope_need_none():
    """Only the windows of this configuration are rotated, and those are not quantized."""
    config = transformers.BeamConfig(**_SIZES, head_dim=32)
    assert config.rope_parameters["sliding_attention"]
    assert config.rope_parameters["full_attention"] is None
    assert all(rope is None for rope in qjl.KVCache(config, EXACT).codecs.ropes.values())


# Codecs and statistics


@pytest.mark.parametrize("quantizer", [Balanced(2), KVQuant(3)], ids=lambda quantizer: quantizer.method)
def test_a_layer_without_rope_is_told_by_its_statistics(quantizer):
    """Keys with a large bias; the second layer of this SmolLM3 has no RoPE."""
    model = tiny("smollm3", attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.normal_(std=3)
    cache = qjl.KVCache(model, qjl.CacheConfig(quantizer, Identity(), pre_rope=True))
    read(model, prompt(LENGTH), cache, (LENGTH,))
    assert is_undone(cache) == [True, False]


@pytest.mark.parametrize("name", ["b3", "qjl-paper", "kivi-2"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["after first", "before first"])
def test_caches_before_and_after_rope_share_no_codec(name, order):
    """Both kinds on one model, in turns: each stores what it stores alone."""
    model, ids = tiny(head_dim=64), prompt(LENGTH)
    configs = [dataclasses.replace(qjl.PRESETS[name], pre_rope=pre_rope) for pre_rope in (False, True)]
    stored = {}
    for turn in range(2):
        for index in order:
            cache = qjl.KVCache(model, configs[index])
            read(model, ids, cache, (LENGTH,))
            stored[turn, index] = packed_bytes(cache)
            assert is_undone(cache) == [bool(index)] * 2
    for index, config in enumerate(configs):
        alone = qjl.KVCache(model, codecs=own_codecs(model, config))
        read(model, ids, alone, (LENGTH,))
        for turn in range(2):
            assert all(map(torch.equal, stored[turn, index], packed_bytes(alone)))
    assert not all(map(torch.equal, stored[0, 0], stored[0, 1]))


def fitted_before(model, quantizer):
    """The codec as the cache makes it, and the one inside that never sees a rotated key."""
    context = LayerContext(
        "key", model.heads, model.head_dim, torch.device("cpu"), torch.float32, model.statistics(), undone=model.rope
    )
    codec = quantizer.fit(context)
    return Unrotated(codec, model.rope), codec


@pytest.fixture(scope="module")
def blocks_of(model_of):
    """A model and two rows of two blocks of its tokens at different positions."""

    def make(head_dim):
        model = model_of(head_dim=head_dim)
        first = torch.tensor([[4, 68], [1040, 1104]])
        positions = (first[..., None] + torch.arange(BLOCK)).flatten(1)
        return model, model.tokens(positions), first, positions

    return make


@every_method
def test_codes_are_those_of_the_keys_before_rope(quantizer, blocks_of):
    model, tokens, first, positions = blocks_of(64)
    outer, inner = fitted_before(model, quantizer)
    blocks = outer.quantize(tokens.keys, first)
    expected = inner.encode_tokens(model.rope.unrotate(tokens.keys, positions), first)
    assert all(torch.equal(blocks[name], expected[name]) for name in expected)
    decoded = model.rope.rotate(inner.dequantize(blocks, first), positions)
    assert torch.equal(outer.dequantize(blocks, first), decoded)
    assert outer.layout == quantizer.layout(64, torch.float32)
    assert [x.data_ptr() for x in outer.tensors] == [x.data_ptr() for x in inner.tensors]


def score_error(codec, tokens, first):
    """Root mean square error of scores against their spread over tokens, as in the budgets."""
    query = tokens.grouped_queries()
    scores, truth = (
        scores_of(codec, query, codec.quantize(tokens.keys, first), first),
        query @ tokens.keys.transpose(2, 3),
    )
    return float((scores - truth).square().mean().sqrt() / truth.std(-1).square().mean().sqrt())


@every_head_dim
@pytest.mark.parametrize(
    ("quantizer", "budget"), [(Balanced(2), 0.085), (Transform(3), 0.037)], ids=["balanced", "transform"]
)
def test_balanced_codes_before_rope_stay_within_their_budget(quantizer, budget, head_dim, blocks_of):
    model, tokens, first, _ = blocks_of(head_dim)
    assert score_error(fitted_before(model, quantizer)[0], tokens, first) < budget


def test_channels_are_steadier_before_rope(blocks_of):
    """KVQuant's observation (arXiv 2401.18079, section 3.2), on constants per channel."""
    model, tokens, first, _ = blocks_of(64)
    before, after = fitted_before(model, KIVI(2))
    assert score_error(before, tokens, first) < 0.5 * score_error(after, tokens, first)


def test_moments_are_in_the_frame_of_the_keys_before_rope(blocks_of):
    """A query meets a key before RoPE as turned by their distance, so its moment is averaged and the keys' is not."""
    model, *_ = blocks_of(64)
    statistics, rope = model.statistics(), oracles.Rope(model.rope.inv_freq.numpy())
    context = LayerContext("key", 2, 64, torch.device("cpu"), torch.float32, statistics, undone=model.rope)
    ridge = max(RIDGE, 0.05 * 64 / statistics.count)
    keys, queries = context.key_moments()
    for head in range(2):
        plain, averaged = (float64(moment[head]) for moment in (statistics.key_covariance, statistics.query_moment))
        averaged = rope.averaged(averaged, POSITIONS.numpy())
        for ours, truth in ((keys, plain), (queries, averaged)):
            torch.testing.assert_close(
                ours[head], torch.from_numpy(oracles.BalancedMetric.regularised(truth, ridge)), atol=1e-4, rtol=1e-4
            )


# Same tokens, any arrival, same bytes


@pytest.fixture(scope="module")
def tokens(model_of):
    return model_of().first_tokens(LENGTH, batch=2)


def part(tokens, rows, columns):
    return type(tokens)(*(x[rows, :, columns] for x in (tokens.keys, tokens.values, tokens.queries)), tokens.rope)


@every_method
def test_bytes_do_not_depend_on_how_tokens_came(quantizer, tokens, model_of, run_through):
    """In one prefill, in chunks, one by one; and in a row whose first 37 columns are padding."""
    statistics = model_of().statistics()
    config = qjl.CacheConfig(quantizer, Identity(), recent=16, pre_rope=True)
    codecs = Codecs(config, {0: tokens.rope}, lambda layer: statistics)

    def run(tokens, sizes, padding=None):
        return run_through(OneLayer.of(config, codecs), tokens, sizes, padding)

    whole = run(tokens, [LENGTH])
    assert whole.packed_tokens == [252, 252]
    for sizes in ([70] * 4 + [20], [1] * LENGTH):
        other = run(tokens, sizes)
        assert all(same_tokens(whole, other, row, row) for row in range(2))
    padded = run(tokens, [50, LENGTH - 50], padding=[37, 0])
    alone = run(part(tokens, slice(0, 1), slice(37, None)), [LENGTH - 37])
    assert padded.packed_tokens == [188, 252]
    assert same_tokens(padded, whole, 1, 1)
    assert same_tokens(padded, alone)


# As a preset


@pytest.mark.parametrize("pre_rope", [True, False])
def test_a_preset_file_says_so(pre_rope, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"key": {"method": "identity"}, "value": {"method": "identity"}, "pre_rope": pre_rope, "sinks": 0})
    )
    model, ids = tiny(), prompt(LENGTH)
    cache = qjl.KVCache(model, path)
    assert cache.config.pre_rope is pre_rope
    assert_close(read(model, ids, cache), exact(model, ids))
    assert is_undone(cache) == [pre_rope] * 2


def test_the_page_works():
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    names = {"qjl": qjl, "model": tiny()}
    exec(block, names)
    read(names["model"], prompt(LENGTH), names["cache"])
    assert is_undone(names["cache"]) == [True, True]


def test_a_preset_file_says_so_with_true_or_false(tmp_path, refuses):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"key": {"method": "qjl"}, "value": {"method": "uniform"}, "pre_rope": 1}))
    with refuses("pre_rope = 1"):
        resolve(path)
