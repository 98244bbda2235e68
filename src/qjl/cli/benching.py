"""Commands that time this machine: bench decode, bench kernels, bench generate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjl.cli.common import (
    DEFAULT_PRESET,
    EMBEDDED,
    JsonOption,
    ModelOption,
    notes,
    out,
    print_json,
    progress,
    results_table,
    sentence,
    times,
)
from qjl.errors import QJLError

if TYPE_CHECKING:
    import torch

    from qjl.bench.protocol import Settings

Row = dict[str, Any]
LONG = 32768  # tokens: what a step costs at any length hardly counts there
_Presets = Annotated[
    list[str] | None,
    typer.Option("--preset", "-p", show_default=DEFAULT_PRESET, help="May be given several times."),
]
_HeadDim = Annotated[int, typer.Option(min=8, help="Numbers per key.")]
_KVHeads = Annotated[int, typer.Option(min=1, help="Key-value heads of the layer.")]
_Group = Annotated[int, typer.Option(min=1, help="Query heads that share a key-value head.")]
_Threads = Annotated[
    int, typer.Option(min=1, help="One is timed by its CPU time; several, and whole models, by the clock on the wall.")
]
_Repeats = Annotated[int, typer.Option(min=1, help="Rounds, each of which times everything once.")]
_Dtype = Annotated[str, typer.Option(help="Of queries and exact tokens: float32, bfloat16 or float16.")]
_Output = Annotated[Path | None, typer.Option("--out", help="Append JSON lines to this file.")]
_Plot = Annotated[Path | None, typer.Option(help="Draw time against context, and a roofline: a .svg or .png file.")]


def decode(
    preset: _Presets = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="32768", min=1)] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="1k to 512k tokens, and how the time grows.")] = False,
    head_dim: _HeadDim = 128,
    kv_heads: _KVHeads = 8,
    group: _Group = 4,
    threads: _Threads = 1,
    repeats: _Repeats = 15,
    dtype: _Dtype = "float32",
    memory: Annotated[str, typer.Option(help="Of the baselines; those that do not fit are left out.")] = "3G",
    output: _Output = None,
    plot: _Plot = None,
    json_output: JsonOption = False,
) -> None:
    """Time one token's attention over a packed layer, beside full precision. First it must be right.

    Exits with 1, and no speed, where the backend in use and the reference differ. With --json, one object per case and
    line.
    """
    from qjl.bench.decode import SWEEP, measure
    from qjl.plan import parse_memory
    from qjl.presets import resolve

    settings = _settings(head_dim, kv_heads, group, threads, repeats, dtype, parse_memory(memory))
    configs = [resolve(name) for name in preset or [DEFAULT_PRESET]]
    if sweep and tokens:
        raise QJLError("--sweep and --tokens were both given: give one of them.")
    lengths = SWEEP if sweep else tokens or [32768]
    _require_places(output, plot)
    rows = []
    with _passing(), _rounds(len(configs) * len(lengths), repeats, json_output) as on_round:
        for config in configs:
            for length in lengths:
                rows.append(measure(config, length, settings, on_round))
                _report(rows[-1], output, json_output)
    _tell_missing(rows)
    if not json_output:
        out.print(_decode_table(rows))
    if len(lengths) > 1:
        _tell_growth(rows)
    if plot is not None:
        _draw(rows, plot)


def kernels(
    preset: _Presets = None,
    signs: Annotated[list[int] | None, typer.Option("--signs", show_default="128, 256, 512")] = None,
    bits: Annotated[list[int] | None, typer.Option("--bits", show_default="1, 2, 3, 4", min=1, max=4)] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=64)] = 32768,
    head_dim: _HeadDim = 128,
    kv_heads: _KVHeads = 8,
    group: _Group = 4,
    threads: _Threads = 1,
    repeats: _Repeats = 15,
    dtype: _Dtype = "float32",
    output: _Output = None,
    json_output: JsonOption = False,
) -> None:
    """Time the scan of packed keys, for sketches of so many signs and codes of so many bits, and encoding.

    Exits with 1, and no speed, where the backend in use and the reference differ. With --json, one object per case and
    line.
    """
    from qjl.bench.kernels import ROLES, encode, scan, scanned
    from qjl.presets import resolve

    settings = _settings(head_dim, kv_heads, group, threads, repeats, dtype)
    configs = [resolve(name) for name in preset or [DEFAULT_PRESET]]
    codes = scanned(signs or [128, 256, 512], bits or [1, 2, 3, 4], head_dim)
    _require_places(output, None)
    scans, encodings = [], []
    cases = len(codes) + len(ROLES) * len(configs)
    with _passing(), _rounds(cases, repeats, json_output) as on_round:
        for name, quantizer in codes.items():
            scans.append(scan(name, quantizer, tokens, settings, on_round))
            _report(scans[-1], output, json_output)
        for config in configs:
            for role in ROLES:
                encodings.append(encode(config, role, tokens, settings, on_round))
                _report(encodings[-1], output, json_output)
    _tell_missing(scans)
    if not json_output:
        out.print(_scan_table(scans))
        out.print(_encode_table(encodings))


def generate(
    model: ModelOption = EMBEDDED,
    preset: _Presets = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="512, 2048, 8192", min=1)] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(show_default="all that are installed", help="dynamic, quanto, hqq or llama.cpp."),
    ] = None,
    threads: _Threads = 2,
    repeats: _Repeats = 16,
    output: _Output = None,
    json_output: JsonOption = False,
) -> None:
    """Time decoding with a whole model, beside other caches and engines.

    Exits with 1, and no speed, where the backend in use and the reference differ. With --json, one object per case and
    line.
    """
    from qjl.bench.endtoend import PEERS, Race, installed
    from qjl.presets import resolve

    configs = [resolve(name) for name in preset or [DEFAULT_PRESET]]
    peers, contexts = installed(against or PEERS), tokens or [512, 2048, 8192]
    for peer in against or PEERS:
        if peer not in peers:
            notes.print(f"Left out: {peer}, whose package is not installed.")
    _require_places(output, None)
    rows = []
    race = Race(model, configs, peers, max(contexts), threads, progress=notes.is_terminal and not json_output)
    with _passing(), _rounds(len(contexts), repeats, json_output) as on_round:
        for row in race.measure(contexts, repeats, on_round):
            rows.append(row)
            _report(row, output, json_output)
    if not json_output:
        out.print(_generate_table(rows))


def _settings(
    head_dim: int, kv_heads: int, group: int, threads: int, repeats: int, dtype: str, memory: int = 0
) -> Settings:
    from qjl.bench.protocol import Settings
    from qjl.bench.synthetic import Shape

    return Settings(Shape(head_dim, kv_heads, group), _dtype(dtype), threads, repeats, memory)


def _dtype(name: str) -> torch.dtype:
    from qjl.models import DTYPES

    if name not in DTYPES:
        raise QJLError(f"dtype {name!r} is unknown: use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _require_places(output: Path | None, plot: Path | None) -> None:
    from qjl import plots, records

    if plot is not None:
        plots.require_format(plot)
    for path in filter(None, (output, plot)):
        records.require_writable(path)


@contextmanager
def _passing() -> Iterator[None]:
    """Ends with exit code 1 where the correctness gate does not open."""
    from qjl.bench.protocol import Inaccurate

    try:
        yield
    except Inaccurate as error:
        notes.print(sentence(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def _rounds(cases: int, repeats: int, quiet: bool) -> Iterator[Callable[[], None]]:
    with progress("Timing", cases * (repeats + 1), quiet) as advance:
        yield lambda: advance(1)


def _report(row: Row, output: Path | None, json_output: bool) -> None:
    from qjl import records

    if json_output:
        print_json(row)
    if output is not None:
        records.append(output, row)


def _tell_missing(rows: Iterable[Row]) -> None:
    """What was not compared with, and where."""
    for row in rows:
        missing = [name.removeprefix("ms_") for name, value in row.items() if name.startswith("ms_") and value is None]
        if missing:
            notes.print(
                f"Not compared at {row['preset']}, {row['tokens']} tokens: {', '.join(missing)}.", soft_wrap=True
            )


def _tell_growth(rows: Sequence[Row]) -> None:
    from qjl.bench.timing import exponent

    for preset in dict.fromkeys(row["preset"] for row in rows):
        chosen = [row for row in rows if row["preset"] == preset]
        for part in (chosen, [row for row in chosen if row["tokens"] >= LONG]):
            sizes, times = [row["tokens"] for row in part], [row["ms"] for row in part]
            if len(set(sizes)) > 1:
                growth = f"n^{exponent(sizes, times):.2f} from {min(sizes)} to {max(sizes)} tokens"
                notes.print(f"{preset}: time grows as {growth}.", soft_wrap=True)


def _draw(rows: list[Row], plot: Path) -> None:
    from qjl import plots

    plot.write_bytes(plots.benchmark(rows, plot.suffix))
    notes.print(f"The picture is in {plot}.", soft_wrap=True)


def _decode_table(rows: list[Row]) -> Any:
    columns = ("tokens", "ms", "x torch\nbf16", "x torch\nfp32", "x fp16\nAVX2", "of\nbandwidth", "error")
    table = results_table("preset", *columns)
    for row in rows:
        table.add_row(
            row["preset"],
            str(row["tokens"]),
            f"{row['ms']:.3g}",
            *(_ratio(row, name) for name in ("torch_bf16", "torch_fp32", "fp16_avx2")),
            f"{row['fraction_of_bandwidth']:.2f}",
            f"{row['max_error']:.0e}",
        )
    table.caption = _caption(rows[0])
    return table


def _scan_table(rows: list[Row]) -> Any:
    columns = ("bits\nper key", "ns\nper key", "x popcount", "x FAISS\nPQ", "x FAISS\nRaBitQ", "of\nbandwidth")
    table = results_table("scan", *columns)
    for row in rows:
        table.add_row(
            row["preset"],
            str(row["bits_per_key"]),
            f"{row['ns_per_vector']:.2f}",
            *(_ratio(row, name) for name in ("popcount", "faiss_pq", "faiss_rabitq")),
            f"{row['fraction_of_bandwidth']:.2f}",
        )
    table.caption = f"{rows[0]['tokens']} tokens, {_caption(rows[0])}"
    return table


def _encode_table(rows: list[Row]) -> Any:
    table = results_table("encoding", "of", "bits\nper vector", "ns\nper vector", "of the prefill's\nattention, %")
    for row in rows:
        share = f"{100 * row['share_of_prefill']:.2f}"
        numbers = (f"{row['bits_per_vector']:.0f}", f"{row['ns_per_vector']:.0f}", share)
        table.add_row(row["preset"], f"{row['role']}s", *numbers)
    return table


def _generate_table(rows: list[Row]) -> Any:
    columns = ("context", "tokens/s", "x dynamic\nbf16", "x dynamic\nfp32", "attention,\nms/layer")
    table = results_table("cache", *columns)
    for row in rows:
        table.add_row(
            row["preset"],
            str(row["tokens"]),
            f"{row['tokens_per_second']:.1f}",
            *(_ratio(row, f"dynamic_{label}") for label in ("bf16", "fp32")),
            f"{row['attention_ms_per_layer']:.3f}",
        )
    table.caption = f"{rows[0]['model']}, {rows[0]['threads']} threads, {rows[0]['machine']}"
    return table


def _ratio(row: Row, name: str) -> str:
    """The median, and its quartiles."""
    ratio, spread = row[f"ratio_{name}"], row[f"spread_{name}"]
    return "-" if ratio is None else f"{times(ratio)} ({spread[0]:.1f}-{spread[1]:.1f})"


def _caption(row: Row) -> str:
    shape = f"{row['kv_heads']} x {row['group']} heads of {row['head_dim']}"
    conditions = f"{row['threads']} thread(s), {row['backend']} backend ({row['isa']}), {row['machine']}"
    return f"{shape}, {conditions}; memory reads at {row['bandwidth_gbs']:.1f} GB/s"
