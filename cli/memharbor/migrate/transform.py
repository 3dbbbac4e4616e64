"""
Make of an item, in any shape that one of Mem0's products writes, a record as Mem0 2.x stores it; or say why not. Pure.

Shapes: payloads of the Python SDK (`data`, flattened metadata) and of the TypeScript SDK (camelCase); memories of the
Platform, of export files and of canonical tables (`memory` or `content`, `metadata`, `categories`).
Source of the shapes: mem0ai 0.1 to 2.2 `mem0/memory/main.py`, mem0-ts `src/oss`, the Platform's OpenAPI description.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Any

from memharbor.migrate.record import NAMESPACE, RawItem, Record, Refusal
from memharbor.migrate.vector import Vector

TEXT_BYTES_MAX = 1 << 20
# JSON is spelled, read and walked by functions that call themselves.
_DEPTH_MAX = 100
_YEARS = range(1970, 2201)

OWNERS = ("user_id", "agent_id", "run_id")
_TIMES = ("created_at", "updated_at")
_OPERATIONS = {
    "add": "create",
    "create": "create",
    "created": "create",
    "insert": "create",
    "delete": "delete",
    "deleted": "delete",
}
_RESERVED = ("data", "hash", *OWNERS, *_TIMES, "text_lemmatized")
# What the TypeScript SDK calls them in its payloads; nothing else of a payload is renamed, since it is the caller's own.
_CAMEL = {
    "userId": "user_id",
    "agentId": "agent_id",
    "runId": "run_id",
    "createdAt": "created_at",
    "updatedAt": "updated_at",
    "textLemmatized": "text_lemmatized",
    "attributedTo": "attributed_to",
}
# Of its entities only: in a memory these could be the caller's own. Source: npm mem0ai 3.3.1, `dist/oss/index.js`.
_CAMEL_ENTITY = {"entityType": "entity_type", "linkedMemoryIds": "linked_memory_ids"}
# Of a memory in an answer, an export or a table: other names of Mem0's fields …
_TEXTS = ("memory", "content", "text")
_ALIASES = {**_CAMEL, "session_id": "run_id"}
# … and what is of the answer or the row, not of the memory.
_DROPPED = {"id", "score", "embedding", "vector", "state", "owner", "organization", "synthesized"}
# With an offset, and as PostgreSQL reads it too; Python knows more spellings.
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d(:?\d\d)?)")
_IMPOSSIBLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Choice:
    """
    Which items travel, and under which name.

    Args:
        users: Only these users, as the source names them; `None` for all.
        from_at: Only what was created then or later.
        to_at: Only what was created before then.
        remap_users: New name by name in the source; empty keeps every name.
        dims: Dimensions of the target's embeddings.
        carry_vectors: Whether embeddings of the source are taken; else all are made anew.
    """

    users: frozenset[str] | None = None
    from_at: datetime | None = None
    to_at: datetime | None = None
    remap_users: Mapping[str, str] = field(default_factory=dict)
    dims: int | None = None
    carry_vectors: bool = True


class _BadItemError(Exception):
    """Carries a reason and its detail out of the depth of an item."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def transform(item: RawItem, source: str, choice: Choice) -> Record | Refusal | None:
    """
    Make a record of an item.

    Args:
        item: As its source has it.
        source: The source's name, part of ids that are made.
        choice: Which items travel.

    Returns:
        The record; a refusal with its reason; `None` where the item was not chosen.
    """
    try:
        _check_values(item.data, "")
        if item.kind == "history" and item.data.get("table") == "messages":
            return None  # Mem0's short memory of a conversation; it stays in the work folder
        data = _relation(item, source) if item.kind in ("relationship", "history") else _payload(item)
        if item.kind == "entity":
            data = _linked(data, source)
        if not item.is_settled:
            if not _is_chosen(data, choice):
                return None
            if choice.remap_users:
                data = _remapped(data, choice.remap_users)
        embedding = _vector(item.vector, choice) if item.vector is not None and choice.carry_vectors else None
        lifecycle = {name: _instant(name, value) for name, value in item.lifecycle.items() if value is not None}
        # The Platform keeps what a newer memory has replaced, and does not find it any more.
        is_replaced = item.state == "active" and bool(item.data.get("replaced_by")) and item.kind == "memory"
        state = "archived" if is_replaced else item.state
        if is_replaced and data.get("updated_at"):
            lifecycle.setdefault("archived_at", _instant("updated_at", data["updated_at"]))
        return Record(item.kind, record_id(item, source), item.source_id, data, embedding, state, lifecycle)
    except _BadItemError as bad:
        return Refusal(bad.reason, bad.detail, item)


def record_id(item: RawItem, source: str) -> uuid.UUID:
    """
    Keep the UUID that an item has, or make one that is the same in every run.

    >>> item = RawItem("memory", "mem_abc123", {}, "1")
    >>> record_id(item, "export") == record_id(item, "export") != record_id(item, "platform")
    True
    """
    if not item.source_id:
        raise _BadItemError("no-id", "it has no id")
    return _uuid_of(item.source_id, source)


