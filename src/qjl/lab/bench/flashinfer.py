"""FlashInfer's attention of one token over pages of keys and values in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.lab.bench.baselines import grouped_attention
from qjl.lab.bench.synthetic import Shape

if TYPE_CHECKING:
    from qjl.lab.bench.gate import BenchSettings

FLASHINFER = "flashinfer_bf16"
PAGE = 16  # tokens, where no other page is asked for
WORKSPACE = 128 << 20  # bytes
MOST_ERROR = 1e-2


def is_installed() -> bool:
    return find_spec("flashinfer") is not None


def require() -> None:
    """Raises QJLError unless it is installed."""
    if not is_installed():
        raise QJLError(f"{FLASHINFER} needs FlashInfer: run `pip install flashinfer-python`, or leave it out.")


@dataclass(frozen=True)
class FlashInfer:
    """The baseline."""

    bits: ClassVar[int] = 16

    def runs_on(self, device: torch.device) -> bool:
        return is_installed() and device.type == "cuda"

    def steps(self, tokens: int, settings: BenchSettings, count: int) -> Sequence[FlashInferStep]:
        """So many steps over numbers of their own.

        Raises:
            Inaccurate: if the first of them is not attention.
        """
        lengths, page = settings.lengths(tokens), settings.page or PAGE
        steps = [FlashInferStep.random(settings.shape, lengths, page, settings.device) for _ in range(count)]
        steps[0].require_attention()
        return steps


@dataclass(frozen=True, eq=False)
class FlashInferStep:
    """``query [B, H * group, D]`` over ``keys, values [pages, page, H, D]``; ``table``: each row's pages."""

    query: Tensor
    keys: Tensor
    values: Tensor
    table: Sequence[Tensor]
    lengths: Sequence[int]
    scaling: float

    @classmethod
    def random(cls, shape: Shape, lengths: Sequence[int], page: int, device: torch.device) -> FlashInferStep:
        """Normal numbers, and pages in no order."""
        counts = [-(-length // page) for length in lengths]
        size = (sum(counts), page, shape.kv_heads, shape.head_dim)
        keys, values = (torch.empty(size, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
        query = torch.empty(len(lengths), shape.kv_heads * shape.group, shape.head_dim, dtype=keys.dtype, device=device)
        table = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
        return cls(query.normal_(), keys, values, table, lengths, shape.scaling)

    @cached_property
    def _wrapper(self) -> Any:
        """Planned once, for these lengths."""
        page, heads, head_dim = self.keys.shape[1:]
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=self.keys.device)
        wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=self.query.shape[1] > heads
        )
        ends = torch.tensor([len(pages) for pages in self.table]).cumsum(0)
        last = torch.tensor([(length - 1) % page + 1 for length in self.lengths])
        wrapper.plan(
            self._on_device(torch.nn.functional.pad(ends, (1, 0))),
            self._on_device(torch.cat(list(self.table))),
            self._on_device(last),
            self.query.shape[1],
            heads,
            head_dim,
            page,
            pos_encoding_mode="NONE",
            q_data_type=self.query.dtype,
            kv_data_type=self.keys.dtype,
            sm_scale=self.scaling,
        )
        return wrapper

    def _on_device(self, numbers: Tensor) -> Tensor:
        return numbers.int().to(self.keys.device)

    def __call__(self) -> Tensor:
        """``[B, H * group, D]``"""
        out: Tensor = self._wrapper.run(self.query, (self.keys, self.values))
        return out

    def require_attention(self) -> None:
        """Raises Inaccurate unless each row is torch's attention over its pages."""
        from qjl.lab.bench.gate import relative_error, require_accurate

        out, heads = self(), self.keys.shape[2]
        for row, (pages, length) in enumerate(zip(self.table, self.lengths, strict=True)):
            places = pages.to(self.keys.device)
            keys, values = (x[places].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (self.keys, self.values))
            query = self.query[row].unflatten(0, (heads, -1))[None]
            expected = grouped_attention(query, keys, values, self.scaling)[0].flatten(0, 1)
            error = relative_error(out[row].float(), expected.float())
            require_accurate(error, f"{length} tokens", FLASHINFER, MOST_ERROR)
