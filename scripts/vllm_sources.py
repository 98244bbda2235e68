"""Fetch the Python sources of vLLM's releases into build/vllm-sources/VERSION.zip, for tests/test_vllm_contract.py.

    python scripts/vllm_sources.py [VERSION...]

Without a version, those of `qjl.vllm.compat.CHECKED`. A wheel has 0.3 GB, of which 12 MB are Python: only these are
read, by ranges, from the index in PIP_INDEX_URL or PyPI. What is there already is not fetched again.
"""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from qjl.vllm.compat import CHECKED

FOLDER = Path(__file__).resolve().parent.parent / "build/vllm-sources"
INDEX = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
READ_AHEAD = 1 << 20
SECONDS = 60
PARTIAL_CONTENT = 206


class Remote(io.RawIOBase):
    """A file behind an address, read by ranges."""

    def __init__(self, address: str) -> None:
        self._address, self._place = address, 0
        with urlopen(Request(address, method="HEAD"), timeout=SECONDS) as answer:
            self._size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        asked = Request(self._address, headers={"Range": f"bytes={self._place}-{stop - 1}"})
        with urlopen(asked, timeout=SECONDS) as answer:
            if answer.status != PARTIAL_CONTENT:
                raise URLError(f"{self._address} is not served in parts")
            read = answer.read()
        buffer[: len(read)] = read
        self._place += len(read)
        return len(read)


def wheels() -> dict[str, str]:
    """Addresses of vLLM's wheels for Linux on x86, by version, the newest last."""
    address = f"{INDEX.rstrip('/')}/vllm/"
    accepted = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urlopen(Request(address, headers=accepted), timeout=SECONDS) as answer:
        files = json.load(answer)["files"]
    named = [(file["filename"].split("-")[1], file) for file in files if file["filename"].endswith("x86_64.whl")]
    found = {version: urljoin(address, file["url"]) for version, file in named if version.replace(".", "").isdigit()}
    return dict(sorted(found.items(), key=lambda item: _ordered(item[0])))


def _ordered(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def fetch(version: str, address: str) -> None:
    unfinished = FOLDER / f"{version}.part"
    with (
        zipfile.ZipFile(io.BufferedReader(Remote(address), READ_AHEAD)) as wheel,
        zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as sources,
    ):
        for member in wheel.namelist():
            if member.startswith("vllm/") and member.endswith(".py"):
                sources.writestr(member, wheel.read(member))
    unfinished.rename(FOLDER / f"{version}.zip")


def main(versions: Sequence[str]) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = [version for version in versions or CHECKED if not (FOLDER / f"{version}.zip").exists()]
    try:
        known = wheels()
        for version in wanted:
            fetch(version, known[version])
    except (OSError, HTTPException, zipfile.BadZipFile) as error:
        print(f"vLLM's sources were not to be had from {INDEX}: {error}.", file=sys.stderr)
        return bool(wanted)
    except KeyError as error:
        print(f"{INDEX} has no wheel of vLLM {error} for Linux on x86.", file=sys.stderr)
        return 1
    newest = [*known][-1]
    if _ordered(newest) > _ordered(CHECKED[-1]):
        print(f"vLLM {newest} is out, and not in CHECKED: python scripts/vllm_sources.py {newest}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
