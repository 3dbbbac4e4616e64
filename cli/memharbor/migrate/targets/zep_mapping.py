"""
What a memory becomes in Zep: the mapping of roles, memory types and metadata, and the pieces that are sent. Pure.

A memory is one graph episode of text, or, where it is a turn of a conversation and that is wanted, one message of a
thread. What is longer than the service takes becomes several pieces, cut at the ends of sentences. Zep has no memory
types and no role `therapist`: a type is a label in the metadata, and what a sender was called is the message's name. Of
some types (`preferences`) the text stands in the metadata besides, under their name, where an application finds it.
Sources: zep-cloud 4.0.1 `BatchItemInput`, `AddMessage`, `RoleType`; help.getzep.com, Limits.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memharbor.errors import ConfigError, StateRefusedError
from memharbor.migrate.record import Record

ROLES = ("system", "assistant", "user", "function", "tool")
EPISODE_CHARACTERS = 10_000
MESSAGE_CHARACTERS = 2_500  # 14,000 in a paid account
USER_ID_CHARACTERS = 500
METADATA_KEYS = 10
ID, HASH, PART, PARTS = "memharbor_id", "memharbor_hash", "memharbor_part", "memharbor_parts"
# These are always in the metadata where a memory has them (a key of `types_in_metadata` instead of its type); the rest of
# the ten can be chosen.
_ALWAYS = (ID, HASH, PART, PARTS, "memory_type", "run_id")
CHOSEN_KEYS = METADATA_KEYS - len(_ALWAYS)
_NOT_METADATA = {"data", "hash", "text_lemmatized", "user_id", "created_at", "updated_at"}
_SENTENCE = re.compile(r"(?<=[.!?…])[\"')\]]*\s+|(?<=[。！？])|\n+")
_SPACE = re.compile(r"\s+")
_NAMES_MAX = 200

DEFAULT: Mapping[str, Any] = {
    "role_key": "role",
    "roles": {
        "user": "user",
        "patient": "user",
        "therapist": "user",
        "assistant": "assistant",
        "ai": "assistant",
        "system": "system",
    },
    "user_roles": {"user": "patient", "therapist": "therapist", "admin": "admin", "support": "support"},
    "memory_type_key": "memory_type",
    "memory_types": {
        "messages": "CONVERSATION",
        "insights": "EMOTIONAL_STATE",
        "summary": "SESSION_SUMMARY",
        "traits": "TREATMENT_PLAN",
    },
    "types_in_metadata": {"preferences": "preferences"},
    "metadata": ["agent_id", "app_id", "categories", "expiration_date"],
}


@dataclass(frozen=True)
class Mapped:
    """
    A mapping that was checked.

    Args:
        role_key: Key of a memory's metadata that has the role of who said it.
        roles: Role in Zep by role here; a memory with another role is no message.
        user_roles: Role in the metadata of a Zep user by role here; another one stays.
        memory_type_key: Key of a memory's metadata that has its type.
        memory_types: Label by type; another one stays.
        types_in_metadata: Key by type: memories of the type have no label, and their text in the metadata too.
        metadata: Keys of a memory's metadata that come along.
    """

    role_key: str = DEFAULT["role_key"]
    roles: Mapping[str, str] = field(default_factory=lambda: DEFAULT["roles"])
    user_roles: Mapping[str, str] = field(default_factory=lambda: DEFAULT["user_roles"])
    memory_type_key: str = DEFAULT["memory_type_key"]
    memory_types: Mapping[str, str] = field(default_factory=lambda: DEFAULT["memory_types"])
    types_in_metadata: Mapping[str, str] = field(default_factory=lambda: DEFAULT["types_in_metadata"])
    metadata: tuple[str, ...] = tuple(DEFAULT["metadata"])


@dataclass(frozen=True)
class Piece:
    """
    What is sent of a memory at once.

    Args:
        record_id: Of the memory.
        part: Which part of its text, from 1.
        parts: How many there are.
        digest: Tells its contents from others.
        user_id: Whose it is.
        run_id: Of a message, the conversation; empty for an episode.
        body: What both ways of sending it have in common, in the names of a message or of an episode.
    """

    record_id: str
    part: int
    parts: int
    digest: str
    user_id: str
    run_id: str
    body: Mapping[str, Any]

    @property
    def is_message(self) -> bool:
        """Whether it goes to a thread."""
        return bool(self.run_id)

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from others."""
        return self.record_id, self.part


@dataclass(frozen=True)
class There:
    """
    A piece as the service has it.

    Args:
        there_id: Its UUID there.
        digest: Of its contents, as they were written.
    """

    there_id: str
    digest: str


