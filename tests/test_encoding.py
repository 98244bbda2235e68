"""encode of every backend that has kernels against what defines it: the codecs' own composition of torch operations.

Sums in another order may turn a tie over: few tokens differ, and those are coded as well as before.
"""

import pytest
import torch

from conftest import Model
from method_cases import every_head_dim, of_type, sums_of_entries, without_statistics
from qjl import ops
from qjl.codebook import NIBBLE, SignCode, joined_code, refined_sign_code, scalar_code, sign_code
from qjl.methods.balanced import Balanced
from qjl.methods.base import LayerContext
from qjl.methods.bitpacking import unpack_tokens
from qjl.methods.grid import Extremes, RotatedGridCodec, block_hadamard, block_size, grid_layout
from qjl.methods.mapped import MappedCodec
from qjl.methods.nibble import LogScale, Mean
from qjl.methods.qjl import QJL, SignCodec
from qjl.methods.quarot import QuaRot
from qjl.methods.saw import SAW
from qjl.methods.transform import GAINS, Transform
from qjl.methods.uniform import TokenUniform
from qjl.ops.reference import TILE_BLOCKS
from qjl.ops.triton import runtime
from qjl.packed import BLOCK
from qjl.rope import Rope
from qjl.sketch import Sketch, haar_rotation
from qjl.trellis import WIDTHS, even_trellis, trellis_code

pytestmark = pytest.mark.usefixtures("kernels")
CPU = torch.device("cpu")
IS_SLOW = runtime.is_interpreted()  # a thousand times
FEW = 0.005  # of the tokens
FEW_OF_FINE_CODES = 2e-4  # for each nibble, where there are more than 3 bits per coordinate: candidates lie close


