"""A page of measurements: rows of any of our commands become one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from qjl.errors import QJLError
from qjl.fingerprints import digest as digest_of
from qjl.lab import records
from qjl.lab.records import Row
from qjl.lab.report.kinds import KINDS, checked, kind_of
from qjl.lab.report.parts import Section

_PROTOCOL = ("prefix", "decode", "chunks", "recent")  # of a fidelity row, which keeps none as such
_ANSWERS = ".answers.jsonl"  # beside the results of an evaluation, so that it can go on


@dataclass(frozen=True)
class Run:
    """A file's rows."""

    name: str
    rows: list[Row]

    @property
    def digest(self) -> str:
        """Of its content: what a citation of these numbers can name."""
        return digest_of(self.rows)


def read(paths: Iterable[Path]) -> list[Run]:
    """Files of JSON lines, and those in folders; what evaluations keep there to go on is left out.

    Raises:
        QJLError: if one is not there, cannot be read or is damaged, if a folder has none, or if nothing was measured.
    """
    found = {file: name for path in paths for file, name in _files(path).items()}
    runs = [_run(name, file) for file, name in found.items()]
    if not any(kind_of(row) in KINDS for run in runs for row in run.rows):
        raise QJLError(f"nothing was measured in {', '.join(run.name for run in runs)}: give files that `--out` wrote.")
    return runs


def _files(path: Path) -> dict[Path, str]:
    """Files, and what a page calls them."""
    if not path.exists():
        raise QJLError(f"there is no {path}: give JSON lines files of measurements, or folders of them.")
    if not path.is_dir():
        return {path: path.name}
    found = sorted(file for file in path.rglob("*.jsonl") if not file.name.endswith(_ANSWERS))
    if not found:
        raise QJLError(f"{path} holds no measurements: give a folder with .jsonl files.")
    return {file: file.relative_to(path).as_posix() for file in found}


def _run(name: str, file: Path) -> Run:
    return Run(name, [checked(_with_protocol(row), name) for row in records.read(file)])


def _with_protocol(row: Row) -> Row:
    if kind_of(row) != "frontier" or "protocol" in row or not row.keys() >= {*_PROTOCOL, "seeds"}:
        return row
    told = {name: row[name] for name in _PROTOCOL}
    return row | {"protocol": told | {"seeds": None, "retrieval": row.get("retrieval") is not None}}


def sections(rows: Sequence[Row]) -> list[Section]:
    """Of the page, in its order."""
    return [kind.section(of) for kind in KINDS.values() if (of := [row for row in rows if kind_of(row) == kind.name])]


def counts(rows: Iterable[Row]) -> tuple[dict[str, int], dict[str, int]]:
    """How many rows each section has, and each kind that has none."""
    found = Counter(map(kind_of, rows))
    known = {name: found[name] for name in KINDS if name in found}
    return known, {name: found[name] for name in sorted(found) if name not in KINDS}


def page(runs: Sequence[Run]) -> str:
    """HTML, the same for the same rows."""
    rows = [row for run in runs for row in run.rows]
    _, others = counts(rows)
    models = list(dict.fromkeys(f"{row['model']}" for row in rows if "model" in row))
    return _template().render(runs=runs, rows=rows, sections=sections(rows), others=others, models=models)


def _template() -> Template:
    loader = PackageLoader("qjl.lab", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")
