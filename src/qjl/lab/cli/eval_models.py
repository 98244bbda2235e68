"""The command that asks every family of models: eval models."""

from __future__ import annotations

from typing import Annotated

import typer

from qjl.cli.common import DEFAULT_PRESET, JsonOption, PresetOption, progress
from qjl.errors import QJLError
from qjl.lab.cli.shared import FoundRows, ResumedOption, resolved


def models(
    family: Annotated[
        list[str] | None,
        typer.Option("--family", "-f", show_default="all", help="A model_type, such as llama; may be given again."),
    ] = None,
    preset: PresetOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Families that are measured together.")] = 2,
    output: ResumedOption = None,
    json_output: JsonOption = False,
) -> None:
    """Whether our caches are right for every family that transformers has: a tiny random model of each is asked.

    Exits with 1 where one is wrong or ends in a traceback. With --json, one object per family and line.
    """
    from qjl.lab.evals.sweep import measure_families, subjects

    asked, (config,) = subjects(family or ()), resolved([preset or DEFAULT_PRESET])
    if config.is_exact:
        raise QJLError("full precision is compared anyway: give a preset that quantizes.")
    found = FoundRows(output, json_output)
    with progress("Asking", len(asked), quiet=json_output) as advance:
        for row in measure_families(asked, preset or DEFAULT_PRESET, workers, found.kept, advance):
            found.add(row)
    found.show()
    if any(row.verdict in ("wrong", "traceback") for row in found.rows):
        raise typer.Exit(1)
