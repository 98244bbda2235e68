"""What is paid: the sections of benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

from qjl.lab import plots
from qjl.lab.plots.answers import FULL
from qjl.lab.report.groups import commands, distinct, facts, groups, latest
from qjl.lab.report.numbers import NOTHING, number
from qjl.lab.report.parts import Cell, Figure, Mark, Part, Table
from qjl.lab.rows import (
    Decode,
    Encode,
    EngineTurn,
    Generate,
    Memory,
    OfLayer,
    OfModel,
    Overhead,
    Scan,
    Serving,
    StaticKernel,
    Throughput,
    Timed,
)

DYNAMIC = "dynamic"
MOST_COLUMNS = 5  # of ratios in a table
LAYER = ("tokens", "head_dim", "kv_heads", "group", "batch", "device", "threads", "repeats")
LOAD = ("clients", "requests", "words", "answer", "slots", "queue", "device", "threads")
MODEL = ("tokens", "device", "threads", "steps", "repeats")
COMPILED = ("tokens", "batch", "statistics")
PAGES = ("requests", "steps", "device", "threads")


def decode(rows: Sequence[Decode]) -> Part:
    rows = sorted(latest(rows, "preset", "tokens"), key=lambda row: (row.preset, row.tokens))
    caption = (
        "Left: time of one token's attention over one layer against context, with the power of n that it grows by. "
        "Right: what each reaches at its longest context, beside what memory and arithmetic allow."
    )
    others = _compared(rows)
    by_line = [_by_line(rows, others)] if len(others) > MOST_COLUMNS else []
    against = () if by_line else others
    table = Table(
        "Milliseconds per token and layer, and how many times as long others take: medians of rounds in which all were "
        "timed in turn, quartiles below. Kernel: the compiled call alone. The error is that of the output against the "
        "reference backend.",
        (
            *("preset", "tokens", "ms", "kernel, ms"),
            *(f"x {name.replace('_', ' ')}" for name in against),
            *("of bandwidth, %", "error"),
        ),
        tuple(
            (
                Cell(row.preset),
                Cell(f"{row.tokens:,}"),
                Cell(number(row.ms)),
                Cell(number(row.kernel_ms)),
                *(_ratio(row, name) for name in against),
                Cell(number(100 * row.fraction_of_bandwidth, 2)),
                Cell(f"{row.max_error:.0e}"),
            )
            for row in rows
        ),
    )
    return Part(
        f"{_shape(rows[0])}{_paging(rows[0])}, {', '.join(distinct(row.backend for row in rows))}, "
        f"{rows[0].repeats} rounds",
        (Figure(partial(plots.benchmark, rows), caption),) if _grows(rows) else (),
        (table, *by_line),
        facts(rows, *LAYER),
        commands(rows),
    )


def _paging(row: Decode) -> str:
    """Nothing for a cache's own pages and sequences of one length."""
    pages = f", pages of {row.page:g} tokens" if row.page else ""
    return f"{pages}{', lengths that differ' if row.is_ragged else ''}"


def _by_line(rows: Sequence[Timed], others: Sequence[str]) -> Table:
    """What is too much for columns."""
    return Table(
        "What it is compared with: milliseconds, and how many times as long as ours; quartiles below.",
        ("preset", "beside", "tokens", "ms", "x"),
        tuple(
            (
                Cell(row.preset),
                Cell(name.replace("_", " ")),
                Cell(f"{row.tokens:,}"),
                Cell(number(row.others_ms.get(name))),
                _ratio(row, name),
            )
            for row in rows
            for name in others
        ),
        words=2,
    )


