"""
What travels through a migration, from any source to any target. Pure.

One memory, entity, relationship or change of the history. A source reads `RawItem`s, as they are there; `memharbor.migrate.transform` makes a `Record` of each, or says by a
`Refusal` why it cannot. Between the steps they lie in the work folder, one JSON object a line.
"""

from __future__ import annotations

import base64
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, Protocol

from memharbor.migrate.vector import Vector

Kind = Literal["memory", "entity", "relationship", "history"]
State = Literal["active", "paused", "archived", "deleted"]

# Ids of sources that are no UUIDs become uuid5 of this, the source's name and the id: a second run meets its own rows.
NAMESPACE = uuid.UUID("0d4f5a1e-6f0b-5d63-9a3e-8a8f6f0f7c11")


@dataclass(frozen=True)
class RawItem:
    """
    One item as its source has it.

    Args:
        kind: What it is.
        source_id: Its id there, as text; empty where it has none.
        data: Its fields as JSON has them. A memory has the names that one of Mem0's own shapes uses (`memory`, `data`,
            `content` or `text`; `user_id` or `userId`; `metadata` or flattened; `created_at` or `createdAt` …): what they
            mean is told once, in `memharbor.migrate.transform`. Instants stay the source's text.
        position: Reading `after` it yields what comes after this item; opaque to all but the source.
        vector: Its embedding as the source has it, unchecked; `None` where it has none.
        state: State of a memory, for sources that know one.
        lifecycle: `archived_at`, `deleted_at`, `expires_at` as the source's text, for sources that know them.
        is_settled: Whether it was chosen, renamed and transformed already, as what a later step refused was.
    """

    kind: Kind
    source_id: str
    data: Mapping[str, Any]
    position: str
    vector: Sequence[float] | None = None
    state: State = "active"
    lifecycle: Mapping[str, str] = field(default_factory=dict)
    is_settled: bool = False


@dataclass(frozen=True)
class Record:
    """
    One item as a target takes it: checked, with a UUID.

    Args:
        kind: What it is.
        id: The UUID that it has in the source, else `uuid5(NAMESPACE, "<source>:<source_id>")`.
        source_id: Its id in the source.
        data: Of a memory or an entity, the payload as Mem0 2.x writes it; of a relationship or a change of the history, the
            columns of the schema contract.
        embedding: Float32 values; `None` until it is embedded.
        state: State of a memory.
        lifecycle: `archived_at`, `deleted_at`, `expires_at` of a memory, in UTC.
        is_made: Whether the embedding is not the source's, but was made by this run's own model.
    """

    kind: Kind
    id: uuid.UUID
    source_id: str
    data: Mapping[str, Any]
    embedding: Vector | None = None
    state: State = "active"
    lifecycle: Mapping[str, datetime] = field(default_factory=dict)
    is_made: bool = False

    @property
    def text(self) -> str:
        """The text that is embedded; empty where there is none."""
        return text_of({"data": self.data})

    @property
    def user_id(self) -> str | None:
        """Whose it is."""
        return self.data.get("user_id")

    def embedded(self, embedding: Vector) -> Record:
        """Make the same record with an embedding."""
        return replace(self, embedding=embedding)


@dataclass(frozen=True)
class Refusal:
    """
    Why an item cannot travel on; a line of the dead-letter file.

    Args:
        reason: A code of `memharbor.migrate.reasons`.
        detail: What is wrong with it, for a person: the cause, not the whole item.
        item: The item as it was, so that it can be mended and tried again.
    """

    reason: str
    detail: str
    item: RawItem


@dataclass(frozen=True)
class SourceInfo:
    """
    What a source says of itself before it is read.

    Args:
        name: Which source, for instance `platform` or `mem0-pgvector`; part of the ids that are made.
        identity: Which one of them and what it held, without secrets: tells a changed source from the same one.
        counts: Items by kind, where the source can tell without reading all of it.
        dims: Dimensions of its embeddings; `None` where it has none.
        size_bytes: How large it is, where it can tell.
    """

    name: str
    identity: str
    counts: Mapping[str, int] = field(default_factory=dict)
    dims: int | None = None
    size_bytes: int | None = None


