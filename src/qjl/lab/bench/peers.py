"""Other engines' attention over caches of their own: one thread of a CPU, one sequence.

What an engine gives must first be attention, up to what the numbers of its cache lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

from qjl.errors import QJLError
from qjl.lab.bench import ggml, onnx_runtime, openvino_pages, openvino_state
from qjl.lab.bench.gate import BenchSettings, Inaccurate, relative_error
from qjl.lab.bench.one_token import EngineStep, OneToken

INSTALL = "run `pip install 'qjl[peers]'`"
MOST_ERRORS = {32: 1e-3, 16: 1e-2, 8: 5e-2, 4: 0.5}  # by bits, of normal numbers; without the keys it would be 0.8
SUMMED_IN_HALF = 0.1  # llama.cpp adds up values in float16 where the cache is


@dataclass(frozen=True)
class Peer:
    """An engine with a cache of one kind, of about so many ``bits`` a number; ``modules`` by package."""

    modules: dict[str, str]
    bits: int
    hold: Callable[[OneToken, int], Sequence[EngineStep]]
    most_error: float

    def runs_on(self, device: torch.device) -> bool:
        return not self.missing and device.type == "cpu"

    @property
    def missing(self) -> list[str]:
        """Packages."""
        return [package for package, module in self.modules.items() if find_spec(module) is None]

    def steps(self, name: str, tokens: int, settings: BenchSettings, count: int) -> Sequence[EngineStep]:
        """The same on so many copies.

        Raises:
            Inaccurate: if one of them is not attention.
            QJLError: if the engine cannot run.
        """
        token = OneToken.random(tokens, settings.shape)
        try:
            steps = self.hold(token, count)
            for step in steps:
                step()
        except Exception as error:
            raise QJLError(f"{name} cannot run here ({_first_line(error)}): leave it out with --against.") from error
        expected = token.attention()
        self._require_attention(f"{name} at {tokens} tokens", [relative_error(x.out.float(), expected) for x in steps])
        return steps

    def _require_attention(self, what: str, errors: Iterable[float]) -> None:
        """NaN is none."""
        for error in errors:
            if not error <= self.most_error:
                raise Inaccurate(
                    f"{what} is {error:.1e} off exact attention, where {self.most_error:g} is allowed, "
                    "so no speed is reported."
                )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require_alike(settings: BenchSettings) -> None:
    """Raises QJLError unless a step is one that other engines are asked for."""
    if (settings.threads, settings.shape.batch, settings.device.type) != (1, 1, "cpu"):
        raise QJLError(
            "other engines are compared on one thread of a CPU, over one sequence: "
            "leave out --peers, or --threads, --batch and --device."
        )


def _onnx(bits: int, numbers: onnx_runtime.Numbers) -> Peer:
    modules = {"onnxruntime": "onnxruntime", "onnx": "onnx"}
    return Peer(modules, bits, partial(onnx_runtime.hold, numbers), MOST_ERRORS[bits])


def _openvino(bits: int, precision: str) -> Peer:
    """The faster of two, over a state, but 4 bits: setting a state of those ends the process."""
    engine = openvino_pages if bits == 4 else openvino_state
    return Peer({"openvino": "openvino"}, bits, partial(engine.hold, precision), MOST_ERRORS[bits])


def _llama(bits: int, kind: str) -> Peer:
    most = SUMMED_IN_HALF if kind == "f16" else MOST_ERRORS[bits]
    return Peer({"llama-cpp-python": "llama_cpp", "gguf": "gguf"}, bits, partial(ggml.hold, kind), most)


PEERS = {
    "onnx_fp32": _onnx(32, onnx_runtime.FP32),
    "onnx_fp16": _onnx(16, onnx_runtime.FP16),
    "onnx_int8": _onnx(8, onnx_runtime.INT8),
    "onnx_int4": _onnx(4, onnx_runtime.INT4),
    "openvino_f16": _openvino(16, "f16"),
    "openvino_u8": _openvino(8, "u8"),
    "openvino_u4": _openvino(4, "u4"),
    "llama_f16": _llama(16, "f16"),
    "llama_q8_0": _llama(8, "q8_0"),
    "llama_q4_0": _llama(4, "q4_0"),
}


def missing(names: Iterable[str]) -> list[str]:
    """Packages that these need and that are not installed."""
    return list(dict.fromkeys(package for name in names if name in PEERS for package in PEERS[name].missing))


def packages(names: Iterable[str]) -> list[str]:
    """Of these."""
    return list(dict.fromkeys(package for name in names if name in PEERS for package in PEERS[name].modules))
