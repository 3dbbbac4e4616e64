"""
A transaction that sees and holds all rows of tables, whoever the administrator is.

For what works on everybody's rows at once: checkpoints, rollbacks, erasures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from memharbor.backup.rows import DatabaseRows
from memharbor.backup.tables import SCHEMA
from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.names import ROLES
from memharbor.schema.sessions import retry_locks
from memharbor.schema.statements import split_statements
from memharbor.templates import ident, render

LOCK_TIMEOUT_MS = 2000

LockMode = Literal["share", "share row exclusive", "exclusive"]


def qualified(table: str) -> str:
    """
    Spell a table of Memharbor's with its schema.

    >>> qualified("memories")
    '"memharbor"."memories"'
    """
    return f"{ident(SCHEMA)}.{ident(table)}"


def run_script(connection: Connection, script: str) -> None:
    """Execute the statements of a rendered template, one after the other."""
    for statement in split_statements(script):
        run_statement(connection, statement)


def present_tables(connection: Connection, names: Sequence[str]) -> list[str]:
    """Keep of the tables' names those that the database has, in their order."""
    found = connection.execute(
        """
        select c.relname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where n.nspname = %s and c.relkind = 'r' and c.relname = any (%s)
        """,
        (SCHEMA, list(names)),
    ).fetchall()
    return [name for name in names if (name,) in found]


def may_set(connection: Connection, parameter: str) -> bool:
    """Tell whether the login may set a parameter that is not everybody's."""
    row = connection.execute(
        "select pg_catalog.has_parameter_privilege(current_user, %s, 'set')", (parameter,)
    ).fetchone()
    return bool(row and row[0])


@contextmanager
def all_rows(connection: Connection, tables: Sequence[str]) -> Iterator[None]:
    """
    See all rows of tables inside the present transaction, also as an administrator whom row level security binds.

    Such a one acts as the tables' owner, for whom the policies are lifted until the end of the block.
    """
    row = connection.execute(
        "select rolsuper or rolbypassrls from pg_catalog.pg_roles where rolname = current_user"
    ).fetchone()
    if row and row[0]:
        yield
        return
    names = [qualified(table) for table in tables]
    connection.execute("select pg_catalog.set_config('role', %s, true)", (ROLES["owner"],))
    run_script(connection, render("checkpoint/row_security.sql", {"forced": False, "tables": names}))
    yield
    run_script(connection, render("checkpoint/row_security.sql", {"forced": True, "tables": names}))


def in_locked_transaction(
    connection: Connection, tables: Sequence[str], mode: LockMode, work: Callable[[DatabaseRows], None], *, what: str
) -> None:
    """
    Do something in one transaction that holds a lock on tables; again while others do not let it have the lock.

    Args:
        connection: Its role administers the database; not inside a transaction.
        tables: Names of tables of Memharbor's.
        mode: The lock.
        work: What to do. It may be called more than once; nothing remains of a call that failed.
        what: What it is, for errors: ``the erasure``.

    Raises:
        StateRefusedError: The lock could not be had.
        DatabaseError: A statement was refused.
    """

    def attempt() -> None:
        with translated_errors(what), transaction(connection, lock_timeout_ms=LOCK_TIMEOUT_MS):
            connection.execute("set local statement_timeout = 0")
            with all_rows(connection, tables):
                if tables:
                    run_statement(connection, f"lock table {', '.join(map(qualified, tables))} in {mode} mode")
                connection.execute("set local lock_timeout = 0")
                work(DatabaseRows(connection))

    retry_locks(attempt, what)


def may_execute(connection: Connection, function: str) -> bool:
    """Tell whether the login may call a function."""
    row = connection.execute(
        "select pg_catalog.has_function_privilege(pg_catalog.to_regprocedure(%s)::oid, 'execute')", (function,)
    ).fetchone()
    return bool(row and row[0])
