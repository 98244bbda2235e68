"""The emulator of PTX: kernels whose results are known, then ours, as the compiler makes them for a GPU."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import using_backend
from pages import Extent, error, expected, operands, paged
from qjl import ops
from qjl.methods.balanced import Balanced
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.transform import Transform
from qjl.ops import reference
from qjl.ops.triton import runtime

if not runtime.is_installed() or runtime.is_interpreted():
    pytest.skip("Triton compiles nothing here", allow_module_level=True)

import triton
import triton.language as tl

from emulation import ptx
from emulation.ptx_text import Fault, Unknown
from qjl.ops.triton import ops as triton_ops

COUNT = 256


@pytest.fixture(params=[80])
def gpu(request, monkeypatch):
    """An emulated GPU, of whose compute capability a test may ask for another."""
    with ptx.emulated(monkeypatch, request.param) as launches:
        yield launches


on_all = pytest.mark.parametrize("gpu", [80, 89, 90], indirect=True)
on_both = pytest.mark.parametrize("gpu", [80, 90], indirect=True)  # 89 differs in floats of 8 bits alone


def _random(generator, *size, dtype=torch.int32):
    """Integers of all sizes, or normal numbers."""
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, size, dtype=dtype, generator=generator)


# Bits


@triton.jit
def _three(a, b, c, out, ASM: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    x, y, z = tl.load(a + i), tl.load(b + i), tl.load(c + i)
    result = tl.inline_asm_elementwise(ASM, "=r,r,r,r", [x, y, z], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + i, result)


def _permuted(a, b, selector):
    given, out = (a | b << 32).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = given[nibble & 7]
        out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return out


def _signed_field(a, start, length):
    bits = "".join(str(a >> min(i, 31) & 1) for i in range(start, start + length))[::-1]
    return int(bits, 2) - (int(bits[0]) << length) if bits else 0


def _inserted(a, b, length):
    mask = (1 << min(length, 32)) - 1
    return b & ~(mask << 5) | (a & mask) << 5


BITS = {
    "prmt.b32 $0, $1, $2, $3;": lambda a, b, c: _permuted(a, b, c),
    "prmt.b32 $0, $1, $2, 0xF140;": lambda a, b, c: _permuted(a, b, 0xF140),
    "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x7531; add.u32 $0, t, $3; }": lambda a, b, c: _permuted(a, b, 0x7531) + c,
    "lop3.b32 $0, $1, $2, $3, 0xEA;": lambda a, b, c: a & b | c,
    "lop3.b32 $0, $1, $2, $3, 0x96;": lambda a, b, c: a ^ b ^ c,
    "bfe.u32 $0, $1, 4, 15;": lambda a, b, c: a >> 4 & 0x7FFF,
    "{ .reg .b32 n; and.b32 n, $2, 31; bfe.s32 $0, $1, n, 9; }": lambda a, b, c: _signed_field(a, b & 31, 9),
    "{ .reg .b32 n; and.b32 n, $3, 31; bfi.b32 $0, $1, $2, 5, n; }": lambda a, b, c: _inserted(a, b, c & 31),
    "shf.l.wrap.b32 $0, $1, $2, $3;": lambda a, b, c: (a | b << 32) << (c & 31) >> 32,
    "shf.r.clamp.b32 $0, $1, $2, $3;": lambda a, b, c: (a | b << 32) >> min(c, 32),
    "{ .reg .b32 n; and.b32 n, $3, 63; shl.b32 $0, $1, n; }": lambda a, b, c: a << (c & 63),
    "{ .reg .b64 w; mul.wide.u32 w, $1, $2; mov.b64 {_, $0}, w; }": lambda a, b, c: a * b >> 32,
    "{ mad.lo.cc.u32 $0, $1, $2, $3; madc.hi.u32 $0, $1, $2, 0; }": lambda a, b, c: a * b + c >> 32,
    "mul.hi.s32 $0, $1, $2;": lambda a, b, c: _signed(a) * _signed(b) >> 32,
    "div.s32 $0, $1, $2;": lambda a, b, c: math.trunc(_signed(a) / _signed(b)),
    "{ .reg .pred p; setp.gt.s32 p, $1, $2; selp.b32 $0, $3, $1, p; }": lambda a, b, c: (
        c if _signed(a) > _signed(b) else a
    ),
    "{ .reg .pred p; setp.gt.u32 p, $1, $2; mov.b32 $0, $3; @!p mov.b32 $0, 7; }": lambda a, b, c: c if a > b else 7,
    "popc.b32 $0, $1;": lambda a, b, c: a.bit_count(),
    "clz.b32 $0, $1;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 $0, $1;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "dp4a.s32.s32 $0, $1, $2, $3;": lambda a, b, c: sum(x * y for x, y in zip(_bytes(a), _bytes(b), strict=True)) + c,
}


def _signed(a):
    return a - (a >> 31 << 32)


def _chosen(a, b, c):
    return c if _signed(a) > _signed(b) else a


def _bytes(a):
    return np.array([a], np.uint32).view(np.int8).tolist()


@pytest.mark.parametrize("asm", BITS)
def test_bits(asm, gpu, generator):
    a, b, c = (_random(generator, COUNT) for _ in range(3))
    a[:4], b[:4] = torch.tensor([0, 1, -1, 2**31 - 1]), 5
    out = torch.zeros(COUNT, dtype=torch.int32)
    _three[(1,)](a, b, c, out, asm, COUNT)
    unsigned = [[x % 2**32 for x in numbers.tolist()] for numbers in (a, b, c)]
    assert [x % 2**32 for x in out.tolist()] == [BITS[asm](*x) % 2**32 for x in zip(*unsigned, strict=True)]


@triton.jit
def _turned_bytes(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    asm: tl.constexpr = "prmt.b32 $0, $1, $1, 0x0123;"
    tl.store(out + i, tl.inline_asm_elementwise(asm, "=r,r", [tl.load(x + i)], dtype=tl.uint8, is_pure=True, pack=4))


@on_all
def test_which_numbers_share_a_register(gpu, generator):
    """The layout decides, which no interpreter shows."""
    x = torch.arange(COUNT * 4).to(torch.uint8)
    out = torch.zeros_like(x)
    _turned_bytes[(1,)](x, out, COUNT * 4)
    assert torch.equal(out, x.view(-1, 4).flip(1).flatten())


# Numbers


@triton.jit
def _functions(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    number = tl.load(x + i)
    positive = tl.abs(number)
    tl.store(out + i, tl.exp2(number))
    tl.store(out + COUNT + i, tl.log2(positive))
    tl.store(out + 2 * COUNT + i, tl.sin(number))
    tl.store(out + 3 * COUNT + i, tl.cos(number * 1e6))
    tl.store(out + 4 * COUNT + i, tl.sqrt(positive))
    tl.store(out + 5 * COUNT + i, tl.math.rsqrt(positive))
    tl.store(out + 6 * COUNT + i, number / (positive + 1))
    tl.store(out + 7 * COUNT + i, tl.floor(number) + tl.ceil(number))
    tl.store(out + 8 * COUNT + i, tl.exp(number))
    tl.store(out + 9 * COUNT + i, tl.where(number > 0, number, tl.minimum(-number, 0.5)))


def test_functions(gpu, generator):
    """The cosine of large angles takes threads through a branch of their own."""
    x = 3 * torch.randn(COUNT, generator=generator)
    x[::3] /= 1e6
    out = torch.zeros(10, COUNT)
    _functions[(1,)](x, out, COUNT)
    y, size = x.double(), x.double().abs()
    truth = [
        y.exp2(),
        size.log2(),
        y.sin(),
        (x * 1e6).double().cos(),
        size.sqrt(),
        size.rsqrt(),
        y / (size + 1),
        y.floor() + y.ceil(),
        y.exp(),
        torch.where(y > 0, y, (-y).clamp(max=0.5)),
    ]
    torch.testing.assert_close(out.double(), torch.stack(truth), rtol=2e-6, atol=2e-6)


@triton.jit
def _convert(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64, torch.uint8]
FLOATS_8 = [torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_conversions(source, to, gpu, generator):
    numbers = 50 * torch.randn(COUNT, generator=generator)
    x = (numbers.abs() if torch.uint8 in (source, to) else numbers).to(source)
    out = torch.zeros(COUNT, dtype=to)
    _convert[(1,)](x, out, COUNT)
    assert torch.equal(out, x.to(to))


@pytest.mark.parametrize("to", FLOATS_8)
@pytest.mark.parametrize("gpu", [89, 90], indirect=True)
def test_floats_of_8_bits(to, gpu, generator):
    x = 20 * torch.randn(COUNT, generator=generator)
    out, back = torch.zeros(COUNT, dtype=to), torch.zeros(COUNT)
    _convert[(1,)](x, out, COUNT)
    assert torch.equal(out.float(), x.to(to).float())
    _convert[(1,)](out, back, COUNT)
    assert torch.equal(back, out.float())


@triton.jit
def _halves(x, y, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a = tl.load(x + i, eviction_policy="evict_last")
    b = tl.load(y + i, cache_modifier=".cg")
    tl.store(out + i, tl.fma(a, b, a) + tl.maximum(a, b) * tl.minimum(a, b), eviction_policy="evict_first")
    tl.store(out + COUNT + i, tl.where(a > b, a, -b) - tl.abs(a))


@on_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype, gpu, generator):
    """Two in a register; hints about caches change nothing."""
    x, y = (_random(generator, COUNT, dtype=dtype) for _ in range(2))
    out = torch.zeros(2, COUNT, dtype=dtype)
    _halves[(1,)](x, y, out, COUNT)
    a, b = x.double(), y.double()
    truth = torch.stack([a * b + a + a * b, torch.where(a > b, a, -b) - a.abs()])
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=8 * torch.finfo(dtype).eps * truth.abs().max().item())


@triton.jit
def _wide_integers(x, y, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b + (a // b) - (a % b) ^ (b >> 7))
    tl.store(out + COUNT + i, tl.umulhi(a.to(tl.uint64), b.to(tl.uint64)).to(tl.int64))


def test_wide_integers(gpu, generator):
    x, y = _random(generator, 2, COUNT, dtype=torch.int64)
    y[::2] >>= 40
    out = torch.zeros(2, COUNT, dtype=torch.int64)
    _wide_integers[(1,)](x, y, out, COUNT)
    for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        assert (out[0, i].item() - (a * b + quotient - (a - quotient * b) ^ (b >> 7))) % 2**64 == 0
        assert (out[1, i].item() - ((a % 2**64) * (b % 2**64) >> 64)) % 2**64 == 0


# Warps and programs


@triton.jit
def _reductions(x, sums, most, places, running, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = row[:, None] * COLUMNS + column[None, :]
    numbers = tl.load(x + at)
    tl.store(sums + column, tl.sum(numbers, axis=0))
    tl.store(most + row, tl.max(numbers, axis=1))
    tl.store(places + row, tl.argmin(numbers, axis=1))
    tl.store(running + at, tl.cumsum(numbers, axis=1))


@on_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("num_warps", [2, 4])
def test_reductions(dtype, num_warps, gpu, generator):
    x = torch.randint(-1000, 1000, (32, 64), generator=generator).to(dtype)
    sums, most, running = torch.zeros(64, dtype=dtype), torch.zeros(32, dtype=dtype), torch.zeros_like(x)
    places = torch.zeros(32, dtype=torch.int32)
    _reductions[(1,)](x, sums, most, places, running, 32, 64, num_warps=num_warps)
    assert torch.equal(sums, x.sum(0, dtype=dtype))
    assert torch.equal(most, x.amax(1))
    assert torch.equal(x.gather(1, places[:, None].long())[:, 0], x.amin(1))
    assert torch.equal(running, x.cumsum(1, dtype=dtype))


@triton.jit
def _atomics(x, added, most, swapped, seen, count, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    number = tl.load(x + i, mask=i < count, other=0)
    tl.atomic_add(added + i % 8, number.to(tl.float32), mask=i < count)
    tl.atomic_max(most + i % 8, number, mask=i < count)
    tl.store(seen + i, tl.atomic_cas(swapped + i, i // 2, number))


@on_all
def test_atomics(gpu, generator):
    x = torch.randint(-1000, 1000, (3 * COUNT,), generator=generator, dtype=torch.int32)
    count = len(x) - 16
    added, most = torch.zeros(8), torch.full((8,), -2000, dtype=torch.int32)
    swapped = torch.arange(len(x), dtype=torch.int32) // 4
    before, seen = swapped.clone(), torch.zeros_like(swapped)
    _atomics[(3,)](x, added, most, swapped, seen, count, COUNT)
    by_place = x[:count].view(-1, 8)
    assert torch.equal(added, by_place.sum(0).float())
    assert torch.equal(most, by_place.amax(0))
    assert torch.equal(seen, before)
    is_same = before == torch.arange(len(x)) // 2
    assert torch.equal(swapped[is_same][:8], torch.where(torch.arange(len(x)) < count, x, 0)[is_same][:8])
    assert torch.equal(swapped[~is_same], before[~is_same])


@triton.jit
def _powers(counts, out, COUNT: tl.constexpr):
    """As many steps as each program is told, and a sum over its threads in each."""
    i = tl.arange(0, COUNT)
    numbers = tl.full([COUNT], 1.0, tl.float32)
    for step in range(tl.load(counts + tl.program_id(0))):
        numbers = numbers / 2 + tl.sum(numbers, axis=0) / COUNT + step
    tl.store(out + tl.program_id(0) * COUNT + i, numbers)


@pytest.mark.parametrize("num_warps", [2, 4])
def test_loops_of_any_length(num_warps, gpu):
    counts = torch.tensor([0, 1, 7, 3, 0, 12], dtype=torch.int32)
    out = torch.zeros(len(counts), COUNT)
    _powers[(len(counts),)](counts, out, COUNT, num_warps=num_warps)
    for count, row in zip(counts.tolist(), out, strict=True):
        number = 1.0
        for step in range(count):
            number = 1.5 * number + step
        assert torch.equal(row, torch.full((COUNT,), number))


# Products of matrices


@triton.jit
def _product(a, b, c, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    sums = tl.zeros([M, N], c.dtype.element_ty)
    for start in range(0, depth, K):
        x = tl.load(a + m[:, None] * depth + start + k[None, :])
        y = tl.load(b + (start + k)[:, None] * N + n[None, :])
        sums = tl.dot(x, y, sums, input_precision=PRECISION, out_dtype=c.dtype.element_ty)
    tl.store(c + m[:, None] * N + n[None, :], sums)


PRODUCTS = {
    "f16": (torch.float16, torch.float32, "ieee", 1e-5),
    "f16 alone": (torch.float16, torch.float16, "ieee", 2e-3),
    "bf16": (torch.bfloat16, torch.float32, "ieee", 1e-5),
    "s8": (torch.int8, torch.int32, "ieee", 0),
    "tf32": (torch.float32, torch.float32, "tf32", 1e-2),
    "tf32x3": (torch.float32, torch.float32, "tf32x3", 1e-5),
    "bf16x3": (torch.float32, torch.float32, "bf16x3", 1e-4),
    "ieee": (torch.float32, torch.float32, "ieee", 1e-5),
}


def _multiplied(kind, generator, m=16, n=32, **options):
    """A product, and what it must be."""
    dtype, out, precision, _ = PRODUCTS[kind]
    a, b = _random(generator, m, 128, dtype=dtype), _random(generator, 128, n, dtype=dtype)
    c = torch.zeros(m, n, dtype=out)
    _product[(1,)](a, b, c, 128, m, n, 32, precision, **options)
    return c.double(), a.double() @ b.double()


@on_all
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products(kind, num_stages, gpu, generator):
    found, truth = _multiplied(kind, generator, num_warps=2, num_stages=num_stages)
    tolerance = PRODUCTS[kind][3]
    assert (found - truth).norm() <= tolerance * truth.norm()


@triton.jit
def _product_of_warps(
    a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SCALE: tl.constexpr
):
    """A and B are the strides of what is summed over."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * (K if A == 1 else 1) + k[None, :] * A)
    y = tl.load(b + k[:, None] * B + n[None, :] * (K if B == 1 else 1))
    if SCALE != 1:
        x *= SCALE
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y))


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize(
    ("m", "n", "k", "a_is_turned", "b_is_turned", "scale"),
    [
        (64, 16, 64, False, False, 1),
        (128, 64, 32, True, False, 1),
        (64, 128, 16, False, True, 1),
        (64, 64, 64, False, False, 2),
    ],
)
@pytest.mark.parametrize("kind", ["f16", "tf32", "s8"])
def test_products_of_four_warps(kind, m, n, k, a_is_turned, b_is_turned, scale, gpu, generator):
    """Matrices lie in shared memory in several ways; a left one that was computed comes from registers."""
    dtype, out, _, tolerance = PRODUCTS[kind]
    k = k * 2 // dtype.itemsize
    a, b = _random(generator, m, k, dtype=dtype), _random(generator, k, n, dtype=dtype)
    if dtype == torch.int8:
        a //= scale
    c = torch.zeros(m, n, dtype=out)
    of_a, of_b = (x.T.contiguous() if turned else x for x, turned in ((a, a_is_turned), (b, b_is_turned)))
    _product_of_warps[(1,)](of_a, of_b, c, m, n, k, m if a_is_turned else 1, 1 if b_is_turned else n, scale)
    assert "wgmma" in gpu[0].compiled(90).asm["ptx"]
    truth = a.double() * scale @ b.double()
    assert (c.double() - truth).norm() <= tolerance * truth.norm()


