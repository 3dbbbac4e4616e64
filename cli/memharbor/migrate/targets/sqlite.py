"""
Write memories to a SQLite file with ChatSG's three tables, as `memharbor migrate run --from sqlite` reads them again.

ChatSG shows every row of `mem0_memories`, so it has active memories only, of users. The others, and changes of memories
that are not in it, lie beside it in `memharbor_memories` and `memharbor_history`, which have the same columns. What there
is no column for lies in the column `metadata`, under one key of ours. The file appears whole or not at all.
Source: ChatSG `002_create_mem0_tables.sql`, in SQLite's types, its triggers among them; the embedding as the TypeScript
SDK packs it; sqlite.org, pragma.html.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from memharbor.errors import SourceDataError, StateRefusedError, UsageError
from memharbor.migrate.reading import Change, readable_instant
from memharbor.migrate.record import Record, State

# Key of the metadata under which lies what ChatSG's tables have no column for.
OURS = "memharbor"
LIFECYCLE = ("archived_at", "deleted_at", "expires_at")
_OURS = {"state", *LIFECYCLE, "old_value", "actor", "metadata"}
_ACTIONS = {"create": "created", "update": "updated", "delete": "deleted"}
# What stands in columns.
_COLUMNS = {"data", "user_id", "run_id", "created_at", "updated_at"}
_CACHE_KIB = 16_384

_MEMORIES = """(
  id text not null primary key,
  user_id integer{needed} references users (id) on delete cascade,
  session_id varchar(255){needed},
  memory text{needed},
  embedding blob,
  metadata text default '{{}}',
  created_at text default current_timestamp,
  updated_at text default current_timestamp
)"""
_HISTORY = """(
  id integer primary key autoincrement,
  memory_id text not null{memory},
  user_id integer{needed} references users (id) on delete cascade,
  action varchar(50) not null,
  previous_content text,
  new_content text,
  metadata text default '{{}}',
  created_at text default current_timestamp
)"""
_NEEDED = {"needed": " not null", "memory": " references mem0_memories (id) on delete cascade"}
_ANY = {"needed": "", "memory": ""}
_TABLES = f"""
create table users (id integer primary key, name text not null unique);
create table mem0_memories {_MEMORIES.format(**_NEEDED)};
create table memharbor_memories {_MEMORIES.format(**_ANY)};
create table mem0_history {_HISTORY.format(**_NEEDED)};
create table memharbor_history {_HISTORY.format(**_ANY)};
create table mem0_metadata (
  id integer primary key autoincrement,
  collection_name varchar(255) not null default 'chatsg_memories',
  user_id integer not null references users (id) on delete cascade,
  total_memories integer default 0,
  last_memory_at text,
  metadata text default '{{}}',
  created_at text default current_timestamp,
  updated_at text default current_timestamp,
  unique (collection_name, user_id)
);
"""
# After the rows, since that is faster, and since the triggers would count them one by one.
_FINISH = """
create index idx_mem0_memories_user_id on mem0_memories (user_id);
create index idx_mem0_memories_session_id on mem0_memories (session_id);
create index idx_mem0_memories_user_session on mem0_memories (user_id, session_id);
create index idx_mem0_memories_created_at on mem0_memories (created_at);
create index idx_mem0_history_memory_id on mem0_history (memory_id);
create index idx_mem0_history_user_id on mem0_history (user_id);
create index idx_mem0_history_created_at on mem0_history (created_at);
create index idx_mem0_metadata_user_id on mem0_metadata (user_id);
insert into mem0_metadata (user_id, total_memories, last_memory_at, created_at, updated_at)
select g.user_id, g.total, newest.created_at, oldest.created_at, newest.created_at
from (
  select user_id, count(*) as total, min(rowid) as first_row, max(rowid) as last_row
  from mem0_memories group by user_id order by user_id
) g
join mem0_memories oldest on oldest.rowid = g.first_row
join mem0_memories newest on newest.rowid = g.last_row;
create trigger update_mem0_metadata_on_insert after insert on mem0_memories begin
  insert into mem0_metadata (collection_name, user_id, total_memories, last_memory_at)
  values ('chatsg_memories', new.user_id, 1, current_timestamp)
  on conflict (collection_name, user_id) do update
  set total_memories = total_memories + 1, last_memory_at = current_timestamp, updated_at = current_timestamp;
end;
create trigger update_mem0_metadata_on_delete after delete on mem0_memories begin
  update mem0_metadata set total_memories = max(0, total_memories - 1), updated_at = current_timestamp
  where collection_name = 'chatsg_memories' and user_id = old.user_id;
