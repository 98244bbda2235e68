"""Attention over rows of pools, on every backend, against tokens decoded by their codecs; and what is refused."""

from dataclasses import replace

import pytest
import torch

from budget import assert_log_sums_within_budget, assert_within, assert_within_budget
from pages import HEADS, Extent, expected, operands, paged
from qjl import ops
from qjl.methods.balanced import Balanced
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.transform import Transform
from qjl.ops.cpu import attention
from qjl.ops.forms import ExactPool, Rows
from qjl.ops.triton import runtime
from qjl.packed import BLOCK

SCALING = 0.125
TRELLIS = Balanced(2, "trellis", metric=False)
every_page = pytest.mark.parametrize("page", [16, 64] if runtime.is_interpreted() else [16, 32, 64, 128])


def _check(made, step, extent, has_exact=True, **how):
    out, lse = step.attend(**how)
    truth, true_lse = expected(made, extent, has_exact=has_exact, **how)
    assert_within_budget(out, truth, step.pool)
    assert_log_sums_within_budget(lse, true_lse, step.pool)


@every_page
def test_rows_of_any_length(backend, page, generator):
    """None, one, less than what is skipped, a page, a page and some more, all."""
    made = operands(Transform(3), TRELLIS)
    lengths = [0, 1, 3, 4, 64, 101, 64 * made.packed.blocks]
    for skip in (0, 4, 70):
        extent = Extent.of(lengths, [skip] * len(lengths), [0] * len(lengths))
        _check(made, paged(made, page, extent, generator), extent)


@every_page
def test_rows_with_tokens_of_their_own(backend, page, generator):
    made = operands(Transform(3), TRELLIS, batch=3)
    extent = Extent.of([384, 101, 200], [0, 4, 131])
    _check(made, paged(made, page, extent, generator), extent)


FORMS = {
    "b2": (Transform(2), TRELLIS),
    "b4": (Transform(4), Balanced(4, "trellis", metric=False)),
    "b-1.5": (Transform(1.5), Balanced(1.5, "trellis", metric=False)),
    "qjl-2": (Balanced(2, "signs"), TRELLIS),
    "qjl-paper": (QJL(2), Balanced(2, metric=False)),
    "groups": (QuaRot(3, 32), QuaRot(2, 16)),
}


@pytest.mark.parametrize("page", [32, 64])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(backend, form, page, generator):
    """Scores of those that do not centre keys are large, and their last digits count."""
    made = operands(*FORMS[form], batch=2)
    extent = Extent.of([300, 101], [4, 0])
    _check(made, paged(made, page, extent, generator), extent, scaling=SCALING / 4)


@every_page
def test_a_larger_head(backend, page, generator):
    made = operands(Transform(3), TRELLIS, batch=2, head_dim=128)
    extent = Extent.of([300, 101], [4, 0])
    _check(made, paged(made, page, extent, generator), extent)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_any_number_of_rows(backend, group, queries, generator):
    """Several query tokens are causal among themselves, as in speculative decoding."""
    made = operands(Transform(2), TRELLIS, batch=2, group=group, queries=queries)
    extent = Extent.of([384, 101], [4, 4])
    _check(made, paged(made, 32, extent, generator), extent, queries=queries)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("page", [16, 64])
def test_what_is_added_to_scores(backend, page, heads, generator):
    """By row, head, query and token; some rows end within a block of 64."""
    made = operands(Transform(2), TRELLIS, batch=2, queries=2)
    extent = Extent.of([101, 70], [4, 0])
    step = paged(made, page, extent, generator)
    bias = torch.rand(2, heads, 2, step.rows.table.shape[1] * page + step.rows.slots.shape[1], generator=generator)
    bias = bias.log().masked_fill(bias < 0.3, -torch.inf)
    _check(made, step, extent, queries=2, bias=bias)


@pytest.mark.parametrize("page", [16, 64])
def test_soft_caps(backend, page, generator):
    made = operands(Transform(2), TRELLIS, batch=2)
    extent = Extent.of([300, 101], [4, 0])
    _check(made, paged(made, page, extent, generator), extent, softcap=5.0)


def test_half_precision_beside_pages(backend, generator):
    made = operands(Transform(2), TRELLIS, batch=2, dtype=torch.bfloat16)
    extent = Extent.of([300, 101], [4, 0])
    _check(made, paged(made, 64, extent, generator), extent)


def test_tables_with_far_more_room_than_tokens(backend, generator):
    """As an engine has them, which keeps room for the longest context."""
    made = operands(Transform(2), TRELLIS, batch=2)
    extent = Extent.of([64, 70], [4, 0])
    step = paged(made, 64, extent, generator)
    room = torch.full((2, 60), -1, dtype=torch.int32)
    step.rows.table = torch.cat([step.rows.table, room], 1)
    _check(made, step, extent)


