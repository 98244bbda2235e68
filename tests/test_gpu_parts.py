"""`make gpu`: its driver on parts that are nothing, and its own parts at toy sizes on a GPU that is pretended."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from typer.testing import CliRunner

import tiny_checkpoint
from conftest import using_backend
from qjl import cli
from qjl.lab.bench import baselines, caches, devices, throughput, timing
from qjl.ops.triton import runtime
from qjl.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 35
DEVICE = "a pretended GPU"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # dataclasses look themselves up there
    spec.loader.exec_module(script)
    return script


gpu, same_numbers = load("gpu"), load("same_numbers")
FAKES = {
    "rows": "import sys; open(sys.argv[1], 'a').write('[]\\n')",
    "fail": "print('it is broken'); raise SystemExit(3)",
    "sleep": "import time; time.sleep(60)",
    "silent": "pass",
}


def part(name, kind, seconds=60, **more):
    return gpu.Part(name, f"{kind} as asked", seconds, (("-c", FAKES[kind], "{rows}"),), **more)


@pytest.fixture
def drive(tmp_path, monkeypatch, capsys):
    """``drive(parts, ...)``: the exit code, and what was told of each part that ran."""
    monkeypatch.setattr(gpu, "device_name", lambda: DEVICE)
    monkeypatch.setattr(signal, "signal", lambda *handler: None)

    def run(parts, *words):
        code = gpu.main(["--out", str(tmp_path), "--json", *words], parts)
        return code, {told["name"]: told for told in map(json.loads, capsys.readouterr().out.splitlines())}

    return run


def state(folder):
    return json.loads((folder / "state.json").read_text())["parts"]


def test_what_is_done_is_not_done_again(drive, tmp_path):
    parts = [part("one", "rows"), part("two", "rows")]
    code, told = drive(parts)
    assert code == 0
    assert told == state(tmp_path)
    assert [(one["status"], one["code"], one["device"]) for one in told.values()] == [("done", 0, DEVICE)] * 2
    assert told["one"]["commit"] == gpu.commit()
    assert (tmp_path / "one.jsonl").read_text() == "[]\n"
    assert not list(tmp_path.glob("*.part"))
    assert drive(parts) == (0, {})
    assert drive([*parts, part("three", "rows")])[1].keys() == {"three"}
    assert drive(parts, "--again", "--only", "two")[1].keys() == {"two"}
    assert (tmp_path / "two.jsonl").read_text() == "[]\n"


def test_another_device_has_done_nothing(drive, monkeypatch):
    drive([part("one", "rows")])
    monkeypatch.setattr(gpu, "device_name", lambda: "another GPU")
    code, told = drive([part("one", "rows")])
    assert code == 0
    assert told["one"]["device"] == "another GPU"


@pytest.mark.parametrize(
    ("broken", "code", "why"),
    [
        (part("broken", "fail"), 3, "it is broken"),
        (part("broken", "sleep", seconds=0.5), None, "it took more than 0.5 s"),
        (part("broken", "silent"), 1, "it gave no rows"),
    ],
    ids=["failed", "late", "no rows"],
)
def test_a_failing_part_is_told_and_the_others_go_on(broken, code, why, drive, tmp_path):
    parts = [part("one", "rows"), broken, part("two", "rows")]
    ended, told = drive(parts)
    assert ended == 1
    assert [one["status"] for one in told.values()] == ["done", "failed", "done"]
    assert (told["broken"]["code"], told["broken"]["why"]) == (code, why)
    assert not (tmp_path / "broken.jsonl").exists()
    again, told = drive(parts)
    assert again == 1
    assert told.keys() == {"broken"}
    ended, told = drive([parts[0], part("broken", "rows"), parts[2]])
    assert ended == 0
    assert told.keys() == {"broken"}


def test_a_limit_stops_before_a_part_that_may_not_end_in_time(drive):
    parts = [part("one", "rows", seconds=30), part("two", "rows", seconds=500)]
    code, told = drive(parts, "--limit", "60")
    assert code == 3
    assert told.keys() == {"one"}
    assert drive(parts, "--limit", "600")[1].keys() == {"two"}
    code, told = drive([part("bad", "fail", seconds=30), part("three", "rows", seconds=500)], "--limit", "60")
    assert code == 1
    assert told.keys() == {"bad"}


def test_what_a_part_needs_and_is_not_there(drive):
    assert drive([part("one", "rows", needs="no_such_package"), part("two", "rows")])[1].keys() == {"two"}


def test_names_choose_parts_by_their_first_words(drive):
    parts = [part(name, "rows") for name in ("decode-a", "decode-b", "decoder")]
    assert drive(parts, "--only", "decode")[1].keys() == {"decode-a", "decode-b"}


def test_the_list_tells_what_became_of_parts(drive, tmp_path):
    parts = [part("one", "rows"), part("two", "fail"), part("three", "rows")]
    drive(parts[:2])
    before = state(tmp_path)
    code, told = drive(parts, "--list")
    assert code == 0
    assert [one["status"] for one in told.values()] == ["done", "failed", "to do"]
    assert state(tmp_path) == before


KILLED = """
import sys
sys.path.insert(0, {scripts!r})
import gpu
gpu.device_name = lambda: {device!r}
first = gpu.Part("one", "", 60, (("-c", {rows!r}, "{{rows}}"),))
second = gpu.Part("two", "", 60, (("-c", {rows!r}, "{{rows}}"), ("-c", {waits!r})), resumes={resumes})
sys.exit(gpu.main(["--out", {out!r}], [first, second]))
"""


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_killed_goes_on(by, resumes, drive, tmp_path):
    pid = tmp_path / "pid"
    waits = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    given = {"scripts": str(ROOT / "scripts"), "device": DEVICE, "rows": FAKES["rows"], "waits": waits}
    code = KILLED.format(**given, out=str(tmp_path), resumes=resumes)
    with subprocess.Popen([sys.executable, "-c", code]) as run:
        _wait_for(lambda: pid.exists() and pid.read_text())
        run.send_signal(by)
    child = int(pid.read_text())
    if by == signal.SIGTERM:
        assert run.returncode == 128 + by
        _wait_for(lambda: not _is_there(child))
    else:
        os.kill(child, signal.SIGKILL)
    assert [one["status"] for one in state(tmp_path).values()] == ["done", "begun"]
    code, told = drive([part("one", "rows"), part("two", "rows", resumes=resumes)])
    assert code == 0
    assert told.keys() == {"two"}
    assert (tmp_path / "two.jsonl").read_text() == "[]\n" * (1 + resumes)


def _is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to pass in half a minute")


@pytest.mark.parametrize("case", ["no such part", "no GPU", "no state", "no folder"])
def test_what_cannot_be_carried_out_ends_with_one_sentence(case, drive, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if case != "no GPU":
        monkeypatch.setattr(gpu, "device_name", lambda: DEVICE)
    (tmp_path / "file").touch()
    if case == "no state":
        (tmp_path / "state.json").write_text("[]")
    words = {"no such part": ["--only", "two"], "no folder": ["--out", str(tmp_path / "file/folder")]}.get(case, [])
    assert gpu.main(["--out", str(tmp_path), *words], [part("one", "rows")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1


def test_parts_take_less_than_ten_minutes_and_name_what_there_is():
    parts = gpu.parts_of(gpu.Sizes())
    assert len({one.name for one in parts}) == len(parts)
    assert all(one.seconds < 600 for one in parts)
    words = [word for one in parts for command in one.commands for word in command]
    assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "scripts/")))
    presets = {word for option, word in pairwise(words) if option == "-p"} - {"no:cacheprovider"}
    assert presets <= PRESETS.keys()


# The same numbers


def measured(path, **fields):
    row = {"preset": "b3", "context": 512, "kl": 0.02, "kl_se": 0.001, "dppl_percent": 2.0, "dppl_percent_se": 0.3}
    path.write_text(json.dumps(row | fields) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, 0),
        ({"kl": 0.0209}, 0),
        ({"kl": 0.0211}, 1),
        ({"kl": 0.0211, "kl_se": 0.01}, 1),
        ({"kl": float("nan")}, 1),
        ({"dppl_percent": 1.6}, 1),
        ({"kl_se": None}, 1),
        ({"preset": "b2"}, 1),
    ],
    ids=str,
)
def test_numbers_of_two_devices(fields, code, tmp_path, monkeypatch, capsys):
    files = [measured(tmp_path / "one.jsonl"), measured(tmp_path / "other.jsonl", **fields)]
    for pair in (files, files[::-1]):
        monkeypatch.setattr(sys, "argv", ["same_numbers.py", *pair])
        assert same_numbers.main() == code
    assert ("b3 at 512 tokens" in capsys.readouterr().out) == bool(code)


def test_numbers_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["same_numbers.py", measured(tmp_path / "one.jsonl"), str(tmp_path / "other.jsonl")]
    )
    assert same_numbers.main() == 2


# The parts themselves


def toy(folder):
    """Sizes that the interpreter gets through."""
    for name, text in {"text.txt": TEXT, "fit.txt": TEXT.replace("April", "May")}.items():
        (folder / name).write_text(text)
    return gpu.Sizes(
        tests=("tests/test_triton_gpu.py", "tests/test_triton.py"),
        model=str(tiny_checkpoint.save(folder / "model", num_hidden_layers=1)),
        text=(
            *("--context", "512", "--chunks", "2"),
            *("--data", str(folder / "text.txt"), "--fit", str(folder / "fit.txt")),
        ),
        fidelity=("turboquant-3",),
        shape=("--head-dim", "64", "--kv-heads", "1", "--group", "2"),
        presets=("turboquant-3",),
        batches=(2,),
        tokens=(280,),
        repeats=1,
        random="toy",
        contexts=(200,),
        memory="4M",
        steps=1,
        static=("--shape", "smollm2", "--statistics", "synthetic"),
    )


def of_this_process(words, log, seconds):
    """In place of ``launch``: our commands, where the GPU is pretended; all others as they are."""
    if words[:2] != ["-m", "qjl"] or "--static" in words:
        return LAUNCH(words, log, seconds)
    result = CliRunner().invoke(cli.app, words[2:])
    log.write(result.output)
    return result.exit_code


def on_the_interpreter(words, log, seconds):
    """The same for a whole model, which no pretended GPU holds: its kernels run on the CPU where a GPU is asked for."""
    with using_backend("triton" if "cuda" in words else "reference"):
        return of_this_process(["cpu" if word == "cuda" else word for word in words], log, seconds)


LAUNCH = gpu.launch
if runtime.is_installed():
    from pretended_gpu import pretended_gpu


def _compiles_nothing():
    raise TorchDynamoException


@pytest.fixture
def pretended(monkeypatch):
    """A GPU, and as much of what torch tells of one as commands ask."""
    monkeypatch.setattr(caches, "FITTED", 130)
    monkeypatch.setattr(devices, "COPIED_BYTES", 1 << 20)
    for what in ("max_memory_allocated", "memory_allocated", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, what, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    fakes = {"ready": lambda place, work: work, "stopwatch": lambda place, work: timing.wall_ms(work), "cache_bytes": 1}
    for what, fake in fakes.items():
        monkeypatch.setattr(devices.OnGPU, what, fake)
    monkeypatch.setattr(devices, "multiply", lambda size, *where: baselines.multiply(size // 64, *where))
    monkeypatch.setattr(throughput, "search", lambda fits: (fits(1), fits(2)))
    monkeypatch.setattr(baselines, "_compiled_flex_attention", _compiles_nothing)
    with pretended_gpu(monkeypatch):
        yield


interpreted = pytest.mark.skipif(not runtime.is_interpreted(), reason="kernels run here under TRITON_INTERPRET=1 alone")


def ends_well(drive, folder, names):
    """Runs these parts, and returns the rows of each that has some."""
    parts = [one for one in gpu.parts_of(toy(folder)) if not one.needs and one.name.partition("-")[0] in names]
    code, told = drive(parts)
    assert {name: one["why"] for name, one in told.items() if one["status"] != "done"} == {}
    assert code == 0
    assert told.keys() == {one.name for one in parts}
    files = {one.name: folder / f"{one.name}.jsonl" for one in parts if one.has_rows}
    return {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}


@interpreted
def test_triton_gives_the_same_numbers_through_the_parts(drive, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "launch", on_the_interpreter)
    rows = ends_well(drive, tmp_path, ["fidelity"])
    assert [len(of) for of in rows.values()] == [1, 1]


@interpreted
@pytest.mark.parametrize("names", [["tests", "encode", "static"], ["decode"], ["memory", "throughput"]], ids=" ".join)
def test_triton_parts_reach_their_end_on_a_gpu_that_is_pretended(names, pretended, drive, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "launch", of_this_process)
    for name, rows in ends_well(drive, tmp_path, names).items():
        assert rows, name
        assert {row["machine"].startswith(DEVICE) if "machine" in row else row["gpu"] == "H100" for row in rows} == {
            True
        }
    if "decode" in names:
        page = tmp_path / "page.html"
        assert CliRunner().invoke(cli.app, ["report", str(tmp_path), "--out", str(page)]).exit_code == 0
        assert "pages of 16 tokens, lengths that differ" in page.read_text()