def _uuid_of(source_id: str, source: str) -> uuid.UUID:
    try:
        return uuid.UUID(source_id)
    except ValueError:
        return uuid.uuid5(NAMESPACE, f"{source}:{source_id}")


def _payload(item: RawItem) -> dict[str, Any]:
    """Flatten a memory or an entity as Mem0 2.x does."""
    is_payload = isinstance(item.data.get("data"), str) and not isinstance(item.data.get("memory"), str)
    shaped = _of_payload if is_payload else _of_export
    found = dict(item.data) if item.is_settled else shaped(item.data)
    text = found.get("data")
    if not isinstance(text, str) or not text.strip():
        raise _BadItemError("no-text", "it has no text" if text is None else f"its text is {json.dumps(text)[:40]}")
    if len(text.encode()) > TEXT_BYTES_MAX:
        raise _BadItemError("text-too-long", f"its text has {len(text.encode()):,} bytes")
    for name in OWNERS:
        if found.get(name) in (None, ""):
            found.pop(name, None)
        else:
            found[name] = str(found[name])
    if not any(name in found for name in OWNERS):
        raise _BadItemError("no-owner", "it has none of user_id, agent_id and run_id")
    for name in _TIMES:
        if found.get(name) is None:
            found.pop(name, None)
        else:
            found[name] = instant_text(name, found[name])
    if not isinstance(found.get("hash"), str):
        found["hash"] = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    if not isinstance(found.get("text_lemmatized"), str):
        found["text_lemmatized"] = text.lower()
    return found


