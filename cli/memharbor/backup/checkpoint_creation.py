"""
Make a checkpoint: name a state that nobody changes at that moment, and copy its rows while everybody goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

from psycopg.types.json import Jsonb

from memharbor.backup.access import all_rows, in_locked_transaction, may_execute, present_tables, qualified, run_script
from memharbor.backup.checkpoint import (
    COPY_BYTES_MAX,
    KEYS,
    OWNERS,
    POINT_PREFIX,
    Checkpoint,
    Checkpoints,
    Scope,
    check_name,
    summarise,
)
from memharbor.backup.erasure import user_digest
from memharbor.backup.rows import DatabaseRows, Fingerprint, fingerprint
from memharbor.backup.wal import parse_lsn
from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.names import ROLES
from memharbor.schema.fingerprint import Catalog, describe_catalog
from memharbor.templates import literal, render


def create_checkpoint(checkpoints: Checkpoints, name: str, scope: Scope, *, copy: bool | None = None) -> Checkpoint:
    """
    Name the present state and copy its rows.

    Args:
        checkpoints: Those of the database.
        name: What to call it.
        scope: What it covers.
        copy: Whether rows are copied; by default where they are not too many.

    Raises:
        UsageError: The name or the scope is wrong.
        StateRefusedError: The name is taken, the schema is not there, or writers do not let it have its locks.
        DatabaseError: A statement was refused; nothing remains but a restore point.
    """
    check_name(name)
    if any(each.name == name for each in checkpoints.list()):
        raise StateRefusedError(
            f"there is a checkpoint `{name}` already", hint=f"run `memharbor checkpoint delete {name}`"
        )
    with closing(checkpoints.connect()) as naming, closing(checkpoints.connect()) as copying:
        created = _Creation(naming, copying, name, scope, copy).run()
    checkpoints.keep(created)
    return created


class _Creation:
    """The two sessions that make one checkpoint: one names the state and lends its snapshot, the other copies."""

    def __init__(self, naming: Connection, copying: Connection, name: str, scope: Scope, copy: bool | None) -> None:
        self._naming = naming
        self._copying = copying
        self._name = name
        self._scope = scope
        self._copy = copy
        self._point: str | None = None
        self._lsn, self._timeline = 0, 0
        self._catalog: Catalog = {}

    def run(self) -> Checkpoint:
        present = present_tables(self._naming, list(KEYS))
        if "memories" not in present:
            raise StateRefusedError("the schema is not rolled out to this database", hint="memharbor schema apply")
        tables = self._scope.resolve(present)
        with translated_errors("prepare the checkpoint"), transaction(self._naming):
            run_script(self._naming, render("checkpoint/schema.sql", {"owner": ROLES["owner"]}))
        try:
            in_locked_transaction(self._naming, present, "share", self._name_state, what="the checkpoint")
            with translated_errors("copy the rows of the checkpoint"), all_rows(self._copying, present):
                made = self._write(tables, is_everything=set(tables) == set(present) and self._scope.user_id is None)
            self._copying.execute("commit")
        finally:
            if not self._copying.closed:
                self._copying.execute("rollback")
        return made

    def _name_state(self, _: DatabaseRows) -> None:
        """Name the state that nobody changes at this moment, and open a snapshot of it in the other session."""
        naming = self._naming
        self._catalog = describe_catalog(naming)
        position = "pg_catalog.pg_current_wal_insert_lsn()"
        if may_execute(naming, "pg_catalog.pg_create_restore_point(text)"):
            self._point = f"{POINT_PREFIX}{self._name}"
            position = f"pg_catalog.pg_create_restore_point({literal(self._point)})"
        row = naming.execute(
            f"""
            select l.lsn::text, substr(pg_catalog.pg_walfile_name(l.lsn), 1, 8), pg_catalog.pg_export_snapshot()
            from {position} l (lsn)
            """.encode()  # noqa: S608 - a checked name
        ).fetchone()
        if row is None:
            raise StateRefusedError("the server named no position")
        self._lsn, self._timeline = parse_lsn(row[0]), int(row[1], 16)
        self._copying.execute("rollback")
        self._copying.execute("begin isolation level repeatable read")
        self._copying.execute(f"set transaction snapshot {literal(row[2])}".encode())

    def _write(self, tables: tuple[str, ...], *, is_everything: bool) -> Checkpoint:
        copying = self._copying
        for setting in ("search_path = ''", "lock_timeout = 0", "statement_timeout = 0"):
            copying.execute(f"set local {setting}".encode())
        user_id = self._scope.user_id
        conditions = {t: "true" if user_id is None else f"{OWNERS[t]} = {literal(user_id)}" for t in tables}
        sizes = {table: self._measure(table, conditions[table]) for table in tables}
        size_bytes = sum(size for _, size in sizes.values())
        number = _next_number(copying)
        may_copy = size_bytes <= COPY_BYTES_MAX if self._copy is None else self._copy
        copies = {table: f"c{number}_{table}" for table in tables} if may_copy else {}
        for table, copy in copies.items():
            variables = {"condition": conditions[table], "copy": copy, "owner": ROLES["owner"], "table": table}
            run_script(copying, render("checkpoint/copy_table.sql", variables))
        made = Checkpoint(
            name=self._name,
            number=number,
            created_at=datetime.now(UTC),
            point=self._point,
            lsn=self._lsn,
            timeline=self._timeline,
            tables=tables,
            user_sha256=user_digest(user_id) if user_id is not None else None,
            is_everything=is_everything,
            copies=copies,
            row_counts={table: rows for table, (rows, _) in sizes.items()},
            size_bytes=size_bytes,
        )
        found = [each for each in fingerprint(DatabaseRows(copying)).values() if made.covers(each)]
        made = replace(made, summary=summarise(found))
        save(copying, made, self._catalog, found)
        return made

    def _measure(self, table: str, condition: str) -> tuple[int, int]:
        """Count rows and the bytes that they take."""
        row = self._copying.execute(
            f"select count(*), coalesce(sum(pg_column_size(t.*)), 0)::bigint from {qualified(table)} t where {condition}".encode()  # noqa: S608
        ).fetchone()
        return (row[0], row[1]) if row else (0, 0)


def save(connection: Connection, made: Checkpoint, catalog: Catalog, found: Iterable[Fingerprint]) -> None:
    """Write a checkpoint into the database's own tables."""
    connection.execute(
        """
        insert into memharbor_checkpoint.checkpoints (number, name, record, catalog) overriding system value
        values (%s, %s, %s, %s)
        """,
        (made.number, made.name, Jsonb(made.as_record()), Jsonb(catalog)),
    )
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into memharbor_checkpoint.fingerprints values (%s, %s, %s, %s, %s)",
            [(made.number, each.user_sha256, each.table, each.rows, each.digest) for each in found],
        )


def _next_number(connection: Connection) -> int:
    row = connection.execute(
        "select nextval(pg_get_serial_sequence('memharbor_checkpoint.checkpoints', 'number'))"
    ).fetchone()
    return int(row[0]) if row else 0
