"""
Write memories to a file that `memharbor migrate run --from file` reads again, or that looks like the Platform's export.

Beside it stands a manifest: how many memories of how many users, and the SHA-256 of the file. Both appear whole or not at
all, the file last.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from memharbor.errors import StateRefusedError
from memharbor.migrate.record import Record, pack_vector

Shape = Literal["jsonl", "platform"]
_OWN = ("hash", "user_id", "agent_id", "run_id", "created_at", "updated_at", "text_lemmatized")
_PLATFORM = ("user_id", "agent_id", "app_id", "categories", "expiration_date", "created_at", "updated_at")


def spell_line(record: Record) -> dict[str, Any]:
    """
    Spell a memory as a line of our own: everything that is of it, its embedding as base64 of little-endian float32.

    >>> import uuid
    >>> record = Record("memory", uuid.UUID(int=1), "1", {"data": "likes tea", "user_id": "alice", "mood": "good"})
    >>> sorted(spell_line(record))
    ['id', 'memory', 'metadata', 'user_id']
    """
    data = record.data
    line = {"id": str(record.id), "memory": data.get("data")}
    line |= {name: data[name] for name in _OWN if name in data}
    line["metadata"] = {name: value for name, value in data.items() if name not in (*_OWN, "data")}
    optional = {
        "state": record.state if record.state != "active" else None,
        "embedding": pack_vector(record.embedding),
        **{name: moment.isoformat() for name, moment in record.lifecycle.items()},
    }
    return line | {name: value for name, value in optional.items() if value is not None}


def spell_platform(record: Record) -> dict[str, Any]:
    """
    Spell a memory as the Platform's list does: no embedding, no hash; what it has no field for is metadata.

    Source: docs.mem0.ai, API reference, Get Memories.
    """
    data = record.data
    line = {"id": str(record.id), "memory": data.get("data")}
    line |= {name: data.get(name) for name in _PLATFORM}
    line["session_id"] = data.get("run_id")
    dropped = {*_OWN, *_PLATFORM, "data"}
    line["metadata"] = {name: value for name, value in data.items() if name not in dropped}
    return line


def write_file(records: Iterable[Record], path: Path, shape: Shape, *, replace: bool = False) -> dict[str, Any]:
    """
    Write memories to a file, gzip where its name ends in `.gz`.

    Args:
        records: Memories, streamed.
        path: The file; its folder must exist. The manifest is `<path>.manifest.json`.
        shape: `jsonl`, which has everything; or `platform`, one JSON object with `results`.
        replace: Whether one that is there may be replaced.

    Returns:
        The manifest: `file`, `shape`, `memories`, `users`, `sha256`, `bytes`.

    Raises:
        StateRefusedError: There is one; nothing was changed.
    """
    if path.exists() and not replace:
        raise StateRefusedError(f"`{path}` is there already", hint="pass `--replace`, or name another file")
    counts = _Counts()
    incoming = path.with_name(f".{path.name}.{os.getpid()}")
    manifest_path = path.with_name(f"{path.name}.manifest.json")
    manifest_incoming = manifest_path.with_name(f".{manifest_path.name}.{os.getpid()}")
    try:
        with _opened(incoming) as raw:
            if path.name.endswith(".gz"):
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
                    _write(packed, counts.of(records), shape)
            else:
                _write(raw, counts.of(records), shape)
        with incoming.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest = {
            "file": path.name,
            "shape": shape,
            "memories": counts.memories,
            "users": len(counts.users),
            "sha256": digest,
            "bytes": incoming.stat().st_size,
        }
        with _opened(manifest_incoming) as raw:
            raw.write((json.dumps(manifest, indent=1) + "\n").encode())
        # The file last: where it is, its manifest is, whatever ends this process.
        manifest_incoming.replace(manifest_path)
        incoming.replace(path)
    finally:
        incoming.unlink(missing_ok=True)
        manifest_incoming.unlink(missing_ok=True)
    return manifest


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write, which nobody else may read, and see to it that the disk has it."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


class _Counts:
    def __init__(self) -> None:
        self.memories, self.users = 0, set[str | None]()

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            self.memories += 1
            self.users.add(record.user_id)
            yield record


def _write(file: IO[bytes] | gzip.GzipFile, records: Iterable[Record], shape: Shape) -> None:
    def put(line: Mapping[str, Any], end: str) -> None:
        file.write((json.dumps(line, ensure_ascii=False, separators=(",", ":")) + end).encode())

    if shape == "jsonl":
        for record in records:
            put(spell_line(record), "\n")
        return
    file.write(b'{"results":[')
    for number, record in enumerate(records):
        file.write(b",\n" if number else b"\n")
        put(spell_platform(record), "")
    file.write(b"\n]}\n")
