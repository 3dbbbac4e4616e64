"""
Decide what a restore would do, without touching anything: which backup, which timeline, which options.

Everything that can be refused is refused here. Source: PostgreSQL manual, Recovery Target; docs/concepts/backup.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from memharbor.backup.engine import Backup, BackupEngine
from memharbor.backup.wal import (
    SEGMENT_BYTES,
    Segment,
    format_lsn,
    missing_segments,
    newest,
    parse_lsn,
    parse_segment,
)
from memharbor.backup.wal_lookup import find_commit, find_last_record, find_restore_point
from memharbor.errors import StateRefusedError, UsageError, VerificationError
from memharbor.versions import POSTGRES_MAJOR

TargetKind = Literal["end", "immediate", "time", "name", "lsn", "xid"]

_POSITION = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}")


@dataclass(frozen=True)
class RestorePlan:
    """
    What a restore will do.

    Args:
        backup: The backup that is restored.
        timeline: The timeline that is replayed.
        target: The target in words.
        options: What pgBackRest is told about the target.
        target_lsn: The target's position; `None` for a moment and for the end.
        end: The last segment that is replayed where the target is the end of the archive, else `None`.
        kind: What the target is.
    """

    backup: Backup
    timeline: int
    target: str
    options: tuple[str, ...]
    target_lsn: int | None = None
    end: Segment | None = None
    kind: TargetKind = "end"

    def as_data(self) -> dict[str, Any]:
        """Describe the plan for `--dry-run` and `--output json`."""
        return {
            "backup": self.backup.id,
            "backup_ended_at": self.backup.ended_at,
            "target": self.target,
            "target_lsn": None if self.target_lsn is None else format_lsn(self.target_lsn),
            "timeline": self.timeline,
        }


def check_reached(plan: RestorePlan, reached_lsn: int) -> None:
    """
    Compare where a replay ended with what was asked for: PostgreSQL opens silently where WAL ends early.

    A moment that is not reached PostgreSQL itself refuses.

    Args:
        plan: What was asked for.
        reached_lsn: Where the timeline that was replayed was left.

    Raises:
        VerificationError: Less was reached.
    """
    wanted = plan.backup.stop_lsn if plan.target_lsn is None else plan.target_lsn
    if reached_lsn < wanted:
        raise VerificationError(
            f"recovery ended at {format_lsn(reached_lsn)}, before {plan.target} at {format_lsn(wanted)}"
        )
    # To the end may end inside the last segment; before it, WAL is missing or damaged and rows are lost.
    if plan.end is not None and reached_lsn < plan.end.number * SEGMENT_BYTES:
        raise VerificationError(
            f"recovery ended at {format_lsn(reached_lsn)}, but the archive goes on to segment {plan.end.name}"
        )


def share_replayed(plan: RestorePlan, lsn: int) -> float:
    """Tell which share of 100 has been replayed, as far as it can be known; `lsn` is how far it is."""
    end = plan.target_lsn or (plan.end.number * SEGMENT_BYTES if plan.end else lsn)
    return max(0.0, min(100.0, 100.0 * (lsn - plan.backup.start_lsn) / max(1, end - plan.backup.start_lsn)))


def parse_instant(text: str, *, now: datetime) -> datetime:
    """
    Read `--at`: ISO 8601 with an offset, in the past.

    Raises:
        UsageError: It is not a time, has no offset, or lies in the future.

    >>> parse_instant("2026-01-02T03:04:05Z", now=datetime(2027, 1, 1, tzinfo=UTC))
    datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(f"`{text}` is not a time", hint="write it as 2026-01-31T12:00:00Z") from exc
    if at.tzinfo is None:
        raise UsageError(f"`{text}` has no time zone", hint=f"write `{text}Z` for UTC, or an offset: `{text}+02:00`")
    if at > now:
        raise UsageError(f"`{text}` lies in the future")
    return at.astimezone(UTC)


def parse_position(text: str) -> int:
    """
    Read `--lsn`.

    Raises:
        UsageError: It is no position in the log.

    >>> parse_position("0/5000060")
    83886176
    """
    if not _POSITION.fullmatch(text):
        raise UsageError(f"`{text}` is no LSN", hint="write it as PostgreSQL does: `0/5000060`")
    return parse_lsn(text)


