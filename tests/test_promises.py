"""A model that does not use the quantized cache it was given says so: whatever transformers and models come up with."""

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationMixin

import qjl
from models_for_tests import build, config_of, generate, prompt, tiny
from qjl import compat
from qjl.compat import CACHE, cache_argument
from qjl.hf.promises import ENABLED

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
ORIGINAL = 256  # tokens, after which the long factors count


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


def long_rope(family="phi3", **settings):
    rope = LONG | {"original_max_position_embeddings": ORIGINAL}
    return tiny(family, rope_parameters=rope, original_max_position_embeddings=ORIGINAL, **settings)


def returned(model, ids, **settings):
    return model.generate(ids, do_sample=False, return_dict_in_generate=True, **settings)


# LongRoPE: past the original context the whole text is read anew

reads_anew = pytest.mark.skipif(
    CACHE != "cache", reason="older versions of transformers go on with the last token alone, which is told"
)


@pytest.mark.skipif(CACHE == "cache", reason="newer versions of transformers read the whole text anew")
def test_a_version_that_forgets_the_text_where_rope_changes_is_told(refuses):
    model = long_rope()
    with refuses("Phi3ForCausalLM was to use a quantized cache and went on without it"):
        generate(model, prompt(ORIGINAL - 16), tokens=40, cache=qjl.KVCache(model, "full"))


@reads_anew
@pytest.mark.parametrize("length", [ORIGINAL - 16, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL])
@pytest.mark.parametrize("how", ["given", "enabled"])
def test_the_cache_is_kept_where_rope_changes(length, how):
    model, ids = long_rope(), prompt(length)
    expected = generate(model, ids, tokens=40, cache=DynamicCache(config=model.config))
    if how == "given":
        cache = qjl.KVCache(model, "full")
        assert generate(model, ids, tokens=40, cache=cache).equal(expected)
    else:
        result = returned(qjl.enable(model, "full"), ids, max_new_tokens=40, min_new_tokens=40)
        assert result.sequences[:, length:].equal(expected)
        cache = result[CACHE]
    assert cache.get_seq_length() == length + 39
    assert cache.packed_tokens[0] >= length - 96


