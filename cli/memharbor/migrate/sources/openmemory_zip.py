"""
One zip of OpenMemory's export: the user, and what is its. `memories.json` says all that `memories.jsonl.gz` does, and more.

Two programs write it: the API, with dashes in its UUIDs, and `export_openmemory.sh`, which has them as the database does.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from memharbor.errors import SourceDataError
from memharbor.migrate.record import Kind, RawItem, Refusal
from memharbor.migrate.sources.json_stream import VALUE_BYTES, JsonStream, Value
from memharbor.migrate.sources.json_values import Problem, parse_object, parse_value, raw_item
from memharbor.migrate.sources.openmemory_item import Change, Memory, change_item, memory_item, refuse
from memharbor.migrate.sources.openmemory_vectors import Vectors
from memharbor.migrate.sources.qdrant_points import canonical_id

_MEMBER = "memories.json"
_LISTS = ("memories", "status_history")
# Embeddings are asked for so many at a time; items of so many bytes are held for it.
_BATCH_ITEMS = 200
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class _Header:
    """
    Whose export it is.

    Args:
        user: As the export has it.
        apps: Names by id.
        categories: Names by id.
    """

    user: Mapping[str, Any]
    apps: Mapping[str, Any]
    categories: Mapping[str, Any]


@dataclass(frozen=True)
class _Item:
    """
    One item of one of the lists.

    Args:
        ordinal: Which one it is, counted from 1.
        key: Of its list.
        value: As it stands there.
        fields: What it says.
    """

    ordinal: int
    key: str
    value: Value
    fields: dict[str, Any] | Problem


def read_zip(path: Path, vectors: Vectors | None, number: int, *, prefix: str = "") -> Iterator[RawItem | Refusal]:
    """
    Read the memories of an export, and the changes of their states.

    Args:
        path: The zip.
        vectors: Where embeddings are found.
        number: So many items are passed over.
        prefix: What positions begin with; the item's number follows.

    Raises:
        SourceDataError: It is no such zip, or damaged.
    """
    with _member(path) as file:
        header = _read_header(JsonStream(file.read, f"`{path}`"), path)
    with _member(path) as file:
        items = (
            _Item(ordinal, key, value, _fields(value))
            for ordinal, (key, value) in enumerate(_find_items(JsonStream(file.read, f"`{path}`")), 1)
            if ordinal > number
        )
        for batch in _batches(items):
            found = {} if vectors is None else vectors.find_many([*_ids(batch)])
            for item in batch:
                yield _item(item, header, found, f"{prefix}{item.ordinal}")


def _find_items(stream: JsonStream) -> Iterator[tuple[str, Value]]:
    for raw in stream.members():
        key = parse_value(raw)
        if key in _LISTS and stream.peek() == b"[":
            for _ in stream.elements():
                yield key, stream.value()
        else:
            stream.value(limit=0)


def _read_header(stream: JsonStream, path: Path) -> _Header:
    found: dict[str, Any] = {}
    if stream.peek() != b"{":
        stream.refuse()
    for raw in stream.members():
        key = parse_value(raw)
        if key in ("user", "apps", "categories"):
            found[key] = parse_value(stream.value().raw)
        else:
            stream.value(limit=0)
    user = found.get("user")
    if not isinstance(user, dict) or not isinstance(user.get("user_id"), str):
        raise SourceDataError(
            f"`{_MEMBER}` of `{path}` does not say whose memories it has", hint="export it again, or give the database"
        )
    return _Header(user, _names(found.get("apps")), _names(found.get("categories")))


def _names(listed: Any) -> dict[str, Any]:
    rows = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return {canonical_id(each.get("id")): each.get("name") for each in rows}


def _fields(value: Value) -> dict[str, Any] | Problem:
    return (
        parse_object(value.raw) if value.is_whole else Problem("bad-json", f"it is larger than {VALUE_BYTES:,} bytes")
    )


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.value.raw)
        if len(batch) == _BATCH_ITEMS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _ids(batch: Iterable[_Item]) -> Iterator[str]:
    of_memories = (item.fields for item in batch if item.key == "memories")
    return (canonical_id(each["id"]) for each in of_memories if not isinstance(each, Problem) and each.get("id"))


def _item(
    item: _Item, header: _Header, vectors: Mapping[str, Sequence[float] | Problem], position: str
) -> RawItem | Refusal:
    fields = item.fields
    if isinstance(fields, Problem):
        kind: Kind = "memory" if item.key == "memories" else "history"
        raw = raw_item(item.value.raw, is_whole=item.value.is_whole)
        return refuse(fields, kind, position, raw, position)
    owner = header.user["user_id"]
    if item.key == "status_history":
        changer = owner if canonical_id(fields.get("changed_by")) == canonical_id(header.user.get("id")) else None
        return change_item(Change(fields, owner, changer, has_memory=True), position)
    if fields.get("user_id") is not None and canonical_id(fields["user_id"]) != canonical_id(header.user.get("id")):
        owner = None
    # One whose name the export does not tell is known by its id still.
    listed = fields.get("category_ids")
    ids = [canonical_id(each) for each in listed] if isinstance(listed, list) else []
    categories = sorted(str(header.categories.get(each) or each) for each in ids)
    app = header.apps.get(canonical_id(fields.get("app_id")))
    return memory_item(Memory(fields, owner, app, categories, {}), vectors, position)


@contextmanager
def _member(path: Path) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == _MEMBER]
            if not names:
                raise SourceDataError(f"`{path}` has no `{_MEMBER}`", hint="give a zip that OpenMemory's export wrote")
            if archive.getinfo(names[0]).flag_bits & 1:
                raise SourceDataError(f"`{path}` is encrypted", hint=f"unpack it and zip it again: `unzip {path}`")
            with archive.open(names[0]) as file:
                yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as exc:
        raise SourceDataError(f"`{path}` is damaged: {exc}", hint="export it again") from exc
    except OSError as exc:
        raise SourceDataError(
            f"`{path}` cannot be read: {exc.strerror or exc}", hint=f"look with `ls -l {path}`"
        ) from exc
