"""What real models and engines ask of a GPU: at full size on one, and at small size under the interpreter."""

from dataclasses import dataclass, replace

import pytest
import torch

from conftest import Model, Tokens, using_backend
from one_layer import OneLayer
from pages import Extent, Operands, error, exact_tokens, expected, operands, packed_rows, paged
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
LONG = 32768 if ON_GPU else 460
ROWS = 32 if ON_GPU else 4
TRELLIS = Balanced(2, "trellis", metric=False)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 2e-3}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE if ON_GPU else [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def triton():
    with using_backend("triton"):
        yield


def _error(made, step, extent):
    out, _ = step.attend()
    truth, _ = expected(made, extent)
    return error(out, truth)


@every_dtype
def test_long_contexts(dtype, generator):
    made = operands(Transform(3), TRELLIS, LONG, dtype=dtype, device=DEVICE)
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
