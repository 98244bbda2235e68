"""``python -m qjl`` is ``qjl``."""

from __future__ import annotations

from qjl.cli import main

main()
