"""
What a run has met: ids and texts, on disk, so that memory stays flat and nothing comes in twice.

The same id with the same content is the same item; with another content it is refused. The same text of the same owner
is one memory, whichever id it has. Texts that were in the database before the run began count too. Never across owners.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from memharbor.migrate.record import Record
from memharbor.migrate.transform import OWNERS

Verdict = Literal["new", "same-id", "other-content", "same-text", "same-change"]

_TABLES = """
create table if not exists ids (id blob primary key, digest blob not null, segment integer not null) without rowid;
create table if not exists segments (number integer primary key) without rowid;
create table if not exists texts (owner_text blob primary key, id blob not null, segment integer not null) without rowid;
"""
_BEFORE = 0
_CHANGE = ("memory_id", "operation", "old_value", "actor", "changed_at")


class Seen:
    """
    The ids and texts of one run.

    Args:
        path: Its file. The segments are what counts: where it is gone, or cut by a power failure, it is begun anew, and
            what it lacks is noted again (`missing`).
        segment: The last segment that is complete; what was noted of later ones is forgotten.
    """

    def __init__(self, path: Path, *, segment: int) -> None:
        self._last = segment
        try:
            self._connection = _opened(path)
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._connection = _opened(path)
        for table, column in (("ids", "segment"), ("texts", "segment"), ("segments", "number")):
            # Names that are spelled in this module.
            self._connection.execute(f"delete from {table} where {column} > ?", (segment,))  # noqa: S608

    @property
    def missing(self) -> list[int]:
        """Numbers of complete segments whose records were not noted."""
        known = {number for (number,) in self._connection.execute("select number from segments")}
        return [number for number in range(1, self._last + 1) if number not in known]

    @property
    def knows_target(self) -> bool:
        """Whether the texts of the database were noted."""
        (version,) = self._connection.execute("pragma user_version").fetchone()
        return bool(version)

    def note_target(self, rows: Iterable[tuple[uuid.UUID, str | None, str | None, str | None, str]]) -> None:
        """
        Note the texts that the database has before the run.

        Args:
            rows: Id, user, agent, run and MD5 of the text of each memory that is active.
        """
        self._connection.execute("begin")
        self._connection.execute("delete from texts where segment = 0")
        self._connection.executemany(
            "insert or ignore into texts values (?, ?, ?)",
            (
                (_owner_text((user, agent, run), text_hash), row_id.bytes, _BEFORE)
                for row_id, user, agent, run, text_hash in rows
            ),
        )
        self._connection.execute("pragma user_version = 1")
        self._connection.execute("commit")

    def begin(self) -> None:
        """Begin a segment."""
        self._connection.execute("begin")

    def commit(self, segment: int) -> None:
        """Keep what was noted of a segment; call it before the segment appears."""
        self._connection.execute("insert or ignore into segments values (?)", (segment,))
        self._connection.execute("commit")

    def meet(self, record: Record, spelled: Mapping[str, Any], segment: int, *, by_text: bool = True) -> Verdict:
        """
        Tell whether a record is new to the run, and note it.

        Args:
            record: The record.
            spelled: The same as JSON data (`record_as_data`).
            segment: In which it came.
            by_text: Whether the same text of the same owner is the same memory.
        """
        fields = {name: value for name, value in spelled.items() if name != "embedding"}
        content = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        content.update(record.embedding.packed if record.embedding is not None else b"")
        digest = content.digest()
        key = record.id.bytes + record.kind.encode()
        row = self._connection.execute("select digest from ids where id = ?", (key,)).fetchone()
        if row is not None:
            return "same-id" if row[0] == digest else "other-content"
        self._connection.execute("insert into ids values (?, ?, ?)", (key, digest, segment))
        # A memory that Mem0 does not meet is no reason to leave out one that it does, nor the other way round.
        if record.kind == "history":
            # A change has no id in the database: it is told by what was changed, when and by whom.
            change = [record.data.get(name) for name in _CHANGE]
            return "same-change" if self._meet_text(_digest(change), record, segment) else "new"
        if not by_text or record.kind != "memory" or record.state != "active":
            return "new"
        # The source's own hash may be of a text that it had before.
        text_hash = hashlib.md5(record.text.encode(), usedforsecurity=False).hexdigest()
        owner_text = _owner_text([record.data.get(name) for name in OWNERS], text_hash)
        return "same-text" if self._meet_text(owner_text, record, segment) else "new"

    def _meet_text(self, key: bytes, record: Record, segment: int) -> bool:
        """Tell whether another record has a key, and note it where none has."""
        row = self._connection.execute("select id from texts where owner_text = ?", (key,)).fetchone()
        if row is not None:
            return bool(row[0] != record.id.bytes)
        self._connection.execute("insert into texts values (?, ?, ?)", (key, record.id.bytes, segment))
        return False

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.executescript(f"pragma journal_mode = wal; pragma synchronous = normal; {_TABLES}")
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


def _owner_text(owner: Iterable[str | None], text_hash: str) -> bytes:
    return _digest([*owner, text_hash])


def _digest(values: list[Any]) -> bytes:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()
