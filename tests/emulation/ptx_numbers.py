"""Numbers in registers: raw bits, and what instructions of each type make of them."""

import numpy as np

SIZES = {"pred": 1, "tf32": 4, "f16x2": 4, "bf16x2": 4, "bf16": 2, "e4m3x2": 2, "e5m2x2": 2}
TF32 = np.uint32(0xFFFFE000)


def size_of(kind):
    """Bytes of a type."""
    return SIZES.get(kind) or int(kind[1:]) // 8


def is_float(kind):
    return "f" in kind


def integer(kind):
    """The numpy type of ``s32`` and the like."""
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{size_of(kind)}")


def raw(size):
    return np.dtype(f"u{size}")


def decoded(kind):
    """A function from bits to what is computed with: halves as float32, two of them as ``[2, threads]``."""
    if kind in _DECODERS:
        return _DECODERS[kind]
    if kind[0] in "bu":
        return lambda bits: bits
    return lambda bits: bits.view(integer(kind))


def encoded(kind):
    """The way back: a function from what was computed to bits."""
    if kind in _ENCODERS:
        return _ENCODERS[kind]
    to = integer(kind)
    bits = raw(size_of(kind))
    return lambda number: number.astype(to, copy=False).view(bits)


def _from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bf16(number):
    """To the nearest, ties to even."""
    bits = number.astype(np.float32, copy=False).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(number), 0x7FFF, nearest).astype(np.uint16)


def _to_f16(number):
    return number.astype(np.float16).view(np.uint16)


def _halves(bits):
    return np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)]).astype(np.uint16)


def _joined(halves):
    """Bits of two halves ``[2, threads]``, the first in the low one."""
    return halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16))


_DECODERS = {
    "pred": lambda bits: bits,
    "f32": lambda bits: bits.view(np.float32),
    "f64": lambda bits: bits.view(np.float64),
    "tf32": lambda bits: (bits & TF32).view(np.float32),
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "bf16": _from_bf16,
    "f16x2": lambda bits: _halves(bits).view(np.float16).astype(np.float32),
    "bf16x2": lambda bits: _from_bf16(_halves(bits)),
}
_ENCODERS = {
    "pred": lambda number: number.astype(bool, copy=False),
    "f32": lambda number: number.astype(np.float32, copy=False).view(np.uint32),
    "tf32": lambda number: number.astype(np.float32, copy=False).view(np.uint32),
    "f64": lambda number: number.astype(np.float64, copy=False).view(np.uint64),
    "f16": _to_f16,
    "bf16": _to_bf16,
    "f16x2": lambda number: _joined(_to_f16(number)),
    "bf16x2": lambda number: _joined(_to_bf16(number)),
}


def literal(text, kind):
    """Bits of an immediate operand, ``[1]``; None where the text is none."""
    size = size_of(kind)
    if kind == "pred":
        return np.array([int(text, 0) != 0]) if text.lstrip("-").isdigit() else None
    if text[:2] in ("0f", "0F"):
        return np.array([int(text[2:], 16)], np.uint32)
    if text[:2] in ("0d", "0D"):
        return np.array([int(text[2:], 16)], np.uint64)
    try:
        number = int(text.rstrip("U"), 0)
    except ValueError:
        return None
    return np.array([number % (1 << (8 * size))], raw(size))
