"""Pools of pages and of exact tokens: many layers encoded at once, and what does not fit is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from conftest import USUAL, Model, using_backend
from qjl import ops
from qjl.methods.base import LayerContext
from qjl.ops.triton import runtime
from qjl.packed import BLOCK
from qjl.presets import PRESETS
from qjl.rope import Rope

HEADS, HEAD_DIM, SLOTS, PAGES = 2, 64, 400, 7
FIRST = torch.tensor([4, 100_036, 68])
INTO = torch.tensor([5, 0, 2], dtype=torch.int32)
DTYPES = torch.float32, torch.bfloat16, torch.float16
CASES = [(name, dtype) for name in sorted(PRESETS) for dtype in DTYPES]
LAYERS = CALLS = 2
if runtime.is_interpreted():  # a kernel takes seconds there
    CASES = list(zip(("quarot-4", "b2", "qjl-2"), DTYPES, strict=True))
    LAYERS = CALLS = 1


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


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_pages_hold_what_each_codec_makes(backend, name, dtype, generator):
    codecs = _codecs(name)
    slots, jobs = _slots(generator), []
    for codec in codecs * LAYERS:
        jobs.append(codec.job(_exact(generator, dtype), _fields(codec), f"tokens {len(jobs)}"))
    for _ in range(CALLS):  # the second with what the first call has made
        ops.encode(jobs, slots, FIRST, INTO)
        for codec, job in zip(codecs * LAYERS, jobs, strict=True):
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
