"""What the ops on a cache read and write: pages of a nibble code, exact tokens beside them, and which row has which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from qjl.ops.recipe import Derived, GridRecipe, Recipe
from qjl.packed import Blocks


@dataclass(frozen=True, eq=False)
class Turn:
    """RoPE of a mean: pair f of coordinates ``first[f], second[f]`` turns by ``position * inv_freq[f]``."""

    inv_freq: Tensor
    first: Tensor
    second: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class NibbleForm:
    """How tokens decode: ``x_hat = mean + map^T (scale * y_hat + middle)``, y_hat a sum of nibble look-ups.

    ``map [H, D', D]`` (None: the identity). ``coordinates [H or 1, N, w]`` and ``entries [H or 1, N, 16, w]`` are the
    code of one of ``groups`` equal parts of the D' coordinates. The field ``scale`` holds 8-bit logarithms in units of
    ``unit [H]``, or float16 where that is None; the field ``middle``, if any, float16.
    """

    map: Tensor | None
    coordinates: Tensor
    entries: Tensor
    code_dim: int
    scale: str
    unit: Tensor | None = None
    middle: str | None = None
    groups: int = 1
    mean: Tensor | None = None
    turn: Turn | None = None
    derived: dict[str, Any] = field(default_factory=Derived)

    @property
    def has_shared_code(self) -> bool:
        """Whether all heads have one code, as values that need no queries do."""
        return self.entries.shape[0] == 1

    @property
    def bits(self) -> float:
        """Per coordinate of the code: a sketch, however long, has one."""
        return 4 * self.entries.shape[1] * self.groups / self.code_dim

    @property
    def error_budget(self) -> float:
        """How far a kernel may be from this form: the error of a row of attention over its norm, rms over rows.

        At most 1 % of the variance of what the code itself does to an output. Errors add as squares, so more precision
        cannot be measured in a model's answers, and costs up to half of the speed.
        """
        return 4e-3 if self.bits <= 3 else 2e-3 if self.bits <= 4 else 1e-3


@dataclass(frozen=True, eq=False)
class Pool:
    """Packed pages of one layer.

    A page holds P tokens (16, 32, 64 or 128) of all heads, token-minor: each field of a ``Packed`` block with P in
    place of its 64. So ``codes uint8 [pages, H, bytes, P]``, a scale ``[pages, H, P]`` or, in groups,
    ``[pages, H, groups, P]``; the fields may be strided views, such as of ``[pages, bytes of a page]`` or of a pool
    that lies head by head.
    """

    keys: Blocks
    values: Blocks
    key_form: NibbleForm
    value_form: NibbleForm
    derived: dict[str, Any] = field(default_factory=Derived, init=False)

    @property
    def page(self) -> int:
        """Tokens per page."""
        return self.keys["codes"].shape[3]

    @property
    def error_budget(self) -> float:
        """The larger of the two: an output has the errors of scores and of values alike, and the coarser code rules."""
        return max(self.key_form.error_budget, self.value_form.error_budget)


@dataclass(frozen=True, eq=False)
class ExactPool:
    """Exact tokens of one layer, addressed by slot: ``keys [slots, H, D]``, ``values [slots, H, Dv]``.

    Both of one type, float32, bfloat16 or float16, and the numbers of a token and head lie together.
    """

    keys: Tensor
    values: Tensor
    derived: dict[str, Any] = field(default_factory=Derived, init=False)


@dataclass(eq=False)
class Rows:
    """Which tokens of the pools each row of a step has: made once per forward pass, shared by all layers.

    - ``table int32 [B, n]``: the page of each P tokens of the sequence in order; -1 is a hole, whose tokens are not
      packed. ``lengths int32 [B]``: where packed tokens end; ``skip int32 [B]``: how many at the start are not read
      packed, as those that are exact too. Row b has packed tokens ``skip[b] <= t < lengths[b]`` that lie in no hole; no
      page beside these is read.
    - ``origins int64 [B]``: RoPE position of token 0, so that page j begins at ``origins + j P``.
    - ``slots int32 [B, E]``: exact tokens, of which row b has the first ``counts[b]`` (``counts int32 [B]``) in this
      order, the queries' own last; a slot of -1 holds none.
    - ``longest``: the largest of ``lengths``, which the host knows, so that no step waits for a device.

    Contents may change in place between steps. A tensor that is assigned takes the place of the former one.
    """

    table: Tensor
    lengths: Tensor
    skip: Tensor
    origins: Tensor
    slots: Tensor
    counts: Tensor
    longest: int
    derived: dict[str, Any] = field(default_factory=Derived, init=False)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if isinstance(value, Tensor) and "derived" in self.__dict__:
            self.derived.clear()

    @property
    def batch(self) -> int:
        return self.table.shape[0]


class Rotation(Protocol):
    """RoPE, as it turns the mean of what is encoded (``qjl.rope.Rope``)."""

    @property
    def inv_freq(self) -> Tensor: ...

    @property
    def scaling(self) -> float: ...

    @property
    def interleaved(self) -> bool: ...

    def exact_angles(self, positions: Tensor) -> Tensor:
        """``[...] -> float32 [..., F]``."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class EncodeJob:
    """The keys or the values of one layer that ``encode`` takes from exact tokens to pages.

    - ``tokens [slots, H, D]``: one side of an ``ExactPool``.
    - ``fields``: those of one side of a ``Pool`` with pages of 64.
    - ``quantize``: what defines the codes, ``Codec.quantize``.
    - ``recipe``, ``rope``: the same as kernels read it, and what turns the mean that it subtracts. Without a recipe
      every backend calls ``quantize``.
    - ``what``: names the tokens in an error.
    """

    tokens: Tensor
    fields: Blocks
    quantize: Callable[[Tensor, Tensor], Blocks]
    what: str
    recipe: Recipe | GridRecipe | None = None
    rope: Rotation | None = None
    derived: dict[str, Any] = field(default_factory=Derived, init=False)


class Source(Protocol):
    """Something that a backend makes something of."""

    @property
    def derived(self) -> dict[str, Any]: ...


def once(source: Source, name: str, derive: Callable[[Any], Any]) -> Any:
    """What a backend makes of a source, made at its first use.

    Threads that come at once may each make one, but all of them get the same, which stays as long as its source.
    """
    made = source.derived.get(name)
    return source.derived.setdefault(name, derive(source)) if made is None else made


def shared_strides(bias: Tensor) -> tuple[int, ...]:
    """In elements, 0 where one number serves all."""
    return tuple(step if size > 1 else 0 for step, size in zip(bias.stride(), bias.shape, strict=True))
