"""
What a logical backup is: a manifest and, for each table, files of rows.

A file of rows is PostgreSQL's binary COPY, compressed by zstd, encrypted by age where recipients are named. The page
`docs/reference/logical-backup-format.md` is the manual, with which psql and zstd alone read it. Holds no SQL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from memharbor.backup.rows import Fingerprint
from memharbor.errors import SourceDataError

FORMAT = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
READ_SCRIPT = "read.sql"


@dataclass(frozen=True)
class Column:
    """A column as it is stored: its name and its type as `format_type` writes it, for instance `vector(384)`."""

    name: str
    type: str


@dataclass(frozen=True)
class StoredFile:
    """
    One file of a backup.

    Args:
        name: Below the backup's folder.
        rows: How many rows it holds.
        size_bytes: As it is stored.
        sha256: As it is stored, hexadecimal.
    """

    name: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredTable:
    """
    One table of a backup.

    Args:
        name: The table, in schema `memharbor`.
        key: Columns that identify a row.
        columns: Every column that is stored, in the order of the file.
        rows: The rows; of an incremental backup those that are new or changed since its parent.
        present: Key and digest of every row that there was, for the next incremental backup; `None` for a choice by time.
        gone: Keys of rows that the parent has and that are no more; `None` where there is no parent.
    """

    name: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: StoredFile
    present: StoredFile | None = None
    gone: StoredFile | None = None

    @property
    def files(self) -> list[StoredFile]:
        """Every file of this table."""
        return [file for file in (self.rows, self.present, self.gone) if file is not None]


@dataclass(frozen=True)
class Selection:
    """
    Which rows a backup holds; everything where nothing is said.

    Args:
        user_sha256: Only this user's, as SHA-256 of the id.
        from_at: Only from this instant on, aware UTC.
        to_at: Only before this instant, aware UTC.
    """

    user_sha256: str | None = None
    from_at: datetime | None = None
    to_at: datetime | None = None

    @property
    def by_time(self) -> bool:
        """Whether it is a choice by time, which no incremental backup can build on."""
        return self.from_at is not None or self.to_at is not None


@dataclass(frozen=True)
class Parent:
    """The backup that an incremental one builds on, and the SHA-256 of its manifest."""

    id: str
    manifest_sha256: str


@dataclass(frozen=True)
class Manifest:
    """
    What a logical backup holds. Names no user: ids are digests, texts are in the files only.

    Args:
        id: Name of its folder.
        database: The database it was taken from.
        taken_at: The instant of its snapshot, aware UTC.
        versions: Of `memharbor`, `postgresql` and `pgvector`.
        selection: Which rows.
        tables: In the order in which they can be inserted.
        fingerprints: Of all rows that there are once the chain is applied, as `memharbor.fingerprint_users()` says them.
        parent: Where it is incremental.
        encrypted: Whether the files are encrypted with age.
        mem0_history: Mem0's own SQLite history, where it was taken along.
    """

    id: str
    database: str
    taken_at: datetime
    versions: Mapping[str, str]
    selection: Selection
    tables: tuple[StoredTable, ...]
    fingerprints: tuple[Fingerprint, ...]
    parent: Parent | None = None
    encrypted: bool = False
    mem0_history: StoredFile | None = None

    @property
    def files(self) -> list[StoredFile]:
        """Every file that the manifest vouches for."""
        return [
            *(file for table in self.tables for file in table.files),
            *([self.mem0_history] if self.mem0_history else []),
        ]

    @property
    def user_count(self) -> int:
        """How many users have rows in it."""
        return len({each.user_sha256 for each in self.fingerprints} - {""})

    @property
    def counts(self) -> dict[str, int]:
        """Rows by table once the chain is applied."""
        counted = {table.name: 0 for table in self.tables}
        for each in self.fingerprints:
            counted[each.table] = counted.get(each.table, 0) + each.rows
        return counted

    def as_text(self) -> str:
        """Write it as JSON."""
        data = {"format": FORMAT, **asdict(self)}
        data["fingerprints"] = [[each.user_sha256, each.table, each.rows, each.digest] for each in self.fingerprints]
        return json.dumps(data, indent=1, default=lambda value: value.isoformat()) + "\n"


def parse_manifest(text: str) -> Manifest:
    """
    Read a manifest.

    Raises:
        SourceDataError: It is no manifest, or of a newer format than this version reads.
    """
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise SourceDataError(
                f"the backup has format {data['format']}, and this version of Memharbor reads {FORMAT}",
                hint="install a newer version of memharbor",
            )
        return Manifest(
            id=str(data["id"]),
            database=str(data["database"]),
            taken_at=datetime.fromisoformat(data["taken_at"]),
            versions=dict(data["versions"]),
            selection=Selection(
                data["selection"]["user_sha256"],
                _instant(data["selection"]["from_at"]),
                _instant(data["selection"]["to_at"]),
            ),
            tables=tuple(_table(each) for each in data["tables"]),
            fingerprints=tuple(Fingerprint(*each) for each in data["fingerprints"]),
            parent=Parent(**data["parent"]) if data["parent"] else None,
            encrypted=bool(data["encrypted"]),
            mem0_history=_file(data["mem0_history"]),
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise SourceDataError(f"the manifest of the backup cannot be read: {exc!r}") from exc


def _table(data: Mapping[str, Any]) -> StoredTable:
    rows = _file(data["rows"])
    if rows is None:
        raise ValueError("a table without rows")
    columns = tuple(Column(**each) for each in data["columns"])
    key = tuple(map(str, data["key"]))
    return StoredTable(str(data["name"]), key, columns, rows, _file(data["present"]), _file(data["gone"]))


def _file(data: Mapping[str, Any] | None) -> StoredFile | None:
    if data is None:
        return None
    file = StoredFile(**data)
    if Path(file.name).name != file.name:
        raise ValueError(f"`{file.name}` is no name of a file")
    return file


def _instant(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
