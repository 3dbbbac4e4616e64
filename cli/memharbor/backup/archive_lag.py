"""
How far the archive is behind the server, and how long the disk lasts where it does not catch up.

PostgreSQL keeps the WAL that the backup store does not take, and goes on; it stops when the disk of its data is full.
Changes nothing. Source: PostgreSQL manual, Continuous Archiving, and the views pg_stat_archiver and pg_stat_wal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memharbor.backup.engine import BackupEngine
from memharbor.database import Connection
from memharbor.output import age_text, size_text
from memharbor.server_files.postgres import DATA_ROOT

# Behind is who has waited longer than this for what is archived every minute.
BEHIND_SECONDS = 600
DISK_SECONDS = 86_400
# Younger than this, what waits says nothing about the rate at which WAL comes.
_RATE_SECONDS = 60


def read_lag(connection: Connection, engine: BackupEngine) -> dict[str, Any]:
    """
    Read how the archive is, as plain data: sizes in bytes, ages in seconds by the server's clock.

    `seconds_until_full` is an estimate, and None while WAL reaches the store.

    Args:
        connection: An administrator's, in autocommit.
        engine: The stack's backups, in whose container the disk is looked at.
    """
    row = connection.execute(
        "select a.last_archived_wal, a.last_archived_time, a.failed_count,"
        " coalesce(a.last_failed_time > coalesce(a.last_archived_time, '-infinity'), false),"
        " extract(epoch from clock_timestamp() - a.last_archived_time)::float8, r.waiting, r.age, s.segment_bytes,"
        " w.wal_bytes::float8 / greatest(1, extract(epoch from clock_timestamp() - w.stats_reset))::float8"
        " from pg_stat_archiver a, pg_stat_wal w,"
        " lateral (select count(*) as waiting,"
        "   extract(epoch from clock_timestamp() - min(modification))::float8 as age"
        "   from pg_ls_archive_statusdir() where name like '%.ready') r,"
        " lateral (select setting::bigint as segment_bytes from pg_settings where name = 'wal_segment_size') s"
    ).fetchone()
    last, archived_at, failed, is_failing, age, waiting, oldest_age, segment_bytes, usual_rate = row or (None,) * 9
    lag = {
        "last_segment": last,
        "last_archived_at": archived_at.isoformat() if archived_at else None,
        "age_seconds": None if age is None else round(age),
        "failed_count": failed,
        "is_failing": is_failing,
        "waiting_segments": waiting,
        "waiting_bytes": waiting * segment_bytes,
        "oldest_waiting_age_seconds": None if oldest_age is None else max(0, round(oldest_age)),
        "disk_free_bytes": _free_bytes(engine),
    }
    return lag | estimate_disk(lag, usual_rate)


def estimate_disk(lag: Mapping[str, Any], usual_rate: float) -> dict[str, Any]:
    """
    Estimate how fast WAL fills the disk, and when, where the archive does not take it.

    Args:
        lag: What `read_lag` has read so far.
        usual_rate: Bytes of WAL a second since the server counts them.

    >>> lag = {"is_failing": True, "waiting_bytes": 120_000, "oldest_waiting_age_seconds": 120, "disk_free_bytes": 60_000}
    >>> estimate_disk(lag, 5.0)
    {'bytes_per_second': 1000, 'seconds_until_full': 60}
    """
    oldest_age, waiting_bytes = lag["oldest_waiting_age_seconds"], lag["waiting_bytes"]
    is_waiting = waiting_bytes > 0 and (lag["is_failing"] or (oldest_age or 0) >= BEHIND_SECONDS)
    # What piles up takes whole segments, however little is written in each.
    rate = waiting_bytes / oldest_age if is_waiting and (oldest_age or 0) >= _RATE_SECONDS else usual_rate
    free = lag["disk_free_bytes"]
    until_full = round(free / rate) if is_waiting and rate > 0 and free is not None else None
    return {"bytes_per_second": round(rate), "seconds_until_full": until_full}


def lag_text(lag: Mapping[str, Any]) -> str:
    """
    Say for people how the archive is.

    >>> lag_text({"last_segment": "0A", "age_seconds": 30, "waiting_segments": 0})
    '0A 30 s ago, 0 segments wait'
    """
    last = "nothing archived yet"
    if lag["last_segment"] is not None:
        last = f"{lag['last_segment']} {age_text(lag['age_seconds'])} ago"
    said = f"{last}, {lag['waiting_segments']} segments wait"
    if not lag["waiting_segments"] or not (lag.get("is_failing") or is_behind(lag)):
        return said
    said += f" ({size_text(lag['waiting_bytes'])}), the oldest for {age_text(lag['oldest_waiting_age_seconds'])}"
    if lag["seconds_until_full"] is not None:
        said += (
            f": the backup store does not take them; at this rate the disk ({size_text(lag['disk_free_bytes'])} free)"
            f" is full in {age_text(lag['seconds_until_full'])}"
        )
    return said


def is_behind(lag: Mapping[str, Any]) -> bool:
    """Tell whether WAL has waited too long for the backup store."""
    return (lag.get("oldest_waiting_age_seconds") or 0) > BEHIND_SECONDS


def is_disk_short(lag: Mapping[str, Any]) -> bool:
    """Tell whether the disk is full within a day where nothing changes."""
    return lag.get("seconds_until_full") is not None and lag["seconds_until_full"] < DISK_SECONDS


def _free_bytes(engine: BackupEngine) -> int | None:
    lines = engine.run_beside(["df", "-B1", "--output=avail", DATA_ROOT]).stdout.split()
    return int(lines[-1]) if lines and lines[-1].isdigit() else None
