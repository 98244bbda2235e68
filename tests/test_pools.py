"""Pools of pages and of exact tokens: many layers encoded at once, and what does not fit is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from conftest import USUAL, Model, using_backend
from pages import operands
from qjl import ops
from qjl.methods.base import LayerContext
from qjl.ops.cpu import decoding
from qjl.ops.forms import ExactPool, Pool, Rows
from qjl.ops.triton import runtime
from qjl.packed import BLOCK
from qjl.presets import PRESETS
from qjl.rope import Rope

HEADS, HEAD_DIM, SLOTS, PAGES = 2, 64, 400, 7
FIRST = torch.tensor([4, 100_036, 68])
INTO = torch.tensor([5, 0, 2], dtype=torch.int32)
NAMES = ["b2", "quarot-4", "qjl-2"] if runtime.is_interpreted() else sorted(PRESETS)


@cache  # fitting takes longer than testing
@using_backend(USUAL)
def _codecs(name):
    model = Model(HEADS, HEAD_DIM)
    preset = PRESETS[name]

    def fit(role, quantizer):
        rope = Rope(model.rope.inv_freq.clone()) if role == "key" else None
        statistics = model.statistics() if quantizer.needs_statistics else None
        return quantizer.fit(LayerContext(role, HEADS, HEAD_DIM, torch.device("cpu"), torch.float32, statistics, rope))

    return [fit(role, quantizer) for role, quantizer in (("key", preset.key), ("value", preset.value))]


def _fields(codec):
    """A pool that lies head by head, with poison in it."""
    fields = {}
    for name, field in codec.layout.items():
        poison = torch.nan if field.dtype.is_floating_point else 127
        fields[name] = torch.full((HEADS, PAGES, *field.shape), poison, dtype=field.dtype).transpose(0, 1)
    return fields


def _exact(generator, dtype=torch.bfloat16):
    return torch.randn(SLOTS, HEADS, HEAD_DIM, generator=generator).to(dtype)


def _slots(generator):
    return torch.randperm(SLOTS, generator=generator)[: len(INTO) * BLOCK].int()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_hold_what_each_codec_makes(backend, name, dtype, generator):
    codecs = _codecs(name)
    slots, jobs = _slots(generator), []
    for codec in codecs * 2:  # of two layers
        jobs.append(codec.job(_exact(generator, dtype), _fields(codec), f"tokens {len(jobs)}"))
    for _ in range(2):  # with what the first call has made
        ops.encode(jobs, slots, FIRST, INTO)
        for codec, job in zip(codecs * 2, jobs, strict=True):
            blocks = codec.encode_tokens(job.tokens[slots.long()].transpose(0, 1)[None], FIRST[None])
            others = [page for page in range(PAGES) if page not in INTO.tolist()]
            untouched = _fields(codec)
            for field, expected in blocks.items():
                assert torch.equal(job.fields[field][INTO.long()], expected[0].transpose(0, 1))
                torch.testing.assert_close(
                    job.fields[field][others], untouched[field][others], rtol=0, atol=0, equal_nan=True
                )


def test_every_kind_of_recipe_is_among_the_presets():
    kinds = {type(codec.recipe).__name__ for name in PRESETS for codec in _codecs(name)}
    assert kinds == {"NoneType", "Recipe", "GridRecipe"}


def _jobs(generator, name="b3", count=2):
    codecs = _codecs(name)
    return [
        codec.job(_exact(generator), _fields(codec), f"{what} of layer {layer}")
        for layer in range(count)
        for codec, what in zip(codecs, ("keys", "values"), strict=True)
    ]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["b3", "quarot-4"])
def test_tokens_that_are_not_finite(backend, name, number, generator, refuses):
    jobs, slots = _jobs(generator, name), _slots(generator)
    jobs[1].tokens[int(slots[70]), 1, 3] = jobs[3].tokens[int(slots[0]), 0, 0] = number
    with refuses("values of layer 0 contain NaN or Inf: check the model's weights, its dtype and the prompt."):
        ops.encode(jobs, slots, FIRST, INTO)


def test_what_is_not_encoded_may_be_anything(backend, generator):
    jobs, slots = _jobs(generator), _slots(generator)
    unused = torch.ones(SLOTS, dtype=torch.bool)
    unused[slots.long()] = False
    for job in jobs:
        job.tokens[unused] = torch.nan
    ops.encode(jobs, slots, FIRST, INTO)


def test_nothing_to_encode(backend, generator):
    none = torch.zeros(0, dtype=torch.int32)
    ops.encode(_jobs(generator), none, none.long(), none)
    ops.encode([], _slots(generator), FIRST, INTO)


def test_threads_change_no_byte(cpu_kernels, generator):
    jobs, slots, given = _jobs(generator, "b2", 3), _slots(generator), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        ops.encode(jobs, slots, FIRST, INTO)
        given.append([field[INTO.long()].clone() for job in jobs for field in job.fields.values()])
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*given, strict=True))


def test_blocks_that_do_not_fit_are_refused(generator, refuses):
    jobs, slots = _jobs(generator), _slots(generator)
    with refuses("slots of blocks to encode should be"):
        ops.encode(jobs, slots[:-1], FIRST, INTO)
    with refuses("positions of blocks to encode should be"):
        ops.encode(jobs, slots, FIRST.int(), INTO)
    with refuses("codes of keys of layer 0 should be"):
        short = {**jobs[0].fields, "codes": jobs[0].fields["codes"][:, :, 2:]}
        ops.encode([replace(jobs[0], fields=short)], slots, FIRST, INTO)
    with refuses("the recipe is not for 1 heads"):
        ops.encode([replace(jobs[0], tokens=jobs[0].tokens[:, :1])], slots, FIRST, INTO)


def test_slots_and_pages_outside_their_pools_are_refused(cpu_kernels, generator, refuses):
    jobs, slots = _jobs(generator), _slots(generator)
    for place in (-1, SLOTS):
        outside = slots.clone()
        outside[3] = place
        with refuses("a row names a slot that is not in the pool"):
            ops.encode(jobs, outside, FIRST, INTO)
    for page in (-1, PAGES):
        with refuses("a table names a page that is not in the pool"):
            ops.encode(jobs, slots, FIRST, torch.tensor([0, page, 1], dtype=torch.int32))


# Attention


def _attention(name="b3", tokens=460, dtype=torch.float32):
    """Pools of one layer, two rows that share pages, and queries for two tokens of each."""
    made = operands(PRESETS[name].key, PRESETS[name].value, tokens=tokens)
    packed = made.packed.as_operand
    keys, values = (
        {field: x[0].transpose(0, 1).contiguous() for field, x in side.items()} for side in (packed.keys, packed.values)
    )
    generator = torch.Generator().manual_seed(3)
    pool = Pool(keys, values, packed.key_form, packed.value_form)
    exact = ExactPool(*(torch.randn(90, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(2)))
    pages = packed.first.shape[1]
    rows = Rows(
        torch.arange(pages, dtype=torch.int32).repeat(2, 1),
        torch.tensor([64 * pages - 10, 100], dtype=torch.int32),
        torch.tensor([4, 0], dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
        torch.arange(80, dtype=torch.int32).view(2, 40),
        torch.tensor([40, 7], dtype=torch.int32),
        longest=64 * pages - 10,
        most_exact=40,
    )
    query = torch.randn(2, HEADS, 4, HEAD_DIM, generator=generator).to(dtype)
    return query, pool, exact, rows, 2, 0.125


def _fresh(query, exact):
    batch, heads, _, dim = query.shape
    tokens = torch.randn(2, batch, heads, 2, dim).to(exact.keys.dtype)
    return query.reshape(batch, 2 * heads, 2, dim), tokens[0], tokens[1]


def test_neither_threads_nor_other_rows_change_a_row(cpu_kernels, monkeypatch):
    monkeypatch.setattr(decoding, "SPLIT_BLOCKS", 2)
    query, pool, exact, rows, *how = _attention(tokens=3000)
    alone = []
    for row in range(2):
        own = {name: getattr(rows, name)[row : row + 1] for name in ("table", "lengths", "skip", "origins", "slots")}
        length = int(rows.lengths[row])
        of_row = Rows(*own.values(), rows.counts[row : row + 1], longest=length, most_exact=int(rows.counts[row]))
        alone.append(ops.attend(query[row : row + 1], pool, exact, of_row, *how))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for part, parts in zip(ops.attend(query, pool, exact, rows, *how), zip(*alone, strict=True), strict=True):
            assert torch.equal(part, torch.cat(parts))
    torch.set_num_threads(1)


def test_contents_of_rows_may_change_in_place(backend):
    query, pool, exact, rows, *how = _attention()
    before = ops.attend(query, pool, exact, rows, *how)
    for name in ("lengths", "counts"):
        getattr(rows, name).copy_(getattr(rows, name).flip(0))
    rows.table = rows.table.clone()  # a tensor that takes the place of the former one
    rows.slots.copy_(rows.slots.flip(0))
    rows.skip.copy_(rows.skip.flip(0))
    after = ops.attend(query.flip(0), pool, exact, rows, *how)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other.flip(0))


def test_exact_tokens_that_have_moved(backend):
    query, pool, exact, rows, *how = _attention()
    before = ops.attend(query, pool, exact, rows, *how)
    moved = ExactPool(*(torch.cat([x, torch.zeros_like(x)]) for x in (exact.keys, exact.values)))
    exact.keys.fill_(torch.nan)
    for one, other in zip(before, ops.attend(query, pool, moved, rows, *how), strict=True):
        assert torch.equal(one, other)


def test_fresh_tokens_of_another_type(backend):
    """Those of a model that computes in float32 beside a pool in half precision."""
    query, pool, exact, rows, _, scaling = _attention(dtype=torch.bfloat16)
    query, keys, values = _fresh(query.float(), exact)
    ops.append_attend(query, keys.float(), values.float(), pool, exact, rows, scaling)
    assert torch.equal(exact.keys[rows.slots[0, 38:40].long()], keys[0].transpose(0, 1))


def test_a_step_of_other_shapes(backend, refuses):
    query, pool, exact, rows, queries, scaling = _attention()
    with refuses("queries should be"):
        ops.attend(query[..., :32], pool, exact, rows, queries, scaling)
    with refuses("queries should be float32, bfloat16 or float16, not torch.float64"):
        ops.attend(query.double(), pool, exact, rows, queries, scaling)
    with refuses("4 query rows are no multiple of 3 queries"):
        ops.attend(query, pool, exact, rows, 3, scaling)
    columns = rows.table.shape[1] * BLOCK + 40
    for shape in ((2, 1, 2, columns - 1), (2, 1, 2, columns + 1), (2, 3, 2, columns), (3, 1, 1, columns)):
        with refuses("a bias"):
            ops.attend(query, pool, exact, rows, queries, scaling, bias=torch.zeros(shape))
    with refuses("exact tokens have heads and dimensions"):
        ops.attend(query, pool, ExactPool(exact.keys[:, :1], exact.values[:, :1]), rows, queries, scaling)
    with refuses("exact keys and values should be of one type"):
        ops.attend(query, pool, ExactPool(exact.keys, exact.values.half()), rows, queries, scaling)
    rows.counts = rows.counts.long()
    with refuses("counts of rows should be"):
        ops.attend(query, pool, exact, rows, queries, scaling)


def test_fresh_tokens_of_other_shapes(backend, refuses):
    query, pool, exact, rows, _, scaling = _attention()
    query, keys, values = _fresh(query, exact)
    for wrong, what in (
        ((query[:, :3], keys, values), "queries should be"),
        ((query, keys[:, :, :1], values), "fresh keys should be"),
        ((query, keys, values[:, :1]), "fresh values should be"),
        ((query, keys.double(), values), "fresh keys should be float32, bfloat16 or float16"),
    ):
        with refuses(what):
            ops.append_attend(*wrong, pool, exact, rows, scaling)


def test_what_rows_name_outside_the_pools_is_refused(cpu_kernels, refuses):
    query, pool, exact, rows, *how = _attention()
    for name, value, what in (
        ("table", -2, "a table names a page that is not in the pool"),
        ("table", 1000, "a table names a page that is not in the pool"),
        ("slots", -2, "a row names a slot that is not in the pool"),
        ("slots", 90, "a row names a slot that is not in the pool"),
        ("counts", 41, "a row has more exact tokens than its slots"),
        ("counts", -1, "a row has more exact tokens than its slots"),
        ("lengths", 1000, "a row has more tokens than its pages"),
    ):
        kept = getattr(rows, name).clone()
        getattr(rows, name)[1:].fill_(value)
        with refuses(what):
            ops.attend(query, pool, exact, rows, *how)
        getattr(rows, name).copy_(kept)
    rows.longest = 0
    with refuses("the splits do not hold all blocks"):
        ops.attend(query, pool, exact, rows, *how)
