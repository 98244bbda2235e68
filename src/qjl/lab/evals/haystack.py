"""Needles in a haystack, and what RULER (arXiv 2404.06654) makes of them, answered over the packed codes.

The haystack with its needles is prefilled exactly and quantized; the question and the answer are read and written over
the codes. An answer counts by the share of the expected words that stand in it.

- ``needle``: one number told at some depth of an essay.
- ``passkey``: the same in a haystack of one sentence, over and over.
- ``multikey``: many numbers of many names, one of which, at any place among them, is asked for.
- ``multivalue``: several numbers of one name, all of which are asked for.
- ``tracking``: a chain of variables, each given the value of another; all that hold the first value are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

from qjl.architecture import context_length
from qjl.errors import QJLError
from qjl.fingerprints import digest
from qjl.hf import KVCache
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.greedy import continue_greedily
from qjl.lab.evals.retrieval import WORDS
from qjl.lab.results import Journal, Row
from qjl.presets import CacheConfig, resolve
from qjl.teacher_forcing import prefill, refill

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NUMBER = "One of the special magic numbers for {} is: {}."
ASK_NUMBER = "\n\nWhat is the special magic number for {0} mentioned in the text?\nThe special magic number for {0} is:"
ASK_NUMBERS = (
    "\n\nWhat are all the special magic numbers for {0} mentioned in the text?\nThe special magic numbers for {0} are:"
)
ASK_VARIABLES = "\n\nWhich variables have the value {0}? Name them all.\nThe variables with the value {0} are:"
DISTRACTORS, VALUES, HOPS = 8, 4, 4
ANSWER_TOKENS = 40
PIECE = 40  # tokens of hay per needle, at least


@dataclass(frozen=True)
class Task:
    """What is hidden, in order, what is asked, and the words that an answer must hold."""

    needles: tuple[str, ...]
    question: str
    expected: tuple[str, ...]
    is_noise: bool = False


def needle(draw: random.Random) -> Task:
    (word,), (number,) = _words(draw, 1), _numbers(draw, 1)
    return Task((NUMBER.format(word, number),), ASK_NUMBER.format(word), (number,))


def passkey(draw: random.Random) -> Task:
    return dataclasses.replace(needle(draw), is_noise=True)


def multikey(draw: random.Random) -> Task:
    words, numbers = _words(draw, DISTRACTORS + 1), _numbers(draw, DISTRACTORS + 1)
    needles = tuple(map(NUMBER.format, words, numbers))
    asked = draw.randrange(len(words))
    return Task(needles, ASK_NUMBER.format(words[asked]), (numbers[asked],))


def multivalue(draw: random.Random) -> Task:
    (word,), numbers = _words(draw, 1), _numbers(draw, VALUES)
    return Task(tuple(NUMBER.format(word, number) for number in numbers), ASK_NUMBERS.format(word), numbers)


def tracking(draw: random.Random) -> Task:
    names = ["".join(draw.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 3)) for _ in range(HOPS + 1)]
    (number,) = _numbers(draw, 1)
    needles = (f"VAR {names[0]} = {number}.", *(f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)))
    return Task(needles, ASK_VARIABLES.format(number), tuple(names))


TASKS: dict[str, Callable[[random.Random], Task]] = {
    "needle": needle,
    "passkey": passkey,
    "multikey": multikey,
    "multivalue": multivalue,
    "tracking": tracking,
}


@dataclass(frozen=True)
class HaystackCell:
    """One haystack: its task, its length in tokens, how deep (0 to 1) its needles begin, and the seed of its words."""

    task: str
    context: int
    depth: float
    seed: int


@dataclass(frozen=True)
class HaystackProtocol:
    """What is asked. ``depths``: so many, evenly from start to end; ``recent``: exact window, None a preset's own."""

    tasks: tuple[str, ...] = ("needle",)
    contexts: tuple[int, ...] = (1024, 2048, 4096)
    depths: int = 5
    seeds: int = 1
    recent: int | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise QJLError(f"there is no task {task!r}: choose from {', '.join(TASKS)}.")
        if min(self.depths, self.seeds) < 1 or not self.tasks or not self.contexts:
            raise QJLError("a haystack needs tasks, contexts, and at least one depth and seed.")

    @property
    def cells(self) -> list[HaystackCell]:
        """The shortest haystacks first."""
        depths = [(2 * index + 1) / (2 * self.depths) for index in range(self.depths)]
        return [
            HaystackCell(task, context, depth, seed)
            for context in sorted(self.contexts)
            for task in self.tasks
            for depth in depths
            for seed in range(self.seeds)
        ]


