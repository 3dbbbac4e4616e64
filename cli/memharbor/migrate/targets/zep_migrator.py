"""
Migrate from Mem0 to Zep Cloud out of a program: one user, all of an export, a conversation; validate, report.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memharbor.errors import UsageError
from memharbor.migrate.record import NAMESPACE, Record, Refusal
from memharbor.migrate.targets.platform import Outcome
from memharbor.migrate.targets.zep import BATCH_ITEMS, ZepTarget
from memharbor.migrate.targets.zep_choosing import Chosen
from memharbor.migrate.targets.zep_client import ZepClient
from memharbor.migrate.targets.zep_mapping import MESSAGE_CHARACTERS, Mapped, read_mapping
from memharbor.migrate.targets.zep_validation import validate

# Refused and changed memories are named in the report, so many at most.
_NAMED_MAX = 1000


class Mem0ToZepMigrator:
    """
    Migrate memories of an export file, or of anything that yields records.

    Args:
        http: The service, with its key: `connect()` makes one.
        state_folder: Where it is noted what is there; each project of Zep has one.
        source: An export file in any of Mem0's shapes, or a function that yields the records, each time it is called.
        mapping: Checked, or a file of it; `None` for the default.
        threads: Whether what was said in a conversation becomes a message of a thread.
        message_characters: The longest message that the account may send.
        batch_items: Pieces that are sent in one batch; 0 for no batches.

    Raises:
        ConfigError: The mapping is wrong.
    """

    def __init__(
        self,
        http: ZepClient,
        state_folder: Path,
        source: Path | Callable[[], Iterable[Record]] | None = None,
        *,
        mapping: Mapped | Path | None = None,
        threads: bool = False,
        message_characters: int = MESSAGE_CHARACTERS,
        batch_items: int = BATCH_ITEMS,
    ) -> None:
        self._chosen = Chosen(source)
        self._mapping = mapping if isinstance(mapping, Mapped) else read_mapping(mapping)
        self._counts: Counter[str] = Counter(inserted=0, same=0, changed=0, refused=0)
        self._unreadable: Counter[str] = Counter()
        self._named: list[dict[str, str]] = []

        def target(*, threads: bool) -> ZepTarget:
            options: Any = {"message_characters": message_characters, "batch_items": batch_items}
            return ZepTarget(http, state_folder, self._mapping, threads=threads, **options)

        self._target = target(threads=threads)
        self._talks = self._target if threads else target(threads=True)

    def migrate_user(self, user: str | Mapping[str, Any], role: str = "user") -> str:
        """
        Migrate a user, and the user's memories where there is a source.

        Args:
            user: Its id; or `id`, and perhaps `email` and `name`.
            role: What the user is here; by the mapping's `user_roles` it becomes metadata of a user that is made.

        Returns:
            The user's UUID in Zep.

        Raises:
            UsageError: It has no id.
            SourceDataError: Zep does not take it.
        """
        given = {"id": user} if isinstance(user, str) else user
        user_id = str(given.get("id") or given.get("user_id") or "")
        if not user_id:
            raise UsageError("the user has no `id`")
        first, _, last = str(given.get("name") or "").partition(" ")
        profile = {"email": given.get("email"), "first_name": first, "last_name": last}
        named = {name: value for name, value in profile.items() if value}
        role = self._mapping.user_roles.get(role, role)
        uuid_there = self._target.ensure_user(user_id, {**named, "metadata": {"role": role}})
        if self._chosen.is_given:
            self._write(self._target, self._chosen.records({user_id}, on_refusal=self._count_unreadable))
        return uuid_there

    def migrate_all(
        self,
        users: Collection[str] = (),
        on_outcome: Callable[[Outcome], None] | None = None,
        *,
        sessions: Collection[str] = (),
    ) -> dict[str, Any]:
        """
        Migrate all memories of the source.

        Args:
            users: Only theirs; empty for everybody's.
            on_outcome: Told of each memory as soon as it is known what became of it.
            sessions: Only what was said in these, by its `run_id`; empty for everything.

        Returns:
            The report, as `get_migration_report` gives it.

        Raises:
            UsageError: There is no source.
            ConnectError: The service cannot be reached; the same call goes on.
        """
        records = self._chosen.records(users, sessions, on_refusal=self._count_unreadable)
        self._write(self._target, records, on_outcome)
        return self.get_migration_report()

    def migrate_conversation_history(
        self, user_id: str, session_id: str, messages: Iterable[Mapping[str, Any]]
    ) -> bool:
        """
        Migrate the turns of a conversation to a thread.

        Args:
            user_id: Whose it is.
            session_id: Tells the conversation from others of the user.
            messages: Each with `role`, `content`, and perhaps `id` and `created_at`, oldest first.

        Returns:
            Whether all are there now; `get_migration_report` names the others.
        """

        def records() -> Iterator[Record]:
            for number, message in enumerate(messages):
                own = message.get("id") or [number, message.get("role"), message.get("content")]
                data = {"data": message.get("content"), "user_id": user_id, "run_id": session_id}
                data |= {self._mapping.role_key: message.get("role"), "created_at": message.get("created_at")}
                yield _record(["message", user_id, session_id, own], data)

        return self._write(self._talks, records())

    def migrate_memory_snapshot(
        self, user_id: str, memory_type: str, content: Any, *, created_at: str | None = None
    ) -> bool:
        """
        Migrate one memory that is in no export.

        Args:
            user_id: Whose it is.
            memory_type: As the mapping's `memory_types` knows it.
            content: A text; anything else is written as JSON.
            created_at: When it was made, in ISO 8601.

        Returns:
            Whether it is there now.
        """
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)
        data = {"data": text, "user_id": user_id, self._mapping.memory_type_key: memory_type, "created_at": created_at}
        return self._write(self._target, [_record(["snapshot", user_id, memory_type, text], data)])

    def validate(self, users: Collection[str] = (), *, sessions: Collection[str] = ()) -> dict[str, Any]:
        """
        Compare what is there with the source's memories; nothing is written.

        Args:
            users: Only theirs; empty for everybody's.
            sessions: Only what was said in these, by its `run_id`; empty for everything.

        Returns:
            As `memharbor.migrate.targets.zep_validation.validate` gives it; `report_text` spells it.

        Raises:
            UsageError: There is no source.
        """
        return validate(self._target, self._chosen.records(users, sessions))

    def get_migration_report(self) -> dict[str, Any]:
        """
        Say what is there, and what this object did.

        Returns:
            `users_migrated`, `memories_migrated`: of all runs with this state; of this object, `inserted`, `same`,
            `changed` and `refused`; `unreadable` items by reason; `named`: which were changed or refused, and why;
            `left_behind`: metadata keys that did not come along, and how often.
        """
        with self._target.open_state() as state:
            users, memories = state.count_users(), state.count_memories()
        left: Counter[str] = Counter(self._target.speller.left_behind)
        if self._talks is not self._target:
            left.update(self._talks.speller.left_behind)
        return {
            "users_migrated": users,
            "memories_migrated": memories,
            **self._counts,
            "unreadable": dict(self._unreadable),
            "named": list(self._named),
            "left_behind": dict(left),
        }

    def _write(
        self, target: ZepTarget, records: Iterable[Record], on_outcome: Callable[[Outcome], None] | None = None
    ) -> bool:
        is_whole = True
        for outcome in target.write(records):
            self._counts[outcome.word] += 1
            if outcome.word in ("changed", "refused"):
                is_whole = False
                if len(self._named) < _NAMED_MAX:
                    self._named.append({"id": outcome.record_id, "what": outcome.word, "detail": outcome.detail})
            if on_outcome is not None:
                on_outcome(outcome)
        return is_whole

    def _count_unreadable(self, refusal: Refusal) -> None:
        self._unreadable[refusal.reason] += 1


def _record(name: list[Any], data: Mapping[str, Any]) -> Record:
    identity = uuid.uuid5(NAMESPACE, "zep:" + json.dumps(name, default=str))
    return Record("memory", identity, "", {key: value for key, value in data.items() if value is not None})
