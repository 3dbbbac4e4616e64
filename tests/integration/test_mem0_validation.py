"""`validate` on a live database: it passes on a good one, leaves nothing behind, and finds what is broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from memharbor import schema
from memharbor.database import connect
from memharbor.settings import Settings
from memharbor.validation import BackupStatus, CheckResult, ValidationContext, run_checks
from tests.containers import Server
from tests.integration.test_pool_guard import without_guard
from tests.memory_database import memory_database

DIMS = 16
NAMES = [
    "pgvector",
    "tables",
    "indexes",
    "row level security",
    "connection pooling",
    "backup",
    "memory CRUD",
    "vector search",
    "graph",
    "clean-up",
]


def context_of(server: Server, database: str) -> ValidationContext:
    return ValidationContext(
        settings=Settings(database=database, embedding_dims=DIMS),
        admin_dsn=server.admin_dsn(database),
        app_dsn=server.pool_dsn(database, "app"),
        service_dsn=server.pool_dsn(database, "service"),
        is_pooled=True,
        backup_status=lambda: BackupStatus(datetime.now(UTC) - timedelta(hours=3), "a full backup"),
    )


@pytest.fixture(scope="module")
def good(server: Server) -> ValidationContext:
    return context_of(server, memory_database(server, "mem0_validate", DIMS))


def failed(results: list[CheckResult]) -> dict[str, str]:
    return {result.name: result.detail for result in results if result.state == "failed"}


def rows_left(context: ValidationContext) -> list[int]:
    tables = ("memories", "entities", "memory_relationships", "memory_categories", "memory_history")
    with closing(connect(context.admin_dsn)) as connection:
        counts = (connection.execute(f"select count(*) from memharbor.{table}".encode()).fetchone() for table in tables)
        return [count[0] for count in counts if count is not None]


def test_a_good_database_passes_twice_and_nothing_is_left(good: ValidationContext) -> None:
    for _ in range(2):
        results = run_checks(good)
        assert failed(results) == {}
        assert [result.name for result in results] == NAMES
        assert {result.state for result in results} == {"ok"}
        assert rows_left(good) == [0, 0, 0, 0, 0]


def test_a_migration_is_counted_with_its_embeddings(good: ValidationContext) -> None:
    with closing(connect(good.admin_dsn, autocommit=True)) as connection:
        for number, embedding in enumerate(([1.0] * DIMS, None)):
            connection.execute(
                "insert into memharbor.memories (payload, embedding) values (jsonb_build_object('user_id', 'counted', 'data',"
                " %s::text), %s::real[]::vector)",
                (f"fact {number}", embedding),
            )
        try:
            assert "1 of 2" in failed(run_checks(replace(good, expected_count=2)))["memory count"]
            connection.execute("delete from memharbor.memories where embedding is null and user_id = 'counted'")
            assert failed(run_checks(replace(good, expected_count=1))) == {}
            assert "not 2" in failed(run_checks(replace(good, expected_count=2)))["memory count"]
        finally:
            connection.execute("delete from memharbor.memories where user_id = 'counted'")
            connection.execute("delete from memharbor.memory_history where user_id = 'counted'")


def test_what_a_killed_run_left_is_removed_and_nothing_of_anybody_else(good: ValidationContext) -> None:
    with closing(connect(good.service_dsn)) as connection:
        for user_id, age in (("memharbor-validate-old", 2), ("memharbor-validate-now", 0), ("somebody", 2)):
            connection.execute(
                "insert into memories (user_id, memory, created_at, updated_at)"
                " values (%s, 'x', now() - %s * interval '1 hour', now() - %s * interval '1 hour')",
                (user_id, age, age),
            )
        connection.commit()
        run_checks(good)
        left = connection.execute("select user_id from memories order by user_id").fetchall()
        connection.execute("delete from memories")
        connection.commit()
    with closing(connect(good.admin_dsn)) as connection:
        connection.execute("delete from memharbor.memory_history")
        connection.commit()
    assert left == [("memharbor-validate-now",), ("somebody",)]


def test_a_database_that_pulumi_did_not_make_passes_what_applies(server: Server, good: ValidationContext) -> None:
    database = good.settings.database
    external = replace(
        good,
        app_dsn=server.direct_dsn(database, "app"),
        service_dsn=server.direct_dsn(database, "service"),
        is_pooled=False,
        backup_status=None,
    )
    results = {result.name: result for result in run_checks(external)}
    assert {name for name, result in results.items() if result.state == "not applicable"} == {
        "connection pooling",
        "backup",
    }
    assert "was not made by `pulumi up`" in results["backup"].detail
    assert not results["backup"].ok
    assert failed(list(results.values())) == {}


def test_a_database_without_a_backup_yet_passes_and_says_so(good: ValidationContext) -> None:
    none_yet = BackupStatus(None, "there is no backup yet; run `memharbor backup create`")
    results = {result.name: result for result in run_checks(replace(good, backup_status=lambda: none_yet))}
    assert results["backup"].ok
    assert results["backup"].detail == f"WAL is archived; {none_yet.detail}"


def test_a_bad_backup_fails(good: ValidationContext) -> None:
    bad = BackupStatus(datetime.now(UTC), "a full backup", "segment 000000010000000000000007 is missing")
    assert failed(run_checks(replace(good, backup_status=lambda: bad))) == {
        "backup": "segment 000000010000000000000007 is missing"
    }


def test_a_pooler_without_its_guard_fails(server: Server, good: ValidationContext) -> None:
    with without_guard(server):
        assert "an identity reached the next client" in failed(run_checks(good))["connection pooling"]
    assert failed(run_checks(good)) == {}


def test_a_pool_that_is_none_fails(server: Server, good: ValidationContext) -> None:
    direct = replace(good, app_dsn=server.direct_dsn(good.settings.database, "app"))
    found = failed(run_checks(direct))
    assert set(found) == {"connection pooling"}
    assert "no transaction pool" in found["connection pooling"]


BREAKAGES = {
    "row level security is off": (
        "alter table memharbor.memories disable row level security",
        {"tables", "row level security"},
    ),
    "a policy lets everybody read": (
        "create policy leak on memharbor.memories for select to memharbor_app using (true)",
        {"tables", "row level security"},
    ),
    "a policy lets everybody write": (
        "drop policy isolate on memharbor.memories;"
        " create policy isolate on memharbor.memories to memharbor_app"
        " using ((payload ->> 'user_id') = memharbor.current_user_id()) with check (true)",
        {"tables", "row level security"},
    ),
    "the index of the users is gone": (
        "drop index memharbor.memories_payload_user_id",
        {"tables", "indexes"},
    ),
    "the text index is gone": ("drop index memharbor.memories_text_lemmatized", {"tables", "indexes"}),
    "the trigger is off": ("alter table memharbor.memories disable trigger sync", {"tables", "memory CRUD"}),
    "mem0's view is gone": ("drop view public.mem0", {"tables", "indexes", "memory CRUD", "vector search"}),
    "the walk is wrong": (
        "create or replace function memharbor.related_memories(memory_id uuid, hops integer default 2)"
        " returns table (id uuid, distance integer, relationship_type text, strength numeric, via uuid)"
        " language sql as 'select null::uuid, 1, null::text, 1.0, null::uuid where false'",
        {"tables", "graph"},
    ),
}


@pytest.fixture(scope="module")
def breakable(server: Server) -> ValidationContext:
    return context_of(server, memory_database(server, "mem0_breakable", DIMS))


@contextmanager
def broken(context: ValidationContext, statements: str) -> Iterator[None]:
    """Break a database, and let the schema's own roll-out repair it."""
    with closing(connect(context.admin_dsn, autocommit=True)) as connection:
        connection.execute(statements.encode())
        try:
            yield
        finally:
            schema.apply(connection, context.settings)


@pytest.mark.parametrize(("statements", "expected"), BREAKAGES.values(), ids=BREAKAGES)
def test_what_is_broken_is_found(breakable: ValidationContext, statements: str, expected: set[str]) -> None:
    with broken(breakable, statements):
        found = failed(run_checks(breakable))
    assert expected <= set(found), found
