"""Quality against size: the frontier."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from qjl.errors import QJLError
from qjl.lab.plots.style import DPI, GRID, INK, MARKERS, OURS, STYLE, TONES, content
from qjl.lab.rows import Fidelity, pareto_front

LEAST_KL = 1e-6  # less is full precision, which has no place on a logarithmic axis
_SIZE = (9.0, 5.8)
_TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 16)
_ANGLES = tuple(math.radians(degrees) for degrees in (0, 90, 270, 45, 315, 135, 225, 180))
_GAPS = (7, 14, 24, 36)  # between a name and its point, in points
_FAR = 20  # from here on a thin line joins them
_MOST_NAMES = 16  # of points of ours; more would hide each other
_Box = tuple[float, float, float, float]


def frontier(rows: Sequence[Fidelity], suffix: str = ".svg") -> bytes:
    """KL against true bits, a line per family of presets: the content of a picture file, the same for the same rows.

    Raises:
        QJLError: if no row has a KL that could be drawn.
    """
    rows = [row for row in rows if row.kl > LEAST_KL]
    if not rows:
        raise QJLError("there is nothing to draw: measure at least one preset that is not full precision.")
    with matplotlib.rc_context(STYLE):
        figure = Figure(_SIZE, dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        found = families(rows)
        _draw_axes(axes, rows)
        _draw_front(axes, rows)
        for family in found:
            _draw_family(axes, family)
        _Names(axes, found).draw()
        return content(figure, suffix)


@dataclass(frozen=True)
class Family:
    """The sizes of one method, smallest first."""

    name: str
    rows: list[Fidelity]
    is_ours: bool
    color: str
    marker: str


def families(rows: Sequence[Fidelity]) -> list[Family]:
    """Presets by method; ours last, so that they are drawn above the others."""
    by_name: dict[tuple[bool, str], list[Fidelity]] = {}
    for row in sorted(rows, key=lambda row: (row.bits, row.kl)):
        by_name.setdefault((row.is_ours, _stem(row.preset)), []).append(row)
    found = []
    for index, ((ours, stem), members) in enumerate(sorted(by_name.items())):
        name = stem if len(members) > 1 else members[0].preset
        color, marker = (OURS, "o") if ours else (TONES[index % len(TONES)], MARKERS[index % len(MARKERS)])
        found.append(Family(name, members, ours, color, marker))
    return found


def _stem(preset: str) -> str:
    """What the sizes of one method have in common: b2 and b3 are of b, b2-pre and b3-pre of b-pre."""
    return re.sub(r"[-_]?[kv]?\d.*?(?=-[a-z]|$)", "", preset) or preset


def _draw_axes(axes: Axes, rows: Sequence[Fidelity]) -> None:
    bits, kl = [row.bits for row in rows], [row.kl for row in rows]
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xlim(min(bits) / 1.15, max(bits) * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(kl) / 1.8, max(kl) * 1.8)
    axes.set_xlabel("true bits per number, every constant counted (16 without quantization)")
    axes.set_ylabel("KL of the next token to full precision, nats")
    row = rows[0]
    protocol = f"{row.chunks} x {row.decode} tokens decoded over the codes, after {row.prefix} of text"
    key = "bars: standard error; band: the least KL to be had for so many bits; bold: this project"
    axes.set_title(f"{row.model}, {protocol}\n{key}", loc="left", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(which="both", color=GRID, labelcolor=INK)
    axes.grid(which="major", color=GRID, alpha=0.3, linewidth=0.8)
    axes.grid(which="minor", axis="y", color=GRID, alpha=0.12, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_front(axes: Axes, rows: Sequence[Fidelity]) -> None:
    """The least KL to be had for so many bits, as steps."""
    front = pareto_front(rows)
    bits, kl = [row.bits for row in front], [row.kl for row in front]
    axes.step([*bits, axes.get_xlim()[1]], [*kl, kl[-1]], where="post", color=OURS, alpha=0.18, linewidth=7)


def _draw_family(axes: Axes, family: Family) -> None:
    axes.errorbar(
        [row.bits for row in family.rows],
        [row.kl for row in family.rows],
        yerr=[row.kl_se or 0 for row in family.rows],
        color=family.color,
        marker=family.marker,
        markersize=8 if family.is_ours else 6,
        linewidth=2.2 if family.is_ours else 1.3,
        elinewidth=1,
        capsize=2.5,
        zorder=4 if family.is_ours else 3,
    )


@dataclass(frozen=True)
class _Place:
    """Where a name may stand beside a row's point: ``gap`` and ``offset`` in points, ``box`` (x, y, x, y) in pixels."""

    row: Fidelity
    gap: float
    offset: tuple[float, float]
    box: _Box


