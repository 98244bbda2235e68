"""Commands that time whole models: bench generate, bench memory, bench throughput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qjl.cli.common import EMBEDDED, DeviceOption, JsonOption, ModelOption, notes, waiting
from qjl.lab.cli.shared import (
    FoundRows,
    ModelDtypeOption,
    OutputOption,
    PlotOption,
    PresetsOption,
    RepeatsOption,
    ThreadsOption,
    load,
    passing,
    resolved,
    rounds,
)

if TYPE_CHECKING:
    from qjl.lab.bench.caches import Rig

_Random = Annotated[
    str | None,
    typer.Option("--random", help="In place of a model, weights at random in the shape of llama-3.1-8b, or of a toy."),
]
_Against = Annotated[
    list[str] | None, typer.Option(show_default="all that are installed", help="dynamic, quanto or hqq.")
]
_Steps = Annotated[int, typer.Option(min=1, help="Tokens decoded each time; 64 of them quantize once.")]


def generate(
    model: ModelOption = EMBEDDED,
    preset: PresetsOption = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="512, 2048, 8192", min=1)] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(show_default="all that are installed", help="dynamic, quanto, hqq or llama.cpp."),
    ] = None,
    threads: ThreadsOption = 2,
    repeats: RepeatsOption = 16,
    output: OutputOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time decoding with a whole model, beside other caches and engines.

    Exits with 1, and no speed, where the backend in use and the reference differ. With --json, one object per case and
    line.
    """
    from qjl.lab.bench.endtoend import PEERS, Race, installed

    configs = resolved(preset)
    peers, contexts = installed(against or PEERS), tokens or [512, 2048, 8192]
    _tell_left_out(against or PEERS, peers)
    found = FoundRows(output, json_output)
    race = Race(model, configs, peers, max(contexts), threads, progress=notes.is_terminal and not json_output)
    with passing(), rounds(len(contexts), repeats, json_output) as on_round:
        for row in race.measure(contexts, repeats, on_round):
            found.add(row)
    found.show()


def memory(
    model: ModelOption = EMBEDDED,
    random: _Random = None,
    preset: PresetsOption = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="1k to 128k", min=1)] = None,
    against: _Against = None,
    device: DeviceOption = "cpu",
    dtype: ModelDtypeOption = "bfloat16",
    threads: ThreadsOption = 2,
    steps: _Steps = 64,
    repeats: RepeatsOption = 3,
    output: OutputOption = None,
    plot: PlotOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time and weigh a whole model with each cache: its prompt, the tokens after it, and the memory they take.

    Exits with 1, and no speed, where the backend in use and the reference differ. With --json, one object per case and
    line.
    """
    from qjl.lab import plots
    from qjl.lab.bench.memory import CONTEXTS, weigh_caches

    contexts, found = tokens or CONTEXTS, FoundRows(output, json_output, plot)
    with passing():
        rig = _rig(model, random, preset, against, device, dtype, threads, max(contexts), json_output)
        with rounds(len(contexts), repeats, json_output) as on_round:
            for context in sorted(contexts):
                for row in weigh_caches(rig, context, steps, repeats, on_round):
                    found.add(row)
    found.show(plots.contexts)


def throughput(
    model: ModelOption = EMBEDDED,
    random: _Random = None,
    preset: PresetsOption = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="4096, 32768", min=1)] = None,
    against: _Against = None,
    device: DeviceOption = "cpu",
    dtype: ModelDtypeOption = "bfloat16",
    budget: Annotated[
        str | None, typer.Option("--memory", show_default="2G, on a GPU 80G", help="Of weights, caches and all else.")
    ] = None,
    threads: ThreadsOption = 2,
    steps: _Steps = 64,
    output: OutputOption = None,
    plot: PlotOption = None,
    json_output: JsonOption = False,
) -> None:
    """How many sequences decode together in so much memory with each cache, and how many tokens per second that gives.

    Exits with 1, and no speed, where the backend in use and the reference differ. With --json, one object per case and
    line.
    """
    from qjl.lab import plots
    from qjl.lab.bench.throughput import find_throughput
    from qjl.plan import parse_memory

    room = parse_memory(budget or ("80G" if device.startswith("cuda") else "2G"))
    contexts, found = tokens or [4096, 32768], FoundRows(output, json_output, plot)
    with passing():
        rig = _rig(model, random, preset, against, device, dtype, threads, max(contexts), json_output)
        for context in sorted(contexts):
            with waiting(f"Batches of {context} tokens") as show:
                for row in find_throughput(rig, context, room, steps, show):
                    found.add(row)
    found.show(plots.throughput)


def _rig(
    model: str,
    random: str | None,
    presets: Sequence[str] | None,
    against: Sequence[str] | None,
    device: str,
    dtype: str,
    threads: int,
    tokens: int,
    quiet: bool,
) -> Rig:
    from qjl.lab.bench import caches, random_models
    from qjl.models import as_device, as_dtype

    configs = resolved(presets)
    peers = [peer for peer in against or caches.PEERS if caches.is_installed(peer)]
    _tell_left_out(against or caches.PEERS, peers)
    place, numbers = as_device(device), as_dtype(dtype)
    if random is None:
        network, _ = load(model, device, numbers, json_output=quiet)
    else:
        network = random_models.make(random, place, numbers)
    with waiting("Checking, and compiling"):
        return caches.build(random or model, network, configs, peers, tokens, threads)


def _tell_left_out(asked: Sequence[str], peers: Sequence[str]) -> None:
    for peer in asked:
        if peer not in peers:
            notes.print(f"Left out: {peer}, whose package is not installed.")
