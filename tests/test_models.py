"""The loader: a tiny Llama written as GGUF comes back with the weights and logits it had."""

import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qjl import download, models
from qjl.errors import QJLError
from qjl.lab import reuploads as reuploads

BYTES = list(bytes_to_unicode().values())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "he", "hel"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QJL_CACHE", str(folder))
    return folder


def tiny_llama(rope=None):
    """A random Llama of 2 layers with 4 heads over 2 key heads, and untied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def permuted(weight, heads):
    """The row order in which llama.cpp keeps query and key weights."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_weights(model):
    """Weights of a tiny Llama by their GGUF names, in llama.cpp's layout."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {".attn_q.": model.config.num_attention_heads, ".attn_k.": model.config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        gguf_name = names.get_name(name, (".weight",))
        turned = next((count for part, count in heads.items() if part in gguf_name), None)
        yield gguf_name, permuted(weight, turned) if turned else weight


def rope_factors(config):
    """How much slower each rotary frequency turns than its default, as llama.cpp writes it."""
    default = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "rope_parameters": {"rope_type": "default"}}))
    return default.model.rotary_emb.inv_freq / LlamaForCausalLM(config).model.rotary_emb.inv_freq


def write_gguf(path, model, omit=()):
    """Write a tiny Llama with a byte-level tokenizer to a GGUF file, without the weights in ``omit``."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(config).numpy())
    for name, weight in gguf_weights(model):
        if name not in omit:
            writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer):
    """Add the vocabulary, its merges and the chat template."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


@pytest.fixture
def source():
    """The model that a GGUF file is written from."""
    return tiny_llama()


@pytest.fixture
def tiny(tmp_path, source):
    """A GGUF file of ``source``."""
    return write_gguf(tmp_path / "tiny.gguf", source)


@torch.no_grad()
def logits(model, length=100):
    """Logits of a fixed sequence, 1 x length x vocabulary."""
    return model(torch.arange(length)[None] % len(TOKENS)).logits


def test_a_gguf_comes_back_with_its_weights_and_logits(tiny, source):
    model, tokenizer = models.load(str(tiny), progress=False)
    loaded = model.state_dict()
    assert not model.training
    assert all(torch.equal(loaded[name], weight) for name, weight in source.state_dict().items())
    assert torch.equal(logits(model), logits(source))
    assert tokenizer("hello").input_ids == [TOKENS.index(token) for token in ("hel", "l", "o")]


def test_the_rotary_factors_of_llama_3_are_kept(tmp_path):
    source = tiny_llama(LLAMA3_ROPE)
    model, _ = models.load(str(write_gguf(tmp_path / "llama3.gguf", source)))
    assert (logits(source) - logits(tiny_llama())).abs().max() > 1e-4
    torch.testing.assert_close(logits(model), logits(source))


def test_chat_template_and_end_of_turn_are_kept(tiny):
    model, tokenizer = models.load(str(tiny))
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>hi<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == TOKENS.index("<|im_end|>")


def test_a_gguf_is_converted_once_per_content(tiny, tmp_path, monkeypatch):
    first = models.fetch(str(tiny))
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted again"))
    copy = tmp_path / "copy"
    copy.write_bytes(tiny.read_bytes())
    assert models.fetch(str(copy)) == first


def test_two_conversions_at_once_agree_and_leave_nothing_behind(tiny, cache):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(models.fetch, [str(tiny)] * 2))
    assert folders[0] == folders[1]
    assert [path.name for path in cache.iterdir()] == ["models"]
    assert AutoModelForCausalLM.from_pretrained(folders[0])


def test_a_folder_loads_in_the_asked_dtype(tiny):
    folder = models.fetch(str(tiny))
    assert models.fetch(str(folder)) == folder
    assert models.load(str(folder))[0].dtype == torch.float32
    assert models.load(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert models.load(str(folder), dtype=torch.float16)[0].dtype == torch.float16


def test_configuration_and_tokenizer_load_alone(tiny):
    assert models.load_config(str(tiny)).num_key_value_heads == 2
    assert len(models.load_tokenizer(str(tiny))) == len(TOKENS)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_weights_bytes_count_tied_weights_once(dtype, width):
    config = tiny_llama().config
    config.dtype = dtype
    untied = models.weights_bytes(config)
    config.tie_word_embeddings = True
    assert untied == width * sum(weight.numel() for weight in tiny_llama().parameters())
    assert untied - models.weights_bytes(config) == width * config.vocab_size * config.hidden_size


@pytest.mark.parametrize("share", [0.0005, 0.1, 0.9, 0.999])
def test_a_truncated_gguf_says_so_and_leaves_nothing(tiny, cache, share):
    tiny.write_bytes(tiny.read_bytes()[: int(tiny.stat().st_size * share)])
    with pytest.raises(QJLError, match=r"cannot be converted.*damaged"):
        models.load(str(tiny))
    assert not list(cache.iterdir())


def test_a_gguf_without_all_weights_says_so(tmp_path, source):
    broken = write_gguf(tmp_path / "broken.gguf", source, omit=["blk.1.attn_v.weight"])
    with pytest.raises(QJLError, match=r"misshapen weights: 1, the first model\.layers\.1\.self_attn\.v_proj"):
        models.load(str(broken))


def test_a_file_of_another_kind_is_no_gguf(tmp_path):
    (tmp_path / "notes.gguf").write_text("notes")
    with pytest.raises(QJLError, match="is not a GGUF file"):
        models.load(str(tmp_path / "notes.gguf"))


@pytest.mark.parametrize("name", ["missing.gguf", "/missing/folder", "./missing", "a/b/c"])
def test_a_missing_path_says_what_to_give(name):
    with pytest.raises(QJLError, match=f"there is no {name}: give a folder or file"):
        models.load(name)


def test_a_folder_without_configuration_says_so(tmp_path):
    with pytest.raises(QJLError, match=r"has no config\.json"):
        models.load(str(tmp_path))


def test_a_damaged_conversion_says_what_to_delete(tiny):
    folder = models.fetch(str(tiny))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(QJLError, match=r"converted model in .* is damaged .*: delete that folder"):
        models.load(str(tiny))


def test_a_hub_name_out_of_reach_says_what_to_do():
    with pytest.raises(QJLError, match="download it first where there is a network, or give a folder"):
        models.load("nobody/no-such-model", local_files_only=True)


def test_a_known_model_is_not_downloaded_when_that_is_forbidden():
    with pytest.raises(QJLError, match=r"smollm2 is not in .* yet: load it once with downloads allowed"):
        models.load("smollm2", local_files_only=True)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_an_unknown_device_says_so(device):
    with pytest.raises(QJLError, match="unknown or not available here"):
        models.load("smollm2", device=device)


def test_an_unknown_dtype_names_the_known_ones():
    with pytest.raises(QJLError, match="use one of float32, float16, bfloat16"):
        models.load("smollm2", dtype="int3")


def test_a_cache_that_is_no_folder_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tiny / "inside-a-file"))
    with pytest.raises(QJLError, match="cannot write to the cache folder"):
        models.load(str(tiny))


def test_too_little_space_says_so(tiny, cache, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: download.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(QJLError, match="free some space"):
        models.load(str(tiny))
    assert not list(cache.iterdir())


def test_known_models_are_pinned_and_the_library_knows_the_embedded_one_alone():
    known = [*models.REGISTRY.values(), *reuploads.REUPLOADS.values()]
    pins = [wheel.sha256 for model in known for wheel, _ in model.parts]
    assert len(set(pins)) == len(pins) == 1 + 6 + 22
    assert all(len(pin) == 64 for pin in pins)
    assert list(models.REGISTRY) == [models.EMBEDDED]


def test_the_lab_fetches_reuploads_by_name_alone(tiny, monkeypatch):
    """Other names are left to the library, which does not know these."""
    monkeypatch.setattr(models, "_join", lambda known, folder, bar: tiny)
    folder = reuploads.place("qwen2.5-coder-0.5b", progress=False)
    model, _ = models.load(folder)
    assert model.config.num_hidden_layers == 2
    assert reuploads.place(str(tiny)) == str(tiny)
    with pytest.raises(QJLError, match=r"no model 'qwen2\.5-coder-0\.5b' is here"):
        models.load("qwen2.5-coder-0.5b", local_files_only=True)


def test_a_gguf_file_asks_for_the_package_that_reads_it(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in (str(tiny), models.EMBEDDED):
        with pytest.raises(QJLError, match=r"pip install 'qjl\[gguf\]'"):
            models.load(name)


@pytest.fixture(scope="module")
def smollm2():
    """The embedded model, from the user's own cache folder."""
    return models.load(models.EMBEDDED)


@pytest.mark.model
def test_the_embedded_model_answers_and_stops(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.model
def test_the_embedded_model_has_its_size(smollm2):
    model, _ = smollm2
    assert models.weights_bytes(model.config) == 4 * 134_515_008
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim) == (
        30,
        3,
        64,
    )
