"""Perplexity over the packed codes at growing contexts: half of one is prefilled, the other half decoded and scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from qjl.fingerprints import digest
from qjl.lab import machine
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.fidelity import Evaluation, FidelityProtocol
from qjl.lab.results import Journal, Row
from qjl.presets import CacheConfig, resolve


def measure_perplexity(
    subject: EvalModel,
    presets: Iterable[str | Path | CacheConfig],
    text: str,
    contexts: Sequence[int],
    chunks: int,
    recent: int | None = 32,
    answers: Path | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[Row]:
    """A row per context and preset: what fidelity tells, with ``context``.

    ``answers`` is a JSON lines file in which each row is kept at once, and found by a run that goes on.

    Raises:
        QJLError: if the text is too short, or a context does not fit the model or is shorter than 512.
    """
    configs = [resolve(preset).with_window(recent) for preset in presets]
    for context in sorted(contexts):
        protocol = FidelityProtocol(
            context // 2, context - context // 2, chunks, seeds=1, recent=recent, retrieval=False
        )
        trial = functools.cache(functools.partial(Evaluation, subject.model, subject.tokenizer, text, protocol))
        for config in configs:
            run = subject.identity(config) | {"case": "perplexity", "text": digest(text), "context": context}
            asked = {"chunks": chunks, "recent": recent}
            journal = Journal(answers, run)
            if asked in journal:
                on_tokens(protocol.tokens)
            row = journal.answer(asked, lambda: trial().row(config, on_tokens))  # noqa: B023
            yield run | row | {"machine": machine.describe(subject.model.device)}
