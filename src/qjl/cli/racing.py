"""Commands that time whole models: bench generate, bench memory, bench throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjl.cli.benching import (
    OutputOption,
    PlotOption,
    PresetsOption,
    RepeatsOption,
    Row,
    ThreadsOption,
    passing,
    ratio,
    report,
    require_places,
    rounds,
)
from qjl.cli.common import (
    EMBEDDED,
    DeviceOption,
    JsonOption,
    ModelOption,
    load,
    megabytes,
    notes,
    out,
    resolved,
    results_table,
    times,
    waiting,
)

if TYPE_CHECKING:
    from qjl.lab.bench.caches import Rig

_Random = Annotated[
    str | None,
    typer.Option("--random", help="In place of a model, weights at random in the shape of llama-3.1-8b, or of a toy."),
]
_Dtype = Annotated[
    str | None, typer.Option(show_default="bfloat16", help="Of the model: float32, bfloat16 or float16.")
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
    require_places(output, None)
    rows = []
    race = Race(model, configs, peers, max(contexts), threads, progress=notes.is_terminal and not json_output)
    with passing(), rounds(len(contexts), repeats, json_output) as on_round:
        for row in race.measure(contexts, repeats, on_round):
            rows.append(row)
            report(row, output, json_output)
    if not json_output:
        out.print(_generate_table(rows))


def memory(
    model: ModelOption = EMBEDDED,
    random: _Random = None,
    preset: PresetsOption = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="1k to 128k", min=1)] = None,
    against: _Against = None,
    device: DeviceOption = "cpu",
    dtype: _Dtype = None,
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
    from qjl.lab.bench.memory import CONTEXTS, measure

    contexts, rows = tokens or CONTEXTS, []
    require_places(output, plot)
    with passing():
        rig = _rig(model, random, preset, against, device, dtype, threads, max(contexts), json_output)
        with rounds(len(contexts), repeats, json_output) as on_round:
            for context in sorted(contexts):
                for row in measure(rig, context, steps, repeats, on_round):
                    rows.append(row)
                    report(row, output, json_output)
    if not json_output:
        out.print(_memory_table(rows))
    if plot is not None:
        from qjl.lab import plots

        _keep(plots.contexts(rows, plot.suffix), plot)


def throughput(
    model: ModelOption = EMBEDDED,
    random: _Random = None,
    preset: PresetsOption = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="4096, 32768", min=1)] = None,
    against: _Against = None,
    device: DeviceOption = "cpu",
    dtype: _Dtype = None,
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
    from qjl.lab.bench.throughput import measure
    from qjl.plan import parse_memory

    room = parse_memory(budget or ("80G" if device.startswith("cuda") else "2G"))
    contexts, rows = tokens or [4096, 32768], []
    require_places(output, plot)
    with passing():
        rig = _rig(model, random, preset, against, device, dtype, threads, max(contexts), json_output)
        for context in sorted(contexts):
            with waiting(f"Batches of {context} tokens") as show:
                for row in measure(rig, context, room, steps, show):
                    rows.append(row)
                    report(row, output, json_output)
    if not json_output:
        out.print(_throughput_table(rows))
    if plot is not None:
        from qjl.lab import plots

        _keep(plots.throughput(rows, plot.suffix), plot)


def _rig(
    model: str,
    random: str | None,
    presets: Sequence[str] | None,
    against: Sequence[str] | None,
    device: str,
    dtype: str | None,
    threads: int,
    tokens: int,
    quiet: bool,
) -> Rig:
    from qjl.lab.bench import caches, random_models
    from qjl.models import as_device, as_dtype

    configs = resolved(presets)
    peers = [peer for peer in against or caches.PEERS if caches.is_installed(peer)]
    _tell_left_out(against or caches.PEERS, peers)
    place, numbers = as_device(device), as_dtype(dtype or "bfloat16")
    if random is None:
        network, _ = load(model, device, numbers, json_output=quiet)
    else:
        network = random_models.make(random, place, numbers)
    with waiting("Checking, and compiling"):
        return caches.build(random or model, network, configs, peers, tokens, threads)


def _generate_table(rows: list[Row]) -> Any:
    columns = ("context", "tokens/s", "x dynamic\nbf16", "x dynamic\nfp32", "attention,\nms/layer")
    table = results_table("cache", *columns)
    for row in rows:
        table.add_row(
            row["preset"],
            str(row["tokens"]),
            f"{row['tokens_per_second']:.1f}",
            *(ratio(row, f"dynamic_{label}") for label in ("bf16", "fp32")),
            f"{row['attention_ms_per_layer']:.3f}",
        )
    table.caption = f"{rows[0]['model']}, {rows[0]['threads']} threads, {rows[0]['machine']}"
    return table


def _memory_table(rows: list[Row]) -> Any:
    columns = (
        "context",
        "prompt,\nms",
        "x dyn-\namic",
        "token,\nms",
        "x dyn-\namic",
        "cache,\nMB",
        "smaller",
        "peak,\nMB",
    )
    table = results_table("cache", *columns)
    for row in rows:
        table.add_row(
            row["preset"],
            str(row["tokens"]),
            f"{row['prefill_ms']:.0f}",
            _times(row["ratio_prefill_dynamic"]),
            f"{row['ms']:.1f}",
            _times(row["ratio_dynamic"]),
            f"{row['cache_bytes'] / 1e6:.1f}",
            _times(row["smaller_than_dynamic"]),
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}",
        )
    table.caption = f"{_whole(rows[0])}; peak: while decoding, beside the weights"
    return table


def _throughput_table(rows: list[Row]) -> Any:
    table = results_table(
        "cache", "context", "largest batch", "tokens/s", "x dynamic", "ms/step", "cache", "with all else"
    )
    for row in (row for row in rows if row["is_largest"]):
        table.add_row(
            row["preset"],
            str(row["tokens"]),
            str(row["batch"]),
            f"{row['tokens_per_second']:.1f}",
            _times(row["ratio_dynamic"]),
            f"{row['ms']:.1f}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            f"{(row['weights_bytes'] + row['peak_bytes']) / 1e6:.1f}",
        )
    if rows:
        table.caption = f"{_whole(rows[0])}; in {megabytes(rows[0]['memory'])}"
    return table


def _times(number: float | None) -> str:
    return "-" if number is None else times(number)


def _tell_left_out(asked: Sequence[str], peers: Sequence[str]) -> None:
    for peer in asked:
        if peer not in peers:
            notes.print(f"Left out: {peer}, whose package is not installed.")


def _whole(row: Row) -> str:
    how = f"{row['threads']} thread(s), " if row["device"] == "cpu" else ""
    return f"{row['model']} in {row['dtype']}, {how}{row['machine']}"


def _keep(picture: bytes, plot: Path) -> None:
    plot.write_bytes(picture)
    notes.print(f"The picture is in {plot}.", soft_wrap=True)
