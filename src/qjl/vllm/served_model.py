"""What the plugin knows of a served model: its preset, its statistics, and the codecs of its layers."""

from __future__ import annotations

import os
from functools import cache, cached_property, partial
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from qjl.architecture import ropes_of
from qjl.codecs import Codecs, Pair, TokenShape
from qjl.errors import QJLError
from qjl.fingerprints import fingerprint_of_folder
from qjl.methods.base import Quantizer
from qjl.presets import CacheConfig, resolve
from qjl.rope import Rope
from qjl.statistics import LayerStatistics, StatisticsFile, path_of
from qjl.vllm import PRESET, chosen_preset
from qjl.vllm.paged_layer import page_bytes

STATISTICS = "QJL_VLLM_STATISTICS"


@cache
def chosen_config() -> CacheConfig:
    """The preset that the environment asks for.

    Raises:
        QJLError: if there is none of that name, or vLLM's pages cannot hold its codes.
    """
    config = resolve(chosen_preset())
    if config.pre_rope:
        raise QJLError(f"preset {config.name} quantizes keys before RoPE, which vLLM's pages do not serve: {_CHOOSE}")
    return config


_CHOOSE = f"choose another {PRESET}, such as b3."


def bytes_per_token(head_dim: int) -> int:
    """Bytes that a token takes in the pages of one head: the same in all layers, enough for the widest.

    Raises:
        QJLError: if the preset's codes have no value per token.
    """
    return max(page_bytes([quantizer.layout(head_dim) for quantizer in pair]) for pair in _pairs(chosen_config()))


def needs_statistics(config: CacheConfig) -> bool:
    """Whether any layer's codes are fitted to a model."""
    return any(quantizer.needs_statistics for pair in _pairs(config) for quantizer in pair)


def _pairs(config: CacheConfig) -> set[tuple[Quantizer, Quantizer]]:
    changes = {0, *(layer for one in config.overrides for layer in (one.first, one.stop))}
    return {config.for_layer(layer) for layer in changes}


class ServedModel:
    """A model by its folder, or its name on the hub."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name = name
        self.folder = Path(name) if Path(name).is_dir() else _snapshot(name, revision)
        self._codecs: dict[tuple[int, int], Codecs] = {}  # by the heads that they are of

    def codecs(self, layer: int, heads: slice, shape: TokenShape) -> Pair:
        """Of keys and values, fitted to some KV heads of a layer.

        Raises:
            QJLError: if the model was not calibrated, or the preset's codes are no nibbles that heads share.
        """
        codecs = self._codecs.setdefault(
            (heads.start, heads.stop),
            Codecs(chosen_config(), self._ropes, partial(self._statistics, heads=heads)),
        )
        pair = codecs.of(layer, shape)
        assert pair is not None
        _require_nibbles(pair, codecs.quantizers(layer))
        return pair

    @cached_property
    def _ropes(self) -> dict[int, Rope | None]:
        return ropes_of(AutoConfig.from_pretrained(self.folder, local_files_only=True))

    def _statistics(self, layer: int, heads: slice) -> LayerStatistics:
        measured = self._statistics_file.layer(layer)
        if measured is None:
            raise QJLError(f"{self._statistics_file.path} tells nothing of layer {layer}: run `qjl calibrate` again.")
        return measured.of_heads(heads)

    @cached_property
    def _statistics_file(self) -> StatisticsFile:
        path = self.statistics_path
        if not path.exists():
            raise QJLError(f"{self.name} has no statistics in {path.parent} yet: run `qjl calibrate {self.name}`.")
        return StatisticsFile(path, path.stem)

    @cached_property
    def statistics_path(self) -> Path:
        """Where its statistics are, or will be.

        Raises:
            QJLError: if its files do not tell which model it is.
        """
        named = os.environ.get(STATISTICS)
        if named:
            return Path(named)
        fingerprint = fingerprint_of_folder(self.folder)
        if fingerprint is None:
            raise QJLError(
                f"the files of {self.name} do not tell which model it is: run `qjl calibrate` with the model it was "
                f"made from, and name the file that it writes in {STATISTICS}."
            )
        return path_of(fingerprint)


def _require_nibbles(codecs: Pair, quantizers: tuple[Quantizer, Quantizer]) -> None:
    for codec, quantizer in zip(codecs, quantizers, strict=True):
        if codec.form is None:
            raise QJLError(
                f"{quantizer.method} has no codes that are read as they are, as vLLM's pages need: {_CHOOSE}"
            )
    if not codecs[1].form.has_shared_code:  # type: ignore[union-attr]
        raise QJLError(f"{quantizers[1].method} gives each head of the values its own code: {_CHOOSE}")


def _snapshot(name: str, revision: str | None) -> Path:
    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