@reads_anew
def test_a_padded_batch_keeps_its_padding_where_rope_changes():
    model = long_rope()
    ids = prompt(ORIGINAL - 6, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    texts = []
    for make in (lambda: DynamicCache(config=model.config), lambda: qjl.KVCache(model, "full")):
        texts.append(generate(model, ids, tokens=20, attention_mask=mask, cache=(cache := make())))
    assert texts[0].equal(texts[1])
    assert cache.index.padding == [0, 50]


@reads_anew
def test_a_conversation_goes_on_past_the_original_context():
    model, text = long_rope(), prompt(ORIGINAL - 20)
    cache = qjl.KVCache(model, "b3")
    for turn in range(3):
        text = torch.cat([text, prompt(20, seed=turn)], dim=1)
        text = torch.cat([text, generate(model, text, cache=cache)], dim=1)
        assert cache.get_seq_length() == text.shape[1] - 1


# Promises that are broken


def drop_the_cache(model):
    """As models do that make one of their own."""
    prepare = model.prepare_inputs_for_generation

    def prepared(*args, **kwargs):
        return prepare(*args, **kwargs) | {CACHE: None}

    model.prepare_inputs_for_generation = prepared


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("how", ["given", "enabled"])
def test_a_cache_that_is_dropped_is_missed_at_the_first_pass(how, settings, refuses):
    model, passes = tiny(), []
    cache = qjl.KVCache(model, "full")
    if how == "enabled":
        qjl.enable(model, "full")
    drop_the_cache(model)
    model.register_forward_hook(lambda *_: passes.append(1))
    with refuses("LlamaForCausalLM was to use a quantized cache and went on without it (transformers"):
        model.generate(prompt(), max_new_tokens=5, **({"cache": cache} if how == "given" else {}), **settings)
    assert len(passes) == 1


def test_a_version_that_never_prepares_a_cache_is_told(monkeypatch, refuses):
    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", lambda *args, **kwargs: None)
    model = qjl.enable(tiny(), "full")
    with refuses("was to use a quantized cache and went on without it"):
        model.generate(prompt(20), max_new_tokens=2)


def test_a_decoding_of_the_users_own_that_does_without_is_told(refuses):
    model = qjl.enable(tiny(), "full")
    with refuses("was to use a quantized cache and never gave it a token"):
        model.generate(prompt(20), custom_generate=lambda model, input_ids, **settings: input_ids)


def test_a_forward_pass_that_ignores_its_cache_is_told(refuses):
    class Forgetful(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            kwargs.pop(CACHE, None)
            return super().forward(input_ids, **kwargs)

    model = Forgetful(config_of("llama")).eval()
    with refuses("Forgetful was to use a quantized cache and did not look at it"):
        model(prompt(20), **cache_argument(qjl.KVCache(model, "full")))
    assert model(prompt(20)).logits.isfinite().all()


@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
def test_a_cache_is_found_under_both_keywords(keyword):
    model = tiny()
    cache = qjl.KVCache(model, "full")
    with torch.no_grad():
        model(prompt(20), **{keyword: cache})
    assert cache.get_seq_length() == 20
    model.generate(prompt(30), **{keyword: cache}, max_new_tokens=2)
    assert cache.get_seq_length() == 31


def test_a_model_is_free_of_what_another_owes():
    """An assistant without a quantized cache, beside a model with one; and guidance, which reads by itself."""
    model, assistant = tiny(), tiny(layers=1)
    ids, expected = prompt(), generate(tiny(), prompt())
    for settings in ({"assistant_model": assistant}, {"guidance_scale": 1.0}, {"num_beams": 1}):
        assert generate(qjl.enable(model, "full"), ids, **settings).equal(expected)
    guided = [generate(one, ids, guidance_scale=1.5) for one in (tiny(), qjl.enable(tiny(), "full"))]
    assert guided[0].equal(guided[1])


def test_a_failed_pass_leaves_nothing_behind():
    model = tiny()
    cache = qjl.KVCache(model, "full")
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10**6), **cache_argument(cache))
    stance = torch.compiler.set_stance("default")
    assert stance.prev.stance == "default"
    assert generate(model, prompt()).equal(generate(tiny(), prompt()))


# What enable can know


def own_caches():
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    yield (
        "minimax",
        transformers.MiniMaxConfig(**sizes, num_key_value_heads=2, intermediate_size=64, num_local_experts=2),
    )
    yield "xlnet", transformers.XLNetConfig(vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=64)
    yield "openai-gpt", transformers.OpenAIGPTConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4)


@pytest.mark.parametrize(("name", "config"), own_caches(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("use", [qjl.enable, qjl.KVCache])
def test_a_model_with_a_cache_of_its_own_is_refused_at_once(name, config, use, refuses):
    model = build(config)
    with refuses(name):
        use(model, "full")
    assert not model._forward_pre_hooks
    assert ENABLED not in vars(model)


def test_a_model_that_writes_by_an_inner_one_is_enabled_inside():
    config = transformers.Blip2Config(
        text_config={"model_type": "opt", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 64}
        | {"num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 512},
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        qformer_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        num_query_tokens=4,
        image_token_index=5,
    )
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    assert type(model).generate is not GenerationMixin.generate
    qjl.enable(model, "full")
    writer = model.language_model
    result = returned(writer, prompt(40), max_new_tokens=3)
    assert type(result[CACHE]) is qjl.KVCache
    qjl.disable(model)
    assert type(returned(writer, prompt(40), max_new_tokens=3)[CACHE]) is DynamicCache


def test_making_a_cache_leaves_the_model_as_it_was():
    model = tiny(attention="eager")
    before = {name: value for name, value in vars(model).items() if "hooks" not in name}
    cache = qjl.KVCache(model, "b3")
    generate(model, prompt(), cache=cache)
    assert {name: value for name, value in vars(model).items() if "hooks" not in name} == before
    assert model.config._attn_implementation == "eager"
    assert compat.uses_attention_interface(model)