def found_in(item: Mapping[str, Any]) -> dict[tuple[str, int], There]:
    """
    Find the piece that an episode or a message is; nothing where it is not of ours.

    >>> list(found_in({"uuid": "e1", "metadata": {"memharbor_id": "7", "memharbor_part": 2}}))
    [('7', 2)]
    """
    metadata = item.get("metadata")
    if not isinstance(metadata, Mapping) or not metadata.get(ID):
        return {}
    part = metadata.get(PART)
    number = int(part) if isinstance(part, int | float) else 1
    return {(str(metadata[ID]), number): There(str(item.get("uuid") or ""), str(metadata.get(HASH)))}


def read_mapping(path: Path | None) -> Mapped:
    """
    Read a mapping file; what it does not name stays as it is by default.

    Args:
        path: JSON; `None` for the default.

    Raises:
        ConfigError: It cannot be read, or a key or a value in it is wrong, which is named.
    """
    if path is None:
        return Mapped()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"the mapping `{path}` cannot be read: {exc}", hint="write one by `write_mapping`") from exc
    return parse_mapping(data)


def parse_mapping(data: Any) -> Mapped:
    """
    Check a mapping.

    Raises:
        ConfigError: A key or a value is wrong; it is named.

    >>> parse_mapping({"roles": {"coach": "assistant"}}).roles
    {'coach': 'assistant'}
    """
    if not isinstance(data, Mapping):
        raise ConfigError("the mapping is no JSON object")
    for name, value in data.items():
        if name not in DEFAULT:
            raise ConfigError(f"the mapping has `{name}`, which is none of {', '.join(DEFAULT)}")
        if isinstance(DEFAULT[name], Mapping):
            _check_names(name, value)
        elif name == "metadata":
            _check_metadata(value)
        elif not isinstance(value, str) or not value:
            raise ConfigError(f"`{name}` of the mapping must be the name of a metadata key")
    chosen: dict[str, Any] = {**data, "metadata": tuple(dict.fromkeys(data.get("metadata", DEFAULT["metadata"])))}
    return Mapped(**chosen)


