"""What quantization loses: by layer, by context, by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qjl.lab.plots.answers import FULL
from qjl.lab.plots.style import (
    DPI,
    INK,
    STYLE,
    Look,
    content,
    looks,
    make_frame,
    make_logarithmic,
    mark_contexts,
    name_below,
    require,
)
from qjl.lab.rows import Distortion, Perplexity, Seed

ROLES = {"score": "error of scores, relative to ‖q‖ ‖k‖", "output": "error of attention's output, relative"}


def distortion(rows: Sequence[Distortion], suffix: str = ".svg") -> bytes:
    """Rows of `qjl eval distortion`: the error of each layer, a panel per role, with theory's as a dotted line.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    roles = [role for role in ROLES if any(row.role == role for row in rows)]
    look = looks(row.preset for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((5.6 * len(roles), 4.8), dpi=DPI, layout="constrained")
        for axes, role in zip(figure.subplots(1, len(roles), squeeze=False)[0], roles, strict=True):
            _draw_layers(axes, [row for row in rows if row.role == role], look)
            make_frame(axes, "layer", ROLES[role])
        name_below(figure)
        return content(figure, suffix)


def _draw_layers(axes: Axes, rows: Sequence[Distortion], look: dict[str, Look]) -> None:
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, style in look.items():
        of = sorted((row for row in rows if row.preset == name), key=lambda row: row.layer)
        layers = [row.layer for row in of]
        errors = [row.error_se or 0 for row in of]
        drawn: Look = {"markersize": 5, "elinewidth": 1, "label": name} | style
        axes.errorbar(layers, [row.error for row in of], yerr=errors, **drawn)
        if any(row.theory is not None for row in of):
            expected = [math.nan if row.theory is None else row.theory for row in of]
            axes.plot(layers, expected, linestyle="dotted", markersize=3, label=f"{name}, theory", **style)


def perplexity(rows: Sequence[Perplexity], suffix: str = ".svg") -> bytes:
    """Rows of `qjl eval perplexity`: perplexity, and KL to full precision, against context.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((11.2, 4.8), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2)
        full = {row.context: row.ppl_full for row in sorted(rows, key=lambda row: row.context)}
        left.plot(list(full), list(full.values()), color=INK, linestyle="dashed", label="full precision")
        lossy = [row for row in rows if row.preset != FULL]
        for name, style in looks(row.preset for row in lossy).items():
            of = sorted((row for row in rows if row.preset == name), key=lambda row: row.context)
            contexts, drawn = [row.context for row in of], {"markersize": 5, "label": name} | style
            left.plot(contexts, [row.ppl for row in of], **drawn)
            right.errorbar(contexts, [row.kl for row in of], yerr=[row.kl_se or 0 for row in of], **drawn)
        make_logarithmic(left, "context, tokens", "perplexity of the second half")
        make_logarithmic(right, "context, tokens", "KL to full precision, nats per token")
        for axes in (left, right):
            mark_contexts(axes, full)
        name_below(figure)
        return content(figure, suffix)


def seeds(rows: Sequence[Seed], suffix: str = ".svg") -> bytes:
    """Rows of `qjl eval seeds`: the KL of each seed, with their mean and deviation; a line per preset.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    look = looks(row.preset for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 1.4 + 0.45 * len(look)), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for place, (name, style) in enumerate(look.items()):
            kl = [row.kl for row in rows if row.preset == name]
            axes.plot(kl, [place] * len(kl), linestyle="none", alpha=0.55, markersize=6, **style)
            deviation = stdev(kl) if len(kl) > 1 else 0.0
            bars: Look = {"fmt": "|", "color": INK, "markersize": 16, "elinewidth": 1.4, "capsize": 4}
            axes.errorbar([mean(kl)], [place], xerr=[deviation], **bars)
        axes.set_yticks(range(len(look)), list(look))
        axes.set_ylim(len(look) - 0.5, -0.5)
        make_frame(axes, "KL to full precision, nats per token; bars: mean and standard deviation over seeds", "")
        return content(figure, suffix)
