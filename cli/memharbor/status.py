"""
What runs, what is stored and how well it is backed up: one snapshot of a stack or database. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
from docker.errors import DockerException

from memharbor.database import Connection, server_text, transaction
from memharbor.errors import MemharborError
from memharbor.names import ROLES
from memharbor.output import age_text, size_text
from memharbor.target import Target

if TYPE_CHECKING:
    from memharbor.backup.engine import Backup


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
        status["archive"] = _part(lambda: _archive(target))
        status["backups"] = _part(lambda: _backups(target, now))
        status["custodian"] = _part(lambda: _custodian(target, now))
    return status


def _part(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except MemharborError as exc:
        return {"error": exc.message}
    except psycopg.Error as exc:
        return {"error": server_text(exc)}
    except (DockerException, OSError) as exc:  # the engine went away while it was asked
        return {"error": f"the Docker engine failed: {exc}"}


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
            memories, users = _count_memories(connection)
    return {
        "version": version,
        "size_bytes": size_bytes,
        "connections": connections,
        "memories": memories,
        "users": users,
    }


def _count_memories(connection: Connection) -> tuple[int, int]:
    service = ROLES["service"]
    # An administrator who is no superuser is held by row level security; the service role's policy shows every row.
    row = connection.execute(
        "select pg_catalog.pg_has_role(current_user, pg_catalog.to_regrole(%s), 'set')", (service,)
    ).fetchone()
    with transaction(connection, role=service if row is not None and row[0] else None):
        connection.execute("set local statement_timeout = 0")
        counted = connection.execute(
            "select count(*), count(distinct payload ->> 'user_id') from memharbor.memories"
        ).fetchone()
    return counted or (0, 0)


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


def _archive(target: Target) -> dict[str, Any]:
    from memharbor.backup.archive_lag import read_lag
    from memharbor.operations import open_stack

    engine = open_stack(target.stack_outputs("status").stack).engine
    with target.connect(autocommit=True) as connection:
        return read_lag(connection, engine)


def _backups(target: Target, now: datetime) -> dict[str, Any]:
    from memharbor.backup.schedule import read_runs
    from memharbor.operations import open_stack

    engine = open_stack(target.stack_outputs("status").stack).engine
    backups = [each for each in engine.list_backups() if not each.has_error]
    last = backups[-1] if backups else None
    return {
        "count": len(backups),
        "last": last.id if last else None,
        "last_ended_at": last.ended_at.isoformat() if last else None,
        "age_seconds": round((now - last.ended_at).total_seconds()) if last else None,
        "failed_schedules": [run for run in read_runs(engine).values() if run.get("result") == "failed"],
        **_drills(target, backups, now),
    }


def _custodian(target: Target, now: datetime) -> dict[str, Any]:
    from memharbor.operations import open_custodian

    return open_custodian(target.stack_outputs("status").stack).works(now=now)


def _drills(target: Target, backups: Sequence[Backup], now: datetime) -> dict[str, Any]:
    from memharbor.backup.drill import verified_at
    from memharbor.backup.drill_schedule import is_overdue, read_note
    from memharbor.operations import drills_folder

    instants = [instant for instant in map(verified_at, backups) if instant is not None]
    newest = max(instants, default=None)
    note = read_note(drills_folder(target.stack_outputs("status").stack) / "schedule.json")
    return {
        "last_is_verified": bool(backups) and verified_at(backups[-1]) is not None,
        "last_verified_at": newest.isoformat() if newest else None,
        "drill_schedule": note["frequency"] if note else None,
        "is_drill_overdue": is_overdue(note, newest, now),
    }


def is_down(status: dict[str, Any]) -> bool:
    """
    Tell whether something of a status does not work: a part cannot be read, or a container does not run well.

    A container that is just starting counts as down, since nobody can use it yet. Age is no matter of this.

    >>> is_down({"target": "x", "database": {"error": "cannot connect"}}), is_down({"target": "x", "containers": []})
    (True, False)
    """
    parts = [value for value in status.values() if isinstance(value, dict)]
    containers = status.get("containers", [])
    return any("error" in part for part in parts) or any(
        isinstance(container, dict) and container["health"] != "healthy" for container in containers
    )


def status_text(status: dict[str, Any]) -> str:
    """Write a status for people: one line a part."""
    sentences: dict[str, Callable[[Any], str]] = {
        "database": _database_text,
        "containers": lambda rows: ", ".join(f"{row['name']} {row['health']}" for row in rows),
        "pools": _pools_text,
        "archive": _archive_text,
        "backups": _backups_text,
        "custodian": _custodian_text,
    }
    lines = [status["target"]]
    for part, say in sentences.items():
        if part in status:
            value = status[part]
            failed = isinstance(value, dict) and "error" in value
            lines.append(f"{part:<12}{value['error'] if failed else say(value)}")
    return "\n".join(lines)


def _database_text(database: dict[str, Any]) -> str:
    stored = "no schema yet" if database["memories"] is None else f"{database['memories']:,} memories"
    if database["users"]:
        stored += f" of {database['users']:,} users"
    return (
        f"PostgreSQL {database['version'].split()[0]}, {size_text(database['size_bytes'])}, {stored},"
        f" {database['connections']} connections"
    )


def _pools_text(pools: list[dict[str, Any]]) -> str:
    said = (
        f"{pool['user']}@{pool['database']} {pool['cl_active']} clients, {pool['cl_waiting']} waiting" for pool in pools
    )
    return "; ".join(said) or "no client yet"


def _archive_text(archive: dict[str, Any]) -> str:
    from memharbor.backup.archive_lag import lag_text

    return lag_text(archive)


def _custodian_text(works: dict[str, Any]) -> str:
    from memharbor.backup.custodian import works_text

    return works_text(works)


def _backups_text(backups: dict[str, Any]) -> str:
    if not backups["count"]:
        return "none yet; run `memharbor backup create`"
    verified = "verified" if backups["last_is_verified"] else "unverified"
    missed = [
        f"; the last scheduled {run['type']} failed: {run['said']}" for run in backups.get("failed_schedules", [])
    ]
    said = f"{backups['count']}, the last one {backups['last']} {age_text(backups['age_seconds'])} ago, {verified}"
    if backups["is_drill_overdue"]:
        said += f"; no {backups['drill_schedule']} drill was good since {backups['last_verified_at'] or 'it was set'}"
    return said + "".join(missed)
