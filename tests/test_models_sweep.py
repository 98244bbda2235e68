"""The sweep over all families: its verdicts on a sample, that it finds what is wrong, and that a crash is a row."""

import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

from qjl import cli
from qjl.errors import QJLError
from qjl.lab import report, results
from qjl.lab.evals import families, sweep, tiny, ways
from qjl.lab.evals.sweep import AskedFamily, ProcessLimits

SAMPLE = {  # a family of each kind, and what its verdict tells
    "llama": ("text", "works", None),
    "gpt2": ("text", "works", None),
    "gpt_neox": ("text", "works", None),
    "gemma2": ("text", "works", None),
    "gemma3n_text": ("text", "works", None),
    "gemma4_text": ("text", "works", None),
    "gpt_oss": ("text", "works", None),
    "mixtral": ("text", "works", None),
    "qwen3_next": ("text", "works", None),
    "diffllama": ("text", "works", None),
    "minimax_m3_vl_text": ("text", "works", None),
    "bert": ("text", "works", None),
    "bart": ("text", "works", None),
    "mllama": ("text", "works", None),
    "qwen3_vl": ("image and text", "works", None),
    "llava": ("image and text", "works", None),
    "deepseek_v3": ("text", "refused", "latents"),
    "mamba": ("text", "refused", "no attention layers"),
    "minimax": ("text", "refused", None),
    "florence2": ("image and text", "refused", "encoder-decoder"),
}


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_the_families(family):
    task, verdict, why = SAMPLE[family]
    row = families.check(family, task, "b3")
    assert row["verdict"] == verdict, row
    if verdict == "works":
        assert row["max_error_full"] <= families.TOLERANCE
        assert 0 < row["kl"] < row["kl_other"]
    else:
        assert why is None or why in row["why"]


@pytest.fixture
def llama(monkeypatch):
    """A model that is built once, and answers in one way only."""
    model = tiny.build("llama", "text")
    monkeypatch.setattr(families.tiny, "build", lambda family, task: model)
    return model


UPDATE = families.KVCache.update


def _blurred(cache, key_states, value_states, layer_idx, *args, **kwargs):
    return UPDATE(cache, key_states, value_states + 0.01, layer_idx, *args, **kwargs)


def _failing(cache, *args, **kwargs):
    raise RuntimeError("the cache fell over")


def _tired(cache, *args, **kwargs):
    if cache.get_seq_length() > ways.PROMPT:
        raise QJLError("these are too many tokens.")
    return UPDATE(cache, *args, **kwargs)


@pytest.mark.parametrize(
    ("update", "verdict", "why"),
    [
        (_blurred, "wrong", "full is off by"),
        (_failing, "traceback", "RuntimeError: the cache fell over"),
        (_tired, "refused", "after 1 of 24 tokens: these are too many"),
    ],
)
def test_a_fault_is_found(update, verdict, why, llama, monkeypatch):
    monkeypatch.setattr(families.KVCache, "update", update)
    row = families.check("llama", "text", "b3")
    assert row["verdict"] == verdict, row
    assert why in row["why"]


def test_full_precision_after_enable_is_wrong(llama, monkeypatch):
    monkeypatch.setattr(families, "enable", lambda model, preset: model)
    row = families.check("llama", "text", "b3")
    assert (row["verdict"], "DynamicCache" in row["why"]) == ("wrong", True)


def test_a_preset_that_quantizes_nothing_is_wrong(llama):
    assert families.check("llama", "text", "full")["verdict"] == "wrong"


def test_a_model_that_does_not_hear_the_context_tells_nothing(llama):
    for layer in llama.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    row = families.check("llama", "text", "b3")
    assert row["verdict"] == "not built"
    assert "another prompt" in row["why"]


def test_a_model_that_cannot_be_built_is_a_row(monkeypatch):
    monkeypatch.setattr(families.tiny, "build", lambda family, task: {}["no such part"])
    row = families.check("llama", "text", "b3")
    assert row["verdict"] == "not built"
    assert "no such part" in row["why"]


@pytest.mark.parametrize("limits", [ProcessLimits(seconds=0), ProcessLimits(nbytes=1 << 20)], ids=["time", "memory"])
def test_a_process_that_dies_is_a_row(limits):
    (row,) = sweep.measure_families([AskedFamily("llama", "text")], "b3", workers=1, limits=limits)
    assert row["family"] == "llama"
    assert row["verdict"] in ("not built", "traceback")  # before it answered alone, or after
    assert row["why"]


def test_what_is_known_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(sweep, "_in_a_process", lambda subject, *more: families.row("works"))
    asked, moved = sweep.subjects(["llama", "gpt2"]), []
    first = list(sweep.measure_families(asked, "b3", workers=2, on_row=moved.append))
    monkeypatch.delattr(sweep, "_in_a_process")
    assert list(sweep.measure_families(asked, "b3", 2, first)) == first
    assert [row["family"] for row in first] == ["gpt2", "llama"]
    assert moved == [1, 1]


def test_every_family_is_asked_once():
    every = sweep.subjects()
    assert len({(one.family, tiny.class_of(one.family, one.task)) for one in every}) == len(every)
    assert {one.family for one in every} == {name for task in tiny.TASKS for name in tiny.families(task)}


@pytest.fixture
def command(monkeypatch):
    """``command(verdict, ...)``: eval models, where every family has this verdict."""

    def start(verdict, *arguments):
        why = None if verdict == "works" else "so it is"
        monkeypatch.setattr(sweep, "_in_a_process", lambda *more: families.row(verdict, why, kl=0.1))
        return CliRunner().invoke(cli.app, ["eval", "models", *arguments])

    return start


def test_the_command_tells_and_keeps_rows(command, tmp_path):
    out = tmp_path / "models.jsonl"
    arguments = ("-f", "llama", "-f", "gpt2", "--out", str(out))
    first = command("works", *arguments, "--json")
    assert first.exit_code == 0, first.output
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert rows == results.read(out)
    assert {"family", "verdict", "preset", "max_error_full", "kl", "why", "versions"} <= rows[0].keys()
    again = command("wrong", *arguments)
    assert again.exit_code == 0
    assert "2 works" in again.stdout
    assert results.read(out) == rows


@pytest.mark.parametrize("verdict", ["wrong", "traceback"])
def test_the_command_fails_where_a_family_does(verdict, command):
    result = command(verdict, "-f", "llama")
    assert result.exit_code == 1
    assert "so it is" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(("-f", "lama"), "no family lama"), (("-p", "full"), "that quantizes")]
)
def test_what_the_command_refuses(arguments, sentence, command):
    result = command("works", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_the_report_takes_no_offence_at_such_rows(command, tmp_path):
    command("works", "-f", "llama", "--out", str(tmp_path / "models.jsonl"))
    (row,) = results.read(tmp_path / "models.jsonl")
    assert report.counts([report.run("models.jsonl", [row])]) == ({"models": 1}, {})


@pytest.mark.parametrize("family", ["gemma2", "gemma4_text", "qwen3_next", "lfm3", "nemotron_h", "laguna"])
def test_every_type_of_layer_stays(family):
    default, small = CONFIG_MAPPING[family](), tiny.configuration(family)
    assert set(small.layer_types) == set(default.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) <= min(default.num_hidden_layers, 6)


def test_special_tokens_are_no_words():
    config = tiny.configuration("qwen2_vl")
    tokens = [value for name, value in config.to_dict().items() if name.endswith("_token_id") and value is not None]
    assert tokens
    assert all(token not in tiny.WORDS and token < tiny.VOCABULARY for token in tokens)