def scan(rows: Sequence[Scan]) -> Part:
    rows = latest(rows, "preset", "tokens")
    against = _compared(rows)
    caption = "Time of scanning all keys once for a group of queries, beside other scans of equally many bits per key."
    table = Table(
        "Nanoseconds per key of one head, and how many times as long others take; medians, quartiles below.",
        ("code", "bits per key", "tokens", "ns per key", *(f"x {name.replace('_', ' ')}" for name in against)),
        tuple(
            (
                Cell(row.preset),
                Cell(f"{row.bits_per_key:g}"),
                Cell(f"{row.tokens:,}"),
                Cell(number(row.ns_per_vector)),
                *(_ratio(row, name) for name in against),
            )
            for row in rows
        ),
    )
    figure = Figure(partial(plots.scans, rows), caption)
    return Part(_shape(rows[0]), (figure,), (table,), facts(rows, *LAYER), commands(rows))


def encode(rows: Sequence[Encode]) -> Part:
    rows = sorted(latest(rows, "preset", "tokens", "role"), key=lambda row: (row.preset, row.role, row.tokens))
    caption = (
        "Left: time of making codes of a prompt's keys and values, beside the attention of its prefill, with the power "
        "of n that each grows by. Right: the share of the former in the latter."
    )
    table = Table(
        "Time of making codes of keys and of values, in one layer.",
        ("preset", "of", "tokens", "bits per vector", "ns per vector", "ms", "prefill's attention, ms", "share, %"),
        tuple(
            (
                Cell(row.preset),
                Cell(f"{row.role}s"),
                Cell(f"{row.tokens:,}"),
                Cell(f"{row.bits_per_vector:g}"),
                Cell(number(row.ns_per_vector)),
                Cell(number(row.ms)),
                Cell(number(row.prefill_ms)),
                Cell(number(100 * row.share_of_prefill)),
            )
            for row in rows
        ),
        words=2,
    )
    return Part(
        _shape(rows[0]),
        (Figure(partial(plots.encoding, rows), caption),) if _grows(rows) else (),
        (table,),
        facts(rows, *LAYER),
        commands(rows),
    )


def static(rows: Sequence[StaticKernel]) -> Part:
    first = rows[0]
    title = f"{first.gpu} ({first.capability / 10:.1f}), {first.kv_heads} x {first.group} heads of {first.head_dim}"
    why = " ".join(dict.fromkeys(row.why for row in rows if row.reads and row.why))
    table = Table(
        f"{title}. A kernel as compiled, with its shared memory, and how many layers launch it. Instructions of all "
        "threads, and cycles of one multiprocessor, are of the main loop, for one token and KV head. Predicted: by a "
        "model of warps that was never calibrated, with what its guesses leave open below; x bf16: how many times as "
        f"long reading bfloat16 would take, where bandwidth and the grid allow as much. {why}".rstrip(),
        ("preset", "kernel", "layers", "registers", "instructions", "predicted cycles", "predicted x bf16"),
        tuple(
            (
                Cell(row.preset),
                Cell(row.kernel, note=_of_a_pass(row)),
                Cell(f"{row.layers}"),
                Cell(f"{row.registers}", note=f"{row.spilled_bytes:,} B spilled" if row.spilled_bytes else ""),
                Cell(number(row.thread_instructions_per_token_head)),
                *_predicted(row),
            )
            for row in rows
        ),
        words=2,
    )
    return Part(title, (), (table,), facts(rows, *COMPILED), commands(rows))


def _of_a_pass(row: StaticKernel) -> str:
    tokens = f"{row.tokens_per_tile} tokens, " if row.tokens_per_tile else ""
    return f"{tokens}{row.warps} warps, {number(row.shared_bytes / 1024)} KiB"


def _predicted(row: StaticKernel) -> tuple[Cell, Cell]:
    """Cycles and ratio, with their ranges."""
    cycles, ratio, between = (row.model_cycles_per_token_head, row.predicted_ratio_bf16, row.predicted_ratio_bf16_range)
    found = Cell(NOTHING)
    if cycles is not None:
        found = Cell(number(cycles["mid"]), note=f"{number(cycles['opt'])} to {number(cycles['pes'])}")
    if ratio is None or between is None:
        return found, Cell(NOTHING)
    return found, Cell(number(ratio), note=f"{number(between[0])} to {number(between[1])}")


