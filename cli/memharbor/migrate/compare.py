"""
Compare: what a run carried with what the database has, or two databases with each other; to the bit of every vector.

Two databases are compared by checksums of buckets of ids, which are divided until the rows are few that differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memharbor.backup.rows import DatabaseRows
from memharbor.backup.selection import DIGEST_SETTINGS, read_tables
from memharbor.database import Connection, translated_errors
from memharbor.errors import SourceDataError

# Named in a report at most; the counts are of all.
NAMED_MAX = 1000
# A bucket of so few rows is compared row by row.
_ROWS_MAX = 200
_DIGITS_MAX = 32


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


def compare_databases(first: Connection, second: Connection) -> Iterator[Difference]:
    """
    Compare memories, entities and relationships of two databases.

    Args:
        first: One, as an administrator who sees all rows; in autocommit.
        second: The other.

    Raises:
        SourceDataError: Their tables have other columns.
        DatabaseError: A query was refused.
    """
    with translated_errors("comparing"), _Snapshot(first), _Snapshot(second):
        mine = {table.name: table for table in read_tables(DatabaseRows(first))}
        theirs = {table.name: table for table in read_tables(DatabaseRows(second))}
        for name in ("memories", "entities", "memory_relationships"):
            if name not in mine or name not in theirs:
                continue
            columns = [column.name for column in mine[name].columns]
            if columns != [column.name for column in theirs[name].columns]:
                raise SourceDataError(
                    f"table `{name}` has other columns in the two databases", hint="roll both out by the same version"
                )
            digests = (mine[name].digest_of("t"), theirs[name].digest_of("t"))
            yield from _Tables(first, second, name, digests, columns).differences("")


class _Snapshot:
    """One snapshot for everything that is read, with settings by which both sides spell values alike."""

    def __init__(self, connection: Connection) -> None:
        self._transaction = connection.transaction()
        self._connection = connection

    def __enter__(self) -> None:
        self._transaction.__enter__()
        self._connection.execute("set transaction isolation level repeatable read, read only")
        self._connection.execute("set local statement_timeout = 0")
        for name, value in DIGEST_SETTINGS.items():
            self._connection.execute("select pg_catalog.set_config(%s, %s, true)", (name, value))

    def __exit__(self, *exc: Any) -> None:
        self._transaction.__exit__(*exc)


@dataclass(frozen=True)
class _Tables:
    """One table on both sides."""

    first: Connection
    second: Connection
    name: str
    digests: tuple[str, str]
    columns: list[str]

    def differences(self, prefix: str) -> Iterator[Difference]:
        mine, theirs = self._buckets(self.first, 0, prefix), self._buckets(self.second, 1, prefix)
        for bucket in sorted(mine.keys() | theirs.keys()):
            left, right = mine.get(bucket), theirs.get(bucket)
            if left == right:
                continue
            if max(left[0] if left else 0, right[0] if right else 0) <= _ROWS_MAX or len(bucket) >= _DIGITS_MAX:
                yield from self._rows(bucket)
            else:
                yield from self.differences(bucket)

    def _buckets(self, connection: Connection, side: int, prefix: str) -> dict[str, tuple[int, bytes]]:
        """Count and digest the rows by the next two hexadecimal digits of their ids."""
        digits = len(prefix) + 2
        query = (
            f"select substr(replace(t.id::text, '-', ''), 1, {digits}) as bucket, count(*),"
            f" sha256(string_agg({self.digests[side]}, ''::bytea order by t.id))"
            f" from memharbor.{self.name} t where {_range(prefix)} group by 1"
        )
        return {row[0]: (row[1], row[2]) for row in connection.execute(query.encode()).fetchall()}

    def _rows(self, bucket: str) -> Iterator[Difference]:
        left, right = self._row_digests(self.first, 0, bucket), self._row_digests(self.second, 1, bucket)
        for row_id in sorted(left.keys() | right.keys()):
            if row_id not in right:
                yield Difference(self.name, row_id, "missing")
            elif row_id not in left:
                yield Difference(self.name, row_id, "extra")
            elif left[row_id] != right[row_id]:
                yield Difference(self.name, row_id, "different", self._columns(row_id))

    def _row_digests(self, connection: Connection, side: int, bucket: str) -> dict[str, bytes]:
        query = f"select t.id::text, {self.digests[side]} from memharbor.{self.name} t where {_range(bucket)}"
        return dict(connection.execute(query.encode()).fetchall())

    def _columns(self, row_id: str) -> tuple[str, ...]:
        selected = ", ".join(f't."{column}"::text' for column in self.columns)
        query = f"select {selected} from memharbor.{self.name} t where t.id = %s".encode()
        left = self.first.execute(query, (row_id,)).fetchone() or ()
        right = self.second.execute(query, (row_id,)).fetchone() or ()
        found = tuple(column for column, mine, theirs in zip(self.columns, left, right, strict=True) if mine != theirs)
        # Only the bits of an embedding can differ where all of its digits are the same.
        return found or ("embedding",)


def _range(prefix: str) -> str:
    """Say which ids begin with hexadecimal digits, so that the primary key finds them."""
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
