"""Imports go down only (docs: the floors of the house), and few rooms know transformers."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "qjl"
FLOORS = (
    ("__main__",),
    ("cli",),
    ("report",),
    ("demo",),
    ("choice", "bench", "serving"),
    ("evals", "plots", "plan"),
    ("conversation",),
    ("calibrate", "generation", "sensitivity"),
    ("prompts",),
    ("hf", "vllm"),
    ("stored",),
    ("models", "texts", "records", "machine"),
    ("architecture", "attention", "fingerprints", "gguf_metadata"),
    ("cache",),
    ("exact", "runs"),
    ("presets", "trees"),
    ("methods",),
    ("statistics", "trellis"),
    ("codebook", "sketch"),
    ("ops", "rope"),
    ("packed", "wheels", "modes", "compat", "copies"),
    ("errors",),
)
HEIGHT = {room: -depth for depth, rooms in enumerate(FLOORS) for room in rooms}
ABOVE_MODELS = {
    "hf",
    "vllm",
    "prompts",
    "calibrate",
    "generation",
    "sensitivity",
    "choice",
    "bench",
    "serving",
    "conversation",
    "plan",
    "evals",
    "demo",
    "cli",
}
KNOW_TRANSFORMERS = {"compat", "architecture", "fingerprints", "gguf_metadata", "models"} | ABOVE_MODELS
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def _room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


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


def _named(path):
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=_named)
def test_every_module_has_a_floor(path):
    assert _room(path) in HEIGHT


@pytest.mark.parametrize("path", FILES, ids=_named)
def test_imports_go_down_only(path):
    room = _room(path)
    is_package = (SOURCE / room).is_dir()
    for name in _imports(path):
        if name == "qjl":
            assert room == "cli", f"{room} imports the package it is part of"
        elif name.startswith("qjl."):
            imported = name.split(".")[1]
            assert HEIGHT[imported] < HEIGHT[room] or (imported == room and is_package), f"{room} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=_named)
def test_few_rooms_import_transformers(path):
    imported = {name.split(".")[0] for name in _imports(path)}
    assert "transformers" not in imported or _room(path) in KNOW_TRANSFORMERS


def test_the_imports_of_a_file_are_found(tmp_path):
    """The reader of imports itself: every form of import is seen."""
    assert "qjl.ops" in set(_imports(SOURCE / "methods" / "nibble.py"))
    assert {"qjl.errors", "torch"} <= set(_imports(SOURCE / "cache.py"))
    assert "transformers" in {name.split(".")[0] for name in _imports(SOURCE / "compat.py")}
