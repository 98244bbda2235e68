"""A cache of one layer, as tests of a single layer drive it: appended to, attended over, settled."""

import torch

from qjl.attention import Scoring
from qjl.cache.paged import PagedCache
from qjl.codecs import Codecs
from qjl.hf.first_prompt import FirstPrompt
from qjl.presets import CacheConfig
from qjl.statistics import none


def codecs_of(config, rope=None, statistics=none, number=0):
    """Codecs of one layer."""
    return Codecs(config, {number: rope}, statistics)


class OneLayer:
    """A ``PagedCache`` of one layer; ``codecs`` are those of another one, or fitted to its first prompt."""

    def __init__(self, key, value, sinks=4, recent=32, codecs=None, rope=None, pre_rope=False, number=0, capacity=None):
        config = CacheConfig(key, value, sinks, recent, pre_rope=pre_rope)
        self.codecs = codecs_of(config, rope, number=number) if codecs is None else codecs
        self.cache = PagedCache([number], sinks, recent, FirstPrompt(self.codecs, "test"), capacity)
        self.core = self.cache.layers[number]
        self.fresh = None

    @classmethod
    def of(cls, config, codecs, number=0):
        """With the windows of a configuration."""
        return cls(config.key, config.value, config.sinks, config.recent, codecs, number=number)

    @property
    def index(self):
        return self.cache.index

    @property
    def length(self):
        """Columns, padding included."""
        return self.index.columns

    @property
    def packed_tokens(self):
        return self.index.packed_tokens

    def append(self, keys, values):
        self.fresh = self.cache.append(self.core, keys, values)

    def attend(self, query, scaling=0.125, mask=None, softcap=None, sink_logits=None):
        """Of the tokens appended last, ``[B, Hq, Q, D] -> [B, Hq, Q, Dv]``."""
        scoring = Scoring(scaling, mask, softcap, sink_logits)
        return self.cache.attend(self.core, query, scoring, self.fresh).transpose(1, 2)

    def step(self, tokens, columns, **scoring):
        """A whole pass over some columns of tokens; what attention gave.

        Queries are observed in place of outputs: then statistics do not depend on how attention rounds.
        """
        query = tokens.queries[:, :, columns]
        self.append(tokens.keys[:, :, columns], tokens.values[:, :, columns])
        out = self.attend(query, **scoring)
        if self.cache.source.waits:
            self.cache.source.observe(self.core, self.cache, query, query)
        self.settle()
        return out

    def settle(self):
        self.cache.settle()
        self.fresh = None

    def dense(self):
        """Keys and values of all tokens, those of the pass at hand too."""
        return self.cache.dense(self.core, self.fresh)

    def pages(self, row=0):
        """The bytes of a row's pages, a tensor per field."""
        return pages_of(self.index, self.core, row)

    def exact(self, row=0):
        """The numbers of a row's exact tokens, and their keys and values ``[t, H, D]``."""
        return exact_of(self.index, self.core, row)


def pages_of(index, core, row=0):
    """The bytes of a row's pages in one layer, ``[pages, H, *shape]`` per field of keys and values, without holes."""
    table = index.table[row, : index.blocks[row]]
    if core.pages is None:
        return []
    return [field for side in taken(core.pages, table[table >= 0]) for field in side.values()]


def taken(pages, numbers):
    """Copies of some pages, ``[n, H, *shape]`` per field, of keys and of values."""
    index = torch.as_tensor(numbers, dtype=torch.int64)
    return [{name: field[index.to(field.device)].contiguous() for name, field in side.items()} for side in pages.fields]


def codec_tensors(core):
    """What the codecs of a layer were fitted to."""
    return [tensor for codec in core.codecs or () for tensor in codec.tensors]


def exact_of(index, core, row=0):
    count = int(index.counts[row])
    slots = index.slot_of[row, :count].tolist()
    return index.token_of[row, :count].tolist(), core.exact.keys[slots], core.exact.values[slots]


def same_tokens(one, other, row=0, other_row=0):
    """Whether two layers hold the same bytes for a row: pages, the table's holes, exact tokens."""
    ours, theirs = one.pages(row), other.pages(other_row)
    if one.index.blocks[row] != other.index.blocks[other_row] or len(ours) != len(theirs):
        return False
    if one.index.partial[row] != other.index.partial[other_row]:
        return False
    holes = [x.index.table[at, : x.index.blocks[at]] < 0 for x, at in ((one, row), (other, other_row))]
    if (holes[0] != holes[1]).any() or not all(a.equal(b) for a, b in zip(ours, theirs, strict=True)):
        return False
    (numbers, *exact), (their_numbers, *their_exact) = one.exact(row), other.exact(other_row)
    return numbers == their_numbers and all(a.equal(b) for a, b in zip(exact, their_exact, strict=True))
