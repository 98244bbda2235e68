"""Instructions of single threads that compute: integers, floats, bits and conversions."""

from functools import partial

import numpy as np
import torch

from emulation.ptx_memory import OWN
from emulation.ptx_numbers import integer, is_float, raw, size_of
from emulation.ptx_steps import Makers, compute
from emulation.ptx_text import CARRY, Unknown, elements

MAKERS = Makers()

ROUNDED_OTHERWISE = ("rz", "rm", "rp")
BYTE = np.uint32(255)
FLOAT_8 = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}


def _wide(kind):
    """The type of twice as many bits."""
    return f"{kind[0]}{16 * size_of(kind)}"


# Floats and integers


def _fused(a, b, c):
    """Of float32 in float64, where the product is exact."""
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


_SUMS = {"add": np.add, "sub": np.subtract}
_UNARY = {
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "abs": np.abs,
    "neg": np.negative,
}


def _as_rounded(operands, function):
    """With saturation where it is asked for; only rounding to the nearest is known."""
    if operands.has(*ROUNDED_OTHERWISE):
        raise Unknown("this rounding")
    if not operands.has("sat"):
        return function
    return lambda *x: np.nan_to_num(function(*x)).clip(0, 1)


def _elementwise(operands, function, count):
    kind = operands.type
    sources = [(place, kind) for place in range(1, count + 1)]
    return compute(operands, function, (0, kind), *sources)


@MAKERS.of("add", "sub")
def _add(operands):
    kind, opcode = operands.type, operands.statement.opcode
    if is_float(kind):
        return _elementwise(operands, _as_rounded(operands, _SUMS[opcode]), 2)
    if operands.has("cc", "sat"):
        raise Unknown("carries and saturation of integers")
    return _elementwise(operands, _SUMS[opcode], 2)


@MAKERS.of("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "abs", "neg")
def _unary(operands):
    function = _UNARY[operands.statement.opcode]
    if is_float(operands.type):
        function = _as_rounded(operands, function)
    return _elementwise(operands, function, 1)


@MAKERS.of("mul")
def _multiply(operands):
    kind = operands.type
    if is_float(kind):
        return _elementwise(operands, _as_rounded(operands, np.multiply), 2)
    return _product(operands, None)


@MAKERS.of("mad", "fma", "madc")
def _multiply_add(operands):
    kind = operands.type
    if is_float(kind):
        return _elementwise(operands, _as_rounded(operands, _fused), 3)
    if operands.has("cc") or operands.statement.opcode == "madc":
        return _with_carry(operands)
    return _product(operands, 3)


def _product(operands, added):
    """The low half, the high half or all of a product, plus a third operand if there is one."""
    kind = operands.type
    if operands.has("wide"):
        out, function = _wide(kind), partial(_all_of_product, integer(_wide(kind)))
    elif operands.has("hi"):
        out, function = kind, partial(_high, kind)
    else:
        out, function = kind, np.multiply
    sources = [(1, kind), (2, kind)]
    if added is None:
        return compute(operands, function, (0, out), *sources)
    return compute(operands, lambda a, b, c: function(a, b) + c, (0, out), *sources, (added, out))


def _all_of_product(whole, a, b):
    return a.astype(whole) * b.astype(whole)


def _high(kind, a, b):
    if size_of(kind) < 8:
        whole = integer(_wide(kind))
        return ((a.astype(whole) * b.astype(whole)) >> whole.type(8 * size_of(kind))).astype(integer(kind))
    a, b = np.broadcast_arrays(a, b)
    return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)], integer(kind))


def _with_carry(operands):
    """``mad.lo.cc`` leaves a carry, which ``madc`` adds."""
    if operands.type != "u32":
        raise Unknown("carries of other types than u32")
    write, leave = operands.write(0, "u32"), operands.write(CARRY, "u32")
    a, b, c = (operands.read(place, "u32") for place in (1, 2, 3))
    carried = operands.read(CARRY, "u32")
    is_high, adds, leaves = operands.has("hi"), operands.statement.opcode == "madc", operands.has("cc")

    def run(machine):
        product = a(machine).astype(np.uint64) * b(machine).astype(np.uint64)
        half = product >> np.uint64(32) if is_high else product & np.uint64(0xFFFFFFFF)
        total = half + c(machine) + (carried(machine) if adds else np.uint64(0))
        write(machine, total.astype(np.uint32))
        if leaves:
            leave(machine, (total >> np.uint64(32)).astype(np.uint32))

    return run


