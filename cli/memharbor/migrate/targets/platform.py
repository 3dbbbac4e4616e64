"""
Write memories into a project of Mem0 Platform, each once, however often this runs and wherever it was interrupted.

The service chooses the ids, so a memory is known again by a key in its metadata, made of the stack and the memory's id.
Before the first memory of a user (or agent, or run) is written, all that the service has of them is listed, and the keys
are kept in a temporary database on disk. A write whose answer was lost is looked for in the same lists before it is sent
again. A write that the service finishes only after it was looked for could still come twice; none is described that does.

What the service does not take: entities, relationships and changes (it makes its own), embeddings (it embeds itself),
memories that are paused, archived or deleted here (there they would be active again), instants finer than a second.
No limit of the length of a text is documented; one that the service refuses is refused with its words.

Sources: docs.mem0.ai, Add Memories, Get Event, Direct Import, Update Project; mem0ai/mem0
`scripts/oss-to-platform-migrate.sh`, whose metadata this writes; mem0ai 2.2 `mem0/client/project.py`. Nobody has run
this against the live service; `tests/platform_server.py` says what is assumed.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote

from memharbor.errors import ConfigError, ConnectError, SourceDataError
from memharbor.migrate.http import HttpClient, LostAnswerError, words_of
from memharbor.migrate.record import Record, record_as_data
from memharbor.migrate.sources.platform import find_project, read_pages, scopes_of

Word = Literal["inserted", "same", "changed", "refused"]
PREFIX = "mem0_migration_"
KEY, HASH = f"{PREFIX}import_key", f"{PREFIX}local_hash"
# What `client.project.update` sends; of each, null leaves it as it is.
SETTINGS = ("custom_instructions", "custom_categories", "agent_custom_instructions", "multilingual", "decay")
_OWNERS = ("user_id", "agent_id", "run_id")
_NOT_METADATA = {"data", "hash", "text_lemmatized", *_OWNERS, "created_at", "updated_at", "expiration_date"}
_ATTEMPTS = 8
_POLLS = 20  # with the pauses of the client, about eight minutes
_REFUSED = (400, 413, 422)
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


@dataclass(frozen=True)
class ConfigSync:
    """
    What became of settings.

    Args:
        changed: Names that were set, or would be.
        same: Names that have the value already.
        unsupported: Names that the service has no setting for.
    """

    changed: tuple[str, ...]
    same: tuple[str, ...]
    unsupported: tuple[str, ...]


class PlatformTarget:
    """
    Write to one project.

    Args:
        http: The service, with its key.
        stack: Name of the stack that the records come from; part of the keys by which they are known again.
        on_review: Told of every record that is there with other contents: its ids, both hashes, and the record.
    """

    def __init__(
        self, http: HttpClient, stack: str, *, on_review: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self._http = http
        self._stack = stack
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

    def sync_config(self, wanted: Mapping[str, Any], *, apply: bool = True) -> ConfigSync:
        """
        Give the project the settings of a stack, as far as it has them.

        Args:
            wanted: Settings by name; the service has those of `SETTINGS`, and chooses models and stores itself.
            apply: Whether they are set; else only compared.

        Raises:
            ConfigError: The key belongs to no project.
        """
        unsupported = tuple(name for name in wanted if name not in SETTINGS)
        asked = {name: value for name, value in wanted.items() if name in SETTINGS and value is not None}
        if not asked:
            return ConfigSync((), (), unsupported)
        project = find_project(self._http)
        if project is None:
            raise ConfigError(f"`{self._http.base_url}` names no project for the key", hint="make a key of a project")
        path = f"/api/v1/orgs/organizations/{quote(project[0], safe='')}/projects/{quote(project[1], safe='')}/"
        present = self._http.request("GET", path, params={"fields": list(asked)}).data
        if not isinstance(present, Mapping):
            raise SourceDataError(f"`{self._http.base_url}{path}` answers no project")
        changed = {name: value for name, value in asked.items() if present.get(name) != value}
        if changed and apply:
            body = {**changed, "org_id": project[0], "project_id": project[1]}  # as Mem0's own client sends it
            self._http.request("PATCH", path, body=body)
        return ConfigSync(tuple(changed), tuple(name for name in asked if name not in changed), unsupported)

    def _write(self, record: Record, known: _Known) -> Outcome:
        body = body_of(record, self._stack)
        key, local_hash = body["metadata"][KEY], body["metadata"][HASH]
        owner = next((name, body[name]) for name in _OWNERS if name in body)
        known.read(owner)
        found = known.find(key)
        if found is None:
            outcome = self._add(str(record.id), body, known, owner)
            if outcome.word == "inserted":
                known.add(key, local_hash, outcome.detail)
            return outcome
        there_hash, there_id = found
        if there_hash == local_hash:
            return Outcome(str(record.id), "same", there_id)
        if self._on_review is not None:
            self._on_review(
                {
                    "status": "changed_existing",
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
        if isinstance(data, Mapping) and data.get("event_id") and not isinstance(data.get("results"), list):
            data = self._await(str(data["event_id"]))
            if data.get("status") == "FAILED":
                return Outcome(record_id, "refused", f"event `{data.get('id')}` failed")
        results = data.get("results") if isinstance(data, Mapping) else data
        if results is None:
            results = []  # of an event that has none to tell
        if not isinstance(results, list):
            raise SourceDataError(f"`{self._http.base_url}/v3/memories/add/` answers no results")
        added = next(
            (each for each in results if isinstance(each, Mapping) and each.get("event", "ADD") == "ADD"), None
        )
        if added is not None:
            return Outcome(record_id, "inserted", str(added.get("id") or ""))
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
        self._database.execute("create table keys (key text primary key, hash text, id text) without rowid")
        self._database.execute("create table owners (field text, value text, primary key (field, value)) without rowid")

    def close(self) -> None:
        """Remove it."""
        self._database.close()

    def read(self, owner: tuple[str, str]) -> None:
        """List what the service has of an owner, once."""
        if self._database.execute("select 1 from owners where field = ? and value = ?", owner).fetchone():
            return
        for memory, metadata in self._memories(owner):
            if isinstance(metadata.get(KEY), str):
                self.add(metadata[KEY], str(metadata.get(HASH)), str(memory.get("id")))
        self._database.execute("insert into owners values (?, ?)", owner)

    def look_for(self, key: str, owner: tuple[str, str]) -> str | None:
        """Find a key in the lists of an owner as they are now."""
        found = (str(memory.get("id")) for memory, metadata in self._memories(owner) if metadata.get(KEY) == key)
        return next(found, None)

    def find(self, key: str) -> tuple[str, str] | None:
        """Find the hash and the id of a key."""
        found: tuple[str, str] | None = self._database.execute(
            "select hash, id from keys where key = ?", (key,)
        ).fetchone()
        return found

    def add(self, key: str, local_hash: str, there_id: str) -> None:
        """Keep a key."""
        self._database.execute("insert or replace into keys values (?, ?, ?)", (key, local_hash, there_id))

    def _memories(self, owner: tuple[str, str]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        for scope in scopes_of(*owner):
            for page in read_pages(self._http, scope):
                for memory in page.items:
                    if isinstance(memory, Mapping) and isinstance(memory.get("metadata"), Mapping):
                        yield memory, memory["metadata"]


def import_key(stack: str, record_id: str) -> str:
    """
    Make the key by which a memory is known again in the service.

    >>> import_key("prod", "7")[:16]
    '72c1dc477e46448d'
    """
    return hashlib.sha256(f"memharbor:{stack}:{record_id}".encode()).hexdigest()


def body_of(record: Record, stack: str) -> dict[str, Any]:
    """
    Spell a memory as the service takes it.

    All that is no field of the service's own goes into its metadata, `categories` and `app_id` too: it has no field to
    set the former with, and the latter as an entity would hide the memory from who asks for its user only.

    Args:
        record: A memory with text and an owner.
        stack: Name of the stack that it comes from.
    """
    data = record.data
    metadata = {
        name: value for name, value in data.items() if name not in _NOT_METADATA and not name.startswith(PREFIX)
    }
    body: dict[str, Any] = {"messages": [{"role": "user", "content": record.text}], "infer": False}
    body |= {name: str(data[name]) for name in _OWNERS if data.get(name)}
    if data.get("created_at"):
        body["timestamp"] = int(datetime.fromisoformat(str(data["created_at"])).timestamp())
    expires_at = record.lifecycle.get("expires_at")
    expiration = data.get("expiration_date") or (expires_at.date().isoformat() if expires_at else None)
    if expiration:
        body["expiration_date"] = str(expiration)
    if data.get("updated_at"):
        metadata[f"{PREFIX}updated_at"] = data["updated_at"]
    contents = json.dumps([body, metadata], sort_keys=True, ensure_ascii=True, default=str)
    metadata |= {
        f"{PREFIX}source": "memharbor",
        f"{PREFIX}local_id": str(record.id),
        HASH: hashlib.sha256(contents.encode()).hexdigest(),
        KEY: import_key(stack, str(record.id)),
    }
    return {**body, "metadata": metadata}


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
