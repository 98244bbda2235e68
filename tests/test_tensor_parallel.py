"""Two processes share the heads of one model: each packs its own, and the text is that of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qjl
from models_for_tests import generate, prompt, tiny

pytest.importorskip("accelerate", reason="transformers needs it for tp_plan")
TESTS = Path(__file__).parent
WORKER = """
import sys
import torch
from transformers import AutoModelForCausalLM
from models_for_tests import generate, prompt
import qjl
from qjl.hf import statistics_path

torch.set_num_threads(1)
folder, preset = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
model.generation_config.pad_token_id = 0
cache = qjl.KVCache(model, preset)
tokens = generate(model, prompt(), cache=cache)
assert statistics_path(model) is None, "statistics of a part of a model are not kept"
heads = cache.cores[0].pages.heads
torch.save((tokens, heads, cache.packed_tokens), f"{folder}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


def run(processes, *arguments):
    """``torchrun`` on this machine."""
    worker = Path(arguments[0]) / "worker.py"
    worker.write_text(WORKER)
    paths = os.pathsep.join([str(TESTS), str(Path(qjl.__file__).parents[1])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "QJL_CACHE": str(worker.parent)}
    result = subprocess.run(
        [*command, str(worker), *map(str, arguments)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("preset", ["b3"])
def test_two_processes_write_the_text_of_one(tmp_path, monkeypatch, preset):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))
    model = tiny(heads=4, kv_heads=2)
    model.save_pretrained(tmp_path)
    expected = generate(model, prompt(), cache=qjl.KVCache(model, preset))
    run(2, tmp_path, preset)
    for rank in range(2):
        tokens, heads, packed_tokens = torch.load(tmp_path / f"{rank}.pt")
        assert tokens.equal(expected)
        assert heads == 1, "the heads were not shared out"
        assert packed_tokens == [252]
