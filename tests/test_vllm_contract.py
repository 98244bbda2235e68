"""Names of vLLM: our list is all that we use, releases have all of it, and what a vLLM lacks is said. Needs no vLLM."""

import ast
import enum
import inspect
import logging
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from qjl import vllm
from qjl.server import vllm_launch
from qjl.vllm import PRESET, compat
from qjl.vllm.compat import CHECKED, ENGINE, FOLLOWED, SERVER, SERVING, TABLES
from released import FOLDER, Release, is_marked, parameters

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "src" / "qjl" / "vllm"
COMPAT = PLUGIN / "compat.py"
USERS = [
    *sorted(PLUGIN.glob("*.py")),
    ROOT / "src/qjl/lab/bench/vllm_engines.py",
    ROOT / "src/qjl/server/vllm_launch.py",
    ROOT / "tests/serve_vllm.py",
]
EVERYTHING = [path for room in ("src", "tests", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]
VERSIONS = sorted({*CHECKED, *(path.stem for path in FOLDER.glob("*.zip"))})
ALL = (SERVING, TABLES, ENGINE)
HOMES = {name: home for uses in ALL for home, names in uses.names.items() for name in names}
MEMBERS = {name for uses in ALL for members in uses.members.values() for name in members}
PARAMETERS = SERVING.parameters | ENGINE.parameters
EACH = pytest.mark.parametrize("uses", ALL, ids=["serving", "tables", "engine"])


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path, *kinds):
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


# the releases have what we use


@pytest.fixture(scope="module", params=VERSIONS)
def release(request):
    found = Release(request.param)
    if not found.path.exists():
        pytest.skip(f"NOT TESTED: the sources of vLLM {request.param} are not here: make vllm-sources")
    return found


@pytest.mark.parametrize("path", sorted(f"{home}.{name}" for name, home in HOMES.items()))
def test_a_release_has_the_name(release, path):
    home, _, name = path.rpartition(".")
    assert release.module(home) is not None, f"{home} has gone"
    assert release.find(home, name) is not None, f"{path} has gone"


@pytest.mark.parametrize(
    ("owner", "name"),
    sorted({(owner, name) for uses in ALL for owner in uses.members for name in uses.members[owner]}),
)
def test_a_release_has_the_member(release, owner, name):
    assert name in release.members(HOMES[owner], owner), f"{owner}.{name} has gone"


@pytest.mark.parametrize(("path", "name"), sorted((path, name) for path in PARAMETERS for name in PARAMETERS[path]))
def test_a_release_takes_the_parameter(release, path, name):
    owner, _, method = path.partition(".")
    home = HOMES[owner]
    function = release.members(home, owner)[method] if method else release.find(home, owner)[1]
    assert name in parameters(function), f"{path} takes no {name} any more"


OVERRIDING = [node for node in nodes(PLUGIN / "backend.py", ast.ClassDef) if is_marked(node, "overriding")]
OVERRIDDEN = [
    (ours, method)
    for ours in OVERRIDING
    for method in ours.body
    if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or not method.name.startswith("_"))
]


def base_of(ours):
    [base] = ours.bases
    return (base.value if isinstance(base, ast.Subscript) else base).id


@pytest.mark.parametrize(
    ("ours", "method"), OVERRIDDEN, ids=[f"{ours.name}.{method.name}" for ours, method in OVERRIDDEN]
)
def test_a_release_calls_what_we_override_as_we_take_it(release, ours, method):
    base = base_of(ours)
    theirs = release.members(HOMES[base], base)
    if method.name == "__init__" and "__init__" not in theirs:
        return
    assert method.name in theirs, f"{base}.{method.name} has gone: ours would never be called"
    passed, taken = parameters(theirs[method.name]), parameters(method)
    assert taken[: len(passed)] == passed, f"{base}.{method.name} passes {passed}"


