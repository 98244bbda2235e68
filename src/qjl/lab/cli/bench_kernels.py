"""Commands that time kernels: bench decode, bench encode, bench kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qjl.cli.common import DeviceOption, JsonOption, notes, progress
from qjl.errors import QJLError
from qjl.lab.cli.shared import (
    FoundRows,
    OutputOption,
    PlotOption,
    PresetsOption,
    RepeatsOption,
    ThreadsOption,
    passing,
    resolved,
    rounds,
)

if TYPE_CHECKING:
    from qjl.lab.bench.gate import BenchSettings
    from qjl.lab.bench.synthetic import Shape
    from qjl.lab.rows import Timed

LONG = 32768  # tokens: what a step costs at any length hardly counts there
_HeadDim = Annotated[int, typer.Option(min=8, help="Numbers per key.")]
_KVHeads = Annotated[int, typer.Option(min=1, help="Key-value heads of the layer.")]
_Group = Annotated[int, typer.Option(min=1, help="Query heads that share a key-value head.")]
_Batch = Annotated[int, typer.Option(min=1, help="Sequences of the same length.")]
_Dtype = Annotated[
    str | None,
    typer.Option(
        show_default="float32, on a GPU bfloat16", help="Of queries and exact tokens: float32, bfloat16 or float16."
    ),
]


def decode(
    preset: PresetsOption = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="32768", min=1)] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="1k to 512k tokens, and how the time grows.")] = False,
    head_dim: _HeadDim = 128,
    kv_heads: _KVHeads = 8,
    group: _Group = 4,
    batch: _Batch = 1,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 1,
    repeats: RepeatsOption = 15,
    dtype: _Dtype = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            show_default="the strongest of the device",
            help="torch_bf16, torch_fp32, fp16_avx2, flash_bf16, flex_bf16, flashinfer_bf16, or one of --peers by its "
            "name.",
        ),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also ONNX Runtime, OpenVINO and llama.cpp over caches of their own (1 thread)."),
    ] = False,
    pages: Annotated[
        int | None, typer.Option("--pages", help="Tokens of a page, 16, 32 or 64, in no order; a cache's own if not.")
    ] = None,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Sequences of different lengths, spread evenly up to --tokens.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(show_default="3G, on a GPU 48G", help="Of the baselines; those that do not fit are left out."),
    ] = None,
    output: OutputOption = None,
    plot: PlotOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time one token's attention over a packed layer, beside full precision. First it must be right.

    On a GPU, kernels are timed as a CUDA graph that is replayed. Exits with 1, and no speed, where the backend in use
    and the reference differ. With --json, one object per case and line.
    """
    from qjl.lab import plots
    from qjl.lab.bench.decode import SWEEP, time_decoding
    from qjl.lab.bench.synthetic import Shape
    from qjl.plan import parse_memory

    shape = Shape(head_dim, kv_heads, group, batch)
    room = parse_memory(memory or ("48G" if device.startswith("cuda") else "3G"))
    settings = _with_peers(_settings(shape, device, dtype, threads, repeats, room, _known(against)), peers)
    settings = replace(settings, page=pages, is_ragged=ragged)
    if ragged and batch == 1:
        raise QJLError("--ragged needs sequences of several lengths: give a --batch of 2 or more.")
    configs = resolved(preset)
    if sweep and tokens:
        raise QJLError("--sweep and --tokens were both given: give one of them.")
    lengths = SWEEP if sweep else tokens or [32768]
    found = FoundRows(output, json_output, plot)
    with passing(), rounds(len(configs) * len(lengths), repeats, json_output) as on_round:
        for config in configs:
            for length in lengths:
                found.add(time_decoding(config, length, settings, on_round))
    tell_missing(found.rows)
    _tell_not_installed(settings.against)
    found.show(plots.benchmark)
    if len(lengths) > 1:
        _tell_growth(found.rows)


