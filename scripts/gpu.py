"""Test and measure all that needs a GPU: `make gpu`.

A list of parts, each of which takes less than ten minutes and needs no network. What is done is kept in the folder of
results, so that the next run goes on where one was stopped. A part that fails is told, and the others go on.

Exit codes: 0 all parts are done, 1 one failed, 2 the command cannot be carried out, 3 stopped by --limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # where commands run, so that rows tell no other path of this machine
FAILED, CANNOT, STOPPED = 1, 2, 3
DONE = "done"
LLAMA = ("--head-dim", "128", "--kv-heads", "8", "--group", "4")
NOT_FOR_PARTS = ("TRITON_INTERPRET", "QJL_BACKEND")


class Refusal(Exception):
    """What cannot be carried out, as a sentence."""


@dataclass(frozen=True)
class Part:
    """Commands for Python, one after the other, that take ``seconds`` at most.

    - In their words ``{rows}`` is the file of the part's rows, if it has some, and ``{folder}`` where all files lie.
    - ``resumes``: a part that was stopped goes on with the rows that it has; others begin anew.
    - ``needs``: a package without which there is nothing to do.
    """

    name: str
    about: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    resumes: bool = False
    needs: str = ""

    @property
    def has_rows(self) -> bool:
        return any("{rows}" in word for command in self.commands for word in command)


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    device: str = "cuda"
    tests: tuple[str, ...] = ("tests/test_triton.py", "tests/test_triton_gpu.py", "tests/test_triton_benches.py")
    picked: str = "(gpu or graph) and not parts"
    model: str = "smollm2"
    text: tuple[str, ...] = ("--context", "1024", "--chunks", "4")
    fidelity: tuple[str, ...] = ("b3", "b2", "b4", "qjl-2")
    shape: tuple[str, ...] = LLAMA
    presets: tuple[str, ...] = ("b3", "b2", "qjl-2")
    batches: tuple[int, ...] = (1, 8, 32)
    tokens: tuple[int, ...] = (8192, 32768, 131072)
    repeats: int = 15
    random: str = "llama-3.1-8b"
    contexts: tuple[int, ...] = (8192, 32768)
    memory: str = "80G"
    steps: int = 64
    static: tuple[str, ...] = ("--shape", "llama-3.1-8b", "--statistics", "synthetic")
    capability: int = 90


def parts_of(sizes: Sizes) -> list[Part]:
    """All parts, in the order in which they run."""
    return [*_tests(sizes), *_fidelity(sizes), *_decode(sizes), *_others(sizes)]


def _tests(sizes: Sizes) -> Iterator[Part]:
    pytest = ("-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider")
    yield Part("tests", "the tests that need a GPU", 590, ((*pytest, "-k", sizes.picked, *sizes.tests),))
    served = (*pytest, "tests/test_vllm_serving.py")
    yield Part("tests-vllm-serving", "vLLM's engine with our pages", 590, (served,), needs="vllm")


def _fidelity(sizes: Sizes) -> Iterator[Part]:
    for device in dict.fromkeys(("cpu", sizes.device)):
        words = ("-m", "qjl", "eval", "perplexity", "--model", sizes.model, *sizes.text, "--device", device)
        command = (*words, *_each("-p", sizes.fidelity), "--out", "{rows}")
        yield Part(f"fidelity-{device}", f"perplexity and KL on {device}", 590, (command,), resumes=True)
    compared = ("scripts/same_numbers.py", "{folder}/fidelity-cpu.jsonl", f"{{folder}}/fidelity-{sizes.device}.jsonl")
    yield Part("fidelity", "the same numbers on both, within their error bars", 60, (compared,))


def _decode(sizes: Sizes) -> Iterator[Part]:
    layouts: dict[str, tuple[str, ...]] = {
        "contiguous": (),
        "paged": ("--pages", "16"),
        "ragged": ("--pages", "16", "--ragged"),
    }
    for name, words in layouts.items():
        for batch in sizes.batches:
            for tokens in sizes.tokens if name != "ragged" or batch > 1 else ():
                asked = (*_bench("decode", sizes), *words, "--batch", f"{batch}", "-n", f"{tokens}")
                about = f"a decode step, {name}: {batch} x {tokens} tokens"
                yield Part(f"decode-{name}-{batch}x{tokens}", about, 400, (asked,))


def _others(sizes: Sizes) -> Iterator[Part]:
    for tokens in sizes.tokens:
        command = (*_bench("encode", sizes, sizes.presets[:2]), "-n", f"{tokens}")
        yield Part(f"encode-{tokens}", f"a prompt of {tokens} tokens to codes", 400, (command,))
    caches = ("--against", "dynamic", "-p", sizes.presets[0])
    whole = ("--random", sizes.random, *caches, "--steps", f"{sizes.steps}", "--device", sizes.device)
    for tokens in sizes.contexts:
        for name, words in {"memory": ("--repeats", "3"), "throughput": ("--memory", sizes.memory)}.items():
            command = ("-m", "qjl", "bench", name, *whole, *words, "-n", f"{tokens}", "--out", "{rows}")
            yield Part(f"{name}-{tokens}", f"{name} of a whole model at {tokens} tokens", 590, (command,))
    of = ("--static", *sizes.static, "--capability", f"{sizes.capability}", *_each("-p", sizes.presets[:2]))
    for tokens in sizes.tokens:
        command = ("-m", "qjl", "bench", "kernels", *of, "-n", f"{tokens}", "--out", "{rows}")
        yield Part(f"static-{tokens}", f"predictions beside the measured steps at {tokens} tokens", 590, (command,))


def _bench(name: str, sizes: Sizes, presets: Sequence[str] = ()) -> tuple[str, ...]:
    words = ("-m", "qjl", "bench", name, *sizes.shape, "--device", sizes.device, "--repeats", f"{sizes.repeats}")
    return (*words, *_each("-p", presets or sizes.presets), "--out", "{rows}")


def _each(option: str, values: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (option, value))


@dataclass
class State:
    """What became of parts, kept in a file at once."""

    path: Path
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> State:
        """Raises Refusal if the file is none of ours."""
        try:
            parts = json.loads(path.read_text())["parts"] if path.exists() else {}
            return cls(path, {name: dict(of) for name, of in parts.items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(f"{path} does not tell what is done: move it away.") from error

    def is_done(self, name: str, device: str) -> bool:
        """On this device; what another one gave does not count."""
        return self.told(name).get("status") == DONE and self.is_of(name, device)

    def is_of(self, name: str, device: str) -> bool:
        """Whether a part was begun on this device."""
        return self.told(name).get("device") == device

    def told(self, name: str) -> dict[str, Any]:
        return self.parts.get(name, {})

    def keep(self, name: str, told: Mapping[str, Any]) -> None:
        self.parts[name] = dict(told)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"parts": self.parts}, indent=1) + "\n")
        part.replace(self.path)


@dataclass(frozen=True)
class Outcome:
    """Of a part; ``code`` is None where it was not let come to its end. ``why`` it failed."""

    name: str
    status: str
    code: int | None
    seconds: float
    why: str
    commit: str | None
    device: str

    @property
    def is_done(self) -> bool:
        return self.status == DONE


@dataclass(frozen=True)
class Driver:
    """Runs parts of a list, and keeps what they give in ``folder``."""

    parts: Sequence[Part]
    folder: Path
    device: str
    commit: str | None

    def begun(self, part: Part) -> Outcome:
        """What is told of a part while it runs, and after if it was stopped."""
        return Outcome(part.name, "begun", None, 0.0, "", self.commit, self.device)

    def run(self, part: Part) -> Outcome:
        """All commands of a part, until one fails."""
        start, rows, log = time.monotonic(), self._rows(part), self.folder / f"{part.name}.log"
        code, why = 0, ""
        with log.open("w") as file:
            for command in part.commands:
                words = [word.format(rows=rows, folder=self.folder) for word in command]
                left = part.seconds - (time.monotonic() - start)
                try:
                    code = launch(words, file, left)
                except subprocess.TimeoutExpired:
                    return self._outcome(part, start, None, f"it took more than {part.seconds} s")
                if code:
                    break
        if code:
            why = _last_line(log) or f"it ended with {code}"
        elif part.has_rows and not rows.exists():
            code, why = FAILED, "it gave no rows"
        elif part.has_rows:
            rows.replace(self.folder / f"{part.name}.jsonl")
        return self._outcome(part, start, code, why)

    def _rows(self, part: Part) -> Path:
        """Where rows go until the part is done."""
        rows = self.folder / f"{part.name}.part"
        if not part.resumes:
            rows.unlink(missing_ok=True)
        return rows

    def _outcome(self, part: Part, start: float, code: int | None, why: str) -> Outcome:
        status = DONE if code == 0 else "failed"
        took = round(time.monotonic() - start, 1)
        return Outcome(part.name, status, code, took, why, self.commit, self.device)

    def forget(self, part: Part) -> None:
        """All rows of it, so that it begins anew."""
        for path in self.folder.glob(f"{part.name}.*"):
            path.unlink()


def launch(words: Sequence[str], log: Any, seconds: float) -> int:
    """The exit code of Python with these words; its processes end with this one, or when time is up.

    Raises:
        subprocess.TimeoutExpired: if that is so.
    """
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_PARTS}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return child.wait(max(0.0, seconds))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def device_name() -> str:
    """Raises Refusal if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise Refusal("there is no GPU on this machine that torch can use: run this where there is one.")
    return torch.cuda.get_device_name()


