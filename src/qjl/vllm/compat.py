"""Every name of vLLM that the project uses; nothing else imports vLLM.

``SERVING``, ``TABLES`` and ``ENGINE`` list them, ``require`` holds a list against the vLLM that is installed, and a
test holds all against the sources of the releases in ``CHECKED``. A name is imported when it is asked for, so that this
module loads without vLLM: ``from qjl.vllm.compat import AttentionBackend``.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch

from qjl.errors import QJLError
from qjl.vllm.host_tables import HostTable, Pages, give, keep, keep_cut, keep_given, known_pages

logger = logging.getLogger("vllm.qjl")
Class = TypeVar("Class", bound=type)

CHECKED = ("0.32.0", "0.33.0")
PLUGINS = "vllm.general_plugins"
ALLOWED = "VLLM_PLUGINS"  # names of plugins, with commas between; without it all are loaded
SERVER = "vllm.entrypoints.openai.api_server"  # vLLM's command has no name in packages other than vllm
ATTENTION = "CUSTOM"
API_KEY = "VLLM_API_KEY"  # an argument could be read by everybody on the machine
LOGGING = "VLLM_LOGGING_LEVEL"
ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Uses:
    """``names`` by module, ``members`` (fields, methods, enum members) by class, ``parameters`` that calls name."""

    names: Mapping[str, tuple[str, ...]]
    members: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


SERVING = Uses(
    names={
        "vllm._custom_ops": (
            "cpu_attention_with_kv_cache",
            "cpu_attn_get_scheduler_metadata",
            "cpu_attn_reshape_and_cache",
        ),
        "vllm.config": (
            "CompilationConfig",
            "ModelConfig",
            "ParallelConfig",
            "SchedulerConfig",
            "SpeculativeConfig",
            "VllmConfig",
        ),
        "vllm.distributed.parallel_state": ("get_tensor_model_parallel_rank",),
        "vllm.envs": ("VLLM_CPU_ATTN_SPLIT_KV",),
        "vllm.model_executor.layers.attention": ("Attention",),
        "vllm.model_executor.models.utils": ("extract_layer_index",),
        "vllm.platforms": ("current_platform",),
        "vllm.platforms.interface": ("Platform",),
        "vllm.v1.attention.backend": (
            "AttentionBackend",
            "AttentionCGSupport",
            "AttentionImpl",
            "AttentionMetadata",
            "AttentionMetadataBuilder",
            "AttentionType",
            "CommonAttentionMetadata",
        ),
        "vllm.v1.attention.backends.cpu_attn": ("CPUAttentionBackend", "_get_attn_isa"),
        "vllm.v1.attention.backends.registry": ("AttentionBackendEnum", "register_backend"),
        "vllm.v1.kv_cache_interface": ("FullAttentionSpec", "KVCacheLayout"),
    },
    members={
        "Attention": ("impl",),
        "AttentionBackend": ("supported_dtypes", "supported_kv_cache_dtypes"),
        "AttentionBackendEnum": (ATTENTION, "CPU_ATTN"),
        "AttentionCGSupport": ("NEVER",),
        "AttentionType": ("DECODER",),
        "CommonAttentionMetadata": (
            "block_table_tensor",
            "causal",
            "num_reqs",
            "query_start_loc_cpu",
            "req_idx",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
        ),
        "CompilationConfig": ("static_forward_context",),
        "CPUAttentionBackend": ("get_supported_head_sizes",),
        "FullAttentionSpec": (
            "attention_chunk_size",
            "block_size",
            "dtype",
            "head_size",
            "head_size_v",
            "non_causal",
            "num_kv_heads",
            "sliding_window",
            "state_content_bytes",
        ),
        "KVCacheLayout": ("LBHNC",),
        "ModelConfig": (
            "dtype",
            "get_num_attention_heads",
            "get_total_num_kv_heads",
            "is_mm_prefix_lm",
            "model",
            "revision",
        ),
        "ParallelConfig": (
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "tensor_parallel_size",
            "use_ubatching",
        ),
        "Platform": ("is_cpu",),
        "SchedulerConfig": ("max_num_seqs",),
        "SpeculativeConfig": ("method",),
        "VllmConfig": (
            "compilation_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
    },
    parameters={
        "_get_attn_isa": ("dtype", "block_size", "head_size"),
        "cpu_attention_with_kv_cache": (
            "query",
            "key_cache",
            "value_cache",
            "output",
            "query_start_loc",
            "seq_lens",
            "scale",
            "causal",
            "alibi_slopes",
            "sliding_window",
            "block_table",
            "softcap",
            "scheduler_metadata",
            "s_aux",
        ),
        "cpu_attn_get_scheduler_metadata": (
            "num_reqs",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "seq_lens",
            "dtype",
            "query_start_loc",
            "causal",
            "sliding_window_size",
            "isa",
            "enable_kv_split",
        ),
        "cpu_attn_reshape_and_cache": ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
        "extract_layer_index": ("layer_name",),
        "register_backend": ("backend", "class_path"),
        "ModelConfig.get_num_attention_heads": ("parallel_config",),
    },
)

ENGINE = Uses(
    names={
        "vllm": ("LLM", "SamplingParams"),
        "vllm.config": ("CacheConfig", "VllmConfig"),
        "vllm.engine.arg_utils": ("EngineArgs",),
        "vllm.envs": (ALLOWED, API_KEY, LOGGING, *ONE_PROCESS),
        "vllm.outputs": ("CompletionOutput", "RequestOutput"),
        "vllm.v1.engine.llm_engine": ("LLMEngine",),
    },
    members={
        "CacheConfig": ("block_size", "num_gpu_blocks"),
        "CompletionOutput": ("token_ids",),
        "EngineArgs": (
            "attention_backend",
            "dtype",
            "enable_prefix_caching",
            "enforce_eager",
            "kv_cache_memory_bytes",
            "max_model_len",
            "max_num_seqs",
            "model",
        ),
        "LLM": ("apply_model", "get_tokenizer", "llm_engine"),
        "LLMEngine": ("add_request", "step", "vllm_config"),
        "RequestOutput": ("outputs", "request_id"),
        "SamplingParams": ("ignore_eos", "max_tokens", "temperature"),
        "VllmConfig": ("cache_config",),
    },
    parameters={"LLMEngine.add_request": ("request_id", "prompt", "params")},
)

TABLES = Uses(  # of runners on a GPU, without which block tables are read back from it
    names={
        "vllm.v1.worker.block_table": ("BlockTable",),
        "vllm.v1.worker.gpu.block_table": ("BlockTables",),
        "vllm.v1.worker.utils": ("AttentionGroup",),
    },
    members={
        "AttentionGroup": ("kernel_block_size", "kernel_block_stride", "kv_cache_spec", "map_to_kernel_block_table"),
        "BlockTable": ("get_device_tensor", "get_numpy_array"),
        "BlockTables": (
            "append_block_ids",
            "gather_block_tables",
            "input_block_tables",
            "redirect_writes_to_null_block",
        ),
    },
)

_HOMES = {name: home for uses in (SERVING, ENGINE, TABLES) for home, names in uses.names.items() for name in names}


def __getattr__(name: str) -> Any:
    """vLLM's own object.

    Raises:
        QJLError: if vLLM has none of that name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _theirs(name)
    except (AttributeError, ImportError) as error:
        raise _lacks([f"{_HOMES[name]}.{name}"]) from error


