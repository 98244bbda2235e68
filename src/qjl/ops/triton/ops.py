"""The ops that this backend has, each on the device of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qjl.ops import reference
from qjl.ops.triton import codes, decoding, encoding


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which may be another than that of the first tensor."""

    @wraps(op)
    def run(tensor: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return op(tensor, *args)

    return run


pack = _on_its_device(codes.pack)
unpack = _on_its_device(codes.unpack)
scan = _on_its_device(codes.scan)
expand = _on_its_device(codes.expand)
encode = _on_its_device(encoding.encode)
encode_grid = _on_its_device(encoding.encode_grid)
attend = _on_its_device(decoding.attend)
append_attend = _on_its_device(decoding.append_attend)
encode_pages = reference.encode_pages  # whose codecs use the encoders here
