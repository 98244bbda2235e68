"""How a nibble form is looked up by byte permutation: 8-bit tables of 16 entries, four nibbles at a time.

A nibble adds to a few coordinates, by a table each. Up to a factor, which a query or a sum takes, few tables differ.
Their entries are whole numbers from 0 to 127 above an offset of 64 (a byte permutation gives 0 for a selector of 8 and
more where no byte has its top bit set, so that two of them and an OR look up 16 entries). A table that whole numbers
do not hold well enough has a second one, of what the first leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qjl.ops.forms import NibbleForm

MIDDLE = 64
TOP = 63
COARSEST = 24  # units of the largest entry, at least
COARSE, FINE = 5e-3, 1.5e-3  # of entries, rms over a table, where coordinates have unit variance
SHARE = 0.6  # of a form's error budget, that coarse tables may take
WORDS = 4  # of which there are a multiple
LOOK_UPS = 2  # of a nibble in a word
QUAD = 4  # nibbles that share tables
LEAST_ROWS = 16
SIGNS = np.array([[1 if value >> bit & 1 else -1 for value in range(16)] for bit in range(4)])


@dataclass(frozen=True, order=True)
class LookUp:
    """What a nibble adds to a coordinate: ``factor`` times (the entries of ``table`` less 64)."""

    table: Table
    coordinate: int
    factor: float


Table = tuple[int, ...]
Nibble = tuple[list[LookUp], list[LookUp]]  # by whole tables, and by those of single bits where tables are their sums


def look_ups(form: NibbleForm, head: int) -> list[Nibble]:
    """Those of each nibble of one head, as exact as the form's error budget wants them."""
    coordinates = form.coordinates[head].cpu().numpy().astype(int)
    entries = form.entries[head].double().cpu().numpy()
    tables = [_by_coordinate(*of_nibble) for of_nibble in zip(coordinates, entries, strict=True)]
    tolerance = COARSE if _error(tables) <= form.error_budget * SHARE else FINE
    return [(list(_whole(of, tolerance)), list(_single_bits(of, tolerance))) for of in tables]


Sums = dict[int, np.ndarray]  # what the values of a nibble add to each coordinate


def _by_coordinate(coordinates: np.ndarray, entries: np.ndarray) -> Sums:
    return {
        int(coordinate): entries[:, coordinates == coordinate].sum(1)
        for coordinate in dict.fromkeys(coordinates[entries.any(0)].tolist())
    }


def _error(nibbles: Sequence[Sums]) -> float:
    """Of coordinates of unit variance, rms, with one table each; a coordinate counts as it has bits."""
    bits: dict[int, int] = {}
    error: dict[int, float] = {}
    for sums in nibbles:
        for coordinate, table in sums.items():
            left = _rms(_rest(table))
            left = 0.0 if left > COARSE else left**2  # which has a second table
            bits[coordinate] = bits.get(coordinate, 0) + _bits_of(table)
            error[coordinate] = error.get(coordinate, 0.0) + left
    weights = {coordinate: 4.0 ** min(of, 8) for coordinate, of in bits.items()}
    total = sum(weights.values())
    return float(sum(weights[c] * error[c] for c in weights) / total) ** 0.5 if total else 0.0


def _bits_of(table: np.ndarray) -> int:
    """How many bits of a nibble change what it adds."""
    return sum(bool((table != table[np.arange(16) ^ 1 << bit]).any()) for bit in range(4))


def _rest(table: np.ndarray) -> np.ndarray:
    """What one table of whole numbers leaves."""
    whole, factor = _as_integers(tuple(table.tolist()))
    return table - whole * factor


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _whole(sums: Sums, tolerance: float) -> Iterator[LookUp]:
    for coordinate, table in sums.items():
        yield from _refined(coordinate, table, tolerance)


def _refined(coordinate: int, table: np.ndarray, tolerance: float) -> Iterator[LookUp]:
    for _ in range(2):
        whole, factor = _as_integers(tuple(table.tolist()))
        yield LookUp(tuple((whole + MIDDLE).tolist()), coordinate, factor)
        table = _rest(table)
        if _rms(table) <= tolerance:
            return


def _single_bits(sums: Sums, tolerance: float) -> Iterator[LookUp]:
    """A table that is the sum of what its bits add by themselves gives way to one for each bit."""
    for coordinate, table in sums.items():
        amplitudes = SIGNS @ table / 16
        if np.abs(amplitudes @ SIGNS - table).max() > FINE:
            yield from _refined(coordinate, table, tolerance)
            continue
        for bit in np.flatnonzero(amplitudes):
            yield LookUp(tuple((SIGNS[bit] * TOP + MIDDLE).tolist()), coordinate, float(amplitudes[bit] / TOP))


