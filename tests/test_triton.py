"""What is special to the triton backend: pages, many query rows, what it needs, and kernels compiled without a GPU."""

from dataclasses import replace

import pytest
import torch

from conftest import Model, using_backend
from qjl import ops
from qjl.cache import CacheLayer, LayerSource
from qjl.methods.balanced import Balanced
from qjl.methods.grid import RotatedGridCodec
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.transform import Transform
from qjl.ops.forms import ExactTokens
from qjl.ops.triton import runtime

if not runtime.is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from launches import recorded
from qjl.ops.triton import decoding
from qjl.ops.triton import ops as triton_ops

interpreted = pytest.mark.skipif(not runtime.is_interpreted(), reason="kernels run here under TRITON_INTERPRET=1 alone")
compiled = pytest.mark.skipif(runtime.is_interpreted(), reason="the interpreter compiles nothing")
on_gpu = pytest.mark.skipif(
    runtime.is_interpreted() or not torch.cuda.is_available(), reason="there is no GPU on this machine"
)
CAPABILITIES = [80, 90, 100]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 2e-3}


def _operands(key, value, tokens=460, batch=1, head_dim=64, group=2, dtype=torch.float32, device="cpu"):
    """Query rows of the last token, packed tokens, exact tokens, and all queries."""
    model = Model(head_dim=head_dim, group=group)
    layer = CacheLayer(key, value, source=LayerSource(rope=model.rope))
    made = model.tokens(torch.arange(tokens).expand(batch, -1))
    with using_backend("reference"):
        layer.append(made.keys.to(dtype).to(device), made.values.to(dtype).to(device))
        if layer.wants_queries:
            layer.observe(made.queries.to(device), made.queries.to(device))
        layer.settle()
    exact, packed = layer.segments()
    rows = made.queries[:, :, -1:].reshape(batch, 2, group, head_dim).contiguous().to(device)
    return rows, packed, [ExactTokens(part.keys, part.values, None) for part in exact]


def _expected(rows, packed, exact, lengths, scaling):
    """Attention in double precision over the first ``lengths`` packed tokens of each row, and the exact ones."""
    with using_backend("reference"):
        keys = packed.key_codec.dequantize(packed.keys, packed.first)
        values = packed.value_codec.dequantize(packed.values, packed.first)
    keys = torch.cat([keys, *(part.keys for part in exact)], 2).double()
    values = torch.cat([values, *(part.values for part in exact)], 2).double()
    hidden = torch.arange(packed.blocks * 64) >= lengths[:, None].cpu()
    hidden = torch.nn.functional.pad(hidden, (0, keys.shape[2] - hidden.shape[1])).to(keys.device)
    scores = (rows.double() @ keys.transpose(2, 3) * scaling).masked_fill(hidden[:, None, None], -torch.inf)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def _paged(packed, page, lengths, generator):
    """The same tokens in pages that lie in no order, in a pool with room that nobody uses."""
    batch, blocks = packed.first.shape
    per_row = blocks * 64 // page
    table = torch.randperm(batch * per_row + 3, generator=generator)[: batch * per_row].view(batch, per_row)
    device = packed.first.device

    def pool(fields):
        return {name: scattered(field) for name, field in fields.items()}

    def scattered(field):
        tokens = field.movedim(2, -2).flatten(-2)  # [B, H, ..., T]
        pages = tokens.unflatten(-1, (per_row, page)).movedim(-2, 1).flatten(0, 1)
        pool = pages.new_empty((batch * per_row + 3, *pages.shape[1:]))
        pool[table.flatten().to(device)] = pages
        return pool

    operand, pools = packed.as_operand, (pool(packed.keys), pool(packed.values))
    table = table.int().to(device)
    table[torch.arange(per_row, device=device) * page >= lengths[:, None]] = 2**30  # must not be read
    return decoding.PagedTokens(*pools, operand.key_form, operand.value_form, table, lengths, packed.first[:, 0])


def _check_pages(page, device, generator, key, value, dtype=torch.float32):
    rows, packed, exact = _operands(key, value, 460, batch=2, dtype=dtype, device=device)
    lengths = torch.tensor([64 * packed.blocks, 101], dtype=torch.int32, device=device)
    pages = _paged(packed, page, lengths, generator)
    out, lse = decoding.attend_paged(rows, pages, None, exact, 1, 0.125, 0.0)
    expected, expected_lse = _expected(rows, packed, exact, lengths, 0.125)
    assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < TOLERANCE[dtype]
    assert (lse - expected_lse).abs().max() < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_pages(page, generator):
    _check_pages(page, "cpu", generator, Transform(3), Balanced(2, "trellis", metric=False))


@interpreted
def test_pages_of_groups(generator):
    _check_pages(16, "cpu", generator, QuaRot(3, 32), QuaRot(2, 16))


@interpreted
def test_a_row_without_tokens_weighs_nothing(generator):
    rows, packed, exact = _operands(Transform(2), Balanced(2, metric=False), 396)
    pages = _paged(packed, 32, torch.zeros(1, dtype=torch.int32), generator)
    out, lse = decoding.attend_paged(rows, pages, None, [], 1, 0.125, 0.0)
    assert not out.any()
    assert (lse == -torch.inf).all()
    out, _ = decoding.attend_paged(rows, pages, None, exact, 1, 0.125, 0.0)
    expected, _ = _expected(rows, packed, exact, pages.lengths, 0.125)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("count", [17, 70])
