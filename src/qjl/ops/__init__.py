"""The operations on packed codes: signatures, shapes and equations. Backends implement them.

Notation: B batch, H key-value heads, R query rows per key-value head (group x query tokens), 64 tokens per block.

- ``attend(query, pool, exact, rows, queries, scaling, softcap, bias)``: ``[B, H, R, D]`` float32, bfloat16 or float16
  to ``(out float32 [B, H, R, Dv], log-sum-exp float32 [B, H, R])``: values weighted by the softmax of
  ``softcap * tanh(scaling * <q, k_hat> / softcap) + bias`` (0: no cap) over the tokens of a ``Pool`` and an
  ``ExactPool`` that ``Rows`` give each row (``qjl.ops.forms``). The last ``queries`` exact tokens are the queries' own,
  and query i of Q sees exact tokens ``e < counts[b] - (Q - 1 - i)``. ``bias``, if any, is float32
  ``[B or 1, 1 or Hq, Q or 1, n P + E]``: a column for each token of the table, then one for each slot. A row without
  any token gives 0 and -inf.
- ``append_attend(query, keys, values, pool, exact, rows, scaling, softcap)``: ``[B, Hq, Q, D]``, ``[B, H, Q, D]`` and
  ``[B, H, Q, Dv]`` to ``[B, Q, Hq, Dv]`` of the query's type: keys and values go to the last Q slots of each row, which
  ``counts`` counts already (not to places before the first, nor to slots of -1), then queries attend.
- ``encode(jobs, slots, first, pages)``: blocks of 64 exact tokens, ``slots int32 [n * 64]``, to pages ``int32 [n]`` of
  a pool, for each ``EncodeJob``: the codes are those of its codec; ``first int64 [n]`` are the RoPE positions of the
  blocks' first tokens. Numbers that are not finite count as 0.
- ``decode(blocks, form, first)``: packed blocks, ``[B, H, n, *shape]`` per field, to tokens
  ``float32 [B, H, n * 64, D]`` as a ``NibbleForm`` tells; ``first int64 [B, n]`` are the RoPE positions of the blocks'
  first tokens.

``reference`` (torch) is the living definition of every op; ``cpu`` is C++; ``triton`` is for GPUs.
``QJL_BACKEND=reference|cpu|triton|auto`` chooses. Automatically tensors on a CPU meet ``cpu`` where that was compiled,
and those on a CUDA device ``triton`` where that is installed, also if ``cpu`` was chosen; all others meet
``reference``. ``triton`` takes tensors on a CPU under ``TRITON_INTERPRET=1`` alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.modes import in_own_precision
from qjl.ops import checks, cpu, reference
from qjl.ops.cpu import library
from qjl.ops.forms import EncodeJob, ExactPool, NibbleForm, Pool, Rows
from qjl.ops.triton import runtime
from qjl.packed import Blocks

AUTOMATIC = "auto"
VARIABLE = "QJL_BACKEND"

_log = logging.getLogger("qjl")
_IS_HERE = {"cpu": library.is_installed, "triton": runtime.is_usable, "reference": lambda: True}
_chosen: str | None = None


def _after_fork() -> None:
    """In a forked child GNU OpenMP, which torch uses, waits for threads that only its parent has: one does not."""
    if _chosen is not None:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def backends() -> list[str]:
    """Names of the backends that this installation can run."""
    return [name for name, is_here in _IS_HERE.items() if is_here()]


def use_backend(name: str) -> None:
    """Select the backend of all following calls, or the ``auto`` choice.

    Raises:
        QJLError: if that backend is not there.
    """
    global _chosen
    _chosen = _automatic() if name == AUTOMATIC else _checked(name)


def active_backend() -> str:
    """Name of the backend that tensors on a CPU meet."""
    if _chosen is None:
        use_backend(os.environ.get(VARIABLE, AUTOMATIC))
    assert _chosen is not None
    return _chosen


def backend_of(device: torch.device) -> str:
    """Name of the backend that tensors on this device meet.

    Raises:
        QJLError: if ``triton`` was chosen, and cannot take them.
    """
    chosen = active_backend()
    if device.type == "cuda" and chosen != "reference":
        return _automatic_on_gpu()
    if device.type != "cpu":
        return "reference"
    if chosen == "triton" and not runtime.is_interpreted():
        raise QJLError("the triton backend takes tensors on a GPU: move the model there, or choose another backend.")
    return chosen


def _backend(tensor: Tensor) -> ModuleType:
    return _module_of(_chosen or active_backend(), tensor.device)


@cache
def _module_of(chosen: str, device: torch.device) -> ModuleType:
    """Where a backend was chosen, its module for a device."""
    return {"cpu": cpu, "reference": reference}.get(backend_of(device)) or import_module("qjl.ops.triton.ops")


def _checked(name: str) -> str:
    if name not in _IS_HERE:
        raise QJLError(f"backend {name!r} is not available here: choose one of {', '.join(backends())}.")
    if name == "cpu":
        library.load()
    if name == "triton":
        runtime.require()
    return name


@cache
def _automatic_on_gpu() -> str:
    if not runtime.is_usable():
        _log.warning("Triton is not installed: on the GPU the slow reference backend is in use.")
        return "reference"
    _log.info("The triton backend is in use on the GPU.")
    return "triton"


@cache  # so that it is said once
def _automatic() -> str:
    if not library.is_installed():
        _log.warning("qjl was installed without a compiler (GCC 12 or Clang): its slow reference backend is in use.")
        return "reference"
    library.load()
    _log.info("The cpu backend is in use, with %s instructions.", library.instruction_set())
    return "cpu"


@in_own_precision
def encode(jobs: Sequence[EncodeJob], slots: Tensor, first: Tensor, pages: Tensor, are_trusted: bool = False) -> None:
    """Blocks of exact tokens to pages, the keys and values of all layers at once.

    ``are_trusted``: tokens are not asked whether they are finite, so that nothing waits for a device.

    Raises:
        QJLError: if a token is not finite.
    """
    checks.require_pages(jobs, slots, first, pages)
    if not jobs or not len(pages):
        return
    are_finite = _backend(slots).encode(jobs, slots, first, pages)
    if not are_trusted and not are_finite.all():
        what = jobs[are_finite.tolist().index(False)].what
        raise QJLError(f"{what} contain NaN or Inf: check the model's weights, its dtype and the prompt.")


@in_own_precision
def decode(blocks: Blocks, form: NibbleForm, first: Tensor) -> Tensor:
    """The tokens that packed blocks stand for."""
    checks.require_decodable(blocks, form, first)
    return _backend(first).decode(blocks, form, first)


@in_own_precision
def attend(
    query: Tensor,
    pool: Pool,
    exact: ExactPool,
    rows: Rows,
    queries: int,
    scaling: float,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens that each row has of two pools."""
    bias = checks.require_step(query, pool, exact, rows, queries, bias)
    return _backend(query).attend(query, pool, exact, rows, queries, scaling, softcap, bias)


def append_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pool: Pool,
    exact: ExactPool,
    rows: Rows,
    scaling: float,
    softcap: float = 0.0,
) -> Tensor:
    """Fresh tokens to their slots, then attention of their queries; backends ask whether all fits where that is new."""
    return _backend(query).append_attend(query, keys, values, pool, exact, rows, scaling, softcap)
