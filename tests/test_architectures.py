"""One cache for many families: every kind of attention, head and number format that transformers has."""

import pytest
import torch
import transformers
from transformers import DynamicCache

import qjl
from method_cases import one_of_each_codec
from models_for_tests import (
    FAMILIES,
    OWN,
    agreement,
    attending_across,
    build,
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
from qjl.compat import cache_argument

ATTENTIONS = ("sdpa", "eager", OWN)
NOISE = 1e-2  # of the logits: a few codes at an edge; quantization itself is ten times as much


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


def model_with(family, attention, **settings):
    model = tiny(family, **settings)
    if attention != "eager" and not model._supports_sdpa:
        pytest.skip(f"{family} has no sdpa")
    return model


def cache_under(attention, model, preset):
    """A cache of a model whose own attention is ``attention``."""
    cache = qjl.KVCache(model, preset)
    model.set_attn_implementation(attention)
    return cache


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_equals_the_dynamic_cache(family, attention):
    model, ids, sizes = model_with(family, attention), prompt(214), (150, 60)
    model.set_attn_implementation(attention)
    reference = exact(model, ids, sizes)
    cache = cache_under(attention, model, "full")
    torch.testing.assert_close(read(model, ids, cache, sizes), reference, atol=2e-5, rtol=1e-4)
    assert cache.packed_tokens == [124]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_soft_cap_is_what_the_models_attention_makes_of_it(attention):
    """Older versions let sdpa leave it out."""
    references = []
    for cap in (0.1, None):
        model = model_with("gemma2", attention, attn_logit_softcapping=cap)
        model.set_attn_implementation(attention)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 30
        references.append(exact(model, prompt(214), (150, 60)))
        logits = read(model, prompt(214), qjl.KVCache(model, "full"), (150, 60))
        torch.testing.assert_close(logits, references[-1], atol=2e-5, rtol=1e-4)
    assert attention == "sdpa" or difference(*references) > 0.01, "the cap changes nothing"


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt-oss", "cohere", "qwen3-next"])
def test_attention_over_codes_is_the_models_own_over_what_they_decode_to(family, monkeypatch):
    ids, results = prompt(290), []
    for over_codes in (True, False):
        if not over_codes:
            monkeypatch.setattr(qjl.hf.wrapped_attention, "_codes_give_all", lambda *_: False)
        model = tiny(family)
        attention, cache = model.config._attn_implementation, qjl.KVCache(model, "b3")
        results.append((read(model, ids, cache), packed_bytes(cache)))
        assert model.config._attn_implementation == attention
    ours, theirs = results
    assert difference(ours[0], theirs[0]) < NOISE
    assert agreement(ours[1], theirs[1]) > 0.999
    assert difference(ours[0], exact(tiny(family), ids)) > 1e-4, "nothing was quantized"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "glm", "gpt2", "qwen3-next"])
def test_a_padded_row_is_the_row_alone(family):
    model, rows = tiny(family), [prompt(300), prompt(180, seed=1)]
    alone = [generate_logits(model, {"input_ids": row}) for row in rows]
    tokens, logits, cache = generate_logits(model, left_padded(rows))
    for row, (its_tokens, its_logits, its_cache) in enumerate(alone):
        assert tokens[row].equal(its_tokens[0])
        assert difference(logits[row], its_logits[0]) < NOISE
        assert agreement(packed_bytes(cache, row=row), packed_bytes(its_cache)) > 0.999


def generate_logits(model, inputs):
    cache = qjl.KVCache(model)
    result = model.generate(
        **inputs,
        **cache_argument(cache),
        do_sample=False,
        max_new_tokens=6,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[:, -6:], torch.stack(result.logits, dim=1), cache


@pytest.mark.parametrize(
    ("preset", "kv_heads"),
    [(preset, 2) for preset in one_of_each_codec()]
    + [(preset, heads) for preset in ("qjl-2", "b3") for heads in (1, 4)],
)
def test_attentions_read_the_same_codes(preset, kv_heads):
    """Directly, and decoded for transformers' own attention; one, two and four queries per key."""
    model, ids = tiny(kv_heads=kv_heads, head_dim=64), prompt(400)
    read(model, ids, qjl.KVCache(model, preset), (400,))
    results = {}
    for attention in ATTENTIONS:
        cache = cache_under(attention, model, preset)
        results[attention] = generate(model, ids, cache=cache), packed_bytes(cache)
    for attention in ("eager", OWN):
        assert results[attention][0].equal(results["sdpa"][0])
        assert agreement(results[attention][1], results["sdpa"][1]) > 0.999


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.bfloat16), (64, torch.float16)] + [(head_dim, torch.float32) for head_dim in (80, 96, 128, 256)],
    ids=str,
)
def test_head_sizes_and_dtypes(head_dim, dtype):
    model, ids = tiny(head_dim=head_dim, dtype=dtype), prompt(280)
    reference = exact(model, ids, (270,))
    rounding = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert difference(read(model, ids, qjl.KVCache(model, "full"), (270,)), reference) < rounding
    cache = qjl.KVCache(model, "b4")
    logits = read(model, ids, cache, (270,))
    assert logits.dtype == dtype
    assert difference(logits.float(), reference.float()) < 0.06 + rounding
    assert cache.bits == (pytest.approx(4 + 8 / head_dim), pytest.approx(4 + 8 / head_dim))


def test_a_window_of_attention_stays_transformers_own():
    model, ids = tiny("gemma2"), prompt(300)
    cache = qjl.KVCache(model)
    read(model, ids, cache)
    sliding, full = cache.layers
    assert type(sliding) is transformers.cache_utils.DynamicSlidingWindowLayer
    assert sliding.keys.shape[2] < 128
    assert full.store.index.packed_tokens == [252]
    assert cache.is_sliding == [True, False]


