"""``PagedCache``: an index, and the layers whose tokens it tells of; the core of every integration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qjl import ops
from qjl.attention import Scoring
from qjl.cache.index import Capacity, Step, TokenIndex, bool_rows
from qjl.cache.layer import Layer, Tokens
from qjl.cache.pool import run_of
from qjl.cache.reading import KeptRows, Reading
from qjl.codecs import Codecs, Pair
from qjl.copies import Copied
from qjl.errors import QJLError
from qjl.ops.forms import EncodeJob


class CodecsOf(ABC):
    """Where a cache's codecs come from; ``waits`` as long as it wants to see what layers compute."""

    waits = False

    def __init__(self, codecs: Codecs) -> None:
        self.codecs = codecs

    @abstractmethod
    def can_code(self, cache: PagedCache) -> bool:
        """Whether every layer has codecs, or will have them once it has read the pass at hand."""

    @abstractmethod
    def of(self, layer: Layer, cache: PagedCache) -> Pair:
        """Codecs of a layer that has read the pass at hand."""

    def observe(self, layer: Layer, cache: PagedCache, query: Tensor, out: Tensor) -> None:
        """Queries ``[B, Hq, Q, D]`` of the fresh tokens, and their outputs in the same order."""
        return

    def keep(self) -> None:
        """The pass at hand is over: what was observed of it counts."""
        return

    def undo(self) -> None:
        """The pass at hand never was: what was observed of it does not count."""
        return

    def crop(self, columns: int) -> None:
        """What was observed of later columns does not count."""
        return

    def reset(self) -> None:
        """Forget what was observed."""
        return


class Fitted(CodecsOf):
    """Codecs that are all there, or can be fitted without looking at tokens."""

    def can_code(self, cache: PagedCache) -> bool:
        return True

    def of(self, layer: Layer, cache: PagedCache) -> Pair:
        assert layer.shape is not None
        found = self.codecs.of(layer.number, layer.shape)
        if found is None:
            raise QJLError(f"the codecs that the cache was given have no statistics of {layer.name}: fit them first.")
        return found


