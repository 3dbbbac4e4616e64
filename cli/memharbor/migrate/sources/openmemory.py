"""
Memories of OpenMemory: its SQLite database, or the zips that its export writes, one for each user.

A memory's owner is the user's external id. Its app becomes `app` and `source_app` of the metadata, its categories stay
categories. How often and when it was last read becomes `access_count` and `last_accessed_at` of the metadata: the log itself
has no place in Memharbor and is many times larger than the memories, but which ones were of use can be asked for again.
`configs` is never read, since it holds keys. Its instants are UTC without saying so. Source: openmemory `api/app/models.py`.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from memharbor.errors import SourceDataError
from memharbor.migrate.record import RawItem, Refusal, SourceInfo
from memharbor.migrate.sources.json_stream import digest_file
from memharbor.migrate.sources.json_values import Problem
from memharbor.migrate.sources.openmemory_item import Change, Memory, change_item, memory_item, refuse
from memharbor.migrate.sources.openmemory_vectors import Vectors, VectorStore
from memharbor.migrate.sources.openmemory_zip import read_zip
from memharbor.migrate.sources.qdrant_points import canonical_id
from memharbor.migrate.sources.sqlite_rows import (
    count_rows,
    digest_rows,
    find_tables,
    json_column,
    kept_row,
    opened,
    plain_row,
    plain_value,
    read_pages,
)

# What is read, and nothing else: the identity is made of these too.
_NEEDED = ("memories", "users", "apps")
_OPTIONAL = ("categories", "memory_categories", "memory_status_history", "memory_access_logs")
_MEMORIES = """
    select m.rowid, m.id, u.user_id as owner, m.user_id, a.name as app, m.content, m.metadata, m.state,
      m.created_at, m.updated_at, m.archived_at, m.deleted_at
    from memories m left join users u on u.id = m.user_id left join apps a on a.id = m.app_id
    where m.rowid > :after order by m.rowid limit :page
"""
_MEMORY_COLUMNS = (
    *("id", "owner", "user_id", "app", "content", "metadata", "state"),
    *("created_at", "updated_at", "archived_at", "deleted_at"),
)
_CHANGES = """
    select h.rowid, h.id, h.memory_id, m.id as known, u.user_id as owner, h.changed_by, c.user_id as changer,
      h.old_state, h.new_state, h.changed_at
    from memory_status_history h left join memories m on m.id = h.memory_id
      left join users u on u.id = m.user_id left join users c on c.id = h.changed_by
    where h.rowid > :after order by h.rowid limit :page
