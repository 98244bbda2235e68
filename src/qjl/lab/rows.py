"""What was measured: a row for each result, of one type per kind, as commands write it and the report reads it.

A file holds rows as JSON lines, a field a name. Fields with a default are those that some rows do not have: rows of old
say less, and not every model or machine can be asked everything. What is compared with others is gathered by name:
``ms_NAME``, ``ratio_NAME`` and ``spread_NAME`` are the entries of ``others_ms``, ``ratios`` and ``spreads``.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from qjl.errors import QJLError

OURS = "this project"
REFUSED = ("429", "503")  # with the time to come again
_GATHERED = {"ms_": "others_ms", "ratio_": "ratios", "spread_": "spreads"}

Positive = Annotated[float, lambda value: value > 0]  # what is drawn over logarithms
Count = Annotated[int, lambda value: value > 0]
Error = Annotated[float, lambda value: not value < 0]  # a standard error; not a number where one sample has none
Share = Annotated[float, lambda value: 0 <= value <= 1]
Answers = Annotated[str, lambda value: set(value) <= {"0", "1"}]  # a digit per question, 1 if it was right
Two = Annotated[list[float], lambda value: len(value) == 2]
Percentiles = Annotated[dict[str, float], lambda value: {"p50", "p99"} <= value.keys()]  # seconds
Guessed = Annotated[dict[str, float], lambda value: {"opt", "mid", "pes"} <= value.keys()]
Asked = Annotated[dict[str, Any], lambda value: not value or "task" in value]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What all rows tell.

    - ``command``: the command line that measured it; rows made by hand have none.
    - ``versions``: of packages, by name; ``machine``: where it ran.
    """

    case: ClassVar[str]
    alike: ClassVar[tuple[str, ...]]  # fields that rows must share to stand in one figure

    command: str | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    machine: str | None = None


