"""
Open connections to PostgreSQL and turn its errors into Memharbor's.

Nothing here knows the schema, and nothing here prints. No message that leaves this module carries a password.
Sources: PostgreSQL manual, libpq Connection Strings and Appendix A (error codes); psycopg 3 documentation, Errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import conninfo
from psycopg.rows import TupleRow

from memharbor import versions
from memharbor.errors import ConfigError, ConnectError, DatabaseError, StateRefusedError

Connection = psycopg.Connection[TupleRow]

# A server that is gone: class 08 (connection), 57P0x (shutdown, crash, cannot connect now).
_GONE_SQLSTATES = ("08", "57P")


def redact_dsn(dsn: str) -> str:
    """
    Say where a DSN leads, without its password and without anything that cannot be understood.

    >>> redact_dsn("postgresql://app:s3cret@db.example:6432/memharbor?sslmode=verify-full")  # pragma: allowlist secret
    'postgresql://app@db.example:6432/memharbor'
    >>> redact_dsn("host=db password='s3cret")
    '<a DSN that cannot be read>'
    """
    try:
        parts = conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        return "<a DSN that cannot be read>"
    user = f"{parts['user']}@" if parts.get("user") else ""
    port = f":{parts['port']}" if parts.get("port") else ""
    return f"postgresql://{user}{parts.get('host') or 'localhost'}{port}/{parts.get('dbname') or ''}"


def connect(
    dsn: str, *, dbname: str | None = None, autocommit: bool = False, application_name: str = "memharbor"
) -> Connection:
    """
    Connect to a server that Memharbor supports.

    Args:
        dsn: A libpq URI or key/value string.
        dbname: Another database of the same server than the one in the DSN.
        autocommit: Whether each statement commits by itself.
        application_name: What `pg_stat_activity` shows.

    Raises:
        ConfigError: The DSN cannot be read.
        ConnectError: The server does not answer or refuses the login.
        StateRefusedError: The server is older than Memharbor supports.
    """
    overrides: dict[str, Any] = {"application_name": application_name}
    if dbname is not None:
        overrides["dbname"] = dbname
    try:
        target = conninfo.make_conninfo(dsn, **overrides)
    except psycopg.Error:
        # The parser quotes what it chokes on, which may be a piece of the password: neither the text nor the cause leaves.
        raise ConfigError(
            "the DSN cannot be read as a libpq connection string",
            hint="percent-encode special characters of the password, for instance `@` as `%40`",
        ) from None
    try:
        connection = psycopg.connect(target, autocommit=autocommit)
    except psycopg.OperationalError as exc:
        raise ConnectError(f"cannot connect to {redact_dsn(target)}: {str(exc).strip()}") from exc
    major = connection.info.server_version // 10_000
    if major < versions.POSTGRES_MINIMUM_MAJOR:
        connection.close()
        raise StateRefusedError(
            f"{redact_dsn(target)} is PostgreSQL {major}; Memharbor needs {versions.POSTGRES_MINIMUM_MAJOR} or newer"
        )
    return connection


@contextmanager
def translated_errors(doing: str) -> Iterator[None]:
    """
    Raise PostgreSQL's errors as Memharbor's.

    Args:
        doing: What was being done, for instance ``statement 3 of `memories` ``; begins the message.

    Raises:
        ConnectError: The connection was lost.
        DatabaseError: The server refused; its text, SQLSTATE, detail and hint are verbatim.
    """
    try:
        yield
    except psycopg.Error as exc:
        if is_connection_lost(exc):
            raise ConnectError(f"{doing}: the connection was lost: {str(exc).strip()}") from exc
        raise DatabaseError(f"{doing}: {server_text(exc)}") from exc


def is_connection_lost(exc: psycopg.Error) -> bool:
    """Tell a connection that is gone from a statement that was refused."""
    if exc.sqlstate is None:
        return isinstance(exc, psycopg.OperationalError)
    return exc.sqlstate.startswith(_GONE_SQLSTATES)


def server_text(exc: psycopg.Error) -> str:
    """Quote the server verbatim: message, SQLSTATE, detail, hint and context, each on its own line."""
    primary = exc.diag.message_primary or str(exc).strip()
    lines = [f"{primary} (SQLSTATE {exc.sqlstate})" if exc.sqlstate else primary]
    for label, text in (
        ("DETAIL", exc.diag.message_detail),
        ("HINT", exc.diag.message_hint),
        ("CONTEXT", exc.diag.context),
    ):
        if text:
            lines.append(f"{label}: {text}")
    return "\n".join(lines)


def run_statement(connection: Connection, statement: str) -> None:
    """Execute one rendered statement; `%` and `{` in it mean nothing."""
    connection.execute(statement)


@contextmanager
def transaction(
    connection: Connection, *, role: str | None = None, lock_timeout_ms: int | None = None, rollback: bool = False
) -> Iterator[None]:
    """
    Run a block in one transaction with an empty search path.

    Args:
        connection: Not inside a transaction, or the block becomes a savepoint of the outer one.
        role: Role to act as until the end of the transaction.
        lock_timeout_ms: How long each statement waits for a lock; the session's setting by default.
        rollback: Undo everything at the end, also after success.
    """
    with connection.transaction(force_rollback=rollback):
        connection.execute("select pg_catalog.set_config('search_path', '', true)")
        if lock_timeout_ms is not None:
            connection.execute("select pg_catalog.set_config('lock_timeout', %s, true)", (f"{lock_timeout_ms}ms",))
        if role is not None:
            connection.execute("select pg_catalog.set_config('role', %s, true)", (role,))
        yield