def _firsts(x, start=4):
    """Positions of the first tokens of blocks: other ones in every row."""
    rows = start + 1000 * torch.arange(x.shape[0])[:, None]
    return rows + BLOCK * torch.arange(x.shape[2] // BLOCK)


def _coded(codec, x, first, blocks):
    """Tokens of unit rms in the metric of the code and what their codes stand for, float64 ``[B, H, T, D']``."""
    decoded = sums_of_entries(codec.code, unpack_tokens(blocks["codes"], NIBBLE)).double()
    positions = (first[..., None] + torch.arange(BLOCK)).flatten(1)
    residual = x.float() - (codec.mean.at(positions) if codec.mean else 0)
    z = residual.double() @ getattr(codec, "key_map", codec.query_map).double().transpose(1, 2)
    active = torch.ones(z.shape[-1]) if getattr(codec, "weights", None) is None else codec.weights[:, None]
    rms = (z * (active > 0)).square().sum(-1, keepdim=True) / (active > 0).sum(-1, keepdim=True)
    return z / rms.sqrt().clamp(min=1e-30), decoded, active.sqrt()


def _are_as_good(codec, x, first, expected, found):
    """Whether the code found is no worse than the one expected: in angle, or in distance at one of the gains.

    With several gains a tie with a third code at one of them changes which angles are compared at all, so that these
    may differ by a little more than rounding.
    """
    gains = getattr(codec, "gains", ())
    z, before, root = _coded(codec, x, first, expected)
    _, after, _ = _coded(codec, x, first, found)
    angle_before, angle_after = (_sine_squared(z * root, decoded * root) for decoded in (before, after))
    tolerance = 0.02 if isinstance(getattr(codec, "encoder", None), SignCode) else 2e-3 if len(gains) > 1 else 1e-4
    is_tie = angle_after - angle_before <= tolerance * angle_before + 2e-5
    for gain in gains:
        distances = [(gain * z - decoded).square().mean(-1) for decoded in (before, after)]
        is_tie |= (distances[1] - distances[0]).abs() <= 1e-4 * distances[0]
    return is_tie


def _sine_squared(x, y):
    return 1 - (x * y).sum(-1).square() / (x.square().sum(-1) * y.square().sum(-1)).clamp(min=1e-30)


def _check(codec, x, first):
    expected, found = codec.quantize(x, first), codec.encode_tokens(x, first)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    differs = (found["codes"] != expected["codes"]).any(3).flatten(2)
    nibbles = codec.code.nibbles
    few = FEW if nibbles * 4 <= 3 * codec.code.dim else nibbles * FEW_OF_FINE_CODES
    assert differs.sum() <= max(few * differs.numel(), 3)
    assert _are_as_good(codec, x, first, expected, found)[differs].all()
    steps = (_ordinals(found["scale"]) - _ordinals(expected["scale"])).abs().flatten(2)[~differs]
    assert not steps.numel() or steps.max() <= 1
    assert steps.count_nonzero() <= max(FEW * steps.numel(), 2)


def _ordinals(scale):
    """Scales as numbers of steps: 8-bit logarithms are that, the bits of positive floats too."""
    return scale.view(torch.int16 if scale.dtype == torch.float16 else torch.uint8).int()


# Codecs as the methods make them


NIBBLES = [*of_type(QJL, outliers=0), *of_type(Balanced), *of_type(Transform)]
GRIDS = [*of_type(QuaRot), *of_type(SAW)]


@every_head_dim
@pytest.mark.parametrize(("role", "quantizer"), NIBBLES)
def test_codes_and_scales_are_those_of_the_reference(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    assert case.codec.recipe is not None
    _check(case.codec, case.x, case.first)


@every_head_dim
@pytest.mark.parametrize(("role", "quantizer"), GRIDS)
def test_grids_are_those_of_the_reference(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    assert case.codec.recipe is not None
    _check_grid(case.codec, case.x, case.first)


def _check_grid(codec, x, first):
    expected, found = codec.quantize(x, first), codec.encode_tokens(x, first)
    assert (found["codes"] != expected["codes"]).float().mean() <= FEW
    spread = expected["step"].float()[:, :, :, :1]
    for name in ("step", "middle"):
        error = (found[name].float() - expected[name].float()).abs()
        assert (error > 0).float().mean() < 0.02
        assert (error <= 2e-3 * spread.expand_as(error) + 1e-3 * expected[name].float().abs()).all()


# Shapes, types and strides


def _scalar(dim, heads, generator):
    """Widths from 0 to 8 bits, in another order in every head."""
    widths = torch.randint(0, 9, (dim,), generator=generator)
    widths[0] = -widths[1:].sum() % 8
    return scalar_code([widths[torch.randperm(dim, generator=generator)].tolist() for _ in range(heads)])


ENCODERS = {
    "scalar": _scalar,
    "three-bits": lambda dim, heads, generator: scalar_code([[3] * dim]),
    **{f"trellis-{w}": lambda dim, heads, generator, w=w: trellis_code(dim, w) for w in WIDTHS},
    "joined": lambda dim, heads, generator: joined_code(trellis_code(dim - 4, 2), scalar_code([[2] * 4])),
    "two-trellises": lambda dim, heads, generator: joined_code(trellis_code(dim - 4, 2), trellis_code(4, 1)),
    "signs": lambda dim, heads, generator: sign_code(dim),
    "refined": lambda dim, heads, generator: refined_sign_code(Sketch(4 * dim - 8, dim).matrix),
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def _codec(encoder, dim, heads, generator, mean=None, half=True):
    code = ENCODERS[encoder](dim, heads, generator)
    rows = Sketch(4 * dim - 8, dim).matrix if encoder == "refined" else haar_rotation(dim)
    key_map = rows * (0.5 + torch.rand(heads, 1, 1, generator=generator))
    weights = None
    if encoder == "scalar":
        has_bits = code.kinds % 9 > 0
        weights = (0.1 + torch.rand(heads, dim, generator=generator)) * has_bits
    unit = 0.5 + torch.rand(heads, generator=generator)
    key_map = key_map.half() if half else key_map
    return MappedCodec(key_map, key_map, code, LogScale(unit), mean, GAINS, weights)


def _tokens(batch, heads, blocks, dim, generator):
    return torch.randn(batch, heads, blocks * BLOCK, dim, generator=generator) + 1


@every_encoder
@pytest.mark.parametrize("dim", [8, 24, 40] if IS_SLOW else [8, 16, 24, 40, 72, 136, 512])
def test_any_dimension(encoder, dim, generator):
    if encoder == "refined" and dim > 136:
        dim = 200
    codec = _codec(encoder, dim, 2, generator, half=dim % 16 == 0)
    x = _tokens(1, 2, 2, dim, generator)
    _check(codec, x, _firsts(x))


SKETCHES = [(8, 8), (40, 24)] if IS_SLOW else [(8, 8), (8, 96), (128, 64), (200, 72), (640, 512), (1000, 24)]


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "hadamard"])
@pytest.mark.parametrize(("m", "dim"), SKETCHES)
def test_signs_of_any_sketch(kind, m, dim, generator):
    sketch = Sketch(m, dim, kind)
    x = _tokens(2, 2, 1, dim, generator)
    x[..., 1] *= 10 ** torch.linspace(-3, 3, BLOCK)
    x[..., 5, :] = 0
    _check(SignCodec(sketch, sketch.matrix, 2), x, _firsts(x))


def test_signs_of_a_product_near_zero(generator):
    """Tokens at right angles to a row but for a thousandth: integers of 16 bits alone cannot tell."""
    sketch = Sketch(256, 128)
    row = sketch.matrix[17] / 128**0.5
    x = _tokens(1, 2, 4, 128, generator)
    side = torch.linspace(-1e-3, 1e-3, 4 * BLOCK)[:, None] * x.norm(dim=-1, keepdim=True)
    x += (side - x @ row[:, None]) * row
    codec = SignCodec(sketch, sketch.matrix, 2)
    found = codec.encode_tokens(x, _firsts(x))
    bits = unpack_tokens(found["codes"], 1)[..., 17]
    assert torch.equal(bits.bool(), side.squeeze(-1) > 0)
    _check(codec, x, _firsts(x))


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize(("dim", "group_size"), [(8, 8), (24, 128), (40, 8), (512, 64)])
def test_grids_of_any_dimension(num_bits, dim, group_size, generator):
    layout, size = grid_layout(dim, num_bits, group_size), block_size(dim)
    rotation = block_hadamard(dim, size, CPU).expand(2, -1, -1)
    x = _tokens(1, 2, 2, dim, generator)
    _check_grid(RotatedGridCodec(layout, rotation, num_bits, Extremes(0.9), size), x, _firsts(x))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotary", "scaling"), [(40, 1.0), (16, 1.19)])
def test_the_mean_turns_with_rope(interleaved, rotary, scaling, generator):
    rope = Rope(10000.0 ** (-torch.arange(0, rotary, 2) / rotary), scaling, interleaved)
    mean = Mean(5 * torch.randn(3, 40, generator=generator), rope)
    codec = _codec("three-bits", 40, 3, generator, mean)
    x = _tokens(2, 3, 2, 40, generator)
    first = torch.tensor([[3, 67], [70000, 5]])
    _check(codec, x, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tokens_of_any_type_and_stride(dtype, generator):
    blocks, dim = (1, 16) if IS_SLOW else (3, 72)
    codec = _codec("scalar", dim, 2, generator)
    x = _tokens(2, 2, blocks, dim, generator).to(dtype)
    first = _firsts(x)
    expected = codec.encode_tokens(x.float().contiguous(), first)
    views = (
        x,
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.nn.functional.pad(x, (3, 2, BLOCK, 5))[:, :, BLOCK:-5, 3:-2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x[:1].expand(2, -1, -1, -1),
    )
    for view in views:
        found = codec.encode_tokens(view, first)
        rows = slice(1) if view is views[-1] else slice(None)
        assert all(torch.equal(found[name][rows], expected[name][rows]) for name in expected)


@pytest.mark.parametrize("value", [0.0, 6e-8, 1.0, -65504.0])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_extreme_halves_are_widened_exactly(value, encoder, generator):
    codec = _codec(encoder, 16, 1, generator)
    x = torch.full((1, 1, BLOCK, 16), value, dtype=torch.float16)
    x[..., ::3] *= -1
    low, high = codec.encode_tokens(x, _firsts(x)), codec.encode_tokens(x.float(), _firsts(x))
    assert all(torch.equal(low[name], high[name]) for name in low)


@every_encoder
@pytest.mark.parametrize("constant", [0.0, 1.0, -300.0, 1e-20])
def test_tokens_of_one_number(encoder, constant, generator):
    """And of zeros, whose scale is zero whatever their codes."""
    codec = _codec(encoder, 24, 2, generator, half=False)
    x = torch.full((1, 2, BLOCK, 24), constant)
    found = codec.encode_tokens(x, _firsts(x))
    assert torch.isfinite(codec.dequantize(found, _firsts(x))).all()
    assert (found["scale"].int() - codec.quantize(x, _firsts(x))["scale"].int()).abs().max() <= 1
    if not constant:
        assert not found["scale"].any()


@pytest.mark.parametrize("shape", [(1, 2, 0), (0, 2, 3)])
def test_no_tokens_and_no_rows(shape, generator):
    batch, heads, blocks = shape
    x = torch.empty(batch, heads, blocks * BLOCK, 16)
    grids = QuaRot().fit(LayerContext("key", heads, 16, CPU, torch.float32))
    for codec in (_codec("scalar", 16, heads, generator), grids):
        for field in codec.encode_tokens(x, _firsts(x)).values():
            assert field.shape[:3] == shape


# In any company


@every_encoder
def test_threads_and_company_change_nothing(encoder, generator):
    dim, heads, blocks = (16, 2, 2) if IS_SLOW else (40, 3, 7)
    rope = Rope(10000.0 ** (-torch.arange(0, dim, 2) / dim))
    codec = _codec(encoder, dim, heads, generator, Mean(torch.randn(heads, dim, generator=generator), rope))
    x = _tokens(2, heads, blocks, dim, generator)
    first = _firsts(x)
    expected = codec.encode_tokens(x, first)
    before = torch.get_num_threads()
    try:
        for threads in () if IS_SLOW else (2, 5):
            torch.set_num_threads(threads)
            found = codec.encode_tokens(x, first)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    finally:
        torch.set_num_threads(before)
    for block in range(blocks):
        alone = codec.encode_tokens(x[1:, :, block * BLOCK : (block + 1) * BLOCK], first[1:, block : block + 1])
        assert all(torch.equal(alone[name][0, :, 0], expected[name][1, :, block]) for name in expected)


def _company(generator):
    """Codecs of two heads of dimension 8, each of another kind to a backend."""
    return {
        "signs of a sketch": without_statistics(QJL(2), heads=2, head_dim=8),
        "refined signs": _codec("refined", 8, 2, generator),
        "grids": without_statistics(QuaRot(3, 8), heads=2, head_dim=8),
        "tokens without a recipe": without_statistics(TokenUniform(2), heads=2, head_dim=8),
    }


def _pool(codec, pages):
    return {name: torch.zeros(pages, 2, *field.shape, dtype=field.dtype) for name, field in codec.layout.items()}


NOT_FINITE = [(torch.float32, float("nan")), (torch.bfloat16, float("inf")), (torch.float16, -float("inf"))]


@pytest.mark.parametrize(("dtype", "number"), NOT_FINITE, ids=str)
def test_numbers_that_are_not_finite_count_as_zero_and_are_told(dtype, number, refuses, generator):
    """Whichever of the jobs has them."""
    codecs = _company(generator)
    x = torch.randn(BLOCK, 2, 8, generator=generator).to(dtype)
    x[60, 1, 5] = 0
    bad = x.clone()
    bad[60, 1, 5] = number
    blocks = torch.arange(BLOCK, dtype=torch.int32), torch.tensor([67]), torch.tensor([1], dtype=torch.int32)
    expected = {what: _pool(codec, 2) for what, codec in codecs.items()}
    ops.encode([codec.job(x, expected[what], what) for what, codec in codecs.items()], *blocks)
    for which in codecs:
        found = {what: _pool(codec, 2) for what, codec in codecs.items()}
        with refuses(f"{which} contain NaN or Inf"):
            ops.encode(
                [codec.job(bad if what == which else x, found[what], what) for what, codec in codecs.items()], *blocks
            )
        assert all(torch.equal(found[what][name], expected[what][name]) for what in codecs for name in found[what])


@pytest.fixture
def at_once(monkeypatch):
    """How many blocks are encoded at once: few under the interpreter."""
    if not IS_SLOW:
        return TILE_BLOCKS
    monkeypatch.setattr("qjl.ops.triton.encoding.TILE_BLOCKS", 2)
    return 2


@pytest.mark.parametrize("what", ["signs of a sketch", "refined signs", "grids"])
def test_more_blocks_than_are_encoded_at_once(what, at_once, generator):
    """From slots in any order to pages in any order, of pools that are parts of larger ones."""
    codec, blocks = _company(generator)[what], at_once + 1
    x = torch.randn(blocks * BLOCK, 2, 8, generator=generator)
    slots, pages = (torch.randperm(n, generator=generator).int() for n in (len(x), blocks))
    first = 1000 * torch.arange(blocks)
    pool = {name: field.transpose(0, 1).contiguous().transpose(0, 1) for name, field in _pool(codec, blocks).items()}
    ops.encode([codec.job(torch.cat([x, -x], 2)[..., :8], pool, what)], slots, first, pages)
    expected = codec.encode_tokens(x[slots.long()].transpose(0, 1)[None], first[None])
    assert all(torch.equal(pool[name][pages.long()].transpose(0, 1)[None], field) for name, field in expected.items())


def test_an_even_trellis_of_two_parts_fills_both(generator):
    """3.5 bits: half of the coordinates on a trellis of 4 bits, half on levels of 3."""
    code = even_trellis(7 * 128 // 2, 128, CPU)
    assert len(code.parts) == 2
    scale = LogScale(torch.ones(2))
    rotation = haar_rotation(128).expand(2, -1, -1)
    codec = MappedCodec(rotation, rotation, code, scale, None, GAINS)
    x = Model(head_dim=128).first_tokens(4 * BLOCK).values
    _check(codec, x, _firsts(x))
