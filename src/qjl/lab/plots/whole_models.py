"""Whole models: what a context costs, and how much work fits into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qjl.lab.plots.style import (
    DPI,
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
from qjl.lab.rows import EngineTurn, Generate, Memory, OfModel, Serving, Throughput

_Kind = TypeVar("_Kind", bound=OfModel)


def contexts(rows: Sequence[Memory], suffix: str = ".svg") -> bytes:
    """Rows of `qjl bench memory`: time of a prompt, of a token after it, and memory against context.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((14.0, 4.6), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, 3)
        _draw(panels[0], rows, "prompt, seconds", lambda row: row.prefill_ms / 1e3)
        _draw(panels[1], rows, "a token after it, ms", lambda row: row.ms)
        _draw(panels[2], rows, "cache, MB", lambda row: row.cache_bytes / 1e6)
        name_below(figure)
        figure.suptitle(_title(rows[0]), x=0.01, ha="left", fontsize=10)
        return content(figure, suffix)


def throughput(rows: Sequence[Throughput], suffix: str = ".svg") -> bytes:
    """Rows of `qjl bench throughput`: tokens per second against batch, a panel per context.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    lengths = sorted({row.tokens for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure((6.0 * len(lengths), 4.6), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, len(lengths), squeeze=False)[0]
        for axes, length in zip(panels, lengths, strict=True):
            _draw_batches(axes, [row for row in rows if row.tokens == length])
        figure.suptitle(f"{_title(rows[0])}, {rows[0].memory / 1e9:.3g} GB", x=0.01, ha="left", fontsize=10)
        return content(figure, suffix)


def generation(rows: Sequence[Generate], suffix: str = ".svg") -> bytes:
    """Rows of `qjl bench generate`: a token's time, and that of its attention, against context.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((11.0, 4.8), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, 2)
        _draw(panels[0], rows, "a token, ms", lambda row: row.ms)
        _draw(panels[1], rows, "attention per layer, ms", _attention)
        panels[1].set_yscale("linear")  # a difference of two times may be negative
        name_below(figure)
        threads = ", ".join(f"{count}" for count in sorted({row.threads for row in rows}))
        title = f"{rows[0].model}, {threads} thread(s), {rows[0].machine}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return content(figure, suffix)


def _attention(row: Generate) -> float:
    """Milliseconds; not a number where none was measured."""
    return math.nan if row.attention_ms_per_layer is None else row.attention_ms_per_layer


def serving(rows: Sequence[Serving], suffix: str = ".svg") -> bytes:
    """Rows of `qjl bench serving`: memory of the server from the first request to the last.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((8.0, 4.0), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for row, look in zip(rows, looks(row.preset for row in rows).values(), strict=True):
            minutes = np.linspace(0, row.seconds / 60, len(row.resident_bytes))
            axes.plot(minutes, [nbytes / 1e6 for nbytes in row.resident_bytes], label=row.preset, markersize=3, **look)
        make_frame(axes, "minutes", "the server's memory, MB")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        figure.suptitle(f"{_title(rows[0])}, {rows[0].clients} clients", x=0.01, ha="left", fontsize=10)
        return content(figure, suffix)


def engines(rows: Sequence[EngineTurn], suffix: str = ".svg") -> bytes:
    """Rows of `qjl bench vllm`: time of a decode step and of prompts against context, medians and ranges of turns.

    Raises:
        QJLError: if there is no row.
    """
    require(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((11.0, 4.6), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, 2)
        _draw_turns(panels[0], rows, "a decode step, ms", lambda row: 1e3 * row.step_seconds)
        _draw_turns(panels[1], rows, "prompts, seconds", lambda row: row.prefill_seconds)
        name_below(figure)
        figure.suptitle(f"{_title(rows[0])}, {rows[0].requests} sequences", x=0.01, ha="left", fontsize=10)
        return content(figure, suffix)


def _title(row: OfModel | Serving | EngineTurn) -> str:
    how = f", {row.threads} thread(s)" if row.device == "cpu" else ""
    return f"{row.model} in {row.dtype}{how}, {row.machine}"


def _looks(rows: Sequence[OfModel | EngineTurn]) -> dict[str, Look]:
    """A tone and a marker per cache, ours first."""
    return looks(sorted({row.preset for row in rows}, key=lambda name: _is_peer(rows, name)))


def _is_peer(rows: Sequence[OfModel | EngineTurn], name: str) -> tuple[bool, str]:
    return all(row.backend is None for row in rows if row.preset == name), name


def _draw(axes: Axes, rows: Sequence[_Kind], what: str, number: Callable[[_Kind], float]) -> None:
    for name, look in _looks(rows).items():
        chosen = sorted((row for row in rows if row.preset == name), key=lambda row: row.tokens)
        axes.plot([row.tokens for row in chosen], [number(row) for row in chosen], label=name, markersize=5, **look)
    make_logarithmic(axes, "context, tokens", what)
    mark_contexts(axes, (row.tokens for row in rows))


def _draw_turns(axes: Axes, rows: Sequence[EngineTurn], what: str, number: Callable[[EngineTurn], float]) -> None:
    for name, look in _looks(rows).items():
        lengths = sorted({row.context for row in rows if row.preset == name})
        turns = [[number(row) for row in rows if (row.preset, row.context) == (name, n)] for n in lengths]
        medians = np.array([np.median(of) for of in turns])
        ranges = [medians - [min(of) for of in turns], [max(of) for of in turns] - medians]
        axes.errorbar(lengths, medians, ranges, label=name, markersize=5, capsize=3, **look)
    make_logarithmic(axes, "context, tokens", what)
    mark_contexts(axes, (row.context for row in rows))


def _draw_batches(axes: Axes, rows: Sequence[Throughput]) -> None:
    for name, look in _looks(rows).items():
        chosen = sorted((row for row in rows if row.preset == name), key=lambda row: row.batch)
        batches = [row.batch for row in chosen]
        axes.plot(batches, [row.tokens_per_second for row in chosen], label=name, markersize=5, **look)
    make_logarithmic(axes, "sequences at once", "tokens per second, all together")
    axes.set_title(f"{rows[0].tokens:,} tokens each", loc="left", fontsize=10)
