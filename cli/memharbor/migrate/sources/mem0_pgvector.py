"""
Read the tables that Mem0's own pgvector store makes: `(id uuid, vector vector(N), payload jsonb)`, of any version.

Before 2.0.2 Mem0 did not quote the name of a collection, so that `MyMem` lives in `mymem`; the exact name is looked for
first, then the folded one. Rows of a store that Memharbor serves look the same. `mem0migrations` of 1.x and
`memory_migrations` of the TypeScript SDK hold no memories.
Source: mem0ai 0.1 to 2.2 `mem0/vector_stores/pgvector.py`; mem0-ts `vector_stores/pgvector.ts`.
"""

from __future__ import annotations

from collections.abc import Sequence

from memharbor.database import Connection
from memharbor.errors import SourceDataError
from memharbor.migrate.record import Kind
from memharbor.migrate.sources.catalog import (
    Relation,
    can_hold_vectors,
    find_relation,
    json_column,
    list_relations,
)
from memharbor.migrate.sources.postgres import Part, PostgresSource

_COLUMNS = ("id", "vector", "payload")
_NOT_COLLECTIONS = ("mem0migrations", "memory_migrations")


class Mem0PgvectorSource(PostgresSource):
    """
    A collection of Mem0's pgvector store, and its entities where it has any.

    Args:
        dsn: A libpq URI or key/value string of a role that sees all rows; a secret.
        collection: As Mem0's `collection_name` says it.
        schema: Where its tables are, if a `search_path` led Mem0 elsewhere.
    """

    name = "mem0-pgvector"

    def __init__(self, dsn: str, collection: str = "mem0", *, schema: str = "public") -> None:
        super().__init__(dsn)
        self._collection = collection
        self._schema = schema

    def find_parts(self, connection: Connection) -> Sequence[Part]:
        """Find the collection and its entities; see `PostgresSource`."""
        notes: list[str] = []
        memories = self._find(connection, self._collection, notes)
        if memories is None:
            raise SourceDataError(
                f"schema `{self._schema}` has no table for collection `{self._collection}`",
                hint=collections_hint(connection, self._schema, _COLUMNS),
            )
        found = [payload_part(memories, "memory", _COLUMNS)]
        entities = self._find(connection, f"{self._collection}_entities", notes)
        if entities is not None:
            found.append(payload_part(entities, "entity", _COLUMNS))
        self.notes = tuple(notes)
        return found

    def _find(self, connection: Connection, name: str, notes: list[str]) -> Relation | None:
        folded = name.lower()
        exact = find_relation(connection, self._schema, name)
        other = find_relation(connection, self._schema, folded) if folded != name else None
        if exact is None and other is not None:
            notes.append(f"collection `{name}` is in table `{folded}`: Mem0 before 2.0.2 did not quote its name")
        elif exact is not None and other is not None:
            notes.append(f"table `{name}` is read; `{folded}`, which Mem0 before 2.0.2 wrote for it, is there too")
        return exact or other


def payload_part(relation: Relation, kind: Kind, columns: Sequence[str]) -> Part:
    """
    Make a part of a table that has a key, an embedding and a payload, and whatever else.

    Args:
        relation: The table.
        kind: What its rows are.
        columns: Names of the three, in this order.

    Raises:
        SourceDataError: One of them is missing, or cannot be what it should be.
    """
    id_column, vector_column, payload_column = columns
    missing = [name for name in columns if relation.find(name) is None]
    if missing:
        raise SourceDataError(
            f"`{relation.spelled}` is no collection of Mem0: it has no column `{missing[0]}`",
            hint="a table of columns such as `memory` and `user_id` is read as a canonical one",
        )
    if not can_hold_vectors(relation.find(vector_column)):
        raise SourceDataError(f"`{relation.spelled}` is no collection of Mem0: `{vector_column}` holds no embeddings")
    return Part(kind, kind, relation, id_column, vector_column, json_column(payload_column))


def collections_hint(connection: Connection, schema: str, columns: Sequence[str]) -> str:
    """Say which collections a schema has, for a hint."""
    names = [name for name in list_relations(connection, schema, columns) if name not in _NOT_COLLECTIONS]
    listed = ", ".join(f"`{name}`" for name in names if not name.endswith("_entities"))
    return f"it has {listed}" if listed else "look into another database or schema: it has no collections"
