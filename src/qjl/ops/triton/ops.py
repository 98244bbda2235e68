"""The ops that this backend has."""

from qjl.ops.triton.codes import expand, pack, scan, unpack

__all__ = ["expand", "pack", "scan", "unpack"]
