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

Verdict = Literal["new", "same-id", "other-content", "same-text"]

_TABLES = """
create table if not exists ids (id blob primary key, digest blob not null, segment integer not null) without rowid;
create table if not exists texts (owner_text blob primary key, id blob not null, segment integer not null) without rowid;
"""
_BEFORE = 0


class Seen:
    """
    The ids and texts of one run.

    Args:
        path: Its file; it may be gone at any time, and is then made anew from the segments.
        segment: The last segment that is complete; what was noted of later ones is forgotten.
    """

    def __init__(self, path: Path, *, segment: int) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        # The segments are what counts: what a power cut loses of this file is noted again from them.
        self._connection.executescript(f"pragma journal_mode = wal; pragma synchronous = normal; {_TABLES}")
        self._connection.execute("delete from ids where segment > ?", (segment,))
        self._connection.execute("delete from texts where segment > ?", (segment,))

    @property
    def knows_target(self) -> bool:
        """Whether the texts of the database were noted."""
        (version,) = self._connection.execute("pragma user_version").fetchone()
        return bool(version)

    def note_target(self, rows: Iterable[tuple[uuid.UUID, str | None, str | None, str | None, str]]) -> None:
        """
        Note the texts that the database has before the run.

        Args:
            rows: Id, user, agent, run and hash of each memory.
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

    def commit(self) -> None:
        """Keep what was noted of a segment; call it before the segment appears."""
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
        digest = hashlib.sha256(json.dumps(spelled, sort_keys=True).encode()).digest()
        key = record.id.bytes + record.kind.encode()
        row = self._connection.execute("select digest from ids where id = ?", (key,)).fetchone()
        if row is not None:
            return "same-id" if row[0] == digest else "other-content"
        self._connection.execute("insert into ids values (?, ?, ?)", (key, digest, segment))
        # A deleted memory is no reason to leave out one that is not, nor the other way round.
        if not by_text or record.kind != "memory" or record.state == "deleted":
            return "new"
        owner_text = _owner_text([record.data.get(name) for name in OWNERS], str(record.data["hash"]))
        row = self._connection.execute("select id from texts where owner_text = ?", (owner_text,)).fetchone()
        if row is not None:
            return "new" if row[0] == record.id.bytes else "same-text"
        self._connection.execute("insert into texts values (?, ?, ?)", (owner_text, record.id.bytes, segment))
        return "new"

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _owner_text(owner: Iterable[str | None], text_hash: str) -> bytes:
    return hashlib.sha256(json.dumps([*owner, text_hash]).encode()).digest()