"""
_CHANGE_COLUMNS = (
    *("id", "memory_id", "known", "owner", "changed_by", "changer"),
    *("old_state", "new_state", "changed_at"),
)


class OpenMemorySource:
    """
    One database of OpenMemory's, or some of its export zips.

    Args:
        paths: The database, or one or several zips.
        vectors: Where its embeddings are, if they are to be carried: an export of Qdrant's points, see `qdrant_points`, or
            a table, see `openmemory_pgvector`.
    """

    def __init__(self, paths: Path | Sequence[Path], vectors: VectorStore | None = None) -> None:
        self._paths = (paths,) if isinstance(paths, Path) else tuple(paths)
        self._vectors = vectors

    def describe(self) -> SourceInfo:
        """Say what there is; reads every row once, for the identity. See `Source`."""
        counts: dict[str, int] = {}
        if self._is_database():
            with opened(self._paths[0]) as connection:
                tables = self._tables(connection)
                counts["memory"] = count_rows(connection, "memories")
                if "memory_status_history" in tables:
                    counts["history"] = count_rows(connection, "memory_status_history")
                identity = f"sha256 {digest_rows(connection, tables)}"
        else:
            for path in self._paths:
                next(read_zip(path, None, 0), None)
            identity = (
                f"sha256 {hashlib.sha256(repr([digest_file(path) for path in self._paths]).encode()).hexdigest()}"
            )
        dims = None
        if self._vectors is not None:
            store, dims = self._vectors.describe()
            identity += f", vectors {store}"
        size = sum(path.stat().st_size for path in self._paths)
        return SourceInfo("openmemory", identity, counts, dims, size)

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """Read every memory and then every change of a state, zip after zip; see `Source`."""
        is_database = self._is_database()
        with nullcontext() if self._vectors is None else self._vectors.lend() as vectors:
            if is_database:
                yield from self._read_database(after, vectors)
                return
            begin, number = _read_zip_position(after, len(self._paths))
            for at, path in enumerate(self._paths):
                if at >= begin:
                    yield from read_zip(path, vectors, number if at == begin else 0, prefix=f"zip {at} ")

    def _is_database(self) -> bool:
        kinds = {_is_zip(path) for path in self._paths}
        if kinds == {True}:
            return False
        if kinds == {False} and len(self._paths) == 1:
            return True
        raise SourceDataError(
            "several files of OpenMemory's must all be zips of its export", hint="migrate a database on its own"
        )

    def _tables(self, connection: sqlite3.Connection) -> dict[str, tuple[str, ...]]:
        found = find_tables(connection)
        if not set(_NEEDED) <= set(found) or "content" not in found["memories"]:
            listed = ", ".join(f"`{table}`" for table in list(found)[:20]) or "none at all"
            raise SourceDataError(
                f"`{self._paths[0]}` is no database of OpenMemory's; its tables are {listed}",
                hint="OpenMemory keeps it at `/usr/src/openmemory/openmemory.db` of its container",
            )
        return {table: found[table] for table in (*_NEEDED, *_OPTIONAL) if table in found}

    def _read_database(self, after: str | None, vectors: Vectors | None) -> Iterator[RawItem | Refusal]:
        table, rowid = _read_position(after)
        with opened(self._paths[0]) as connection:
            tables = self._tables(connection)
            if table == "memories":
                for page in read_pages(connection, _MEMORIES, rowid):
                    rows = [(number, dict(zip(_MEMORY_COLUMNS, values, strict=True))) for number, values in page]
                    extras = _Extras(connection, tables, [row["id"] for _, row in rows])
                    found = {} if vectors is None else vectors.find_many([*_ids(row for _, row in rows)])
                    for number, row in rows:
                        yield _memory(row, extras, found, f"memories {number}")
            if "memory_status_history" in tables:
                begin = rowid if table == "memory_status_history" else None
                for page in read_pages(connection, _CHANGES, begin):
                    for number, values in page:
                        row = dict(zip(_CHANGE_COLUMNS, values, strict=True))
                        yield _change(row, f"memory_status_history {number}")


class _Extras:
    """What other tables say of the memories of a page, by their ids as the database has them."""

    def __init__(self, connection: sqlite3.Connection, tables: Mapping[str, Any], ids: list[Any]) -> None:
        # Ids are texts there; as bytes they would be compared with blobs.
        plain = [each.decode("utf-8", "replace") if isinstance(each, bytes) else each for each in ids]
        marks = ", ".join("?" * len(plain))
        self.categories: dict[Any, list[Any]] = {}
        self.accesses: dict[Any, tuple[int, Any]] = {}
        if {"categories", "memory_categories"} <= set(tables):
            # Nothing but question marks is put in.
            statement = f"""
                select l.memory_id, c.name from memory_categories l join categories c on c.id = l.category_id
                where l.memory_id in ({marks}) order by l.memory_id, c.name
            """  # noqa: S608
            for memory_id, name in connection.execute(statement, plain):
                self.categories.setdefault(memory_id, []).append(name)
        if "memory_access_logs" in tables:
            statement = f"""
                select memory_id, count(*), max(accessed_at) from memory_access_logs
                where memory_id in ({marks}) group by memory_id
            """  # noqa: S608
            self.accesses = {row[0]: (row[1], row[2]) for row in connection.execute(statement, plain)}


def _ids(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    plain = (plain_value(row["id"]) for row in rows)
    return (canonical_id(each) for each in plain if each is not None and not isinstance(each, Problem))


def _memory(
    row: dict[str, Any], extras: _Extras, vectors: Mapping[str, Sequence[float] | Problem], position: str
) -> RawItem | Refusal:
    metadata = json_column("metadata", row["metadata"])
    count, last = extras.accesses.get(row["id"], (0, None))
    names = {f"category {at}": name for at, name in enumerate(extras.categories.get(row["id"], ()))}
    plain = plain_row(
        {**{column: value for column, value in row.items() if column != "metadata"}, **names, "last": last}
    )
    for problem in (plain, metadata):
        if isinstance(problem, Problem):
            return refuse(problem, "memory", canonical_id(kept_row({"id": row["id"]})["id"]), kept_row(row), position)
    assert not isinstance(plain, Problem)  # noqa: S101 - returned above
    assert not isinstance(metadata, Problem)  # noqa: S101 - returned above
    accesses = {"access_count": count, "last_accessed_at": plain["last"]} if count else {}
    memory = Memory(
        {**plain, "metadata": metadata}, plain["owner"], plain["app"], [plain[name] for name in names], accesses
    )
    return memory_item(memory, vectors, position)


def _change(row: dict[str, Any], position: str) -> RawItem | Refusal:
    plain = plain_row(row)
    if isinstance(plain, Problem):
        return refuse(plain, "history", canonical_id(kept_row({"id": row["id"]})["id"]), kept_row(row), position)
    return change_item(Change(plain, plain["owner"], plain["changer"], plain["known"] is not None), position)


def _is_zip(path: Path) -> bool:
    if not path.is_file():
        raise SourceDataError(f"`{path}` is no file", hint=f"look with `ls -l {path.parent}`")
    with path.open("rb") as file:
        return file.read(4)[:2] == b"PK"


def _read_position(after: str | None) -> tuple[str, int | None]:
    if after is None:
        return "memories", None
    table, _, rowid = after.partition(" ")
    if table not in ("memories", "memory_status_history") or not rowid.removeprefix("-").isdecimal():
        raise SourceDataError(f"`{after}` is no position in OpenMemory", hint="begin anew, with another work folder")
    return table, int(rowid)


def _read_zip_position(after: str | None, count: int) -> tuple[int, int]:
    if after is None:
        return 0, 0
    word, *numbers = after.split(" ")
    if word != "zip" or len(numbers) != 2 or not all(map(str.isdecimal, numbers)) or int(numbers[0]) >= count:
        raise SourceDataError(f"`{after}` is no position in these zips", hint="begin anew, with another work folder")
    return int(numbers[0]), int(numbers[1])
