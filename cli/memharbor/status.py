"""
What runs, what is stored and how well it is backed up: one snapshot of a stack or database. Changes nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from memharbor.errors import MemharborError
from memharbor.target import Target


def take_status(target: Target, *, now: datetime | None = None) -> dict[str, Any]:
    """
    Collect the status as plain data. What cannot be read is given as `{"error": …}` in its place.

    Sizes are bytes, ages seconds, instants ISO 8601 in UTC.
    """
    now = now or datetime.now(UTC)
    status: dict[str, Any] = {"target": target.name, "database": _part(lambda: _database(target))}
    if target.outputs is not None:
        status["containers"] = _part(lambda: _containers(target))
        status["pools"] = _part(lambda: _pools(target))
        status["archive"] = _part(lambda: _archive(target, now))
        status["backups"] = _part(lambda: _backups(target, now))
    return status


def _part(read: Any) -> Any:
    try:
        return read()
    except MemharborError as exc:
        return {"error": exc.message}


def _database(target: Target) -> dict[str, Any]:
    with target.connect(autocommit=True) as connection:
        row = connection.execute(
            "select current_setting('server_version'), pg_database_size(current_database()),"
            " (select count(*) from pg_stat_activity where datname = current_database()),"
            " to_regclass('memharbor.memories') is not null"
        ).fetchone()
        version, size_bytes, connections, exists = row or ("", 0, 0, False)
        memories, users = None, None
        if exists:
            counted = connection.execute(
                "select count(*), count(distinct payload->>'user_id') from memharbor.memories"
            ).fetchone()
            memories, users = counted or (0, 0)
    return {
        "version": version,
        "size_bytes": size_bytes,
        "connections": connections,
        "memories": memories,
        "users": users,
    }


def _containers(target: Target) -> list[dict[str, Any]]:
    from memharbor.containers import Containers

    containers = Containers()
    names = [node.container for node in target.stack_outputs("status").nodes]
    names += [name for group in target.stack_outputs("status").containers.values() for name in group]
    return [{"name": name, "health": containers.health(name) if containers.find(name) else "missing"} for name in names]


def _pools(target: Target) -> list[dict[str, Any]]:
    from memharbor.operations import open_stack

    wanted = ("database", "user", "cl_active", "cl_waiting", "sv_active", "sv_idle", "pool_mode")
    rows = open_stack(target.stack_outputs("status").stack).pooler.show("pools")
    return [{key: row[key] for key in wanted if key in row} for row in rows if row["database"] != "pgbouncer"]


def _archive(target: Target, now: datetime) -> dict[str, Any]:
    with target.connect(autocommit=True) as connection:
        row = connection.execute(
            "select last_archived_wal, last_archived_time, failed_count,"
            " (select count(*) from pg_ls_archive_statusdir() where name like '%.ready') from pg_stat_archiver"
        ).fetchone()
    last, archived_at, failed, waiting = row or (None, None, 0, 0)
    return {
        "last_segment": last,
        "last_archived_at": archived_at.isoformat() if archived_at else None,
        "age_seconds": round((now - archived_at).total_seconds()) if archived_at else None,
        "failed_count": failed,
        "waiting_segments": waiting,
    }


def _backups(target: Target, now: datetime) -> dict[str, Any]:
    from memharbor.operations import open_stack

    backups = [
        each for each in open_stack(target.stack_outputs("status").stack).engine.list_backups() if not each.has_error
    ]
    last = backups[-1] if backups else None
    return {
        "count": len(backups),
        "last": last.id if last else None,
        "last_ended_at": last.ended_at.isoformat() if last else None,
        "age_seconds": round((now - last.ended_at).total_seconds()) if last else None,
        "last_verified_at": None,
    }


def status_text(status: dict[str, Any]) -> str:
    """Write a status for people."""
    lines = [status["target"]]
    for part, value in status.items():
        if part == "target":
            continue
        if isinstance(value, list):
            lines.append(f"{part}:")
            lines += ["  " + ", ".join(f"{key} {text}" for key, text in row.items()) for row in value]
        else:
            said = ", ".join(f"{key.replace('_', ' ')} {'-' if text is None else text}" for key, text in value.items())
            lines.append(f"{part}: {said}")
    return "\n".join(lines)