def version() -> str:
    """Of the vLLM that is installed."""
    return getattr(import_module("vllm"), "__version__", "of an unknown version")


def require(uses: Uses) -> None:
    """Raises QJLError that names all that the installed vLLM lacks."""
    gone = [*_gone(uses)]
    if gone:
        raise _lacks(gone)
    if not any(version().startswith(f"{release.rpartition('.')[0]}.") for release in CHECKED):
        logger.warning("qjl: vLLM %s has all that the plugin uses, which was tried with %s.", version(), _releases())


def _theirs(name: str) -> Any:
    return getattr(import_module(_HOMES[name]), name)


def _lacks(gone: list[str]) -> QJLError:
    return QJLError(
        f"vLLM {version()} lacks {', '.join(gone)}, which the plugin uses: "
        f"install vLLM {_releases()}, or unset QJL_VLLM_PRESET."
    )


def _releases() -> str:
    return " or ".join(CHECKED)


def _gone(uses: Uses) -> Iterator[str]:
    found: dict[str, Any] = {}
    for home, names in uses.names.items():
        try:
            module = import_module(home)
        except ImportError as error:
            yield f"{home} ({error})"
            continue
        found |= {name: getattr(module, name) for name in names if hasattr(module, name)}
        yield from (f"{home}.{name}" for name in names if name not in found)
    for owner, members in uses.members.items():
        yield from (f"{owner}.{name}" for name in members if owner in found and not _has(found[owner], name))
    for path, parameters in uses.parameters.items():
        owner, *rest = path.split(".")
        function = found.get(owner)
        for name in rest:
            function = getattr(function, name, None)
        if function is not None:
            taken = inspect.signature(function).parameters
            yield from (f"the parameter {name} of {path}" for name in parameters if name not in taken)