@pytest.mark.parametrize("ours", OVERRIDING, ids=lambda ours: ours.name)
def test_we_have_all_that_a_release_wants_of_us(release, ours):
    base = base_of(ours)
    wanted = {
        name
        for name, method in release.members(HOMES[base], base).items()
        if isinstance(method, ast.FunctionDef) and is_marked(method, "abstractmethod")
    }
    assert wanted, "vLLM's classes have abstract methods"
    assert wanted <= {method.name for owner, method in OVERRIDDEN if owner is ours}


@pytest.mark.parametrize(("owner", "name"), FOLLOWED)
def test_a_release_has_the_method_that_is_followed_as_it_was(release, owner, name):
    theirs = parameters(release.members(HOMES[owner], owner)[name])
    [ours] = [node for node in nodes(COMPAT, ast.FunctionDef) if node.name == FOLLOWED[owner, name].__name__]
    taken = parameters(ours)[2:]
    assert theirs[: len(taken)] == taken
    assert ours.args.kwarg or len(theirs) == len(taken)


@pytest.mark.parametrize(
    ("home", "function", "passes"),
    [
        ("vllm.v1.worker.gpu.attn_utils", "build_attn_metadata", "block_table_tensor=block_table"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "block_table_tensor=block_table_gid_0"),
    ],
)
def test_a_release_passes_tables_to_builders_as_it_got_them(release, home, function, passes):
    """What the host knows of them goes along, and would be lost with a copy."""
    _, found = release.find(home, function)
    assert passes in ast.unparse(found)


def test_a_release_has_the_program_that_serves(release):
    assert any("__main__" in ast.unparse(one) for one in release.module(SERVER) if isinstance(one, ast.If))


def test_a_release_looks_for_plugins_where_ours_is(release):
    _, group = release.find("vllm.plugins", "DEFAULT_PLUGINS_GROUP")
    assert group.value.value == compat.PLUGINS


def test_a_release_stops_when_a_plugin_raises(release):
    """What ``register`` raises must not be logged and forgotten."""
    _, loading = release.find("vllm.plugins", "load_general_plugins")
    calls = [node for node in ast.walk(loading) if isinstance(node, ast.Call) and ast.unparse(node) == "func()"]
    assert calls
    assert not [node for node in ast.walk(loading) if isinstance(node, ast.Try)]


def test_the_package_asks_for_releases_that_were_tried():
    [asked] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    oldest, newest = (release.rpartition(".")[0] for release in (CHECKED[0], CHECKED[-1]))
    major, minor = newest.split(".")
    assert asked == f"vllm>={oldest},<{major}.{int(minor) + 1}"


