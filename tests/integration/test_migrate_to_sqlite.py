"""Memories taken out to ChatSG's tables and brought in again, as a person types it, on real databases."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.command_line import memharbor, ok, refused
from tests.integration.test_migrate_commands import rows_of
from tests.integration.test_migrate_sources import identity, payload, spell, vector
from tests.memory_database import Server
from tests.schema_databases import scratch_database
from tests.user_rows import HOSTILE_USERS

EXPORT = ("migrate", "export", "--to", "sqlite", "--output-file")
RUN = ("migrate", "run", "--from", "sqlite", "--no-checkpoint", "--keep-duplicates", "--input")
NAMED = ("--users-from", "username")
USERS = ("alice", "12", *HOSTILE_USERS)
# Everything that is of a change, but for its number; in order for each memory.
HISTORY = """select memory_id, user_id, operation, old_value, actor, changed_at from memharbor.memory_history
  order by memory_id, id"""


@pytest.fixture
def dsn(dsn: str) -> str:
    """One with memories of several users, in each state, with what changed of them."""
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        fill(connection)
    return dsn


def fill(connection: psycopg.Connection[Any]) -> None:
    for n in range(36):
        text = ("likes 日本茶 🐘", 'it\'s "quoted"\n', f"fact {n}")[n % 3]
        own = {"topic": "naïve", "deep": {"list": [1, None, 0.1, "ü"]}, "memory": "x", "memharbor": {"state": "x"}}
        data = {**payload(n), "data": text, "user_id": USERS[n % len(USERS)], **(own if n % 2 else {})}
        data |= {"run_id": f"session {n % 2}"} if n % 4 else {}
        data |= {"agent_id": "helper", "categories": ["a", "ü"]} if n % 5 == 0 else {}
        data |= {"hash": f"hash {n}", "text_lemmatized": text.lower() if n % 2 else "likes tea"}
        connection.execute(
            "insert into memharbor.memories (id, embedding, payload) values (%s, %s, %s)",
            (identity(n), None if n % 7 == 3 else spell(vector(n)), json.dumps(data)),
        )
    data = {**payload(30), "agent_id": "helper", "hash": "h", "text_lemmatized": "l"}
    del data["user_id"]
    connection.execute("insert into memharbor.memories (id, payload) values (%s, %s)", (identity(90), json.dumps(data)))
    texts = 'update memharbor.memories set payload = payload || \'{"data": "changed"}\' where id = any (%s)'
    connection.execute(texts, ([identity(n) for n in range(0, 12, 2)],))
    for n, state in enumerate(("paused", "archived", "deleted", "deleted")):
        connection.execute("update memharbor.memories set state = %s where id = %s", (state, identity(20 + n)))
    expiry = "update memharbor.memories set expires_at = %s where id = %s"
    connection.execute(expiry, ("2020-01-01T00:00:00.123456Z", identity(24)))
    connection.execute(expiry, ("2150-01-01T00:00:00.123456Z", identity(25)))
    connection.execute("delete from memharbor.memories where id = %s", (identity(26),))


def memories_of(dsn: str) -> Any:
    return {key: value for key, value in rows_of(dsn).items() if key[1] == "memories"}


def history_of(dsn: str) -> list[Any]:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        return connection.execute(HISTORY.encode()).fetchall()


def in_file(path: str, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_what_is_taken_out_comes_in_again_to_the_bit(dsn: str, server: Server) -> None:
    report = ok(dsn, *EXPORT, "chatsg.db")
    assert report["beside"] == {"archived": 1, "deleted": 2, "expired": 1, "paused": 1, "without a user": 1}
    history = history_of(dsn)
    assert (report["memories"], report["users"], report["changes"], report["expiring"]) == (36, 6, len(history), 1)
    assert len(history) == 37 + 6 + 4 + 1
    assert in_file("chatsg.db", "select count(*) from mem0_memories") == [(30,)]
    assert in_file("chatsg.db", "select sum(total_memories), count(*) from mem0_metadata") == [(30, 6)]
    assert in_file("chatsg.db", "pragma foreign_key_check") == []
    with scratch_database(server) as name:
        other = server.admin_dsn(name)
        done = ok(other, *RUN, "chatsg.db", *NAMED)
        assert (done["inserted"], done["refused"]) == (36 + len(history), 0)
        assert memories_of(other) == memories_of(dsn)
        loaded = history_of(other)
        assert [row for row in loaded if row in history] == history
        assert {row[2] for row in loaded if row not in history} == {"create"}
    before = rows_of(dsn)
    again = ok(dsn, *RUN, "chatsg.db", *NAMED)
    assert (again["same"], again["read"]) == (36 + len(history), 36 + len(history))
    assert (rows_of(dsn), history_of(dsn)) == (before, history)


def test_only_some_users_are_taken_out(dsn: str) -> None:
    report = ok(dsn, *EXPORT, "some.db", "--users", "alice,12,nobody")
    assert report["users"] == 2
    assert in_file("some.db", "select id, name from users") == [(12, "12"), (13, "alice")]
    users = {row[1] for row in history_of(dsn)} - {"alice", "12", None}
    assert len(users) == len(HOSTILE_USERS)
    for table in ("mem0_memories", "memharbor_memories", "mem0_history", "memharbor_history"):
        assert in_file("some.db", f"select count(*) from {table} where user_id not in (12, 13) or user_id is null") == [
            (0,)
        ]
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        count = "select count(*) from memharbor.{} where user_id in ('alice', '12')"
        assert connection.execute(count.format("memories").encode()).fetchone() == (report["memories"],)
        assert connection.execute(count.format("memory_history").encode()).fetchone() == (report["changes"],)


def test_a_file_numbers_the_users_there_and_names_them_on_the_way_back(dsn: str, server: Server) -> None:
    numbers = {str(100 + place): user for place, user in enumerate(USERS)}
    Path("users.json").write_text(json.dumps(numbers))
    ok(dsn, *EXPORT, "chatsg.db", "--map-users", "users.json")
    assert dict(in_file("chatsg.db", "select cast(id as text), name from users")) == numbers
    with scratch_database(server) as name:
        other = server.admin_dsn(name)
        ok(other, *RUN, "chatsg.db", "--remap-users", "users.json")
        assert memories_of(other) == memories_of(dsn)


def test_a_user_without_a_number_is_refused_before_anything_is_written(dsn: str) -> None:
    Path("users.csv").write_text("1,alice\n2,12\n")
    for dry in ((), ("--dry-run",)):
        refused(7, "has no number in the file", dsn, *EXPORT, "chatsg.db", "--map-users", "users.csv", *dry)
    assert not list(Path().glob("*chatsg.db*"))
    ok(dsn, *EXPORT, "chatsg.db", "--map-users", "users.csv", "--users", "alice,12")


def test_a_dry_run_writes_nothing_and_refuses_what_the_run_would(dsn: str) -> None:
    assert ok(dsn, *EXPORT, "chatsg.db", "--dry-run") == {"dry_run": True, "memories": 36, "users": 6}
    assert list(Path().iterdir()) == []
    refused(2, "no file is named", dsn, "migrate", "export", "--to", "sqlite", "--dry-run")
    Path("chatsg.db").write_text("mine")
    for dry in ((), ("--dry-run",)):
        refused(9, "is there already", dsn, *EXPORT, "chatsg.db", *dry)
    assert Path("chatsg.db").read_text() == "mine"
    ok(dsn, *EXPORT, "chatsg.db", "--replace")
    assert in_file("chatsg.db", "select count(*) from users") == [(6,)]


def test_a_person_reads_what_is_where_and_how_it_comes_back(dsn: str) -> None:
    said = memharbor(dsn, *EXPORT, "chat sg.db").stdout
    assert "36 memories of 6 users and 48 changes in chat sg.db" in said
    assert "1 archived, 2 deleted, 1 expired, 1 paused, 1 without a user" in said
    assert "--input 'chat sg.db' --users-from username" in said


def test_a_memory_that_does_not_say_when_it_was_made_keeps_the_instant_of_its_row(dsn: str, server: Server) -> None:
    query = "select created_at from memharbor.memories where id = any (%s) order by id"
    odd = [identity(200), identity(201)]
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        for row, data in zip(odd, ({}, {"created_at": "yesterday"}), strict=True):
            body = json.dumps({"data": "x", "user_id": "odd", **data})
            connection.execute("insert into memharbor.memories (id, payload) values (%s, %s)", (row, body))
        times = connection.execute(query, (odd,)).fetchall()
    ok(dsn, *EXPORT, "chatsg.db", "--users", "odd")
    with scratch_database(server) as name:
        ok(server.admin_dsn(name), *RUN, "chatsg.db", *NAMED)
        with closing(psycopg.connect(server.admin_dsn(name), autocommit=True)) as connection:
            assert connection.execute(query, (odd,)).fetchall() == times


def test_an_administrator_who_is_no_superuser_takes_everything_out(dsn: str) -> None:
    with closing(psycopg.connect(dsn, autocommit=True)) as admin:
        admin.execute("create role sqlite_test_admin login password 'managed'")  # pragma: allowlist secret
        admin.execute("grant memharbor_owner, memharbor_service to sqlite_test_admin with inherit false, set true")
        managed = make_conninfo(dsn, user="sqlite_test_admin", password="managed")  # pragma: allowlist secret
        try:
            report = ok(managed, *EXPORT, "chatsg.db")
        finally:
            admin.execute("drop owned by sqlite_test_admin cascade")
            admin.execute("drop role sqlite_test_admin")
    assert (report["memories"], report["changes"]) == (36, 48)
