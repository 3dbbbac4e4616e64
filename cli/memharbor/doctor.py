"""
What can be wrong, checked one by one: before anything exists as well as after.

Each check looks at one thing and answers with findings; every finding that is not good names its cause and the next
command. Must not change anything.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memharbor import versions
from memharbor.errors import ConfigError, MemharborError
from memharbor.process import find_tool, run
from memharbor.settings import Settings
from memharbor.target import Target, find_target

DISK_FREE_MINIMUM_BYTES = 5 * 1024**3
ARCHIVE_LAG_MAXIMUM_SEGMENTS = 4
# Source: PostgreSQL names, pg_proc; the LEAKPROOF step of sql_templates/ marks these (docs/concepts/row-level-security.md).
LEAKPROOF_FUNCTIONS = (
    "pg_catalog.jsonb_object_field_text(jsonb, text)",
    "pg_catalog.ts_match_vq(tsvector, tsquery)",
    "pg_catalog.to_tsvector(regconfig, text)",
)

Level = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `next_command` is empty where it is good."""

    area: str
    level: Level
    cause: str
    next_command: str = ""


Findings = Iterator[Finding]


def examine(stack: str, dsn: str | None) -> list[Finding]:
    """
    Look at the machine, and at the stack or database as far as it exists.

    Args:
        stack: Name of the stack.
        dsn: A database that Pulumi did not make; the machine's containers are not looked at then.
    """
    findings: list[Finding] = []
    if dsn is None:
        findings += _safely("machine", _machine)
    try:
        target = find_target(stack, dsn)
    except ConfigError as exc:
        findings.append(Finding("stack", "warning", exc.message, exc.hints[0] if exc.hints else "make up"))
        findings += _safely("ports", lambda: _ports(Settings()))
        return findings
    if target.outputs is not None:
        findings += _safely("containers", lambda: _containers(target))
        findings += _safely("pooler", lambda: _pooler_guard(target))
        findings += _safely("backup", lambda: _backups(target))
    findings += _safely("database", lambda: _database(target))
    return findings


