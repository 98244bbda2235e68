"""What is special to the triton backend: many query rows, what it needs, and kernels compiled without a GPU."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import using_backend
from pages import Extent, error, expected, operands, paged
from qjl import ops
from qjl.methods.balanced import Balanced
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.transform import Transform
from qjl.ops.reference import TILE_BLOCKS
from qjl.ops.triton import runtime

if not runtime.is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from qjl.lab.bench.launches import recorded
from qjl.ops.forms import NibbleForm
from qjl.ops.triton import attention
from qjl.ops.triton import ops as triton_ops
from qjl.ops.triton import step as triton_step
from qjl.ops.triton.slots import key_words

interpreted = pytest.mark.skipif(not runtime.is_interpreted(), reason="kernels run here under TRITON_INTERPRET=1 alone")
compiled = pytest.mark.skipif(runtime.is_interpreted(), reason="the interpreter compiles nothing")
on_gpu = pytest.mark.skipif(
    runtime.is_interpreted() or not torch.cuda.is_available(), reason="there is no GPU on this machine"
)
CAPABILITIES = [89, 100]  # 8.0 and 9.0 are compiled by test_ptx.py
MOST_SHARED = {89: 99, 100: 227}  # KiB that a program may have
TRELLIS = Balanced(2, "trellis", metric=False)
TOLERANCE = 2e-3


@interpreted
@pytest.mark.parametrize("count", [17, 70])
def test_many_query_rows(count, generator):
    """As many as a chunk of a prompt has; the last tile is not full."""
    made = operands(Transform(2), TRELLIS, 396)
    made = replace(made, queries=torch.randn(1, 2, count, 64, generator=generator))
    extent = Extent.of([64 * made.packed.blocks])
    with using_backend("triton"):
        out, _ = paged(made, 64, extent, generator).attend()
    truth, _ = expected(made, extent)
    assert error(out, truth) < TOLERANCE


@compiled
def test_room_does_not_grow_with_the_context(generator):
    shapes = []
    for tokens in (3000, 6000):
        made = operands(QuaRot(2), QuaRot(2), tokens, batch=4)
        step = paged(made, 64, Extent.of([tokens - 100] * 4), generator)
        with recorded() as launches:
            triton_ops.attend(*_operands(step), 1, 0.125, 0.0, None)
        shapes.append([launch.args[0].out.shape for launch in launches if launch.name == "join"])
    assert shapes[0] == shapes[1]


@compiled
def test_no_length_makes_another_kernel(generator):
    """So that nothing is compiled in the middle of an answer."""
    made = operands(Transform(2), TRELLIS, 396, batch=2, dtype=torch.bfloat16)
    variants = {"prepare": set(), "step": set()}
    for pages, slots in ((1, 1), (2, 16), (16, 17), (63, 48), (512, 100)):
        step = paged(made, 64, Extent.of([64, 64]), generator)
        step.rows.table = torch.zeros(2, pages, dtype=torch.int32)
        step.rows.slots = torch.zeros(2, slots, dtype=torch.int32)
        with recorded(132) as launches:
            triton_ops.attend(*_operands(step), 1, 0.125, 0.0, None)
        for launch in launches:
            variants[launch.name].add(launch.variant(90))
    assert [len(of_kernel) for of_kernel in variants.values()] == [1, 1]


def test_two_coordinates_of_a_nibble_may_have_the_same_table(generator):
    """Up to a factor: each is looked up."""
    entries = torch.randn(1, 6, 16, 1, generator=generator)
    form = NibbleForm(None, torch.arange(12).view(1, 6, 2), torch.cat([entries, 2 * entries], -1), 12, "scale")
    words = key_words(form)
    tables = words.tables.numpy().view(np.uint8).reshape(-1, 4, 2, 2, 16)
    nibbles = torch.randint(16, (6,), generator=generator).numpy()
    found = np.zeros(12)
    for chunk, half, look_up, word, nibble in np.ndindex(words.coordinates.shape[1:]):
        coordinate = words.coordinates[0, chunk, half, look_up, word, nibble]
        if coordinate >= 0:
            row = words.rows[0, 4 * chunk + word, 2 * half + nibble // 2]
            entry = tables[chunk, word, half, look_up][nibbles[2 * row + nibble % 2]]
            found[coordinate] += words.factors[0, chunk, half, look_up, word, nibble] * (float(entry) - 64)
    truth = form.entries[0, range(6), nibbles].flatten().numpy()
    np.testing.assert_allclose(found, truth, atol=2e-3)


def test_means_that_turn_otherwise_than_by_rope_are_left_to_the_other_step(generator):
    """As 32 functions do not hold frequencies that lie evenly."""
    step = paged(operands(Transform(2), TRELLIS, 396), 64, Extent.of([64]), generator)
    assert triton_step.serves(step.pool)
    form = step.pool.key_form
    even = replace(form, turn=replace(form.turn, inv_freq=torch.linspace(0, 3, 32)), derived={})
    assert not triton_step.serves(replace(step.pool, key_form=even))


def test_what_a_gpu_has_no_room_for_is_told(refuses, monkeypatch, generator):
    def no_room(*args):
        raise OutOfResources(114688, 101376, "shared memory")

    monkeypatch.setattr(attention, "attend", no_room)
    made = operands(QuaRot(3, 32), QuaRot(2, 32), 396)
    with refuses("a kernel for these codes needs 114688 of shared memory, where this GPU has 101376: use half"):
        triton_ops.attend(*_operands(paged(made, 64, Extent.of([64]), generator)), 1, 0.125, 0.0, None)


# Without a GPU


def _operands(step):
    return step.query, step.pool, step.exact, step.rows


def _fresh(step):
    """One token of each row, and its queries, for ``append_attend``."""
    batch, heads, count, dim = step.query.shape
    dtype = step.exact.keys.dtype
    keys, values = torch.zeros(2, batch, heads, 1, dim, dtype=dtype)
    return torch.zeros(batch, heads * count, 1, dim, dtype=dtype), keys, values


CASES = {
    "b3": (Transform(3), TRELLIS, torch.bfloat16, 64),
    "b2-float32": (Transform(2), TRELLIS, torch.float32, 64),
    "groups": (QuaRot(3, 32), QuaRot(2, 32), torch.float16, 80),
}


@compiled
@pytest.mark.parametrize(
    ("case", "capability"), [("b3", 89), ("b3", 100), ("b2-float32", 100), ("groups", 89), ("groups", 100)]
)
def test_the_step_compiles(case, capability, generator):
    key, value, dtype, head_dim = CASES[case]
    made = operands(key, value, 396, head_dim=head_dim, dtype=dtype)
    extent = Extent.of([300], [4])
    step, alone = (paged(made, page, extent, generator, has_exact) for page, has_exact in ((64, True), (16, False)))
    bias = torch.zeros(1, 1, 1, step.rows.table.shape[1] * 64 + step.rows.slots.shape[1])
    with recorded() as launches:
        triton_ops.attend(*_operands(step), 1, 0.125, 0.0, bias)
        triton_ops.attend(*_operands(alone), 1, 0.125, 5.0, None)
        query, keys, values = _fresh(step)
        triton_ops.append_attend(query, keys, values, *_operands(step)[1:], 0.125, 0.0)
    in_groups = {"put", "project", "packed_part", "exact_part", "join"}
    assert {launch.name for launch in launches} == (in_groups if case == "groups" else {"prepare", "step"})
    _compile(launches, capability)


@compiled
@pytest.mark.parametrize(("key", "value"), [(Transform(3), TRELLIS), (QuaRot(3, 32), QuaRot(2, 32))])
def test_a_chunk_of_a_prompt_fits_at_the_largest_head_dim(key, value, generator):
    made = operands(key, value, 396, head_dim=256, group=1, dtype=torch.bfloat16)
    step = paged(replace(made, queries=torch.zeros(1, 2, 64, 256)), 64, Extent.of([300]), generator)
    with recorded() as launches:
        triton_ops.attend(*_operands(step), 64, 0.125, 0.0, None)
    _compile(launches, 89)


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("quantizer", [Transform(3), QuaRot(3, 32)])
def test_decode_compiles(quantizer, capability, fitted):
    case = fitted("key", quantizer, 64)
    with recorded() as launches:
        triton_ops.decode(case.blocks, case.codec.form, case.first)
    assert [launch.name for launch in launches] == ["_decode"]
    _compile(launches, capability)


ENCODERS = {
    "b3 keys": ("key", Transform(3), torch.bfloat16, ["encode"]),
    "b3 values": ("value", TRELLIS, torch.bfloat16, ["encode"]),
    "trellis and levels": ("key", Balanced(3.5, "trellis"), torch.float32, ["encode"]),
    "sketch": ("key", QJL(2, "hadamard"), torch.float16, ["encode"]),
    "groups": ("value", QuaRot(3, 32), torch.bfloat16, ["encode_on_grids"]),
    "refined signs": ("key", Balanced(2, "signs"), torch.bfloat16, ["map_tokens", "code_tokens"]),
}


def _encode(name, fitted, jobs=1, blocks=1):
    """Blocks of one side to their pages, once for each job."""
    role, quantizer, dtype, _ = ENCODERS[name]
    codec = fitted(role, quantizer, 64).codec
    fields = {name: torch.zeros(1, 2, *field.shape, dtype=field.dtype) for name, field in codec.layout.items()}
    job = codec.job(torch.zeros(64, 2, 64, dtype=dtype), fields, "tokens")
    slots, pages = torch.arange(64, dtype=torch.int32).repeat(blocks), torch.zeros(blocks, dtype=torch.int32)
    return partial(triton_ops.encode, [job] * jobs, slots, pages.long(), pages)


def _launches(encode):
    with recorded() as launches:
        encode()
    return launches


@compiled
@pytest.mark.parametrize("name", ENCODERS)
def test_a_side_is_encoded_in_one_launch_or_two(name, fitted):
    """The keys or values of one layer, as long as their blocks are encoded at once."""
    names = ENCODERS[name][3]
    for blocks, times in ((1, 1), (TILE_BLOCKS, 1), (TILE_BLOCKS + 1, 2)):
        launches = _launches(_encode(name, fitted, blocks=blocks))
        assert [launch.name for launch in launches] == names * times


class _Operations(TorchDispatchMode):
    """The names of torch's operations that would launch something on a GPU."""

    FREE = ("new_empty", "split")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.FREE:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@compiled
