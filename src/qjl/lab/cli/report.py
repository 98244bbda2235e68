"""The command that tells what was measured: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qjl.cli.common import JsonOption, notes, out, print_json, require_writable
from qjl.errors import QJLError


def report(
    runs: Annotated[list[Path], typer.Argument(help="JSON lines files that --out wrote, or folders of them.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The page: an .html file.")] = Path("report.html"),
    json_output: JsonOption = False,
) -> None:
    """Turn measurements into one HTML page with figures, tables and commands, which needs nothing beside it.

    The same rows give the same page. With --json, how many rows each section has.
    """
    from qjl.lab import report

    found = report.read(runs)
    if output.is_dir() or output.suffix not in (".html", ".htm"):
        raise QJLError(f"{output} is no page: give a name that ends in .html.")
    require_writable(output)
    content = report.page(found)
    output.write_text(content, encoding="utf-8")
    sections, others = report.counts(found)
    if json_output:
        print_json({"output": str(output), "bytes": len(content.encode()), "sections": sections, "others": others})
        return
    out.print(f"{sum(sections.values())} measurements in {len(sections)} sections are in {output}.", soft_wrap=True)
    for name, count in others.items():
        notes.print(f"No section shows {count} rows of {name!r}.", markup=False, soft_wrap=True)
