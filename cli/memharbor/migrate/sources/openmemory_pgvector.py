"""
Embeddings of OpenMemory, from the table of its pgvector store: looked up by id, as many at a time as a page has memories.

OpenMemory keeps them there where `PG_HOST` and `PG_PORT` are set, in collection `openmemory`: a table as Mem0 makes it.
All lookups are of one snapshot, and nothing of a row but its id and its embedding is read.
Source: openmemory `api/app/utils/memory.py`; mem0ai `mem0/vector_stores/pgvector.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from psycopg import sql

from memharbor.database import Connection
from memharbor.errors import SourceDataError
from memharbor.migrate.sources.catalog import VECTOR_TYPES, decode_vector
from memharbor.migrate.sources.json_values import Problem
from memharbor.migrate.sources.mem0_pgvector import Mem0PgvectorSource
from memharbor.migrate.sources.postgres import Part, snapshot
from memharbor.migrate.sources.qdrant_points import canonical_id, is_uuid

_ID_TYPES = ("uuid", "text", "varchar")


class CollectionVectors:
    """
    Embeddings by id.

    Args:
        connection: In a snapshot of the database that has the table.
        part: The table.

    Raises:
        SourceDataError: Its ids are of a type that no id of OpenMemory's is.
    """

    def __init__(self, connection: Connection, part: Part) -> None:
        key, vector = part.relation.find(part.id_column), part.relation.find(part.vector_column)
        if key is None or vector is None or key.type_name not in _ID_TYPES:
            raise SourceDataError(
                f"`{part.relation.spelled}` is no collection of OpenMemory's: `{part.id_column}` is no UUID",
                hint="give the table that its pgvector store wrote: `--collection openmemory`",
            )
        self._connection = connection
        self._key, self._vector = key, vector
        self._query = sql.SQL("select t.{0}::text, t.{1} from {2} t where t.{0} = any(%s::{3}[])").format(
            sql.Identifier(key.name), sql.Identifier(vector.name), part.relation.quoted, sql.SQL(key.type)
        )

    def find_many(self, ids: Sequence[str]) -> Mapping[str, Sequence[float] | Problem]:
        """Find embeddings by their ids; see `Vectors`."""
        wanted = [each for each in ids if self._key.type_name != "uuid" or is_uuid(each)]
        if not wanted:
            return {}
        with self._connection.cursor(binary=True) as cursor:
            rows = cursor.execute(self._query, [wanted]).fetchall()
        return {canonical_id(bytes(key).decode()): self._read(value) for key, value in rows if value is not None}

    def _read(self, value: Any) -> Sequence[float]:
        type_name = self._vector.type_name
        return decode_vector(bytes(value), type_name) if type_name in VECTOR_TYPES else list(value)


class CollectionTable:
    """
    The collection in which OpenMemory's pgvector store keeps its embeddings.

    Args:
        dsn: A libpq URI or key/value string of a role that sees all rows; a secret.
        collection: Its name, as Mem0's `collection_name` says it.
    """

    def __init__(self, dsn: str, collection: str) -> None:
        self._source = _Memories(dsn, collection)

    def describe(self) -> tuple[str, int | None]:
        """
        Say which table it is and what it holds; see `VectorStore`.

        Raises:
            SourceDataError: It is not there, or no collection.
            StateRefusedError: The role may not read all rows.
            ConnectError: The server does not answer or refuses the login.
        """
        info = self._source.describe()
        return info.identity, info.dims

    @contextmanager
    def lend(self) -> Iterator[CollectionVectors]:
        """
        Lend the embeddings, of one snapshot; see `VectorStore`.

        Raises:
            SourceDataError: It is not there, or no collection.
            StateRefusedError: The role may not read all rows.
            ConnectError: The server does not answer, or the connection was lost.
        """
        with self._source.opened() as vectors:
            yield vectors


class _Memories(Mem0PgvectorSource):
    """The memories of a collection alone: OpenMemory's entities are in no file that it is read from."""

    def find_parts(self, connection: Connection) -> Sequence[Part]:
        return super().find_parts(connection)[:1]

    @contextmanager
    def opened(self) -> Iterator[CollectionVectors]:
        with snapshot(self._dsn) as connection:
            (part,) = self._checked_parts(connection)
            yield CollectionVectors(connection, part)
