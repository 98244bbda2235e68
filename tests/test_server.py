"""The server as its clients see it: the official client, others that misbehave, and Prometheus."""

import asyncio
import contextlib
import copy
import functools
import http.client
import itertools
import json
import logging
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import httpx2
import openai
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from typer.testing import CliRunner

import tiny_checkpoint
from models_for_tests import FAMILIES, difference, prompt, tiny
from qjl import cli, generation, models
from qjl.cli import serve as serve_command
from qjl.errors import QJLError
from qjl.generation import make_cache, prefill
from qjl.presets import resolve
from qjl.server import app as app_module
from qjl.server import engine as engine_module
from qjl.server import listener, vllm_launch
from qjl.server.app import Limits, Service, build
from qjl.server.detokenizer import Writer
from qjl.server.engine import Engine, Job, fit_codecs
from qjl.server.metrics import Held, Metrics
from qjl.server.openai_api import _CHANGE_NOTHING, _ONLY, ChatRequest, CompletionRequest
from qjl.server.ragged_batch import RaggedBatch
from qjl.server.sampling import Choice, Chooser
from qjl.vllm.served_model import ServedModel
from test_detokenizer import ALL, decoded, until, word_level

ROOT = Path(__file__).resolve().parent.parent
PRESET = "b3"
UNSERVED = {"qwen3-next", "lfm2", "gemma3n"}  # convolutions, states, layers that share a cache
NOISE = 8e-3  # of the logits of two steps: the budget of the codes of each; quantization itself is five times as much
KEY = "a key of the tests"
LONGEST = 120  # seconds that a busy machine may take
ENOUGH = 1000  # turns
SECRETS = ("otter", "maple", "comet", "basil", "quartz", "violin", "harbor", "lantern")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_checkpoint.byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """A random one, whose codecs are fitted, and whose likeliest text has no end."""
    network = tiny(vocab_size=len(tokenizer), max_position_embeddings=tiny_checkpoint.CONTEXT)
    network.lm_head.weight.data[tokenizer.eos_token_id] = 0
    fit_codecs(network, tokenizer, resolve(PRESET), lambda: "It was a bright cold day in April. " * 40)
    return network


@contextlib.contextmanager
def serving(model, tokenizer, limits=None, preset=PRESET, **settings):
    """A server on a free port: its URL, and itself."""
    limits = limits or Limits("tiny")
    engine = Engine(model, tokenizer, resolve(preset), **settings)
    with listener.listen("127.0.0.1", 0) as bound:
        here = listener.Server(build(Service(engine, tokenizer, limits)), engine, grace=LONGEST)
        thread = threading.Thread(target=here.run, args=([bound],), daemon=True)
        thread.start()
        wait_until(lambda: here.started)
        try:
            yield listener.url_of(bound), here
        finally:
            here.should_exit = True
            thread.join(LONGEST)
            assert not thread.is_alive()


def wait_until(is_so):
    end = time.monotonic() + LONGEST
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def url(model, tokenizer):
    with serving(model, tokenizer, Limits("tiny", max_tokens=256, max_body=20_000)) as (url, _):
        yield url


request = functools.partial(
    httpx2.request, timeout=LONGEST, verify=False
)  # certificates take longer to read than an answer


def client_of(url, key="none"):
    http_client = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=LONGEST, http_client=http_client)


@pytest.fixture(scope="module")
def client(url):
    return client_of(url)


CONVERSATIONS = itertools.count()  # a conversation of its own each time, so that nothing is taken up again


def ask(client, text="Hello", tokens=12, **settings):
    settings = {"temperature": 0, "max_tokens": tokens, "user": f"{next(CONVERSATIONS)}"} | settings
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **settings)


def complete(client, text="Hello", tokens=12, **settings):
    settings = {"temperature": 0, "max_tokens": tokens, "user": f"{next(CONVERSATIONS)}"} | settings
    return client.completions.create(model="tiny", prompt=text, **settings)


def post(url, path="/v1/completions", **fields):
    defaults = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    return request("POST", url + path, json=defaults | fields)


def metrics(url, headers=None):
    text = request("GET", f"{url}/metrics", headers=headers).text
    return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.M)}


# Rows


def fit(network, preset):
    """So that codecs wait for no prompt."""
    with torch.inference_mode():
        prefill(network, prompt(300, seed=99)[0].tolist(), make_cache(network, preset))


def read_on(batch, tokens):
    """Logits by sequence."""
    with torch.inference_mode(), batch.attached():
        return dict(zip(batch.order(tokens), batch.read(tokens), strict=True))


@pytest.mark.parametrize(
    ("family", "preset"),
    [*((family, "b3") for family in sorted(set(FAMILIES) - UNSERVED)), ("llama", "kivi-2"), ("gemma2", "full")],
)
def test_rows_in_one_pass_are_rows_alone(family, preset):
    network = tiny(family)
    fit(network, preset)
    texts = [prompt(length, seed=length)[0].tolist() for length in (300, 5, 190, 1)]
    together, alone = RaggedBatch(network, resolve(preset)), [RaggedBatch(network, resolve(preset)) for _ in texts]
    names, own = [together.add() for _ in texts], [batch.add() for batch in alone]
    for start in (0, 150, 299):
        parts = [text[start : start + 150] if start < 299 else [7] for text in texts]
        found = read_on(together, {name: part for name, part in zip(names, parts, strict=True) if part})
        for name, batch, mine, part in zip(names, alone, own, parts, strict=True):
            if part:
                expected = read_on(batch, {mine: part})[mine]
                assert difference(found[name], expected) < NOISE
    assert [together.length(name) for name in names] == [len(text) + 1 for text in texts]


def test_rows_are_what_generate_writes(model):
    ids = prompt(300)
    written = model.generate(
        ids, past_key_values=make_cache(model, PRESET), do_sample=False, max_new_tokens=20, min_new_tokens=20
    )
    batch, tokens = RaggedBatch(model, resolve(PRESET)), []
    name, step = batch.add(), ids[0].tolist()
    for _ in range(20):
        step = [int(read_on(batch, {name: step})[name].argmax())]
        tokens += step
    assert tokens == written[0, 300:].tolist()


def test_rows_come_and_go_without_a_trace(model):
    """What is left is what was there: pages and slots of sequences that are gone are free."""
    batch = RaggedBatch(model, resolve(PRESET))
    first = batch.add()
    read_on(batch, {first: prompt(300)[0].tolist()})
    held = batch.nbytes
    for length in (10, 400):
        other = batch.add()
        read_on(batch, {other: prompt(length)[0].tolist()})
        assert batch.nbytes > held
        batch.drop(other)
        assert batch.nbytes == held
    batch.drop(first)
    assert batch.nbytes == 0


def test_rows_read_the_same_when_room_is_given_back(model):
    batch = RaggedBatch(model, resolve(PRESET))
    gone, one, two = (batch.add() for _ in range(3))
    read_on(batch, {gone: prompt(500)[0].tolist(), one: prompt(300, seed=1)[0].tolist(), two: [7]})
    batch.drop(gone)
    other = copy.deepcopy(batch)
    assert batch.is_loose
    batch.shrink()
    assert not batch.is_loose
    assert batch.allocated_nbytes == batch.nbytes == other.nbytes
    for count in (1, 70, 1):
        tokens = {name: prompt(count, seed=name)[0].tolist() for name in (one, two)}
        found, expected = read_on(batch, tokens), read_on(other, tokens)
        assert all(torch.equal(found[name], expected[name]) for name in tokens)


def test_a_shared_beginning_is_held_once_and_goes_its_own_way(model):
    text = prompt(400)[0].tolist()
    batch, alone = (RaggedBatch(model, resolve(PRESET)) for _ in range(2))
    first, mine = batch.add(), alone.add()
    read_on(batch, {first: text})
    read_on(alone, {mine: text[:390]})
    held = batch.nbytes
    second = batch.share(first, 390)
    assert batch.nbytes == held
    assert batch.length(second) == 390
    found = read_on(batch, {second: [5, 6, 7]})[second]
    assert difference(found, read_on(alone, {mine: [5, 6, 7]})[mine]) < NOISE
    assert batch.length(first) == 400


def test_a_pass_that_fails_leaves_all_rows_as_they_were(model):
    batch = RaggedBatch(model, resolve(PRESET))
    name = batch.add()
    read_on(batch, {name: prompt(300)[0].tolist()})
    with pytest.raises(IndexError):
        read_on(batch, {name: [10**9]})
    assert batch.length(name) == 300
    read_on(batch, {name: [5]})


def test_the_attention_of_the_model_stays(model):
    before = model.config._attn_implementation
    with RaggedBatch(model, resolve(PRESET)).attached():
        assert model.config._attn_implementation == before
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", sorted(UNSERVED))
def test_a_model_with_other_layers_is_refused(family, tokenizer, refuses):
    with refuses("serve a model with attention layers alone"):
        Engine(tiny(family), tokenizer, resolve("full"))


