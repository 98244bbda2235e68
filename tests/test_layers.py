"""Imports go down only (docs: the floors of the house), few rooms know transformers, and extras stay extras."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "qjl"
FLOORS = (
    ("__main__",),
    ("cli",),
    ("lab",),
    ("choice", "serving"),
    ("plan", "conversation"),
    ("calibrate", "generation", "sensitivity", "teacher_forcing"),
    ("prompts",),
    ("hf", "vllm"),
    ("stored",),
    ("models", "texts"),
    ("architecture", "fingerprints", "gguf_metadata"),
    ("cache",),
    ("attention", "codecs"),
    ("presets", "trees"),
    ("methods",),
    ("statistics", "trellis"),
    ("codebook", "sketch"),
    ("ops", "rope"),
    ("packed", "wheels", "versions", "modes", "compat", "copies"),
    ("errors",),
)
LAB_FLOORS = (
    ("report",),
    ("bench", "demo"),
    ("evals", "plots"),
    ("records", "machine", "models"),
)
ABOVE_MODELS = {
    "hf",
    "vllm",
    "prompts",
    "calibrate",
    "generation",
    "sensitivity",
    "teacher_forcing",
    "choice",
    "serving",
    "conversation",
    "plan",
    "lab",
    "cli",
}
KNOW_TRANSFORMERS = {"compat", "architecture", "fingerprints", "gguf_metadata", "models"} | ABOVE_MODELS
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
EXTRAS = ("matplotlib", "jinja2", "gguf", "lm_eval", "accelerate", "wonderwords", "fastapi", "uvicorn", "datasets")


def _room(path, house=SOURCE):
    return path.relative_to(house).parts[0].removesuffix(".py")


def _is_module(name):
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _imports(path):
    """Dotted names of all modules a file imports, wherever in the file."""
    package = path.relative_to(SOURCE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if base.startswith("qjl") and _is_module(name) else base


def _upward(floors, house, prefix):
    """Imports that do not go down, as (file, name)."""
    height = {room: -depth for depth, rooms in enumerate(floors) for room in rooms}
    for path in house.rglob("*.py"):
        room = _room(path, house)
        if path == house / "__init__.py":
            continue
        for name in _imports(path):
            if not name.startswith(prefix):
                continue
            imported = name.removeprefix(prefix).split(".")[0]
            is_own = imported == room and (house / room).is_dir()
            if not is_own and height[imported] >= height[room]:
                yield str(path.relative_to(house)), name


def test_imports_go_down_only():
    assert list(_upward(FLOORS, SOURCE, "qjl.")) == []
    assert list(_upward(LAB_FLOORS, SOURCE / "lab", "qjl.lab.")) == []


def test_every_room_has_a_floor_and_does_not_import_the_whole_house():
    rooms = {room for rooms in FLOORS for room in rooms}
    assert {_room(path) for path in FILES} == rooms
    assert {_room(path) for path in FILES if "qjl" in _imports(path)} == {"cli"}
    lab = SOURCE / "lab"
    assert {_room(path, lab) for path in FILES if lab in path.parents} - {"__init__"} == {
        room for rooms in LAB_FLOORS for room in rooms
    }


def test_few_rooms_import_transformers():
    know = {_room(path) for path in FILES if "transformers" in {name.split(".")[0] for name in _imports(path)}}
    assert know <= KNOW_TRANSFORMERS


def test_the_imports_of_a_file_are_found():
    """The reader of imports itself: every form of import is seen."""
    assert "qjl.ops" in set(_imports(SOURCE / "methods" / "nibble.py"))
    assert {"qjl.errors", "torch"} <= set(_imports(SOURCE / "packed.py"))
    assert "transformers" in {name.split(".")[0] for name in _imports(SOURCE / "compat.py")}


def _run_without_extras(code):
    blocked = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))"
    return subprocess.run([sys.executable, "-c", f"{blocked}\n{code}"], capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "import qjl; [getattr(qjl, name) for name in qjl.__all__]",
        "import qjl.vllm.planning, qjl.calibrate, qjl.generation, qjl.conversation, qjl.plan",
        "from qjl import cli; cli.app(['presets'])",
        "from qjl import cli; cli.app(['bench', '--help'])",
    ],
    ids=["names", "rooms", "command", "help"],
)
def test_the_library_needs_no_extra(code):
    done = _run_without_extras(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["report", "results", "--out", "NEW/page.html"], "lab"),
        (["serve"], "serve"),
        (["eval", "harness", "--task", "piqa"], "lab"),
    ],
    ids=["report", "serve", "harness"],
)
def test_a_command_names_the_extra_that_it_needs(command, extra, tmp_path):
    arguments = [word.replace("NEW", str(tmp_path)).replace("results", str(tmp_path)) for word in command]
    (tmp_path / "rows.jsonl").write_text("")
    done = _run_without_extras(f"from qjl import cli; cli.app({arguments!r})")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"pip install 'qjl[{extra}]'" in done.stderr
