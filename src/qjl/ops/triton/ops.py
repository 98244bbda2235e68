"""The ops that this backend has, each on the device of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qjl.ops.triton import attention, decoding, encoding


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which may be another than that of the first tensor."""

    @wraps(op)
    def run(*args: Any) -> Any:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            return op(*args)

    return run


decode = _on_its_device(decoding.decode)
encode = _on_its_device(encoding.encode)
attend = _on_its_device(attention.attend)
append_attend = _on_its_device(attention.append_attend)