@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "refined signs"])
def test_around_the_launches_of_encode_there_is_one_operation_of_torch(name, fitted):
    """Which makes the flags; what kernels know of a recipe is made once."""
    encode = _encode(name, fitted, jobs=3, blocks=2 * TILE_BLOCKS)
    _launches(encode)
    with _Operations() as seen:
        _launches(encode)
    assert seen.names == ["ones"]


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoders_compile(name, capability, fitted):
    _compile(_launches(_encode(name, fitted)), capability)


def _compile(launches, capability):
    for launch in launches:
        kernel = launch.compiled(capability)
        assert f".target sm_{capability}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= MOST_SHARED[capability] * 1024


# On a GPU


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page", [16, 128])
def test_pages_on_a_gpu(page, dtype, generator):
    made = operands(Transform(3), TRELLIS, batch=2, dtype=dtype, device="cuda")
    extent = Extent.of([64 * made.packed.blocks, 101], [0, 4], device="cuda")
    out, lse = paged(made, page, extent, generator).attend()
    truth, true_lse = expected(made, extent)
    assert error(out, truth) < TOLERANCE
    assert (lse - true_lse).abs().max() < TOLERANCE


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_captured_graph_serves_other_lengths(dtype, generator):
    made = operands(Transform(2), TRELLIS, 396, batch=2, dtype=dtype, device="cuda")
    now = Extent.of([320, 320], device="cuda")
    step = paged(made, 64, now, generator)
    step.attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step.attend()
    for lengths, skip in ([320, 101], [4, 0]), ([7, 256], [0, 70]):
        now.lengths.copy_(torch.tensor(lengths))
        now.skip.copy_(torch.tensor(skip))
        graph.replay()
        truth, _ = expected(made, now)
        assert error(out, truth) < TOLERANCE


