"""
Checkpoints: a state of the memories with a name, to which `memharbor.backup.rollback` goes back exactly.

A checkpoint is a restore point in the WAL and, up to `COPY_BYTES_MAX`, a copy of its rows in a schema of its own, both
of the very same state: writers wait for milliseconds while the point is named and the snapshot taken, and the copying
itself holds nobody up. What a checkpoint is stands in the database and beside the backups, so that it is found also
where the database is wrecked. Names users by digests only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

from memharbor.backup.access import run_script
from memharbor.backup.rows import Fingerprint, RowSource
from memharbor.backup.tables import SHARED_TABLES, USER_TABLES
from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import ConnectError, StateRefusedError, UsageError
from memharbor.schema.fingerprint import Catalog
from memharbor.templates import ident, literal, render

SCHEMA = "memharbor_checkpoint"
FOLDER = "checkpoints"
POINT_PREFIX = "checkpoint-"
# Above this, rows are not copied: going back to the restore point is exact too.
COPY_BYTES_MAX = 1024**3
LAST = "last"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")
OWNERS = {table.name: table.owner for table in USER_TABLES}
# Every table that is taken along, with the columns that identify a row. The erase ledger is not: an erasure stays.
KEYS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(SHARED_TABLES, ("id",)),
    **{table.name: table.key for table in USER_TABLES},
    "migration_ledger": ("run_id", "step"),
}


class CheckpointRecords(Protocol):
    """Records beside the backups; `memharbor.backup.records.Records` is one."""

    def put(self, path: str, record: dict[str, Any]) -> None:
        """Write a record."""

    def get_all(self, folder: str) -> dict[str, dict[str, Any]]:
        """Read every record below a folder, by path."""

    def delete(self, path: str) -> None:
        """Delete a record."""


@dataclass(frozen=True)
class Checkpoint:
    """
    One checkpoint.

    Args:
        name: What it is called.
        number: What the names of its copies begin with, unique in its database.
        created_at: Aware UTC.
        point: Its restore point; `None` where the server would not name one.
        lsn: The point's position.
        timeline: The timeline on which it lies.
        tables: The tables in its scope.
        user_sha256: The one user in its scope; `None` for everybody.
        is_everything: Whether it covers every table and every user.
        copies: Name of the copy by table; empty where nothing was copied.
        row_counts: Rows in its scope, by table.
        size_bytes: What the copies take, or would.
        summary: For each table its number of users and rows in the scope, and a digest of their fingerprints.
    """

    name: str
    number: int
    created_at: datetime
    point: str | None
    lsn: int
    timeline: int
    tables: tuple[str, ...]
    user_sha256: str | None
    is_everything: bool
    copies: Mapping[str, str] = field(default_factory=dict)
    row_counts: Mapping[str, int] = field(default_factory=dict)
    size_bytes: int = 0
    summary: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many rows are in its scope."""
        return sum(self.row_counts.values())

    @property
    def scope(self) -> str:
        """Its scope in words."""
        if self.is_everything:
            return "everything"
        who = f"user {self.user_sha256[:12]}" if self.user_sha256 else "everybody"
        return f"{', '.join(self.tables)} of {who}"

    def as_record(self) -> dict[str, Any]:
        """Spell it for the store; `from_record` reads it."""
        return {"format": 1, **asdict(self), "created_at": self.created_at.isoformat()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Checkpoint:
        """Read what `as_record` spelled."""
        fields = {name: value for name, value in record.items() if name != "format"}
        fields |= {"created_at": datetime.fromisoformat(record["created_at"]), "tables": tuple(record["tables"])}
        return cls(**fields)

    def with_copies(self, copies: Mapping[str, str]) -> Checkpoint:
        """Return it with other copies."""
        return replace(self, copies=copies)

    def condition(self, table: str) -> str:
        """Spell which rows of a table, or of its copy, are in the scope."""
        if self.user_sha256 is None:
            return "true"
        # Expressions and digests are this program's own.
        return f"encode(sha256(convert_to({OWNERS[table]}, 'UTF8')), 'hex') = {literal(self.user_sha256)}"

    def covers(self, found: Fingerprint) -> bool:
        """Tell whether a fingerprint is of rows in the scope."""
        return found.table in self.tables and self.user_sha256 in (None, found.user_sha256)


@dataclass(frozen=True)
class Scope:
    """
    What a checkpoint shall cover.

    Args:
        tables: Names of tables; none for all.
        user_id: One user; `None` for everybody.
    """

    tables: tuple[str, ...] = ()
    user_id: str | None = None

    def resolve(self, present: Sequence[str]) -> tuple[str, ...]:
        """
        List the tables, in the order in which rows go in.

        Raises:
            UsageError: A table is none that a checkpoint can cover, or has no rows of users.
        """
        known = [table for table in KEYS if table in present]
        possible = [table for table in known if table in OWNERS] if self.user_id is not None else known
        for table in self.tables:
            if table not in possible:
                whose = " of a single user" if table in known else ""
                raise UsageError(
                    f"a checkpoint cannot cover table `{table}`{whose}", hint=f"one of {', '.join(possible)}"
                )
        return tuple(table for table in possible if not self.tables or table in self.tables)


def check_name(name: str) -> str:
    """
    Check the name of a new checkpoint.

    Raises:
        UsageError: It is not one.

    >>> check_name("checkpoint-2025-10-27")
    'checkpoint-2025-10-27'
    """
    if not _NAME.fullmatch(name) or name == LAST:
        raise UsageError(
            f"`{name}` cannot be the name of a checkpoint",
            hint="1 to 48 letters, digits, dots, hyphens and underscores, beginning with a letter or digit; not `last`",
        )
    return name


def summarise(found: Iterable[Fingerprint]) -> dict[str, list[Any]]:
    """
    Digest fingerprints into one line a table: how many users, how many rows, and a digest.

    >>> summarise([Fingerprint("ab", "memories", 2, "x")])["memories"][:2]
    [1, 2]
    """
    lines: dict[str, list[Fingerprint]] = {}
    for each in found:
        lines.setdefault(each.table, []).append(each)
    summary: dict[str, list[Any]] = {}
    for table, rows in sorted(lines.items()):
        text = "\n".join(f"{row.user_sha256} {row.rows} {row.digest}" for row in sorted(rows, key=_by_user))
        summary[table] = [len(rows), sum(row.rows for row in rows), hashlib.sha256(text.encode()).hexdigest()]
    return summary


def _by_user(found: Fingerprint) -> tuple[str, str]:
    return found.user_sha256, found.digest


class Checkpoints:
    """
    The checkpoints of one database.

    Args:
        connect: Connects to the database as its administrator, committing by statement.
        records: Records beside the backups; `None` where there is no store of ours.
    """

    def __init__(self, connect: Callable[[], Connection], records: CheckpointRecords | None) -> None:
        self.connect = connect
        self._records = records

    def list(self) -> list[Checkpoint]:
        """
        List the checkpoints, oldest first: those beside the backups and those in the database.

        Raises:
            ConnectError: The database does not answer, and there is no store of ours.
            ExternalToolError: The store cannot be read.
        """
        kept: list[Checkpoint] = []
        if self._records is not None:
            kept = [Checkpoint.from_record(record) for record in self._records.get_all(FOLDER).values()]
        try:
            with closing(self.connect()) as connection:
                own = read_checkpoints(connection)
        except ConnectError:
            if self._records is None:
                raise
            own = []
        # A restore takes the database's tables back: copies of what is only beside the backups are not there, though
        # others may have come to the same number since.
        known = {(each.name, each.created_at) for each in own}
        found = {each.name: each for each in own}
        found |= {
            each.name: each if (each.name, each.created_at) in known else replace(each, copies={}) for each in kept
        }
        return sorted(found.values(), key=lambda each: each.created_at)

    def get(self, name: str) -> Checkpoint:
        """
        Get a checkpoint by its name, or the newest as `last`.

        Raises:
            StateRefusedError: There is none of that name.
        """
        known = self.list()
        wanted = known[-1:] if name == LAST else [each for each in known if each.name == name]
        if not wanted:
            missing = "there is no checkpoint" if name == LAST else f"there is no checkpoint `{name}`"
            raise StateRefusedError(missing, hint="run `memharbor checkpoint list`")
        return wanted[0]

    def keep(self, created: Checkpoint) -> None:
        """
        Record a new checkpoint beside the backups; where that fails, the database forgets it too.

        Raises:
            ExternalToolError: The store did not take it.
        """
        if self._records is None:
            return
        try:
            self._records.put(_path(created), created.as_record())
        except BaseException:
            self._delete_rows(created)
            raise

    def delete(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint and its copies; its restore point stays in the WAL until that is removed."""
        self._delete_rows(checkpoint)
        if self._records is not None:
            self._records.delete(_path(checkpoint))

    def _delete_rows(self, checkpoint: Checkpoint) -> None:
        with closing(self.connect()) as connection, translated_errors(f"delete checkpoint `{checkpoint.name}`"):
            # Those that the database knows by the same name: a restore may have brought back others than the record's.
            for each in read_checkpoints(connection):
                if each.name == checkpoint.name:
                    with transaction(connection):
                        run_script(
                            connection,
                            render(
                                "checkpoint/drop_copies.sql", {"copies": [f"c{each.number}_{table}" for table in KEYS]}
                            ),
                        )
                        connection.execute(
                            "delete from memharbor_checkpoint.checkpoints where number = %s", (each.number,)
                        )


def read_checkpoints(connection: Connection) -> list[Checkpoint]:
    """List the checkpoints that the database has itself, oldest first."""
    with translated_errors("read the checkpoints"):
        row = connection.execute("select to_regclass(%s) is not null", ("memharbor_checkpoint.checkpoints",)).fetchone()
        if row is None or not row[0]:
            return []
        rows = connection.execute("select record from memharbor_checkpoint.checkpoints order by number").fetchall()
    return [Checkpoint.from_record(record) for (record,) in rows]


def read_catalog(connection: Connection, checkpoint: Checkpoint) -> Catalog | None:
    """Read the catalog as it was at a checkpoint; `None` where the database does not know the checkpoint."""
    if (checkpoint.name, checkpoint.created_at) not in {(e.name, e.created_at) for e in read_checkpoints(connection)}:
        return None
    statement = "select catalog from memharbor_checkpoint.checkpoints where number = %s"
    row = connection.execute(statement, (checkpoint.number,)).fetchone()
    return dict(row[0]) if row else None


def _path(checkpoint: Checkpoint) -> str:
    return f"{FOLDER}/{checkpoint.name}.json"


def read_fingerprints(source: RowSource, checkpoint: Checkpoint) -> dict[tuple[str, str], Fingerprint]:
    """Read what every user's rows were at a checkpoint, by user and table."""
    # Its number is the program's own.
    wanted = f"where number = {checkpoint.number}"
    rows = source.query(
        f"select user_sha256, table_name, row_count, fingerprint from memharbor_checkpoint.fingerprints {wanted}"  # noqa: S608
    )
    found = (Fingerprint(str(row[0]), str(row[1]), int(row[2] or 0), str(row[3])) for row in rows)
    return {(each.user_sha256, each.table): each for each in found}


def copy_name(copy: str) -> str:
    """
    Spell a copy with its schema.

    >>> copy_name("c1_memories")
    'memharbor_checkpoint."c1_memories"'
    """
    return f"{SCHEMA}.{ident(copy)}"