_KNOWN: dict[tuple[float, ...], tuple[np.ndarray, float]] = {}


def _as_integers(table: tuple[float, ...]) -> tuple[np.ndarray, float]:
    """Whole numbers of at most 63 whose multiple is nearest to a table, its first entry that is not 0 below 0."""
    if table not in _KNOWN:
        entries = np.array(table)
        steps = np.linspace(COARSEST, TOP + 0.49, 4096) / np.abs(entries).max()
        scaled = entries * steps[:, None]
        best = (np.square(scaled - scaled.round()).sum(1) / steps**2).argmin()
        sign = -np.sign(entries[np.flatnonzero(entries)[0]])
        _KNOWN[table] = (scaled[best].round() * sign).astype(int), float(sign / steps[best])
    return _KNOWN[table]


@dataclass(frozen=True, eq=False)
class KeyWords:
    """Of H' heads, 1 where all share a code. A word is two quads of nibbles, two byte rows each, with two look-ups.

    - ``rows int32 [H', W, 4]``: the byte rows of each word.
    - ``tables int32 [H', W, 2, 2, 4]``: by quad and look-up, four entries in each.
    - ``coordinates int32 [H', W / 4, 2, 2, 4, 4]``: what each nibble of a quad adds to (-1 for nothing), four words at
      a time, by quad, look-up, word and nibble: the order of the matrix products.
    - ``factors float32 [H', W / 4, 2, 2, 4, 4]``.
    """

    rows: Tensor
    tables: Tensor
    coordinates: Tensor
    factors: Tensor

    @property
    def words(self) -> int:
        return self.rows.shape[1]


