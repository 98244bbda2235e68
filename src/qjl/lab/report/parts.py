"""What a page is made of."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from qjl.lab.plots.style import INK

Mark = Literal["", "best", "near", "ours"]


@dataclass(frozen=True)
class Cell:
    """What stands in a table; ``note`` smaller, below it."""

    text: str
    mark: Mark = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Lines of cells, the first of which names the line; the columns after the first ``words`` hold numbers."""

    caption: str
    columns: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    words: int = 1


@dataclass(frozen=True)
class Figure:
    """A picture, and what it shows in words; ``draw`` gives it as SVG, when a page needs it."""

    draw: Callable[[], bytes]
    caption: str

    @functools.cached_property
    def svg(self) -> bytes:
        return self.draw()

    def inline(self, name: str) -> str:
        """As a part of a page, in its colour of text, named by the caption ``name-caption``; ids start with ``name``.

        It must be matplotlib's, which no row can put markup into: all of its text is drawn as paths.
        """
        text = self.svg.decode()
        text = text[text.index("<svg") :].strip()
        text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r"<!--.*?-->\n?\s*", "", text, flags=re.DOTALL)
        text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
        text = re.sub(r'\bid="|xlink:href="#|url\(#', lambda found: f"{found.group()}{name}-", text)
        text = text.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-caption" ', 1)
        return text.replace(INK, "currentColor")

    @property
    def width(self) -> float:
        """In points."""
        found = re.search(rb'width="([\d.]+)pt"', self.svg)
        assert found is not None
        return float(found.group(1))


@dataclass(frozen=True)
class Part:
    """One measurement: all rows that may be compared with each other."""

    title: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    command: str = ""
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """An evaluation or a benchmark: what it measures, and a part for each measurement; ``name`` is its anchor."""

    name: str
    title: str
    text: str
    parts: tuple[Part, ...]
