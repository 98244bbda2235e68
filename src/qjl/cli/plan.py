"""Commands that need no weights: presets, plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjl.cli.common import JsonOption, ModelArgument, notes, out, print_json, results_table, times

if TYPE_CHECKING:
    from qjl.plan import Plan, Planner
    from qjl.presets import CacheConfig


def presets(
    head_dim: Annotated[int, typer.Option(min=8, help="Of the model.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; qjl-paper treats the first apart.")] = 32,
    json_output: JsonOption = False,
) -> None:
    """Show all presets, with the true bits of keys and values.

    With --json, one object per preset and line.
    """
    from qjl.presets import DEFAULT_PRESET, PRESETS

    if json_output:
        for preset in PRESETS.values():
            print_json(_preset_fields(preset, head_dim, layers))
        return
    table = results_table("preset", "keys", "values", "average")
    table.add_column("what it is")
    for preset in PRESETS.values():
        keys, values = preset.bits(head_dim, layers)
        name = f"[bold]{preset.name}[/bold]" if preset.name == DEFAULT_PRESET else preset.name
        table.add_row(name, f"{keys:.2f}", f"{values:.2f}", f"{(keys + values) / 2:.2f}", preset.summary)
    table.caption = f"true bits per quantized number, {layers} layers of head_dim {head_dim}"
    out.print(table)


def _preset_fields(preset: CacheConfig, head_dim: int, layers: int) -> dict[str, object]:
    from qjl.presets import DEFAULT_PRESET

    keys, values = preset.bits(head_dim, layers)
    return {
        "preset": preset.name,
        "summary": preset.summary,
        "is_default": preset.name == DEFAULT_PRESET,
        "method_keys": preset.key.method,
        "method_values": preset.value.method,
        "source": preset.source,
        "source_values": preset.value.source,
        "head_dim": head_dim,
        "layers": layers,
        "bits_keys": keys,
        "bits_values": values,
        "bits": (keys + values) / 2,
        "pre_rope": preset.pre_rope,
        "sinks": preset.sinks,
        "recent": preset.recent,
    }


def plan(
    model: ModelArgument,
    memory: Annotated[str, typer.Option(help="Such as 24G (GiB), 80GB or 512M.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of each user.")] = 8192,
    dtype: Annotated[str, typer.Option(help="Of the weights and of exact tokens.")] = "bfloat16",
    json_output: JsonOption = False,
) -> None:
    """Show how many tokens or users fit into memory with each preset.

    Only the configuration is read. With --json, one object per preset and line.
    """
    from qjl.models import as_dtype, load_config
    from qjl.plan import Planner, parse_memory
    from qjl.presets import PRESETS

    available, numbers = parse_memory(memory), as_dtype(dtype)
    planner = Planner(load_config(model, progress=not json_output), numbers)
    plans = [planner.plan(preset, available, context) for preset in PRESETS.values()]
    if json_output:
        for one in plans:
            print_json(_plan_fields(model, planner, one, available))
        return
    out.print(_plan_summary(model, planner, memory, dtype))
    out.print(_plan_table(planner, plans, context))
    if planner.uncounted_layers:
        notes.print(f"The state of {planner.uncounted_layers} layers of constant size is not counted.")


def _plan_fields(model: str, planner: Planner, one: Plan, available: int) -> dict[str, object]:
    return {
        "model": model,
        "preset": one.preset,
        "memory_bytes": available,
        "weights_bytes": planner.weights_bytes,
        "tokens": one.tokens,
        "users": one.users,
        "context": one.context,
        "model_context": planner.model_context,
        "cache_bytes": one.cache_bytes,
        "cache_bytes_full": one.cache_bytes_full,
        "compression": one.compression,
        "bits_keys": one.bits_keys,
        "bits_values": one.bits_values,
    }


def _plan_summary(model: str, planner: Planner, memory: str, dtype: str) -> str:
    quantized = [shape for shape in planner.shapes if shape.is_quantized]
    layers = f"{len(planner.shapes)} layers" + (
        f" ({len(quantized)} quantized)" if len(quantized) < len(planner.shapes) else ""
    )
    heads = f"{quantized[0].num_key_value_heads} KV heads of {quantized[0].head_dim}"
    weights = f"weights {planner.weights_bytes / 2**30:.2f} GiB in {dtype}"
    return f"[bold]{model}[/bold] in {memory}: {layers}, {heads}, {weights}"


def _plan_table(planner: Planner, plans: list[Plan], context: int) -> Any:
    columns = ("tokens for one user", f"users at {context:,} tokens", "MB per user", "compression")
    table = results_table("preset", *columns)
    for one in plans:
        tokens = f"{one.tokens:,}" + (" *" if _is_beyond_context(planner, one) else "")
        table.add_row(one.preset, tokens, f"{one.users:,}", f"{one.cache_bytes / 1e6:,.1f}", times(one.compression))
    table.caption = "counted: weights, codes, exact windows, fitted codecs; activations and room for growth come on top"
    if any(_is_beyond_context(planner, one) for one in plans):
        table.caption += f"; * is more than the model's own context of {planner.model_context:,}"
    return table


def _is_beyond_context(planner: Planner, one: Plan) -> bool:
    return planner.model_context is not None and one.tokens > planner.model_context
