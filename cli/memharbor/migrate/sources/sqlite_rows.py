"""
Rows of a SQLite file that others may be writing to: opened for reading only, a page at a time, in the order of `rowid`.

No transaction is held between pages, so that writers do not wait for a migration, in either journal mode. Texts come as
bytes: one that is not UTF-8 must not end the reading of all others. Source: sqlite.org/uri.html, lang_createtable.html.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from memharbor.errors import ConnectError, SourceDataError
from memharbor.migrate.sources.json_values import Problem, is_storable, parse_value, read_vector, unpack_floats

PAGE_ROWS = 200
_BUSY_SECONDS = 30
_FIRST = -(2**63)


class Text(bytes):
    """A value that SQLite has as a text, undecoded; what is plain `bytes` is a blob there."""


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """
    Lend a connection that cannot write.

    Raises:
        SourceDataError: It is not there, no SQLite database, or damaged.
        ConnectError: Somebody else keeps it locked.
    """
    if not path.is_file():
        raise SourceDataError(f"`{path}` is no file", hint=f"look with `ls -l {path.parent}`")
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            connection.text_factory = Text
            yield connection
    except sqlite3.Error as exc:
        raise _translated(path, exc) from exc


def _translated(path: Path, exc: sqlite3.Error) -> Exception:
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return ConnectError(
            f"`{path}` is locked by another program: {exc}", hint="stop what writes to it, or try again"
        )
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        # A database in WAL mode needs a file beside it even to be read.
        return SourceDataError(
            f"`{path}` cannot be opened: {exc}",
            hint=f"copy it, and its `-wal` file where there is one, into a folder of yours: `cp {path}* FOLDER`",
        )
    return SourceDataError(
        f"`{path}` cannot be read: {exc}", hint=f"look with `sqlite3 {path} 'pragma integrity_check'`"
    )


def find_tables(connection: sqlite3.Connection) -> dict[str, tuple[str, ...]]:
    """Find the tables of a database, each with its columns."""
    names = [
        _name(row[0]) for row in connection.execute("select name from sqlite_master where type = 'table' order by 1")
    ]
    return {
        name: tuple(_name(row[0]) for row in connection.execute("select name from pragma_table_info(?)", (name,)))
        for name in names
        if not name.startswith("sqlite_")
    }


def read_pages(
    connection: sqlite3.Connection, statement: str, after: int | None
) -> Iterator[list[tuple[int, tuple[Any, ...]]]]:
    """
    Read pages of rows, each a `rowid` and the values.

    Args:
        connection: Of `opened`.
        statement: Selects a rowid first, of rows whose rowid is larger than `:after`, in its order, `:page` of them.
        after: The rowid to go on behind.
    """
    last = _FIRST if after is None else after
    while rows := connection.execute(statement, {"after": last, "page": PAGE_ROWS}).fetchall():
        last = int(rows[-1][0])
        yield [(int(row[0]), tuple(row[1:])) for row in rows]


def select_rows(table: str, columns: Sequence[str]) -> str:
    """
    Spell the statement for `read_pages` that reads one table.

    >>> select_rows("vectors", ["id"])
    'select rowid, "id" from "vectors" where rowid > :after order by rowid limit :page'
    """
    listed = ", ".join(["rowid", *map(quoted, columns)])
    # Names that SQLite itself told.
    return f"select {listed} from {quoted(table)} where rowid > :after order by rowid limit :page"  # noqa: S608


def count_rows(connection: sqlite3.Connection, table: str) -> int:
    """Count the rows of a table."""
    return int(connection.execute(f"select count(*) from {quoted(table)}").fetchone()[0])  # noqa: S608 - see above


def digest_rows(connection: sqlite3.Connection, tables: Mapping[str, Sequence[str]]) -> str:
    """
    Tell a database by its rows: SHA-256 over every value and rowid of some tables.

    Over rows, since the file changes when a journal is folded into it and its rows do not.
    """
    digest = hashlib.sha256()
    for table, columns in sorted(tables.items()):
        digest.update(repr((table, list(columns))).encode())
        for page in read_pages(connection, select_rows(table, columns), None):
            for rowid, values in page:
                digest.update(b"%d" % rowid)
                for value in values:
                    spelled = value if isinstance(value, bytes) else repr(value).encode()
                    digest.update(b"%c%d:" % (type(value).__name__.encode()[0], len(spelled)))
                    digest.update(spelled)
    return digest.hexdigest()


def quoted(name: str) -> str:
    """
    Quote a name for SQLite.

    >>> quoted('a"b')
    '"a""b"'
    """
    return '"' + name.replace('"', '""') + '"'


def plain_value(value: Any) -> Any:
    r"""
    Read one value of a row as JSON has it, or return a `Problem`.

    >>> plain_value(Text(b"\xc3\xa9"))
    'é'
    """
    if isinstance(value, bytes):
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError as exc:
            return Problem("bad-text", f"it is not UTF-8: {exc.reason} at its byte {exc.start:,}")
        return text if is_storable(text) else Problem("bad-text", "it has a NUL character")
    if isinstance(value, float) and not math.isfinite(value):
        return Problem("bad-number", "it is no finite number")
    return value


def plain_row(row: Mapping[str, Any]) -> dict[str, Any] | Problem:
    """Read a row as JSON has it; the first column that cannot be is the `Problem`."""
    plain = {column: plain_value(value) for column, value in row.items()}
    for column, value in plain.items():
        if isinstance(value, Problem):
            return Problem(value.reason, f"column `{column}`: {value.detail}")
    return plain


def kept_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a row that cannot be read, so that a person can mend it: bytes that are no text in hexadecimal."""
    kept = {}
    for column, value in row.items():
        plain = plain_value(value)
        kept[column] = value.hex() if isinstance(value, bytes) and isinstance(plain, Problem) else plain
        if isinstance(kept[column], Problem):
            kept[column] = repr(value)
    return kept


def json_column(column: str, value: Any) -> dict[str, Any] | Problem:
    """
    Read a column that holds a JSON object; nothing at all is an empty one.

    >>> json_column("metadata", Text(b'{"a": 1}'))
    {'a': 1}
    """
    if value is None or value == b"":
        return {}
    parsed = parse_value(bytes(value)) if isinstance(value, bytes) else value
    if isinstance(parsed, Problem):
        return Problem(parsed.reason, f"column `{column}`: {parsed.detail}")
    if parsed is None:
        return {}
    return parsed if isinstance(parsed, dict) else Problem("bad-json", f"column `{column}` has no JSON object")


def vector_column(value: Any) -> Sequence[float] | Problem | None:
    """Read a column that holds an embedding: a blob of little-endian float32, or a text as files spell it."""
    if isinstance(value, Text):
        text = plain_value(value)
        return text if isinstance(text, Problem) else read_vector(text)
    if isinstance(value, bytes):
        return unpack_floats(value)
    return read_vector(value)


def _name(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
