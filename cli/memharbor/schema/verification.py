"""
Check a database against what was rolled out: verify twins, the ledger, and the recorded catalog. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg

from memharbor.database import Connection, is_connection_lost, run_statement, transaction, translated_errors
from memharbor.schema import applier, ledger
from memharbor.schema.fingerprint import describe_catalog, differences
from memharbor.schema.ledger import HistoryEntry
from memharbor.schema.statements import split_statements
from memharbor.settings import Settings
from memharbor.templates import render

_ROLES_VERIFY = "roles/1_roles.verify.sql"
_REWIND_VERIFY = "roles/2_rewind.verify.sql"
# Grants on functions of pg_catalog are of one database, and pg_rewind connects to this one.
MAINTENANCE_DATABASE = "postgres"


@dataclass(frozen=True)
class Finding:
    """
    One thing that is not as it was rolled out.

    `pending`: a step is not applied or another text now. `missing`: a verify twin raised. `drift`: an object differs from
    what the last run left.
    """

    kind: Literal["pending", "missing", "drift"]
    name: str
    message: str
    hint: str


def verify(
    connection: Connection,
    settings: Settings,
    *,
    connect: Callable[[str], Connection] | None = None,
    root: Path | None = None,
) -> list[Finding]:
    """
    Check everything and report what is wrong; an empty list is good.

    Args:
        connection: Straight to the database, as its administrator.
        settings: The configuration that is rolled out.
        connect: Opens a connection to a named database of the server, as its administrator; without it, what the roles
            need outside of this database is not looked at.
        root: Where the templates are.
    """
    findings = []
    twins = [("roles", "roles", render(_ROLES_VERIFY, {}, root=root))]
    for item in applier.plan(connection, settings, root=root):
        if item.state == "pending" or item.reason.startswith("its rendered text"):
            hint = f"memharbor schema apply --component {item.step.component}"
            findings.append(Finding("pending", item.name, f"step `{item.name}`: {item.reason}", hint))
        twins.append((item.name, item.step.component, item.step.verify_sql))
    for name, component, sql in twins:
        message = _run_twin(connection, sql)
        if message is not None:
            findings.append(Finding("missing", name, message, f"memharbor schema apply --component {component}"))
    if connect is not None and _is_superuser(connection):
        findings += _verify_rewind(connect, root)
    recorded = ledger.read_recorded_catalog(connection)
    if recorded is not None:
        for difference in differences(recorded, describe_catalog(connection)):
            hint = "memharbor schema apply repairs it; where it was meant, add `--adopt-drift`"
            findings.append(Finding("drift", difference.key, f"{difference} outside Memharbor", hint))
    return findings


def _is_superuser(connection: Connection) -> bool:
    with translated_errors("verify"), transaction(connection):
        row = connection.execute("select rolsuper from pg_catalog.pg_roles where rolname = current_user").fetchone()
    return row is not None and bool(row[0])


def _verify_rewind(connect: Callable[[str], Connection], root: Path | None) -> list[Finding]:
    with closing(connect(MAINTENANCE_DATABASE)) as connection:
        message = _run_twin(connection, render(_REWIND_VERIFY, {}, root=root))
    return [Finding("missing", "rewind", message, "memharbor schema apply --component roles")] if message else []


def _run_twin(connection: Connection, sql: str) -> str | None:
    try:
        with transaction(connection, rollback=True):
            connection.execute("set transaction read only")
            for statement in split_statements(sql):
                run_statement(connection, statement)
    except psycopg.Error as exc:
        if is_connection_lost(exc):
            with translated_errors("verify"):
                raise
        return exc.diag.message_primary or str(exc)
    return None


def current(connection: Connection) -> str | None:
    """Name the newest versioned step that is applied; None where there is none."""
    names = [step.name for step in ledger.read_applied(connection).values() if step.kind == "versioned"]
    return max(names, default=None)


def history(connection: Connection) -> tuple[HistoryEntry, ...]:
    """List everything that was ever applied or taken back, oldest first."""
    return ledger.read_history(connection)
