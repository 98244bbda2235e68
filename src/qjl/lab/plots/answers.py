"""What a model still answers over the packed codes: problems, tasks, needles in haystacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qjl.lab.plots.style import DPI, GRID, INK, OURS, STYLE, TONES, Look, content, context_name, make_frame, require
from qjl.lab.rows import HarnessMetric, Haystack, OfPreset, Problems

FULL = "full"
_ACROSS = 4  # haystacks beside each other


@dataclass(frozen=True)
class _Result:
    """One preset's share with its standard error."""

    name: str
    bits: float
    value: float
    error: float
    is_ours: bool


def problems(rows: Sequence[Problems], suffix: str = ".svg") -> bytes:
    """Rows of `qjl eval generate` of one task: the share solved by each preset, beside full precision.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    results = [_result(row, 100 * row.accuracy, 100 * row.accuracy_se) for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 1.4 + 0.32 * len(results)), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        _draw_results(axes, results)
        make_frame(axes, f"{rows[0].task}: problems solved of {rows[0].n}, percent", "")
        return content(figure, suffix)


def tasks(rows: Sequence[HarnessMetric], suffix: str = ".svg") -> bytes:
    """Rows of `qjl eval harness`: a panel per task, metric and filter, in it each preset's value.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    panels = by_metric(rows)
    count = max(map(len, panels.values()))
    lines = -(-len(panels) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure((11.2, lines * (1.4 + 0.3 * count)), dpi=DPI, layout="constrained")
        places = figure.subplots(lines, 2, squeeze=False).flatten()
        for axes in places[len(panels) :]:
            axes.remove()
        for axes, ((task, metric), chosen) in zip(places, panels.items(), strict=False):
            _draw_results(axes, [_result(row, row.value, row.value_se or 0) for row in chosen])
            make_frame(axes, metric.replace("_", " "), "")
            axes.set_title(task, loc="left", fontsize=10)
        return content(figure, suffix)


def by_metric(rows: Sequence[HarnessMetric]) -> dict[tuple[str, str], list[HarnessMetric]]:
    """Rows by their task and the name of their metric, which tells the filter where there are several."""
    filters = Counter((task, metric) for task, metric, _ in {_measured(row) for row in rows})
    found: dict[tuple[str, str], list[HarnessMetric]] = {}
    for row in rows:
        task, metric, chosen = _measured(row)
        found.setdefault((task, metric if filters[task, metric] == 1 else f"{metric}, {chosen}"), []).append(row)
    return found


def _measured(row: HarnessMetric) -> tuple[str, str, str | None]:
    return row.task, row.metric, row.filter


def _result(row: OfPreset, value: float, error: float) -> _Result:
    return _Result(row.preset, row.bits, value, error, row.is_ours)


def _draw_results(axes: Axes, results: Sequence[_Result]) -> None:
    """The smallest cache at the bottom; full precision as a line with a band of its standard error."""
    shown = sorted((one for one in results if one.name != FULL), key=lambda one: (one.bits, one.value))
    for full in (one for one in results if one.name == FULL):
        axes.axvline(full.value, color=INK, linewidth=1.2, linestyle="dashed")
        axes.axvspan(full.value - full.error, full.value + full.error, color=GRID, alpha=0.15, linewidth=0)
    for place, one in enumerate(shown):
        drawn: Look = {"fmt": "o", "color": OURS} if one.is_ours else {"fmt": "s", "color": TONES[0]}
        axes.errorbar([one.value], [place], xerr=[one.error], markersize=6, capsize=3, elinewidth=1.2, **drawn)
    axes.set_yticks(range(len(shown)), [f"{one.name}, {one.bits:.2f} bits" for one in shown])
    axes.set_ylim(-0.6, max(len(shown), 1) - 0.4)


def heatmap(rows: Sequence[Haystack], suffix: str = ".svg") -> bytes:
    """Rows of `qjl eval retrieval` of one task: what was found by context and depth, a panel per preset.

    Where full precision found another share, a cell names it below its own.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    presets = sorted({row.preset for row in rows}, key=lambda name: (name != FULL, -_bits(rows, name), name))
    contexts, depths = sorted({row.context for row in rows}), sorted({row.depth for row in rows})
    across = min(_ACROSS, len(presets))
    lines = -(-len(presets) // across)
    size = (0.6 + across * (0.4 + 0.55 * max(len(contexts), 3)), 0.6 + lines * (0.4 + 0.42 * max(len(depths), 3)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, dpi=DPI, layout="constrained")
        panels = figure.subplots(lines, across, squeeze=False, sharex=True, sharey=True).flatten()
        for axes in panels[len(presets) :]:
            axes.remove()
        full = _cells([row for row in rows if row.preset == FULL])
        for axes, name in zip(panels, presets, strict=False):
            cells = _cells([row for row in rows if row.preset == name])
            _draw_cells(axes, cells, full, contexts, depths)
            axes.set_title(name if name == FULL else f"{name}, {_bits(rows, name):.2f} bits", fontsize=10)
        figure.supxlabel("context, tokens", fontsize=10, color=INK)
        figure.supylabel("depth, percent", fontsize=10, color=INK)
        return content(figure, suffix)


_Cells = dict[tuple[int, float], float]


def _cells(rows: Sequence[Haystack]) -> _Cells:
    """The mean over seeds, by context and depth."""
    found: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        found.setdefault((row.context, row.depth), []).append(row.found)
    return {cell: mean(shares) for cell, shares in found.items()}


def _bits(rows: Sequence[Haystack], name: str) -> float:
    return float(next(row.bits for row in rows if row.preset == name))


def _draw_cells(axes: Axes, cells: _Cells, full: _Cells, contexts: Sequence[int], depths: Sequence[float]) -> None:
    for (context, depth), share in cells.items():
        x, y = contexts.index(context), depths.index(depth)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=TONES[0], alpha=0.55 * share, linewidth=0))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=GRID, alpha=0.5, linewidth=0.6))
        baseline = full.get((context, depth), share)
        text = f"{share:.2g}" if abs(baseline - share) < 5e-3 else f"{share:.2g}\nof {baseline:.2g}"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, linespacing=0.95)
    axes.set_xlim(-0.5, len(contexts) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(contexts)), [context_name(context) for context in contexts])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
    axes.tick_params(color=GRID, labelcolor=INK, length=0)
    axes.spines[:].set_visible(False)
