"""One layer of a cache: its tokens' numbers, which lie where the index of the cache says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl import ops
from qjl.attention import Known, Scoring, Seen, Segment, attend, joined
from qjl.cache.index import Blocks, Step, TokenIndex
from qjl.cache.pool import ExactTokens, Pages
from qjl.cache.reading import Reading
from qjl.codecs import Pair, TokenShape
from qjl.copies import Copied
from qjl.errors import QJLError
from qjl.methods.base import require_finite, tokens_to_encode
from qjl.ops.forms import EncodeJob, Pool
from qjl.packed import to_device

ROWS_AT_ONCE = 256  # of queries per KV head, so that what they ask fits a cache
Tokens = tuple[Tensor, Tensor]  # keys and values ``[B, H, T, D]``


@dataclass(frozen=True, eq=False)
class _Codes:
    """Pages of some rows, as attention over decoded tokens reads them."""

    pages: Pages
    table: Tensor
    first: Tensor
    seen: Seen

    @property
    def blocks(self) -> int:
        return self.table.shape[1]

    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.pages.decode(self.table[:, start:stop], self.first[:, start:stop])


class Layer(Copied):
    """Keys and values of one attention layer.

    In a pass it is given fresh tokens (``join``), attends, and carries the step out. Codes are written once codecs are
    there (``codecs``), which the cache sees to.
    """

    def __init__(self, index: TokenIndex, number: int) -> None:
        self.index = index
        self.number = number
        self.name = f"layer {number}"
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, and which codecs they were coded with."""
        self.shape: TokenShape | None = None
        self.exact: ExactTokens | None = None
        self.pages: Pages | None = None
        self.step: Step | None = None  # the last one that it joined
        self.has_missed = False  # whether the cache holds tokens that it was not given
        self.fresh: Tokens | None = None  # of the pass at hand, as long as they are not stored
        self.replaced: dict[int, Tensor] = {}  # what stands in place of fresh keys (0) and values (1)
        self._is_put = False
        self._jobs: tuple[object, object, list[EncodeJob]] | None = None

    # A pass

    def join(self, step: Step, keys: Tensor, values: Tensor) -> None:
        """Fresh tokens of a pass, ``[B, H, T, D]``."""
        if self.shape is None:
            self.shape = TokenShape.of(keys, values)
            self.exact = ExactTokens(self.shape, self.index.slots.capacity)
        self.step, self.fresh, self._is_put, self.replaced = step, (keys, values), False, {}

    def require(self, keys: Tensor, values: Tensor) -> None:
        """Raises QJLError if tokens do not fit those that are held, or the cache holds some that this layer missed."""
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise QJLError(
                f"keys {list(keys.shape)} and values {list(values.shape)} must be [B, H, T, D] with equal B, H and T."
            )
        if self.has_missed:
            raise QJLError(f"{self.name} was given no tokens in an earlier pass, and is now: reset the cache.")
        held = self.shape
        if held is not None and (held.heads, held.key_dim, held.value_dim) != (
            keys.shape[1],
            keys.shape[3],
            values.shape[3],
        ):
            raise QJLError(
                f"{self.name} holds tokens of {held.heads} heads with {held.key_dim} numbers a key and cannot take "
                f"{list(keys.shape)}: heads and head_dim must stay the same."
            )

    def attend(self, query: Tensor, scoring: Scoring, reading: Reading, fresh: Tokens) -> Tensor:
        """Attention of ``query [B, Hq, Q, D]``, that of the fresh tokens: ``[B, Q, Hq, Dv]`` in its dtype."""
        pool = self._pool_for(query, reading)
        if pool is None:
            exact, coded = self._segments(reading, fresh)
            known = self._over_codes(query, scoring, reading)
            coded = coded if known is None else None
            return attend(query, exact, coded, scoring, known).transpose(1, 2).contiguous()
        pools, rows, softcap = (pool, self._exact().operand), reading.operand, scoring.softcap or 0.0
        is_plain = reading.is_plain(scoring.mask)
        if is_plain and scoring.sink_logits is None:
            self._is_put = reading.is_whole
            return ops.append_attend(query, *fresh, *pools, rows, scoring.scaling, softcap)
        self.put()
        bias, queries = None if is_plain else reading.bias(scoring.mask), query.shape[2]
        if bias is not None and scoring.mask is not None and queries > 1:
            bias, queries = _by_row(bias, query), 1
        grouped = query.reshape(query.shape[0], fresh[0].shape[1], -1, query.shape[3])
        part = ops.attend(grouped, *pools, rows, queries, scoring.scaling, softcap, bias)
        return joined(part, query, scoring.sink_logits).transpose(1, 2).contiguous()

    def _pool_for(self, query: Tensor, reading: Reading) -> Pool | None:
        """What is scored as it is, if codes are; no kernel reads float64."""
        if self.pages is None or not reading.is_short or query.dtype == torch.float64:
            return None
        return self.pages.operand

    def _over_codes(self, query: Tensor, scoring: Scoring, reading: Reading) -> Known | None:
        """Attention over packed tokens alone, which all queries see: some at a time. None where it decodes them."""
        pool = None if self.pages is None else self.pages.operand
        if pool is None or reading.packed is None or query.dtype == torch.float64:
            return None
        if ops.backend_of(query.device) != "cpu" or not reading.is_plain(scoring.mask):
            return None
        assert self.pages is not None
        pools, softcap = (pool, self._exact().operand), scoring.softcap or 0.0
        group = query.shape[1] // self.pages.heads
        parts = []
        for some in query.split(max(1, ROWS_AT_ONCE // group), dim=2):
            grouped = some.reshape(some.shape[0], self.pages.heads, -1, some.shape[3])
            out, lse = ops.attend(grouped, *pools, reading.packed_operand, 1, scoring.scaling, softcap, None)
            parts.append((out.unflatten(2, (group, -1)), lse.unflatten(2, (group, -1))))
        return Known(*(torch.cat(side, 3) for side in zip(*parts, strict=True)))

    def _exact(self) -> ExactTokens:
        assert self.exact is not None
        self.exact.reserve(self.index.slots.capacity)
        return self.exact

    def _segments(self, reading: Reading, fresh: Tokens | None) -> tuple[list[Segment], _Codes | None]:
        """All tokens as attention over decoded ones reads them, with fresh ones of the pass at hand."""
        exact = []
        if reading.before is not None:
            slots, seen = reading.before
            exact.append(Segment(*self._exact().read(slots), seen))
        if fresh is not None:
            exact.append(Segment(*fresh, reading.own))
        if reading.packed is None:
            return _as_one_run(exact), None
        assert self.pages is not None
        return exact, _Codes(self.pages, *reading.packed)

    # Storing

    @property
    def is_stored(self) -> bool:
        """Whether nothing is to be done with fresh tokens any more until the pass ends."""
        step = self.step
        return (
            self._is_put and step is not None and not step.direct.pages and (not step.pooled.pages or bool(self.pages))
        )

    def put(self) -> None:
        """Store the fresh tokens that stay exact for now."""
        step = self.step
        if self._is_put or self.fresh is None or step is None:
            return
        self._is_put = True
        if step.put_tokens:
            tokens, slots = (self._on_device(x) for x in (step.put_tokens, step.put_slots))
            self._exact().put(slots, *(_by_token(x)[tokens] for x in self.fresh))

    def encode_direct(self, codecs: Pair) -> None:
        """Code blocks all of whose tokens are fresh."""
        assert self.step is not None
        assert self.fresh is not None
        keys, values = (tokens_to_encode(x) for x in self.fresh)
        ops.encode(self._jobs_of(keys, values, codecs), *self.step.direct.on(keys.device))

    def jobs(self, codecs: Pair) -> list[EncodeJob]:
        """How pages are made of tokens in slots, keys and values; the same objects as long as nothing grows."""
        exact, pages = self._exact(), self._pages(codecs)
        key = (exact.operand, pages.storage)
        if self._jobs is None or self._jobs[0] is not key[0] or self._jobs[1] is not key[1]:
            self._jobs = (*key, self._jobs_of(exact.keys, exact.values, codecs))
        return self._jobs[2]

    def _jobs_of(self, keys: Tensor, values: Tensor, codecs: Pair) -> list[EncodeJob]:
        sides = zip(codecs, (keys, values), self._pages(codecs).fields, ("keys", "values"), strict=True)
        return [codec.job(tokens, fields, f"{what} of {self.name}") for codec, tokens, fields, what in sides]

    def copy_pages(self, codecs: Pair) -> None:
        """Pages that are to be filled, to where they are filled."""
        assert self.step is not None
        self._pages(codecs).copy(self.step.copies)

    def fill_pages(self, codecs: Pair) -> None:
        """Code blocks whose tokens are in slots, beside the codes that their pages have."""
        assert self.step is not None
        pages, blocks, exact = self._pages(codecs), self.step.pooled, self._exact()
        slots = self._on_device(blocks.sources)
        for side, (codec, tokens) in enumerate(zip(codecs, (exact.keys, exact.values), strict=True)):
            coded = codec.encode_tokens(*self._checked(tokens[slots], side, blocks))
            pages.fill(side, coded, blocks.pages, blocks.kept)

    def _pages(self, codecs: Pair) -> Pages:
        assert self.shape is not None
        if self.pages is None:
            self.pages = Pages(codecs, self.shape.heads, self.index.pages.capacity, self.shape.device)
        self.pages.reserve(self.index.pages.capacity)
        return self.pages

    def _checked(self, tokens: Tensor, side: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Finite tokens ``[1, H, n * 64, D]`` of ``[n * 64, H, D]``, and positions ``[1, n]``."""
        chosen = tokens.transpose(0, 1)[None]
        require_finite(chosen, f"{('keys', 'values')[side]} of {self.name}")
        return chosen, self._on_device(blocks.first)[None]

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        assert self.shape is not None
        return to_device(torch.tensor(numbers, dtype=torch.int64), self.shape.device)

    def keep(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Hold only these slots and pages, in this order."""
        if self.exact is not None and not self.has_missed:
            self.exact.keep(self._on_device(slots))
        if self.pages is not None and not self.has_missed:
            self.pages.keep(self._on_device(pages))

    # Files

    def hold_exact(self, keys: Tensor, values: Tensor) -> None:
        """Hold exact tokens ``[slots, H, D]`` that were held before, where they lie."""
        self.shape = TokenShape.of(keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
        self.exact = ExactTokens(self.shape, 0)
        self.exact.adopt(keys, values)

    def hold_pages(self, codecs: Pair, keys: dict[str, Tensor], values: dict[str, Tensor]) -> int:
        """Hold pages ``[pages, H, *shape]`` that these codecs made, where they lie; returns how many.

        Raises:
            QJLError: if they are not pages of these codecs.
        """
        assert self.shape is not None
        self.pages = Pages(codecs, self.shape.heads, 0, self.shape.device)
        self.pages.adopt(keys, values)
        return self.pages.capacity

    # What is held

    @property
    def codecs(self) -> Pair | None:
        """With which tokens were coded; None as long as none were."""
        return None if self.pages is None else self.pages.codecs

    def exact_tokens(self, reading: Reading) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values ``[B, H, t, D]`` of all tokens that are exact, fresh ones too, their columns ``int64 [B, t]``
        and which of them there are, ``bool [B, t]``."""
        segments, _ = self._segments(reading, self.fresh)
        keys, values = (torch.cat([getattr(one, name) for one in segments], 2) for name in ("keys", "values"))
        return keys, values, *_columns_of(segments)

    def dense(self, reading: Reading, fresh: Tokens | None) -> Tokens:
        """All keys and values decoded to the model's dtype, ``[B, H, columns, D]``; padding is zero."""
        exact, coded = self._segments(reading, fresh)
        if coded is None and len(exact) == 1 and exact[0].seen.valid is None and exact[0].seen.columns == 0:
            return exact[0].keys, exact[0].values
        if coded is not None:
            exact.append(Segment(*coded.decode(0, coded.blocks), coded.seen))
        assert self.shape is not None
        columns = self.index.columns + (0 if fresh is None else fresh[0].shape[2])
        size = (self.index.batch, self.shape.heads, columns)
        out = self.shape.zeros(*size, self.shape.key_dim), self.shape.zeros(*size, self.shape.value_dim)
        for segment in exact:
            _place(out, segment)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens held, exact and packed; codecs are apart."""
        packed = 0 if self.pages is None else self.index.pages.in_use * self.pages.page_bytes
        return self.exact_nbytes + packed

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the exact tokens: sinks, window, and those that a token mask leaves exact."""
        return 0 if self.exact is None else self.index.slots.in_use * self.exact.token_bytes

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(of.nbytes for of in (self.exact, self.pages) if of is not None)


def _as_one_run(exact: list[Segment]) -> list[Segment]:
    """Tokens that follow each other in all rows, in one piece: torch's own kernel reads them at once."""
    if len(exact) < 2 or any(one.seen.valid is not None for one in exact):
        return exact
    before, own = exact
    if before.seen.columns != 0 or own.seen.columns != before.tokens:
        return exact
    keys, values = (torch.cat(pair, 2) for pair in ((before.keys, own.keys), (before.values, own.values)))
    return [Segment(keys, values, before.seen)]


def _by_row(bias: Tensor, query: Tensor) -> Tensor:
    """``[B, h, Q, t] -> [B, Hq * Q, 1, t]``, as if each query were the last token of a head of its own.

    Then a mask alone says what is seen: it may show tokens that come later.
    """
    return bias.expand(-1, query.shape[1], -1, -1).flatten(1, 2)[:, :, None]


def _by_token(x: Tensor) -> Tensor:
    """``[B, H, T, D] -> [B * T, H, D]``, as fresh tokens are numbered."""
    return x.transpose(1, 2).flatten(0, 1)


def _columns_of(segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    columns, valid = [], []
    for one in segments:
        batch, tokens, device = one.keys.shape[0], one.tokens, one.keys.device
        seen = one.seen
        if isinstance(seen.columns, int):
            columns.append(torch.arange(seen.columns, seen.columns + tokens, device=device).expand(batch, -1))
        else:
            columns.append(seen.columns)
        valid.append(torch.ones(batch, tokens, dtype=torch.bool, device=device) if seen.valid is None else seen.valid)
    return torch.cat(columns, 1), torch.cat(valid, 1)


def _place(out: tuple[Tensor, ...], segment: Segment) -> None:
    """Write tokens to their columns."""
    seen = segment.seen
    for target, source in zip(out, (segment.keys.to(out[0].dtype), segment.values.to(out[1].dtype)), strict=True):
        if isinstance(seen.columns, int) and seen.valid is None:
            target[:, :, seen.columns : seen.columns + source.shape[2]] = source
            continue
        columns, valid = _columns_of([segment])
        for row in range(source.shape[0]):
            chosen = valid[row]
            target[row][:, columns[row][chosen]] = source[row][:, chosen]
