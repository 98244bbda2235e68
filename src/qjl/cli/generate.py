"""Commands that let a model write: generate, chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    sentence,
    speed,
    times,
)
from qjl.errors import QJLError

if TYPE_CHECKING:
    from qjl.generation import Generation


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; from --file or stdin if not given.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A text file with the prompt.")] = None,
    model: ModelOption = EMBEDDED,
    preset: PresetOption = None,
    bits: BitsOption = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Continue a text, and stream it. The preset full is transformers' own cache."""
    from qjl import generation

    text, wanted = _prompt_text(prompt, file), asked(preset, bits)
    sampling = generation.Sampling(temperature, seed)
    network, tokenizer = load(model, device, dtype, json_output=json_output)
    config = configuration(wanted, network, tokenizer)
    cache = generation.make_cache(network, config)
    ids = tokenizer(text, verbose=False).input_ids
    result = generation.generate(
        network,
        tokenizer,
        ids,
        cache,
        max_new_tokens,
        sampling=sampling,
        on_text=(lambda text: None) if json_output else _stream,
    )
    held, full = generation.cache_bytes(cache), generation.bf16_cache_bytes(cache, network.dtype)
    if not json_output:
        typer.echo()
        notes.print(_cache_line(len(result.ids), held, full, result), style="dim")
        return
    print_json(generation_fields(model, config.name, len(ids), result, held, full))


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    from qjl import corpora

    if prompt is not None and file is not None:
        raise QJLError("a prompt and --file were both given: give one of them.")
    if file is not None:
        return corpora.read_text(file)
    if prompt is None and sys.stdin.isatty():
        raise QJLError("there is no prompt: give it as an argument, with --file, or on stdin.")
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise QJLError("the prompt is empty: give some text.")
    return text


def _stream(text: str) -> None:
    typer.echo(text, nl=False)


def _cache_line(tokens: int, held: int, full: int, result: Generation) -> str:
    size = f"{tokens:,} tokens in {megabytes(held)}, in bfloat16 {megabytes(full)} ({times(full / held)})"
    return f"{size}, {speed(result)} tokens/s" if result.tokens_per_second else size


def chat(
    model: ModelOption = EMBEDDED,
    preset: PresetOption = None,
    bits: BitsOption = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Talk with a model on one quantized cache. /new starts over, /exit or Ctrl-D ends.

    Each turn feeds the model only what is new; the size of the cache is shown after it.
    """
    from qjl.conversation import Conversation
    from qjl.generation import Sampling, bf16_cache_bytes, cache_bytes

    wanted, sampling = asked(preset, bits), Sampling(temperature, seed)
    network, tokenizer = load(model, device, dtype)
    config = configuration(wanted, network, tokenizer)
    conversation = Conversation(network, tokenizer, config)
    for message in _messages():
        if message == "/new":
            conversation = Conversation(network, tokenizer, config)
            continue
        try:
            answer = conversation.say(message, max_new_tokens, sampling=sampling, on_text=_stream)
        except QJLError as error:
            notes.print(f"{sentence(error)} Type /new to start over.", markup=False, soft_wrap=True)
            continue
        held = cache_bytes(conversation.cache)
        full = bf16_cache_bytes(conversation.cache, network.dtype)
        typer.echo()
        out.print(_cache_line(len(conversation.ids), held, full, answer), style="dim")


def _messages() -> Iterator[str]:
    """Lines of the user until /exit or the end of input; empty ones do not count."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            message = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if message == "/exit":
            return
        if message:
            yield message