def overhead(rows: Sequence[Overhead]) -> Part:
    rows = latest(rows, "preset")
    names = {
        "Python, us": "python_us_per_layer_token",
        "kernel, us": "kernel_us_per_layer_token",
        "Python of a block, us": "python_us_per_block",
        "16 rows, us": "rows_us_per_layer",
        "server's turn, ms": "server_turn_ms",
        "vLLM's plan, us": "plan_us",
    }
    table = Table(
        "Processor time of one thread: of a token in one layer, of coding 64 tokens in all layers, of 16 rows of 640 "
        "tokens in one layer, of a server's turn over such rows in all layers, and of planning a step of 256 rows.",
        ("preset", *names),
        tuple((Cell(row.preset), *(Cell(number(getattr(row, name))) for name in names.values())) for row in rows),
    )
    return Part(f"{rows[0].layers} layers, {rows[0].tokens:,} tokens", (), (table,), facts(rows, "isa"), commands(rows))


def memory(rows: Sequence[Memory]) -> Part:
    rows = sorted(latest(rows, "preset", "tokens"), key=lambda row: (row.tokens, row.backend is None))
    against = _compared(rows, hidden="prefill")
    caption = "Time of a prompt, of a token after it, and what the cache holds, against context."
    table = Table(
        "Time and memory of a whole model. Peaks are beside the weights. x: how many times as long, or as large, the "
        "named cache is; quartiles below.",
        (
            *("cache", "tokens", "prompt, s", "token, ms", *(f"x {name}" for name in against)),
            *("cache, MB", "x smaller", "peak, MB", "prompt's peak, MB"),
        ),
        tuple(
            (
                _cache(row),
                Cell(f"{row.tokens:,}"),
                Cell(number(row.prefill_ms / 1e3)),
                Cell(number(row.ms)),
                *(_ratio(row, name) for name in against),
                Cell(_megabytes(row.cache_bytes)),
                Cell(number(row.smaller_than_dynamic)),
                Cell(_megabytes(row.peak_bytes)),
                Cell(_megabytes(row.prefill_peak_bytes)),
            )
            for row in rows
        ),
    )
    figures = (Figure(partial(plots.contexts, rows), caption),) if _grows(rows) else ()
    return Part(_whole(rows), figures, (table,), facts(rows, *MODEL), commands(rows))


def throughput(rows: Sequence[Throughput]) -> Part:
    rows = latest(rows, "preset", "tokens", "batch")
    caches = groups(sorted(rows, key=_cache_order), "tokens", "preset")
    fastest = [max(of, key=_rate) for of in caches]
    caption = f"Tokens per second against batch, up to the largest that fits into {rows[0].memory / 1e9:.3g} GB."
    table = Table(
        "The largest batch of each cache that fits into memory, and the most tokens per second that any batch gave; x: "
        "over the most of transformers' own cache. Each batch was timed once. Bytes are those of the largest batch.",
        (
            *("cache", "tokens each", "sequences", "tokens/s", "step, ms", "cache, MB", "else, MB"),
            *("most tokens/s", "of sequences", "x dynamic"),
        ),
        tuple(_batches(of, fastest) for of in caches),
    )
    figure = Figure(partial(plots.throughput, rows), caption)
    return Part(_whole(rows), (figure,), (table,), facts(rows, *MODEL, "memory"), commands(rows))


def _batches(rows: Sequence[Throughput], fastest: Sequence[Throughput]) -> tuple[Cell, ...]:
    """Of one cache and context; ``fastest`` are the batches of most tokens per second, of all caches."""
    largest = max(rows, key=lambda row: row.batch)
    alike = [row for row in fastest if row.tokens == largest.tokens]
    own, most = max(rows, key=_rate), max(alike, key=_rate)
    dynamic = next((row for row in alike if row.preset == DYNAMIC), None)
    return (
        _cache(largest),
        Cell(f"{largest.tokens:,}"),
        Cell(f"{largest.batch:,}"),
        Cell(number(_rate(largest))),
        Cell(number(largest.ms)),
        Cell(_megabytes(largest.cache_bytes)),
        Cell(_megabytes(largest.peak_bytes and largest.peak_bytes - largest.cache_bytes)),
        Cell(number(_rate(own)), _best(own is most)),
        Cell(f"{own.batch:,}"),
        Cell(number(_rate(own) / _rate(dynamic)) if dynamic else NOTHING),
    )


