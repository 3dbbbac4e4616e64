"""
What was applied to a database: the tables `memharbor.schema_migrations` and `memharbor.schema_state`.

A step is applied while the last row of its name says `up`. Rows are only ever added, so that they are the history too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import psycopg
import stamina
from psycopg.types.json import Jsonb

from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.names import ROLES
from memharbor.schema.fingerprint import Catalog, fingerprint_of
from memharbor.schema.migrations import Step, split_header
from memharbor.schema.statements import split_statements
from memharbor.templates import render

OWNER = ROLES["owner"]
# One roll-out at a time per database; "memharbo" as a big-endian integer.
ADVISORY_LOCK_KEY = 0x6D656D686172626F
ADVISORY_LOCK_WAIT_SECONDS = 60.0

_BOOTSTRAP = ("ledger/1_schema.sql", "ledger/2_tables.sql")


@dataclass(frozen=True)
class AppliedStep:
    """The state of one step in the ledger."""

    name: str
    component: str
    kind: str
    checksum: str


@dataclass(frozen=True)
class HistoryEntry:
    """One row of the ledger; `applied_at` is aware."""

    name: str
    component: str
    kind: str
    direction: str
    checksum: str
    applied_at: datetime
    applied_by: str
    execution_ms: int


def ledger_exists(connection: Connection) -> bool:
    """Tell whether Memharbor was ever rolled out to this database."""
    with translated_errors("read the ledger"), transaction(connection):
        row = connection.execute("select to_regclass('memharbor.schema_state') is not null").fetchone()
    return bool(row and row[0])


def create_ledger(connection: Connection) -> None:
    """Create the schema and the ledger where they are missing. Runs inside the caller's transaction, or its own."""
    for name in _BOOTSTRAP:
        sql = render(name, {})
        header, _ = split_header(sql, name)
        with translated_errors("create the ledger"), transaction(connection):
            if header.runs_as == "owner":
                act_as(connection, OWNER)
            for statement in split_statements(sql):
                connection.execute(statement)
            # The end of a savepoint does not take this back.
            act_as(connection, "none")


def act_as(connection: Connection, role: str) -> None:
    """Act as a role until the end of the transaction; `none` is the login itself."""
    connection.execute("select pg_catalog.set_config('role', %s, true)", (role,))


def read_applied(connection: Connection) -> dict[str, AppliedStep]:
    """Read which steps are applied, by name; empty where there is no ledger."""
    if not ledger_exists(connection):
        return {}
    with translated_errors("read the ledger"), transaction(connection, role=OWNER):
        rows = connection.execute(
            """
            select name, component, kind, checksum from (
              select distinct on (name) name, component, kind, checksum, direction
              from memharbor.schema_migrations order by name, id desc
            ) latest
            where direction = 'up'
            """
        ).fetchall()
    return {row[0]: AppliedStep(*row) for row in rows}


def read_history(connection: Connection) -> tuple[HistoryEntry, ...]:
    """Read everything that was ever applied or taken back, oldest first; empty where there is no ledger."""
    if not ledger_exists(connection):
        return ()
    with translated_errors("read the ledger"), transaction(connection, role=OWNER):
        rows = connection.execute(
            """
            select name, component, kind, direction, checksum, applied_at, applied_by, execution_ms
            from memharbor.schema_migrations order by id
            """
        ).fetchall()
    return tuple(HistoryEntry(*row) for row in rows)


def write_row(connection: Connection, step: Step, direction: str, execution_ms: int) -> None:
    """Record a step inside the caller's transaction, whatever role it acts as."""
    act_as(connection, OWNER)
    connection.execute(
        """
        insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
        values (%s, %s, %s, %s, %s, %s)
        """,
        (step.name, step.component, step.kind, direction, step.checksum, execution_ms),
    )


def read_recorded_catalog(connection: Connection) -> Catalog | None:
    """Read the catalog as the last run left it; None before the first run has ended."""
    if not ledger_exists(connection):
        return None
    with translated_errors("read the ledger"), transaction(connection, role=OWNER):
        row = connection.execute("select catalog from memharbor.schema_state").fetchone()
    return dict(row[0]) if row else None


def record_catalog(connection: Connection, catalog: Catalog) -> None:
    """Record the catalog as this run leaves it."""
    with translated_errors("record the catalog"), transaction(connection, role=OWNER):
        connection.execute(
            """
            insert into memharbor.schema_state (fingerprint, catalog) values (%s, %s)
            on conflict (only_row) do update
              set fingerprint = excluded.fingerprint, catalog = excluded.catalog, recorded_at = clock_timestamp()
              where schema_state.fingerprint <> excluded.fingerprint
            """,
            (fingerprint_of(catalog), Jsonb(catalog)),
        )


@contextmanager
def advisory_lock(connection: Connection, *, wait_seconds: float = ADVISORY_LOCK_WAIT_SECONDS) -> Iterator[None]:
    """
    Hold the database's roll-out lock for a block; PostgreSQL releases it too when the connection ends.

    Raises:
        StateRefusedError: Another roll-out held it for `wait_seconds`.
    """

    def try_lock() -> None:
        row = connection.execute("select pg_catalog.pg_try_advisory_lock(%s)", (ADVISORY_LOCK_KEY,)).fetchone()
        if row is None or not row[0]:
            raise _LockedError

    try:
        for attempt in stamina.retry_context(
            on=_LockedError, attempts=None, timeout=wait_seconds, wait_initial=0.05, wait_max=2.0, wait_jitter=0.05
        ):
            with attempt:
                try_lock()
    except _LockedError as exc:
        raise StateRefusedError(
            f"another roll-out has held this database for {wait_seconds:.0f} seconds{_holder(connection)}",
            hint="wait for it, or end it with `select pg_terminate_backend(<pid>)`",
        ) from exc
    try:
        yield
    finally:
        if not connection.closed:
            try:
                connection.execute("select pg_catalog.pg_advisory_unlock(%s)", (ADVISORY_LOCK_KEY,))
            except psycopg.OperationalError:
                # The connection died under the block: the lock died with it, and the block's error is what matters.
                connection.close()


class _LockedError(Exception):
    pass


def _holder(connection: Connection) -> str:
    row = connection.execute(
        """
        select a.pid, a.usename, a.application_name from pg_catalog.pg_locks l
        join pg_catalog.pg_stat_activity a using (pid)
        where l.locktype = 'advisory' and l.granted
          and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
          and (l.classid::bigint << 32 | l.objid::bigint) = %s
        """,
        (ADVISORY_LOCK_KEY,),
    ).fetchone()
    return f": process {row[0]}, `{row[1]}`, `{row[2]}`" if row else ""
