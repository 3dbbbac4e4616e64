"""
Compare: what a run carried with what the database has, or two databases with each other; to the bit of every vector.

Two databases are compared by checksums of buckets of ids, which are divided until the rows are few that differ. What is
compared is every column of memories, entities and relationships. The audit trail is not: the database numbers and dates
its rows itself, so that the same memories have another one wherever they were loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from memharbor.backup.access import qualified
from memharbor.backup.logical import snapshot
from memharbor.backup.rows import DatabaseRows
from memharbor.backup.selection import Table, TableColumn, read_tables
from memharbor.backup.tables import SCHEMA
from memharbor.database import Connection, redact_dsn
from memharbor.errors import SourceDataError, StateRefusedError, UsageError
from memharbor.names import ROLES
from memharbor.templates import ident

TABLES = ("memories", "entities", "memory_relationships")
# Named in a report at most; the counts are of all.
NAMED_MAX = 1000
# A bucket of so few rows is compared row by row.
_ROWS_MAX = 5000
# How many rows there are, and their digest, by the first digits of their ids.
_Buckets = dict[str, tuple[int, bytes]]

# A policy that lets the role see everything, and no other one that takes some of it away again.
_HIDING_TABLES = """
    select c.relname from pg_catalog.pg_class c
    where c.relnamespace = pg_catalog.to_regnamespace(%s) and c.relname = any (%s)
      and pg_catalog.row_security_active(c.oid)
      and not coalesce((
        select bool_or(p.polpermissive and e.is_open) and bool_and(p.polpermissive or e.is_open)
        from pg_catalog.pg_policy p
        cross join lateral (select pg_catalog.pg_get_expr(p.polqual, p.polrelid) = 'true' as is_open) e
        where p.polrelid = c.oid and p.polcmd in ('*', 'r') and exists (
          select from unnest(p.polroles) as r (id) where r.id = 0 or pg_catalog.pg_has_role(current_user, r.id, 'usage')
        )
      ), false)
    order by 1
"""
# A server that was copied has another moment of its start, also where both have the same name and number.
_WHICH_DATABASE = """
    select pg_catalog.pg_postmaster_start_time(), oid
    from pg_catalog.pg_database where datname = pg_catalog.current_database()
