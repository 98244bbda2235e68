"""vLLM as the server, our plugin switched on in it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import NoReturn

import torch

from qjl.errors import QJLError
from qjl.vllm import PRESET, UNCHANGED
from qjl.vllm.compat import ALLOWED, API_KEY, ATTENTION, PLUGINS, SERVER


def is_installed() -> bool:
    return find_spec("vllm") is not None


def has_plugin() -> bool:
    """Whether vLLM will find ours."""
    return any(point.value.startswith("qjl.") for point in entry_points(group=PLUGINS))


def is_allowed() -> bool:
    """Whether vLLM will load it."""
    allowed = os.environ.get(ALLOWED)
    return allowed is None or "qjl" in allowed.split(",")


def is_ready() -> bool:
    return is_installed() and has_plugin() and is_allowed()


def require_ready() -> None:
    """Raises QJLError if vLLM is missing, does not know our plugin, or is told not to load it."""
    if not is_installed():
        raise QJLError(
            "vLLM is not installed: run `pip install vllm` (`qjl serve` can do without: --engine transformers)."
        )
    if not has_plugin():
        raise QJLError("vLLM does not find this package's plugin: install qjl again, beside vLLM.")
    if not is_allowed():
        raise QJLError(f"{ALLOWED} keeps vLLM from this package's plugin: add qjl to it, or unset it.")


def run(model: str, options: list[str], preset: str, api_key: str | None) -> NoReturn:
    """Become vLLM's server of a model, with more options of ``vllm serve``."""
    environment = os.environ | {PRESET: preset}
    if api_key is not None:
        environment[API_KEY] = api_key
    if torch.cuda.is_available() and preset != UNCHANGED:
        options = [f"--attention-backend={ATTENTION}", *options]
    command = [sys.executable, "-m", SERVER, f"--model={model}", *options]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)
