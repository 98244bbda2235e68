"""How a nibble form decodes two coordinates at a time: what the kernels of the decode step look up.

A coordinate is a sum of look-ups, one for each nibble that adds to it (its sources). Two coordinates share theirs: a
table has 16 entries of two float16 in one 32-bit word, so that one look-up serves both. Coordinates that nothing adds
to are left out, unless each token has a middle, which adds to all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qjl.ops.forms import NibbleForm

LEAST = 16  # pairs: what a matrix product takes


@dataclass(frozen=True, eq=False)
class Pairs:
    """Of H' heads, 1 where all share a code; P is a power of two, K the largest number of sources.

    - ``sources int32 [H', K, P]``: nibbles, -1 for none.
    - ``tables int32 [H', K, P, 16]``: two float16 each, the first coordinate in the low half.
    - ``coordinates int32 [H', 2, P]``: -1 for none.
    - ``groups int32 [H', P]``: the group whose scale a pair has.
    """

    sources: Tensor
    tables: Tensor
    coordinates: Tensor
    groups: Tensor

    @property
    def count(self) -> int:
        return self.sources.shape[2]

    @property
    def terms(self) -> int:
        return self.sources.shape[1]


def pairs_of(form: NibbleForm) -> Pairs:
    """Those of a form, on its device."""
    heads = [_of_head(form, head) for head in range(form.entries.shape[0])]
    terms = max(len(sources) for head in heads for _, sources in head) if any(heads) else 1
    count = form.groups * max(len(head) for head in heads)
    shape = max(terms, 1), max(LEAST, 1 << (count - 1).bit_length())
    arrays = [_arrays(form, i, head, *shape) for i, head in enumerate(heads)]
    stacked = [np.stack(of_heads) for of_heads in zip(*arrays, strict=True)]
    return Pairs(*(torch.from_numpy(array).to(form.entries.device) for array in stacked))


Pair = tuple[tuple[int, int], list[int]]  # two coordinates, the second -1 for none, and the look-ups of both


def _of_head(form: NibbleForm, head: int) -> list[Pair]:
    """Each coordinate with the one whose sources are most like its own; those with the most sources first."""
    adds = np.any(_by_coordinate(form, head), axis=2).astype(np.float32)
    together = np.matmul(adds, adds.T).astype(np.int32)
    counts = together.diagonal()
    left = [c for c in np.argsort(-counts, kind="stable") if counts[c] or form.middle is not None]
    pairs = []
    while left:
        first = left.pop(0)
        if left:
            second = left.pop(int(np.lexsort((counts[left], -together[first, left]))[0]))
            pairs.append(((int(first), int(second)), np.flatnonzero(adds[first] + adds[second]).tolist()))
        else:
            pairs.append(((int(first), -1), np.flatnonzero(adds[first]).tolist()))
    return sorted(pairs, key=lambda pair: -len(pair[1]))


def _by_coordinate(form: NibbleForm, head: int) -> np.ndarray:
    """What every value of every nibble adds to each coordinate: ``[D' / groups, M N, 16]``.

    M is 1 unless a nibble adds to a coordinate several times: the sum of two float16 may not be one.
    """
    places, entries = form.coordinates[head].cpu().numpy(), form.entries[head].float().cpu().numpy()
    count, slots = places.shape
    tables = np.zeros((slots, form.code_dim // form.groups, count, 16), np.float32)
    adds = np.any(entries, axis=1)  # [N, w]
    for nibble, slot in np.argwhere(adds):
        times = int(np.sum(adds[nibble, :slot] & (places[nibble, :slot] == places[nibble, slot])))
        tables[times, places[nibble, slot], nibble] = entries[nibble, :, slot]
    most = max((times + 1 for times in range(slots) if tables[times].any()), default=1)
    return np.concatenate(list(tables[:most]), axis=1)


def _arrays(form: NibbleForm, head: int, pairs: list[Pair], terms: int, count: int) -> tuple[np.ndarray, ...]:
    """Sources, tables, coordinates and groups of one head, the groups side by side."""
    added = _by_coordinate(form, head).astype(np.float16)
    nibbles, dim = form.coordinates.shape[1], added.shape[0]
    sources, coordinates = np.full((terms, count), -1, np.int32), np.full((2, count), -1, np.int32)
    tables = np.zeros((terms, count, 16, 2), np.float16)
    groups = np.zeros(count, np.int32)
    for place, (both, look_ups) in enumerate(pairs):
        for group in range(form.groups):
            at = group * len(pairs) + place
            groups[at] = group
            sources[: len(look_ups), at] = np.array(look_ups, np.int32) % nibbles + group * nibbles
            for half, coordinate in enumerate(both):
                if coordinate >= 0:
                    coordinates[half, at] = coordinate + group * dim
                    tables[: len(look_ups), at, :, half] = added[coordinate, look_ups]
    return sources, tables.view(np.int32)[..., 0], coordinates, groups