def _of_payload(given: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {_CAMEL[name]: value for name, value in given.items() if name in _CAMEL}
    return renamed | {name: value for name, value in given.items() if name not in _CAMEL}


def _of_export(given: Mapping[str, Any]) -> dict[str, Any]:
    metadata = given.get("metadata")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise _BadItemError("bad-json", "its metadata is no JSON object")
    metadata = metadata or {}
    text_name = next((name for name in _TEXTS if given.get(name) is not None), "data")
    own = {_ALIASES.get(name, name): value for name, value in given.items() if value is not None}
    own |= {name: given[name] for name in _RESERVED if given.get(name) is not None}
    found = {name: value for name, value in own.items() if name not in _DROPPED | {"metadata", text_name}}
    if text_name in given:
        found["data"] = given[text_name]
    for name, value in metadata.items():
        if name not in found and (name != "data"):
            # An export may name the owner nowhere else.
            found[name] = value
        elif found.get(name) != value:
            # Metadata of the caller's own must not become the memory's text or owner.
            found[f"metadata_{name}"] = value
    return found


def _linked(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Name the memories of an entity by the ids that they get."""
    found = {_CAMEL_ENTITY.get(name, name): value for name, value in data.items()}
    linked = found.get("linked_memory_ids")
    if isinstance(linked, list):
        found["linked_memory_ids"] = [str(_uuid_of(str(each), source)) for each in linked]
    return found


def _relation(item: RawItem, source: str) -> dict[str, Any]:
    """Name the columns of a relationship or a change of the history as the schema contract does."""
    if item.kind == "relationship":
        data = {name: value for name, value in item.data.items() if value is not None}
        names: tuple[str, ...] = ("source_memory_id", "target_memory_id")
        if not str(data.get("relationship_type") or "").strip():
            raise _BadItemError("bad-json", "it has no relationship_type")
        strength = data.get("strength", 1)
        if not isinstance(strength, int | float) or isinstance(strength, bool) or not 0 <= strength <= 1:
            raise _BadItemError("bad-number", f"its strength is {str(strength)[:40]}, which is not between 0 and 1")
    else:
        data, names = _change(item.data), ("memory_id",)
    for name in names:
        if not data.get(name):
            raise _BadItemError("dangling", f"it names no {name}")
        # As the memory's own id was made.
        data[name] = str(_uuid_of(str(data[name]), source))
    for name in ("created_at", "changed_at"):
        if data.get(name) is not None:
            data[name] = instant_text(name, data[name])
    if data.get("user_id") in (None, ""):
        data.pop("user_id", None)
    else:
        data["user_id"] = str(data["user_id"])
    return data


def _change(given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Name the columns of a change, whoever recorded it.

    Source: mem0ai `mem0/memory/storage.py`; ChatSG's `mem0_history`; OpenMemory's `memory_status_history`.
    """

    def first(*names: str) -> Any:
        return next((given[name] for name in names if given.get(name) not in (None, "")), None)

    word = str(first("operation", "event", "action") or "update").lower()
    old = first("old_value", "old_memory", "previous_content", "previous_value", "old_content")
    if old is None and first("old_state") is not None:
        old = {"state": first("old_state")}
    found = {
        "memory_id": first("memory_id"),
        "user_id": first("user_id"),
        "operation": _OPERATIONS.get(word, "update"),
        "old_value": old if old is None or isinstance(old, Mapping) else {"data": str(old)},
        "actor": str(first("actor", "actor_id", "changed_by") or given.get("table") or "migration"),
        "changed_at": first("changed_at", "updated_at", "created_at", "timestamp"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _is_chosen(data: Mapping[str, Any], choice: Choice) -> bool:
    if choice.users is not None and data.get("user_id") not in choice.users:
        return False
    if choice.from_at is None and choice.to_at is None:
        return True
    at = data.get("created_at", data.get("changed_at"))
    if at is None:
        return False
    moment = _instant("created_at", at)
    return (choice.from_at is None or moment >= choice.from_at) and (choice.to_at is None or moment < choice.to_at)


def _remapped(data: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    user = data.get("user_id")
    if user is None:
        return data
    if user not in names:
        raise _BadItemError("not-mapped", f"user {user!r} is not in the file of `--remap-users`")
    return {**data, "user_id": names[user]}


def _vector(vector: Sequence[Any], choice: Choice) -> Vector:
    if choice.dims is not None and len(vector) != choice.dims:
        raise _BadItemError("wrong-dims", f"its embedding has {len(vector)} dimensions and the schema {choice.dims}")
    try:
        found = Vector.of(vector)
    except (OverflowError, TypeError, ValueError, struct.error):
        raise _BadItemError("bad-vector", "its embedding has a value that is no float32") from None
    if not found.is_finite:
        raise _BadItemError("bad-vector", "its embedding has a value that is not finite")
    if found.is_zero:
        raise _BadItemError("bad-vector", "its embedding is all zeros, which is near to nothing by cosine distance")
    return found


def instant_text(name: str, value: Any) -> str:
    """
    Check an instant and spell it as Mem0 does; one that has an offset stays as it was written.

    Args:
        name: Of the field.
        value: ISO 8601 text, naive ones being UTC; or seconds or milliseconds since 1970.

    >>> instant_text("created_at", "2025-01-15 10:00:00"), instant_text("created_at", 1736935200)
    ('2025-01-15T10:00:00+00:00', '2025-01-15T10:00:00+00:00')
    """
    moment = _instant(name, value)
    as_it_was = str(value).strip()
    return as_it_was if _INSTANT.fullmatch(as_it_was) else moment.isoformat()


def _instant(name: str, value: Any) -> datetime:
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, int | float):
            seconds = value / 1000 if abs(value) > 1e11 else value
            moment = datetime.fromtimestamp(seconds, UTC)
        else:
            moment = datetime.fromisoformat(str(value).strip())
    except (ValueError, OverflowError, OSError):
        raise _BadItemError("bad-time", f"its {name} is {str(value)[:40]!r}") from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    if moment.year not in _YEARS:
        raise _BadItemError("bad-time", f"its {name} is in the year {moment.year}")
    return moment.astimezone(UTC)


def _check_values(value: Any, path: str, depth: int = 0) -> None:
    """Refuse what PostgreSQL's text and jsonb cannot hold, wherever it is."""
    if depth > _DEPTH_MAX:
        raise _BadItemError("bad-json", f"it is nested deeper than {_DEPTH_MAX} levels")
    if isinstance(value, str):
        if _IMPOSSIBLE.search(value):
            raise _BadItemError("bad-text", f"`{path[1:]}` has a NUL character or half of a surrogate pair")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _BadItemError("bad-number", f"`{path[1:]}` is {value}")
    elif isinstance(value, Mapping):
        for name, part in value.items():
            _check_values(name, f"{path}.{name[:40]!r}", depth + 1)
            _check_values(part, f"{path}.{name[:40]}", depth + 1)
    elif isinstance(value, Iterable):
        for number, part in enumerate(value):
            _check_values(part, f"{path}[{number}]", depth + 1)


def names_user(data: Any, user_id: str) -> bool:
    """
    Tell whether the fields of an item or a record are of a user, in any of the shapes.

    >>> names_user({"metadata": {"user_id": "alice"}}, "alice"), names_user({"userId": 7}, "7"), names_user([], "7")
    (True, True, False)
    """
    if not isinstance(data, Mapping):
        return False
    given = (data, data.get("metadata"))
    fields = [each for each in given if isinstance(each, Mapping)]
    return any(str(each[name]) == user_id for each in fields for name in ("user_id", "userId") if name in each)


def parse_bound(text: str) -> datetime:
    """
    Read a moment of `--from-date` or `--to-date`: ISO 8601; a day is its beginning in UTC.

    Raises:
        ValueError: It is neither.

    >>> parse_bound("2025-01-15").isoformat()
    '2025-01-15T00:00:00+00:00'
    """
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        return datetime.combine(date.fromisoformat(text), time(), UTC)
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