# the list is all that we use


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_vllm_but_by_the_list(path):
    modules = [name.name for node in nodes(path, ast.Import) for name in node.names]
    modules += [node.module or "" for node in nodes(path, ast.ImportFrom) if not node.level]
    assert "vllm" not in {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("path", USERS, ids=lambda path: path.stem)
def test_names_that_are_used_are_in_the_list(path):
    asked = {alias.name for node in imports_of_compat(path) for alias in node.names}
    asked |= {node.attr for node in nodes(path, ast.Attribute) if ast.unparse(node.value) == "compat"}
    assert asked <= {*HOMES, *vars(compat)}
    if path == COMPAT:
        assert looked_up() <= {*HOMES}


def imports_of_compat(path):
    return [node for node in nodes(path, ast.ImportFrom) if node.module == "qjl.vllm.compat"]


def looked_up():
    return {node.args[0].value for node in nodes(COMPAT, ast.Call) if is_look_up(node)}


def is_look_up(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "__getattr__"


def test_every_function_in_the_list_is_used():
    used = looked_up() | {alias.name for path in USERS for node in imports_of_compat(path) for alias in node.names}
    used |= {node.attr for path in USERS for node in nodes(path, ast.Attribute)}
    variables = {name for name, home in HOMES.items() if home == "vllm.envs"}
    classes = {name for uses in ALL for name in uses.members}
    assert {*HOMES} - classes - variables - used == set()


@pytest.mark.parametrize("path", sorted(PARAMETERS))
def test_calls_name_the_parameters_in_the_list(path):
    calls = [node for user in USERS for node in nodes(user, ast.Call) if called(node) == path.split(".")[-1]]
    assert calls
    for call in calls:
        assert not call.args
        assert {one.arg for one in call.keywords} == {*PARAMETERS[path]}


def called(node):
    if is_look_up(node.func):
        return node.func.args[0].value
    return getattr(node.func, "attr", getattr(node.func, "id", None))


@pytest.mark.parametrize("path", USERS, ids=lambda path: path.stem)
def test_members_of_names_are_in_the_list(path):
    of_names = [node for node in nodes(path, ast.Attribute) if getattr(node.value, "id", None) in HOMES]
    listed = SERVING.members | TABLES.members | ENGINE.members
    for node in of_names:
        assert node.attr in listed.get(node.value.id, ()), ast.unparse(node)


def takes_vllm_s_objects(function):
    return any(ast.unparse(one.annotation) == "Any" for one in function.args.args if one.annotation)


READERS = [
    node
    for node in tree(COMPAT).body
    if isinstance(node, ast.FunctionDef) and (takes_vllm_s_objects(node) or node.name in ("is_on_cpu", "register"))
]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_what_is_read_of_vllm_s_objects_is_in_the_list(reader):
    read = [node for node in ast.walk(reader) if isinstance(node, ast.Attribute) and is_of_vllm(node.value)]
    assert read
    assert {node.attr for node in read} <= MEMBERS


def is_of_vllm(node):
    if isinstance(node, ast.Name):
        return node.id not in ("torch", "backend")
    return isinstance(node, ast.Attribute) or is_look_up(node)


@pytest.mark.parametrize("path", [path for path in PLUGIN.glob("*.py") if path != COMPAT], ids=lambda path: path.stem)
def test_no_other_module_reads_vllm_s_objects(path):
    for function in nodes(path, ast.FunctionDef):
        theirs = {one.arg for one in function.args.args if one.annotation and ast.unparse(one.annotation) == "Any"}
        read = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
        assert not [ast.unparse(node) for node in read if getattr(node.value, "id", None) in theirs]


# what a vLLM lacks is said


def function_of(names):
    def function(*_, **__):
        return None

    kinds = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    function.__signature__ = inspect.Signature(kinds)
    return function


@pytest.fixture
def pretended(monkeypatch):
    """``pretended(uses)``: a vLLM that has just that; a module's names can be taken away again."""

    def make(uses, version="0.33.0"):
        modules = {}
        for home in ("vllm", *uses.names):
            parts = home.split(".")
            for depth in range(1, len(parts) + 1):
                modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
        for home, ours in uses.names.items():
            for name in ours:
                setattr(modules[home], name, thing(uses, name))
        modules["vllm"].__version__ = version
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return modules

    return make


def thing(uses, name):
    if name not in uses.members:
        return function_of(uses.parameters.get(name, ()))
    members = {member: function_of(uses.parameters.get(f"{name}.{member}", ())) for member in uses.members[name]}
    return type(name, (), members)


@EACH
def test_a_vllm_with_all_names_is_taken(uses, pretended, caplog):
    pretended(uses)
    with caplog.at_level(logging.WARNING):
        compat.require(uses)
    assert not caplog.records


def test_a_vllm_that_was_not_tried_is_told_of(pretended, caplog):
    pretended(SERVING, version="0.34.1")
    with caplog.at_level(logging.WARNING):
        compat.require(SERVING)
    assert "vLLM 0.34.1 has all that the plugin uses, which was tried with 0.32.0 or 0.33.0." in caplog.text


def test_all_that_has_gone_is_said_at_once_when_vllm_starts(pretended, monkeypatch, refuses):
    monkeypatch.setenv(PRESET, "b3")
    modules = pretended(SERVING, version="0.41.0")
    del modules["vllm.v1.attention.backends.cpu_attn"]._get_attn_isa
    del modules["vllm.config"].ModelConfig.get_total_num_kv_heads
    modules["vllm.v1.attention.backends.registry"].register_backend = function_of(["backend", "path"])
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", None)
    told = (
        "vllm.v1.attention.backends.cpu_attn._get_attn_isa, ModelConfig.get_total_num_kv_heads, "
        "the parameter class_path of register_backend, which the plugin uses: "
        "install vLLM 0.32.0 or 0.33.0, or unset QJL_VLLM_PRESET."
    )
    with refuses(told):
        vllm.register()
    with refuses("vLLM 0.41.0 lacks vllm.distributed.parallel_state ("):
        vllm.register()


@pytest.mark.parametrize("preset", [None, "full"])
def test_without_a_preset_nothing_is_asked_of_vllm(preset, pretended, monkeypatch):
    monkeypatch.delenv(PRESET, raising=False)
    if preset:
        monkeypatch.setenv(PRESET, preset)
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm.register()


def test_a_name_that_has_gone_is_said_where_it_is_used(pretended, refuses):
    del pretended(SERVING)["vllm.v1.kv_cache_interface"].KVCacheLayout
    with refuses("vLLM 0.33.0 lacks vllm.v1.kv_cache_interface.KVCacheLayout, which the plugin uses"):
        compat.KVCacheLayout  # noqa: B018
    with pytest.raises(AttributeError):
        compat.NoNameOfAnybody  # noqa: B018


def test_fields_and_what_init_sets_are_members():
    class Made:
        def __init__(self):
            self.impl = 1

    assert compat._has(Made, "impl")
    assert not compat._has(Made, "paged")
    assert compat._has(compat.PageShape, "tokens")


class Theirs:
    def build(self, common, fast=False):
        """vLLM's."""


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        ("self, common, fast=False, more=None", None),
        ("self, common", "vLLM 0.33.0 passes fast to Ours.build, which does not know it"),
        ("self, fast, common", "vLLM 0.33.0 passes common, fast to Ours.build"),
        ("self, common, **more", "vLLM 0.33.0 passes fast to Ours.build"),
    ],
)
def test_a_method_that_takes_other_parameters_is_told_of(taken, told, pretended, refuses):
    pretended(SERVING)
    found = {}
    exec(f"def build({taken}): pass", found)
    ours = type("Ours", (Theirs,), {"build": found["build"], "_own": function_of([])})
    if told is None:
        assert compat.overriding(ours) is ours
        return
    with refuses(told):
        compat.overriding(ours)


