"""How much a result owes to its seed: the fidelity of each, to be averaged over ten or more."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qjl.fingerprints import digest
from qjl.lab import machine
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.fidelity import Evaluation, FidelityProtocol
from qjl.lab.results import Journal, Row
from qjl.presets import CacheConfig, resolve


def measure_seeds(
    subject: EvalModel,
    presets: Iterable[str | Path | CacheConfig],
    text: str,
    protocol: FidelityProtocol,
    answers: Path | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[Row]:
    """A row per preset and seed, of projections and of the prompt that statistics come from.

    ``answers`` is a JSON lines file in which each preset's rows are kept at once, and found by a run that goes on.

    Raises:
        QJLError: if the text is too short, or the chunk does not fit the model's context.
    """
    trial = functools.cache(functools.partial(Evaluation, subject.model, subject.tokenizer, text, protocol))
    for config in (resolve(preset).with_window(protocol.recent) for preset in presets):
        run = subject.identity(config) | {"case": "seeds", "text": digest(text)}
        asked = dataclasses.asdict(protocol)
        journal = Journal(answers, run)
        if asked in journal:
            on_tokens(protocol.tokens)
        found = journal.answer(asked, lambda: trial().rows_by_seed(config, on_tokens))  # noqa: B023
        yield from (run | row | {"machine": machine.describe(subject.model.device)} for row in found)
