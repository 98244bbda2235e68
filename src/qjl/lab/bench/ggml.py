"""llama.cpp's flash attention alone, as its library ggml computes it for one layer, where ``llama-cpp-python`` is."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.lab.bench.one_token import EngineStep, OneToken

BLOCK = 32  # numbers that share a scale
TENSORS = 16  # more than a step has


class _Room(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_ = (("bytes", c_size_t), ("buffer", c_void_p), ("is_empty", c_bool))


_ANY, _SIZES = c_void_p, c_int64
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # what they return and take
    "ggml_init": (_ANY, _Room),
    "ggml_free": (None, _ANY),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_row_size": (c_size_t, c_int, _SIZES),
    "ggml_new_tensor_2d": (_ANY, _ANY, c_int, _SIZES, _SIZES),
    "ggml_new_tensor_3d": (_ANY, _ANY, c_int, _SIZES, _SIZES, _SIZES),
    "ggml_view_2d": (_ANY, _ANY, _ANY, _SIZES, _SIZES, c_size_t, c_size_t),
    "ggml_view_3d": (_ANY, _ANY, _ANY, _SIZES, _SIZES, _SIZES, c_size_t, c_size_t, c_size_t),
    "ggml_cpy": (_ANY, _ANY, _ANY, _ANY),
    "ggml_flash_attn_ext": (_ANY, _ANY, _ANY, _ANY, _ANY, _ANY, c_float, c_float, c_float),
    "ggml_new_graph": (_ANY, _ANY),
    "ggml_build_forward_expand": (None, _ANY, _ANY),
    "ggml_get_data": (_ANY, _ANY),
    "ggml_quantize_chunk": (c_size_t, c_int, _ANY, _ANY, _SIZES, _SIZES, _SIZES, _ANY),
    "ggml_backend_alloc_ctx_tensors": (_ANY, _ANY, _ANY),
    "ggml_backend_buffer_free": (None, _ANY),
    "ggml_backend_graph_compute": (c_int, _ANY, _ANY),
    "ggml_backend_cpu_init": (_ANY,),
    "ggml_backend_cpu_set_n_threads": (None, _ANY, c_int),
}


class _Ggml:
    """Its functions by name, and a backend of one thread."""

    def __init__(self, folder: Path) -> None:
        base, processor = (ctypes.CDLL(str(min(folder.glob(f"libggml-{part}.*")))) for part in ("base", "cpu"))
        self._functions: dict[str, Any] = {}
        for name, (returned, *taken) in _FUNCTIONS.items():
            function = getattr(processor if name.startswith("ggml_backend_cpu_") else base, name)
            function.restype, function.argtypes = returned, taken
            self._functions[name] = function
        self.backend = self("ggml_backend_cpu_init")
        self("ggml_backend_cpu_set_n_threads", self.backend, 1)

    def __call__(self, name: str, *arguments: Any) -> Any:
        return self._functions[name](*arguments)


@cache
def _ggml() -> _Ggml:
    package = find_spec("llama_cpp")
    assert package is not None
    (folder,) = package.submodule_search_locations or [""]
    return _Ggml(Path(folder) / "lib")


def hold(kind: str, token: OneToken, count: int) -> list[EngineStep]:
    """So many caches of one of llama.cpp's types.

    Raises:
        QJLError: if heads do not end with a block of the type.
    """
    from gguf import GGMLQuantizationType

    if token.head_dim % BLOCK:
        raise QJLError(f"llama.cpp's {kind} takes no heads of {token.head_dim} numbers: give a multiple of {BLOCK}.")
    sides = [x.transpose(0, 1).flatten(1).contiguous() for x in (token.keys, token.values)]
    return [_step(GGMLQuantizationType[kind.upper()].value, token, sides) for _ in range(count)]


def _step(kind: int, token: OneToken, sides: list[Tensor]) -> EngineStep:
    """Copies the fresh token to the end of the cache, in its type, and attends to all; rows as llama.cpp lays them."""
    ggml = _ggml()
    room = ggml("ggml_graph_overhead") + TENSORS * ggml("ggml_tensor_overhead")
    context = ggml("ggml_init", _Room(room, None, True))
    graph = ggml("ggml_new_graph", context)
    query = ggml("ggml_new_tensor_3d", context, 0, token.head_dim, 1, token.heads * token.group)
    caches, fresh, views = zip(*(_side(context, graph, kind, token) for _ in sides), strict=True)
    out = ggml("ggml_flash_attn_ext", context, query, *views, None, token.scaling, 0.0, 0.0)
    ggml("ggml_build_forward_expand", graph, out)
    buffer = ggml("ggml_backend_alloc_ctx_tensors", context, ggml.backend)
    _write(query, token.query)
    for place, last, rows in zip(caches, fresh, sides, strict=True):
        ggml("ggml_quantize_chunk", kind, rows.data_ptr(), ggml("ggml_get_data", place), 0, *rows.shape, None)
        _write(last, rows[-1])
    step = EngineStep(partial(_compute, graph), _read(out, token.query), sides)
    weakref.finalize(step, _free, buffer, context)
    return step


def _side(context: int, graph: int, kind: int, token: OneToken) -> tuple[int, int, int]:
    """Keys or values: all rows, the fresh one, and how heads see them."""
    ggml, width = _ggml(), token.heads * token.head_dim
    of_row, of_head = (ggml("ggml_row_size", kind, size) for size in (width, token.head_dim))
    rows = ggml("ggml_new_tensor_2d", context, kind, width, token.count)
    fresh = ggml("ggml_new_tensor_2d", context, 0, width, 1)
    end = ggml("ggml_view_2d", context, rows, width, 1, of_row, (token.count - 1) * of_row)
    ggml("ggml_build_forward_expand", graph, ggml("ggml_cpy", context, fresh, end))
    view = ggml("ggml_view_3d", context, rows, token.head_dim, token.count, token.heads, of_row, of_head, 0)
    return rows, fresh, view


def _compute(graph: int) -> None:
    ggml = _ggml()
    if status := ggml("ggml_backend_graph_compute", ggml.backend, graph):
        raise QJLError(f"llama.cpp's attention ended with status {status}: leave it out with --against.")


def _write(tensor: int, numbers: Tensor) -> None:
    ctypes.memmove(_ggml()("ggml_get_data", tensor), numbers.contiguous().data_ptr(), numbers.nbytes)


def _read(tensor: int, like: Tensor) -> Tensor:
    """Float32 of this shape where they lie."""
    array = (c_float * like.numel()).from_address(_ggml()("ggml_get_data", tensor))
    return torch.frombuffer(array, dtype=torch.float32).view(like.shape)


def _free(buffer: int, context: int) -> None:
    _ggml()("ggml_backend_buffer_free", buffer)
    _ggml()("ggml_free", context)
