"""Attention over rows of pools on random forms, holes and slots, in guarded memory, against double precision."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from budget import WORST, trades
from qjl import ops
from qjl.ops.cpu import attention
from qjl.ops.forms import ExactPool, Pool, Rows
from qjl.ops.triton import runtime
from random_forms import DTYPES, Maker, Side, decoded, mean_at, sides

pytest_plugins = "guarded"
pytestmark = pytest.mark.usefixtures("backend")
TOLERANCE = 1e-3
EXAMPLES = 3 if runtime.is_interpreted() else 40
SPARE = 3  # pages and slots that no row has


@dataclass(frozen=True)
class Case:
    keys: Side
    values: Side
    batch: int
    heads: int
    page: int
    pages: int  # of a row, at most
    blocks_per_split: int
    group: int
    queries: int
    slots: int  # of a row, at most
    has_holes: bool
    has_empty_slots: bool
    dtype: torch.dtype
    asked_in: torch.dtype
    has_turn: bool
    bias: str
    softcap: float
    seed: int


cases = st.builds(
    Case,
    keys=sides,
    values=sides,
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    page=st.sampled_from([16, 32, 64, 64, 128]),
    pages=st.integers(0, 6),
    blocks_per_split=st.integers(1, 5),
    group=st.integers(1, 5),
    queries=st.sampled_from([1, 1, 2, 3, 7]),
    slots=st.one_of(st.integers(0, 20), st.integers(60, 150)),
    has_holes=st.booleans(),
    has_empty_slots=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    asked_in=st.sampled_from(DTYPES),
    has_turn=st.booleans(),
    bias=st.sampled_from(["none", "none", "one for all", "by query head", "by row and query"]),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 2**32),
)
fuzzed = settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)


@dataclass(frozen=True)
class Made:
    case: Case
    pool: Pool
    exact: ExactPool
    rows: Rows
    query: torch.Tensor  # [B, Hq, Q, D]
    bias: torch.Tensor | None
    scaling: float

    def tokens(self, row):
        """Packed tokens and places of exact ones that a row has."""
        case, rows = self.case, self.rows
        packed = [
            t for t in range(int(rows.skip[row]), int(rows.lengths[row])) if int(rows.table[row, t // case.page]) >= 0
        ]
        exact = [e for e in range(int(rows.counts[row])) if int(rows.slots[row, e]) >= 0]
        return torch.tensor(packed, dtype=torch.int64), torch.tensor(exact, dtype=torch.int64)


def made_from(case, guarded):
    make = Maker(guarded, case.seed)
    integers = lambda low, high, *size: torch.randint(low, high + 1, size, generator=make.generator)  # noqa: E731
    has_turn = case.has_turn and case.keys.head_dim > 1
    key_form = make.form(case.keys, case.heads, 1 if case.keys.heads_share else case.heads, has_turn)
    value_form = make.form(case.values, case.heads, 1, False)
    count, slot_count = case.batch * case.pages + SPARE, case.batch * case.slots + SPARE
    table = torch.randperm(count, generator=make.generator)[: count - SPARE].view(case.batch, case.pages).int()
    slots = torch.randperm(slot_count, generator=make.generator)[: case.batch * case.slots].int()
    slots = slots.view(case.batch, case.slots)
    lengths, counts = integers(0, case.pages * case.page, case.batch), integers(0, case.slots, case.batch)
    if case.has_holes:
        table[integers(0, 2, *table.shape) == 0] = -1
    if case.has_empty_slots:
        slots[integers(0, 3, *slots.shape) == 0] = -1
    rows = Rows(
        guarded(table),
        guarded(lengths.int()),
        guarded((lengths * (torch.rand(case.batch, generator=make.generator) - 0.2).clamp(min=0)).int()),
        guarded(integers(0, 5000, case.batch)),
        guarded(slots),
        guarded(counts.int()),
        longest=int(lengths.max()) if case.batch else 0,
    )
    used_pages, used_slots = _used(rows, case, count, slot_count)
    pool = Pool(
        _poisoned(guarded, make.pages(case.keys, count, case.heads, case.page), used_pages),
        _poisoned(guarded, make.pages(case.values, count, case.heads, case.page), used_pages),
        key_form,
        value_form,
    )
    exact = [make.normal(slot_count, case.heads, side.head_dim).to(case.dtype) for side in (case.keys, case.values)]
    for tokens in exact:
        tokens[~used_slots] = torch.nan
    query = make.normal(case.batch, case.heads * case.group, case.queries, case.keys.head_dim).to(case.asked_in)
    scaling = 0.5 * case.keys.head_dim**-0.5
    return Made(case, pool, ExactPool(*map(guarded, exact)), rows, guarded(query), _bias(case, make), scaling)


def _used(rows, case, count, slot_count):
    pages, slots = torch.zeros(count, dtype=torch.bool), torch.zeros(slot_count, dtype=torch.bool)
    for row in range(case.batch):
        for t in range(int(rows.skip[row]), int(rows.lengths[row])):
            if (page := int(rows.table[row, t // case.page])) >= 0:
                pages[page] = True
        for slot in rows.slots[row, : int(rows.counts[row])].tolist():
            if slot >= 0:
                slots[slot] = True
    return pages, slots


def _poisoned(guarded, fields, used):
    for field in fields.values():
        field[~used] = torch.nan if field.is_floating_point() else 255
    return {name: guarded(field) for name, field in fields.items()}


def _bias(case, make):
    if case.bias == "none":
        return None
    columns = case.pages * case.page + case.slots
    shape = {
        "one for all": (1, 1, 1, columns),
        "by query head": (1, case.heads * case.group, 1, columns),
        "by row and query": (case.batch, 1, case.queries, columns),
    }[case.bias]
    bias = torch.randn(shape, generator=make.generator)
    return make.guarded(bias.masked_fill(bias < -0.5, -torch.inf))


def truth(made, row):
    """Outputs ``[Hq, Q, Dv]``, what an error is measured by, and log-sum-exps of one row."""
    case, rows = made.case, made.rows
    packed, places = made.tokens(row)
    pages, slots = rows.table[row, packed // case.page].long(), rows.slots[row, places].long()
    parts = []
    for form, fields, exact in (
        (made.pool.key_form, made.pool.keys, made.exact.keys),
        (made.pool.value_form, made.pool.values, made.exact.values),
    ):
        used, place = pages.unique(return_inverse=True)
        blocks = {name: field[used][:, :, None] for name, field in fields.items()}
        tokens = decoded(form, blocks)[place, :, packed % case.page].transpose(0, 1)  # [H, t, D]
        mean = mean_at(form, (rows.origins[row] + packed)[None, :, None], 1)
        tokens = tokens + (mean[0] if form.mean is not None else 0)
        parts.append(torch.cat([tokens, exact[slots].transpose(0, 1).double()], 1))
    keys, values = (part.repeat_interleave(case.group, 0) for part in parts)
    scores = made.query[row].double() @ keys.transpose(1, 2) * made.scaling
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    if made.bias is not None:
        columns = torch.cat([packed, case.pages * case.page + places])
        scores = scores + made.bias[row % made.bias.shape[0]][..., columns].double()
    own = rows.counts[row] - torch.arange(case.queries - 1, -1, -1)
    scores[..., len(packed) :].masked_fill_(places >= own[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp()
    return weights @ values, (weights.square() @ values.square()).sum(-1).sqrt(), lse


def _tolerance(made):
    """Of one row, since there may be no others; a token too many is further off than that among 1,000."""
    return WORST * made.pool.error_budget if trades() else TOLERANCE


def _split(case, monkeypatch):
    if runtime.is_interpreted():
        monkeypatch.setattr(runtime, "processors", lambda device: case.blocks_per_split)
    monkeypatch.setattr(attention, "SPLIT_BLOCKS", case.blocks_per_split)


def _attended(made):
    case = made.case
    query = made.query.reshape(case.batch, case.heads, case.group * case.queries, case.keys.head_dim)
    return ops.attend(query, made.pool, made.exact, made.rows, case.queries, made.scaling, case.softcap, made.bias)


@fuzzed
@given(cases)
def test_attend(guarded, monkeypatch, case):
    _split(case, monkeypatch)
    attention.release()
    made = made_from(case, guarded)
    out, lse = _attended(made)
    attention.release()
    assert out.shape == (case.batch, case.heads, case.group * case.queries, case.values.head_dim)
    assert out.dtype == lse.dtype == torch.float32
    for row in range(case.batch):
        expected, size, true_lse = truth(made, row)
        error = (out[row].reshape(expected.shape) - expected).norm(dim=-1)
        assert (error <= _tolerance(made) * size).all()
        torch.testing.assert_close(lse[row].reshape(true_lse.shape).double(), true_lse, rtol=0, atol=_tolerance(made))


@fuzzed
@given(cases)
def test_append_attend(guarded, monkeypatch, case):
    """Tokens lie in the pool as they came, and what comes out is what ``attend`` gives, rounded."""
    case = replace(case, bias="none")
    _split(case, monkeypatch)
    attention.release()
    made = made_from(case, guarded)
    make = Maker(guarded, case.seed + 1)
    fresh = [
        make.part(make.normal(case.batch, case.queries, case.heads, side.head_dim).to(case.dtype), 1).transpose(1, 2)
        for side in (case.keys, case.values)
    ]
    expected = [x.clone() for x in (made.exact.keys, made.exact.values)]
    for row in range(case.batch):
        for token in range(case.queries):
            place = int(made.rows.counts[row]) - case.queries + token
            if place >= 0 and int(made.rows.slots[row, place]) >= 0:
                for kept, tokens in zip(expected, fresh, strict=True):
                    kept[int(made.rows.slots[row, place])] = tokens[row, :, token]
    query = make.part(made.query.transpose(1, 2), 1).transpose(1, 2)
    given_out = ops.append_attend(query, *fresh, made.pool, made.exact, made.rows, made.scaling, case.softcap)
    for kept, tokens in zip(expected, (made.exact.keys, made.exact.values), strict=True):
        torch.testing.assert_close(tokens, kept, rtol=0, atol=0, equal_nan=True)
    out, _ = _attended(made)
    attention.release()
    out = out.reshape(*query.shape[:3], case.values.head_dim).transpose(1, 2)
    assert given_out.is_contiguous()
    cut = 2**-7 if runtime.is_interpreted() and query.dtype == torch.bfloat16 else 0  # where a GPU rounds
    torch.testing.assert_close(given_out, out.to(query.dtype), rtol=cut, atol=0)
