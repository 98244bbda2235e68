"""The thread that owns the model: it reads prompts and writes answers, many at once, on rows of one cache.

A turn is one forward pass over the next token of every answer being written and the next tokens of prompts being read.
So answers join and leave at any token, and wait for a piece of another's prompt at most. What all rows take is kept
within a budget of bytes: where it would be exceeded, the answer that came last gives its pages back, and reads its
tokens again later. An ended conversation stays as long as there is room, so that its next turn need not be read again;
it serves requests of the same client alone.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl.calibration import rows_of
from qjl.errors import QJLError
from qjl.generation import end_tokens, make_cache, prefill
from qjl.hf import KVCache
from qjl.packed import BLOCK
from qjl.presets import CacheConfig
from qjl.server.detokenizer import Writer
from qjl.server.metrics import Held, Metrics
from qjl.server.ragged_batch import RaggedBatch
from qjl.server.sampling import Choice, Chooser

logger = logging.getLogger("qjl")
CHUNK = 512  # tokens of prompts read in one turn, and of one prompt at once
SLOTS = 16
MOST_ENDED = 64  # conversations that may go on
LEAST_SHARED = BLOCK  # tokens, for which taking up a conversation again is worth it
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
    """A prompt to be answered. ``hear`` is called from the model's thread with pieces, or with what went wrong.

    Jobs of one ``client`` may share the tokens that their prompts begin with; None shares with nobody.
    """

    ids: list[int]
    max_tokens: int
    hear: Callable[[Piece | Exception], object]
    choice: Choice = field(default_factory=Choice)
    stops: Sequence[str] = ()
    client: str | None = None
    written: int = 0
    is_cancelled: bool = False
    arrived: float = field(default_factory=time.perf_counter)


class _Row:
    """A job that is worked on, and the sequence that holds what was read and written of it."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase) -> None:
        self.job = job
        self.chooser = Chooser(job.choice)
        self.writer = Writer(tokenizer, job.stops)
        self.ids = list(job.ids)  # read or written so far, and yet to be read
        self.read = 0  # of these
        self.sequence: int | None = None
        self.is_open = True
        self.has_failed = False
        self.last_token_at: float | None = None

    @property
    def is_writing(self) -> bool:
        """Whether only the token that was written last is still to be read."""
        return self.last_token_at is not None and len(self.ids) - self.read == 1

    def next_tokens(self) -> list[int]:
        return self.ids[self.read : self.read + CHUNK]

    def take(self, logits: Tensor, read: int, ends: set[int], metrics: Metrics) -> None:
        """Go on by what the model says after the next ``read`` tokens."""
        self.read += read
        if self.read < len(self.ids):
            return
        token = self.chooser(logits)
        self._note_time(metrics)
        self.job.written += 1
        metrics.tokens_written.inc()
        text = "" if token in ends else self.writer.write(token)
        reason: Reason | None = "stop" if token in ends or self.writer.stopped else None
        if reason is None and self.job.written == self.job.max_tokens:
            reason = "length"
        self.ids.append(token)
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


@dataclass(frozen=True, eq=False)
class _Ended:
    """A conversation that may go on: its client, its tokens, and the sequence that holds them."""

    client: str
    ids: list[int]
    sequence: int


