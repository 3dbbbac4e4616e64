"""
Mem0's own history, a SQLite file on the application's side: copied while Mem0 writes to it, and put back.

Copies go through SQLite's online backup, which is consistent whatever others write, in either journal mode.
Source: sqlite.org/backup.html; mem0ai `mem0/memory/storage.py` (tables `history` and `messages`).
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from memharbor.backup.logical_files import Keys, pour
from memharbor.backup.logical_format import StoredFile
from memharbor.errors import SourceDataError, StateRefusedError

_TABLE = "history"
_BUSY_SECONDS = 30


@contextmanager
def copied_history(path: Path) -> Iterator[tuple[Path, int]]:
    """
    Copy a history that may be in use, and lend the copy with the number of its rows.

    Raises:
        SourceDataError: It is not there, or no history of Mem0's.
    """
    if not path.is_file():
        raise SourceDataError(f"`{path}` is no file", hint="Mem0 keeps it at its `history_db_path`")
    with tempfile.TemporaryDirectory(prefix="memharbor-") as folder:
        copy = Path(folder) / "history.db"
        try:
            with closing(_open(path, mode="ro")) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target, pages=1000)
                row_count = _check(target, path)
        except sqlite3.Error as exc:
            raise SourceDataError(f"`{path}` cannot be copied: {exc}") from exc
        yield copy, row_count


def restore_history(folder: Path, file: StoredFile, keys: Keys, path: Path, *, overwrite: bool) -> Path | None:
    """
    Put a history back, also under a Mem0 that has it open; returns where the one that was there is kept.

    Args:
        folder: Of the backup.
        file: The history in it.
        keys: Decrypts by its identities.
        path: Where it belongs; its folder must exist.
        overwrite: Whether one that has rows may be replaced.

    Raises:
        StateRefusedError: There is one with rows, and it may not be replaced; nothing was changed.
        SourceDataError: What is in the backup is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="memharbor-") as scratch:
        unpacked = Path(scratch) / "history.db"
        with unpacked.open("wb") as sink:
            pour(folder, file, sink, keys)
        return put_back(unpacked, path, overwrite=overwrite)


def put_back(unpacked: Path, path: Path, *, overwrite: bool) -> Path | None:
    """
    Put a history back from a file, as `restore_history` does from a logical backup.

    Raises:
        StateRefusedError: There is one with rows, and it may not be replaced; nothing was changed.
        SourceDataError: The file is damaged.
    """
    kept: Path | None = None
    try:
        with closing(sqlite3.connect(unpacked)) as source:
            _check(source, unpacked)
            if path.exists() and path.stat().st_size:
                kept = _keep(path, overwrite=overwrite)
            with closing(_open(path, mode="rwc")) as target:
                source.backup(target)
    except sqlite3.Error as exc:
        raise SourceDataError(f"the history cannot be put back at `{path}`: {exc}") from exc
    return kept


def _keep(path: Path, *, overwrite: bool) -> Path | None:
    with closing(_open(path, mode="rw")) as present:
        row_count = _count(present)
        if row_count and not overwrite:
            raise StateRefusedError(
                f"`{path}` has {row_count:,} rows", hint="pass `--on-conflict overwrite`, which keeps a copy beside it"
            )
        kept = path.with_name(f"{path.name}.before-{datetime.now(UTC):%Y%m%dT%H%M%S}Z")
        with closing(sqlite3.connect(kept)) as copy:
            present.backup(copy)
    kept.chmod(0o600)
    return kept


def _open(path: Path, *, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_BUSY_SECONDS)


def _check(connection: sqlite3.Connection, path: Path) -> int:
    (said,) = connection.execute("pragma integrity_check").fetchone()
    if said != "ok":
        raise SourceDataError(f"`{path}` is damaged: {said}")
    if not connection.execute("select 1 from sqlite_master where name = ?", (_TABLE,)).fetchone():
        raise SourceDataError(f"`{path}` is no history of Mem0's: it has no table `{_TABLE}`")
    return _count(connection)


def _count(connection: sqlite3.Connection) -> int:
    tables = [row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")]
    counts = [
        # The name is one of two that are spelled here.
        connection.execute(f"select count(*) from {name}").fetchone()[0]  # noqa: S608
        for name in ("history", "messages")
        if name in tables
    ]
    return sum(counts)
