"""
Take a logical backup: rows as PostgreSQL's binary COPY, of one snapshot, whole or of one user or time, also incremental.

Needs nothing of the server but SQL, so it works with any PostgreSQL. An incremental backup is found by comparing every
row's digest with those that its parent recorded, not by timestamps: Mem0 lets a caller write any `updated_at`, and its
entities have none. Why: docs/adr/0014-logical-backups.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from memharbor import __version__
from memharbor.backup.chain import Request, selection_of
from memharbor.backup.destinations import Destination
from memharbor.backup.logical_files import Keys, pour, write_file, write_sums, write_text
from memharbor.backup.logical_format import (
    MANIFEST,
    READ_SCRIPT,
    Column,
    Manifest,
    Parent,
    StoredFile,
    StoredTable,
)
from memharbor.backup.rows import DatabaseRows, RowSource
from memharbor.backup.selection import DIGEST_SETTINGS, Choice, Table, fingerprint_rows, read_tables
from memharbor.database import Connection, run_statement, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.output import Output, size_text
from memharbor.templates import ident, literal, render


@contextmanager
def snapshot(connection: Connection) -> Iterator[DatabaseRows]:
    """
    Lend one snapshot of a database, with the settings that digests need; nothing of it stays.

    Args:
        connection: Straight to the database, of a role that sees all rows; in autocommit and outside a transaction.
    """
    with translated_errors("reading the database"), connection.transaction(force_rollback=True):
        connection.execute("set transaction isolation level repeatable read")
        for name, value in DIGEST_SETTINGS.items():
            connection.execute("select pg_catalog.set_config(%s, %s, true)", (name, value))
        yield DatabaseRows(connection)


def count_rows(source: RowSource, request: Request) -> dict[str, int]:
    """Count what a backup would hold, by table; of an incremental one what is new or changed, and what is gone."""
    writer = _Writer(source, request, Path())
    return {name: count for table in read_tables(source) for name, count in writer.count(table).items()}


def create(
    source: RowSource, request: Request, destination: Destination, output: Output, *, taken_at: datetime | None = None
) -> Manifest:
    """
    Take a backup.

    Args:
        source: One snapshot of a database (see `snapshot`), or one at rest.
        request: What is to be backed up.
        destination: Where it is kept.
        output: Where progress is said.
        taken_at: The instant whose state the source shows, aware UTC; now by default.

    Raises:
        StateRefusedError: The user has no rows; nothing was written.
        DatabaseError: PostgreSQL refused; nothing appears at the destination.
    """
    now = datetime.now(UTC)
    name = f"memharbor-{''.join(c if c.isalnum() and c.isascii() else '_' for c in request.database)}-{now:%Y%m%dT%H%M%S%f}Z"
    tables = read_tables(source)
    choice = request.choice
    fingerprints = fingerprint_rows(source, [(table, choice.query(table)) for table in tables])
    if choice.user_id is not None and not any(each.user_sha256 for each in fingerprints):
        raise StateRefusedError(
            f"user `{choice.user_id}` has no rows in database `{request.database}`", hint="run `memharbor user show ID`"
        )
    manifest = Manifest(
        id=name,
        database=request.database,
        taken_at=taken_at or now,
        versions=_versions(source),
        selection=selection_of(choice),
        tables=(),
        fingerprints=tuple(fingerprints),
        parent=Parent(request.parent.manifest.id, request.parent.manifest_sha256) if request.parent else None,
        encrypted=bool(request.keys.recipients),
    )
    with destination.create(name) as folder:
        writer = _Writer(source, request, folder)
        stored = writer.write(tables, output)
        history = _write_mem0_history(request, folder)
        manifest = replace(manifest, tables=tuple(stored), mem0_history=history)
        write_text(folder, READ_SCRIPT, _read_script(stored))
        write_text(folder, MANIFEST, manifest.as_text())
        write_sums(folder, manifest)
    return manifest


def _write_mem0_history(request: Request, folder: Path) -> StoredFile | None:
    if request.mem0_history is None:
        return None
    from memharbor.backup.mem0_history import copied_history

    with copied_history(request.mem0_history) as (copy, row_count), copy.open("rb") as file:
        stored = write_file(folder, "mem0-history.db", iter(lambda: file.read(1 << 20), b""), request.keys)
    return replace(stored, rows=row_count)


def _versions(source: RowSource) -> dict[str, str]:
    rows = source.query(
        "select current_setting('server_version'),"
        " (select extversion from pg_catalog.pg_extension where extname = 'vector')"
    )
    return {"memharbor": __version__, "postgresql": str(rows[0][0]), "pgvector": str(rows[0][1])}


def _read_script(tables: Sequence[StoredTable]) -> str:
    def command(file: StoredFile) -> str:
        if file.name.endswith(".age"):
            return f'age --decrypt --identity "$AGE_IDENTITY" {file.name} | zstd --decompress --stdout'
        return f"zstd --decompress --stdout {file.name}"

    described = [
        {
            "name": table.name,
            "key": table.key,
            "columns": [(column.name, column.type) for column in table.columns],
            "rows_command": command(table.rows),
            "gone_command": command(table.gone) if table.gone else "",
        }
        for table in tables
    ]
    return render("logical/read.sql", {"tables": described})


class _Writer:
    """Writes the files of one backup."""

    def __init__(self, source: RowSource, request: Request, folder: Path) -> None:
        self._source = source
        self._request = request
        self._folder = folder

    def write(self, tables: Sequence[Table], output: Output) -> list[StoredTable]:
        expected_bytes = int(sum(map(self._estimate_bytes, tables))) or 1
        stored, done = [], 0

        with output.percent(expected_bytes) as on_percent:

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                on_percent(min(99.0, 100 * done / expected_bytes))

            for table in tables:
                begun_at, before = time.monotonic(), done
                stored.append(self._write_table(table, on_bytes))
                seconds = time.monotonic() - begun_at
                output.detail(
                    f"{table.name}: {stored[-1].rows.rows:,} rows, {size_text(done - before)} in {seconds:.1f} s,"
                    f" {size_text((done - before) / max(seconds, 0.001))}/s"
                )
        return stored

    def count(self, table: Table) -> dict[str, int]:
        query = self._request.choice.query(table)
        if self._request.parent is None:
            return {table.name: self._count(query)}
        changed, gone = self._compare(table, query)
        return {table.name: self._count(changed), f"{table.name} gone": self._count(gone)}

    def _write_table(self, table: Table, on_bytes: Callable[[int], None]) -> StoredTable:
        query = self._request.choice.query(table)
        columns = _columns(table)
        if self._request.parent is None:
            rows = self._copy(f"{table.name}.copy", query, on_bytes)
            present = None
            if not selection_of(self._request.choice).by_time:
                digests = f"select {table.key_of('r')}, {table.digest_of('r')} from ({query}) r"
                present = replace(
                    self._copy(f"{table.name}.present.copy", digests, on_bytes, rows.rows), rows=rows.rows
                )
            return StoredTable(table.name, table.key, columns, rows, present)
        changed, gone = self._compare(table, query)
        return StoredTable(
            table.name,
            table.key,
            columns,
            rows=self._copy(f"{table.name}.copy", changed, on_bytes),
            present=self._copy(f"{table.name}.present.copy", f"select * from {_present(table)}", on_bytes),
            gone=self._copy(f"{table.name}.gone.copy", gone, on_bytes),
        )

    def _compare(self, table: Table, query: str) -> tuple[str, str]:
        """Load what the parent recorded, and spell the rows that differ from it and the keys that are no more."""
        parent = self._request.parent
        assert parent is not None  # noqa: S101 - the caller asked
        if not isinstance(self._source, DatabaseRows):
            raise StateRefusedError("an incremental backup is taken of a live database")
        connection = self._source.connection
        known = next((each for each in parent.manifest.tables if each.name == table.name), None)
        if known is not None and known.columns != _columns(table):
            raise StateRefusedError(
                f"`{table.name}` has other columns now than in backup `{parent.manifest.id}`",
                hint="take a whole one: the same command without `--since`",
            )
        for name in (_present(table), _known(table)):
            stage(connection, name, table.name, table.key, with_digest=True)
        if known is not None and known.present is not None:
            copy_in(connection, _known(table), None, parent.folder, known.present, self._request.keys)
        connection.execute(
            f"insert into {_present(table)} select {table.key_of('r')}, {table.digest_of('r')} from ({query}) r".encode()
        )
        connection.execute(f"analyze {_present(table)}, {_known(table)}".encode())
        using = ", ".join(map(ident, table.key))
        changed = (
            f"select {', '.join(f'r.{ident(column.name)}' for column in table.columns)} from ({query}) r"
            f" join {_present(table)} present using ({using}) left join {_known(table)} known using ({using})"
            " where known.digest is distinct from present.digest"
        )
        gone = (
            f"select {table.key_of('known')} from {_known(table)} known left join {_present(table)} present using ({using})"
            " where present.digest is null"
        )
        return changed, gone

    def _copy(self, stem: str, query: str, on_bytes: Callable[[int], None], row_count: int | None = None) -> StoredFile:
        statement = f"copy ({query}) to stdout with (format binary)"
        chunks = self._source.copy_out(statement)
        stored = write_file(self._folder, stem, chunks, self._request.keys, on_bytes=on_bytes)
        return replace(stored, rows=self._count(query) if row_count is None else row_count)

    def _count(self, query: str) -> int:
        return int(self._source.query(f"select count(*) from ({query}) counted")[0][0] or 0)

    def _estimate_bytes(self, table: Table) -> float:
        size, tuples = self._source.query(
            f"select pg_table_size(c.oid), greatest(c.reltuples, 0) from pg_catalog.pg_class c"
            f" where c.oid = to_regclass({literal(table.relation)})"
        )[0]
        if self._request.choice == Choice() or not float(tuples or 0):
            return float(size or 0)
        return float(size or 0) * min(1.0, self._count(self._request.choice.query(table)) / float(tuples or 1))


def _columns(table: Table) -> tuple[Column, ...]:
    return tuple(Column(column.name, column.type) for column in table.columns)


def _present(table: Table) -> str:
    return ident(f"present_{table.name}")


def _known(table: Table) -> str:
    return ident(f"known_{table.name}")


def stage(
    connection: Connection,
    name: str,
    table: str,
    columns: Sequence[str],
    *,
    with_digest: bool = False,
    with_verdict: bool = False,
) -> None:
    """Make an empty temporary table with columns of one of ours; it lives as long as the transaction."""
    variables = {
        "name": name.strip('"'),
        "table": table,
        "columns": list(columns),
        "with_digest": with_digest,
        "with_verdict": with_verdict,
    }
    with translated_errors(f"staging {table}"):
        run_statement(connection, render("logical/stage.sql", variables))


def copy_in(
    connection: Connection,
    name: str,
    columns: Sequence[str] | None,
    folder: Path,
    file: StoredFile,
    keys: Keys,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Copy a file of a backup into a table, decrypted and decompressed on the way."""
    listed = f" ({', '.join(map(ident, columns))})" if columns else ""
    statement = f"copy {name}{listed} from stdin with (format binary)"
    with (
        translated_errors(f"reading `{file.name}`"),
        connection.cursor() as cursor,
        cursor.copy(statement.encode()) as copy,
    ):
        pour(folder, file, copy, keys, on_bytes)
