"""Codes themselves: what making them takes beside a prefill, and what scanning them takes beside other scans."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from qjl.lab.plots.style import (
    DPI,
    GRID,
    INK,
    OURS,
    STYLE,
    TONES,
    Look,
    content,
    looks,
    make_frame,
    make_logarithmic,
    mark_contexts,
    require,
    with_power,
)
from qjl.lab.rows import Encode, Scan

_LINES: dict[str, Look] = {
    "key": {"linestyle": "solid", "marker": "o", "markersize": 5},
    "value": {"linestyle": "dashed", "marker": "s", "markersize": 5},
}
_SCANS = {"popcount": ("popcount (RaBitQ's)", TONES[0], "s")} | {
    "faiss_pq": ("FAISS PQ", TONES[2], "D"),
    "faiss_rabitq": ("FAISS RaBitQ", TONES[3], "^"),
}


def encoding(rows: Sequence[Encode], suffix: str = ".svg") -> bytes:
    """Rows of `qjl bench encode`: time against prompt, and its share of the prefill's attention.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    look = looks(row.preset for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((11.2, 4.8), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2)
        prefill = {row.tokens: row.prefill_ms for row in sorted(rows, key=lambda row: row.tokens)}
        contexts, attention = list(prefill), list(prefill.values())
        name = with_power("attention of the prefill", contexts, attention)
        left.plot(contexts, attention, color=INK, marker="x", label=name)
        for preset, role in itertools.product(look, _LINES):
            of = [row for row in rows if (row.preset, row.role) == (preset, role)]
            of.sort(key=lambda row: row.tokens)
            tokens, ms = [row.tokens for row in of], [row.ms for row in of]
            name, drawn = f"{preset}, {role}s", look[preset] | _LINES[role]
            left.plot(tokens, ms, label=with_power(name, tokens, ms), **drawn)
            right.plot(tokens, [100 * row.share_of_prefill for row in of], label=name, **drawn)
        make_logarithmic(left, "prompt, tokens", "ms per layer")
        make_logarithmic(right, "prompt, tokens", "encoding, percent of the prefill's attention")
        for axes in (left, right):
            mark_contexts(axes, prefill)
        return content(figure, suffix)


def scans(rows: Sequence[Scan], suffix: str = ".svg") -> bytes:
    """Scans of `qjl bench kernels`: the time of each code, beside other scans of equally many bits.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 1.6 + 0.36 * len(rows)), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        drawn: Look = {"linestyle": "none", "markersize": 7}
        axes.plot([row.ms for row in rows], range(len(rows)), color=OURS, marker="o", label="qjl", **drawn)
        for key, (name, color, marker) in _SCANS.items():
            timed = {place: ms for place, row in enumerate(rows) if (ms := row.others_ms.get(key)) is not None}
            if timed:
                axes.plot(list(timed.values()), list(timed), color=color, marker=marker, label=name, **drawn)
        axes.set_yticks(range(len(rows)), [f"{row.preset}, {row.bits_per_key:g} bits" for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        make_frame(axes, f"ms for {rows[0].tokens:,} tokens", "")
        axes.grid(axis="y", color=GRID, alpha=0.15)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
        return content(figure, suffix)
