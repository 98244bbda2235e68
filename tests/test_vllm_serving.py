"""vLLM with our pages, in an environment of its own (`make test-vllm`): every test sees that our backend served."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import qjl
from models_for_tests import tiny
from qjl import models
from qjl.calibration import calibrate
from qjl.presets import PRESETS, to_dict
from qjl.vllm.compat import ONE_PROCESS

pytestmark = pytest.mark.model
TESTS = Path(__file__).parent
LENGTHS = (300, 17, 70, 500, 131, 700, 64, 257)
CALL = {"sampling": {"max_tokens": 32}}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 2048,  # all prompts at once
    "kv_cache_memory_bytes": 32 << 20,
}
BF16_BYTES = 30 * 3 * 2 * 64 * 2  # of one token in SmolLM2: layers, KV heads, keys and values, head_dim
OURS, STOCK = ["QuantizedAttention"], ["CPUAttentionBackendImpl"]


class Served:
    """A calibrated model, and engines that serve it."""

    def __init__(self, folder, home):
        self.folder, self.home = folder, home
        self.environment = (
            os.environ
            | ONE_PROCESS
            | {
                "QJL_CACHE": str(home),
                "HF_HUB_OFFLINE": "1",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                "OMP_NUM_THREADS": "1",
            }
        )

    def start(self, preset, calls, without=(), **engine):
        job, answers = self.home / "job.json", self.home / "answers.json"
        told = {"engine": ENGINE | {"model": str(self.folder)} | engine, "calls": calls, "without": without}
        job.write_text(json.dumps(told))
        return subprocess.run(
            [sys.executable, str(TESTS / "serve_vllm.py"), str(job), str(answers)],
            env=self.environment | {"QJL_VLLM_PRESET": str(preset)},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def serve(self, preset, calls, names=OURS, **engine):
        """What the engine tells, once it is sure which attention served."""
        result = self.start(preset, calls, **engine)
        assert result.returncode == 0, result.stderr[-4000:]
        told = json.loads((self.home / "answers.json").read_text())
        for rank in told["served"]:
            assert rank["names"] == names
            assert (rank["steps"] > 0) == (names == OURS)
        return told


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("qjl")


@pytest.fixture(scope="session")
def model():
    folder = models.fetch("smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def text(model):
    tokenizer = AutoTokenizer.from_pretrained(models.fetch("smollm2"))
    return tokenizer, (TESTS.parent / "LICENSE").read_text()


@pytest.fixture
def calibrated(monkeypatch, home):
    """Caches in transformers find the statistics that vLLM finds."""
    monkeypatch.setenv("QJL_CACHE", str(home))


@pytest.fixture(scope="session")
def smollm2(home, model, text):
    served = Served(models.fetch("smollm2"), home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QJL_CACHE", str(home))
        calibrate(model, text[0], text[1][:5000])
    return served


@pytest.fixture(scope="session")
def preset_of(home):
    """``preset_of(name, field=value)``: the JSON file of a preset with other settings."""

    def write(name, **changes):
        path = home / f"{name}.json"
        path.write_text(json.dumps(to_dict(PRESETS[name]) | {"name": "of a test"} | changes))
        return path

    return write


@pytest.fixture(scope="session")
def aligned(preset_of):
    """b3 whose exact tokens at the start fill a page, so that transformers and vLLM cut blocks at the same tokens."""
    return preset_of("b3", sinks=64)


@pytest.fixture(scope="session")
def prompts(text):
    tokens = text[0](text[1]).input_ids
    return [tokens[100 * i : 100 * i + length] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="session")
def told(smollm2, aligned, prompts):
    """Eight requests together, alone, and again with their prompts cached."""
    call = CALL | {"prompts": prompts}
    return smollm2.serve(aligned, [call, call | {"one_by_one": True, "forget": True}, call])


def texts(call):
    return [answer["tokens"] for answer in call["answers"]]


def served_logprobs(answer):
    return torch.tensor(answer["logprobs"])


def assert_same(answer, expected):
    """But for rounding, and what turns on it: the codes of few tokens, and levels in tables of the kernels."""
    difference = (served_logprobs(answer) - expected).abs()
    assert difference.median() < 1e-3
    assert difference.mean() < 5e-3


@torch.no_grad()
def logprobs(model, prompt, tokens, preset, chunk=2048):
    """Of given tokens, after a prompt that is read in chunks."""
    cache = DynamicCache() if preset is None else qjl.KVCache(model, preset)
    for fed in torch.tensor([prompt]).split(chunk, dim=1):
        logits = model(input_ids=fed, past_key_values=cache, logits_to_keep=1).logits
    found = []
    for token in tokens:
        found.append(float(logits[0, -1].log_softmax(-1)[token]))
        logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
    return torch.tensor(found)


class TestTheSameAnswers:
    """Of ``told``, which takes a minute; tests of one class share a process."""

    def test_eight_requests_together_give_the_texts_of_each_alone(self, told):
        together, alone, _ = told["calls"]
        assert texts(together) == texts(alone)
        assert all(len(tokens) == CALL["sampling"]["max_tokens"] for tokens in texts(together))

    def test_logprobs_are_those_of_our_cache_in_transformers(self, told, model, prompts, aligned, calibrated):
        for index in (1, 4, 5):
            answer = told["calls"][0]["answers"][index]
            ours = logprobs(model, prompts[index], answer["tokens"], aligned)
            assert_same(answer, ours)
        exact = logprobs(model, prompts[index], answer["tokens"], None)
        assert (ours - exact).abs().mean() > 1e-2, "the codes were not read"

    def test_cached_prompts_are_found_and_give_nearly_the_same(self, told):
        _, alone, again = told["calls"]
        assert again["prefix_cache_hits"] > 500
        first = [one[0] == two[0] for one, two in zip(texts(again), texts(alone), strict=True)]
        assert sum(first) >= 7

    def test_five_times_the_tokens_of_bf16_fit(self, told):
        lines, sink_lines = 2, 2  # for each of 8 sequences, of 64 tokens in float32
        assert told["tokens"] >= 5 * ENGINE["kv_cache_memory_bytes"] // BF16_BYTES
        assert told["served"][0]["pool_bytes"] == 8 * (lines + sink_lines) * 64 * 2 * BF16_BYTES

    def test_speculative_decoding_and_long_prompts(self, smollm2, model, aligned, told, prompts, calibrated):
        """Drafts change no text; a prompt of more than one chunk reads its first chunk's codes."""
        long = (prompts[5] + prompts[3]) * 2
        call = CALL | {"prompts": prompts}
        ngrams = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
        calls = [call, call | {"prompts": [long], "forget": True}]
        short_call, long_call = smollm2.serve(aligned, calls, speculative_config=ngrams, max_model_len=4096)["calls"]
        for one in (short_call, long_call):
            assert one["spec_decode_num_accepted_tokens"] > 0
        assert short_call["spec_decode_num_draft_tokens"] > short_call["spec_decode_num_accepted_tokens"]
        assert texts(short_call) == texts(told["calls"][0])
        [answer] = long_call["answers"]
        assert_same(answer, logprobs(model, long, answer["tokens"], aligned))


