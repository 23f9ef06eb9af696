"""Tidy tables: a list of rows, each a dictionary from column to value."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeGuard

Row = dict[str, Any]


def columns(rows: Iterable[Row]) -> list[str]:
    """Every column of any row, in the order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV; what is missing is empty, and what is a list or a dictionary is JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return text.getvalue()


def json_text(value: Any) -> str:
    """JSON that every reader takes: what is not finite is null."""
    return json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same value with None in place of every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """The rows by key, in the order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def number(value: float, digits: int = 4, *, zeros: bool = False) -> str:
    """In so many digits, a large number in all that stand before its point: 1,823 rather than 1.82e+03.

    Args:
        value: the number.
        digits: how many that mean something.
        zeros: keep those at the end, so that numbers under each other have the same precision.
    """
    text = f"{value:{'#' if zeros else ''}.{digits}g}".rstrip(".")
    return f"{value:,.0f}" if "e+" in text and abs(value) < 1e9 else text


def cell(value: Any, digits: int = 4) -> str:
    """A number in so many digits, nothing where nothing is there, and anything else as it is."""
    if value is None:
        return ""
    return number(value, digits) if isinstance(value, float) else str(value)


class Spread(NamedTuple):
    """Several measurements of one thing."""

    mean: float
    sd: float
    """Sample standard deviation; 0 for one measurement."""
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and standard deviation of what is there and finite; None when nothing is."""
    found = [float(v) for v in values if measured(v)]
    if not found:
        return None
    return Spread(fmean(found), stdev(found) if len(found) > 1 else 0.0, len(found))


def measured(value: float | None) -> TypeGuard[float]:
    """Whether a measurement is there and finite."""
    return value is not None and math.isfinite(value)


def paired(rows: Iterable[Row], base: Iterable[Row]) -> Spread | None:
    """The ratio of two methods' FD over training seeds that both have; None where there is none."""
    own, other = by_training(rows), by_training(base)
    return spread(own[seed] / other[seed] for seed in own if other.get(seed))


def by_training(rows: Iterable[Row]) -> dict[int | None, float]:
    """The mean FD of each training seed; of None where the rows do not tell theirs."""
    groups = grouped(rows, lambda r: r.get("training_seed"))
    return {seed: value.mean for seed, own in groups.items() if (value := spread(r.get("fd") for r in own)) is not None}
