"""
Read what Mem0 and its users keep on Supabase: collections of `vecs`, and canonical tables of columns.

Canonical tables are those of the guides that put Mem0 onto Supabase: `memories` with `user_id`, `memory`, `metadata`,
`categories` and `embedding`, and beside it `memory_relationships` and `memory_history`. Columns may be missing, and others
may be there: they are read too. Their policies (`auth.uid()`) hide rows from every role but their owner's and those with
BYPASSRLS, so a role that would not see all is refused.
Sources: vecs 0.4, `vecs/collection.py`; mem0ai `mem0/vector_stores/supabase.py`; Supabase documentation, Postgres roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast, get_args

from memharbor.database import Connection
from memharbor.errors import SourceDataError
from memharbor.migrate.record import Kind, RawItem, State
from memharbor.migrate.sources.catalog import (
    VECTOR_TYPES,
    Relation,
    can_hold_vectors,
    find_relation,
    json_of_columns,
    list_relations,
)
from memharbor.migrate.sources.mem0_pgvector import collections_hint, payload_part
from memharbor.migrate.sources.postgres import Part, PostgresSource

_VECS_COLUMNS = ("id", "vec", "metadata")
_TEXTS = ("memory", "content", "text", "data")
_VECTORS = ("embedding", "vector", "vec")
_LIFECYCLE = ("archived_at", "deleted_at", "expires_at")
# What of a row is no field of a memory.
_UNREAD_TYPES = (*VECTOR_TYPES, "sparsevec", "tsvector")
_RELATED: tuple[tuple[Kind, str, str], ...] = (
    ("relationship", "relationship", "memory_relationships"),
    ("history", "history", "memory_history"),
    ("history", "mem0-history", "mem0_history"),
)


class VecsSource(PostgresSource):
    """
    A collection of `vecs`, which Mem0's `supabase` provider writes, and its entities where it has any.

    Args:
        dsn: A libpq URI or key/value string of a role that sees all rows; a secret.
        collection: As Mem0's `collection_name` says it.
    """

    name = "vecs"
    _schema = "vecs"

    def __init__(self, dsn: str, collection: str = "mem0") -> None:
        super().__init__(dsn)
        self._collection = collection

    def find_parts(self, connection: Connection) -> Sequence[Part]:
        """Find the collection and its entities; see `PostgresSource`."""
        memories = find_relation(connection, self._schema, self._collection)
        if memories is None:
            raise SourceDataError(
                f"schema `{self._schema}` has no collection `{self._collection}`",
                hint=collections_hint(connection, self._schema, _VECS_COLUMNS),
            )
        entities = find_relation(connection, self._schema, f"{self._collection}_entities")
        found = [payload_part(memories, "memory", _VECS_COLUMNS)]
        return [*found, payload_part(entities, "entity", _VECS_COLUMNS)] if entities is not None else found


class CanonicalTableSource(PostgresSource):
    """
    A canonical table of memories, and its relationships and history where they are there.

    Args:
        dsn: A libpq URI or key/value string of a role that sees all rows; a secret.
        table: With the memories.
        schema: Where the tables are.
    """

    name = "canonical"

    def __init__(self, dsn: str, table: str = "memories", *, schema: str = "public") -> None:
        super().__init__(dsn)
        self._table = table
        self._schema = schema

    def find_parts(self, connection: Connection) -> Sequence[Part]:
        """Find the tables; see `PostgresSource`."""
        memories = find_relation(connection, self._schema, self._table)
        if memories is None:
            names = list_relations(connection, self._schema, ("id", "memory"))
            listed = ", ".join(f"`{name}`" for name in names)
            raise SourceDataError(
                f"schema `{self._schema}` has no table `{self._table}`",
                hint=f"it has {listed}" if listed else "look into another database or schema",
            )
        found = [self._part(memories, "memory", "memory")]
        for kind, key, name in _RELATED:
            relation = find_relation(connection, self._schema, name)
            # A view of this name shows the changes of the other table once more.
            if relation is not None and (name != "mem0_history" or relation.kind in "rp"):
                found.append(self._part(relation, kind, key))
        return found

    def make_item(self, item: RawItem) -> RawItem:
        """Take the state of a memory out of its columns; see `PostgresSource`."""
        if item.kind != "memory":
            return item
        lifecycle = {name: str(item.data[name]) for name in _LIFECYCLE if item.data.get(name) is not None}
        data = {name: value for name, value in item.data.items() if name not in _LIFECYCLE}
        state = data.get("state")
        if state not in get_args(State):
            state = "deleted" if "deleted_at" in lifecycle else "archived" if "archived_at" in lifecycle else "active"
        return replace(item, data=data, state=cast("State", state), lifecycle=lifecycle)

    def _part(self, relation: Relation, kind: Kind, key: str) -> Part:
        if relation.find("id") is None:
            raise SourceDataError(f"`{relation.spelled}` has no column `id`")
        if kind == "memory":
            _check_text(relation)
        vector = _find_vector_column(relation) if kind == "memory" else None
        read = [
            column
            for column in relation.columns
            if column.name not in ("id", vector) and column.type_name not in _UNREAD_TYPES
        ]
        return Part(kind, key, relation, "id", vector, json_of_columns(read))


def _check_text(relation: Relation) -> None:
    if any(relation.find(name) for name in _TEXTS):
        return
    hint = "give the table that has the texts"
    if relation.find("payload"):
        hint = "it looks like a collection of Mem0's pgvector store: read it as such"
    raise SourceDataError(f"`{relation.spelled}` has none of the columns {', '.join(_TEXTS)}", hint=hint)


def _find_vector_column(relation: Relation) -> str | None:
    """Find the embeddings: the column of a usual name, else the only one of pgvector's types."""
    named = [name for name in _VECTORS if can_hold_vectors(relation.find(name))]
    typed = [column.name for column in relation.columns if column.type_name in VECTOR_TYPES]
    if named:
        return named[0]
    return typed[0] if len(typed) == 1 else None
