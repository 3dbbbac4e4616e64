"""
One zip of OpenMemory's export: the user, and what is its. `memories.json` says all that `memories.jsonl.gz` does, and more.

Two programs write it: the API, with dashes in its UUIDs, and `export_openmemory.sh`, which has them as the database does.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from memharbor.errors import SourceDataError
from memharbor.migrate.record import RawItem, Refusal
from memharbor.migrate.sources.json_stream import VALUE_BYTES, JsonStream, Value
from memharbor.migrate.sources.json_values import Problem, parse_object, parse_value, raw_item
from memharbor.migrate.sources.openmemory_item import Change, Memory, change_item, memory_item, refuse
from memharbor.migrate.sources.qdrant_points import PointVectors, canonical_id

_MEMBER = "memories.json"
_LISTS = ("memories", "status_history")


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


def read_zip(path: Path, vectors: PointVectors | None, number: int, *, prefix: str = "") -> Iterator[RawItem | Refusal]:
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
        for ordinal, (key, value) in enumerate(_find_items(JsonStream(file.read, f"`{path}`")), 1):
            if ordinal > number:
                yield _item(key, value, header, vectors, f"{prefix}{ordinal}")


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


def _item(key: str, value: Value, header: _Header, vectors: PointVectors | None, position: str) -> RawItem | Refusal:
    kind: Any = "memory" if key == "memories" else "history"
    fields: Any = parse_object(value.raw)
    if not value.is_whole:
        fields = Problem("bad-json", f"it is larger than {VALUE_BYTES:,} bytes")
    if isinstance(fields, Problem):
        return refuse(fields, kind, position, raw_item(value.raw, is_whole=value.is_whole), position)
    owner = header.user["user_id"]
    if key == "status_history":
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