@MAKERS.of("div")
def _divide(operands):
    if is_float(operands.type):
        return _elementwise(operands, _as_rounded(operands, np.divide), 2)
    return _elementwise(operands, lambda a, b: (a - np.fmod(a, b)) // b, 2)


@MAKERS.of("rem")
def _remainder(operands):
    return _elementwise(operands, np.fmod, 2)


@MAKERS.of("min", "max")
def _extreme(operands):
    is_least = operands.statement.opcode == "min"
    if not is_float(operands.type) or operands.has("NaN"):
        function = np.minimum if is_least else np.maximum
    else:
        function = np.fmin if is_least else np.fmax
    if operands.has("xorsign", "relu"):
        raise Unknown("this minimum")
    return _elementwise(operands, function, 2)


@MAKERS.of("copysign")
def _copied_sign(operands):
    return _elementwise(operands, lambda sign, number: np.copysign(number, sign), 2)


@MAKERS.of("testp")
def _tested(operands):
    tests = {"infinite": np.isinf, "finite": np.isfinite, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)}
    if operands.modifiers[0] not in tests:
        raise Unknown("this test")
    return compute(operands, tests[operands.modifiers[0]], (0, "pred"), (1, operands.type))


# Comparisons and choices


_COMPARED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name, kind):
    if not is_float(kind) or name in ("num", "nan"):
        return _COMPARED[name]
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name in _COMPARED:
        return _COMPARED[name]
    ordered = _COMPARED[name[:-1]]
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


@MAKERS.of("setp")
def _set_predicate(operands):
    """One predicate, or two: of both halves, or the second the opposite of the first."""
    name, kind = operands.modifiers[0], operands.type
    compare, combine = _comparison(name, kind), _COMBINED.get(operands.modifiers[1])
    to = operands.texts[0].split("|")
    writes = [operands.write(text.strip(), "pred") for text in to]
    a, b = operands.read(1, kind), operands.read(2, kind)
    if combine and len(to) > 1:
        raise Unknown("two predicates of a third")
    third = operands.read(3, "pred") if combine else None

    def run(machine):
        found = compare(a(machine), b(machine))
        if third:
            found = combine(found, third(machine))
        both = found if kind.endswith("x2") else (found, ~found)
        for write, predicate in zip(writes, both, strict=False):
            write(machine, predicate)

    return run


@MAKERS.of("selp")
def _select(operands):
    bits = f"b{8 * size_of(operands.type)}"
    return compute(operands, lambda a, b, p: np.where(p, a, b), (0, bits), (1, bits), (2, bits), (3, "pred"))


@MAKERS.of("mov")
def _move(operands):
    kind = operands.type
    bits = kind if kind == "pred" else f"b{8 * size_of(kind)}"
    to, source = operands.texts[:2]
    if to.startswith("{"):
        return _split(operands, elements(to), bits)
    if source.startswith("{"):
        return _join(operands, elements(source), bits)
    return compute(operands, lambda x: x, (0, bits), (1, bits))


def _split(operands, parts, bits):
    size = size_of(bits) // len(parts)
    read, whole = operands.read(1, bits), raw(size_of(bits)).type
    writes = [operands.write(part, f"b{8 * size}") for part in parts]

    def run(machine):
        number = read(machine)
        for i, write in enumerate(writes):
            write(machine, (number >> whole(8 * size * i)).astype(raw(size)))

    return run


def _join(operands, parts, bits):
    size, whole = size_of(bits) // len(parts), raw(size_of(bits))

    def function(*numbers):
        out = numbers[0].astype(whole)
        for i, number in enumerate(numbers[1:], 1):
            out = out | (number.astype(whole) << whole.type(8 * size * i))
        return out

    return compute(operands, function, (0, bits), *((part, f"b{8 * size}") for part in parts))


@MAKERS.of("cvta")
def _convert_address(operands):
    if not operands.has("global", "local"):
        raise Unknown("addresses of shared memory among global ones")
    begin = np.uint64(OWN if operands.has("local") else 0)
    return compute(operands, lambda x: x + begin, (0, "u64"), (1, "u64"))


# Bits


@MAKERS.of("and", "or", "xor", "not")
def _logic(operands):
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    opcode = operands.statement.opcode
    return _elementwise(operands, functions[opcode], 1 if opcode == "not" else 2)


