"""Erasing a user on a real PostgreSQL: everywhere in the database, in its files, again after a restore, certified."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from memharbor import schema
from memharbor.backup.certificate import Signer
from memharbor.backup.checkpoint import Checkpoints, Scope
from memharbor.backup.checkpoint_creation import create_checkpoint
from memharbor.backup.erase_user import FolderRecords, Place, erase, pending, replay
from memharbor.backup.erasure import count_rows, find_erasure, new_erasure, replay_erasures, user_digest
from memharbor.backup.rows import DatabaseRows
from memharbor.backup.traces import find_traces
from memharbor.database import Connection, connect
from memharbor.errors import ExternalToolError, StateRefusedError, UsageError
from memharbor.output import Output
from memharbor.schema.tenants import index_name
from memharbor.stack.certificates import create_authority, create_leaf
from tests.integration.memory_rows import fingerprints, insert_user
from tests.memory_database import Server
from tests.schema_databases import admin_connection, drop_database, scratch_database, settings_for

# Nobody else's, and found however it is stored: in a text, a JSON, an array, a lexeme.
USER, WORD = "canary-user-4711", "canarytext"


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    with scratch_database(server) as name:
        with closing(admin_connection(server, name)) as connection:
            for user in ("alice", "bob"):
                insert_user(connection, user)
            insert_user(connection, USER, word=WORD, memories=200)
            insert_user(connection, "zoe")
        yield name


@pytest.fixture
def connection(server: Server, database: str) -> Iterator[Connection]:
    with closing(admin_connection(server, database)) as opened:
        yield opened


@pytest.fixture
def place(connection: Connection, database: str, tmp_path: Path) -> Place:
    authority = create_authority("test")
    (tmp_path / "ca.crt").write_text(authority.certificate)
    leaf = create_leaf(authority, ["erasures.test"])
    signer = Signer(leaf.certificate, leaf.key)
    return Place(connection, FolderRecords(tmp_path / "records"), tmp_path / "certificates", signer, database, "test")


def erased(place: Place, *, rewrite: bool = False) -> dict[str, object]:
    return erase(place, USER, Output("json"), reason="request 1", rewrite=rewrite).as_data()


def places_of(connection: Connection, word: str) -> list[str]:
    """Name every table, view and statistic of the database that says a word."""
    found = []
    relations = connection.execute(
        """
        select c.oid::regclass::text from pg_class c
        where c.relkind in ('r', 'v', 'm', 't') and c.relnamespace <> 'information_schema'::regnamespace
          -- This very session, which says the word itself.
          and c.relname not in (
            'pg_stat_activity', 'pg_prepared_statements', 'pg_cursors', 'pg_backend_memory_contexts')
        """
    ).fetchall()
    for (name,) in relations:
        try:
            row = connection.execute(f"select count(*) from {name} t where t::text ~ %s".encode(), (word,)).fetchone()
        except psycopg.Error:
            continue  # a view that only replicas have
        if row and row[0]:
            found.append(str(name))
    return found


def files_of(server: Server, connection: Connection, word: str) -> list[str]:
    """Name every file of the server, but its WAL, that holds a word."""
    connection.execute("checkpoint")
    script = f"cd $PGDATA && grep -rlaF '{word}' . --exclude-dir=pg_wal || true"
    code, said = server.execute("postgres", ["sh", "-c", script])
    assert code == 0, said
    return said.split()


def test_nothing_of_the_user_is_left_in_any_table_and_in_any_file(
    server: Server, connection: Connection, place: Place
) -> None:
    name = index_name(USER)
    connection.execute(
        f"create index {name} on memharbor.memories using hnsw (embedding public.vector_cosine_ops)"
        f" where (payload ->> 'user_id') = '{USER}'".encode()
    )
    connection.execute(f"comment on index memharbor.{name} is '{USER}'".encode())
    connection.execute("analyze")
    checkpoints = Checkpoints(lambda: connect(place_dsn(server, place), autocommit=True), None)
    create_checkpoint(checkpoints, "before", Scope())
    before = fingerprints(connection)
    for word in (USER, WORD):
        # The test can see what it looks for.
        assert {"memharbor.memories", "memharbor_checkpoint.c1_memories"} <= set(places_of(connection, word))
        assert files_of(server, connection, word)
    assert find_traces(connection, USER)

    report = erased(place, rewrite=True)

    for word in (USER, WORD):
        assert places_of(connection, word) == []
        assert files_of(server, connection, word) == []
    assert places_of(connection, name) == []
    counts = {table: each.rows for (user, table), each in before.items() if user == user_digest(USER)}
    assert {**report["counts"], "checkpoints": None} == {**counts, "checkpoints": None}  # type: ignore[dict-item]
    assert report["counts"]["checkpoints"] == sum(counts.values())  # type: ignore[index]
    assert fingerprints(connection) == {key: each for key, each in before.items() if key[0] != user_digest(USER)}


def place_dsn(server: Server, place: Place) -> str:
    return server.admin_dsn(place.database)


def test_the_statistics_of_a_table_that_became_empty_are_forgotten_too(connection: Connection, place: Place) -> None:
    connection.execute("delete from memharbor.memories where user_id <> %s", (USER,))
    connection.execute("delete from memharbor.org_members where user_id <> %s", (USER,))
    connection.execute("analyze")
    assert any("memories" in trace for trace in find_traces(connection, USER))
    erased(place)
    for word in (USER, WORD):
        assert places_of(connection, word) == []


def test_erasing_twice_says_so_and_counts_nothing(connection: Connection, place: Place) -> None:
    first, second = erased(place), erased(place)
    assert first["already_erased"] is False
    assert (second["already_erased"], second["erased_now"], second["id"]) == (True, {}, first["id"])
    assert connection.execute("select count(*) from memharbor.erase_ledger").fetchone() == (1,)
    insert_user(connection, USER, memories=1)
    third = erased(place)
    assert third["id"] != first["id"]
    assert count_rows(connection, USER) == {}


def test_the_record_is_there_before_a_row_is_touched(
    connection: Connection, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        def __init__(self, fail_at: int) -> None:
            self.left = fail_at

        def put(self, path: str, record: dict[str, object]) -> None:
            self.left -= 1
            if not self.left:
                raise ExternalToolError("killed here")
            place.records.put(path, record)

        def get_all(self, folder: str) -> dict[str, dict[str, object]]:
            return place.records.get_all(folder)

    before = fingerprints(connection)
    dying = Place(connection, Dying(1), place.folder, place.signer, place.database, "test")
    with pytest.raises(ExternalToolError):
        erased(dying)
    assert fingerprints(connection) == before
    assert place.records.get_all("erasures") == {}

    dying = Place(connection, Dying(2), place.folder, place.signer, place.database, "test")
    with pytest.raises(ExternalToolError):
        erased(dying)
    assert count_rows(connection, USER) == {}
    (record,) = place.records.get_all("erasures").values()
    assert record["state"] == "requested"

    # The same command goes on: the same record, the same row, a certificate.
    report = erased(place)
    assert report["id"] == record["id"]
    assert place.records.get_all("erasures")[f"erasures/{record['id']}.json"]["state"] == "erased"
    assert Path(str(report["certificate"])).is_file()


def test_a_restored_database_erases_again_before_it_opens(
    server: Server, database: str, connection: Connection, place: Place
) -> None:
    """A copy of the database stands for what a restore brings back."""
    with scratch_database(server, rolled_out=False) as restored:
        copy_database(server, database, restored)
        with closing(admin_connection(server, database)) as live:
            report = erase(
                Place(live, place.records, place.folder, None, database, "test"), USER, Output("json"), reason="r"
            )
            others = fingerprints(live)
        with closing(admin_connection(server, restored)) as back:
            assert count_rows(back, USER)
            assert replay_erasures(place.records, DatabaseRows(back))[0]["id"] == report.erasure.id
            assert count_rows(back, USER) == {}
            assert fingerprints(back) == others
            # Who comes back after that stays, and a later restore does not take them again.
            insert_user(back, USER, memories=3)
            came_back = fingerprints(back)
            assert replay_erasures(place.records, DatabaseRows(back)) == []
            assert fingerprints(back) == came_back


def copy_database(server: Server, source: str, target: str) -> None:
    drop_database(server, target)
    with closing(admin_connection(server)) as maker:
        maker.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (source,))
        maker.execute(f"create database {target} template {source}".encode())


def test_many_erasures_are_replayed_and_a_database_without_a_schema_has_nobody(
    server: Server, connection: Connection
) -> None:
    for number in range(250):
        insert_quickly(connection, f"user{number}")
    records = [
        new_erasure(f"user{number}", reason=f"o'brien \\ $erase$; {{{{ 7 }}}} {number}").as_record()
        for number in range(250)
    ]
    assert len(replay_erasures(records, DatabaseRows(connection))) == 250
    left = connection.execute("select count(*) from memharbor.memories where user_id ~ '^user'").fetchone()
    assert left == (0,)
    with scratch_database(server, rolled_out=False) as empty, closing(admin_connection(server, empty)) as other:
        assert replay_erasures(records, DatabaseRows(other)) == []


def insert_quickly(connection: Connection, user: str) -> None:
    connection.execute(
        "insert into memharbor.memories (payload) values (jsonb_build_object('user_id', %s::text, 'data', 'x'))",
        (user,),
    )


@pytest.mark.parametrize("user", ["o'brien", 'a"b\\c', "{{ 7 }} %s", "ünï🐘\n", "x" * 500])
def test_any_id_is_erased(connection: Connection, place: Place, user: str) -> None:
    insert_user(connection, user, memories=3)
    before = fingerprints(connection)
    erase(place, user, Output("json"), reason="request 2")
    assert fingerprints(connection) == {key: each for key, each in before.items() if key[0] != user_digest(user)}
    kept = json.dumps(list(place.records.get_all("erasures").values()), ensure_ascii=False)
    assert user not in kept
    found = find_erasure(place.records, user)
    assert found is not None
    assert found["erased_at"]


def test_a_writer_waits_and_nothing_of_before_is_left(server: Server, database: str, place: Place) -> None:
    with psycopg.connect(server.admin_dsn(database)) as writer:
        writer.execute("update memharbor.memories set state = 'paused' where user_id = 'alice'")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("memharbor.backup.access.LOCK_TIMEOUT_MS", 50)
            with pytest.raises(StateRefusedError, match="could not get its locks"):
                erased(place)
        writer.rollback()
    assert erased(place)["already_erased"] is False


def test_the_reason_cannot_hold_the_id(place: Place) -> None:
    with pytest.raises(UsageError, match="holds the user's id"):
        erase(place, USER, Output("json"), reason=f"{USER.upper()} asked us")
    assert place.records.get_all("erasures") == {}


def test_the_certificate_is_what_openssl_verifies_and_a_changed_one_is_not(place: Place, tmp_path: Path) -> None:
    report = erased(place)
    certificate, signature = Path(str(report["certificate"])), Path(str(report["signature"]))
    assert USER not in certificate.read_text()
    assert json.loads(certificate.read_text())["counts"] == report["counts"]

    def verify(content: Path) -> int:
        command = ["openssl", "smime", "-verify", "-binary", "-purpose", "any", "-no_check_time", "-inform", "PEM"]
        files = ["-in", str(signature), "-content", str(content), "-CAfile", str(tmp_path / "ca.crt")]
        return subprocess.run([*command, *files], capture_output=True, check=False).returncode

    assert verify(certificate) == 0
    forged = tmp_path / "forged.json"
    forged.write_text(certificate.read_text().replace('"memories": 200', '"memories": 2'))
    assert forged.read_text() != certificate.read_text()
    assert verify(forged) != 0
    (tmp_path / "ca.crt").write_text(create_authority("other").certificate)
    assert verify(certificate) != 0


def test_an_administrator_who_is_no_superuser_erases_too(server: Server, tmp_path: Path) -> None:
    """As on a managed service: row level security binds the administrator, and triggers cannot be left out."""
    role, name = "erase_admin", "erase_managed"
    settings = settings_for(name)
    with scratch_database(server), closing(admin_connection(server)) as admin:
        admin.execute(f"create role {role} login createrole createdb password 'managed'".encode())
        admin.execute(
            f"grant {', '.join(schema.ROLES.values())} to {role} with admin option, inherit false, set false".encode()
        )
        managed = make_conninfo(server.admin_dsn(), user=role, password="managed")  # pragma: allowlist secret
        try:
            schema.apply_roles(lambda database: connect(managed, dbname=database), settings, server.passwords)
            with closing(connect(managed, autocommit=True)) as connection:
                schema.ensure_database(connection, settings)
            with closing(admin_connection(server, name)) as connection:
                connection.execute("create extension vector")
            with closing(connect(managed, dbname=name, autocommit=True)) as connection:
                schema.apply(connection, settings)
            with closing(admin_connection(server, name)) as connection:
                insert_user(connection, USER, word=WORD)
                insert_user(connection, "alice")
                before = fingerprints(connection)
            with closing(connect(managed, dbname=name, autocommit=True)) as connection:
                place = Place(connection, FolderRecords(tmp_path), tmp_path, None, name, None)
                counted = count_rows(connection, USER)
                assert pending(place) == []
                report = erase(place, USER, Output("json"), reason="request 3")
                assert report.erasure.counts == counted
                assert schema.verify(connection, settings) == []
                assert replay(place) == []
            with closing(admin_connection(server, name)) as connection:
                after = {key: each for key, each in before.items() if key[0] != user_digest(USER)}
                assert fingerprints(connection) == after
                # The provider restores to before it: the ledger is gone with it, the folder is not.
                connection.execute("delete from memharbor.erase_ledger")
                insert_user(connection, USER, word=WORD)
            with closing(connect(managed, dbname=name, autocommit=True)) as connection:
                place = Place(connection, FolderRecords(tmp_path), tmp_path, None, name, None)
                assert len(pending(place)) == 1
                assert [record["id"] for record in replay(place)] == [report.erasure.id]
                assert count_rows(connection, USER) == {}
        finally:
            drop_database(server, name)
            admin.execute(f"drop owned by {role} cascade".encode())
            admin.execute(f"drop role {role}".encode())
            schema.apply_roles(
                lambda database: admin_connection(server, database), settings_for("postgres"), server.passwords
            )
