"""Commands that measure a model over the packed codes: eval distortion, perplexity, seeds, retrieval, generate."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjl.cli.common import (
    EMBEDDED,
    DataOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    notes,
    out,
    print_json,
    progress,
    read_data,
    results_table,
    waiting,
)
from qjl.errors import QJLError
from qjl.lab.cli.eval_harness import quieten
from qjl.lab.cli.shared import (
    ChunksOption,
    ContextsOption,
    DecodeOption,
    FoundRows,
    PrefixOption,
    ProjectionSeed,
    RecentOption,
    ResumedOption,
    load,
    parse_recent,
    resolved,
)

if TYPE_CHECKING:
    from qjl.lab.evals.eval_model import EvalModel
    from qjl.presets import CacheConfig

Row = dict[str, Any]
_Presets = Annotated[
    list[str] | None,
    typer.Option("--preset", "-p", show_default="full, b3, b2, qjl-paper, kivi-2", help="May be given several times."),
]
_Fitted = Annotated[
    Path | None, typer.Option("--fit", help="A text that codecs are fitted to; Paul Graham's essays if not given.")
]
DEFAULT_PRESETS = ("full", "b3", "b2", "qjl-paper", "kivi-2")


def distortion(
    model: ModelOption = EMBEDDED,
    preset: _Presets = None,
    data: DataOption = None,
    fit: _Fitted = None,
    tokens: Annotated[int, typer.Option(help="Of each stretch of the text.")] = 1024,
    rows: Annotated[int, typer.Option(help="Stretches of the text.")] = 4,
    recent: RecentOption = "32",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: ResumedOption = None,
    json_output: JsonOption = False,
) -> None:
    """Errors of scores and attention outputs on real keys, layer by layer, beside what theory says.

    With --json, one object per preset, layer and role, and line.
    """
    from qjl.lab.evals.distortion import DistortionProtocol, measure_distortion

    protocol, text = DistortionProtocol(tokens, rows, parse_recent(recent)), read_data(data)
    configs = _quantized(preset)
    found, subject = FoundRows(output, json_output), _subject(model, fit, device, dtype, json_output)
    with progress("Quantizing", len(configs), quiet=json_output) as advance:
        for row in measure_distortion(subject, configs, text, protocol, _answers(output), advance):
            found.add(row)
    found.show()


def perplexity(
    model: ModelOption = EMBEDDED,
    preset: _Presets = None,
    data: DataOption = None,
    fit: _Fitted = None,
    context: ContextsOption = None,
    chunks: ChunksOption = 4,
    recent: RecentOption = "32",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: ResumedOption = None,
    json_output: JsonOption = False,
) -> None:
    """Perplexity at growing contexts: half of each is prefilled, the other half decoded over the packed codes.

    With --json, one object per context and preset, and line.
    """
    from qjl.lab.evals.perplexity import measure_perplexity

    contexts, text, configs = context or [1024, 2048, 4096], read_data(data), _quantized(preset)
    window = parse_recent(recent)
    found, subject = FoundRows(output, json_output), _subject(model, fit, device, dtype, json_output)
    total = len(configs) * sum(length - length // 2 for length in contexts)
    with progress("Decoding", total, quiet=json_output) as advance:
        for row in measure_perplexity(subject, configs, text, contexts, chunks, window, _answers(output), advance):
            found.add(row)
    found.show()


def seeds(
    model: ModelOption = EMBEDDED,
    preset: _Presets = None,
    data: DataOption = None,
    fit: _Fitted = None,
    count: Annotated[int, typer.Option("--seeds", min=2, help="Of projections and of what statistics come from.")] = 10,
    prefix: PrefixOption = 512,
    decode: DecodeOption = 256,
    chunks: ChunksOption = 4,
    recent: RecentOption = "32",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: ResumedOption = None,
    json_output: JsonOption = False,
) -> None:
    """How much a result owes to its seed: mean and deviation over ten of them.

    With --json, one object per preset and seed, and line.
    """
    from qjl.lab.evals.fidelity import FidelityProtocol
    from qjl.lab.evals.seeds import measure_seeds

    protocol = FidelityProtocol(prefix, decode, chunks, count, parse_recent(recent), retrieval=False)
    text, configs = read_data(data), _quantized(preset)
    found, subject = FoundRows(output, json_output), _subject(model, fit, device, dtype, json_output)
    with progress("Decoding", len(configs) * protocol.tokens, quiet=json_output) as advance:
        for row in measure_seeds(subject, configs, text, protocol, _answers(output), advance):
            found.add(row)
    found.show()


def retrieval(
    model: ModelOption = EMBEDDED,
    preset: _Presets = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", show_default="needle", help="needle, passkey, multikey, multivalue, tracking."),
    ] = None,
    context: ContextsOption = None,
    depths: Annotated[int, typer.Option(help="Places of a needle, from the start to the end.")] = 5,
    count: Annotated[int, typer.Option("--seeds", help="Haystacks for each place.")] = 1,
    data: DataOption = None,
    fit: _Fitted = None,
    recent: RecentOption = "own",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: ResumedOption = None,
    json_output: JsonOption = False,
) -> None:
    """Needles in a haystack, and RULER's variants of them, asked for over the packed codes.

    With --json, one object per haystack and preset, and line.
    """
    from qjl.lab.evals.haystack import HaystackProtocol, measure_retrieval

    contexts = tuple(context or (1024, 2048, 4096))
    protocol = HaystackProtocol(tuple(task or ("needle",)), contexts, depths, count, parse_recent(recent))
    text, configs = read_data(data), resolved(preset, DEFAULT_PRESETS)
    found, subject = FoundRows(output, json_output), _subject(model, fit, device, dtype, json_output)
    with progress("Asking", len(protocol.cells), quiet=json_output) as advance:
        for row in measure_retrieval(subject, configs, text, protocol, _answers(output), advance):
            found.add(row)
    found.show()
    for preset, context in dict.fromkeys((row.preset, row.context) for row in found.rows if not row.read_as_codes):
        notes.print(
            f"{context} tokens say nothing of {preset}: none was read as a code, since all are exact. Take a longer "
            "context, or a smaller window.",
            markup=False,
            soft_wrap=True,
        )


def generate(
    data: Annotated[Path, typer.Argument(help="JSON lines with a question and an answer each, such as GSM8K's.")],
    model: ModelOption = EMBEDDED,
    preset: _Presets = None,
    task: Annotated[str | None, typer.Option(help="What results call it; the file's name if not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Problems, the first ones; all if not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest solution, in tokens.")] = 384,
    batch: Annotated[int, typer.Option(min=1, help="Problems that go through the model together.")] = 25,
    fit: _Fitted = None,
    recent: RecentOption = "own",
    seed: ProjectionSeed = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: ResumedOption = None,
    json_output: JsonOption = False,
) -> None:
    """Problems worked out step by step over the packed codes, the final answer compared: GSM8K, MATH, or your own.

    With --json, one object per preset and line.
    """
    from qjl.lab.evals.problems import ProblemsProtocol, measure_problems, read

    protocol = ProblemsProtocol(max_new_tokens, batch, parse_recent(recent), seed)
    asked, configs = read(data, limit), resolved(preset, DEFAULT_PRESETS)
    found, subject = FoundRows(output, json_output), _subject(model, fit, device, dtype, json_output)
    with progress("Solving", len(asked) * len(configs), quiet=json_output) as advance:
        for row in measure_problems(subject, configs, task or data.stem, asked, protocol, _answers(output), advance):
            found.add(row)
    found.show()


def smoke(
    model: ModelOption = EMBEDDED,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Run every evaluation and benchmark at toy size, in a few minutes: whether they run here, not what they find.

    Exits with 1 where one finds nothing. With --json, one object per evaluation and line.
    """
    quieten()
    from qjl.lab.bench import toy_benches as benchmarks
    from qjl.lab.evals import toy_evals as evaluations

    text = read_data(data)
    subject, found = _subject(model, data, device, dtype, json_output), []
    with TemporaryDirectory() as folder, waiting("Starting") as show:
        checks = chain(evaluations.checks(subject, text, Path(folder)), benchmarks.checks(subject.model.device))
        for name, run in checks:
            show(name)
            start = time.perf_counter()
            rows = run()
            found.append({"evaluation": name, "rows": len(rows), "seconds": round(time.perf_counter() - start, 1)})
            if json_output:
                print_json(found[-1])
    if not json_output:
        table = results_table("evaluation", "rows", "seconds")
        for row in found:
            table.add_row(*map(str, row.values()))
        out.print(table)
    if not evaluations.has_harness():
        notes.print("Not run: harness, which needs lm-eval: run `pip install 'qjl[lab]'`.", markup=False)
    if not all(row["rows"] for row in found):
        raise typer.Exit(1)


def _subject(model: str, fit: Path | None, device: str, dtype: str | None, json_output: bool) -> EvalModel:
    from qjl.lab.evals.eval_model import EvalModel

    text = read_data(fit)
    network, tokenizer = load(model, device, dtype, json_output=json_output)
    return EvalModel(model, network, tokenizer, text)


def _answers(output: Path | None) -> Path | None:
    """Where answers are kept, beside the results."""
    return None if output is None else output.with_suffix(f".answers{output.suffix}")


def _quantized(presets: Iterable[str] | None) -> list[CacheConfig]:
    """Full precision has no errors to measure."""
    configs = [config for config in resolved(presets, DEFAULT_PRESETS) if not config.is_exact]
    if not configs:
        raise QJLError("full precision loses nothing: give another preset beside it.")
    return configs
