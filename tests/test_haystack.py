"""Haystacks: what is hidden is there and asked for, answers are shares of words, and presets are really asked."""

import random

import pytest
import torch

from models_for_tests import tiny
from qjl.lab.evals import haystack
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.haystack import TASKS, HaystackCell, HaystackProtocol, Task
from tiny_checkpoint import CONTEXT, byte_tokenizer

FIT = "Call me Ishmael, some years ago, never mind how long precisely. " * 35
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 35
SMALL = HaystackProtocol(("needle",), (400,), depths=2)


@pytest.fixture(scope="module")
def subject():
    model = tiny(vocab_size=len(byte_tokenizer()), max_position_embeddings=CONTEXT)
    return EvalModel("tiny", model, byte_tokenizer(), FIT)


def haystack_of(subject, cell):
    return haystack._Haystack(subject, haystack._Filler(subject, TEXT, 2000), cell)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.1, 0.9])
def test_everything_hidden_stands_in_order_in_so_many_tokens(subject, task, depth):
    one = haystack_of(subject, HaystackCell(task, 2000, depth, 0))
    text = subject.tokenizer.decode(one.tokens)
    places = [text.index(needle) for needle in one.task.needles]
    assert places == sorted(places)
    assert abs(places[0] / len(text) - depth) < 0.1 + 0.2 * depth
    assert len(one.tokens) + one.question.shape[1] == 2000
    told = " ".join(one.task.needles)
    assert all(word in told for word in one.task.expected)
    assert ("The grass is green" in text) is (task == "passkey")


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_makes_its_own_words(task):
    first, again, other = (TASKS[task](random.Random(seed)) for seed in (0, 0, 1))
    assert first == again
    assert not set(first.expected) & set(other.expected)


def test_what_is_asked_is_one_of_many():
    task = TASKS["multikey"](random.Random(3))
    (needle,) = [needle for needle in task.needles if task.expected[0] in needle]
    assert len(task.needles) == haystack.DISTRACTORS + 1
    assert task.question.count(needle.split(" is: ")[0].removeprefix("One of the special magic numbers for ")) == 2


def test_variables_form_a_chain():
    task = TASKS["tracking"](random.Random(0))
    holders = {task.needles[0].split()[1]}
    for needle in task.needles[1:]:
        _, name, _, _, source = needle.rstrip(".").split()
        assert source in holders
        holders.add(name)
    assert holders == set(task.expected)


def test_an_answer_counts_by_its_words(subject):
    one = haystack_of(subject, HaystackCell("multivalue", 1000, 0.5, 0))
    first, second, *_ = one.task.expected
    assert one.share(f"{first}, and {second}.") == 0.5
    assert one.share("none") == 0
    assert one.share(f"{first}1, 9{second}, x{first} and {second}_") == 0


def test_every_preset_is_asked_in_every_cell(subject):
    rows = list(haystack.measure_retrieval(subject, ["full", "turboquant-3"], TEXT, SMALL))
    assert [(row["preset"], row["depth"]) for row in rows] == [
        (p, d) for d in (0.25, 0.75) for p in ("full", "turboquant-3")
    ]
    for row in rows:
        assert 0.8 < row["read_as_codes"] < 1
        assert row["found"] in (0, 1)
        assert (row["case"], row["task"], row["context"]) == ("haystack", "needle", 400)
    assert rows[0]["answer"] != ""


def test_the_answer_of_full_precision_is_the_model_s(subject):
    one = haystack_of(subject, HaystackCell("needle", 400, 0.5, 0))
    (row,) = haystack.measure_retrieval(subject, ["full"], TEXT, HaystackProtocol(("needle",), (400,), depths=1))
    ids = subject.model.generate(
        input_ids=_joined(one), max_new_tokens=haystack.ANSWER_TOKENS, do_sample=False, pad_token_id=0
    )
    expected = subject.tokenizer.decode(ids[0, 400:], skip_special_tokens=True).partition("\n\n")[0]
    assert row["answer"] == expected


def _joined(one):
    return torch.cat([torch.tensor([one.tokens]), one.question], 1)


def test_a_killed_run_asks_only_what_is_missing(subject, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    whole = list(haystack.measure_retrieval(subject, ["turboquant-3"], TEXT, SMALL, path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:20])
    asked = []
    monkeypatch.setattr(
        haystack, "refill", lambda cache, exact, refill=haystack.refill: (asked.append(1), refill(cache, exact))
    )
    assert list(haystack.measure_retrieval(subject, ["turboquant-3"], TEXT, SMALL, path)) == whole
    assert path.read_text() == "".join(lines)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (HaystackProtocol(("needle",), (4000,)), "too few for a haystack of 4000"),
        (HaystackProtocol(("tracking",), (300,)), "the needles of tracking do not fit into 300 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(subject, protocol, message, refuses):
    with refuses(message):
        list(haystack.measure_retrieval(subject, ["full"], TEXT, protocol))


def test_a_context_longer_than_the_model_s_is_refused(refuses):
    model = tiny(vocab_size=len(byte_tokenizer()), max_position_embeddings=512)
    with refuses("500 tokens leave no room for an answer in the model's context of 512"):
        list(
            haystack.measure_retrieval(
                EvalModel("tiny", model, byte_tokenizer(), FIT), ["full"], TEXT, HaystackProtocol(contexts=(500,))
            )
        )


def test_protocols_that_ask_nothing_are_refused(refuses):
    with refuses("there is no task 'hay': choose from needle, passkey"):
        HaystackProtocol(("hay",))
    with refuses("at least one depth and seed"):
        HaystackProtocol(depths=0)


def test_codecs_are_never_fitted_to_the_hay(subject):
    both = EvalModel("tiny", subject.model, byte_tokenizer(), TEXT)
    everything, fitted = both.tokens(TEXT)[0], 2048
    assert torch.equal(both.unseen(TEXT), everything[fitted:])
    assert torch.equal(both.unseen(FIT), both.tokens(FIT)[0])


def test_needles_begin_where_they_should():
    assert haystack._hidden(list(range(10)), [[-1], [-2]], 0.4) == [0, 1, 2, 3, -1, 4, 5, 6, -2, 7, 8, 9]
    assert Task(("a",), "b", ("c",)).is_noise is False
