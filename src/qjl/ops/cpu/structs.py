"""The structs of the C interface (``csrc/qjl_cpu.h``, ``step.h``, ``baselines.h``), each ``Qjl`` and its name there.

``abi`` is a number of them all, which the library tells of its own (``csrc/abi.cpp``).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int8, c_int32, c_int64, c_void_p
from struct import Struct

import torch

CPU = torch.device("cpu")  # where all that the library reads lies, whatever torch's default device is
MEANING = 5  # raised where a function or a field means something else, and no size tells so


class Limits(Structure):
    _fields_ = tuple((name, c_int64) for name in ("dim", "threads"))


class Codes(Structure):
    """Packed codes where they lie."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch", "heads", "blocks", "bytes")),
        *((name, c_int64) for name in ("batch_stride", "head_stride", "block_stride")),
    )


# Encoding


class Tokens(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("type", "dim", "head_stride", "slot_stride", "slot_count")),
    )


class Mean(Structure):
    _fields_ = (("vector", c_void_p), *((name, c_int64) for name in ("pairs", "interleaved")))


class Map(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("matrix", c_void_p),
        *((name, c_int64) for name in ("is_half", "head_stride")),
        *((name, c_void_p) for name in ("flips", "order")),
        ("size", c_int64),
    )


class Part(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("kind", "dim", "nibbles")),
        *((name, c_void_p) for name in ("kinds", "bit_coordinate", "bit_index")),
        *((name, c_void_p) for name in ("tree", "levels", "patterns")),
        *((name, c_int64) for name in ("kind_stride", "place_stride")),
        *((name, c_void_p) for name in ("own", "next")),
        ("width", c_int64),
        ("gram", c_void_p),
        *((name, c_int64) for name in ("block", "sweeps")),
    )


class Recipe(Structure):
    _fields_ = (
        ("codes", Codes),
        ("tokens", Tokens),
        ("mean", Mean),
        ("map", Map),
        ("parts", POINTER(Part)),
        ("part_count", c_int64),
        ("gains", POINTER(c_float)),
        ("gain_count", c_int64),
        *((name, c_void_p) for name in ("weights", "units")),
        ("norm_factor", c_float),
        ("scales", c_void_p),
        ("scale_stride", c_int64 * 2),
    )


class GridRecipe(Structure):
    _fields_ = (
        ("codes", Codes),
        ("tokens", Tokens),
        *((name, c_int64) for name in ("size", "groups", "bits")),
        ("clip", c_float),
        *((name, c_void_p) for name in ("steps", "middles")),
        *((name, c_int64 * 2) for name in ("step_stride", "middle_stride")),
    )


class Job(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("recipe", "grid", "cos", "sin"))


class Encode(Structure):
    _fields_ = (
        ("jobs", POINTER(Job)),
        ("job_count", c_int64),
        *((name, c_void_p) for name in ("slots", "pages")),
        *((name, c_int64) for name in ("blocks", "not_finite")),
        ("room", c_void_p),
        ("room_bytes", c_int64),
    )


class Decode(Structure):
    _fields_ = (
        ("codes", Codes),
        *((name, c_void_p) for name in ("scales", "middles")),
        *((name, c_int64 * 3) for name in ("scale_stride", "middle_stride")),
        ("units", c_void_p),
        *((name, c_int64) for name in ("dim", "groups")),
        *((name, c_void_p) for name in ("coordinates", "entries")),
        *((name, c_int64) for name in ("slots", "code_stride")),
        ("map", c_void_p),
        ("map_stride", c_int64),
        *((name, c_void_p) for name in ("mean", "turns", "cos", "sin")),
        ("pairs", c_int64),
        ("out", c_void_p),
        ("head_dim", c_int64),
        ("room", c_void_p),
        ("room_bytes", c_int64),
    )


# The fused decode step


class Quad(Structure):
    _fields_ = (
        ("tables", (c_int8 * 16) * 8),
        ("sources", c_int32 * 8),
        ("coordinates", c_int32 * 4),
        ("group", c_int32),
        ("step", c_float),
        ("kind", c_int32),
    )