def test_statistics_are_those_of_the_text(tokenizer, refuses):
    network = tiny(vocab_size=len(tokenizer), seed=3)
    with refuses("at least 256 tokens"):
        fit_codecs(network, tokenizer, resolve(PRESET), lambda: "short")
    fit_codecs(network, tokenizer, resolve(PRESET), lambda: "long enough " * 60)
    codecs = make_cache(network, PRESET).codecs
    kept = [codecs.known(layer)[0] for layer in range(2)]
    batch = RaggedBatch(network, resolve(PRESET))
    name = batch.add()
    read_on(batch, {name: prompt(300)[0].tolist()})
    assert all(layer.codecs[0] is one for layer, one in zip(batch.store.layers.values(), kept, strict=True))
    assert batch.store.index.packed_tokens[0]


def test_codecs_that_wait_for_a_prompt_are_refused(tokenizer, refuses):
    with refuses("call fit_codecs"):
        Engine(tiny(vocab_size=len(tokenizer), seed=5), tokenizer, resolve(PRESET))


# Writing


def pieces(tokenizer, text, stops=()):
    writer = Writer(tokenizer, stops)
    found = []
    for token in tokenizer(text).input_ids:
        found.append(writer.write(token))
        if writer.stopped:
            break
    return [*found, writer.finish()], writer


def test_characters_come_whole(tokenizer):
    text = "naïve 東京 🦦 e\u0301 done"
    found, _ = pieces(tokenizer, text)
    assert "".join(found) == text
    assert "🦦" in found
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(["END"], "one ENtwo "), (["EN"], "one "), (["zzz"], "one ENtwo END three"), (["three", "o E"], "one ENtw")],
)
def test_a_text_ends_before_a_stop_string(tokenizer, stops, expected):
    if stops == ["three", "o E"]:
        expected = "one ENtw"
    found, writer = pieces(tokenizer, "one ENtwo END three", stops)
    assert "".join(found) == expected
    assert writer.stopped is (stops != ["zzz"])


def test_what_may_be_a_stop_string_waits(tokenizer):
    found, _ = pieces(tokenizer, "aENDb", ["ENDx"])
    assert found[:5] == ["a", "", "", "", "ENDb"]


def test_text_stops_held_back_come_at_the_end(tokenizer):
    found, writer = pieces(tokenizer, "see EN", ["END"])
    assert found[-1] == "EN"
    assert not writer.stopped


def test_choices_follow_the_shares():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    chooser = Chooser(Choice(seed=1))
    shares = torch.tensor([chooser(logits) for _ in range(4000)]).bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, logits.exp(), atol=0.03, rtol=0)
    few = Chooser(Choice(top_p=0.7, seed=1))
    assert {few(logits) for _ in range(200)} == {0, 1}
    cold = Chooser(Choice(temperature=0.01, seed=1))
    assert {cold(logits) for _ in range(50)} == {0}
    coldest = Chooser(Choice(temperature=5e-324, seed=1))
    assert {coldest(logits) for _ in range(5)} == {0}
    assert Chooser(Choice(temperature=0))(logits) == 0


def test_a_seed_is_a_text():
    logits = torch.zeros(1000)
    one, same, other = (Chooser(Choice(seed=seed)) for seed in (1, 1, 2))
    drawn = [one(logits) for _ in range(20)]
    assert drawn == [same(logits) for _ in range(20)] != [other(logits) for _ in range(20)]


# The client


