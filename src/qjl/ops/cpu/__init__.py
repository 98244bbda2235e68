"""Ops in C++ (``csrc/``), compiled when qjl is installed and called on raw pointers."""

from qjl.ops.cpu.codes import expand, pack, scan, unpack
from qjl.ops.cpu.decoding import append_attend, attend
from qjl.ops.cpu.encoding import encode, encode_grid, encode_pages

__all__ = [
    "append_attend",
    "attend",
    "encode",
    "encode_grid",
    "encode_pages",
    "expand",
    "pack",
    "scan",
    "unpack",
]
