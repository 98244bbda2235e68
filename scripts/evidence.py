"""Measure all that the report tells of the embedded model: `make report`.

Quality is measured by as many processes as there are cores, speed by one at a time after them. What lies in the folder
already is not measured again: a run that was killed goes on.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results" / "smollm2"
CHOSEN = (
    "b4",
    "b3",
    "b2",
    "qjl-2",
    "qjl-paper",
    "kivi-4",
    "kivi-2",
    "turboquant-4",
    "turboquant-3",
    "quarot-4",
    "int8",
)
FEW = ("b3", "b2", "qjl-paper", "kivi-2", "turboquant-3")
VARIANTS = "--task passkey --task multikey --task multivalue --task tracking"
Command = tuple[str, tuple[str, ...]]
QUALITY: dict[str, Command] = {  # a command and its presets, the longest first
    "frontier": ("eval frontier --bits 1..9 --decode 256 --chunks 2 --seeds 2 --no-retrieval", ()),
    "retrieval": ("eval retrieval --context 1024 --context 2048 --context 4096", ("full", *CHOSEN)),
    "variants": (f"eval retrieval {VARIANTS} --context 1024 --depths 2 --seeds 2", ("full", *CHOSEN)),
    "perplexity": ("eval perplexity --context 1024 --context 2048 --context 4096 --chunks 2", FEW),
    "seeds": ("eval seeds --seeds 10 --decode 128 --chunks 2", ("qjl-2", "qjl-paper", "turboquant-3", "b3")),
    "harness": ("eval harness --task olmes/piqa/rc_5shot --limit 50", ("full", *FEW)),
    "distortion": ("eval distortion --rows 2", CHOSEN),
}
TOKENS = "--tokens 1024 --tokens 4096 --tokens 16384"
SPEED: dict[str, Command] = {
    "decode": (f"bench decode {TOKENS} --repeats 7", ("b3", "b2", "qjl-2")),
    "encode": (f"bench encode {TOKENS} --repeats 3", ("b3", "b2")),
    "memory": (
        "bench memory --against dynamic --tokens 1024 --tokens 2048 --tokens 4096 --dtype float32 --repeats 1",
        ("b3", "b2"),
    ),
    "throughput": ("bench throughput --against dynamic --tokens 2048 --memory 3G --dtype float32", ("b3", "b2")),
}


def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: run(name, QUALITY[name], threads=1), QUALITY))
    for name, command in SPEED.items():
        if not (RESULTS / f"{name}.jsonl").exists():
            run(name, command, threads=os.cpu_count() or 1)


def run(name: str, command: Command, threads: int) -> None:
    """One command; ends this program where it fails."""
    start, (text, presets) = time.perf_counter(), command
    chosen = (word for preset in presets for word in ("--preset", preset))
    line = [sys.executable, "-m", "qjl", *text.split(), *chosen, "--out", str(RESULTS / f"{name}.jsonl")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(line)} ended with {done.returncode}")
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