def _check_names(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{name}` of the mapping must be a JSON object")
    for key, target in value.items():
        if not isinstance(target, str) or not target:
            raise ConfigError(f"`{name}.{key}` of the mapping must be a text")
        if name == "roles" and target not in ROLES:
            raise ConfigError(f"`roles.{key}` of the mapping is `{target}`; Zep has the roles {', '.join(ROLES)}")
        if name == "types_in_metadata" and target in _ALWAYS:
            raise ConfigError(f"`{name}.{key}` of the mapping is `{target}`, which is a key of ours")


def _check_metadata(value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ConfigError("`metadata` of the mapping must be a list of names")
    taken = [name for name in value if name in _ALWAYS]
    if taken:
        raise ConfigError(f"`metadata` of the mapping has `{taken[0]}`, which comes along by itself")
    if len(set(value)) > CHOSEN_KEYS:
        raise ConfigError(
            f"`metadata` of the mapping has {len(set(value))} names; Zep takes {METADATA_KEYS} keys, of which "
            f"{len(_ALWAYS)} are ours: choose {CHOSEN_KEYS} at most"
        )


def write_mapping(path: Path) -> None:
    """
    Write the default mapping to a file that a person can edit.

    Raises:
        StateRefusedError: There is one.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(DEFAULT, indent=2) + "\n")
    except FileExistsError as exc:
        raise StateRefusedError(f"`{path}` is there already", hint="edit it, or name another file") from exc


class Speller:
    """
    Spell memories as Zep takes them, and count what is left behind.

    Args:
        mapping: Roles, types, metadata.
        threads: Whether what was said in a conversation becomes a message of a thread.
        message_characters: The longest message that the account may send.
    """

    def __init__(self, mapping: Mapped, *, threads: bool = False, message_characters: int = MESSAGE_CHARACTERS) -> None:
        self.mapping = mapping
        self.threads = threads
        self._message_characters = message_characters
        self.left_behind: dict[str, int] = {}

    def pieces(self, record: Record) -> list[Piece]:
        """Make the pieces of a memory that has text and a user."""
        data = record.data
        role = self._role(record)
        metadata = self._metadata(record)
        kind = str(data.get(self.mapping.memory_type_key) or "")
        own_key = self.mapping.types_in_metadata.get(kind)
        described = str(metadata.get("memory_type") or own_key or "memory of Mem0")
        digest = _digest(record)
        texts = list(split_text(record.text, self._message_characters if role else EPISODE_CHARACTERS))
        at = reference_time(data.get("created_at"))
        timed = {"reference_time": at} if at else {}
        made = []
        for number, text in enumerate(texts, 1):
            marks: dict[str, Any] = {ID: str(record.id), HASH: digest}
            if len(texts) > 1:
                marks |= {PART: number, PARTS: len(texts)}
            own = {own_key: text} if own_key else {}
            body: dict[str, Any] = {"metadata": {**marks, **metadata, **own}, **timed}
            if role:
                body |= {"role": role, "content": text, "name": str(data[self.mapping.role_key])}
            else:
                body |= {"data": text, "source_description": described}
            run_id = str(data["run_id"]) if role else ""
            made.append(Piece(str(record.id), number, len(texts), digest, str(record.user_id), run_id, body))
        return made

    def _metadata(self, record: Record) -> dict[str, Any]:
        data, mapping = record.data, self.mapping
        found: dict[str, Any] = {}
        kind = str(data.get(mapping.memory_type_key) or "")
        if kind and kind not in mapping.types_in_metadata:
            found["memory_type"] = mapping.memory_types.get(kind, kind)
        if data.get("run_id"):
            found["run_id"] = str(data["run_id"])
        for name in mapping.metadata:
            value = _scalars(data.get(name))
            if value is not None:
                found[name] = value
        expires_at = record.lifecycle.get("expires_at")
        if expires_at and "expiration_date" in mapping.metadata:
            found.setdefault("expiration_date", expires_at.date().isoformat())
        return found

    def note_left_behind(self, record: Record) -> None:
        """Count the metadata keys of a memory that do not come along."""
        mapping = self.mapping
        kept = {*mapping.metadata, "run_id", mapping.memory_type_key, *_NOT_METADATA}
        kept |= {mapping.role_key} if self._role(record) else set()
        for name in record.data:
            if name not in kept and (name in self.left_behind or len(self.left_behind) < _NAMES_MAX):
                self.left_behind[name] = self.left_behind.get(name, 0) + 1

    def _role(self, record: Record) -> str | None:
        """Find the role in Zep of who said it; nothing where it is no turn of a conversation."""
        if not self.threads or not record.data.get("run_id"):
            return None
        return self.mapping.roles.get(str(record.data.get(self.mapping.role_key) or "").lower())


def split_text(text: str, limit: int) -> Iterator[str]:
    """
    Cut a text into parts of at most so many characters: behind a sentence, else behind a word, else anywhere.

    Nothing is lost: the parts together are the text, but for parts of nothing but space.

    >>> list(split_text("One. Two three. Four.", 12))
    ['One. ', 'Two three. ', 'Four.']
    """
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= limit else start + _cut(text[start : start + limit], limit)
        if text[start:end].strip():
            yield text[start:end]
        start = end


def _cut(window: str, limit: int) -> int:
    # A sentence that ends very early would leave a crumb.
    sentences = [found.end() for found in _SENTENCE.finditer(window) if found.end() >= limit // 4]
    if sentences:
        return sentences[-1]
    words = [found.end() for found in _SPACE.finditer(window)]
    return words[-1] if words else limit


def reference_time(text: Any) -> str | None:
    """
    Spell an instant as RFC 3339 in UTC; nothing for what is none, which Mem0 lets a caller write.

    >>> reference_time("2025-03-01T09:00:00.5+01:00"), reference_time("not a date")
    ('2025-03-01T08:00:00.500000Z', None)
    """
    try:
        moment = datetime.fromisoformat(str(text))
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError):
        return None


def _digest(record: Record) -> str:
    data = record.data
    contents = [record.text, data.get("user_id"), data.get("run_id"), str(data.get("created_at") or "")]
    return hashlib.sha256(json.dumps(contents, default=str).encode()).hexdigest()


def _scalars(value: Any) -> Any:
    """Make of a value what Zep's metadata takes: a scalar, a list of scalars, or the JSON of anything else."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list) and value and all(isinstance(each, str | bool | int) for each in value):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if value else None


def impossible(record: Record) -> str:
    """Say why Zep cannot take a record; nothing where it can."""
    if record.kind != "memory":
        return f"the service makes its own of what is a {record.kind} here"
    if record.state != "active":
        return f"it is {record.state} here, and would be active there"
    if not record.text.strip():
        return "it has no text"
    if not record.user_id:
        return "it has no user_id, and Zep keeps memories by user"
    if len(str(record.user_id)) > USER_ID_CHARACTERS:
        return f"its user_id is longer than {USER_ID_CHARACTERS} characters"
    return ""
