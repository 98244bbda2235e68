"""What real models and engines ask of a GPU: at full size on one, and at small size under the interpreter."""

from dataclasses import replace

import pytest
import torch

from conftest import Model, Tokens, using_backend
from one_layer import OneLayer
from pages import Extent, Operands, error, exact_tokens, expected, operands, packed_rows, paged
from qjl import ops
from qjl.methods.balanced import Balanced
from qjl.methods.transform import Transform
from qjl.ops.triton import runtime

if not runtime.is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.skipif(
    not runtime.is_interpreted() and not torch.cuda.is_available(),
    reason="there is no GPU on this machine, and TRITON_INTERPRET=1 is not set",
)
ON_GPU = torch.cuda.is_available() and not runtime.is_interpreted()
DEVICE = "cuda" if ON_GPU else "cpu"
LONG = 32768 if ON_GPU else 450
ROWS = 32 if ON_GPU else 4
TRELLIS = Balanced(2, "trellis", metric=False)
TOLERANCE = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 2e-3)  # half of the budget of these codes
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE if ON_GPU else [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def triton():
    with using_backend("triton"):
        yield


def _error(made, step, extent):
    out, _ = step.attend()
    truth, _ = expected(made, extent)
    return error(out, truth)


def _long(dtype):
    """``LONG`` tokens: those of a short prompt again and again, each block at a position of its own."""
    made = operands(Transform(3), TRELLIS, dtype=dtype, device=DEVICE)
    packed, times = made.packed, -(-LONG // (64 * made.packed.blocks))
    keys, values = (
        {name: torch.cat([x] * times, dim=2) for name, x in side.items()} for side in (packed.keys, packed.values)
    )
    first = 64 * torch.arange(times * packed.blocks, device=DEVICE)[None]
    return replace(made, packed=replace(packed, keys=keys, values=values, first=first))


@every_dtype
def test_long_contexts(dtype, generator):
    made = _long(dtype)
    extent = Extent.of([64 * made.packed.blocks], [4], device=DEVICE)
    assert _error(made, paged(made, 64, extent, generator), extent) < TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize("page", [16, 64])
def test_ragged_batches(page, dtype, generator):
    """From no packed token to all that there are, in rows that read the same pages."""
    made = operands(Transform(2), TRELLIS, 4096 if ON_GPU else 300, dtype=dtype, device=DEVICE)
    most = 64 * made.packed.blocks
    lengths = [most * row // (ROWS - 1) for row in range(ROWS)]
    extent = Extent.of(lengths, [min(4, length) for length in lengths], [0] * ROWS, device=DEVICE)
    assert _error(made, paged(made, page, extent, generator), extent) < TOLERANCE[dtype]


def _with_mean(side, mean, dtype):
    """Keys with a mean of this size before RoPE, which turns it, or values with one."""
    model = Model(head_dim=64)
    count = 4096 if ON_GPU else 300
    made = model.first_tokens(count)
    generator = torch.Generator().manual_seed(2)
    added = (mean * torch.randn(1, model.heads, 1, 64, generator=generator)).expand_as(made.keys)
    keys, values = made.keys, made.values
    if side == "keys":
        keys = keys + model.rope.rotate(added, torch.arange(count)[None])
    else:
        values = values + added
    held = Tokens(*(x.to(DEVICE, dtype) for x in (keys, values)), made.queries.to(DEVICE), made.rope)
    layer = OneLayer(Transform(3), TRELLIS, rope=model.rope)
    with using_backend("reference"):
        layer.step(held, slice(None))
    queries = made.queries[:, :, -1:].reshape(1, model.heads, model.group, 64).contiguous().to(DEVICE)
    return Operands(queries, packed_rows(layer), exact_tokens(layer))


@every_dtype
@pytest.mark.parametrize("mean", [1e2, 1e3])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_large_means(side, mean, dtype, generator):
    """Scores are scaled so that many tokens count."""
    made = _with_mean(side, mean, dtype)
    extent = Extent.of([64 * made.packed.blocks], [4], device=DEVICE)
    scaling = 1 / mean if side == "keys" else 0.125
    out, _ = paged(made, 64, extent, generator).attend(scaling=scaling)
    truth, _ = expected(made, extent, scaling=scaling)
    assert error(out, truth) < TOLERANCE[dtype]


def _captured(work):
    """What does the work again: on a GPU a graph of it, which was captured."""
    work()
    if not ON_GPU:
        return work
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.append(work())

    def replay():
        graph.replay()
        return kept[0]

    return replay


@pytest.mark.parametrize("dtype", TOLERANCE if ON_GPU else [torch.bfloat16], ids=str)
def test_a_graph_stores_and_reads_fresh_tokens(dtype, generator):
    """One graph serves steps that differ in fresh tokens, queries and lengths, as an engine replays it."""
    made = _long(dtype)
    most = 64 * made.packed.blocks
    extent = Extent.of([most] * 2, [4, 4], [0, 0], device=DEVICE)
    step = paged(made, 64, extent, generator)
    spare = set(range(step.exact.keys.shape[0])) - set(step.rows.slots.flatten().tolist())
    step.rows.slots[:, -1] = torch.tensor(sorted(spare)[:2])
    query = step.query.flatten(1, 2)[:, :, None].to(dtype).contiguous()
    keys, values = torch.zeros(2, 2, 2, 1, 64, dtype=dtype, device=DEVICE)
    again = _captured(
        lambda: ops.append_attend(query, keys, values, step.pool, step.exact, step.rows, 0.125, 0.0).clone()
    )
    for lengths in ([most, 7], [101, most]):
        extent.lengths.copy_(torch.tensor(lengths))
        for given in (query, keys, values):
            given.copy_(torch.randn(given.shape, generator=generator))
        out = again()
        with using_backend("reference"):
            truth = ops.append_attend(query.float(), keys, values, step.pool, step.exact, step.rows, 0.125, 0.0)
        assert error(out.float(), truth) < 2 * TOLERANCE[dtype] + torch.finfo(dtype).eps