class _Names:
    """Names beside points, each where it hides least: one per family, one per point of ours while they are few."""

    def __init__(self, axes: Axes, families: Sequence[Family]) -> None:
        self.axes, self.families = axes, families
        self.figure = cast(Figure, axes.get_figure())
        self.figure.draw_without_rendering()  # the layout is known from here on
        self.frame = np.array([axes.get_window_extent().extents])
        self.taken = np.array([box for family in families for box in self._boxes(family)])

    def draw(self) -> None:
        are_few = sum(len(family.rows) for family in self.families if family.is_ours) <= _MOST_NAMES
        for family in sorted(self.families, key=lambda family: (not family.is_ours, len(family.rows))):
            if family.is_ours and are_few:
                for row in family.rows:
                    self._draw(row.preset, [row], family)
            else:
                self._draw(family.name, family.rows, family)

    def _draw(self, name: str, rows: Sequence[Fidelity], family: Family) -> None:
        style: dict[str, Any] = {"color": INK, "weight": "bold" if family.is_ours else "normal"}
        best = min(self._places(rows, *self._size(name, style)), key=self._cost)
        self.taken = np.vstack([self.taken, best.box])
        line = {"arrowstyle": "-", "color": family.color, "lw": 0.7, "shrinkA": 0, "shrinkB": 3}
        text = self.axes.annotate(
            name,
            (best.row.bits, best.row.kl),
            best.offset,
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops=line if best.gap > _FAR else None,
            zorder=5,
            **style,
        )
        text.set_in_layout(False)

    def _size(self, name: str, style: dict[str, Any]) -> tuple[float, float]:
        """In pixels."""
        text = self.figure.text(0, 0, name, **style)
        box = text.get_window_extent()
        text.remove()
        return box.width, box.height

    def _places(self, rows: Sequence[Fidelity], width: float, height: float) -> Iterator[_Place]:
        pixels = self.figure.dpi / 72
        for row, gap, angle in itertools.product(rows, _GAPS, _ANGLES):
            right, up = math.cos(angle), math.sin(angle)
            x, y = self._at(row)
            dx, dy = right * (gap * pixels + width / 2), up * (gap * pixels + height / 2)
            box = (x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2)
            yield _Place(row, gap, (dx / pixels, dy / pixels), box)

    def _cost(self, place: _Place) -> float:
        """Pixels hidden, pixels outside of the picture, and a little for the distance."""
        left, bottom, right, top = place.box
        outside = (right - left) * (top - bottom) - _overlap(place.box, self.frame)
        return _overlap(place.box, self.taken) + 10 * outside + 2 * place.gap

    def _boxes(self, family: Family) -> Iterator[_Box]:
        """Around the family's points and along its line."""
        points = [self._at(row) for row in family.rows]
        for x, y in points:
            yield x - 10, y - 10, x + 10, y + 10
        for (x1, y1), (x2, y2) in itertools.pairwise(points):
            steps = max(2, int(math.hypot(x2 - x1, y2 - y1) / 8))
            for x, y in zip(np.linspace(x1, x2, steps), np.linspace(y1, y2, steps), strict=True):
                yield x - 4, y - 4, x + 4, y + 4

    def _at(self, row: Fidelity) -> tuple[float, float]:
        x, y = self.axes.transData.transform((row.bits, row.kl))
        return float(x), float(y)


def _overlap(box: _Box, others: np.ndarray) -> float:
    """Area that a box has in common with the others, ``[n, 4]``."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(sides.clip(min=0).prod(1).sum())
