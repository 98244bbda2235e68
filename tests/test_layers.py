"""Imports go down only (docs: the floors of the house), few rooms know transformers, and extras stay extras."""

import ast
import json
import subprocess
import sys
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tiny_checkpoint

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


# What is installed: the package's own requirements alone, and one sentence for what needs more

PROJECT = tomllib.loads((SOURCE.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WITHOUT_EXTRAS = """\
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {extras!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
"""
BY_EXTRA = {  # rooms that may import what an extra brings, and no other room may
    "gguf": ("gguf_metadata.py", "models.py"),
    "serve": ("server",),
    "vllm": ("vllm",),
    "gpu": ("ops/triton",),
    "lab": ("lab",),
    "bench": ("lab/bench",),
    "peers": ("lab/bench",),
}
COMES_WITH = {"starlette": "fastapi", "pydantic": "fastapi", "pydantic-core": "fastapi", "datasets": "lm-eval"}
COMES_WITH |= {"huggingface-hub": "transformers", "tokenizers": "transformers"}
PACKAGES = {"faiss": "faiss-cpu", "llama-cpp": "llama-cpp-python"}


def _named(requirements):
    """Packages, with those of the extras of ours that are among them."""
    for requirement in map(Requirement, requirements):
        if requirement.name == "qjl":
            for extra in requirement.extras:
                yield from _named(PROJECT["optional-dependencies"][extra])
        else:
            yield canonicalize_name(requirement.name)


def _brought(names):
    """Packages that are installed with some, extras of theirs left out."""
    found, todo = set(), list(names)
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            asked = map(Requirement, _requirements_of(name))
            todo += [canonicalize_name(one.name) for one in asked if not one.marker or one.marker.evaluate()]
    return found


def _requirements_of(name):
    try:
        return metadata.requires(name) or ()
    except metadata.PackageNotFoundError:  # of another system
        return ()


@pytest.fixture(scope="module")
def bare():
    """``bare(code)``: run where nothing can be imported that ``pip install qjl`` does not bring."""
    kept = _brought(_named(PROJECT["dependencies"])) | {"qjl"}
    extras = {
        module
        for module, packages in metadata.packages_distributions().items()
        if not kept & {canonicalize_name(package) for package in packages}
    }
    assert {"matplotlib", "fastapi", "uvicorn", "lm_eval", "gguf", "pytest"} <= extras
    assert not {"torch", "transformers", "safetensors", "numpy", "typer", "rich", "platformdirs", "qjl"} & extras

    def run(code, *arguments):
        script = WITHOUT_EXTRAS.format(extras=extras) + code
        return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)

    return run


LIBRARY = """
import importlib, torch, qjl
from transformers import AutoModelForCausalLM

for name in sys.argv[2:]:
    importlib.import_module(name)
assert all(getattr(qjl, name) for name in qjl.__all__)
model = AutoModelForCausalLM.from_config(qjl.models.load_config(sys.argv[1]))
cache = qjl.KVCache(model, "b3")
model.generate(torch.ones(1, 300, dtype=torch.int64), cache=cache, max_new_tokens=4, do_sample=False)
assert cache.packed_tokens[0] > 128
assert qjl.quantize(torch.randn(2, 64, 64), "qjl-2").bits < 3
"""


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("tiny"))


def test_the_library_needs_no_extra(bare, tiny_folder):
    others = [room for extra, rooms in BY_EXTRA.items() if extra != "gguf" for room in rooms]
    files = [path.relative_to(SOURCE) for path in FILES if path.stem != "__main__"]
    files = [path for path in files if not any(path.is_relative_to(room) for room in others)]
    names = [".".join(("qjl", *path.with_suffix("").parts)).removesuffix(".__init__") for path in files]
    assert {"qjl.cli.serve", "qjl.conversation", "qjl.hf.kv_cache", "qjl.methods.balanced"} <= set(names)
    done = bare(LIBRARY, tiny_folder, *names, "qjl.vllm.block_planner", "qjl.server.vllm_launch")
    assert done.returncode == 0, done.stderr


COMMANDS = """
import json
from typer.testing import CliRunner
from qjl import cli

def told(words):
    result = CliRunner().invoke(cli.app, words)
    return result.exit_code, result.stdout, result.stderr

print(json.dumps([told(words) for words in json.loads(sys.argv[1])]))
"""


def _told(bare, commands):
    done = bare(COMMANDS, json.dumps([[str(word) for word in words] for words in commands]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_commands_need_no_extra(bare, tiny_folder):
    plan = ["plan", tiny_folder, "--memory", "1G"]
    write = ["generate", "hi", "--model", tiny_folder, "--max-new-tokens", "4"]
    helps = [[], ["serve"], ["demo"], ["report"], ["eval", "fidelity"], ["bench", "decode"]]
    commands = [["presets"], plan, write, *([*words, "--help"] for words in helps)]
    told = dict(zip(map(str, commands), _told(bare, commands), strict=True))
    assert {name: error for name, (code, _, error) in told.items() if code} == {}


def test_a_command_names_the_extra_that_it_needs_before_it_works(bare, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 100)
    (tmp_path / "rows.jsonl").write_text("")
    model, text, rows = ["--model", tiny_folder], ["--data", tmp_path / "text.txt"], tmp_path / "new.jsonl"
    needs = {
        "serve": [["serve", tiny_folder]],
        "gguf": [["demo"], ["generate", "hi"]],
        "lab": [
            ["report", tmp_path, "--out", tmp_path / "page.html"],
            ["eval", "harness", "--task", "piqa", *model],
            ["eval", "fidelity", *model, *text, "--json", "--out", rows],
            ["eval", "perplexity", *model, *text, "--fit", tmp_path / "text.txt", "--json", "--out", rows],
            ["eval", "models", "--family", "llama", "--json", "--out", rows],
            ["bench", "decode", "--json", "--out", rows],
            ["bench", "serving", *model, *text, "--json", "--out", rows],
        ],
    }
    commands = [words for of_one in needs.values() for words in of_one]
    extras = [extra for extra, of_one in needs.items() for _ in of_one]
    for words, extra, (code, output, error) in zip(commands, extras, _told(bare, commands), strict=True):
        assert (code, output, error.count("\n")) == (2, "", 1), (words, output, error)
        assert f"pip install 'qjl[{extra}]'" in error, words
    assert not rows.exists()


def test_a_room_imports_what_its_extra_brings():
    ours = {path: set(_named(PROJECT["dependencies"])) for path in FILES}
    for extra, rooms in BY_EXTRA.items():
        for path, allowed in ours.items():
            if any(path.relative_to(SOURCE).is_relative_to(room) for room in rooms):
                allowed.update(_named(PROJECT["optional-dependencies"][extra]))
    for path, allowed in ours.items():
        imported = {name.split(".")[0] for name in _imports(path)} - sys.stdlib_module_names - {"qjl"}
        packages = {PACKAGES.get(name, name) for name in map(canonicalize_name, imported)}
        assert {COMES_WITH.get(name, name) for name in packages} <= allowed, path
