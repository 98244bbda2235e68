"""What all pictures share: tones, formats, axes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, NullLocator

from qjl.errors import QJLError
from qjl.lab.rows import Row

FORMATS = (".svg", ".png")
DPI = 160
MOST_TICKS = 10  # that have room beside each other
Look = dict[str, Any]
# The background is transparent: each has a contrast of 3 with white and with black, and the tones are far apart for
# the colour-blind too. There are no more such tones, so that markers tell apart what shares one.
INK, GRID, OURS = "#78828e", "#8b949e", "#e8590c"
TONES = ("#4068e8", "#889870", "#b83070", "#1098e8", "#905830", "#a888b8", "#9840a8")
MARKERS = "sD^vPX<>ph*d8"
STYLE: Any = {
    "svg.hashsalt": "qjl",
    "font.size": 10,
    "text.parse_math": False,  # a name may hold a dollar
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
}


def require_format(path: Path) -> None:
    """Raises QJLError unless the name says which kind of picture it is."""
    if path.suffix not in FORMATS:
        raise QJLError(f"{path} is no picture that can be drawn: give a name that ends in {' or '.join(FORMATS)}.")


def require(rows: Sequence[Row]) -> None:
    """Raises QJLError if there is no row."""
    if not rows:
        raise QJLError("there is nothing to draw: measure at least one case.")


def content(figure: Figure, suffix: str) -> bytes:
    """Of a picture file, the same for the same figure."""
    content = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
    figure.savefig(content, format=suffix[1:], dpi=DPI, transparent=True, metadata=metadata)
    return content.getvalue()


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A tone and a marker for each name."""
    tones, markers = (OURS, *TONES), "o" + MARKERS
    return {
        name: {"color": tones[index % len(tones)], "marker": markers[index % len(markers)]}
        for index, name in enumerate(dict.fromkeys(names))
    }


class _WithinADecade(LogFormatter):
    """Names what lies between powers of ten where there are few of them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def with_power(name: str, sizes: Sequence[float], values: Sequence[float]) -> str:
    """A curve's name, and the power of its sizes that the values grow by: the slope of a line through logarithms."""
    if len(set(sizes)) < 2:
        return name
    power, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return f"{name}, n^{power:.2f}"


def make_frame(axes: Axes, x: str, y: str) -> None:
    """What all axes have: labels with units, a faint grid, no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(which="both", color=GRID, labelcolor=INK)
    axes.grid(which="major", color=GRID, alpha=0.3, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def make_logarithmic(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    make_frame(axes, x, y)
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(_WithinADecade(minor_thresholds=(1, 0.4)))
    axes.legend(frameon=False, fontsize=9)


def name_below(figure: Figure) -> None:
    """One legend for all panels, in place of their own."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    by_name = dict(sorted(zip(names, handles, strict=True), key=lambda pair: pair[0]))
    for legend in filter(None, (axes.get_legend() for axes in figure.axes)):
        legend.remove()
    figure.legend(by_name.values(), by_name.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)


def mark_contexts(axes: Axes, contexts: Iterable[float]) -> None:
    """A tick for each, in thousands of tokens; where they would stand too near, for some."""
    ticks = sorted(set(contexts))
    while len(ticks) > MOST_TICKS:
        ticks = ticks[::-2][::-1]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: context_name(value)))


def context_name(tokens: float) -> str:
    """``512``, ``1k``, ``1.5k``."""
    return f"{tokens:g}" if tokens < 1024 else f"{tokens / 1024:.3g}k"
