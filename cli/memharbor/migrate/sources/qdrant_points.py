"""
Embeddings of an export of Qdrant's points, found by id: kept in a temporary file, since they may be larger than memory.

Read: one point a line, a list of points, and answers of the scroll API, one or many. Source: Qdrant, Points, Scroll.
"""

from __future__ import annotations

import sqlite3
import struct
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from memharbor.errors import SourceDataError
from memharbor.migrate.sources.json_stream import JsonStream, digest_file, opened
from memharbor.migrate.sources.json_values import Problem, id_text, parse_value, read_vector, unpack_floats

_BATCH_ROWS = 200


class PointVectors:
    """
    Embeddings by id.

    Args:
        connection: Of a database with a table `points`, filled.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def find_many(self, ids: Sequence[str]) -> Mapping[str, Sequence[float] | Problem]:
        """Find embeddings by the ids of their points; see `Vectors`."""
        found = ((each, self._find(each)) for each in ids)
        return {each: vector for each, vector in found if vector is not None}

    def _find(self, point_id: str) -> Sequence[float] | Problem | None:
        row = self._connection.execute("select vector, reason, detail from points where id = ?", (point_id,)).fetchone()
        if row is None:
            return None
        vector, reason, detail = row
        return Problem(reason, detail) if vector is None else unpack_floats(vector)


class PointsExport:
    """
    An export of Qdrant's points.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def describe(self) -> tuple[str, int | None]:
        """Say what the file is, and the dimensions of its first embedding; see `VectorStore`."""
        return f"sha256 {digest_file(self._path)[1]}", find_dims(self._path)

    def lend(self) -> AbstractContextManager[PointVectors]:
        """Lend the embeddings; see `VectorStore`."""
        return point_vectors(self._path)


@contextmanager
def point_vectors(path: Path) -> Iterator[PointVectors]:
    """
    Lend the embeddings of an export; the temporary file goes with the block.

    Raises:
        SourceDataError: It cannot be read, or is no export of points. One bad embedding is told when it is asked for.
    """
    with (
        tempfile.TemporaryDirectory(prefix="memharbor-") as folder,
        closing(sqlite3.connect(Path(folder) / "points.db", isolation_level=None)) as connection,
    ):
        connection.execute("pragma journal_mode = off")
        connection.execute("pragma synchronous = off")
        connection.execute(
            "create table points (id text primary key, vector blob, reason text, detail text) without rowid"
        )
        with opened(path) as (file, _):
            rows = _rows(read_points(JsonStream(file.read, f"`{path}`"), f"`{path}`"))
            while batch := list(islice(rows, _BATCH_ROWS)):
                connection.execute("begin")
                connection.executemany("insert or replace into points values (?, ?, ?, ?)", batch)
                connection.execute("commit")
        yield PointVectors(connection)


def find_dims(path: Path) -> int | None:
    """Find the dimensions of the first embedding of an export."""
    with opened(path) as (file, _):
        points = read_points(JsonStream(file.read, f"`{path}`"), f"`{path}`")
        return next((len(vector) for _, vector in points if vector and not isinstance(vector, Problem)), None)


def _rows(
    points: Iterator[tuple[str, Sequence[float] | Problem | None]],
) -> Iterator[tuple[str, bytes | None, str | None, str | None]]:
    for point_id, vector in points:
        if isinstance(vector, Problem):
            yield point_id, None, vector.reason, vector.detail
            continue
        try:
            yield point_id, struct.pack(f"<{len(vector or ())}f", *(vector or ())), None, None
        except OverflowError:
            yield point_id, None, "bad-vector", "a value of its embedding is larger than any float32"


def read_points(stream: JsonStream, name: str) -> Iterator[tuple[str, Sequence[float] | Problem | None]]:
    """
    Read points one after the other, each its id and its embedding.

    Raises:
        SourceDataError: Something in it is no point and no answer with points.
    """
    while stream.peek():
        yield from _points(stream, name)


def _points(stream: JsonStream, name: str) -> Iterator[tuple[str, Sequence[float] | Problem | None]]:
    if stream.peek() == b"[":
        for _ in stream.elements():
            yield from _points(stream, name)
        return
    kept: dict[str, Any] = {}
    has_points = False
    for raw in stream.members():
        key = parse_value(raw)
        if key in ("result", "points") and stream.peek() in (b"[", b"{"):
            has_points = True
            yield from _points(stream, name)
        else:
            if key in ("id", "vector", "vectors"):
                kept["id" if key == "id" else "vector"] = parse_value(stream.value().raw)
            else:
                stream.value(limit=0)
    if has_points:
        return
    point_id = kept.get("id")
    if not isinstance(point_id, str | int) or isinstance(point_id, bool):
        raise SourceDataError(f"{name} has an object that is no point of Qdrant's, before byte {stream.offset:,}")
    yield canonical_id(id_text(point_id)), _vector(kept.get("vector"))


def _vector(value: Any) -> Sequence[float] | Problem | None:
    """Read a point's embedding: a list, or the only dense one of several that have names."""
    if isinstance(value, Problem):
        return Problem("bad-vector", f"its point's embedding: {value.detail}")
    if isinstance(value, dict):
        dense = [each for each in value.values() if isinstance(each, list)]
        if len(dense) > 1:
            return Problem("bad-vector", f"its point has {len(dense)} embeddings, and none is the memory's for certain")
        value = dense[0] if dense else None
    return read_vector(value)


def canonical_id(text: Any) -> str:
    """
    Spell a UUID with dashes, whether it had them or not; what is none stays as it is.

    >>> canonical_id("0D4F5A1E6F0B5D639A3E8A8F6F0F7C11")
    '0d4f5a1e-6f0b-5d63-9a3e-8a8f6f0f7c11'
    """
    try:
        return str(uuid.UUID(str(text)))
    except ValueError:
        return str(text)


def is_uuid(text: str) -> bool:
    """
    Tell a UUID from other ids.

    >>> is_uuid("0d4f5a1e-6f0b-5d63-9a3e-8a8f6f0f7c11"), is_uuid("7")
    (True, False)
    """
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True
