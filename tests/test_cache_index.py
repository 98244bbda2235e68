"""Which tokens a cache holds and where, in numbers alone: against rows that are plain lists of tokens."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from qjl.cache.index import HOLE, Capacity, TokenIndex, bool_rows
from qjl.cache.places import Places
from qjl.errors import QJLError
from qjl.packed import BLOCK

SEQUENCES, SHARDS = 10_000, 10


@dataclass
class Token:
    number: int
    is_marked: bool
    is_coded: bool = False


class Naive:
    """What an index should hold: rows of tokens, looked at one by one."""

    def __init__(self, padding, sinks, recent, fills_pages):
        self.padding, self.sinks, self.recent, self.fills_pages = list(padding), sinks, recent, fills_pages
        self.rows = [[] for _ in padding]
        self.decided = [0 for _ in padding]
        self.marks, self.has_mask, self.columns = [[] for _ in padding], False, 0

    def mark(self, mask):
        for row, marks in enumerate(self.marks):
            known = [*marks[: self.columns], *[not self.has_mask] * (self.columns - len(marks))]
            self.marks[row] = known + list(mask[row])
        self.has_mask = True

    def append(self, numbers):
        """``numbers [B][T]``, padding included."""
        for row, fresh in enumerate(numbers):
            for column, number in enumerate(fresh, self.columns):
                if column >= self.padding[row]:
                    self.rows[row].append(Token(number, self._is_marked(row, column)))
        self.columns += len(numbers[0])
        for row in range(len(self.rows)):
            self._decide(row)

    def _is_marked(self, row, column):
        marks = self.marks[row]
        return marks[column] if column < len(marks) else not self.has_mask

    def _decide(self, row):
        tokens = self.rows[row]
        if self.fills_pages and self.decided[row] and not self._is_settled(tokens, self.decided[row] - 1):
            self.decided[row] -= 1
        while (self.decided[row] + 1) * BLOCK <= len(tokens) - self.recent:
            block = tokens[self.decided[row] * BLOCK :][:BLOCK]
            if all(token.is_marked for token in block):
                for token in block:
                    token.is_coded = True
            self.decided[row] += 1
        self.decided[row] = max(self.decided[row], -(-len(self.codes(row)) // BLOCK))

    @staticmethod
    def _is_settled(tokens, block):
        """Whether a block has no codes, or nothing but codes."""
        inside = [token.is_coded for token in tokens[block * BLOCK :][:BLOCK]]
        return not any(inside) or (all(inside) and len(inside) == BLOCK)

    def codes(self, row):
        """All tokens up to the last one in codes."""
        coded = [place for place, token in enumerate(self.rows[row]) if token.is_coded]
        return self.rows[row][: coded[-1] + 1] if coded else []

    def crop(self, columns):
        if columns >= self.columns:
            return
        self.columns = max(columns, 0)
        self.padding = [min(pad, self.columns) for pad in self.padding]
        self.marks = [marks[: self.columns] for marks in self.marks]
        for row, tokens in enumerate(self.rows):
            del tokens[self.columns - self.padding[row] :]
            whole = len(tokens) // BLOCK
            self.decided[row] = min(self.decided[row], max(whole, -(-len(self.codes(row)) // BLOCK)))

    def select(self, rows):
        self.rows = [[Token(**vars(token)) for token in self.rows[row]] for row in rows]
        self.padding, self.decided = [self.padding[row] for row in rows], [self.decided[row] for row in rows]
        self.marks = [list(self.marks[row]) for row in rows]


class Store:
    """Slots and pages that hold numbers of tokens, in which steps are carried out as layers do."""

    def __init__(self, index):
        self.index, self.slots, self.pages = index, {}, {}

    def append(self, numbers):
        """A pass over ``numbers [B][T]``."""
        step = self.index.begin_columns(len(numbers[0]))
        fresh = [number for row in numbers for number in row]
        self.index.plan()
        self.slots |= {slot: fresh[token] for token, slot in zip(step.put_tokens, step.put_slots, strict=True)}
        for source, target in step.copies:
            self.pages[target] = list(self.pages[source])
        self._encode(step.direct, fresh)
        self._encode(step.pooled, self.slots)
        self.index.commit()

    def _encode(self, blocks, numbers):
        for place, (page, kept) in enumerate(zip(blocks.pages, blocks.kept, strict=True)):
            tokens = [numbers[source] for source in blocks.sources[place * BLOCK : (place + 1) * BLOCK]]
            self.pages[page] = [*(self.pages[page][:kept] if kept else []), *tokens[kept:]]

    def row(self, row):
        """Numbers of a row's tokens in codes and of its exact ones, by place; each once, sinks in both."""
        index, codes = self.index, {}
        for block in range(index.blocks[row]):
            page = int(index.table[row, block])
            if page != HOLE:
                inside = index.partial[row].get(block, BLOCK)
                codes |= {block * BLOCK + i: number for i, number in enumerate(self.pages[page][:inside])}
        tokens = index.token_of[row, : index.counts[row]].tolist()
        assert tokens == sorted(set(tokens))
        slots = index.slot_of[row, : index.counts[row]].tolist()
        return codes, dict(zip(tokens, (self.slots[slot] for slot in slots), strict=True))


