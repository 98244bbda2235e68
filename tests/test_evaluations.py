"""The commands of the evaluations: what they tell, that a killed run goes on, and what they refuse."""

import json
import re
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

import tiny_checkpoint
from qjl import cli
from qjl.lab import results
from qjl.lab.bench import toy_benches as benchmarks
from qjl.lab.cli import eval as eval_commands
from qjl.lab.cli import eval_fidelity
from qjl.lab.evals import harness
from qjl.lab.evals import toy_evals as evaluations

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 35
PROBLEMS = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(3)]
SMALL = {
    "fidelity": ("--prefix", "256", "--decode", "70", "--chunks", "1", "--seeds", "1", "--no-retrieval"),
    "distortion": ("--tokens", "300", "--rows", "1"),
    "perplexity": ("--context", "512", "--chunks", "1"),
    "seeds": ("--seeds", "2", "--prefix", "256", "--decode", "70", "--chunks", "1"),
    "retrieval": ("--context", "400", "--depths", "2", "--recent", "32"),
    "generate": ("--max-new-tokens", "5", "--batch", "2", "--task", "sums"),
}
CASES = SMALL.keys()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(checkpoint, tmp_path):
    """``run(name, ...)``: one evaluation of the tiny model."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "fit.txt").write_text(TEXT.replace("April", "May"))
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)))

    def start(name, *more):
        text, fit = (str(tmp_path / name) for name in ("text.txt", "fit.txt"))
        data = (str(tmp_path / "sums.jsonl"),) if name == "generate" else ("--data", text)
        fitted = () if name == "fidelity" else ("--fit", fit)
        return CliRunner().invoke(cli.app, ["eval", name, *data, "-m", checkpoint, *fitted, *SMALL[name], *more])

    return start


@pytest.mark.parametrize("name", CASES)
def test_every_preset_is_told_and_kept_once(name, run, tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ("-p", "full", "-p", "turboquant-3", "-p", "b2", "--out", str(out))
    first = run(name, *arguments, "--json")
    assert first.exit_code == 0, first.output
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    assert presets == (["full"] if name in ("fidelity", "retrieval", "generate") else []) + ["turboquant-3", "b2"]
    assert {"model", "fingerprint", "dtype", "settings", "versions", "bits", "source"} <= rows[0].keys()
    kept = out.read_bytes()
    assert [json.loads(line) for line in kept.splitlines()] == rows
    again = run(name, *arguments)
    assert again.exit_code == 0, again.output
    assert out.read_bytes() == kept
    assert all(re.search(rf"^ ?{preset} ", again.stdout, re.M) for preset in presets)


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_to_the_same_files(name, run, tmp_path, monkeypatch):
    def writes(out, most=None):
        """Exit code and written lines of a run that is killed within line ``most``."""
        lines, append = [], results.append

        def write(path, row):
            lines.append(row)
            if len(lines) == most:
                with path.open("a") as file:
                    file.write(json.dumps(row)[:-9])
                raise KeyboardInterrupt
            append(path, row)

        with monkeypatch.context() as patch:
            patch.setattr(results, "append", write)
            return run(name, "-p", "turboquant-3", "-p", "b2", "--out", str(tmp_path / out)).exit_code, len(lines)

    ended, count = writes("whole.jsonl")
    assert ended == 0
    assert count > 1
    middle = count // 2 + 1
    assert writes("killed.jsonl", most=middle) == (130, middle)
    assert writes("killed.jsonl") == (0, count - middle + 1)
    for whole in tmp_path.glob("whole*.jsonl"):
        assert _measured(tmp_path / whole.name.replace("whole", "killed")) == _measured(whole)


def _measured(path):
    """What rows tell but for the commands, which name the file."""
    return [json.dumps(row | {"command": None}) for row in results.read(path)]


@pytest.mark.parametrize("name", CASES)
def test_bars_count_what_was_kept(name, run, tmp_path, monkeypatch):
    moved = []

    @contextmanager
    def progress(what, total, quiet=False):
        moved.append([total, 0])

        def advance(count):
            moved[-1][1] += count

        yield advance

    for module in (eval_commands, eval_fidelity):
        monkeypatch.setattr(module, "progress", progress)
    for _ in range(2):
        assert run(name, "-p", "b2", "--out", str(tmp_path / "rows.jsonl")).exit_code == 0
    assert [total for total, _ in moved] == [count for _, count in moved]


@pytest.mark.parametrize(("recent", "told"), [("399", 1), ("32", 0)])
def test_a_haystack_without_codes_is_told(recent, told, run):
    result = run("retrieval", "-p", "b2", "--recent", recent)
    assert result.exit_code == 0
    assert result.stderr.count("400 tokens say nothing of b2: none was read as a code") == told


@pytest.mark.parametrize("name", CASES)
def test_one_preset_is_enough(name, run):
    result = run(name, "-p", "kivi-2")
    assert result.exit_code == 0, result.output
    assert "kivi-2" in result.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("distortion", ("-p", "full"), "full precision loses nothing: give another preset beside it"),
        ("distortion", ("--tokens", "99"), "rows of more than 128 tokens"),
        ("perplexity", ("--context", "100"), "prefix >= 256"),
        ("perplexity", ("--recent", "some"), "recent 'some' is no number of tokens"),
        ("seeds", ("--chunks", "0"), "chunks and seeds of at least 1"),
        ("retrieval", ("--task", "hay"), "there is no task 'hay': choose from needle"),
        ("retrieval", ("--context", "9000"), "too few for a haystack of 9000"),
        ("generate", ("--out", "/nowhere/rows.jsonl"), "cannot write to /nowhere/rows.jsonl"),
        ("generate", ("-p", "b17"), "unknown preset 'b17'"),
    ],
)
def test_refusals_are_one_sentence(name, arguments, message, run):
    result = run(name, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.startswith("Error: ")


BENCHMARKS = {"decode", "encode", "memory", "throughput"}


@pytest.fixture
def smoke(checkpoint, tmp_path, monkeypatch):
    """``smoke()``: rows of each evaluation, and what is told beside them."""
    monkeypatch.setattr(harness, "_is_hub_there", lambda: False)
    (tmp_path / "text.txt").write_text(2 * TEXT)

    def start():
        arguments = ["eval", "smoke", "-m", checkpoint, "--data", str(tmp_path / "text.txt"), "--json"]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        rows = map(json.loads, result.stdout.splitlines())
        return {row["evaluation"]: row["rows"] for row in rows}, result.stderr

    return start


def test_smoke_runs_all_of_them(smoke):
    found, told = smoke()
    assert found.keys() == {"frontier", "widths", "harness", *CASES, *BENCHMARKS}
    assert all(found.values())
    assert "Not run" not in told


def test_smoke_tells_that_the_harness_is_missing(smoke, monkeypatch):
    monkeypatch.setattr(evaluations, "find_spec", lambda package: None)
    monkeypatch.setattr(benchmarks, "checks", lambda device: ())
    found, told = smoke()
    assert found.keys() == {"frontier", "widths", *CASES}
    assert told == "Not run: harness, which needs lm-eval: run `pip install 'qjl[lab]'`.\n"
