"""
Cron expressions of five fields, in UTC: whether one is right, and when it comes next. Pure.

A subset on which crontab(5) and supercronic, which starts the backups inside the container, agree: where both the day
of the month and the day of the week are given, programs differ, so that is refused.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("day of the week", 0, 6))
_PART = re.compile(r"(?:\*|(\d{1,2})(?:-(\d{1,2}))?)(?:/(\d{1,2}))?")
# The longest gap between two leap days.
_DAYS_MAX = 366 * 8


def parse_cron(expression: str) -> tuple[frozenset[int], ...]:
    """
    Parse an expression into the values that each of its fields allows: minute, hour, day, month, weekday (0: Sunday).

    Raises:
        ValueError: It is wrong; the message says what.

    >>> [sorted(values) for values in parse_cron("*/30 2 1,15 1-3 *")][:3]
    [[0, 30], [2], [1, 15]]
    """
    texts = expression.split()
    if len(texts) != len(_FIELDS):
        raise ValueError("a schedule has five fields: minute, hour, day of the month, month, day of the week")
    fields = tuple(_parse_field(text, *field) for text, field in zip(texts, _FIELDS, strict=True))
    if texts[2] != "*" and texts[4] != "*":
        raise ValueError("give the day of the month or the day of the week, not both: programs differ about it")
    if _next_day(fields, datetime(2000, 1, 1, tzinfo=UTC)) is None:
        raise ValueError("it never comes: no such month has that day")
    return fields


def _parse_field(text: str, name: str, low: int, high: int) -> frozenset[int]:
    values: set[int] = set()
    for part in text.split(","):
        found = _PART.fullmatch(part)
        if found is None:
            raise ValueError(f"`{part}` is no {name}: a number, `*`, `a-b`, each with `/step`, or a list of them")
        first, last, step = found.groups()
        begin = low if first is None else int(first)
        # `5/10` begins at 5; without a step a number is itself only.
        end = int(last) if last else (high if first is None or step else begin)
        if not low <= begin <= end <= high or step == "0" or (step and int(step) == 0):
            raise ValueError(f"`{part}` is no {name}: it goes from {low} to {high}")
        values |= set(range(begin, end + 1, int(step or 1)))
    return frozenset(values)


def find_next(expression: str, after: datetime) -> datetime:
    """
    Find the first instant after another, aware UTC, at which an expression comes.

    Raises:
        ValueError: The expression is wrong.

    >>> find_next("17 2 * * 0", datetime(2026, 11, 21, tzinfo=UTC)).isoformat()
    '2026-11-22T02:17:00+00:00'
    """
    fields = parse_cron(expression)
    earliest = after.astimezone(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
    for day in (earliest, (earliest + timedelta(days=1)).replace(hour=0, minute=0)):
        found_day = _next_day(fields, day)
        if found_day is None:
            continue
        since = (earliest.hour, earliest.minute) if found_day.date() == earliest.date() else (0, 0)
        times = [(hour, minute) for hour in sorted(fields[1]) for minute in sorted(fields[0])]
        time = next((each for each in times if each >= since), None)
        if time is not None:
            return found_day.replace(hour=time[0], minute=time[1])
    raise ValueError(f"`{expression}` never comes")


def _next_day(fields: tuple[frozenset[int], ...], since: datetime) -> datetime | None:
    for days in range(_DAYS_MAX):
        day = since + timedelta(days=days)
        if day.month in fields[3] and day.day in fields[2] and day.isoweekday() % 7 in fields[4]:
            return day
    return None
