"""decode in C++ (``csrc/decode.inl``)."""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor

from qjl.ops import reference
from qjl.ops.cpu import library
from qjl.ops.cpu.structs import CPU, Codes, Decode
from qjl.ops.forms import NibbleForm
from qjl.packed import BLOCK, Blocks, block_positions


def decode(blocks: Blocks, form: NibbleForm, first: Tensor) -> Tensor:
    codes, scales = blocks["codes"], blocks[form.scale]
    batch, heads, count = codes.shape[:3]
    operation = Decode(Codes(codes.data_ptr(), *codes.shape[:4], *codes.stride()[:3]), dim=form.code_dim)
    operation.scales, operation.scale_stride = scales.data_ptr(), _strides(scales)
    if form.middle is not None:
        middles = blocks[form.middle]
        operation.middles, operation.middle_stride = middles.data_ptr(), _strides(middles)
    kept = {**_put_code(operation, form), **_put_map(operation, form), **_put_mean(operation, form, first)}
    out = torch.empty((batch, heads, count * BLOCK, operation.head_dim), dtype=torch.float32, device=CPU)
    operation.out = out.data_ptr()
    library.call_in_room("qjl_decode", operation, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=CPU))
    del kept
    return out


def _strides(field: Tensor) -> Any:
    """Over batch, head and block."""
    return (c_int64 * 3)(*field.stride()[:3])


def _pointed(operation: Decode, **tensors: Tensor) -> dict[str, Tensor]:
    """The tensors that the fields of these names point to, which must be kept until the call is over."""
    for name, tensor in tensors.items():
        setattr(operation, name, tensor.data_ptr())
    return tensors


def _put_code(operation: Decode, form: NibbleForm) -> dict[str, Tensor]:
    operation.groups, operation.slots = form.groups, form.entries.shape[3]
    operation.code_stride = int(form.entries.shape[0] > 1)
    units = {} if form.unit is None else {"units": form.unit.float().contiguous()}
    entries = form.entries.float().transpose(2, 3).contiguous()
    return _pointed(operation, coordinates=form.coordinates.short().contiguous(), entries=entries, **units)


def _put_map(operation: Decode, form: NibbleForm) -> dict[str, Tensor]:
    operation.head_dim = form.code_dim
    if form.map is None:
        return {}
    is_shared = form.map.shape[0] == 1 or form.map.stride(0) == 0
    back = (form.map[:1] if is_shared else form.map).float().transpose(1, 2).contiguous()
    operation.head_dim = back.shape[1]
    operation.map_stride = 0 if is_shared else back.stride(0)
    return _pointed(operation, map=back)


def _put_mean(operation: Decode, form: NibbleForm, first: Tensor) -> dict[str, Tensor]:
    if form.mean is None:
        return {}
    mean = form.mean.float().contiguous()
    if form.turn is None:
        return _pointed(operation, mean=mean)
    cos, sin = (x.transpose(1, 2).contiguous() for x in reference.turns(form.turn, block_positions(first)))
    turns = torch.stack([form.turn.first, form.turn.second]).int().contiguous()
    operation.pairs = turns.shape[1]
    return _pointed(operation, mean=mean, turns=turns, cos=cos, sin=sin)
