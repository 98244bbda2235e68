"""What the measuring commands share: which models they take, and how they tell what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qjl.cli import common
from qjl.cli.common import command, notes, out, print_json, results_table
from qjl.errors import QJLError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qjl.lab.report.parts import Table as Found

_MARKS = {"": "{}", "ours": "[bold]{}[/bold]", "best": "[bold]{}[/bold]", "near": "≈ {}"}

RecentOption = Annotated[str, typer.Option(help="Exact tokens at the end; own keeps each preset's.")]


def place(name: str, *, progress: bool = True) -> str:
    """What the library loads for ``name``: the lab knows models that it does not."""
    from qjl.lab import reuploads

    return reuploads.place(name, progress=progress)


def load(
    name: str, device: str, dtype: Any, *, json_output: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As that of all commands, for the models that the lab knows too."""
    is_shown = notes.is_terminal and not json_output
    return common.load(place(name, progress=is_shown), device, dtype, json_output=json_output)


def parse_recent(recent: str) -> int | None:
    """Tokens of ``--recent``; None for each preset's own.

    Raises:
        QJLError: if it is neither.
    """
    if recent == "own":
        return None
    if not recent.isdecimal():
        raise QJLError(f"recent {recent!r} is no number of tokens: give one, or own for that of each preset.")
    return int(recent)


class FoundRows:
    """What a command measured: told as soon as it is known, kept once however often a run goes on."""

    def __init__(self, output: Path | None, json_output: bool) -> None:
        from qjl.lab import results

        self.output, self._json = output, json_output
        self.kept = [] if output is None else results.resume(output)
        self.rows: list[Any] = []

    def add(self, fields: dict[str, Any]) -> None:
        from qjl.lab import results, rows

        row = {"command": command()} | fields
        self.rows.append(rows.typed(row))
        if self._json:
            print_json(row)
        if self.output is not None and not any(_is_same(row, kept) for kept in self.kept):
            results.append(self.output, row)

    def show(self) -> None:
        """The report's tables of them."""
        from qjl.lab.report.kinds import sections

        if not self._json:
            for section in sections(self.rows):
                for part in section.parts:
                    for table in part.tables:
                        out.print(_printed(table))


def _is_same(row: dict[str, Any], kept: dict[str, Any]) -> bool:
    return row | {"command": None} == kept | {"command": None}


def _printed(found: Found) -> Table:
    table = results_table(found.columns[0], *found.columns[1:])
    table.columns[0].no_wrap = True
    for column in table.columns[1 : found.words]:
        column.justify = "left"
    for line in found.lines:
        table.add_row(*(f"{_MARKS[cell.mark].format(escape(cell.text))}{_note(cell.note)}" for cell in line))
    table.caption = found.caption
    return table


def _note(note: str) -> str:
    return f"\n[dim]{escape(note)}[/dim]" if note else ""
