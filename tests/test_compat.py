"""Names that are private, or differ between versions of transformers and torch: each is there, and in one file."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import qjl
from models_for_tests import generate, prompt, tiny
from qjl import compat

SOURCE = Path(__file__).parent.parent / "src" / "qjl"
OURS = [path for path in SOURCE.rglob("*.py") if path.name != "compat.py"]
PUBLIC = {
    "transformers.utils",
    "transformers.models.auto",
    "transformers.models.auto.configuration_auto",
    "transformers.pytorch_utils",
}
OF_OUR_OWN_CLASSES = {"cache._restore", "torch.Tensor._make_wrapper_subclass"}
NAMES = {
    AttentionInterface: ["get_interface"],
    GenerationMixin: [
        "generate",
        "_prepare_cache_for_generation",
        "_supports_default_dynamic_cache",
        "_update_model_kwargs_for_generation",
    ],
    PreTrainedModel: ["_can_set_attn_implementation", "_supports_sdpa", "get_decoder", "_forward_pre_hooks"],
    PreTrainedConfig: ["get_text_config", "per_layer_config", "sub_configs"],
    compat.Cache: ["activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"],
    torch.compiler: ["set_stance", "disable"],
    torch.Tensor: ["_make_wrapper_subclass"],
    torch.accelerator: ["current_accelerator"],
}


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in NAMES.items() for name in names], ids=lambda x: str(x)
)
def test_a_name_is_there(owner, name):
    owner = tiny() if name == "_forward_pre_hooks" else tiny().config if owner is PreTrainedConfig else owner
    assert hasattr(owner, name), f"{name} has gone from {owner} in {compat.versions()}"


@pytest.mark.parametrize("name", compat.__all__)
def test_what_compat_offers_is_there(name):
    assert hasattr(compat, name)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (AttentionInterface.get_interface, ["attn_implementation", "default"]),
        (GenerationMixin._prepare_cache_for_generation, ["generation_config", "model_kwargs"]),
        (GenerationMixin._update_model_kwargs_for_generation, ["outputs", "model_kwargs"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_method_takes_what_its_wrapper_passes_on(method, names):
    assert list(inspect.signature(method).parameters)[1 : 1 + len(names)] == names


def test_the_keyword_of_the_cache_is_that_of_models_and_of_generate():
    model = tiny()
    for function in (type(model).forward, type(model).prepare_inputs_for_generation):
        assert compat.CACHE in inspect.signature(function).parameters
    output = model(prompt(10), **compat.cache_argument(DynamicCache()))
    assert isinstance(output[compat.CACHE], DynamicCache)
    assert compat.cache_argument(None) == {compat.CACHE: None}


def test_the_keyword_of_the_newest_is_taken_by_all_versions_and_warns_of_nothing(recwarn):
    model = tiny()
    caches = [qjl.KVCache(model, "full") for _ in range(2)]
    model.generate(prompt(20), cache=caches[0], max_new_tokens=2)
    model(prompt(20), cache=caches[1])
    assert [cache.get_seq_length() for cache in caches] == [21, 20]
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_crop_takes_what_transformers_own_layer_takes():
    layer = DynamicLayer()
    layer.update(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8))
    if compat.CROP_TAKES_LENGTHS:
        layer.crop(3)
        assert layer.get_seq_length() == 3
    else:
        with pytest.raises(ValueError, match="negative"):
            layer.crop(3)


def test_a_cache_that_a_user_gave_is_known():
    cache = DynamicCache()
    assert not compat.is_given_by_user(cache)
    generate(tiny(), prompt(20), cache=cache)
    assert compat.is_given_by_user(cache)


def test_the_window_of_a_layer_is_known():
    assert int(compat.window_of(DynamicSlidingWindowLayer(sliding_window=7))) == 7
    assert compat.window_of(DynamicLayer()) is None


def test_sdpa_and_flash_attention_are_known_and_others_are_not():
    functions = transformers.AttentionInterface()
    for name in ("sdpa", "flash_attention_2", "flash_attention_3"):
        found = functions.get_interface(name, print)
        assert compat.is_sdpa_or_flash(found.args[0]), f"{name} is another function in {compat.versions()}"
    assert not compat.is_sdpa_or_flash(functions.get_interface("flex_attention", print).args[0])
    assert functions.get_interface("eager", print).args == (print, True)


@pytest.mark.parametrize(("family", "has_sdpa"), [("llama", True), ("gpt-oss", False)])
def test_support_of_sdpa_is_known(family, has_sdpa):
    attention = next(module for module in tiny(family).modules() if type(module).__name__.endswith("Attention"))
    assert compat.supports_sdpa(type(attention).__module__) is has_sdpa


def test_flash_attention_on_a_cpu_gives_sums():
    query = torch.randn(1, 2, 3, 16)
    out, lse = compat.flash_attention_for_cpu(query, query, query, is_causal=True, attn_mask=None, scale=0.25)
    scores = (0.25 * query @ query.mT).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ query)


@pytest.mark.parametrize("name", sorted(compat._HOMES_OF_GGUF))
def test_what_reads_gguf_files_is_there(name):
    assert compat.gguf_reader(name) is not None


def test_a_reader_of_gguf_files_that_has_gone_is_named(monkeypatch, refuses):
    monkeypatch.setitem(compat._HOMES_OF_GGUF, "no_such_reader", "transformers.integrations.gguf")
    with refuses("transformers.integrations.gguf has no no_such_reader in transformers"):
        compat.gguf_reader("no_such_reader")


def test_the_bar_of_gguf_files_is_there():
    with compat.gguf_bar(print):
        pass


def test_what_a_module_holds_is_read():
    norm = torch.nn.BatchNorm1d(3)
    assert {"weight", "bias", "running_mean"} <= compat.tensors_of(norm).keys()
    assert compat.parts_of(torch.nn.Sequential(norm)) == {"0": norm}
    assert compat.compiled_module(torch.compile(norm)) is norm
    assert compat.has_own_forward(norm)
    norm.register_forward_hook(print)
    assert compat.hooks_of(norm) == [print]
    norm.forward = print
    assert not compat.has_own_forward(norm)


def test_buffers_are_computed_that_no_file_holds():
    model, twin = tiny(), tiny()
    model.model.rotary_emb.inv_freq.zero_()
    compat.compute_buffers(model)
    assert model.model.rotary_emb.inv_freq.equal(twin.model.rotary_emb.inv_freq)


def test_a_method_that_has_gone_is_named(refuses):
    class Empty:
        pass

    with refuses("Empty has no generate in transformers"):
        compat.wrap(Empty, "generate", print)


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_private_is_used_elsewhere(path):
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            assert node.module in PUBLIC, f"{node.module} belongs into compat.py"
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(re.match(r"torch\.(.*\.)?_", name) for name in names), f"{names} belong into compat.py"
    of_others = r"\b(torch(\.\w+)*|model|cache|layer|module|config|generation_config|tokenizer)\._(?!_)\w+"
    found = [match.group() for match in re.finditer(of_others, text)]
    assert not set(found) - OF_OUR_OWN_CLASSES, f"{found} belong into compat.py"
