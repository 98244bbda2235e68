"""What every op promises on every backend: decode is what a form says, and neither threads nor forks change a bit."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from method_cases import float64, without_statistics
from qjl import ops
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.ops.forms import NibbleForm
from qjl.ops.triton import runtime
from qjl.packed import BLOCK
from random_forms import Maker, decoded, mean_at, sides

pytest_plugins = "guarded"
pytestmark = pytest.mark.usefixtures("backend")
EXAMPLES = 5 if runtime.is_interpreted() else 40
sizes = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 4))  # batch, heads, blocks


@settings(max_examples=EXAMPLES)
@given(sides, sizes, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_decode_is_what_the_form_says(guarded, side, size, heads_share, has_turn, seed):
    """Any form, in blocks of a cache that has room to grow."""
    batch, heads, count = size
    make = Maker(guarded, seed)
    form = make.form(side, heads, 1 if heads_share else heads, has_turn)
    blocks = make.blocks(side, batch, heads, count)
    first = make.integers(2000, batch, count, dtype=torch.int64)
    found = ops.decode(blocks, form, first)
    expected = decoded(form, blocks) + mean_at(form, first)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape == (batch, heads, count * BLOCK, side.head_dim)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3 * max(1.0, _largest(expected)))


def test_every_logarithm_decodes_to_its_scale():
    """Code 0 to zero."""
    codes, logarithms = torch.zeros(1, 2, 4, 1, BLOCK, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)
    places, halves = torch.zeros(1, 2, 1, dtype=torch.int16), torch.full((1, 2, 16, 1), 0.5).half()
    unit = torch.tensor([0.3, 7.0])
    form = NibbleForm(None, places, halves, code_dim=1, scale="scale", unit=unit)  # every code is 1
    scale = logarithms.view(4, BLOCK).expand(1, 2, -1, -1).contiguous()
    found = ops.decode({"codes": codes, "scale": scale}, form, torch.zeros(1, 4, dtype=torch.int64))
    for head in range(2):
        expected = oracles.LogScale.decode(float64(logarithms), float64(unit[head]))
        np.testing.assert_allclose(found[0, head, :, 0], expected, rtol=1e-5)


def _largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


def _all_ops(blocks, generator):
    """Tokens through the codes of a sketch and of a grid, and back."""
    x = torch.randn(2, 3, blocks * BLOCK, 24, generator=generator)
    first = torch.arange(blocks).mul(BLOCK).repeat(2, 1)
    codecs = [without_statistics(quantizer, heads=3, head_dim=24) for quantizer in (QJL(2), QuaRot(3, 8))]

    def run():
        given = []
        for codec in codecs:
            coded = codec.encode_tokens(x, first)
            given += [*coded.values(), codec.dequantize(coded, first)]
        return given

    return run


def _same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.fixture
def threads(backend):
    if not backend.startswith("cpu"):
        pytest.skip("the threads of torch, and Triton's interpreter has one")
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(threads, generator):
    run = _all_ops(11, generator)
    alone = run()
    for count in (2, 3, 8, 200):
        threads(count)
        for _ in range(10):
            assert _same(run(), alone)


def test_calls_from_several_threads_at_once_do_not_disturb_each_other(threads, generator):
    runs = [_all_ops(4 + i, generator) for i in range(6)]
    alone = [run() for run in runs]
    threads(3)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            assert all(_same(*pair) for pair in zip(pool.map(lambda run: run(), runs), alone, strict=True))


def test_a_forked_process_computes_with_threads_of_its_own(threads, generator):
    run = _all_ops(9, generator)
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


def test_a_missing_backend_fails_loudly(refuses):
    with refuses("backend 'abacus' is not available here"):
        ops.use_backend("abacus")


def test_the_reference_is_always_there():
    assert "reference" in ops.backends()
