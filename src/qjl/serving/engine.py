"""The thread that owns the model: it reads prompts and writes answers, many at once, each on a cache of its own.

A turn is one forward pass over the next token of every answer being written and the next tokens of prompts being read.
So answers join and leave at any token, and wait for a piece of another's prompt at most.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl.calibrate import rows_of
from qjl.errors import QJLError
from qjl.generation import bf16_cache_bytes, cache_bytes, end_tokens, make_cache, prefill
from qjl.hf import KVCache
from qjl.presets import CacheConfig
from qjl.serving.metrics import Metrics
from qjl.serving.rows import read, rows_in
from qjl.serving.sampling import Choice, Chooser
from qjl.serving.writing import Writer

logger = logging.getLogger("qjl")
CHUNK = 512  # tokens of prompts read in one turn, and of one prompt at once
Reason = Literal["stop", "length"]


class Stopped(QJLError):
    """A job that is not taken, or not written to its end, since the engine stops."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: ask again in a while.")


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer, and why it ended if it did."""

    text: str
    reason: Reason | None = None


@dataclass(eq=False)
class Job:
    """A prompt to be answered. ``hear`` is called from the model's thread with pieces, or with what went wrong."""

    ids: list[int]
    max_tokens: int
    hear: Callable[[Piece | Exception], object]
    choice: Choice = field(default_factory=Choice)
    stops: Sequence[str] = ()
    written: int = 0
    is_cancelled: bool = False
    arrived: float = field(default_factory=time.perf_counter)


class _Row:
    """A job that is worked on."""

    def __init__(self, job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: CacheConfig):
        self.job = job
        self.cache = make_cache(model, config)
        self.chooser = Chooser(job.choice)
        self.writer = Writer(tokenizer, job.stops)
        self.unread = job.ids
        self.is_open = True
        self.last_token_at: float | None = None

    @property
    def is_writing(self) -> bool:
        return self.last_token_at is not None

    def next_tokens(self) -> list[int]:
        return self.unread[:CHUNK]

    def take(self, logits: Tensor, read: int, ends: set[int], metrics: Metrics) -> None:
        """Go on by what the model says after the next ``read`` tokens."""
        self.unread = self.unread[read:]
        if self.unread:
            return
        token = self.chooser(logits)
        self._note_time(metrics)
        self.job.written += 1
        metrics.tokens_written.inc()
        text = "" if token in ends else self.writer.write(token)
        reason: Reason | None = "stop" if token in ends or self.writer.stopped else None
        if reason is None and self.job.written == self.job.max_tokens:
            reason = "length"
        self.unread = [token]
        if reason is not None:
            self.is_open = False
            text += self.writer.finish()
            reason = "stop" if self.writer.stopped else reason
        if text or reason:
            self.job.hear(Piece(text, reason))

    def _note_time(self, metrics: Metrics) -> None:
        now = time.perf_counter()
        if self.last_token_at is None:
            metrics.first_token.observe(now - self.job.arrived)
            metrics.tokens_read.inc(len(self.job.ids))
        else:
            metrics.next_token.observe(now - self.last_token_at)
        self.last_token_at = now

    @property
    def nbytes(self) -> int:
        """Of its cache, without codecs, which all rows share."""
        return cache_bytes(self.cache) - (self.cache.codec_nbytes if isinstance(self.cache, KVCache) else 0)


@dataclass(frozen=True)
class Held:
    """Requests at hand, and bytes of their caches: as they are, and at 16 bits per number."""

    running: int
    waiting: int
    cache_bytes: int
    bf16_bytes: int


