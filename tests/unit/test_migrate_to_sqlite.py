"""A SQLite file with ChatSG's tables: what is in it, what comes back of it, and that there is never half of one."""

from __future__ import annotations

import hashlib
import json
import resource
import sqlite3
import struct
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.errors import MemharborError, SourceDataError, StateRefusedError, UsageError
from memharbor.migrate.reading import Change
from memharbor.migrate.record import RawItem, Record
from memharbor.migrate.sources.sqlite import SqliteSource
from memharbor.migrate.targets.sqlite import number_users, unwrap, wrap, write_sqlite
from memharbor.migrate.transform import Choice, transform
from memharbor.migrate.vector import Vector

AT = "2025-01-15T02:00:00.123456-08:00"
MOMENT = datetime(2025, 2, 1, 3, 4, 5, 678_901, UTC)
FLOATS = struct.unpack("<3f", struct.pack("<3f", 0.1, -0.0, 1.401298464324817e-45))


def identity(number: int) -> uuid.UUID:
    return uuid.UUID(int=number + 1)


def memory(number: int, user: str | None = "alice", **changes: Any) -> Record:
    text = changes.pop("data", f"fact {number}")
    data = {
        "data": text,
        "hash": hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(),
        "text_lemmatized": text.lower(),
        "created_at": AT,
        "updated_at": AT,
    }
    data |= {"user_id": user} if user is not None else {}
    data |= changes.pop("payload", {})
    return Record("memory", identity(number), str(identity(number)), data, **changes)


def change(number: int, memory_number: int, operation: str = "create", **changes: Any) -> Change:
    values: dict[str, Any] = {"user_id": "alice", "old_value": None, "new_text": "after", "actor": "anna", **changes}
    return Change(number, identity(memory_number), operation=operation, changed_at=MOMENT, **values)


def users_of(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.user_id for record in records if record.user_id is not None))


def write(
    path: Path, memories: Sequence[Record] = (), changes: Sequence[Change] = (), **options: Any
) -> dict[str, Any]:
    users = options.pop("users", users_of(memories))
    return write_sqlite(users, iter(memories), iter(changes), path, **options)


def come_back(path: Path) -> list[Record]:
    found = []
    for item in SqliteSource(path, "username").read():
        assert isinstance(item, RawItem), item
        record = transform(item, "chatsg", Choice())
        assert isinstance(record, Record), record
        found.append(record)
    return found


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


# Metadata of a caller's own, with the names that the way back gives a meaning to.
HOSTILE = {
    "memory": "not the text",
    "content": 1,
    "text": None,
    "id": "mine",
    "session_id": "mine",
    "userId": "mine",
    "metadata": {"metadata": {"data": 1}},
    "memharbor": {"state": "deleted", "metadata": 7},
    "state": "deleted",
    "score": 0.1,
    "embedding": [1],
    "replaced_by": "x",
    "expires_at": "never",
    "categories": ["a", "b"],
}
MEMORIES = {
    "plain": (memory(0), "mem0_memories"),
    "with an embedding": (memory(0, embedding=Vector.of(FLOATS)), "mem0_memories"),
    "of a session and an agent": (memory(0, payload={"run_id": "s", "agent_id": "a"}), "mem0_memories"),
    "in other words than Mem0 makes of it": (memory(0, payload={"hash": "h", "text_lemmatized": "l"}), "mem0_memories"),
    "in many scripts": (memory(0, "naïve 日本 🐘\t\n'\"--", data="日本語 🐘 \u202e ‮"), "mem0_memories"),
    "with metadata that look like ours": (memory(0, payload=HOSTILE), "mem0_memories"),
    "never updated": (memory(0, payload={"updated_at": None}), "mem0_memories"),
    "that expires one day": (memory(0, lifecycle={"expires_at": MOMENT.replace(year=2150)}), "mem0_memories"),
    "expired": (memory(0, lifecycle={"expires_at": MOMENT}), "memharbor_memories"),
    "paused": (memory(0, state="paused"), "memharbor_memories"),
    "archived": (memory(0, state="archived", lifecycle={"archived_at": MOMENT}), "memharbor_memories"),
    "deleted": (
        memory(0, state="deleted", lifecycle={"archived_at": MOMENT, "deleted_at": MOMENT}, payload=HOSTILE),
        "memharbor_memories",
    ),
    "of an agent only": (memory(0, None, payload={"agent_id": "helper"}), "memharbor_memories"),
}


