"""SQLite files as a source of a migration: each kind by its tables, bad rows one by one, files that are in use."""

from __future__ import annotations

import json
import shutil
import sqlite3
import struct
import tracemalloc
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest
from mem0.memory.storage import SQLiteManager

from memharbor.errors import ConnectError, SourceDataError
from memharbor.migrate.reasons import REASONS
from memharbor.migrate.record import RawItem, Refusal, item_as_data, item_from_data
from memharbor.migrate.sources import sqlite_rows
from memharbor.migrate.sources.sqlite import SqliteSource
from memharbor.migrate.sources.user_names import UsersFrom

Item = RawItem | Refusal

# As mem0-ts makes it.
VECTORS = "create table vectors (id text primary key, vector blob not null, payload text not null)"
TS_HISTORY = """create table memory_history (id integer primary key autoincrement, memory_id text not null,
  previous_value text, new_value text, action text not null, created_at text, updated_at text, is_deleted integer default 0)"""
# As ChatSG's migration has it, in SQLite's types.
CHATSG = """
create table mem0_memories (id text primary key, user_id integer not null, session_id text not null, memory text not null,
  embedding blob, metadata text default '{}', created_at text, updated_at text);
create table mem0_history (id integer primary key, memory_id text not null, user_id integer not null, action text not null,
  previous_content text, new_content text, metadata text default '{}', created_at text);
create table mem0_metadata (id integer primary key, collection_name text, user_id integer, total_memories integer);
"""
USERS = "create table users (id integer primary key, {columns})"
FLOATS = (1.0, -0.5, 1.401298464324817e-45, -0.0)
PACKED = struct.pack("<4f", *FLOATS)
UUID = "0d4f5a1e-6f0b-5d63-9a3e-8a8f6f0f7c11"


def make(path: Path, script: str, rows: Iterable[tuple[str, Sequence[Any]]] = ()) -> Path:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(script)
        for statement, values in rows:
            connection.execute(statement, values)
    return path


def point(point_id: Any, vector: Any, payload: Any) -> tuple[str, Sequence[Any]]:
    return "insert into vectors values (?, ?, ?)", (point_id, vector, payload)


def read(source: SqliteSource | Path, after: str | None = None) -> list[Item]:
    return list((SqliteSource(source) if isinstance(source, Path) else source).read(after))


def raw(item: Item) -> RawItem:
    return item.item if isinstance(item, Refusal) else item


def assert_resumes(source: SqliteSource | Path) -> None:
    whole = read(source)
    assert len({raw(each).position for each in whole}) == len(whole)
    for at, each in enumerate(whole, 1):
        assert read(source, raw(each).position) == whole[at:]


def test_points_of_the_typescript_sdk_are_read_bit_for_bit(tmp_path: Path) -> None:
    new = {"userId": "u", "data": "tea", "hash": "h", "createdAt": "2026-01-01T00:00:00.000Z", "textLemmatized": "tea"}
    old = {"user_id": "u", "data": "rain", "created_at": "2025-01-01T00:00:00+00:00", "id": "the payload's own"}
    path = make(tmp_path / "v.db", VECTORS, [point(UUID, PACKED, json.dumps(new)), point("b", b"", json.dumps(old))])
    first, second = read(path)
    assert first == RawItem("memory", UUID, new, "vectors 1", FLOATS)
    assert struct.pack("<4f", *raw(first).vector or ()) == PACKED
    assert second == RawItem("memory", "b", old, "vectors 2")
    info = SqliteSource(path).describe()
    assert (info.name, info.counts, info.dims, info.size_bytes) == (
        "sqlite-vectors",
        {"memory": 2},
        4,
        path.stat().st_size,
    )


def test_points_that_link_memories_are_entities(tmp_path: Path) -> None:
    payloads = [
        {"data": "Anna", "entityType": "PROPER", "linkedMemoryIds": ["a"], "user_id": "u"},
        {"data": "Anna", "entity_type": "PROPER", "linked_memory_ids": []},
        {"data": "tea", "entityType": "PROPER"},
    ]
    path = make(
        tmp_path / "v.db", VECTORS, [point(str(at), PACKED, json.dumps(each)) for at, each in enumerate(payloads)]
    )
    assert [raw(each).kind for each in read(path)] == ["entity", "entity", "memory"]


