"""Pictures: drawn from rows alone, the same for the same rows, with every family's name in them."""

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from qjl import plots
from qjl.plots import pareto

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
        {
            "model": "tiny",
            "preset": name,
            "bits": bits,
            "kl": kl,
            "kl_se": None if name == "b4" else kl / 10,
            "source": "this project" if name.startswith("b") else "arXiv",
            "chunks": 4,
            "decode": 512,
            "prefix": 512,
        }
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
    points = [axes.transData.transform((row["bits"], row["kl"])) for row in rows]
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
    full = rows[0] | {"preset": "full", "bits": 16, "kl": 0.0}
    assert plots.frontier([*rows, full]) == plots.frontier(rows)
    with refuses("there is nothing to draw"):
        plots.frontier([full])


def test_one_row_is_enough(rows):
    assert pixels(plots.frontier(rows[:1], ".png")).shape[2] == 4


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.svg.txt"])
def test_other_formats_are_refused(name, refuses):
    with refuses("give a name that ends in .svg or .png"):
        plots.require_format(Path(name))