@MAKERS.of("shl", "shr")
def _shift(operands):
    """By the width or more, nothing is left but the sign."""
    kind = operands.type
    width, number_type = 8 * size_of(kind), integer(kind).type
    if operands.statement.opcode == "shl":
        function = partial(_shifted, np.left_shift, width, number_type)
    elif kind[0] == "s":
        function = partial(_shifted_with_sign, width, number_type)
    else:
        function = partial(_shifted, np.right_shift, width, number_type)
    return compute(operands, function, (0, kind), (1, kind), (2, "u32"))


def _shifted(shift, width, number_type, a, by):
    return np.where(by < width, shift(a, np.minimum(by, width - 1).astype(number_type)), number_type(0))


def _shifted_with_sign(width, number_type, a, by):
    return a >> np.minimum(by, width - 1).astype(number_type)


@MAKERS.of("shf")
def _funnel(operands):
    is_left, wraps = operands.has("l"), operands.has("wrap")

    def function(low, high, by):
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        by = (by & np.uint32(31) if wraps else np.minimum(by, 32)).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if is_left else both >> by).astype(np.uint32)

    return compute(operands, function, (0, "b32"), (1, "b32"), (2, "b32"), (3, "u32"))


def _low_bits(count):
    """Ones in so many low places of 64."""
    ones = np.uint64(2**64 - 1)
    return np.where(count >= 64, ones, (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1))


@MAKERS.of("bfe")
def _extract(operands):
    """A field, whose highest bit is the sign of a signed one."""
    kind = operands.type
    if kind == "s64":
        raise Unknown("signed fields of 64 bits")

    def unsigned_field(a, start, length):
        start, length = start & BYTE, length & BYTE
        field = a.astype(np.uint64) >> np.minimum(start, 63).astype(np.uint64)
        return np.where(start < 64, field & _low_bits(length), 0).astype(integer(kind))

    def signed_field(a, start, length):
        start, length = start & BYTE, length & BYTE
        room = (64 - np.clip(length, 1, 64)).astype(np.int64)
        field = a.astype(np.int64) >> np.minimum(start, 63).astype(np.int64)
        return np.where(length > 0, (field << room) >> room, 0).astype(np.int32)

    function = signed_field if kind[0] == "s" else unsigned_field
    return compute(operands, function, (0, kind), (1, kind), (2, "u32"), (3, "u32"))


@MAKERS.of("bfi")
def _insert(operands):
    kind = operands.type
    width = 8 * size_of(kind)

    def function(field, into, start, length):
        start, length = start & BYTE, length & BYTE
        by = np.minimum(start, 63).astype(np.uint64)
        chosen = np.where(start < width, _low_bits(length) << by, np.uint64(0))
        wide = into.astype(np.uint64)
        return ((wide & ~chosen) | ((field.astype(np.uint64) << by) & chosen)).astype(integer(kind))

    return compute(operands, function, (0, kind), (1, kind), (2, kind), (3, "u32"), (4, "u32"))


@MAKERS.of("lop3")
def _logic_of_three(operands):
    table = int(operands.texts[4], 0)

    def function(a, b, c):
        out = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return out + np.zeros(1, np.uint32)

    return compute(operands, function, (0, "b32"), (1, "b32"), (2, "b32"), (3, "b32"))


