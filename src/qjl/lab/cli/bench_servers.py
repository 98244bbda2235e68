"""Commands that load servers: bench serving, bench vllm."""

from __future__ import annotations

from typing import Annotated

import typer

from qjl.cli.common import DEFAULT_PRESET, EMBEDDED, DataOption, JsonOption, ModelOption, progress, read_data
from qjl.cli.serve import measure_for_vllm, source_for_vllm
from qjl.lab.cli.shared import (
    FoundRows,
    ModelDtypeOption,
    OutputOption,
    PresetsOption,
    ThreadsOption,
    passing,
    place,
    resolved,
)


def serving(
    model: ModelOption = EMBEDDED,
    preset: PresetsOption = None,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 64,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="In all.")] = 2000,
    words: Annotated[int, typer.Option(min=1, help="Of the longest prompt; most are short.")] = 150,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")] = 16,
    slots: Annotated[int, typer.Option(min=1, help="Answers that the server writes at once.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait for it.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Of the server.")] = 1,
    dtype: ModelDtypeOption = "bfloat16",
    data: DataOption = None,
    output: OutputOption = None,
    json_output: JsonOption = False,
) -> None:
    """Ask `qjl serve` much at once: how long answers take, what memory it holds, and whether conversations stay apart.

    Each conversation has a secret of its own. Exits with 1 where one was heard in another, or where an answer failed.
    With --json, one object per preset and line.
    """
    from qjl.lab.bench.load_test import Load, ask_server

    load, text = Load(clients, requests, words, answer, slots, queue, threads, dtype), read_data(data)
    names = preset or [DEFAULT_PRESET]
    resolved(names)  # an unknown one is told before the first is asked for an hour
    found, source = FoundRows(output, json_output), place(model)
    for name in names:
        with progress(f"Asking {name}", requests, json_output) as advance:
            row = ask_server(model, source, name, load, text, lambda: advance(1))
        found.add(row)
    found.show()
    if not all(row.went_well for row in found.rows):
        raise typer.Exit(1)


def vllm(
    model: ModelOption = EMBEDDED,
    preset: PresetsOption = None,
    requests: Annotated[int, typer.Option(min=1, help="Sequences that are decoded together.")] = 4,
    context: Annotated[
        list[int] | None, typer.Option("--context", "-n", show_default="4032", min=1, help="Tokens of each prompt.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are timed.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 3,
    threads: ThreadsOption = 1,
    dtype: ModelDtypeOption = "bfloat16",
    data: DataOption = None,
    output: OutputOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time vLLM with our pages and with its own, in turns: prompts, decode steps, and how many tokens fit.

    Needs vLLM beside this package. Exits with 1, and no speed, where an engine writes something else than it was given.
    With --json, one object per turn and line.
    """
    from qjl.lab.bench.vllm_engines import EngineTrial, time_engines
    from qjl.server.vllm_launch import require_ready

    names, contexts = list(dict.fromkeys(["full", *(preset or [DEFAULT_PRESET])])), context or [4032]
    resolved(names)
    require_ready()
    found, source = FoundRows(output, json_output), source_for_vllm(place(model))
    for name in names:
        measure_for_vllm(source, name, data)
    with passing(), progress("Taking turns", len(contexts) * rounds * len(names), json_output) as advance:
        for length in contexts:
            trial = EngineTrial(source, names[0], requests, length, steps, dtype, threads)
            for row in time_engines(model, trial, names, rounds):
                found.add(row)
                advance(1)
    found.show()