def measure_retrieval(
    subject: EvalModel,
    presets: Iterable[str | Path | CacheConfig],
    text: str,
    protocol: HaystackProtocol = HaystackProtocol(),
    answers: Path | None = None,
    on_cell: Callable[[int], None] = lambda count: None,
) -> Iterator[Row]:
    """A row per cell and preset, as soon as it is measured; ``text`` is what haystacks are made of.

    ``found`` is the share of the expected words in the answer, 0 to 1. ``answers`` is a JSON lines file in which each
    answer is kept at once, and found by a run that goes on.

    Raises:
        QJLError: if the text is too short, a haystack does not fit the model's context, or the model cannot have a
            preset.
    """
    configs = [resolve(preset).with_window(protocol.recent) for preset in presets]
    caches = [subject.cache(config) for config in configs]
    filler = _Filler(subject, text, max(protocol.contexts))
    runs = [subject.identity(config) | {"case": "haystack", "text": filler.name} for config in configs]
    journals = [Journal(answers, run) for run in runs]
    for cell in protocol.cells:
        haystack = _Haystack(subject, filler, cell)
        for config, cache, run, journal in zip(configs, caches, runs, journals, strict=True):
            asked = dataclasses.asdict(cell)
            answer = journal.answer(asked, lambda: haystack.answer(cache))  # noqa: B023 - called at once
            found = haystack.share(answer["answer"])
            yield run | asked | {"found": found} | answer | subject.facts(config, cache)
        on_cell(1)


class _Filler:
    """Real text, and noise, as tokens."""

    def __init__(self, subject: EvalModel, text: str, longest: int) -> None:
        self.name = digest(text)
        self.tokens = {False: subject.unseen(text).tolist(), True: _repeated(subject, longest)}
        if len(self.tokens[False]) < longest:
            raise QJLError(
                f"the text has {len(self.tokens[False])} tokens, too few for a haystack of {longest}: give a longer "
                "one, or a shorter context."
            )
        most = context_length(subject.model.config)
        if most is not None and longest + ANSWER_TOKENS > most:
            raise QJLError(
                f"{longest} tokens leave no room for an answer in the model's context of {most}: take fewer."
            )


def _repeated(subject: EvalModel, longest: int) -> list[int]:
    once = subject.tokens(f" {NOISE}")[0].tolist()
    return (once * (longest // len(once) + 1))[:longest]


class _Haystack:
    """A cell's tokens; they go through the model once, whatever the number of presets."""

    def __init__(self, subject: EvalModel, filler: _Filler, cell: HaystackCell) -> None:
        self.subject = subject
        self.task = TASKS[cell.task](random.Random(f"{cell}"))
        self.question = subject.tokens(self.task.question)
        needles = [subject.tokens(f"\n{needle}\n")[0].tolist() for needle in self.task.needles]
        room = cell.context - self.question.shape[1] - sum(map(len, needles))
        if room < PIECE * len(needles):
            raise QJLError(f"the needles of {cell.task} do not fit into {cell.context} tokens: give a longer context.")
        self.tokens = _hidden(filler.tokens[self.task.is_noise][:room], needles, cell.depth)

    @functools.cached_property
    def _exact(self) -> DynamicCache:
        return prefill(self.subject.model, torch.tensor([self.tokens]))

    def answer(self, cache: KVCache) -> Row:
        """What the model says, and how much of the haystack was codes when it was asked."""
        refill(cache, self._exact)
        share = cache.packed_tokens[0] / len(self.tokens)
        text = continue_greedily(self.subject, cache, self.question, ANSWER_TOKENS)
        return {"answer": text, "read_as_codes": share}

    def share(self, answer: str) -> float:
        """Of the expected words that stand in an answer."""
        return sum(_stands_in(answer, word) for word in self.task.expected) / len(self.task.expected)


def _stands_in(answer: str, word: str) -> bool:
    """As a word of its own: a number that goes on is another number."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer) is not None


def _hidden(hay: list[int], needles: list[list[int]], depth: float) -> list[int]:
    """The first needle at ``depth``, the others evenly from there to the end: of ``multikey``, any may be asked for."""
    first = depth * len(hay)
    tokens, stop = [], 0
    for index, one in enumerate(needles):
        start, stop = stop, int(first + (len(hay) - first) * index / len(needles))
        tokens += hay[start:stop] + one
    return tokens + hay[stop:]


def _words(draw: random.Random, count: int) -> tuple[str, ...]:
    return tuple(draw.sample(WORDS, count))


def _numbers(draw: random.Random, count: int) -> tuple[str, ...]:
    """Of seven digits, all different, as RULER has them."""
    return tuple(map(str, draw.sample(range(1_000_000, 10_000_000), count)))
