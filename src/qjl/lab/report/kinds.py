"""The kinds of rows there are, in the order of the page; a new evaluation is one entry here, and its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qjl.errors import QJLError
from qjl.lab.records import Row
from qjl.lab.report import quality, speed
from qjl.lab.report.fields import NEVER_NULL, fits
from qjl.lab.report.groups import by_window, groups
from qjl.lab.report.parts import Part, Section


@dataclass(frozen=True)
class Kind:
    """Rows of one evaluation or benchmark.

    - ``needs``: fields without which a row is damaged; with a question mark, if they may be null.
    - ``alike``: fields that rows must share to stand in one figure.
    - ``part``: of a page, made from such rows.
    """

    name: str
    title: str
    text: str
    needs: tuple[str, ...]
    alike: tuple[str, ...]
    part: Callable[[Sequence[Row]], Part]

    def section(self, rows: Sequence[Row]) -> Section:
        parts = (part for alike in groups(rows, *self.alike) for part in by_window(alike))
        return Section(self.name, self.title, self.text, tuple(map(self.part, parts)))


_PRESET = ("model", "preset", "bits", "source")
_WHERE = ("machine", "device", "threads")
_PROTOCOL = ("prefix", "decode", "chunks", "recent?")
_LAYER = ("backend", "head_dim", "kv_heads", "group", "batch", "dtype", "repeats", *_WHERE)
_MODEL = ("model", "dtype", "device", "machine")
_SHAPE = ("head_dim", "kv_heads", "group", "threads")
_OURS = ("preset", "tokens", "ms", "backend?", "threads")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "frontier",
            "The frontier: quality against size",
            "How far the next token's distribution is from that of full precision, with all tokens outside the exact "
            "window read from packed codes, teacher-forced on real text.",
            (
                *(*_PRESET, "protocol", "kl", "kl_se?", "bits_keys", "bits_values", "bits_with_window"),
                *("ppl_full", "dppl_percent", "top1", "retrieval?", "prefix", "decode", "chunks"),
            ),
            ("model", "dtype", "protocol"),
            quality.frontier,
        ),
        Kind(
            "distortion",
            "Distortion of scores and outputs",
            "What quantization does to the scores and to the outputs of each layer's attention, on real keys, beside "
            "what theory says.",
            (*_PRESET, "layer", "role", "error", "theory?", "recent?"),
            ("model", "dtype", "tokens", "rows", "text", "fitted_to"),
            quality.distortion,
        ),
        Kind(
            "perplexity",
            "Perplexity against context",
            "Half of each context is prefilled and quantized, the other half decoded over the codes.",
            (*_PRESET, "context", "ppl", "ppl_full", "kl", "kl_se?", "chunks", "recent?"),
            ("model", "dtype", "text", "fitted_to", "chunks"),
            quality.perplexity,
        ),
        Kind(
            "seeds",
            "Seeds: how much is luck",
            "The same measurement with other random projections, and with other prompts for the statistics.",
            (*_PRESET, "seed", "kl", *_PROTOCOL),
            ("model", "dtype", "text", "fitted_to", "prefix", "decode", "chunks"),
            quality.seeds,
        ),
        Kind(
            "haystack",
            "Retrieval: needles in haystacks",
            "Something is hidden in a long text, which is quantized; the question is asked and answered over codes. "
            "Answers count by exact match.",
            (*_PRESET, "task", "context", "depth", "seed", "found", "read_as_codes", "recent?"),
            ("model", "dtype", "text", "fitted_to"),
            quality.haystack,
        ),
        Kind(
            "problems",
            "Problems with a final answer",
            "Problems worked out step by step over the codes of the question and of all that was written, the final "
            "answer compared.",
            (
                *(*_PRESET, "protocol", "task", "n", "accuracy", "accuracy_se", "right", "tokens", "unfinished"),
                *("read_as_codes?", "recent?"),
            ),
            ("model", "dtype", "task", "n", "protocol", "fitted_to"),
            quality.problems,
        ),
        Kind(
            "harness",
            "Tasks of lm-evaluation-harness",
            "Log-likelihoods and answers taken over the packed codes of each context.",
            (*_PRESET, "protocol", "task", "metric", "value", "value_se?", "read_as_codes", "recent?"),
            ("model", "dtype", "protocol", "limit", "fitted_to"),
            quality.harness,
        ),
        Kind(
            "decode",
            "Decoding: one token's attention",
            "One token's attention over a packed layer with cold caches, everything included, beside attention in full "
            "precision. No speed is reported of what is not right.",
            (
                *(*_OURS, *_SHAPE, "machine", "repeats", "operations", "bytes", "max_error"),
                *("bandwidth_gbs", "peak_gflops", "fraction_of_bandwidth"),
            ),
            _LAYER,
            speed.decode,
        ),
        Kind(
            "scan",
            "Scanning packed keys",
            "Scores of a group of queries with all keys, tables and scales included, and nothing else of attention.",
            (*_OURS, *_SHAPE, "bits_per_key", "ns_per_vector"),
            (*_LAYER, "tokens"),
            speed.scan,
        ),
        Kind(
            "encode",
            "Encoding a prompt",
            "A prompt's keys and values to packed codes, beside the attention of the prefill that they come from.",
            (*_OURS, *_SHAPE, "role", "bits_per_vector", "ns_per_vector", "prefill_ms", "share_of_prefill"),
            _LAYER,
            speed.encode,
        ),
        Kind(
            "memory",
            "Whole models: time and memory against context",
            "Every cache reads the same prompt and decodes the same number of tokens after it.",
            (*_OURS, *_MODEL, "prefill_ms", "cache_bytes", "peak_bytes?", "prefill_peak_bytes?"),
            ("model", "dtype", *_WHERE, "steps"),
            speed.memory,
        ),
        Kind(
            "throughput",
            "Throughput: as many sequences as fit",
            "All sequences hold the same tokens; batches grow until weights, caches and all else exceed the memory.",
            (
                *(*_OURS, *_MODEL, "batch", "tokens_per_second", "is_largest", "memory"),
                *("cache_bytes", "peak_bytes?"),
            ),
            ("model", "dtype", *_WHERE, "memory", "steps"),
            speed.throughput,
        ),
        Kind(
            "generate",
            "Whole models: a token's time beside other engines",
            "Decoding with a whole model after a prompt, beside transformers' own caches and llama.cpp.",
            (*_OURS, "model", "machine", "tokens_per_second", "attention_ms_per_layer?"),
            ("model", *_WHERE),
            speed.generate,
        ),
        Kind(
            "serving",
            "A server under load",
            "qjl serve, asked by many clients at once: each conversation has a secret of its own that is asked for, "
            "and that no other may hear.",
            (
                *("preset", *_MODEL, "threads", "backend?", "clients", "requests", "seconds", "statuses", "leaks"),
                *("repeated", "first_token_seconds", "request_seconds", "tokens_per_second", "peak_bytes?"),
                *("resident_bytes", "smaller_than_full?", "words", "answer", "slots", "queue"),
            ),
            ("model", "dtype", *_WHERE, "clients", "requests", "words", "answer", "slots", "queue"),
            speed.serving,
        ),
        Kind(
            "vllm",
            "vLLM: pages of codes beside its own",
            "vLLM with the plugin and without: all sequences hold the same context and decode together.",
            (
                *("preset", *_MODEL, "threads", "backend?", "requests", "context", "steps", "cached_tokens"),
                *("step_seconds", "step_cpu_seconds", "prefill_seconds", "prefill_cpu_seconds"),
            ),
            ("model", "dtype", *_WHERE, "requests", "steps"),
            speed.vllm,
        ),
    )
}


def kind_of(row: Row) -> str:
    """Told by ``case``, and where there is none by what was measured; a row of another project keeps its own name."""
    if "case" in row:
        return f"{row['case']}"
    if "kl" in row:
        return "frontier"
    if {"task", "metric", "value"} <= row.keys():
        return "harness"
    return "answers of evaluations" if {"run", "request", "answer"} <= row.keys() else "of no kind"


def checked(row: Row, place: str) -> Row:
    """The row, if nothing is missing, and every field holds what its name says.

    Raises:
        QJLError: if something is.
    """
    name = kind_of(row)
    if name not in KINDS:
        return row
    needs = {need.removesuffix("?"): need.endswith("?") for need in KINDS[name].needs}
    for field in needs:
        if field not in row:
            raise QJLError(f"a row of {name} in {place} has no {field}: measure it again, or leave it out.")
    for field, value in row.items():
        may_be_null = needs.get(field, field not in NEVER_NULL)
        if not (value is None and may_be_null) and not fits(name, field, value, is_needed=field in needs):
            raise QJLError(f"a row of {name} in {place} has {value!r} for {field}: measure it again, or leave it out.")
    return row
