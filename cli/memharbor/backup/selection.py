"""
Which rows of which table a logical backup holds, and how a row is digested, as SQL.

A row's digest is the one of `memharbor.fingerprint_users()` (`sql_templates/repeatable/45_fingerprints.sql`; a test
compares them), so that a choice of rows, a staged copy and a whole database can be compared with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from memharbor.backup.rows import Fingerprint, RowSource
from memharbor.backup.tables import SCHEMA, SHARED_TABLES, USER_TABLES
from memharbor.errors import StateRefusedError
from memharbor.templates import ident, literal

# How a digest's text is written; `fingerprint_users()` sets the same.
DIGEST_SETTINGS = {
    "timezone": "UTC",
    "datestyle": "ISO, MDY",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "search_path": "",
    "statement_timeout": "0",
    "lock_timeout": "10s",
}
_VECTOR_TYPES = ("vector", "halfvec")


@dataclass(frozen=True)
class TableColumn:
    """A column of a table, as the catalog has it; `send` is the function that sends an embedding's bits, or empty."""

    name: str
    type: str
    send: str = ""


@dataclass(frozen=True)
class Table:
    """
    A table that can be backed up.

    Args:
        name: In schema `memharbor`.
        key: Columns that identify a row.
        columns: All of its columns, in the catalog's order.
        owner: SQL expression of the owner over its columns; `null::text` for what is shared.
        identity: The column that the database numbers itself.
    """

    name: str
    key: tuple[str, ...]
    columns: tuple[TableColumn, ...]
    owner: str
    identity: str | None = None

    @property
    def is_shared(self) -> bool:
        """Whether its rows are nobody's in particular."""
        return self.name in SHARED_TABLES

    @property
    def relation(self) -> str:
        """Its qualified name, as SQL."""
        return f"{SCHEMA}.{ident(self.name)}"

    @property
    def column_list(self) -> str:
        """All of its columns, as SQL."""
        return ", ".join(ident(column.name) for column in self.columns)

    def key_of(self, alias: str) -> str:
        """Spell the key of an alias as a list, as SQL."""
        return ", ".join(f"{alias}.{ident(column)}" for column in self.key)

    def owner_of(self, alias: str) -> str:
        """Spell the owner of an alias's row, as SQL."""
        return (
            self.owner.replace("user_id", f"{alias}.user_id", 1)
            if self.owner == "user_id"
            else (self.owner.replace("payload", f"{alias}.payload"))
        )

    def digest_of(self, alias: str) -> str:
        """Spell the digest of an alias's row, as SQL: text of what is no embedding, bits of what is one."""
        plain = ", ".join(
            f"{alias}.{ident(column.name)}"
            for column in self.columns
            if not column.send and column.name != self.identity
        )
        sends = "".join(
            f" || coalesce({each.send}({alias}.{ident(each.name)}), '')" for each in self.columns if each.send
        )
        return f"sha256(convert_to(row({plain})::text, 'UTF8'){sends})"