def test_linear_attention_stays_transformers_own():
    model = tiny("qwen3-next")
    cache = qjl.KVCache(model)
    reference = DynamicCache(config=model.config)
    assert [type(layer) for layer in cache.layers] == [type(reference.layers[0]), qjl.hf.QuantizedLayer]


def test_assisted_decoding_rolls_sliding_windows_back():
    model, ids = tiny("gemma2"), prompt(300)
    expected = generate(model, ids, cache=qjl.KVCache(model, "full"))
    cache = qjl.KVCache(model, "full")
    assert generate(model, ids, cache=cache, prompt_lookup_num_tokens=4).equal(expected)


@pytest.mark.parametrize(("family", "message"), [("bloom", "attention interface"), ("gpt_neo", "attention interface")])
def test_models_that_hide_their_queries(family, message, refuses):
    sizes = {"vocab_size": 128, "hidden_size": 128, "n_embd": 128, "n_layer": 2, "n_head": 4}
    if family == "gpt_neo":
        sizes |= {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
    model, ids = build(transformers.AutoConfig.for_model(family, **sizes)), prompt(214)
    with refuses(message):
        qjl.KVCache(model, "b3")
    assert not model._forward_pre_hooks
    reference, cache = exact(model, ids, (200,)), qjl.KVCache(model, "full")
    torch.testing.assert_close(read(model, ids, cache, (200,)), reference, atol=2e-5, rtol=1e-4)


def test_encoders_beside_the_decoder_keep_their_attention():
    config = transformers.Qwen2VLConfig(
        text_config=config_of("qwen2", head_dim=32, rope_parameters=None).to_dict()
        | {"hidden_size": 128, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 128},
    )
    model = transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids = prompt(290)
    reference = exact(model, ids)
    cache = qjl.KVCache(model, "b4")
    assert difference(read(model, ids, cache), reference) < 0.1
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "eager"


# Models whose attention is not what the interface's arguments say


def _sized(name, **settings):
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return build(getattr(transformers, name)(**(sizes | settings)))


def _bigbird_pegasus():
    sizes = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    return build(
        transformers.BigBirdPegasusConfig(vocab_size=128, encoder_layers=2, encoder_attention_heads=4, **sizes)
    )


def _gpt_neo():
    kinds = [[["global"], 2]]
    return _sized("GPTNeoConfig", num_layers=2, num_heads=4, attention_types=kinds, intermediate_size=96)


UNUSUAL = {
    "diffllama": lambda: _sized("DiffLlamaConfig", num_key_value_heads=2, intermediate_size=96),
    "bigbird_pegasus": _bigbird_pegasus,
    "bloom": lambda: _sized("BloomConfig", n_layer=2, n_head=4),
    "xglm": lambda: _sized("XGLMConfig", d_model=64, ffn_dim=96, num_layers=2, attention_heads=4),
    "gpt_neo": _gpt_neo,
    "falcon": lambda: _sized("FalconConfig", num_kv_heads=4, new_decoder_architecture=True),
    "jetmoe": lambda: _sized("JetMoeConfig", num_key_value_heads=2, kv_channels=16, num_local_experts=2),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", UNUSUAL)
def test_an_unusual_attention_reads_what_it_wrote(family, batch):
    """In one prompt, in chunks and token by token; values that are changed after they were cached, ALiBi, own masks."""
    model = UNUSUAL[family]()
    ids = torch.cat([prompt(214, seed=seed) for seed in range(batch)])
    for sizes in ((150, 60), (64, 64, 64)):
        reference = exact(model, ids, sizes)
        cache = qjl.KVCache(model, "full")
        torch.testing.assert_close(read(model, ids, cache, sizes), reference, atol=3e-5, rtol=1e-4)
        assert cache.packed_tokens == [124] * batch
    coded = read(model, ids, qjl.KVCache(model, "kivi-4"), (150, 60))
    assert difference(coded, reference) < 0.2


@pytest.mark.parametrize("family", ["diffllama", "bigbird_pegasus"])
def test_statistics_come_from_an_unusual_attention_too(family):
    model, ids = UNUSUAL[family](), prompt(300)
    cache = qjl.KVCache(model, "b3")
    assert difference(read(model, ids, cache), exact(model, ids)) < 0.5
    assert cache.packed_tokens == [252]


def test_dropout_and_gradients_are_the_models_own_with_a_cache_made_before():
    for family in ("llama", "gemma2", "gpt-oss"):
        gradients = []
        for has_cache in (False, True):
            model = tiny(family, attention_dropout=0.1)
            if has_cache:
                qjl.KVCache(model, "full")
            torch.manual_seed(0)
            model.train()(input_ids=prompt(40), labels=prompt(40), use_cache=False).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert (gradient is None) == (gradients[1][name] is None)
            assert gradient is None or gradient.equal(gradients[1][name])


def test_padding_of_the_text_is_none_of_cross_attentions():
    model = attending_across()
    batch = left_padded([prompt(30), prompt(12, seed=1)])
    states = torch.randn(2, 5, 128)
    results = []
    for make in (lambda: DynamicCache(config=model.config), lambda: qjl.KVCache(model, "full")):
        cache = make()
        with torch.no_grad():
            mask = torch.ones(2, 30, 1, 1, dtype=torch.long)
            first = model(**batch, cross_attention_states=states, cross_attention_mask=mask, **cache_argument(cache))
        results.append(first.logits)
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)
    assert [layer.has_text for layer in cache.quantized_layers] == [True, False, True]
    text, across = (store.index for store in cache.stores)
    assert (text.padding, across.padding) == ([0, 18], [0, 0])
