"""docs/add-a-method.md, followed to the letter in a copy of the package and of its tests."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/add-a-method.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^`([^`\n]+)`(?:, at the end(?: of `(\w+)`)?)?:\n\n```python\n(.*?)^```$", PAGE, re.M | re.S)
WITHOUT_EDITABLE = """\
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""  # an editable install would find the original first
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]


def _inserted(source, line, text):
    """``text`` below that line, counted from 1."""
    lines = source.splitlines(keepends=True)
    return "".join([*lines[:line], text, *lines[line:]])


def _with_imports(source, imports):
    last = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)][-1]
    return _inserted(source, last.end_lineno, imports)


def _assigned(node):
    """Names that a statement assigns to."""
    targets = {ast.Assign: lambda: node.targets, ast.AnnAssign: lambda: [node.target]}
    return [ast.unparse(target) for target in targets.get(type(node), list)()]


def _at_the_end_of(name, source, lines):
    """The lines as the last elements of a module's tuple or dictionary."""
    (value,) = [node.value for node in ast.parse(source).body if name in _assigned(node)]
    collection = next(node for node in ast.walk(value) if isinstance(node, ast.Tuple | ast.Dict))
    last = (collection.elts if isinstance(collection, ast.Tuple) else collection.keys)[-1]
    return _inserted(source, collection.end_lineno - 1, textwrap.indent(lines, " " * last.col_offset))


def _follow(folder, path, name, code):
    file = folder / path
    if not file.exists():
        file.write_text(code, encoding="utf-8")
        return
    imports, addition = re.split(r"(?<=\n)\n+", code, maxsplit=1)
    source = _with_imports(file.read_text(encoding="utf-8"), imports)
    source = _at_the_end_of(name, source, addition) if name else f"{source}\n\n{addition}"
    file.write_text(source, encoding="utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The copy in which every step is done."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "src/sitecustomize.py").write_text(WITHOUT_EDITABLE, encoding="utf-8")
    for path, name, code in STEPS:
        _follow(folder, path, name, code)
    return folder


def _run(folder, command):
    program, *arguments = shlex.split(command)
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "QJL_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", program, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_page_has_all_steps():
    assert [(path, name) for path, name, _ in STEPS] == [
        ("src/qjl/methods/nf4.py", ""),
        ("src/qjl/methods/__init__.py", "METHODS"),
        ("src/qjl/presets.py", "_ALL"),
        ("tests/method_cases.py", "BUDGETS"),
        ("tests/oracles.py", ""),
        ("tests/test_nf4.py", ""),
    ]
    assert len(STEPS) == PAGE.count("```python")
    assert [command.split()[0] for command in COMMANDS] == ["pytest", "qjl"]


def test_the_example_is_not_here_already(followed):
    assert not (ROOT / "src/qjl/methods/nf4.py").exists()
    assert (followed / "src/qjl/methods/nf4.py").exists()


def test_the_suite_passes_with_it(followed):
    done = _run(followed, COMMANDS[0])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed > 30, done.stdout


def test_its_preset_is_there(followed):
    done = _run(followed, COMMANDS[1])
    assert done.returncode == 0, done.stderr
    (fields,) = [row for row in map(json.loads, done.stdout.splitlines()) if row["preset"] == "nf4"]
    assert fields["method_keys"] == fields["method_values"] == "nf4"
    assert fields["bits_keys"] == fields["bits_values"] == 4.125


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check"])
def test_it_is_written_as_the_rest(command, followed):
    done = _run(followed, f"{command} {STEPS[0][0]} {STEPS[-1][0]}")
    assert done.returncode == 0, done.stdout
