"""OpenVINO's scaled_dot_product_attention over keys and values in a state, where ``openvino`` is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qjl.errors import QJLError
from qjl.lab.bench.one_token import EngineStep, OneToken
from qjl.lab.bench.openvino_pages import compiled, parameter

FUSED = "ScaledDotProductAttention"


def hold(precision: str, token: OneToken, count: int) -> list[EngineStep]:
    """So many states whose ``KV_CACHE_PRECISION`` is this; each step makes its state a token longer.

    Raises:
        QJLError: if this version takes the model for something else than attention over a state.
    """
    made = compiled(_model(token), precision)
    kinds = [one.get_rt_info()["layerType"].value for one in made.get_runtime_model().get_ops()]
    if FUSED not in kinds:
        raise QJLError("this version of OpenVINO does not know its own attention")
    return [_step(made, token) for _ in range(count)]


def _model(token: OneToken) -> Any:
    import openvino
    from openvino import opset13

    heads, dim = token.heads, token.head_dim
    query = parameter("query", "f32", [-1, heads * token.group, -1, dim])
    beams = parameter("beams", "i32", [-1])
    sides = [parameter(name, "f32", [-1, heads, -1, dim]) for name in ("key", "value")]
    held = [_appended(side, name, beams) for side, name in zip(sides, ("key", "value"), strict=True)]
    every = (_for_every_query(state, token) for state, _ in held)
    out = opset13.scaled_dot_product_attention(query, *every)  # scaled by its head_dim, as a shape is
    stores = [store for _, store in held]
    return openvino.Model([opset13.result(out)], stores, [query, *sides, beams], "step")


def _appended(fresh: Any, name: str, beams: Any) -> tuple[Any, Any]:
    """A state with fresh tokens behind it, and what stores it so: as the plugin looks for it."""
    from openvino import PartialShape, Type, opset6, opset13
    from openvino.op import util

    shape, facts = fresh.get_output_partial_shape(0), util.VariableInfo()
    facts.data_shape, facts.data_type, facts.variable_id = PartialShape(shape), Type.f32, name
    state = util.Variable(facts)
    heads, dim = shape[1].get_length(), shape[3].get_length()
    sizes = opset13.concat([opset13.shape_of(beams, "i64"), opset13.constant(np.array([heads, 0, dim]))], 0)
    before = opset6.read_value(opset13.broadcast(opset13.constant(np.float32(0)), sizes), state)
    tokens = opset13.concat([opset13.gather(before, beams, opset13.constant(0)), fresh], 2)
    return tokens, opset6.assign(tokens, state)


def _for_every_query(states: Any, token: OneToken) -> Any:
    from openvino import opset13

    ones = opset13.constant(np.ones((1, 1, token.group, 1, 1), dtype=np.float32))
    repeated = opset13.multiply(opset13.unsqueeze(states, opset13.constant(2)), ones)
    shape = opset13.constant(np.array([0, token.heads * token.group, -1, token.head_dim]))
    return opset13.reshape(repeated, shape, special_zero=True)


def _step(made: Any, token: OneToken) -> EngineStep:
    import openvino

    request = made.create_infer_request()
    sides = {"key": token.keys[None], "value": token.values[None]}
    for state in request.query_state():
        state.state = openvino.Tensor(sides[state.name][:, :, :-1].contiguous().numpy())
    arrays = {name: tokens[:, :, -1:].contiguous().numpy() for name, tokens in sides.items()}
    arrays |= {"query": token.query.reshape(1, -1, 1, token.head_dim).numpy(), "beams": np.zeros(1, dtype=np.int32)}
    for name, array in arrays.items():
        request.set_tensor(name, openvino.Tensor(array))
    out = torch.empty(1, token.heads * token.group, 1, token.head_dim)
    request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))
    return EngineStep(request.infer, out.view(token.query.shape), made)