@MAKERS.of("prmt")
def _permute(operands):
    """Byte ``selector & 7`` of eight, or its sign eight times."""
    if len(operands.modifiers) > 1:
        raise Unknown("this mode")

    def function(a, b, selectors):
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out = np.uint32(0)
        for i in range(4):
            selector = (selectors >> np.uint32(4 * i)).astype(np.uint64) & np.uint64(15)
            byte = (both >> ((selector & np.uint64(7)) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            out = out | (np.where(selector & np.uint64(8), sign, byte) << np.uint32(8 * i))
        return out

    return compute(operands, function, (0, "b32"), (1, "b32"), (2, "b32"), (3, "b32"))


def _reversed_bits(a):
    for by, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        by, mask = np.uint32(by), np.uint32(mask)
        a = ((a >> by) & mask) | ((a & mask) << by)
    return (a >> np.uint32(16)) | (a << np.uint32(16))


def _length(a):
    """Places up to the highest one."""
    return np.frexp(a.astype(np.float64))[1].astype(np.uint32)


@MAKERS.of("popc", "clz", "brev", "bfind")
def _bits(operands):
    opcode, kind = operands.statement.opcode, operands.type
    functions = {
        "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
        "clz": lambda a: np.uint32(32) - _length(a),
        "brev": _reversed_bits,
        "bfind": lambda a: _length(a) - np.uint32(1),
    }
    if kind not in ("b32", "u32") and not (opcode == "popc" and kind == "b64"):
        raise Unknown("this width")
    return compute(operands, functions[opcode], (0, "b32"), (1, kind))


@MAKERS.of("dp4a")
def _dot_of_bytes(operands):
    of_a, of_b = operands.modifiers[-2:]
    out = "u32" if of_a == of_b == "u32" else "s32"

    def function(a, b, c):
        a, b = (
            x.astype(np.uint32)[:, None].view(np.int8 if kind == "s32" else np.uint8).astype(np.int32)
            for x, kind in ((a, of_a), (b, of_b))
        )
        return (a * b).sum(-1, dtype=np.int32).view(integer(out)) + c

    return compute(operands, function, (0, out), (1, "b32"), (2, "b32"), (3, out))


# Conversions


_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@MAKERS.of("cvt")
def _convert(operands):
    to, source = operands.modifiers[-2:]
    if to in FLOAT_8 or source in FLOAT_8:
        return _convert_float_8(operands, to, source)
    if to.endswith("x2"):
        return compute(operands, _in_halves(operands, to), (0, to), (1, source), (2, source))
    return compute(operands, _conversion(operands, to, source), (0, to), (1, source))


def _in_halves(operands, to):
    """The first operand is the high half."""
    change = _rounding(operands, to)
    return lambda high, low: change(np.stack(np.broadcast_arrays(low, high)))


def _conversion(operands, to, source):
    if is_float(to) and is_float(source):
        return _rounding(operands, to)
    if is_float(to):
        return lambda x: x.astype(np.float64 if to == "f64" else np.float32)
    if is_float(source):
        return partial(_to_integer, _whole(operands), integer(to))
    if operands.has("sat"):
        limits = np.iinfo(integer(to))
        return lambda x: np.clip(x.astype(np.int64), limits.min, limits.max).astype(integer(to))
    return lambda x: x.astype(integer(to))


def _whole(operands):
    return next((_WHOLE[x] for x in operands.modifiers if x in _WHOLE), None)


def _rounding(operands, to):
    """Between floats; that to the nearest is left to how they are written."""
    whole = _whole(operands)
    if operands.has(*ROUNDED_OTHERWISE):
        raise Unknown("this rounding")

    def change(x):
        if whole is not None:
            x = whole(x)
        if operands.has("relu"):
            x = np.maximum(x, 0)
        if operands.has("sat"):
            x = np.nan_to_num(x).clip(0, 1)
        if to == "tf32":
            x = _to_tf32(x)
        return x

    if operands.has("satfinite"):
        raise Unknown("saturation to finite numbers")
    return change


def _to_tf32(x):
    """To the nearest, ties away from zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def _to_integer(whole, to, x):
    """The nearest that the type has; 0 for what is no number."""
    limits = np.iinfo(to)
    number = np.nan_to_num(whole(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    is_low, is_high = number <= limits.min, number >= limits.max
    inside = np.where(is_low | is_high, 0, number).astype(to)
    return np.where(is_low, to.type(limits.min), np.where(is_high, to.type(limits.max), inside))


def _convert_float_8(operands, to, source):
    if source in FLOAT_8:
        return compute(operands, partial(_from_float_8, FLOAT_8[source]), (0, to), (1, "b16"))
    if source != "f32" or operands.has("relu"):
        raise Unknown("this conversion")
    return compute(operands, partial(_to_float_8, FLOAT_8[to]), (0, "b16"), (1, source), (2, source))


def _to_float_8(kind, high, low):
    largest = torch.finfo(kind).max
    both = torch.from_numpy(np.stack(np.broadcast_arrays(low, high))).clamp(-largest, largest)
    low, high = both.to(kind).view(torch.uint8).numpy().astype(np.uint16)
    return low | (high << np.uint16(8))


def _from_float_8(kind, bits):
    both = np.stack([bits & np.uint16(255), bits >> np.uint16(8)]).astype(np.uint8)
    return torch.from_numpy(both).view(kind).float().numpy()