def capability() -> int:
    """That of the GPU, 90 for 9.0."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def commit() -> str | None:
    """Of the working tree, marked where it differs; None where git does not tell."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="the folder of results and of the state")
    parser.add_argument("--list", action="store_true", help="the parts and what became of them; runs none")
    parser.add_argument("--only", action="append", metavar="NAME", help="this part, or all whose names begin so")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop before a part that may end later than so")
    parser.add_argument("--tests", action="append", metavar="FILE", help="of tests; may be given several times")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per part, and nothing else")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None, parts: Sequence[Part] | None = None) -> int:
    """The exit code. ``parts``: in place of ours."""
    chosen = parsed(words)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _carried_out(chosen, parts)
    except Refusal as refusal:
        print(f"Error: {refusal}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _carried_out(chosen: argparse.Namespace, parts: Sequence[Part] | None) -> int:
    folder = chosen.out.resolve()
    state = State.of(folder / "state.json")
    if parts is None:
        tests = tuple(chosen.tests or Sizes.tests)
        parts = parts_of(Sizes(tests=tests) if chosen.list else Sizes(tests=tests, capability=_known_capability()))
    wanted = _wanted(parts, chosen.only)
    if chosen.list:
        _list(wanted, state, chosen.json)
        return 0
    device = device_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"{folder} cannot be made ({error.strerror}): give another folder with --out.") from error
    return _run(Driver(wanted, folder, device, commit()), state, chosen)


