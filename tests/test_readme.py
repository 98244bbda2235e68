"""What the README and the docs show is run, and what they say is in the results is there."""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qjl import calibration, cli, corpora, download, models, presets
from qjl.lab import report
from qjl.lab.report import parts

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = {
    "demo": "--prompt-tokens 512 --max-new-tokens 8 --dtype bfloat16 --json",
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


@pytest.fixture(scope="module")
def models_and_texts(tmp_path_factory):
    """A cache folder with those of the user, and none of its statistics: the first line that needs some makes them."""
    models.fetch(progress=False)
    corpora.essays()
    folder = tmp_path_factory.mktemp("cache")
    for name in ("models", "texts"):
        (folder / name).symlink_to(download.cache_dir() / name)
    return folder


@pytest.fixture
def cache_folder(models_and_texts, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(models_and_texts))
    monkeypatch.setattr(calibration, "ROWS", 1)


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
    if command == "demo":
        _require_a_good_demo(json.loads(result.stdout))


def _require_a_good_demo(told):
    assert told["model"] == "smollm2"
    assert told["compression"] > 2
    assert told["kl"] < 0.1
    assert told["top1"] > 0.8
    assert len(told["text"].split()) > 3


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


def test_what_a_budget_saves_is_the_measured_share():
    """What `--bits` takes off the KL of the best preset of the same size, as the README says."""
    shares = []
    for model in ("smollm2", "qwen2.5-coder-0.5b"):
        rows = {row["preset"]: row for row in _measured("frontier") if row["model"] == model}
        for chosen in (row for name, row in rows.items() if name.startswith("auto-")):
            rivals = [row["kl"] for name, row in rows.items() if row["bits"] == chosen["bits"] and name[0] == "b"]
            shares.append(100 * (1 - chosen["kl"] / min(rivals)))
    assert f"takes {min(shares):.0f} to {max(shares):.0f} % off the KL" in (ROOT / "README.md").read_text()


def _measured(name):
    return [json.loads(line) for line in (ROOT / f"docs/results/{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("fill", ROOT / "scripts/fill.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_the_measured_ones(page, fill):
    assert fill.filled(page.read_text()) == page.read_text()


def test_a_changed_number_is_noticed(fill):
    text = (ROOT / "README.md").read_text()
    for table in fill.FILLED.finditer(text):
        digit = re.search(r"(?<=\.)\d(?=\d* )", table[0])
        changed = table[0][: digit.start()] + str((int(digit[0]) + 1) % 10) + table[0][digit.end() :]
        assert fill.filled(text.replace(table[0], changed)) == text


def test_pictures_of_the_frontier_are_the_measured_ones(fill):
    for name, part in fill.models(report.read([ROOT / "docs/results/frontier.jsonl"])[0].rows).items():
        assert (fill.RESULTS / f"frontier-{name}.svg").read_bytes() == fill.plots.frontier(part)


def test_the_page_is_made_of_the_committed_rows(monkeypatch):
    """All but its figures, whose bytes are matplotlib's; pictures have tests of their own."""
    monkeypatch.setattr(parts.Figure, "svg", b'<svg width="9pt"></svg>')
    page = report.page(report.read([ROOT / "docs/results", ROOT / "results"]))
    assert _without_figures((ROOT / "results/report.html").read_text()) == _without_figures(page)


def _without_figures(page):
    return re.sub(r"<figure.*?</figure>", "", page, flags=re.DOTALL)
