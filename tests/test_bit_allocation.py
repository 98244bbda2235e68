"""The choice of a configuration: what errors do, how bits are shared out, and what is kept of it."""

import itertools
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from typer.testing import CliRunner

import qjl
import tiny_checkpoint
from models_for_tests import FAMILIES, prompt, tiny
from qjl import architecture, bit_allocation, cli, compat, corpora, hf, presets, sensitivity
from qjl.bit_allocation import Option, allocate, choose
from qjl.compat import cache_argument
from qjl.errors import QJLError
from qjl.lab import demo
from qjl.methods.balanced import Balanced
from qjl.methods.transform import Transform
from tiny_checkpoint import byte_tokenizer

SINKS, WINDOW = 2, 16
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 12


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("QJL_CACHE", str(folder))
    return folder


@pytest.fixture
def short(monkeypatch):
    """Choices from few tokens."""
    for name, tokens in (("ROWS", 1), ("ROW_TOKENS", 256), ("PREFIX", 256), ("DECODE", 64)):
        monkeypatch.setattr(bit_allocation, name, tokens)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny(vocab_size=len(tokenizer), layers=3)


# Sensitivity


def disturbed_logits(model, ids, layer, key_error, value_error):
    """What the model says if this layer's tokens are read with errors from the window on: written apart from ours."""

    def attention(own, module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        group = query.shape[1] // key.shape[1]
        near, far = (key, value), (key + key_error, value + value_error)
        if module.layer_idx != layer:
            far = near
        out = torch.zeros_like(query)
        for t in range(query.shape[2]):
            coded = [SINKS <= n <= t - WINDOW for n in range(t + 1)]
            keys, values = (
                torch.stack([(far if coded[n] else near)[part][:, :, n] for n in range(t + 1)], dim=2)
                for part in (0, 1)
            )
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            weights = (query[:, :, t : t + 1] @ keys.mT * scaling).softmax(-1)
            out[:, :, t] = (weights @ values)[:, :, 0]
        return out.transpose(1, 2), None

    with hf.attention_watched(model, attention), torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


def mean_kl(model, ids, layer, key_error, value_error):
    """Per position that reads codes."""
    full, disturbed = (
        disturbed_logits(model, ids, layer, *errors).log_softmax(-1)
        for errors in ((0 * key_error, 0 * value_error), (key_error, value_error))
    )
    return float((full.exp() * (full - disturbed)).sum()) / (ids.shape[1] - SINKS - WINDOW)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_damage_is_the_kl_of_small_errors(layer, role):
    """Of one word's errors, which are alike at all its places, and of errors of all tokens, independent."""
    model, ids = tiny(dtype=torch.float64), prompt(48)
    ids[0, 20::5] = 7
    probed = sensitivity.probe(model, ids, sinks=SINKS, window=WINDOW, draws=400)[layer]
    generator = torch.Generator().manual_seed(2)
    is_seven = (ids == 7)[:, None, :, None]
    first = 20 if role == "keys" else SINKS
    errors = {
        "one word": torch.randn(1, 1, 1, 32, generator=generator) * is_seven * torch.tensor([1.0, 0])[:, None, None],
        "one token": torch.randn(1, 2, 48, 32, generator=generator) * (torch.arange(48) == first)[:, None],
    }
    for name, error in errors.items():
        size = 0.05 * error / error.norm() * error.count_nonzero() ** 0.5
        none = torch.zeros_like(size)
        pair = (size, none) if role == "keys" else (none, size)
        truth = mean_kl(model, ids, layer, *pair)
        damage = probed.damage(probed.keys + pair[0], probed.values + pair[1])
        assert damage == pytest.approx(truth, rel=0.3), name


def test_independent_errors_add_up():
    model, ids = tiny(dtype=torch.float64), prompt(48)
    probed = sensitivity.probe(model, ids, sinks=SINKS, window=WINDOW, draws=100)[1]
    generator = torch.Generator().manual_seed(3)
    errors = [0.05 * torch.randn(2, *probed.values.shape, generator=generator) for _ in range(12)]
    truth = sum(mean_kl(model, ids, 1, *error) for error in errors) / 12
    expected = sum(probed.damage(probed.keys + key, probed.values + value) for key, value in errors) / 12
    assert expected == pytest.approx(truth, rel=0.3)


def test_damages_of_keys_and_values_add_up():
    probed = sensitivity.probe(tiny(), prompt(80, 2), sinks=SINKS, window=WINDOW)[0]
    keys, values = probed.keys + 0.1, probed.values + 0.2
    both, of_keys, of_values = (
        probed.damage(*pair) for pair in ((keys, values), (keys, probed.values), (probed.keys, values))
    )
    assert both == pytest.approx(of_keys + of_values)
    assert of_keys > 0
    assert of_values > 0
    assert probed.damage(probed.keys, probed.values) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_cached_is_what_transformers_caches(family):
    model, ids = tiny(family), prompt(96)
    probed = sensitivity.probe(model, ids, sinks=SINKS, window=WINDOW)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **cache_argument(cache))
    for layer, one in probed.items():
        torch.testing.assert_close(one.keys, cache.layers[layer].keys, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(one.values, cache.layers[layer].values, atol=1e-4, rtol=1e-3)
        for gradients in (one.key_gradients, one.value_gradients):
            by_token = gradients.abs().sum((0, 1, 2, 4))
            assert (by_token[SINKS:-WINDOW] > 0).all()
            assert not by_token[:SINKS].any()
            assert not by_token[-WINDOW:].any()


def test_layers_that_share_a_cache_are_sensitive_together():
    """Layer 3 of this model reads the cache of layer 1, whose own attention is cut off here."""
    model = tiny("gemma3n")
    with torch.no_grad():
        model.get_decoder().layers[1].self_attn.o_proj.weight.zero_()
    (probed,) = sensitivity.probe(model, prompt(64), sinks=SINKS, window=WINDOW).values()
    assert probed.key_gradients.any()
    assert probed.value_gradients.any()


def test_rows_are_probed_alike_in_any_company():
    ids = prompt(64, 2)
    together = sensitivity.probe(tiny(), ids, sinks=SINKS, window=WINDOW)
    alone = sensitivity.probe(tiny(), ids[:1], sinks=SINKS, window=WINDOW)
    torch.testing.assert_close(together[0].key_gradients[:, :1], alone[0].key_gradients)
    assert together[0].words[0].max() < together[0].words[1].min()


def test_the_model_is_left_as_it_was(monkeypatch):
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def fail(*arguments, **keywords):
        raise RuntimeError("no memory")

    for broken in (False, True):
        if broken:
            monkeypatch.setattr(model.lm_head, "forward", fail)
            with pytest.raises(RuntimeError, match="no memory"):
                sensitivity.probe(model, prompt(64), sinks=SINKS, window=WINDOW)
        else:
            sensitivity.probe(model, prompt(64), sinks=SINKS, window=WINDOW)
        assert model.config._attn_implementation == "sdpa"
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
        assert all(parameter.grad is None for parameter in model.parameters())
        assert sensitivity._current.get(None) is None


def test_probing_works_without_gradients():
    """As under ``torch.inference_mode``, which a user may be in."""
    model, ids = tiny(), prompt(64)
    with torch.inference_mode():
        inside = sensitivity.probe(model, ids, sinks=SINKS, window=WINDOW)
    outside = sensitivity.probe(model, ids, sinks=SINKS, window=WINDOW)
    torch.testing.assert_close(inside[0].key_gradients, outside[0].key_gradients)


def test_a_probe_needs_tokens_beyond_the_window(refuses):
    with refuses("rows of more than 18 tokens, not 18"):
        sensitivity.probe(tiny(), prompt(18), sinks=SINKS, window=WINDOW)


# Allocation


def options(*pairs):
    return [Option(Transform(3), bits, damage) for bits, damage in pairs]


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 30),
    st.integers(1, 3),
)
def test_the_allocation_is_the_best_one(pairs, spare, unit):
    tables = [options(*((unit * bits, damage) for bits, damage in table)) for table in pairs]
    capacity = sum(min(option.bits for option in table) for table in tables) + spare
    picked = allocate(tables, capacity)
    affordable = [every for every in itertools.product(*tables) if sum(one.bits for one in every) <= capacity]
    assert all(one in table for one, table in zip(picked, tables, strict=True))
    assert sum(one.bits for one in picked) <= capacity
    assert sum(one.damage for one in picked) == pytest.approx(
        min(sum(one.damage for one in every) for every in affordable)
    )


