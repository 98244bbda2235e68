"""A page of measurements: rows of any of our commands become one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from qjl.errors import QJLError
from qjl.fingerprints import digest as digest_of
from qjl.lab import results
from qjl.lab.report.kinds import KINDS, sections
from qjl.lab.rows import Row, kind_of, typed

__all__ = ["KINDS", "Run", "counts", "page", "read", "run", "sections"]

_ANSWERS = ".answers.jsonl"  # beside the results of an evaluation, so that it can go on


@dataclass(frozen=True)
class Run:
    """A file's rows; ``others`` counts those of kinds that are not ours, by name.

    ``digest``: of its content, which a citation of these numbers can name.
    """

    name: str
    rows: list[Row]
    digest: str
    others: dict[str, int]


def read(paths: Iterable[Path]) -> list[Run]:
    """Files of JSON lines, and those in folders; what evaluations keep there to go on is left out.

    Raises:
        QJLError: if one is not there, cannot be read or is damaged, if a folder has none, or if nothing was measured.
    """
    found = {file: name for path in paths for file, name in _files(path).items()}
    runs = [_run(name, file) for file, name in found.items()]
    if not any(run.rows for run in runs):
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
    return run(name, results.read(file))


def run(name: str, content: list[results.Row]) -> Run:
    """Of rows as JSON tells them.

    Raises:
        QJLError: if one is damaged.
    """
    kinds = [kind_of(row) for row in content]
    rows = [typed(row, name) for row, kind in zip(content, kinds, strict=True) if kind in KINDS]
    return Run(name, rows, digest_of(content), dict(Counter(kind for kind in kinds if kind not in KINDS)))


def counts(runs: Iterable[Run]) -> tuple[dict[str, int], dict[str, int]]:
    """How many rows each section has, and each kind that has none."""
    runs = list(runs)
    found = Counter(row.case for run in runs for row in run.rows)
    others = sum((Counter(run.others) for run in runs), Counter[str]())
    return {name: found[name] for name in KINDS if name in found}, dict(sorted(others.items()))


def page(runs: Sequence[Run]) -> str:
    """HTML, the same for the same rows."""
    rows = [row for run in runs for row in run.rows]
    _, others = counts(runs)
    models = list(dict.fromkeys(model for row in rows if (model := getattr(row, "model", None)) is not None))
    return _template().render(runs=runs, rows=rows, sections=sections(rows), others=others, models=models)


def _template() -> Template:
    loader = PackageLoader("qjl.lab", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")
