"""
Read what a Memharbor database has, on its way out: memories and their changes, streamed in one snapshot.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from memharbor.database import Connection, transaction, translated_errors
from memharbor.migrate.record import Record
from memharbor.migrate.vector import Vector
from memharbor.names import ROLES
from memharbor.schema.migrations import VECTOR_SCHEMA

_PAGE_ROWS = 1000
# Two int16 before the values. Source: pgvector, vector_send.
_HEADER_BYTES = 4
_LIFECYCLE = ("archived_at", "deleted_at", "expires_at")
# As `memharbor.migrate.transform` takes them.
_YEARS = range(1970, 2201)


@dataclass(frozen=True)
class Change:
    """
    One line of the audit trail.

    Args:
        number: Of the line; later ones have larger numbers.
        memory_id: Whose change it is; the memory may be gone.
        user_id: Whose memory it was.
        operation: `create`, `update` or `delete`.
        old_value: The payload before.
        new_text: The text after; `None` where the memory was deleted.
        actor: Who changed it.
        changed_at: When.
    """

    number: int
    memory_id: uuid.UUID
    user_id: str | None
    operation: str
    old_value: Mapping[str, Any] | None
    new_text: str | None
    actor: str
    changed_at: datetime


@contextmanager
def one_snapshot(connection: Connection) -> Iterator[None]:
    """Let everything that is read in a block be of one instant; nothing can be written in it."""
    with translated_errors("reading"), connection.transaction():
        connection.execute("set transaction isolation level repeatable read, read only")
        # What is read may be written for a while before the block ends.
        connection.execute("set local idle_in_transaction_session_timeout = 0")
        yield


def count_memories(connection: Connection, users: Sequence[str] = ()) -> int:
    """Count the memories that `read_memories` reads."""
    with translated_errors("counting the memories"), transaction(connection, role=ROLES["service"]):
        row = connection.execute(
            "select count(*) from memharbor.memories where %(users)s::text[] is null or user_id = any (%(users)s)",
            {"users": list(users) or None},
        ).fetchone()
    return int(row[0]) if row is not None else 0


def read_memories(
    connection: Connection, users: Sequence[str] = (), *, vectors: bool = True, always_dated: bool = False
) -> Generator[Record, None, None]:
    """
    Read memories in the order in which they were made.

    Args:
        connection: Straight to the database, as its administrator; in autocommit.
        users: Only theirs; empty for everybody's.
        vectors: Whether embeddings come along.
        always_dated: Whether a memory whose payload does not say when it was made gets the instant of its row.

    Raises:
        DatabaseError: The query was refused.
    """
    # As pgvector sends it, so that no bit changes on the way through a text.
    embedding = f"{VECTOR_SCHEMA}.vector_send(embedding::{VECTOR_SCHEMA}.vector)" if vectors else "null::bytea"
    query = (
        f"select created_at, id, payload, state, archived_at, deleted_at, expires_at, {embedding} from memharbor.memories"  # noqa: S608
        " where %(users)s::text[] is null or user_id = any (%(users)s) order by created_at, id"
    )
    for created_at, *row in _read(connection, "memories", query, users):
        record = _record(row)
        if always_dated and readable_instant(record.data.get("created_at")) is None:
            record = replace(record, data={**record.data, "created_at": created_at.astimezone(UTC).isoformat()})
        yield record


def readable_instant(value: Any) -> str | None:
    """
    Find an instant as it was written; Mem0 lets a caller write anything there, which a migration would refuse.

    >>> readable_instant("2025-01-15T10:00:00-08:00"), readable_instant("long ago")
    ('2025-01-15T10:00:00-08:00', None)
    """
    try:
        return value if isinstance(value, str) and datetime.fromisoformat(value.strip()).year in _YEARS else None
    except ValueError:
        return None


def read_users(connection: Connection, users: Sequence[str] = ()) -> Generator[str, None, None]:
    """
    Read who has memories or changes, in the order of their first one.

    Those who are called by a number of at most nine digits come before the others.

    Args:
        connection: As for `read_memories`.
        users: Only these; empty for everybody.

    Raises:
        DatabaseError: The query was refused.
    """
    changes = "union all select user_id, changed_at from memharbor.memory_history" if _has_history(connection) else ""
    query = f"""
        select user_id from (select user_id, created_at as at from memharbor.memories {changes}) each
        where user_id is not null and (%(users)s::text[] is null or user_id = any (%(users)s))
        group by user_id order by user_id ~ '^[1-9][0-9]{{0,8}}$' desc, min(at), user_id
    """  # noqa: S608 - two texts of this module
    for (user_id,) in _read(connection, "users", query, users):
        yield user_id


def read_changes(connection: Connection, users: Sequence[str] = ()) -> Generator[Change, None, None]:
    """
    Read the audit trail in its order; nothing where the schema keeps none.

    Args:
        connection: As for `read_memories`.
        users: Only theirs; empty for everybody's.

    Raises:
        DatabaseError: The query was refused.
    """
    if not _has_history(connection):
        return
    # What a change made of a memory, its next change found there.
    query = """
        select h.id, h.memory_id, h.user_id, h.operation, h.old_value,
          case when h.operation <> 'delete' then
            coalesce(lead(h.old_value) over (partition by h.memory_id order by h.id), m.payload) end ->> 'data',
          h.actor, h.changed_at
        from memharbor.memory_history h left join memharbor.memories m on m.id = h.memory_id
        where %(users)s::text[] is null or h.user_id = any (%(users)s) order by h.id
    """
    for row in _read(connection, "changes", query, users):
        yield Change(*row)


def _has_history(connection: Connection) -> bool:
    with translated_errors("looking for the audit trail"), transaction(connection, role=ROLES["service"]):
        row = connection.execute("select pg_catalog.to_regclass('memharbor.memory_history') is not null").fetchone()
    return row is not None and bool(row[0])


def _read(connection: Connection, what: str, query: str, users: Sequence[str]) -> Iterator[Sequence[Any]]:
    with translated_errors(f"reading the {what}"), transaction(connection, role=ROLES["service"]):
        connection.execute("set local statement_timeout = 0")
        with connection.cursor(name="memharbor_export") as cursor:
            cursor.itersize = _PAGE_ROWS
            cursor.execute(query.encode(), {"users": list(users) or None}, binary=True)
            yield from cursor


def _record(row: Sequence[Any]) -> Record:
    row_id, payload, state, *moments, embedding = row
    lifecycle = {name: moment for name, moment in zip(_LIFECYCLE, moments, strict=True) if moment is not None}
    values = None if embedding is None else Vector.from_big_endian(bytes(embedding[_HEADER_BYTES:]))
    return Record("memory", row_id, str(row_id), payload, values, state, lifecycle)