class Source(Protocol):
    """A place that memories are read from. Reading changes nothing there, and holds few items in memory."""

    def describe(self) -> SourceInfo:
        """
        Say what there is, with as little reading as possible.

        Raises:
            SourceDataError: It is not what it was said to be.
            ConnectError: It cannot be reached.
        """

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """
        Read every item in a fixed order; `after` is a position to go on behind.

        Raises:
            SourceDataError: The source as a whole cannot be read. One bad item never stops it: that is a `Refusal`.
            ConnectError: It cannot be reached, after retries; what was read so far is good.
        """


def pack_vector(vector: Sequence[float] | None) -> str | None:
    """
    Spell an embedding for a file: base64 of little-endian float32.

    >>> pack_vector((1.0, -0.5))
    'AACAPwAAAL8='
    """
    return None if vector is None else base64.b64encode(Vector.of(vector).packed).decode("ascii")


def unpack_vector(text: str | None) -> Vector | None:
    """
    Read what `pack_vector` spelled.

    >>> unpack_vector("AACAPwAAAL8=")
    Vector.of((1.0, -0.5))
    """
    return None if text is None else Vector(base64.b64decode(text, validate=True))


def item_as_data(item: RawItem) -> dict[str, Any]:
    """
    Spell an item as JSON data; a vector that no float32 can hold stays a list of numbers.

    >>> item_as_data(RawItem("memory", "7", {"memory": "x"}, "7", (1.0,)))["vector"]
    'AACAPw=='
    """
    try:
        vector: Any = pack_vector(item.vector)
    except (struct.error, OverflowError, TypeError):
        vector = [value if value is None or isinstance(value, str) else repr(value) for value in item.vector or ()]
    data = {"kind": item.kind, "source_id": item.source_id, "data": item.data, "position": item.position}
    optional = {"vector": vector, "state": item.state if item.state != "active" else None, "lifecycle": item.lifecycle}
    optional["settled"] = item.is_settled
    return data | {name: value for name, value in optional.items() if value}


def item_from_data(data: Mapping[str, Any]) -> RawItem:
    """Read what `item_as_data` spelled."""
    vector = data.get("vector")
    return RawItem(
        data["kind"],
        data["source_id"],
        data["data"],
        data["position"],
        vector if vector is None or isinstance(vector, list) else unpack_vector(vector),
        data.get("state", "active"),
        data.get("lifecycle", {}),
        data.get("settled", False),
    )


def text_of(spelled: Mapping[str, Any]) -> str:
    """
    Find the text that is embedded in a record that was spelled; empty where there is none.

    >>> text_of({"kind": "memory", "data": {"data": "likes tea"}})
    'likes tea'
    """
    return str(spelled["data"].get("data") or "")


def record_as_data(record: Record) -> dict[str, Any]:
    """Spell a record as JSON data."""
    data = {"kind": record.kind, "id": str(record.id), "source_id": record.source_id, "data": record.data}
    optional = {
        "embedding": pack_vector(record.embedding),
        "state": record.state if record.state != "active" else None,
        "lifecycle": {name: moment.isoformat() for name, moment in record.lifecycle.items()},
        "made": record.is_made,
    }
    return data | {name: value for name, value in optional.items() if value}


def record_from_data(data: Mapping[str, Any]) -> Record:
    """Read what `record_as_data` spelled."""
    return Record(
        data["kind"],
        uuid.UUID(data["id"]),
        data["source_id"],
        data["data"],
        unpack_vector(data.get("embedding")),
        data.get("state", "active"),
        {name: datetime.fromisoformat(moment) for name, moment in data.get("lifecycle", {}).items()},
        data.get("made", False),
    )
