"""Imports go down only (docs: the floors of the house), few rooms know transformers, and extras stay extras."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "qjl"
FLOORS = (
    ("lab",),
    ("__main__",),
    ("cli",),
    ("bit_allocation", "server"),
    ("plan", "conversation"),
    ("calibration", "generation", "sensitivity", "teacher_forcing"),
    ("prefix_store",),
    ("hf", "vllm"),
    ("models", "corpora", "quantization"),
    ("architecture", "fingerprints", "gguf_metadata"),
    ("cache",),
    ("codecs", "attention"),
    ("presets",),
    ("methods",),
    ("statistics", "trellis"),
    ("codebook", "sketch"),
    ("ops", "rope"),
    ("container", "packed", "download", "versions", "modes", "compat", "copies"),
    ("errors",),
)
LAB_FLOORS = (
    ("cli",),
    ("report", "lm_eval"),
    ("bench", "demo"),
    ("evals", "plots"),
    ("results", "rows", "machine", "reuploads"),
)
ABOVE_MODELS = {
    "hf",
    "vllm",
    "prefix_store",
    "calibration",
    "generation",
    "sensitivity",
    "teacher_forcing",
    "bit_allocation",
    "server",
    "conversation",
    "plan",
    "lab",
    "cli",
}
KNOW_TRANSFORMERS = {"compat", "architecture", "fingerprints", "gguf_metadata", "models"} | ABOVE_MODELS
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
DOOR = SOURCE / "cli" / "__init__.py"
CONVENTIONAL = {"compat"}
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
            is_own = imported == room  # a package within itself, a module that is run under its own name
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


def test_one_door_leads_to_the_lab():
    """What is measured needs the library; the library needs no measurement, and names the lab in one place."""
    outside = [path for path in FILES if SOURCE / "lab" not in path.parents]
    assert [path for path in outside if "qjl.lab" in path.read_text(encoding="utf-8")] == [DOOR]


def _basename(path):
    return path.parent.name if path.stem == "__init__" else path.stem


def test_no_two_modules_have_one_name():
    """But for commands, called as the user calls them, and backends, which have one file for one thing."""
    named = [path for path in FILES if not {"cli", "cpu", "triton"} & set(path.relative_to(SOURCE).parts)]
    counted = Counter(_basename(path) for path in named)
    assert {name for name, count in counted.items() if count > 1} <= CONVENTIONAL


def test_no_two_public_classes_have_one_name():
    """But for those of a backend, which mirror what they carry out."""
    named = [path for path in FILES if SOURCE / "ops" not in path.parents]
    counted = Counter(
        node.name
        for path in named
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in counted.items() if count > 1] == []


def test_few_rooms_import_transformers():
    know = {_room(path) for path in FILES if "transformers" in {name.split(".")[0] for name in _imports(path)}}
    assert know <= KNOW_TRANSFORMERS


def test_the_imports_of_a_file_are_found():
    """The reader of imports itself: every form of import is seen."""
    assert "qjl.ops" in set(_imports(SOURCE / "methods" / "base.py"))
    assert {"qjl.errors", "torch"} <= set(_imports(SOURCE / "packed.py"))
    assert "transformers" in {name.split(".")[0] for name in _imports(SOURCE / "compat.py")}


def _run_without_extras(code):
    blocked = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))"
    return subprocess.run([sys.executable, "-c", f"{blocked}\n{code}"], capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "import qjl; [getattr(qjl, name) for name in qjl.__all__]",
        "import qjl.vllm.block_planner, qjl.calibration, qjl.generation, qjl.conversation, qjl.plan",
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
