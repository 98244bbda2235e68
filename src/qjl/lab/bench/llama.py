"""llama.cpp on the same GGUF, where the package ``llama-cpp-python`` is installed.

It runs in a process of its own: two OpenMP libraries in one get in each other's way, and the command line's
``OMP_WAIT_POLICY`` would slow it down.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

from qjl.errors import QJLError

CACHES = ("f16", "q8_0", "q4_0")
ROOM = 1024  # tokens beyond the longest context
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def is_installed() -> bool:
    return find_spec("llama_cpp") is not None


class Llama:
    """A model whose key-value cache is of one of llama.cpp's types, with its flash attention.

    Raises:
        QJLError: if llama.cpp cannot load it.
    """

    def __init__(self, path: Path, cache: str, ids: Sequence[int], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._path = path
        self._pipe, other_end = context.Pipe()
        process = context.Process(target=_serve, args=(other_end, str(path), cache, list(ids), threads), daemon=True)
        with _without(WAITING):
            process.start()
        other_end.close()
        self.fill(1)

    def fill(self, context: int) -> None:
        """Hold the first ``context`` tokens; those of an earlier, shorter context are there already."""
        self._ask(context)

    def step(self) -> None:
        """Decode one token."""
        self._ask(None)

    def _ask(self, context: int | None) -> None:
        try:
            self._pipe.send(context)
            self._pipe.recv()
        except (EOFError, OSError) as error:
            raise QJLError(f"llama.cpp could not run {self._path}: leave it out with --against.") from error


def _serve(pipe: Connection, path: str, cache: str, ids: list[int], threads: int) -> None:
    """Fill the cache for every number received, and decode a token for every None."""
    import llama_cpp

    kind = getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
    llama = llama_cpp.Llama(
        path,
        n_ctx=len(ids) + ROOM,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )
    kept = 0
    with suppress(EOFError):  # the benchmark has ended
        while True:
            context = pipe.recv()
            if context is None:
                llama.eval(ids[:1])
            else:
                llama.n_tokens = min(context, kept)
                llama.eval(ids[llama.n_tokens : context])
                kept = context
            pipe.send(None)


@contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    taken = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
