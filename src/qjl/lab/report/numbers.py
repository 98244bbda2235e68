"""Numbers as a reader needs them: no digit that says nothing, and the best marked with all that may be as good."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev

from qjl.lab.report.parts import Cell, Mark

NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
ERRORS = 2  # standard errors of a difference, within which two results are not told apart
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # for 1 to 9 degrees of freedom
_ALIKE = 6  # pairs of one sign, of which two in 64 are luck
Measured = tuple[float, float | None]  # a value and its standard error


def number(value: float | None, digits: int = 3) -> str:
    """So many digits that count; a dash where nothing was measured."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _plain(value, decimals) if 1e-5 <= abs(value) < 1e9 else f"{value:.{digits - 1}e}"


def with_error(value: float | None, error: float | None) -> str:
    """Two digits of the error, and the value to the same place."""
    if value is None or not error or not math.isfinite(error):
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{_plain(value, decimals)} ± {_plain(error, decimals)}"


def _plain(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def signed(text: str) -> str:
    """With a plus where there is no minus."""
    return text if text.startswith((MINUS, NOTHING)) or text == "0" else f"+{text}"


def percent(share: float | None) -> str:
    return NOTHING if share is None else number(100 * share)


def mean_and_error(numbers: Sequence[float]) -> Measured:
    """Their mean with its standard error, which a single number does not have."""
    return mean(numbers), stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None


def are_apart(differences: Sequence[float]) -> bool:
    """Whether pairs differ: by Student's t at 95 %, or, all by the same, at least as many as a sign test needs.

    Without a pair nothing says that they are alike.
    """
    if not differences:
        return True
    found, error = mean_and_error(differences)
    if not error:
        return found != 0 and len(differences) >= _ALIKE
    return abs(found) > _student(len(differences) - 1) * error


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile; beyond the table Cornish and Fisher's expansion, to three digits."""
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.37 / freedom + 2.82 / freedom**2


def is_near(one: Measured, other: Measured) -> bool:
    """Whether two results cannot be told apart, as if they were independent.

    Those of presets on the same text are not: what is hard for one is hard for the other, which makes this careful.
    """
    if one[1] is None or other[1] is None:
        return False
    return abs(one[0] - other[0]) <= ERRORS * math.hypot(one[1], other[1])


def marks(
    results: Sequence[Measured | None],
    higher: bool,
    near: Callable[[int, int], bool] | None = None,
) -> list[Mark]:
    """The best, and what is not told apart from it; None stands for what does not compete, and if all are the same,
    none is the best.

    ``near``: whether the results of two indices cannot be told apart, if more is known than their errors.
    """
    competing = [index for index, one in enumerate(results) if one is not None and math.isfinite(one[0])]
    if len(competing) < 2:
        return [""] * len(results)
    values = {index: one[0] for index in competing if (one := results[index]) is not None}
    if len(set(values.values())) == 1:
        return [""] * len(results)
    top = (max if higher else min)(values.values())
    best = next(index for index, value in values.items() if value == top)

    def alike(index: int) -> bool:
        one, other = results[index], results[best]
        assert one is not None
        assert other is not None
        return near(index, best) if near else is_near(one, other)

    found: list[Mark] = [""] * len(results)
    for index, value in values.items():
        found[index] = "best" if value == top else "near" if alike(index) else ""
    return found


def column(
    results: Sequence[Measured | None],
    shown: Sequence[str],
    higher: bool = True,
    notes: Sequence[str] = (),
    near: Callable[[int, int], bool] | None = None,
) -> list[Cell]:
    """Cells of results that compete, with their marks."""
    found = marks(results, higher, near)
    return [Cell(*parts) for parts in zip(shown, found, notes or [""] * len(shown), strict=True)]
