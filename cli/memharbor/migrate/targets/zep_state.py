"""
What was written to a project of Zep: users, threads, pieces of memories and batches, in a file that a SIGKILL cannot hurt.

Zep chooses the ids of all that it holds, so a run that goes on must know them. Each piece of a memory has a row before
it is sent: a row that is `sending` says that nobody knows yet whether it is there.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from memharbor.errors import StateRefusedError

FILE = "zep.sqlite3"
Status = Literal["sending", "written"]

_TABLES = """
create table if not exists about (name text primary key, value text not null) without rowid;
create table if not exists users (
  user_id text primary key, user_uuid text not null, graph_uuid text not null
) without rowid;
create table if not exists threads (
  user_id text, run_id text, thread_uuid text not null, primary key (user_id, run_id)
) without rowid;
create table if not exists pieces (
  record_id text, part integer, digest text not null, status text not null, there_id text not null default '',
  idempotency_key text not null default '', batch text, position integer, primary key (record_id, part)
) without rowid;
create index if not exists pieces_batch on pieces (batch, position) where batch is not null;
create table if not exists batches (uuid text primary key, status text not null) without rowid;
"""


@dataclass(frozen=True)
class User:
    """
    A user of Zep.

    Args:
        uuid: Of the user.
        graph_uuid: Of the user's graph.
    """

    uuid: str
    graph_uuid: str


@dataclass(frozen=True)
class Sent:
    """
    What is known of a piece.

    Args:
        digest: Of its contents.
        status: `written`, or `sending` where nobody knows.
        there_id: UUID there, where it is known.
        idempotency_key: That it was sent with.
    """

    digest: str
    status: Status
    there_id: str
    idempotency_key: str


class ZepState:
    """
    The state of one project; one process at a time. A context manager.

    Args:
        folder: Where its file is; made where it is not.

    Raises:
        StateRefusedError: Another process uses it, or the file is no state.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / FILE
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        self._database = sqlite3.connect(self.path, isolation_level=None, timeout=0)
        try:
            # The lock is held until the file is closed, or the process is no more.
            self._database.execute("pragma locking_mode = exclusive")
            self._database.executescript(f"pragma journal_mode = wal; pragma synchronous = full; {_TABLES}")
            self._database.execute("insert or ignore into about values ('state', ?)", (str(uuid.uuid4()),))
            self._database.execute("update about set value = value")
        except sqlite3.DatabaseError as exc:
            self._database.close()
            raise StateRefusedError(
                f"`{self.path}` cannot be used: {exc}", hint="another migration to Zep may be running: wait for its end"
            ) from exc

    def __enter__(self) -> Self:
        """Lend the state."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close its file."""
        self.close()

    def close(self) -> None:
        """Close the file; what was noted stays."""
        self._database.close()

    @property
    def id(self) -> str:
        """What tells this state from others."""
        return self._about("state")

    def bind(self, project: str) -> None:
        """
        Tie the state to a project.

        Raises:
            StateRefusedError: It is of another one.
        """
        bound = self._about("project")
        if bound and project and bound != project:
            raise StateRefusedError(
                f"`{self.path}` is of the project `{bound}`, and the key is of `{project}`",
                hint="name another folder, or use the key of that project",
            )
        if project:
            self._database.execute("insert or replace into about values ('project', ?)", (project,))

    def _about(self, name: str) -> str:
        row = self._database.execute("select value from about where name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Note several things at once, or none of them."""
        self._database.execute("begin")
        try:
            yield
        except BaseException:
            self._database.execute("rollback")
            raise
        self._database.execute("commit")

    def find_user(self, user_id: str) -> User | None:
        """Find a user by our name."""
        row = self._database.execute("select user_uuid, graph_uuid from users where user_id = ?", (user_id,)).fetchone()
        return User(row[0], row[1]) if row else None

    def get_user(self, user_id: str) -> User:
        """
        Get a user by our name.

        Raises:
            StateRefusedError: There is none.
        """
        user = self.find_user(user_id)
        if user is None:
            raise StateRefusedError(f"`{self.path}` does not know the user `{user_id}`")
        return user

    def note_user(self, user_id: str, user: User) -> None:
        """Note a user, once all that the service has of it is noted."""
        row = (user_id, user.uuid, user.graph_uuid)
        self._database.execute("insert or replace into users values (?, ?, ?)", row)

    def count_users(self) -> int:
        """Count the users."""
        (count,) = self._database.execute("select count(*) from users").fetchone()
        return int(count)

    def count_memories(self) -> int:
        """Count the memories of which something is there."""
        (count,) = self._database.execute(
            "select count(distinct record_id) from pieces where status = 'written'"
        ).fetchone()
        return int(count)

    def find_thread(self, user_id: str, run_id: str) -> str | None:
        """Find the thread of a conversation."""
        row = self._database.execute(
            "select thread_uuid from threads where user_id = ? and run_id = ?", (user_id, run_id)
        ).fetchone()
        return str(row[0]) if row else None

    def note_thread(self, user_id: str, run_id: str, thread_uuid: str) -> None:
        """Note the thread of a conversation."""
        self._database.execute("insert or replace into threads values (?, ?, ?)", (user_id, run_id, thread_uuid))

    def threads(self, user_id: str) -> dict[str, str]:
        """List the threads of a user by conversation."""
        return dict(self._database.execute("select run_id, thread_uuid from threads where user_id = ?", (user_id,)))

    def find_pieces(self, record_id: str) -> dict[int, Sent]:
        """Find what was sent of a memory, by part."""
        rows = self._database.execute(
            "select part, digest, status, there_id, idempotency_key from pieces where record_id = ?", (record_id,)
        )
        return {row[0]: Sent(*row[1:]) for row in rows}

    def intend(self, record_id: str, part: int, digest: str) -> str:
        """Note that a piece is about to be sent; the key that it is sent with stays the same when it is sent again."""
        self._database.execute(
            "insert or ignore into pieces (record_id, part, digest, status, idempotency_key)"
            " values (?, ?, ?, 'sending', ?)",
            (record_id, part, digest, str(uuid.uuid4())),
        )
        (key,) = self._database.execute(
            "select idempotency_key from pieces where record_id = ? and part = ?", (record_id, part)
        ).fetchone()
        return str(key)

    def note_written(self, record_id: str, part: int, digest: str, there_id: str) -> None:
        """Note that a piece is there."""
        self._database.execute(
            "insert or replace into pieces (record_id, part, digest, status, there_id) values (?, ?, ?, 'written', ?)",
            (record_id, part, digest, there_id),
        )

    def forget_piece(self, record_id: str, part: int) -> None:
        """Forget a piece that is not there."""
        self._database.execute("delete from pieces where record_id = ? and part = ?", (record_id, part))

    def note_batch(self, batch: str, status: str) -> None:
        """Note a batch: a `draft`; `sent`, when the service has begun with it; `ended`."""
        self._database.execute("insert or replace into batches values (?, ?)", (batch, status))

    def batches(self) -> list[tuple[str, str]]:
        """List the batches that have not ended, with their status."""
        return self._database.execute("select uuid, status from batches where status <> 'ended'").fetchall()

    def note_batched(self, batch: str, rows: Iterable[tuple[str, int, str, int]]) -> None:
        """Note pieces that a batch has: record, part, digest, and the position in the batch."""
        self._database.executemany(
            "insert or replace into pieces (record_id, part, digest, status, batch, position)"
            " values (?, ?, ?, 'written', ?, ?)",
            ((record_id, part, digest, batch, position) for record_id, part, digest, position in rows),
        )

    def note_item(self, batch: str, position: int, there_id: str) -> None:
        """Note the UUID that an item of a batch has there."""
        self._database.execute(
            "update pieces set there_id = ? where batch = ? and position = ?", (there_id, batch, position)
        )

    def doubt_item(self, batch: str, position: int) -> None:
        """Note that an item of a batch failed: it is looked for before it is sent again."""
        self._database.execute(
            "update pieces set status = 'sending', idempotency_key = ?, batch = null where batch = ? and position = ?",
            (str(uuid.uuid4()), batch, position),
        )

    def doubt_batch(self, batch: str) -> None:
        """Note that nobody knows what became of all items of a batch."""
        self._database.execute("update pieces set status = 'sending', batch = null where batch = ?", (batch,))

    def drop_batch(self, batch: str) -> None:
        """Forget a draft that was thrown away, with its pieces: none of them is there."""
        with self.transaction():
            self._database.execute("delete from pieces where batch = ?", (batch,))
            self._database.execute("delete from batches where uuid = ?", (batch,))