end;
"""


def wrap(metadata: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """
    Put what there is no column for under our key of the metadata; what has that key already goes along.

    >>> wrap({"topic": "tea"}, {"state": "archived"})
    {'topic': 'tea', 'memharbor': {'state': 'archived'}}
    """
    ours = dict(ours) | ({"metadata": metadata[OURS]} if OURS in metadata else {})
    rest = {name: value for name, value in metadata.items() if name != OURS}
    return rest | {OURS: ours} if ours else rest


def unwrap(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Take apart what `wrap` put together; metadata of others stays as it is.

    >>> unwrap({"topic": "tea", "memharbor": {"state": "archived"}})
    ({'topic': 'tea'}, {'state': 'archived'})
    >>> unwrap({"memharbor": "a project of mine"})
    ({'memharbor': 'a project of mine'}, {})
    """
    ours = metadata.get(OURS)
    states = get_args(State)
    if not isinstance(ours, dict) or not ours or not ours.keys() <= _OURS or ours.get("state", states[0]) not in states:
        return dict(metadata), {}
    rest = {name: value for name, value in metadata.items() if name != OURS}
    own = {OURS: ours["metadata"]} if "metadata" in ours else {}
    return rest | own, {name: value for name, value in ours.items() if name != "metadata"}


def number_users(names: Mapping[str, str]) -> dict[str, int]:
    """
    Read a file of `--remap-users` backwards: the number by the name.

    >>> number_users({"7": "alice"})
    {'alice': 7}

    Raises:
        SourceDataError: A number is none, or one user has two.
    """
    numbers: dict[str, int] = {}
    for number, name in names.items():
        if not number.isascii() or not number.isdecimal() or int(number) >= 2**63:
            raise SourceDataError(
                f"`{number}` is no number of a user", hint='for instance {"1": "alice"}, or a line `1,alice`'
            )
        if numbers.setdefault(name, int(number)) != int(number):
            raise SourceDataError(f"user `{name}` has two numbers, {numbers[name]} and {int(number)}")
    if len(set(numbers.values())) != len(numbers):
        raise SourceDataError("two users have the same number")
    return numbers


def number_of(name: str, numbers: Mapping[str, int] | None) -> int | None:
    """
    Find the number of a user; `None` where the file may give any that is free.

    Args:
        name: Of the user.
        numbers: Of all users, where they were given; without it, a name that is a number keeps it.

    Raises:
        SourceDataError: Numbers were given, and none to this user.

    >>> number_of("7", None), number_of("alice", None), number_of("alice", {"alice": 3})
    (7, None, 3)
    """
    if numbers is not None:
        if name not in numbers:
            raise SourceDataError(
                f"user `{name}` has no number in the file of `--map-users`",
                hint="add a line `NUMBER,USER`, or leave the user out with `--users`",
            )
        return numbers[name]
    is_number = name.isascii() and name.isdecimal() and not name.startswith("0") and len(name) < 10
    return int(name) if is_number else None


def refuse_unwritable(path: Path, *, replace: bool) -> None:
    """
    Refuse to write where something is in the way.

    Raises:
        UsageError: The folder is not there.
        StateRefusedError: The file is there, or another program works with it.
    """
    if not path.parent.is_dir():
        raise UsageError(f"`{path.parent}` is no folder", hint=f"mkdir -p {path.parent}")
    if path.exists() and not replace:
        raise StateRefusedError(f"`{path}` is there already", hint="pass `--replace`, or name another file")
    for end in ("-wal", "-journal"):
        journal = path.with_name(path.name + end)
        if journal.exists():
            # SQLite would play it into the new file.
            raise StateRefusedError(
                f"`{journal}` is there: a program works with the database, or ended in the middle",
                hint=f"stop it, and let SQLite fold it in: `sqlite3 {path} 'pragma wal_checkpoint(truncate)'`",
            )