def test_of_equals_the_smaller_is_taken():
    picked = allocate([options((2, 0.5), (3, 0.5)), options((2, 0.1), (4, 0.1))], 100)
    assert [one.bits for one in picked] == [2, 2]


def test_equal_neighbours_share_an_override():
    low, high = Transform(1), Transform(4)
    value = Balanced(2, "trellis", metric=False)
    keys = {0: low, 1: high, 2: high, 5: high, 7: low, 8: low, 9: low, 10: low}
    picks = {(layer, "key"): Option(key, 1, 0) for layer, key in keys.items()}
    picks |= {(layer, "value"): Option(value, 1, 0) for layer in keys}
    config = bit_allocation._configuration(picks, pre_rope=True)
    assert (config.key, config.value, config.pre_rope) == (low, value, True)
    assert [(one.first, one.stop) for one in config.overrides] == [(1, 6)]
    assert {layer: config.for_layer(layer) for layer in keys} == {layer: (key, value) for layer, key in keys.items()}


# Choices


@pytest.mark.parametrize("bits", [1.3, 2.5, 3.99])
def test_a_choice_keeps_to_its_budget(model, tokenizer, short, bits):
    config = choose(model, tokenizer, bits, TEXT)
    keys, values = config.bits(32, 3)
    assert bits - 0.3 < (keys + values) / 2 <= bits
    assert qjl.KVCache(model, config).bits == (keys, values)
    assert config.name == f"auto-{bits:g}"
    assert re.fullmatch(
        r"keys \d\.\d\d bits( \(.+ to .+\))?, values \d\.\d\d bits( \(.+ to .+\))?(, before RoPE)?; "
        r"in a probe KL \d\.\d{4}(, the best uniform one \d\.\d{4})?",
        config.summary,
    )