@dataclass(frozen=True, kw_only=True)
class OfPreset(Row):
    """An evaluation of a preset on a model.

    - ``bits``, ``bits_keys``, ``bits_values``: true bits per number, every constant counted.
    - ``source``: of the keys' method; ``settings``: the preset as JSON.
    - ``recent``, ``sinks``: exact tokens at the end and at the start.
    - ``fitted_to``, ``text``: digests of what codecs were fitted to, and of what was evaluated on.
    - ``fingerprint``: of what the model computes.
    """

    model: str
    preset: str
    bits: Positive
    source: str
    bits_keys: float | None = None
    bits_values: float | None = None
    fingerprint: str | None = None
    dtype: str | None = None
    settings: dict[str, Any] | None = None
    fitted_to: str | None = None
    text: str | None = None
    recent: float | None = None
    sinks: float | None = None
    method_keys: str | None = None
    method_values: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the keys' method is this project's own."""
        return self.source == OURS


@dataclass(frozen=True, kw_only=True)
class Lossy(OfPreset):
    """What teacher-forced decoding over the codes loses against full precision.

    - ``kl``: of the next token, nats per token; ``kl_se``, its standard error over ``kl_of_chunks``.
    - ``ppl``, ``ppl_full``: perplexities; ``dppl_percent`` the increase, percent.
    - ``top1``: share of tokens with the same most likely next one.
    - ``retrieval``, ``retrieval_full``: shares of the codes hidden in a text that were found.
    - ``bits_with_window``: with the exact tokens and the maps counted too.
    - ``prefix``, ``decode``: tokens; ``chunks``: stretches of the text; ``seeds``: that made a difference.
    """

    kl: float
    kl_se: Error | None = None
    kl_of_chunks: list[float] | None = None
    ppl: float | None = None
    ppl_full: float | None = None
    dppl_percent: float | None = None
    dppl_percent_se: Error | None = None
    top1: float | None = None
    retrieval: float | None = None
    retrieval_full: float | None = None
    bits_with_window: float | None = None
    seeds: float | None = None
    chunks: float | None = None
    prefix: float | None = None
    decode: float | None = None
    source_values: str | None = None
    pre_rope: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Fidelity(Lossy):
    """A preset of `qjl eval fidelity` or `qjl eval frontier`; ``protocol`` says how it was measured."""

    case: ClassVar[str] = "frontier"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "protocol")

    protocol: dict[str, Any]
    kl_se: Error | None = field()
    ppl_full: float = field()
    dppl_percent: float = field()
    top1: float = field()
    retrieval: float | None = field()
    bits_keys: float = field()
    bits_values: float = field()
    bits_with_window: float = field()
    chunks: float = field()
    prefix: float = field()
    decode: float = field()


@dataclass(frozen=True, kw_only=True)
class Distortion(OfPreset):
    """Errors of one layer: of scores over ||q|| ||k|| (``role`` score), or of outputs over their norm.

    ``error`` is a root mean square, ``error_se`` its standard error over texts and heads, ``theory`` what a formula
    says, if there is one. ``rows`` stretches of ``tokens`` tokens.
    """

    case: ClassVar[str] = "distortion"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "tokens", "rows", "text", "fitted_to")

    recent: float | None = field()
    layer: float
    role: str
    error: float
    error_se: Error | None = None
    theory: float | None
    tokens: Count | None = None
    rows: float | None = None


@dataclass(frozen=True, kw_only=True)
class Perplexity(Lossy):
    """A preset at one context, of which half is prefilled; ``context`` in tokens."""

    case: ClassVar[str] = "perplexity"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "text", "fitted_to", "chunks")

    recent: float | None = field()
    context: Count
    ppl: float = field()
    ppl_full: float = field()
    ppl_se: Error | None = None
    kl_se: Error | None = field()
    chunks: float = field()


@dataclass(frozen=True, kw_only=True)
class Seed(Lossy):
    """A preset with one seed of its projections and statistics."""

    case: ClassVar[str] = "seeds"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "text", "fitted_to", "prefix", "decode", "chunks")

    recent: float | None = field()
    seed: float
    chunks: float = field()
    prefix: float = field()
    decode: float = field()


@dataclass(frozen=True, kw_only=True)
class Haystack(OfPreset):
    """What was hidden in a text of ``context`` tokens at ``depth`` (0 the start, 1 the end), asked for over the codes.

    ``found``: the share of it; ``read_as_codes``: of the tokens attended to.
    """

    case: ClassVar[str] = "haystack"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "text", "fitted_to")

    recent: float | None = field()
    task: str
    context: Count
    depth: float
    seed: float
    found: Share
    answer: str | None = None
    read_as_codes: float


@dataclass(frozen=True, kw_only=True)
class Problems(OfPreset):
    """``n`` problems solved step by step over the codes.

    ``right`` has a digit per problem, ``accuracy`` is their share with its standard error; ``tokens`` the mean length
    of solutions, ``unfinished`` the share that was cut at the longest.
    """

    case: ClassVar[str] = "problems"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "task", "n", "protocol", "fitted_to")

    recent: float | None = field()
    protocol: dict[str, Any]
    task: str
    n: float
    accuracy: float
    accuracy_se: Error
    right: Answers
    tokens: float
    unfinished: float
    read_as_codes: float | None


@dataclass(frozen=True, kw_only=True)
class HarnessMetric(OfPreset):
    """A metric of a task of lm-evaluation-harness, over ``n`` questions with ``shots`` examples in front of each.

    ``value_se`` is the harness's standard error, None if there is none; ``filter`` its name for how answers are read;
    ``asked`` how the task was asked for, ``questions`` a digest of all that was asked, by which another run can be
    known to have asked the same; ``read_as_codes`` the share of codes among all tokens that were attended to.
    """

    case: ClassVar[str] = "harness"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "protocol", "limit", "fitted_to")

    recent: float | None = field()
    protocol: dict[str, Any]
    task: str
    metric: str
    filter: str | None = None
    value: float
    value_se: Error | None
    n: float | None = None
    shots: float | None = None
    limit: float | None = None
    asked: Asked = field(default_factory=dict)
    questions: str | None = None
    read_as_codes: float


@dataclass(frozen=True, kw_only=True)
class Timed(Row):
    """A benchmark: ``ms`` are medians over ``repeats`` rounds.

    - ``backend``: of the kernels; None for what is not ours. ``isa``: its instruction set.
    - ``tokens``: in the cache, or of the prompt.
    - ``others_ms``, ``ratios``, ``spreads``: of what it is compared with; milliseconds, how many times as long it
      takes, and the quartiles of that; None for what was not timed.
    - ``max_error``, ``rms_error``: of attention's rows against the reference backend, relative: of the worst one, and
      the root mean square of all. Of scores, of logits and of codes there is one number.
    """

    preset: str
    tokens: Count
    ms: float
    backend: str | None
    threads: float
    head_dim: float | None = None
    device: str = "cpu"
    dtype: str | None = None
    repeats: float | None = None
    isa: str | None = None
    max_error: float | None = None
    rms_error: float | None = None
    others_ms: dict[str, float | None] = field(default_factory=dict)
    ratios: dict[str, float | None] = field(default_factory=dict)
    spreads: dict[str, Two | None] = field(default_factory=dict)


_LAYER = (
    *("backend", "head_dim", "kv_heads", "group", "batch", "dtype", "repeats"),
    *("machine", "device", "threads", "command"),  # what was not timed in turn is not compared
)


@dataclass(frozen=True, kw_only=True)
class OfLayer(Timed):
    """One layer of ``batch`` sequences with ``kv_heads`` key-value heads, each of ``group`` query heads.

    ``bytes``: that must be read; ``bandwidth_gbs``: at which memory moves, GB/s; ``fraction_of_bandwidth``: reached.
    """

    alike: ClassVar[tuple[str, ...]] = _LAYER

    head_dim: float = field()
    kv_heads: float
    group: float
    batch: Count = 1
    eager_ms: float | None = None
    bytes: float | None = None
    bandwidth_gbs: float | None = None
    fraction_of_bandwidth: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decode(OfLayer):
    """One token's attention; ``operations`` of exact attention, ``peak_gflops`` of the machine.

    ``kernel_ms``: of the compiled call alone, in steps of their own on cold data; None for backends other than cpu.
    ``page``: tokens of a page, where they lie in no order; None for a cache's own. ``lengths``: of each sequence, where
    they differ.
    """

    case: ClassVar[str] = "decode"
    alike: ClassVar[tuple[str, ...]] = (*_LAYER, "page", "is_ragged")

    machine: str = field()
    repeats: float = field()
    kernel_ms: float | None = None
    operations: float
    bytes: float = field()
    max_error: float = field()
    bandwidth_gbs: float = field()
    peak_gflops: float
    fraction_of_bandwidth: float = field()
    packed_bytes: float | None = None
    exact_tokens: float | None = None
    page: float | None = None
    lengths: list[float] | None = None

    @property
    def is_ragged(self) -> bool:
        return self.lengths is not None


@dataclass(frozen=True, kw_only=True)
class Scan(OfLayer):
    """Scores of a group of queries with all keys of ``bits_per_key`` bits; ``ns_per_vector`` for one key of a head."""

    case: ClassVar[str] = "scan"
    alike: ClassVar[tuple[str, ...]] = (*_LAYER, "tokens")

    bits_per_key: float
    ns_per_vector: float


@dataclass(frozen=True, kw_only=True)
class Encode(OfLayer):
    """A prompt's keys or values (``role``) to codes.

    ``prefill_ms``: of the attention of its prefill, of which encoding takes ``share_of_prefill``.
    """

    case: ClassVar[str] = "encode"

    role: str
    bits_per_vector: float
    ns_per_vector: float
    prefill_ms: float
    share_of_prefill: float


@dataclass(frozen=True, kw_only=True)
class StaticKernel(Row):
    """A kernel of a decode step as it was compiled for a GPU, and what a model predicts of it; nothing was timed.

    - ``layers``: so many of ``statistics`` launch it. ``reads``: codes or exact tokens, if it walks over any.
    - ``registers`` and ``spilled_bytes`` (local memory) of a thread, ``shared_bytes`` of a program of ``warps``.
    - ``programs``: of a step of ``batch`` sequences; ``programs_per_processor`` at once, which leaves ``filled`` of all
      places taken.
    - ``loop_instructions``: of a warp and a pass of the main loop, over ``tokens_per_tile``, by kind.
    - ``..._per_token_head``: of one token and KV head, cycles of one multiprocessor; ``model_cycles`` by guess
      (``opt``, ``mid``, ``pes``), None where ``why`` says so; ``bandwidth_cycles``: until its bytes are there.
    - ``predicted_ratio_bf16``: how many times as long reading bfloat16 would take; of codes alone.
    """

    case: ClassVar[str] = "static"
    alike: ClassVar[tuple[str, ...]] = (
        *("capability", "head_dim", "kv_heads", "group", "batch", "tokens", "statistics"),
        *("versions", "command"),
    )

    kernel: str
    preset: str
    capability: Count
    gpu: str
    head_dim: Count
    kv_heads: Count
    group: Count
    batch: Count
    tokens: Count
    statistics: str
    layers: Count
    reads: str | None
    tokens_per_tile: float | None
    warps: Count
    registers: Count
    spilled_bytes: float
    shared_bytes: float
    programs: Count
    programs_per_processor: Count
    filled: Share
    loop_instructions: dict[str, float]
    thread_instructions_per_token_head: float | None
    model_cycles_per_token_head: Guessed | None
    bandwidth_cycles_per_token_head: float | None
    predicted_ratio_bf16: float | None
    predicted_ratio_bf16_range: Two | None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class OfModel(Timed):
    """A whole model, with a cache; bytes are of memory, ``peak_bytes`` beside the weights."""

    model: str
    weights_bytes: float | None = None
    steps: float | None = None


@dataclass(frozen=True, kw_only=True)
class Memory(OfModel):
    """A prompt (``prefill_ms``), a token after it (``ms``), and what the cache holds."""

    case: ClassVar[str] = "memory"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "machine", "device", "threads", "steps")

    dtype: str = field()
    device: str = field()
    machine: str = field()
    prefill_ms: float
    cache_bytes: float
    peak_bytes: float | None
    prefill_peak_bytes: float | None
    smaller_than_dynamic: float | None = None


@dataclass(frozen=True, kw_only=True)
class Throughput(OfModel):
    """``batch`` sequences decoded together; ``is_largest`` if no more fit into ``memory`` bytes."""

    case: ClassVar[str] = "throughput"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "machine", "device", "threads", "memory", "steps")

    dtype: str = field()
    device: str = field()
    machine: str = field()
    batch: Count
    tokens_per_second: float
    is_largest: float
    memory: float
    cache_bytes: float
    peak_bytes: float | None


@dataclass(frozen=True, kw_only=True)
class Generate(OfModel):
    """Decoding beside other caches and engines.

    ``attention_ms_per_layer``: beyond a step over 16 tokens in full precision.
    """

    case: ClassVar[str] = "generate"
    alike: ClassVar[tuple[str, ...]] = ("model", "machine", "device", "threads")

    machine: str = field()
    tokens_per_second: float
    attention_ms_per_layer: float | None
    spread_attention_ms_per_layer: Two | None = None


@dataclass(frozen=True, kw_only=True)
class Overhead(Row):
    """What Python costs around the kernels, in processor time of one thread.

    - ``python_us_per_layer_token``, ``kernel_us_per_layer_token``: of one token in one layer, behind ``tokens`` others.
    - ``python_us_per_block``: what a pass takes more that codes 64 tokens in all ``layers``.
    - ``rows_us_per_layer``: 16 rows of 640 tokens through transformers, kernels included.
    - ``server_turn_ms``: attention of a server's turn over such rows, all layers, kernels included.
    - ``plan_us``: of a step of the vLLM plugin, 256 rows of 32k tokens.
    """

    case: ClassVar[str] = "overhead"
    alike: ClassVar[tuple[str, ...]] = ("layers", "tokens", "machine")

    preset: str
    layers: Count
    tokens: Count
    repeats: Count
    python_us_per_layer_token: float
    kernel_us_per_layer_token: float
    python_us_per_block: float
    rows_us_per_layer: float
    server_turn_ms: float
    plan_us: float
    isa: str | None = None


@dataclass(frozen=True, kw_only=True)
class Serving(Row):
    """A server asked by ``clients`` at once, ``requests`` conversations in all, each with a secret of its own.

    - ``statuses``: how often the server answered with each; ``leaks``: answers with another's secret; ``repeated``:
      the share with their own.
    - ``first_token_seconds``, ``request_seconds``: from the first attempt.
    - ``peak_bytes``: of memory, in each half of the time; ``resident_bytes``: over time.
    - ``smaller_than_full``: all caches at their largest, beside 16 bits per number.
    """

    case: ClassVar[str] = "serving"
    alike: ClassVar[tuple[str, ...]] = (
        *("model", "dtype", "machine", "device", "threads"),
        *("clients", "requests", "words", "answer", "slots", "queue"),
    )

    preset: str
    model: str
    dtype: str
    device: str
    machine: str = field()
    threads: float
    backend: str | None
    isa: str | None = None
    clients: float
    requests: int
    seconds: float
    processor_seconds: float | None = None
    statuses: dict[str, Any]
    leaks: float
    repeated: float
    prompt_tokens: float | None = None
    answer_tokens: float | None = None
    tokens_per_second: float
    first_token_seconds: Percentiles
    request_seconds: Percentiles
    idle_bytes: float | None = None
    peak_bytes: Two | None
    resident_bytes: list[float]
    cache_bytes: float | None = None
    smaller_than_full: float | None
    words: float
    answer: float
    slots: float
    queue: float
    exit_code: float | None = None

    @property
    def refusals(self) -> int:
        """Requests that were to come again, and did."""
        return sum(self.statuses.get(status, 0) for status in REFUSED)

    @property
    def failures(self) -> int:
        """Conversations without a whole answer."""
        return self.requests - int(self.statuses.get("200", 0))

    @property
    def went_well(self) -> bool:
        return not (self.failures or self.leaks or self.exit_code)


@dataclass(frozen=True, kw_only=True)
class EngineTurn(Row):
    """A turn of vLLM with ``requests`` sequences of ``context`` tokens; ``cached_tokens`` fit into 1 GiB of pages.

    Seconds are of a decode step and of all prompts, by the clock and of the processor.
    """

    case: ClassVar[str] = "vllm"
    alike: ClassVar[tuple[str, ...]] = ("model", "dtype", "machine", "device", "threads", "requests", "steps")

    preset: str
    model: str
    dtype: str
    device: str
    machine: str = field()
    threads: float
    backend: str | None
    isa: str | None = None
    requests: float
    context: Count
    steps: float
    cached_tokens: float
    step_seconds: float
    step_cpu_seconds: float
    prefill_seconds: float
    prefill_cpu_seconds: float
    right: float | None = None
    attention: list[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFamily(Row):
    """A tiny random model of one family of transformers, asked whether our caches are right for it.

    ``max_error_full``: of logits with exact codecs, relative; ``kl``, ``kl_other``: of the preset, nats, on the prompt
    that statistics came from and on another; ``why`` it does not work.
    """

    case: ClassVar[str] = "models"
    alike: ClassVar[tuple[str, ...]] = ("preset", "versions")

    family: str
    task: str
    model_class: str | None = None
    preset: str
    verdict: str
    max_error_full: float | None
    kl: float | None
    kl_other: float | None
    why: str | None = None
    asked: list[Any] | None = None


KINDS: Mapping[str, type[Row]] = {
    kind.case: kind
    for kind in (
        *(Fidelity, Distortion, Perplexity, Seed, Haystack, Problems, HarnessMetric),
        *(Decode, Scan, Encode, StaticKernel, Overhead),
        *(Memory, Throughput, Generate, Serving, EngineTurn, ModelFamily),
    )
}


def kind_of(fields: Mapping[str, Any]) -> str:
    """Told by ``case``; a row of another project keeps its own name."""
    if "case" in fields:
        return f"{fields['case']}"
    return "answers of evaluations" if {"run", "request", "answer"} <= fields.keys() else "of no kind"


def typed(fields: Mapping[str, Any], place: str = "what was measured") -> Row:
    """The row that JSON tells.

    Raises:
        QJLError: if a field is missing, is not known, or does not hold what its name says; or if the row is of no kind
            that is known.
    """
    name = kind_of(fields)
    if name not in KINDS:
        raise QJLError(f"a row in {place} is {name!r}, which is no kind of ours: leave it out.")
    hints = _hints(name)
    given = _gathered({field: value for field, value in fields.items() if field != "case"}, hints)
    for one in dataclasses.fields(KINDS[name]):
        is_needed = one.default is MISSING and one.default_factory is MISSING
        if is_needed and one.name not in given:
            raise QJLError(f"a row of {name} in {place} has no {one.name}: measure it again, or leave it out.")
    for path, value in given.items():
        if path not in hints:
            raise QJLError(f"a row of {name} in {place} has {path}, which is not known: measure it again.")
        for told, one in _told(path, value, hints[path]):
            raise QJLError(f"a row of {name} in {place} has {one!r} for {told}: measure it again, or leave it out.")
    return KINDS[name](**given)


def pareto_front(rows: Sequence[Fidelity]) -> list[Fidelity]:
    """The rows, by size, that no other beats with as few bits or as low a KL."""
    front: list[Fidelity] = []
    for row in sorted(rows, key=lambda row: (row.bits, row.kl)):
        if not front or row.kl < front[-1].kl:
            front.append(row)
    return front


@functools.cache
def _hints(name: str) -> dict[str, Any]:
    return get_type_hints(KINDS[name], include_extras=True)


def _gathered(fields: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """With what is compared with others under one name."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        start = next((start for start in _GATHERED if name.startswith(start) and name not in hints), None)
        if start is None or _GATHERED[start] not in hints:
            found[name] = value
        else:
            found.setdefault(_GATHERED[start], {})[name.removeprefix(start)] = value
    return found


def _told(name: str, value: Any, hint: Any) -> list[tuple[str, Any]]:
    """The first field that does not hold what it should, and what it holds, as the file names them."""
    if name not in _GATHERED.values():
        return [] if _fits(hint, value) else [(name, value)]
    start = next(start for start, gathered in _GATHERED.items() if gathered == name)
    inner = get_args(hint)[1]
    return [(start + of, one) for of, one in value.items() if not _fits(inner, one)][:1]


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _fits(arguments[0], value) and all(rule(value) for rule in arguments[1:])
    if origin in (Union, types.UnionType):
        return any(_fits(one, value) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], one) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(arguments[1], one) for one in value.values())
    return isinstance(value, (int, float) if hint is float else hint)