class Engine:
    """Answers jobs with one model.

    Args:
        config: of the caches.
        slots: answers written at once; other jobs wait.

    Raises:
        QJLError: if the model cannot read several sequences in one pass, or its cache cannot be quantized.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CacheConfig,
        *,
        slots: int = 16,
        metrics: Metrics | None = None,
    ) -> None:
        self.model, self.config, self.slots = model, config, slots
        self.metrics = metrics or Metrics()
        self._tokenizer = copy.deepcopy(tokenizer)  # one cannot be used by two threads at once
        self._ends = end_tokens(model) | ({tokenizer.eos_token_id} - {None})
        self._waiting: deque[Job] = deque()
        self._rows: list[_Row] = []
        self._asked: list[Future[Held]] = []
        self._changed = threading.Condition()
        self._is_stopping = self._is_closed = False
        make_cache(model, config)  # raises now what would go wrong later
        with rows_in(model):
            pass
        self._thread = threading.Thread(target=self._work, name="qjl-model", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, job: Job) -> None:
        """Raises Stopped if the engine is stopping."""
        with self._changed:
            if self._is_stopping:
                raise Stopped
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nothing more is written to the job; its cache is gone after the turn at hand."""
        job.is_cancelled = True
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)

    def held(self) -> Future[Held]:
        """What is at hand, as of the end of the turn."""
        future: Future[Held] = Future()
        with self._changed:
            self._asked.append(future)
            self._changed.notify()
            if self._is_closed:
                self._answer()
        return future

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def is_idle(self) -> bool:
        return not self._rows and not self._waiting

    def drain(self) -> None:
        """Take no more jobs and refuse those that wait; those being written go on."""
        with self._changed:
            self._is_stopping = True
            while self._waiting:
                self._waiting.popleft().hear(Stopped())

    def close(self) -> None:
        """End at once: what is being written fails. Returns when the thread has ended."""
        self.drain()
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    # In the model's thread

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            with rows_in(self.model):
                while self._admit():
                    self._turn()
        finally:
            self._end()

    def _end(self) -> None:
        self.drain()
        for row in self._rows:
            row.job.hear(Stopped())
        with self._changed:
            self._rows, self._is_closed = [], True
            self._answer()

    def _admit(self) -> bool:
        """Wait for something to do, and give waiting jobs the free slots; False when all is over."""
        with self._changed:
            while True:
                self._rows = [row for row in self._rows if row.is_open and not row.job.is_cancelled]
                while self._waiting and len(self._rows) < self.slots:
                    self._rows.append(_Row(self._waiting.popleft(), self.model, self._tokenizer, self.config))
                self._answer()
                if self._is_closed:
                    return False
                if self._rows:
                    return True
                self._changed.wait()

    def _answer(self) -> None:
        while self._asked:
            full = sum(bf16_cache_bytes(row.cache, self.model.dtype) for row in self._rows)
            held = Held(len(self._rows), len(self._waiting), sum(row.nbytes for row in self._rows), full)
            asked = self._asked.pop()
            if asked.set_running_or_notify_cancel():
                asked.set_result(held)

    def _turn(self) -> None:
        rows = self._rows_of_turn()
        tokens = [row.next_tokens() for row in rows]
        with _failing(rows):
            logits = read(self.model, [row.cache for row in rows], tokens)
            for row, scores, given in zip(rows, logits, tokens, strict=True):
                with _failing([row]):
                    row.take(scores, len(given), self._ends, self.metrics)

    def _rows_of_turn(self) -> list[_Row]:
        """All that write, and those that have waited longest to read, as far as their tokens fit one turn."""
        writing, reading, room = [row for row in self._rows if row.is_writing], [], CHUNK
        for row in (row for row in self._rows if not row.is_writing):
            size = len(row.next_tokens())
            if size <= room:
                reading.append(row)
                room -= size
        self._rows = [row for row in self._rows if row not in reading] + reading
        return writing + reading


@contextmanager
def _failing(rows: list[_Row]) -> Iterator[None]:
    """What goes wrong ends these answers, and no others."""
    try:
        yield
    except Exception as error:
        logger.exception("%d answers failed", len(rows))
        for row in rows:
            row.is_open = False
            row.job.hear(error)


def fit_codecs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: CacheConfig, text: Callable[[], str]
) -> None:
    """Take the statistics that codecs are fitted to from a text, so that no request's words are in those of others.

    Statistics of ``qjl calibrate`` are taken where they exist.

    Raises:
        QJLError: if the text is too short.
    """
    cache = make_cache(model, config)
    if not isinstance(cache, KVCache) or cache.has_codecs:
        return
    prefill(model, rows_of(model, tokenizer, text())[0].tolist(), cache)
    if not cache.has_codecs:
        raise QJLError(f"the text is too short to fit {config.name} to: run `qjl calibrate` first.")