def test_chat(client, tokenizer):
    answer = ask(client)
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason, answer.model) == ("assistant", "length", "tiny")
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(tokenizer("[user] Hello<end>[assistant] ").input_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_chat_takes_parts_and_roles(client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    texts = [
        client.chat.completions.create(model="tiny", messages=one, temperature=0, max_completion_tokens=8)
        for one in (messages, same)
    ]
    assert texts[0].choices[0].message.content == texts[1].choices[0].message.content


def test_an_answer_can_be_sent_back(client, tokenizer):
    question, more = {"role": "user", "content": "Hello"}, {"role": "user", "content": "Go on"}
    message = ask(client).choices[0].message
    answer = client.chat.completions.create(
        model="tiny", messages=[question, message, more], temperature=0, max_tokens=2
    )
    text = f"[user] Hello<end>[assistant] {message.content}<end>[user] Go on<end>[assistant] "
    assert answer.usage.prompt_tokens == len(tokenizer(text).input_ids)


def test_completions_are_greedy_generation(client, model, tokenizer):
    text = "Once upon a time " * 20
    answer = complete(client, text, 30)
    cache = make_cache(model, PRESET)
    expected = generation.generate(model, tokenizer, tokenizer(text).input_ids, cache, 30)
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == 30
    tokens = complete(client, tokenizer(text).input_ids, 30)
    assert tokens.choices[0].text == answer.choices[0].text


def test_completions_have_openais_default_length(url):
    fields = {"model": "tiny", "prompt": "Hello", "temperature": 0}
    answer = request("POST", f"{url}/v1/completions", json=fields).json()
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("send", [ask, complete])
def test_a_stream_is_the_answer_in_pieces(client, send):
    whole = send(client, tokens=40)
    chunks = list(send(client, tokens=40, stream=True, stream_options={"include_usage": True}))
    *texts, last = chunks
    assert last.usage == whole.usage
    assert last.choices == []
    if send is ask:
        assert texts[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in texts)
        assert text == whole.choices[0].message.content
    else:
        text = "".join(chunk.choices[0].text for chunk in texts)
        assert text == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in texts if chunk.choices[0].finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done_and_has_no_usage_unasked(url):
    body = post(url, stream=True).text
    events = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert not any("usage" in json.loads(event) for event in events[:-1])


def test_an_answer_ends_at_a_stop_string(client):
    text = complete(client, tokens=60).choices[0].text
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    answer = complete(client, tokens=60, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 60


SCRIPTS = 5


class Scripted:
    """In place of a chooser: writes the tokens of the script that the seed names."""

    scripts = ()

    def __init__(self, choice):
        self.tokens = iter(self.scripts[choice.seed])

    def __call__(self, logits):
        return next(self.tokens)


@pytest.mark.parametrize("name", ["bytes", "metaspace, first", "llama", "words", "suffixes", "a string across tokens"])
def test_a_stream_and_an_answer_are_the_tokenizers_text(monkeypatch, name):
    """The tokens are random ones; each script also ends at a string that is in its text, if it has any."""
    chance, words = random.Random(name), ALL[name]
    words.chat_template = "<think>"
    scripts = [[chance.randrange(len(words)) for _ in range(chance.randrange(1, 40))] for _ in range(SCRIPTS)]
    monkeypatch.setattr(Scripted, "scripts", scripts)
    monkeypatch.setattr(engine_module, "Chooser", Scripted)
    with serving(tiny(vocab_size=len(words)), words, preset="full") as (url, _):
        client = client_of(url)
        for seed, tokens in enumerate(scripts):
            text = decoded(words, tokens)
            start = chance.randrange(len(text) + 1)
            for stop in filter(None, {"never there", text[start : start + 3]}):
                settings = {"tokens": len(tokens), "seed": seed, "stop": [stop]}
                expected = (until(text, [stop]), "stop" if stop in text else "length")
                answer = complete(client, [1], **settings).choices[0]
                assert (answer.text, answer.finish_reason) == expected
                *_, last = chunks = [one.choices[0] for one in complete(client, [1], stream=True, **settings)]
                assert ("".join(one.text for one in chunks), last.finish_reason) == expected
                chat = ask(client, **settings).choices[0]
                assert (chat.message.content, chat.finish_reason) == expected
                *_, last = chunks = [one.choices[0] for one in ask(client, stream=True, **settings)]
                assert ("".join(one.delta.content or "" for one in chunks), last.finish_reason) == expected


def test_events_are_lines_for_every_client(monkeypatch):
    """Some end a line at other characters than newlines too."""
    words = word_level(["a", "\u2028", "\x85", "\x0c"], decoders.Fuse())
    monkeypatch.setattr(Scripted, "scripts", [[0, 1, 2, 3]])
    monkeypatch.setattr(engine_module, "Chooser", Scripted)
    with serving(tiny(vocab_size=len(words)), words, preset="full") as (url, _):
        body = post(url, prompt=[0], seed=0, stream=True).content.decode()
    events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == "a\u2028\x85\x0c"


def test_an_answer_ends_with_the_end_token(model, tokenizer):
    token = int(make_next(model, tokenizer("Hello").input_ids))
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = tokenizer.convert_ids_to_tokens(token)
    with serving(model, ending) as (url, _):
        answer = complete(client_of(url))
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")


def make_next(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].argmax()


def test_sampling_is_the_same_for_the_same_seed_alone_and_in_company(client):
    settings = {"temperature": 1.0, "top_p": 0.9, "tokens": 24}
    alone = complete(client, seed=7, **settings).choices[0].text
    with asking(lambda number: complete(client, f"Company {number}", **settings), 6):
        company = complete(client, seed=7, **settings).choices[0].text
    assert company == alone
    assert complete(client, seed=8, **settings).choices[0].text != alone


@contextlib.contextmanager
def asking(send, count):
    """Others ask at the same time; yields their answers, which are there afterwards."""
    answers = [None] * count

    def one(number):
        answers[number] = send(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join()
    assert all(answers)


def test_the_text_in_company_is_the_text_alone(client):
    """Greedy, in float32; prompts of different lengths join and leave a running batch."""
    prompts = [f"{secret} " * (3 + 17 * number) for number, secret in enumerate(SECRETS)]
    alone = [complete(client, text, 20 + number).choices[0].text for number, text in enumerate(prompts)]
    with asking(lambda number: complete(client, prompts[number], 20 + number), len(prompts)) as answers:
        pass
    assert [answer.choices[0].text for answer in answers] == alone


def written(engine, tokenizer, texts, tokens=40, client=None):
    """What an engine answers to prompts that come at once."""
    done, found = threading.Semaphore(0), [""] * len(texts)

    def hear(number, piece):
        if isinstance(piece, Exception):
            found[number] = piece
            done.release()
            return
        found[number] += piece.text
        if piece.reason:
            done.release()

    with engine._changed:  # so that all are there before the first turn
        for number, text in enumerate(texts):
            hears = functools.partial(hear, number)
            engine.submit(Job(tokenizer(text).input_ids, tokens, hears, Choice(0), client=client))
    assert all(done.acquire(timeout=LONGEST) for _ in texts)
    return found


@contextlib.contextmanager
def engine_of(model, tokenizer, **settings):
    engine = Engine(model, tokenizer, resolve(PRESET), **settings)
    try:
        yield engine
    finally:
        engine.close()


def test_no_conversation_sees_anothers_tokens(model, tokenizer):
    """In company each answer is what it is alone."""
    texts = [f"My secret is {secret}. " * 20 for secret in SECRETS]
    alone = []
    for text in texts:
        with engine_of(model, tokenizer) as engine:
            alone += written(engine, tokenizer, [text])
    with engine_of(model, tokenizer, slots=len(texts)) as engine:
        assert written(engine, tokenizer, texts) == alone


def test_a_budget_of_bytes_is_kept_by_answers_that_wait_their_turn(model, tokenizer):
    texts = [f"My secret is {secret}. " * 20 for secret in SECRETS]
    with engine_of(model, tokenizer, slots=len(texts)) as engine:
        expected = written(engine, tokenizer, texts, tokens=100)
        one = engine._batch.bytes_for(len(tokenizer(texts[0]).input_ids) + 100)
    most = []
    with engine_of(model, tokenizer, slots=len(texts), memory=3 * one) as engine:
        turn = engine._turn
        engine._turn = lambda: (turn(), most.append(engine._batch.allocated_nbytes))
        found = written(engine, tokenizer, texts, tokens=100)
        # those that were paused read their prompts again, partly as codes
        assert sum(one == other for one, other in zip(found, expected, strict=True)) >= len(texts) // 2
        assert all(one[:10] == other[:10] for one, other in zip(found, expected, strict=True))
    assert max(most) <= 3 * one


def squeeze(engine):
    """Once all answers are being written, there is room for half of what they hold."""
    turn = engine._turn

    def take():
        turn()
        if all(row.is_writing for row in engine._rows):
            engine.memory = engine._batch.memory = engine._batch.nbytes // 2
            engine._turn = turn

    engine._turn = take


def test_paused_answers_read_their_tokens_again(model, tokenizer):
    texts = [f"My secret is {secret}. " * 20 for secret in SECRETS[:4]]
    with engine_of(model, tokenizer) as engine:
        expected = written(engine, tokenizer, texts, tokens=80)
    with engine_of(model, tokenizer) as engine:
        squeeze(engine)
        found = written(engine, tokenizer, texts, tokens=80)
        assert engine.metrics.paused._value.get() >= 2
        held = engine.held().result(LONGEST)
        assert (held.running, held.waiting, held.cache_bytes, held.allocated_bytes) == (0, 0, 0, 0)
    assert [len(text) for text in found] == [len(text) for text in expected]


def test_a_paused_answer_that_nobody_waits_for_leaves_nothing(model, tokenizer):
    heard = []
    with engine_of(model, tokenizer) as engine:
        squeeze(engine)
        jobs = [Job(tokenizer(f"{name} " * 60).input_ids, 400, heard.append, Choice(0)) for name in SECRETS[:4]]
        with engine._changed:
            for job in jobs:
                engine.submit(job)
        wait_until(lambda: engine._paused)
        paused = engine._paused[0].job
        engine.cancel(paused)
        wait_until(lambda: paused not in [row.job for row in [*engine._paused, *engine._rows]])
        for job in jobs:
            engine.cancel(job)
        wait_until(lambda: engine.is_idle)
        held = engine.held().result(LONGEST)
        assert (held.running, held.waiting, held.cache_bytes, held.allocated_bytes) == (0, 0, 0, 0)
        assert engine._batch._sequences == []
    assert not any(isinstance(one, Exception) for one in heard)


def test_room_is_given_back_when_nobody_asks(model, tokenizer):
    """What an ended conversation holds stays, and is still read."""
    text = "My secret is otter. " * 20
    with engine_of(model, tokenizer) as engine:
        first = written(engine, tokenizer, [text], client="a")[0]
        burst = [f"My secret is {secret}. " * 20 for secret in SECRETS]
        written(engine, tokenizer, burst)
        wait_until(lambda: engine.held().result(LONGEST).running == 0)
        held = engine.held().result(LONGEST)
        assert 0 < held.cache_bytes <= held.allocated_bytes <= 2 * held.cache_bytes
        found = written(engine, tokenizer, [text + first + " And?"], client="a")
        assert engine.metrics.shared._value.get() >= len(text)
    with engine_of(model, tokenizer) as engine:
        assert written(engine, tokenizer, [text], client="a")[0] == first
        assert written(engine, tokenizer, [text + first + " And?"], client="a") == found


def test_ended_conversations_make_way_only_where_that_helps(model, tokenizer):
    text = "My secret is otter. " * 20
    with engine_of(model, tokenizer) as engine:
        written(engine, tokenizer, [text], client="a")
        wait_until(lambda: engine.held().result(LONGEST).running == 0)
        held = engine._batch.nbytes
        engine.memory = engine._batch.memory = 2 * held
        assert not engine._fits(2 * held + 1)
        assert len(engine._ended) == 1
        assert engine._fits(held)
        assert len(engine._ended) == 1
        assert engine._fits(held + 1)
        assert not engine._ended


def test_one_answer_alone_has_all_room_but_no_more_than_it_needs(model, tokenizer):
    """Ended conversations make way, and pools grow by no quarter."""
    text = "My secret is otter. " * 20
    with engine_of(model, tokenizer) as engine:
        written(engine, tokenizer, [text], client="a")
        wait_until(lambda: engine.held().result(LONGEST).running == 0)
        engine.memory = engine._batch.memory = engine._batch.nbytes
        most, turn = [], engine._turn
        engine._turn = lambda: (turn(), most.append((engine._batch.allocated_nbytes, engine._batch.nbytes)))
        written(engine, tokenizer, ["My secret is maple. " * 30], tokens=150)
        assert not engine._ended
    token = engine._batch._bytes_of(1, 0)
    assert all(allocated <= max(engine.memory, held) + 65 * token for allocated, held in most)


def test_the_bytes_of_tokens_are_known_before_they_are_read(model):
    batch = RaggedBatch(model, resolve(PRESET), memory=0)
    one, two = batch.add(), batch.add()
    for counts in ({one: 300, two: 5}, {one: 1, two: 130}, *[{one: 1}] * 70, {one: 200, two: 64}):
        before, most = batch.nbytes, batch.bytes_for_pass(counts)
        read_on(batch, {name: prompt(count)[0].tolist() for name, count in counts.items()})
        assert batch.nbytes <= before + most
        assert batch.nbytes == batch.nbytes_of([one, two]) <= batch.allocated_nbytes <= before + most
        assert batch.nbytes_of([one]) + batch.nbytes_of([two]) == batch.nbytes


def test_what_is_held_is_told_until_the_end_and_after(model, tokenizer, monkeypatch):
    """Never while a turn is under way."""
    entered, go_on = threading.Event(), threading.Event()
    read = RaggedBatch.read

    def wait(*arguments):
        entered.set()
        assert go_on.wait(LONGEST)
        return read(*arguments)

    monkeypatch.setattr(RaggedBatch, "read", wait)
    engine = Engine(model, tokenizer, resolve(PRESET))
    engine.submit(Job(tokenizer("Hello").input_ids, 10, lambda piece: None, Choice(0)))
    assert entered.wait(LONGEST)
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: engine._is_closed)
    asked = engine.held()
    assert not asked.done()
    go_on.set()
    closing.join(LONGEST)
    for held in (asked.result(LONGEST), engine.held().result(0)):
        assert held.waiting == 0
    assert engine.held().result(0).allocated_bytes == 0


def test_a_conversation_goes_on_where_it_ended_for_the_same_client_alone(model, tokenizer):
    text = "My secret is otter. " * 20
    with engine_of(model, tokenizer) as engine:
        first = written(engine, tokenizer, [text], client="a")[0]
        shared = engine.metrics.shared._value.get
        assert shared() == 0
        written(engine, tokenizer, [text + first + " And?"], client="b")
        written(engine, tokenizer, [text + first + " And?"], client=None)
        assert shared() == 0
        written(engine, tokenizer, [text + first + " And?"], client="a")
        assert shared() >= len(tokenizer(text).input_ids)


def test_models(client):
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# What is refused


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt="Hello")
    assert caught.value.code == "model_not_found"
    assert "'tiny'" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 2}, "n", "n = 2 is not supported here: leave n out."),
        ({"logprobs": 3}, "logprobs", "logprobs = 3 is not supported"),
        ({"logprobs": 0}, "logprobs", "logprobs = 0 is not supported"),  # those of the tokens written
        ({"prompt": [1, "a"]}, "prompt", "prompt: 'a' is no token: give integers."),
        ({"prompt": [True]}, "prompt", "True is no token: give integers"),
        ({"prompt": {}}, "prompt", "prompt: give a text, or a list of tokens."),
        ({"best_of": 2}, "best_of", "best_of"),
        ({"echo": True}, "echo", "echo"),
        ({"echo": 0}, "echo", "echo"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "repetition_penalty = 1.1 is not supported"),
        ({"top_k": 40}, "top_k", "top_k = 40 is not supported here: leave top_k out."),
        ({"min_p": 0.05}, "min_p", "min_p"),
        ({"ignore_eos": True}, "ignore_eos", "ignore_eos"),
        ({"stop_token_ids": [5]}, "stop_token_ids", "stop_token_ids"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "skip_special_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format"),
        ({"tools": [{"type": "function"}]}, "tools", "tools"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice"),
        ({"web_search_options": {}}, "web_search_options", "web_search_options"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats", "leave"),
        ({"prompt": ["one", "two"]}, "prompt", "one at a time"),
        ({"prompt": [[1], [2]]}, "prompt", "one at a time"),
        ({"prompt": ["one", 2]}, "prompt", "one at a time"),
        ({"prompt": [[[1]]]}, "prompt", "is no token"),
        ({"prompt": [2**70]}, "prompt", "must be from 0"),
        ({"prompt": []}, None, "empty"),
        ({"prompt": [[]]}, None, "empty"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": [1, 99999]}, "prompt", "must be from 0"),
        ({"max_tokens": 0}, "max_tokens", "give 1 or more, or -1 for as long as there is room"),
        ({"max_tokens": -3}, "max_tokens", "-3 is no length"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "0 is no length"),
        ({"max_tokens": 2.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "true is no number"),
        ({"max_tokens": "many"}, "max_tokens", "integer"),
        ({"temperature": False}, "temperature", "false is no number"),
        ({"seed": [1]}, "seed", "integer"),
        ({"stream": "perhaps"}, "stream", "boolean"),
        ({"stop": [1]}, "stop.0", "string"),
        ({"stop": {}}, "stop", "list"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"temprature": 1}, "temprature", "not permitted: leave it out"),
        ({"prompt": None}, "prompt", "is missing: give it"),
    ],
)
def test_what_is_not_built_or_not_right_is_said(url, fields, param, says):
    response = post(url, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


CHANGES_NOTHING = [
    {"n": 1, "logprobs": None, "user": "me", "presence_penalty": 0, "logit_bias": {}, "stop": None},
    *({"n": 1.0}, {"best_of": 1}, {"echo": False}, {"suffix": ""}, {"logprobs": False}, {"top_logprobs": 0}),
    *({"top_k": -1}, {"top_k": 0}, {"min_p": 0}, {"min_p": 0.0}, {"typical_p": 1}, {"tfs_z": 1.0}, {"mirostat": 0}),
    *({"repetition_penalty": 1.0}, {"repeat_penalty": 1}, {"frequency_penalty": 0.0}, {"presence_penalty": -0.0}),
    *({"length_penalty": 1.0}, {"ignore_eos": False}, {"skip_special_tokens": True}, {"use_beam_search": False}),
    *({"min_tokens": 0}, {"stop": ""}, {"stop": []}, {"stop": [""]}, {"stop_token_ids": []}, {"bad_words": []}),
    *({"include_stop_str_in_output": False}, {"spaces_between_special_tokens": True}, {"add_generation_prompt": True}),
    *({"tools": [], "tool_choice": None}, {"tools": None, "tool_choice": "auto"}, {"tool_choice": "none"}),
    *({"functions": []}, {"function_call": None}, {"parallel_tool_calls": True}, {"response_format": {"type": "text"}}),
    *({"verbosity": "low"}, {"reasoning_effort": "none"}, {"reasoning_effort": None}, {"web_search_options": None}),
    *(
        {"prompt_cache_retention": "24h"},
        {"prompt_cache_key": "a"},
        {"prediction": {"type": "content", "content": "a"}},
    ),
    *({"store": True}, {"metadata": {}}, {"service_tier": "auto"}, {"safety_identifier": "a"}, {"user": None}),
    *({"num_ctx": 4096}, {"keep_alive": "5m"}, {"cache_prompt": True}, {"chat_template_kwargs": {}}, {"options": {}}),
    *(
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"modalities": ["text"]},
        {"audio": None},
        {"anything": None},
    ),
    *(
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": None}},
        {"stream_options": None},
    ),
    *({"stream_options": {"continuous_usage_stats": False, "include_obfuscation": True}}, {"seed": 5}, {"seed": None}),
    *({"temperature": "0"}, {"temperature": -0.0}, {"max_tokens": 4.0}, {"max_tokens": "4"}, {"stream": "false"}),
    *({"max_completion_tokens": 4}, {"max_tokens": None, "max_completion_tokens": 4}, {"max_completion_tokens": 9000}),
    *({"max_tokens": 9000, "max_completion_tokens": 4}, {"max_tokens": -1, "max_completion_tokens": 4}),
    *({"model": None}, {"model": ""}, {"top_p": 1}, {"top_p": "1.0"}),
]


@pytest.fixture(scope="module")
def plain(url):
    """Answers to requests that say no more than they must."""
    return {path: answer_of(post(url, path, **ASKED[path])) for path in ASKED}


ASKED = {
    "/v1/completions": {},
    "/v1/chat/completions": {"prompt": None, "messages": [{"role": "user", "content": "Hello"}]},
}


def answer_of(response):
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"], answer["usage"], answer["model"]


@pytest.mark.parametrize("fields", CHANGES_NOTHING, ids=str)
@pytest.mark.parametrize("path", ASKED)
def test_settings_that_change_nothing_are_taken(url, plain, path, fields):
    assert answer_of(post(url, path, **ASKED[path] | fields)) == plain[path]


def test_a_model_need_not_be_named(url, plain):
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}
    assert answer_of(request("POST", f"{url}/v1/completions", json=body)) == plain["/v1/completions"]