GOOD = json.dumps({"data": "x", "user_id": "u"})
BAD_POINTS = {
    "a vector cut off": (point("x", b"abc", GOOD), "wrong-dims"),
    "a vector that is a text": (point("x", "abc", GOOD), "bad-vector"),
    "a vector that is a number": (point("x", 7, GOOD), "bad-vector"),
    "no JSON": (point("x", PACKED, "{"), "bad-json"),
    "a list": (point("x", PACKED, "[]"), "bad-json"),
    "a number": (point("x", PACKED, 7), "bad-json"),
    "NaN": (point("x", PACKED, '{"a": NaN}'), "bad-number"),
    "NUL": (point("x", PACKED, '{"a": "\\u0000"}'), "bad-text"),
    "half a surrogate": (point("x", PACKED, '{"a": "\\ud800"}'), "bad-text"),
    "no UTF-8": (("insert into vectors values ('x', ?, cast(x'7b2261223a22ff227d' as text))", (PACKED,)), "bad-text"),
    "an id that is no UTF-8": (("insert into vectors values (cast(x'ff' as text), ?, ?)", (PACKED, GOOD)), "bad-text"),
}


@pytest.mark.parametrize("bad", BAD_POINTS)
def test_one_bad_point_is_refused_and_the_next_is_read(bad: str, tmp_path: Path) -> None:
    row, reason = BAD_POINTS[bad]
    path = make(tmp_path / "v.db", VECTORS, [point("a", PACKED, GOOD), row, point("b", PACKED, GOOD)])
    good, refused, other = read(path)
    assert [raw(good).source_id, raw(other).source_id] == ["a", "b"]
    assert isinstance(refused, Refusal)
    assert refused.reason == reason
    assert refused.reason in REASONS
    text = json.dumps(item_as_data(refused.item), allow_nan=False).encode()
    assert item_from_data(json.loads(text)) == refused.item
    assert_resumes(path)


def test_a_refused_point_keeps_its_bytes(tmp_path: Path) -> None:
    (refused,) = read(make(tmp_path / "v.db", VECTORS, [point("x", b"\xff\x00a", GOOD)]))
    assert raw(refused).data == {"id": "x", "vector": "ff0061", "payload": GOOD}


def test_an_embedding_that_is_a_list_in_a_text_is_read(tmp_path: Path) -> None:
    (found,) = read(make(tmp_path / "v.db", VECTORS, [point(None, "[1, -0.5]", GOOD)]))
    assert (raw(found).source_id, raw(found).vector) == ("vectors 1", (1.0, -0.5))


