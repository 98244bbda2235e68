"""The benches on the triton backend: at toy sizes under the interpreter, and on a GPU where there is one."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from conftest import using_backend
from qjl import cli
from qjl.lab.bench import baselines, caches, devices, throughput
from qjl.ops.triton import runtime

SMALL = ("--head-dim", "64", "--kv-heads", "1", "--group", "2", "--repeats", "1")
TOY = ("--random", "toy", "-p", "turboquant-3", "--against", "dynamic", "--steps", "1")
COMMANDS = {
    "decode": ("decode", "-n", "164", *SMALL, "--batch", "2", "--dtype", "bfloat16", "--against", "flash_bf16"),
    "encode": ("encode", "-p", "b2", "-n", "64", *SMALL),
    "memory": ("memory", *TOY, "-n", "200", "--repeats", "1"),
    "throughput": ("throughput", *TOY, "-n", "200", "--memory", "4M"),
}
on_gpu = pytest.mark.skipif(
    runtime.is_interpreted() or not (runtime.is_installed() and torch.cuda.is_available()),
    reason="there is no GPU on this machine",
)


def rows_of(*arguments):
    result = CliRunner().invoke(cli.app, ["bench", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


class Peaks:
    """Room for one sequence and not for two, whatever the interpreter takes."""

    told = itertools.cycle([1 << 20, 1 << 26])

    def __init__(self, device):
        self.nbytes = next(self.told)

    def restart(self):
        pass


@pytest.mark.skipif(not runtime.is_interpreted(), reason="kernels run here under TRITON_INTERPRET=1 alone")
@pytest.mark.parametrize("name", COMMANDS)
def test_benches_reach_their_end(name, monkeypatch):
    monkeypatch.setattr(baselines, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(devices.OnCPU, "cache_bytes", 1 << 10)
    monkeypatch.setattr(caches, "FITTED", 130)
    monkeypatch.setattr(throughput, "Peak", Peaks)
    with using_backend("triton"):
        rows = rows_of(*COMMANDS[name])
    ours = [row for row in rows if row["backend"] == "triton"]
    assert {row["case"] for row in rows} == {name}
    assert ours
    for row in ours:
        assert row["ms"] > 0
        assert row["max_error"] <= 2e-3
    if name == "memory":
        assert ours[0]["smaller_than_dynamic"] > 1


@on_gpu
@pytest.mark.parametrize("name", COMMANDS)
def test_benches_on_a_gpu(name):
    memory = ("--memory", "8G") if name == "throughput" else ()
    rows = rows_of(*COMMANDS[name], *memory, "--device", "cuda")
    assert {row["device"] for row in rows} == {"cuda"}
    assert {row["backend"] for row in rows} <= {"triton", None}


@on_gpu
def test_a_graph_does_what_it_was_captured_from():
    numbers = torch.arange(8.0, device="cuda")
    work = devices.Captured(lambda: numbers * 2)
    numbers.fill_(3)
    assert work().tolist() == [6.0] * 8


@on_gpu
def test_the_time_of_a_gpu_is_not_that_of_its_launches():
    place = devices.OnGPU(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    place.stopwatch(lambda: matrix @ matrix)
    assert place.stopwatch(lambda: [matrix @ matrix for _ in range(20)]) > 1