def _safely(area: str, check: Callable[[], Findings]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except MemharborError as exc:
        found.append(Finding(area, "failed", exc.message, exc.hints[0] if exc.hints else "memharbor status"))
    return found


def _machine() -> Findings:
    wanted = ".".join(map(str, versions.PYTHON_MINIMUM))
    if sys.version_info < versions.PYTHON_MINIMUM:
        yield Finding(
            "python", "failed", f"Python {sys.version.split()[0]} is older than {wanted}", "apt-get install python3"
        )
    else:
        yield Finding("python", "ok", f"Python {sys.version.split()[0]}")
    if find_tool("pulumi") is None:
        yield Finding("pulumi", "failed", "`pulumi` is not on PATH", "make setup, then `source .venv/bin/activate`")
    else:
        version = run(["pulumi", "version"], timeout_seconds=30).strip().removeprefix("v")
        good = parse_version(version) >= versions.PULUMI_MINIMUM
        least = ".".join(map(str, versions.PULUMI_MINIMUM))
        cause = f"Pulumi {version}" + ("" if good else f" is older than {least}")
        yield Finding("pulumi", "ok" if good else "failed", cause, "" if good else "make setup")
    yield from _engine()
    free = shutil.disk_usage(Path.cwd()).free
    cause = f"{free / 1024**3:.0f} GiB of disk free"
    yield (
        Finding("disk", "ok", cause)
        if free >= DISK_FREE_MINIMUM_BYTES
        else Finding("disk", "warning", f"only {cause}", "docker system df")
    )


def _engine() -> Findings:
    from memharbor.containers import Containers

    version = Containers().engine_version()
    least = ".".join(map(str, versions.DOCKER_ENGINE_MINIMUM))
    if parse_version(version) < versions.DOCKER_ENGINE_MINIMUM:
        yield Finding("engine", "failed", f"Docker engine {version} is older than {least}", "make setup")
    else:
        yield Finding(
            "engine", "ok", f"Docker engine {version}" + (" of DOCKER_HOST" if os.environ.get("DOCKER_HOST") else "")
        )


def parse_version(text: str) -> tuple[int, ...]:
    """
    Read the leading numbers of a version.

    >>> parse_version("20.10.24+dfsg1"), parse_version("18.6 (Debian 18.6-1)")
    ((20, 10, 24), (18, 6))
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _ports(settings: Settings) -> Findings:
    for name in ("postgres_port", "pool_port"):
        port = getattr(settings, name)
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken:
            yield Finding(
                "ports", "failed", f"port {port} is taken by another program", f"pulumi config set {name} {port + 1}"
            )
        else:
            yield Finding("ports", "ok", f"port {port} is free")


def _containers(target: Target) -> Findings:
    from memharbor.containers import Containers

    outputs = target.stack_outputs("doctor")
    containers = Containers()
    names = [node.container for node in outputs.nodes] + [
        name for group in outputs.containers.values() for name in group
    ]
    for name in names:
        if containers.find(name) is None:
            yield Finding("containers", "failed", f"`{name}` does not exist", "pulumi up")
            continue
        health = containers.health(name)
        if health == "healthy":
            yield Finding("containers", "ok", f"`{name}` is healthy")
        elif health == "starting":
            yield Finding("containers", "warning", f"`{name}` is starting", "wait a few seconds, then memharbor doctor")
        elif health in ("exited", "created"):
            yield Finding("containers", "failed", f"`{name}` is stopped", f"docker start {name}")
        else:
            yield Finding("containers", "failed", f"`{name}` is {health}", f"docker logs {name}")


def _pooler_guard(target: Target) -> Findings:
    from memharbor.operations import open_stack

    opened = open_stack(target.stack_outputs("doctor").stack)
    for row in opened.pooler.show("config"):
        if row["key"] == "server_reset_query_always" and row["value"] != "1":
            yield Finding(
                "pooler", "failed", f"{row['pooler']} lets a session's identity reach the next client", "pulumi up"
            )
        if row["key"] == "server_reset_query":
            good = any(reset in row["value"].lower() for reset in ("reset app.user_id", "reset all", "discard all"))
            cause = "identity is reset between clients" if good else "`server_reset_query` does not reset app.user_id"
            yield Finding("pooler", "ok" if good else "failed", cause, "" if good else "pulumi up")
    paused = sorted({row["name"] for row in opened.pooler.show("databases") if row["paused"] == "1"})
    if paused:
        yield Finding(
            "pooler",
            "failed",
            f"{', '.join(paused)} paused: clients wait",
            "memharbor restore goes on with a restore that stopped; `docker restart` of the pooler lets clients in",
        )


def _backups(target: Target) -> Findings:
    from memharbor.operations import open_stack

    backups = open_stack(target.stack_outputs("doctor").stack).engine.list_backups()
    good = [backup for backup in backups if not backup.has_error]
    if not good:
        yield Finding("backup", "warning", "there is no backup yet", "memharbor backup create")
    else:
        yield Finding("backup", "ok", f"{len(good)} backups, the newest of {good[-1].ended_at:%Y-%m-%d %H:%M} UTC")
    with target.connect(autocommit=True) as connection:
        row = connection.execute(
            "select count(*) filter (where name like '%.ready'), (select failed_count from pg_stat_archiver),"
            " (select last_failed_time > coalesce(last_archived_time, '-infinity') from pg_stat_archiver)"
            " from pg_ls_archive_statusdir()"
        ).fetchone()
    waiting, _, failing = row or (0, 0, False)
    if failing or waiting > ARCHIVE_LAG_MAXIMUM_SEGMENTS:
        yield Finding(
            "archive",
            "failed",
            f"{waiting} WAL segments wait for the backup store",
            "docker logs of the postgres container; memharbor validate",
        )
    else:
        yield Finding("archive", "ok", "WAL reaches the backup store")


def _database(target: Target) -> Findings:
    with target.connect(autocommit=True) as connection:
        version = parse_version(_value(connection, "show server_version"))
        if version < (versions.POSTGRES_MINIMUM_MAJOR,):
            yield Finding(
                "database",
                "failed",
                f"PostgreSQL {version[0]} is older than {versions.POSTGRES_MINIMUM_MAJOR}",
                "upgrade the server",
            )
        else:
            yield Finding("database", "ok", f"PostgreSQL {'.'.join(map(str, version))}")
        yield from _pgvector(connection)
        yield from _leakproof(connection, target.settings)
        invalid = _value(
            connection, "select string_agg(indexrelid::regclass::text, ', ') from pg_index where not indisvalid"
        )
        if invalid:
            yield Finding(
                "indexes", "failed", f"invalid after an interrupted build: {invalid}", "memharbor schema apply"
            )
        yield from _settings_owner(connection, target)
        yield from _schema(connection, target)


def _pgvector(connection: Any) -> Findings:
    version = _value(connection, "select extversion from pg_extension where extname = 'vector'")
    if not version:
        yield Finding(
            "pgvector", "failed", "the extension is not installed", "ansible-playbook ansible/playbooks/site.yml"
        )
    elif parse_version(version) < versions.PGVECTOR_MINIMUM:
        yield Finding(
            "pgvector", "failed", f"{version} has no iterative scans", "as superuser: alter extension vector update"
        )
    elif parse_version(version) < versions.PGVECTOR_SAFE_PARALLEL_BUILD:
        yield Finding(
            "pgvector",
            "failed",
            f"{version} overflows its heap in parallel HNSW builds",
            "upgrade pgvector to 0.8.4 or later",
        )
    elif parse_version(version) < versions.PGVECTOR_SAFE_VACUUM:
        yield Finding(
            "pgvector",
            "failed",
            f"{version} can corrupt an HNSW index after vacuum",
            "upgrade pgvector to 0.8.4 or later",
        )
    else:
        yield Finding("pgvector", "ok", f"pgvector {version}")


def _leakproof(connection: Any, settings: Settings) -> Findings:
    names = ", ".join(f"'{name}'::regprocedure" for name in LEAKPROOF_FUNCTIONS)
    marked = int(_value(connection, f"select count(*) from pg_proc where oid in ({names}) and proleakproof"))  # noqa: S608 - our own names
    if settings.leakproof and marked < len(LEAKPROOF_FUNCTIONS):
        yield Finding(
            "leakproof",
            "warning",
            f"{marked} of {len(LEAKPROOF_FUNCTIONS)} functions are LEAKPROOF: keyword search is slow for large users",
            "memharbor schema apply, as a superuser",
        )
    elif not settings.leakproof and marked:
        yield Finding(
            "leakproof", "warning", f"{marked} functions are LEAKPROOF, against the setting", "memharbor schema apply"
        )
    else:
        yield Finding("leakproof", "ok", "LEAKPROOF is as the setting says")


def _settings_owner(connection: Any, target: Target) -> Findings:
    if target.outputs is None:
        return
    names = _value(
        connection, "select string_agg(name, ', ') from pg_file_settings where sourcefile like '%postgresql.auto.conf'"
    )
    if names:
        yield Finding(
            "settings",
            "failed",
            f"postgresql.auto.conf holds {names}",
            "as superuser: alter system reset all; settings belong to `pulumi config`",
        )
    else:
        yield Finding("settings", "ok", "server settings come from one file")


def _schema(connection: Any, target: Target) -> Findings:
    from memharbor import schema

    waiting = [step.name for step in schema.plan(connection, target.settings) if step.state != "applied"]
    if waiting:
        yield Finding(
            "schema",
            "failed",
            f"{len(waiting)} steps are not applied: {', '.join(waiting[:5])}",
            "memharbor schema apply",
        )
        return
    findings = schema.verify(connection, target.settings)
    for finding in findings:
        yield Finding("schema", "failed", str(finding), "memharbor schema verify")
    if not findings:
        yield Finding("schema", "ok", "applied, verified, no drift")


def _value(connection: Any, statement: str) -> Any:
    row = connection.execute(statement).fetchone()
    return row[0] if row else None