def test_mem0s_own_history_is_read(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    with closing(SQLiteManager(str(path))) as manager:
        manager.add_history(
            "m", None, "tea", "ADD", created_at="2026-01-01T00:00:00+00:00", actor_id="anna", role="user"
        )
        manager.add_history("m", "tea", None, "DELETE", is_deleted=1)
        manager.save_messages([{"role": "user", "content": "hello", "name": "anna"}], "user_id=u")
        rows = manager.get_history("m")
    added, deleted, message = map(raw, read(path))
    assert {added.kind, deleted.kind, message.kind} == {"history"}
    expected = next(row for row in rows if row["event"] == "ADD")
    assert added.data == {"table": "history", **expected, "is_deleted": 0}
    assert added.source_id == expected["id"]
    assert (deleted.data["event"], deleted.data["is_deleted"], deleted.data["new_memory"]) == ("DELETE", 1, None)
    created_at = message.data["created_at"]
    assert message.data == {
        "table": "messages",
        "id": message.source_id,
        "session_scope": "user_id=u",
        "role": "user",
        "content": "hello",
        "name": "anna",
        "created_at": created_at,
    }
    info = SqliteSource(path).describe()
    assert (info.name, info.counts, info.dims) == ("mem0-history", {"history": 3}, None)
    assert_resumes(path)


def test_the_typescript_sdks_history_is_read_also_beside_its_vectors(tmp_path: Path) -> None:
    changed = ("insert into memory_history (memory_id, new_value, action) values (?, 'tea', 'ADD')", (UUID,))
    alone = make(tmp_path / "memory.db", TS_HISTORY, [changed])
    (found,) = read(alone)
    assert raw(found).source_id == f"memory_history 1 of {UUID}"
    assert raw(found).data["table"] == "memory_history"
    assert SqliteSource(alone).describe().name == "mem0-history"
    both = make(tmp_path / "both.db", f"{VECTORS}; {TS_HISTORY}", [point("a", PACKED, GOOD), changed, changed])
    assert [raw(each).kind for each in read(both)] == ["memory", "history", "history"]
    assert SqliteSource(both).describe().counts == {"memory": 1, "history": 2}
    assert_resumes(both)


def chatsg(
    path: Path, users: str | None = "email text, name text", rows: Iterable[tuple[str, Sequence[Any]]] = ()
) -> Path:
    insert = "insert into mem0_memories values (?, ?, ?, ?, ?, ?, ?, ?)"
    script = CHATSG + (USERS.format(columns=users) if users else "")
    return make(
        path,
        script,
        [
            (insert, (UUID, 7, "s", "tea", PACKED, '{"topic": "drinks"}', "2026-01-01", None)),
            (insert, ("b", 8, "s", "rain", "[1, 2]", None, None, None)),
            ("insert into mem0_history values (5, ?, 7, 'created', null, 'tea', '{}', null)", (UUID,)),
            ("insert into mem0_metadata values (1, 'chatsg_memories', 7, 1)", ()),
            *rows,
        ],
    )


def test_chatsgs_tables_are_read_with_their_users_as_texts(tmp_path: Path) -> None:
    path = chatsg(tmp_path / "chat.db", users=None)
    first, second, change = map(raw, read(path))
    assert first.data == {
        "id": UUID,
        "user_id": "7",
        "session_id": "s",
        "memory": "tea",
        "metadata": {"topic": "drinks"},
        "created_at": "2026-01-01",
        "updated_at": None,
    }
    assert (first.kind, first.source_id, first.vector) == ("memory", UUID, FLOATS)
    assert (second.data["user_id"], second.data["metadata"], second.vector) == ("8", {}, (1.0, 2.0))
    assert (change.kind, change.source_id) == ("history", f"mem0_history 5 of {UUID}")
    assert (change.data["table"], change.data["user_id"], change.data["new_content"]) == ("mem0_history", "7", "tea")
    info = SqliteSource(path).describe()
    assert (info.name, info.counts, info.dims) == ("chatsg", {"memory": 2, "history": 1}, 4)
    assert_resumes(path)


@pytest.mark.parametrize(
    ("users_from", "columns", "expected"),
    [
        ("id", "name text, email text", ["7", "8", "7"]),
        ("username", "name text, email text", ["anna", "ben", "anna"]),
        ("username", "username text, name text", ["anna", "ben", "anna"]),
        ("email", "name text, email text", ["a@x", "b@x", "a@x"]),
    ],
)
def test_chatsgs_users_are_named_as_asked(
    users_from: UsersFrom, columns: str, expected: list[str], tmp_path: Path
) -> None:
    users = [("insert into users values (?, ?, ?)", row) for row in ((7, "anna", "a@x"), (8, "ben", "b@x"))]
    source = SqliteSource(chatsg(tmp_path / "chat.db", columns, users), users_from)
    assert [raw(each).data["user_id"] for each in read(source)] == expected
    assert_resumes(source)


def test_every_way_to_name_users_is_tested() -> None:
    assert set(get_args(UsersFrom)) == {"id", "username", "email"}


def test_users_whose_numbers_are_texts_are_found(tmp_path: Path) -> None:
    script = """
        create table mem0_memories (id text, user_id text, memory text);
        create table users (id integer primary key, email text);
        insert into users values (7, 'a@x');
        insert into mem0_memories values ('a', '7', 'tea'), ('b', null, 'rain');
    """
    found = read(SqliteSource(make(tmp_path / "chat.db", script), "email"))
    assert [raw(each).data["user_id"] for each in found] == ["a@x", None]


@pytest.mark.parametrize("name", [None, ""])
def test_a_user_without_a_name_is_not_mapped(name: str | None, tmp_path: Path) -> None:
    users = [("insert into users values (?, ?, ?)", row) for row in ((7, "a@x", "anna"), (8, name, None))]
    source = SqliteSource(chatsg(tmp_path / "chat.db", "email text, name text", users), "email")
    good, refused, change = read(source)
    assert raw(good).data["user_id"] == raw(change).data["user_id"] == "a@x"
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.item.data["user_id"]) == ("not-mapped", "users:8")
    assert "user `8` has no name in table `users`" in refused.detail
    assert_resumes(source)