@every_page
def test_rows_that_share_pages(backend, page, generator):
    """As those with a common prompt do."""
    made = operands(Transform(3), TRELLIS)
    extent = Extent.of([300, 300, 128], [4, 4, 0], [0, 0, 0])
    step = paged(made, page, extent, generator)
    assert torch.equal(step.rows.table[0], step.rows.table[1])
    _check(made, step, extent)


def test_far_positions_turn_the_mean_exactly(backend, generator):
    """Pages are taken as if they began later, as the oracle's blocks are."""
    made = operands(Transform(2), TRELLIS)
    made = replace(made, packed=replace(made.packed, first=made.packed.first + 10_000_000))
    extent = Extent.of([300], [4])
    step = paged(made, 64, extent, generator)
    assert step.rows.origins.item() == 10_000_000
    _check(made, step, extent)


def test_a_row_without_tokens_weighs_nothing(backend, generator):
    made = operands(Transform(2), TRELLIS)
    extent = Extent.of([3], [4])
    out, lse = paged(made, 32, extent, generator, has_exact=False).attend()
    assert not out.any()
    assert (lse == -torch.inf).all()
    _check(made, paged(made, 32, extent, generator), extent)


def test_rows_without_exact_tokens(backend, generator):
    made = operands(Transform(2), TRELLIS)
    extent = Extent.of([300], [4])
    _check(made, paged(made, 64, extent, generator, has_exact=False), extent, has_exact=False)


def test_no_rows(backend, generator):
    made = operands(Transform(2), TRELLIS)
    step = paged(made, 64, Extent.of([]), generator)
    out, lse = step.attend()
    assert out.shape == (0, *made.queries.shape[1:])
    assert lse.shape == (0, *made.queries.shape[1:3])


def test_contents_of_rows_may_change_in_place(backend, generator):
    """What a backend has made of pools and rows serves what they hold later."""
    made = operands(Transform(3), TRELLIS)
    extent = Extent.of([300, 101], [4, 70], [0, 0])
    step = paged(made, 16, extent, generator)
    _check(made, step, extent)
    rows = step.rows
    for name in ("lengths", "skip"):
        getattr(rows, name).copy_(getattr(rows, name).flip(0))
    rows.table = rows.table.flip(0)  # a tensor that takes the place of the former one
    _check(made, step, extent)  # whose tensors are those of the rows


def test_exact_tokens_that_have_moved(backend, generator):
    made = operands(Transform(3), TRELLIS)
    step = paged(made, 64, Extent.of([300]), generator)
    before = step.attend()
    moved = ExactPool(*(torch.cat([x, torch.zeros_like(x)]) for x in (step.exact.keys, step.exact.values)))
    step.exact.keys.fill_(torch.nan)
    for one, other in zip(before, replace(step, exact=moved).attend(), strict=True):
        assert torch.equal(one, other)


# Fresh tokens


def _fresh(step, queries=2):
    batch, heads, count, dim = step.query.shape
    keys, values = torch.randn(2, batch, heads, queries, dim).to(step.exact.keys.dtype)
    return step.query.reshape(batch, heads * count // queries, queries, dim), keys, values


def test_fresh_tokens_of_another_type(backend, generator):
    """Those of a model that computes in float32 beside a pool in half precision."""
    made = operands(Transform(2), TRELLIS, dtype=torch.bfloat16, queries=2)
    step = paged(made, 64, Extent.of([300]), generator)
    query, keys, values = _fresh(step)
    ops.append_attend(query, keys.float(), values.float(), step.pool, step.exact, step.rows, SCALING)
    assert torch.equal(step.exact.keys[step.rows.slots[0, -2:].long()], keys[0].transpose(0, 1))


def test_operands_of_another_form_than_in_the_call_before(backend, generator, refuses):
    """What a backend keeps of a call serves none that differs."""
    made = operands(Transform(2), TRELLIS, dtype=torch.bfloat16, queries=2)
    step = paged(made, 64, Extent.of([300]), generator)
    pools, given = (step.pool, step.exact, step.rows), _fresh(step)
    expected = ops.append_attend(*given, *pools, SCALING)
    across = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in given)
    for query, keys, values in (across, given, (given[0], given[1].float(), across[2]), given):
        assert torch.equal(ops.append_attend(query, keys, values, *pools, SCALING), expected)
    assert not torch.equal(ops.append_attend(*given, *pools, SCALING / 2), expected)
    with refuses("fresh keys should be"):
        ops.append_attend(given[0], given[1][:, :, :1], given[2], *pools, SCALING)
    step.rows.counts = step.rows.counts.long()
    with refuses("counts of rows should be"):
        ops.append_attend(*given, *pools, SCALING)


# What does not fit


@pytest.fixture
def two_rows(generator):
    made = operands(Transform(3), TRELLIS, queries=2)
    return paged(made, 64, Extent.of([300, 100], [4, 0], [0, 0]), generator)