def test_a_choice_under_inference_mode(model, tokenizer, short):
    with torch.inference_mode():
        inside = choose(model, tokenizer, 2.5, TEXT)
    assert choose(model, tokenizer, 2.5, TEXT, refresh=True) == inside


def test_a_choice_serves_wherever_a_preset_does(model, tokenizer, short):
    config = qjl.choose(model, tokenizer, 2.5, TEXT)
    ids = prompt(300)
    settings = {"max_new_tokens": 4, "do_sample": False}
    given_cache = model.generate(ids, **cache_argument(qjl.KVCache(model, config)), **settings)
    enabled = qjl.enable(model, config).generate(ids, **settings)
    assert torch.equal(given_cache, enabled)


def test_decoding_has_the_last_word(model, tokenizer, short, monkeypatch):
    tried = []

    def kl(trial, config):
        tried.append(config)
        return 0.5 if config.pre_rope and not config.overrides else 1.0

    monkeypatch.setattr(bit_allocation._Trial, "kl", kl)
    config = choose(model, tokenizer, 2.5, TEXT)
    assert config.pre_rope
    assert not config.overrides
    assert "KL 0.5000" in config.summary
    assert {one.pre_rope for one in tried} == {False, True}
    assert len(set(tried)) == len(tried)


def test_a_sensitive_layer_gets_the_bits(model, tokenizer, short):
    """Layer 1's values are made a hundred times more important than all others."""
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight *= 10 if index == 1 else 0.1
    config = choose(model, tokenizer, 2.5, TEXT)
    sizes = [config.for_layer(layer)[1].num_bits for layer in range(3)]
    assert sizes[1] == max(sizes) > max(sizes[0], sizes[2])


def test_fractional_bits_are_interpolated_and_left_out_where_they_do_not_pack(tokenizer, short):
    for head_dim, count in ((32, 8), (24, 5)):
        model = tiny(vocab_size=len(tokenizer), head_dim=head_dim)
        shapes = architecture.layer_shapes(model.config)
        lab = bit_allocation._Lab(model, shapes, prompt(256), lambda stage: None)
        keys = lab.table(pre_rope=False)[0, "key"]
        damage = {one.quantizer.num_bits: one.damage for one in keys}
        assert len(keys) == count
        assert sorted(damage) == list(damage)
        assert damage[4] == pytest.approx((damage[3] * damage[5]) ** 0.5)
        assert all(one.bits == 2 * 64 * head_dim * one.quantizer.bits(head_dim) for one in keys)


def test_a_model_without_rope(tokenizer, short):
    config = choose(tiny("gpt2", vocab_size=len(tokenizer)), tokenizer, 2.5, TEXT)
    assert not config.pre_rope


def test_a_model_with_few_quantized_layers(tokenizer, short):
    model = tiny("gemma3", vocab_size=len(tokenizer))
    keys, values = qjl.KVCache(model, choose(model, tokenizer, 2.5, TEXT)).bits
    assert (keys + values) / 2 <= 2.5


def test_refusals(model, tokenizer, short, refuses, monkeypatch):
    for bits in (1, 9, float("nan"), -2.5):
        with refuses("ask for 1.25 to 5.25"):
            choose(model, tokenizer, bits, TEXT)
    with refuses("a text of at least 577 tokens, this one has 5"):
        choose(model, tokenizer, 2.5, "short")
    with refuses("does not use transformers' attention interface"):
        monkeypatch.setattr(compat, "uses_attention_interface", lambda model: False)
        sensitivity.probe(model, prompt(64), sinks=SINKS, window=WINDOW)
    monkeypatch.setattr(model.config, "max_position_embeddings", 300)
    with refuses("model's context is 300"):
        choose(model, tokenizer, 2.5, TEXT)