class Side(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scale", "middle", "unit", "map", "mean")),
        *((name, c_int64 * 2) for name in ("codes_stride", "scale_stride", "middle_stride")),
        *((name, c_int64) for name in ("map_stride", "map_is_half")),
        *((name, c_int64) for name in ("nibbles", "groups", "code_dim", "head_dim", "code_stride")),
        ("coordinates", c_void_p),
        ("entries", c_void_p),
        ("slots", c_int64),
        ("quads", c_void_p),
        ("quad_count", c_int64),
        ("mean_energy", c_void_p),
        ("tolerance", c_double),
    )


class Exact(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64 * 2) for name in ("key_stride", "value_stride")),
        *((name, c_int64) for name in ("slots", "dtype")),
    )


class Fresh(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64 * 3) for name in ("key_stride", "value_stride")),
    )


class Rows(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("table", "lengths", "skip", "origins", "slots", "counts")),
        *((name, c_int64) for name in ("capacity", "room")),
    )


class Turn(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("inv_freq", "step", "anchor_step", "coordinates", "down", "up", "bounds")),
        ("pairs", c_int64),
        ("direct", c_int64),
        ("scaling", c_float),
    )


class Step(Structure):
    _fields_ = (
        ("keys", Side),
        ("values", Side),
        *((name, c_int64) for name in ("page_tokens", "page_count")),
        ("exact", Exact),
        ("bias", c_void_p),
        ("bias_stride", c_int64 * 4),
        ("turn", POINTER(Turn)),
        *((name, c_int64) for name in ("heads", "blocks_per_split")),
        ("room", c_void_p),
        *((name, c_int64) for name in ("room_bytes", "splits")),
        *((name, c_void_p) for name in ("query", "out")),
        ("fresh", Fresh),
        ("of_rows", c_void_p),
        *((name, c_int64) for name in ("batch", "rows", "queries", "query_type")),
        ("query_stride", c_int64 * 3),
        ("out_type", c_int64),
        ("out_stride", c_int64 * 3),
        ("scaling", c_float),
        ("softcap", c_float),
        *((name, c_void_p) for name in ("lse", "scores")),
    )

    def describe(self, *words: int) -> None:
        """Write all from ``fresh`` to ``out_stride``, which takes a fifth of the time of their fields one by one."""
        _DESCRIBED.pack_into(self, Step.fresh.offset, *words)

    def point(self, *words: int) -> None:
        """Write all from ``room`` to the addresses of ``fresh``."""
        _POINTED.pack_into(self, Step.room.offset, *words)


_DESCRIBED = Struct(f"={(Step.scaling.offset - Step.fresh.offset) // 8}q")
_POINTED = Struct(f"={(Step.fresh.offset + Fresh.key_stride.offset - Step.room.offset) // 8}q")


# What the benchmarks compare with


class FlashDecode(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "keys", "values", "out")),
        *((name, c_int64) for name in ("heads", "group", "tokens", "head_dim")),
        ("scaling", c_float),
    )


class PopcountScan(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "signs", "scale", "ones", "scores")),
        *((name, c_int64) for name in ("heads", "group", "tokens", "m")),
    )


class Read(Structure):
    _fields_ = (("numbers", c_void_p), ("count", c_int64), ("sums", c_void_p))


ALL: tuple[type[Structure], ...] = (
    *(Limits, Codes, Decode),
    *(Tokens, Mean, Map, Part, Recipe, GridRecipe, Job, Encode),
    *(Quad, Side, Exact, Fresh, Rows, Turn, Step),
    *(FlashDecode, PopcountScan, Read),
)


def abi() -> int:
    """The sum over all fields of a hash of name, place and size, in 64 bits."""
    total = _hashed("meaning", MEANING, ctypes.sizeof(c_void_p))
    for struct in ALL:
        name = f"Qjl{struct.__name__}"
        total += _hashed(name, ctypes.sizeof(struct), ctypes.alignment(struct))
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            total += _hashed(f"{name}.{field}", place.offset, place.size)
    return total % 2**64


def _hashed(text: str, first: int, second: int) -> int:
    """FNV-1a, mixed so that places of some fields, more by what others are less, do not add up to the same."""
    hashed = 0xCBF29CE484222325
    for byte in text.encode() + first.to_bytes(8, "little") + second.to_bytes(8, "little"):
        hashed = (hashed ^ byte) * 0x100000001B3 % 2**64
    hashed = (hashed ^ hashed >> 33) * 0xFF51AFD7ED558CCD % 2**64
    return hashed ^ hashed >> 33
