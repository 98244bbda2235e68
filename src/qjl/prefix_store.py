"""A folder of prompt caches: the longest one that a new prompt begins with is read instead of computed.

Any number of processes may share a folder without waiting for each other: files appear whole, their names tell them
apart, there is no index, and a file that another process has just deleted is a miss.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qjl.architecture import layer_shapes
from qjl.cache.file import CacheFile, sha256_of_tokens
from qjl.container import PARTIAL, SUFFIX
from qjl.errors import QJLError
from qjl.fingerprints import digest, fingerprint
from qjl.hf import KVCache
from qjl.packed import BLOCK
from qjl.presets import DEFAULT_PRESET, CacheConfig, resolve

logger = logging.getLogger("qjl")
_OWN_NAME = re.compile(rf"[0-9a-f]{{16}}-[0-9a-f]{{16}}{re.escape(SUFFIX)}")
ABANDONED = 600  # seconds without a change, after which an unfinished file is of a process that was killed
_Seen = tuple[Path, int, int]  # inode and time of a change or use: what tells a file from one that was there before


class PromptCaches:
    """The prompt caches in a folder, in at most ``max_bytes``; those least recently used go first.

    >>> caches = qjl.PromptCaches("prompts", max_bytes=10 * 2**30)
    >>> cache = caches.longest(model, ids) or qjl.KVCache(model)
    >>> output = model.generate(ids, cache=cache)
    >>> caches.put(cache, output)
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._seen: dict[_Seen, Tensor] = {}  # token ids, which take milliseconds to find in a file

    def put(self, cache: KVCache, token_ids: Tensor | Sequence[int]) -> Path:
        """Keep a cache of one row, without padding and without a token mask; returns its file.

        Raises:
            QJLError: if the cache is another one, was loaded with other tokens (it knows no others), is larger than all
                of the folder may be, or cannot be saved.
        """
        _require_plain(cache)
        ids = torch.as_tensor(token_ids).reshape(1, -1)[:, : cache.get_seq_length()]
        _require_same(cache.prompt_ids, ids)
        name = f"{_family(cache.model, cache.config)}-{sha256_of_tokens(ids.int())[:16]}{SUFFIX}"
        path = self.folder / name
        size = cache.save(path, ids)
        if size > self.max_bytes:
            path.unlink(missing_ok=True)
            raise QJLError(f"a prompt cache of {size} bytes does not fit a folder of {self.max_bytes}: allow it more.")
        self._make_room(path)
        return path

    def longest(
        self,
        model: PreTrainedModel,
        token_ids: Tensor | Sequence[int],
        preset: str | Path | CacheConfig = DEFAULT_PRESET,
        *,
        at_least: int = BLOCK,
    ) -> KVCache | None:
        """The cache of the longest beginning of a prompt; None if no file has ``at_least`` tokens of it.

        It holds at most all tokens but the last, which is left for the model to read; its ``prompt_ids`` are those
        that it holds. Codes are those of the prompt that was kept, whatever has been cropped from its end. With layers
        that cannot be cropped (sliding windows, linear attention), only whole prompts are found.

        Raises:
            QJLError: if the model has no fingerprint, or the preset is unknown.
        """
        ids = torch.as_tensor(token_ids).reshape(-1).to("cpu", torch.int32)
        family = _family(model, resolve(preset))
        is_croppable = all(shape.is_quantized for shape in layer_shapes(model.config))
        self._look(family)
        shared = [(_shared(kept, ids, is_croppable), path) for (path, _, _), kept in self._seen.items()]
        for count, path in sorted((one for one in shared if one[0] >= at_least), reverse=True):
            with _passing_over(path):
                cache = KVCache.load(path, model)
                _keep_first(cache, count)
                with suppress(OSError):  # a folder that may only be read
                    os.utime(path)
                return cache
        return None

    def _look(self, family: str) -> None:
        """Read the token ids of files that have come or changed, and forget those of files that have gone."""
        before, self._seen = self._seen, {}
        for path in self.folder.glob(f"{family}-*{SUFFIX}"):
            with _passing_over(path):
                stat = path.stat()
                seen = path, stat.st_ino, stat.st_mtime_ns
                kept = before[seen] if seen in before else CacheFile(path).token_ids
                if kept is not None:
                    self._seen[seen] = kept.clone()  # a view would hold the file

    def _make_room(self, newest: Path) -> None:
        for partial in self.folder.glob(f".*{PARTIAL}"):
            with suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime > ABANDONED:
                    partial.unlink()
        total = 0
        for _, size, path in sorted(self._used(), key=lambda one: (one[2] == newest, one), reverse=True):
            total += size
            if total > self.max_bytes:
                path.unlink(missing_ok=True)

    def _used(self) -> Iterator[tuple[int, int, Path]]:
        """When each file that ``put`` wrote was used last, its bytes and its path; others are not ours to delete."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):
                if not _OWN_NAME.fullmatch(path.name):
                    continue
                stat = path.stat()
                yield stat.st_mtime_ns, stat.st_size, path


def _family(model: PreTrainedModel, config: CacheConfig) -> str:
    """The same for caches that can stand for each other."""
    return digest([fingerprint(model), str(model.dtype), config.settings])


def _shared(kept: Tensor, ids: Tensor, is_croppable: bool) -> int:
    """How many of the tokens ``ids [T]`` a file with ``kept [1, t]`` can serve."""
    size = min(kept.shape[1], len(ids) - 1)
    count = int((kept[0, :size] == ids[:size]).cumprod(0).sum())
    return count if is_croppable or count == kept.shape[1] else 0


def _require_plain(cache: KVCache) -> None:
    index = cache.index
    if index.batch > 1 or any(index.padding) or index.marks is not None:
        raise QJLError("a folder keeps caches of one row without padding and token mask: save others by themselves.")


def _require_same(known: Tensor | None, ids: Tensor) -> None:
    if known is not None:
        size = min(known.shape[1], ids.shape[1])
        if not known[:, :size].cpu().equal(ids[:, :size].to("cpu", known.dtype)):
            raise QJLError("the cache was loaded with other tokens: give those that it goes on from.")


def _keep_first(cache: KVCache, count: int) -> None:
    assert cache.prompt_ids is not None
    cache.prompt_ids = cache.prompt_ids[:, :count]
    surplus = cache.get_seq_length() - count
    if surplus:
        cache.crop(-surplus)


@contextmanager
def _passing_over(path: Path) -> Iterator[None]:
    """A file that is refused is a miss, and said so unless another process has deleted it."""
    try:
        yield
    except FileNotFoundError:
        pass
    except QJLError as error:
        if path.exists():
            logger.warning("%s", error)
