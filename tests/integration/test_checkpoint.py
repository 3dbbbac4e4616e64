"""Checkpoints on a real PostgreSQL: the state that is named, what was changed since, and the way back by copied rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from memharbor.backup.changes import Change, find_changed_keys, find_changes
from memharbor.backup.checkpoint import Checkpoints, Scope
from memharbor.backup.checkpoint_creation import create_checkpoint
from memharbor.backup.erasure import erase_user, new_erasure, user_digest
from memharbor.backup.rollback import drop_fetched, fetch_copies, plan_rollback, put_rows_back
from memharbor.backup.rows import DatabaseRows
from memharbor.database import Connection
from memharbor.errors import SourceDataError, StateRefusedError, UsageError, VerificationError
from tests.integration.memory_rows import fingerprints, insert_user
from tests.memory_database import Server
from tests.schema_databases import admin_connection, role_connection, scratch_database

USERS = ("alice", "bob", "carol")


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    with scratch_database(server) as name:
        with closing(admin_connection(server, name)) as connection:
            for user in USERS:
                insert_user(connection, user)
        yield name


@pytest.fixture
def connection(server: Server, database: str) -> Iterator[Connection]:
    with closing(admin_connection(server, database)) as opened:
        yield opened


class MemoryRecords:
    """Records that outlive the database, in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, object]] = {}
        self.is_down = False

    def put(self, path: str, record: dict[str, object]) -> None:
        if self.is_down:
            raise SourceDataError("the store is down")
        self.kept[path] = record

    def get_all(self, folder: str) -> dict[str, dict[str, object]]:
        return {path: record for path, record in self.kept.items() if path.startswith(f"{folder}/")}

    def delete(self, path: str) -> None:
        self.kept.pop(path, None)


@pytest.fixture
def records() -> MemoryRecords:
    return MemoryRecords()


@pytest.fixture
def checkpoints(server: Server, database: str, records: MemoryRecords) -> Checkpoints:
    return Checkpoints(lambda: admin_connection(server, database), records)


def break_midway(connection: Connection) -> None:
    """What a migration that dies in the middle leaves: changed, doubled and lost rows, and vectors off by a bit."""
    connection.execute(
        "update memharbor.memories set payload = payload || '{\"data\": \"broken\"}' where memory ~ '3$'"
    )
    connection.execute(
        "update memharbor.memories set embedding = (select array_agg(-v) from unnest(embedding::real[]) v)::public.vector"
        " where memory ~ '4$'"
    )
    connection.execute("delete from memharbor.memories where memory ~ '5$'")
    connection.execute('insert into memharbor.memories (payload) values (\'{"user_id": "dave", "data": "new"}\')')
    connection.execute("update memharbor.entities set payload = payload || '{\"x\": 1}'")
    connection.execute("update memharbor.categories set name = 'renamed' where name = 'work'")
    connection.execute(
        "insert into memharbor.migration_ledger (run_id, step, source) values (gen_random_uuid(), 'load', 'sqlite')"
    )


def test_what_a_broken_migration_did_is_taken_back_to_the_bit(connection: Connection, checkpoints: Checkpoints) -> None:
    before = fingerprints(connection)
    made = create_checkpoint(checkpoints, "before", Scope())
    break_midway(connection)
    assert fingerprints(connection) != before
    changes, point = put_rows_back(connection, made)
    assert fingerprints(connection) == before
    assert point is not None
    assert changes["memories"].added == 1
    assert changes["memories"].removed == 3 * 3
    assert connection.execute("select count(*) from memharbor.migration_ledger").fetchone() == (0,)
    assert {change.total for change in find_changes(connection, made).values()} == {0}


def test_a_difference_that_only_the_bits_show_is_found(connection: Connection, checkpoints: Checkpoints) -> None:
    zeros = "array_fill({}0.0::real, array[8])::public.vector"
    row = connection.execute(
        f"update memharbor.memories set embedding = {zeros.format('')}"
        " where id = (select id from memharbor.memories limit 1) returning id"
    ).fetchone()
    assert row is not None
    made = create_checkpoint(checkpoints, "zero", Scope(("memories",)))
    connection.execute(f"update memharbor.memories set embedding = {zeros.format('-')} where id = %s", row)
    # For PostgreSQL they are equal.
    assert connection.execute(f"select {zeros.format('')} = {zeros.format('-')}").fetchone() == (True,)
    assert find_changes(connection, made) == {"memories": Change(0, 1, 0)}
    assert find_changed_keys(connection, made) == [{"table": "memories", "change": "changed", "key": str(row[0])}]


