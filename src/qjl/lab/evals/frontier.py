"""The frontier: what is lost at each size, over every preset whose true bits lie in a range.

It takes hours on a large model, so each row goes to a file as soon as it is measured, and tells its own settings: a
run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qjl.errors import QJLError
from qjl.fingerprints import digest, fingerprint_or_none
from qjl.hf import KVCache
from qjl.lab import machine
from qjl.lab.evals.fidelity import FidelityProtocol, measure_fidelity
from qjl.lab.results import Row
from qjl.presets import CacheConfig, resolve


def parse_bits(text: str) -> tuple[float, float]:
    """The ends of a range such as ``1..8``.

    Raises:
        QJLError: if it is none.
    """
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high:
        raise QJLError(f"bits {text!r} is no range: give the smallest and the largest, such as 1..8.")
    return low, high


def within(
    config: PreTrainedConfig,
    presets: Iterable[str | Path | CacheConfig],
    bits: tuple[float, float],
    on_refusal: Callable[[str, QJLError], None],
) -> list[CacheConfig]:
    """The presets whose true bits on this model lie in the range, smallest first.

    A preset that this model cannot have is told to ``on_refusal``, and left out.

    Raises:
        QJLError: if none is left.
    """
    found = []
    for preset in map(resolve, presets):
        try:
            keys, values = KVCache(config, preset).bits
        except QJLError as error:
            on_refusal(preset.name, error)
            continue
        if bits[0] <= (keys + values) / 2 <= bits[1]:
            found.append(((keys + values) / 2, preset))
    if not found:
        raise QJLError(f"no preset has {bits[0]:g} to {bits[1]:g} true bits on this model: widen --bits.")
    return [preset for _, preset in sorted(found, key=lambda pair: pair[0])]


@dataclasses.dataclass(frozen=True, eq=False)
class Frontier:
    """A model, a text and a protocol: what presets are measured on."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str
    protocol: FidelityProtocol

    @functools.cached_property
    def _weights(self) -> str | None:
        return fingerprint_or_none(self.model)

    def identity(self, preset: CacheConfig) -> Row:
        """All that the row of a preset depends on, but for the versions of packages."""
        return {
            "case": "frontier",
            "model": self.name,
            "fingerprint": self._weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "preset": preset.name,
            "settings": preset.with_window(self.protocol.recent).settings,
            "protocol": dataclasses.asdict(self.protocol) | {"text": digest(self.text)},
        }

    def known(self, preset: CacheConfig, rows: Iterable[Row]) -> Row | None:
        """The last of these rows that was measured just so; with other versions, if it tells them, is not so."""
        identity, versions = self.identity(preset), machine.versions(machine.MODEL_PACKAGES)
        same = [row for row in rows if _holds(row, identity) and _holds(row.get("versions", versions), versions)]
        return same[-1] if same else None

    def measure(
        self, presets: Sequence[CacheConfig], on_tokens: Callable[[int], None], kept: Iterable[Row] = ()
    ) -> Iterator[Row]:
        """A row per preset: one of those ``kept``, or else measured, and told as soon as it is."""
        found = [self.known(preset, kept) for preset in presets]
        missing = [preset for preset, row in zip(presets, found, strict=True) if row is None]
        measured = measure_fidelity(self.model, self.tokenizer, missing, self.text, self.protocol, on_tokens)
        here = {"versions": machine.versions(), "machine": machine.describe(self.model.device)}
        for preset, row in zip(presets, found, strict=True):
            if row is not None:
                on_tokens(self.protocol.tokens)
            yield row or self.identity(preset) | next(measured) | here


def _holds(row: Row, fields: Row) -> bool:
    return all(row.get(name) == value for name, value in fields.items())
