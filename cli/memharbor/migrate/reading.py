"""
Read what a Memharbor database has, on its way out: memories, streamed in one snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from memharbor.database import Connection, transaction, translated_errors
from memharbor.migrate.record import Record
from memharbor.names import ROLES
from memharbor.schema.migrations import VECTOR_SCHEMA

_PAGE_ROWS = 1000
_LIFECYCLE = ("archived_at", "deleted_at", "expires_at")


def count_memories(connection: Connection, users: Sequence[str] = ()) -> int:
    """Count the memories that `read_memories` reads."""
    with translated_errors("counting the memories"), transaction(connection, role=ROLES["service"]):
        row = connection.execute(
            "select count(*) from memharbor.memories where %(users)s::text[] is null or user_id = any (%(users)s)",
            {"users": list(users) or None},
        ).fetchone()
    return int(row[0]) if row is not None else 0


def read_memories(connection: Connection, users: Sequence[str] = (), *, vectors: bool = True) -> Iterator[Record]:
    """
    Read memories in the order in which they were made.

    Args:
        connection: Straight to the database, as its administrator; in autocommit.
        users: Only theirs; empty for everybody's.
        vectors: Whether embeddings come along.

    Raises:
        DatabaseError: The query was refused.
    """
    # The float4 values as they are, so that no bit changes on the way through a text.
    embedding = f"embedding::{VECTOR_SCHEMA}.vector::real[]" if vectors else "null::real[]"
    query = (
        f"select id, payload, state, archived_at, deleted_at, expires_at, {embedding} from memharbor.memories"  # noqa: S608
        " where %(users)s::text[] is null or user_id = any (%(users)s) order by created_at, id"
    )
    with translated_errors("reading the memories"), transaction(connection, role=ROLES["service"]):
        connection.execute("set local statement_timeout = 0")
        with connection.cursor(name="memharbor_export") as cursor:
            cursor.itersize = _PAGE_ROWS
            cursor.execute(query.encode(), {"users": list(users) or None}, binary=True)
            for row in cursor:
                yield _record(row)


def _record(row: Sequence[Any]) -> Record:
    row_id, payload, state, *moments, embedding = row
    lifecycle = {name: moment for name, moment in zip(_LIFECYCLE, moments, strict=True) if moment is not None}
    values = None if embedding is None else tuple(embedding)
    return Record("memory", row_id, str(row_id), payload, values, state, lifecycle)