@pytest.fixture(scope="module")
def brief(model, tokenizer):
    with serving(model, tokenizer, Limits("tiny", max_tokens=20)) as (url, _):
        yield url


@pytest.mark.parametrize("wanted", [-1, -2, 20, 21, 4096, 10**30])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("path", ASKED)
def test_an_answer_is_as_long_as_is_wanted_and_there_is_room(brief, path, name, wanted):
    fields = ASKED[path] | {"max_tokens": None, name: wanted}
    choices, usage, _ = answer_of(post(brief, path, **fields))
    assert (usage["completion_tokens"], choices[0]["finish_reason"]) == (20, "length")


def test_the_smaller_of_two_lengths_holds(url):
    lengths = [
        answer_of(post(url, max_tokens=one, max_completion_tokens=other))[1]["completion_tokens"]
        for one, other in ((3, 5), (5, 3), (-1, 3), (3, -1), (9000, 3))
    ]
    assert lengths == [3] * 5


@pytest.mark.parametrize("wanted", [7, 20, -1])
def test_an_answer_ends_with_the_context(model, tokenizer, wanted):
    with serving(model, tokenizer, Limits("tiny", context=50)) as (url, _):
        _, usage, _ = answer_of(post(url, prompt="a" * 43, max_tokens=wanted))
    assert usage == {"prompt_tokens": 43, "completion_tokens": 7, "total_tokens": 50}


