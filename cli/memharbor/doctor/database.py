"""
The database: its server, pgvector, its marks and settings, and the schema.
"""

from __future__ import annotations

from typing import Any

from memharbor import schema, versions
from memharbor.doctor.findings import Finding, Findings
from memharbor.doctor.machine import parse_version
from memharbor.errors import StateRefusedError
from memharbor.settings import Settings
from memharbor.target import Target
from memharbor.templates import render


def check_database(target: Target) -> Findings:
    """Look at the server and everything that was rolled out."""
    try:
        connection = target.connect(autocommit=True)
    except StateRefusedError as exc:  # older than we support
        yield Finding(
            "database",
            "failed",
            exc.message,
            f"move to PostgreSQL {versions.POSTGRES_MINIMUM_MAJOR} or newer with pg_upgrade, or with a dump and a restore",
        )
        return
    with connection:
        version = parse_version(_value(connection, "show server_version"))
        yield Finding("database", "ok", f"PostgreSQL {'.'.join(map(str, version))}")
        yield from _pgvector(connection, target)
        yield from _leakproof(connection, target.settings)
        invalid = _value(
            connection, "select string_agg(indexrelid::regclass::text, ', ') from pg_index where not indisvalid"
        )
        if invalid:
            cause = f"invalid after an interrupted build: {invalid}"
            yield Finding("indexes", "failed", cause, "memharbor schema apply")
        yield from _settings_owner(connection, target)
        yield from _schema(connection, target)


def _pgvector(connection: Any, target: Target) -> Findings:
    version = _value(connection, "select extversion from pg_extension where extname = 'vector'")
    safe = ".".join(map(str, versions.PGVECTOR_SAFE_VACUUM))
    psql = "psql <an administrator's URI of this database>"
    get = f"install pgvector {safe} or newer on the server"
    if target.outputs is not None:
        psql, get = 'psql "$(memharbor stack dsn admin)"', "pulumi up"
    problem = _pgvector_problem(parse_version(version or ""))
    if not version:
        yield Finding("pgvector", "failed", "the extension is not installed", "memharbor schema apply")
    elif problem:
        update = f'{get}, then {psql} --command "alter extension vector update"'
        yield Finding("pgvector", "failed", f"{version} {problem}", update)
    else:
        yield Finding("pgvector", "ok", f"pgvector {version}")


def _pgvector_problem(version: tuple[int, ...]) -> str:
    if version < versions.PGVECTOR_MINIMUM:
        return "has no iterative scans"
    if version < versions.PGVECTOR_SAFE_PARALLEL_BUILD:
        return "overflows its heap in parallel HNSW builds"
    return "can corrupt an HNSW index after vacuum" if version < versions.PGVECTOR_SAFE_VACUUM else ""


def _leakproof(connection: Any, settings: Settings) -> Findings:
    marked, count = connection.execute(render("catalog/leakproof.sql", {})).fetchone()
    if settings.leakproof and marked < count:
        yield Finding(
            "leakproof",
            "warning",
            f"{marked} of {count} functions are LEAKPROOF: keyword search is slow for large users",
            "memharbor schema apply --component extension, as a superuser",
        )
    elif not settings.leakproof and marked:
        cause = f"{marked} functions are LEAKPROOF, against the setting"
        yield Finding("leakproof", "warning", cause, "memharbor schema apply --component extension, as a superuser")
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
            f"postgresql.auto.conf holds {names}, and settings belong to `pulumi config`",
            'psql "$(memharbor stack dsn admin)" --command "alter system reset all"',
        )
    else:
        yield Finding("settings", "ok", "server settings come from one file")


def _schema(connection: Any, target: Target) -> Findings:
    waiting = [step.name for step in schema.plan(connection, target.settings) if step.state != "applied"]
    if waiting:
        cause = f"{len(waiting)} steps are not applied: {', '.join(waiting[:5])}"
        yield Finding("schema", "failed", cause, "memharbor schema apply")
        return
    found = schema.verify(connection, target.settings, connect=lambda name: target.connect(dbname=name))
    for finding in found:
        yield Finding("schema", "failed", finding.message, finding.hint)
    if not found:
        yield Finding("schema", "ok", "applied, verified, no drift")


def _value(connection: Any, statement: str) -> Any:
    row = connection.execute(statement).fetchone()
    return row[0] if row else None
