"""Prompt caches as files: safetensors with a header of ours, whole or refused.

The layout of safetensors, so that any reader of it can look inside: eight bytes with the length of the header, the
header as JSON, and the tensors. Its metadata begin with the format and a SHA-256 over all other bytes of the file, so
no bit can change unnoticed; the tensors are those of the cache, its state as JSON (``tree``) and the prompt's tokens.
A file is written under another name, synced and renamed, and is memory-mapped when it is read.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qjl import trees
from qjl.errors import QJLError
from qjl.versions import installed_version

VERSION = 2
SUFFIX = ".qjl"
PARTIAL = ".partial"
_LENGTH = 8  # bytes of the header's length
_ALIGNMENT = 64  # bytes: what vector instructions read at once
_PIECE = 1 << 22  # bytes that a thread hashes at a time
_DIGITS = 64  # of the SHA-256
_FORMAT = b'{"__metadata__":{"format":"qjl-prompt-cache-'
_SHA = b'","sha256":"'
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
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class Header:
    """What a file says of the cache inside.

    - ``model``: the kind of model, for people; ``fingerprint``, what it computes; ``dtype``, what they ran in.
    - ``preset``: the configuration, as ``presets.to_dict`` has it.
    - ``statistics``: SHA-256 of the codecs, which are fitted to statistics.
    - ``rows``, ``tokens``: rows of the batch and tokens of each, padding included.
    - ``token_sha256``: of the token ids as little-endian int32; None where they are not known.
    - ``cache_bytes``, ``bf16_bytes``: of the cache in memory, and of the same tokens at 16 bits per number.
    """

    model: str
    fingerprint: str
    dtype: str
    preset: dict[str, Any]
    statistics: str
    rows: int
    tokens: int
    token_sha256: str | None
    cache_bytes: int
    bf16_bytes: int
    qjl: str = field(default_factory=lambda: installed_version("qjl") or "")


def write(path: Path, header: Header, state: Any, token_ids: Tensor | None = None) -> int:
    """Write a cache's state; the file appears whole or not at all. Returns its bytes.

    Raises:
        QJLError: if it cannot be written, or the state cannot be stored.
    """
    tree, tensors = trees.dump(state)
    tensors["tree"] = torch.frombuffer(bytearray(json.dumps(tree), "utf-8"), dtype=torch.uint8)
    if token_ids is not None:
        tensors["token_ids"] = token_ids.cpu().contiguous()
    ordered = dict(sorted(tensors.items(), key=_aligned_first))
    with _appearing(path) as file:
        file.write(_head(header, ordered))
        for tensor in ordered.values():
            file.write(trees.raw(tensor))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digits, size = _sha256(content), len(content)
        file.seek(_sha_place().start)
        file.write(digits)
    return size


def sha256_of_tokens(token_ids: Tensor) -> str:
    """Of ``int32 [B, T]``."""
    return hashlib.sha256(token_ids.cpu().contiguous().numpy().astype("<i4").tobytes()).hexdigest()


class StoredFile:
    """A file, memory-mapped; what ``header`` and ``token_ids`` say is only sure once ``verify`` was called.

    Raises:
        QJLError: if it is missing, no prompt cache, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError as error:
            raise QJLError(f"there is no prompt cache {path}.") from error
        except OSError as error:
            raise QJLError(f"prompt cache {path} cannot be read ({error.strerror}).") from error
        except ValueError as error:  # empty
            raise self._damaged() from error
        self._require_format()

    def __len__(self) -> int:
        """Bytes of the file."""
        return len(self._content)

    def verify(self) -> None:
        """Raises QJLError unless every byte is what was written."""
        if self._content[_sha_place()] != _sha256(self._content):
            raise self._damaged()

    @cached_property
    def header(self) -> Header:
        try:
            found = json.loads(self._parsed["__metadata__"]["qjl"])
            return Header(**{one.name: found[one.name] for one in fields(Header)})
        except _MALFORMED as error:
            raise self._damaged() from error

    @property
    def token_ids(self) -> Tensor | None:
        """``int32 [B, T]``; None where they are not known."""
        if "token_ids" not in self._parsed:
            return None
        ids = self.tensor("token_ids")
        if ids.dim() != 2 or ids.dtype != torch.int32:
            raise self._damaged()
        return ids

    def state(self, device: torch.device) -> Any:
        """What was given to ``write``, its tensors on a device; on the CPU they stay memory-mapped."""
        try:
            tree = json.loads(bytes(self.tensor("tree").numpy()))
        except _MALFORMED as error:
            raise self._damaged() from error
        names = self._parsed.keys() - {"__metadata__", "tree", "token_ids"}
        return trees.build(tree, {name: self.tensor(name) for name in names}, device)

    def tensor(self, name: str) -> Tensor:
        try:
            entry = self._parsed[name]
            first, stop = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            if first == stop:
                return torch.empty(shape, dtype=dtype)
            count, start = (stop - first) // dtype.itemsize, self._data_start + first
            tensor = torch.frombuffer(self._content, dtype=dtype, count=count, offset=start).view(shape)
        except _MALFORMED as error:
            raise self._damaged() from error
        return tensor if start % _ALIGNMENT == 0 else tensor.clone()

    @cached_property
    def _parsed(self) -> dict[str, Any]:
        try:
            head = json.loads(self._content[_LENGTH : self._data_start])
        except (ValueError, RecursionError) as error:
            raise self._damaged() from error
        if not isinstance(head, dict):
            raise self._damaged()
        return head

    @property
    def _data_start(self) -> int:
        return _LENGTH + int.from_bytes(self._content[:_LENGTH], "little")

    def _require_format(self) -> None:
        start = self._content[_LENGTH : _sha_place().start]
        if not start.startswith(_FORMAT):
            raise QJLError(f"{self.path} is no prompt cache.")
        if start != _format_and_version():
            raise QJLError(f"prompt cache {self.path} is of another version of qjl: build it again.")

    def _damaged(self) -> QJLError:
        return QJLError(f"prompt cache {self.path} is damaged: delete it and build it again.")


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
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
        raise QJLError(f"prompt cache {path} cannot be written ({error.strerror}): give another path.") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _head(header: Header, tensors: dict[str, Tensor]) -> bytes:
    """Length and header, with zeros for the digest; the tensors begin at a multiple of the alignment."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        stop = offset + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    described = json.dumps(json.dumps(asdict(header)))
    listed = json.dumps(entries, separators=(",", ":")).removeprefix("{")
    head = _format_and_version() + b"0" * _DIGITS + f'","qjl":{described}}},{listed}'.encode()
    head += b" " * (-(_LENGTH + len(head)) % _ALIGNMENT)
    return len(head).to_bytes(_LENGTH, "little") + head


def _aligned_first(item: tuple[str, Tensor]) -> tuple[bool, int, str]:
    """Those that leave the next one aligned come first; every one is aligned to its own numbers."""
    name, tensor = item
    return tensor.nbytes % _ALIGNMENT != 0, -tensor.itemsize, name


def _format_and_version() -> bytes:
    return _FORMAT + str(VERSION).encode() + _SHA


def _sha_place() -> slice:
    start = _LENGTH + len(_format_and_version())
    return slice(start, start + _DIGITS)


def _sha256(content: mmap.mmap) -> bytes:
    """Digits of the SHA-256 over the header's length and the SHA-256 of each piece behind the digits."""
    with memoryview(content) as view, ThreadPoolExecutor() as pool:
        starts = range(_sha_place().stop, len(view), _PIECE)
        pieces = pool.map(lambda start: hashlib.sha256(view[start : start + _PIECE]).digest(), starts)
        return hashlib.sha256(b"".join([view[:_LENGTH], *pieces])).hexdigest().encode()
