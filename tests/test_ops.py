"""Every op against its equation, written as loops, on every backend and instruction set."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from qjl import ops
from qjl.ops import reference
from qjl.ops.triton import runtime

SHAPES = [
    (1, 1, 1, 2),
    (2, 3, 1, 16),
    (1, 2, 3, 50),
    (3, 1, 2, 6),
    (1, 1, 2, 34),
    (1, 2, 1, 128),
    (0, 2, 3, 8),
    (1, 2, 0, 8),
]  # B, H, blocks, nibbles

pytestmark = pytest.mark.usefixtures("backend")


def _nibbles(shape, generator):
    batch, heads, blocks, nibbles = shape
    size = (batch, heads, 64 * blocks, nibbles)
    return torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)


def _tables(shape, rows, generator):
    batch, heads, _, nibbles = shape
    return torch.randn(batch, heads, rows, nibbles, 16, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_puts_two_nibbles_in_a_byte_low_first_and_tokens_last(shape, generator):
    nibbles = _nibbles(shape, generator)
    codes = ops.pack(nibbles)
    batch, heads, blocks, count = shape
    assert codes.shape == (batch, heads, blocks, count // 2, 64)
    assert codes.is_contiguous()
    token_major = codes.numpy().transpose(0, 1, 2, 4, 3).reshape(batch, heads, 64 * blocks, count // 2)
    assert (token_major == nibbles.numpy()[..., 0::2] + 16 * nibbles.numpy()[..., 1::2]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_is_the_inverse_of_pack(shape, generator):
    nibbles = _nibbles(shape, generator)
    assert torch.equal(ops.unpack(ops.pack(nibbles)), nibbles)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3] if runtime.is_interpreted() else [1, 2, 3, 5, 12])
def test_scan_sums_one_table_entry_per_nibble(shape, rows, generator):
    nibbles, tables = _nibbles(shape, generator), _tables(shape, rows, generator)
    picked = np.take_along_axis(
        tables.double().numpy()[:, :, :, None], nibbles.numpy()[:, :, None, :, :, None].astype(int), axis=5
    )
    scores = ops.scan(tables, ops.pack(nibbles))
    assert scores.shape == (*shape[:2], rows, nibbles.shape[2])
    np.testing.assert_allclose(scores.numpy(), picked[..., 0].sum(-1), atol=1e-5 * np.abs(picked).max(initial=1) * 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 3] if runtime.is_interpreted() else [1, 2, 3, 4, 5, 8])
def test_expand_looks_up_every_entry(shape, width, generator):
    nibbles = _nibbles(shape, generator)
    _, heads, _, count = shape
    entries = torch.randn(heads, count, 16, width, generator=generator).half()
    expanded = ops.expand(entries, ops.pack(nibbles)).unflatten(3, (count, width))
    assert expanded.dtype == torch.float32
    for head in range(heads):
        for j in range(count):
            assert torch.equal(expanded[:, head, :, j], entries[head, j].float()[nibbles[:, head, :, j].long()])


def test_heads_may_share_their_entries(generator):
    codes = ops.pack(_nibbles((2, 3, 1, 8), generator))
    entries = torch.randn(1, 8, 16, 2, generator=generator).expand(3, -1, -1, -1)
    assert torch.equal(ops.expand(entries, codes), ops.expand(entries.contiguous(), codes))


TILES = {
    "blocks": lambda codes: codes[:, :, 1:4],
    "heads": lambda codes: codes[:, 1:],
    "every other row": lambda codes: codes[::2],
    "bytes": lambda codes: codes[:, :, :, 1:3],
    "heads and rows exchanged": lambda codes: codes.transpose(0, 1),
}


@pytest.mark.parametrize("name", TILES)
def test_codes_of_a_tile_need_not_be_contiguous(name, generator):
    tile = TILES[name](ops.pack(_nibbles((3, 2, 5, 8), generator)))
    assert not tile.is_contiguous()
    batch, heads, _, count, _ = tile.shape
    tables = _tables((batch, heads, 0, 2 * count), 3, generator)
    entries = torch.randn(heads, 2 * count, 16, 2, generator=generator)
    whole = tile.contiguous()
    assert torch.equal(ops.unpack(tile), ops.unpack(whole))
    assert torch.equal(ops.scan(tables, tile), ops.scan(tables, whole))
    assert torch.equal(ops.expand(entries, tile), ops.expand(entries, whole))


def test_tables_entries_and_nibbles_need_not_be_contiguous(generator):
    shape = (2, 3, 2, 6)
    nibbles, tables = _nibbles(shape, generator), _tables(shape, 4, generator)
    entries = torch.randn(3, 6, 16, 2, generator=generator)
    codes = ops.pack(nibbles)
    assert torch.equal(ops.pack(_restrided(nibbles)), codes)
    assert torch.equal(ops.scan(_restrided(tables), codes), ops.scan(tables, codes))
    assert torch.equal(ops.expand(_restrided(entries), codes), ops.expand(entries, codes))


def _restrided(x):
    """The same numbers, laid out the other way round."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _all_ops(shape, rows, generator):
    nibbles, tables = _nibbles(shape, generator), _tables(shape, rows, generator)
    entries = torch.randn(shape[1], shape[3], 16, 2, generator=generator)

    def run():
        codes = ops.pack(nibbles)
        return codes, ops.unpack(codes), ops.scan(tables, codes), ops.expand(entries, codes)

    return run


def _same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.fixture
def threads(backend):
    if backend == "triton":
        pytest.skip("Triton's interpreter has one thread")
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(threads, generator):
    run = _all_ops((2, 3, 11, 10), 5, generator)
    alone = run()
    for count in (2, 3, 8, 200):
        threads(count)
        for _ in range(20):
            assert _same(run(), alone)


def test_calls_from_several_threads_at_once_do_not_disturb_each_other(threads, generator):
    runs = [_all_ops((1, 2, 4 + i, 10), 3, generator) for i in range(6)]
    alone = [run() for run in runs]
    threads(3)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            assert all(_same(*pair) for pair in zip(pool.map(lambda run: run(), runs), alone, strict=True))


def test_a_forked_process_computes_with_threads_of_its_own(backend, threads, generator):
    if backend == "reference":
        pytest.skip("torch's own threads do not survive a fork")
    run = _all_ops((1, 2, 9, 10), 3, generator)
    threads(4)
    before = run()

    def compute():
        assert _same(run(), before)

    child = multiprocessing.get_context("fork").Process(target=compute)
    child.start()
    child.join(timeout=120)
    child.kill()
    assert child.exitcode == 0
    assert _same(run(), before)


def test_tensors_that_are_not_on_a_cpu_meet_the_reference():
    codes = torch.zeros(1, 2, 3, 4, 64, dtype=torch.uint8, device="meta")
    assert ops.unpack(codes).shape == (1, 2, 192, 8)


def test_offered_are_the_ops_that_a_backend_has(monkeypatch):
    tensor = torch.zeros(1)
    assert ops.offers("scan", tensor)
    assert not ops.offers("divine", tensor)
    monkeypatch.setattr(reference, "divine", None, raising=False)
    assert ops.offers("divine", tensor.to("meta"))


def test_a_missing_backend_fails_loudly(refuses):
    with refuses("backend 'abacus' is not available here"):
        ops.use_backend("abacus")


def test_the_reference_is_always_there():
    assert "reference" in ops.backends()