def plan_restore(
    engine: BackupEngine,
    *,
    at: datetime | None = None,
    name: str | None = None,
    lsn: int | None = None,
    xid: int | None = None,
    backup_id: str | None = None,
) -> RestorePlan:
    """
    Decide what a restore would do.

    Args:
        engine: The stack's backups.
        at: Instant to recover to, aware UTC.
        name: Named restore point to recover to.
        lsn: Position to recover to, as a byte position.
        xid: Transaction whose commit is the last thing that is recovered. None of the four: to the end of the archive.
        backup_id: The backup to begin with; the newest that leads to the target by default.

    Raises:
        StateRefusedError: There is nothing to restore, or the target cannot be reached from what there is.
    """
    usable = _usable_backups(engine, backup_id)
    archived = engine.list_segments()
    if not archived:
        raise StateRefusedError(
            "the archive holds no WAL, so no backup can be made consistent", hint="run `memharbor doctor`"
        )
    # What the server has and the archive has not yet: a running server archives it before the restore, and a stopped
    # one's is put back beside the restored files.
    segments = sorted({*archived, *engine.list_live_segments()})
    if name is not None:
        plan = _to_name(engine, segments, usable, name)
    elif at is not None:
        plan = _to_moment(engine, segments, usable, at)
    elif lsn is not None:
        plan = _to_position(engine, segments, usable, lsn)
    elif xid is not None:
        plan = _to_transaction(engine, segments, usable, xid)
    else:
        end = newest(archived) or archived[-1]
        backup = _backup_for(engine, usable, timeline=end.timeline, target="the end of the archive")
        _refuse_gap(engine, archived, backup, end.timeline, end.number)
        options = ("--type=default", f"--target-timeline={end.timeline}")
        plan = RestorePlan(backup, end.timeline, "the end of the archive", options, end=end)
    _refuse_other_version(plan.backup)
    return plan


def plan_backup(backup: Backup, *, point: str | None = None, lsn: int | None = None, timeline: int = 0) -> RestorePlan:
    """
    Decide how one backup is restored by itself, with no more WAL than it needs.

    Args:
        backup: The backup.
        point: The restore point that was named right after it; the first moment at which it is consistent by default.
        lsn: Where that point is, as a byte position.
        timeline: The timeline of that point.

    Raises:
        StateRefusedError: Another version of PostgreSQL made it.
    """
    _refuse_other_version(backup)
    if point is not None and lsn is not None:
        options = _options("name", point, timeline)
        return RestorePlan(backup, timeline, f"restore point `{point}`", options, target_lsn=lsn, kind="name")
    options = ("--type=immediate", "--target-action=promote")
    return RestorePlan(backup, backup.timeline, "the end of the backup itself", options, kind="immediate")


def _options(kind: TargetKind, target: str, timeline: int) -> tuple[str, ...]:
    return (f"--type={kind}", f"--target={target}", f"--target-timeline={timeline}", "--target-action=promote")


def _usable_backups(engine: BackupEngine, backup_id: str | None) -> list[Backup]:
    if backup_id is not None:
        wanted = engine.get_backup(backup_id)
        if wanted.has_error or not wanted.is_of_present_cluster:
            why = "is damaged" if wanted.has_error else "is of a cluster that was replaced"
            raise StateRefusedError(f"backup `{backup_id}` {why}", hint="run `memharbor backup list`")
        return [wanted]
    usable = [each for each in engine.list_backups() if not each.has_error and each.is_of_present_cluster]
    if not usable:
        raise StateRefusedError("there is no backup to restore", hint="run `memharbor backup create`")
    return usable


def _refuse_other_version(backup: Backup) -> None:
    if backup.postgres_version and backup.postgres_version != str(POSTGRES_MAJOR):
        raise StateRefusedError(
            f"backup `{backup.id}` is of PostgreSQL {backup.postgres_version}, and this stack runs {POSTGRES_MAJOR}",
            hint="restore it with the version of Memharbor that made it",
        )


def _to_moment(engine: BackupEngine, segments: list[Segment], usable: list[Backup], at: datetime) -> RestorePlan:
    # The timeline that was being written at that moment, which need not be the newest: what was written after the
    # moment to which an earlier restore went is on an older one.
    births = {1: datetime.min.replace(tzinfo=UTC), **engine.timeline_births()}
    timeline = max(number for number, born_at in births.items() if born_at <= at)
    backup = _backup_for(engine, usable, timeline=timeline, target=at.isoformat(), at=at)
    last = max(segment.number for segment in segments if segment.timeline == timeline)
    _refuse_gap(engine, segments, backup, timeline, last)
    options = _options("time", f"{at:%Y-%m-%d %H:%M:%S.%f%z}", timeline)
    return RestorePlan(backup, timeline, at.isoformat(), options, kind="time")