def test_one_users_rows_go_back_and_nobody_elses_do(connection: Connection, checkpoints: Checkpoints) -> None:
    before = fingerprints(connection)
    made = create_checkpoint(checkpoints, "alice", Scope(user_id="alice"))
    connection.execute("delete from memharbor.memories where user_id in ('alice', 'bob') and memory ~ '[1-6]$'")
    others = {key: each for key, each in fingerprints(connection).items() if key[0] != user_digest("alice")}
    put_rows_back(connection, made)
    after = fingerprints(connection)
    assert {key: each for key, each in after.items() if key[0] != user_digest("alice")} == others
    assert {key: each for key, each in after.items() if key[0] == user_digest("alice")} == {
        key: each for key, each in before.items() if key[0] == user_digest("alice")
    }


def test_a_memory_that_became_somebody_elses_is_not_taken_from_them(
    connection: Connection, checkpoints: Checkpoints
) -> None:
    made = create_checkpoint(checkpoints, "alice", Scope(user_id="alice"))
    connection.execute(
        'update memharbor.memories set payload = payload || \'{"user_id": "bob"}\''
        " where id = (select id from memharbor.memories where user_id = 'alice' limit 1)"
    )
    before = fingerprints(connection)
    with pytest.raises(VerificationError, match="others have taken their keys"):
        put_rows_back(connection, made)
    assert fingerprints(connection) == before


def test_single_tables_are_refused_where_others_would_refer_to_nothing(
    connection: Connection, checkpoints: Checkpoints
) -> None:
    made = create_checkpoint(checkpoints, "few", Scope(("memories",)))
    insert_user(connection, "erin")
    before = fingerprints(connection)
    with pytest.raises(StateRefusedError, match=r"memory_(relationships|categories)`? would refer"):
        put_rows_back(connection, made)
    assert fingerprints(connection) == before


def test_a_tampered_copy_is_not_put_back(connection: Connection, checkpoints: Checkpoints) -> None:
    made = create_checkpoint(checkpoints, "tampered", Scope())
    copy = made.copies["memories"]
    connection.execute(f"update memharbor_checkpoint.{copy} set memory = 'forged' where memory = 'fact 7'".encode())
    before = fingerprints(connection)
    with pytest.raises(VerificationError, match="would not be what was recorded"):
        put_rows_back(connection, made)
    assert fingerprints(connection) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("alter table memharbor.memories add extra text", "column memharbor.memories.extra was added"),
        (
            "alter table memharbor.memories drop column categories cascade",
            "column memharbor.memories.categories is gone",
        ),
        ("drop table memharbor.org_members", "relation memharbor.org_members is gone"),
        ("drop policy isolate on memharbor.memories", "policy memharbor.memories.isolate is gone"),
        ("drop schema memharbor cascade", "schema memharbor is gone"),
    ],
)
def test_changed_definitions_are_no_matter_of_rows(
    connection: Connection, checkpoints: Checkpoints, change: str, said: str
) -> None:
    made = create_checkpoint(checkpoints, "whole", Scope())
    connection.execute(change.encode())
    with pytest.raises(StateRefusedError) as refused:
        plan_rollback(made, connection, None)
    assert said in refused.value.message


def test_rows_without_copies_come_out_of_a_restored_copy(
    server: Server, database: str, connection: Connection, checkpoints: Checkpoints
) -> None:
    before = fingerprints(connection)
    with scratch_database(server) as other, closing(admin_connection(server, "postgres")) as maker:
        made = create_checkpoint(checkpoints, "point-only", Scope(user_id="bob"), copy=False)
        assert not made.copies
        maker.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (database,))
        maker.execute(f"drop database {other}".encode())
        maker.execute(f"create database {other} template {database}".encode())
        with (
            closing(admin_connection(server, database)) as live,
            closing(admin_connection(server, other)) as restored,
        ):
            break_midway(live)
            fetched = fetch_copies(live, made, DatabaseRows(restored))
            fetched = fetch_copies(live, made, DatabaseRows(restored))  # as after a kill
            put_rows_back(live, fetched)
            drop_fetched(live, fetched)
            bob = {key: each for key, each in fingerprints(live).items() if key[0] == user_digest("bob")}
            assert bob == {key: each for key, each in before.items() if key[0] == user_digest("bob")}
            restored.execute("delete from memharbor.memories where user_id = 'bob'")
            with pytest.raises(VerificationError, match="not those of checkpoint"):
                fetch_copies(live, made, DatabaseRows(restored))


def test_an_erased_user_does_not_come_back(connection: Connection, checkpoints: Checkpoints) -> None:
    before = fingerprints(connection)
    made = create_checkpoint(checkpoints, "before", Scope())
    # Attached by somebody else to what will be erased.
    connection.execute(
        "insert into memharbor.memory_relationships (source_memory_id, target_memory_id, relationship_type)"
        " select id, id, 'of nobody' from memharbor.memories where user_id = 'bob' limit 1"
    )
    erasure = erase_user(connection, "bob", new_erasure("bob", reason="asked"))
    assert erasure.counts["checkpoints"] > 0
    insert_user(connection, "bob", memories=2)
    break_midway(connection)
    put_rows_back(connection, made)
    after = fingerprints(connection)
    assert not [key for key in after if key[0] == user_digest("bob")]
    assert after == {key: each for key, each in before.items() if key[0] != user_digest("bob")}


