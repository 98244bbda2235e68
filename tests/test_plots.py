"""Pictures: drawn from rows alone, the same for the same rows, with every family's name in them."""

import io
import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from colours import VISIONS, contrast, distance
from qjl.lab import plots
from qjl.lab.plots import pareto, style
from report_rows import EVERY_KIND, frontier, typed

PRESETS = {
    "b2": (2.1, 0.03),
    "b3": (2.6, 0.02),
    "b4": (4.1, 0.004),
    "kivi-2": (3.0, 0.09),
    "kivi-4": (5.0, 0.005),
    "qjl-paper": (4.0, 0.26),
    "int8": (8.25, 0.0003),
}


@pytest.fixture
def rows():
    return [
        replace(
            *typed(frontier("b3" if name.startswith("b") else "kivi-2", kl, None if name == "b4" else kl / 10)),
            preset=name,
            bits=bits,
        )
        for name, (bits, kl) in PRESETS.items()
    ]


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA"))


def test_a_png_has_its_size_and_can_be_laid_on_any_page(rows):
    picture = pixels(plots.frontier(rows, ".png"))
    assert picture.shape == (928, 1440, 4)
    assert picture[0, -1, 3] == 0  # transparent
    ours = (picture[..., :3] == (0xE8, 0x59, 0x0C)).all(-1) & (picture[..., 3] == 255)
    assert ours.sum() > 1000


def test_an_svg_is_xml_and_the_same_for_the_same_rows(rows):
    picture = plots.frontier(rows)
    assert ET.fromstring(picture).tag.endswith("svg")
    assert plots.frontier(list(reversed(rows))) == picture


