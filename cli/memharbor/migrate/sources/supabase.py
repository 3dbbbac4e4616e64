"""
Read what Mem0 and its users keep on Supabase: collections of `vecs`, and canonical tables of columns.

Canonical tables are those of the guides that put Mem0 onto Supabase: `memories` with `user_id`, `memory`, `metadata`,
`categories` and `embedding`, and beside it `memory_relationships` and `memory_history`. Columns may be missing, and others
may be there: they are read too. ChatSG's `mem0_memories` is such a table, with `mem0_history` beside it: its owners are
numbers of a table `users`, and where there was no pgvector its embeddings are lists in jsonb. Policies (`auth.uid()`) hide rows from every role but their owner's and those with
BYPASSRLS, so a role that would not see all is refused.
Sources: vecs 0.4, `vecs/collection.py`; mem0ai `mem0/vector_stores/supabase.py`; Supabase documentation, Postgres roles;
ChatSG `002_create_mem0_tables.sql` and `002_create_mem0_tables_safe.sql`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast, get_args

from psycopg import sql

from memharbor.database import Connection
from memharbor.errors import SourceDataError
from memharbor.migrate.record import Kind, RawItem, State
from memharbor.migrate.sources.catalog import (
    JSON_TYPES,
    VECTOR_TYPES,
    Relation,
    can_hold_vectors,
    find_relation,
    json_of_columns,
    list_relations,
)
from memharbor.migrate.sources.mem0_pgvector import collections_hint, payload_part
from memharbor.migrate.sources.postgres import Part, PostgresSource, check_key, check_row_security
from memharbor.migrate.sources.user_names import UsersFrom, find_user_column, shared_name_error

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
        users_from: What becomes the `user_id`: what stands there, or a column of table `users`.
    """

    name = "canonical"

    def __init__(
        self, dsn: str, table: str = "memories", *, schema: str = "public", users_from: UsersFrom = "id"
    ) -> None:
        super().__init__(dsn)
        self._table = table
        self._schema = schema
        self._users_from = users_from

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
        users, column = self._find_users(connection)
        found = [self._part(memories, "memory", "memory", users, column)]
        for kind, key, name in _RELATED:
            relation = find_relation(connection, self._schema, name)
            # A view of this name shows the changes of the other table once more.
            if relation is not None and (name != "mem0_history" or relation.kind in "rp"):
                found.append(self._part(relation, kind, key, users, column))
        counted = find_relation(connection, self._schema, "mem0_metadata")
        if self._table == "mem0_memories" and counted is not None:
            note = f"`{counted.spelled}` only counts the rows of `{self._table}` and is not read: they are counted here too"
            self.notes = (note,)
        return found

    def make_item(self, item: RawItem) -> RawItem:
        """Take the state of a memory out of its columns, and spell a user's number as text; see `PostgresSource`."""
        number = item.data.get("user_id")
        if isinstance(number, int) and not isinstance(number, bool):
            item = replace(item, data={**item.data, "user_id": str(number)})
        if item.kind != "memory":
            return item
        lifecycle = {name: str(item.data[name]) for name in _LIFECYCLE if item.data.get(name) is not None}
        data = {name: value for name, value in item.data.items() if name not in _LIFECYCLE}
        state = data.get("state")
        if state not in get_args(State):
            state = "deleted" if "deleted_at" in lifecycle else "archived" if "archived_at" in lifecycle else "active"
        return replace(item, data=data, state=cast("State", state), lifecycle=lifecycle)

    def _find_users(self, connection: Connection) -> tuple[Relation | None, str | None]:
        """Find the table and the column that name users, and refuse a name that two of them have."""
        if self._users_from == "id":
            return None, None
        users = find_relation(connection, self._schema, "users")
        columns = [column.name for column in users.columns] if users is not None else []
        place = f"schema {self._schema}"
        column = find_user_column(self._users_from, columns, place)
        if users is None or column is None:
            return None, None
        check_row_security(connection, users)
        check_key(connection, users, "id")
        query = sql.SQL(
            "select exists (select from {} u where u.{}::text <> '' group by u.{}::text having count(*) > 1)"
        )
        name = sql.Identifier(column)
        if connection.execute(query.format(users.quoted, name, name)).fetchone() == (True,):
            raise shared_name_error(place, column)
        return users, column

    def _part(self, relation: Relation, kind: Kind, key: str, users: Relation | None, user_column: str | None) -> Part:
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
        owner = None
        if users is not None and user_column is not None and relation.find("user_id"):
            owner = _owner_expression(relation, users, user_column)
        return Part(kind, key, relation, "id", vector, json_of_columns(read), owner)


def _owner_expression(relation: Relation, users: Relation, column: str) -> sql.Composable:
    """Spell what the user of a row is called; as texts where the two ids have different types."""
    ours, theirs = relation.find("user_id"), users.find("id")
    is_same = ours is not None and theirs is not None and ours.type == theirs.type
    comparison = sql.SQL("u.id = t.user_id" if is_same else "u.id::text = t.user_id::text")
    return sql.SQL("(select u.{}::text from {} u where {})").format(sql.Identifier(column), users.quoted, comparison)


def _check_text(relation: Relation) -> None:
    if any(relation.find(name) for name in _TEXTS):
        return
    hint = "give the table that has the texts"
    if relation.find("payload"):
        hint = "it looks like a collection of Mem0's pgvector store: read it as such"
    raise SourceDataError(f"`{relation.spelled}` has none of the columns {', '.join(_TEXTS)}", hint=hint)


def _find_vector_column(relation: Relation) -> str | None:
    """Find the embeddings: the column of a usual name, else the only one of pgvector's types; else a list in JSON."""
    named = [name for name in _VECTORS if can_hold_vectors(relation.find(name))]
    typed = [column.name for column in relation.columns if column.type_name in VECTOR_TYPES]
    if named or len(typed) == 1:
        return named[0] if named else typed[0]
    columns = map(relation.find, _VECTORS)
    return next((column.name for column in columns if column and column.type_name in JSON_TYPES), None)
