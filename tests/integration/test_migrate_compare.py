"""Two databases side by side: whatever differs is found, named and nothing else; also by an administrator who is no superuser."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from memharbor.commands import main
from memharbor.database import Connection, connect
from memharbor.errors import StateRefusedError
from memharbor.migrate import compare
from memharbor.migrate.compare import NAMED_MAX, compare_databases
from memharbor.settings import Settings
from tests.command_line import ok, refused
from tests.containers import Server
from tests.schema_databases import DIMS, admin_connection, scratch_database
from tests.unit.test_stack import checkout, endpoint, put_outputs, raw_outputs
from tests.user_rows import USERS, memory_id, populate

__all__ = ["checkout"]

SEED = int(os.environ.get("MEMHARBOR_TEST_SEED", "20261121"))
EACH = 170
COMPARED = {"memories": len(USERS) * EACH, "entities": len(USERS) * 43, "memory_relationships": len(USERS) * (EACH - 1)}
SOAK_ROWS = 1_000_000
# Of one bucket whose rows are compared one by one.
SOAK_GROWTH_KIB = 16_000


@pytest.fixture(scope="module")
def original(server: Server) -> Iterator[str]:
    """A database with about a thousand memories of several users."""
    with scratch_database(server) as name:
        with closing(admin_connection(server, name)) as connection:
            populate(connection, DIMS, count=EACH)
        yield name


@contextmanager
def copied(server: Server, name: str) -> Iterator[str]:
    copy = f"{name}_copy"
    with closing(admin_connection(server)) as connection:
        connection.execute(f"drop database if exists {copy} with (force)".encode())
        connection.execute(f"create database {copy} template {name}".encode())
        try:
            yield copy
        finally:
            connection.execute(f"drop database {copy} with (force)".encode())


@pytest.fixture
def copy(server: Server, original: str) -> Iterator[str]:
    """The same, to be changed."""
    with copied(server, original) as name:
        yield name


def put_stack(checkout: Path, server: Server, database: str) -> None:
    """Let stack `staging` be a database of the test's server."""
    server.container("postgres")  # a stack's administrator is `postgres`, over TLS: skips where the server is not ours
    parts = conninfo_to_dict(server.admin_dsn(database))
    raw = raw_outputs(
        stack="staging",
        database=database,
        settings=Settings(database=database, embedding_dims=DIMS).model_dump(),
        ca_certificate=Path(str(parts["sslrootcert"])).read_text(),
    )
    raw["endpoints"]["rw"] = endpoint(int(str(parts["port"])), database, str(parts["host"]))
    raw["passwords"]["admin"] = str(parts["password"])
    put_outputs(checkout, raw)


@pytest.fixture
def staging(checkout: Path, server: Server, copy: str) -> str:
    put_stack(checkout, server, copy)
    return copy


