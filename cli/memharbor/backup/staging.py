"""
Load a chain of logical backups into temporary tables, where its rows are checked, chosen and renamed before they count.

Nothing here writes to a table that lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from memharbor.backup.chain import Link
from memharbor.backup.logical import copy_in, stage
from memharbor.backup.logical_files import Keys
from memharbor.backup.logical_format import StoredTable
from memharbor.backup.rows import DatabaseRows
from memharbor.backup.selection import Table, TableColumn, fingerprint_rows, read_tables
from memharbor.database import Connection, translated_errors
from memharbor.errors import SourceDataError, StateRefusedError
from memharbor.output import Output
from memharbor.templates import ident, literal


class Staging:
    """
    The rows of a chain's end in temporary tables, one a table.

    Args:
        connection: To the database that the rows are for, inside a transaction with `DIGEST_SETTINGS`.
        chain: Oldest first.
        keys: Decrypts by its identities.
    """

    def __init__(self, connection: Connection, chain: Sequence[Link], keys: Keys) -> None:
        self.connection = connection
        self.manifest = chain[-1].manifest
        self._chain = chain
        self._keys = keys
        self.tables = self._match_tables()

    def name(self, table: Table | str) -> str:
        """Name the temporary table of a table, as SQL."""
        return ident(f"staged_{table if isinstance(table, str) else table.name}")

    def find(self, name: str) -> Table | None:
        """Find a table that the backup has."""
        return next((table for table in self.tables if table.name == name), None)

    def load(self, output: Output) -> None:
        """
        Read every file, apply the chain in order, and compare the rows with the fingerprints of the newest manifest.

        Raises:
            SourceDataError: A file cannot be read, or the rows are not those that were backed up.
        """
        total = (
            sum(file.size_bytes for link in self._chain for each in link.manifest.tables for file in each.files) or 1
        )
        done = 0

        with output.percent(total) as on_percent:

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                on_percent(100 * done / total)

            for table in self.tables:
                self._load_table(table, on_bytes)
        found = fingerprint_rows(
            DatabaseRows(self.connection), [(table, f"select * from {self.name(table)}") for table in self.tables]
        )
        names = {table.name for table in self.tables}
        expected = [each for each in self.manifest.fingerprints if each.table in names]
        if sorted(found, key=repr) != sorted(expected, key=repr):
            raise SourceDataError(
                f"the rows of backup `{self.manifest.id}` are not those that its manifest has fingerprints of"
            )

    def keep_user(self, user_sha256: str) -> None:
        """
        Keep only one user's rows, and what hangs on their memories.

        Raises:
            StateRefusedError: The backup has none of this user.
        """
        kept = 0
        for table in self.tables:
            if table.is_shared:
                continue
            condition = f"{_digest_of(table, 's')} is not distinct from {literal(user_sha256)}"
            memory = {"memory_relationships": "source_memory_id", "memory_categories": "memory_id"}.get(table.name)
            if memory:
                condition += f" or (s.user_id is null and s.{memory} in (select id from {self.name('memories')}))"
            self._run(f"delete from {self.name(table)} s where not ({condition})")
            kept += self.count(table)
        if not kept:
            raise StateRefusedError(f"backup `{self.manifest.id}` has no rows of this user")
        if self.find("configs"):
            self._run(f"delete from {self.name('configs')}")
        if self.find("categories") and self.find("memory_categories"):
            used = f"select category_id from {self.name('memory_categories')}"
            self._run(f"delete from {self.name('categories')} where id not in ({used})")

    def leave_out_erased(self, requested_at: Mapping[str, datetime]) -> int:
        """
        Take out the rows of users whose erasure was requested after the backup was taken; returns how many users.

        Args:
            requested_at: The newest erasure by SHA-256 of the user's id.
        """
        erased = [user for user, at in requested_at.items() if at >= self.manifest.taken_at]
        found: set[str] = set()
        for table in self.tables:
            if table.is_shared or not erased:
                continue
            rows = self._rows(
                f"delete from {self.name(table)} s where {_digest_of(table, 's')} in ({', '.join(map(literal, erased))})"
                f" returning {_digest_of(table, 's')}"
            )
            found |= {str(row[0]) for row in rows}
        return len(found)

    def rename_owner(self, user_id: str) -> None:
        """Make every row that has an owner another user's, in the payload too."""
        user = literal(user_id)

        def renamed(payload: str) -> str:
            return (
                f"case when {payload} ? 'user_id' then jsonb_set({payload}, '{{user_id}}', to_jsonb({user}::text))"
                f" else {payload} end"
            )

        for table in self.tables:
            if table.is_shared:
                continue
            names = {column.name for column in table.columns}
            changes = [f"user_id = {user}"] if "user_id" in names else []
            changes += [f"{column} = {renamed(column)}" for column in ("payload", "old_value") if column in names]
            self._run(f"update {self.name(table)} s set {', '.join(changes)} where {table.owner_of('s')} is not null")

    def count(self, table: Table) -> int:
        """Count the staged rows of a table."""
        return int(self._rows(f"select count(*) from {self.name(table)}")[0][0] or 0)

    def analyze(self) -> None:
        """Let the planner know the staged rows."""
        self._run(f"analyze {', '.join(map(self.name, self.tables))}")

    def _match_tables(self) -> list[Table]:
        present = {table.name: table for table in read_tables(DatabaseRows(self.connection))}
        matched = []
        for stored in self.manifest.tables:
            table = present.get(stored.name)
            if table is None:
                if self.manifest.counts.get(stored.name):
                    raise StateRefusedError(
                        f"the backup has rows of `{stored.name}`, a table that the database has not",
                        hint="run `memharbor schema apply`",
                    )
                continue
            matched.append(replace(table, columns=_match_columns(stored, table)))
        order = list(present)
        return sorted(matched, key=lambda table: order.index(table.name))

    def _load_table(self, table: Table, on_bytes: Callable[[int], None]) -> None:
        columns = [column.name for column in table.columns]
        stage(self.connection, self.name(table), table.name, columns)
        for number, link in enumerate(self._chain):
            stored = next((each for each in link.manifest.tables if each.name == table.name), None)
            if stored is None:
                continue
            if [column.name for column in stored.columns] != columns:
                raise StateRefusedError(
                    f"`{stored.name}` has other columns in backup `{link.manifest.id}` than in the one that builds on it"
                )
            into = self.name(table)
            if number:
                into = ident(f"incoming_{number}_{table.name}")
                stage(self.connection, into, table.name, columns)
            copy_in(self.connection, into, columns, link.folder, stored.rows, self._keys, on_bytes)
            if number:
                self._apply(table, into, number, link, stored, on_bytes)

    def _apply(
        self, table: Table, incoming: str, number: int, link: Link, stored: StoredTable, on_bytes: Callable[[int], None]
    ) -> None:
        obsolete = [incoming]
        if stored.gone is not None:
            obsolete.append(ident(f"gone_{number}_{table.name}"))
            stage(self.connection, obsolete[-1], table.name, table.key)
            copy_in(self.connection, obsolete[-1], table.key, link.folder, stored.gone, self._keys, on_bytes)
        for name in obsolete:
            self._run(
                f"delete from {self.name(table)} s using {name} o where ({table.key_of('s')}) = ({table.key_of('o')})"
            )
        self._run(f"insert into {self.name(table)} select * from {incoming}")

    def _run(self, statement: str) -> None:
        with translated_errors("preparing the rows"):
            self.connection.execute(statement.encode())

    def _rows(self, statement: str) -> list[tuple[str | None, ...]]:
        return DatabaseRows(self.connection).query(statement)


def _digest_of(table: Table, alias: str) -> str:
    return f"encode(sha256(convert_to({table.owner_of(alias)}, 'UTF8')), 'hex')"


def _match_columns(stored: StoredTable, table: Table) -> tuple[TableColumn, ...]:
    known = {column.name: column for column in table.columns}
    for column in stored.columns:
        if column.name not in known:
            raise StateRefusedError(
                f"the backup has a column `{stored.name}.{column.name}`, which the database has not",
                hint="run `memharbor schema apply`",
            )
        if known[column.name].type != column.type:
            raise StateRefusedError(
                f"`{stored.name}.{column.name}` is {column.type} in the backup and {known[column.name].type} in the database",
                hint="restore into a database with the same embedding dimensions",
            )
    return tuple(known[column.name] for column in stored.columns)