def write_sqlite(
    users: Iterable[str],
    memories: Iterable[Record],
    changes: Iterable[Change],
    path: Path,
    *,
    numbers: Mapping[str, int] | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """
    Write memories and their changes to a SQLite file.

    Args:
        users: Everybody who is in the others; those first who are called by a number.
        memories: Oldest first, streamed; read to their end before `changes`.
        changes: Streamed.
        path: The file; its folder must exist.
        numbers: The number of each user; without it, users are numbered in their order, and a number stays what it is.
        replace: Whether a file that is there may be replaced.

    Returns:
        `file`, `users`, `memories`, `changes`, `beside`: how many memories are not in `mem0_memories`, by reason;
        `expiring`: how many are in it that expire one day, which ChatSG does not know; `sha256`, `bytes`.

    Raises:
        UsageError: The folder is not there.
        StateRefusedError: There is such a file, or it cannot be written; nothing was changed.
        SourceDataError: A user has no number.
    """
    refuse_unwritable(path, replace=replace)
    incoming = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        os.close(os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        with _translated(path), _opened(incoming) as connection:
            writer = _Writer(connection, numbers)
            for name in users:
                writer.put_user(name)
            for record in memories:
                writer.put_memory(record)
            for change in changes:
                writer.put_change(change)
        with incoming.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        report = {"file": path.name, **writer.report(), "sha256": digest, "bytes": incoming.stat().st_size}
        # It may have taken long.
        refuse_unwritable(path, replace=replace)
        incoming.replace(path)
        _sync_folder(path.parent)
    finally:
        incoming.unlink(missing_ok=True)
    return report


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Lend an empty database without a journal: a file that is not complete is thrown away."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("journal_mode = off", "synchronous = off", f"cache_size = -{_CACHE_KIB}", "temp_store = file"):
            connection.execute(f"pragma {pragma}")
        connection.executescript(_TABLES)
        connection.execute("begin")
        yield connection
        connection.execute("commit")
        connection.executescript(f"begin; {_FINISH} commit;")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise StateRefusedError(f"`{path}` cannot be written: {exc}", hint=f"look with `df -h {path.parent}`") from exc


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class _Writer:
    def __init__(self, connection: sqlite3.Connection, numbers: Mapping[str, int] | None) -> None:
        self._connection, self._numbers = connection, numbers
        self._now = datetime.now(UTC)
        self._counts: Counter[str] = Counter()
        self._beside: Counter[str] = Counter()

    def report(self) -> dict[str, Any]:
        counts = {name: self._counts[name] for name in ("users", "memories", "changes")}
        return {**counts, "beside": dict(sorted(self._beside.items())), "expiring": self._counts["expiring"]}

    def put_user(self, name: str) -> None:
        row = (number_of(name, self._numbers), name)
        self._connection.execute("insert into users (id, name) values (?, ?)", row)
        self._counts["users"] += 1

    def put_memory(self, record: Record) -> None:
        text, reason = record.data.get("data"), _reason_beside(record, self._now)
        table = "memharbor_memories" if reason else "mem0_memories"
        if reason:
            self._beside[reason] += 1
        elif "expires_at" in record.lifecycle:
            self._counts["expiring"] += 1
        self._counts["memories"] += 1
        row = (
            str(record.id),
            self._number(record.user_id),
            str(record.data.get("run_id") or ""),
            text if isinstance(text, str) else None,
            None if record.embedding is None else record.embedding.packed,
            _spell(wrap(_metadata(record), _ours(record))),
            readable_instant(record.data.get("created_at")),
            readable_instant(record.data.get("updated_at")),
        )
        self._connection.execute(f"insert into {table} values (?, ?, ?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - two names

    def put_change(self, change: Change) -> None:
        number, old = self._number(change.user_id), change.old_value
        text = None if old is None else old.get("data")
        ours: dict[str, Any] = {"actor": change.actor}
        # A text alone comes back from the column.
        if old is not None and (not text or not isinstance(text, str) or len(old) > 1):
            ours["old_value"] = old
        is_there = number is not None and self._is_in_chatsg(str(change.memory_id))
        row = (
            change.number,
            str(change.memory_id),
            number,
            _ACTIONS[change.operation],
            text if isinstance(text, str) else None,
            change.new_text,
            _spell(wrap({}, ours)),
            change.changed_at.astimezone(UTC).isoformat(),
        )
        table = "mem0_history" if is_there else "memharbor_history"
        self._connection.execute(f"insert into {table} values (?, ?, ?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - two names
        self._counts["changes"] += 1

    def _number(self, name: str | None) -> int | None:
        if name is None:
            return None
        (number,) = self._connection.execute("select id from users where name = ?", (name,)).fetchone()
        return int(number)

    def _is_in_chatsg(self, memory_id: str) -> bool:
        return self._connection.execute("select 1 from mem0_memories where id = ?", (memory_id,)).fetchone() is not None


def _reason_beside(record: Record, now: datetime) -> str | None:
    """Say why ChatSG's table cannot have a memory, or should not, as view `public.mem0_memories` does."""
    text = record.data.get("data")
    if record.state != "active":
        return record.state
    if "expires_at" in record.lifecycle and record.lifecycle["expires_at"] <= now:
        return "expired"
    if record.user_id is None:
        return "without a user"
    return None if isinstance(text, str) and text.strip() else "without a text"


def _metadata(record: Record) -> dict[str, Any]:
    """What of the payload has no column, without what follows from the text."""
    text = str(record.data.get("data") or "")
    derived = {
        "hash": hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(),
        "text_lemmatized": text.lower(),
    }
    return {
        name: value
        for name, value in record.data.items()
        if name not in _COLUMNS and (name not in derived or derived[name] != value)
    }


def _ours(record: Record) -> dict[str, Any]:
    state = {} if record.state == "active" else {"state": record.state}
    return state | {name: moment.isoformat() for name, moment in record.lifecycle.items()}


def _spell(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
