"""Rows that may be compared with each other, and what they have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from qjl.lab.plots.answers import FULL
from qjl.lab.report.parts import Cell
from qjl.lab.rows import Fidelity, HarnessMetric, OfPreset, Problems, Row

WIDTH = 96  # of a command's lines
Kind = TypeVar("Kind", bound=Row)


def groups(rows: Sequence[Kind], *fields: str) -> list[list[Kind]]:
    """Rows alike in these fields; a field that a row does not have is like no other but of such rows."""
    found: dict[str, list[Kind]] = {}
    for row in rows:
        found.setdefault(json.dumps([getattr(row, field, None) for field in fields], sort_keys=True), []).append(row)
    return list(found.values())


def by_window(rows: Sequence[Kind]) -> list[list[Kind]]:
    """Rows with each exact window apart, if a preset was measured with several: one would hide the other."""
    windows = latest(rows, "preset", "recent")
    return groups(rows, "recent") if len(windows) > len(latest(windows, "preset")) else [list(rows)]


def latest(rows: Sequence[Kind], *fields: str) -> list[Kind]:
    """Of several rows alike in these fields the last one counts."""
    return [alike[-1] for alike in groups(rows, *fields)]


def distinct(values: Iterable[Any]) -> list[str]:
    """Each once, as text, but for None."""
    return list(dict.fromkeys(_word(value) for value in values if value is not None))


def _of(rows: Iterable[Row], field: str) -> list[str]:
    """The values of a field, which not all rows have."""
    return distinct(getattr(row, field, None) for row in rows)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def facts(rows: Sequence[Row], *fields: str) -> dict[str, str]:
    """What was measured, how, with what and where; ``fields`` are those of the rows that tell of the protocol."""
    protocols = [row.protocol for row in rows if isinstance(row, (Fidelity, Problems, HarnessMetric))]
    names = list(dict.fromkeys(name for protocol in protocols for name in protocol))
    told = {name: distinct(protocol.get(name) for protocol in protocols) for name in names} | {
        name: _of(rows, name) for name in (*fields, "fitted_to") if name not in names
    }
    packages = dict.fromkeys(package for row in rows for package in row.versions)
    versions = {package: distinct(row.versions.get(package) for row in rows) for package in packages}
    found = {
        "Model": ", ".join(_of(rows, "model")),
        "Precision": ", ".join(_of(rows, "dtype")),
        "Protocol": "; ".join(f"{name.replace('_', ' ')} {', '.join(one)}" for name, one in told.items() if one),
        "Versions": ", ".join(f"{package} {' or '.join(one)}" for package, one in versions.items()),
        "Machine": "; ".join(_of(rows, "machine")),
        "Backend": ", ".join(filter(None, dict.fromkeys(map(_backend, rows)))),
    }
    return {name: value for name, value in found.items() if value}


def _backend(row: Row) -> str:
    name, isa = getattr(row, "backend", None), getattr(row, "isa", None)
    return f"{name} ({isa})" if name and isa else name or ""


def commands(rows: Sequence[Row]) -> str:
    """Those that measured the rows, as lines that a shell reads."""
    return "\n".join(_wrapped(command) for command in dict.fromkeys(row.command for row in rows) if command)


def _wrapped(command: str) -> str:
    first, *others = re.split(" (?=--)", command)
    lines = [first]
    for option in others:
        if len(lines[-1]) + len(option) < WIDTH:
            lines[-1] += f" {option}"
        else:
            lines.append(f"  {option}")
    return " \\\n".join(lines)


def settings(rows: Sequence[OfPreset]) -> dict[str, str]:
    """Of each preset, as a JSON file that gives it again."""
    return {row.preset: json.dumps(row.settings) for row in latest(rows, "preset") if row.settings is not None}


def names(rows: Sequence[OfPreset]) -> list[Cell]:
    """Of their presets; ours marked."""
    return [Cell(row.preset, "ours" if row.is_ours and row.preset != FULL else "") for row in rows]
