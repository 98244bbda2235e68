"""Every evaluation at toy size: whether they run on this model and machine, not what they find."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from qjl.lab.evals import distortion, fidelity, haystack, perplexity, problems, seeds
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.frontier import Frontier, within
from qjl.lab.evals.problems import Problem
from qjl.lab.evals.widths import every_width
from qjl.lab.results import Row
from qjl.presets import CacheConfig

PRESETS = ("b2", "kivi-2")
PROBLEMS = [
    Problem("What is two and two?", "4"),
    Problem("There are three dogs with four legs each. How many legs?", "12"),
]
SHOTS = "Question: is grass green? Answer: yes.\nQuestion: is snow black? Answer: no.\n" * 8
QUESTIONS = [("coal", "black", "white"), ("milk", "white", "black")]


def has_harness() -> bool:
    """Whether lm-eval is installed, without which there is no ``harness``."""
    return find_spec("lm_eval") is not None


def checks(subject: EvalModel, text: str, folder: Path) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """The name of each evaluation, and what runs it; answers are kept in ``folder``."""
    small = fidelity.FidelityProtocol(256, 70, 1, 1, 32, retrieval=False)

    def kept(name: str) -> Path:
        return folder / f"{name}.answers.jsonl"

    def listed(rows: Iterable[Row]) -> Callable[[], list[Row]]:
        return lambda: list(rows)

    model, tokenizer = subject.model, subject.tokenizer
    yield "fidelity", listed(fidelity.measure_fidelity(model, tokenizer, PRESETS, text, small))
    yield "frontier", listed(_frontier(subject, PRESETS, text, small))
    yield "widths", listed(_frontier(subject, every_width(), text, small))
    yield (
        "distortion",
        listed(
            distortion.measure_distortion(
                subject, PRESETS, text, distortion.DistortionProtocol(300, 1), kept("distortion")
            )
        ),
    )
    yield "perplexity", listed(perplexity.measure_perplexity(subject, PRESETS, text, [512], 1, 32, kept("perplexity")))
    two = fidelity.FidelityProtocol(256, 70, 1, 2, 32, retrieval=False)
    yield "seeds", listed(seeds.measure_seeds(subject, ["qjl-2"], text, two, kept("seeds")))
    hay = haystack.HaystackProtocol(tuple(haystack.TASKS), (1024,), depths=1)
    yield "retrieval", listed(haystack.measure_retrieval(subject, PRESETS, text, hay, kept("retrieval")))
    quick = problems.ProblemsProtocol(max_new_tokens=16, batch=2, recent=0)
    yield "generate", listed(problems.measure_problems(subject, PRESETS, "sums", PROBLEMS, quick, kept("generate")))
    if has_harness():
        yield "harness", lambda: _harness(subject, folder)


def _frontier(
    subject: EvalModel, presets: Iterable[str | CacheConfig], text: str, protocol: fidelity.FidelityProtocol
) -> Iterator[Row]:
    """The smallest of the presets."""
    trial = Frontier(subject.name, subject.model, subject.tokenizer, text, protocol)
    smallest, *_ = within(subject.model.config, presets, (0, 16), lambda name, refusal: None)
    return trial.measure([smallest], lambda count: None)


def _harness(subject: EvalModel, folder: Path) -> list[Row]:
    """Two questions of a task of our own."""
    from qjl.lab.evals.harness import Harness, HarnessProtocol, load_tasks

    docs = [
        {"question": f"{SHOTS}Question: is {what} {right}? Answer:", "choices": ["yes", "no"], "answer": 0}
        for what, right, _ in QUESTIONS
    ]
    (folder / "colours.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "colours.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "colours.yaml").write_text(json.dumps(task))
    protocol = HarnessProtocol(include=folder)
    harness = Harness(subject, protocol, folder / "harness.answers.jsonl")
    return [row for rows in harness.measure(PRESETS, load_tasks(["colours"], protocol)) for row in rows]
