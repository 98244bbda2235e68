"""The command that asks every family of models: eval models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from qjl.cli.common import (
    DEFAULT_PRESET,
    JsonOption,
    PresetOption,
    Rows,
    progress,
    require_writable,
    resolved,
    results_table,
)
from qjl.errors import QJLError

FEW = 20


def models(
    family: Annotated[
        list[str] | None,
        typer.Option("--family", "-f", show_default="all", help="A model_type, such as llama; may be given again."),
    ] = None,
    preset: PresetOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Families that are measured together.")] = 2,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Append JSON lines to this file; a run that was killed goes on where it stopped."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Whether our caches are right for every family that transformers has: a tiny random model of each is asked.

    Exits with 1 where one is wrong or ends in a traceback. With --json, one object per family and line.
    """
    from qjl.lab.evals.sweep import measure, subjects

    asked, (config,) = subjects(family or ()), resolved([preset or DEFAULT_PRESET])
    if config.is_exact:
        raise QJLError("full precision is compared anyway: give a preset that quantizes.")
    if output is not None:
        require_writable(output)
    found = Rows(output, json_output)
    with progress("Asking", len(asked), quiet=json_output) as advance:
        for row in measure(asked, preset or DEFAULT_PRESET, workers, found.kept, advance):
            found.add(row)
    found.show(_table)
    if any(row["verdict"] in ("wrong", "traceback") for row in found.rows):
        raise typer.Exit(1)


def _table(rows: list[dict[str, Any]]) -> Any:
    """The families that do not work, or all where few were asked."""
    counts = Counter(row["verdict"] for row in rows)
    table = results_table("family", "full: error", "KL", "KL of another\nprompt")
    table.add_column("verdict")
    for row in rows:
        if row["verdict"] != "works" or len(rows) <= FEW:
            numbers = (row["max_error_full"], row["kl"], row["kl_other"])
            shown = ("-" if number is None else f"{number:.1e}" for number in numbers)
            table.add_row(row["family"], *shown, ": ".join(filter(None, (row["verdict"], row["why"]))))
    table.caption = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return table