class Engine:
    """Answers jobs with one model.

    Args:
        config: of the cache.
        slots: answers written at once; other jobs wait.
        memory: bytes that the tensors of the cache may take, codecs apart.

    Raises:
        QJLError: if the model cannot read several sequences in one pass, its cache cannot be quantized, or codecs wait
            for statistics (``fit_codecs``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CacheConfig,
        *,
        slots: int = SLOTS,
        memory: int | None = None,
    ) -> None:
        self.model, self.config, self.slots = model, config, slots
        self.memory = half_of_memory() if memory is None else memory
        self.metrics = Metrics()
        self._tokenizer = copy.deepcopy(tokenizer)  # one cannot be used by two threads at once
        self._ends = end_tokens(model) | ({tokenizer.eos_token_id} - {None})
        self._waiting: deque[Job] = deque()
        self._rows: list[_Row] = []
        self._paused: deque[_Row] = deque()  # whose pages were needed by others
        self._ended: OrderedDict[int, _Ended] = OrderedDict()  # least recently used first
        self._asked: list[Future[Held]] = []
        self._changed = threading.Condition()
        self._is_stopping = self._is_closed = self._has_ended = False
        self._batch = RaggedBatch(model, config, self.memory)
        with self._batch.attached():
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
            if self._has_ended:
                self._answer()
        return future

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def is_idle(self) -> bool:
        with self._changed:
            return not self._rows and not self._waiting and not self._paused

    def drain(self) -> None:
        """Take no more jobs and refuse those that wait; those being written go on."""
        with self._changed:
            self._is_stopping = True
            while self._waiting:
                _tell(self._waiting.popleft(), Stopped())

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
            with self._batch.attached():
                while self._admit():
                    if self._rows:
                        self._turn()
                    else:
                        self._batch.shrink()
        finally:
            self._end()

    def _end(self) -> None:
        self.drain()
        for row in [*self._rows, *self._paused]:
            _tell(row.job, Stopped())
        with self._changed:
            self._rows, self._has_ended = [], True
            self._paused.clear()
            self._ended.clear()
            self._batch.clear()
            self._answer()

    def _admit(self) -> bool:
        """Wait for something to do, and take up paused and waiting jobs as there is room; False when all is over.

        Without rows there is room to be given back.
        """
        with self._changed:
            while True:
                self._clear()
                while self._paused and self._has_room(len(self._paused[0].ids)):
                    self._rows.append(self._paused.popleft())
                while self._waiting and not self._paused and self._has_room(len(self._waiting[0].ids)):
                    self._rows.append(_Row(self._waiting.popleft(), self._tokenizer))
                if not self._rows and self._batch.is_loose:
                    return True
                self._answer()
                if self._is_closed:
                    return False
                if self._rows:
                    return True
                self._changed.wait()

    def _clear(self) -> None:
        """Let go of jobs that are done or cancelled."""
        for row in self._rows:
            if not row.is_open or row.job.is_cancelled:
                self._leave(row)
        self._rows = [row for row in self._rows if row.is_open and not row.job.is_cancelled]
        self._paused = deque(row for row in self._paused if not row.job.is_cancelled)

    def _leave(self, row: _Row) -> None:
        """Keep its tokens for the client's next turn, if there is a client."""
        sequence, client = row.sequence, row.job.client
        if sequence is None:
            return
        if client is None or row.is_open or row.has_failed:
            self._batch.drop(sequence)
        else:
            self._ended[sequence] = _Ended(client, row.ids[: row.read], sequence)
            if len(self._ended) > MOST_ENDED:
                self._forget_oldest()

    def _has_room(self, tokens: int) -> bool:
        """For another answer whose prompt has so many tokens; one that is alone always has."""
        if not self._rows:
            return True
        unread = [len(row.ids) - row.read for row in self._rows if not row.is_writing]
        return len(self._rows) < self.slots and self._fits(sum(map(self._batch.bytes_for, [tokens, *unread])))

    def _fits(self, more: int) -> bool:
        """Whether the cache may take so many more bytes, once ended conversations have made way; none does in vain."""
        if self._batch.nbytes + more <= self.memory:
            return True
        running = [row.sequence for row in self._rows if row.sequence is not None]
        if self._batch.nbytes_of(running) + more > self.memory:
            return False
        while self._batch.nbytes + more > self.memory:
            self._forget_oldest()
        return True

    def _forget_oldest(self) -> None:
        self._batch.drop(self._ended.popitem(last=False)[0])

    def _answer(self) -> None:
        while self._asked:
            sequences = [row.sequence for row in self._rows if row.sequence is not None]
            full = self._batch.bf16_bytes(sequences)
            waiting = len(self._waiting) + len(self._paused)
            held = Held(len(self._rows), waiting, self._batch.nbytes, self._batch.allocated_nbytes, full)
            asked = self._asked.pop()
            if asked.set_running_or_notify_cancel():
                asked.set_result(held)

    def _turn(self) -> None:
        rows = self._rows_of_turn()
        for row in rows:
            if row.sequence is None:
                with _failing([row]):
                    self._begin(row)
        rows = [row for row in rows if not row.has_failed]
        tokens = {row.sequence: row.next_tokens() for row in rows if row.sequence is not None}
        by_sequence = {row.sequence: row for row in rows}
        with _failing(rows):
            logits = self._batch.read(tokens)
            for sequence, scores in zip(self._batch.order(tokens), logits, strict=True):
                row = by_sequence[sequence]
                with _failing([row]):
                    row.take(scores, len(tokens[sequence]), self._ends, self.metrics)

    def _begin(self, row: _Row) -> None:
        """A sequence for a row: one that begins with what the same client has read before, or an empty one."""
        found = self._longest_shared(row)
        if found is not None:
            ended, count = found
            row.sequence = self._batch.share(ended.sequence, count)
            if row.sequence is not None:  # which goes on in its place
                del self._ended[ended.sequence]
                self._batch.drop(ended.sequence)
        if row.sequence is None:
            row.sequence = self._batch.add()
        row.read = self._batch.length(row.sequence)
        self.metrics.shared.inc(row.read)

    def _longest_shared(self, row: _Row) -> tuple[_Ended, int] | None:
        """An ended conversation of the row's client, and how many tokens they share; the last is always read anew."""
        if row.job.client is None:
            return None
        ours = [ended for ended in self._ended.values() if ended.client == row.job.client]
        shared = [(_common(ended.ids, row.ids[:-1]), ended) for ended in ours]
        count, best = max(shared, key=lambda one: one[0], default=(0, None))
        return (best, count) if best is not None and count >= LEAST_SHARED else None

    def _rows_of_turn(self) -> list[_Row]:
        """All that write, and those that have waited longest to read, as far as tokens and bytes allow."""
        self._make_room()
        writing, reading, room = [row for row in self._rows if row.is_writing], [], CHUNK
        for row in (row for row in self._rows if not row.is_writing):
            size = len(row.next_tokens())
            if size <= room:
                reading.append(row)
                room -= size
        self._rows = [row for row in self._rows if row not in reading] + reading
        return writing + reading

    def _make_room(self) -> None:
        """Pause answers that came last until the others can go on; one always can, though all else makes way."""
        while not self._fits(self._bytes_of_turn()):
            if len(self._rows) == 1:
                while self._ended:
                    self._forget_oldest()
                return
            row = max(self._rows, key=lambda one: one.job.arrived)
            self._rows.remove(row)
            if row.sequence is not None:
                self._batch.drop(row.sequence)
            row.sequence, row.read = None, 0
            self._paused.append(row)
            self.metrics.paused.inc()

    def _bytes_of_turn(self) -> int:
        """At most so many bytes do the next tokens of all rows take."""
        counts = {row.sequence: len(row.next_tokens()) for row in self._rows if row.sequence is not None}
        new = [len(row.next_tokens()) for row in self._rows if row.sequence is None]
        return self._batch.bytes_for_pass(counts) + sum(map(self._batch.bytes_for, new))


def _tell(job: Job, error: Exception) -> None:
    """Who asked may be gone, which is no matter of others."""
    try:
        job.hear(error)
    except Exception:
        logger.exception("an error could not be told")


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


def half_of_memory() -> int:
    """Bytes: half of what the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@contextmanager
def _failing(rows: list[_Row]) -> Iterator[None]:
    """What goes wrong ends these answers, and no others."""
    try:
        yield
    except Exception as error:
        logger.exception("%d answers failed", len(rows))
        for row in rows:
            row.is_open, row.has_failed = False, True
            _tell(row.job, error)


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
