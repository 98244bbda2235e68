"""Layers of transformers' own as plain values and arrays: sliding windows, states of linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods.base import Arrays

KINDS = (
    "DummyLayer",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionLayer",
)
_ARRAYS = ("keys", "values", "conv_states", "recurrent_states", "indexer_keys", "indexer_position_ids")
_PLAIN: dict[str, type] = {
    "conv_kernel_size": int,
    "cumulative_length": int,
    "has_previous_state": bool,
    "is_conv_states_initialized": bool,
    "is_indexer_initialized": bool,
    "is_initialized": bool,
    "is_recurrent_states_initialized": bool,
    "record_past": bool,
}
_DTYPES = ("dtype", "indexer_dtype")
_DEVICES = ("device", "indexer_device")
_OF_MODEL = ("max_batch_size", "number_of_states", "sliding_window")  # the configuration tells them


def described(number: int, layer: object) -> tuple[dict[str, Any], Arrays]:
    """Numbers by their public names, and arrays as ``layers.3.own.keys``; a value per state is a list, and its arrays
    ``layers.3.own.conv_states.0``.

    Raises:
        QJLError: if the layer is of a kind that files do not know, or holds something else.
    """
    kind = type(layer).__name__
    if kind not in KINDS:
        raise QJLError(f"layer {number} is a {kind}, which files of prompt caches do not know: it cannot be saved.")
    told: dict[str, Any] = {"kind": kind}
    arrays: Arrays = {}
    for name, value in vars(layer).items():
        if name.startswith("_") or name in _OF_MODEL or name in _DEVICES:
            continue
        for place, one in value.items() if isinstance(value, dict) else [("", value)]:
            _require_known(number, kind, name, one)
            if isinstance(one, Tensor):
                arrays[_array_name(number, name, place)] = one
        told[name] = [_plain(one) for one in value.values()] if isinstance(value, dict) else _plain(value)
    return told, arrays


def restore(
    number: int, layer: object, told: Mapping[str, Any], arrays: Mapping[str, Tensor], device: torch.device
) -> None:
    """Let a new layer hold what ``described`` told of another, on a device; on the CPU arrays stay where they are.

    Raises:
        QJLError: if the layer is of another kind, or what was told is not what such a layer holds.
    """
    kind = type(layer).__name__
    held = {name: value for name, value in told.items() if name != "kind"}
    fresh = {name for name in vars(layer) if not name.startswith("_")} - {*_OF_MODEL, *_DEVICES}
    if told.get("kind") != kind or not fresh <= held.keys() <= {*_ARRAYS, *_PLAIN, *_DTYPES}:
        raise QJLError(f"layer {number} is a {kind} in this version of transformers, and holds other things.")
    for name, value in held.items():
        if isinstance(value, list):
            value = {state: _value(number, name, one, arrays, device, state) for state, one in enumerate(value)}
        else:
            value = _value(number, name, value, arrays, device)
        setattr(layer, name, value)
    for of_device, of_dtype in zip(_DEVICES, _DTYPES, strict=True):
        if held.get(of_dtype) is not None:
            setattr(layer, of_device, device)


def _array_name(number: int, name: str, state: object = "") -> str:
    return f"layers.{number}.own.{name}" if state == "" else f"layers.{number}.own.{name}.{state}"


def _require_known(number: int, kind: str, name: str, value: object) -> None:
    is_known = value is None and name in (*_ARRAYS, *_PLAIN, *_DTYPES)
    is_known = is_known or (name in _ARRAYS and isinstance(value, Tensor))
    is_known = is_known or (name in _PLAIN and type(value) is _PLAIN[name])
    if not is_known and not (name in _DTYPES and isinstance(value, torch.dtype)):
        raise QJLError(
            f"layer {number}, a {kind}, holds a {type(value).__name__} as {name}, which files of prompt caches do not "
            "know: it cannot be saved."
        )


def _plain(value: Any) -> Any:
    """As JSON; an array is told as True."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return True if isinstance(value, Tensor) else value


def _value(
    number: int, name: str, told: Any, arrays: Mapping[str, Tensor], device: torch.device, state: object = ""
) -> Any:
    if told is None:
        value = None
    elif name in _ARRAYS:
        value = arrays[_array_name(number, name, state)].to(device)
    else:
        value = getattr(torch, told) if name in _DTYPES else told
    _require_known(number, "layer", name, value)
    return value