def test_a_name_of_two_users_is_refused_since_one_would_see_the_others_memories(tmp_path: Path) -> None:
    users = [("insert into users values (?, ?, ?)", row) for row in ((7, "a@x", "anna"), (8, "b@x", "anna"))]
    path = chatsg(tmp_path / "chat.db", "email text, name text", users)
    for use in (SqliteSource(path, "username").describe, lambda: list(SqliteSource(path, "username").read())):
        with pytest.raises(SourceDataError, match="the same `name` twice"):
            use()
    assert [raw(each).data["user_id"] for each in read(SqliteSource(path, "email"))] == ["a@x", "b@x", "a@x"]


@pytest.mark.parametrize("users", [None, "name text"])
def test_users_cannot_be_named_by_a_column_that_is_not_there(users: str | None, tmp_path: Path) -> None:
    source = SqliteSource(chatsg(tmp_path / "chat.db", users), "email")
    for use in (source.describe, lambda: list(source.read())):
        with pytest.raises(SourceDataError, match="no table `users`") as error:
            use()
        assert error.value.hints == ("pass `--users-from id`",)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("memory", "cast(x'ff' as text)", "bad-text"),
        ("memory", "'a' || char(0)", "bad-text"),
        ("metadata", "'[]'", "bad-json"),
        ("metadata", "'{'", "bad-json"),
        ("embedding", "x'0102'", "wrong-dims"),
        ("embedding", "'[\"x\"]'", "bad-vector"),
        ("user_id", "9e999", "bad-number"),
    ],
)
def test_one_bad_row_of_chatsgs_is_refused(column: str, value: str, reason: str, tmp_path: Path) -> None:
    path = chatsg(
        tmp_path / "chat.db", None, [(f"update mem0_memories set {column} = {value} where id = '{UUID}'", ())]
    )
    refused, *good = read(path)
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.item.kind) == (reason, "memory")
    assert [raw(each).source_id for each in good] == ["b", f"mem0_history 5 of {UUID}"]
    text = json.dumps(item_as_data(refused.item), allow_nan=False)
    assert item_from_data(json.loads(text.encode())) == refused.item


@pytest.mark.parametrize(
    ("script", "said", "hint"),
    [
        ("", "none at all", "vector_store.db"),
        ("create table a (x); create table b (x)", "it has `a`, `b`", "vector_store.db"),
        ("create table vectors (x); create table history (id)", "it has `history`, `vectors`", "vector_store.db"),
        ("create table memories (x); create table users (x); create table apps (x)", "`memories`", "--from openmemory"),
    ],
)
def test_a_file_that_is_none_of_them_is_said_to_be_none(script: str, said: str, hint: str, tmp_path: Path) -> None:
    path = make(tmp_path / "x.db", script or "pragma user_version = 1")
    for use in (SqliteSource(path).describe, lambda: list(SqliteSource(path).read())):
        with pytest.raises(SourceDataError, match=said) as error:
            use()
        assert hint in error.value.hints[0]


@pytest.mark.parametrize("position", ["7", "vectors", "vectors x", "history 1", ""])
def test_a_position_of_another_source_is_refused(position: str, tmp_path: Path) -> None:
    with pytest.raises(SourceDataError, match="no position"):
        read(make(tmp_path / "v.db", VECTORS, [point("a", PACKED, GOOD)]), position)


def test_a_file_that_is_no_database_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"hello" * 1000)
    with pytest.raises(SourceDataError, match="cannot be read: file is not a database"):
        read(tmp_path / "x.db")
    with pytest.raises(SourceDataError, match="is no file"):
        read(tmp_path / "y.db")


def test_a_damaged_database_is_said_to_be_damaged(tmp_path: Path) -> None:
    rows = [point(str(number), PACKED, json.dumps({"data": "x" * 3000})) for number in range(500)]
    path = make(tmp_path / "v.db", VECTORS, rows)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xa5" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(SourceDataError, match="cannot be read"):
        read(path)


