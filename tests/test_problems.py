"""Problems: final answers are found and compared, batches do not matter, and what is written is read from codes."""

import itertools
import json

import pytest
from transformers import GenerationConfig

from models_for_tests import tiny
from qjl.lab.evals import greedy, problems
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.greedy import write
from qjl.lab.evals.problems import Problem, ProblemsProtocol, final_answer, is_same
from qjl.presets import PRESETS
from tiny_checkpoint import CONTEXT, byte_tokenizer

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 35
ASKED = [Problem(f"What is {n} times seven, if {'really ' * n}nothing else is known?", str(7 * n)) for n in range(1, 6)]
QUICK = ProblemsProtocol(max_new_tokens=80, batch=2, recent=0)


@pytest.fixture(scope="module")
def subject():
    model = tiny(vocab_size=len(byte_tokenizer()), max_position_embeddings=CONTEXT)
    model.generation_config = GenerationConfig(eos_token_id=1)
    return EvalModel("tiny", model, byte_tokenizer(), TEXT)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
        ("#### 7\nno, rather\n#### 1,080", "1,080"),
        (r"Therefore \[ x = \boxed{\frac{1}{2}} \] holds.", r"\frac{1}{2}"),
        (r"First \boxed{3}, then \boxed{4}.", "4"),
        ("So the final answer is: $42.", "42"),
        ("That leaves 3 apples and 12 pears.", "12"),
        ("about -3.5 degrees", "-3.5"),
        (r"An open \boxed{5", "5"),
        ("The answer is 18 apples.", "18 apples"),
        ("none at all", "none at all"),
    ],
)
def test_what_a_solution_comes_to(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("1,080", "1080", True),
        ("$18.00", "18", True),
        ("50%", "50", True),
        ("1/2", "0.5", True),
        ("180", "18", False),
        (r"\frac{1}{2}", r"\frac{1}{2}.", True),
        ("x + 1", "x+1", True),
        ("x", "y", False),
        ("1/0", "1", False),
        ("", "0", False),
        (r"\$18", "18", True),
        ("18 dollars", "18", True),
        ("18 apples.", "18", True),
        ("$18 per day.", "18", True),
        ("**18**", "18", True),
        ("18. That is all", "18", True),
        (r"\text{18}", "18", True),
        (r"18\text{ dollars}", "18", True),
        (r"18 \text{ dollars}", "18", True),
        (r"18\%", "18", True),
        (r"90^\circ", "90", True),
        (r"\(18\)", "18", True),
        ("x = 18", "18", True),
        ("1{,}080", "1080", True),
        (r"1{,}080\text{ meters}", "1080", True),
        (r"\frac12", r"\frac{1}{2}", True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        (r"-\frac{1}{2}", "-0.5", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("180 dollars", "18", False),
        ("18 or 20", "18", False),
        ("18 or more", "18", False),
        ("18 million", "18", False),
        ("18 dollars and 50 cents", "18", False),
        ("2x", "2", False),
        (r"2\pi", "2", False),
        ("2 x + y", "2", False),
        ("1/2", "2", False),
        (r"1\frac{1}{2}", "5.5", False),
        ("-18 dollars", "18", False),
        ("18 dollars", "18 euros", False),
    ],
)
def test_answers_are_compared_as_numbers_where_they_are_numbers(found, expected, same):
    assert is_same(found, expected) is same


def test_files_of_problems(tmp_path, refuses):
    path = tmp_path / "problems.jsonl"
    rows = [
        {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
        {"problem": "2 + 2?", "solution": r"so $\boxed{4}$"},
        {"prompt": "3 + 3?", "target": 6},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert problems.read(path) == [Problem("1 + 1?", "2"), Problem("2 + 2?", "4"), Problem("3 + 3?", "6")]
    assert len(problems.read(path, limit=2)) == 2
    for content in ('{"question": "1?"}', "[]", "1", "{"):
        path.write_text(content)
        with refuses("does not hold problems: give JSON lines with a question and an answer each"):
            problems.read(path)
    path.write_text("\n")
    with refuses("holds no problem"):
        problems.read(path)


def test_a_batch_writes_what_each_would_alone(subject):
    together, alone = (
        list(problems.measure_problems(subject, ["full"], "sevens", ASKED, ProblemsProtocol(40, batch)))
        for batch in (5, 1)
    )
    for field in ("right", "tokens", "unfinished", "n", "accuracy"):
        assert together[0][field] == alone[0][field]


@pytest.mark.parametrize("preset", ["turboquant-3", "b2"])
def test_what_is_written_is_read_from_codes(subject, preset):
    full, coded = problems.measure_problems(subject, ["full", preset], "sevens", ASKED, QUICK)
    assert full["read_as_codes"] is None
    assert 0.4 < coded["read_as_codes"] < 1
    assert coded["bits"] < 4
    assert len(coded["right"]) == coded["n"] == len(ASKED)
    assert coded["accuracy"] == coded["right"].count("1") / 5


def test_the_model_s_own_words_count(subject, monkeypatch):
    monkeypatch.setattr(
        problems, "_solve", lambda *a: [{"text": "so 7", "tokens": 80, "read_as_codes": 0.5}] * len(a[2])
    )
    (row,) = problems.measure_problems(subject, ["b2"], "sevens", ASKED, QUICK)
    assert (row["right"], row["accuracy"], row["tokens"], row["unfinished"]) == ("10000", 0.2, 80, 1)
    assert row["accuracy_se"] == pytest.approx((0.2 * 0.8 / 5) ** 0.5)


def test_a_killed_run_goes_on(subject, tmp_path, monkeypatch):
    whole = list(problems.measure_problems(subject, ["turboquant-3"], "sevens", ASKED, QUICK, tmp_path / "whole.jsonl"))
    solve, calls = problems._solve, []

    def dies(*arguments):
        calls.append(arguments[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr(problems, "_solve", dies)
    with pytest.raises(KeyboardInterrupt):
        list(problems.measure_problems(subject, ["turboquant-3"], "sevens", ASKED, QUICK, tmp_path / "killed.jsonl"))
    with (tmp_path / "killed.jsonl").open("a") as file:
        file.write('{"run": "half a li')
    resumed = list(
        problems.measure_problems(subject, ["turboquant-3"], "sevens", ASKED, QUICK, tmp_path / "killed.jsonl")
    )
    assert resumed == whole
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(calls) == 4  # one done, one killed, two after it


@pytest.mark.parametrize("preset", ["full", "b2"])
def test_rows_that_end_leave_the_batch_and_the_others_do_not_notice(subject, monkeypatch, preset):
    prompts, widths, config = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [3, 3], [11, 12, 13]], [], PRESETS[preset].with_window(0)
    alone = [write(subject.model, subject.cache(config), [prompt], 60)[0] for prompt in prompts]
    ends = {1, alone[0][20], alone[1][30]}
    monkeypatch.setattr(greedy, "end_tokens", lambda model: ends)
    cache = subject.cache(config)
    together = write(subject.model, cache, prompts, 60, lambda: widths.append(cache.index.batch))
    assert together == [list(itertools.takewhile(lambda token: token not in ends, row)) for row in alone]
    assert len(set(widths)) > 1


def test_a_model_without_a_chat_is_refused(subject, refuses):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with refuses("problems are asked in a chat, and this model has no chat template"):
        next(problems.measure_problems(EvalModel("tiny", subject.model, tokenizer, TEXT), ["b3"], "sevens", ASKED))
