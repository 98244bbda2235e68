"""What all pictures share: tones, formats, axes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, NullLocator

from qjl.errors import QJLError

FORMATS = (".svg", ".png")
DPI = 160
# Tones that can be read on white and on black: the background is transparent.
INK, GRID, OURS = "#78828e", "#8b949e", "#e8590c"
TONES = (
    *("#3b82c4", "#2a9d72", "#9a6fd0", "#b08a1e", "#c2588f", "#3a9fae"),
    *("#7c8f3a", "#6475e0", "#8a7f78", "#4f9a46", "#a8695a"),
)
MARKERS = "sD^vPX<>ph*d8"
STYLE: Any = {
    "svg.hashsalt": "qjl",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
}


def require_format(path: Path) -> None:
    """Raises QJLError unless the name says which kind of picture it is."""
    if path.suffix not in FORMATS:
        raise QJLError(f"{path} is no picture that can be drawn: give a name that ends in {' or '.join(FORMATS)}.")


def content(figure: Figure, suffix: str) -> bytes:
    """Of a picture file, the same for the same figure."""
    content = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
    figure.savefig(content, format=suffix[1:], dpi=DPI, transparent=True, metadata=metadata)
    return content.getvalue()


class _WithinADecade(LogFormatter):
    """Names what lies between powers of ten where there are few of them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def make_logarithmic(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(_WithinADecade(minor_thresholds=(1, 0.4)))
    axes.tick_params(which="both", color=GRID, labelcolor=INK)
    axes.grid(which="major", color=GRID, alpha=0.3, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
