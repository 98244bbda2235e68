"""Commands for prompts that are processed once and kept as files: cache build, cache show, cache use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjl.cli.common import (
    EMBEDDED,
    BitsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxNewTokens,
    ModelOption,
    PresetOption,
    SeedOption,
    TemperatureOption,
    asked,
    configuration,
    generation_fields,
    load,
    megabytes,
    notes,
    out,
    print_json,
    progress,
    require_writable,
    results_table,
    speed,
    times,
)
from qjl.errors import QJLError

if TYPE_CHECKING:
    from qjl.cache.file import CacheFile
    from qjl.hf import KVCache

_CacheArgument = Annotated[Path, typer.Argument(help="A file that `qjl cache build` or cache.save() wrote.")]


def build(
    file: Annotated[Path, typer.Argument(help="A UTF-8 text file with the prompt.")],
    output: Annotated[
        Path | None, typer.Option("--out", "-o", show_default="FILE.qjl", help="The prompt cache to write.")
    ] = None,
    model: ModelOption = EMBEDDED,
    preset: PresetOption = None,
    bits: BitsOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Process a prompt once, and keep its quantized cache in a file."""
    from qjl import corpora, generation, hf
    from qjl.cache.file import CacheFile
    from qjl.container import SUFFIX

    text, wanted = corpora.read_text(file), asked(preset, bits)
    path = output or file.with_suffix(SUFFIX)
    if path.exists() and path.samefile(file):
        raise QJLError(f"{path} is the prompt itself: name another file by --out.")
    require_writable(path)
    network, tokenizer = load(model, device, dtype, json_output=json_output)
    cache = hf.KVCache(network, configuration(wanted, network, tokenizer))
    ids = tokenizer(text, verbose=False).input_ids
    generation.require_context(network, len(ids))
    start = time.perf_counter()
    with progress("Reading", len(ids), quiet=json_output) as advance:
        generation.prefill(network, ids, cache, advance)
    seconds = time.perf_counter() - start
    cache.save(path, ids)
    told = _fields(path, CacheFile(path)) | {"prefill_seconds": seconds}
    if json_output:
        print_json(told)
    else:
        notes.print(f"{path}: {_size_line(told)}, read in {seconds:.1f} s", style="dim", markup=False, soft_wrap=True)


def show(file: _CacheArgument, json_output: JsonOption = False) -> None:
    """Show what is in a prompt cache, after a check of every byte."""
    from qjl.cache.file import CacheFile

    stored = CacheFile(file)
    stored.verify()
    told = _fields(file, stored)
    if json_output:
        print_json(told)
        return
    table = results_table(str(file), "")
    for name in ("preset", "model", "dtype", "fingerprint", "codecs", "qjl"):
        table.add_row(name, str(told[name]))
    table.add_row("rows x tokens", f"{told['rows']} x {told['tokens']:,}")
    for name in ("cache_bytes", "cache_bytes_full", "file_bytes"):
        table.add_row(_SIZES[name], megabytes(told[name]))
    table.add_row("compression", times(told["compression"]))
    out.print(table)


def use(
    file: _CacheArgument,
    question: Annotated[str, typer.Argument(help="The text that follows the prompt.")],
    model: ModelOption = EMBEDDED,
    max_new_tokens: MaxNewTokens = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Continue a kept prompt with a question, which alone is read by the model."""
    from qjl import generation, hf

    sampling = generation.Sampling(temperature, seed)
    if not question.strip():
        raise QJLError("the question is empty: give some text.")
    network, tokenizer = load(model, device, dtype, json_output=json_output)
    start = time.perf_counter()
    cache = hf.KVCache.load(file, network)
    seconds = time.perf_counter() - start
    ids = _prompt_ids(file, cache) + tokenizer(question, add_special_tokens=False, verbose=False).input_ids
    result = generation.generate(
        network,
        tokenizer,
        ids,
        cache,
        max_new_tokens,
        sampling=sampling,
        on_text=(lambda text: None) if json_output else lambda text: typer.echo(text, nl=False),
    )
    full = generation.bf16_cache_bytes(cache, network.dtype)
    if not json_output:
        typer.echo()
        notes.print(f"{len(result.ids):,} tokens, loaded in {seconds:.3f} s, {speed(result)} tokens/s", style="dim")
        return
    told = generation_fields(model, cache.config.name, len(ids), result, cache.nbytes, full)
    print_json(told | {"load_seconds": seconds})


_SIZES = {"cache_bytes": "in memory", "cache_bytes_full": "in bfloat16", "file_bytes": "on disk"}


def _fields(path: Path, stored: CacheFile) -> dict[str, Any]:
    header = stored.header
    return {
        "file": str(path),
        "preset": header.configuration["name"],
        "model": header.model,
        "dtype": header.dtype,
        "fingerprint": header.fingerprint,
        "codecs": header.codecs,
        "token_sha256": header.token_sha256,
        "qjl": header.qjl,
        "rows": header.rows,
        "tokens": header.tokens,
        "cache_bytes": header.cache_bytes,
        "cache_bytes_full": header.bf16_bytes,
        "file_bytes": len(stored),
        "compression": header.bf16_bytes / len(stored),
    }


def _size_line(told: dict[str, Any]) -> str:
    sizes = f"{megabytes(told['file_bytes'])}, in bfloat16 {megabytes(told['cache_bytes_full'])}"
    return f"{told['tokens']:,} tokens in {sizes} ({times(told['compression'])})"


def _prompt_ids(path: Path, cache: KVCache) -> list[int]:
    if cache.prompt_ids is None or len(cache.prompt_ids) > 1:
        raise QJLError(f"prompt cache {path} has no token ids of one prompt: save it with token_ids.")
    return cache.prompt_ids[0].tolist()
