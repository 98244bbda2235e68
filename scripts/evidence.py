"""Measure what the report tells of a model: `make report` for the embedded one, `scripts/evidence.py MODEL` for others.

Quality is measured by as many processes as there are cores, speed by one at a time after them. What lies in the folder
already is not measured again: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where commands run, so that rows tell no other path of this machine
RESULTS = Path("results")
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
FRONTIER = "eval frontier --bits 1..9 --decode 128 --chunks 4 --seeds 2 --no-retrieval"
Command = tuple[str, tuple[str, ...]]
VARIANTS = "--task passkey --task multikey --task multivalue --task tracking"
QUALITY: dict[str, dict[str, Command]] = {  # of each model: commands and their presets, the longest first
    "smollm2": {
        "perplexity": ("eval perplexity --context 1024 --context 2048 --context 4096 --chunks 4", FEW),
        "frontier": (FRONTIER, ()),
        "widths": (f"{FRONTIER} --widths", ()),
        "retrieval": ("eval retrieval --context 1024 --context 2048 --context 4096 --depths 3", ("full", *CHOSEN)),
        "variants": (f"eval retrieval {VARIANTS} --context 1024 --depths 2 --seeds 2", ("full", *CHOSEN)),
        "multikey": (
            "eval retrieval --task multikey --context 1024 --depths 2 --seeds 10",
            ("full", "b4", "b3", "b2", "kivi-4", "turboquant-4", "turboquant-3"),
        ),
        "seeds": ("eval seeds --seeds 10 --decode 128 --chunks 2", ("qjl-2", "qjl-paper", "turboquant-3", "b3")),
        "harness": (
            "eval harness --task olmes/piqa/rc_5shot --task olmes/lambada/bpb_0shot --limit 50",
            ("full", *FEW, "kivi-1"),
        ),
        "distortion": ("eval distortion --rows 2", CHOSEN),
        "values": (
            FRONTIER,
            ("qjl-2", "b2", str(RESULTS / "presets/qjl-for-both.json")),
        ),
    },
    "qwen2.5-coder-0.5b": {
        "frontier": (FRONTIER, CHOSEN),
        "generate": (
            "eval generate {problems} --task gsm8k --dtype bfloat16 --limit 200 --batch 100",
            ("full", *CHOSEN),
        ),
        "retrieval": (
            "eval retrieval --dtype bfloat16 --context 2048 --context 4096 --context 8192 --depths 2",
            ("full", *CHOSEN),
        ),
    },
    "qwen2.5-coder-1.5b": {
        "frontier": (
            "eval frontier --dtype bfloat16 --bits 1..9 --decode 128 --chunks 4 --seeds 1 --no-retrieval",
            CHOSEN,
        ),
        "retrieval": ("eval retrieval --dtype bfloat16 --context 2048 --context 4096 --depths 2", ("full", *FEW)),
    },
}
TOKENS = "--tokens 1024 --tokens 4096 --tokens 16384"
SPEED: dict[str, Command] = {  # of the embedded model
    "decode": (f"bench decode {TOKENS} --repeats 7", ("b3", "b2", "qjl-2")),
    "encode": (f"bench encode {TOKENS} --repeats 3", ("b3", "b2", "quarot-4")),
    "memory": (
        "bench memory --against dynamic --tokens 1024 --tokens 2048 --tokens 4096 --dtype bfloat16 --repeats 3",
        ("b3", "b2"),
    ),
    "throughput": ("bench throughput --against dynamic --tokens 2048 --memory 2G --dtype bfloat16", ("b3",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2", choices=QUALITY)
    parser.add_argument("--problems", default="gsm8k.test.jsonl", help="GSM8K's test set, for models that are asked it")
    chosen = parser.parse_args()
    chosen.problems = os.path.relpath(chosen.problems, ROOT)
    os.chdir(ROOT)
    folder, quality = RESULTS / chosen.model, QUALITY[chosen.model]
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(run, quality[name], folder / f"{name}.jsonl", chosen, threads=1) for name in quality]
        try:
            for one in as_completed(running):
                one.result()
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise
    for name, command in SPEED.items() if chosen.model == "smollm2" else ():
        run_whole(command, folder / f"{name}.jsonl", chosen)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"in all {time.perf_counter() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processors", flush=True
    )


def run_whole(command: Command, output: Path, chosen: argparse.Namespace) -> None:
    """One command on all cores, unless its output lies there: a benchmark that was killed begins anew."""
    if output.exists():
        return
    part = output.with_suffix(".part")
    part.unlink(missing_ok=True)
    run(command, part, chosen, threads=os.cpu_count() or 1)
    part.rename(output)


def run(command: Command, output: Path, chosen: argparse.Namespace, threads: int) -> None:
    """One command; ends this program where it fails."""
    start, (text, presets) = time.perf_counter(), command
    words = text.format(problems=chosen.problems).split()
    wanted = (word for preset in presets for word in ("--preset", preset))
    model = () if chosen.model == "smollm2" else ("--model", chosen.model)
    line = [sys.executable, "-m", "qjl", *words, *model, *wanted, "--out", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(line)} ended with {done.returncode}")
    print(f"{output.stem}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
