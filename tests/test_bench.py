"""The benchmarks: their baselines are right, their gate shuts, and their rows say what was measured."""

import io
import json
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention.flex_attention import flex_attention
from typer.testing import CliRunner

import tiny_checkpoint
from one_layer import exact_of, pages_of
from qjl import attention, cli, corpora, models, ops
from qjl.cache.paged import Fitted, PagedCache
from qjl.codecs import Codecs
from qjl.compat import cache_argument
from qjl.errors import QJLError
from qjl.lab import plots
from qjl.lab.bench import (
    baselines,
    caches,
    decode,
    devices,
    encode,
    endtoend,
    faiss_scans,
    kernels,
    llama,
    peak,
    peers,
    random_models,
    throughput,
    timing,
)
from qjl.lab.bench.gate import (
    BenchSettings,
    Inaccurate,
    RowErrors,
    relative_error,
    require_accurate,
    require_right,
    require_within_budget,
    using_backend,
)
from qjl.lab.bench.one_token import EngineStep, OneToken
from qjl.lab.bench.synthetic import DISTINCT, FilledLayer, Maker, Shape, fill
from qjl.lab.plots import decode_step, style
from qjl.lab.rows import typed
from qjl.ops.cpu import library
from qjl.presets import PRESETS
from report_rows import decode as decode_row

pytestmark = pytest.mark.skipif(not library.is_installed(), reason="needs the compiled baselines")

