"""Pictures of measurements, drawn from their rows alone."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from qjl.errors import QJLError
from qjl.records import Row, is_ours, pareto_front

FORMATS = (".svg", ".png")
LEAST_KL = 1e-6  # less is full precision, which has no place on a logarithmic axis
_SIZE, _DPI = (9.0, 5.8), 160
# Tones that can be read on white and on black: the background is transparent.
_INK, _GRID, _OURS = "#78828e", "#8b949e", "#e8590c"
_TONES = (
    *("#3b82c4", "#2a9d72", "#9a6fd0", "#b08a1e", "#c2588f", "#3a9fae"),
    *("#7c8f3a", "#6475e0", "#8a7f78", "#4f9a46", "#a8695a"),
)
_MARKERS = "sD^vPX<>ph*d8"
_STYLE: Any = {
    "svg.hashsalt": "qjl",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
}
_TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 16)
_ANGLES = tuple(math.radians(degrees) for degrees in (0, 90, 270, 45, 315, 135, 225, 180))
_GAPS = (7, 14, 24, 36)  # between a name and its point, in points
_FAR = 20  # from here on a thin line joins them
_Box = tuple[float, float, float, float]


def require_format(path: Path) -> None:
    """Raises QJLError unless the name says which kind of picture it is."""
    if path.suffix not in FORMATS:
        raise QJLError(f"{path} is no picture that can be drawn: give a name that ends in {' or '.join(FORMATS)}.")


def frontier(rows: Sequence[Row], suffix: str = ".svg") -> bytes:
    """KL against true bits, a line per family of presets: the content of a picture file, the same for the same rows.

    Raises:
        QJLError: if no row has a KL that could be drawn.
    """
    rows = [row for row in rows if row["kl"] > LEAST_KL]
    if not rows:
        raise QJLError("there is nothing to draw: measure at least one preset that is not full precision.")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(_SIZE, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        families = _families(rows)
        _draw_axes(axes, rows)
        _draw_front(axes, rows)
        for family in families:
            _draw_family(axes, family)
        _Names(axes, families).draw()
        return _content(figure, suffix)


def benchmark(rows: Sequence[Row], suffix: str = ".svg") -> bytes:
    """Rows of `qjl bench decode`: time against context with the power it grows by, and the roofline.

    Raises:
        QJLError: if there is no row.
    """
    if not rows:
        raise QJLError("there is nothing to draw: measure at least one case.")
    with matplotlib.rc_context(_STYLE):
        figure = Figure((12.0, 5.0), dpi=_DPI, layout="constrained")
        growth, roofline = figure.subplots(1, 2)
        curves = _curves(rows)
        _draw_growth(growth, curves, rows[0])
        _draw_roofline(roofline, curves, rows)
        return _content(figure, suffix)


def _content(figure: Figure, suffix: str) -> bytes:
    content = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
    figure.savefig(content, format=suffix[1:], dpi=_DPI, transparent=True, metadata=metadata)
    return content.getvalue()


@dataclass(frozen=True)
class _Family:
    """The sizes of one method, smallest first."""

    name: str
    rows: list[Row]
    is_ours: bool
    color: str
    marker: str


def _families(rows: Sequence[Row]) -> list[_Family]:
    """Ours last, so that they are drawn above the others."""
    by_name: dict[tuple[bool, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["bits"], row["kl"])):
        by_name.setdefault((is_ours(row), _stem(row["preset"])), []).append(row)
    families = []
    for index, ((ours, stem), members) in enumerate(sorted(by_name.items())):
        name = stem if len(members) > 1 else members[0]["preset"]
        color, marker = (_OURS, "o") if ours else (_TONES[index % len(_TONES)], _MARKERS[index % len(_MARKERS)])
        families.append(_Family(name, members, ours, color, marker))
    return families


def _stem(preset: str) -> str:
    """What the sizes of one method have in common: b2 and b3 are of b, b2-pre and b3-pre of b-pre."""
    return re.sub(r"[-_]?[kv]?\d.*?(?=-[a-z]|$)", "", preset) or preset


def _draw_axes(axes: Axes, rows: Sequence[Row]) -> None:
    bits, kl = [row["bits"] for row in rows], [row["kl"] for row in rows]
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xlim(min(bits) / 1.15, max(bits) * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(kl) / 1.8, max(kl) * 1.8)
    axes.set_xlabel("true bits per number, every constant counted (16 without quantization)")
    axes.set_ylabel("KL of the next token to full precision, nats")
    row = rows[0]
    protocol = f"{row['chunks']} x {row['decode']} tokens decoded over the codes, after {row['prefix']} of text"
    key = "bars: standard error; band: the least KL to be had for so many bits; bold: this project"
    axes.set_title(f"{row['model']}, {protocol}\n{key}", loc="left", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(which="both", color=_GRID, labelcolor=_INK)
    axes.grid(which="major", color=_GRID, alpha=0.3, linewidth=0.8)
    axes.grid(which="minor", axis="y", color=_GRID, alpha=0.12, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_front(axes: Axes, rows: Sequence[Row]) -> None:
    """The least KL to be had for so many bits, as steps."""
    front = pareto_front(rows)
    bits, kl = [row["bits"] for row in front], [row["kl"] for row in front]
    axes.step([*bits, axes.get_xlim()[1]], [*kl, kl[-1]], where="post", color=_OURS, alpha=0.18, linewidth=7)


def _draw_family(axes: Axes, family: _Family) -> None:
    axes.errorbar(
        [row["bits"] for row in family.rows],
        [row["kl"] for row in family.rows],
        yerr=[row["kl_se"] or 0 for row in family.rows],
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

    row: Row
    gap: float
    offset: tuple[float, float]
    box: _Box


class _Names:
    """Names beside points, each where it hides least: one per family, and one for each point of ours."""

    def __init__(self, axes: Axes, families: Sequence[_Family]) -> None:
        self.axes, self.families = axes, families
        self.figure = cast(Figure, axes.get_figure())
        self.figure.draw_without_rendering()  # the layout is known from here on
        self.frame = np.array([axes.get_window_extent().extents])
        self.taken = np.array([box for family in families for box in self._boxes(family)])

    def draw(self) -> None:
        for family in sorted(self.families, key=lambda family: (not family.is_ours, len(family.rows))):
            if family.is_ours:
                for row in family.rows:
                    self._draw(row["preset"], [row], family)
            else:
                self._draw(family.name, family.rows, family)

    def _draw(self, name: str, rows: Sequence[Row], family: _Family) -> None:
        style: dict[str, Any] = {"color": family.color, "weight": "bold" if family.is_ours else "normal"}
        best = min(self._places(rows, *self._size(name, style)), key=self._cost)
        self.taken = np.vstack([self.taken, best.box])
        line = {"arrowstyle": "-", "color": family.color, "lw": 0.7, "shrinkA": 0, "shrinkB": 3}
        text = self.axes.annotate(
            name,
            (best.row["bits"], best.row["kl"]),
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

    def _places(self, rows: Sequence[Row], width: float, height: float) -> Iterator[_Place]:
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

    def _boxes(self, family: _Family) -> Iterator[_Box]:
        """Around the family's points and along its line."""
        points = [self._at(row) for row in family.rows]
        for x, y in points:
            yield x - 10, y - 10, x + 10, y + 10
        for (x1, y1), (x2, y2) in itertools.pairwise(points):
            steps = max(2, int(math.hypot(x2 - x1, y2 - y1) / 8))
            for x, y in zip(np.linspace(x1, x2, steps), np.linspace(y1, y2, steps), strict=True):
                yield x - 4, y - 4, x + 4, y + 4

    def _at(self, row: Row) -> tuple[float, float]:
        x, y = self.axes.transData.transform((row["bits"], row["kl"]))
        return float(x), float(y)


