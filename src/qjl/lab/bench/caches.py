"""The caches that whole models are timed with: ours, transformers' own, and how all of them get the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from qjl import ops
from qjl.architecture import layer_shapes, text_config
from qjl.attention import Scoring
from qjl.compat import cache_argument, tree_leaves
from qjl.errors import QJLError
from qjl.hf import KVCache
from qjl.lab import machine
from qjl.lab.bench import decode
from qjl.lab.bench.devices import Place, place_of
from qjl.lab.bench.gate import BenchSettings, RowErrors, require_right
from qjl.lab.bench.synthetic import Shape, fill
from qjl.lab.bench.timing import Spread, wall_ms
from qjl.lab.results import Row
from qjl.packed import BLOCK
from qjl.presets import CacheConfig

FITTED = 512  # tokens of the prompt that statistics come from
MOST_GATED = 4096  # tokens
DYNAMIC = "dynamic"
QUANTIZED: Mapping[str, tuple[str, Mapping[str, int]]] = {  # transformers' own: package, settings
    "quanto": ("optimum.quanto", {"nbits": 4}),
    "hqq": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
}
PEERS = (DYNAMIC, *QUANTIZED)
EXTRA_PACKAGES = ("optimum-quanto", "hqq", "llama-cpp-python")

Make = Callable[[], Cache]


def is_installed(peer: str) -> bool:
    """Whether a peer's package is here.

    Raises:
        QJLError: if it is none of the ``PEERS``.
    """
    if peer not in PEERS:
        raise QJLError(f"{peer!r} is not compared with: choose from {', '.join(PEERS)}.")
    package, _ = QUANTIZED.get(peer, ("transformers", {}))
    return find_spec(package.partition(".")[0]) is not None and find_spec(package) is not None


def makers(model: PreTrainedModel, presets: Sequence[CacheConfig], peers: Sequence[str]) -> dict[str, Make]:
    """What makes an empty cache of each kind for this model."""
    config = text_config(model.config)
    made: dict[str, Make] = {preset.name: partial(KVCache, model, preset) for preset in presets}
    if DYNAMIC in peers:
        made[DYNAMIC] = partial(DynamicCache, config=config)
    for peer in [peer for peer in peers if peer in QUANTIZED]:
        made[peer] = partial(QuantizedCache, peer, config, **QUANTIZED[peer][1])
    return made


@torch.no_grad()
def warm(model: PreTrainedModel, make: Make, input_ids: Tensor) -> None:
    """A prompt ``[1, T]``, after which codecs are fitted and kernels compiled."""
    cache = make()
    prompt = input_ids[:, :FITTED].to(model.device)
    model(input_ids=prompt, logits_to_keep=1, **cache_argument(cache))
    model(input_ids=prompt[:, :1], **cache_argument(cache))


def refill(cache: Cache, exact: Sequence[tuple[Tensor, Tensor]], context: int, batch: int, dtype: torch.dtype) -> None:
    """Make each of ``batch`` rows hold the first ``context`` of one sequence's exact tokens, given by layer."""
    for index, pair in enumerate(exact):
        keys, values = (x[:, :, :context].to(dtype).expand(batch, -1, -1, -1) for x in pair)
        cache.update(keys, values, index)
    if isinstance(cache, KVCache):
        cache.settle()


def nbytes(cache: Cache) -> int:
    """Of all that a cache holds."""
    if isinstance(cache, KVCache):
        return cache.nbytes
    return sum(x.nbytes for layer in cache.layers for held in tree_leaves(vars(layer)) for x in _plain(held))


def _plain(held: object) -> Iterator[Tensor]:
    """The tensors that one of a quantized kind is made of."""
    if hasattr(held, "__tensor_flatten__"):
        for name in held.__tensor_flatten__()[0]:
            yield from _plain(getattr(held, name))
    elif isinstance(held, Tensor):
        yield held


@dataclass(frozen=True, eq=False)
class Rig:
    """A model, and the caches that it decodes with; ``errors``, by cache, are what the gate found."""

    name: str
    model: PreTrainedModel
    makers: Mapping[str, Make]
    errors: Mapping[str, RowErrors]
    threads: int = 1

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def place(self) -> Place:
        return place_of(self.device, self.threads)

    @property
    def backend(self) -> str:
        return ops.backend_of(self.device)

    @property
    def weights_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.parameters())

    def ids(self, count: int) -> Tensor:
        """Tokens at random, ``[1, count]``."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = text_config(self.model.config).vocab_size
        return torch.randint(vocabulary, (1, count), generator=generator).to(self.device)

    def timed(self, work: Callable[[], object]) -> float:
        """Milliseconds by the wall clock, until the device is done."""

        def finished() -> None:
            work()
            self.place.finish()

        return wall_ms(finished)

    def head(self, case: str, name: str, context: int) -> Row:
        """What comes first in the row of a cache."""
        return {
            "case": case,
            "backend": self.backend if name in self.errors else None,
            "preset": name,
            "tokens": context,
            "head_dim": layer_shapes(self.model.config)[0].head_dim,
        }

    def conditions(self, name: str) -> Row:
        errors = self.errors.get(name)
        return (errors.columns if errors else {"max_error": None, "rms_error": None}) | {
            "model": self.name,
            "weights_bytes": self.weights_bytes,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "threads": self.threads,
            "isa": machine.instruction_set() if self.backend == "cpu" else None,
            "machine": self.place.name,
            "versions": machine.versions((*machine.PACKAGES, *EXTRA_PACKAGES)),
        }


def build(
    name: str, model: PreTrainedModel, presets: Sequence[CacheConfig], peers: Sequence[str], tokens: int, threads: int
) -> Rig:
    """A rig whose codecs are fitted, kernels compiled and results right.

    Raises:
        QJLError: if a preset does not take this model.
        Inaccurate: if the backend in use and the reference do not agree on layers of its shape.
    """
    made = makers(model, presets, peers)
    errors = {preset.name: gate(model, preset, tokens, threads) for preset in presets}
    rig = Rig(name, model, made, errors, threads)
    for make in made.values():
        warm(model, make, rig.ids(FITTED))
    return rig


def ratio(name: str, spread: Spread | None) -> Row:
    """A median and its quartiles, as a row has them."""
    return {f"ratio_{name}": spread and spread.median, f"spread_{name}": spread and [spread.low, spread.high]}


def gate(model: PreTrainedModel, preset: CacheConfig, tokens: int, threads: int) -> RowErrors:
    """The errors of attention over a layer of this model's shape, relative to the reference's.

    Raises:
        Inaccurate: if they are large.
    """
    least = preset.sinks + preset.recent + BLOCK
    heads = text_config(model.config).num_attention_heads
    layer = next(layer for layer in layer_shapes(model.config) if layer.is_quantized)
    shape = Shape(layer.head_dim, layer.num_key_value_heads, heads // layer.num_key_value_heads)
    settings = BenchSettings(shape, model.dtype, model.device, threads)
    subject = fill(preset, max(least, min(tokens, MOST_GATED)), shape, model.dtype, model.device)
    errors = decode.row_errors(subject, Scoring(shape.scaling), threads)
    require_right(errors, f"{preset.name} at head_dim {layer.head_dim}", settings, subject.pool)
    return errors
