"""The ops that this backend has, each on the device of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from qjl.errors import QJLError
from qjl.ops.forms import Pool
from qjl.ops.triton import attention, decoding, encoding, step


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which may be another than that of the first tensor."""

    @wraps(op)
    def run(*args: Any) -> Any:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            try:
                return op(*args)
            except OutOfResources as error:
                raise QJLError(
                    f"a kernel for these codes needs {error.required} of {error.name}, where this GPU has"
                    f" {error.limit}: use half precision, a preset with one scale per token, or QJL_BACKEND=reference."
                ) from error

    return run


decode = _on_its_device(decoding.decode)
encode = _on_its_device(encoding.encode)


@_on_its_device
def attend(query: Tensor, pool: Pool, *others: Any) -> tuple[Tensor, Tensor]:
    return _of(pool).attend(query, pool, *others)


@_on_its_device
def append_attend(query: Tensor, keys: Tensor, values: Tensor, pool: Pool, *others: Any) -> Tensor:
    return _of(pool).append_attend(query, keys, values, pool, *others)


def _of(pool: Pool) -> ModuleType:
    """Where the kernels for the forms of a pool are."""
    return step if step.serves(pool) else attention
