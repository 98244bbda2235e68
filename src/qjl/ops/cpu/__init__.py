"""Ops in C++ (``csrc/``), compiled when qjl is installed and called on raw pointers."""

from qjl.ops.cpu.attention import append_attend, attend
from qjl.ops.cpu.decoding import decode
from qjl.ops.cpu.encoding import encode

__all__ = [
    "append_attend",
    "attend",
    "decode",
    "encode",
]
