"""Named arrays in one file: safetensors with a SHA-256 over every byte, whole or refused.

The layout of safetensors, so that any reader of it can look inside: eight bytes with the length of the header, the
header as JSON, and the arrays. Its metadata begin with the format, its version and a SHA-256 over all other bytes of
the file, so no bit can change unnoticed; what the file says of itself is JSON. A file is written under another name,
synced and renamed, and is memory-mapped when it is read.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qjl.errors import QJLError

Arrays = Mapping[str, Tensor]
SUFFIX = ".qjl"
PARTIAL = ".partial"
_LENGTH = 8  # bytes of the header's length
_ALIGNMENT = 64  # bytes: what vector instructions read at once
_PIECE = 1 << 22  # bytes that a thread hashes at a time
_DIGITS = 64  # of the SHA-256
_FORMAT = b'{"__metadata__":{"format":"'
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class FileKind:
    """What files hold: their ``format`` and its ``version``, what messages call one, and how one is made ``again``.

    ``before``: formats that went before this one.
    """

    format: str
    version: int
    name: str
    again: str
    before: tuple[str, ...] = ()

    @property
    def start(self) -> bytes:
        """Of the header, up to the SHA-256."""
        return _FORMAT + f'{self.format}","version":"{self.version}","sha256":"'.encode()

    @property
    def digits(self) -> slice:
        """Where the SHA-256 is in a file."""
        start = _LENGTH + len(self.start)
        return slice(start, start + _DIGITS)

    def is_older(self, start: bytes) -> bool:
        """Whether the header of a file begins as those of other versions do."""
        names = (f'{self.format}"', *(f"{name}-" for name in self.before))
        return start.startswith(tuple(_FORMAT + name.encode() for name in names))


def write(path: Path, kind: FileKind, header: Mapping[str, Any], arrays: Arrays) -> int:
    """Write arrays; the file appears whole or not at all. Returns its bytes.

    Raises:
        QJLError: if it cannot be written.
    """
    ordered = dict(sorted(arrays.items(), key=_aligned_first))
    with _appearing(path, kind) as file:
        file.write(_head(kind, header, ordered))
        for array in ordered.values():
            file.write(_raw(array))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digits, size = _sha256(content, kind), len(content)
        file.seek(kind.digits.start)
        file.write(digits)
    return size


def digest(arrays: Arrays) -> str:
    """The same for equal arrays, wherever they lie: SHA-256 in hexadecimal digits."""
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha.update(f"{name} {_NAMES[array.dtype]} {list(array.shape)} ".encode())
        sha.update(_raw(array))
    return sha.hexdigest()


class ArrayFile:
    """A file, memory-mapped; what it says is only sure once ``verify`` was called.

    Raises:
        QJLError: if it is missing, of another kind, or of another version.
    """

    def __init__(self, path: Path, kind: FileKind) -> None:
        self.path, self.kind = path, kind
        try:
            with path.open("rb") as file:
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # nothing is written through
        except FileNotFoundError as error:
            raise QJLError(f"there is no {kind.name} {path}.") from error
        except OSError as error:
            raise QJLError(f"{kind.name} {path} cannot be read ({error.strerror}).") from error
        except ValueError as error:  # empty
            raise self.damaged() from error
        self._require_format()

    def __len__(self) -> int:
        """Bytes of the file."""
        return len(self._content)

    def verify(self) -> None:
        """Raises QJLError unless every byte is what was written."""
        if self._content[self.kind.digits] != _sha256(self._content, self.kind):
            raise self.damaged()

    @cached_property
    def header(self) -> dict[str, Any]:
        """What was given to ``write``."""
        try:
            found = json.loads(self._parsed["__metadata__"]["header"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise self.damaged() from error
        if not isinstance(found, dict):
            raise self.damaged()
        return found

    @property
    def names(self) -> list[str]:
        """Of the arrays."""
        return [name for name in self._parsed if name != "__metadata__"]

    def arrays(self) -> dict[str, Tensor]:
        """All arrays, memory-mapped."""
        return {name: self.array(name) for name in self.names}

    def array(self, name: str) -> Tensor:
        """One array, memory-mapped; it may be written to, which the file does not see."""
        try:
            entry = self._parsed[name]
            first, stop = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            if first == stop:
                return torch.empty(shape, dtype=dtype)
            count, start = (stop - first) // dtype.itemsize, self._data_start + first
            array = torch.frombuffer(self._content, dtype=dtype, count=count, offset=start).view(shape)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise self.damaged() from error
        return array if start % _ALIGNMENT == 0 else array.clone()

    @cached_property
    def _parsed(self) -> dict[str, Any]:
        try:
            head = json.loads(self._content[_LENGTH : self._data_start])
        except (ValueError, RecursionError) as error:
            raise self.damaged() from error
        if not isinstance(head, dict):
            raise self.damaged()
        return head

    @property
    def _data_start(self) -> int:
        return _LENGTH + int.from_bytes(self._content[:_LENGTH], "little")

    def _require_format(self) -> None:
        kind = self.kind
        start = self._content[_LENGTH : kind.digits.start]
        if start == kind.start:
            return
        if kind.is_older(start):
            raise QJLError(f"{kind.name} {self.path} is of another version of qjl: {kind.again}.")
        raise QJLError(f"{self.path} is no {kind.name}.")

    def damaged(self) -> QJLError:
        """To be raised where something is not as it was written."""
        return QJLError(f"{self.kind.name} {self.path} is damaged: delete it and {self.kind.again}.")


@contextmanager
def _appearing(path: Path, kind: FileKind) -> Iterator[BinaryIO]:
    """A file that becomes ``path`` once all of it is on the disk."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise QJLError(f"{kind.name} {path} cannot be written ({error.strerror}): give another path.") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _head(kind: FileKind, header: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Length and header, with zeros for the digest; the arrays begin at a multiple of the alignment."""
    entries, offset = {}, 0
    for name, array in arrays.items():
        stop = offset + array.nbytes
        entries[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, stop]}
        offset = stop
    listed = json.dumps(entries, separators=(",", ":")).removeprefix("{")
    text = json.dumps(json.dumps(header))
    head = kind.start + b"0" * _DIGITS + f'","header":{text}}}{"," if entries else ""}{listed}'.encode()
    head += b" " * (-(_LENGTH + len(head)) % _ALIGNMENT)
    return len(head).to_bytes(_LENGTH, "little") + head


def _aligned_first(item: tuple[str, Tensor]) -> tuple[bool, int, str]:
    """Those that leave the next one aligned come first; every one is aligned to its own numbers."""
    name, array = item
    return array.nbytes % _ALIGNMENT != 0, -array.itemsize, name


def _raw(array: Tensor) -> memoryview:
    """The bytes of an array, one row behind the other."""
    return array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _sha256(content: mmap.mmap, kind: FileKind) -> bytes:
    """Digits of the SHA-256 over the header's length and the SHA-256 of each piece behind the digits."""
    with memoryview(content) as view, ThreadPoolExecutor() as pool:
        starts = range(kind.digits.stop, len(view), _PIECE)
        pieces = pool.map(lambda start: hashlib.sha256(view[start : start + _PIECE]).digest(), starts)
        return hashlib.sha256(b"".join([view[:_LENGTH], *pieces])).hexdigest().encode()
