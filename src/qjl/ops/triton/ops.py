"""The ops that this backend has."""

from qjl.ops.triton.codes import expand, pack, scan, unpack
from qjl.ops.triton.decoding import attend, attend_paged

__all__ = ["attend", "attend_paged", "expand", "pack", "scan", "unpack"]