SENT_BACK = {"role": "assistant", "content": "Hi"}
SAME_MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
    {"role": "user", "content": [{"type": "input_text", "text": "H"}, "i"]},
    {"role": "user", "content": [{"text": "Hi"}], "cache_control": {"type": "ephemeral"}},
    {"role": "user", "content": "Hi", "name": "me", "id": "1", "type": "message"},
    *(
        SENT_BACK | more
        for more in (
            *({}, {"refusal": None, "annotations": [], "audio": None, "tool_calls": [], "function_call": None}),
            *({"reasoning_content": "they greet"}, {"reasoning": "they greet"}, {"reasoning_details": [{"a": 1}]}),
            *({"thinking_blocks": []}, {"provider_specific_fields": {}}, {"prefix": False}, {"tool_calls": None}),
            *({"content": [{"type": "output_text", "text": "Hi", "annotations": []}]}, {"anything": None}),
            *({"content": None, "refusal": "Hi"}, {"content": [{"type": "refusal", "refusal": "Hi"}]}),
        )
    ),
]


@pytest.mark.parametrize("message", SAME_MESSAGES, ids=str)
def test_messages_are_taken_as_clients_send_them(url, message):
    """The template of the tests shows roles and contents alone."""
    answers = [
        answer_of(
            post(url, "/v1/chat/completions", prompt=None, messages=[*messages, {"role": "user", "content": "a"}])
        )
        for messages in ([message], [{"role": message["role"], "content": "Hi"}])
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "message", [{"content": None}, {}, {"content": ""}, {"content": []}, {"content": [{"text": ""}]}]
)
def test_an_assistant_may_have_said_nothing(url, tokenizer, message):
    messages = [{"role": "assistant", **message}]
    _, usage, _ = answer_of(post(url, "/v1/chat/completions", prompt=None, messages=messages))
    assert usage["prompt_tokens"] == len(tokenizer("[assistant] <end>[assistant] ").input_ids)


def test_templates_are_told_what_they_know(model, tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}{{ m.name }}|{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
        "{{ reasoning_effort }}{{ enable_thinking }}"
    )
    message = {"role": "assistant", "content": "Hi", "name": "me", "reasoning": "they greet"}
    fields = {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}
    with serving(model, thinking) as (url, _):
        _, usage, _ = answer_of(post(url, "/v1/chat/completions", prompt=None, messages=[message], **fields))
    assert usage["prompt_tokens"] == len(tokenizer("me|they greet|HihighFalse").input_ids)


@pytest.mark.parametrize(
    ("template", "fields", "says"),
    [
        ("{{ messages }}", {"reasoning_effort": "high"}, "tiny knows no reasoning_effort: leave it out"),
        ("{{ enable_thinking }}", {"reasoning_effort": "none"}, "by chat_template_kwargs"),
        ("a", {"chat_template_kwargs": {"chat_template": "b"}}, "cannot have chat_template: leave chat_template out"),
        ("a", {"chat_template_kwargs": {"self": 1}}, "cannot have self"),
        ("{{ 1 // number }}", {"chat_template_kwargs": {"number": 0}}, "the chat template refuses"),
        ("{{ number + 1 }}", {"chat_template_kwargs": {"number": "a"}}, "the chat template refuses"),
        ("{{ number.a.b }}", {"chat_template_kwargs": {"conversations": 1}}, "the chat template refuses"),
    ],
)
def test_what_a_template_does_not_know_is_refused(model, tokenizer, template, fields, says):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with serving(model, other) as (url, _):
        response = post(url, "/v1/chat/completions", prompt=None, messages=[SENT_BACK], **fields)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


NO_JSON = "the body is no JSON object: send one, as application/json."


@pytest.mark.parametrize(
    "body", ["{", "[]", '"text"', "", "3", "null", "prompt=Hello", '{"prompt": "a",}', "{'prompt': 'a'}"]
)
def test_a_body_that_is_no_object_is_refused_by_one_sentence(url, body):
    status, answer = send(url, body.encode())
    assert (status, answer["error"]["message"], answer["error"]["param"]) == (400, NO_JSON, None)


@pytest.mark.parametrize(
    "body",
    [
        *("\xff", "[" * 9000, '{"prompt": "a", "seed": ' + "9" * 5000 + "}", '{"prompt": "a", "max_tokens": 1e999}'),
        '{"model": "tiny", "prompt": "Hello", "temperature": NaN}',
        '{"model": "tiny", "prompt": "half a character: \\ud83e"}',
    ],
)
def test_a_body_that_is_no_request_is_refused(url, body):
    headers = {"content-type": "application/json"}
    response = request("POST", f"{url}/v1/completions", content=body.encode("latin-1"), headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        (
            {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "content",
            "type 'image_url' are not supported",
        ),
        ({"content": [{"type": "text"}]}, "content", "has no text"),
        ({"content": [{"type": "text", "text": 3}]}, "content", "has no text"),
        ({"content": [{"type": ["text"], "text": "a"}]}, "content", "not supported"),
        ({"content": [{"type": "text", "text": "a", "image": "b"}]}, "content", "'image' of a part is not supported"),
        ({"content": [3]}, "content", "send texts"),
        ({"content": 3}, "content", "string"),
        ({"content": {}}, "content", "string"),
        ({"content": None}, "content", "is missing"),
        ({"content": "a", "weather": "b"}, "weather", "not permitted"),
        ({"content": "a", "reasoning_content": 3, "role": "assistant"}, "reasoning_content", "string"),
        ({"content": "a", "tool_calls": [{"id": "1"}], "role": "assistant"}, "tool_calls", "messages.0: tool_calls"),
        ({"content": None, "function_call": {"name": "a"}, "role": "assistant"}, "function_call", "function_call"),
        ({"content": "a", "prefix": True, "role": "assistant"}, "prefix", "leave prefix out"),
        ({"content": "3", "role": "tool", "tool_call_id": "1"}, "role", "'assistant'"),
        ({"content": "3", "role": "robot"}, "role", "'assistant'"),
        ({"content": "3", "role": None}, "role", "is missing"),
        ({"content": "\ud83e"}, "content", "half a character"),
        (3, None, "dictionary"),
    ],
    ids=str,
)
def test_messages_of_other_kinds_are_refused(url, message, param, says):
    if isinstance(message, dict):
        message = {"role": "user"} | message
    body = json.dumps({"model": "tiny", "messages": [message]})
    response = request("POST", f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == ".".join(filter(None, ["messages.0", param]))
    assert says in error["message"]
    assert len(error["message"]) < 300


VALUES = st.recursive(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 4, 0.5, 1e300, 10**30, "", "a", "0.5", "\x00", "true", "user", "text"]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage", "a"]), inner, max_size=3),
    ),
    max_leaves=6,
)
NAMES = sorted([*CompletionRequest.model_fields, *ChatRequest.model_fields, *_ONLY, *_CHANGE_NOTHING, "another"])


@given(st.sampled_from(sorted(ASKED)), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
@settings(max_examples=100)
def test_whatever_is_sent_is_answered_or_refused_by_one_sentence(url, path, fields):
    response = post(url, path, **{"max_tokens": 1} | ASKED[path] | fields)
    if response.status_code == 200:
        return
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert 10 < len(error["message"]) < 300


def test_a_conversation_without_messages_is_refused(url):
    error = post(url, "/v1/chat/completions", prompt=None, messages=[]).json()["error"]
    assert (error["param"], error["message"]) == ("messages", "messages: is empty: give at least one.")


def test_a_prompt_beyond_the_context_names_both_numbers(url):
    response = post(url, prompt="a" * tiny_checkpoint.CONTEXT)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert f"{tiny_checkpoint.CONTEXT} tokens" in error["message"]
    assert f"has {tiny_checkpoint.CONTEXT} tokens" in error["message"]
    assert post(url, prompt="a" * (tiny_checkpoint.CONTEXT - 1)).status_code == 200


def test_a_context_may_be_shortened(model, tokenizer):
    with serving(model, tokenizer, Limits("tiny", context=50)) as (url, _):
        assert post(url, prompt="a" * 49).status_code == 200
        assert post(url, prompt="a" * 50).status_code == 400
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": None, "temperature": 0}
        answer = request("POST", f"{url}/v1/chat/completions", json=chat).json()
        assert answer["usage"]["total_tokens"] == 50


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(url, is_chunked):
    body = json.dumps({"model": "tiny", "prompt": "a" * 30_000}).encode()
    content = iter([body[:15_000], body[15_000:]]) if is_chunked else body
    headers = {"content-type": "application/json"}
    response = request("POST", f"{url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/v2", 404, "there is no '/v2' here: use one of /v1/chat/completions"),
        ("POST", "/chat/completions", 404, "use one of /v1/chat/completions"),
        ("POST", "/v1/v1/completions", 404, "there is no"),
        ("POST", "/v1/embeddings", 404, "there is no"),
        ("GET", "/", 404, "there is no '/' here"),
        ("GET", "/v1/models/%00%ff", 404, "does not exist here"),
        ("GET", "/v1/completions", 405, "GET is not for /v1/completions: use POST."),
        ("OPTIONS", "/v1/completions", 405, "OPTIONS is not for /v1/completions: use POST."),
        ("DELETE", "/v1/models/tiny", 405, "use GET, HEAD."),
    ],
)
def test_other_addresses_and_methods_are_refused_in_the_same_form(url, method, path, status, says):
    response = request(method, url + path)
    assert response.status_code == status
    error = response.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("method", "path"), [("GET", "/v2"), ("GET", "/v1/completions"), ("POST", "/v1/models/")])
