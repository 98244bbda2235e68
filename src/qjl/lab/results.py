"""Measurements as JSON lines: one object per line, appended as soon as it is measured, read again to go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qjl.errors import QJLError
from qjl.fingerprints import digest

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """All rows of a file, none if there is no file yet; a half line at its end does not count.

    Raises:
        QJLError: if the file cannot be read or has a line that is no JSON object.
    """
    lines = _whole(path).split(b"\n")
    return [_row(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def resume(path: Path) -> list[Row]:
    """``read``, and cut off the half line or end the last one, so that rows can be appended."""
    rows, whole = read(path), _whole(path)
    if path.exists() and len(whole) < path.stat().st_size:
        os.truncate(path, len(whole))
    elif whole and not whole.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return rows


def append(path: Path, row: Row) -> None:
    """Write a row at the end of a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class Journal:
    """Answers to requests, kept in JSON lines as soon as they are known, so that a killed run goes on where it was.

    Args:
        path: a file, which other runs may share; None keeps nothing.
        run: all that answers depend on, but for the requests themselves.

    Raises:
        QJLError: if the file cannot be read or is no JSON lines.
    """

    def __init__(self, path: Path | None = None, run: Any = None) -> None:
        self._path, self._run = path, digest(run)
        rows = [] if path is None else resume(path)
        self._answers = {row["request"]: row["answer"] for row in rows if row.get("run") == self._run}

    def __contains__(self, request: Any) -> bool:
        return digest(request) in self._answers

    def answer(self, request: Any, work: Callable[[], Any]) -> Any:
        """What ``work()`` gives for this request, or gave before; all is plain JSON."""
        name = digest(request)
        if name not in self._answers:
            self._answers[name] = work()
            if self._path is not None:
                append(self._path, {"run": self._run, "request": name, "answer": self._answers[name]})
        return self._answers[name]


def _whole(path: Path) -> bytes:
    """What a file holds, but for the first half of an object at its end: the mark of a killed run."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise QJLError(f"cannot read {path} ({error.strerror}): give another file.") from error
    end = content.rfind(b"\n") + 1
    is_half = content[end:].startswith(b"{") and _parsed(content[end:]) is None
    return content[:end] if is_half else content


def _row(line: bytes, path: Path, number: int) -> Row:
    row = _parsed(line)
    if not isinstance(row, dict):
        raise QJLError(f"cannot read {path} as JSON lines, for line {number} is no object: give another file.")
    return row


def _parsed(line: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None
