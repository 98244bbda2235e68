"""Tasks of lm-evaluation-harness, answered over the packed codes.

A model object of the harness (``PackedModel``) reads a context, quantizes it, and scores each continuation over the
codes. A prefill reads no code, so nothing that counts is taken from one: the last token of the context, which predicts
the first of the continuation, is decoded too.

Tokens are quantized in blocks of 64. Of a context the ``sinks`` and the last ``recent + 1`` to ``recent + 64`` tokens
stay exact, and one of fewer than about 64 tokens is not quantized at all: its answers are those of full precision,
whatever the preset. Therefore each result tells the share of what was attended to that was read as codes. Few-shot
examples make contexts long enough.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import huggingface_hub
import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from qjl.compat import cache_argument
from qjl.errors import QJLError
from qjl.fingerprints import digest
from qjl.hf import KVCache
from qjl.lab.evals import requests
from qjl.lab.evals.coverage import Reads, Watch
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.results import Journal, Row
from qjl.presets import CacheConfig, resolve
from qjl.teacher_forcing import decode, feed, log_probabilities, prefill, refill

try:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise QJLError("the harness is not installed: run `pip install 'qjl[lab]'`.") from error

FEW_SHOT_SEED = 1234  # the harness's own, as the next two
RANDOM_SEED = 0
NUMPY_SEED = 1234
BOOTSTRAPS = 1000
LENGTHS = "max_seq_lengths"  # by which RULER's tasks are made
HUB_PATIENCE = 5.0  # seconds
_QUESTIONS = ("shots", "limit", "include", "metadata")  # of a protocol, that say what is asked, not how it is answered

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
Task = dict[str, Any]  # the harness's dictionary of the tasks and groups behind one name
Request = tuple[Any, list[int], list[int]]  # the harness's: texts, tokens of the context, tokens to score
_Tokens = tuple[int, ...]


@dataclass(frozen=True)
class HarnessProtocol:
    """What is asked, and how it is answered.

    - ``shots``: examples in front of each question; None is what the task says.
    - ``limit``: questions per task, the first ones; None for all.
    - ``include``: a folder with tasks as YAML files.
    - ``metadata``: what the harness generates tasks by, such as ``{"max_seq_lengths": [1024]}`` for RULER's.
    - ``recent``: the exact window of every preset; None its own.
    - ``chunk``: a context goes through the model so many tokens at a time, over the codes of those before; None for
      all at once and exactly, as prompts are prefilled in use.
    - ``batch``: continuations, or prompts to go on from, that go through the model together.
    - ``seed``: of the projections.
    """

    shots: int | None = None
    limit: int | None = None
    recent: int | None = 0
    chunk: int | None = None
    batch: int = 8
    seed: int = 0
    include: Path | None = None
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if min(x for x in (self.limit, self.chunk, self.batch, 1) if x is not None) < 1:
            raise QJLError("limit, chunk and batch must be at least 1.")
        if self.include is not None and not self.include.is_dir():
            raise QJLError(f"{self.include} is no folder: give one with the YAML files of your tasks.")
        if len((self.metadata or {}).get(LENGTHS, [0])) != 1:
            raise QJLError(f"{LENGTHS} must hold one length: run the others one by one, so that each has a row.")

    @property
    def questions(self) -> Row:
        """What is asked, but for the names of the tasks."""
        asked = {name: getattr(self, name) for name in _QUESTIONS}
        return asked | {"include": None if self.include is None else str(self.include)}


def _silent(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda count: None)


class PackedModel(HFLM):
    """The harness's model object for transformers, with all that is scored or generated read from a quantized cache.

    Tokenization, windows of long texts, stop strings and chat templates are the harness's own. ``reads`` counts what
    was attended to; ``asked`` names what the harness asked, by digests.

    Args:
        cache: empty, of the same model; its codecs must not wait for a prompt, whose answers they would sweeten.
        chunk, batch: as in ``Protocol``.
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
        progress: Progress = _silent,
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