def _has(owner: type, name: str) -> bool:
    """Whether objects of a class have it: from the class, as a field, or since ``__init__`` sets it."""
    made = getattr(inspect.unwrap(owner.__init__), "__code__", None)  # type: ignore[misc]
    fields = getattr(owner, "__dataclass_fields__", {})
    return hasattr(owner, name) or name in fields or (made is not None and name in made.co_names)


def overriding(ours: Class) -> Class:
    """Of a class whose public methods are all called by vLLM.

    Raises:
        QJLError: if vLLM's class has no such method, or passes it what ours does not take.
    """
    theirs = super(ours, ours)
    mine = [name for name in vars(ours) if _is_called(name) and inspect.isroutine(getattr(ours, name))]
    gone = [f"the method {name} that {ours.__name__} overrides" for name in mine if not hasattr(theirs, name)]
    if gone:
        raise _lacks(gone)
    for name in mine:
        passed, taken = (inspect.signature(getattr(of, name)) for of in (theirs, ours))
        unknown = _not_taken(taken, passed)
        if unknown:
            raise QJLError(
                f"vLLM {version()} passes {', '.join(unknown)} to {ours.__name__}.{name}, which does not know it: "
                f"install vLLM {_releases()}, or unset QJL_VLLM_PRESET."
            )
    return ours


