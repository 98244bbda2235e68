"""The caller's modes of torch do not reach into what is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

DEVICES = ("cpu", "cuda")  # whose autocast is looked at

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_own_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function computes in the types that it names, whatever autocast it is called under."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not _is_autocast_on():
            return function(*args, **kwargs)
        with without_autocast():
            return function(*args, **kwargs)

    return run


def for_keeps(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """What the function makes serves later calls in any mode: no gradient, autocast or inference mode marks it.

    ``torch.compile`` leaves it as it is.
    """
    return torch.compiler.disable(outside_modes(function))


def uncompiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``torch.compile`` leaves the function as it is; where nothing is compiled, calls cost no more."""
    disabled = torch.compiler.disable(function)

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def outside_modes(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``for_keeps`` for what is only called from where ``torch.compile`` has stopped already."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or _is_autocast_on()):
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad(), without_autocast():
            return function(*args, **kwargs)

    return run


def _is_autocast_on() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Operations on every device of the types of their operands."""
    with ExitStack() as stack:
        for device in DEVICES:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
