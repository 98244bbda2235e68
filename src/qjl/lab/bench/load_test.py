"""`qjl serve` under load: many clients at once, and a secret in each conversation that no other may hear."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np

from qjl import ops
from qjl.errors import QJLError
from qjl.lab import machine
from qjl.lab.bench.peak import resident_bytes
from qjl.lab.bench.synthetic import CPU
from qjl.lab.results import Row
from qjl.lab.rows import REFUSED
from qjl.presets import resolve

BROKEN = "broken"  # the status of an answer that ended without its last word, and of a connection that failed
NAME = "served"  # the model, in requests
PATIENCE = 600  # seconds without a byte after which an answer is broken
DIGITS = 10  # of a secret
FEWEST = 8  # words of a passage
SYSTEM = "Answer with a number."
POINTS = 60  # of the memory over time that a row keeps


@dataclass(frozen=True)
class Load:
    """What is asked, by ``clients`` at a time: each of the ``requests`` is a secret and a passage of up to so many
    ``words``, most of them short.

    ``answer``: tokens of the longest answer; the others are options of the server.
    """

    clients: int = 64
    requests: int = 2000
    words: int = 150
    answer: int = 16
    slots: int = 16
    queue: int = 64
    threads: int = 1
    dtype: str = "bfloat16"


@dataclass
class Exchange:
    """A question with its secret, and what came of it; times are seconds from the first attempt."""

    secret: str
    prompt: str
    statuses: Counter[str] = field(default_factory=Counter)
    text: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    first_token: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Sample:
    """The server at one moment: its resident memory, its caches, and these at 16 bits per number; all in bytes."""

    resident: int | None
    cache: float
    full_cache: float


def conversations(load: Load, text: str) -> list[Exchange]:
    """The same for the same load and text."""
    chance, words = random.Random(0), text.split()
    made = []
    for _ in range(load.requests):
        size = round(math.exp(chance.uniform(math.log(min(FEWEST, load.words)), math.log(load.words))))
        start = chance.randrange(len(words) - size)
        secret = "".join(chance.choices("0123456789", k=DIGITS))
        passage = " ".join(words[start : start + size])
        made.append(Exchange(secret, f"{secret} is the number.\n\n{passage}\n\nWhat is the number?"))
    return made


def leaks(asked: Sequence[Exchange]) -> int:
    """In how many answers the secret of another conversation stands."""
    secrets = {conversation.secret for conversation in asked}
    return sum(bool((_numbers(one.text) & secrets) - {one.secret}) for one in asked)


def repeated(asked: Sequence[Exchange]) -> float:
    """The share of answers that tell their own secret: without any, leaks could not be seen."""
    return sum(one.secret in _numbers(one.text) for one in asked) / len(asked)


def _numbers(text: str) -> set[str]:
    """All runs of so many digits as a secret has, inside longer ones too."""
    return set(re.findall(rf"(?=(\d{{{DIGITS}}}))", text))


def ask_server(
    model: str, source: str, preset: str, load: Load, text: str, on_answer: Callable[[], None] = lambda: None
) -> Row:
    """Start a server, ask it everything, and end it; passages are of ``text``.

    ``source`` is what `qjl serve` takes for the model that results call ``model``.

    Raises:
        QJLError: if the server does not start.
    """
    asked = conversations(load, text)
    with _serving(source, preset, load) as (url, process):
        samples, start = [_sample(url, process.pid)], time.perf_counter()
        before = _processor_seconds(process.pid)
        with _sampling(samples, url, process.pid):
            _ask_all(asked, url, load, on_answer)
        seconds, after = time.perf_counter() - start, _processor_seconds(process.pid)
        process.send_signal(signal.SIGTERM)
        ended = process.wait()
    backend = None if resolve(preset).is_exact else ops.backend_of(CPU)
    return (
        {"case": "serving", "backend": backend, "model": model, "preset": preset, "seconds": seconds}
        | {"processor_seconds": None if before is None or after is None else after - before}
        | asdict(load)
        | _told(asked, seconds)
        | _held(samples)
        | {"exit_code": ended, "device": "cpu", "machine": machine.describe(), "versions": machine.versions()}
        | {"isa": machine.instruction_set() if backend == "cpu" else None}
    )


def _told(asked: Sequence[Exchange], seconds: float) -> Row:
    statuses = sum((one.statuses for one in asked), Counter[str]())
    answered = [one for one in asked if one.statuses["200"]]
    return {
        "statuses": dict(sorted(statuses.items())),
        "leaks": leaks(asked),
        "repeated": repeated(asked),
        "prompt_tokens": sum(one.prompt_tokens for one in asked),
        "answer_tokens": sum(one.answer_tokens for one in asked),
        "tokens_per_second": sum(one.prompt_tokens + one.answer_tokens for one in asked) / seconds,
        "first_token_seconds": _percentiles([one.first_token for one in answered if one.first_token is not None]),
        "request_seconds": _percentiles([one.seconds for one in answered]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(seconds, share)) for share in (50, 99)} if seconds else {}


def _held(samples: Sequence[Sample]) -> Row:
    """Memory before the load, the most in each half of it, and over time; how much smaller the caches were."""
    resident = [sample.resident for sample in samples if sample.resident is not None]
    middle = len(resident) // 2
    most = max(samples, key=lambda sample: sample.cache)
    picked = np.linspace(0, len(resident) - 1, min(POINTS, len(resident))).round().astype(int)
    return {
        "idle_bytes": samples[0].resident,
        "peak_bytes": [max(resident[:middle]), max(resident[middle:])] if middle else None,
        "resident_bytes": [resident[index] for index in picked],
        "cache_bytes": int(most.cache),
        "smaller_than_full": most.full_cache / most.cache if most.cache else None,
    }


@contextmanager
def _serving(source: str, preset: str, load: Load) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, where it is, and the process."""
    options = {
        "preset": preset,
        "slots": load.slots,
        "queue": load.queue,
        "dtype": load.dtype,
        "engine": "transformers",
        "port": 0,
        "name": NAME,
    }
    command = [sys.executable, "-m", "qjl", "serve", source, *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"OMP_NUM_THREADS": str(load.threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.search(r" at (http\S+)/v1", process.stdout.readline())
            if found is None:
                raise QJLError("the server did not start: it says why above.")
            yield found[1], process
        finally:
            process.kill()


@contextmanager
def _sampling(samples: list[Sample], url: str, process: int) -> Iterator[None]:
    """One more each second, as long as it lasts."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1):
            samples.append(_sample(url, process))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _sample(url: str, process: int) -> Sample:
    with urlopen(f"{url}/metrics", timeout=PATIENCE) as response:
        told = dict(re.findall(r"^(qjl_cache\w*) (\S+)$", response.read().decode(), re.MULTILINE))
    return Sample(resident_bytes(process), float(told["qjl_cache_bytes"]), float(told["qjl_cache_full_bytes"]))


def _processor_seconds(process: int) -> float | None:
    """What a process has used so far, whatever else the machine does; None where Linux is not there to tell."""
    place = Path(f"/proc/{process}/stat")
    if not place.exists():
        return None
    user, system = place.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _ask_all(asked: Iterable[Exchange], url: str, load: Load, on_answer: Callable[[], None]) -> None:
    waiting, lock = iter(asked), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                conversation = next(waiting, None)
            if conversation is None:
                return
            _converse(conversation, url, load.answer)
            on_answer()

    threads = [threading.Thread(target=work) for _ in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _converse(conversation: Exchange, url: str, answer: int) -> None:
    """Ask, and again after as long as the server says where it refuses."""
    start = time.perf_counter()
    while True:
        try:
            status, retry_after = _ask(conversation, url, answer, start)
        except (OSError, HTTPException):
            status, retry_after = BROKEN, None
        conversation.statuses[status] += 1
        if status not in REFUSED or retry_after is None:
            break
        time.sleep(float(retry_after))
    conversation.seconds = time.perf_counter() - start


def _ask(conversation: Exchange, url: str, answer: int, start: float) -> tuple[str, str | None]:
    """The status, and when to come again."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": conversation.prompt}]
    fields = {"model": NAME, "messages": messages, "max_tokens": answer, "temperature": 0}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    place = urlsplit(url)
    connection = HTTPConnection(f"{place.hostname}", place.port, timeout=PATIENCE)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(fields), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return f"{response.status}", response.headers["Retry-After"]
        return "200" if _hear(conversation, response, start) else BROKEN, None
    finally:
        connection.close()


def _hear(conversation: Exchange, events: Iterable[bytes], start: float) -> bool:
    """Whether the answer came to its end."""
    for event in (line.removeprefix(b"data: ").strip() for line in events if line.startswith(b"data: ")):
        if event == b"[DONE]":
            return True
        told = json.loads(event)
        if told.get("usage"):
            conversation.prompt_tokens = told["usage"]["prompt_tokens"]
            conversation.answer_tokens = told["usage"]["completion_tokens"]
        text = "".join(choice["delta"].get("content") or "" for choice in told.get("choices", []))
        if text and not conversation.text:
            conversation.first_token = time.perf_counter() - start
        conversation.text += text
    return False