class PagedCache(Copied):
    """Tokens of some layers that are given the same ones, in exact slots and in pages of codes.

    A pass: each layer is given its fresh tokens (``append``) and attends (``attend``); ``settle`` ends the pass, and
    codes what became old enough. A pass that fails is undone by ``roll_back``.

    Args:
        layers: numbers of the layers, as the codecs know them.
        sinks, recent: exact tokens at the start and at the end of each row.
        source: where codecs come from.
        capacity: what there is room for, all of it taken at once; None grows as needed. With one a step that reads a
            token makes no array and no tensor anew, as engines need that capture graphs.
    """

    def __init__(
        self, layers: Iterable[int], sinks: int, recent: int, source: CodecsOf, capacity: Capacity | None = None
    ) -> None:
        self.index = TokenIndex(sinks, recent, capacity)
        self.source = source
        self.layers = {number: Layer(self.index, number) for number in layers}
        self._forget()

    def _copied(self) -> dict[str, object]:
        """A copy reads its own arrays."""
        return vars(self) | {"_reading": None, "_kept": KeptRows()}

    def _forget(self) -> None:
        self._reading: Reading | None = None
        self._kept = KeptRows()
        self._can_code = False
        self._last: Layer | None = None  # whose fresh tokens are still held

    def reset(self) -> None:
        """Forget all tokens, and the codecs that they were coded with."""
        self.source.reset()
        self.index.reset()
        for layer in self.layers.values():
            layer.reset()
        self._forget()

    # A pass

    def append(self, layer: Layer, keys: Tensor, values: Tensor) -> Tokens:
        """Give a layer its fresh tokens ``[B, H, T, D]``; the first layer that is given some begins a pass.

        Returns them as they are kept, keys and values of one dtype.

        Raises:
            QJLError: if they do not fit what is held, or the pass before left layers out.
        """
        index, last = self.index, self._last
        if last is not None:
            if last.is_stored:
                last.fresh = None
            else:
                with self._undone_by_errors():
                    self.store(last)
        if index.step is not None and layer.step is index.step:
            self.settle()
        layer.require(keys, values)
        keys, values = _of_one_dtype(keys, values)
        batch, _, tokens, _ = keys.shape
        if index.step is None:
            self._begin(layer, batch, tokens)
        elif (batch, tokens) != index.step.shape:
            rows, columns = index.step.shape
            raise QJLError(
                f"{layer.name} was given {batch} x {tokens} tokens in a pass of {rows} x {columns}: batch and tokens "
                "must be those of the other layers."
            )
        assert index.step is not None
        layer.join(index.step, keys, values)
        self._last = layer
        return keys, values

    def _begin(self, layer: Layer, batch: int, tokens: int) -> None:
        index = self.index
        if not index.batch:
            if index.marks is not None and len(index.marks) != batch:
                raise QJLError(
                    f"the token mask given to {layer.name} is for {len(index.marks)} rows and {batch} come: repeat it "
                    "for beams and samples."
                )
            index.add_rows(batch)
        elif batch != index.batch:
            raise QJLError(f"the cache holds {index.batch} rows and cannot append {batch}: the batch stays the same.")
        index.begin_columns(tokens)
        self._reading = None

    def _plan(self) -> Step:
        step = self.index.step
        assert step is not None
        if not step.is_planned:
            if self.source.waits or not self._can_code:
                self._can_code = self.source.can_code(self) or self._can_code
            self.index.packs = self._can_code
            self.index.fills_pages = all(layer.pages.can_be_filled for layer in self.layers.values() if layer.pages)
            self.index.plan()
        return step

    def reading(self, device: torch.device) -> Reading:
        """What all rows read in the pass at hand; without one, what they hold."""
        if self.index.step is None:
            return Reading(self.index, device, self._kept)
        if self._reading is None or self._reading.device != device:
            self._plan()
            self._reading = Reading(self.index, device, self._kept)
        return self._reading

    def attend(self, layer: Layer, query: Tensor, scoring: Scoring, fresh: Tokens) -> Tensor:
        """Attention of ``query [B, Hq, Q, D]``, that of the fresh tokens: ``[B, Q, Hq, Dv]`` in its dtype."""
        return layer.attend(query, scoring, self.reading(query.device), fresh)

    # Passes over rows with different numbers of fresh tokens

    def begin(self, counts: Sequence[int]) -> None:
        """Begin a pass in which row b has ``counts[b]`` fresh tokens; layers are given those of all rows behind each
        other, ``[1, H, T, D]``."""
        self.settle()
        self.index.begin_ragged(counts)
        self._readings: list[Reading] | None = None

    def attend_ragged(self, layer: Layer, query: Tensor, scoring: Scoring) -> Tensor:
        """Attention of ``query [1, Hq, T, D]``, that of the fresh tokens: ``[1, T, Hq, Dv]`` in its dtype."""
        assert layer.fresh is not None
        outputs = [
            layer.attend(
                _rows_of(query, one), scoring, one, (_rows_of(layer.fresh[0], one), _rows_of(layer.fresh[1], one))
            )
            for one in self._groups(query.device)
        ]
        if len(outputs) == 1:
            return outputs[0].flatten(0, 1)[None]
        return torch.cat([out.flatten(0, 1) for out in outputs])[self._order][None]

    def _groups(self, device: torch.device) -> list[Reading]:
        """Rows with one fresh token together, those with more each by itself."""
        if self._readings is None or self._readings[0].device != device:
            step = self._plan()
            together = [row for row, count in enumerate(step.counts) if count == 1]
            groups = [together] if together else []
            groups += [[row] for row, count in enumerate(step.counts) if count > 1]
            whole = list(range(self.index.batch))
            self._readings = [
                Reading(self.index, device, self._kept)
                if rows == whole
                else Reading(self.index, device, KeptRows(), rows)
                for rows in groups
            ]
            order = [step.starts[row] + place for rows in groups for row in rows for place in range(step.counts[row])]
            self._order = torch.tensor(order, dtype=torch.int64, device=device).argsort()
        return self._readings

    def store(self, layer: Layer) -> None:
        """Keep or code a layer's fresh tokens, once it has attended, so that they need not be held any longer."""
        if layer.fresh is None:
            return
        if layer.replaced:
            layer.fresh = None
            return
        step = self._plan()
        layer.put()
        if len(step.direct) or len(step.pooled):
            codecs = self.source.of(layer, self)
            if len(step.direct):
                layer.encode_direct(codecs)
        layer.fresh = None

    def settle(self) -> None:
        """End the pass at hand; blocks that have left the window are coded.

        Raises:
            QJLError: if a number is NaN or infinite, or a layer that holds tokens was given none; the cache is then as
                it was before the pass.
        """
        if self.index.step is None:
            return
        with self._undone_by_errors():
            self._take_replaced()
            step = self._plan()
            joined = [layer for layer in self.layers.values() if layer.step is step]
            if not joined:
                raise QJLError("a pass was begun, and no layer was given any of its tokens: it is undone.")
            self._require_all(joined)
            for layer in joined:
                self.store(layer)
            if len(step.pooled):
                self._encode_pooled(joined)
        self.index.commit()
        self.source.keep()
        self._reading = self._last = None
        for layer in self.layers.values():
            layer.has_missed = layer.has_missed or layer.step is not step

    def replace(self, layer: Layer, side: int, states: Tensor | None) -> None:
        """Other keys (0) or values (1) ``[B, H, t, D]`` in place of those that the layer was given in the pass at hand.

        All layers must get as many, keys and values, before the pass ends; they count as tokens 0 to t. So methods that
        choose among the tokens of a prompt (kvpress) go together with codes; heads may choose other tokens.

        Raises:
            QJLError: if there are tokens from an earlier pass, or the layer's own are stored already, or the shape is
                another one.
        """
        fresh = layer.fresh
        if self.index.marks is not None or any(self.index.padding) or self.source.codecs.config.pre_rope:
            raise QJLError(
                "keys and values cannot be set beside a token mask or padding, nor where keys are coded before RoPE: "
                "choose another preset, and one prompt at a time."
            )
        if fresh is None or self.index.columns:
            raise QJLError(
                f"keys and values of {layer.name} can be set in the pass that reads them into an empty cache, before "
                "the next layer is given its own: set them in a hook of the layer's attention, and drop last tokens by "
                "the cache's crop."
            )
        batch, heads, tokens, dim = fresh[side].shape
        if states is None:
            raise QJLError(f"keys and values of {layer.name} cannot be taken away: reset the cache.")
        if states.dim() != 4 or (*states.shape[:2], states.shape[3]) != (batch, heads, dim) or states.shape[2] > tokens:
            raise QJLError(
                f"{layer.name} was given {list(fresh[side].shape)}, in place of which {list(states.shape)} cannot "
                "stand: only the number of tokens may be smaller."
            )
        layer.replaced[side] = states.detach().to(fresh[side])

    def _take_replaced(self) -> None:
        """Begin the pass anew with what was put in place of its tokens."""
        joined = [layer for layer in self.layers.values() if layer.step is self.index.step]
        if not any(layer.replaced for layer in joined):
            return
        counts = {states.shape[2] for layer in joined for states in layer.replaced.values()}
        if len(counts) > 1 or any(len(layer.replaced) < 2 for layer in joined):
            raise QJLError("keys and values were set in some layers, or to other numbers of tokens: set all alike.")
        assert self.index.step is not None
        given, kept = self.index.step.columns, counts.pop()
        self.index.roll_back()
        self._reading, self._last, self._can_code = None, None, False
        self.index.padding = [0] * self.index.batch
        step = self.index.begin_columns(kept)
        step.left_out = given - kept
        for layer in joined:
            keys, values = layer.replaced[0], layer.replaced[1]
            layer.join(step, keys, values)

    @contextmanager
    def _undone_by_errors(self) -> Iterator[None]:
        is_done = False
        try:
            yield
            is_done = True
        finally:
            if not is_done:
                self.roll_back()

    def _require_all(self, joined: Sequence[Layer]) -> None:
        for layer in self.layers.values():
            if layer not in joined and layer.shape is not None and not layer.has_missed:
                raise QJLError(
                    f"{layer.name} was given no tokens in a pass that {joined[0].name} was given some in: the pass is "
                    "undone, so read its tokens again."
                )

    def _encode_pooled(self, layers: Sequence[Layer]) -> None:
        """Blocks of all layers, keys and values, at once where their pages have no codes yet."""
        blocks = self._plan().pooled
        jobs: dict[torch.device, list[EncodeJob]] = {}
        for layer in layers:
            codecs = self.source.of(layer, self)
            if self._plan().copies:
                layer.copy_pages(codecs)
            if not blocks.are_whole:
                layer.fill_pages(codecs)
                continue
            for job in layer.jobs(codecs):
                jobs.setdefault(job.tokens.device, []).append(job)
        for device, some in jobs.items():
            ops.encode(some, *blocks.on(device))

    def roll_back(self) -> None:
        """The pass at hand never was."""
        step = self.index.step
        self.index.roll_back()
        self.source.undo()
        self._reading, self._last, self._can_code = None, None, False
        for layer in self.layers.values():
            if layer.step is step:
                layer.step, layer.fresh, layer.replaced = None, None, {}

    def abandon(self) -> None:
        """The same, with what was learned of its padding before it began."""
        self.roll_back()
        self.index.forget_padding()

    # Rows and columns

    def set_padding(self, padding: Sequence[int], origins: Sequence[int]) -> None:
        """Left padding of each row in columns, and the RoPE position of its first real token.

        Rows that hold tokens keep what they have.
        """
        if not self.index.batch:
            self.index.add_rows(len(padding))
        self.index.set_padding(padding, origins)

    def mark(self, mask: Tensor) -> None:
        """Say which of the next T tokens may be packed: ``bool [B, T]``, padding included.

        A block is packed if all of its 64 tokens may be; all others stay exact for ever. Tokens that no mask speaks of
        may be packed as long as there was no mask, and stay exact from the first one on: text that is generated after
        an image, for example. A mask replaces what an earlier one said of tokens yet to come.

        Raises:
            QJLError: if the mask is of another kind, or for another number of rows.
        """
        self.settle()
        self.index.mark(bool_rows(mask))

    def crop(self, columns: int) -> None:
        """Keep the first columns, and touch none of their tokens; marks of later columns are forgotten."""
        self.settle()
        self.index.crop(columns)
        self.source.crop(columns)

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat, reorder or drop rows: no token moves. An empty cache has none."""
        self.settle()
        if self.index.batch:
            self.index.select(rows)

    def shrink(self) -> None:
        """Give back the room that no token takes; a fixed capacity stays."""
        self.settle()
        if self.index.capacity is not None:
            return
        slots, pages = self.index.renumber()
        for layer in self.layers.values():
            layer.keep(slots.tolist(), pages.tolist())

    # What is held

    def columns(self, layer: Layer) -> int:
        """Tokens of each row that a layer holds, padding included, those of the pass at hand too."""
        if layer.shape is None:
            return 0
        step = self.index.step
        return self.index.columns + (step.columns if step is not None and layer.step is step else 0)

    def dense(self, layer: Layer, fresh: Tokens | None = None) -> Tokens:
        """All keys and values decoded to the model's dtype, ``[B, H, columns, D]``; padding is zero.

        In a pass these are the tokens before it, and the ``fresh`` ones that the layer was given.
        """
        assert layer.shape is not None
        return layer.dense(self.reading(layer.shape.device), fresh)

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens held, exact and packed."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(layer.allocated_nbytes for layer in self.layers.values())


def _rows_of(x: Tensor, reading: Reading) -> Tensor:
    """The fresh tokens of some rows, ``[1, H, T, D] -> [B, H, Q, D]``."""
    step = reading.index.step
    assert step is not None
    starts = [step.starts[row] for row in reading.rows]
    if reading.batch == 1:
        return x[:, :, starts[0] : starts[0] + reading.queries]
    run = run_of(starts)  # one token each
    return x[0, :, torch.tensor(starts, dtype=torch.int64) if run is None else run].transpose(0, 1)[:, :, None]


def as_coded(keys: Tensor, values: Tensor, codecs: Codecs, layer: int = 0) -> Tokens:
    """``[B, H, T, D]`` as a cache gives them back that keeps no token exact but those behind the last whole block."""
    cache = PagedCache([layer], sinks=0, recent=0, source=Fitted(codecs))
    cache.append(cache.layers[layer], keys, values)
    cache.settle()
    return cache.dense(cache.layers[layer])


def _of_one_dtype(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast a model's keys and values may differ in theirs."""
    if keys.dtype == values.dtype:
        return keys, values
    dtype = torch.promote_types(keys.dtype, values.dtype)
    return keys.to(dtype), values.to(dtype)
