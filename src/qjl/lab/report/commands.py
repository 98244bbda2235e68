"""The command that measures rows again.

A text that is not the default is named by the digest that rows keep of it, and a preset that is none of ours by a JSON
file of that name, whose content is among the settings beside the command.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from qjl import texts
from qjl.fingerprints import digest
from qjl.lab.bench.random_models import SHAPES
from qjl.lab.evals.widths import every_width
from qjl.lab.records import Row
from qjl.presets import PRESETS

WIDTH = 96
_MODEL = ("dtype", "device", "threads", "steps")


def _line(command: str, **options: Any) -> str:
    """An option per keyword: repeated for a list, a flag for True, left out for None and False."""
    words = [f"qjl {command}"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                words.append(flag if one is True else f"{flag} {shlex.quote(str(one))}")
    return _wrapped(words)


def _wrapped(words: Sequence[str]) -> str:
    """As lines that a shell reads as one."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return " \\\n".join(lines)


def _values(rows: Sequence[Row], field: str) -> list[Any]:
    return list(dict.fromkeys(row[field] for row in rows))


def _presets(rows: Sequence[Row]) -> list[str]:
    """A preset's name, or a file's; those of whole models also say what numbers they run in."""
    names = (row["preset"].split()[0] for row in rows)
    return list(dict.fromkeys(name if name in PRESETS else f"{name}.json" for name in names))


def _text(rows: Sequence[Row], field: str = "text") -> str | None:
    digest = rows[0].get(field) or rows[0].get("protocol", {}).get(field)
    return f"{digest}.txt" if digest and digest != _default_text() else None


@functools.cache
def _default_text() -> str:
    return digest(texts.essays())


def _recent(rows: Sequence[Row]) -> Any:
    """The exact window that all had, or each preset's own."""
    found = _values(rows, "recent")
    return found[0] if len(found) == 1 else "own"


def _evaluated(rows: Sequence[Row]) -> dict[str, Any]:
    row = rows[0]
    return {"model": row["model"], "dtype": row.get("dtype"), "preset": _presets(rows), "fit": _text(rows, "fitted_to")}


def frontier(rows: Sequence[Row]) -> str:
    """A command for presets by name, and one for those that only ``--widths`` names."""
    swept = {config.name for config in every_width()} - PRESETS.keys()
    named = _presets([row for row in rows if row["preset"] not in swept])
    asked: list[dict[str, Any]] = [{"preset": named}] if named else []
    if any(row["preset"] in swept for row in rows):
        asked.append({"widths": True})
    return "\n".join(_frontier(rows[0], chosen) for chosen in asked)


def _frontier(row: Row, chosen: dict[str, Any]) -> str:
    protocol = row["protocol"]
    options = {name: protocol.get(name) for name in ("prefix", "decode", "chunks", "seeds")}
    return _line(
        "eval frontier",
        **{"model": row["model"], "dtype": row.get("dtype"), "bits": "0..16"} | chosen,
        **{"data": _text([row])} | options,
        recent="own" if protocol.get("recent") is None else protocol["recent"],
        no_retrieval=not protocol.get("retrieval"),
    )


def distortion(rows: Sequence[Row]) -> str:
    row = rows[0]
    options = {"data": _text(rows), "tokens": row.get("tokens"), "rows": row.get("rows"), "recent": _recent(rows)}
    return _line("eval distortion", **_evaluated(rows), **options)


def perplexity(rows: Sequence[Row]) -> str:
    row = rows[0]
    options = {"data": _text(rows), "context": _values(rows, "context"), "chunks": row["chunks"]}
    return _line("eval perplexity", **_evaluated(rows), **options, recent=_recent(rows))


def seeds(rows: Sequence[Row]) -> str:
    row = rows[0]
    options = {name: row[name] for name in ("prefix", "decode", "chunks")}
    count = max(row["seed"] for row in rows) + 1
    return _line("eval seeds", **_evaluated(rows), data=_text(rows), seeds=count, **options, recent=_recent(rows))


def haystack(rows: Sequence[Row]) -> str:
    """A command for all tasks that were asked at the same places."""
    places: dict[tuple[tuple[Any, ...], ...], list[Row]] = {}
    for task in _values(rows, "task"):
        of = [row for row in rows if row["task"] == task]
        places.setdefault(tuple(tuple(_values(of, field)) for field in ("context", "depth", "seed")), []).extend(of)
    return "\n".join(_retrieval(contexts, depths, seeds, of) for (contexts, depths, seeds), of in places.items())


def _retrieval(contexts: Sequence[int], depths: Sequence[float], seeds: Sequence[int], rows: Sequence[Row]) -> str:
    options = {"task": _values(rows, "task"), "context": list(contexts), "depths": len(depths), "seeds": len(seeds)}
    return _line("eval retrieval", **_evaluated(rows), data=_text(rows), **options, recent=_recent(rows))


