"""Which backend and which instruction set are chosen, and what is said where they are not there."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from method_cases import without_statistics
from qjl import ops
from qjl.methods.qjl import QJL
from qjl.ops.cpu import library, structs

HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
needs_kernels = pytest.mark.skipif(not library.is_installed(), reason="the kernels were not compiled")


@pytest.fixture
def unsettled(monkeypatch):
    """Nothing is chosen yet, as in a fresh process."""
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    before = library.instruction_set() if library.is_installed() else None
    monkeypatch.setattr(ops, "_chosen", None)
    _forget()
    yield monkeypatch
    monkeypatch.undo()
    _forget()
    if before:
        library.use_instruction_set(before)


def _compute():
    first = torch.zeros(1, 1, dtype=torch.int64)
    without_statistics(QJL(2)).encode_tokens(torch.ones(1, 1, 64, 64), first)


def _forget():
    library.load.cache_clear()
    library.limits.cache_clear()
    ops._automatic.cache_clear()


@pytest.fixture
def uncompiled(unsettled):
    unsettled.delenv(library.PATH_VARIABLE, raising=False)
    unsettled.setattr(library, "FILE_NAME", "absent.so")
    return unsettled


def test_the_kernels_are_compiled_wherever_there_is_a_compiler():
    assert library.is_installed() or not HAS_COMPILER, "run `make native` to see why they are not"


@needs_kernels
def test_the_kernels_are_chosen_where_they_are_there(unsettled, caplog):
    caplog.set_level(logging.INFO, "qjl")
    assert ops.active_backend() == "cpu"
    ops.use_backend("reference")
    ops.use_backend("auto")
    assert ops.active_backend() == "cpu"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert library.instruction_set() in caplog.text


def test_without_kernels_the_reference_computes_and_that_is_said_once(uncompiled, caplog):
    for _ in range(3):
        _compute()
    ops.use_backend("auto")
    assert ops.backends() == ["reference"]
    assert ops.active_backend() == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "without a compiler" in caplog.text


def test_asking_for_kernels_that_are_not_there_fails_loudly(uncompiled, refuses):
    with refuses("no compiler was found when qjl was installed: install GCC 12 or Clang"):
        ops.use_backend("cpu")
    uncompiled.setenv(ops.VARIABLE, "cpu")
    with refuses("no compiler was found"):
        ops.active_backend()


def test_a_library_that_does_not_load_fails_loudly(unsettled, tmp_path, refuses):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for path in (broken, tmp_path / "absent.so"):
        unsettled.setenv(library.PATH_VARIABLE, str(path))
        with refuses(f"{path} does not load"):
            ops.active_backend()


def test_the_environment_chooses_the_backend(unsettled, refuses):
    unsettled.setenv(ops.VARIABLE, "reference")
    assert ops.active_backend() == "reference"
    unsettled.setattr(ops, "_chosen", None)
    unsettled.setenv(ops.VARIABLE, "abacus")
    with refuses("backend 'abacus' is not available here: choose one of "):
        ops.active_backend()


@needs_kernels
def test_the_environment_chooses_the_instruction_set(unsettled, refuses):
    for name in library.instruction_sets():
        library.load.cache_clear()
        unsettled.setenv(library.ISA_VARIABLE, name)
        assert library.instruction_set() == name
    library.load.cache_clear()
    unsettled.setenv(library.ISA_VARIABLE, "mmx")
    with refuses("QJL_CPU_ISA=mmx is not available here: choose one of scalar"):
        ops.active_backend()


@needs_kernels
def test_an_instruction_set_that_is_not_there_is_refused_and_nothing_changes(refuses):
    before = library.instruction_set()
    with refuses(f"choose one of {', '.join(library.instruction_sets())}."):
        library.use_instruction_set("mmx")
    assert library.instruction_set() == before


@needs_kernels
def test_scalar_kernels_are_always_there():
    assert library.instruction_sets()[0] == "scalar"


@needs_kernels
def test_of_several_copies_the_newest_is_loaded(unsettled, tmp_path):
    built = library._copies()[-1]
    unsettled.delenv(library.PATH_VARIABLE, raising=False)
    folders = [tmp_path / name for name in ("old", "new", "older", "empty")]
    for folder, age in zip(folders, (20, 10, 30, None), strict=True):
        folder.mkdir()
        if age:
            shutil.copy(built, folder / library.FILE_NAME)
            os.utime(folder / library.FILE_NAME, (1e9 - age, 1e9 - age))
    unsettled.setattr(library, "_folders", lambda: folders)
    assert library.load()._name == str(folders[1] / library.FILE_NAME)


# Libraries of other versions

COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no compiler")
OLDER = 'extern "C" const char* qjl_supported() { return "scalar "; }'
OTHER = f'{OLDER} extern "C" unsigned long long qjl_abi() {{ return 42; }}'


def _compiled(source, path):
    subprocess.run([COMPILER, "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=source, text=True, check=True)
    return path


@needs_kernels
def test_the_number_of_the_structs_is_that_of_the_library():
    assert library.fits(library.load())
    assert 0 < structs.abi() < 2**64


@needs_kernels
@pytest.mark.parametrize("changed", structs.ALL)
def test_any_other_field_is_another_number(changed, monkeypatch):
    """A field more, one that is moved, one of another size, another name: all are seen."""
    fields = list(changed._fields_)
    others = [
        [*fields, ("more", ctypes.c_int64)],
        [*fields[:-1], (fields[-1][0], ctypes.c_int64 * 9)],
        [*fields[:-1], (f"{fields[-1][0]}s", fields[-1][1])],
        [fields[-1], *fields[:-1]],
    ]
    numbers, every = {structs.abi()}, structs.ALL
    for other in others:
        struct = type(changed.__name__, (ctypes.Structure,), {"_fields_": other})
        monkeypatch.setattr(structs, "ALL", [struct if one is changed else one for one in every])
        numbers.add(structs.abi())
    assert len(numbers) == 1 + len(others)


@needs_kernels
@needs_compiler
@pytest.mark.parametrize("source", [OTHER, OLDER])
def test_of_several_copies_the_newest_that_fits_is_loaded(unsettled, tmp_path, source):
    built = library._copies()[-1]
    unsettled.delenv(library.PATH_VARIABLE, raising=False)
    folders = [tmp_path / name for name in ("fits", "fits too", "other", "broken")]
    for folder in folders:
        folder.mkdir()
    copies = [folder / library.FILE_NAME for folder in folders]
    shutil.copy(built, copies[0])
    shutil.copy(built, copies[1])
    _compiled(source, copies[2])
    copies[3].write_bytes(b"not a library")
    for age, path in enumerate(copies):
        os.utime(path, (1e9 + age, 1e9 + age))
    unsettled.setattr(library, "_folders", lambda: folders)
    assert library.load()._name == str(copies[1])
    assert ops.active_backend() == "cpu"


@needs_compiler
@pytest.mark.parametrize("source", [OTHER, OLDER])
def test_where_no_copy_fits_one_sentence_says_to_reinstall(unsettled, tmp_path, refuses, source):
    path = _compiled(source, tmp_path / library.FILE_NAME)
    unsettled.delenv(library.PATH_VARIABLE, raising=False)
    unsettled.setattr(library, "_folders", lambda: [tmp_path])
    for chosen in (None, str(path)):
        if chosen:
            unsettled.setenv(library.PATH_VARIABLE, chosen)
        for ask in (ops.active_backend, lambda: ops.use_backend("cpu"), library.instruction_set):
            with refuses(f"{path} was built from another version of qjl: run `pip install --force-reinstall"):
                ask()


@needs_kernels
def test_structs_of_another_version_meet_no_kernel(unsettled, refuses):
    unsettled.setattr(structs, "MEANING", structs.MEANING + 1)
    with refuses("was built from another version of qjl"):
        _compute()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files that cannot be read are Linux's here")
def test_a_file_that_cannot_be_read_fails_loudly(unsettled, tmp_path, refuses):
    """Root may read all files, but no directory is one, and no link that leads nowhere."""
    folder, link = tmp_path / "folder.so", tmp_path / "link.so"
    folder.mkdir()
    link.symlink_to(tmp_path / "absent")
    for path in (folder, link):
        unsettled.setenv(library.PATH_VARIABLE, str(path))
        with refuses(f"{path} does not load"):
            ops.active_backend()
