"""Commands that ask a model questions over a quantized cache: eval harness."""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qjl.cli.common import (
    EMBEDDED,
    DataOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    notes,
    progress,
    read_data,
)
from qjl.errors import QJLError
from qjl.lab.cli.shared import FoundRows, ProjectionSeed, RecentOption, load, parse_recent, place, resolved

_QUIET = {
    "TQDM_DISABLE": "1",  # bars are our own, and for a terminal only
    "DISABLE_MULTIPROC": "1",  # a bootstrap takes less time than starting processes with torch in them
}


def quieten() -> None:
    """To be called before the harness is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def harness(
    task: Annotated[
        list[str], typer.Option("--task", "-t", help="A name of lm-eval, of --include, or olmes/...; may be repeated.")
    ],
    model: ModelOption = EMBEDDED,
    preset: Annotated[
        list[str] | None, typer.Option("--preset", "-p", help="May be given several times; full and b3 if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task; all if not given.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in front; the task's own if not given.")] = None,
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own, as YAML files.")] = None,
    metadata: Annotated[
        str | None, typer.Option(help="Of tasks that are generated, as lm-eval's: '{\"max_seq_lengths\": [1024]}'.")
    ] = None,
    data: DataOption = None,
    recent: RecentOption = "0",
    chunk: Annotated[
        int | None, typer.Option(help="Read contexts so many tokens at a time, over the codes of those before.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Answers, or prompts, that go through the model together.")] = 8,
    seed: ProjectionSeed = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Append JSON lines to this file, and every answer at once to one beside it."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Tasks of lm-evaluation-harness, answered over the packed codes.

    What --data says fits the codecs, never the questions. With --out, a run that was killed goes on where it stopped.
    With --json, one object per preset, task and metric, and line.
    """
    quieten()
    from qjl import models
    from qjl.lab.evals.eval_model import EvalModel
    from qjl.lab.evals.harness import Harness, HarnessProtocol, load_tasks

    protocol = HarnessProtocol(shots, limit, parse_recent(recent), chunk, batch, seed, include, _parse(metadata))
    configs = resolved(preset, ("full", "b3"))
    text = read_data(data)
    found = FoundRows(output, json_output)
    bars = notes.is_terminal and not json_output
    tasks = load_tasks(task, protocol, models.load_tokenizer(place(model, progress=bars), progress=bars))
    network, tokenizer = load(model, device, dtype, json_output=json_output)
    answers = None if output is None else output.with_suffix(f".answers{output.suffix}")
    trial = Harness(EvalModel(model, network, tokenizer, text), protocol, answers)
    for rows in trial.measure(configs, tasks, lambda what: functools.partial(progress, what, quiet=json_output)):
        for row in rows:
            found.add(row)
        for row in rows[:1]:
            _tell_if_no_codes(row)
    found.show()


def _parse(metadata: str | None) -> dict[str, Any] | None:
    try:
        found = None if metadata is None else json.loads(metadata)
    except ValueError:
        found = metadata
    if found is None or isinstance(found, dict):
        return found
    raise QJLError(f"metadata {metadata!r} is no JSON object: give one such as '{{\"max_seq_lengths\": [1024]}}'.")


def _tell_if_no_codes(row: dict[str, Any]) -> None:
    if not row["read_as_codes"]:
        notes.print(
            f"{row['task']} says nothing of {row['preset']}: no token was read as a code, since its contexts are "
            "shorter than a block of 64 and the exact tokens. Take more shots, or a smaller window.",
            markup=False,
            soft_wrap=True,
        )
