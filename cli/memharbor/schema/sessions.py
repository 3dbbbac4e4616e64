"""
The connection that a roll-out runs on: a session of its own, patient where nobody waits for it, brief where others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import stamina

from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.errors import DatabaseError, StateRefusedError
from memharbor.schema.ledger import OWNER
from memharbor.templates import render

LOCK_ATTEMPTS = 5
# lock_not_available, deadlock_detected. Source: PostgreSQL manual, Appendix A.
_LOCK_SQLSTATES = ("55P03", "40P01")


@contextmanager
def concurrent_session(connection: Connection) -> Iterator[None]:
    """
    Act as the owner outside a transaction, with an empty search path, and wait for others as long as it takes.

    CREATE and DROP INDEX CONCURRENTLY wait for old transactions while nobody waits for them: giving up early would only
    leave an invalid index behind.
    """
    present = {"search_path": "", "lock_timeout": "0", "statement_timeout": "0", "role": OWNER}
    for name, value in present.items():
        connection.execute("select pg_catalog.set_config(%s, %s, false)", (name, value))
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("reset role")
            for name in ("search_path", "lock_timeout", "statement_timeout"):
                connection.execute(f"reset {name}")


def drop_invalid_indexes(connection: Connection) -> tuple[str, ...]:
    """Drop what interrupted builds left behind and return the names; what is being built now is left alone."""
    with transaction(connection):
        rows = connection.execute(render("catalog/invalid_indexes.sql", {})).fetchall()
    names = tuple(row[0] for row in rows)
    with concurrent_session(connection):
        for name in names:
            with translated_errors(f"drop the invalid index `{name}`"):
                run_statement(connection, render("tenant/drop_index.sql", {"index_name": name}).rstrip().rstrip(";"))
    return names


@contextmanager
def session(connection: Connection) -> Iterator[list[str]]:
    """Collect notices, commit by statement, and refuse a pooled connection; all as before at the end."""
    if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        raise ValueError("the connection is inside a transaction")
    autocommit = connection.autocommit
    connection.autocommit = True
    notices: list[str] = []

    def collect(diagnostic: psycopg.errors.Diagnostic) -> None:
        if (diagnostic.message_primary or "").startswith("skipped: "):
            notices.append((diagnostic.message_primary or "").removeprefix("skipped: "))

    connection.add_notice_handler(collect)
    try:
        refuse_pooler(connection)
        yield notices
    finally:
        connection.remove_notice_handler(collect)
        if not connection.closed:
            connection.autocommit = autocommit


def refuse_pooler(connection: Connection) -> None:
    """
    Refuse a transaction pool: session locks and settings would land on somebody else's server session.

    A pooler tells its clients a process id of its own.
    """
    row = connection.execute("select pg_catalog.pg_backend_pid()").fetchone()
    if row is None or row[0] != connection.info.backend_pid:
        raise StateRefusedError(
            "this connection goes through a pooler, and a roll-out needs a session of its own",
            hint="connect straight to PostgreSQL, for instance with `memharbor stack dsn owner --direct`",
        )


def retry_locks(work: Callable[[], None], what: str) -> None:
    """
    Run a transaction again while it cannot get a lock, a bounded number of times.

    Raises:
        StateRefusedError: The lock could not be had; nothing of `work` remains.
    """
    try:
        for attempt in stamina.retry_context(
            on=_is_lock_failure, attempts=LOCK_ATTEMPTS, timeout=None, wait_initial=0.2, wait_max=5.0, wait_jitter=1.0
        ):
            with attempt:
                work()
    except DatabaseError as exc:
        if not _is_lock_failure(exc):
            raise
        raise StateRefusedError(
            f"{what} could not get its locks in {LOCK_ATTEMPTS} attempts: {exc.message}",
            hint="end the long transactions that `select * from pg_stat_activity order by xact_start` shows, then run it again",
        ) from exc


def _is_lock_failure(exc: Exception) -> bool:
    return isinstance(exc.__cause__, psycopg.Error) and exc.__cause__.sqlstate in _LOCK_SQLSTATES