# What is kept


def test_a_choice_is_kept(model, tokenizer, short, cache_folder, monkeypatch):
    stages = []
    first = choose(model, tokenizer, 2.5, TEXT, on_stage=stages.append)
    (path,) = (cache_folder / "choices").iterdir()
    assert stages
    stages.clear()
    assert choose(model, tokenizer, 2.5, TEXT, on_stage=stages.append) == first
    assert not stages
    path.write_text(path.read_text().replace("auto-2.5", "auto-kept"))
    assert choose(model, tokenizer, 2.5, TEXT).name == "auto-kept"
    assert choose(model, tokenizer, 2.5, TEXT, refresh=True) == first
    assert choose(model, tokenizer, 2.5, TEXT).name == "auto-2.5"
    choose(model, tokenizer, 2.5, "x" + TEXT)
    choose(model, tokenizer, 2.75, TEXT)
    choose(tiny(vocab_size=len(tokenizer), layers=3, seed=1), tokenizer, 2.5, TEXT)
    assert len(list((cache_folder / "choices").iterdir())) == 4
    assert [entry.name for entry in cache_folder.iterdir()] == ["choices"]


def test_a_choice_for_a_model_without_a_name_is_not_kept_and_says_why(model, tokenizer, short, cache_folder, caplog):
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    qjl.choose(model, tokenizer, 2.5)
    hook.remove()
    assert not (cache_folder / "choices").exists()
    assert "model.layers.0 has a forward hook of test_bit_allocation, which may change what it computes" in caplog.text


def test_a_failed_choice_leaves_no_file(model, tokenizer, short, cache_folder, monkeypatch):
    def fail(*arguments):
        raise QJLError("no luck.")

    monkeypatch.setattr(bit_allocation._Trial, "kl", fail)
    with pytest.raises(QJLError, match="no luck"):
        choose(model, tokenizer, 2.5, TEXT)
    assert not (cache_folder / "choices").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format": "qjl-choice-1"}', '{"format": "qjl-choice-1", "config": {"key": 1}}', "old"]
)
def test_a_damaged_file(model, tokenizer, short, refuses, content):
    path = bit_allocation._path(model, 2.5, TEXT)
    path.parent.mkdir(parents=True)
    known = {"format": "qjl-choice-0", "config": presets.to_dict(qjl.PRESETS["b3"])}
    path.write_text(json.dumps(known) if content == "old" else content)
    with refuses("is damaged or of another version: delete it"):
        choose(model, tokenizer, 2.5, TEXT)


# The command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(short, checkpoint, monkeypatch):
    monkeypatch.setattr(corpora, "essays", lambda: demo.ESSAY_OPENING + " " + TEXT)

    def invoke(command, *arguments, stdin=None):
        return CliRunner().invoke(cli.app, [*command.split(), "--model", checkpoint, *arguments], input=stdin)

    return invoke


SMALL = ("--prefix", "256", "--decode", "64", "--chunks", "1", "--seeds", "1", "--no-retrieval")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("generate", ("hello", "--max-new-tokens", "2", "--json")),
        ("demo", ("--prompt-tokens", "320", "--max-new-tokens", "2", "--json")),
        ("eval fidelity", (*SMALL, "--json")),
    ],
)
def test_bits_stand_in_for_a_preset(run, command, arguments):
    result = run(command, *arguments, "--bits", "2.5")
    assert result.exit_code == 0, result.output
    (told,) = map(json.loads, result.stdout.splitlines())
    assert told["preset"] == "auto-2.5"
    assert re.search(r"^auto-2\.5: keys .* KL \d", result.stderr, re.M)


def test_chat_takes_bits(run):
    result = run("chat", "--max-new-tokens", "2", "--bits", "2.5", stdin="hello\n")
    assert result.exit_code == 0, result.output
    assert " tokens in " in result.stdout


@pytest.mark.parametrize("command", ["generate hello", "demo", "chat", "eval fidelity"])
def test_bits_and_a_preset_exclude_each_other(run, command):
    result = run(command, "--bits", "2.5", "--preset", "b3")
    assert (result.exit_code, result.stderr) == (2, "Error: --preset and --bits were both given: give one of them.\n")


def test_bits_out_of_range(run):
    result = run("generate", "hello", "--bits", "17")
    assert result.exit_code == 2
    assert re.fullmatch(
        r"Error: 17 bits cannot be had by choice on this model: ask for [\d.]+ to [\d.]+\.\n", result.stderr
    )