def test_copies_arrive_when_they_are_waited_for(gpu, generator, monkeypatch):
    """Else what stood in shared memory before is read: a kernel that does not wait shows."""
    waits = "cp.async.wait_group"
    monkeypatch.setattr(ptx, "program_of", lambda text: ptx.Program(_without(text, waits)))
    found, truth = _multiplied("f16", generator, num_stages=3)
    assert not torch.allclose(found, truth, rtol=0.1)


def test_missing_barriers_are_told(gpu, generator, monkeypatch):
    monkeypatch.setattr(ptx, "program_of", lambda text: ptx.Program(_without(text, "bar.sync")))
    with pytest.raises(Fault, match="reads what another warp wrote, without a barrier"):
        _multiplied("f16", generator)


@triton.jit
def _handed_on(x, out, COUNT: tl.constexpr):
    """What one program writes another one reads, in no order that a GPU keeps."""
    i = tl.arange(0, COUNT)
    tl.store(x + tl.program_id(0) * COUNT + i, i)
    tl.store(out + tl.program_id(0) * COUNT + i, tl.load(x + i))


def test_programs_that_need_each_other_are_told(gpu):
    x, out = torch.zeros(2, 2 * COUNT)
    _handed_on[(1,)](x, out, COUNT)
    with pytest.raises(Fault, match=r"of program \(1, 0, 0\) reads what another warp wrote"):
        _handed_on[(2,)](x, out, COUNT)