def test_exact_tokens_alone_give_stock_vllm_s_text(smollm2, preset_of, prompts):
    """A window as long as the context, through our backend: in chunks, in large pages, some waiting for room."""
    call = CALL | {"prompts": prompts}
    stock = smollm2.serve("full", [call], names=STOCK, kv_cache_memory_bytes=256 << 20)["calls"][0]
    scarce = {"block_size": 128, "max_num_batched_tokens": 96, "enable_prefix_caching": False}
    exact = preset_of("b4", recent=1024)
    ours = smollm2.serve(exact, [call], kv_cache_memory_bytes=8 << 20, **scarce)["calls"][0]
    assert texts(ours) == texts(stock)


def test_preempted_requests_read_codes_again(smollm2, model, prompts):
    """Six requests in a cache for three, in small pages, their prompts in pieces of 96 tokens."""
    call = {"prompts": [prompt[:350] for prompt in prompts[::-1][:6]], "sampling": {"max_tokens": 90}}
    small = {"kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 96, "block_size": 16, "max_model_len": 512}
    told = smollm2.serve("b4", [call], **small)["calls"][0]
    assert told["num_preemptions"] > 0
    answer = told["answers"][-1]
    exact = logprobs(model, call["prompts"][-1], answer["tokens"], None)
    assert 1e-4 < (served_logprobs(answer) - exact).abs().mean() < 0.1


def test_two_ranks_share_the_heads(home, aligned):
    """A small random model: each rank keeps one of two KV heads, and together they are one process."""
    small = tiny(heads=4, kv_heads=2)
    served = Served(home / "tiny", home)
    small.save_pretrained(served.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QJL_CACHE", str(home))
        calibrate(small, _Letters(), "0123456789abcdef" * 64)
        prompt = [(7 * i * i + 3) % 127 for i in range(200)]
        told = served.serve(aligned, [CALL | {"prompts": [prompt]}], tensor_parallel_size=2, max_model_len=512)
        [answer] = told["calls"][0]["answers"]
        ours = logprobs(small, prompt, answer["tokens"], aligned)
    assert [rank["heads"] for rank in told["served"]] == [[1, 1], [1, 1]]
    assert_same(answer, ours)


class _Letters:
    """A tokenizer for ``calibrate``: a character is a token."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(letter) % 127 for letter in text]])})


def test_the_benchmark_has_room_for_five_times_the_tokens(smollm2):
    """And both engines go on with the words of their prompts, which is its gate."""
    options = {"model": smollm2.folder, "context": 1024, "requests": 1, "steps": 4, "rounds": 1}
    command = [
        sys.executable,
        "-m",
        "qjl",
        "bench",
        "vllm",
        "--json",
        *(f"--{name}={x}" for name, x in options.items()),
    ]
    result = subprocess.run(command, env=smollm2.environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    stock, ours = map(json.loads, result.stdout.splitlines())
    assert (stock["preset"], stock["attention"]) == ("full", STOCK)
    assert (ours["preset"], ours["attention"]) == ("b3", OURS)
    assert ours["cached_tokens"] > 5 * stock["cached_tokens"]
    assert stock["cached_tokens"] > 0.95 * (1 << 30) / BF16_BYTES


def test_drafts_of_models_are_refused(smollm2):
    """vLLM knows only an upper bound of the lengths then."""
    drafts = {"method": "draft_model", "model": str(smollm2.folder), "num_speculative_tokens": 2}
    result = smollm2.start("b3", [], speculative_config=drafts)
    assert result.returncode != 0
    assert "take drafts of ngram, and not of draft_model" in result.stderr


def test_an_unknown_preset_stops_the_engine(smollm2):
    result = smollm2.start("b33", [])
    assert result.returncode != 0
    assert "unknown preset 'b33': choose one of" in result.stderr


def test_a_vllm_that_lacks_what_the_plugin_uses_does_not_start(smollm2):
    gone = [("vllm._custom_ops", "cpu_attn_reshape_and_cache")]
    result = smollm2.start("b3", [], without=gone)
    assert result.returncode != 0
    assert "lacks vllm._custom_ops.cpu_attn_reshape_and_cache, which the plugin uses: install vLLM" in result.stderr