def _known_capability() -> int:
    device_name()
    return capability()


def _wanted(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    for name in names or ():
        if not any(_is_of(part, name) for part in parts):
            raise Refusal(f"there is no part {name!r}: --list tells which there are.")
    return [part for part in parts if names is None or any(_is_of(part, name) for name in names)]


def _is_of(part: Part, name: str) -> bool:
    """Whether a name is that of the part, or the first words of it."""
    return part.name == name or part.name.startswith(f"{name}-")


def _list(parts: Sequence[Part], state: State, as_json: bool) -> None:
    for part in parts:
        told = state.told(part.name)
        status = told.get("status", "to do")
        if as_json:
            print(
                json.dumps(
                    {"name": part.name, "about": part.about, "most_seconds": part.seconds, "status": status} | told
                )
            )
        else:
            where = f" ({told['device']}, {told['commit']})" if told else ""
            print(f"{part.name:28} {status}{where}: {part.about}, {part.seconds} s at most")


def _run(driver: Driver, state: State, chosen: argparse.Namespace) -> int:
    start, code = time.monotonic(), 0
    for part in driver.parts:
        if state.is_done(part.name, driver.device) and not chosen.again:
            continue
        if part.needs and find_spec(part.needs) is None:
            print(f"{part.name}: left out, for {part.needs} is not installed", file=sys.stderr, flush=True)
            continue
        if chosen.limit is not None and time.monotonic() - start + part.seconds > chosen.limit:
            print(f"{part.name}: not begun, for it may take {part.seconds} s", file=sys.stderr, flush=True)
            return code or STOPPED
        if chosen.again or not state.is_of(part.name, driver.device):
            driver.forget(part)
        state.keep(part.name, asdict(driver.begun(part)))
        outcome = driver.run(part)
        state.keep(part.name, asdict(outcome))
        _tell(outcome, chosen.json)
        code = code if outcome.is_done else FAILED
    return code


def _tell(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(outcome)), flush=True)
    else:
        why = f": {outcome.why}" if outcome.why else ""
        print(f"{outcome.name}: {outcome.status} after {outcome.seconds:.0f} s{why}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
