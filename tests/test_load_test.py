"""Benchmarks of servers: what they ask, what they count, that a leak is seen, and that what is wrong has no speed."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from threading import Thread

import pytest
from typer.testing import CliRunner

import tiny_checkpoint
from qjl import cli, models
from qjl.errors import QJLError
from qjl.lab import reuploads
from qjl.lab.bench import load_test, vllm_engines
from qjl.lab.bench.gate import Inaccurate
from qjl.lab.bench.load_test import BROKEN, DIGITS, FEWEST, Exchange, Load, conversations, leaks, repeated
from qjl.lab.rows import typed
from report_rows import serving as serving_row

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 20


def test_conversations_are_the_same_each_time_and_their_secrets_are_not():
    load = Load(requests=300, words=40)
    asked = conversations(load, TEXT)
    assert asked == conversations(load, TEXT)
    assert len({one.secret for one in asked}) == 300
    assert all(one.prompt.count(one.secret) == 1 for one in asked)
    around = 4 + 4  # words before and after a passage
    lengths = [len(one.prompt.split()) - around for one in asked]
    assert (min(lengths), max(lengths)) == (FEWEST, 40)
    assert sorted(lengths)[150] < (FEWEST + 40) / 2


def heard(*texts):
    return [Exchange(f"{index}" * DIGITS, "", text=text) for index, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("texts", "leaked", "told"),
    [
        (("It is 0000000000.", "1111111111", "Which number?"), 0, 2 / 3),
        (("It is 1111111111.", "1111111111", ""), 1, 1 / 3),
        (("0000000000, or 2222222222", "91111111111", "Call 0000000000222"), 2, 2 / 3),
    ],
)
def test_a_secret_in_another_conversation_is_a_leak(texts, leaked, told):
    asked = heard(*texts)
    assert leaks(asked) == leaked
    assert repeated(asked) == pytest.approx(told)


class Scripted(BaseHTTPRequestHandler):
    """Answers what ``answers`` says, one after the other: a status, headers and a body."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, body = self.server.answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def asking():
    """What becomes of a conversation with a server that answers so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        Thread(target=server.serve_forever, daemon=True).start()

        def ask(*answers):
            server.answers = list(answers)
            conversation = Exchange("1" * DIGITS, "Which number?")
            load_test._converse(conversation, f"http://127.0.0.1:{server.server_port}", 4)
            return conversation

        yield ask
        server.shutdown()


def events(*told):
    return b"".join(b"data: " + (one if one == b"[DONE]" else json.dumps(one).encode()) + b"\n\n" for one in told)


def delta(text):
    return {"choices": [{"delta": {"content": text}}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
WHOLE = 200, {}, events({"choices": [{"delta": {}}]}, delta("11"), delta("1"), USAGE, b"[DONE]")


def test_an_answer_is_heard_to_its_end(asking):
    conversation = asking(WHOLE)
    assert (conversation.text, conversation.prompt_tokens, conversation.answer_tokens) == ("111", 5, 2)
    assert conversation.statuses == {"200": 1}
    assert 0 < conversation.first_token <= conversation.seconds


def test_who_is_told_to_come_again_does(asking):
    later = {"Retry-After": "0"}
    assert asking((429, later, b""), (503, later, b""), WHOLE).statuses == {"429": 1, "503": 1, "200": 1}
    assert asking((429, {}, b""), WHOLE).statuses == {"429": 1}


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ((500, {"Retry-After": "0"}, b""), "500"),
        ((200, {}, events(delta("1"))), BROKEN),
        ((200, {}, events(delta("1"), {"error": {"message": "out of luck"}})), BROKEN),
    ],
)
def test_what_is_no_answer_is_a_failure(asking, answer, status):
    assert asking(answer, WHOLE).statuses == {status: 1}


def test_a_server_that_hangs_up_is_a_failure():
    conversation = Exchange("1" * DIGITS, "Which number?")
    load_test._converse(conversation, "http://127.0.0.1:9", 4)
    assert conversation.statuses == {BROKEN: 1}


def test_what_a_server_may_not_do():
    row = serving_row("b3", requests=3, statuses={"200": 3, "429": 5}, leaks=0, exit_code=0)
    assert typed(row).went_well
    assert not typed(row | {"statuses": {"200": 2, "429": 5}}).went_well
    assert not typed(row | {"leaks": 1}).went_well
    assert not typed(row | {"exit_code": 1}).went_well


def test_the_command_loads_a_server_of_its_own_with_a_model_of_the_lab(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "cache"))
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text(TEXT)
    folder = tiny_checkpoint.save(tmp_path / "model")
    monkeypatch.setitem(reuploads.REUPLOADS, "uploaded-again", None)
    monkeypatch.setattr(models, "fetch_known", lambda name, known, progress: folder)
    options = {"model": "uploaded-again", "dtype": "float32"}
    options |= {"clients": 4, "requests": 8, "slots": 1, "queue": 0, "words": 150, "data": text, "out": rows}
    words = [f"--{name}={value}" for name, value in options.items()]
    result = CliRunner().invoke(cli.app, ["bench", "serving", *words])
    assert result.exit_code == 0, result.output
    assert "Conversations, each with a secret" in " ".join(result.stdout.split())
    row = json.loads(rows.read_text())
    assert row["model"] == "uploaded-again"
    assert row["statuses"]["200"] == 8
    assert row["statuses"]["429"] > 0
    assert row["statuses"].keys() <= {"200", "429"}
    assert row["leaks"] == row["exit_code"] == 0
    assert row["prompt_tokens"] > 8 * 100
    assert row["processor_seconds"] > 0
    assert 0 < row["first_token_seconds"]["p50"] <= row["request_seconds"]["p99"]


# vLLM


TRIAL = vllm_engines.EngineTrial("a folder", "full", requests=4, context=1024, steps=8, dtype="bfloat16", threads=1)


def turns(monkeypatch, **fields):
    """What ``measure`` makes of turns that tell these fields."""

    def turn(trial):
        served = vllm_engines.OURS if trial.preset == "b3" else "CPUAttentionBackendImpl"
        return {"right": 1.0, "attention": [served], "step_seconds": 0.1} | fields

    monkeypatch.setattr(vllm_engines, "_turn", turn)
    return list(vllm_engines.time_engines("a model", TRIAL, ["full", "b3"], rounds=2))


def test_engines_take_turns(monkeypatch):
    rows = turns(monkeypatch)
    assert [row["preset"] for row in rows] == ["full", "b3"] * 2
    assert {row["model"] for row in rows} == {"a model"}
    assert {row["context"] for row in rows} == {1024}


def test_a_turn_of_wrong_tokens_has_no_speed(monkeypatch):
    with pytest.raises(Inaccurate, match="only 50% of the tokens are right with full"):
        turns(monkeypatch, right=0.5)


@pytest.mark.parametrize(
    ("served", "says"),
    [("QuantizedAttention", "full was asked for"), ("CPUAttentionBackendImpl", "b3 was asked for")],
)
def test_a_turn_of_another_attention_does_not_count(monkeypatch, served, says):
    with pytest.raises(QJLError, match=f"{says} and {served} attended"):
        turns(monkeypatch, attention=[served])


def test_what_ended_an_engine_is_one_sentence(monkeypatch):
    failed = "Traceback\nValueError: it is too long. It should not be.\n  For more see errors\n"
    monkeypatch.setattr(vllm_engines.sys, "executable", "/bin/false")
    with pytest.raises(QJLError, match="vLLM did not run with full: it does not say why"):
        list(vllm_engines.time_engines("a model", TRIAL, ["full"], rounds=1))
    assert vllm_engines._cause(failed) == "ValueError: it is too long."


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_there_is_nothing_to_measure():
    result = CliRunner().invoke(cli.app, ["bench", "vllm"])
    assert result.exit_code == 2
    assert "vLLM is not installed: run `pip install vllm`" in result.stderr
