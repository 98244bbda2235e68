"""Every method at every width that it takes: a line per method on the frontier, whether its paper has them or not."""

from __future__ import annotations

import dataclasses
from typing import Any

from qjl.errors import QJLError
from qjl.presets import PRESETS, CacheConfig

WIDTHS = (1, 1.5, 2, 2.5, 3, 4, 5, 8)  # bits of a code; scales and the like come on top
SWEPT = {
    "b-{:g}": "b2",
    "b-{:g}-pre": "b2-pre",
    "signs-{:g}": "qjl-2",
    "kivi-{:g}": "kivi-2",
    "kvquant-{:g}": "kvquant-2",
    "oscar-{:g}": "oscar",
    "quarot-{:g}": "quarot-2",
    "rabitq-{:g}": "rabitq-2",
    "turboquant-{:g}": "turboquant-2",
}
_PAIRS = ((2, 1), (3, 2), (4, 2))  # for keys and values, where a method takes no halves, or not these


def every_width() -> list[CacheConfig]:
    """The presets of ``SWEPT`` at each of ``WIDTHS``; where that is a preset of its own, that one.

    All but the widths stays. Where a method does not take a width, keys have the wider and values the narrower code of
    a pair; where it does not take the pair either, the width is left out.
    """
    swept = [(name.format(width), PRESETS[preset], width) for name, preset in SWEPT.items() for width in WIDTHS]
    found = [(name, PRESETS.get(name) or _at(preset, width)) for name, preset, width in swept]
    return [dataclasses.replace(config, name=name) for name, config in found if config is not None]


def _at(preset: CacheConfig, width: float) -> CacheConfig | None:
    for keys, values in [(width, width), *(pair for pair in _PAIRS if sum(pair) == 2 * width)]:
        try:
            return dataclasses.replace(preset, key=_widened(preset.key, keys), value=_widened(preset.value, values))
        except QJLError:
            continue
    return None


def _widened(quantizer: Any, width: float) -> Any:
    try:
        return dataclasses.replace(quantizer, num_bits=width)
    except QJLError:
        if getattr(quantizer, "code", None) != "trellis":
            raise
        return dataclasses.replace(quantizer, num_bits=width, code="levels")  # a trellis has at most 4 bits