@dataclass(frozen=True)
class Choice:
    """
    Which rows are wanted; all of them where nothing is said.

    Args:
        user_id: Only this user's.
        from_at: Only from this instant on.
        to_at: Only before this instant.
    """

    user_id: str | None = None
    from_at: datetime | None = None
    to_at: datetime | None = None

    def query(self, table: Table) -> str:
        """Spell the rows of a table that are wanted as a query with the table's columns."""
        conditions = [*self._of_user(table), *self._of_time(table)]
        where = f" where {' and '.join(conditions)}" if conditions else ""
        return f"select {table.column_list} from {table.relation} t{where}"

    def _of_user(self, table: Table) -> list[str]:
        if self.user_id is None:
            return []
        user = literal(self.user_id)
        mine = f"(select m.id from {SCHEMA}.memories m where m.user_id = {user})"
        # Rows of nobody that hang on a memory of the user go when it goes.
        return {
            "memory_relationships": [f"(t.user_id = {user} or (t.user_id is null and t.source_memory_id in {mine}))"],
            "memory_categories": [f"(t.user_id = {user} or (t.user_id is null and t.memory_id in {mine}))"],
            "categories": [
                f"t.id in (select c.category_id from {SCHEMA}.memory_categories c"
                f" where c.user_id = {user} or (c.user_id is null and c.memory_id in {mine}))"
            ],
            "configs": ["false"],
        }.get(table.name, [f"{table.owner_of('t')} = {user}"])

    def _of_time(self, table: Table) -> list[str]:
        if self.from_at is None and self.to_at is None:
            return []

        def between(column: str) -> str:
            bounds = [f"{column} >= {literal(self.from_at.isoformat())}::timestamptz"] if self.from_at else []
            bounds += [f"{column} < {literal(self.to_at.isoformat())}::timestamptz"] if self.to_at else []
            return " and ".join(bounds)

        chosen = f"(select m.id from {SCHEMA}.memories m where {between('m.created_at')})"
        linked = "case when jsonb_typeof(e.payload -> 'linked_memory_ids') = 'array' then e.payload -> 'linked_memory_ids' else '[]' end"
        return {
            "memories": [between("t.created_at")],
            "entities": [
                f"t.id in (select e.id from {SCHEMA}.entities e cross join jsonb_array_elements_text({linked}) as link(memory_id)"
                f" where link.memory_id in (select id::text from {chosen} as chosen))"
            ],
            "memory_relationships": [f"t.source_memory_id in {chosen}", f"t.target_memory_id in {chosen}"],
            "memory_categories": [f"t.memory_id in {chosen}"],
            "memory_history": [between("t.changed_at")],
            "org_members": [between("t.created_at")],
            "configs": ["false"],
        }.get(table.name, [])


def read_tables(source: RowSource) -> list[Table]:
    """
    Read which of the tables a database has, and their columns; in the order in which rows can be inserted.

    Raises:
        StateRefusedError: The schema is not there.
    """
    owners = {table.name: (table.owner, table.key, table.identity) for table in USER_TABLES}
    # What others refer to stands first.
    order = [*SHARED_TABLES, *owners]
    rows = source.query(
        "select c.relname, a.attname, format_type(a.atttypid, a.atttypmod), n.nspname, y.typname"
        " from pg_catalog.pg_attribute a"
        " join pg_catalog.pg_class c on c.oid = a.attrelid"
        " join pg_catalog.pg_type y on y.oid = a.atttypid"
        " join pg_catalog.pg_namespace n on n.oid = y.typnamespace"
        f" where c.relnamespace = to_regnamespace({literal(SCHEMA)}) and c.relkind = 'r'"
        f" and c.relname in ({', '.join(map(literal, order))}) and a.attnum > 0 and not a.attisdropped"
        " order by c.relname, a.attnum"
    )
    columns: dict[str, list[TableColumn]] = {}
    for table, column, type_text, type_schema, type_name in rows:
        send = f"{ident(str(type_schema))}.{type_name}_send" if type_name in _VECTOR_TYPES else ""
        # A reader of the backup has pgvector where they have it.
        spelled = str(type_text).rpartition(".")[2] if send else str(type_text)
        columns.setdefault(str(table), []).append(TableColumn(str(column), spelled, send))
    if "memories" not in columns:
        raise StateRefusedError("the database has no schema of Memharbor", hint="run `memharbor schema apply`")
    found = []
    for name in order:
        if name in columns:
            owner, key, identity = owners.get(name, ("null::text", ("id",), None))
            found.append(Table(name, key, tuple(columns[name]), owner, identity))
    return found


def fingerprint_rows(source: RowSource, queries: Sequence[tuple[Table, str]]) -> list[Fingerprint]:
    """
    Fingerprint the rows of queries, by user and table, sorted.

    Args:
        source: Where they are run; the settings of its session must be `DIGEST_SETTINGS`.
        queries: A table and a query with the table's columns, each.
    """
    found = []
    for table, query in queries:
        rows = source.query(
            "select coalesce(encode(sha256(convert_to(owner, 'UTF8')), 'hex'), ''), count(*),"
            " encode(sha256(string_agg(digest, '' order by digest)), 'hex')"
            f" from (select {table.owner_of('r')} as owner, {table.digest_of('r')} as digest from ({query}) r) hashed"
            " group by owner"
        )
        found += [Fingerprint(str(row[0]), table.name, int(row[1] or 0), str(row[2])) for row in rows]
    return sorted(found, key=lambda each: (each.user_sha256, each.table))