def _overlap(box: _Box, others: np.ndarray) -> float:
    """Area that a box has in common with the others, ``[n, 4]``."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(sides.clip(min=0).prod(1).sum())


@dataclass(frozen=True)
class _Curve:
    """One way of attending, at growing contexts: tokens, milliseconds, and bytes that it reads."""

    name: str
    tokens: list[int]
    ms: list[float]
    nbytes: list[float]
    color: str
    marker: str

    @property
    def label(self) -> str:
        """With the power of the context that the time grows by."""
        if len(set(self.tokens)) < 2:
            return self.name
        power, _ = np.polyfit(np.log(self.tokens), np.log(self.ms), 1)
        return f"{self.name}, n^{power:.2f}"


_FULL_BYTES = {"torch_fp32": 4, "torch_bf16": 2, "fp16_avx2": 2}  # per number


def _curves(rows: Sequence[Row]) -> list[_Curve]:
    """The presets, and what they are compared with, each context once."""
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    tones = [_OURS, *_TONES]
    curves = []
    for index, preset in enumerate(presets):
        chosen = sorted((row for row in rows if row["preset"] == preset), key=lambda row: row["tokens"])
        nbytes = [float(row["bytes"]) for row in chosen]
        tokens, ms = [row["tokens"] for row in chosen], [row["ms"] for row in chosen]
        curves.append(_Curve(preset, tokens, ms, nbytes, tones[index % len(tones)], "o"))
    for index, (name, size) in enumerate(_FULL_BYTES.items()):
        by_tokens = {row["tokens"]: row for row in rows if row[f"ms_{name}"] is not None}
        if by_tokens:
            tokens, chosen = sorted(by_tokens), [by_tokens[count] for count in sorted(by_tokens)]
            nbytes = [2.0 * size * row["kv_heads"] * row["tokens"] * row["head_dim"] for row in chosen]
            ms = [row[f"ms_{name}"] for row in chosen]
            curves.append(_Curve(name.replace("_", " "), tokens, ms, nbytes, _TONES[-1 - index], _MARKERS[index]))
    return curves


def _draw_growth(axes: Axes, curves: Sequence[_Curve], row: Row) -> None:
    for curve in curves:
        axes.plot(curve.tokens, curve.ms, color=curve.color, marker=curve.marker, label=curve.label, markersize=5)
    _make_logarithmic(axes, "tokens in the cache", "ms per layer and token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}k"))
    axes.xaxis.set_major_locator(FixedLocator(sorted({count for curve in curves for count in curve.tokens})))
    shape = f"{row['kv_heads']} x {row['group']} heads of {row['head_dim']}, {row['threads']} thread(s)"
    axes.set_title(f"One token's attention, {shape}\n{row['machine']}", loc="left", fontsize=10)


def _draw_roofline(axes: Axes, curves: Sequence[_Curve], rows: Sequence[Row]) -> None:
    """What each reaches at its longest context, beside what memory and arithmetic allow."""
    bandwidth, peak = max(row["bandwidth_gbs"] for row in rows), max(row["peak_gflops"] for row in rows)
    per_token = rows[0]["operations"] / rows[0]["tokens"]
    points = [(curve, per_token * curve.tokens[-1]) for curve in curves]
    intensities = [operations / curve.nbytes[-1] for curve, operations in points]
    x = np.geomspace(min(intensities) / 2, max(*intensities, peak / bandwidth) * 2, 200)
    axes.plot(x, bandwidth * x, color=_INK, linewidth=1.2, label="memory")
    axes.axhline(peak, color=_INK, linewidth=1.2, linestyle="dotted", label="arithmetic, which look-ups do without")
    for (curve, operations), intensity in zip(points, intensities, strict=True):
        reached = operations / curve.ms[-1] / 1e6
        axes.plot([intensity], [reached], color=curve.color, marker=curve.marker, label=curve.name, linestyle="none")
    _make_logarithmic(axes, "operations of exact attention per byte read", "billions of them per second")
    limits = f"memory {bandwidth:.1f} GB/s, float32 arithmetic {peak:.0f} GFLOP/s"
    axes.set_title(f"Roofline at {max(curves[0].tokens)} tokens\n{limits}", loc="left", fontsize=10)


def _make_logarithmic(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(which="both", color=_GRID, labelcolor=_INK)
    axes.grid(which="major", color=_GRID, alpha=0.3, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
