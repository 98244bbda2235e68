"""Kernels of Triton that ops would launch, recorded where there is no GPU and compiled for any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from qjl.errors import QJLError
from qjl.ops.triton import runtime

WARP = 32


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel with its arguments; ``grid``: how many programs there are, in up to three directions."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def arguments(self) -> dict[str, Any]:
        """By name."""
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.kwargs

    @property
    def tensors(self) -> list[Tensor]:
        """All that the kernel is given, those in tuples too."""
        return list(_tensors(self.arguments.values()))

    def variant(self, capability: int) -> str:
        """The same for launches of one compiled kernel."""
        source, _, options = self._source(capability)
        return f"{source.hash()} {options.hash()}"

    def compiled(self, capability: int) -> CompiledKernel:
        """As a GPU of that compute capability would get it."""
        source, target, options = self._source(capability)
        return triton.compile(source, target=target, options=options.__dict__)

    def _source(self, capability: int) -> tuple[ASTSource, GPUTarget, Any]:
        target = GPUTarget("cuda", capability, WARP)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.args, **self.kwargs)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.kwargs, bound, specialization, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), target, options


@contextmanager
def recorded(processors: int | None = None) -> Iterator[list[Launch]]:
    """The launches made within, none of which runs; as for a GPU of so many processors, if that is given.

    Raises:
        QJLError: without Triton, or under its interpreter, which compiles nothing.
    """
    if not runtime.is_installed():
        raise QJLError("kernels of Triton cannot be compiled without it: run `pip install triton`.")
    if runtime.is_interpreted():
        raise QJLError(f"Triton's interpreter compiles nothing: unset {runtime.INTERPRET}.")
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs, grid))

    with mock.patch.object(JITFunction, "run", record), _pretended(processors):
        yield launches


@contextmanager
def _pretended(processors: int | None) -> Iterator[None]:
    if processors is None:
        yield
        return
    with mock.patch.object(runtime, "processors", return_value=processors):
        yield


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, tuple):
            yield from _tensors(one)