def test_a_method_that_vllm_does_not_call_is_told_of(pretended, refuses):
    pretended(SERVING)
    with refuses("vLLM 0.33.0 lacks the method plan that Ours overrides"):
        compat.overriding(type("Ours", (Theirs,), {"plan": lambda self: None}))


class Names(enum.Enum):
    CUSTOM = 1
    CPU_ATTN = 2


def test_the_backend_is_put_where_vllm_looks(pretended):
    put = {}
    registry = pretended(SERVING)["vllm.v1.attention.backends.registry"]
    registry.AttentionBackendEnum = Names
    registry.register_backend = lambda backend, class_path: put.update({backend: class_path})
    compat.register(Theirs)
    assert put == dict.fromkeys(Names, f"{__name__}.Theirs")


@pytest.mark.parametrize(
    ("allowed", "is_allowed"), [(None, True), ("qjl", True), ("lora,qjl", True), ("", False), ("lora", False)]
)
def test_a_vllm_that_would_not_load_the_plugin_is_refused(allowed, is_allowed, monkeypatch, refuses):
    monkeypatch.setattr(vllm_launch, "is_installed", lambda: True)
    monkeypatch.setattr(vllm_launch, "has_plugin", lambda: True)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert vllm_launch.is_ready() is is_allowed
    if is_allowed:
        vllm_launch.require_ready()
        return
    with refuses("VLLM_PLUGINS keeps vLLM from this package's plugin: add qjl to it, or unset it."):
        vllm_launch.require_ready()


def test_the_plugin_s_name_is_that_of_its_entry_point():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][compat.PLUGINS]
    assert points == {"qjl": "qjl.vllm:register"}