def _to_name(engine: BackupEngine, segments: list[Segment], usable: list[Backup], name: str) -> RestorePlan:
    point = find_restore_point(engine, segments, name, oldest_lsn=_oldest_lsn(usable))
    if point is None:
        raise StateRefusedError(
            f"there is no restore point `{name}` in the archive",
            hint="check the name, or run `memharbor restore --at TIME`",
        )
    target = f"restore point `{name}`"
    backup = _backup_for(engine, usable, timeline=point.timeline, target=target, lsn=point.lsn)
    _refuse_gap(engine, segments, backup, point.timeline, point.lsn // SEGMENT_BYTES)
    options = _options("name", name, point.timeline)
    return RestorePlan(backup, point.timeline, target, options, target_lsn=point.lsn, kind="name")


def _to_position(engine: BackupEngine, segments: list[Segment], usable: list[Backup], lsn: int) -> RestorePlan:
    # The branch that is newest: the position on the way to the newest timeline, on an abandoned one only where it has none.
    target = f"LSN {format_lsn(lsn)}"
    timeline = _timeline_of(engine, segments, lsn)
    if timeline is None or not _is_written(engine, segments, timeline, lsn):
        raise StateRefusedError(f"{target} is not in the archive: {_window(usable)}", hint="run `memharbor status`")
    backup = _backup_for(engine, usable, timeline=timeline, target=target, lsn=lsn)
    _refuse_gap(engine, segments, backup, timeline, lsn // SEGMENT_BYTES)
    options = _options("lsn", format_lsn(lsn), timeline)
    return RestorePlan(backup, timeline, target, options, target_lsn=lsn, kind="lsn")


def _timeline_of(engine: BackupEngine, segments: list[Segment], lsn: int) -> int | None:
    there = set(segments)
    for newest_timeline in sorted({segment.timeline for segment in segments}, reverse=True):
        left_at = engine.history(newest_timeline)
        owner = next((old for old in sorted(left_at) if lsn < left_at[old]), newest_timeline)
        if Segment(owner, lsn // SEGMENT_BYTES) in there:
            return owner
    return None


def _is_written(engine: BackupEngine, segments: list[Segment], timeline: int, lsn: int) -> bool:
    """Tell whether a record begins at a position or after it: to a later one PostgreSQL would never get."""
    last = max(segment for segment in segments if segment.timeline == timeline)
    if last.number > lsn // SEGMENT_BYTES:
        return True
    end = find_last_record(engine, last)
    return end is not None and end >= lsn


def _to_transaction(engine: BackupEngine, segments: list[Segment], usable: list[Backup], xid: int) -> RestorePlan:
    found = find_commit(engine, segments, xid, oldest_lsn=_oldest_lsn(usable))
    if found is None:
        raise StateRefusedError(
            f"no commit of transaction {xid} is in the archive: {_window(usable)}", hint="run `memharbor status`"
        )
    segment, lsn = found
    target = f"the commit of transaction {xid}"
    backup = _backup_for(engine, usable, timeline=segment.timeline, target=target, lsn=lsn)
    _refuse_gap(engine, segments, backup, segment.timeline, segment.number)
    options = _options("xid", str(xid), segment.timeline)
    return RestorePlan(backup, segment.timeline, target, options, target_lsn=lsn, kind="xid")


def _oldest_lsn(usable: Sequence[Backup]) -> int:
    return min(backup.start_lsn for backup in usable)


def _window(usable: Sequence[Backup]) -> str:
    first = min(usable, key=lambda backup: backup.ended_at)
    return (
        f"what can be restored begins at {first.ended_at.isoformat()} (LSN {format_lsn(first.stop_lsn)})"
        " and goes on to the last change that was archived"
    )


def _backup_for(
    engine: BackupEngine,
    usable: Sequence[Backup],
    *,
    timeline: int,
    target: str,
    lsn: int | None = None,
    at: datetime | None = None,
) -> Backup:
    backup = engine.find_backup_before(timeline=timeline, lsn=lsn, at=at, among=usable)
    if backup is None:
        whose = f"backup `{usable[0].id}` does not lead" if len(usable) == 1 else "no backup leads"
        raise StateRefusedError(f"{whose} to {target}: {_window(usable)}", hint="run `memharbor backup list`")
    return backup


def _refuse_gap(engine: BackupEngine, segments: Sequence[Segment], backup: Backup, timeline: int, end: int) -> None:
    start = parse_segment(backup.start_segment)
    if start is None:
        raise StateRefusedError(f"backup `{backup.id}` names no WAL segment", hint="run `memharbor backup list`")
    missing = missing_segments(segments, start, timeline=timeline, end=end, history=engine.history(timeline))
    if missing:
        raise StateRefusedError(
            f"WAL segment {missing[0].name} is missing from the archive, and replay would end before it",
            hint="restore to a moment before the gap with `memharbor restore --at TIME`",
        )
