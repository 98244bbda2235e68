"""Every family of models that transformers has, each in a process of its own.

A process is bounded in time and memory, so that a crash or a hang is the row of one family and not the end of all.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from qjl.errors import QJLError
from qjl.lab import machine
from qjl.lab.evals import families, tiny
from qjl.lab.results import Row


@dataclass(frozen=True)
class ProcessLimits:
    """Of one family's process: seconds of the processor, bytes, and seconds of the clock, which end a hang."""

    cpu_seconds: int = 120
    nbytes: int = 6 << 30
    seconds: int = 1800


@dataclass(frozen=True)
class AskedFamily:
    """A family as a task has it; some have a model for each of two."""

    family: str
    task: str

    def identity(self, preset: str) -> Row:
        """What a row is about."""
        return {
            "case": "models",
            "family": self.family,
            "task": self.task,
            "model_class": tiny.class_of(self.family, self.task),
            "preset": preset,
            "versions": machine.versions(machine.MODEL_PACKAGES),
        }


def subjects(names: Sequence[str] = ()) -> list[AskedFamily]:
    """All, or those of some families; a model that is of two tasks comes once.

    Raises:
        QJLError: if transformers has no such family.
    """
    models: dict[tuple[str, str], AskedFamily] = {}
    for task in tiny.TASKS:
        for family in tiny.families(task):
            models.setdefault((family, tiny.class_of(family, task)), AskedFamily(family, task))
    if unknown := sorted(set(names) - {family for family, _ in models}):
        raise QJLError(f"transformers has no family {', '.join(unknown)}: give a model_type, such as llama.")
    return [one for one in models.values() if not names or one.family in names]


def measure_families(
    asked: Sequence[AskedFamily],
    preset: str,
    workers: int,
    known: Sequence[Row] = (),
    on_row: Callable[[int], None] = lambda count: None,
    limits: ProcessLimits = ProcessLimits(),
) -> Iterator[Row]:
    """A row per family, in their order; those that are ``known`` are not measured again.

    Raises:
        QJLError: if the kernels here are of another version, which would be the refusal of every family.
    """
    machine.instruction_set()

    def work(subject: AskedFamily) -> Row:
        identity = subject.identity(preset)
        found = next((row for row in known if row.items() >= identity.items()), None)
        row = found or identity | _in_a_process(subject, preset, limits)
        on_row(1)
        return row

    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(work, asked)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_a_process(subject: AskedFamily, preset: str, limits: ProcessLimits) -> Row:
    """The last row that it sends."""
    receiver, sender = _context().Pipe(duplex=False)
    process = _context().Process(target=_work, args=(sender, subject, preset, limits), daemon=True)
    process.start()
    sender.close()
    end, row = time.monotonic() + limits.seconds, families.row("not built", "its process did not begin")
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            row = receiver.recv()
    except EOFError:
        pass
    process.kill()
    process.join()
    return row


def _context() -> Any:
    """Where it can be, processes begin with everything imported."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _work(place: Connection, subject: AskedFamily, preset: str, limits: ProcessLimits) -> None:
    """Sends what is true if this process ends without another word, as often as that changes."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limits.nbytes, limits.nbytes))
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds))
    torch.set_num_threads(1)
    ended = f"its process died, or took more than {limits.cpu_seconds} seconds"

    def on_built() -> None:
        place.send(families.row("traceback", f"{ended}, with ours"))

    place.send(families.row("not built", f"{ended}, with its own cache"))
    place.send(families.check(subject.family, subject.task, preset, on_built))
    place.close()