@pytest.mark.parametrize("host", ["[", "", "a b"])
def test_a_host_that_is_none_is_refused_in_the_same_form(url, method, path, host):
    response = request(method, url + path, headers={"Host": host})
    assert response.status_code in (404, 405)
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["//v1/completions", "/v1/completions/", "/v1//completions//", "///v1/completions"])
def test_slashes_that_are_too_many_do_no_harm(url, plain, path):
    assert answer_of(post(url, path)) == plain["/v1/completions"]
    assert request("GET", f"{url}//v1/models/").json() == request("GET", f"{url}/v1/models").json()
    assert request("GET", f"{url}/v1/models/tiny/?a=b").json()["id"] == "tiny"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/health", "/metrics"])
def test_what_can_be_read_can_be_asked_for_its_head(url, path):
    response = request("HEAD", url + path)
    assert (response.status_code, response.content) == (200, b"")


JSON_TYPES = [
    *(None, "application/json", "application/json; charset=utf-8", "text/plain", "application/octet-stream"),
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "nonsense", ""),
]


def send(url, content, kind="application/json", **headers):
    """Through the socket's own client, which adds no headers."""
    connection = http.client.HTTPConnection("127.0.0.1", httpx2.URL(url).port, timeout=LONGEST)
    with contextlib.closing(connection):
        given = headers if kind is None else headers | {"Content-Type": kind}
        connection.request("POST", "/v1/completions", content, given)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


BODY = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0}).encode()


@pytest.mark.parametrize("kind", JSON_TYPES)
def test_json_is_json_however_it_is_declared(url, plain, kind):
    for body in (BODY, b"\xef\xbb\xbf" + BODY, BODY.decode().encode("utf-16"), b" \n" + BODY + b"\n"):
        status, answer = send(url, body, kind)
        assert status == 200, answer
        assert answer["choices"] == plain["/v1/completions"][0]


@pytest.mark.parametrize("kind", [kind for kind in JSON_TYPES if "json" not in (kind or "")])
def test_a_page_cannot_ask_past_its_browser(url, kind):
    """Requests of such types are sent without asking whether the page may."""
    status, answer = send(url, BODY, kind, Origin="https://elsewhere.example")
    assert (status, answer["error"]["message"]) == (400, NO_JSON)


def test_a_model_without_a_chat_template_says_what_to_do(model, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with serving(model, plain) as (url, _), pytest.raises(openai.BadRequestError, match="use /v1/completions"):
        ask(client_of(url))


def test_what_a_template_refuses_is_said(model, tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with serving(model, strict) as (url, _), pytest.raises(openai.BadRequestError, match="roles must alternate"):
        ask(client_of(url))


def test_a_key_is_wanted_where_there_is_one(model, tokenizer):
    with serving(model, tokenizer, Limits("tiny", api_key=KEY)) as (url, _):
        assert complete(client_of(url, KEY), tokens=2)
        for key in ("another", KEY + "x", KEY[:-1]):
            with pytest.raises(openai.AuthenticationError):
                complete(client_of(url, key))
        assert request("GET", f"{url}/v1/models").status_code == 401
        assert request("GET", f"{url}/metrics").status_code == 401
        assert request("GET", f"{url}/health").status_code == 200
        for given, status in (("bearer " + KEY, 200), (KEY, 401), ("Basic " + KEY, 401), ("Bearer", 401), ("", 401)):
            assert request("GET", f"{url}/v1/models", headers={"Authorization": given}).status_code == status
        counted = metrics(url, {"Authorization": f"Bearer {KEY}"})
    assert counted['qjl_requests_total{path="/v1/completions",status="401"}'] == 3


# Browsers

PAGE = "http://localhost:3000"


def preflight(url, page=PAGE, path="/v1/chat/completions", **headers):
    wanted = {
        "Origin": page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    return request("OPTIONS", url + path, headers=wanted | headers)


def allowed(response):
    return response.headers.get("access-control-allow-origin")


@pytest.fixture
def open_to(model, tokenizer):
    """A server for some pages, with a key."""

    @contextlib.contextmanager
    def start(*origins, **settings):
        limits = Limits("tiny", api_key=KEY, origins=origins, max_body=20_000, queue=1)
        with serving(model, tokenizer, limits, slots=1, **settings) as (url, _):
            yield url

    return start


def test_pages_may_read_nothing_unless_they_are_named(url):
    assert preflight(url).status_code == 405
    assert not [name for name in post_of_page(url).headers if name.startswith("access-control")]


def post_of_page(url, page=PAGE, key=KEY, path="/v1/completions", **fields):
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0} | fields
    headers = {"Origin": page, "Authorization": f"Bearer {key}"}
    return request("POST", url + path, json=body, headers=headers)


@pytest.mark.parametrize(("origins", "expected"), [(("http://a.example", PAGE), PAGE), (("*",), "*")])
def test_pages_that_are_named_may_ask_and_read(open_to, origins, expected):
    with open_to(*origins) as url:
        asked = preflight(url, **{"Access-Control-Request-Private-Network": "true"})  # which has no key
        assert (asked.status_code, allowed(asked)) == (200, expected)
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        assert asked.headers["access-control-allow-private-network"] == "true"
        for fields in ({}, {"stream": True}):
            answer = post_of_page(url, **fields)
            assert (answer.status_code, allowed(answer)) == (200, expected)
            assert "Retry-After" in answer.headers["access-control-expose-headers"]
        assert allowed(request("GET", f"{url}/health", headers={"Origin": PAGE})) == expected


def test_other_pages_may_not(open_to):
    with open_to(PAGE) as url:
        asked = preflight(url, page="http://elsewhere.example")
        assert (asked.status_code, allowed(asked)) == (400, None)
        assert "another --cors-origin" in asked.json()["error"]["message"]
        assert allowed(post_of_page(url, page="http://elsewhere.example")) is None


def test_pages_are_told_what_is_wrong(open_to, monkeypatch, turns):
    with open_to(PAGE) as url, asking(lambda number: post_of_page(url), 2):
        key = {"Authorization": f"Bearer {KEY}"}
        wait_until(lambda: metrics(url, key)["qjl_requests_waiting"] == 1)
        full = post_of_page(url)
        turns.release(ENOUGH)
        wait_until(lambda: metrics(url, key)["qjl_requests_running"] == 0)

        def fail(*arguments):
            raise RuntimeError("out of luck")

        monkeypatch.setattr(RaggedBatch, "read", fail)
        answers = [
            *(full, post_of_page(url, key="another"), post_of_page(url, path="/v2"), post_of_page(url, n=2)),
            *(post_of_page(url, prompt="a" * 30_000), post_of_page(url)),
        ]
    assert [answer.status_code for answer in answers] == [429, 401, 404, 400, 413, 500]
    assert {allowed(answer) for answer in answers} == {PAGE}
    assert all(answer.json()["error"]["message"] for answer in answers)


@pytest.mark.parametrize(
    ("page", "origin"),
    [
        ("*", "*"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("HTTP://LocalHost:3000/", "http://localhost:3000"),
        ("https://a.example:443", "https://a.example"),
        ("http://[::1]:80", "http://[::1]"),
        ("app://obsidian.md", "app://obsidian.md"),
    ],
)
def test_an_origin_is_as_browsers_name_it(page, origin):
    assert serve_command.origin_of(page) == origin


@pytest.mark.parametrize(
    "page", ["", "localhost", "localhost:3000", "http://a/b", "http://u@a", "http://[::1", "null", "//a"]
)
def test_a_page_that_is_no_origin_is_refused(page, refuses):
    with refuses("give https://host"):
        serve_command.origin_of(page)


# Under load


@pytest.fixture
def turns(monkeypatch):
    """The engine takes as many turns as are released; meanwhile it takes up requests, and tells what it holds."""
    released, turn = threading.Semaphore(0), Engine._turn

    def take(engine):
        if released.acquire(timeout=0.01):
            turn(engine)

    monkeypatch.setattr(Engine, "_turn", take)
    return released


@contextlib.contextmanager
def sending(url, body, length=None):
    """The connection that a request was sent on, of which more may have been promised; it is closed afterwards."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length or len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", httpx2.URL(url).port), timeout=LONGEST) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        yield connection


def test_too_many_are_told_to_wait(model, tokenizer, turns):
    with (
        serving(model, tokenizer, Limits("tiny", queue=1), slots=1) as (url, _),
        asking(lambda number: post(url), 2) as answers,
    ):
        wait_until(lambda: metrics(url)["qjl_requests_waiting"] == 1)
        response = post(url)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            complete(client_of(url))
        turns.release(ENOUGH)
    assert [answer.status_code for answer in answers] == [200, 200]


def test_bodies_that_do_not_come_keep_no_place(model, tokenizer, monkeypatch):
    with serving(model, tokenizer, Limits("tiny", queue=0), slots=1) as (url, _):
        with sending(url, "{", 99):
            wait_until(lambda: post(url).status_code == 429)
        wait_until(lambda: post(url).status_code == 200)
        monkeypatch.setattr(app_module, "BODY_SECONDS", 0.3)
        with sending(url, "{", 99) as stalled:
            answer = stalled.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"send it faster" in answer
        wait_until(lambda: post(url).status_code == 200)


def test_a_short_prompt_waits_for_a_piece_of_a_long_one(model, tokenizer, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    heard, done = [], threading.Semaphore(0)

    def job(name, tokens):
        def hear(piece):
            heard.append(name)
            if piece.reason:
                done.release()

        return Job(tokenizer("a" * tokens).input_ids, 2, hear, Choice(0))

    engine = Engine(model, tokenizer, resolve(PRESET))
    for one in (job("long", 8 * 16), job("short", 3), job("longer", 20 * 16), job("last", 5)):
        engine.submit(one)
    assert all(done.acquire(timeout=LONGEST) for _ in range(4))
    engine.close()
    assert heard.index("long") > max(heard.index("short"), heard.index("last"))
    assert heard.index("longer") > heard.index("long")


def test_a_client_that_waits_as_told_is_served(model, tokenizer):
    with serving(model, tokenizer, Limits("tiny", queue=0), slots=1) as (url, _):
        patient = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=6)
        with asking(lambda number: complete(patient, f"{number}", 3), 3) as answers:
            pass
    assert all(answer.usage.completion_tokens == 3 for answer in answers)


def test_a_client_that_goes_before_the_first_event_frees_its_row(model, tokenizer):
    """When the answer's head cannot be sent, though nobody tells that the client has gone."""
    engine = Engine(model, tokenizer, resolve(PRESET))
    app = build(Service(engine, tokenizer, Limits("tiny")))
    body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 500, "stream": True, "temperature": 0})
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}

    async def ask():
        parts = iter([{"type": "http.request", "body": body.encode()}])

        async def receive():
            return next(parts, None) or await asyncio.Event().wait()

        async def send(message):
            raise OSError("gone")

        with contextlib.suppress(Exception):
            await app(scope | {"asgi": {"version": "3.0", "spec_version": "2.4"}}, receive, send)
        # the job is left before anything else is done for it
        assert all(row.job.is_cancelled for row in engine._rows)

    asyncio.run(asyncio.wait_for(ask(), LONGEST))
    wait_until(lambda: engine.is_idle)
    assert engine.held().result(LONGEST).cache_bytes == 0
    assert engine.metrics.tokens_written._value.get() < 500
    engine.close()


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_row(model, tokenizer, turns, streams):
    with serving(model, tokenizer, slots=1) as (url, _):
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 500, "stream": streams, "temperature": 0}
        with sending(url, json.dumps(body)) as rude:
            turns.release(20)
            wait_until(lambda: metrics(url)["qjl_generated_tokens_total"] == 20)
            if streams:
                assert rude.recv(4096)
        wait_until(lambda: metrics(url)["qjl_requests_running"] == 0)
        assert metrics(url)["qjl_cache_bytes"] == 0
        if not streams:
            wait_until(lambda: 'qjl_requests_total{path="/v1/completions",status="499"}' in metrics(url))
        turns.release(ENOUGH)
        assert post(url).status_code == 200
        assert metrics(url)["qjl_generated_tokens_total"] == 20 + 4