def as_stored(record: Record) -> Record:
    data = {name: value for name, value in record.data.items() if name != "updated_at" or value is not None}
    return Record("memory", record.id, record.source_id, data, record.embedding, record.state, record.lifecycle)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    record, table = MEMORIES[name]
    write(tmp_path / "c.db", [record])
    (found,) = come_back(tmp_path / "c.db")
    assert found == as_stored(record)
    if record.embedding is not None:
        assert found.embedding is not None
        assert struct.pack("<3f", *found.embedding) == struct.pack("<3f", *FLOATS)
    assert rows(tmp_path / "c.db", f"select id from {table}") == [(str(identity(0)),)]


def test_chatsg_finds_its_columns(tmp_path: Path) -> None:
    """As `002_create_mem0_tables.sql` has them: their names in order, and which must not be empty."""
    write(tmp_path / "c.db")
    columns = {
        "mem0_memories": "*id *user_id *session_id *memory embedding metadata created_at updated_at",
        "mem0_history": "id *memory_id *user_id *action previous_content new_content metadata created_at",
        "mem0_metadata": "id *collection_name *user_id total_memories last_memory_at metadata created_at updated_at",
    }
    for table, expected in columns.items():
        shown = "case when \"notnull\" then '*' else '' end || name"
        found = rows(tmp_path / "c.db", f"select {shown} from pragma_table_info('{table}')")
        assert " ".join(row[0] for row in found) == expected