def encode(
    preset: PresetsOption = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", show_default="1k to 128k", min=64)] = None,
    head_dim: _HeadDim = 128,
    kv_heads: _KVHeads = 8,
    group: _Group = 4,
    batch: _Batch = 1,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 1,
    repeats: RepeatsOption = 5,
    dtype: _Dtype = None,
    output: OutputOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time the encoding of a prompt's keys and values, beside the attention of its prefill.

    Exits with 1, and no speed, where codes are worse than the reference's. With --json, one object per case and line.
    """
    from qjl.lab.bench.encode import PROMPTS, ROLES, time_encoding
    from qjl.lab.bench.synthetic import Shape

    settings = _settings(Shape(head_dim, kv_heads, group, batch), device, dtype, threads, repeats)
    configs, lengths, found = resolved(preset), tokens or PROMPTS, FoundRows(output, json_output)
    with passing(), rounds(len(configs) * len(ROLES) * len(lengths), repeats, json_output) as on_round:
        for config in configs:
            for length in lengths:
                for role in ROLES:
                    found.add(time_encoding(config, role, length, settings, on_round))
    found.show()


def kernels(
    preset: PresetsOption = None,
    signs: Annotated[list[int] | None, typer.Option("--signs", show_default="128, 256, 512")] = None,
    bits: Annotated[list[int] | None, typer.Option("--bits", show_default="1, 2, 3, 4", min=1, max=4)] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=64)] = 32768,
    head_dim: _HeadDim = 128,
    kv_heads: _KVHeads = 8,
    group: _Group = 4,
    threads: ThreadsOption = 1,
    repeats: RepeatsOption = 15,
    dtype: _Dtype = None,
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="Time nothing: compile the GPU's kernels of a decode step, count their instructions, and predict "
            "their speed. Takes minutes, and no GPU.",
        ),
    ] = False,
    capability: Annotated[
        list[int] | None, typer.Option("--capability", show_default="80, 89, 90, 100", help="Of --static: 90 for 9.0.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            show_default="llama-3.1-8b, smollm2",
            help="Of --static, in place of --head-dim, --kv-heads and --group.",
        ),
    ] = None,
    statistics: Annotated[
        str, typer.Option(help="Of --static: smollm2, which are stretched to other shapes, or synthetic.")
    ] = "smollm2",
    output: OutputOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time the CPU's scan of packed keys, for sketches of so many signs and codes of so many bits, and encoding.

    Exits with 1, and no speed, where the backend in use and the reference differ. With --static, what the kernels of a
    GPU compile to, and a prediction of how fast they are, for b3 and b2 by default. With --json, one object per case
    and line.
    """
    if static:
        if signs or bits:
            raise QJLError("--static times no scans: leave --signs and --bits out.")
        _predict(preset, capability, shape, statistics, tokens, FoundRows(output, json_output), json_output)
        return
    if capability or shape:
        raise QJLError("--capability and --shape are of --static: give it too, or leave them out.")
    from qjl.lab.bench.encode import ROLES
    from qjl.lab.bench.encode import time_encoding as measure_encoding
    from qjl.lab.bench.kernels import scan, scanned
    from qjl.lab.bench.synthetic import Shape

    settings = _settings(Shape(head_dim, kv_heads, group), "cpu", dtype, threads, repeats)
    configs = resolved(preset)
    codes = scanned(signs or [128, 256, 512], bits or [1, 2, 3, 4], head_dim)
    found = FoundRows(output, json_output)
    cases = len(codes) + len(ROLES) * len(configs)
    with passing(), rounds(cases, repeats, json_output) as on_round:
        for name, quantizer in codes.items():
            found.add(scan(name, quantizer, tokens, settings, on_round))
        for config in configs:
            for role in ROLES:
                found.add(measure_encoding(config, role, tokens, settings, on_round))
    tell_missing([row for row in found.rows if row.case == "scan"])
    found.show()


def _predict(
    presets: list[str] | None,
    capabilities: list[int] | None,
    shapes: list[str] | None,
    statistics: str,
    tokens: int,
    found: FoundRows,
    json_output: bool,
) -> None:
    from qjl.lab.bench import warp_model
    from qjl.lab.bench.static_kernels import SHAPES, Case, Source, attention

    configs, chosen = resolved(presets, ("b3", "b2")), [attention(name) for name in shapes or SHAPES]
    of = capabilities or list(warp_model.GPUS)
    for one in of:
        warp_model.gpu(one)
    with progress("Compiling", len(configs) * len(chosen) * len(of), json_output) as advance:
        for shape in chosen:
            source = Source.of(statistics, shape)
            for config in configs:
                case = Case.of(config, shape, source, tokens)
                for one in of:
                    for row in case.rows(one):
                        found.add(row)
                    advance(1)
    found.show()


def overhead(
    preset: PresetsOption = None,
    layers: Annotated[int, typer.Option(min=1, help="Of the model.")] = 30,
    repeats: Annotated[int, typer.Option(min=64, help="Tokens that are timed.")] = 256,
    output: OutputOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time what Python costs around the kernels: per layer and token, per block, per turn of a server, per vLLM step.

    Exits with 1, and no speed, where the backend in use and the reference differ. With --json, one object per preset.
    """
    from qjl.lab.bench.overhead import time_overhead

    configs = resolved(preset)
    found = FoundRows(output, json_output)
    with passing(), rounds(len(configs), 4, json_output) as on_round:
        for config in configs:
            found.add(time_overhead(config, layers, repeats, on_round))
    found.show()


def _settings(
    shape: Shape,
    device: str,
    dtype: str | None,
    threads: int,
    repeats: int,
    memory: int = 0,
    against: Sequence[str] = (),
) -> BenchSettings:
    from qjl.lab.bench.gate import BenchSettings
    from qjl.models import as_device, as_dtype

    place = as_device(device)
    numbers = as_dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    return BenchSettings(shape, numbers, place, threads, repeats, memory, tuple(against))


def _known(others: list[str] | None) -> list[str]:
    from qjl.lab.bench import flashinfer
    from qjl.lab.bench.decode import OTHERS
    from qjl.lab.bench.flashinfer import FLASHINFER

    for name in others or []:
        if name not in OTHERS:
            raise QJLError(f"{name!r} is no baseline: choose from {', '.join(OTHERS)}.")
        if name == FLASHINFER:
            flashinfer.require()
    return others or []


def _with_peers(settings: BenchSettings, is_asked: bool) -> BenchSettings:
    from qjl.lab.bench.peers import PEERS

    names = settings.against or settings.place.baselines
    return replace(settings, against=tuple(dict.fromkeys((*names, *PEERS)))) if is_asked else settings


def _tell_not_installed(names: Iterable[str]) -> None:
    from qjl.lab.bench.peers import INSTALL, missing

    if packages := missing(names):
        notes.print(f"Not installed: {', '.join(packages)}: {INSTALL}.", markup=False, soft_wrap=True)


def tell_missing(rows: Iterable[Timed]) -> None:
    """What was not compared with, and where."""
    for row in rows:
        missing = [name for name, ms in row.others_ms.items() if ms is None]
        if missing:
            notes.print(f"Not compared at {row.preset}, {row.tokens} tokens: {', '.join(missing)}.", soft_wrap=True)


def _tell_growth(rows: Sequence[Timed]) -> None:
    from qjl.lab.bench.timing import exponent

    for preset in dict.fromkeys(row.preset for row in rows):
        chosen = [row for row in rows if row.preset == preset]
        for part in (chosen, [row for row in chosen if row.tokens >= LONG]):
            sizes, times = [row.tokens for row in part], [row.ms for row in part]
            if len(set(sizes)) > 1:
                growth = f"n^{exponent(sizes, times):.2f} from {min(sizes)} to {max(sizes)} tokens"
                notes.print(f"{preset}: time grows as {growth}.", soft_wrap=True)