def test_a_client_that_goes_away_while_waiting_is_not_served(model, tokenizer, turns):
    with (
        serving(model, tokenizer, Limits("tiny", queue=1), slots=1) as (url, _),
        asking(lambda number: post(url), 1),
    ):
        wait_until(lambda: metrics(url)["qjl_requests_running"] == 1)
        with sending(url, json.dumps({"model": "tiny", "prompt": "a" * 900})):
            wait_until(lambda: metrics(url)["qjl_requests_waiting"] == 1)
        wait_until(lambda: metrics(url)["qjl_requests_waiting"] == 0)
        assert metrics(url)["qjl_requests_running"] == 1
        with asking(lambda number: post(url), 1) as later:
            wait_until(lambda: metrics(url)["qjl_requests_waiting"] == 1)  # there is room again
            turns.release(ENOUGH)
        assert later[0].status_code == 200
        wait_until(lambda: metrics(url)["qjl_requests_running"] == 0)
        assert metrics(url)["qjl_prompt_tokens_total"] == 10


def test_answers_do_not_wait_for_each_other(model, tokenizer, turns):
    with serving(model, tokenizer, slots=2) as (url, _), asking(lambda number: post(url, max_tokens=100), 1):
        wait_until(lambda: metrics(url)["qjl_requests_running"] == 1)
        with asking(lambda number: post(url, max_tokens=3), 1):
            wait_until(lambda: metrics(url)["qjl_requests_running"] == 2)
            turns.release(50)
        assert metrics(url)["qjl_requests_running"] == 1  # the longer one still
        turns.release(ENOUGH)


def test_metrics_count(model, tokenizer, turns):
    with serving(model, tokenizer, slots=1) as (url, _):
        with asking(lambda number: post(url, prompt="a" * 600, max_tokens=60), 2):
            wait_until(lambda: metrics(url)["qjl_requests_waiting"] == 1)
            turns.release(30)
            wait_until(lambda: metrics(url)["qjl_cache_compression_ratio"] > 2)
            during = metrics(url)
            turns.release(ENOUGH)
        after = metrics(url)
    assert (during["qjl_requests_running"], during["qjl_requests_waiting"]) == (1, 1)
    full = during["qjl_cache_full_bytes"]
    per_token = 2 * 2 * 2 * 32 * 2  # layers, keys and values, heads, head_dim, bytes
    assert full % per_token == 0
    assert 600 <= full / per_token < 660
    assert full / during["qjl_cache_bytes"] == pytest.approx(during["qjl_cache_compression_ratio"])
    assert after["qjl_cache_bytes"] == after["qjl_cache_full_bytes"] == 0
    assert after['qjl_requests_total{path="/v1/completions",status="200"}'] == 2
    assert after["qjl_prompt_tokens_total"] == 1200
    assert after["qjl_generated_tokens_total"] == 120
    assert after["qjl_time_to_first_token_seconds_count"] == 2
    assert after["qjl_time_per_token_seconds_count"] == 118


def test_tokens_are_gone_with_their_requests(model, tokenizer):
    with serving(model, tokenizer) as (url, _):
        with asking(lambda number: post(url, prompt="a" * 200), 8):
            pass
        wait_until(lambda: metrics(url)["qjl_requests_running"] == 0)
        assert metrics(url)["qjl_cache_bytes"] == 0


def test_who_asks_and_does_not_wait_harms_nobody(model, tokenizer):
    engine = Engine(model, tokenizer, resolve(PRESET))
    done = threading.Event()
    with engine._changed:  # so that nothing is answered yet
        assert engine.held().cancel()
    engine.submit(Job(tokenizer("Hello").input_ids, 10, lambda piece: piece.reason and done.set(), Choice(0)))
    assert done.wait(LONGEST)
    assert engine.held().result(LONGEST).running == 0
    engine.close()


def test_a_failed_pass_fails_its_answers_and_no_others(model, tokenizer, monkeypatch, caplog):
    failing, read = threading.Event(), RaggedBatch.read

    def turn(*arguments):
        if failing.is_set():
            failing.clear()
            raise RuntimeError("out of luck")
        return read(*arguments)

    monkeypatch.setattr(RaggedBatch, "read", turn)
    with serving(model, tokenizer) as (url, _), caplog.at_level(logging.ERROR):
        failing.set()
        response = post(url)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "out of luck" not in response.text
        assert "out of luck" in caplog.text
        assert post(url).status_code == 200


