"""Every benchmark of caches at toy size: whether they run on this machine, not how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from qjl.lab.bench import caches, decode, encode, memory, random_models, throughput
from qjl.lab.bench.gate import BenchSettings
from qjl.lab.bench.synthetic import Shape
from qjl.lab.results import Row
from qjl.presets import PRESETS

TOY, CONTEXT, STEPS = "toy", 256, 2
ROOM = 24 << 20  # bytes, for the toy and tens of sequences
LAYER = 2048  # tokens


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """The name of each benchmark, and what runs it; whole models are a toy with weights at random."""
    preset, dtype = PRESETS["b3"], torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = BenchSettings(Shape(), dtype, device, repeats=1)
    yield "decode", lambda: [decode.time_decoding(preset, LAYER, settings)]
    yield "encode", lambda: [encode.time_encoding(preset, role, LAYER, settings) for role in encode.ROLES]
    toy = random_models.make(TOY, device, dtype)
    rig = caches.build(TOY, toy, [preset], [caches.DYNAMIC], CONTEXT, settings.threads)
    yield "memory", lambda: list(memory.weigh_caches(rig, CONTEXT, STEPS, settings.repeats))
    yield "throughput", lambda: list(throughput.find_throughput(rig, CONTEXT, ROOM, STEPS))
