"""
What a comparison is made of: one way's seconds and bytes, and a table of them against the first way. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What made-up memories are made of.
WORDS = (
    "prefers remembers coffee tea Lisbon Berlin Tuesday morning evening train flight sister brother doctor garden piano "
    "vegetarian allergic project deadline contract invoice hiking swimming novel poem window blue green seven forty"
)


@dataclass(frozen=True)
class Measure:
    """
    How one way did one piece of work.

    Args:
        work: What was to be done, for instance `full`.
        way: How, for instance `pg_dump`; the first way of a piece of work is what the others are compared with.
        seconds: How long it took, by the wall clock.
        size_bytes: What it wrote; `None` where it wrote nothing that is kept.
    """

    work: str
    way: str
    seconds: float
    size_bytes: int | None = None


def compare(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """
    Set every measure against the first one of the same work.

    >>> rows = compare([Measure("full", "a", 4.0, 100), Measure("full", "b", 1.0, 50)])
    >>> rows[1]["seconds_ratio"], rows[1]["bytes_ratio"]
    (0.25, 0.5)
    """
    first: dict[str, Measure] = {}
    rows = []
    for measure in measures:
        base = first.setdefault(measure.work, measure)
        rows.append(
            {
                "work": measure.work,
                "way": measure.way,
                "seconds": round(measure.seconds, 2),
                "seconds_ratio": _ratio(measure.seconds, base.seconds),
                "size_bytes": measure.size_bytes,
                "bytes_ratio": _ratio(measure.size_bytes, base.size_bytes),
            }
        )
    return rows


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, 3)
