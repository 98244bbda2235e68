"""Ops in C++ (``csrc/``), compiled when qjl is installed and called on raw pointers."""

from qjl.ops.cpu.codes import expand, pack, scan, unpack
from qjl.ops.cpu.decoding import attend
from qjl.ops.cpu.encoding import encode, encode_grid

__all__ = ["attend", "encode", "encode_grid", "expand", "pack", "scan", "unpack"]