def _rate(row: Throughput) -> float:
    return float(row.tokens_per_second)


def _cache_order(row: Throughput) -> tuple[int, bool, str]:
    """Ours first."""
    return row.tokens, row.backend is None, row.preset


def generate(rows: Sequence[Generate]) -> Part:
    rows = sorted(latest(rows, "preset", "tokens"), key=lambda row: row.tokens)
    against = _compared(rows)
    caption = (
        "A token's time with a whole model against context, and the part of it that attention takes in each layer."
    )
    table = Table(
        "Whole models: medians; x: how many times as long transformers' own cache takes, quartiles below. Attention: "
        "the time beyond that of a step over 16 tokens, per layer.",
        ("cache", "tokens", "tokens/s", "ms", *(f"x {name.replace('_', ' ')}" for name in against), "attention, ms"),
        tuple(
            (
                Cell(row.preset),
                Cell(f"{row.tokens:,}"),
                Cell(number(row.tokens_per_second)),
                Cell(number(row.ms)),
                *(_ratio(row, name) for name in against),
                Cell(number(row.attention_ms_per_layer, 2)),
            )
            for row in rows
        ),
    )
    figures = (Figure(partial(plots.generation, rows), caption),) if _grows(rows) else ()
    return Part(_whole(rows), figures, (table,), facts(rows, *MODEL), commands(rows))


def serving(rows: Sequence[Serving]) -> Part:
    rows = latest(rows, "preset")
    caption = "Memory of the server from the first request to the last."
    table = Table(
        "Conversations, each with a secret. Told again: refused with the time to come again in, and came again. Leaks: "
        "answers with the secret of another conversation; own: with the one asked for. Seconds from the first attempt "
        "to the first token and to the last: medians, and what 99 % are within. Memory: the most in each half of the "
        "time. x smaller: all caches at their largest, beside 16 bits per number, exact tokens included.",
        (
            *("cache", "answered", "told again", "failed", "leaks", "own, %", "first token, s", "answer, s"),
            *("tokens/s", "memory, MB", "x smaller"),
        ),
        tuple((_cache(row), *_conversations(row), *_waits(row), *_memory_of_server(row)) for row in rows),
    )
    figure = Figure(partial(plots.serving, rows), caption)
    room = rows[0].slots + rows[0].queue
    title = f"{_whole(rows)}, {rows[0].clients} clients, room for {room}"
    return Part(title, (figure,), (table,), facts(rows, *LOAD), commands(rows))


def _conversations(row: Serving) -> tuple[Cell, ...]:
    counts = (row.requests - row.failures, row.refusals, row.failures, row.leaks)
    return *(Cell(f"{count:,}") for count in counts), Cell(number(100 * row.repeated))


def _waits(row: Serving) -> tuple[Cell, ...]:
    waits = (row.first_token_seconds, row.request_seconds)
    used = row.processor_seconds
    tokens = row.tokens_per_second * row.seconds
    note = f"{number(tokens / used)} a processor second" if used else ""
    return *map(_wait, waits), Cell(number(row.tokens_per_second), note=note)


def _wait(seconds: dict[str, float]) -> Cell:
    """The median, and what 99 % are within."""
    return Cell(number(seconds["p50"]), note=f"99 %: {number(seconds['p99'])}") if seconds else Cell(NOTHING)


def _memory_of_server(row: Serving) -> tuple[Cell, ...]:
    smaller = Cell(number(row.smaller_than_full))
    if row.peak_bytes is None:
        return Cell(NOTHING), smaller
    first, second = map(_megabytes, row.peak_bytes)
    return Cell(first, note=f"then {second}"), smaller


