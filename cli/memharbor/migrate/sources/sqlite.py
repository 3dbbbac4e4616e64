"""
Memories of SQLite files: the TypeScript SDK's vectors, Mem0's own history, and ChatSG's tables.

Which of them a file is, its tables say. ChatSG's `mem0_metadata` only counts the rows of `mem0_memories` and is not read:
Memharbor counts them itself. `memharbor_memories` and `memharbor_history` are what `memharbor migrate export --to sqlite`
found no place for in ChatSG's. Sources: mem0ai `mem0/memory/storage.py`; mem0-ts `vector_stores/memory.ts` and
`storage/SQLiteManager.ts`; ChatSG `002_create_mem0_tables.sql`.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memharbor.errors import SourceDataError
from memharbor.migrate.record import Kind, RawItem, Refusal, SourceInfo
from memharbor.migrate.sources.json_values import Problem, id_text
from memharbor.migrate.sources.sqlite_rows import (
    count_rows,
    digest_rows,
    find_tables,
    json_column,
    kept_row,
    opened,
    plain_row,
    plain_value,
    quoted,
    read_pages,
    select_rows,
    vector_column,
)
from memharbor.migrate.sources.user_names import UsersFrom, find_user_column, nameless_user, shared_name_error
from memharbor.migrate.targets.sqlite import LIFECYCLE, unwrap

# Each with the columns that tell it from another program's table of that name.
_VECTORS = {"vectors": {"id", "vector", "payload"}}
_HISTORY = {
    "history": {"memory_id", "old_memory", "new_memory", "event"},
    "messages": {"session_scope", "role", "content"},
    "memory_history": {"memory_id", "previous_value", "new_value", "action"},
}
_CHATSG = {
    "mem0_memories": {"id", "user_id", "memory"},
    "memharbor_memories": {"id", "user_id", "memory"},
    "mem0_history": {"memory_id", "action"},
    "memharbor_history": {"memory_id", "action"},
}
_LAYOUTS = {"sqlite-vectors": _VECTORS, "chatsg": _CHATSG, "mem0-history": _HISTORY}


@dataclass(frozen=True)
class _Plan:
    """
    What is read of one file.

    Args:
        name: Which source it is.
        tables: Tables with their columns, in the order of reading.
        user_column: Of table `users`, in place of its id; `None` where ids stay.
    """

    name: str
    tables: Mapping[str, tuple[str, ...]]
    user_column: str | None = None


@dataclass(frozen=True)
class SqliteSource:
    """
    A SQLite file with memories, a history, or both.

    Args:
        path: The file; may be in use.
        users_from: What becomes the `user_id` of ChatSG's memories: the number itself, or a column of its table `users`.
    """

    path: Path
    users_from: UsersFrom = "id"

    def describe(self) -> SourceInfo:
        """Say what there is; reads every row once, for the identity. See `Source`."""
        with opened(self.path) as connection:
            plan = self._plan(connection)
            counts: dict[str, int] = {}
            for table in plan.tables:
                counts[_kind(table)] = counts.get(_kind(table), 0) + count_rows(connection, table)
            digest = digest_rows(connection, plan.tables)
            found = (_find_dims(connection, table, columns) for table, columns in plan.tables.items())
            dims = next(filter(None, found), None)
        # Whose memories they become is part of what they are.
        return SourceInfo(
            plan.name,
            f"sha256 {digest}, users from {plan.user_column or 'id'}",
            counts,
            dims,
            self.path.stat().st_size,
        )

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """Read every row, table after table; see `Source`."""
        with opened(self.path) as connection:
            plan = self._plan(connection)
            names = list(plan.tables)
            begin_table, rowid = _read_position(after, names)
            for table in names[names.index(begin_table) :]:
                columns = plan.tables[table]
                for page in read_pages(
                    connection, select_rows(table, columns), rowid if table == begin_table else None
                ):
                    owners = _find_owners(connection, plan, columns, page) if table in _CHATSG else {}
                    for number, values in page:
                        row = dict(zip(columns, values, strict=True))
                        yield _item(table, row, number, owners)

    def _plan(self, connection: sqlite3.Connection) -> _Plan:
        found = find_tables(connection)
        for name, layout in _LAYOUTS.items():
            tables = {table: found[table] for table in layout if layout[table] <= set(found.get(table, ()))}
            if tables:
                # Histories may lie in the same file as vectors.
                others = {table: found[table] for table in _HISTORY if _HISTORY[table] <= set(found.get(table, ()))}
                column = self._user_column(connection, found.get("users", ())) if name == "chatsg" else None
                return _Plan(name, tables | others, column)
        listed = ", ".join(f"`{table}`" for table in list(found)[:20]) or "none at all"
        hint = "give Mem0's `vector_store.db` or `history.db`, or ChatSG's database"
        if {"memories", "users", "apps"} <= set(found):
            hint = "it is OpenMemory's: pass `--from openmemory`"
        raise SourceDataError(f"`{self.path}` has no tables of Mem0 or ChatSG; it has {listed}", hint=hint)

    def _user_column(self, connection: sqlite3.Connection, columns: tuple[str, ...]) -> str | None:
        column = find_user_column(self.users_from, columns, str(self.path))
        if column is not None:
            name = quoted(column)
            # A name of this package.
            statement = f"select 1 from users where {name} <> '' group by {name} having count(*) > 1 limit 1"  # noqa: S608
            if connection.execute(statement).fetchone():
                raise shared_name_error(str(self.path), column)
        return column


def _kind(table: str) -> Kind:
    return "memory" if table in _VECTORS or table in ("mem0_memories", "memharbor_memories") else "history"


def _read_position(after: str | None, tables: list[str]) -> tuple[str, int | None]:
    if after is None:
        return tables[0], None
    table, _, rowid = after.partition(" ")
    if table not in tables or not rowid.removeprefix("-").isdecimal():
        raise SourceDataError(f"`{after}` is no position in this file", hint="begin anew, with another work folder")
    return table, int(rowid)


def _find_dims(connection: sqlite3.Connection, table: str, columns: tuple[str, ...]) -> int | None:
    for column in {"vector", "embedding"} & set(columns):
        name, of = quoted(column), quoted(table)
        # Names that are spelled in this module.
        statement = f"select {name} from {of} where {name} is not null order by rowid limit 1"  # noqa: S608
        for (value,) in connection.execute(statement):
            vector = vector_column(value)
            return None if vector is None or isinstance(vector, Problem) else len(vector)
    return None


def _find_owners(
    connection: sqlite3.Connection, plan: _Plan, columns: tuple[str, ...], page: list[tuple[int, tuple[Any, ...]]]
) -> Mapping[str, Any]:
    """Find what the users of a page are called, by their number as a text."""
    if "user_id" not in columns:
        return {}
    at = columns.index("user_id")
    plain = {plain_value(values[at]) for _, values in page} - {None}
    numbers = [number for number in plain if not isinstance(number, Problem)]
    if plan.user_column is None:
        return {str(number): str(number) for number in numbers}
    column, marks = quoted(plan.user_column), ", ".join("?" * len(numbers))
    # A name of this module, and question marks.
    statement = f"select id, {column} from users where id in ({marks})"  # noqa: S608
    return {str(plain_value(number)): plain_value(name) for number, name in connection.execute(statement, numbers)}


def _item(table: str, row: Mapping[str, Any], rowid: int, owners: Mapping[str, Any]) -> RawItem | Refusal:
    position = f"{table} {rowid}"
    if table == "vectors":
        return _vector_item(row, position)
    plain = plain_row({column: value for column, value in row.items() if column not in ("embedding", "metadata")})
    if isinstance(plain, Problem):
        return _refuse(plain, _kind(table), position, row)
    ours: dict[str, Any] = {}
    if table in _CHATSG:
        number = plain.get("user_id")
        owner = None if number is None else owners.get(str(number))
        if isinstance(owner, Problem) or (number is not None and owner in (None, "")):
            name, problem = nameless_user(number)
            return _refuse(problem, _kind(table), position, {**row, "user_id": name})
        plain["user_id"] = None if owner is None else str(owner)
        metadata = json_column("metadata", row.get("metadata"))
        if isinstance(metadata, Problem):
            return _refuse(metadata, _kind(table), position, row)
        plain["metadata"], ours = unwrap(metadata)
    if _kind(table) == "history":
        exact = {name: value for name, value in ours.items() if name in ("old_value", "actor")}
        data: dict[str, Any] = {"table": table, **plain, **exact}
        return RawItem("history", _history_id(table, plain, position), data, position)
    vector = vector_column(row.get("embedding"))
    if isinstance(vector, Problem):
        return _refuse(vector, "memory", position, row)
    source_id = id_text(plain.get("id"))
    if isinstance(source_id, Problem):
        return _refuse(source_id, "memory", position, row)
    lifecycle = {name: ours[name] for name in LIFECYCLE if name in ours}
    return RawItem("memory", source_id or position, plain, position, vector, ours.get("state", "active"), lifecycle)


def _vector_item(row: Mapping[str, Any], position: str) -> RawItem | Refusal:
    """Read a point of the TypeScript SDK; one that links memories is an entity."""
    payload = json_column("payload", row["payload"])
    if isinstance(payload, Problem):
        return _refuse(payload, "memory", position, row)
    is_entity = any(isinstance(payload.get(links), list) and kind in payload for kind, links in _ENTITY_KEYS)
    kind: Kind = "entity" if is_entity else "memory"
    plain_id = plain_value(row["id"])
    source_id = plain_id if isinstance(plain_id, Problem) else id_text(plain_id)
    if isinstance(source_id, Problem):
        return _refuse(source_id, kind, position, row)
    vector = vector_column(row["vector"])
    if isinstance(vector, Problem):
        return _refuse(vector, kind, position, row)
    return RawItem(kind, source_id or position, payload, position, vector)


_ENTITY_KEYS = (("entityType", "linkedMemoryIds"), ("entity_type", "linked_memory_ids"))


def _history_id(table: str, row: Mapping[str, Any], position: str) -> str:
    """Tell a change by its UUID, or by its number together with its memory, since numbers begin anew in each file."""
    try:
        return str(uuid.UUID(str(row.get("id"))))
    except ValueError:
        number = position if row.get("id") is None else f"{table} {row['id']}"
        return f"{number} of {row.get('memory_id') or row.get('session_scope') or 'nothing'}"


def _refuse(problem: Problem, kind: Kind, position: str, row: Mapping[str, Any]) -> Refusal:
    kept = kept_row(row)
    source_id = str(kept.get("id") or position)
    return Refusal(problem.reason, problem.detail, RawItem(kind, source_id, kept, position))