"""


@dataclass(frozen=True)
class Difference:
    """
    One row that differs.

    Args:
        table: Where.
        id: Its id.
        what: `missing` in the second, `extra` there, or `different`.
        columns: Which columns differ; empty where it is there only once.
    """

    table: str
    id: str
    what: str
    columns: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return {"table": self.table, "id": self.id, "what": self.what, "columns": list(self.columns)}


def compare_databases(first: Connection, second: Connection) -> dict[str, Any]:
    """
    Compare memories, entities and relationships of two databases, each as of one instant.

    Args:
        first: One, as its administrator, who may act as the service role; in autocommit.
        second: The other.

    Returns:
        What `summarise` gives, and `compared`: how many rows of each table were seen, of the first and of the second.

    Raises:
        UsageError: Both are the same database.
        StateRefusedError: One has no schema of ours, or its policies would hide rows.
        SourceDataError: Their tables have other columns.
        DatabaseError: A query was refused.
    """
    with _all_rows(first) as mine, _all_rows(second) as theirs:
        if first.execute(_WHICH_DATABASE).fetchone() == second.execute(_WHICH_DATABASE).fetchone():
            raise UsageError("both are the same database", hint="name another stack by `--with`")
        left, right = ({table.name: table for table in read_tables(rows)} for rows in (mine, theirs))
        compared: dict[str, list[int]] = {}
        return {**summarise(_differences((first, left), (second, right), compared)), "compared": compared}


@contextmanager
def _all_rows(connection: Connection) -> Iterator[DatabaseRows]:
    """Lend a snapshot with all rows: as an administrator whom row level security binds, one would see none."""
    with snapshot(connection) as rows:
        connection.execute("set transaction read only")
        connection.execute("select pg_catalog.set_config('role', %s, true)", (ROLES["service"],))
        hiding = [name for (name,) in connection.execute(_HIDING_TABLES, (SCHEMA, list(TABLES))).fetchall()]
        if hiding:
            raise StateRefusedError(
                f"row level security would hide rows of `{'`, `'.join(hiding)}` in {redact_dsn(connection.info.dsn)}",
                hint="run `memharbor schema apply` there",
            )
        yield rows


def _differences(
    first: tuple[Connection, Mapping[str, Table]],
    second: tuple[Connection, Mapping[str, Table]],
    compared: dict[str, list[int]],
) -> Iterator[Difference]:
    for name in TABLES:
        left, right = (_Side(connection, tables.get(name)) for connection, tables in (first, second))
        if left.table is not None and right.table is not None:
            _refuse_other_columns(name, left.table.columns, right.table.columns)
        pair = _Pair(name, left, right)
        buckets = pair.buckets("")
        compared[name] = [sum(count for count, _ in side.values()) for side in buckets]
        yield from pair.differences(buckets)


def _refuse_other_columns(name: str, first: Sequence[TableColumn], second: Sequence[TableColumn]) -> None:
    mine, theirs = ({column.name: column.type for column in side} for side in (first, second))
    if list(mine.items()) == list(theirs.items()):
        return
    other = [column for column in {**mine, **theirs} if mine.get(column) != theirs.get(column)]
    named = ", ".join(f"`{each}` is {mine.get(each, 'absent')} and {theirs.get(each, 'absent')}" for each in other)
    raise SourceDataError(
        f"table `{name}` has other columns in the two databases: {named or 'their order'}",
        hint="roll both out by the same version, with the same `embedding_dims` and `embedding_type`",
    )


@dataclass(frozen=True)
class _Side:
    """One table in one database; where the roll-out left the table out, it has no rows."""

    connection: Connection
    table: Table | None

    def ends(self, prefix: str) -> list[str]:
        """Read the digits of the least and the greatest id."""
        query = "select t.id::text from {relation} t where {range} order by t.id {order} limit 1"
        found = [row for order in ("asc", "desc") for row in self._read(query, prefix, order=order)]
        return [_digits(row_id) for (row_id,) in found]

    def buckets(self, prefix: str, digits: int) -> _Buckets:
        """Count and digest the rows by so many first digits of their ids."""
        # Digested behind a fence, so that what is put in order are digests and not whole rows.
        query = (
            "select d.bucket, count(*), sha256(string_agg(d.digest, ''::bytea order by d.id))"
            " from (select t.id, substr(replace(t.id::text, '-', ''), 1, {digits}) as bucket, {digest} as digest"
            " from {relation} t where {range} offset 0) d group by d.bucket"
        )
        return {row[0]: (row[1], row[2]) for row in self._read(query, prefix, digits=str(digits))}

    def rows(self, prefix: str) -> dict[str, bytes]:
        return dict(self._read("select t.id::text, {digest} from {relation} t where {range}", prefix))

    def columns(self, ids: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """Digest each column of rows; the bits of what is an embedding."""
        columns = self.table.columns if self.table else ()
        sent = (
            f"{each.send}(t.{ident(each.name)})" if each.send else f"convert_to(t.{ident(each.name)}::text, 'UTF8')"
            for each in columns
        )
        query = f"select t.id::text, {', '.join(f'sha256({each})' for each in sent)} from {{relation}} t"
        return {row[0]: row[1:] for row in self._read(f"{query} where t.id = any (%s::uuid[])", ids=ids)}

    def _read(self, query: str, prefix: str = "", *, ids: Sequence[str] | None = None, **parts: str) -> list[Any]:
        if self.table is None:
            return []
        known = {"relation": qualified(self.table.name), "digest": self.table.digest_of("t"), "range": _range(prefix)}
        statement = query.format(**known, **parts).encode()
        return self.connection.execute(statement, None if ids is None else (list(ids),), binary=True).fetchall()


@dataclass(frozen=True)
class _Pair:
    """One table on both sides."""

    name: str
    first: _Side
    second: _Side

    def buckets(self, prefix: str) -> tuple[_Buckets, _Buckets]:
        # Ids that a clock or a counter made have many digits in common, which would divide nothing.
        digits = len(commonprefix([*self.first.ends(prefix), *self.second.ends(prefix)])) + 2
        return self.first.buckets(prefix, digits), self.second.buckets(prefix, digits)

    def differences(self, buckets: tuple[_Buckets, _Buckets]) -> Iterator[Difference]:
        mine, theirs = buckets
        for bucket in sorted(mine.keys() | theirs.keys()):
            left, right = mine.get(bucket, (0, b"")), theirs.get(bucket, (0, b""))
            if left == right:
                continue
            if max(left[0], right[0]) <= _ROWS_MAX:
                yield from self._rows(bucket)
            else:
                yield from self.differences(self.buckets(bucket))

    def _rows(self, bucket: str) -> Iterator[Difference]:
        left, right = self.first.rows(bucket), self.second.rows(bucket)
        changed = [row_id for row_id in left.keys() & right.keys() if left[row_id] != right[row_id]]
        mine, theirs = self.first.columns(changed), self.second.columns(changed)
        for row_id in sorted(left.keys() | right.keys()):
            if row_id not in right:
                yield Difference(self.name, row_id, "missing")
            elif row_id not in left:
                yield Difference(self.name, row_id, "extra")
            elif row_id in mine:
                yield Difference(self.name, row_id, "different", self._other(mine[row_id], theirs[row_id]))

    def _other(self, mine: Sequence[Any], theirs: Sequence[Any]) -> tuple[str, ...]:
        columns = self.first.table.columns if self.first.table else ()
        return tuple(column.name for column, one, other in zip(columns, mine, theirs, strict=True) if one != other)


def _digits(row_id: str) -> str:
    return row_id.replace("-", "")


def _range(prefix: str) -> str:
    """
    Say which ids begin with hexadecimal digits, so that the primary key finds them.

    >>> _range("")
    'true'
    """
    if not prefix:
        return "true"
    low, high = prefix.ljust(32, "0"), prefix.ljust(32, "f")
    return f"t.id between '{low}'::uuid and '{high}'::uuid"


def summarise(differences: Iterator[Difference]) -> dict[str, Any]:
    """
    Count differences, and name the first of them.

    Returns:
        `missing`, `extra`, `different`: how many; `rows`: the first ones.
    """
    counts: dict[str, int] = {"missing": 0, "extra": 0, "different": 0}
    named: list[Mapping[str, Any]] = []
    for each in differences:
        counts[each.what] += 1
        if len(named) < NAMED_MAX:
            named.append(each.as_data())
    return {**counts, "rows": named}