def vllm(rows: Sequence[EngineTurn]) -> Part:
    table = Table(
        "Engines took turns, each in a process of its own. Medians of all turns; x: how many times as long stock vLLM "
        "takes, the median of the turns and the range below it. Tokens: what fits into 1 GiB of pages.",
        (
            *("cache", "context", "turns", "step, ms", "x", "its processor time, ms", "x"),
            *("prompts, s", "x", "their processor time, s", "x", "tokens", "x"),
        ),
        tuple(
            _turns(turns, [row for row in rows if row.preset == FULL and row.context == turns[0].context])
            for turns in groups(rows, "context", "preset")
        ),
    )
    title = f"{_whole(rows)}, {rows[0].requests} sequences"
    caption = "Time of a decode step and of prompts against context: medians of the turns, and their range."
    figure = Figure(partial(plots.engines, rows), caption)
    return Part(title, (figure,), (table,), facts(rows, *PAGES), commands(rows))


def _turns(rows: Sequence[EngineTurn], stock: Sequence[EngineTurn]) -> tuple[Cell, ...]:
    """Of one cache at one context."""
    times: tuple[Callable[[EngineTurn], float], ...] = (
        lambda row: 1e3 * row.step_seconds,
        lambda row: 1e3 * row.step_cpu_seconds,
        lambda row: row.prefill_seconds,
        lambda row: row.prefill_cpu_seconds,
    )
    cells = (cell for time in times for cell in _in_turns(rows, stock, time))
    tokens = rows[0].cached_tokens
    more = Cell(number(tokens / stock[0].cached_tokens)) if stock else Cell(NOTHING)
    first = _cache(rows[0]), Cell(f"{rows[0].context:,}"), Cell(f"{len(rows)}")
    return *first, *cells, Cell(f"{tokens:,}"), more


def _in_turns(
    rows: Sequence[EngineTurn], stock: Sequence[EngineTurn], time: Callable[[EngineTurn], float]
) -> tuple[Cell, Cell]:
    """The median, and how many times as long the engine took whose turn was the same."""
    ratios = [time(other) / time(row) for row, other in zip(rows, stock, strict=False)]
    own = Cell(number(median(map(time, rows))))
    if not ratios:
        return own, Cell(NOTHING)
    return own, Cell(number(median(ratios)), note=f"{number(min(ratios))} to {number(max(ratios))}")


def _grows(rows: Sequence[Timed]) -> bool:
    """Whether there is a curve to draw."""
    return len({row.tokens for row in rows}) > 1


def _compared(rows: Sequence[Timed], hidden: str = "no such") -> list[str]:
    """What some row has a ratio to."""
    found = dict.fromkeys(name for row in rows for name, ratio in row.ratios.items() if ratio is not None)
    return [name for name in found if not name.startswith(hidden)]


def _ratio(row: Timed, name: str) -> Cell:
    """The median, and below the quartiles of several rounds."""
    ratio, spread = row.ratios.get(name), row.spreads.get(name)
    if ratio is None:
        return Cell(NOTHING)
    if not spread or row.repeats == 1:
        return Cell(number(ratio))
    return Cell(number(ratio), note=f"{number(spread[0])} to {number(spread[1])}")


def _cache(row: OfModel | Serving | EngineTurn) -> Cell:
    return Cell(row.preset, "" if row.backend is None else "ours")


def _best(is_best: bool) -> Mark:
    return "best" if is_best else ""


def _megabytes(nbytes: float | None) -> str:
    return NOTHING if nbytes is None else number(nbytes / 1e6)


def _shape(row: OfLayer) -> str:
    batch = f"{row.batch} x " if row.batch > 1 else ""
    threads = f", {row.threads} thread(s)" if row.device == "cpu" else ""
    return f"{batch}{row.kv_heads} x {row.group} heads of {row.head_dim}{threads}"


def _whole(rows: Sequence[OfModel | Serving | EngineTurn]) -> str:
    row = rows[0]
    dtype = f" in {row.dtype}" if row.dtype else ""
    where = f"{row.threads} thread(s)" if row.device == "cpu" else row.device
    return f"{row.model}{dtype}, {where}"
