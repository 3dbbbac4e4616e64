"""Rows in every table for tests of logical backups: several users, some with hostile ids, and values that are easy to lose."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from psycopg import Connection, sql

from memharbor.backup.rows import DatabaseRows, Fingerprint, fingerprint
from memharbor.backup.tables import USER_TABLES
from tests import corpus

HOSTILE_USERS = ("o'brien\"; drop table x; -- \\", "naïve 日本 🐘\t\n", "u" * 200, "{{ 7 * 7 }} %s :name $1")
USERS = ("alice", "bob", *HOSTILE_USERS)
_NAMESPACE = uuid.UUID("7c0a2a39-4d1f-5f0e-9a53-2f7fca2c9b8e")


def memory_id(user_id: str, number: int) -> uuid.UUID:
    """The id of a user's memory of that number."""
    return uuid.uuid5(_NAMESPACE, f"{user_id}:{number}")


def memories_of(user_id: str, count: int, *, first: int = 0) -> list[corpus.CorpusMemory]:
    """Some memories of a user, the same in each run."""
    chosen = corpus.memories()[first : first + count]
    return [
        replace(memory, id=memory_id(user_id, first + place), user_id=user_id) for place, memory in enumerate(chosen)
    ]


def populate(connection: Connection[Any], dims: int, users: Sequence[str] = USERS, *, count: int = 12) -> None:
    """Give users memories, entities, relationships, categories, memberships and a history, as Mem0 and others write them."""
    for name in corpus.CATEGORIES:
        connection.execute(
            "insert into memharbor.categories (id, name) values (%s, %s) on conflict do nothing",
            (uuid.uuid5(_NAMESPACE, name), name),
        )
    connection.execute(
        "insert into memharbor.configs (key, value) values ('limits', '{\"a\": 1.50}') on conflict do nothing"
    )
    for user_id in users:
        add_user(connection, dims, user_id, count)


def add_user(connection: Connection[Any], dims: int, user_id: str, count: int) -> None:
    """Give one user rows in every table."""
    chosen = memories_of(user_id, count)
    corpus.load(connection, dims, chosen=chosen)
    with connection.transaction():
        _add_rows(connection, dims, user_id, [memory.id for memory in chosen])


def _add_rows(connection: Connection[Any], dims: int, user_id: str, ids: list[uuid.UUID]) -> None:
    count = len(ids)
    # What is easy to lose: no embedding, a negative zero, a state, times of the caller's own, an empty metadata.
    connection.execute("update memharbor.memories set embedding = null where id = %s", (ids[0],))
    connection.execute(
        "update memharbor.memories set embedding = %s where id = %s", (f"[-0{',1' * (dims - 1)}]", ids[1])
    )
    connection.execute("update memharbor.memories set state = 'archived', org_id = 'org' where id = %s", (ids[2],))
    connection.execute(
        "update memharbor.memories set expires_at = 'infinity', payload = payload || %s where id = %s",
        (json.dumps({"updated_at": "1999-12-31T23:59:59.123456+05:00", "note": "a\tb\\c\n\u2028"}), ids[3]),
    )
    for place in range(count - 1):
        connection.execute(
            "insert into memharbor.memory_relationships"
            " (source_memory_id, target_memory_id, relationship_type, strength, user_id) values (%s, %s, 'next', %s, %s)",
            (ids[place], ids[place + 1], f"0.{place}0", user_id if place else None),
        )
        connection.execute(
            "insert into memharbor.memory_categories (memory_id, category_id, user_id)"
            " select %s, id, %s from memharbor.categories where name = %s",
            (ids[place], user_id, corpus.CATEGORIES[place % 5]),
        )
    for place in range(0, count, 4):
        payload = {
            "data": f"entity {place}",
            "user_id": user_id,
            "linked_memory_ids": [str(each) for each in ids[place : place + 2]],
        }
        connection.execute(
            "insert into memharbor.entities (id, vector, payload)"
            " select %s, embedding, %s from memharbor.memories where id = %s",
            (uuid.uuid5(_NAMESPACE, f"entity {user_id} {place}"), json.dumps(payload), ids[min(place + 2, count - 1)]),
        )
    connection.execute("insert into memharbor.org_members (org_id, user_id) values ('org', %s)", (user_id,))


def wipe(connection: Connection[Any], user_id: str) -> int:
    """Delete all rows of a user, the audit trail's too; returns how many."""
    with connection.transaction():
        return _wipe(connection, user_id)


def _wipe(connection: Connection[Any], user_id: str) -> int:
    deleted = connection.execute(
        "delete from memharbor.memory_relationships where user_id is null and source_memory_id in"
        " (select id from memharbor.memories where user_id = %s)",
        (user_id,),
    ).rowcount
    for table in reversed(USER_TABLES[:-2]):
        deleted += _delete(connection, table.name, table.owner, user_id)
    for table in USER_TABLES[-2:]:
        deleted += _delete(connection, table.name, table.owner, user_id)
    return deleted


def _delete(connection: Connection[Any], table: str, owner: str, user_id: str) -> int:
    statement = sql.SQL("delete from memharbor.{} where " + owner + " = %s").format(sql.Identifier(table))  # type: ignore[arg-type]
    return connection.execute(statement, (user_id,)).rowcount


def state(connection: Connection[Any], tables: Iterable[str] = ()) -> dict[tuple[str, str], Fingerprint]:
    """Every user's fingerprints."""
    found = fingerprint(DatabaseRows(connection))
    return {key: value for key, value in found.items() if not tables or key[1] in tables}
