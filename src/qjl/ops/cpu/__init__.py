"""Ops in C++ (``csrc/``), compiled when qjl is installed and called on raw pointers."""

from qjl.ops.cpu.codes import expand, pack, scan, unpack
from qjl.ops.cpu.decoding import attend, attend_paged
from qjl.ops.cpu.encoding import encode, encode_grid

__all__ = ["attend", "attend_paged", "encode", "encode_grid", "expand", "pack", "scan", "unpack"]
