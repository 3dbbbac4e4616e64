"""
Write memories into a project of Mem0 Platform, each once, however often this runs and wherever it was interrupted.

The service chooses the ids, so a memory is known again by its own id in the metadata, and the key that is made of it: not
by the name of its database, which may be called otherwise the next time, be restored or upgraded. So a copy of a memory in
another database is the same memory; where the two say something else, the first to come stays, and the other is reviewed.
Before the first memory of a user (or agent, or run) is written, all that the service has of them is listed, and the keys
are kept in a temporary database on disk. A write whose answer was lost is looked for in the same lists before it is sent
again. A write that the service finishes only after it was looked for could still come twice; none is described that does.

What the service does not take: entities, relationships and changes (it makes its own), embeddings (it embeds itself),
memories that are paused, archived or deleted here (there they would be active again), instants finer than a second.
No limit of the length of a text is documented; one that the service refuses is refused with its words.

Sources: docs.mem0.ai, Add Memories, Get Event, Direct Import, Async Mode; mem0ai/mem0
`scripts/oss-to-platform-migrate.sh`, whose metadata this writes. Nobody has run this against the live service;
`tests/platform_server.py` says what is assumed. Settings of a project: `platform_settings`.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

from memharbor.errors import ConnectError, SourceDataError
from memharbor.migrate.http import HttpClient, LostAnswerError, words_of
from memharbor.migrate.record import Record, record_as_data
from memharbor.migrate.sources.platform import read_pages, scopes_of

Word = Literal["inserted", "same", "changed", "refused"]
PREFIX = "mem0_migration_"
KEY, HASH = f"{PREFIX}import_key", f"{PREFIX}local_hash"
SOURCE, LOCAL_ID = f"{PREFIX}source", f"{PREFIX}local_id"
_SOURCE = "memharbor"
_OWNERS = ("user_id", "agent_id", "run_id")
_NOT_METADATA = {"data", "hash", "text_lemmatized", *_OWNERS, "created_at", "updated_at", "expiration_date"}
_ATTEMPTS = 8
_POLLS = 20  # with the pauses of the client, about eight minutes
_REFUSED = (400, 413, 422)
_QUEUED = ("PENDING", "RUNNING")
_AGAIN = "run the same command again: what is there is not written twice"


@dataclass(frozen=True)
class Outcome:
    """
    What became of a record.

    Args:
        record_id: Its id here.
        word: `inserted`; `same`, where the service has it already; `changed`, where it has it with other contents, which
            stay; `refused`.
        detail: Why, for a person; of one that is there, its id there.
    """

    record_id: str
    word: Word
    detail: str = ""


class PlatformTarget:
    """
    Write to one project.

    Args:
        http: The service, with its key.
        on_review: Told of every record that is there with other contents: its ids, both hashes, and the record; its
            `status` is `changed_existing` where it was changed here since, and `changed_there` where its text was there.
    """

    def __init__(self, http: HttpClient, *, on_review: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self._http = http
        self._on_review = on_review

    def write(self, records: Iterable[Record]) -> Iterator[Outcome]:
        """
        Write records one after another, in their order, and say of each what became of it.

        Args:
            records: As they are in the stack.

        Raises:
            ConnectError: The service cannot be reached, after retries; what was said so far holds.
            ConfigError: It refuses the key.
            SourceDataError: An answer is not what the API describes.
        """
        with closing(_Known(self._http)) as known:
            for record in records:
                why = _impossible(record)
                if why:
                    yield Outcome(str(record.id), "refused", why)
                else:
                    yield self._write(record, known)

    def _write(self, record: Record, known: _Known) -> Outcome:
        body = body_of(record)
        key, local_hash = body["metadata"][KEY], body["metadata"][HASH]
        owner = next((name, body[name]) for name in _OWNERS if name in body)
        known.read(owner)
        found = known.find(key)
        if found is None:
            outcome = self._add(str(record.id), body, known, owner)
            if outcome.word == "inserted":
                known.add(key, local_hash, outcome.detail, _digest(record.text))
            return outcome
        there_hash, there_id, there_text = found
        if there_hash == local_hash and there_text == _digest(record.text):
            return Outcome(str(record.id), "same", there_id)
        if self._on_review is not None:
            self._on_review(
                {
                    "status": "changed_there" if there_hash == local_hash else "changed_existing",
                    "platform_memory_id": there_id,
                    "existing_hash": there_hash,
                    "local_hash": local_hash,
                    "record": record_as_data(record),
                }
            )
        return Outcome(str(record.id), "changed", there_id)

    def _add(self, record_id: str, body: Mapping[str, Any], known: _Known, owner: tuple[str, str]) -> Outcome:
        key = body["metadata"][KEY]
        attempt = 0
        while True:
            attempt += 1
            try:
                answer = self._http.request("POST", "/v3/memories/add/", body=body, allow=_REFUSED, once=True)
                break
            except LostAnswerError as exc:
                self._http.pause(attempt)
                there_id = known.look_for(key, owner)
                if there_id is not None:
                    return Outcome(record_id, "inserted", there_id)
                if attempt >= _ATTEMPTS:
                    raise ConnectError(f"{exc.message}, {attempt} times", hint=_AGAIN) from exc
        if answer.status in _REFUSED:
            return Outcome(record_id, "refused", f"{answer.status} {words_of(answer.data)}".rstrip())
        data = answer.data
        event_id = _event_of(data)
        if event_id is not None:
            data = self._await(event_id)
            if data["status"] == "FAILED":
                return Outcome(record_id, "refused", f"event `{event_id}` failed")
        results = data.get("results") if isinstance(data, Mapping) else data
        if results is None:
            results = []  # of an event that has none to tell
        if not isinstance(results, list):
            raise SourceDataError(f"`{self._http.base_url}/v3/memories/add/` answers no results")
        there = (each for each in results if isinstance(each, Mapping) and each.get("event", "ADD") == "ADD")
        added = next((str(each["id"]) for each in there if each.get("id")), None)
        if added is not None:
            return Outcome(record_id, "inserted", added)
        # It says that it added nothing, or nothing at all, as it once did for every write without inference.
        there_id = known.look_for(key, owner)
        if there_id is not None:
            return Outcome(record_id, "inserted", there_id)
        return Outcome(
            record_id, "same", "it keeps one memory of a text in a scope, and has this text under another key"
        )

    def _await(self, event_id: str) -> Mapping[str, Any]:
        """Ask for an event until it has ended."""
        path = f"/v1/event/{quote(event_id, safe='')}/"
        status = "PENDING"
        for poll in range(1, _POLLS + 1):
            answer = self._http.request("GET", path, allow=(404,))  # one that is young may not be there yet
            if answer.status != 404:
                if not isinstance(answer.data, Mapping) or not answer.data.get("status"):
                    raise SourceDataError(f"`{self._http.base_url}{path}` answers no event")
                status = str(answer.data["status"])
                if status in ("SUCCEEDED", "FAILED"):
                    return answer.data
            self._http.pause(poll)
        raise ConnectError(f"event `{event_id}` is still {status}", hint=_AGAIN)


class _Known:
    """What the service has of the owners that were listed, on disk: a project may hold more keys than memory does."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        # Without a name it is a temporary file of SQLite's own, gone when it is closed.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("create table keys (key text primary key, hash text, id text, text text) without rowid")
        self._database.execute("create table owners (field text, value text, primary key (field, value)) without rowid")

    def close(self) -> None:
        """Remove it."""
        self._database.close()

    def read(self, owner: tuple[str, str]) -> None:
        """List what the service has of an owner, once."""
        if self._database.execute("select 1 from owners where field = ? and value = ?", owner).fetchone():
            return
        for memory, metadata in self._memories(owner):
            key = _key_in(metadata)
            if key is not None:
                self.add(key, str(metadata.get(HASH)), str(memory.get("id")), _digest(memory.get("memory")))
        self._database.execute("insert into owners values (?, ?)", owner)

    def look_for(self, key: str, owner: tuple[str, str]) -> str | None:
        """Find a key in the lists of an owner as they are now."""
        found = (str(memory.get("id")) for memory, metadata in self._memories(owner) if _key_in(metadata) == key)
        return next(found, None)

    def find(self, key: str) -> tuple[str, str, str] | None:
        """Find the hash and the id of a key, and the digest of its text there."""
        found: tuple[str, str, str] | None = self._database.execute(
            "select hash, id, text from keys where key = ?", (key,)
        ).fetchone()
        return found

    def add(self, key: str, local_hash: str, there_id: str, text: str) -> None:
        """Keep a key."""
        self._database.execute("insert or replace into keys values (?, ?, ?, ?)", (key, local_hash, there_id, text))

    def _memories(self, owner: tuple[str, str]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        for scope in scopes_of(*owner):
            for page in read_pages(self._http, scope):
                for memory in page.items:
                    if isinstance(memory, Mapping) and isinstance(memory.get("metadata"), Mapping):
                        yield memory, memory["metadata"]


def _event_of(data: Any) -> str | None:
    """
    Find the event of a write that is only queued; `None` where it was done at once.

    >>> _event_of({"event_id": "e1", "status": "PENDING"}), _event_of({"results": [{"status": "PENDING", "event_id": "e2"}]})
    ('e1', 'e2')
    >>> _event_of({"event_id": "e1", "results": [{"id": "7", "event": "ADD"}]})
    """
    if not isinstance(data, Mapping):
        listed = data if isinstance(data, list) else []
    elif data.get("event_id") and (data.get("status") in _QUEUED or not isinstance(data.get("results"), list)):
        return str(data["event_id"])
    else:
        listed = data["results"] if isinstance(data.get("results"), list) else []
    queued = (each for each in listed if isinstance(each, Mapping) and each.get("status") in _QUEUED)
    return next((str(each["event_id"]) for each in queued if each.get("event_id")), None)


def import_key(record_id: str) -> str:
    """
    Make the key by which a memory is known again in the service.

    >>> import_key("7")[:16]
    'e4bfefddbfe037e2'
    """
    return hashlib.sha256(f"{_SOURCE}:{record_id}".encode()).hexdigest()


def _key_in(metadata: Mapping[str, Any]) -> str | None:
    """
    Find the key of a memory there; earlier ones, that were made of a database's name too, count as those of today.

    >>> _key_in({"mem0_migration_source": "memharbor", "mem0_migration_local_id": "7", KEY: "old"}) == import_key("7")
    True
    >>> _key_in({KEY: "of another tool"}), _key_in({"colour": "red"})
    ('of another tool', None)
    """
    if metadata.get(SOURCE) == _SOURCE and isinstance(metadata.get(LOCAL_ID), str):
        return import_key(metadata[LOCAL_ID])
    return metadata[KEY] if isinstance(metadata.get(KEY), str) else None


def _digest(text: Any) -> str:
    """Make the digest of a text; a service may cut the space around it."""
    return hashlib.sha256(str(text or "").strip().encode("utf-8", "surrogatepass")).hexdigest()


def body_of(record: Record) -> dict[str, Any]:
    """
    Spell a memory as the service takes it.

    All that is no field of the service's own goes into its metadata, `categories` and `app_id` too: it has no field to
    set the former with, and the latter as an entity would hide the memory from who asks for its user only.

    Args:
        record: A memory with text and an owner.
    """
    data = record.data
    metadata = {
        name: value for name, value in data.items() if name not in _NOT_METADATA and not name.startswith(PREFIX)
    }
    body: dict[str, Any] = {"messages": [{"role": "user", "content": record.text}], "infer": False}
    body |= {name: str(data[name]) for name in _OWNERS if data.get(name)}
    timestamp = _timestamp(data.get("created_at"))
    if timestamp is not None:
        body["timestamp"] = timestamp
    expires_at = record.lifecycle.get("expires_at")
    expiration = data.get("expiration_date") or (expires_at.date().isoformat() if expires_at else None)
    if expiration:
        body["expiration_date"] = str(expiration)
    if data.get("updated_at"):
        metadata[f"{PREFIX}updated_at"] = data["updated_at"]
    contents = json.dumps([body, metadata], sort_keys=True, ensure_ascii=True, default=str)
    metadata |= {
        SOURCE: _SOURCE,
        LOCAL_ID: str(record.id),
        HASH: hashlib.sha256(contents.encode()).hexdigest(),
        KEY: import_key(str(record.id)),
    }
    return {**body, "metadata": metadata}


def _timestamp(text: Any) -> int | None:
    """
    Spell an instant as seconds since 1970; nothing for what is none or earlier, which Mem0 lets a caller write.

    >>> _timestamp("2025-03-01T08:00:00.5+00:00"), _timestamp("2025-03-01T08:00:00"), _timestamp("not a date")
    (1740816000, 1740816000, None)
    """
    try:
        moment = datetime.fromisoformat(str(text))
        seconds = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return None
    return seconds if seconds >= 0 else None


def _impossible(record: Record) -> str:
    """Say why the service cannot take a record; nothing where it can."""
    if record.kind != "memory":
        return f"the service makes its own of what is a {record.kind} here"
    if record.state != "active":
        return f"it is {record.state} here, and would be active there"
    if not record.text.strip():
        return "it has no text"
    if not any(record.data.get(name) for name in _OWNERS):
        return "it has none of user_id, agent_id and run_id"
    return ""