def test_rows_are_read_over_many_pages_with_gaps_and_below_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_rows, "PAGE_ROWS", 3)
    path = make(tmp_path / "v.db", VECTORS, [point(str(number), PACKED, GOOD) for number in range(10)])
    make(path, "delete from vectors where id in ('2', '3'); update vectors set rowid = -5 where id = '7'")
    assert [raw(each).source_id for each in read(path)] == ["7", "0", "1", "4", "5", "6", "8", "9"]
    assert_resumes(path)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_file_in_use_is_read_and_writers_do_not_wait(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_rows, "PAGE_ROWS", 2)
    path = make(tmp_path / "v.db", f"pragma journal_mode = {mode}; {VECTORS}")
    with closing(sqlite3.connect(path, timeout=0)) as writer:
        writer.executemany(point("", b"", "")[0], [(str(number), PACKED, GOOD) for number in range(5)])
        writer.commit()
        items = SqliteSource(path).read()
        found = [raw(next(items)).source_id]
        writer.execute("delete from vectors where id = '3'")
        writer.execute(*point("new", PACKED, GOOD))
        writer.commit()
        found += [raw(each).source_id for each in items]
    assert found == ["0", "1", "2", "4", "new"]


def test_what_is_only_in_the_write_ahead_log_is_read(tmp_path: Path) -> None:
    path = make(tmp_path / "v.db", f"pragma journal_mode = wal; {VECTORS}")
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("pragma wal_autocheckpoint = 0")
        writer.execute(*point("a", PACKED, GOOD))
        writer.commit()
        assert b"user_id" not in path.read_bytes()
        before = SqliteSource(path).describe()
        assert [raw(each).source_id for each in read(path)] == ["a"]
        writer.execute("pragma wal_checkpoint(truncate)")
        assert b"user_id" in path.read_bytes()
        assert SqliteSource(path).describe().identity == before.identity


def test_a_locked_file_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_rows, "_BUSY_SECONDS", 0)
    path = make(tmp_path / "v.db", VECTORS, [point("a", PACKED, GOOD)])
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        with pytest.raises(ConnectError, match="locked"):
            read(path)
        writer.execute("rollback")
    assert len(read(path)) == 1


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = chatsg(tmp_path / "chat.db", None)
    before = (path.read_bytes(), sorted(each.name for each in tmp_path.iterdir()))
    SqliteSource(path).describe()
    read(path)
    assert (path.read_bytes(), sorted(each.name for each in tmp_path.iterdir())) == before


def test_the_identity_is_of_the_rows_and_not_of_the_path(tmp_path: Path) -> None:
    rows = [point("a", PACKED, GOOD), point("b", PACKED, GOOD)]
    path = make(tmp_path / "v.db", VECTORS, rows)
    first = SqliteSource(path).describe()
    (tmp_path / "other").mkdir()
    copy = Path(shutil.copy(path, tmp_path / "other" / "copy.db"))
    assert SqliteSource(copy).describe() == first
    identities = {first.identity}
    for change in (
        "update vectors set vector = x'0000803f000000bf0100000000000000' where id = 'a'",
        "update vectors set payload = payload || ' ' where id = 'a'",
        "update vectors set id = 'c' where id = 'a'",
        "update vectors set rowid = 9 where id = 'b'",
        "delete from vectors where id = 'b'",
        "create table history (id, memory_id, old_memory, new_memory, event)",
    ):
        make(path, change)
        identities.add(SqliteSource(path).describe().identity)
    assert len(identities) == 7
    make(copy, "pragma user_version = 3")
    assert SqliteSource(copy).describe().identity == first.identity


def test_whose_memories_they_become_is_part_of_the_identity(tmp_path: Path) -> None:
    users = [("insert into users values (?, ?, ?)", row) for row in ((7, "a@x", "anna"), (8, "b@x", "ben"))]
    path = chatsg(tmp_path / "chat.db", "email text, name text", users)
    ways: list[UsersFrom] = ["id", "username", "email"]
    assert len({SqliteSource(path, way).describe().identity for way in ways}) == 3


def test_memory_stays_flat(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.db"
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(VECTORS)
            rows = ((str(number), PACKED * 16, GOOD) for number in range(count))
            connection.executemany("insert into vectors values (?, ?, ?)", rows)
        tracemalloc.start()
        try:
            assert SqliteSource(path).describe().counts == {"memory": count}
            assert sum(1 for _ in SqliteSource(path).read()) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Chunks and what Python keeps for itself; the items alone would be several times as much.
    assert peak(20_000) - peak(2_000) < 1_000_000
