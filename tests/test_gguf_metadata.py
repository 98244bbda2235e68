"""GGUF files of tiny random models: what their metadata say of numbers is heard, or refused by its name."""

import gguf
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qjl import gguf_metadata, models
from test_models import TOKENS, permuted, write_tokenizer

SCALING = gguf.RopeScalingType
CONFIGS = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "phi3": "Phi3Config",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "stablelm": "StableLmConfig",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    """Some families' tokenizers are of another kind than the one in these files."""

    class Nothing:
        def save_pretrained(self, folder):
            pass

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Nothing())


def tiny(architecture, **settings):
    sizes = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "tie_word_embeddings": architecture.startswith("gemma"),
    }
    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS[architecture])(**sizes | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # so that positions and order matter
            if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                weight.mul_(8)
    return model


def write(path, architecture, model, entries=(), tensors=()):
    """A file of a model; ``entries`` are named without the architecture."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    norm = {"stablelm": "attention.layer_norm_epsilon"}.get(architecture, "attention.layer_norm_rms_epsilon")
    stated = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "rope.freq_base": 1e4,
        norm: getattr(config, "rms_norm_eps", None) or config.layer_norm_eps,
    } | dict(entries)
    for key, value in stated.items():
        add(writer, f"{architecture}.{key}", value)
    write_tokenizer(writer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        own = names.get_name(name, (".weight", ".bias"))
        turned = next((count for part, count in heads.items() if part in own and architecture == "llama"), None)
        weight = permuted(weight, turned) if turned else weight
        weight = weight + 1 if architecture.startswith("gemma") and "norm" in name else weight
        writer.add_tensor(own, weight.contiguous().numpy())
    for name, values in dict(tensors).items():
        writer.add_tensor(name, torch.tensor(values).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def loaded_logits(path):
    loaded = AutoModelForCausalLM.from_pretrained(models.fetch(str(path), progress=False), dtype=torch.float32).eval()
    return logits(loaded)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(200)[None] % len(TOKENS)).logits


def scaling(kind, factor=4.0, **more):
    return {"rope.scaling.type": kind, "rope.scaling.factor": factor} | {
        f"rope.scaling.{k}": v for k, v in more.items()
    }


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
YARN_FILE = scaling("yarn", original_context_length=64)
LONG, SHORT = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": LONG, "short_factor": SHORT}
LONGROPE_TENSORS = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
HEARD = {
    "nothing": ("llama", {}, {}),
    "theta": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope.freq_base": 1e6}),
    "linear": ("llama", {"rope_parameters": LINEAR}, scaling("linear")),
    "linear, no type": ("qwen2", {"rope_parameters": LINEAR}, {"rope.scaling.factor": 4.0}),
    "linear, old key": ("llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
    "type none": ("llama", {}, scaling("none")),
    "yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}, YARN_FILE | {"attention.key_length": 16}),
    "yarn's attention": (
        "qwen2",
        {"rope_parameters": YARN | {"attention_factor": 1.5 * 1.1386294361}},
        YARN_FILE | {"rope.scaling.attn_factor": 1.5},
    ),
    "yarn's betas": (
        "llama",
        {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}},
        YARN_FILE | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
    ),
    "heads of llama": (
        "llama",
        {"head_dim": 32},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
    ),
    "heads of llama, not RoPE's": ("llama", {"head_dim": 32}, {"attention.key_length": 32}),
    "heads of qwen2": ("qwen2", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
    "heads of qwen3": ("qwen3", {"head_dim": 48}, {"attention.key_length": 48, "attention.value_length": 48}),
    "heads of qwen3, not stated": ("qwen3", {"head_dim": 16}, {}),
    "partial rope": (
        "stablelm",
        {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope.dimension_count": 8, "use_parallel_residual": False},
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.sliding_window": 64,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "rope_parameters": GEMMA3_ROPE,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        scaling("linear", 8.0)
        | {"attention.key_length": 32, "attention.value_length": 32, "rope.freq_base": 1e6}
        | {"attention.sliding_window": 64, "attention.sliding_window_pattern": 2},
    ),
    "a window of phi3": ("phi3", {"sliding_window": 64}, {"attention.sliding_window": 64, "rope.dimension_count": 16}),
    "what changes nothing": (
        "llama",
        {},
        {"attention.causal": True, "logit_scale": 1.0, "expert_count": 0, "rope.scaling.finetuned": True},
    ),
    "a scale that is the usual one": ("llama", {}, {"attention.scale": 0.25}),
}


@pytest.mark.parametrize("case", HEARD)
def test_what_a_file_says_is_heard(case, tmp_path):
    architecture, settings, entries = HEARD[case]
    model = tiny(architecture, **settings)
    path = write(tmp_path / "model.gguf", architecture, model, entries=entries)
    torch.testing.assert_close(loaded_logits(path), logits(model), atol=1e-4, rtol=1e-3)


def test_longrope_is_heard(tmp_path):
    """Logits of 200 tokens, which are more than its first length."""
    model = tiny(
        "phi3",
        rope_parameters=LONGROPE | {"original_max_position_embeddings": 64, "attention_factor": 1.25},
        original_max_position_embeddings=64,
    )
    entries = {"rope.dimension_count": 16, "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25}
    path = write(tmp_path / "model.gguf", "phi3", model, entries=entries, tensors=LONGROPE_TENSORS)
    torch.testing.assert_close(loaded_logits(path), logits(model), atol=1e-4, rtol=1e-3)


REFUSED = {
    "rope.scaling.type": ("llama", scaling("ntk"), " = ntk, and only none, linear, yarn, longrope are known"),
    "rope.scaling.attn_factor": ("llama", scaling("linear", attn_factor=1.5), " = 1.5"),
    "rope.scaling.yarn_log_multiplier": ("llama", YARN_FILE | {"rope.scaling.yarn_log_multiplier": 0.1}, " = 0.1"),
    "rope.dimension_count": ("qwen2", {"rope.dimension_count": 8}, " = 8, and its heads have 16"),
    "rope.dimension_sections": ("qwen2", {"rope.dimension_sections": [4, 2, 2, 0]}, ","),
    "attention.value_length": ("llama", {"attention.value_length": 32}, " = 32, and its keys have 16"),
    "attention.head_count_kv": ("llama", {"attention.head_count_kv": [2, 1]}, ", which differs from layer to layer"),
    "attention.sliding_window": ("qwen2", {"attention.sliding_window": 64}, " = 64"),
    "attention.scale": ("llama", {"attention.scale": 0.5}, " = 0.5"),
    "attention.clamp_kqv": ("llama", {"attention.clamp_kqv": 8.0}, " = 8.0"),
    "attention.causal": ("qwen2", {"attention.causal": False}, " = False"),
    "pooling_type": ("qwen2", {"pooling_type": 3}, " = 3"),
    "attn_logit_softcapping": ("llama", {"attn_logit_softcapping": 50.0}, " = 50.0"),
    "final_logit_softcapping": ("qwen3", {"final_logit_softcapping": 30.0}, " = 30.0"),
    "attention.layer_norm_epsilon": ("llama", {"attention.layer_norm_epsilon": 0.5}, " = 0.5"),
    "logit_scale": ("llama", {"logit_scale": 0.5}, " = 0.5"),
    "residual_scale": ("llama", {"residual_scale": 0.25}, " = 0.25"),
    "embedding_scale": ("llama", {"embedding_scale": 12.0}, " = 12.0"),
    "expert_count": ("llama", {"expert_count": 8}, " = 8"),
    "use_parallel_residual": ("llama", {"use_parallel_residual": True}, " = True"),
    "an.entry.of.the.future": ("llama", {"an.entry.of.the.future": "yes"}, " = yes"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_a_model_cannot_have_is_refused_by_its_name(key, tmp_path, refuses):
    architecture, entries, told = REFUSED[key]
    path = write(tmp_path / "model.gguf", architecture, tiny(architecture, head_dim=16), entries=entries)
    with refuses(f"says {architecture}.{key}{told}"):
        models.fetch(str(path), progress=False)


@pytest.mark.parametrize("entries", [scaling("linear"), YARN_FILE])
def test_frequencies_beside_another_scaling_are_refused(entries, tmp_path, refuses):
    tensors = {"rope_freqs.weight": LONG}
    path = write(tmp_path / "model.gguf", "llama", tiny("llama"), entries=entries, tensors=tensors)
    with refuses("says rope_freqs.weight, beside another scaling of RoPE"):
        models.fetch(str(path), progress=False)


def test_a_part_of_a_model_is_refused(tmp_path, refuses):
    path = tmp_path / "model-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with refuses("is one of 2 files"):
        gguf_metadata.require_readable(gguf.GGUFReader(path), str(path))


@pytest.mark.parametrize(("layers", "scalar"), [(46, 16), (26, 32)])
def test_the_largest_gemma_scales_by_its_width(layers, scalar, tmp_path):
    """As llama.cpp has it; the file does not say so."""
    model = tiny("gemma2", head_dim=32, num_hidden_layers=layers, query_pre_attn_scalar=scalar)
    entries = {"attention.key_length": 32, "attention.sliding_window": 4096}
    folder = models.fetch(str(write(tmp_path / "model.gguf", "gemma2", model, entries=entries)), progress=False)
    assert transformers.AutoConfig.from_pretrained(folder).query_pre_attn_scalar == scalar


def test_what_an_earlier_converter_made_is_made_again(tmp_path, monkeypatch):
    path = str(write(tmp_path / "model.gguf", "llama", tiny("llama")))
    before = models.fetch(path, progress=False)
    monkeypatch.setattr(models, "CONVERTER", models.CONVERTER + 1)
    assert models.fetch(path, progress=False) != before
