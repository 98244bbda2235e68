"""The command ``qjl demo``, and how it shows its two texts and its table."""

from __future__ import annotations

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
    asked,
    configuration,
    megabytes,
    notes,
    out,
    print_json,
    results_table,
    speed,
    times,
)
from qjl.lab.cli.shared import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qjl.lab.demo import Comparison, Prompt, Stage
    from qjl.presets import CacheConfig


def demo(
    preset: PresetOption = None,
    bits: BitsOption = None,
    model: ModelOption = EMBEDDED,
    prompt_tokens: Annotated[int, typer.Option(min=320, help="Length of the prompt.")] = 4096,
    max_new_tokens: MaxNewTokens = 64,
    question: Annotated[str | None, typer.Option(help="What to ask about the essay.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Ask about a long essay, with a full-precision cache and with a quantized one, and compare."""
    from qjl.lab import demo as demonstration

    wanted = asked(preset, bits)
    network, tokenizer = load(model, device, dtype or _fast_dtype(device), json_output=json_output)
    config = configuration(wanted, network, tokenizer)
    prompt = demonstration.essay_prompt(tokenizer, prompt_tokens, question or demonstration.QUESTION)
    if json_output:
        result = demonstration.run(network, tokenizer, prompt, config, max_new_tokens)
        print_json({"model": model, "dtype": _name(network.dtype)} | result.to_json())
        return
    _introduce(model, network, prompt)
    with _Screen(config) as screen:
        result = demonstration.run(
            network, tokenizer, prompt, config, max_new_tokens, on_stage=screen.stage, on_text=screen.text
        )
    out.print(_table(result))
    out.print(_explanation(result, _name(network.dtype)), style="dim")


def _fast_dtype(device: str) -> str:
    """bfloat16 where there are instructions for it, else float32."""
    import torch

    has_bfloat16 = device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bfloat16" if has_bfloat16 else "float32"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _introduce(model: str, network: PreTrainedModel, prompt: Prompt) -> None:
    where = f"{_name(network.dtype)} on {network.device}"
    out.print(f"{model} ({where}) reads {len(prompt.ids):,} tokens of an essay by Paul Graham, and is asked:")
    out.print(prompt.question, style="italic", markup=False)


class _Screen:
    """The two texts as they come, with a spinner while the model reads."""

    def __init__(self, preset: CacheConfig) -> None:
        self._preset = f"{preset.name}, {preset.summary}" if preset.summary else preset.name
        self._spinner: Any = None
        self._column = 0

    def stage(self, stage: Stage) -> None:
        self._end_text()
        if stage == "check":
            self._wait("Both caches read on in the essay")
            return
        title = "Full precision, 16 bits per number" if stage == "full" else self._preset
        out.print(f"\n{title}", style="bold", markup=False)
        self._wait("Reading the prompt")

    def text(self, text: str) -> None:
        self._stop_spinner()
        for word in text.splitlines(keepends=True) if "\n" in text else [text]:
            self._write(word)

    def _write(self, word: str) -> None:
        """Break lines between words, which come whole."""
        if self._column and self._column + len(word.rstrip()) > min(out.width, 100):
            out.file.write("\n")
            self._column = 0
        out.file.write(word)
        out.file.flush()
        self._column = 0 if word.endswith("\n") else self._column + len(word)

    def _end_text(self) -> None:
        self._stop_spinner()
        if self._column:
            out.file.write("\n")
            self._column = 0

    def _wait(self, what: str) -> None:
        if notes.is_terminal:
            self._spinner = notes.status(what)
            self._spinner.start()

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._end_text()


def _table(result: Comparison) -> Any:
    table = results_table("", "full precision", result.preset)
    table.add_row("Cache", megabytes(result.cache_bytes_full), megabytes(result.cache_bytes))
    table.add_row("Compression, everything counted", times(1), times(result.compression))
    if result.compression_at_context is not None:
        label = f"  with the context of {result.context:,} full"
        table.add_row(label, times(1), times(result.compression_at_context))
    table.add_row("True bits per quantized number", "16", f"{result.bits:.2f}")
    table.add_row("KL of the next token", "0", f"{result.kl:.3f} nats")
    table.add_row("Same likeliest token", "100 %", f"{100 * result.top1:.0f} %")
    table.add_row("Tokens per second", speed(result.full), speed(result.quantized))
    return table


def _explanation(result: Comparison, dtype: str) -> str:
    exact = f", of which the exact window is in {dtype}" if dtype == "float32" else ""
    return (
        f"Cache: {result.prompt_tokens:,} prompt tokens and the answer, against 16 bits per number{exact}. "
        f"KL and likeliest token: over the next {result.checked_tokens} tokens of the essay, decoded over the "
        "packed codes. Speed: of decoding."
    )