FIELDS = (
    *("case", "backend", "preset", "tokens", "head_dim", "ms"),
    *("ratio_torch_bf16", "ratio_torch_fp32", "ratio_fp16_avx2", "fraction_of_bandwidth", "max_error"),
)
SMALL = ("--head-dim", "64", "--kv-heads", "2", "--group", "2", "--repeats", "3")
OWN = ("--against", "dynamic")
SHAPE = Shape(head_dim=64, kv_heads=2, group=2)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Caches and reads of a few kilobytes, so that few copies are made."""
    monkeypatch.setattr(devices.OnCPU, "cache_bytes", 1 << 16)
    monkeypatch.setattr(baselines, "READ_BYTES", 1 << 20)


@pytest.fixture
def reference():
    with using_backend("reference"):
        yield


@pytest.fixture
def compiled():
    with using_backend("cpu"):
        yield


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *arguments])


def rows_of(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


# Baselines


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("heads", "group", "tokens", "head_dim"),
    [(2, 4, 500, 128), (3, 3, 77, 64), (1, 7, 333, 80), (2, 1, 1, 8), (1, 2, 33, 256), (1, 5, 50, 512), (2, 4, 16, 96)],
)
def test_flash_decode_is_attention(heads, group, tokens, head_dim, threads, generator):
    query = 3 * torch.randn(heads, group, head_dim, generator=generator)
    keys, values = torch.randn(2, heads, tokens, head_dim, generator=generator).half()
    scores = query.double() @ keys.double().transpose(1, 2) * head_dim**-0.5
    expected = scores.softmax(-1) @ values.double()
    with timing.use_threads(threads):
        out = baselines.flash_decode(query[None], keys[None], values[None], head_dim**-0.5)
    assert relative_error(out[0], expected) < 3e-6


def test_flash_decode_of_scores_that_overflow_an_exponential(generator):
    query, (keys, values) = torch.full((1, 1, 64), 40.0), torch.randn(2, 1, 100, 64, generator=generator).half()
    expected = (query.double() @ keys.double().transpose(1, 2)).softmax(-1) @ values.double()
    out = baselines.flash_decode(query[None], keys[None], values[None], 1.0)
    assert relative_error(out[0], expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_attention_is_that_of_every_query_head(dtype, generator):
    query, keys, values = (torch.randn(2, n, 64, generator=generator).to(dtype) for n in (3, 100, 100))
    out = baselines.grouped_attention(query[None], keys[None], values[None], 0.125)[0]
    for head in range(3):
        alone = (query[:, head, None].double() @ keys.double().transpose(1, 2) * 0.125).softmax(-1) @ values.double()
        assert relative_error(out[:, head, None], alone) < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "group", "m"), [(2, 4, 128), (2, 3, 256), (1, 5, 512), (1, 4, 1024)])
def test_popcount_scan_scores_queries_of_four_bits(heads, group, m, threads, generator):
    rows, query = baselines.SignRows.random(heads, 64, m), torch.randn(heads, group, m, generator=generator)
    signs = torch.from_numpy(np.unpackbits(rows.signs.numpy(), axis=-1, bitorder="little")).double() * 2 - 1
    assert torch.equal(rows.ones.double(), (signs > 0).double().sum(-1))
    lowest = query.amin(-1, keepdim=True)
    step = (query.amax(-1, keepdim=True) - lowest) / 15
    levels = ((query - lowest) / step + 0.5).floor()
    expected = (lowest + step * levels).double() @ signs.transpose(1, 2) * rows.scale[:, None]
    with timing.use_threads(threads):
        assert relative_error(baselines.popcount_scan(query, rows), expected) < 1e-4


def test_a_read_reads_everything():
    reader = baselines.Reader()
    with timing.use_threads(2):
        assert reader().sum() == reader.nbytes / 4


def test_the_popcount_scan_is_not_asked_for_what_it_cannot_do():
    assert [m for m in (8, 128, 192, 256, 384, 512, 4096) if baselines.SignRows.takes(m)] == [128, 256, 512]


@pytest.mark.skipif(not faiss_scans.is_installed(), reason="needs faiss-cpu")
def test_faiss_scans_with_equally_many_bits():
    for name in (faiss_scans.PQ, faiss_scans.RABITQ):
        (work,) = faiss_scans.works(name, 128, 4096, SHAPE, copies=1)
        (distances, _), *others = work()
        assert distances.shape == (SHAPE.group, faiss_scans.TOP)
        assert len(others) == SHAPE.kv_heads - 1
    assert faiss_scans.works(faiss_scans.PQ, 512, 4096, SHAPE, copies=1) == []


@pytest.mark.parametrize("attend", [baselines.flash_attention, baselines.flexible_attention])
def test_what_a_gpu_is_compared_with_is_attention_too(attend, monkeypatch, generator):
    monkeypatch.setattr(baselines, "_compiled_flex_attention", lambda: flex_attention)
    query, keys, values = (torch.randn(2, 3, n, 64, generator=generator).bfloat16() for n in (4, 128, 128))
    out = attend(query, keys, values, 0.125)
    assert relative_error(out, baselines.grouped_attention(query, keys, values, 0.125)) < 0.02


def test_what_does_not_compile_is_not_compared_with(monkeypatch):
    def broken():
        raise TorchDynamoException

    monkeypatch.setattr(baselines, "_compiled_flex_attention", broken)
    result = run("decode", "-n", "200", *SMALL, "--against", "flash_bf16", "--against", "flex_bf16", "--json")
    (row,) = rows_of(result)
    assert row["ratio_flash_bf16"] > 0
    assert row["ratio_flex_bf16"] is None
    assert "Not compared at b3, 200 tokens: flex_bf16." in result.stderr


# Peers


@pytest.fixture
def token():
    return OneToken.random(200, SHAPE)


@pytest.fixture
def settings():
    return BenchSettings(SHAPE, against=("fake",))


def fake(error=0.0, most_error=0.05, packages=("qjl",)):
    """An engine in full precision that errs by so much."""

    def hold(token, count):
        return [EngineStep(lambda: None, (1 + error) * token.attention(), None) for _ in range(count)]

    return peers.Peer(dict.fromkeys(packages, "qjl" if packages == ("qjl",) else "no_such_engine"), 8, hold, most_error)


def installed(name):
    if absent := peers.missing([name]):
        pytest.skip(f"needs {', '.join(absent)}")
    return peers.PEERS[name]


@pytest.mark.parametrize("tokens", [200, 333])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 2, 64), (1, 3, 128)])
@pytest.mark.parametrize("name", peers.PEERS)
def test_what_engines_compute_is_attention(name, kv_heads, group, head_dim, tokens):
    peer = installed(name)
    shape = Shape(head_dim, kv_heads, group)
    first, second = peer.steps(name, tokens, BenchSettings(shape), count=2)
    held = second.out.clone()
    first.out.zero_()
    first()
    assert torch.isfinite(first.out).all()
    assert first.out.abs().max() > 0
    assert torch.equal(second.out, held)


@pytest.mark.parametrize("name", peers.PEERS)
def test_engines_work_on_the_thread_that_is_timed(name):
    peer = installed(name)
    with timing.use_threads(1):
        (step,) = peer.steps(name, 4096, BenchSettings(Shape()), count=1)
        thread, process = time.thread_time(), time.process_time()
        for _ in range(10):
            step()
        assert time.thread_time() - thread > 0.7 * (time.process_time() - process)


def test_a_token_has_exact_attention(token):
    for head in range(token.heads):
        scores = token.query[head].double() @ token.keys[head].double().T * token.scaling
        assert relative_error(token.attention()[head], scores.softmax(-1) @ token.values[head].double()) < 1e-5


@pytest.mark.parametrize("name", peers.PEERS)
def test_values_without_scores_are_not_within_what_a_cache_may_lose(name):
    token = OneToken.random(4096, SHAPE)
    mean = token.values.mean(1, keepdim=True).expand(token.query.shape)
    assert relative_error(mean, token.attention()) > peers.PEERS[name].most_error


def with_peer(monkeypatch, peer):
    monkeypatch.setitem(decode.PEERS, "fake", peer)
    monkeypatch.setitem(decode.OTHERS, "fake", peer)


def test_a_peer_is_timed_like_every_other(monkeypatch):
    with_peer(monkeypatch, fake(0.04))
    (row,) = rows_of(run("decode", "-n", "200", *SMALL, "--against", "fake", "--against", "torch_fp32", "--json"))
    read = typed(row)
    assert read.ratios["fake"] == row["ratio_fake"] == pytest.approx(row["ms_fake"] / row["ms"], rel=5)
    assert read.ratios["torch_fp32"] > 0
    assert row["spread_fake"][0] <= row["ratio_fake"] <= row["spread_fake"][1]


@pytest.mark.parametrize("error", [0.06, 1.0, float("nan")])
def test_a_peer_that_computes_something_else_gives_no_speed(error, monkeypatch):
    with_peer(monkeypatch, fake(error))
    result = run("decode", "-n", "200", *SMALL, "--against", "fake", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "fake at 200 tokens is" in result.stderr
    assert "off exact attention, where 0.05 is allowed, so no speed is reported." in result.stderr


def test_one_wrong_copy_is_enough(settings):
    def hold(token, count):
        return [*fake().hold(token, 1), *fake(0.2).hold(token, 1)]

    peer = peers.Peer({}, 8, hold, 0.05)
    with pytest.raises(Inaccurate):
        peer.steps("fake", 200, settings, 2)


def test_a_peer_that_cannot_run_says_why(monkeypatch):
    def broken(token, count):
        raise RuntimeError("\n no such kernel\nat line 5")

    with_peer(monkeypatch, peers.Peer({}, 8, broken, 0.05))
    result = run("decode", "-n", "200", *SMALL, "--against", "fake")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "fake cannot run here (no such kernel): leave it out with --against." in result.stderr


def test_peers_that_are_not_installed_are_left_out_and_named(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"fake": fake(packages=("quick-engine",))})
    with_peer(monkeypatch, peers.PEERS["fake"])
    result = run("decode", "-n", "200", *SMALL, "--peers", "--json")
    (row,) = rows_of(result)
    assert row["ratio_fake"] is None
    assert row["ratio_torch_bf16"] > 0
    assert "Not compared at b3, 200 tokens: fake.\n" in result.stderr
    assert result.stderr.endswith("Not installed: quick-engine: run `pip install 'qjl[peers]'`.\n")


# Timing


def test_everything_is_timed_once_a_round_on_copies_in_turn():
    done = []
    works = {
        "a": [lambda: done.append("a0"), lambda: done.append("a1"), lambda: done.append("a2")],
        "b": [lambda: done.append("b")],
    }
    heard = []
    timings = timing.interleave(works, 5, 1, lambda: heard.append(len(done)))
    assert heard == [2, 4, 6, 8, 10, 12]
    assert [name for name in done if name != "b"] == ["a0", "a1", "a2", "a0", "a1", "a2"]
    assert {tuple(name[0] for name in done[first : first + 2]) for first in range(0, 12, 2)} == {("a", "b"), ("b", "a")}
    assert len(timings.rounds["a"]) == len(timings.rounds["b"]) == 5


def test_ratios_are_taken_round_by_round():
    timings = timing.Timings({"slow": [4.0, 30.0, 6.0], "fast": [2.0, 10.0, 1.0]})
    assert timings.ratio("slow", "fast") == timing.Spread(2.5, 3.0, 4.5)
    assert timings.ratio("absent", "fast") is None
    assert timings.difference("slow", "fast") == timing.Spread(3.5, 5.0, 12.5)
    assert (timings.ms("slow"), timings.least_ms("slow")) == (6.0, 4.0)
    assert timing.spread([2.0]) == timing.Spread(2.0, 2.0, 2.0)


def test_copies_fill_the_caches_twice():
    place = devices.OnCPU(threads=1)
    assert [devices.copies_for(nbytes, place) for nbytes in (1 << 20, 1 << 17, 1 << 16, 50_000)] == [1, 1, 2, 3]


def test_work_of_another_process_is_timed_by_the_wall():
    works = {"elsewhere": [lambda: time.sleep(0.02)]}
    assert timing.interleave(works, 1, threads=1).ms("elsewhere") < 10
    assert timing.interleave(works, 1, threads=1, stopwatch=timing.wall_ms).ms("elsewhere") >= 20


@pytest.mark.parametrize("power", [0.5, 1.0, 1.3])
def test_the_exponent_of_growth(power, refuses):
    sizes = [2**n for n in range(10, 20)]
    assert timing.exponent(sizes, [3e-4 * size**power for size in sizes]) == pytest.approx(power)
    with refuses("an exponent needs times at two sizes"):
        timing.exponent([8, 8], [1.0, 2.0])


# Synthetic layers


def test_a_short_layer_is_one_that_took_its_tokens_itself():
    config, tokens = PRESETS["b3"], 300
    subject = fill(config, tokens, SHAPE, torch.float32)
    maker = Maker(SHAPE)
    statistics = maker.statistics()
    codecs = Codecs(config, {0: maker.rope}, lambda layer: statistics)
    expected = PagedCache([0], config.sinks, config.recent, Fitted(codecs))
    expected.append(expected.layers[0], maker.keys(torch.arange(tokens - 1)[None]), maker.values(tokens - 1))
    expected.settle()
    assert subject.cache.index.columns == expected.index.columns == tokens - 1, "the last one is in a pass"
    caches = subject.cache, expected
    ours, theirs = (pages_of(cache.index, cache.layers[0]) for cache in caches)
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))
    numbers, *exact = zip(*(exact_of(cache.index, cache.layers[0]) for cache in caches), strict=True)
    assert numbers[0] == numbers[1]
    assert all(torch.equal(*pair) for pair in exact)


@pytest.mark.parametrize("preset", ["b3", "b3-pre", "kivi-2", "full"])
def test_a_long_layer_repeats_codes_at_positions_of_their_own(preset):
    config = PRESETS[preset]
    subject = fill(config, 3 * DISTINCT + 70, SHAPE, torch.float32)
    index = subject.cache.index
    assert index.columns == 3 * DISTINCT + 69
    assert index.blocks == [(index.columns - config.recent) // 64] * index.batch
    for field in pages_of(index, subject.layer):
        repeat, same = DISTINCT // 64, DISTINCT // 64 - 4  # behind these stand tokens of the last stretch
        assert torch.equal(field[repeat : repeat + same], field[2 * repeat : 2 * repeat + same])
    assert torch.isfinite(subject.attend(attention.Scoring(0.125))).all()


def test_copies_have_bytes_of_their_own():
    subject = fill(PRESETS["b2"], 300, SHAPE, torch.float32)
    first, second = subject.copies(2)
    pointers = {one.layer.pages.fields[0]["codes"].data_ptr() for one in (first, second)}
    assert len(pointers) == 2
    assert first.layer.codecs is second.layer.codecs


def test_too_few_tokens_are_refused(refuses):
    with refuses("keeps the last of 96 tokens exact and packs none: give 97 or more"):
        fill(PRESETS["b3"], 96, SHAPE, torch.float32)


# bench decode


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_decode_tells_what_it_measured(backend):
    with using_backend(backend):
        rows = rows_of(run("decode", "-p", "b3", "-p", "b2", "-n", "200", "-n", "333", *SMALL, "--json"))
    assert [(row["preset"], row["tokens"]) for row in rows] == [("b3", 200), ("b3", 333), ("b2", 200), ("b2", 333)]
    for row in rows:
        assert set(FIELDS) <= row.keys()
        assert (row["case"], row["backend"], row["head_dim"], row["threads"]) == ("decode", backend, 64, 1)
        assert 0 <= row["rms_error"] <= row["max_error"] <= (2e-2 if backend == "cpu" else 1e-4)
        for name in ("torch_bf16", "torch_fp32", "fp16_avx2"):
            low, high = row[f"spread_{name}"]
            assert 0 < low <= row[f"ratio_{name}"] <= high
        subject = fill(PRESETS[row["preset"]], row["tokens"], SHAPE, torch.float32)
        subject.attend(attention.Scoring(0.125))
        assert row["bytes"] == subject.cache.nbytes
        assert row["fraction_of_bandwidth"] == pytest.approx(row["bytes"] / row["ms"] / row["bandwidth_gbs"] / 1e6)
        assert row["operations"] == 4 * 4 * 64 * row["tokens"]
        assert typed(row).kernel_ms == row["kernel_ms"]
        assert (row["kernel_ms"] is None) == (backend == "reference")


@pytest.mark.usefixtures("compiled")
def test_only_calls_into_the_library_count_as_kernels():
    query, (keys, values) = torch.randn(1, 1, 1, 64), torch.randn(2, 1, 1, 4096, 64).half()
    rounds = []
    called = library.call

    def work():
        time.sleep(0.02)
        baselines.flash_decode(query, keys, values, 1.0)

    timing.add_kernels(rounds, time.perf_counter_ns, work)
    timing.add_kernels(rounds, time.perf_counter_ns, lambda: time.sleep(0.02))
    assert 0 < rounds[0] < 20
    assert rounds[1] == 0
    assert library.call is called


def test_what_a_layer_makes_once_is_made_before_it_is_timed(monkeypatch):
    own, steps = FilledLayer.attend, Counter()

    def attend(subject, scoring):
        steps[id(subject)] += 1
        return own(subject, scoring)

    def only_what_is_made(works, *arguments):
        assert min(steps.values()) >= 1
        assert len(steps) >= len(works["qjl"])
        raise QJLError("enough")

    monkeypatch.setattr(FilledLayer, "attend", attend)
    monkeypatch.setattr(decode, "interleave", only_what_is_made)
    with pytest.raises(QJLError, match="enough"):
        decode.time_decoding(PRESETS["b3"], 200, BenchSettings(SHAPE))


def test_a_batch_is_so_many_layers_in_one():
    (one,) = rows_of(run("decode", "-n", "200", *SMALL, "--json"))
    (three,) = rows_of(run("decode", "-n", "200", *SMALL, "--batch", "3", "--json"))
    assert three["batch"] == 3
    for field in ("bytes", "packed_bytes", "operations"):
        assert three[field] == 3 * one[field]
    assert three["exact_tokens"] == one["exact_tokens"]


@pytest.mark.usefixtures("compiled")
def test_the_gate_does_not_see_the_rounding_of_bfloat16(monkeypatch):
    seen, own = [], FilledLayer.attend

    def attend(subject, scoring):
        seen.append(own(subject, scoring).dtype)
        return own(subject, scoring)

    monkeypatch.setattr(FilledLayer, "attend", attend)
    subject = fill(PRESETS["b3"], 200, SHAPE, torch.bfloat16)
    assert subject.query.dtype == torch.bfloat16
    errors = decode.row_errors(subject, attention.Scoring(0.125), 1)
    assert seen == [torch.float32] * 2
    assert errors.rows == 4
    assert errors.worst <= 2e-2


@pytest.mark.usefixtures("reference")
def test_decode_on_a_terminal_appends_rows_and_draws(tmp_path):
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "decode.svg"
    result = run("decode", "-n", "200", "-n", "400", *SMALL, "--out", str(rows), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "preset" in result.stdout
    assert "b3: time grows as n^" in result.stderr
    assert len(rows.read_text().splitlines()) == 2
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")


@pytest.mark.usefixtures("reference")
def test_baselines_that_do_not_fit_are_left_out_and_named():
    result = run("decode", "-n", "200", *SMALL, "--memory", "300K", "--json")
    (row,) = rows_of(result)
    assert row["ratio_fp16_avx2"] > 0
    assert [row[f"ratio_{name}"] for name in ("torch_bf16", "torch_fp32")] == [None, None]
    assert "Not compared at b3, 200 tokens: torch_bf16, torch_fp32." in result.stderr


def perturbed(backend, error):
    """``Subject.attend`` that is wrong by a relative error on every backend but one."""
    own = FilledLayer.attend

    def attend(subject, scoring):
        out = own(subject, scoring)
        return out if ops.active_backend() == backend else out * (1 + error)

    return attend


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("error", [0.03, float("nan")])
def test_what_is_wrong_gets_no_speed(error, monkeypatch):
    monkeypatch.setattr(FilledLayer, "attend", perturbed("reference", error))
    result = run("decode", "-n", "200", *SMALL, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "off the reference, where 0.01 is allowed, so no speed is reported." in result.stderr


def test_the_gate_lets_small_errors_through():
    require_accurate(1e-4, "this", "cpu")
    with pytest.raises(Inaccurate):
        require_accurate(1.1e-4, "this", "cpu")


@pytest.mark.parametrize(
    ("rows", "off"),
    [
        ([3.9e-3] * 30, None),
        ([4.1e-3] * 30, "all"),
        ([0.019] + [1e-3] * 99, None),
        ([0.021] + [1e-3] * 99, "worst"),
        ([0.019], None),
        ([0.021], "all"),
        ([float("nan")] * 30, "all"),
    ],
)
def test_the_gate_of_codes_bounds_all_rows_and_each(rows, off):
    expected = torch.tensor([[3.0, 4.0]]).expand(len(rows), -1)
    errors = RowErrors.of(expected * (1 + torch.tensor(rows))[:, None], expected)
    assert errors.rows == len(rows)
    if off is None:
        require_within_budget(errors, "this", "cpu", 4e-3)
    else:
        with pytest.raises(Inaccurate, match="in the worst row" if off == "worst" else "this: the cpu"):
            require_within_budget(errors, "this", "cpu", 4e-3)


def test_backends_that_trade_nothing_keep_their_bound():
    """And so does a CPU where it reads no codes."""
    pool = fill(PRESETS["b3"], 200, SHAPE, torch.float32).pool
    errors = RowErrors(2e-4, 2e-4, 100)
    for backend, of in (("reference", pool), ("cpu", None)):
        with using_backend(backend), pytest.raises(Inaccurate):
            require_right(errors, "this", BenchSettings(SHAPE), of)
    with using_backend("cpu"):
        require_right(errors, "this", BenchSettings(SHAPE), pool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "-p", "b17"], "unknown preset 'b17'"),
        (["decode", "-n", "96", *SMALL], "packs none: give 97 or more"),
        (["decode", "--head-dim", "20", "-n", "200"], "head_dim 20 does not pack"),
        (["decode", "--sweep", "-n", "200"], "--sweep and --tokens were both given"),
        (["decode", "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["decode", "--plot", "a.pdf"], "give a name that ends in .svg or .png"),
        (["decode", "--out", "/nowhere/rows.jsonl"], "cannot write to /nowhere/rows.jsonl"),
        (["kernels", "--signs", "100"], "m=100 does not pack into bytes"),
        (["decode", "--against", "cudnn"], "'cudnn' is no baseline: choose from"),
        (["decode", "--peers", "--threads", "2"], "compared on one thread of a CPU, over one sequence: leave out"),
        (["decode", "--against", "onnx_int8", "--batch", "2"], "compared on one thread of a CPU, over one sequence"),
        (["decode", "--device", "tpu"], "device 'tpu' is unknown or not available here"),
        (["encode", "--out", "/nowhere/rows.jsonl"], "cannot write to /nowhere/rows.jsonl"),
        (["generate", "--against", "vllm"], "'vllm' is not compared with"),
        (["memory", "--against", "llama.cpp"], "'llama.cpp' is not compared with: choose from dynamic, quanto, hqq"),
        (
            ["memory", "--against", "dynamic", "--random", "llama-9"],
            "no shape is known by the name 'llama-9': choose from llama-3.1-8b, toy",
        ),
        (
            ["throughput", "--against", "dynamic", "--random", "toy", "--memory", "1M", "-n", "64"],
            "the weights alone take",
        ),
        (["throughput", "--memory", "much"], "memory 'much' is not a size"),
    ],
)
def test_refusals_are_one_sentence_and_exit_with_2(arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.startswith("Error: ")


# bench kernels


def test_kernels_time_scans_and_encodings():
    result = run("kernels", "-p", "b2", "--signs", "128", "--bits", "3", "-n", "2048", *SMALL, "--json")
    signs, levels, keys, values = rows_of(result)
    assert [row["case"] for row in (signs, levels, keys, values)] == ["scan", "scan", "encode", "encode"]
    assert [row["preset"] for row in (signs, levels)] == ["signs-128", "levels-3"]
    assert [row["bits_per_key"] for row in (signs, levels)] == [128, 192]
    assert [row["role"] for row in (keys, values)] == ["key", "value"]
    for row in (signs, levels, keys, values):
        assert set(FIELDS) <= row.keys()
        assert row["ms"] > 0
        assert row["ns_per_vector"] > 0
    assert signs["ratio_popcount"] > 0
    assert levels["ratio_popcount"] is None
    assert keys["share_of_prefill"] > 0
    assert keys["ms"] == pytest.approx(keys["ns_per_vector"] * 2048 * 2 / 1e6)


def test_kernels_on_a_terminal_show_both_tables():
    result = run("kernels", "--signs", "128", "--bits", "1", "-n", "2048", *SMALL)
    assert result.exit_code == 0, result.output
    assert "signs-128" in result.stdout
    assert "Time of making codes" in result.stdout


@pytest.mark.usefixtures("compiled")
def test_wrong_scores_get_no_speed(monkeypatch):
    scores = kernels.scores

    def wrong(rows, segment):
        return scores(rows, segment) * (1 if ops.active_backend() == "reference" else 1.01)

    monkeypatch.setattr(kernels, "scores", wrong)
    result = run("kernels", "--signs", "128", "-n", "2048", *SMALL, "--json")
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.usefixtures("compiled")
def test_worse_codes_are_an_error():
    codec = SimpleNamespace(
        encode_tokens=lambda x, first: x if ops.active_backend() == "reference" else 0.99 * x,
        dequantize=lambda blocks, first: 0.5 * blocks,
    )
    error = encode.encoding_error(codec, torch.ones(1, 1, 64, 8), torch.zeros(1, 1), 1)
    assert error == pytest.approx(0.01, rel=1e-4)


# bench generate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def essays(monkeypatch):
    monkeypatch.setattr(corpora, "essays", lambda: "The clocks were striking thirteen. " * 20)


@pytest.mark.usefixtures("essays", "reference")
def test_generate_compares_caches(checkpoint):
    arguments = ("-m", checkpoint, "-n", "300", "-n", "100", "--against", "dynamic", "--threads", "1", "--repeats", "2")
    rows = rows_of(run("generate", *arguments, "--json"))
    names = ["b3 bf16", "dynamic bf16", "b3 fp32", "dynamic fp32"]
    assert [(row["tokens"], row["preset"]) for row in rows] == [(n, name) for n in (100, 300) for name in names]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 / row["ms"])
        assert row["ratio_dynamic_fp32"] > 0
        assert row["max_error"] == (0 if row["preset"] == "b3 fp32" else None)
        low, high = row["spread_attention_ms_per_layer"]
        assert low <= row["attention_ms_per_layer"] <= high
    assert rows[3]["ratio_dynamic_fp32"] == 1


@pytest.mark.usefixtures("essays")
def test_caches_of_generate_hold_the_same_tokens(checkpoint):
    race = endtoend.Race(checkpoint, [PRESETS["full"]], [caches.DYNAMIC], 300, 1)
    logits = {}
    for name, one in race.contestants.items():
        one.fill(300)
        with torch.inference_mode():
            logits[name] = one.step()
    assert relative_error(logits["full fp32"], logits["dynamic fp32"]) < 1e-5
    race.contestants["dynamic fp32"].fill(299)
    with torch.inference_mode():
        assert relative_error(race.contestants["dynamic fp32"].step(), logits["dynamic fp32"]) > 1e-3


@pytest.mark.usefixtures("essays", "compiled")
def test_wrong_logits_get_no_speed(checkpoint, monkeypatch):
    step = endtoend.Transformer.step

    def wrong(self):
        return step(self) * (1 if ops.active_backend() == "reference" else 1.1)

    monkeypatch.setattr(endtoend.Transformer, "step", wrong)
    arguments = ("-m", checkpoint, "-n", "200", "--against", "dynamic", "--threads", "1", "--repeats", "1")
    result = run("generate", *arguments, "--json")
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.usefixtures("essays")
def test_a_context_longer_than_the_text_is_refused(checkpoint):
    result = run("generate", "-m", checkpoint, "-n", "2000", "--against", "dynamic")
    assert result.exit_code == 2
    assert "fewer than 2000" in result.stderr


def test_llama_keeps_what_it_holds(monkeypatch):
    class Fake:
        def __init__(self, path, **settings):
            self.n_tokens, self.calls = 0, calls
            assert (settings["type_k"], settings["type_v"], settings["flash_attn"]) == (8, 8, True)

        def eval(self, tokens):
            self.calls.append((self.n_tokens, list(tokens)))
            self.n_tokens += len(tokens)

    class Pipe:
        def __init__(self):
            self.asked = [2, None, None, 4, 3]

        def recv(self):
            if not self.asked:
                raise EOFError
            return self.asked.pop(0)

        def send(self, answer):
            assert answer is None

    calls = []
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Fake, GGML_TYPE_Q8_0=8))
    llama._serve(Pipe(), "a.gguf", "q8_0", [5, 6, 7, 8], 2)
    assert calls == [(0, [5, 6]), (2, [5]), (3, [5]), (2, [7, 8]), (3, [])]


def test_a_gguf_for_other_engines_is_kept(tmp_path, monkeypatch):
    def join(known, folder, bar):
        joined.append(known)
        (folder / "model.gguf").write_bytes(b"GGUF of a known model")
        return folder / "model.gguf"

    joined = []
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_join", join)
    paths = {models.fetch_gguf("smollm2", progress=False) for _ in range(2)}
    assert [path.read_bytes() for path in paths] == [b"GGUF of a known model"]
    assert joined == [models.REGISTRY["smollm2"]]
    own = tmp_path / "own.gguf"
    own.write_bytes(b"GGUF of my own")
    assert models.fetch_gguf(str(own)) == own
    own.write_bytes(b"text")
    with pytest.raises(QJLError, match=r"own\.gguf is not a GGUF file"):
        models.fetch_gguf(str(own))


# bench encode


@pytest.mark.usefixtures("reference")
def test_encode_tells_how_the_share_of_a_prompt_falls():
    rows = rows_of(run("encode", "-p", "b2", "-n", "128", "-n", "256", *SMALL, "--json"))
    assert [(row["tokens"], row["role"]) for row in rows] == [(n, role) for n in (128, 256) for role in encode.ROLES]
    for row in rows:
        assert row["case"] == "encode"
        assert row["share_of_prefill"] == pytest.approx(row["ms"] / row["prefill_ms"])
        assert row["ms"] == pytest.approx(row["ns_per_vector"] * row["tokens"] * 2 / 1e6)


def test_a_whole_prefill_is_causal_attention_of_all_queries():
    settings = BenchSettings(Shape(16, 2, 3, batch=2), torch.float32)
    work = encode.whole_prefill(64, settings)
    out = work()
    assert out.shape == (2, 6, 64, 16)
    query, keys, values = (x.double() for x in work.args)
    scores = query.unflatten(1, (2, 3)) @ keys[:, :, None].transpose(3, 4) * 16**-0.5
    scores = scores.masked_fill(~torch.ones(64, 64).tril().bool(), -torch.inf)
    assert relative_error(out, (scores.softmax(-1) @ values[:, :, None]).flatten(1, 2)) < 1e-5


# bench memory and bench throughput

TOY = ("--random", "toy", *OWN, "--dtype", "float32", "--threads", "1")


def test_memory_weighs_and_times_every_cache(tmp_path):
    picture = tmp_path / "memory.svg"
    arguments = ("-n", "200", "-n", "400", "--steps", "2", "--repeats", "2", "--plot", str(picture))
    rows = rows_of(run("memory", *TOY, *arguments, "--json"))
    assert [(row["tokens"], row["preset"]) for row in rows] == [(n, p) for n in (200, 400) for p in ("b3", "dynamic")]
    for ours, own in zip(rows[::2], rows[1::2], strict=True):
        assert own["cache_bytes"] == 2 * 2 * 2 * 64 * 4 * (own["tokens"] + 2)  # layers, keys and values, heads, numbers
        assert ours["smaller_than_dynamic"] == own["cache_bytes"] / ours["cache_bytes"]
        assert own["ratio_dynamic"] == own["ratio_prefill_dynamic"] == 1
        assert min(ours["ms"], ours["prefill_ms"], ours["ratio_dynamic"], ours["ratio_prefill_dynamic"]) > 0
        assert ours["rms_error"] <= ours["max_error"] <= 2e-2
        assert own["max_error"] is own["rms_error"] is own["backend"] is None
        assert own["weights_bytes"] == ours["weights_bytes"] > 4 * 512 * 256
    assert rows[2]["smaller_than_dynamic"] > rows[0]["smaller_than_dynamic"]
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")


@pytest.mark.skipif(not peak.CLEAR.exists(), reason="the peak of a process is told on Linux")
def test_throughput_fills_the_memory(tmp_path):
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "throughput.svg"
    arguments = ("-n", "256", "--memory", "40M", "--steps", "2", "--out", str(rows_file), "--plot", str(picture))
    result = run("throughput", *TOY, *arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    largest = {row["preset"]: row for row in rows if row["is_largest"]}
    assert list(largest) == ["dynamic", "b3"]
    for row in rows:
        assert row["weights_bytes"] + row["peak_bytes"] <= 40 << 20
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["batch"] <= largest[row["preset"]]["batch"]
    assert largest["b3"]["batch"] > 2 * largest["dynamic"]["batch"]
    speeds = [largest[name]["tokens_per_second"] for name in ("b3", "dynamic")]
    assert largest["b3"]["ratio_dynamic"] == pytest.approx(speeds[0] / speeds[1])
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")


@pytest.mark.parametrize("most", [0, 1, 5, 64, 1000])
def test_the_largest_batch_is_found_to_one_part_in_twenty(most):
    asked = []

    def fits(batch):
        asked.append(batch)
        return batch <= most

    throughput.search(fits)
    found = max((batch for batch in asked if batch <= most), default=0)
    assert most - found <= most / 20
    assert len(asked) == len(set(asked)) <= 2 * 11


@pytest.mark.skipif(not peak.CLEAR.exists(), reason="the peak of a process is told on Linux")
def test_the_peak_is_the_most_that_was_held_at_once():
    most = peak.Peak(torch.device("cpu"))
    kept = torch.ones(16 << 20)  # as much as makes little of what else this process may touch
    most.restart()
    for _ in range(3):
        torch.ones(32 << 20)
    assert 0.9 * (48 << 22) < most.nbytes < 1.3 * (48 << 22)
    most.restart()
    assert 0.9 * kept.nbytes < most.nbytes < 1.5 * kept.nbytes


@pytest.mark.parametrize("peer", [peer for peer in caches.QUANTIZED if caches.is_installed(peer)])
def test_bytes_of_transformers_quantized_caches_are_those_of_their_codes(peer):
    model = random_models.make("toy", torch.device("cpu"), torch.float32)
    make = caches.makers(model, [], [peer])[peer]
    cache, numbers = make(), 2 * 2 * 2 * 64 * 512
    with torch.inference_mode():
        model(input_ids=torch.ones(1, 512, dtype=torch.int64), **cache_argument(cache))
    assert 0.5 * numbers < caches.nbytes(cache) < 0.7 * numbers


# Pictures


@pytest.fixture
def rows():
    def row(preset, tokens, factor):
        fields = {
            "preset": preset,
            "tokens": tokens,
            "head_dim": 128,
            "kv_heads": 8,
            "group": 4,
            "threads": 1,
            "machine": "a machine",
            "ms": factor * tokens,
            "bytes": 600 * tokens,
            "bandwidth_gbs": 25.0,
            "peak_gflops": 100.0,
            "operations": 4 * 32 * 128 * tokens,
            "ms_torch_bf16": 1e-3 * tokens,
            "ms_torch_fp32": None,
            "ms_fp16_avx2": 1e-6 * tokens**1.5,
        }
        return typed(decode_row(preset, tokens, 1.0) | fields)

    return [row(preset, tokens, factor) for preset, factor in (("b3", 1e-4), ("b2", 9e-5)) for tokens in (1024, 4096)]


def labels(rows):
    return [style.with_power(curve.name, curve.tokens, curve.ms) for curve in decode_step._curves(rows)]


def test_the_picture_tells_how_time_grows(rows):
    assert labels(rows) == ["b3, n^1.00", "b2, n^1.00", "torch bf16, n^1.00", "fp16 avx2, n^1.50"]
    assert labels(rows[:1]) == ["b3", "torch bf16", "fp16 avx2"]
    picture = plots.benchmark(rows)
    assert ET.fromstring(picture).tag.endswith("svg")
    assert plots.benchmark(list(reversed(rows))).count(b"<path") == picture.count(b"<path")
    assert plots.benchmark(rows) == picture


def test_a_png_and_nothing_to_draw(rows, refuses):
    picture = np.asarray(Image.open(io.BytesIO(plots.benchmark(rows, ".png"))).convert("RGBA"))
    assert picture.shape == (800, 1920, 4)
    assert (picture[..., :3] == (0xE8, 0x59, 0x0C)).all(-1).sum() > 100
    with refuses("there is nothing to draw"):
        plots.benchmark([])


@pytest.mark.parametrize("command", ["", "decode", "encode", "kernels", "generate", "memory", "throughput", "serving"])
def test_help_ends_in_an_example(command):
    example = run(*command.split(), "--help").stdout.strip().splitlines()[-1]
    assert example.strip().startswith(f"Example: qjl bench {command}".strip())