# What it needs


@compiled
def test_without_a_gpu_it_says_what_it_needs(refuses, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refuses("the triton backend needs a GPU, or TRITON_INTERPRET=1"):
        ops.use_backend("triton")
    assert "triton" not in ops.backends()


def test_without_triton_it_says_so(refuses, monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with refuses("the triton backend needs Triton: run `pip install triton`."):
        ops.use_backend("triton")


@compiled
def test_tensors_on_a_cpu_are_not_taken(refuses, monkeypatch, fitted):
    case = fitted("key", QuaRot(3, 32), 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = ops.active_backend()
    ops.use_backend("triton")
    try:
        with refuses("the triton backend takes tensors on a GPU"):
            ops.decode(case.blocks, case.codec.form, case.first)
    finally:
        ops.use_backend(before)


@pytest.mark.parametrize("chosen", ["reference", "cpu"])
def test_which_backend_a_gpu_meets(chosen, monkeypatch):
    monkeypatch.setattr(runtime, "is_usable", lambda: True)
    monkeypatch.setattr(ops, "_chosen", chosen)
    ops._automatic_on_gpu.cache_clear()
    assert ops.backend_of(torch.device("cuda")) == ("reference" if chosen == "reference" else "triton")
    assert ops.backend_of(torch.device("meta")) == "reference"
    ops._automatic_on_gpu.cache_clear()


def test_without_triton_a_gpu_meets_the_reference_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(runtime, "is_usable", lambda: False)
    monkeypatch.setattr(ops, "_chosen", "cpu")
    ops._automatic_on_gpu.cache_clear()
    assert [ops.backend_of(torch.device("cuda")) for _ in range(3)] == ["reference"] * 3
    assert caplog.text.count("Triton is not installed") == 1
    ops._automatic_on_gpu.cache_clear()
