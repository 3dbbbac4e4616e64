"""
Decide what a restore would do, without touching anything: which backup, which timeline, which options.

Everything that can be refused is refused here. Source: PostgreSQL manual, Recovery Target; docs/concepts/backup.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from memharbor.backup.engine import Backup, BackupEngine
from memharbor.backup.wal import (
    SEGMENT_BYTES,
    RestorePoint,
    Segment,
    format_lsn,
    missing_segments,
    newest,
    parse_restore_points,
    parse_segment,
)
from memharbor.errors import StateRefusedError, UsageError

# Prints the named restore points of segments: of the server's own where it still has them, else from the repository.
# Runs inside the container; its arguments are pairs of a segment and its path in the archive (`-` where it has none).
# repo-get and not archive-get, which reads the control file of a cluster that may be broken. The server may have removed
# or renamed its own since it was listed. pg_waldump fails at the end of the last record that is written, after it has
# said all the others.
_POINTS_OF_SEGMENTS = """
set -eu
stanza=$1; shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
while [ $# -gt 0 ]; do
  segment=$1 path=$2; shift 2
  file=$PGDATA/pg_wal/$segment
  if [ ! -f "$file" ]; then
    [ "$path" != - ] || continue
    file=$scratch/$segment
    pgbackrest --stanza="$stanza" repo-get "archive/$stanza/$path" > "$file.zst"
    zstd --quiet --decompress --force -o "$file" "$file.zst"
  fi
  echo "segment $segment"
  pg_waldump --rmgr=XLOG "$file" 2>/dev/null | grep RESTORE_POINT || true
  rm -f "$scratch"/*
done
"""
_SEGMENTS_PER_CALL = 16


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
    """

    backup: Backup
    timeline: int
    target: str
    options: tuple[str, ...]
    target_lsn: int | None = None
    end: Segment | None = None

    def as_data(self) -> dict[str, Any]:
        """Describe the plan for `--dry-run` and `--output json`."""
        return {
            "backup": self.backup.id,
            "backup_ended_at": self.backup.ended_at,
            "target": self.target,
            "target_lsn": None if self.target_lsn is None else format_lsn(self.target_lsn),
            "timeline": self.timeline,
        }


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


def plan_restore(engine: BackupEngine, *, at: datetime | None, name: str | None) -> RestorePlan:
    """
    Decide what a restore would do.

    Args:
        engine: The stack's backups.
        at: Instant to recover to, aware UTC.
        name: Named restore point to recover to. Neither: to the end of the archive.

    Raises:
        StateRefusedError: There is nothing to restore, or the target cannot be reached from what there is.
    """
    backups = [backup for backup in engine.list_backups() if not backup.has_error]
    if not backups:
        raise StateRefusedError("there is no backup to restore", hint="run `memharbor backup create`")
    archived = engine.list_segments()
    if not archived:
        raise StateRefusedError(
            "the archive holds no WAL, so no backup can be made consistent", hint="run `memharbor doctor`"
        )
    # What the server has and the archive has not yet: a running server archives it before the restore, and a stopped
    # one's is put back beside the restored files.
    segments = sorted({*archived, *engine.list_live_segments()})
    if name is not None:
        return _to_name(engine, segments, backups, name)
    if at is not None:
        return _to_moment(engine, segments, backups, at)
    end = newest(archived) or archived[-1]
    backup = _backup_for(engine, backups, timeline=end.timeline, target="the end of the archive")
    _refuse_gap(engine, archived, backup, end.timeline, end.number)
    return RestorePlan(backup, end.timeline, "the end of the archive", ("--type=default",), end=end)


def _to_moment(engine: BackupEngine, segments: list[Segment], backups: list[Backup], at: datetime) -> RestorePlan:
    # The timeline that was being written at that moment, which need not be the newest: what was written after the
    # moment to which an earlier restore went is on an older one.
    births = {1: datetime.min.replace(tzinfo=UTC), **engine.timeline_births()}
    timeline = max(number for number, born_at in births.items() if born_at <= at)
    backup = _backup_for(engine, backups, timeline=timeline, target=at.isoformat(), at=at)
    last = max(segment.number for segment in segments if segment.timeline == timeline)
    _refuse_gap(engine, segments, backup, timeline, last)
    options = (
        "--type=time",
        f"--target={at:%Y-%m-%d %H:%M:%S.%f%z}",
        f"--target-timeline={timeline}",
        "--target-action=promote",
    )
    return RestorePlan(backup, timeline, at.isoformat(), options)


def _to_name(engine: BackupEngine, segments: list[Segment], backups: list[Backup], name: str) -> RestorePlan:
    oldest = min(backup.start_lsn for backup in backups)
    point = find_restore_point(engine, segments, name, oldest_lsn=oldest)
    if point is None:
        raise StateRefusedError(
            f"there is no restore point `{name}` in the archive",
            hint="check the name, or run `memharbor restore --at TIME`",
        )
    target = f"restore point `{name}`"
    backup = _backup_for(engine, backups, timeline=point.timeline, target=target, lsn=point.lsn)
    _refuse_gap(engine, segments, backup, point.timeline, point.lsn // SEGMENT_BYTES)
    options = ("--type=name", f"--target={name}", f"--target-timeline={point.timeline}", "--target-action=promote")
    return RestorePlan(backup, point.timeline, target, options, target_lsn=point.lsn)


def _backup_for(
    engine: BackupEngine,
    backups: Sequence[Backup],
    *,
    timeline: int,
    target: str,
    lsn: int | None = None,
    at: datetime | None = None,
) -> Backup:
    backup = engine.find_backup_before(timeline=timeline, lsn=lsn, at=at)
    if backup is None:
        first = min(backup.ended_at for backup in backups)
        raise StateRefusedError(
            f"no backup leads to {target}: the first one ended at {first.isoformat()}",
            hint="run `memharbor backup list`",
        )
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


def find_restore_point(
    engine: BackupEngine, segments: Sequence[Segment], name: str, *, oldest_lsn: int
) -> RestorePoint | None:
    """
    Look a named restore point up in the WAL, newest segment first; the newest of that name is meant.

    Reads every segment down to the point, about a tenth of a second each. `None` where there is none.
    """
    paths = engine.segment_paths()
    wanted = [segment for segment in reversed(segments) if (segment.number + 1) * SEGMENT_BYTES > oldest_lsn]
    for begin in range(0, len(wanted), _SEGMENTS_PER_CALL):
        chunk = wanted[begin : begin + _SEGMENTS_PER_CALL]
        pairs = [part for segment in chunk for part in (segment.name, paths.get(segment, "-"))]
        said = engine.run_in_container(["sh", "-c", _POINTS_OF_SEGMENTS, "points", engine.stanza, *pairs])
        for part in f"\n{said}".split("\nsegment ")[1:]:
            segment_name, _, waldump = part.partition("\n")
            points = parse_restore_points(int(segment_name[:8], 16), waldump)
            found = [point for point in points if point.name == name]
            if found:
                return found[-1]
    return None
