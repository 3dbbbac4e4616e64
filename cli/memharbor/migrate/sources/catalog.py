"""
What a PostgreSQL database has: its tables and views, their columns, and how a row of one is read as JSON or floats.

Names are looked up exactly, never through a `search_path`. Sources: PostgreSQL manual, System Catalogs; pgvector,
`vector_send` and `halfvec_send`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from memharbor.database import Connection
from memharbor.migrate.vector import Vector

VECTOR_TYPES = ("vector", "halfvec")
JSON_TYPES = ("json", "jsonb")
_ARRAY_TYPES = ("_float4", "_float8")


@dataclass(frozen=True)
class Column:
    """
    A column of a relation.

    Args:
        name: Its name.
        type: As PostgreSQL spells it in a cast, without a length.
        type_name: Bare name of the type, for instance `vector` or `_text`.
        modifier: `atttypmod`; of a vector its dimensions, or -1.
    """

    name: str
    type: str
    type_name: str
    modifier: int


@dataclass(frozen=True)
class Relation:
    """A table or view that is there."""

    oid: int
    schema: str
    name: str
    kind: str
    columns: tuple[Column, ...]

    @property
    def spelled(self) -> str:
        """Its name for a message."""
        return f"{self.schema}.{self.name}"

    @property
    def quoted(self) -> sql.Identifier:
        """Its name for a statement."""
        return sql.Identifier(self.schema, self.name)

    def find(self, name: str | None) -> Column | None:
        """Find a column by its name."""
        return next((column for column in self.columns if column.name == name), None)


def find_relation(connection: Connection, schema: str, name: str) -> Relation | None:
    """Find a table or view by its exact name."""
    found = connection.execute(
        "select c.oid, c.relkind from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = %s and c.relname = %s and c.relkind in ('r', 'p', 'v', 'm', 'f')",
        (schema, name),
    ).fetchone()
    if found is None:
        return None
    columns = connection.execute(
        "select a.attname, format_type(a.atttypid, null), t.typname, a.atttypmod from pg_attribute a"
        " join pg_type t on t.oid = a.atttypid where a.attrelid = %s and a.attnum > 0 and not a.attisdropped"
        " order by a.attnum",
        (found[0],),
    )
    return Relation(found[0], schema, name, str(found[1]), tuple(Column(*row) for row in columns))


def list_relations(connection: Connection, schema: str, columns: Sequence[str]) -> list[str]:
    """List the tables of a schema that have all these columns, for a hint."""
    rows = connection.execute(
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = %s and c.relkind in ('r', 'p') and %s::text[] <@ array(select a.attname::text"
        " from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) order by 1",
        (schema, list(columns)),
    )
    return [str(row[0]) for row in rows]


def json_column(name: str) -> sql.Composable:
    """Spell a column that holds the fields of a row as json or jsonb."""
    return sql.SQL("t.{}::text").format(sql.Identifier(name))


def json_of_columns(columns: Sequence[Column]) -> sql.Composable:
    """Spell the fields of a row from its columns: instants as ISO 8601 text in UTC, arrays as lists, json as it is."""
    listed = sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(column.name)) for column in columns)
    return sql.SQL("(select row_to_json(x) from (select {}) x)::text").format(listed)


def can_hold_vectors(column: Column | None) -> bool:
    """Tell a column whose values can be read as embeddings."""
    return column is not None and column.type_name in (*VECTOR_TYPES, *_ARRAY_TYPES)


def decode_vector(raw: bytes, type_name: str) -> Vector:
    """
    Read what pgvector sends for a vector or a halfvec: int16 count, int16 unused, then big-endian floats.

    >>> decode_vector(bytes.fromhex("00020000" "3f800000" "bf000000"), "vector")
    Vector.of((1.0, -0.5))
    >>> decode_vector(bytes.fromhex("00020000" "3c00" "b800"), "halfvec")
    Vector.of((1.0, -0.5))
    """
    if type_name == "halfvec":
        return Vector.of(struct.unpack_from(f">{int.from_bytes(raw[:2], 'big')}e", raw, 4))
    return Vector.from_big_endian(raw[4:])