def require_holds(store, naive):
    index = store.index
    assert (index.columns, index.padding, index.lengths) == (
        naive.columns,
        naive.padding,
        [len(row) for row in naive.rows],
    )
    packed_tokens = index.packed_tokens
    for row, tokens in enumerate(naive.rows):
        codes, exact = store.row(row)
        assert codes == {place: token.number for place, token in enumerate(tokens) if token.is_coded}
        assert exact == {
            place: token.number for place, token in enumerate(tokens) if not token.is_coded or place < naive.sinks
        }
        assert packed_tokens[row] == len(codes) - sum(place < naive.sinks for place in codes)
        assert index.ends[row] == max(codes, default=-1) + 1 or index.has_holes
    for places, held in zip((index.slots, index.pages), index.held(), strict=True):
        assert places.in_use == len(held)
        assert set(held.tolist()).isdisjoint(places._given_back)


def random_marks(chance, batch, count):
    runs = [[chance.random() < 0.7 for _ in range(count // 40 + 2)] for _ in range(batch)]
    shift = chance.randrange(40)
    return [[run[(i + shift) // 40] for i in range(count)] for run in runs]


def _numbers(chance, batch, count, start):
    return [[start + row * count + i for i in range(count)] for row in range(batch)]


def _compare(seed):
    chance = random.Random(seed)
    sinks, recent, fills = chance.choice([0, 1, 4, 70]), chance.choice([0, 2, 40]), chance.random() < 0.7
    padding = chance.choice([(0,), (3,), (0, 0), (0, 1), (64, 0), (80, 17), (7, 0, 70), (2, 66, 2)])
    has_masks, taken = chance.random() < 0.5, 0
    index, naive = TokenIndex(sinks, recent), Naive(padding, sinks, recent, fills)
    index.fills_pages = fills
    index.add_rows(len(padding))
    index.set_padding(padding, [0] * len(padding))
    store = Store(index)
    for turn in range(chance.randint(2, 8)):
        what = chance.choice(["append", "append", "append", "select", "crop back", "crop", "mark"])
        batch = index.batch
        if what == "mark" and has_masks:
            marks = random_marks(chance, batch, chance.choice([10, 70, 200]))
            index.mark(np.array(marks))
            naive.mark(marks)
        elif what == "append" or not turn:
            numbers = _numbers(chance, batch, chance.choice([1, 2, 5, 63, 64, 65, 130, 210]), taken)
            taken += batch * len(numbers[0])
            store.append(numbers)
            naive.append(numbers)
        elif what == "select":
            rows = [chance.randrange(batch) for _ in range(chance.randint(1, 4))]
            index.select(rows)
            naive.select(rows)
        else:
            columns = chance.randint(0, 300) if what == "crop" else index.columns - chance.randint(1, 70)
            index.crop(columns)
            naive.crop(columns)
        require_holds(store, naive)
    index.crop(0)
    assert (index.slots.in_use, index.pages.in_use) == (0, 0)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_sequence_of_operations_holds_what_lists_would(shard):
    for seed in range(shard, SEQUENCES, SHARDS):
        try:
            _compare(seed)
        except AssertionError as error:
            raise AssertionError(f"sequence {seed}") from error


def filled(sizes, sinks=4, recent=32, padding=(0,), **limits):
    """An index that has read passes of these sizes."""
    index = TokenIndex(sinks, recent, **limits)
    index.add_rows(len(padding))
    index.set_padding(padding, [0] * len(padding))
    for size in sizes:
        index.begin_columns(size)
        index.commit()
    return index


# The grid


@pytest.mark.parametrize("recent", [0, 5, 32, 64])
@pytest.mark.parametrize("length", [1, 63, 64, 96, 128, 300])
def test_a_block_is_packed_once_it_is_older_than_the_window(recent, length):
    index = filled([length], 4, recent)
    blocks = max(0, length - recent) // BLOCK
    assert index.blocks == [blocks]
    assert index.packed_tokens == [max(0, blocks * BLOCK - 4)]
    expected = sorted({*range(min(4, length)), *range(blocks * BLOCK, length)})
    assert index.token_of[0, : index.counts[0]].tolist() == expected


@pytest.mark.parametrize("sizes", [[400], [1] * 400, [7] * 57 + [1], [300, 1, 64, 35]], ids=len)
def test_the_same_tokens_are_packed_however_they_arrive(sizes):
    whole, index = filled([400]), filled(sizes)
    assert index.blocks == whole.blocks == [5]
    assert np.array_equal(index.token_of[0, : index.counts[0]], whole.token_of[0, : whole.counts[0]])


@pytest.mark.parametrize("sizes", [[300], [50, 200, 50], [1] * 300], ids=len)
def test_a_padded_row_lies_on_its_own_grid(sizes):
    """Padding is not stored: the row has the blocks that it has alone."""
    index = filled(sizes, padding=(0, 70, 130))
    for row, pad in enumerate((0, 70, 130)):
        alone = filled([300 - pad])
        assert index.lengths[row] == 300 - pad
        assert index.blocks[row] == alone.blocks[0]
        assert index.token_of[row, : index.counts[row]].tolist() == alone.token_of[0, : alone.counts[0]].tolist()


def test_direct_blocks_take_no_slot():
    """Of a prompt only what stays exact is stored before it is coded; sinks lie in both."""
    index = TokenIndex(4, 32)
    index.add_rows(1)
    step = index.begin_columns(1000)
    index.plan()
    assert (len(step.direct), len(step.pooled)) == (15, 0)
    assert index.slots.in_use == 4 + 1000 - 15 * BLOCK
    index.commit()
    assert index.slots.in_use == 4 + 1000 - 15 * BLOCK


def test_positions_begin_at_the_origin_of_the_row():
    index = TokenIndex(0, 0)
    index.add_rows(2)
    index.set_padding([0, 64], [100, 7])
    step = index.begin_columns(192)
    index.plan()
    assert step.direct.first == [100, 164, 228, 7, 71]


def test_until_codecs_are_there_nothing_is_packed_and_then_everything_is():
    index = TokenIndex(4, 32)
    index.packs = False
    index.add_rows(1)
    for size in (200, 100):
        index.begin_columns(size)
        index.commit()
    assert index.blocks == [0]
    index.packs = True
    index.begin_columns(1)
    step = index.plan()
    assert len(step.pooled) == 4
    index.commit()
    assert index.blocks == [4]


def test_rows_that_hold_tokens_keep_their_padding():
    index = filled([100], padding=(3, 0))
    index.set_padding([1, 2], [5, 6])
    assert index.padding == [3, 0]
    assert index.origins.tolist() == [0, 0]
    with pytest.raises(QJLError, match="the cache holds 2 rows, and 1 paddings were given"):
        index.set_padding([1], [0])


# Masks: a block is packed if all of its 64 tokens may be; the others are holes


def marked(length, *spans):
    mask = np.zeros((1, length), bool)
    for first, stop in spans:
        mask[:, first:stop] = True
    return mask


@pytest.mark.parametrize(
    ("spans", "packed"),
    [
        ([(0, 300)], [0, 1, 2, 3]),
        ([(10, 200)], [1, 2]),
        ([(64, 128), (192, 256)], [1, 3]),
        ([(65, 191)], []),
        ([], []),
    ],
)
def test_only_blocks_that_are_marked_whole_are_packed(spans, packed):
    index = TokenIndex(4, 32)
    index.mark(marked(300, *spans))
    index.add_rows(1)
    index.begin_columns(300)
    index.commit()
    assert [block for block in range(index.blocks[0]) if index.table[0, block] != HOLE] == packed
    assert index.has_holes == (len(packed) < 4)
    assert set(range(300)) - set(index.token_of[0, : index.counts[0]].tolist()) == {
        token for block in packed for token in range(block * BLOCK, block * BLOCK + BLOCK) if token >= 4
    }


def test_tokens_that_no_mask_speaks_of():
    """They may be packed as long as there was no mask, and stay exact from then on."""
    index = filled([100], 0, 0)
    index.mark(marked(50, (0, 40)))
    index.begin_columns(200)
    index.commit()
    assert index.packed_tokens == [128], "36 of before and 28 of the mask are a block"
    index.begin_columns(200)
    index.commit()
    assert index.packed_tokens == [128]
    index.reset()
    assert index.marks is None


def test_a_mask_may_be_given_ahead_and_again():
    index = TokenIndex(0, 0)
    index.mark(marked(400, (0, 400)))
    index.mark(marked(400, (50, 260)))
    index.add_rows(1)
    for _ in range(10):
        index.begin_columns(40)
        index.commit()
    assert [block for block in range(6) if index.table[0, block] != HOLE] == [1, 2, 3]


def test_a_hole_that_is_cropped_into_is_decided_anew():
    """Its tokens are exact: nothing was lost. A page that was cropped into keeps its codes."""
    index = TokenIndex(0, 0)
    index.mark(marked(256, (0, 64), (128, 256)))
    index.add_rows(1)
    index.begin_columns(256)
    index.commit()
    index.crop(100)
    assert index.blocks == [1]
    index.mark(marked(200, (0, 200)))
    index.begin_columns(100)
    index.commit()
    assert [int(page) == HOLE for page in index.table[0, :3]] == [False, True, False], "64 to 99 were never marked"


def test_codes_stay_where_tokens_that_are_not_marked_follow_a_crop():
    index = filled([128], 0, 0)
    page = int(index.table[0, 1])
    index.crop(100)
    index.mark(marked(200))
    index.begin_columns(200)
    index.commit()
    assert index.table[0, :2].tolist() == [index.table[0, 0], page]
    assert index.packed_tokens == [100]
    assert index.token_of[0, : index.counts[0]].tolist() == list(range(100, 300))


@pytest.mark.parametrize("mask", [torch.ones(1, 5), torch.ones(5).bool(), torch.ones(1, 5, dtype=torch.long)], ids=str)
def test_masks_of_another_kind_are_refused(mask, refuses):
    with refuses("a token mask is bool [B, T]"):
        bool_rows(mask)


def test_masks_for_other_rows_are_refused(refuses):
    with refuses("the cache holds 2 rows, and the token mask is for 1"):
        filled([5], padding=(0, 0)).mark(marked(5))


def test_tokens_until_due_counts_to_the_next_block():
    index = TokenIndex(4, 16)
    assert index.tokens_until_due == 1
    index.add_rows(2)
    index.set_padding([0, 30], [0, 0])
    index.begin_columns(50)
    index.commit()
    due = []
    while index.columns < 300:
        before, count = list(index.blocks), index.tokens_until_due
        for size in (count - 1, 1):
            assert index.blocks == before
            if size:
                index.begin_columns(size)
                index.commit()
        assert index.blocks != before
        due.append(index.columns)
    assert due == [80, 110, 144, 174, 208, 238, 272, 302]


# Sharing


def test_selected_rows_share_slots_and_pages():
    index = filled([300], padding=(0, 40))
    slots, pages = index.slots.in_use, index.pages.in_use
    index.select([0, 0, 1, 0])
    assert (index.slots.in_use, index.pages.in_use) == (slots, pages)
    index.select([2])
    assert index.padding == [40]
    assert index.pages.in_use == (260 - 32) // BLOCK
    index.select([])
    assert (index.slots.in_use, index.pages.in_use) == (0, 0)


def test_a_page_that_is_shared_is_copied_before_one_of_its_rows_writes():
    index = filled([300])
    index.select([0, 0])
    index.crop(100)
    shared = int(index.table[0, 1])
    index.begin_columns(100)
    step = index.plan()
    assert [source for source, _ in step.copies] == [shared, shared]
    index.commit()
    assert index.table[0, 0] == index.table[1, 0]
    assert index.table[0, 1] != index.table[1, 1]
    assert index.pages.in_use == 3


def test_rows_that_are_equal_to_the_last_token_share_what_they_pack():
    index = filled([64])
    index.select([0, 0])
    index.begin_columns(32)
    step = index.plan()
    assert len(step.pooled) == 1
    index.commit()
    assert index.pages.in_use == 1


def test_nothing_is_ever_lost_or_leaked_by_beams():
    chance, index = random.Random(0), filled([200], padding=(0, 0, 0))
    for _ in range(400):
        index.begin_columns(1)
        index.commit()
        index.select([chance.randrange(3) for _ in range(3)])
    assert index.slots.in_use == len(index.held()[0]) <= 3 * (4 + 32 + BLOCK)
    assert index.slots.capacity < 6 * (4 + 32 + BLOCK)
    assert index.pages.capacity <= 1.25 * index.pages.in_use + 8


# Passes that fail, and capacities


def _state(index):
    return {name: array.tolist() for name, array in index.arrays().items()}


@pytest.mark.parametrize("is_planned", [False, True])
@pytest.mark.parametrize("cropped", [None, 100])
def test_a_pass_that_is_rolled_back_never_was(is_planned, cropped):
    index = filled([300])
    if cropped:
        index.crop(cropped)
    before, in_use = _state(index), (index.slots.in_use, index.pages.in_use)
    index.begin_columns(200)
    if is_planned:
        index.plan()
    index.roll_back()
    assert index.step is None
    assert _state(index) == before
    assert (index.slots.in_use, index.pages.in_use) == in_use


@pytest.mark.parametrize(
    ("packs", "size", "message"),
    [
        (False, 250, "the cache has room for 260 exact tokens and needs"),
        (True, 1000, "room for 400 tokens of a row and is given 1090"),
    ],
    ids=str,
)
def test_a_capacity_is_not_exceeded_and_nothing_has_changed_then(packs, size, message, refuses):
    index = filled([90], capacity=Capacity(1, 400))
    index.packs = packs
    before, in_use = _state(index), (index.slots.in_use, index.pages.in_use)
    index.begin_columns(size)
    with refuses(message):
        index.plan()
    index.roll_back()
    assert _state(index) == before
    assert (index.slots.in_use, index.pages.in_use) == in_use


def test_arrays_stay_where_they_are_but_at_growth():
    """Kernels read them: another version, other arrays; and there are few."""
    index, versions = filled([100]), set()
    for _ in range(2000):
        before = index.version, [of.ctypes.data for of in index._arrays]
        index.begin_columns(1)
        index.commit()
        if index.version == before[0]:
            assert [of.ctypes.data for of in index._arrays] == before[1]
        versions.add(index.version)
    assert len(versions) < 12


# Places


def test_places_are_taken_shared_and_given_back():
    places = Places("pages")
    first = places.take(3)
    assert first == [0, 1, 2]
    places.share([1])
    places.release([0, 1])
    assert places.in_use == 2
    assert places.take(2) == [0, 3]
    places.release([1, 2])
    places.release([0, 3])
    assert places.in_use == 0


def test_places_grow_by_a_quarter():
    places, capacities = Places("pages"), set()
    for _ in range(1000):
        places.take(1)
        capacities.add(places.capacity)
    assert len(capacities) < 35
    assert places.capacity <= 1250
    places.reset()
    assert (places.in_use, places.take(2)) == (0, [0, 1])


def test_places_grow_no_further_than_is_ample():
    places = Places("pages")
    places.ample = 100
    for _ in range(120):
        places.take(1)
        assert places.capacity <= max(100, places.in_use)


def test_what_is_held_is_numbered_without_gaps():
    index = filled([200, 40])
    index.select([0, 0])
    index.crop(190)
    for _ in range(3):
        index.begin_columns(70)
        index.commit()
    index.select([1])
    index.add_rows(1)
    slots, pages = index.held()
    exact, coded = index.slot_of[0, : index.counts[0]].copy(), index.table[0, : index.blocks[0]].copy()
    found = index.renumber()
    assert [of.tolist() for of in found] == [slots.tolist(), pages.tolist()]
    assert slots[index.slot_of[0, : index.counts[0]]].tolist() == exact.tolist()
    assert pages[index.table[0, : index.blocks[0]]].tolist() == coded.tolist()
    for places, held in ((index.slots, slots), (index.pages, pages)):
        assert places.in_use == places.capacity == len(held)
        assert places.take(1) == [len(held)]


@pytest.mark.parametrize("sinks", [0, 4, 100])
def test_what_a_pass_takes_is_known_before(sinks):
    index, chance = filled([10, 10], sinks=sinks), random.Random(sinks)
    index.select([0, 0, 0])
    for number in range(200):
        counts = [chance.choice([0, 1, 1, 1, 30, 64, 300]) for _ in range(3)]
        if number % 20 == 19:
            index.crop_row(1, chance.randrange(index.lengths[1]))
        slots, pages = index.need(counts)
        step = index.begin_ragged(counts)
        index.plan()
        assert (slots, pages) == (len(step.put_slots), len(step.taken))
        index.commit()
        index.select([0, 1, 1] if number == 100 else [0, 1, 2])


def test_a_place_that_is_released_twice_at_once_is_free_once():
    places = Places("slots")
    places.take(1)
    places.share([0])
    places.release([0, 0])
    assert (places.in_use, places.take(2)) == (0, [0, 1])


def test_rows_beyond_the_capacity_are_refused(refuses):
    with refuses("room for 2 rows, not for 3"):
        TokenIndex(4, 32, Capacity(2, 100)).add_rows(3)
    with refuses("at least one row of one token"):
        Capacity(1, 0)


def test_with_a_capacity_no_array_is_made_anew():
    index = filled([90], capacity=Capacity(1, 1000))
    arrays = [id(of) for of in (index.table, index.slot_of, index.token_of, index.counts, index.ends, index.origins)]
    for size in [1] * 100 + [64, 200, 7]:
        index.begin_columns(size)
        index.commit()
    assert [
        id(of) for of in (index.table, index.slot_of, index.token_of, index.counts, index.ends, index.origins)
    ] == arrays
