"""pack, unpack, scan and expand in C++ (``csrc/codes.inl``)."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from qjl.ops.cpu import library
from qjl.packed import BLOCK


class Codes(ctypes.Structure):
    """``QjlCodes``: packed codes where they lie."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch", "heads", "blocks", "bytes")),
        *((name, c_int64) for name in ("batch_stride", "head_stride", "block_stride")),
    )

    @classmethod
    def of(cls, codes: Tensor) -> Codes:
        """Those of a tensor whose blocks are contiguous (``with_whole_blocks``)."""
        return cls(codes.data_ptr(), *codes.shape[:4], *codes.stride()[:3])


class _Pack(ctypes.Structure):
    _fields_ = (("codes", Codes), ("nibbles", c_void_p))


class _Scan(ctypes.Structure):
    _fields_ = (("codes", Codes), ("tables", c_void_p), ("scores", c_void_p), ("rows", c_int64))


class _Expand(ctypes.Structure):
    _fields_ = (
        ("codes", Codes),
        ("entries", c_void_p),
        ("expanded", c_void_p),
        ("head_stride", c_int64),
        ("width", c_int64),
    )


def with_whole_blocks(codes: Tensor) -> Tensor:
    """The same codes, copied where ``[bytes, 64]`` of a block do not lie together."""
    return codes if codes.stride()[3:] == (BLOCK, 1) else codes.contiguous()


def pack(nibbles: Tensor) -> Tensor:
    nibbles = nibbles.contiguous()
    batch, heads, tokens, count = nibbles.shape
    codes = torch.empty((batch, heads, tokens // BLOCK, count // 2, BLOCK), dtype=torch.uint8)
    library.call("qjl_pack", _Pack(Codes.of(codes), nibbles.data_ptr()))
    return codes


def unpack(codes: Tensor) -> Tensor:
    codes = with_whole_blocks(codes)
    batch, heads, blocks, count, _ = codes.shape
    nibbles = torch.empty((batch, heads, blocks * BLOCK, 2 * count), dtype=torch.uint8)
    library.call("qjl_unpack", _Pack(Codes.of(codes), nibbles.data_ptr()))
    return nibbles


def scan(tables: Tensor, codes: Tensor) -> Tensor:
    codes, tables = with_whole_blocks(codes), tables.float().contiguous()
    batch, heads, rows = tables.shape[:3]
    scores = torch.empty((batch, heads, rows, codes.shape[2] * BLOCK))
    library.call("qjl_scan", _Scan(Codes.of(codes), tables.data_ptr(), scores.data_ptr(), rows))
    return scores


def expand(entries: Tensor, codes: Tensor) -> Tensor:
    codes = with_whole_blocks(codes)
    heads, nibbles, _, width = entries.shape
    are_shared = entries.stride(0) == 0
    entries = (entries[:1] if are_shared else entries).float().contiguous()
    expanded = torch.empty((codes.shape[0], heads, codes.shape[2] * BLOCK, nibbles * width))
    head_stride = 0 if are_shared else nibbles * 16 * width
    library.call("qjl_expand", _Expand(Codes.of(codes), entries.data_ptr(), expanded.data_ptr(), head_stride, width))
    return expanded