def test_a_step_of_other_shapes(backend, two_rows, refuses):
    step, exact, rows = two_rows, two_rows.exact, two_rows.rows
    with refuses("queries should be"):
        replace(step, query=step.query[..., :32]).attend(2)
    with refuses("queries should be float32, bfloat16 or float16, not torch.float64"):
        replace(step, query=step.query.double()).attend(2)
    with refuses("4 query rows are no multiple of 3 queries"):
        step.attend(3)
    columns = rows.table.shape[1] * BLOCK + rows.slots.shape[1]
    for shape in ((2, 1, 2, columns - 1), (2, 1, 2, columns + 1), (2, 3, 2, columns), (3, 1, 1, columns), (2, columns)):
        with refuses("a bias should be"):
            step.attend(2, bias=torch.zeros(shape))
    with refuses("exact tokens have heads and dimensions"):
        replace(step, exact=ExactPool(exact.keys[:, :1], exact.values[:, :1])).attend(2)
    with refuses("exact keys and values should be of one type"):
        replace(step, exact=ExactPool(exact.keys, exact.values.half())).attend(2)
    rows.counts = rows.counts.long()
    with refuses("counts of rows should be"):
        step.attend(2)


def test_fresh_tokens_of_other_shapes(backend, two_rows, refuses):
    query, keys, values = _fresh(two_rows)
    for wrong, what in (
        ((query[:, :3], keys, values), "queries should be"),
        ((query, keys[:, :, :1], values), "fresh keys should be"),
        ((query, keys, values[:, :1]), "fresh values should be"),
        ((query, keys.double(), values), "fresh keys should be float32, bfloat16 or float16"),
    ):
        with refuses(what):
            ops.append_attend(*wrong, two_rows.pool, two_rows.exact, two_rows.rows, SCALING)


# In C++


def test_what_rows_name_outside_the_pools_is_refused(cpu_kernels, two_rows, refuses):
    rows, slots, pages = two_rows.rows, two_rows.exact.keys.shape[0], two_rows.pool.keys["codes"].shape[0]
    for name, value, what in (
        ("table", -2, "a table names a page that is not in the pool"),
        ("table", pages, "a table names a page that is not in the pool"),
        ("slots", -2, "a row names a slot that is not in the pool"),
        ("slots", slots, "a row names a slot that is not in the pool"),
        ("counts", rows.slots.shape[1] + 1, "a row has more exact tokens than its slots"),
        ("counts", -1, "a row has more exact tokens than its slots"),
        ("lengths", 1000, "a row has more tokens than its pages"),
    ):
        kept = getattr(rows, name).clone()
        getattr(rows, name)[1:].fill_(value)
        with refuses(what):
            two_rows.attend(2)
        getattr(rows, name).copy_(kept)
    rows.longest = 0
    with refuses("the splits do not hold all blocks"):
        two_rows.attend(2)


def test_neither_threads_nor_other_rows_change_a_row(cpu_kernels, monkeypatch, generator):
    monkeypatch.setattr(attention, "SPLIT_BLOCKS", 2)
    made = operands(Transform(3), TRELLIS, tokens=3000)
    step = paged(made, 16, Extent.of([2900, 2100, 300], [4, 0, 131], [0, 0, 0]), generator)
    alone = zip(*(_row(step, row).attend() for row in range(3)), strict=True)
    alone = [torch.cat(parts) for parts in alone]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(*parts) for parts in zip(step.attend(), alone, strict=True))
    torch.set_num_threads(1)


def _row(step, row):
    names = ("table", "lengths", "skip", "origins", "slots", "counts")
    of_row = [getattr(step.rows, name)[row : row + 1] for name in names]
    rows = Rows(*of_row, longest=int(step.rows.lengths[row]))
    return replace(step, query=step.query[row : row + 1], rows=rows)


def test_room_is_bounded(cpu_kernels, monkeypatch, generator):
    monkeypatch.setattr(attention, "SPLIT_BLOCKS", 1)
    made = operands(QuaRot(2), QuaRot(2), tokens=6000)
    sizes = []
    for length in (2100, 5800):
        attention.release()
        paged(made, 64, Extent.of([length]), generator).attend()
        sizes.append(attention.held_bytes())
    assert sizes[0] == sizes[1]


def test_scores_alone(cpu_kernels, generator):
    """What they add to all tokens changes no output; what is left, attention over many of them averages."""
    made = operands(Transform(3), TRELLIS)
    extent = Extent.of([300], [4])
    step = paged(made, 16, extent, generator)
    scores = attention.score(step.query, step.pool, step.exact, step.rows)[..., 4:300]
    keys = made.packed.key_codec.dequantize(made.packed.keys, made.packed.first)[..., 4:300, :]
    truth = step.query.double() @ keys.double().transpose(2, 3)
    spread = (truth - truth.mean(-1, keepdim=True)).norm(dim=-1)
    assert_within((scores - truth).norm(dim=-1) / spread, 2 * made.packed.key_codec.form.error_budget)
    assert scores.shape == (1, HEADS, step.query.shape[2], 296)
