"""Values as the kernels sum them up: 8-bit levels by nibble, four coordinates at a time (``QjlQuad``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np

from qjl.ops.cpu import structs
from qjl.ops.forms import NibbleForm

TOP = 127
_QUAD = np.dtype(structs.Quad)
_ANY, _TWO_CHAIN, _TWO_LEVELS, _ONE_LEVELS, _FOUR_CHAIN, _ONE_CHAIN = range(6)
_NOTHING = np.zeros(16)

# By kind (``QjlKind``): which nibble each look-up reads, two for each coordinate (None: none), and which of these
# nibbles are the high ones of their bytes (None: any).
_READS: dict[int, tuple[tuple[int | None, ...], tuple[bool | None, ...]]] = {
    _TWO_LEVELS: ((0, None, 0, None, 1, None, 1, None), (False, True)),
    _ONE_LEVELS: ((0, None, 1, None, 2, None, 3, None), (False, True, False, True)),
    _TWO_CHAIN: ((0, 1, 0, 1, 1, 2, 1, 2), (True, False, True)),
    _FOUR_CHAIN: ((0, 1, 0, 1, 0, 1, 0, 1), (None, None)),
    _ONE_CHAIN: ((0, 1, 1, 2, 2, 3, 3, 4), (True, False, True, False, True)),
    _ANY: (tuple(range(8)), (None,) * 8),
}


@dataclass(frozen=True, eq=False)
class _Term:
    """``step * sum of tables[k][nibble sources[k]]``, a part of one coordinate; one or two tables, -1: none."""

    coordinate: int
    sources: tuple[int, ...]
    tables: list[np.ndarray]
    step: float


def quads_of(form: NibbleForm) -> np.ndarray:
    """``QjlQuad`` of all coordinates, group by group."""
    dim = form.code_dim // form.groups
    one = np.array([_quad(terms) for terms in _by_four(_terms(form, dim))], dtype=_QUAD)
    groups = np.tile(one, (form.groups, 1))
    for group, quads in enumerate(groups):
        quads["group"] = group
        quads["sources"] += group * form.entries.shape[1]
        quads["coordinates"] = np.where(one["coordinates"] < 0, -1, one["coordinates"] + group * dim)
    return groups.reshape(-1)


def mean_energy(form: NibbleForm) -> np.ndarray | None:
    """The squared norm of each head's mean, over that of ``map^T y_hat`` where all nibbles are alike: ``float32 [H]``.

    None without a mean. What a mean gives to an output is exact: it tells how much coarser weights may be.
    """
    if form.mean is None:
        return None
    moments = [_second_moment(list(of.values())) for of in _tables_by_coordinate(form, form.code_dim // form.groups)]
    of_coordinates = np.tile(moments, form.groups)
    if form.map is None:
        energies = np.full(len(form.mean), of_coordinates.sum())
    else:
        energies = form.map.double().square().sum(2).cpu().numpy() @ of_coordinates
    means = form.mean.double().square().sum(1).cpu().numpy()
    return (means / np.maximum(energies, 1e-30)).astype(np.float32)


def _second_moment(tables: Sequence[np.ndarray]) -> float:
    """Of a sum of look-ups by nibbles that do not depend on each other."""
    variance = sum(float(table.var()) for table in tables)
    return variance + sum(float(table.mean()) for table in tables) ** 2


def _by_four(terms: list[_Term]) -> Iterator[Sequence[_Term]]:
    """Terms in units of one step."""
    for _, of_step in groupby(terms, key=lambda term: term.step):
        several = list(of_step)
        yield from (several[first : first + 4] for first in range(0, len(several), 4))


def _quad(terms: Sequence[_Term]) -> tuple[object, ...]:
    coordinates = [term.coordinate for term in terms] + [-1] * (4 - len(terms))
    placed = [_placed(term) for term in terms] + [[(None, None)]] * (4 - len(terms))
    for kind in _READS:
        for sources in product(*placed):
            if (nibbles := _nibbles(kind, [one for two in sources for one in two])) is not None:
                tables = [_table(*pair) for pair in zip([*terms, None, None, None, None], sources, strict=False)]
                return np.concatenate(tables), nibbles, coordinates, 0, terms[0].step, kind
    raise AssertionError("any look-ups make a quad")


def _placed(term: _Term) -> list[tuple[int | None, int | None]]:
    """The two look-ups of a coordinate: a single one may be either."""
    if len(term.sources) == 2:
        return [(term.sources[0], term.sources[1])]
    return [(term.sources[0], None), (None, term.sources[0])]


def _table(term: _Term | None, sources: tuple[int | None, int | None]) -> np.ndarray:
    """``[2, 16]``"""
    of_source = {} if term is None else dict(zip(term.sources, term.tables, strict=True))
    return np.stack([_NOTHING if source is None else of_source[source] for source in sources])


def _nibbles(kind: int, sources: Sequence[int | None]) -> list[int] | None:
    """Which nibbles the look-ups of a kind read, if they are these."""
    reads, are_high = _READS[kind]
    found: dict[int, int] = {}
    for read, source in zip(reads, sources, strict=True):
        if source is None:
            continue
        if read is None or found.setdefault(read, source) != source:
            return None
        if are_high[read] is not None and source % 2 != are_high[read]:
            return None
    return [0 if read is None else found.get(read, int(bool(are_high[read]))) for read in reads]


def _terms(form: NibbleForm, dim: int) -> list[_Term]:
    """All tables in steps: one where they are exact multiples of it, otherwise a coarse and a fine one."""
    tables = _tables_by_coordinate(form, dim)
    two_by_two = [
        (coordinate, sources[place : place + 2])
        for coordinate, by_source in enumerate(tables)
        for sources in [tuple(sorted(by_source))]
        for place in range(0, len(sources), 2)
    ]
    terms = []
    for step in _steps(tables):
        for coordinate, sources in two_by_two:
            levels = [np.round(tables[coordinate][source] / step) for source in sources]
            terms.append(_Term(coordinate, sources, levels, step))
            for source, level in zip(sources, levels, strict=True):
                tables[coordinate][source] = tables[coordinate][source] - level * step
    return terms


def _tables_by_coordinate(form: NibbleForm, dim: int) -> list[dict[int, np.ndarray]]:
    coordinates, entries = form.coordinates[0].cpu().numpy(), form.entries[0].double().cpu().numpy()
    tables: list[dict[int, np.ndarray]] = [{} for _ in range(dim)]
    for source, (places, of_slots) in enumerate(zip(coordinates, entries.transpose(0, 2, 1), strict=True)):
        for place, table in zip(places, of_slots, strict=True):
            if table.any():
                tables[place][source] = tables[place].get(source, 0) + table
    return tables


def _steps(tables: list[dict[int, np.ndarray]]) -> list[float]:
    """So that the sum of two levels fits 8 bits: a power of two that all entries are multiples of, if there is one."""
    every = np.array([table for by_source in tables for table in by_source.values()])
    largest = max((sum(np.abs(table).max() for table in by_source.values()) for by_source in tables), default=0)
    for exponent in range(3, 8):
        step = 2.0**-exponent
        if (every / step == np.round(every / step)).all() and largest <= TOP * step:
            return [step]
    coarse = max(largest / (TOP - 2), 1e-30)
    return [coarse, coarse / (TOP - 1)]
