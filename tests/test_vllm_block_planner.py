"""The pages and lines of the vLLM plugin: whatever arrives, every token is read once, and is the right one."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjl.errors import QJLError
from qjl.packed import BLOCK
from qjl.vllm.block_planner import NONE, BlockPlanner, Encoding, PoolShape, Requests

MOST_QUERIES = 5


@dataclass
class Sequence:
    tokens: list = field(default_factory=list)  # that the engine counts as computed
    pages: list = field(default_factory=list)
    hits: int = 0


class Engine:
    """A naive engine: tokens are names, a page's codes and the pool's slots are dictionaries of them."""

    def __init__(self, seed, page_tokens, sinks, recent, lines, sink_lines, pages=40):
        self.random = random.Random(seed)
        self.shape = PoolShape(page_tokens, sinks, lines, sink_lines)
        self.planner = BlockPlanner(self.shape, recent, MOST_QUERIES)
        self.free = list(range(pages))
        self.known = {}  # the tokens up to the end of a full page, to that page
        self.codes, self.pool = {}, {}
        self.running = []
        self.named = 0
        self.apart = 0  # steps

    def names(self, count):
        self.named += count
        return list(range(self.named - count, self.named))

    def take_page(self):
        page = self.free.pop(0)
        self.known = {tokens: known for tokens, known in self.known.items() if known != page}
        return page

    def start(self, prompt):
        """A sequence whose first pages may be known; the last token is always computed."""
        sequence = Sequence()
        size = self.shape.page_tokens
        while len(sequence.tokens) + size < len(prompt):
            page = self.known.get(tuple(prompt[: len(sequence.tokens) + size]))
            if page is None:
                break
            sequence.pages.append(page)
            sequence.tokens += prompt[len(sequence.tokens) :][:size]
            sequence.hits += 1
            if page in self.free:
                self.free.remove(page)
        self.running.append(sequence)
        return sequence

    def stop(self, sequence):
        self.running.remove(sequence)
        shared = {page for other in self.running for page in other.pages}
        self.free += [page for page in reversed(sequence.pages) if page not in shared]

    def room(self, sequence, fresh):
        pages = -(-(len(sequence.tokens) + fresh) // self.shape.page_tokens)
        return len(self.free) - (pages - len(sequence.pages))

    def allocate(self, sequence, fresh, accepted):
        size = self.shape.page_tokens
        while len(sequence.pages) * size < len(sequence.tokens) + len(fresh):
            sequence.pages.append(self.take_page())
        kept = sequence.tokens + fresh[:accepted]
        for page, stop in zip(sequence.pages, range(size, len(kept) + 1, size), strict=False):
            self.known.setdefault(tuple(kept[:stop]), page)

    def step(self, work):
        """``work``: sequences, their fresh tokens, and how many of them turn out to be accepted."""
        tables = [sequence.pages for sequence, _, _ in work]
        context, fresh = (
            np.array([len(x) for x in of], np.int64)
            for of in ([sequence.tokens for sequence, _, _ in work], [fresh for _, fresh, _ in work])
        )
        requests = Requests(
            context,
            fresh,
            lambda rows, places: np.array(
                [tables[row][place] if tables[row] else 0 for row, place in zip(rows, places, strict=True)], np.int64
            ),
        )
        plan = self.planner.plan(requests)
        exact = plan.skip + context - plan.packed + fresh
        assert exact[plan.is_together].max(initial=0) <= self.planner.most_exact
        batch = [token for _, fresh, _ in work for token in fresh]
        is_own = plan.own & np.repeat(plan.is_together, fresh)[plan.put_tokens]
        self.encode(plan.rescued, self.pool)
        self.encode(plan.direct, batch)
        if plan.is_apart:  # whatever the order of those that attend together
            self.put(plan, ~is_own, batch)
            found = self.read_all(work, plan, plan.is_together)
            self.put(plan, is_own, batch)
            self.encode(plan.filled, self.pool)
            found |= self.read_all(work, plan, ~plan.is_together)
        else:
            self.put(plan, slice(None), batch)
            self.encode(plan.filled, self.pool)
            found = self.read_all(work, plan, np.ones(len(work), bool))
        for row, (sequence, fresh, accepted) in enumerate(work):
            assert found[row] == sequence.tokens
            sequence.tokens += fresh[:accepted]
        self.apart += plan.is_apart
        return plan

    def put(self, plan, chosen, batch):
        for token, slot in zip(plan.put_tokens[chosen].tolist(), plan.put_slots[chosen].tolist(), strict=True):
            self.pool[slot] = batch[token]

    def read_all(self, work, plan, chosen):
        return {row: self.read(work[row][0], plan, row) for row in chosen.nonzero()[0].tolist()}

    def encode(self, encoding: Encoding, source):
        assert len(encoding.sources) == len(encoding) * BLOCK
        whole = encoding.whole_pages
        if whole is not None:
            assert np.array_equal(np.repeat(whole, BLOCK), encoding.pages)
            assert np.array_equal(encoding.columns, np.arange(len(encoding.sources)))
        columns, pages, offsets = (x.tolist() for x in (encoding.columns, encoding.pages, encoding.offsets))
        for column, page, offset in zip(columns, pages, offsets, strict=True):
            position = encoding.first[column // BLOCK] + column % BLOCK
            assert position % self.shape.page_tokens == offset
            self.codes[page, offset] = source[encoding.sources[column]]

    def read(self, sequence, plan, row):
        size = self.shape.page_tokens
        context, skip, packed = len(sequence.tokens), int(plan.skip[row]), int(plan.packed[row])
        exact = [self.pool[plan.sinks[row] + token] for token in range(skip)]
        codes = [self.codes[sequence.pages[i // size], i % size] for i in range(skip, packed)]
        window = []
        for token in range(packed, context):
            line = int(plan.lines[row, (context - 1) // size - token // size])
            assert line != NONE
            window.append(self.pool[line * size + token % size])
        return exact + codes + window

    def random_step(self, most):
        work = []
        for sequence in self.random.sample(self.running, len(self.running)):
            fresh = self.names(self.random.choice([1, 1, 1, 3, self.random.randint(1, most)]))
            if self.room(sequence, len(fresh)) < 0 or self.random.random() < 0.2:
                continue
            accepted = self.random.randint(1, len(fresh)) if len(fresh) <= 4 else len(fresh)
            self.allocate(sequence, fresh, accepted)
            work.append((sequence, fresh, accepted))
            if self.random.random() < 0.2:
                work += self.follower(sequence.tokens + fresh[:accepted])
        self.step(work)

    def follower(self, tokens):
        """A sequence that begins like one that is computed in the same step."""
        follower = self.start(tokens + self.names(1))
        fresh = self.names(3)
        if self.room(follower, 3) < 0:
            self.stop(follower)
            return []
        self.allocate(follower, fresh, 3)
        return [(follower, fresh, 3)]

    def shuffle(self):
        """Sequences come, go, and are preempted."""
        if self.running and self.random.random() < 0.3:
            gone = self.random.choice(self.running)
            self.stop(gone)
            if self.random.random() < 0.5:
                self.start(gone.tokens + self.names(1))
        while len(self.running) < 3 or self.random.random() < 0.2:
            self.start(self.names(2))


@pytest.mark.parametrize("page_tokens", [16, 64])
@given(
    seed=st.integers(0, 2**32),
    sinks=st.sampled_from([0, 1, 4, 16]),
    recent=st.sampled_from([0, 1, 16, 32, 50]),
    lines=st.sampled_from([0, 1, 3, 8, 100]),
    sink_lines=st.sampled_from([0, 1, 5]),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_read_once_whatever_happens(page_tokens, seed, sinks, recent, lines, sink_lines):
    engine = Engine(seed, page_tokens, sinks, recent, lines, sink_lines)
    for _ in range(25):
        engine.shuffle()
        engine.random_step(3 * page_tokens)


@pytest.mark.parametrize("recent", [0, 16, 32, 33])
@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_the_end_of_a_sequence_is_exact_to_the_page_where_there_are_lines_enough(recent, chunk):
    engine = Engine(0, 16, 4, recent, lines=100, sink_lines=1)
    sequence = engine.start([])
    while len(sequence.tokens) < 300:
        fresh = engine.names(chunk)
        engine.allocate(sequence, fresh, chunk)
        context = len(sequence.tokens)
        plan = engine.step([(sequence, fresh, chunk)])
        assert plan.packed == max(0, context - recent) // 16 * 16
        assert plan.skip == min(4, plan.packed)


@pytest.mark.parametrize("recent", [0, 16, 33])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_rows_with_few_fresh_tokens_have_lines_for_them(page_tokens, recent):
    """As many sequences as the pool was made for, at once."""
    lines = PoolShape.of(page_tokens, 4, recent, sequences=9, most_queries=MOST_QUERIES).lines
    engine = Engine(recent, page_tokens, 4, recent, lines, sink_lines=18, pages=200)
    sequences = [engine.start([]) for _ in range(9)]
    for _ in range(40):
        work = []
        for sequence in sequences:
            fresh = engine.names(engine.random.randint(1, MOST_QUERIES + 2))
            engine.allocate(sequence, fresh, len(fresh))
            work.append((sequence, fresh, len(fresh)))
        context = np.array([len(sequence.tokens) for sequence in sequences])
        plan = engine.step(work)
        is_short = np.array([len(fresh) <= MOST_QUERIES for _, fresh, _ in work])
        assert np.array_equal(plan.is_together, is_short & (context > 0))
        assert not len(plan.rescued)


def test_a_full_page_is_encoded_once_however_its_tokens_come():
    for chunk in (1, 5, 16, 40):
        engine = Engine(0, 16, 4, 32, lines=10, sink_lines=1)
        sequence, encoded = engine.start([]), []
        while len(sequence.tokens) < 160:
            fresh = engine.names(chunk)
            engine.allocate(sequence, fresh, chunk)
            plan = engine.step([(sequence, fresh, chunk)])
            for part in (plan.rescued, plan.filled, plan.direct):
                encoded += zip(part.pages.tolist(), part.offsets.tolist(), strict=True)
        assert len(encoded) == len(set(encoded)) == 160


def test_a_line_that_is_used_again_is_written_to_its_page_first():
    engine = Engine(0, 16, 0, 0, lines=1, sink_lines=0)
    first, second = engine.start([]), engine.start([])
    rescued = []
    for sequence in (first, second, first, second):
        fresh = engine.names(5)
        engine.allocate(sequence, fresh, 5)
        rescued.append(len(engine.step([(sequence, fresh, 5)]).rescued))
    assert rescued == [0, 1, 1, 1]


def test_first_tokens_that_were_forgotten_are_read_packed_and_counted():
    engine = Engine(0, 16, 4, 0, lines=4, sink_lines=1)
    sequences = [engine.start([]), engine.start([])]
    for sequence in sequences:
        fresh = engine.names(20)
        engine.allocate(sequence, fresh, 20)
        engine.step([(sequence, fresh, 20)])
    for sequence in sequences:
        engine.allocate(sequence, [0], 1)
        engine.step([(sequence, engine.names(1), 1)])
    assert engine.planner.missed_sinks == 1


def test_more_first_tokens_than_a_page_are_refused():
    with pytest.raises(QJLError, match="--block-size of at least 64"):
        BlockPlanner(PoolShape(16, 64, 4, 4), 32)
