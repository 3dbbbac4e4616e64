"""
Which versions to purge, and which to bring back. Pure: decides, and does nothing.

A version's age counts from when it was superseded, which is when the next newer entry of its key was made. The time of
an entry is that in its version ID where that is a ULID: versitygw reports for a version that is not current any
more when it was superseded, and for a delete marker the time of what it deleted. Source: versity/versitygw issue 2311.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from memharbor_custodian.errors import RefusedError

_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # pragma: allowlist secret - Crockford's base 32
_CROCKFORD = {digit: value for value, digit in enumerate(_DIGITS)}
_ULID_LENGTH, _ULID_TIME_LENGTH = 26, 10
# Larger than any drift between two machines that somebody looks after.
CLOCK_TOLERANCE = timedelta(hours=1)
# A stack backs up every day; a store in which nothing was written for longer, or a clock that says so, is a riddle.
SILENCE_MAXIMUM = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Entry:
    """One version or delete marker of a key. `reported_at` is what the store says of its time, aware UTC."""

    key: str
    version_id: str
    is_marker: bool
    reported_at: datetime
    size_bytes: int = 0

    @property
    def made_at(self) -> datetime:
        """When it was made, aware UTC."""
        return ulid_time(self.version_id) or self.reported_at


# The entries of each key, the newest first.
History = Mapping[str, Sequence[Entry]]


def ulid_time(text: str) -> datetime | None:
    """
    Read the time out of a ULID; `None` where the text is none. Source: ulid/spec, 48 bits of milliseconds first.

    >>> ulid_time("01ARZ3NDEKTSV4RRFFQ69G5FAV").isoformat()
    '2016-07-30T23:54:10.259000+00:00'
    >>> ulid_time("null") is None
    True
    """
    if len(text) != _ULID_LENGTH or not set(text) <= set(_CROCKFORD) or text[0] > "7":
        return None
    milliseconds = 0
    for digit in text[:_ULID_TIME_LENGTH]:
        milliseconds = milliseconds * 32 + _CROCKFORD[digit]
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (OverflowError, ValueError):
        return None


@dataclass(frozen=True)
class PurgePlan:
    """
    What a purge deletes for good.

    Args:
        versions: Versions and delete markers that something newer of the same key follows.
        tombstones: Delete markers that are all that is left of their key: with them the key is gone.
    """

    versions: tuple[Entry, ...]
    tombstones: tuple[Entry, ...]


def plan_purge(history: History, *, now: datetime, keep: timedelta) -> PurgePlan:
    """
    Choose what was superseded longer ago than the promise. A current version is never among it.

    Args:
        history: The entries of each key, the newest first.
        now: Aware.
        keep: The promise: how long a deleted or overwritten version can be brought back.

    Raises:
        RefusedError: The clock cannot be right; what it says decides over what is deleted for good.
    """
    check_clock(history, now=now)
    versions: list[Entry] = []
    tombstones: list[Entry] = []
    for entries in history.values():
        newest, *older = entries
        kept = 0
        for before, entry in zip(entries, older, strict=False):
            # Not before it was made: a clock that was set back makes nothing look older than it is.
            if max(before.made_at, entry.made_at) < now - keep:
                versions.append(entry)
            else:
                kept += 1
        if newest.is_marker and not kept and max(entry.made_at for entry in entries) < now - keep:
            tombstones.append(newest)
    return PurgePlan(tuple(versions), tuple(tombstones))


def check_clock(history: History, *, now: datetime) -> None:
    """
    Refuse to judge ages by a clock that contradicts the store.

    Raises:
        RefusedError: The newest entry is of the future, or nothing was written for longer than any schedule leaves out.
    """
    newest_at = max((entry.made_at for entries in history.values() for entry in entries), default=None)
    if newest_at is None:
        return
    if newest_at > now + CLOCK_TOLERANCE:
        raise RefusedError(
            f"the clock says {now:%Y-%m-%d %H:%M} UTC, but the store holds something of {newest_at:%Y-%m-%d %H:%M} UTC",
            hint="set the machine's clock",
        )
    if newest_at < now - SILENCE_MAXIMUM:
        raise RefusedError(
            f"nothing was written into the store since {newest_at:%Y-%m-%d %H:%M} UTC: the clock is wrong, or backups"
            " have ended and their versions are all that is left",
            hint="set the machine's clock, or run `memharbor backup create`",
        )


@dataclass(frozen=True)
class UndeletePlan:
    """
    What an undelete does.

    Args:
        markers: Delete markers to remove, so that what they hide is current again.
        copies: Versions to write once more, because something else is current.
        brought_back: Keys that are brought back.
        gone: Keys without a version to bring back.
    """

    markers: tuple[Entry, ...]
    copies: tuple[Entry, ...]
    brought_back: int
    gone: int


def plan_undelete(history: History, *, since: datetime) -> UndeletePlan:
    """
    Choose the delete markers to remove so that everything deleted since a moment is there again.

    Args:
        history: The entries of each key, the newest first.
        since: Aware; what was deleted before stays deleted.
    """
    markers: list[Entry] = []
    brought_back = gone = 0
    for entries in history.values():
        if not entries[0].is_marker or entries[0].made_at < since:
            continue
        version = next((place for place, entry in enumerate(entries) if not entry.is_marker), None)
        if version is None:
            gone += 1
        elif entries[version - 1].made_at >= since:
            # The oldest marker above it is when it was deleted; later ones deleted it again.
            markers += entries[:version]
            brought_back += 1
    return UndeletePlan(tuple(markers), (), brought_back, gone)


def plan_undelete_at(history: History, *, at: datetime) -> UndeletePlan:
    """
    Choose what brings every key that was there at a moment back to what it was then.

    Keys that were made later stay: an archived segment that is newer does no harm.
    """
    markers: list[Entry] = []
    copies: list[Entry] = []
    brought_back = 0
    for entries in history.values():
        place = next((place for place, entry in enumerate(entries) if entry.made_at <= at), None)
        if not place or entries[place].is_marker:
            continue  # made later, or current then as now, or deleted already
        if all(entry.is_marker for entry in entries[:place]):
            markers += entries[:place]
        else:
            copies.append(entries[place])
        brought_back += 1
    return UndeletePlan(tuple(markers), tuple(copies), brought_back, 0)


def group(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Group entries by key, in the order in which the store lists them: the newest first."""
    history: dict[str, list[Entry]] = {}
    for entry in entries:
        history.setdefault(entry.key, []).append(entry)
    return history
