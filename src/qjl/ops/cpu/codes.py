"""pack, unpack, scan and expand in C++ (``csrc/codes.inl``)."""

from __future__ import annotations

import torch
from torch import Tensor

from qjl.ops.cpu import library
from qjl.ops.cpu.structs import CPU, Codes, Expand, Pack, Scan
from qjl.packed import BLOCK


def with_whole_blocks(codes: Tensor) -> Tensor:
    """The same codes, copied where ``[bytes, 64]`` of a block do not lie together."""
    return codes if codes.stride()[3:] == (BLOCK, 1) else codes.contiguous()


def pack(nibbles: Tensor) -> Tensor:
    nibbles = nibbles.contiguous()
    batch, heads, tokens, count = nibbles.shape
    codes = torch.empty((batch, heads, tokens // BLOCK, count // 2, BLOCK), dtype=torch.uint8, device=CPU)
    library.call("qjl_pack", Pack(Codes.of(codes), nibbles.data_ptr()))
    return codes


def unpack(codes: Tensor) -> Tensor:
    codes = with_whole_blocks(codes)
    batch, heads, blocks, count, _ = codes.shape
    nibbles = torch.empty((batch, heads, blocks * BLOCK, 2 * count), dtype=torch.uint8, device=CPU)
    library.call("qjl_unpack", Pack(Codes.of(codes), nibbles.data_ptr()))
    return nibbles


def scan(tables: Tensor, codes: Tensor) -> Tensor:
    codes, tables = with_whole_blocks(codes), tables.float().contiguous()
    batch, heads, rows = tables.shape[:3]
    scores = torch.empty((batch, heads, rows, codes.shape[2] * BLOCK), dtype=torch.float32, device=CPU)
    library.call("qjl_scan", Scan(Codes.of(codes), tables.data_ptr(), scores.data_ptr(), rows))
    return scores


def expand(entries: Tensor, codes: Tensor) -> Tensor:
    codes = with_whole_blocks(codes)
    heads, nibbles, _, width = entries.shape
    are_shared = entries.stride(0) == 0
    entries = (entries[:1] if are_shared else entries).float().contiguous()
    size = (codes.shape[0], heads, codes.shape[2] * BLOCK, nibbles * width)
    expanded = torch.empty(size, dtype=torch.float32, device=CPU)
    head_stride = 0 if are_shared else nibbles * 16 * width
    library.call("qjl_expand", Expand(Codes.of(codes), entries.data_ptr(), expanded.data_ptr(), head_stride, width))
    return expanded
