"""What the measuring commands share: which models they take, and how they tell what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qjl.cli import common
from qjl.cli.common import (
    DEFAULT_PRESET,
    command,
    notes,
    out,
    print_json,
    progress,
    require_writable,
    results_table,
    sentence,
)
from qjl.errors import QJLError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qjl.lab.report.parts import Table as Found
    from qjl.presets import CacheConfig

_MARKS = {"": "{}", "ours": "[bold]{}[/bold]", "best": "[bold]{}[/bold]", "near": "≈ {}"}

PresetsOption = Annotated[
    list[str] | None,
    typer.Option("--preset", "-p", show_default=DEFAULT_PRESET, help="May be given several times."),
]
RecentOption = Annotated[str, typer.Option(help="Exact tokens at the end; own keeps each preset's.")]
ContextsOption = Annotated[list[int] | None, typer.Option("--context", "-n", show_default="1024, 2048, 4096")]
PrefixOption = Annotated[int, typer.Option(help="Tokens that are prefilled.")]
DecodeOption = Annotated[int, typer.Option(help="Tokens decoded over the packed codes.")]
ChunksOption = Annotated[int, typer.Option(help="Stretches of the text.")]
ProjectionSeed = Annotated[int, typer.Option(help="Of the projections.")]
ThreadsOption = Annotated[
    int, typer.Option(min=1, help="One is timed by its CPU time; several, and whole models, by the clock on the wall.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Rounds, each of which times everything once.")]
ModelDtypeOption = Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")]
OutputOption = Annotated[Path | None, typer.Option("--out", help="Append JSON lines to this file.")]
ResumedOption = Annotated[
    Path | None,
    typer.Option("--out", help="Append JSON lines to this file; a run that was killed goes on where it stopped."),
]
PlotOption = Annotated[
    Path | None, typer.Option(help="Draw time against context, and a roofline: a .svg or .png file.")
]


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


def resolved(presets: Iterable[str] | None, default: Iterable[str] = (DEFAULT_PRESET,)) -> list[CacheConfig]:
    """The configurations that were asked for, before any model is loaded for them.

    Raises:
        QJLError: for an unknown preset.
    """
    from qjl.presets import resolve

    return [resolve(name) for name in presets or default]


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
    """What a command measured: told as soon as it is known, kept once however often a run goes on.

    To be made before anything is measured: what is needed to tell and to draw it is asked for here.

    Raises:
        QJLError: if a file cannot be written, or is none of rows or none of a picture.
    """

    def __init__(self, output: Path | None, json_output: bool, plot: Path | None = None) -> None:
        from qjl.lab import plots, report, results

        if plot is not None:
            plots.require_format(plot)
        for path in filter(None, (output, plot)):
            require_writable(path)
        self.output, self._json, self._plot = output, json_output, plot
        self._sections = report.sections
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

    def show(self, draw: Callable[[list[Any], str], bytes] | None = None) -> None:
        """The report's tables of them, and their picture."""
        if not self._json:
            for section in self._sections(self.rows):
                for part in section.parts:
                    for table in part.tables:
                        out.print(_printed(table))
        if draw is not None and self._plot is not None:
            self._plot.write_bytes(draw(self.rows, self._plot.suffix))
            notes.print(f"The picture is in {self._plot}.", soft_wrap=True)


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


@contextmanager
def passing() -> Iterator[None]:
    """Ends with exit code 1 where the correctness gate does not open."""
    from qjl.lab.bench.gate import Inaccurate

    try:
        yield
    except Inaccurate as error:
        notes.print(sentence(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def rounds(cases: int, repeats: int, quiet: bool) -> Iterator[Callable[[], None]]:
    with progress("Timing", cases * (repeats + 1), quiet) as advance:
        yield lambda: advance(1)
