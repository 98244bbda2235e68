"""Attention over pages of a pool, on every backend, against tokens decoded by their codecs."""

from dataclasses import replace

import pytest
import torch

from pages import Extent, error, expected, operands, paged
from qjl import ops
from qjl.methods.balanced import Balanced
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.transform import Transform
from qjl.ops.cpu import decoding
from qjl.ops.forms import ExactTokens
from qjl.ops.triton import runtime
from qjl.packed import BLOCK

TOLERANCE = 1e-4
IN_HALF_PRECISION = 2e-3  # where that is what a GPU multiplies in
SCALING = 0.125
TRELLIS = Balanced(2, "trellis", metric=False)
every_page = pytest.mark.parametrize("page", [16, 64] if runtime.is_interpreted() else [16, 32, 64, 128])


pytestmark = pytest.mark.usefixtures("backend")


def _check(made, pages, extent, exact=None, queries=1, scaling=SCALING, softcap=0.0, tolerance=TOLERANCE):
    exact = made.exact if exact is None else exact
    rows = made.rows[extent.source.long()].contiguous()
    exact = [ExactTokens(x.keys[extent.source.long()], x.values[extent.source.long()], x.bias) for x in exact]
    out, lse = ops.attend_paged(rows, pages, None, exact, queries, scaling, softcap)
    truth, true_lse = expected(rows, made.packed, exact, extent, scaling, softcap=softcap)
    assert error(out, truth) < tolerance
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=tolerance)


@every_page
def test_rows_of_any_length(page, generator):
    """None, one, less than what is skipped, a page, a page and some more, all."""
    made = operands(Transform(3), TRELLIS)
    lengths = [0, 1, 3, 4, 64, 101, 64 * made.packed.blocks]
    for skip in (0, 4, 70):
        extent = Extent.of(lengths, [skip] * len(lengths), [0] * len(lengths))
        _check(made, paged(made.packed, page, extent, generator), extent)


@every_page
def test_rows_with_tokens_of_their_own(page, generator):
    made = operands(Transform(3), TRELLIS, batch=3)
    extent = Extent.of([384, 101, 200], [0, 4, 131])
    _check(made, paged(made.packed, page, extent, generator), extent)


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
def test_every_form(form, page, generator):
    """Scores of those that do not centre keys are large, and their last digits count."""
    made = operands(*FORMS[form], batch=2)
    extent = Extent.of([300, 101], [4, 0])
    _check(made, paged(made.packed, page, extent, generator), extent, scaling=SCALING / 4)


@every_page
def test_a_larger_head(page, generator):
    made = operands(Transform(3), TRELLIS, batch=2, head_dim=128)
    extent = Extent.of([300, 101], [4, 0])
    _check(made, paged(made.packed, page, extent, generator), extent)


def _causal(made, queries):
    """The exact tokens with what hides from each of the last ``queries`` those behind it."""
    *sinks, recent = made.exact
    tokens = recent.keys.shape[2]
    later = torch.arange(tokens) > torch.arange(tokens - queries, tokens)[:, None]
    return [*sinks, replace(recent, bias=torch.zeros(1, 1, queries, tokens).masked_fill(later, -torch.inf))]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_any_number_of_rows(group, queries, generator):
    """Several query tokens are causal among themselves, as in speculative decoding."""
    made = operands(Transform(2), TRELLIS, batch=2, group=group, queries=queries)
    extent = Extent.of([384, 101], [4, 4])
    pages = paged(made.packed, 32, extent, generator)
    _check(made, pages, extent, _causal(made, queries), queries=queries)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("page", [16, 64])
def test_what_is_added_to_scores(page, heads, generator):
    """By row, head, query and token; it ends with the longest row, within a block of 64."""
    made = operands(Transform(2), TRELLIS, batch=2, queries=2)
    extent = Extent.of([101, 70], [4, 0])
    bias = torch.rand(2, heads, 2, 101, generator=generator).log()
    bias[bias < -1] = -torch.inf
    pages = paged(made.packed, page, extent, generator)
    out, lse = ops.attend_paged(made.rows, pages, bias, made.exact, 2, SCALING, 0.0)
    room = torch.nn.functional.pad(bias, (0, BLOCK * made.packed.blocks - 101))
    truth, true_lse = expected(made.rows, made.packed, made.exact, extent, SCALING, room)
    assert error(out, truth) < TOLERANCE
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("page", [16, 64])
def test_soft_caps(page, generator):
    made = operands(Transform(2), TRELLIS, batch=2)
    extent = Extent.of([300, 101], [4, 0])
    _check(made, paged(made.packed, page, extent, generator), extent, softcap=5.0)


