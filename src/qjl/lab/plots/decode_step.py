"""A decode step: time against context, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qjl.lab.plots.style import DPI, INK, STYLE, content, looks, make_logarithmic, mark_contexts, require, with_power
from qjl.lab.rows import Decode


def benchmark(rows: Sequence[Decode], suffix: str = ".svg") -> bytes:
    """Rows of `qjl bench decode`: time against context with the power it grows by, and the roofline.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((12.0, 5.0), dpi=DPI, layout="constrained")
        growth, roofline = figure.subplots(1, 2)
        curves = _curves(rows)
        _draw_growth(growth, curves, rows[0])
        _draw_roofline(roofline, curves, rows)
        return content(figure, suffix)


@dataclass(frozen=True)
class _Curve:
    """One way of attending, at growing contexts: tokens, milliseconds, and bytes that it reads."""

    name: str
    tokens: list[int]
    ms: list[float]
    nbytes: list[float]
    color: str
    marker: str


_FULL_BYTES = {"torch_fp32": 4, "torch_bf16": 2, "fp16_avx2": 2, "flash_bf16": 2, "flex_bf16": 2}  # per number


def _curves(rows: Sequence[Decode]) -> list[_Curve]:
    """The presets, and what they are compared with, each context once."""
    presets = list(dict.fromkeys(row.preset for row in rows))
    look = looks([*presets, *_FULL_BYTES])
    curves = []
    for preset in presets:
        chosen = sorted((row for row in rows if row.preset == preset), key=lambda row: row.tokens)
        nbytes = [float(row.bytes) for row in chosen]
        tokens, ms = [row.tokens for row in chosen], [row.ms for row in chosen]
        curves.append(_Curve(preset, tokens, ms, nbytes, **look[preset]))
    for name, size in _FULL_BYTES.items():
        timed = {row.tokens: (row, taken) for row in rows if (taken := row.others_ms.get(name)) is not None}
        if timed:
            chosen = [timed[count][0] for count in sorted(timed)]
            nbytes = [2.0 * size * row.batch * row.kv_heads * row.tokens * row.head_dim for row in chosen]
            tokens, ms = sorted(timed), [timed[count][1] for count in sorted(timed)]
            curves.append(_Curve(name.replace("_", " "), tokens, ms, nbytes, **look[name]))
    return curves


def _draw_growth(axes: Axes, curves: Sequence[_Curve], row: Decode) -> None:
    for curve in curves:
        axes.plot(
            curve.tokens,
            curve.ms,
            color=curve.color,
            marker=curve.marker,
            label=with_power(curve.name, curve.tokens, curve.ms),
            markersize=5,
        )
    make_logarithmic(axes, "tokens in the cache", "ms per layer and token")
    mark_contexts(axes, (count for curve in curves for count in curve.tokens))
    shape = f"{row.batch} x {row.kv_heads} x {row.group} heads of {row.head_dim}"
    shape += f", {row.threads} thread(s)" if row.device == "cpu" else ""
    axes.set_title(f"One token's attention, {shape}\n{row.machine}", loc="left", fontsize=10)


def _draw_roofline(axes: Axes, curves: Sequence[_Curve], rows: Sequence[Decode]) -> None:
    """What each reaches at its longest context, beside what memory and arithmetic allow."""
    bandwidth, peak = max(row.bandwidth_gbs for row in rows), max(row.peak_gflops for row in rows)
    per_token = rows[0].operations / rows[0].tokens
    points = [(curve, per_token * curve.tokens[-1]) for curve in curves]
    intensities = [operations / curve.nbytes[-1] for curve, operations in points]
    x = np.geomspace(min(intensities) / 2, max(*intensities, peak / bandwidth) * 2, 200)
    axes.plot(x, bandwidth * x, color=INK, linewidth=1.2, label="memory")
    axes.axhline(peak, color=INK, linewidth=1.2, linestyle="dotted", label="arithmetic, which look-ups do without")
    for (curve, operations), intensity in zip(points, intensities, strict=True):
        reached = operations / curve.ms[-1] / 1e6
        axes.plot([intensity], [reached], color=curve.color, marker=curve.marker, label=curve.name, linestyle="none")
    make_logarithmic(axes, "operations of exact attention per byte read", "billions of them per second")
    limits = f"memory {bandwidth:.1f} GB/s, arithmetic {peak:.0f} GFLOP/s"
    axes.set_title(f"Roofline at {max(curves[0].tokens)} tokens\n{limits}", loc="left", fontsize=10)