def key_words(form: NibbleForm) -> KeyWords:
    """Those of a form without groups, on its device."""
    heads = [list(_pairs(look_ups(form, head))) for head in range(form.entries.shape[0])]
    count = max(1, -(-max(len(head) for head in heads) // (2 * WORDS))) * WORDS
    parts = zip(*(_arrays(head, count) for head in heads), strict=True)
    return KeyWords(*(_on(form, np.stack(part)) for part in parts))


def _on(form: NibbleForm, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(form.entries.device)


@dataclass(frozen=True)
class Pair:
    """Two look-ups at most that four nibbles share: their two byte rows (-1 for none), their tables, and by table and
    nibble what a look-up is for."""

    rows: tuple[int, int]
    tables: list[Table]
    uses: list[list[LookUp | None]]


def _pairs(nibbles: Sequence[Nibble]) -> Iterator[Pair]:
    for rows in _quads(nibbles):
        of_quad = _of_rows(nibbles, rows)
        times = sorted((table, time) for table, many in _counts(of_quad).items() for time in range(many))
        for begin in range(0, len(times), LOOK_UPS):
            chosen = times[begin : begin + LOOK_UPS]
            uses = [[_use(nibble, *one) for nibble in of_quad] for one in chosen]
            yield Pair(rows, [table for table, _ in chosen], uses)


def _use(look_ups: list[LookUp], table: Table, time: int) -> LookUp | None:
    """What a nibble looks up in a table: a second time where two coordinates have the same."""
    return next((one for one in [own for own in look_ups if own.table == table][time : time + 1]), None)


def _of_rows(nibbles: Sequence[Nibble], rows: tuple[int, ...]) -> list[list[LookUp]]:
    """Of the nibbles of some byte rows, by whichever tables are fewer."""
    both = [[nibbles[2 * row + i][way] if row >= 0 else [] for row in rows for i in range(2)] for way in range(2)]
    return min(both, key=lambda way: _counts(way).total())


def _counts(nibbles: Sequence[list[LookUp]]) -> Counter[Table]:
    """How often each table is looked up in, for nibbles that look up together."""
    counts: Counter[Table] = Counter()
    for nibble in nibbles:
        counts |= Counter(one.table for one in nibble)
    return counts


def _tables(nibbles: Sequence[list[LookUp]]) -> set[Table]:
    return {one.table for nibble in nibbles for one in nibble}


def _quads(nibbles: Sequence[Nibble]) -> Iterator[tuple[int, int]]:
    """Byte rows two by two, those with like tables together."""
    left = list(range(len(nibbles) // 2))
    while left:
        row = left.pop(0)
        if not left:
            yield row, -1
            return
        other = min(left, key=lambda r: (_counts(_of_rows(nibbles, (row, r))).total(), r))
        left.remove(other)
        yield row, other


Arrays = tuple[np.ndarray, ...]


def _arrays(pairs: Sequence[Pair], words: int) -> Arrays:
    rows = np.zeros((2 * words, 2), np.int32)
    tables = np.full((2 * words, LOOK_UPS, 16), MIDDLE, np.uint8)
    coordinates = np.full((2 * words, LOOK_UPS, QUAD), -1, np.int32)
    factors = np.zeros((2 * words, LOOK_UPS, QUAD), np.float32)
    for half, pair in enumerate(pairs):
        rows[half], tables[half, : len(pair.tables)] = np.maximum(pair.rows, 0), pair.tables
        for which, uses in enumerate(pair.uses):
            for nibble, use in enumerate(uses):
                if use is not None:
                    coordinates[half, which, nibble], factors[half, which, nibble] = use.coordinate, use.factor
    return (
        rows.reshape(words, 4),
        _as_words(tables).reshape(words, 2, LOOK_UPS, 4),
        *map(_fours, (coordinates, factors)),
    )


def _fours(of_halves: np.ndarray) -> np.ndarray:
    """``[2 W, look-ups, 4] -> [W / 4, 2, look-ups, 4, 4]``."""
    return of_halves.reshape(-1, WORDS, 2, LOOK_UPS, QUAD).transpose(0, 2, 3, 1, 4)


def _as_words(tables: np.ndarray) -> np.ndarray:
    """``uint8 [..., 16] -> int32 [..., 4]``, the first entry lowest."""
    return np.ascontiguousarray(tables).view("<i4")


@dataclass(frozen=True, eq=False)
class Run:
    """Byte rows of values that one set of tables serves: ``rows`` from ``first`` on, ``tables int32 [S, 4]``."""

    first: int
    rows: int
    tables: Tensor

    @property
    def planes(self) -> int:
        return self.tables.shape[0]


@dataclass(frozen=True, eq=False)
class ValueTables:
    """Values are summed up by table, half of a byte and byte row: run by run ``[S, 2, rows]``, then to coordinates.

    Of H' heads, 1 where all share a code: ``places int32 [H', K, C]`` of the sums that belong to a coordinate, -1 for
    none, and ``weights float32 [H', K, C]``.
    """

    runs: tuple[Run, ...]
    places: Tensor
    weights: Tensor


def value_tables(form: NibbleForm, most_tables: int) -> ValueTables | None:
    """Those of a form without groups, on its device; None where nibbles need more tables in all."""
    heads = [[whole for whole, _ in look_ups(form, head)] for head in range(form.entries.shape[0])]
    runs = _runs([_tables([of[2 * r + i] for of in heads for i in range(2)]) for r in range(len(heads[0]) // 2)])
    if any(len(tables) > most_tables for _, _, tables in runs):
        return None
    sums = [_sums(nibbles, runs, form.code_dim) for nibbles in heads]
    most = max(len(of) for head in sums for of in head)
    places = np.full((len(heads), most, form.code_dim), -1, np.int32)
    weights = np.zeros((len(heads), most, form.code_dim), np.float32)
    for head, of_head in enumerate(sums):
        for coordinate, of in enumerate(of_head):
            for k, (place, weight) in enumerate(of):
                places[head, k, coordinate], weights[head, k, coordinate] = place, weight
    made = tuple(Run(first, rows, _on(form, _as_words(np.array(tables, np.uint8)))) for first, rows, tables in runs)
    return ValueTables(made, _on(form, places), _on(form, weights))


Rows = tuple[int, int, list[Table]]  # the first, how many, and their tables


def _runs(tables_of_rows: Sequence[set[Table]]) -> list[Rows]:
    """Neighbours that share tables."""
    runs: list[tuple[int, int, set[Table]]] = []
    for row, tables in enumerate(tables_of_rows):
        if runs and (tables & runs[-1][2] or not tables):
            first, rows, known = runs[-1]
            runs[-1] = first, rows + 1, known | tables
        else:
            runs.append((row, 1, set(tables)))
    return [(first, rows, sorted(tables)) for first, rows, tables in runs]


def _sums(nibbles: Sequence[list[LookUp]], runs: Sequence[Rows], dim: int) -> list[list[tuple[int, float]]]:
    """Which sums belong to each coordinate, and their weights."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(dim)]
    begin = 0
    for first, rows, tables in runs:
        room = room_of(rows)
        for row in range(rows):
            for half in range(2):
                for one in nibbles[2 * (first + row) + half]:
                    place = begin + (tables.index(one.table) * 2 + half) * room + row
                    found[one.coordinate].append((place, one.factor))
        begin += len(tables) * 2 * room
    return found


def room_of(rows: int) -> int:
    """Rows that a matrix product takes."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())
