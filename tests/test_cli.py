"""The command line as a user meets it: exit codes, one-sentence errors, JSON, and what stays in the cache."""

import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import qjl
import tiny_checkpoint
from qjl import cli, corpora, generation, models, presets
from qjl.cli import common, plan
from qjl.compat import cache_argument
from qjl.conversation import Conversation
from qjl.lab import demo
from qjl.lab.demo import QUESTION

COMMANDS = (
    ["demo"],
    ["generate"],
    ["chat"],
    ["presets"],
    ["plan"],
    ["calibrate"],
    ["report"],
    ["eval"],
    ["eval", "fidelity"],
    ["eval", "frontier"],
    ["eval", "harness"],
    ["cache"],
    *(["cache", name] for name in ("build", "show", "use")),
    *(["eval", name] for name in ("distortion", "perplexity", "seeds", "retrieval", "generate", "smoke")),
)
DEMO_KEYS = {
    "preset",
    "cache_bytes",
    "cache_bytes_full",
    "compression",
    "bits",
    "kl",
    "top1",
    "tokens_per_second",
    "tokens_per_second_full",
    "prompt_tokens",
}
FIDELITY_KEYS = {
    "preset",
    "kl",
    "kl_se",
    "ppl",
    "ppl_full",
    "dppl_percent",
    "top1",
    "retrieval",
    "bits_keys",
    "bits_values",
    "bits",
    "bits_with_window",
    "seeds",
}
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("QJL_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model on disk."""
    return str(tiny_checkpoint.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 35)
    return str(path)


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


def succeed(*arguments, stdin=None):
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def lines_of_json(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_defaults_are_those_of_the_library():
    assert common.DEFAULT_PRESET == presets.DEFAULT_PRESET
    assert common.EMBEDDED == models.EMBEDDED


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_ends_in_an_example(command):
    example = succeed(*command, "--help").stdout.strip().splitlines()[-1]
    assert example.strip().startswith(f"Example: qjl {' '.join(command)}")


def test_help_does_not_wait_for_torch():
    script = (
        "import sys, typer.testing, qjl.cli\n"
        "assert typer.testing.CliRunner().invoke(qjl.cli.app, ['demo', '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_module_is_the_command():
    version = subprocess.run([sys.executable, "-m", "qjl", "--version"], capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, f"qjl {qjl.__version__}\n")
    wrong = subprocess.run(
        [sys.executable, "-m", "qjl", "generate", "hello", "--preset", "b17"], capture_output=True, text=True
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert re.fullmatch(r"Error: unknown preset 'b17': [^\n]+\.\n", wrong.stderr)


def test_control_c_ends_with_130(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "_preset_fields", interrupt)
    assert run("presets", "--json").exit_code == 130


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--preset", "b17"], "unknown preset 'b17'"),
        (["generate", "hi", "--preset", "{tmp}/wrong.json"], "has no field 'num_bit'"),
        (["generate", "hi", "--preset", "{tmp}/none.json"], "does not exist"),
        (["generate", "hi", "--model", "{tmp}/none"], "there is no {tmp}/none"),
        (["generate", "hi", "--model", "{tmp}"], "has no config.json"),
        (["generate", "hi", "--model", "{model}", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["generate", "hi", "--model", "{model}", "--device", "tpu"], "device 'tpu' is unknown"),
        (["generate", "hi", "--temperature", "-1"], "temperature must be 0 or more"),
        (["generate", "hi", "--file", "{tmp}/wrong.json"], "give one of them"),
        (["generate", "--file", "{tmp}/none.txt"], "cannot read {tmp}/none.txt"),
        (["generate", " "], "the prompt is empty"),
        (["generate", "x" * 4000, "--model", "{model}"], "has 4000 tokens and the model's context is 3072"),
        (["cache", "build", "{tmp}/none.txt"], "cannot read {tmp}/none.txt"),
        (["cache", "build", "{tmp}/wrong.json", "-o", "{tmp}/a/b"], "cannot write to {tmp}/a/b"),
        (["cache", "build", "{tmp}/wrong.json", "-o", "{tmp}/wrong.json"], "is the prompt itself"),
        (["cache", "build", "{tmp}/wrong.json", "--preset", "b17"], "unknown preset 'b17'"),
        (["cache", "show", "{tmp}/none.qjl"], "there is no prompt cache {tmp}/none.qjl"),
        (["cache", "show", "{tmp}/wrong.json"], "{tmp}/wrong.json is no prompt cache"),
        (["cache", "use", "{tmp}/none.qjl", "hi", "--model", "{model}"], "there is no prompt cache {tmp}/none.qjl"),
        (["cache", "use", "{tmp}/none.qjl", " "], "the question is empty"),
        (["plan", "{model}", "--memory", "lots"], "memory 'lots' is not a size"),
        (["plan", "{model}", "--memory", "1K"], "the weights alone take"),
        (["plan", "{model}", "--memory", "1G", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["calibrate", "{model}", "--data", "{tmp}/none.txt"], "cannot read {tmp}/none.txt"),
        (["calibrate", "{model}", "--data", "{tmp}/wrong.json"], "at least 256 tokens"),
        (["eval", "fidelity", "--model", "{model}", "--prefix", "3"], "prefix >= 256"),
        (["eval", "fidelity", "--data", "{tmp}/wrong.json", "--out", "{tmp}/a/b"], "cannot write to {tmp}/a/b"),
        (["eval", "frontier", "--model", "{model}", "--bits", "8..1"], "bits '8..1' is no range"),
        (["eval", "frontier", "--model", "{model}", "--data", "{tmp}/wrong.json", "--bits", "9..10"], "no preset has"),
        (["eval", "frontier", "--model", "{model}", "--recent", "some"], "recent 'some' is no number of tokens"),
        (["eval", "frontier", "--data", "{tmp}/wrong.json", "--out", "{tmp}/a/b"], "cannot write to {tmp}/a/b"),
        (["eval", "frontier", "--data", "{tmp}/wrong.json", "--plot", "{tmp}/a/b.svg"], "cannot write to {tmp}/a/b"),
        (["eval", "frontier", "--data", "{tmp}/wrong.json", "--plot", "{tmp}/a.pdf"], "ends in .svg or .png"),
        (["eval", "frontier", "--preset", "b17", "--data", "{tmp}/wrong.json"], "unknown preset 'b17'"),
        (["eval", "frontier", "--widths", "--preset", "b3", "--data", "{tmp}/wrong.json"], "leave --preset out"),
        (["demo", "--preset", "b17"], "unknown preset 'b17'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_errors_are_one_sentence(arguments, message, checkpoint, tmp_path):
    wrong = {"key": {"method": "balanced", "num_bit": 3}, "value": {"method": "uniform"}}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))

    def fill(text):
        return text.replace("{tmp}", str(tmp_path)).replace("{model}", checkpoint)

    result = run(*map(fill, arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"Error: [^\n]+\.\n", result.stderr)
    assert fill(message) in result.stderr


@pytest.mark.parametrize(
    "command", ["frontier", "fidelity", "distortion", "perplexity", "seeds", "retrieval", "generate", "harness"]
)
def test_an_unknown_preset_is_told_before_a_model_is_fetched(command, text_file, tmp_path, cache_folder):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    data = {"generate": [str(problems)], "harness": ["--task", "piqa"]}.get(command, ["--data", text_file])
    result = run("eval", command, *data, "--preset", "b17")
    assert result.exit_code == 2
    assert "unknown preset 'b17'" in result.stderr
    assert not cache_folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing(checkpoint):
    result = run("generate", "hi", "--model", checkpoint, "--device", "cuda")
    assert result.exit_code == 2
    assert "device 'cuda' is unknown or not available here" in result.stderr


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "file"))
    result = run("generate", "hi")
    assert result.exit_code == 2
    assert re.fullmatch(r"Error: cannot write to the cache folder [^\n]+\.\n", result.stderr)


# Writing


def test_generate_streams_what_json_tells(checkpoint):
    options = ("--model", checkpoint, "--max-new-tokens", "12")
    streamed = succeed("generate", TEXT, *options)
    (told,) = lines_of_json(succeed("generate", TEXT, *options, "--json"))
    assert streamed.stdout == told["text"] + "\n"
    assert " MB, in bfloat16 " in streamed.stderr
    assert (told["prompt_tokens"], told["new_tokens"], told["preset"]) == (len(TEXT), 12, "b3")
    assert told["tokens_per_second"] > 0


def test_generate_reads_files_and_stdin(checkpoint, text_file):
    options = ("--model", checkpoint, "--max-new-tokens", "4", "--json")
    from_file = lines_of_json(succeed("generate", "--file", text_file, *options))
    from_stdin = lines_of_json(succeed("generate", *options, stdin=TEXT * 35))
    assert from_file[0]["prompt_tokens"] == from_stdin[0]["prompt_tokens"] == len(TEXT) * 35
    assert from_file[0]["text"] == from_stdin[0]["text"]


def test_generate_ends_with_the_context(checkpoint):
    prompt = "x" * (tiny_checkpoint.CONTEXT - 3)
    (told,) = lines_of_json(succeed("generate", prompt, "--model", checkpoint, "--json"))
    assert told["new_tokens"] == 3


def test_a_seed_repeats_a_sample(checkpoint):
    options = ("--model", checkpoint, "--max-new-tokens", "12", "--temperature", "1", "--json")
    texts = [lines_of_json(succeed("generate", TEXT, *options, "--seed", seed))[0]["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_full_is_the_cache_of_transformers(checkpoint, text_file):
    options = ("--model", checkpoint, "--file", text_file, "--max-new-tokens", "4", "--json")
    (full,) = lines_of_json(succeed("generate", "--preset", "full", *options))
    (quantized,) = lines_of_json(succeed("generate", "--preset", "b4", *options))
    assert full["compression"] == 0.5  # float32
    assert quantized["compression"] > 2
    assert full["cache_bytes_full"] == quantized["cache_bytes_full"]


def test_chat_keeps_one_cache(checkpoint):
    result = succeed(
        "chat", "--model", checkpoint, "--max-new-tokens", "5", stdin=f"{TEXT}\n\nAnd then?\n/exit\nnever\n"
    )
    tokens = [int(count) for count in re.findall(r"^(\d+) tokens in .* MB, in bfloat16 ", result.stdout, re.M)]
    first = len(f"[user] {TEXT.strip()}") + 1 + len("[assistant] ") + 5
    assert tokens[0] == first
    assert tokens[1] == first + 1 + len("[user] And then?") + 1 + len("[assistant] ") + 5


def test_chat_says_that_the_context_is_full_and_starts_over(checkpoint):
    result = succeed("chat", "--model", checkpoint, "--max-new-tokens", "2", stdin=f"{'x' * 4000}\n/new\nhello\n")
    assert "the conversation has 4020 tokens and the model's context is 3072" in result.stderr
    assert result.stdout.count(" MB, in bfloat16 ") == 1


def test_a_turn_feeds_only_what_is_new(checkpoint):
    model, tokenizer = models.load(checkpoint)
    fed = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    conversation = Conversation(model, tokenizer, "b3")
    conversation.say(TEXT * 5, 3)
    whole = len(conversation.ids)
    conversation.say("And then?", 3)
    assert fed[1:3] == [1, 1]
    assert fed[3] == len(conversation.ids) - 3 - (whole - 1)
    assert conversation.cache.get_seq_length() == len(conversation.ids) - 1


def test_chat_needs_a_template(checkpoint, tmp_path):
    model, tokenizer = models.load(checkpoint)
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    result = run("chat", "--model", str(tmp_path / "base"), stdin="hello\n")
    assert (result.exit_code, "has no chat template" in result.stderr) == (2, True)


@pytest.fixture
def essays(monkeypatch):
    monkeypatch.setattr(corpora, "essays", lambda: demo.ESSAY_OPENING + " " + TEXT * 60)


def test_demo_compares_two_caches(checkpoint, essays):
    options = ("--model", checkpoint, "--prompt-tokens", "600", "--max-new-tokens", "5")
    (told,) = lines_of_json(succeed("demo", *options, "--json"))
    assert told.keys() >= DEMO_KEYS
    assert told["prompt_tokens"] == 600
    assert told["compression"] == told["cache_bytes_full"] / told["cache_bytes"]
    assert told["kl"] > 0
    shown = succeed("demo", *options).stdout
    assert QUESTION in shown
    assert f"{told['compression']:.1f}x" in shown


def test_demo_of_full_precision_differs_in_nothing(checkpoint, essays):
    options = ("--model", checkpoint, "--prompt-tokens", "400", "--max-new-tokens", "3", "--preset", "full")
    (told,) = lines_of_json(succeed("demo", *options, "--dtype", "float32", "--json"))
    assert told["kl"] < 1e-6
    assert told["top1"] == 1
    assert told["text"] == told["text_full"]
    assert 0.49 < told["compression"] < 0.5  # the first tokens are held twice


# Prompt caches


def test_a_prompt_is_built_shown_and_used(checkpoint, text_file, tmp_path):
    file, length = str(tmp_path / "prompt.qjl"), len(TEXT) * 35
    (built,) = lines_of_json(succeed("cache", "build", text_file, "--model", checkpoint, "-o", file, "--json"))
    (shown,) = lines_of_json(succeed("cache", "show", file, "--json"))
    assert built == shown | {"prefill_seconds": built["prefill_seconds"]}
    assert (shown["tokens"], shown["rows"], shown["preset"], shown["model"]) == (length, 1, "b3", "llama")
    assert shown["compression"] == shown["cache_bytes_full"] / shown["file_bytes"] > 3
    assert f"1 x {length:,}" in succeed("cache", "show", file).stdout
    options = ("--model", checkpoint, "--max-new-tokens", "12")
    (used,) = lines_of_json(succeed("cache", "use", file, "And then?", *options, "--json"))
    assert (used["prompt_tokens"], used["new_tokens"]) == (length + len("And then?"), 12)
    model, tokenizer = models.load(checkpoint)
    cache, ids = qjl.KVCache(model, "b3"), tokenizer(TEXT * 35).input_ids
    generation.prefill(model, ids, cache)
    direct = generation.generate(model, tokenizer, ids + tokenizer("And then?").input_ids, cache, 12)
    assert used["text"] == direct.text
    assert succeed("cache", "use", file, "And then?", *options).stdout == used["text"] + "\n"


def test_a_prompt_cache_lies_beside_its_text_if_not_told_otherwise(checkpoint, text_file, tmp_path):
    told = succeed("cache", "build", text_file, "--model", checkpoint, "--preset", "b4")
    assert (tmp_path / "text.qjl").is_file()
    assert f"{len(TEXT) * 35:,} tokens in " in told.stderr


def test_a_prompt_cache_without_tokens_is_not_continued(checkpoint, tmp_path):
    model, _ = models.load(checkpoint)
    cache = qjl.KVCache(model, "b3")
    model(torch.ones(1, 300, dtype=torch.long), **cache_argument(cache))
    cache.save(tmp_path / "prompt.qjl")
    result = run("cache", "use", str(tmp_path / "prompt.qjl"), "And then?", "--model", checkpoint)
    assert (result.exit_code, "has no token ids of one prompt" in result.stderr) == (2, True)


# Measuring and planning


def test_presets_tell_methods_sources_and_bits():
    told = {fields["preset"]: fields for fields in lines_of_json(succeed("presets", "--head-dim", "64", "--json"))}
    assert told.keys() == presets.PRESETS.keys()
    assert told["qjl-paper"]["source"] == "arXiv:2406.03482"
    assert told["asymkv-16-0"]["source"] == "arXiv:2410.13212"
    assert told["qjl-paper"]["method_keys"] == "qjl"
    assert told["b3"]["is_default"]
    assert told["b3"]["bits_keys"] == 3.125
    assert told["b3"]["bits_values"] == 2.125
    assert all(fields["pre_rope"] in (True, False) for fields in told.values())
    shown = succeed("presets").stdout
    assert all(name in shown for name in presets.PRESETS)


def test_plan_needs_only_a_configuration(checkpoint, tmp_path):
    config = tmp_path / "bare"
    models.load_config(checkpoint).save_pretrained(config)
    told = {one["preset"]: one for one in lines_of_json(succeed("plan", str(config), "--memory", "64M", "--json"))}
    assert told.keys() == presets.PRESETS.keys()
    assert told["b2"]["tokens"] > told["b3"]["tokens"] > 4 * told["full"]["tokens"]
    assert told["b3"]["users"] > told["full"]["users"] > 0
    assert "more than the model's own context" in " ".join(
        succeed("plan", str(config), "--memory", "64M").stdout.split()
    )


def test_fidelity_tells_one_object_per_preset(checkpoint, text_file, tmp_path):
    sizes = ("--prefix", "256", "--decode", "70", "--chunks", "1", "--seeds", "1")
    out = tmp_path / "results.jsonl"
    arguments = ("eval", "fidelity", "--model", checkpoint, "--data", text_file, *sizes, "--preset", "b3")
    told = lines_of_json(succeed(*arguments, "--preset", "qjl-2", "--out", str(out), "--json"))
    assert [row["preset"] for row in told] == ["b3", "qjl-2"]
    assert all(row.keys() >= FIDELITY_KEYS | {"model"} for row in told)
    assert [json.loads(line) for line in out.read_text().splitlines()] == told
    assert "Perplexity at full precision is" in " ".join(succeed(*arguments).stdout.split())


SMALL = ("--prefix", "256", "--decode", "70", "--chunks", "1", "--seeds", "1")


@pytest.fixture
def frontier(checkpoint, text_file):
    """``qjl eval frontier`` with few presets and tokens."""
    chosen = ("--preset", "b2", "--preset", "qjl-2", "--preset", "full", "--preset", "b3")
    arguments = ("eval", "frontier", "--model", checkpoint, "--data", text_file, *SMALL, "--no-retrieval", *chosen)
    return lambda *more: succeed(*arguments, *more)


def test_frontier_measures_what_is_in_its_range(frontier, checkpoint, tmp_path):
    out, plot = tmp_path / "rows.jsonl", tmp_path / "frontier.png"
    told = lines_of_json(frontier("--bits", "1..3.1", "--out", str(out), "--plot", str(plot), "--json"))
    assert {row["preset"] for row in told} == {"b2", "qjl-2", "b3"}
    assert [row["bits"] for row in told] == sorted(row["bits"] for row in told)
    wanted = FIDELITY_KEYS | {"model", "method_keys", "method_values", "source", "pre_rope", "recent", "versions"}
    assert all(row.keys() >= wanted for row in told)
    assert told[0]["model"] == checkpoint
    assert told[0]["versions"]["qjl"] == qjl.__version__
    assert lines_of_file(out) == told
    assert plot.stat().st_size > 10_000


def test_frontier_goes_on_where_it_stopped(frontier, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    first = lines_of_json(frontier("--bits", "1..2.4", "--out", str(out), "--json"))
    out.write_bytes(out.read_bytes()[:-20])
    whole, half = first
    measured = counted_presets(monkeypatch)
    shown = frontier("--bits", "1..4", "--out", str(out))
    assert measured == [half["preset"], "b3"]
    assert "1 of 3 presets are in" in " ".join(shown.stderr.split())
    rows = lines_of_file(out)
    assert [row["preset"] for row in rows] == [whole["preset"], half["preset"], "b3"]
    assert [row | {"command": None} for row in rows[:2]] == [row | {"command": None} for row in first]
    assert rows[1]["command"].startswith("qjl eval frontier --model")
    names = re.findall(r"^ *([a-z]+-?\d+)  ", shown.stdout.partition("preset")[2], re.M)
    assert names == [row["preset"] for row in sorted(rows, key=lambda row: (row["bits"], row["kl"]))]
    measured.clear()
    assert lines_of_json(frontier("--bits", "1..4", "--out", str(out), "--json")) == rows
    assert measured == []
    frontier("--bits", "1..4", "--out", str(out), "--recent", "own")
    assert len(measured) == 3


def counted_presets(monkeypatch):
    """Names of the presets that are measured from now on."""
    from qjl.lab.evals import frontier

    measured, measure = [], frontier.measure_fidelity

    def count(model, tokenizer, presets, *rest):
        measured.extend(preset.name for preset in presets)
        return measure(model, tokenizer, presets, *rest)

    monkeypatch.setattr(frontier, "measure_fidelity", count)
    return measured


def lines_of_file(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_calibrate_tells_where_its_file_is(checkpoint, text_file, cache_folder):
    path = succeed("calibrate", checkpoint, "--data", text_file).stdout.strip()
    assert path.startswith(str(cache_folder))
    assert path.endswith(".safetensors")
