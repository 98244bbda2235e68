"""Compare what `qjl eval perplexity` found on two devices: exits with 1 where it differs by more than error bars.

Both read the same text, so that the smaller of two error bars counts, which is mostly of the text.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from qjl.errors import QJLError
from qjl.lab import results
from qjl.lab.results import Row

COMPARED = {"kl": "kl_se", "dppl_percent": "dppl_percent_se"}
DIFFERENT, CANNOT = 1, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    chosen = parser.parse_args()
    try:
        one, other = (rows_of(path) for path in (chosen.one, chosen.other))
    except QJLError as error:
        print(f"Error: {error}", file=sys.stderr)
        return CANNOT
    found = list(differences(one, other))
    for line in found:
        print(line)
    print(f"{len(one)} cases, {len(found)} differences")
    return DIFFERENT if found else 0


def rows_of(path: Path) -> dict[str, Row]:
    """By preset and context.

    Raises:
        QJLError: if there are none.
    """
    found = {f"{row['preset']} at {row['context']} tokens": row for row in results.read(path)}
    if not found:
        raise QJLError(f"{path} has no rows: measure them first.")
    return found


def differences(one: dict[str, Row], other: dict[str, Row]) -> Iterator[str]:
    """A line for each number that differs, and for what was measured on one device alone."""
    for case in sorted(one.keys() ^ other.keys()):
        yield f"{case}: measured on one device alone"
    for case in one.keys() & other.keys():
        for name, of_error in COMPARED.items():
            a, b = one[case][name], other[case][name]
            bars = [row[of_error] for row in (one[case], other[case])]
            if any(bar is None for bar in bars):
                yield f"{case}: no error bar of {name}, which takes two chunks or more"
            elif not (math.isfinite(a) and abs(a - b) <= min(bars)):
                yield f"{case}: {name} is {a:.5g} and {b:.5g}, where {min(bars):.2g} is allowed"


if __name__ == "__main__":
    sys.exit(main())