def load_tasks(
    names: Iterable[str],
    protocol: HarnessProtocol = HarnessProtocol(),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Task]:
    """Tasks by name: prebuilt ones (``olmes/...``), those of a folder with YAML files, YAML files, lm-eval's own.

    A task that is generated counts its tokens by ``tokenizer``, if ``protocol.metadata`` names no other.

    Raises:
        QJLError: for a task that is unknown, that cannot be loaded, or that cannot have other ``shots``.
    """
    with _metadata(protocol, tokenizer) as metadata:
        manager = functools.cache(functools.partial(_manager, protocol.include, metadata))
        return {
            name: _load_prebuilt(name, protocol.shots) if name.startswith(requests.PREFIX) else _load(name, manager)
            for name in names
        }


@contextlib.contextmanager
def _metadata(protocol: HarnessProtocol, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[dict[str, Any]]:
    """The harness takes a tokenizer by its place."""
    with TemporaryDirectory() as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        yield ({} if tokenizer is None else {"tokenizer": folder}) | dict(protocol.metadata or {})


def _manager(include: Path | None, metadata: dict[str, Any], include_defaults: bool) -> TaskManager:
    place = None if include is None else str(include)
    return TaskManager(include_path=place, include_defaults=include_defaults, metadata=metadata)


def _load_prebuilt(name: str, shots: int | None) -> Task:
    if shots is not None:
        raise QJLError(f"{name} has its examples written out: choose another variant of it in place of --shots.")
    return {"tasks": {name: ConfigurableTask(config=requests.task_config(name))}, "groups": {}}


def _load(name: str, manager: Callable[[bool], TaskManager]) -> Task:
    random.seed(RANDOM_SEED)  # some tasks are drawn, or shuffle their answers, when they are loaded
    np.random.seed(NUMPY_SEED)
    try:
        with _one_look_for_the_hub(), _silence():
            return dict(_manager_of(name, manager).load([name]))
    except ImportError as error:
        raise QJLError(f"task {name!r} needs the package {_missing(error)}: install it with pip.") from error
    except (OSError, LookupError, ValueError) as error:
        raise QJLError(
            f"task {name!r} cannot be loaded ({_reason(error)}): where there is no hub, put the data set into a folder "
            f"of its name, take a prebuilt task such as {requests.PREFIX}hellaswag/rc_5shot, or one of your own by "
            "--include."
        ) from error


def _manager_of(name: str, manager: Callable[[bool], TaskManager]) -> TaskManager:
    """The smaller one that knows the task: to look through all of the harness's own takes seconds."""
    for include_defaults in (False, True):
        found = manager(include_defaults)
        if name in found.all_tasks or name.endswith(".yaml"):
            return found
    raise QJLError(
        f"there is no task {name!r}: take a name of lm-eval, one in the folder given by --include, a .yaml file, or a "
        f"prebuilt one such as {requests.PREFIX}hellaswag/rc_5shot."
    )


@contextlib.contextmanager
def _one_look_for_the_hub() -> Iterator[None]:
    """Where it is out of reach its client is told so, which would else try for half a minute and more."""
    with contextlib.ExitStack() as stack:
        if not _is_hub_there():
            for place in (huggingface_hub.constants, datasets.config):
                stack.enter_context(mock.patch.object(place, "HF_HUB_OFFLINE", True))
        yield


def _is_hub_there() -> bool:
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception:  # whatever its HTTP library raises, which is another one from version to version
        return False
    return True


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Tasks tell how they are made, and of what they miss and may not need."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _missing(error: ImportError) -> str | None:
    """The harness raises an error of its own in place of the one that names the module."""
    origin = error.__context__ if isinstance(error.__context__, ImportError) else error
    return origin.name


def _reason(error: Exception) -> str:
    """Its first line in words."""
    if url := getattr(getattr(error, "request", None), "url", None):
        return f"{url} cannot be reached"
    lines = [line.strip() for line in str(error).splitlines() if any(map(str.isalpha, line))]
    return lines[0].rstrip(".") if lines else type(error).__name__


@dataclass(frozen=True, eq=False)
class Harness:
    """A model, and how it answers; in ``answers``, a JSON lines file, every answer is kept, and found again."""

    subject: EvalModel
    protocol: HarnessProtocol = HarnessProtocol()
    answers: Path | None = None

    def measure(
        self,
        presets: Iterable[str | Path | CacheConfig],
        tasks: Mapping[str, Task],
        progress: Callable[[str], Progress] = lambda what: _silent,
    ) -> Iterator[list[Row]]:
        """The rows of one preset and task at a time, a row per metric.

        ``value`` and its standard error ``value_se`` (None if there is none) are the harness's, over ``n`` questions,
        in front of which there were ``shots`` examples; ``asked`` is how the task was asked for, ``questions`` a digest
        of all that the harness then asked, so that another run can be known to have asked the same;
        ``read_as_codes`` is the share of codes among all tokens that were attended to; ``bits`` are true bits.

        Raises:
            QJLError: for a preset that the model cannot have, before anything is measured.
        """
        configs = [
            resolve(preset).with_seed(self.protocol.seed).with_window(self.protocol.recent) for preset in presets
        ]
        caches = [self.subject.cache(config) for config in configs]
        for config, cache in zip(configs, caches, strict=True):
            for name, task in tasks.items():
                yield self._rows(config, cache, name, task, progress(f"{config.name}, {name}"))

    def _rows(self, config: CacheConfig, cache: KVCache, name: str, task: Task, progress: Progress) -> list[Row]:
        identity = self.identity(config)
        model = PackedModel(
            self.subject.model,
            self.subject.tokenizer,
            cache,
            chunk=self.protocol.chunk,
            batch=self.protocol.batch,
            journal=Journal(self.answers, identity),
            progress=progress,
        )
        results = _evaluate(model, task, self.protocol)
        asked = {"task": name} | self.protocol.questions
        common = {"asked": asked, "questions": digest(model.asked), "read_as_codes": model.reads.share}
        common |= {"limit": self.protocol.limit} | self.subject.facts(config, cache)
        return [identity | row | common for row in _results(results)]

    def identity(self, config: CacheConfig) -> Row:
        """All that an answer depends on, but for the question."""
        identity = self.subject.identity(config)
        protocol = {name: value for name, value in dataclasses.asdict(self.protocol).items() if name not in _QUESTIONS}
        versions = identity["versions"] | {"lm_eval": version("lm_eval")}
        return identity | {
            "case": "harness",
            "protocol": protocol | {"few_shot_seed": FEW_SHOT_SEED},
            "versions": versions,
        }


def _evaluate(model: PackedModel, task: Task, protocol: HarnessProtocol) -> dict[str, Any]:
    for one in task["tasks"].values():
        _set_shots(one, protocol.shots)
    with contextlib.redirect_stdout(io.StringIO()):  # the harness tells there what it bootstraps
        return evaluate(model, task, limit=protocol.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)


def _set_shots(task: Any, shots: int | None) -> None:
    """As the harness does: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=own or 0 if own == 0 or shots is None else shots)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)


def _results(results: dict[str, Any]) -> Iterator[Row]:
    """A row for each task or group, metric and filter."""
    for name, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if (
                filtered
                and not metric.endswith("_stderr")
                and isinstance(value, Real)
                and not _is_unasked(metric, value)
            ):
                error = found.get(f"{metric}_stderr,{filtered}")
                yield {
                    "task": name,
                    "metric": metric,
                    "filter": filtered,
                    "value": float(value),
                    "value_se": error if isinstance(error, float) else None,
                    "n": found.get("sample_len"),
                    "shots": None if name.startswith(requests.PREFIX) else results["n-shot"].get(name),
                }


def _is_unasked(metric: str, value: Real) -> bool:
    """A length of RULER's that was not asked for has a value all the same, of -1."""
    return metric.isdecimal() and float(value) < 0