def test_names_are_there_and_hide_no_point_and_no_other_name(rows, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    plots.frontier(rows)
    (axes,) = figures[0].axes
    names = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert names.keys() == {"b2", "b3", "b4", "kivi", "qjl-paper", "int8"}
    points = [axes.transData.transform((row.bits, row.kl)) for row in rows]
    assert not [name for name, box in names.items() for point in points if box.contains(*point)]
    boxes = list(names.values())
    assert not [1 for i, box in enumerate(boxes) if box.count_overlaps(boxes[:i])]


@pytest.mark.parametrize(
    ("preset", "stem"),
    [
        ("b3", "b"),
        ("b3-3", "b"),
        ("b3-pre", "b-pre"),
        ("qjl-2", "qjl"),
        ("kivi-4", "kivi"),
        ("asymkv-16-0", "asymkv"),
        ("turboquant-prod-2", "turboquant-prod"),
        ("turboquant-2.5", "turboquant"),
        ("qjl-paper", "qjl-paper"),
        ("turboquant-k8v4", "turboquant"),
    ],
)
def test_a_family_is_what_stands_before_the_size(preset, stem):
    assert pareto._stem(preset) == stem


def test_full_precision_is_not_drawn(rows, refuses):
    full = replace(rows[0], preset="full", bits=16, kl=0.0)
    assert plots.frontier([*rows, full]) == plots.frontier(rows)
    with refuses("there is nothing to draw"):
        plots.frontier([full])


def test_one_row_is_enough(rows):
    assert pixels(plots.frontier(rows[:1], ".png")).shape[2] == 4


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.svg.txt"])
def test_other_formats_are_refused(name, refuses):
    with refuses("give a name that ends in .svg or .png"):
        plots.require_format(Path(name))


@pytest.mark.parametrize("vision", VISIONS)
def test_tones_are_told_apart_by_the_colour_blind(vision):
    apart = {pair: distance(*pair, vision) for pair in itertools.combinations((style.OURS, *style.TONES), 2)}
    assert min(apart.values()) > 16


@pytest.mark.parametrize("ground", ["#ffffff", "#0f1318", "#000000"])
def test_tones_can_be_seen_on_white_and_on_black(ground):
    assert min(contrast(tone, ground) for tone in (style.OURS, style.INK, style.GRID, *style.TONES)) >= 3


def test_a_tone_and_a_marker_stand_for_one_name_only():
    looks = style.looks(f"preset-{index}" for index in range(50))
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 50
    assert looks["preset-0"]["color"] == style.OURS


DRAWN = {
    "distortion": plots.distortion,
    "perplexity": plots.perplexity,
    "seeds": plots.seeds,
    "haystack": plots.heatmap,
    "problems": plots.problems,
    "harness": plots.tasks,
    "decode": plots.benchmark,
    "scan": plots.scans,
    "encode": plots.encoding,
    "memory": plots.contexts,
    "throughput": plots.throughput,
    "generate": plots.generation,
    "serving": plots.serving,
    "vllm": plots.engines,
}


@pytest.mark.parametrize("kind", DRAWN)
def test_each_kind_has_a_picture_the_same_for_the_same_rows(kind, refuses):
    picture = DRAWN[kind](typed(*EVERY_KIND[kind]))
    assert ET.fromstring(picture).tag.endswith("svg")
    assert DRAWN[kind](typed(*EVERY_KIND[kind])) == picture
    with refuses("there is nothing to draw"):
        DRAWN[kind]([])


@pytest.fixture
def drawn(monkeypatch):
    """The figure of a picture, before it is one."""

    def figure_of(draw, rows):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
        draw(rows)
        figures[0].draw_without_rendering()
        return figures[0]

    return figure_of


def _is_off(text):
    """Whether it names a tick beyond its axis, which is not drawn."""
    axis = next((axis for axes in text.figure.axes for axis in axes._axis_map.values() if text in _labels(axis)), None)
    if axis is None:
        return False
    low, high = sorted(axis.get_view_interval())
    place = text.get_position()[axis.axis_name == "y"]
    return not low <= place <= high


def _labels(axis):
    return [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]


@pytest.mark.parametrize("most", [1, None], ids=["one row", "all"])
@pytest.mark.parametrize("kind", DRAWN)
def test_no_text_is_cut_and_every_axis_has_a_name(kind, most, drawn):
    figure = drawn(DRAWN[kind], typed(*EVERY_KIND[kind])[:most])
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and not _is_off(text)]
    inside = figure.bbox.padded(1)
    cut = [text for text in texts for corner in text.get_window_extent().corners() if not inside.contains(*corner)]
    assert not cut
    shared = figure.get_supxlabel()
    assert all(axes.get_xlabel() or shared for axes in figure.axes if axes.get_visible())


def test_a_haystack_tells_where_full_precision_found_more(drawn):
    full, quantized, _ = drawn(plots.heatmap, typed(*EVERY_KIND["haystack"])).axes
    assert {text.get_text() for text in full.texts} == {"1"}
    assert {text.get_text() for text in quantized.texts} == {"0.5\nof 1"}


def test_full_precision_is_a_line_and_no_contestant(drawn):
    (axes,) = drawn(plots.problems, typed(*EVERY_KIND["problems"])).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b3, 2.62 bits", "kivi-2, 3.00 bits"]
    assert axes.lines[0].get_xdata()[0] == 75


def test_theory_is_drawn_where_there_is_a_formula(drawn):
    scores, outputs = drawn(plots.distortion, typed(*EVERY_KIND["distortion"])).axes
    assert [line.get_label() for line in scores.lines if line.get_linestyle() == ":"] == ["kivi-2, theory"]
    assert not [line for line in outputs.lines if line.get_linestyle() == ":"]


def test_curves_are_named_with_the_power_they_grow_by(drawn):
    left, _ = drawn(plots.encoding, typed(*EVERY_KIND["encode"])).axes
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert names == ["attention of the prefill, n^1.00", "b3, keys, n^1.00", "b3, values, n^1.00"]
    assert style.with_power("b3", [1024, 1024], [1.0, 2.0]) == "b3"
