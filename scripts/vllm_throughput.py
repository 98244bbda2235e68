"""Decode throughput of vLLM with quantized pages and with its own, in turns: a JSON line per run, then the ratios.

    python scripts/vllm_throughput.py MODEL --presets full b3 --requests 4 --context 4096 --rounds 2

Every run is a process of its own. It fills the cache with prompts, waits until all of them are decoding, and measures
the steps that follow. Prompts say these words over and over, and a run counts only if the model goes on with them.
Start it with the threads to be used, such as ``OMP_NUM_THREADS=2``. Seconds of the processor are told beside those of
the clock, for a machine that has other work.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MEASURE = "--measure"
RIGHT = 0.9  # of the answers' tokens, so that a run counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("--presets", nargs="+", default=["full", "b3"], help="full is vLLM's own cache")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64, help="steps that are measured")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--profile", help="write cProfile statistics of the measured steps to this file")
    parser.add_argument(MEASURE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    runs: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        for preset in arguments.presets:
            in_turn = {"QJL_VLLM_PRESET": preset, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            command = [sys.executable, __file__, *sys.argv[1:], MEASURE]
            done = subprocess.run(command, env=os.environ | in_turn, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout.splitlines()[-1], flush=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for preset in arguments.presets[1:]:
        print(json.dumps(ratios(runs, preset, arguments.presets[0])))


def ratios(runs: list[dict[str, Any]], preset: str, other: str) -> dict[str, Any]:
    """Of all turns together: above 1, the first is the faster one."""

    def seconds(of: str, name: str) -> float:
        return statistics.mean(run[name] for run in runs if run["preset"] == of)

    names = ("median_step_seconds", "cpu_step_seconds", "prefill_seconds", "prefill_cpu_seconds")
    return {f"{name}, {other} / {preset}": round(seconds(other, name) / seconds(preset, name), 3) for name in names}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM

    room = arguments.context + 2 * arguments.tokens
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_model_len=room,
        max_num_seqs=arguments.requests,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    words = Words(llm.get_tokenizer().encode(__doc__, add_special_tokens=False))
    begin, begin_cpu, answers = time.perf_counter(), time.process_time(), {}
    prefill(llm, arguments, words, answers)
    prefill_seconds, prefill_cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    with profiling(arguments.profile):
        seconds, cpu_seconds = zip(*(timed_step(llm, answers) for _ in range(arguments.tokens)), strict=True)
    require_right(answers, words, arguments.context)
    return {
        "preset": os.environ["QJL_VLLM_PRESET"],
        "model": arguments.model,
        "dtype": arguments.dtype,
        "requests": arguments.requests,
        "context": arguments.context,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        "prefill_seconds": prefill_seconds,
        "prefill_cpu_seconds": prefill_cpu_seconds,
        "median_step_seconds": statistics.median(seconds),
        "cpu_step_seconds": statistics.median(cpu_seconds),
        "tokens_per_second": arguments.requests / statistics.median(seconds),
        "slowest_step_seconds": max(seconds),
        "backends": sorted(set(llm.apply_model(backends)[0])),
        "cached_tokens": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        * llm.llm_engine.vllm_config.cache_config.block_size,
    }


class Words:
    """What prompts say: every request begins at another place of the same words."""

    def __init__(self, words: list[int]) -> None:
        self.words = words

    def of(self, request: int, place: int, count: int) -> list[int]:
        return [self.words[(17 * request + index) % len(self.words)] for index in range(place, place + count)]


def prefill(llm: Any, arguments: argparse.Namespace, words: Words, answers: dict[int, list[int]]) -> None:
    """Until all requests are decoding."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=2 * arguments.tokens, ignore_eos=True)
    for request in range(arguments.requests):
        prompt = {"prompt_token_ids": words.of(request, 0, arguments.context)}
        llm.llm_engine.add_request(str(request), prompt, settings)
    while len(answers) < arguments.requests:
        step(llm, answers)


def step(llm: Any, answers: dict[int, list[int]]) -> None:
    for output in llm.llm_engine.step():
        if output.outputs[0].token_ids:
            answers[int(output.request_id)] = list(output.outputs[0].token_ids)


def timed_step(llm: Any, answers: dict[int, list[int]]) -> tuple[float, float]:
    begin, begin_cpu = time.perf_counter(), time.process_time()
    step(llm, answers)
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def require_right(answers: dict[int, list[int]], words: Words, context: int) -> None:
    right: list[bool] = []
    for request, tokens in answers.items():
        right += [token == told for token, told in zip(tokens, words.of(request, context, len(tokens)), strict=True)]
    if statistics.mean(right) < RIGHT:
        sys.exit(f"only {statistics.mean(right):.0%} of the tokens are right: this run tells nothing of speed.")


@contextmanager
def profiling(path: str | None) -> Iterator[None]:
    """cProfile statistics of what is done inside, if there is a file to write them to."""
    if path is None:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    profile.dump_stats(path)


def backends(model: Any) -> list[str]:
    return [type(module.impl).__name__ for module in model.modules() if hasattr(module, "impl")]


if __name__ == "__main__":
    main()
