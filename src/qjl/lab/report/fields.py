"""What a field of a row holds, by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Rule = Callable[[object], bool]
NEVER_NULL = ("asked", "batch", "versions")  # of the fields that rows may lack


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _is_word(value: object) -> bool:
    return isinstance(value, str)


def _is_group(value: object) -> bool:
    return isinstance(value, dict)


def _is_counted(value: object) -> bool:
    """Above nothing: what is drawn over logarithms."""
    return isinstance(value, (int, float)) and value > 0


def _is_error(value: object) -> bool:
    """A standard error; not a number where one measurement has none."""
    return isinstance(value, (int, float)) and not value < 0


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _are_answers(value: object) -> bool:
    return isinstance(value, str) and set(value) <= {"0", "1"}


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _are_two(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _has_task(value: object) -> bool:
    return isinstance(value, dict) and "task" in value


def _are_percentiles(value: object) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(name)) for name in ("p50", "p99"))


_BY_NAME: Mapping[str, Rule] = (
    dict.fromkeys(("model", "preset", "source", "role", "task", "metric", "filter"), _is_word)
    | dict.fromkeys(("backend", "machine", "device", "dtype"), _is_word)
    | dict.fromkeys(("protocol", "statuses", "versions"), _is_group)
    | dict.fromkeys(("first_token_seconds", "request_seconds"), _are_percentiles)
    | dict.fromkeys(("bits", "tokens", "context", "batch"), _is_counted)
    | {"problems.right": _are_answers, "found": _is_share, "resident_bytes": _are_numbers, "kl_of_chunks": _are_numbers}
    | {"asked": _has_task, "processor_seconds": _is_number}
    | {"serving.peak_bytes": _are_two, "problems.tokens": _is_number}
)
_BY_START: Mapping[str, Rule] = {
    "ms_": _is_number,
    "ratio_": _is_number,
    "smaller_than_": _is_number,
    "spread_": _are_two,
}


def fits(kind: str, field: str, value: object, is_needed: bool) -> bool:
    """Whether a field of this name may hold this; what no rule names may hold anything if no figure needs it."""
    by_name = _BY_NAME.get(f"{kind}.{field}") or _BY_NAME.get(field)
    by_start = (rule for start, rule in _BY_START.items() if field.startswith(start))
    by_end = _is_error if field.endswith("_se") else None
    rule = by_name or by_end or next(by_start, None) or (_is_number if is_needed else None)
    return rule is None or rule(value)
