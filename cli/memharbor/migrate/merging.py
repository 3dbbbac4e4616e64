"""
What one segment of a migration becomes in temporary tables, and the statements that judge and merge it. Pure.

A judgement is one of: `insert`; `same`; `embed`, the same but for an embedding that is there now; `conflict`, another
version of the same user's; `foreign`, another user's; `dangling`. `CAST` and `SEND` stand for the schema's type of
embeddings and the function that spells its bits.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from decimal import Decimal
from typing import Any

from psycopg.types.json import Jsonb

from memharbor.migrate.record import Record

COLUMNS = {
    "memory": (
        "place", "id", "embedding", "payload", "will_embed", "state", "archived_at", "deleted_at", "expires_at",
    ),
    "entity": ("place", "id", "embedding", "payload", "will_embed"),
    "relationship": (
        "place", "id", "source_memory_id", "target_memory_id", "relationship_type", "strength", "metadata", "user_id",
        "created_at",
    ),
    "history": ("place", "memory_id", "user_id", "operation", "old_value", "actor", "changed_at"),
}  # fmt: skip
TYPES = {
    "place": "int4",
    "id": "uuid",
    "embedding": "vector",
    "payload": "jsonb",
    "will_embed": "bool",
    "archived_at": "timestamptz",
    "deleted_at": "timestamptz",
    "expires_at": "timestamptz",
    "source_memory_id": "uuid",
    "target_memory_id": "uuid",
    "strength": "numeric",
    "metadata": "jsonb",
    "created_at": "timestamptz",
    "memory_id": "uuid",
    "old_value": "jsonb",
    "changed_at": "timestamptz",
}
STAGED = {
    "memory": "staged_memories",
    "entity": "staged_entities",
    "relationship": "staged_relationships",
    "history": "staged_history",
}


def staged_row(place: int, record: Record, *, will_embed: bool) -> tuple[Any, ...]:
    """
    Spell a record as a row of its temporary table.

    Args:
        place: Its place in the segment.
        record: The record.
        will_embed: Whether it will have an embedding, though it has none yet.
    """
    data = record.data
    if record.kind in ("memory", "entity"):
        base = (place, record.id, record.embedding, Jsonb(data), will_embed or record.embedding is not None)
        if record.kind == "entity":
            return base
        lifecycle = record.lifecycle
        return (*base, record.state, *(lifecycle.get(name) for name in ("archived_at", "deleted_at", "expires_at")))
    if record.kind == "relationship":
        return (
            place, record.id, uuid.UUID(data["source_memory_id"]), uuid.UUID(data["target_memory_id"]),
            data.get("relationship_type"), Decimal(str(data.get("strength", 1))), Jsonb(data.get("metadata") or {}),
            data.get("user_id"), _moment(data.get("created_at")),
        )  # fmt: skip
    old_value = data.get("old_value")
    return (
        place, uuid.UUID(data["memory_id"]), data.get("user_id"), data.get("operation"),
        None if old_value is None else Jsonb(old_value), data.get("actor") or "migration", _moment(data.get("changed_at")),
    )  # fmt: skip


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


JUDGE = {
    "memory": """
        insert into pg_temp.judged (place, verdict)
        select s.place, case
            when t.id is null then 'insert'
            when t.user_id is distinct from s.payload ->> 'user_id' then 'foreign'
            when t.payload is distinct from s.payload or t.state <> s.state
              or t.expires_at is distinct from s.expires_at
              -- The database says when, where the source does not.
              or t.archived_at is distinct from coalesce(s.archived_at, t.archived_at)
              or t.deleted_at is distinct from coalesce(s.deleted_at, t.deleted_at) then 'conflict'
            when t.embedding is null and s.will_embed then 'embed'
            when s.embedding is null or SEND(t.embedding) = SEND(s.embedding::CAST) then 'same'
            else 'conflict' end
        from pg_temp.staged_memories s left join memharbor.memories t on t.id = s.id""",
    "entity": """
        insert into pg_temp.judged (place, verdict)
        select s.place, case
            when t.id is null then 'insert'
            when t.payload ->> 'user_id' is distinct from s.payload ->> 'user_id' then 'foreign'
            when t.payload is distinct from s.payload then 'conflict'
            when t.vector is null and s.will_embed then 'embed'
            when s.embedding is null or SEND(t.vector) = SEND(s.embedding::CAST) then 'same'
            else 'conflict' end
        from pg_temp.staged_entities s left join memharbor.entities t on t.id = s.id""",
    "relationship": """
        insert into pg_temp.judged (place, verdict)
        select s.place, case
            when coalesce(a.id, c.id) is null or coalesce(b.id, d.id) is null then 'dangling'
            -- An id of theirs is another user's memory here.
            when a.id is not null and a.user_id is distinct from coalesce(s.user_id, a.user_id)
              or b.id is not null and b.user_id is distinct from coalesce(s.user_id, b.user_id) then 'dangling'
            when t.id is null then 'insert'
            when t.user_id is distinct from coalesce(s.user_id, t.user_id) then 'foreign'
            when (t.source_memory_id, t.target_memory_id, t.relationship_type, t.strength, t.metadata)
              is distinct from
              (s.source_memory_id, s.target_memory_id, s.relationship_type, s.strength, s.metadata)
              or t.created_at <> coalesce(s.created_at, t.created_at) then 'conflict'
            else 'same' end
        from pg_temp.staged_relationships s
        left join memharbor.memory_relationships t on t.id = s.id
        left join memharbor.memories a on a.id = s.source_memory_id
        left join memharbor.memories b on b.id = s.target_memory_id
        left join pg_temp.foretold_memories c on c.id = s.source_memory_id
        left join pg_temp.foretold_memories d on d.id = s.target_memory_id""",
    "history": """
        insert into pg_temp.judged (place, verdict)
        select s.place, case
            -- Whose it is can be told by its memory alone, and a change of nobody's could never be erased.
            when s.user_id is null and coalesce(m.id, c.id) is null then 'dangling'
            when m.id is not null and m.user_id is distinct from coalesce(s.user_id, m.user_id) then 'dangling'
            when exists (
              select from memharbor.memory_history t
              where t.memory_id = s.memory_id and t.operation = s.operation
                and t.changed_at = coalesce(s.changed_at, t.changed_at)
                and t.old_value is not distinct from s.old_value and t.actor = s.actor
            ) then 'same'
            else 'insert' end
        from pg_temp.staged_history s
        left join memharbor.memories m on m.id = s.memory_id
        left join pg_temp.foretold_memories c on c.id = s.memory_id""",
}
INSERT = {
    "memory": """
        insert into memharbor.memories (id, embedding, payload, state, archived_at, deleted_at, expires_at)
        select s.id, s.embedding::CAST, s.payload, s.state, s.archived_at, s.deleted_at, s.expires_at
        from pg_temp.staged_memories s join pg_temp.judged j using (place)
        where j.verdict = 'insert' order by s.place""",
    "entity": """
        insert into memharbor.entities (id, vector, payload)
        select s.id, s.embedding::CAST, s.payload
        from pg_temp.staged_entities s join pg_temp.judged j using (place)
        where j.verdict = 'insert' order by s.place""",
    "relationship": """
        insert into memharbor.memory_relationships
          (id, source_memory_id, target_memory_id, relationship_type, strength, metadata, user_id, created_at)
        select s.id, s.source_memory_id, s.target_memory_id, s.relationship_type, s.strength, s.metadata,
          coalesce(s.user_id, m.user_id), coalesce(s.created_at, now())
        from pg_temp.staged_relationships s join pg_temp.judged j using (place)
        join memharbor.memories m on m.id = s.source_memory_id
        where j.verdict = 'insert' order by s.place""",
    "history": """
        insert into memharbor.memory_history (memory_id, user_id, operation, old_value, actor, changed_at)
        select s.memory_id, coalesce(s.user_id, m.user_id), s.operation, s.old_value, s.actor,
          coalesce(s.changed_at, now())
        from pg_temp.staged_history s join pg_temp.judged j using (place)
        left join memharbor.memories m on m.id = s.memory_id
        where j.verdict = 'insert' order by s.place""",
}
UPDATE = {
    "memory": """
        update memharbor.memories t
        set payload = s.payload,
          -- That of another text is none.
          embedding = case
            when s.embedding is null and t.payload ->> 'data' = s.payload ->> 'data' then t.embedding
            else s.embedding::CAST end,
          state = s.state,
          archived_at = s.archived_at, deleted_at = s.deleted_at, expires_at = s.expires_at
        from pg_temp.staged_memories s join pg_temp.judged j using (place)
        where j.verdict = 'update' and t.id = s.id""",
    "entity": """
        update memharbor.entities t
        set payload = s.payload,
          vector = case
            when s.embedding is null and t.payload ->> 'data' = s.payload ->> 'data' then t.vector
            else s.embedding::CAST end
        from pg_temp.staged_entities s join pg_temp.judged j using (place)
        where j.verdict = 'update' and t.id = s.id""",
    "relationship": """
        update memharbor.memory_relationships t
        set source_memory_id = s.source_memory_id, target_memory_id = s.target_memory_id,
          relationship_type = s.relationship_type, strength = s.strength, metadata = s.metadata,
          created_at = coalesce(s.created_at, t.created_at)
        from pg_temp.staged_relationships s join pg_temp.judged j using (place)
        where j.verdict = 'update' and t.id = s.id""",
}
