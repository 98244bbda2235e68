"""The ops that this backend has."""

from qjl.ops.triton.codes import expand, pack, scan, unpack
from qjl.ops.triton.decoding import attend, attend_paged
from qjl.ops.triton.encoding import encode, encode_grid

__all__ = ["attend", "attend_paged", "encode", "encode_grid", "expand", "pack", "scan", "unpack"]