def _without(text, instruction):
    assert instruction in text
    return "\n".join(line for line in text.splitlines() if instruction not in line)


# What is refused


@triton.jit
def _copy(x, out, count, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    numbers = tl.load(x + i, mask=i < count, other=7)
    tl.store(out + i, numbers)


def test_masked_tokens_are_not_read(gpu):
    x, out = torch.arange(100, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    _copy[(1,)](x, out, 100, 128)
    assert torch.equal(out, torch.nn.functional.pad(x, (0, 28), value=7))


@pytest.mark.parametrize("is_read", [True, False])
def test_accesses_outside_of_a_tensor_are_told(is_read, gpu):
    """Though memory goes on there."""
    x, out = (torch.zeros(256, dtype=torch.int32)[64:][:length] for length in ((127, 128) if is_read else (128, 127)))
    line = _copy.fn.__code__.co_firstlineno + (3 if is_read else 4)
    with pytest.raises(
        Fault, match=rf"test_ptx.py:{line}: thread \d+ of program \(0, 0, 0\) is outside of {'x' if is_read else 'out'}"
    ):
        _copy[(1,)](x, out, 128, 128)


def test_what_is_not_emulated_is_told(gpu):
    a, b, c, out = torch.zeros(4, COUNT, dtype=torch.int32)
    with pytest.raises(Unknown, match=r"test_ptx.py:\d+: instruction sad is not emulated: sad.s32"):
        _three[(1,)](a, b, c, out, "sad.s32 $0, $1, $2, $3;", COUNT)


def test_threads_that_part_before_a_barrier_are_told(gpu):
    """The other threads wait at another one."""
    a, b, c, out = torch.arange(4 * COUNT, dtype=torch.int32).view(4, COUNT)
    parting = (
        "{ .reg .pred p; setp.lt.u32 p, $1, 3; @p bra ELSE${:uid}; bar.sync 0; ELSE${:uid}: bar.sync 0;"
        " add.u32 $0, $2, $3; }"
    )
    with pytest.raises(Fault, match="some threads wait for others, which go elsewhere"):
        _three[(1,)](a, b, c, out, parting, COUNT)


# Our kernels


TRELLIS = Balanced(2, "trellis", metric=False)
TOLERANCE = 2e-3


@pytest.fixture
def ours(gpu, monkeypatch):
    """All ops of ours on the emulated GPU; gives the launches."""
    monkeypatch.setattr(ops, "_backend", _backend)
    return gpu


def _backend(tensor):
    return reference if ops.active_backend() == "reference" else triton_ops


STEPS = {
    "b3": (Transform(3), TRELLIS, torch.bfloat16, 64, 64),
    "b2-float32": (Transform(2), TRELLIS, torch.float32, 64, 16),
    "b4": (Transform(4), Balanced(4, "trellis", metric=False), torch.float16, 80, 128),
    "b1": (Transform(1.5), Balanced(1.5, "trellis", metric=False), torch.bfloat16, 128, 64),
    "norms": (QJL(2, "hadamard"), TRELLIS, torch.bfloat16, 64, 32),
    "groups": (QuaRot(3, 32), QuaRot(2, 32), torch.float16, 80, 64),
}


@pytest.mark.parametrize(
    ("gpu", "name"),
    [*((80, name) for name in STEPS), *((90, name) for name in ("b3", "groups"))],
    indirect=["gpu"],
)
def test_the_step(name, ours, generator):
    key, value, dtype, head_dim, page = STEPS[name]
    made = operands(key, value, 396, batch=2, head_dim=head_dim, dtype=dtype)
    extent = Extent.of([300, 101], [4, 0])
    out, lse = paged(made, page, extent, generator).attend()
    in_groups = ["project", "packed_part", "exact_part", "join"]
    assert [launch.name for launch in ours] == (in_groups if name == "groups" else ["prepare", "step"])
    truth, true_lse = expected(made, extent)
    assert error(out, truth) < TOLERANCE
    assert (lse - true_lse).abs().max() < TOLERANCE


def test_several_queries_with_a_bias_and_a_cap(ours, generator):
    made = operands(Transform(2), TRELLIS, batch=2, group=3, queries=3)
    extent = Extent.of([101, 384], [4, 70])
    step = paged(made, 64, extent, generator)
    columns = step.rows.table.shape[1] * 64 + step.rows.slots.shape[1]
    bias = torch.randn(2, 6, 3, columns, generator=generator)
    how = {"queries": 3, "softcap": 20.0, "bias": bias}
    out, _ = step.attend(**how)
    assert error(out, expected(made, extent, **how)[0]) < TOLERANCE


def test_a_fresh_token_is_stored_and_met(ours, generator):
    made = operands(Transform(3), TRELLIS, 396, batch=2, dtype=torch.bfloat16)
    extent = Extent.of([300, 101], [4, 0])
    step = paged(made, 64, extent, generator)
    last = step.rows.slots[:, -1].long()
    keys, values = (
        pool[last].transpose(0, 1).transpose(0, 1)[:, :, None].clone() for pool in (step.exact.keys, step.exact.values)
    )
    step.exact.keys[last] = step.exact.values[last] = torch.nan
    query = step.query.to(keys.dtype).flatten(1, 2)[:, :, None]
    out = ops.append_attend(query, keys, values, step.pool, step.exact, step.rows, 0.125)
    assert torch.equal(step.exact.keys[last], keys[:, :, 0])
    truth, _ = expected(replace(made, queries=query.float().view(made.queries.shape)), extent)
    assert error(out.transpose(1, 2).reshape(truth.shape), truth) < 4 * TOLERANCE  # bfloat16 comes out


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize("in_groups", [False, True])
def test_many_query_rows(in_groups, ours, generator):
    """The last tile is not full; where scales are of groups, so many that four warps multiply together."""
    key, value = (QuaRot(3, 32), QuaRot(2, 32)) if in_groups else (Transform(2), TRELLIS)
    made = operands(key, value, 396, dtype=torch.bfloat16)
    made = replace(made, queries=torch.randn(1, 2, 70 if in_groups else 19, 64, generator=generator))
    extent = Extent.of([64 * made.packed.blocks])
    out, _ = paged(made, 64, extent, generator).attend()
    assert any("wgmma" in launch.compiled(90).asm["ptx"] for launch in ours) == in_groups
    assert error(out, expected(made, extent)[0]) < TOLERANCE


@on_both
@pytest.mark.parametrize("quantizer", [Transform(3), QuaRot(3, 32)])
def test_decode(quantizer, ours, fitted):
    case = fitted("key", quantizer, 64)
    found = case.codec.dequantize(case.blocks, case.first)
    assert [launch.name for launch in ours] == ["_decode"]
    with using_backend("reference"):
        truth = ops.decode(case.blocks, case.codec.form, case.first)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-3 * truth.abs().max().item())


ENCODERS = {
    "trellis and levels": ("key", Balanced(3.5, "trellis")),
    "signs": ("key", Balanced(2, "signs")),
    "sketch": ("key", QJL(2, "hadamard")),
    "trellis": ("value", TRELLIS),
}
FEW = 0.01  # of the tokens: ties that turn over


@on_both
@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoders(name, ours, fitted):
    case = fitted(*ENCODERS[name], 64)
    found = case.codec.encode_tokens(case.x, case.first)
    assert ours
    differs = (found["codes"] != case.blocks["codes"]).any(3).flatten(2)
    assert differs.sum() <= max(FEW * differs.numel(), 3)
    steps = (_ordinals(found["scale"]) - _ordinals(case.blocks["scale"])).abs().flatten(2)[~differs]
    assert steps.max() <= 1
    assert steps.count_nonzero() <= max(FEW * steps.numel(), 2)


@on_both
def test_grids(ours, fitted):
    case = fitted("key", QuaRot(3, 32), 64)
    found = case.codec.encode_tokens(case.x, case.first)
    assert [launch.name for launch in ours] == ["encode_on_grids"]
    assert (found["codes"] != case.blocks["codes"]).float().mean() <= FEW
    for name in ("step", "middle"):
        torch.testing.assert_close(found[name], case.blocks[name], rtol=2e-3, atol=2e-3)


def _ordinals(scale):
    """As numbers of steps."""
    return scale.view(torch.int16 if scale.dtype == torch.float16 else torch.uint8).int()
