"""OpenVINO's PagedAttention, which its servers run, where ``openvino`` is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qjl.lab.bench.one_token import EngineStep, OneToken

FILLED = 64  # pages at a time
CACHES = ("key_cache", "value_cache")
ROWS = {"query": "f32", "key": "f32", "value": "f32"}
COUNTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
LONGEST = "max_context_len"
# What follows the longest context: score windows, rotation, sparse attention, sinks, eviction, token types, a bias of
# queries. None of it is used.
UNUSED = (
    *("[i32]", "[i32]", "[i32]", "[f32]", "[f32]", "i32", "i32", "[f32]", "i32"),
    *("[i32]", "[i32]", "[i32]", "[i32]", "[u8]", "[i32]"),
)


def hold(precision: str, token: OneToken, count: int) -> list[EngineStep]:
    """So many copies of a cache whose ``KV_CACHE_PRECISION`` is this."""
    made = compiled(_model(token), precision)
    caches = _filled(made, token)
    return [_step(made, token, {name: _copy(cache) for name, cache in caches.items()}) for _ in range(count)]


def compiled(model: Any, precision: str) -> Any:
    """For one thread."""
    import openvino

    settings = {
        "KV_CACHE_PRECISION": getattr(openvino.Type, precision),
        "INFERENCE_PRECISION_HINT": openvino.Type.f32,
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def _model(token: OneToken) -> Any:
    """The operation and nothing else; the caches' types and sizes are the plugin's to say."""
    import openvino
    from openvino import op, opset13

    widths = {"query": token.query.numel(), "key": token.heads * token.head_dim, "value": token.heads * token.head_dim}
    inputs = [parameter(name, "f32", [-1, width]) for name, width in widths.items()]
    inputs += [parameter(name, "dynamic", [-1] * 4) for name in CACHES]
    inputs += [parameter(name, "i32", [-1]) for name in COUNTS]
    longest = parameter(LONGEST, "i32", [])
    scoring = [opset13.constant(np.float32(token.scaling)), *map(_unused, ("i32", "[f32]"))]
    every = [*inputs, *scoring, longest, *map(_unused, UNUSED)]
    attention = op._PagedAttentionExtension([one.output(0) for one in every])
    facts = attention.get_rt_info()
    for side in "kv":
        facts[f"num_{side}_heads"], facts[f"{side}_head_size"] = token.heads, token.head_dim
    return openvino.Model([opset13.result(attention.output(0))], [*inputs, longest], "step")


def parameter(name: str, kind: str, shape: list[int]) -> Any:
    from openvino import PartialShape, Type, opset13

    parameter = opset13.parameter(PartialShape(shape), getattr(Type, kind))
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _unused(kind: str) -> Any:
    """Zero, or in brackets nothing."""
    from openvino import Type, opset13

    shape = () if kind == kind.strip("[]") else (0,)
    return opset13.constant(np.zeros(shape), dtype=getattr(Type, kind.strip("[]")))


def _filled(made: Any, token: OneToken) -> dict[str, Any]:
    """Caches of all tokens but the last. Each page is filled as a sequence of its own, which takes no time of T²."""
    page = made.input("value_cache").partial_shape[2].get_length()
    caches = {name: _empty(made.input(name), -(-token.count // page)) for name in CACHES}
    request = made.create_infer_request()
    keys, values = (_by_token(x) for x in (token.keys[:, :-1], token.values[:, :-1]))
    for first in range(0, len(keys), FILLED * page):
        fresh = {"key": keys[first : first + FILLED * page], "value": values[first : first + FILLED * page]}
        length, query = len(fresh["key"]), torch.zeros(len(fresh["key"]), token.query.numel())
        pages = -(-length // page)
        counts = {
            "past_lens": [0] * pages,
            "subsequence_begins": [*range(0, length, page), length],
            "block_indices": range(first // page, first // page + pages),
            "block_indices_begins": range(pages + 1),
            LONGEST: page,
        }
        _give(request, fresh | {"query": query}, counts, caches)
        request.infer()
    return caches


def _step(made: Any, token: OneToken, caches: dict[str, Any]) -> EngineStep:
    import openvino

    keys, values = (_by_token(x[:, -1:]) for x in (token.keys, token.values))
    pages = caches["value_cache"].shape[0]
    counts = {
        "past_lens": [token.count - 1],
        "subsequence_begins": [0, 1],
        "block_indices": range(pages),
        "block_indices_begins": [0, pages],
        LONGEST: token.count,
    }
    request, out = made.create_infer_request(), torch.empty(1, token.query.numel())
    rows = {"query": token.query.reshape(1, -1), "key": keys, "value": values}
    kept = _give(request, rows, counts, caches)
    request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))
    return EngineStep(request.infer, out.view(token.query.shape), (kept, caches))


def _give(request: Any, rows: Mapping[str, Tensor], counts: Mapping[str, Any], caches: Mapping[str, Any]) -> object:
    import openvino

    arrays = {name: x.contiguous().numpy() for name, x in rows.items()}
    arrays |= {name: np.array(count, dtype=np.int32) for name, count in counts.items()}
    tensors = {name: openvino.Tensor(array) for name, array in arrays.items()}
    for name, tensor in (tensors | dict(caches)).items():
        request.set_tensor(name, tensor)
    return tensors


def _by_token(x: Tensor) -> Tensor:
    """``[H, T, D]`` as ``[T, H D]``."""
    return x.transpose(0, 1).flatten(1)


def _empty(port: Any, pages: int) -> Any:
    import openvino

    shape = openvino.Shape([pages, *(port.partial_shape[place].get_length() for place in (1, 2, 3))])
    return openvino.Tensor(port.element_type, shape)


def _copy(cache: Any) -> Any:
    import openvino

    copy = openvino.Tensor(cache.element_type, cache.shape)
    cache.copy_to(copy)
    return copy
