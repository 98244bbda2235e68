"""Tasks of lm-evaluation-harness, answered over the packed codes.

The harness loads the tasks, asks and scores; ``PackedModel`` answers. Each result tells the share of what was attended
to that was read as codes: of short contexts there is none. Few-shot examples make contexts long enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import huggingface_hub
import numpy as np
from transformers import PreTrainedTokenizerBase

from qjl.errors import QJLError, reason
from qjl.fingerprints import digest
from qjl.hf import KVCache
from qjl.lab.evals import requests
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.results import Journal, Row
from qjl.presets import CacheConfig, resolve

try:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from qjl.lab.evals.packed_lm import PackedModel, Progress, silent
except ImportError as error:
    raise QJLError("the harness is not installed: run `pip install 'qjl[lab]'`.") from error

BOOTSTRAPS = 1000
LENGTHS = "max_seq_lengths"  # by which RULER's tasks are made
HUB_PATIENCE = 5.0  # seconds
_QUESTIONS = ("shots", "limit", "include", "metadata")  # of a protocol, that say what is asked, not how it is answered

Task = list[Any]  # the harness's objects behind one name: a group, or tasks


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
        return {name: getattr(self, name) for name in _QUESTIONS} | {"include": self.include and str(self.include)}


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
    with TemporaryDirectory() as folder:  # the harness takes a tokenizer by its place
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        metadata = ({} if tokenizer is None else {"tokenizer": folder}) | dict(protocol.metadata or {})
        manager = functools.cache(functools.partial(TaskManager, None, protocol.include, metadata=metadata))
        return {name: _load(name, protocol.shots, manager) for name in names}


def _load(name: str, shots: int | None, manager: Callable[..., TaskManager]) -> Task:
    if name.startswith(requests.PREFIX):
        return [ConfigurableTask(config=requests.task_config(name, shots))]
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks are drawn, or shuffle their answers, when they are loaded
    np.random.seed(DEFAULT_OTHER_SEED)
    known = _manager_of(name, manager)
    try:
        with _one_look_for_the_hub():
            found = known.load([name])
    except ImportError as error:
        origin = error.__context__ if isinstance(error.__context__, ImportError) else error  # names the module
        raise QJLError(f"task {name!r} needs the package {origin.name}: install it with pip.") from error
    except (OSError, LookupError, ValueError) as error:
        raise QJLError(
            f"task {name!r} cannot be loaded ({reason(error)}): where there is no hub, put the data set into a folder "
            f"of its name, take a prebuilt task such as {requests.PREFIX}hellaswag/rc_5shot, or one of your own by "
            "--include."
        ) from error
    return [*found["groups"].values()][:1] or [*found["tasks"].values()]  # the first group holds the others


def _manager_of(name: str, manager: Callable[..., TaskManager]) -> TaskManager:
    """The smaller one that knows the task: to look through all of the harness's own takes seconds."""
    for include_defaults in (False, True):
        found = manager(include_defaults=include_defaults)
        if name in found.all_tasks or name.endswith(".yaml"):
            return found
    raise QJLError(
        f"there is no task {name!r}: take a name of lm-eval, one in the folder given by --include, a .yaml file, or a "
        f"prebuilt one such as {requests.PREFIX}hellaswag/rc_5shot."
    )


@contextlib.contextmanager
def _one_look_for_the_hub() -> Iterator[None]:
    """Where it is out of reach its client is told so, which would else try for half a minute; nothing is printed."""
    is_out_of_reach = not _is_hub_there()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", is_out_of_reach),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", is_out_of_reach),
    ):
        yield


def _is_hub_there() -> bool:
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception:  # whatever its HTTP library raises, which is another one from version to version
        return False
    return True


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
        progress: Callable[[str], Progress] = lambda what: silent,
    ) -> Iterator[list[Row]]:
        """Rows of ``qjl.lab.rows.HarnessMetric``, those of one preset and task at a time.

        Raises:
            QJLError: for a preset that the model cannot have, before anything is measured.
        """
        seed, recent = self.protocol.seed, self.protocol.recent
        configs = [resolve(preset).with_seed(seed).with_window(recent) for preset in presets]
        caches = [self.subject.cache(config) for config in configs]
        for config, cache in zip(configs, caches, strict=True):
            for name, task in tasks.items():
                yield self._rows(config, cache, name, task, progress(f"{config.name}, {name}"))

    def _rows(self, config: CacheConfig, cache: KVCache, name: str, task: Task, progress: Progress) -> list[Row]:
        subject, protocol, identity = self.subject, self.protocol, self.identity(config)
        answers, chunk, batch = Journal(self.answers, identity), protocol.chunk, protocol.batch
        model = PackedModel(
            subject.model, subject.tokenizer, cache, chunk=chunk, batch=batch, journal=answers, progress=progress
        )
        results = _evaluate(model, task, protocol)
        asked = {"task": name} | protocol.questions
        common = {"asked": asked, "questions": digest(model.asked), "read_as_codes": model.reads.share}
        common |= {"limit": protocol.limit} | subject.facts(config, cache)
        return [identity | row | common for row in _results(results)]

    def identity(self, config: CacheConfig) -> Row:
        """All that an answer depends on, but for the question."""
        identity = self.subject.identity(config)
        protocol = {name: value for name, value in dataclasses.asdict(self.protocol).items() if name not in _QUESTIONS}
        return identity | {
            "case": "harness",
            "protocol": protocol | {"few_shot_seed": DEFAULT_OTHER_SEED},
            "versions": identity["versions"] | {"lm_eval": version("lm_eval")},
        }


def _evaluate(model: PackedModel, task: Task, protocol: HarnessProtocol) -> dict[str, Any]:
    with (
        contextlib.redirect_stdout(io.StringIO()),  # it tells what it bootstraps
        mock.patch("lm_eval.evaluator.get_git_commit_hash"),  # which rows need not tell
        mock.patch("lm_eval.evaluator.add_env_info"),
    ):
        return simple_evaluate(
            model,
            tasks=task,
            num_fewshot=protocol.shots,
            limit=protocol.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            task_manager=TaskManager(include_defaults=False),
        )


def _results(results: dict[str, Any]) -> Iterator[Row]:
    """A row for each task or group, metric and filter; a length that RULER was not asked for has a value of -1."""
    for name, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            is_value = filtered and isinstance(value, Real) and not metric.endswith("_stderr")
            if is_value and not (metric.isdecimal() and value < 0):
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
