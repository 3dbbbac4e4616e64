"""
PgBouncer's reset guard: what one client leaves on a server connection never reaches the next client.

Each leak is tried twice, with the guard as it is shipped and with the guard taken away: only then is it the guard that
closes it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from memharbor.mem0 import user_pool
from tests.containers import Server
from tests.integration.test_mem0_interleavings import SEED, ForeignRowError, interleave
from tests.memory_database import memory_database

ROW_COUNT = 31


@pytest.fixture(scope="module")
def database(server: Server) -> str:
    return memory_database(server, "mem0_guard", 8)


@pytest.fixture(scope="module")
def dsn(server: Server, database: str) -> str:
    """As the application, which here may create temporary tables, unlike in a stack."""
    with psycopg.connect(server.admin_dsn(), autocommit=True) as connection:
        connection.execute(f"grant temporary on database {database} to memharbor_app".encode())
    return server.pool_dsn(database, "app")


@pytest.fixture
def alice(dsn: str) -> str:
    """A user with memories."""
    user_id = f"alice-{uuid.uuid4()}"
    with ConnectionPool(dsn, min_size=1, max_size=1, open=True) as pool, user_pool(pool, user_id).connection() as lent:
        lent.execute(
            "insert into memories (user_id, memory) select %s, 'memory ' || n from generate_series(1, %s) n",
            (user_id, ROW_COUNT),
        )
    return user_id


@contextmanager
def without_guard(server: Server) -> Iterator[None]:
    set_guard(server, on=False)
    try:
        yield
    finally:
        set_guard(server, on=True)
        # Every server connection of that time, not only the one that the next client happens to get.
        tell_pooler(server, "reconnect")


def set_guard(server: Server, *, on: bool) -> None:
    tell_pooler(server, f"set server_reset_query_always = {int(on)}")


def tell_pooler(server: Server, command: str) -> None:
    console = ["psql", "--no-psqlrc", "-h", "/run/pgbouncer", "-p", "6432", "-U", "pgbouncer", "pgbouncer"]
    code, output = server.execute("pgbouncer", [*console, "-c", command])
    assert code == 0, output


def session_setting(client: psycopg.Connection[Any], user_id: str) -> None:
    """Set the identity for the session, which a transaction pooler does not give."""
    client.execute("select set_config('app.user_id', %s, false)", (user_id,))


def held_cursor(client: psycopg.Connection[Any], user_id: str) -> None:
    """Open a cursor that outlives its transaction."""
    with client.transaction():
        client.execute("select set_config('app.user_id', %s, true)", (user_id,))
        client.execute("declare left_behind cursor with hold for select id from memories")


def temporary_table(client: psycopg.Connection[Any], user_id: str) -> None:
    """Copy memories into a table of the session."""
    with client.transaction():
        client.execute("select set_config('app.user_id', %s, true)", (user_id,))
        client.execute("create temporary table left_behind as select id from memories")


LEAKS: list[tuple[Callable[[psycopg.Connection[Any], str], None], str]] = [
    (session_setting, "select id from memories"),
    (held_cursor, "fetch all from left_behind"),
    (temporary_table, "select id from left_behind"),
]


def foreign_rows(dsn: str, leave: Callable[[psycopg.Connection[Any], str], None], query: str, user_id: str) -> int:
    """Let one client leave something behind, and count what the next one on the same server connection gets."""
    with psycopg.connect(dsn, autocommit=True) as careless, psycopg.connect(dsn, autocommit=True) as next_client:
        careless.execute("select pg_backend_pid()")
        leave(careless, user_id)
        try:
            rows = next_client.execute(query.encode()).fetchall()
        except (psycopg.errors.InvalidCursorName, psycopg.errors.UndefinedTable):
            return 0
        return len(rows)


@pytest.mark.parametrize(("leave", "query"), LEAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_nothing_reaches_the_next_client(
    dsn: str, alice: str, leave: Callable[[psycopg.Connection[Any], str], None], query: str
) -> None:
    assert foreign_rows(dsn, leave, query, alice) == 0


@pytest.mark.parametrize(("leave", "query"), LEAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_without_the_guard_it_would(
    server: Server, dsn: str, alice: str, leave: Callable[[psycopg.Connection[Any], str], None], query: str
) -> None:
    with without_guard(server):
        assert foreign_rows(dsn, leave, query, alice) == ROW_COUNT
    assert foreign_rows(dsn, leave, query, alice) == 0


def test_without_the_guard_the_interleavings_find_the_leak(server: Server, dsn: str) -> None:
    with without_guard(server), pytest.raises(ForeignRowError):
        interleave(300, dsn, SEED)


def test_a_lock_of_a_session_ends_with_the_transaction(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as careless, psycopg.connect(dsn, autocommit=True) as next_client:
        careless.execute("select pg_advisory_lock(4711)")
        held = next_client.execute("select count(*) from pg_locks where locktype = 'advisory' and objid = 4711")
        assert held.fetchone() == (0,)


def test_prepared_statements_survive_the_guard(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=0) as client:
        seen = {client.execute("select %s::int + 1", (number,)).fetchone() for number in range(50)}
        statements = client.execute("select count(*) from pg_prepared_statements").fetchone()
    assert seen == {(number + 1,) for number in range(50)}
    assert statements is not None
    assert statements[0] >= 1


def test_an_application_of_a_stack_cannot_create_temporary_tables(server: Server) -> None:
    database = memory_database(server, "mem0_384", 384)
    with (
        psycopg.connect(server.pool_dsn(database, "app"), autocommit=True) as client,
        pytest.raises(psycopg.errors.InsufficientPrivilege, match="temporary"),
    ):
        client.execute("create temporary table mine (id int)")
