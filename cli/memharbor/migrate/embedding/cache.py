"""
Keep embeddings, so that no text is paid for twice: one SQLite file, by a hash of model, dimensions and text.

Texts are not in it. It is written in write-ahead mode and each batch is one transaction that is on the disk when `store`
returns, so that a process may be killed at any instant; several processes may share it.
Source: SQLite documentation, Write-Ahead Logging and PRAGMA synchronous.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from memharbor.errors import ConfigError

FILE = "embeddings.db"
_FORMAT = 1
_BUSY_SECONDS = 60.0


def cache_key(model: str, dims: int, text: str) -> bytes:
    """
    Hash what an embedding depends on.

    >>> cache_key("m", 8, "text") == cache_key("m", 8, "text") != cache_key("m", 9, "text")
    True
    """
    # As JSON, so that no two triples are spelled alike.
    return hashlib.sha256(json.dumps([model, dims, text]).encode()).digest()


def pack(vector: Sequence[float]) -> bytes:
    """
    Spell an embedding as little-endian float32.

    Raises:
        OverflowError: A value is too large for one.
    """
    return struct.pack(f"<{len(vector)}f", *vector)


def unpack(packed: bytes) -> tuple[float, ...]:
    """
    Read what `pack` spelled.

    >>> unpack(pack((1.0, -0.5)))
    (1.0, -0.5)
    """
    return struct.unpack(f"<{len(packed) // 4}f", packed)


class EmbeddingCache:
    """
    Embeddings of one model, kept in a folder. A context manager; threads may share it.

    Args:
        folder: Where the file is; made where it is missing.
        model: That made the embeddings.
        dims: Of each.

    Raises:
        ConfigError: The folder cannot be written to, or its file is no such cache.
    """

    def __init__(self, folder: Path, model: str, dims: int) -> None:
        self._path = folder / FILE
        self._model, self._dims = model, dims
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
        except OSError as exc:
            raise ConfigError(f"`{folder}` cannot be written to: {exc}") from exc
        with self._errors():
            self._connection = sqlite3.connect(
                self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> Self:
        """Lend the cache."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; what was stored is there."""
        with self._lock:
            self._connection.close()

    def find(self, texts: Iterable[str]) -> dict[str, tuple[float, ...]]:
        """
        Find the embeddings of those texts that have one.

        Raises:
            ConfigError: The file cannot be read.
        """
        found = {}
        with self._lock, self._errors():
            for text in texts:
                key = cache_key(self._model, self._dims, text)
                row = self._connection.execute("select vector from embeddings where key = ?", (key,)).fetchone()
                if row is not None and len(row[0]) == 4 * self._dims:
                    found[text] = unpack(row[0])
        return found

    def store(self, embeddings: Iterable[tuple[str, Sequence[float]]]) -> None:
        """
        Keep embeddings of texts; they are on the disk when this returns.

        Raises:
            ConfigError: The file cannot be written to.
        """
        rows = [(cache_key(self._model, self._dims, text), pack(vector)) for text, vector in embeddings]
        with self._lock, self._errors(), self._transaction():
            self._connection.executemany("insert or replace into embeddings (key, vector) values (?, ?)", rows)

    def _prepare(self) -> None:
        self._connection.execute("pragma journal_mode = wal")
        self._connection.execute("pragma synchronous = full")
        found = self._connection.execute("pragma user_version").fetchone()[0]
        if found not in (0, _FORMAT):
            raise ConfigError(f"`{self._path}` was written by another version of Memharbor", hint=self._remedy)
        with self._transaction():
            self._connection.execute(
                "create table if not exists embeddings (key blob primary key, vector blob not null) without rowid"
            )
            self._connection.execute(f"pragma user_version = {_FORMAT}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._connection.execute("rollback")
            raise
        self._connection.execute("commit")

    @property
    def _remedy(self) -> str:
        return f"delete `{self._path}`, or name another folder; its embeddings are asked for again"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise ConfigError(f"`{self._path}` cannot be used as a cache: {exc}", hint=self._remedy) from exc