def problems(rows: Sequence[Row]) -> str:
    row, protocol = rows[0], rows[0]["protocol"]
    data = shlex.quote(f"{row['task']}.jsonl")
    told = {name: protocol.get(name) for name in ("max_new_tokens", "batch", "seed")}
    options = {"task": row["task"], "limit": row["n"]}
    return _line(f"eval generate {data}", **_evaluated(rows), **options, **told, recent=_recent(rows))


def harness(rows: Sequence[Row]) -> str:
    """A command for all tasks that were asked alike; rows of old say less of that."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        told = {name: value for name, value in row.get("asked", {}).items() if name != "task"}
        alike.setdefault(json.dumps(told), []).append(row)
    return "\n".join(map(_harness, alike.values()))


def _harness(rows: Sequence[Row]) -> str:
    row, protocol = rows[0], rows[0]["protocol"]
    asked = row.get("asked", {})
    metadata = json.dumps(asked["metadata"]) if asked.get("metadata") else None
    tasks = list(dict.fromkeys(row.get("asked", row)["task"] for row in rows))
    options = {"task": tasks, "limit": row.get("limit"), "data": _text(rows, "fitted_to")}
    options |= {"shots": asked.get("shots"), "include": asked.get("include"), "metadata": metadata}
    told = {name: protocol.get(name) for name in ("chunk", "batch", "seed")}
    shared = {name: value for name, value in _evaluated(rows).items() if name != "fit"}
    return _line("eval harness", **shared, **options, **told, recent=_recent(rows))


def _layer(rows: Sequence[Row]) -> dict[str, Any]:
    """A benchmark's shape and conditions; rows of old say no batch and no device."""
    row = rows[0]
    fields = ("head_dim", "kv_heads", "group", "batch", "device", "threads", "repeats", "dtype")
    return {name: row.get(name) for name in fields}


def decode(rows: Sequence[Row]) -> str:
    against = [name.removeprefix("ms_") for name in rows[0] if name.startswith("ms_")]
    options = {"preset": _presets(rows), "tokens": _values(rows, "tokens"), "against": against}
    return _line("bench decode", **options, **_layer(rows))


def encode(rows: Sequence[Row]) -> str:
    return _line("bench encode", preset=_presets(rows), tokens=_values(rows, "tokens"), **_layer(rows))


def scan(rows: Sequence[Row]) -> str:
    row = rows[0]
    codes = [name.partition("-") for name in _values(rows, "preset")]
    options = {"signs": [size for kind, _, size in codes if kind == "signs"]}
    options |= {"bits": [size for kind, _, size in codes if kind == "levels"]}
    shape = {name: row.get(name) for name in ("head_dim", "kv_heads", "group", "threads", "repeats")}
    return _line("bench kernels", **options, tokens=row["tokens"], **shape)


def _whole(rows: Sequence[Row], is_ours: Callable[[Row], bool], *conditions: str) -> dict[str, Any]:
    row = rows[0]
    source = "random" if row["model"] in SHAPES else "model"
    peers = list(dict.fromkeys(row["preset"].split()[0] for row in rows if not is_ours(row)))
    ours = _presets([row for row in rows if is_ours(row)])
    options = {source: row["model"], "preset": ours, "tokens": _values(rows, "tokens"), "against": peers}
    return options | {name: row.get(name) for name in conditions}


def memory(rows: Sequence[Row]) -> str:
    return _line("bench memory", **_whole(rows, _has_backend, *_MODEL, "repeats"))


def throughput(rows: Sequence[Row]) -> str:
    return _line("bench throughput", **_whole(rows, _has_backend, *_MODEL), memory=rows[0]["memory"])


def generate(rows: Sequence[Row]) -> str:
    return _line(
        "bench generate", **_whole(rows, lambda row: row["preset"].split()[0] in PRESETS, "threads", "repeats")
    )


def serving(rows: Sequence[Row]) -> str:
    names = ("model", "clients", "requests", "words", "answer", "slots", "queue", "threads", "dtype")
    return _line("bench serving", preset=_presets(rows), **{name: rows[0][name] for name in names})


def vllm(rows: Sequence[Row]) -> str:
    rounds = max(Counter((row["preset"], row["context"]) for row in rows).values())
    ours = _presets([row for row in rows if _has_backend(row)])
    alike = {name: rows[0][name] for name in ("model", "requests", "steps", "threads", "dtype")}
    return _line("bench vllm", preset=ours, context=_values(rows, "context"), rounds=rounds, **alike)


def _has_backend(row: Row) -> bool:
    return row["backend"] is not None