def test_half_precision_beside_pages(backend, generator):
    made = operands(Transform(2), TRELLIS, batch=2, dtype=torch.bfloat16)
    extent = Extent.of([300, 101], [4, 0])
    tolerance = IN_HALF_PRECISION if backend == "triton" else TOLERANCE
    _check(made, paged(made.packed, 64, extent, generator), extent, tolerance=tolerance)


@every_page
def test_rows_that_share_pages(page, generator):
    """As those with a common prompt do."""
    made = operands(Transform(3), TRELLIS)
    extent = Extent.of([300, 300, 128], [4, 4, 0], [0, 0, 0])
    pages = paged(made.packed, page, extent, generator)
    assert torch.equal(pages.table[0], pages.table[1])
    _check(made, pages, extent)


def test_far_positions_turn_the_mean_exactly(generator):
    """Pages are taken as if they began later, as the oracle's blocks are."""
    made = operands(Transform(2), TRELLIS)
    packed = replace(made.packed, first=made.packed.first + 100_000)
    extent = Extent.of([300], [4])
    pages = paged(packed, 64, extent, generator)
    assert pages.origins.item() == 100_000
    _check(replace(made, packed=packed), pages, extent)


def test_a_row_without_tokens_weighs_nothing(generator):
    made = operands(Transform(2), TRELLIS)
    extent = Extent.of([3], [4])
    pages = paged(made.packed, 32, extent, generator)
    out, lse = ops.attend_paged(made.rows, pages, None, [], 1, SCALING, 0.0)
    assert not out.any()
    assert (lse == -torch.inf).all()
    _check(made, pages, extent)  # beside exact tokens


def test_no_rows(generator):
    made = operands(Transform(2), TRELLIS)
    pages = paged(made.packed, 64, Extent.of([300]), generator)
    none = {name: getattr(pages, name)[:0] for name in ("table", "lengths", "skip", "origins")}
    out, lse = ops.attend_paged(made.rows[:0], replace(pages, **none), None, [], 1, SCALING, 0.0)
    assert out.shape == (0, *made.rows.shape[1:])
    assert lse.shape == (0, *made.rows.shape[1:3])


def test_other_rows_of_a_pool(generator):
    """What a backend has made of the pool serves them too."""
    made = operands(Transform(3), TRELLIS)
    extent = Extent.of([300], [4])
    pages = paged(made.packed, 16, extent, generator)
    _check(made, pages, extent)
    shorter = Extent.of([101], [70])
    _check(made, replace(pages, lengths=shorter.lengths, skip=shorter.skip), shorter)


def test_rows_of_another_type(refuses, generator):
    pages = paged(operands(Transform(3), TRELLIS).packed, 64, Extent.of([300]), generator)
    with refuses("lengths should be torch.int32 [1], not torch.int64 [1]."):
        replace(pages, lengths=pages.lengths.long())


# In C++


@pytest.fixture
def in_cpp(backend):
    if not backend.startswith("cpu"):
        pytest.skip("of the cpu backend")


@every_page
def test_pages_give_what_blocks_give(page, in_cpp, generator):
    made = operands(Transform(3), TRELLIS, batch=2)
    pages = paged(made.packed, page, Extent.of([384, 384]), generator)
    blocks = made.packed.as_operand
    for part, others in zip(
        ops.attend_paged(made.rows, pages, None, made.exact, 1, SCALING, 0.0),
        ops.attend_packed(made.rows, blocks, None, made.exact, 1, SCALING, 0.0),
        strict=True,
    ):
        assert torch.equal(part, others)


def test_neither_threads_nor_other_rows_change_a_row(in_cpp, monkeypatch, generator):
    monkeypatch.setattr(decoding, "SPLIT_BLOCKS", 2)
    made = operands(Transform(3), TRELLIS, tokens=3000)
    pages = paged(made.packed, 16, Extent.of([2900, 2100, 300], [4, 0, 131], [0, 0, 0]), generator)
    queries = made.rows.repeat(3, 1, 1, 1)

    def attend(rows):
        of_rows = {name: getattr(pages, name)[rows] for name in ("table", "lengths", "skip", "origins")}
        return ops.attend_paged(queries[rows], replace(pages, **of_rows), None, [], 1, SCALING, 0.0)[0]

    alone = torch.cat([attend(slice(row, row + 1)) for row in range(3)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(attend(slice(None)), alone)
    torch.set_num_threads(1)


def test_room_is_bounded(in_cpp, monkeypatch, generator):
    monkeypatch.setattr(decoding, "SPLIT_BLOCKS", 1)
    made = operands(QuaRot(2), QuaRot(2), tokens=6000)
    sizes = []
    for length in (2100, 5800):
        pages = paged(made.packed, 64, Extent.of([length]), generator)
        decoding.release()
        ops.attend_paged(made.rows, pages, None, made.exact, 1, SCALING, 0.0)
        sizes.append(decoding.held_bytes())
    assert sizes[0] == sizes[1]
