"""ONNX Runtime's GroupQueryAttention, where ``onnxruntime`` and ``onnx`` are installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qjl.lab.bench.one_token import EngineStep, OneToken

INPUTS = (
    *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"),
    *("", "", "", "", "", "k_scale", "v_scale"),
)
OUTPUTS = {"output": "output", "past_key": "present_key", "past_value": "present_value"}


@dataclass(frozen=True)
class Numbers:
    """Of a cache: as they are in the query, or integers of so many bits, with a scale per channel or one in all."""

    of_query: type[np.number]
    bits: int = 0
    scales: str = "NONE"


FP32, FP16 = Numbers(np.float32), Numbers(np.float16)
INT8, INT4 = Numbers(np.float32, 8, "PER_TENSOR"), Numbers(np.float32, 4, "PER_CHANNEL")


def hold(numbers: Numbers, token: OneToken, count: int) -> list[EngineStep]:
    """So many copies of the cache, each of which a step writes to where it reads it."""
    inputs = _inputs(numbers, token)
    session = _session(numbers, token, inputs)
    return [_step(session, token, inputs | {name: inputs[name].copy() for name in OUTPUTS}) for _ in range(count)]


def _inputs(numbers: Numbers, token: OneToken) -> dict[str, np.ndarray]:
    """And the output, which has the query's size."""
    kind = numbers.of_query
    fresh = {"query": token.query, "key": token.keys[:, -1], "value": token.values[:, -1]}
    found = {name: x.numpy().astype(kind).reshape(1, 1, -1) for name, x in fresh.items()}
    for name, x in (("k", token.keys), ("v", token.values)):
        codes, scale = _quantized(x, numbers) if numbers.bits else (x.numpy().astype(kind), None)
        found["past_key" if name == "k" else "past_value"] = codes[None]
        found |= {} if scale is None else {f"{name}_scale": scale}
    lengths = {"seqlens_k": np.array([token.count - 1]), "total_sequence_length": np.array(token.count)}
    found |= {name: length.astype(np.int32) for name, length in lengths.items()}
    return found | {"output": np.empty_like(found["query"])}


def _quantized(x: Tensor, numbers: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Signed bytes, or two numbers in a byte, each eight more than it is, the first one low."""
    most = 2 ** (numbers.bits - 1) - 1
    largest = x.abs().amax(dim=1, keepdim=True) if numbers.scales == "PER_CHANNEL" else x.abs().max()
    scale = largest / most
    codes = (x / scale).round().clamp(-most, most).to(torch.int8)
    if numbers.bits == 4:
        low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        codes = low | high << 4
    return codes.numpy(), scale.reshape(-1).numpy()


def _session(numbers: Numbers, token: OneToken, inputs: dict[str, np.ndarray]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = _model(numbers, token, inputs)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _model(numbers: Numbers, token: OneToken, inputs: dict[str, np.ndarray]) -> bytes:
    from onnx import helper

    def described(names: dict[str, str]) -> list[Any]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(inputs[name].dtype) for name in names}
        return [helper.make_tensor_value_info(names[name], kinds[name], inputs[name].shape) for name in names]

    given = [name if name in inputs else "" for name in INPUTS]
    quantized = {"k_quant_type": numbers.scales, "v_quant_type": numbers.scales, "kv_cache_bit_width": numbers.bits}
    heads = {"num_heads": token.heads * token.group, "kv_num_heads": token.heads, "scale": token.scaling}
    attributes = heads | (quantized if numbers.bits else {})
    outputs = list(OUTPUTS.values())
    node = helper.make_node("GroupQueryAttention", given, outputs, domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], "step", described({name: name for name in given if name}), described(OUTPUTS))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _step(session: Any, token: OneToken, arrays: dict[str, np.ndarray]) -> EngineStep:
    binding = session.io_binding()
    for name, array in arrays.items():
        place = ("cpu", 0, array.dtype, array.shape, array.ctypes.data)
        if name in INPUTS:
            binding.bind_input(name, *place)
        if name in OUTPUTS:
            binding.bind_output(OUTPUTS[name], *place)
    out = torch.from_numpy(arrays["output"]).view(token.query.shape)
    return EngineStep(partial(session.run_with_iobinding, binding), out, arrays)