def test_what_goes_wrong_with_one_answer_ends_no_other(model, tokenizer, monkeypatch):
    take = engine_module._Row.take

    def fail(row, *arguments):
        if tokenizer.decode(row.job.ids) == "Fail" and row.job.written == 5:
            raise RuntimeError("out of luck")
        take(row, *arguments)

    monkeypatch.setattr(engine_module._Row, "take", fail)
    with serving(model, tokenizer) as (url, _):
        prompts = ("Hello", "Fail", "Hello")
        with asking(lambda number: post(url, prompt=prompts[number], max_tokens=20), 3) as answers:
            pass
    assert [answer.status_code for answer in answers] == [200, 500, 200]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_keeps_nobody_waiting(model, tokenizer, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Engine, "_rows_of_turn", fail)
    with serving(model, tokenizer) as (url, _):
        assert post(url).status_code == 503
        wait_until(lambda: request("GET", f"{url}/health").status_code == 503)
        assert post(url).status_code == 503
        assert metrics(url)["qjl_requests_running"] == 0


def test_an_error_in_a_stream_is_an_event(model, tokenizer, monkeypatch):
    turns, read = iter([False] * 5 + [True]), RaggedBatch.read

    def turn(*arguments):
        if next(turns):
            raise RuntimeError("out of luck")
        return read(*arguments)

    monkeypatch.setattr(RaggedBatch, "read", turn)
    with serving(model, tokenizer) as (url, _), pytest.raises(openai.APIError, match="could not write this answer"):
        list(complete(client_of(url), tokens=50, stream=True))


# The end


def stop(here):
    loop = next(iter(here.servers)).get_loop()
    loop.call_soon_threadsafe(here.stop)


def test_running_answers_are_written_at_the_end(model, tokenizer, turns):
    with serving(model, tokenizer, slots=1) as (url, here):
        with httpx2.Client(timeout=LONGEST, verify=False) as kept, asking(lambda number: post(url), 2) as answers:
            wait_until(lambda: metrics(url)["qjl_requests_waiting"] == 1)
            stop(here)
            wait_until(lambda: kept.get(f"{url}/health").status_code == 503)
            late = kept.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "Hello"})
            assert late.status_code == 503
            assert int(late.headers["retry-after"]) > 0
            turns.release(ENOUGH)
        wait_until(lambda: not here.servers[0].is_serving())
    assert sorted(answer.status_code for answer in answers) == [200, 503]


def test_the_end_does_not_wait_for_ever(model, tokenizer, turns):
    with serving(model, tokenizer) as (url, here):
        here.grace = 0.2
        with asking(lambda number: post(url), 1) as answers:
            wait_until(lambda: metrics(url)["qjl_requests_running"] == 1)
            stop(here)
        assert answers[0].status_code == 503


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint.save(tmp_path_factory.mktemp("served")))


@pytest.fixture
def command(checkpoint, tmp_path):
    """Arguments of ``qjl serve`` with a model and a text to fit its codes to."""
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 40)
    return [sys.executable, "-m", "qjl", "serve", checkpoint, "--data", str(text), "--port", "0", "--name", "tiny"]


def test_the_command_serves_until_it_is_asked_to_end(command, tmp_path):
    environment = os.environ | {"QJL_CACHE": str(tmp_path / "cache"), "QJL_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            url, bits = re.fullmatch(r"tiny at (\S+)/v1, on caches of b3: (.*)\n", line).groups()
            assert bits == "3.25 bits for keys, 2.25 for values"
            stream = complete(client_of(url, KEY), tokens=200, temperature=1, seed=2, stream=True)
            next(stream)
            process.send_signal(signal.SIGTERM)
            *_, last = stream
            assert last.choices[0].finish_reason in ("length", "stop")
            assert process.wait(LONGEST) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()


def serve(*arguments):
    return CliRunner().invoke(cli.app, ["serve", *arguments])


def test_a_port_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = serve("--port", port)
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: cannot listen on 127.0.0.1:{port} (Address already in use): choose another --host or --port.\n"
    )
    with pytest.raises(QJLError, match="no address to listen on"):
        listener.listen("nowhere.invalid", 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--api-key", ""], "the API key is empty"),
        (["smollm2", "--engine", "transformers", "--", "--enforce-eager"], "are for --engine vllm"),
        (["--engine", "vllm", "--queue", "0", "--bits", "3"], "--queue, --bits are for --engine transformers"),
        (["--port", "0", "--preset", "b99"], "b99"),
        (["--cors-origin", "localhost:3000"], "--cors-origin 'localhost:3000' is no origin"),
        (["--port", "0", "--max-body", "much"], "memory 'much' is not a size"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(arguments, says):
    result = serve(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setattr(serve_command, "find_spec", lambda package: None)
    assert serve().stderr == "Error: the server is not installed: run `pip install 'qjl[serve]'`.\n"


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("::", True)]
)
def test_which_addresses_are_public(host, expected):
    assert listener.is_public(host) is expected


# vLLM


@pytest.fixture
def pretended_vllm(tmp_path, monkeypatch):
    """An empty vLLM that knows our plugin; what would run in place of this process."""
    package, plugin = tmp_path / "vllm", tmp_path / "pretended-1.dist-info"
    package.mkdir()
    plugin.mkdir()
    (package / "__init__.py").touch()
    (plugin / "METADATA").write_text("Name: pretended\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nqjl = qjl.vllm:register\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = Mock(side_effect=SystemExit)
    monkeypatch.setattr(vllm_launch.os, "execve", run)
    return run


def test_vllm_serves_where_it_is(pretended_vllm, checkpoint, command, monkeypatch, tmp_path):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))
    options = ["--preset", "b2", "--slots", "4", "--api-key", KEY, "--cors-origin", PAGE, "--", "--enforce-eager"]
    serve(*command[4:], *options)
    program, given, environment = pretended_vllm.call_args.args
    assert program == given[0] == sys.executable
    assert given[1:4] == ["-m", "vllm.entrypoints.openai.api_server", f"--model={checkpoint}"]
    assert {"--port=0", "--host=127.0.0.1", "--max-num-seqs=4", "--enforce-eager"} <= set(given)
    assert f'--allowed-origins=["{PAGE}"]' in given
    assert KEY not in given  # everybody on the machine could read it there
    assert (environment["QJL_VLLM_PRESET"], environment["VLLM_API_KEY"]) == ("b2", KEY)
    measured = ServedModel(checkpoint).statistics_path.stat()
    serve(*command[4:], *options)
    assert ServedModel(checkpoint).statistics_path.stat() == measured  # once is enough


def test_vllm_that_is_missing_is_said(refuses, monkeypatch):
    monkeypatch.setattr(vllm_launch, "is_installed", lambda: False)
    with refuses("vLLM is not installed"):
        vllm_launch.require_ready()
    monkeypatch.setattr(vllm_launch, "is_installed", lambda: True)
    monkeypatch.setattr(vllm_launch, "has_plugin", lambda: False)
    with refuses("does not find this package's plugin"):
        vllm_launch.require_ready()


# The pages


def served_lines():
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/serving.md"))
    return re.findall(r"^(qjl serve.*?)(?:\s*#.*)?$", text, re.M)


@pytest.mark.parametrize("line", served_lines())
def test_a_line_of_the_pages_is_one_that_the_command_takes(line):
    serve = typer.main.get_command(cli.app).commands["serve"]
    serve.make_context("serve", shlex.split(line)[2:])


def test_the_page_names_every_option_metric_and_status():
    page = (ROOT / "docs/serving.md").read_text()
    options = [name for one in typer.main.get_command(cli.app).commands["serve"].params for name in one.opts]
    names = [name for name in options if name.startswith("--") and name != "--help"]
    names += re.findall(r"qjl_\w+", Metrics().text(Held(0, 0, 0, 0, 0)).decode())
    told = re.sub(r"_(total|bucket|count|sum|created)\b", "", page)
    missing = {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in names} - set(
        re.findall(r"--[\w-]+|qjl_\w+", told)
    )
    assert not missing


# A real model


@pytest.mark.model
def test_smollm_answers_many_at_once():
    network, words = models.load("smollm2")
    questions = [f"What is the capital of {country}?" for country in ("France", "Germany", "Japan", "Egypt")]
    with serving(network, words, Limits("tiny"), preset="full") as (url, _):
        client = client_of(url)
        with asking(lambda number: ask(client, questions[number], 16), len(questions)) as answers:
            pass
        texts = [answer.choices[0].message.content for answer in answers]
        assert texts[0] == ask(client, questions[0], 16).choices[0].message.content
    for text, capital in zip(texts, ("Paris", "Berlin", "Tokyo", "Cairo"), strict=True):
        assert capital in text