def test_the_state_that_is_named_is_the_state_that_is_copied_while_others_write(
    server: Server, database: str, connection: Connection, checkpoints: Checkpoints
) -> None:
    stop = threading.Event()
    longest = [0.0]

    def write() -> None:
        with closing(role_connection(server, database, "service")) as writer:
            number = 0
            while not stop.is_set():
                number += 1
                begun_at = time.monotonic()
                writer.execute(
                    "insert into public.memories (user_id, memory) values (%s, %s)",
                    (f"writer{number % 5}", f"m{number}"),
                )
                longest[0] = max(longest[0], time.monotonic() - begun_at)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = [create_checkpoint(checkpoints, f"busy{number}", Scope()) for number in range(3)]
    finally:
        stop.set()
        writer.join(timeout=30)
    assert longest[0] < 2.5
    for each in reversed(made):
        # Compares with the fingerprints that were taken in the same snapshot, and refuses where one differs.
        put_rows_back(connection, each)
    assert made[0].row_counts["memories"] <= made[-1].row_counts["memories"]


def test_an_open_transaction_that_wrote_makes_a_checkpoint_refuse_in_the_end(
    server: Server, database: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memharbor.backup.access.LOCK_TIMEOUT_MS", 50)
    with psycopg.connect(server.admin_dsn(database)) as holder:
        holder.execute("delete from memharbor.memories where memory = 'fact 7'")
        with pytest.raises(StateRefusedError, match="could not get its locks"):
            create_checkpoint(checkpoints, "never", Scope())
        holder.rollback()
    assert checkpoints.list() == []
    create_checkpoint(checkpoints, "never", Scope())


def test_a_checkpoint_is_listed_found_deleted_and_its_name_taken_once(
    connection: Connection, checkpoints: Checkpoints, records: MemoryRecords
) -> None:
    create_checkpoint(checkpoints, "one", Scope())
    two = create_checkpoint(checkpoints, "two", Scope(("memories", "memory_history"), "alice"))
    assert [each.name for each in checkpoints.list()] == ["one", "two"]
    assert checkpoints.get("last") == two
    assert "alice" not in str(records.kept)
    with pytest.raises(StateRefusedError, match="there is a checkpoint `one` already"):
        create_checkpoint(checkpoints, "one", Scope())
    with pytest.raises(StateRefusedError, match="no checkpoint `three`"):
        checkpoints.get("three")
    for name in ("one", "two"):
        checkpoints.delete(checkpoints.get(name))
    assert checkpoints.list() == []
    left = connection.execute(
        "select relname from pg_class where relnamespace = 'memharbor_checkpoint'::regnamespace and relkind = 'r'"
    ).fetchall()
    assert {name for (name,) in left} == {"checkpoints", "fingerprints"}


def test_copies_of_a_state_that_a_restore_took_back_are_not_believed(
    connection: Connection, checkpoints: Checkpoints
) -> None:
    made = create_checkpoint(checkpoints, "lost", Scope())
    connection.execute("drop schema memharbor_checkpoint cascade")
    create_checkpoint(checkpoints, "other", Scope())
    assert checkpoints.get("other").number == made.number
    found = checkpoints.get("lost")
    assert not found.copies
    with pytest.raises(StateRefusedError, match="does not know the checkpoint any more"):
        plan_rollback(found, connection, None)


def test_a_checkpoint_that_the_store_does_not_take_leaves_nothing(
    connection: Connection, checkpoints: Checkpoints, records: MemoryRecords
) -> None:
    records.is_down = True
    with pytest.raises(SourceDataError, match="the store is down"):
        create_checkpoint(checkpoints, "nowhere", Scope())
    assert checkpoints.list() == []
    row = connection.execute("select to_regclass('memharbor_checkpoint.c1_memories')").fetchone()
    assert row == (None,)


@pytest.mark.parametrize("tables", [("nothing",), ("erase_ledger",), ("schema_migrations",)])
def test_tables_that_are_not_memories_are_refused(checkpoints: Checkpoints, tables: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="cannot cover table"):
        create_checkpoint(checkpoints, "wrong", Scope(tables))


@pytest.mark.parametrize("role", ["app", "service", "readonly"])
def test_applications_cannot_look_into_checkpoints(
    server: Server, database: str, checkpoints: Checkpoints, role: str
) -> None:
    made = create_checkpoint(checkpoints, "private", Scope())
    with closing(role_connection(server, database, role)) as other:
        for table in (*made.copies.values(), "checkpoints", "fingerprints"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                other.execute(f"select from memharbor_checkpoint.{table}".encode())
