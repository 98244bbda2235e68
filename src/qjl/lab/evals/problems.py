"""Problems with a final answer, worked out over the packed codes: GSM8K, MATH, or JSON lines of one's own.

The prompt but for its last token is prefilled and quantized; that token, and all that the model writes, are decoded
over the codes. Problems go through the model in left-padded batches.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

from qjl.conversation import chat_tokens
from qjl.errors import QJLError
from qjl.hf import KVCache
from qjl.lab.evals.coverage import Reads
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.greedy import write
from qjl.lab.results import Journal, Row
from qjl.presets import CacheConfig, resolve

ASK = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_QUESTIONS, _ANSWERS = ("question", "problem", "prompt"), ("answer", "solution", "target")
_MARKED = re.compile(r"####\s*(.+)")
_SAID = re.compile(r"answer is:?\s*\$?\\?\(?([^\n]+?)\.?\s*$", re.IGNORECASE | re.MULTILINE)
_MANY = "hundred|thousand|million|billion|dozen|or |and "  # after which a number is another
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_WITH_UNIT = re.compile(rf"(?:[a-zA-Z]\s*=\s*)?({_NUMBER.pattern})%?[.,]?(?:\s+(?!{_MANY})[a-zA-Z][^\d\\+*/^=]*)?")
_LATEX = (
    (r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?<!\d)\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2"),
    (r"\{,\}", ","),
    (r"\\left|\\right|\\[!()\[\]]|\^\{?\\circ\}?|\\?\$|\*\*", ""),
    (r"\\([%\s])", r"\1"),
)


@dataclass(frozen=True)
class Problem:
    """A question, and the final answer alone."""

    question: str
    answer: str


def read(path: Path, limit: int | None = None) -> list[Problem]:
    """The first ``limit`` problems of a file: an object per line with ``question`` and ``answer``.

    ``problem`` or ``prompt`` will do for the former, ``solution`` or ``target`` for the latter, from which the final
    answer is taken as it is from a model's.

    Raises:
        QJLError: if the file cannot be read, or a line is no such object.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines[:limit]]
        problems = [Problem(_field(row, _QUESTIONS), final_answer(_field(row, _ANSWERS))) for row in rows]
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise QJLError(f"{path} does not hold problems: give JSON lines with a question and an answer each.") from error
    if not problems:
        raise QJLError(f"{path} holds no problem: give JSON lines with a question and an answer each.")
    return problems


def _field(row: dict[str, str], names: Iterable[str]) -> str:
    found = [row[name] for name in names if name in row]
    return str(found[0])


def final_answer(text: str) -> str:
    """What a solution comes to: after ``####``, in ``\\boxed{}``, after "the answer is", or else its last number."""
    if found := _boxed(text):
        return found
    for pattern in (_MARKED, _SAID, _NUMBER):
        if matches := pattern.findall(text):
            return str(matches[-1]).strip()
    return text.strip()


def _boxed(text: str) -> str:
    """The content of the last ``\\boxed{...}``, braces in it included; empty if there is none."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for index, letter in enumerate(rest if mark else ""):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[:index].strip()
    return ""


def is_same(found: str, expected: str) -> bool:
    """Whether two final answers are the same number, whatever the unit of the one found, or else the same text.

    LaTeX's spacing and frames, dollars, and the full stop at the end do not count.
    """
    wanted = _number(_plain(expected))
    if wanted is None:
        return _joined(found) == _joined(expected)
    measured = _WITH_UNIT.fullmatch(_plain(found))
    return _number(measured[1] if measured else _joined(found)) == wanted


def _number(answer: str) -> float | None:
    top, _, bottom = answer.replace(",", "").removesuffix("%").partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _joined(answer: str) -> str:
    return re.sub(r"\s", "", _plain(answer)).lower()


def _plain(answer: str) -> str:
    """Of LaTeX, what a line of text would say: ``1/2`` for ``\\frac12``, ``18 apples`` for ``18\\text{ apples}``."""
    for pattern, plain in _LATEX:
        answer = re.sub(pattern, plain, answer)
    return answer.strip().removesuffix(".")


@dataclass(frozen=True)
class ProblemsProtocol:
    """How problems are asked; ``recent`` is the exact window of every preset, None its own."""

    max_new_tokens: int = 384
    batch: int = 25
    recent: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.batch) < 1:
            raise QJLError("max_new_tokens and batch must be at least 1.")


def measure_problems(
    subject: EvalModel,
    presets: Iterable[str | Path | CacheConfig],
    task: str,
    problems: list[Problem],
    protocol: ProblemsProtocol = ProblemsProtocol(),
    answers: Path | None = None,
    on_problems: Callable[[int], None] = lambda count: None,
) -> Iterator[Row]:
    """A row per preset, as soon as it is measured.

    ``accuracy`` with its standard error; ``right``, "1" or "0" for each problem, so that presets can be compared
    problem by problem; ``tokens`` written on average; ``unfinished``, the share of texts cut at ``max_new_tokens``;
    ``read_as_codes``, the share of codes among all tokens attended to, None for full precision.

    ``answers`` is a JSON lines file in which each batch is kept at once, and found by a run that goes on.

    Raises:
        QJLError: if the model has no chat template, or cannot have a preset.
    """
    if not subject.tokenizer.chat_template:
        raise QJLError("problems are asked in a chat, and this model has no chat template: take an instruct model.")
    configs = [resolve(preset).with_seed(protocol.seed).with_window(protocol.recent) for preset in presets]
    facts = [subject.facts(config, subject.cache(config)) for config in configs]
    asked = [chat_tokens(subject.tokenizer, [{"role": "user", "content": ASK.format(p.question)}])[0] for p in problems]
    for config, fact in zip(configs, facts, strict=True):
        identity = subject.identity(config) | {"case": "problems", "protocol": dataclasses.asdict(protocol)}
        journal, found = Journal(answers, identity), []
        for first in range(0, len(asked), protocol.batch):
            batch = asked[first : first + protocol.batch]
            found += journal.answer(batch, functools.partial(_solve, subject, config, batch, protocol))
            on_problems(len(batch))
        yield identity | {"task": task} | _summary(problems, found, protocol.max_new_tokens) | fact


def _solve(subject: EvalModel, config: CacheConfig, prompts: list[list[int]], protocol: ProblemsProtocol) -> list[Row]:
    """What the model writes, for each prompt of a batch."""
    model, reads = subject.model, Reads()
    cache = DynamicCache(config=model.config) if config.is_exact else subject.cache(config)
    torch.manual_seed(protocol.seed)
    count = functools.partial(reads.add_step, cache) if isinstance(cache, KVCache) else None
    written = write(model, cache, prompts, protocol.max_new_tokens, count)
    share = reads.share if count else None
    texts = subject.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [
        {"text": text, "tokens": len(row), "read_as_codes": share} for text, row in zip(texts, written, strict=True)
    ]


def _summary(problems: list[Problem], found: list[Row], most: int) -> Row:
    right = [is_same(final_answer(row["text"]), problem.answer) for row, problem in zip(found, problems, strict=True)]
    count, accuracy = len(right), sum(right) / len(right)
    shares = [row["read_as_codes"] for row in found if row["read_as_codes"] is not None]
    return {
        "n": count,
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / count),
        "right": "".join(map(str, map(int, right))),
        "tokens": sum(row["tokens"] for row in found) / count,
        "unfinished": sum(row["tokens"] == most for row in found) / count,
        "read_as_codes": sum(shares) / len(shares) if shares else None,
    }