Typed = Callable[..., tuple[int, str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Compare a database with stack `staging`; returns the exit code and what was said on stdout."""

    def call(dsn: str, *options: str) -> tuple[int, str]:
        monkeypatch.setenv("MEMHARBOR_DSN", dsn)
        with pytest.raises(SystemExit) as ended:
            main(["migrate", "compare", "--with", "staging", *options])
        return int(ended.value.code or 0), capsys.readouterr().out

    return call


def change(server: Server, database: str, statement: str, parameters: Any = None) -> None:
    """Change what is written and nothing else: no trigger follows it up."""
    with closing(admin_connection(server, database)) as connection, connection.transaction():
        connection.execute("set local session_replication_role = replica")
        changed = connection.execute(statement.encode(), parameters)
        assert changed.rowcount == 1, statement


VICTIM = memory_id("bob", 77)
ZERO = memory_id("alice", 1)
_RELATIONSHIP = "id = (select id from memharbor.memory_relationships where user_id = 'bob' order by id limit 1)"
_ENTITY = "id = (select id from memharbor.entities where payload ->> 'user_id' = 'bob' order by id limit 1)"


@dataclass(frozen=True)
class Case:
    """One change of one row, and what is to be said of it."""

    table: str
    statement: str
    columns: tuple[str, ...] = ()
    what: str = "different"


def of_memory(column: str, value: str, row_id: uuid.UUID = VICTIM) -> Case:
    return Case("memories", f"update memharbor.memories set {column} = {value} where id = '{row_id}'", (column,))


def of_entity(column: str, value: str) -> Case:
    return Case("entities", f"update memharbor.entities set {column} = {value} where {_ENTITY}", (column,))


def of_relationship(column: str, value: str) -> Case:
    statement = f"update memharbor.memory_relationships set {column} = {value} where {_RELATIONSHIP}"
    return Case("memory_relationships", statement, (column,))


def last_bit(column: str) -> str:
    """One float of an embedding, changed by its last bit."""
    return (
        "(select array_agg(case when n = 3 then v * (1 + 1e-7::double precision) else v end order by n)::real[]"
        f" from unnest({column}::real[]::double precision[]) with ordinality as each (v, n))::public.vector"
    )


CASES = {
    "the last bit of a float": of_memory("embedding", last_bit("embedding")),
    "a zero without its sign": of_memory("embedding", f"'[0{',1' * (DIMS - 1)}]'", ZERO),
    "no embedding": of_memory("embedding", "null"),
    "a text": of_memory("memory", "memory || ' '"),
    "a text that is empty": of_memory("agent_id", "case when agent_id is null then '' end"),
    "a key of the metadata": of_memory("metadata", "metadata || '{\"mood\": null}'"),
    "a number spelled otherwise": of_memory("metadata", "metadata || '{\"importance\": 1.0}'"),
    "a key of the payload": of_memory("payload", "payload - 'book'"),
    "a category": of_memory("categories", "categories || array['new']"),
    "a microsecond": of_memory("created_at", "created_at + '1 microsecond'"),
    "the time of the last change": of_memory("updated_at", "updated_at - '1 microsecond'::interval"),
    "a time of deletion": of_memory("deleted_at", "'2025-01-15T10:00:00Z'"),
    "a time of archiving": of_memory("archived_at", "'2025-01-15T10:00:00Z'"),
    "an expiry": of_memory("expires_at", "'infinity'"),
    "a state": of_memory("state", "'paused'"),
    "an owner": of_memory("user_id", "'alice'"),
    "a missing memory": Case("memories", f"delete from memharbor.memories where id = '{VICTIM}'", what="missing"),
    "an extra memory": Case(
        "memories",
        "insert into memharbor.memories (id, payload) values ('00000000-0000-0000-0000-000000000000', '{}')",
        what="extra",
    ),
    "an entity's name": of_entity("payload", 'payload || \'{"data": "other"}\''),
    "an entity's float": of_entity("vector", last_bit("vector")),
    "a missing entity": Case("entities", f"delete from memharbor.entities where {_ENTITY}", what="missing"),
    "how strong a relationship is": of_relationship("strength", "strength - 0.001"),
    "what a relationship leads to": of_relationship("target_memory_id", "source_memory_id"),
    "what a relationship is": of_relationship("relationship_type", "'other'"),
    "what is known of a relationship": of_relationship("metadata", "'{\"n\": 1}'"),
    "a missing relationship": Case(
        "memory_relationships",
        f"delete from memharbor.memory_relationships where {_RELATIONSHIP}",
        what="missing",
    ),
}


def victim_of(server: Server, case: Case, original: str) -> str:
    """Which row the case is about, as the database names it."""
    if case.what == "extra":
        return str(uuid.UUID(int=0))
    if case.table == "memories":
        return str(ZERO if str(ZERO) in case.statement else VICTIM)
    condition = _ENTITY if case.table == "entities" else _RELATIONSHIP
    with closing(admin_connection(server, original)) as connection:
        row = connection.execute(f"select id::text from memharbor.{case.table} where {condition}".encode()).fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.parametrize("name", CASES)
def test_one_difference_is_found_and_named(
    name: str, server: Server, original: str, staging: str, typed: Typed
) -> None:
    case = CASES[name]
    victim = victim_of(server, case, original)
    change(server, staging, case.statement)
    code, said = typed(server.admin_dsn(original), "--output", "json")
    found = json.loads(said)
    named = {"table": case.table, "id": victim, "what": case.what, "columns": list(case.columns)}
    assert (code, found["rows"]) == (10, [named])
    assert {what: found[what] for what in ("missing", "extra", "different")} == {
        "missing": 0,
        "extra": 0,
        "different": 0,
        case.what: 1,
    }
    step = {"missing": -1, "extra": 1, "different": 0}[case.what]
    assert found["compared"] == {
        table: [count, count + step * (table == case.table)] for table, count in COMPARED.items()
    }
    code, said = typed(server.admin_dsn(original))
    line, summary = said.splitlines()
    assert code == 10
    assert line.split() == f"{case.what}: {case.table} {victim} {', '.join(case.columns)}".split()
    assert summary.startswith("1 difference")


def test_what_the_server_calls_equal_is_not_so_to_the_bit(server: Server, original: str) -> None:
    """The case `a zero without its sign` would be no case otherwise."""
    with closing(admin_connection(server, original)) as connection:
        row = connection.execute(
            "select embedding = %s::vector, vector_send(embedding) = vector_send(%s::vector) from memharbor.memories"
            " where id = %s",
            (*[f"[0{',1' * (DIMS - 1)}]"] * 2, ZERO),
        ).fetchone()
    assert row == (True, False)


def test_the_same_rows_are_no_difference(server: Server, original: str, staging: str, typed: Typed) -> None:
    with closing(admin_connection(server, staging)) as connection:
        # Other places in the table, another order, another audit trail.
        connection.execute("set session_replication_role = replica")
        connection.execute("update memharbor.memories set user_id = user_id where user_id <> 'bob'")
        connection.execute("delete from memharbor.memory_history")
        connection.execute("vacuum (full, analyze) memharbor.memories")
    code, said = typed(server.admin_dsn(original), "--output", "json")
    assert code == 0
    assert json.loads(said) == {
        "missing": 0,
        "extra": 0,
        "different": 0,
        "rows": [],
        "compared": {table: [count, count] for table, count in COMPARED.items()},
    }
    code, said = typed(server.admin_dsn(original))
    assert (code, said.split()[:2]) == (0, ["no", "difference"])


def spelled(number: int) -> uuid.UUID:
    """Ids as a counter makes them: they differ in their last digits only."""
    return uuid.UUID(int=number)


@pytest.mark.parametrize("make_id", [spelled, lambda number: memory_id("x", number)], ids=["counted", "random"])
def test_many_differences_are_found_in_small_buckets(
    make_id: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buckets are divided to the end, as they are in a large database."""
    monkeypatch.setattr(compare, "_ROWS_MAX", 3)
    draw = random.Random(SEED)
    with scratch_database(server) as one:
        with closing(admin_connection(server, one)) as connection, connection.cursor() as cursor:
            cursor.executemany(
                "insert into memharbor.memories (id, embedding, payload)"
                " values (%s, %s, jsonb_build_object('user_id', 'alice', 'data', %s::text))",
                [(make_id(n), f"[{n}{',1' * (DIMS - 1)}]", f"fact {n}") for n in range(600)],
            )
        with copied(server, one) as other:
            chosen = draw.sample(range(600), 60)
            expected = {(str(make_id(n)), "missing") for n in chosen[:20]}
            expected |= {(str(make_id(n)), "different") for n in chosen[20:40]}
            expected |= {(str(make_id(n + 1000)), "extra") for n in chosen[40:]}
            with closing(admin_connection(server, other)) as connection:
                connection.execute(
                    "delete from memharbor.memories where id = any (%s)", ([*map(make_id, chosen[:20])],)
                )
                connection.execute(
                    "update memharbor.memories set state = 'paused' where id = any (%s)",
                    ([*map(make_id, chosen[20:40])],),
                )
                for n in chosen[40:]:
                    connection.execute(
                        "insert into memharbor.memories (id, payload) values (%s, '{}')", (make_id(n + 1000),)
                    )
            found = compared(server, one, other)
    assert {(each["id"], each["what"]) for each in found["rows"]} == expected
    assert [each["id"] for each in found["rows"]] == sorted(each["id"] for each in found["rows"])


def compared(server: Server, one: str, other: str) -> dict[str, Any]:
    with closing(admin_connection(server, one)) as first, closing(admin_connection(server, other)) as second:
        return compare_databases(first, second)


def test_a_table_that_the_other_one_does_not_have_is_missing(server: Server, original: str, copy: str) -> None:
    with closing(admin_connection(server, copy)) as connection:
        connection.execute("drop table memharbor.memory_relationships cascade")
    found = compared(server, original, copy)
    count = COMPARED["memory_relationships"]
    assert (found["missing"], found["extra"], found["different"]) == (count, 0, 0)
    assert found["compared"]["memory_relationships"] == [count, 0]
    assert len(found["rows"]) == NAMED_MAX < count, "the counts are of all, and the first ones are named"
    found = compared(server, copy, original)
    assert (found["missing"], found["extra"], found["different"]) == (0, count, 0)
    assert {each["table"] for each in found["rows"]} == {"memory_relationships"}


def test_other_columns_are_refused(server: Server, original: str, staging: str) -> None:
    with closing(admin_connection(server, staging)) as connection:
        connection.execute("alter table memharbor.memories add column surprise text")
    pattern = "other columns in the two databases: `surprise` is absent and text"
    refused(7, pattern, server.admin_dsn(original), "migrate", "compare", "--with", "staging")


def test_a_database_is_not_compared_with_itself(server: Server, staging: str) -> None:
    """Nothing differs then, whatever was meant."""
    refused(2, "both are the same database", server.admin_dsn(staging), "migrate", "compare", "--with", "staging")


@pytest.fixture(params=["true", "false"], ids=["may read", "must become"])
def administrator(server: Server, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """
    The login of an administrator who is no superuser, as managed services have it.

    One who may read as the owner sees no row and no error, where row level security binds the owner too.
    """
    with closing(admin_connection(server)) as admin:
        admin.execute("create role compare_test_admin login password 'managed'")  # pragma: allowlist secret
        admin.execute(
            f"grant memharbor_owner to compare_test_admin with inherit {request.param}, set true;"
            " grant memharbor_service to compare_test_admin with inherit false, set true".encode()
        )
        try:
            yield {"user": "compare_test_admin", "password": "managed"}  # pragma: allowlist secret
        finally:
            admin.execute("drop owned by compare_test_admin cascade")
            admin.execute("drop role compare_test_admin")


def test_an_administrator_who_is_no_superuser_sees_all_rows(
    administrator: dict[str, str], server: Server, original: str, staging: str, typed: Typed
) -> None:
    dsn = make_conninfo(server.admin_dsn(original), **administrator)
    with closing(connect(dsn, autocommit=True)) as connection:
        row = connection.execute("select current_setting('is_superuser')").fetchone()
        assert row == ("off",)
    code, said = typed(dsn, "--output", "json")
    assert (code, json.loads(said)["compared"]["memories"]) == (0, [COMPARED["memories"]] * 2)
    change(server, staging, f"delete from memharbor.memories where id = '{VICTIM}'")
    code, said = typed(dsn, "--output", "json")
    named = {"table": "memories", "id": str(VICTIM), "what": "missing", "columns": []}
    assert (code, json.loads(said)["rows"]) == (10, [named])
    with (
        closing(connect(dsn, autocommit=True)) as first,
        closing(connect(make_conninfo(server.admin_dsn(staging), **administrator), autocommit=True)) as second,
    ):
        found = compare_databases(first, second)
        assert found["compared"]["memories"] == [COMPARED["memories"], COMPARED["memories"] - 1]
        assert (found["missing"], found["extra"], found["different"]) == (1, 0, 0)
        assert first.execute("select current_user").fetchone() == ("compare_test_admin",), "the role ends with it"


HIDING = {
    "nothing lets it see": "drop policy service on memharbor.{}",
    "one takes it away again": "create policy hiding on memharbor.{} as restrictive to memharbor_service"
    " using (current_user = 'nobody')",
    "one is for everybody": "create policy hiding on memharbor.{} as restrictive for select using (id is null)",
}


@pytest.mark.parametrize("table", ["memories", "entities", "memory_relationships"])
@pytest.mark.parametrize("how", HIDING)
def test_rows_that_may_be_hidden_are_refused_and_not_equal(
    how: str, table: str, administrator: dict[str, str], server: Server, original: str, copy: str
) -> None:
    with closing(admin_connection(server, copy)) as connection:
        connection.execute(HIDING[how].format(table).encode())

    def opened(name: str) -> Connection:
        return connect(make_conninfo(server.admin_dsn(name), **administrator), autocommit=True)

    with closing(opened(original)) as first, closing(opened(copy)) as second:
        with pytest.raises(StateRefusedError, match=f"would hide rows of `{table}`") as caught:
            compare_databases(first, second)
        assert "managed" not in caught.value.message
        with pytest.raises(StateRefusedError, match=f"would hide rows of `{table}`"):
            compare_databases(second, first)


def test_a_run_that_has_not_everything_ready_is_not_compared(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has ready would be compared, and the rest not missed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", str(DIMS))
    path = tmp_path / "export.json"
    path.write_text(json.dumps([{"memory": f"fact {n}", "user_id": "alice"} for n in range(5)]))
    with scratch_database(server) as name:
        dsn = server.admin_dsn(name)
        run = ("migrate", "run", "--from", "file", "--input", str(path), "--model", "memharbor-hash")
        done = ok(dsn, *run, "--until", "transform")
        refused(9, "was stopped before everything", dsn, "migrate", "compare")
        ok(dsn, "migrate", "resume", done["run"])
        assert ok(dsn, "migrate", "compare")["rows"] == []


@pytest.fixture
def million(server: Server) -> Iterator[tuple[str, str, str]]:
    """Two databases of a million memories, and the id of the one that has another float in the second."""
    with scratch_database(server) as one:
        with closing(admin_connection(server, one)) as connection, connection.transaction():
            connection.execute("set local role memharbor_service")
            connection.execute(
                """
                insert into memharbor.memories (id, embedding, payload)
                select md5('memory ' || n)::uuid, array[n, 1, 2, 3, 5, 7, 11, 13]::real[]::public.vector,
                  jsonb_build_object('user_id', 'user ' || n %% 1000, 'data', 'fact ' || n, 'mood', n %% 7)
                from generate_series(1, %s) n
                """,
                (SOAK_ROWS,),
            )
        with copied(server, one) as other:
            with closing(admin_connection(server, other)) as connection:
                row = connection.execute("select md5('memory 765432')::uuid::text").fetchone()
            assert row is not None
            change(
                server, other, f"update memharbor.memories set embedding = {last_bit('embedding')} where id = %s", row
            )
            yield one, other, row[0]


# The high water mark of this very process: what `wait4` says of a child begins with its parent's.
MEASURED = """
import atexit, pathlib, sys
from memharbor.commands import main
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: pathlib.Path("peak").write_text(status.read_text().partition("VmHWM:")[2].split()[0]))
main(sys.argv[1:])
"""


def measured(dsn: str) -> tuple[int, dict[str, Any], float, int]:
    """Compare with stack `staging` in a process of its own: exit code, report, seconds, peak memory in KiB."""
    command = (sys.executable, "-c", MEASURED, "migrate", "compare", "--with", "staging", "--output", "json")
    begun_at = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "MEMHARBOR_DSN": dsn}, check=False)
    seconds = time.monotonic() - begun_at
    return done.returncode, json.loads(done.stdout), seconds, int(Path("peak").read_text())


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_one_float_in_a_million_rows_is_found(
    million: tuple[str, str, str],
    original: str,
    copy: str,
    checkout: Path,
    server: Server,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    """In memory that is the same as for a thousand rows."""
    put_stack(checkout, server, copy)
    code, found, _, small_kib = measured(server.admin_dsn(original))
    assert (code, found["rows"]) == (0, [])
    one, other, victim = million
    put_stack(checkout, server, other)
    code, found, seconds, peak_kib = measured(server.admin_dsn(one))
    record_testsuite_property("compare_million_seconds", round(seconds, 1))
    record_testsuite_property("compare_million_peak_kib", peak_kib)
    record_testsuite_property("compare_thousand_peak_kib", small_kib)
    assert code == 10
    assert found["compared"]["memories"] == [SOAK_ROWS, SOAK_ROWS]
    assert found["rows"] == [{"table": "memories", "id": victim, "what": "different", "columns": ["embedding"]}]
    assert peak_kib < small_kib + SOAK_GROWTH_KIB