def _is_called(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def _not_taken(ours: inspect.Signature, theirs: inspect.Signature) -> list[str]:
    """Parameters that ours has not, or in another place."""
    passed = [name for name, one in theirs.parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    taken = [*ours.parameters]
    return [name for place, name in enumerate(passed) if taken[place : place + 1] != [name]]


# what the plugin reads of vLLM's objects


@dataclass(frozen=True)
class EngineSettings:
    """Of an engine: ``heads`` of queries and the KV heads from ``first_head`` on are those of this rank."""

    model: str
    revision: str | None
    dtype: torch.dtype
    heads: int
    first_head: int
    sequences: int
    drafts: str | None
    is_split: bool
    sees_ahead: bool


def settings(config: Any) -> EngineSettings:
    """Of a ``VllmConfig``."""
    model, parallel, drafts = config.model_config, config.parallel_config, config.speculative_config
    ranks = (parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    rank = __getattr__("get_tensor_model_parallel_rank")()
    return EngineSettings(
        model=model.model,
        revision=model.revision,
        dtype=model.dtype,
        heads=model.get_num_attention_heads(parallel_config=parallel),
        first_head=rank * model.get_total_num_kv_heads() // parallel.tensor_parallel_size,
        sequences=config.scheduler_config.max_num_seqs,
        drafts=None if drafts is None else drafts.method,
        is_split=parallel.use_ubatching or max(ranks) > 1,
        sees_ahead=model.is_mm_prefix_lm,
    )


def attention_of(config: Any, layer: str) -> Any:
    """What attends in a layer of a ``VllmConfig``'s model."""
    return config.compilation_config.static_forward_context[layer].impl


@dataclass(frozen=True)
class PageShape:
    """Of one layer: ``tokens`` of ``heads`` KV heads in each."""

    tokens: int
    heads: int
    head_dim: int


def pages(spec: Any) -> PageShape:
    """Of a layer's ``FullAttentionSpec``."""
    return PageShape(spec.block_size, spec.num_kv_heads, spec.head_size)


def packed(spec: Any, bytes_per_token: Callable[[int], int]) -> Any:
    """The spec of pages that hold, of each token and head, the bytes that a head's size takes.

    Raises:
        QJLError: if more than the tokens before a token are attended to, or fewer.
    """
    if spec.state_content_bytes is not None:
        return spec
    is_full = type(spec) is __getattr__("FullAttentionSpec")  # those derived from it read more, or less
    if not is_full or spec.non_causal or spec.sliding_window or spec.attention_chunk_size:
        raise QJLError("only full causal attention is served from quantized pages: unset QJL_VLLM_PRESET.")
    if spec.head_size != spec.head_size_v:
        raise QJLError("quantized pages do not serve keys wider than values: unset QJL_VLLM_PRESET.")
    return replace(spec, dtype=torch.uint8, state_content_bytes=bytes_per_token(spec.head_size))


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of a step: of ``totals[i]`` tokens, ``starts[i]`` to ``starts[i + 1]`` of the step are fresh.

    ``table int32 [n, most]`` of pages lies on the device; ``pages`` reads it on the host, where the host has it.
    """

    totals: np.ndarray
    starts: np.ndarray
    table: torch.Tensor
    pages: Pages | None


def batch(common: Any) -> Batch:
    """Of a step's ``CommonAttentionMetadata``.

    Raises:
        QJLError: if tokens attend to those behind them.
    """
    if common.causal is not True:
        raise QJLError("quantized pages serve causal attention alone: unset QJL_VLLM_PRESET for this model.")
    lengths = common.seq_lens_cpu_upper_bound if common.seq_lens_cpu_upper_bound is not None else common.seq_lens
    count = common.num_reqs
    starts = common.query_start_loc_cpu[: count + 1]
    table = common.block_table_tensor
    pages = known_pages(table, count, common.req_idx)
    return Batch(_numbers(lengths[:count]), _numbers(starts), table[:count], pages)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """``int64`` on the host."""
    return tensor.cpu().numpy().astype(np.int64)


# what the host knows of tables on a device


def _after_get_device_tensor(own: Any, table: torch.Tensor, num_reqs: int) -> None:
    """Of the first runner, whose table on the device is a copy of one on the host."""
    keep(table, HostTable(own.get_numpy_array()))


def _after_append_block_ids(
    own: Any, _: None, req_index: int, new_block_ids: tuple[list[int], ...], overwrite: bool
) -> None:
    """Of the second runner, which has its tables on the device alone."""
    pages = [[0] * len(one) for one in new_block_ids] if own.redirect_writes_to_null_block else new_block_ids
    give(own, own.input_block_tables, req_index, pages, overwrite)


def _after_gather_block_tables(
    own: Any, tables: tuple[torch.Tensor, ...], idx_mapping: torch.Tensor, *others: Any, **named: Any
) -> None:
    keep_given(own, own.input_block_tables, tables)


def _after_map_to_kernel_block_table(
    own: Any, table: torch.Tensor, block_table: torch.Tensor, ubatch_idx: int = 0
) -> None:
    """Of both, where pages are cut into some that a backend takes."""
    if own.kernel_block_size is not None:
        parts = own.kv_cache_spec.block_size // own.kernel_block_size
        keep_cut(table, block_table, parts, own.kernel_block_stride or parts)


FOLLOWED: dict[tuple[str, str], Callable[..., None]] = {
    ("BlockTable", "get_device_tensor"): _after_get_device_tensor,
    ("BlockTables", "append_block_ids"): _after_append_block_ids,
    ("BlockTables", "gather_block_tables"): _after_gather_block_tables,
    ("AttentionGroup", "map_to_kernel_block_table"): _after_map_to_kernel_block_table,
}


def follow_tables() -> None:
    """Know on the host which pages vLLM's runners give to requests; a warning says if this vLLM does not tell."""
    gone = [*_gone(TABLES)] or [f"{owner}.{name} as it was" for owner, name in FOLLOWED if not _is_as_was(owner, name)]
    if gone:
        logger.warning("qjl: each step waits to read its block table: vLLM %s lacks %s.", version(), ", ".join(gone))
        return
    for (owner, name), then in FOLLOWED.items():
        _follow(_theirs(owner), name, then)


def _is_as_was(owner: str, name: str) -> bool:
    """Whether a method takes what the one that follows it takes."""
    taken = inspect.signature(FOLLOWED[owner, name]).parameters.values()
    ours = [one.name for one in taken if one.kind is one.POSITIONAL_OR_KEYWORD][2:]
    theirs = [*inspect.signature(getattr(_theirs(owner), name)).parameters][1:]
    takes_more = any(one.kind is one.VAR_KEYWORD for one in taken)
    return theirs[: len(ours)] == ours and (takes_more or len(theirs) == len(ours))


def _follow(owner: type, name: str, then: Callable[..., None]) -> None:
    """Have ``then(self, what it gave, *arguments)`` called after each call of a method."""
    theirs = getattr(owner, name)
    if vars(theirs).get("follows") is then:
        return

    @wraps(theirs)
    def followed(own: Any, *args: Any, **named: Any) -> Any:
        given = theirs(own, *args, **named)
        then(own, given, *args, **named)
        return given

    vars(followed)["follows"] = then
    setattr(owner, name, followed)


def is_on_cpu() -> bool:
    """Whether vLLM runs on a CPU."""
    return __getattr__("current_platform").is_cpu()


def register(backend: type) -> None:
    """Put a backend where vLLM looks for one of somebody else's; and for its own on a CPU, where it takes no other."""
    names = __getattr__("AttentionBackendEnum")
    for name in (names[ATTENTION], names.CPU_ATTN):
        __getattr__("register_backend")(backend=name, class_path=f"{backend.__module__}.{backend.__qualname__}")
