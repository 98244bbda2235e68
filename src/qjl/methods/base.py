"""What a method is: how to encode tokens, and how to decode them.

A ``Quantizer`` is a frozen dataclass: the method and its settings, nothing learned. What a layer's statistics teach
it, ``learn`` gives as named arrays; ``build`` makes the ``Codec`` of the layer from these, and ``fit`` does both. A
file of caches keeps the settings and the arrays.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qjl import ops
from qjl.errors import QJLError
from qjl.modes import for_keeps, in_own_precision
from qjl.ops.checks import READABLE
from qjl.ops.forms import EncodeJob, NibbleForm
from qjl.ops.recipe import GridRecipe, Recipe
from qjl.packed import BLOCK, Blocks, Layout, block_bits, block_positions
from qjl.rope import Rope
from qjl.statistics import LayerStatistics

RIDGE = 0.02  # of the mean eigenvalue, added to covariances
SHIFTS = (0, *(64 * 2**i for i in range(10)))
Arrays = dict[str, Tensor]
POSITIONS = torch.cat([shift + torch.arange(512) for shift in SHIFTS])  # that moments are averaged over


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What a codec is fitted to: one layer's keys or values.

    ``statistics`` is None for methods that need none, and where a codec is built from learned arrays. ``rope`` turns
    the tokens that the codec sees; None for values, layers without RoPE, and keys whose RoPE the cache has ``undone``.
    """

    role: str  # "key" or "value"
    heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    statistics: LayerStatistics | None = None
    rope: Rope | None = None
    undone: Rope | None = None

    def require_statistics(self) -> LayerStatistics:
        if self.statistics is None:
            raise QJLError("this method needs statistics: run `qjl calibrate` or give a prompt of 256 tokens.")
        return self.statistics

    def require_learned(
        self, learned: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A learned array on the device of the layer.

        Raises:
            QJLError: if it is missing, or has another shape or dtype.
        """
        array = learned.get(name)
        if array is None:
            raise QJLError(f"the {self.role} codec has no learned array {name!r}: fit it again.")
        if array.shape != shape or array.dtype != dtype:
            raise QJLError(
                f"the learned array {name!r} of the {self.role} codec is {array.dtype} {list(array.shape)} "
                f"in place of {dtype} {list(shape)}: fit it again."
            )
        return array.to(self.device)

    def learned_rope(self) -> Arrays:
        """Whether means and quantiles are those of keys before RoPE, for ``rope_from``."""
        return {"is_rotary": torch.tensor(self.require_statistics().is_rotary, dtype=torch.bool)}

    def rope_from(self, learned: Mapping[str, Tensor]) -> Rope | None:
        """What turns the keys before RoPE that the arrays are learned from into those that the codec sees."""
        is_rotary = self.require_learned(learned, "is_rotary", (), torch.bool)
        return self.rope if is_rotary else None

    def key_moments(self) -> tuple[Tensor, Tensor]:
        """Covariance of the keys that the codec sees and second moment of the queries as these keys meet them.

        ``float64 [H, D, D]`` on the CPU, regularised. Where RoPE turns one against the other, the moment is averaged
        over positions: codes fitted to those of a short prompt alone fail further on.
        """
        statistics = self.require_statistics()
        keys, queries = (x.double().cpu() for x in (statistics.key_covariance, statistics.query_moment))
        if statistics.is_rotary:
            if self.rope is not None:
                keys, queries = (_averaged(x, self.rope) for x in (keys, queries))
            elif self.undone is not None:
                queries = _averaged(queries, self.undone)
        return regularised(keys, statistics.count), regularised(queries, statistics.count)

    def second_moment(self) -> Tensor:
        """Uncentred, of the tokens that the codec sees, ``float64 [H, D, D]`` on the CPU, averaged over positions."""
        statistics = self.require_statistics()
        if self.role == "value":
            return _uncentred(statistics.value_mean, statistics.value_covariance)
        moment = _uncentred(statistics.key_mean, statistics.key_covariance)
        return _averaged(moment, self.rope) if self.rope is not None and statistics.is_rotary else moment


class Quantizer(ABC):
    """A method and its settings. Subclasses are frozen dataclasses, one paper per file."""

    method: ClassVar[str]
    source: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("learn", "build"):
            if name in vars(cls):
                setattr(cls, name, for_keeps(getattr(cls, name)))

    @property
    def is_exact(self) -> bool:
        """Whether tokens are stored as they come."""
        return False

    @property
    def needs_statistics(self) -> bool:
        return False

    @property
    def needs_queries(self) -> bool:
        """Whether the statistics must include the queries'."""
        return False

    @abstractmethod
    def layout(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Layout:
        """Fields of a block of 64 tokens of one head; ``dtype`` is the model's."""

    def learn(self, context: LayerContext) -> Arrays:
        """What the codec of one layer takes from its statistics: contiguous arrays by name, none by default.

        Raises:
            QJLError: if the method needs statistics and there are none.
        """
        return {}

    @abstractmethod
    def build(self, context: LayerContext, learned: Arrays) -> Codec:
        """The codec of one layer from what was learned, on this machine or another; it looks at no statistics.

        Raises:
            QJLError: if a learned array is missing or has another shape or dtype.
        """

    def fit(self, context: LayerContext) -> Codec:
        """The codec of one layer, from its statistics."""
        return self.build(context, self.learn(context))

    def bits(self, head_dim: int) -> float:
        """True bits per number, every constant included."""
        return block_bits(self.layout(head_dim)) / (BLOCK * head_dim)


class Codec(ABC):
    """A quantizer fitted to one layer.

    Shapes: ``x [B, H, T, D]`` with T a multiple of 64; ``first [B, T / 64]`` is the RoPE position of the first
    token of each block. Every estimator is linear in the query: it is ``<q, k_hat>`` of the decoded token, and
    backends take it from the codes where they have a ``form``. A codec with one need not say how it decodes.
    """

    layout: Layout

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("quantize", "dequantize"):
            if name in vars(cls):
                setattr(cls, name, in_own_precision(getattr(cls, name)))

    def __deepcopy__(self, memo: dict[int, object]) -> Codec:
        """Never changed once it is fitted, it serves a cache and its copies."""
        return self

    @abstractmethod
    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        """Encode whole blocks: the definition, in torch."""

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        """Decode to ``float32 [B, H, T, D]``, by default as the ``form`` says."""
        if self.form is None:
            raise QJLError(f"{type(self).__name__} has no form: define how it decodes (dequantize).")
        return ops.decode(blocks, self.form, first)

    @property
    def form(self) -> NibbleForm | None:
        """How the fused decode step reads the blocks; None where they are no nibble codes."""
        return None

    @property
    def recipe(self) -> Recipe | GridRecipe | None:
        """What ``quantize`` does as plain arrays, for kernels that do it at once; None where they cannot."""
        return None

    @property
    def rope_of_mean(self) -> Rope | None:
        """What turns the mean that the recipe subtracts."""
        return None

    def job(self, tokens: Tensor, fields: Blocks, what: str) -> EncodeJob:
        """How ``ops.encode`` takes exact tokens ``[slots, H, D]`` to pages."""
        if self.recipe is None:
            return EncodeJob(tokens, fields, self.quantize, what)
        if tokens.dtype not in READABLE:
            return EncodeJob(tokens, fields, self.encode_tokens, what)
        return EncodeJob(tokens, fields, self.quantize, what, self.recipe, self.rope_of_mean)

    def encode_tokens(self, x: Tensor, first: Tensor) -> Blocks:
        """The codes that ``quantize`` defines, as the backend in use makes them.

        Tokens that a cache keeps go from its exact pool to its pages (``job``); this is for all others, and asks nobody
        whether they are finite.
        """
        if self.recipe is None:
            return self.quantize(x, first)
        batch, heads, length, _ = x.shape
        pages = torch.arange(batch * length // BLOCK, dtype=torch.int32, device=x.device)
        storage = {
            name: x.new_empty((heads, len(pages), *field.shape), dtype=field.dtype)
            for name, field in self.layout.items()
        }
        fields = {name: field.transpose(0, 1) for name, field in storage.items()}
        job = self.job(tokens_to_encode(x if x.dtype in READABLE else x.float()), fields, "tokens")
        slots = torch.arange(batch * length, dtype=torch.int32, device=x.device)
        ops.encode([job], slots, first.flatten().long(), pages, are_trusted=True)
        return {name: field.unflatten(1, (batch, length // BLOCK)).transpose(0, 1) for name, field in storage.items()}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the codec keeps beside the codes; tensors shared between layers count once (``storage_bytes``)."""
        return ()


class Unrotated(Codec):
    """Codes of keys before RoPE: undone by storage position when a key is stored, done again when it is decoded."""

    def __init__(self, codec: Codec, rope: Rope) -> None:
        self.codec = codec
        self.rope = rope
        self.layout = codec.layout

    def quantize(self, x: Tensor, first: Tensor) -> Blocks:
        return self.codec.encode_tokens(self.rope.unrotate(x.float(), block_positions(first)), first)

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        return self.rope.rotate(self.codec.dequantize(blocks, first), block_positions(first))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codec.tensors


def _uncentred(mean: Tensor, covariance: Tensor) -> Tensor:
    mean, covariance = mean.double().cpu(), covariance.double().cpu()
    return covariance + mean[:, :, None] * mean[:, None, :]


def _averaged(moment: Tensor, rope: Rope) -> Tensor:
    return rope.to(moment.device).averaged(moment, POSITIONS)


def regularised(moment: Tensor, count: int) -> Tensor:
    """Covariance plus a ridge that grows as the prompt gets shorter; the identity where nothing varies."""
    dim = moment.shape[-1]
    identity = torch.eye(dim, dtype=moment.dtype)
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    ridge = max(RIDGE, 0.05 * dim / max(count, 1))
    return torch.where(level > 0, moment + ridge * level * identity, identity)


def tokens_to_encode(x: Tensor) -> Tensor:
    """``[B, H, T, D] -> [B * T, H, D]``, numbers of a token side by side, copied where they must be."""
    by_token = x.transpose(1, 2).flatten(0, 1)
    return by_token if by_token.stride(2) == 1 else by_token.contiguous()


def require_packable(head_dim: int) -> None:
    """Raises QJLError unless head_dim is a multiple of 8."""
    if head_dim <= 0 or head_dim % 8:
        raise QJLError(f"head_dim {head_dim} does not pack into bytes: it must be a multiple of 8.")


def code_bits(num_bits: float, head_dim: int) -> int:
    """Bits of the codes of one token.

    Raises:
        QJLError: if they do not fill bytes.
    """
    require_packable(head_dim)
    bits = num_bits * head_dim
    if bits % 8:
        raise QJLError(f"{num_bits} bits x head_dim {head_dim} do not fill bytes: use a multiple of 8.")
    return int(bits)


def require_finite(x: Tensor, what: str) -> None:
    """Raises QJLError if x has a NaN or an infinity."""
    is_surely_finite = math.isfinite(x.sum(dtype=torch.float32))  # one pass; too large a sum is looked at again
    if not is_surely_finite and not torch.isfinite(x).all():
        raise QJLError(f"{what} contain NaN or Inf: check the model's weights, its dtype and the prompt.")


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