def test_what_chatsg_reads_is_there(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    first = memory(0, "bob", payload={"run_id": "s", "topic": "日本"}, embedding=Vector.of(FLOATS))
    write(
        path,
        [first, memory(1, "7"), memory(2, "bob", state="deleted")],
        [change(5, 0, user_id="bob")],
        users=["7", "bob"],
    )
    assert rows(path, "select * from users") == [(7, "7"), (8, "bob")]
    assert rows(path, "select * from mem0_memories order by rowid") == [
        (str(identity(0)), 8, "s", "fact 0", struct.pack("<3f", *FLOATS), '{"topic":"日本"}', AT, AT),
        (str(identity(1)), 7, "", "fact 1", None, "{}", AT, AT),
    ]
    assert rows(
        path, "select id, memory_id, user_id, action, previous_content, new_content, created_at from mem0_history"
    ) == [(5, str(identity(0)), 8, "created", None, "after", MOMENT.isoformat())]
    assert rows(
        path, "select collection_name, user_id, total_memories, last_memory_at, metadata from mem0_metadata"
    ) == [
        ("chatsg_memories", 7, 1, AT, "{}"),
        ("chatsg_memories", 8, 1, AT, "{}"),
    ]
    assert rows(path, "pragma integrity_check") == [("ok",)]
    assert rows(path, "pragma foreign_key_check") == []


def test_the_counts_go_on_as_chatsg_s_do(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    write(path, [memory(0), memory(1)])
    totals = "select user_id, total_memories from mem0_metadata order by 1"
    assert rows(path, totals) == [(1, 2)]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("insert into mem0_memories (id, user_id, session_id, memory) values ('x', 1, 's', 'new')")
        connection.execute("insert into users values (9, 'new')")
        connection.execute("insert into mem0_memories (id, user_id, session_id, memory) values ('y', 9, 's', 'new')")
        connection.execute("delete from mem0_memories where id = ?", (str(identity(0)),))
        connection.execute("delete from mem0_memories where id = ?", (str(identity(1)),))
    assert rows(path, totals) == [(1, 1), (9, 1)]


CHANGES = {
    "made": (change(1, 0), "mem0_history", "created"),
    "changed": (
        change(1, 0, "update", old_value={"data": "before", "mood": [1, None], "memharbor": 1}),
        "mem0_history",
        "updated",
    ),
    "of a text alone": (change(1, 0, "update", old_value={"data": "before"}), "mem0_history", "updated"),
    "of a state": (change(1, 0, "update", old_value={"state": "paused"}), "mem0_history", "updated"),
    "of an empty text": (change(1, 0, "update", old_value={"data": ""}), "mem0_history", "updated"),
    "of no object in it": (change(1, 0, "update", old_value={"data": 5}), "mem0_history", "updated"),
    "of one that is gone": (
        change(1, 700, "delete", old_value={"data": "b"}, new_text=None),
        "memharbor_history",
        "deleted",
    ),
    "of one that chatsg does not see": (change(1, 1), "memharbor_history", "created"),
    "of nobody": (change(1, 0, user_id=None), "memharbor_history", "created"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    line, table, action = CHANGES[name]
    write(tmp_path / "c.db", [memory(0), memory(1, state="archived")], [line])
    *_, found = come_back(tmp_path / "c.db")
    expected = {
        "memory_id": str(line.memory_id),
        "user_id": line.user_id,
        "operation": line.operation,
        "old_value": line.old_value,
        "actor": "anna",
        "changed_at": MOMENT.isoformat(),
    }
    assert (found.kind, found.data) == ("history", {key: value for key, value in expected.items() if value is not None})
    assert rows(tmp_path / "c.db", f"select action from {table}") == [(action,)]


def test_the_report_counts_what_chatsg_does_not_see(tmp_path: Path) -> None:
    later = MOMENT.replace(year=2150)
    given_ = [
        memory(0),
        memory(1, state="paused"),
        memory(2, state="paused"),
        memory(3, lifecycle={"expires_at": MOMENT}),
    ]
    given_ += [
        memory(4, lifecycle={"expires_at": later}),
        memory(5, None, payload={"agent_id": "a"}),
        memory(6, data=" "),
    ]
    report = write(tmp_path / "c.db", given_, [change(1, 0), change(2, 1)])
    content = (tmp_path / "c.db").read_bytes()
    assert report == {
        "file": "c.db",
        "users": 1,
        "memories": 7,
        "changes": 2,
        "beside": {"expired": 1, "paused": 2, "without a text": 1, "without a user": 1},
        "expiring": 1,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    assert rows(tmp_path / "c.db", "select count(*) from mem0_memories") == [(2,)]


JSON = st.none() | st.integers() | st.text() | st.dictionaries(st.text(), st.integers())
STATES = st.sampled_from(["active", "paused", "archived", "deleted"])
OURS = st.fixed_dictionaries(
    {}, optional={"state": STATES, "actor": st.text(), "old_value": st.dictionaries(st.text(), JSON)}
)


@given(st.dictionaries(st.sampled_from(["memharbor", "a", "state"]), JSON | OURS), OURS)
def test_what_is_wrapped_is_unwrapped(metadata: dict[str, Any], ours: dict[str, Any]) -> None:
    assert unwrap(json.loads(json.dumps(wrap(metadata, ours)))) == (metadata, ours)


@pytest.mark.parametrize("theirs", [None, 7, "x", [], {}, {"state": "gone"}, {"state": "paused", "color": "red"}])
def test_metadata_of_others_stay_as_they_are(theirs: Any) -> None:
    assert unwrap({"memharbor": theirs, "a": 1}) == ({"memharbor": theirs, "a": 1}, {})


def test_users_keep_their_numbers_and_others_get_free_ones(tmp_path: Path) -> None:
    names = ["7", "123456789", "0", "07", "-1", "1234567890", "٣", "alice"]
    write(tmp_path / "c.db", users=names)
    numbered = {name: number for number, name in rows(tmp_path / "c.db", "select id, name from users")}
    assert (numbered["7"], numbered["123456789"]) == (7, 123456789)
    assert sorted(numbered[name] for name in names[2:]) == list(range(123456790, 123456796))


def test_users_are_numbered_by_a_file(tmp_path: Path) -> None:
    numbers = number_users({"12": "alice", "3": "7"})
    write(tmp_path / "c.db", [memory(0, "7"), memory(1)], numbers=numbers)
    assert rows(tmp_path / "c.db", "select id, name from users order by id") == [(3, "7"), (12, "alice")]
    assert [record.user_id for record in come_back(tmp_path / "c.db")] == ["7", "alice"]
    with pytest.raises(SourceDataError, match="user `bob` has no number"):
        write(tmp_path / "d.db", [memory(0), memory(1, "bob")], numbers=numbers)
    assert [each.name for each in tmp_path.iterdir()] == ["c.db"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"alice": "7"}, "`alice` is no number"),
        ({"-1": "alice"}, "`-1` is no number"),
        ({"٣": "alice"}, "is no number"),
        ({"9223372036854775808": "alice"}, "is no number"),
        ({"1": "alice", "2": "alice"}, "`alice` has two numbers, 1 and 2"),
        ({"1": "alice", "01": "bob"}, "two users have the same number"),
    ],
)
def test_a_file_that_numbers_no_users_is_refused(names: dict[str, str], said: str) -> None:
    with pytest.raises(SourceDataError, match=said):
        number_users(names)


IN_THE_WAY: dict[str, tuple[Callable[[Path], Any], bool, type[MemharborError], str]] = {
    "the file": (lambda path: path.write_text("mine"), False, StateRefusedError, "is there already"),
    "its log": (
        lambda path: path.with_name("c.db-wal").write_text("mine"),
        True,
        StateRefusedError,
        "c.db-wal` is there",
    ),
    "its journal": (
        lambda path: path.with_name("c.db-journal").write_text("x"),
        True,
        StateRefusedError,
        "-journal` is",
    ),
    "no folder": (lambda path: path.parent.rmdir(), False, UsageError, "is no folder"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_nothing_is_written_over_what_is_there(name: str, tmp_path: Path) -> None:
    put, replace, error, said = IN_THE_WAY[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    put(folder / "c.db")
    before = {each.name: each.read_text() for each in folder.iterdir()} if folder.exists() else None
    with pytest.raises(error, match=said):
        write(folder / "c.db", [memory(0)], replace=replace)
    assert before == ({each.name: each.read_text() for each in folder.iterdir()} if folder.exists() else None)


def test_one_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    def memories() -> Iterator[Record]:
        yield memory(0)
        (tmp_path / "c.db").write_text("mine")

    with pytest.raises(StateRefusedError, match="is there already"):
        write_sqlite(["alice"], memories(), [], tmp_path / "c.db")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"c.db": "mine"}


def test_one_that_is_there_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    write(path, [memory(0), memory(1)])
    write(path, [memory(2)], replace=True)
    assert rows(path, "select id from mem0_memories") == [(str(identity(2)),)]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["c.db"]


def test_a_fault_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    write(path, [memory(9)])
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def memories() -> Iterator[Record]:
        yield memory(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sqlite(["alice"], memories(), [], path, replace=True)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    many = [memory(number, data="x" * 3000) for number in range(50)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StateRefusedError, match="cannot be written"):
            write(tmp_path / "c.db", many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from memharbor.migrate.targets.sqlite import write_sqlite
from tests.unit.test_migrate_to_sqlite import memory
def memories():
    yield from (memory(number, data="x" * 3000) for number in range(200))
    os.kill(os.getpid(), signal.SIGKILL)
write_sqlite(["alice"], memories(), [], Path(sys.argv[1]), replace=True)
"""


def test_a_kill_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    write(path, [memory(9)])
    before = path.read_bytes()
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
    assert path.read_bytes() == before
    write(path, [memory(0)], replace=True)
    assert [record.id for record in come_back(path)] == [identity(0)]


def test_memory_stays_flat(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        memories = (memory(number, embedding=Vector.of(FLOATS * 30)) for number in range(count))
        changes = (change(number + 1, number, "update", old_value={"data": "b", "n": 1}) for number in range(count))
        tracemalloc.start()
        try:
            assert write_sqlite(["alice"], memories, changes, tmp_path / f"{count}.db")["changes"] == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # The rows alone would be ten times as much.
    assert peak(5_000) - peak(500) < 300_000
