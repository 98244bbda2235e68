"""Rows that may be compared with each other, and what they have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qjl.lab.plots.answers import FULL
from qjl.lab.records import Row, is_ours
from qjl.lab.report.parts import Cell


def groups(rows: Sequence[Row], *fields: str) -> list[list[Row]]:
    """Rows alike in these fields; a field that a row does not have is like no other but of such rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps([row.get(field) for field in fields], sort_keys=True), []).append(row)
    return list(found.values())


def by_window(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows with each exact window apart, if a preset was measured with several: one would hide the other."""
    windows = latest(rows, "preset", "recent")
    return groups(rows, "recent") if len(windows) > len(latest(windows, "preset")) else [list(rows)]


def latest(rows: Sequence[Row], *fields: str) -> list[Row]:
    """Of several rows alike in these fields the last one counts."""
    return [alike[-1] for alike in groups(rows, *fields)]


def distinct(rows: Sequence[Row], field: str) -> list[str]:
    """The values of a field, each once, as text."""
    return list(dict.fromkeys(_word(value) for row in rows if (value := row.get(field)) is not None))


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def facts(rows: Sequence[Row], *fields: str) -> dict[str, str]:
    """What was measured, how, with what and where; ``fields`` are those of the rows that tell of the protocol."""
    found = {"Model": ", ".join(distinct(rows, "model")), "Precision": ", ".join(distinct(rows, "dtype"))}
    protocols = [row["protocol"] for row in rows if "protocol" in row]
    names = list(dict.fromkeys(name for protocol in protocols for name in protocol))
    told = {name: distinct(protocols, name) for name in names} | {
        name: distinct(rows, name) for name in (*fields, "fitted_to") if name not in names
    }
    found["Protocol"] = "; ".join(
        f"{name.replace('_', ' ')} {', '.join(values)}" for name, values in told.items() if values
    )
    versions = [row.get("versions", {}) for row in rows]
    packages = dict.fromkeys(package for one in versions for package in one)
    found["Versions"] = ", ".join(f"{package} {' or '.join(distinct(versions, package))}" for package in packages)
    found["Machine"] = "; ".join(distinct(rows, "machine"))
    backends = [row for row in rows if row.get("backend")]
    found["Backend"] = ", ".join(
        dict.fromkeys(row["backend"] + (f" ({row['isa']})" if row.get("isa") else "") for row in backends)
    )
    return {name: value for name, value in found.items() if value}


def settings(rows: Sequence[Row]) -> dict[str, str]:
    """Of each preset, as a JSON file that gives it again."""
    return {row["preset"]: json.dumps(row["settings"]) for row in latest(rows, "preset") if "settings" in row}


def names(rows: Sequence[Row]) -> list[Cell]:
    """Of their presets; ours marked."""
    return [Cell(row["preset"], "ours" if is_ours(row) and row["preset"] != FULL else "") for row in rows]
