"""Decode steps over pages in no order and sequences of several lengths, and FlashInfer beside them."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from conftest import using_backend
from qjl import cli
from qjl.attention import Scoring
from qjl.lab.bench import baselines, devices, flashinfer
from qjl.lab.bench.flashinfer import FlashInferStep
from qjl.lab.bench.gate import Inaccurate, relative_error
from qjl.lab.bench.paged_steps import PagedStep
from qjl.lab.bench.synthetic import Shape, fill
from qjl.presets import PRESETS

SHAPE = Shape(head_dim=64, kv_heads=2, group=2, batch=2)
SCORING = Scoring(SHAPE.scaling)
SMALL = (
    "-n",
    "400",
    "--head-dim",
    "64",
    "--kv-heads",
    "2",
    "--group",
    "2",
    "--repeats",
    "1",
    "--against",
    "torch_fp32",
)


@pytest.fixture(scope="module")
def layer():
    with using_backend("reference"):
        yield fill(PRESETS["b2"], 400, SHAPE, torch.float32)


@pytest.mark.parametrize("page", [16, 32, 64])
def test_pages_hold_the_tokens_of_the_cache(page, layer, backend):
    step = PagedStep.of(layer, page, [400, 400], SCORING)
    with using_backend("reference"):
        expected = layer.attend(SCORING)
    assert step.pool.page == page
    table = step.rows.table.flatten().tolist()
    assert sorted(table) == list(range(len(table))) != table
    for one in step.copies(2):
        assert relative_error(one.attend(SCORING), expected) < 2e-2
    assert (step.nbytes, step.packed_bytes) == (layer.nbytes, layer.packed_bytes)


def test_a_shorter_sequence_reads_less_and_leaves_the_others_as_they_are(layer, reference_backend):
    whole, ragged = (PagedStep.of(layer, 16, lengths, SCORING) for lengths in ([400, 400], [200, 400]))
    assert ragged.lengths[1] - ragged.lengths[0] == 200
    assert whole.packed_bytes - ragged.packed_bytes == 200 * whole.packed_bytes // sum(whole.lengths)
    out, full = ragged.attend(SCORING), whole.attend(SCORING)
    assert torch.equal(out[1], full[1])
    assert relative_error(out[0], full[0]) > 1e-2


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(devices.OnCPU, "cache_bytes", 1 << 16)
    monkeypatch.setattr(baselines, "READ_BYTES", 1 << 20)


def run(*words):
    return CliRunner().invoke(cli.app, ["bench", "decode", "-p", "b2", *SMALL, *words])


def test_rows_tell_pages_and_lengths(small_machine):
    plain, ragged = (
        json.loads(run("--batch", "2", *words, "--json").stdout) for words in ((), ("--pages", "16", "--ragged"))
    )
    assert (plain["page"], plain["lengths"]) == (None, None)
    assert (ragged["page"], ragged["lengths"]) == (16, [200, 400])
    assert plain.keys() == ragged.keys()
    assert ragged["operations"] == plain["operations"] * 3 // 4


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--pages", "48"), "pages of 48 tokens cannot be made here"),
        (("--ragged",), "--ragged needs sequences of several lengths"),
        (("--ragged", "--batch", "8"), "the shortest sequence, of 50 tokens, would have too few to pack"),
        (("--against", "flashinfer_bf16"), "flashinfer_bf16 needs FlashInfer: run `pip install flashinfer-python`"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, why, small_machine, monkeypatch):
    monkeypatch.setattr(flashinfer, "is_installed", lambda: False)
    result = run(*words)
    assert result.exit_code == 2
    assert why in result.stderr


# FlashInfer


class Wrapper:
    """What stands in for FlashInfer's: attention of torch over the pages that the plan tells."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert layout == "NHD"
        assert use_tensor_cores

    def plan(self, ends, pages, last, query_heads, heads, head_dim, page, *, sm_scale, **numbers):
        assert {ends.dtype, pages.dtype, last.dtype} == {torch.int32}
        self.told = SimpleNamespace(
            ends=ends.tolist(), pages=pages.long(), last=last.tolist(), page=page, scale=sm_scale
        )

    def run(self, query, pools):
        told, out = self.told, torch.empty_like(query)
        for row, (start, stop) in enumerate(zip(told.ends, told.ends[1:], strict=False)):
            length = (stop - start - 1) * told.page + told.last[row]
            keys, values = (x[told.pages[start:stop]].flatten(0, 1)[:length].transpose(0, 1).float() for x in pools)
            rows = query[row].unflatten(0, (keys.shape[0], -1)).float()
            weights = (rows @ keys.transpose(1, 2) * told.scale).softmax(-1)
            out[row] = (weights @ values).flatten(0, 1)
        return out


@pytest.mark.parametrize("lengths", [[100], [33, 64, 1]])
def test_flashinfer_is_given_pages_as_it_takes_them(lengths, monkeypatch):
    stand_in = ModuleType("flashinfer")
    stand_in.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    step = FlashInferStep.random(SHAPE, lengths, 16, torch.device("cpu"))
    assert step.keys.shape[0] == sum(-(-length // 16) for length in lengths)
    step.require_attention()
    monkeypatch.setattr(Wrapper, "run", lambda wrapper, query, pools: torch.zeros_like(query))
    with pytest.raises(Inaccurate):
        step.require_attention()


def test_a_gpu_is_compared_with_flashinfer_where_that_is_installed(monkeypatch):
    for is_installed in (True, False):
        monkeypatch.setattr(flashinfer, "is_installed", lambda found=is_installed: found)
        assert ("flashinfer_bf16" in devices.OnGPU(torch.device("cuda")).baselines) == is_installed