def test_many_query_rows(count, generator):
    """As many as a chunk of a prompt has; the last tile is not full."""
    _, packed, exact = _operands(Transform(2), Balanced(2, "trellis", metric=False), 396)
    rows = torch.randn(1, 2, count, 64, generator=generator)
    out, _ = decoding.attend(rows, packed.as_operand, None, exact, count, 0.125, 0.0)
    expected, _ = _expected(rows, packed, exact, torch.tensor([64 * packed.blocks]), 0.125)
    assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-4


@compiled
def test_room_does_not_grow_with_the_context(monkeypatch):
    shapes = []
    for tokens in (3000, 6000):
        rows, packed, exact = _operands(QuaRot(2), QuaRot(2), tokens, batch=4)
        with recorded(monkeypatch) as launches:
            decoding.attend(rows, packed.as_operand, None, exact, 1, 0.125, 0.0)
        shapes.append([launch.args[0].out.shape for launch in launches if launch.name == "join"])
    assert shapes[0] == shapes[1]


# Without a GPU


CASES = {
    "b3": (Transform(3), Balanced(2, "trellis", metric=False), torch.bfloat16, 64),
    "b2-float32": (Transform(2), Balanced(2, "trellis", metric=False), torch.float32, 64),
    "groups": (QuaRot(3, 32), QuaRot(2, 32), torch.float16, 80),
}


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_the_step_compiles(case, capability, monkeypatch, generator):
    key, value, dtype, head_dim = CASES[case]
    rows, packed, exact = _operands(key, value, 396, head_dim=head_dim, dtype=dtype)
    exact = [replace(exact[0], bias=torch.zeros(1, 1, 1, exact[0].keys.shape[2])), *exact[1:]]
    pages = _paged(packed, 16, torch.tensor([300], dtype=torch.int32), generator)
    with recorded(monkeypatch) as launches:
        decoding.attend(rows, packed.as_operand, None, exact, 1, 0.125, 0.0)
        decoding.attend_paged(rows, pages, None, [], 1, 0.125, 5.0)
    assert {launch.name for launch in launches} == {"project", "packed_part", "exact_part", "join"}
    _compile(launches, capability)


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chunk_of_a_prompt_fits_at_the_largest_head_dim(dtype, capability, monkeypatch):
    _, packed, exact = _operands(
        Transform(3), Balanced(2, "trellis", metric=False), 396, head_dim=256, group=1, dtype=dtype
    )
    with recorded(monkeypatch) as launches:
        decoding.attend(torch.zeros(1, 2, 64, 256), packed.as_operand, None, exact[:1], 64, 0.125, 0.0)
    _compile(launches, capability)


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_operations_on_codes_compile(capability, monkeypatch):
    codes, nibbles = torch.zeros(1, 2, 1, 8, 64, dtype=torch.uint8), torch.zeros(1, 2, 64, 16, dtype=torch.uint8)
    with recorded(monkeypatch) as launches:
        triton_ops.pack(nibbles)
        triton_ops.unpack(codes)
        triton_ops.scan(torch.zeros(1, 2, 3, 16, 16), codes)
        triton_ops.expand(torch.zeros(2, 16, 16, 3), codes)
    assert len(launches) == 4
    _compile(launches, capability)


ENCODERS = {
    "levels": (Transform(3), torch.bfloat16),
    "trellis and levels": (Balanced(3.5, "trellis"), torch.float32),
    "signs": (Balanced(2, "signs"), torch.bfloat16),
    "sketch": (QJL(2, "hadamard"), torch.float16),
    "grid": (QuaRot(3, 32), torch.bfloat16),
}


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoders_compile(name, capability, fitted, monkeypatch):
    quantizer, dtype = ENCODERS[name]
    codec = fitted("key", quantizer, 64).codec
    tokens = torch.zeros(1, 2, 64, 64, dtype=dtype)
    with recorded(monkeypatch) as launches:
        if isinstance(codec, RotatedGridCodec):
            triton_ops.encode_grid(tokens, codec.recipe)
        else:
            turn = codec.mean.turn(torch.arange(64)[None]) if codec.mean else None
            triton_ops.encode(tokens, codec.recipe, turn)
    _compile(launches, capability)


MOST_SHARED = 163 * 1024  # bytes that compute capability 8.0 gives a program, and later ones more


def _compile(launches, capability):
    for launch in launches:
        kernel = launch.compiled(capability)
        assert f".target sm_{capability}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= MOST_SHARED


# On a GPU


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page", [16, 128])
def test_pages_on_a_gpu(page, dtype, generator):
    _check_pages(page, "cuda", generator, Transform(3), Balanced(2, "trellis", metric=False), dtype)


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_captured_graph_serves_other_lengths(dtype, generator):
    rows, packed, exact = _operands(Transform(2), Balanced(2, metric=False), 396, batch=2, dtype=dtype, device="cuda")
    lengths = torch.tensor([320, 101], dtype=torch.int32, device="cuda")
    pages = replace(_paged(packed, 64, torch.full_like(lengths, 320), generator), lengths=lengths)
    decoding.attend_paged(rows, pages, None, exact, 1, 0.125, 0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decoding.attend_paged(rows, pages, None, exact, 1, 0.125, 0.0)
    for now in ([320, 101], [7, 256]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        expected, _ = _expected(rows, packed, exact, lengths, 0.125)
        assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < TOLERANCE[dtype]


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
def test_tensors_on_a_cpu_are_not_taken(refuses, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = ops.active_backend()
    ops.use_backend("triton")
    try:
        with refuses("the triton backend takes tensors on a GPU"):
            ops.unpack(torch.zeros(1, 1, 1, 1, 64, dtype=torch.uint8))
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
