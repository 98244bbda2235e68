"""The model object of lm-evaluation-harness whose answers are all read from a quantized cache.

``PackedModel`` reads a context, quantizes it, and scores each continuation over the codes. A prefill reads no code, so
nothing that counts is taken from one: the last token of the context, which predicts the first of the continuation, is
decoded too.

Tokens are quantized in blocks of 64. Of a context the ``sinks`` and the last ``recent + 1`` to ``recent + 64`` tokens
stay exact, and one of fewer than about 64 tokens is not quantized at all: its answers are those of full precision,
whatever the preset.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from qjl.compat import cache_argument
from qjl.fingerprints import digest
from qjl.hf import KVCache
from qjl.lab.evals.coverage import Reads, Watch
from qjl.lab.results import Journal
from qjl.teacher_forcing import decode, feed, log_probabilities, prefill, refill

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
Request = tuple[Any, list[int], list[int]]  # the harness's: texts, tokens of the context, tokens to score
_Tokens = tuple[int, ...]


def silent(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A ``Progress`` that tells nothing."""
    return nullcontext(lambda count: None)


class PackedModel(HFLM):
    """The harness's model object for transformers, with all that is scored or generated read from a quantized cache.

    Tokenization, windows of long texts, stop strings and chat templates are the harness's own. ``reads`` counts what
    was attended to; ``asked`` names what the harness asked, by digests.

    Args:
        cache: empty, of the same model; its codecs must not wait for a prompt, whose answers they would sweeten.
        chunk, batch: as in ``HarnessProtocol``.
        journal: where answers are kept and found again.
        progress: given a number of requests, a context manager of a function that is told how many more are done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: KVCache,
        *,
        chunk: int | None = None,
        batch: int = 8,
        journal: Journal | None = None,
        progress: Progress = silent,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
        self.reads = Reads()
        self.asked: list[str] = []
        self._empty, self._chunk = cache, chunk
        self._journal = journal or Journal()
        self._progress = progress
        self._advance: Callable[[int], None] = lambda count: None

    @contextlib.contextmanager
    def _running(self, requests: Sequence[Any]) -> Iterator[None]:
        self.asked.append(digest([request.args for request in requests]))
        with self._progress(len(requests)) as self._advance:
            yield

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with self._running(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        with self._running(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        with self._running(requests):
            return super().generate_until(requests, disable_tqdm=True)

    # Scoring

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each request: the log-likelihood of its continuation, and whether greedy decoding gives it."""
        answers: dict[int, dict[str, Any]] = {}
        by_context = _by_context(requests, self.max_length)
        contexts = functools.cache(lambda: _Contexts(self.model, self._empty, self._chunk, list(by_context)))
        for context, members in by_context.items():
            for first in range(0, len(members), self.batch_size):
                part = members[first : first + self.batch_size]
                continuations = [requests[index][2] for index in part]
                score = functools.partial(self._score, contexts, context, continuations)
                found = self._journal.answer(["score", context, continuations], score)
                answers.update(zip(part, found, strict=True))
                self._advance(len(part))
        for answer in answers.values():
            self.reads.add(answer["codes"], answer["tokens"])
        return [(answers[index]["log_likelihood"], answers[index]["is_greedy"]) for index in range(len(requests))]

    @torch.inference_mode()
    def _score(
        self, contexts: Callable[[], _Contexts], context: _Tokens, continuations: list[list[int]]
    ) -> list[dict[str, Any]]:
        cache, prefix = contexts().after(context[:-1]), len(context) - 1
        if prefix:
            cache.reorder_cache(torch.zeros(len(continuations), dtype=torch.long))  # type: ignore[arg-type]
        ids = _right_padded([[*context, *continuation] for continuation in continuations])
        found, right, codes = [], [], []
        packed = _packed_tokens(cache)
        for first, logits in decode(self.model, cache, ids, prefix):
            stop = first + logits.shape[1]
            targets = ids[:, first + 1 : stop + 1].to(logits.device)
            found.append(log_probabilities(logits).gather(2, targets[..., None])[..., 0].cpu())
            right.append((logits.argmax(-1) == targets).cpu())
            codes += [packed] * logits.shape[1]
            packed = _packed_tokens(cache)
        rows = zip(torch.cat(found, 1), torch.cat(right, 1), map(len, continuations), strict=True)
        return [
            {
                "log_likelihood": float(row[:length].sum()),
                "is_greedy": bool(greedy[:length].all()),
                "codes": sum(codes[:length]),
                "tokens": sum(range(prefix + 1, prefix + length + 1)),
            }
            for row, greedy, length in rows
        ]

    # Generation

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """All tokens ``[B, T]`` after ``context``, which may be padded on the left."""
        mask = settings.pop("attention_mask")
        request = ["generate", context.tolist(), mask.tolist(), max_length, stop, settings]
        generate = functools.partial(self._generate, context, mask, max_length, stop, settings)
        answer = self._journal.answer(request, generate)
        self.reads.add(answer["codes"], answer["tokens"])
        self._advance(len(context))
        return torch.tensor(answer["generated"])

    def _generate(
        self, context: Tensor, mask: Tensor, max_length: int, stop: list[str], settings: dict[str, Any]
    ) -> dict[str, Any]:
        cache, reads = copy.deepcopy(self._empty), Reads()
        torch.manual_seed(0)  # where a task samples, a run that goes on must draw what an unbroken one draws
        tokens = super()._model_generate(
            context,
            max_length,
            stop,
            attention_mask=mask,
            **cache_argument(cache),
            prefill_chunk_size=self._chunk,
            logits_processor=LogitsProcessorList([Watch(cache, reads)]),
            **settings,
        )
        return {"generated": tokens.tolist(), "codes": reads.codes, "tokens": reads.tokens}


class _Contexts:
    """Quantized caches of contexts. What all of them begin with, such as examples, goes through the model once."""

    def __init__(self, model: PreTrainedModel, pristine: KVCache, chunk: int | None, contexts: list[_Tokens]) -> None:
        self.model, self.pristine, self.chunk = model, pristine, chunk
        shared = [] if chunk else [*_common_start(contexts)][: min(map(len, contexts)) - 1]
        self.shared = len(shared)
        self.exact = prefill(model, _row(shared))

    def after(self, context: _Tokens) -> KVCache:
        cache = copy.deepcopy(self.pristine)
        if self.chunk is None:
            exact = copy.deepcopy(self.exact)
            feed(self.model, exact, _row(context[self.shared :]))
            refill(cache, exact)
        else:
            for piece in _row(context).split(self.chunk, dim=1):
                feed(self.model, cache, piece)
        return cache


def _common_start(rows: list[_Tokens]) -> Iterator[int]:
    """What all of them begin with."""
    pairs = zip(min(rows), max(rows), strict=False)
    return (token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _row(tokens: Sequence[int]) -> Tensor:
    """``int64 [1, T]``"""
    return torch.tensor([tokens], dtype=torch.long)


def _by_context(requests: list[Request], longest: int) -> dict[_Tokens, list[int]]:
    """Indices of requests by their context, cut on the left where it and the continuation are too long together."""
    found: dict[_Tokens, list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        surplus = max(0, len(context) + len(continuation) - longest - 1)
        found.setdefault(tuple(context[surplus:]), []).append(index)
    return found


def _right_padded(rows: list[list[int]]) -> Tensor:
    """``int64 [B, T]``; no token attends to what comes after it."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def _packed_tokens(cache: KVCache) -> int:
    """Of one row; all are alike."""
    return max(cache.packed_tokens, default=0)
