"""The contract: both ways to write a memory, its history, its graph, and what older programs see."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from memharbor.database import Connection
from tests.memory_database import Server
from tests.schema_databases import DIMS, acting, admin_connection, scratch_database

VECTOR = "[" + ",".join(["1"] * DIMS) + "]"


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    with scratch_database(server) as name:
        yield name


@pytest.fixture
def service(server: Server, database: str) -> Iterator[Connection]:
    with closing(admin_connection(server, database)) as connection, acting(connection, "service"):
        connection.execute("set local search_path = public")
        yield connection


def store(connection: Connection, payload: dict[str, Any], vector: str | None = VECTOR) -> uuid.UUID:
    identifier = uuid.uuid4()
    connection.execute(
        "insert into mem0 (id, vector, payload) values (%s, %s, %s)", (identifier, vector, Jsonb(payload))
    )
    return identifier


def canonical(connection: Connection, identifier: uuid.UUID) -> dict[str, Any]:
    cursor = connection.execute("select * from memories where id = %s", (identifier,))
    row = cursor.fetchone()
    assert row is not None
    assert cursor.description is not None
    return dict(zip((column.name for column in cursor.description), row, strict=True))


MEM0_PAYLOAD = {
    "data": "Likes tea",
    "hash": "0123",
    "user_id": "alice",
    "agent_id": "agent",
    "run_id": "run",
    "created_at": "2025-03-01T10:00:00.123456-08:00",
    "updated_at": "2025-03-02T10:00:00+00:00",
    "text_lemmatized": "like tea",
    "attributed_to": "user",
    "mood": {"deep": [1, None]},
    "categories": ["drinks", "tea"],
}


# --- from the payload to the columns ---------------------------------------------------------------------------------


def test_a_memory_that_mem0_writes_has_its_canonical_columns(service: Connection) -> None:
    row = canonical(service, store(service, MEM0_PAYLOAD))
    assert row["payload"] == MEM0_PAYLOAD
    assert (row["memory"], row["hash"], row["user_id"]) == ("Likes tea", "0123", "alice")
    assert (row["agent_id"], row["run_id"], row["categories"]) == ("agent", "run", ["drinks", "tea"])
    assert row["metadata"] == {"attributed_to": "user", "mood": {"deep": [1, None]}}
    assert row["created_at"] == datetime(2025, 3, 1, 18, 0, 0, 123456, UTC)
    assert row["updated_at"] == datetime(2025, 3, 2, 10, tzinfo=UTC)
    assert row["state"] == "active"


@pytest.mark.parametrize("created_at", ["not a date", "", 17, None, {"a": 1}, "2025-13-45T99:00:00", "0000-00-00"])
def test_a_created_at_that_is_no_date_is_kept_and_does_not_fail_the_add(service: Connection, created_at: Any) -> None:
    row = canonical(service, store(service, {"data": "x", "user_id": "a", "created_at": created_at}))
    assert row["payload"]["created_at"] == created_at
    assert abs((row["created_at"] - datetime.now(UTC)).total_seconds()) < 600


@pytest.mark.parametrize("zone", ["UTC", "America/Los_Angeles", "Asia/Kolkata"])
def test_a_time_without_an_offset_is_utc_whoever_writes_it(service: Connection, zone: str) -> None:
    service.execute("select set_config('timezone', %s, true)", (zone,))
    row = canonical(service, store(service, {"data": "x", "user_id": "a", "created_at": "2025-01-01T00:00:00"}))
    assert row["created_at"] == datetime(2025, 1, 1, tzinfo=UTC)


def test_a_text_of_null_is_left_out_because_it_breaks_get_all(service: Connection) -> None:
    row = canonical(service, store(service, {"data": None, "user_id": "a"}))
    assert (row["payload"], row["memory"]) == ({"user_id": "a"}, None)


def test_a_missing_hash_is_computed(service: Connection) -> None:
    row = canonical(service, store(service, {"data": "x", "user_id": "a"}))
    assert row["hash"] == "9dd4e461268c8034f5c8564e155c67a6"  # pragma: allowlist secret


@pytest.mark.parametrize("categories", ["drinks", {"a": 1}, [1, 2], ["a", {"b": 1}], [["a"]], None])
def test_categories_that_are_no_list_of_texts_stay_metadata(service: Connection, categories: Any) -> None:
    row = canonical(service, store(service, {"data": "x", "user_id": "a", "categories": categories}))
    assert (row["categories"], row["metadata"]) == (None, {"categories": categories})


@pytest.mark.parametrize("payload", ["[]", "1", '"x"', "null"])
def test_a_payload_that_is_no_object_is_refused(service: Connection, payload: str) -> None:
    with pytest.raises(psycopg.DatabaseError):
        service.execute("insert into mem0 values (gen_random_uuid(), null, %s)", (payload,))


def test_an_update_by_mem0_changes_the_columns(service: Connection) -> None:
    identifier = store(service, MEM0_PAYLOAD)
    service.execute("update mem0 set vector = %s where id = %s", (VECTOR, identifier))
    changed = {**MEM0_PAYLOAD, "data": "Likes coffee", "updated_at": "2026-01-01T00:00:00+00:00"}
    service.execute("update mem0 set payload = %s where id = %s", (Jsonb(changed), identifier))
    row = canonical(service, identifier)
    assert (row["memory"], row["payload"]) == ("Likes coffee", changed)
    assert row["updated_at"] == datetime(2026, 1, 1, tzinfo=UTC)


# --- from the columns to the payload ---------------------------------------------------------------------------------


def test_a_memory_of_canonical_columns_is_one_that_mem0_reads(service: Connection) -> None:
    service.execute(
        "insert into memories (id, user_id, agent_id, memory, metadata, categories, embedding, created_at)"
        " values (%s, 'alice', 'agent', 'Likes Tea', %s, '{a,b}', %s, '2025-01-01T00:00:00Z')",
        (identifier := uuid.uuid4(), Jsonb({"mood": "calm"}), VECTOR),
    )
    row = service.execute("select payload from mem0 where id = %s", (identifier,)).fetchone()
    assert row is not None
    updated_at = row[0].pop("updated_at")
    assert datetime.fromisoformat(updated_at).tzinfo is not None
    assert row[0] == {
        "data": "Likes Tea",
        "text_lemmatized": "likes tea",
        "hash": hashlib.md5(b"Likes Tea", usedforsecurity=False).hexdigest(),
        "user_id": "alice",
        "agent_id": "agent",
        "created_at": "2025-01-01T00:00:00+00:00",
        "mood": "calm",
        "categories": ["a", "b"],
    }


def test_an_upsert_of_canonical_columns_works_as_documented(service: Connection) -> None:
    for text in ("first", "second"):
        service.execute(
            "insert into memories (id, user_id, memory) values (%s, 'alice', %s)"
            " on conflict (id) do update set memory = excluded.memory",
            (uuid.UUID(int=7), text),
        )
    row = canonical(service, uuid.UUID(int=7))
    assert (row["memory"], row["payload"]["data"], row["payload"]["text_lemmatized"]) == ("second", "second", "second")


def test_a_changed_text_changes_hash_and_words_and_keeps_what_mem0_knows_besides(service: Connection) -> None:
    identifier = store(service, MEM0_PAYLOAD)
    service.execute("update memories set metadata = metadata || '{\"mood\": 2}' where id = %s", (identifier,))
    row = canonical(service, identifier)
    assert row["payload"]["text_lemmatized"] == "like tea"
    assert row["payload"]["created_at"] == MEM0_PAYLOAD["created_at"]
    assert (row["payload"]["mood"], row["payload"]["attributed_to"]) == (2, "user")
    service.execute("update memories set memory = 'Hates Tea' where id = %s", (identifier,))
    row = canonical(service, identifier)
    assert row["payload"]["data"] == "Hates Tea"
    assert row["payload"]["text_lemmatized"] == "hates tea"
    assert row["payload"]["hash"] == row["hash"] != "0123"
    assert row["payload"]["categories"] == ["drinks", "tea"]


def test_metadata_cannot_smuggle_another_owner_into_the_payload(service: Connection) -> None:
    service.execute(
        "insert into memories (id, memory, user_id, metadata) values (%s, 'x', null, %s)",
        (identifier := uuid.uuid4(), Jsonb({"user_id": "bob", "data": "y", "other": 1})),
    )
    row = canonical(service, identifier)
    assert ("user_id" in row["payload"], row["payload"]["data"], row["metadata"]) == (False, "x", {"other": 1})


texts = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
RESERVED = {"data", "hash", "user_id", "agent_id", "run_id", "created_at", "updated_at", "text_lemmatized"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(texts.filter(lambda key: key not in RESERVED | {"categories"}), values, max_size=4), texts)
def test_any_payload_survives_the_way_through_the_columns(
    service: Connection, extra: dict[str, Any], text: str
) -> None:
    payload = {**extra, "data": text, "user_id": "alice", "hash": "h", "text_lemmatized": text.lower()}
    payload["created_at"] = payload["updated_at"] = "2025-01-01T00:00:00+00:00"
    identifier = store(service, payload)
    assert canonical(service, identifier)["payload"] == payload
    # Touch a canonical column, so that the payload is built anew, and touch it back.
    service.execute("update memories set agent_id = 'a' where id = %s", (identifier,))
    service.execute(
        "update memories set agent_id = null, updated_at = '2025-01-01T00:00:00Z' where id = %s", (identifier,)
    )
    assert canonical(service, identifier)["payload"] == payload


# --- states ----------------------------------------------------------------------------------------------------------


def mem0_sees(connection: Connection, identifier: uuid.UUID) -> bool:
    return connection.execute("select 1 from mem0 where id = %s", (identifier,)).fetchone() is not None


@pytest.mark.parametrize("state", ["paused", "archived", "deleted"])
def test_mem0_sees_only_active_memories_and_the_state_stamps_its_time(service: Connection, state: str) -> None:
    identifier = store(service, MEM0_PAYLOAD)
    service.execute("update memories set state = %s where id = %s", (state, identifier))
    row = canonical(service, identifier)
    assert mem0_sees(service, identifier) is False
    assert row["payload"] == MEM0_PAYLOAD
    assert (row["archived_at"] is not None, row["deleted_at"] is not None) == (state == "archived", state == "deleted")
    service.execute("update memories set state = 'active' where id = %s", (identifier,))
    row = canonical(service, identifier)
    assert (mem0_sees(service, identifier), row["archived_at"], row["deleted_at"]) == (True, None, None)


def test_mem0_sees_no_expired_memory_and_none_without_an_embedding(service: Connection) -> None:
    expired, bare = store(service, MEM0_PAYLOAD), store(service, MEM0_PAYLOAD, None)
    assert (mem0_sees(service, expired), mem0_sees(service, bare)) == (True, False)
    service.execute("update memories set expires_at = now() - interval '1 second' where id = %s", (expired,))
    service.execute("update memories set embedding = %s where id = %s", (VECTOR, bare))
    assert (mem0_sees(service, expired), mem0_sees(service, bare)) == (False, True)


def test_mem0s_own_expiration_date_stays_mem0s_to_judge(service: Connection) -> None:
    identifier = store(service, {**MEM0_PAYLOAD, "expiration_date": "2001-01-01"})
    assert (mem0_sees(service, identifier), canonical(service, identifier)["expires_at"]) == (True, None)


def test_an_unknown_state_is_refused(service: Connection) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        service.execute("insert into memories (memory, user_id, state) values ('x', 'a', 'lost')")


# --- history ---------------------------------------------------------------------------------------------------------


def test_every_change_is_in_the_history_with_the_image_before_it(service: Connection) -> None:
    identifier = store(service, MEM0_PAYLOAD)
    service.execute("update mem0 set vector = %s where id = %s", (VECTOR, identifier))
    service.execute("update memories set memory = 'Hates tea' where id = %s", (identifier,))
    service.execute("update memories set state = 'paused' where id = %s", (identifier,))
    service.execute("delete from memories where id = %s", (identifier,))
    rows = service.execute(
        "select operation, old_value->>'data', new_value->>'data', user_id, actor = session_user"
        " from memory_history where memory_id = %s order by id",
        (identifier,),
    ).fetchall()
    assert rows == [
        ("create", None, "Likes tea", "alice", True),
        ("update", "Likes tea", "Hates tea", "alice", True),
        ("update", "Hates tea", "Hates tea", "alice", True),
        ("delete", "Hates tea", None, "alice", True),
    ]
    states = service.execute(
        "select old_state from memharbor.memory_history where memory_id = %s order by id", (identifier,)
    ).fetchall()
    assert [state for (state,) in states] == [None, "active", "active", "paused"]


def test_one_statement_over_many_rows_writes_one_row_of_history_each(service: Connection) -> None:
    service.execute("delete from memharbor.memories")
    for _ in range(3):
        store(service, MEM0_PAYLOAD)
    service.execute("update memories set agent_id = 'other'")
    row = service.execute("select count(*) filter (where operation = 'update') from memory_history h where"
                          " exists (select from memories m where m.id = h.memory_id)").fetchone()  # fmt: skip
    assert row == (3,)


def test_an_upsert_writes_what_it_did(service: Connection) -> None:
    identifier = uuid.uuid4()
    for text in ("one", "two"):
        service.execute(
            "insert into memories (id, user_id, memory) values (%s, 'a', %s)"
            " on conflict (id) do update set memory = excluded.memory",
            (identifier, text),
        )
    rows = service.execute(
        "select operation from memory_history where memory_id = %s order by id", (identifier,)
    ).fetchall()
    assert rows == [("create",), ("update",)]


# --- graph -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def graph(service: Connection) -> dict[str, uuid.UUID]:
    """The memories a → b → c → d, and e → a."""
    ids = {name: store(service, {"data": name, "user_id": "alice"}) for name in "abcde"}
    for source, target, strength in (("a", "b", 0.5), ("b", "c", 0.5), ("c", "d", 1), ("e", "a", 0.9)):
        service.execute(
            "insert into memory_relationships (source_memory_id, target_memory_id, relationship_type, strength, user_id)"
            " values (%s, %s, 'related_to', %s, 'alice')",
            (ids[source], ids[target], strength),
        )
    return ids


def related(connection: Connection, start: uuid.UUID, ids: dict[str, uuid.UUID], hops: int) -> dict[str, Any]:
    names = {identifier: name for name, identifier in ids.items()}
    rows = connection.execute(
        "select id, distance, strength from memharbor.related_memories(%s, %s)", (start, hops)
    ).fetchall()
    return {names[identifier]: (distance, float(strength)) for identifier, distance, strength in rows}


def test_the_graph_is_walked_one_or_two_hops_in_both_directions(
    service: Connection, graph: dict[str, uuid.UUID]
) -> None:
    assert related(service, graph["a"], graph, 1) == {"b": (1, 0.5), "e": (1, 0.9)}
    assert related(service, graph["a"], graph, 2) == {"b": (1, 0.5), "e": (1, 0.9), "c": (2, 0.25)}
    assert related(service, graph["a"], graph, 9) == related(service, graph["a"], graph, 2)
    assert related(service, graph["a"], graph, 0) == {}


def test_the_walk_uses_the_indexes_of_both_ends(service: Connection, graph: dict[str, uuid.UUID]) -> None:
    service.execute("set local enable_seqscan = off")
    found = service.execute(
        "select prosrc from pg_proc where oid = 'memharbor.related_memories(uuid, integer)'::regprocedure"
    ).fetchone()
    assert found is not None
    query = re.sub(r"\bhops\b", "2", re.sub(r"= memory_id|<> memory_id", lambda m: m[0][:-9] + "%(id)s", found[0]))
    plan = "\n".join(row[0] for row in service.execute("explain (costs off) " + query, {"id": graph["a"]}))
    assert "memory_relationships_source" in plan
    assert "memory_relationships_target" in plan


def test_an_archived_memory_is_not_related(service: Connection, graph: dict[str, uuid.UUID]) -> None:
    service.execute("update memories set state = 'archived' where id = %s", (graph["b"],))
    assert "b" not in related(service, graph["a"], graph, 1)


def test_a_deleted_memory_takes_its_edges_along(service: Connection, graph: dict[str, uuid.UUID]) -> None:
    service.execute("delete from mem0 where id = %s", (graph["b"],))
    assert service.execute("select count(*) from memory_relationships").fetchone() == (2,)


@pytest.mark.parametrize("strength", ["-0.1", "1.1", "NaN"])
def test_a_strength_outside_zero_to_one_is_refused(
    service: Connection, graph: dict[str, uuid.UUID], strength: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        service.execute(
            "insert into memory_relationships (source_memory_id, target_memory_id, relationship_type, strength)"
            " values (%s, %s, 'x', %s)",
            (graph["a"], graph["c"], strength),
        )


# --- counts and older programs ---------------------------------------------------------------------------------------


def test_memories_are_counted_per_user(service: Connection) -> None:
    service.execute("delete from memharbor.memories")
    for user, day in (("a", 1), ("a", 3), ("b", 2)):
        store(service, {"data": "x", "user_id": user, "created_at": f"2025-01-0{day}T00:00:00+00:00"})
    store(service, {"data": "x", "agent_id": "nobody's"})
    rows = service.execute(
        "select user_id, memory_count, first_memory_at, last_memory_at from memharbor.memory_stats order by 1"
    ).fetchall()
    days = [datetime(2025, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    assert rows == [("a", 2, days[0], days[2]), ("b", 1, days[1], days[1])]


def test_chatsg_finds_its_three_tables(service: Connection) -> None:
    service.execute("delete from memharbor.memories")
    row = service.execute(
        "insert into mem0_memories (user_id, session_id, memory, embedding, metadata)"
        " values ('7', 'session', 'Likes tea', %s, '{\"a\": 1}') returning id",
        (VECTOR,),
    ).fetchone()
    assert row is not None
    service.execute("update mem0_memories set memory = 'Hates tea' where id = %s and user_id = '7'", row)
    found = service.execute("select user_id, session_id, memory, metadata from mem0_memories").fetchall()
    assert found == [("7", "session", "Hates tea", {"a": 1})]
    assert mem0_sees(service, row[0])
    history = service.execute(
        "select action, previous_content, new_content, metadata from mem0_history where memory_id = %s order by id", row
    ).fetchall()
    assert history == [("created", None, "Likes tea", {"a": 1}), ("updated", "Likes tea", "Hates tea", {"a": 1})]
    counted = service.execute(
        "select total_memories, last_memory_at is not null from mem0_metadata"
        " where user_id = '7' and collection_name = 'chatsg_memories'"
    ).fetchall()
    assert counted == [(1, True)]


def test_mem0_finds_its_collections_and_needs_no_ddl(server: Server, database: str) -> None:
    with closing(psycopg.connect(server.direct_dsn(database, "app"))) as connection:
        rows = connection.execute(
            "select table_name from information_schema.tables where table_schema = 'public'"
        ).fetchall()
        assert {"mem0", "mem0_entities", "memories", "memories_entities"} <= {name for (name,) in rows}
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("create table public.other (id int)")


def test_an_application_has_the_settings_that_mem0_never_makes(server: Server, database: str) -> None:
    for role in ("app", "service", "readonly"):
        with closing(psycopg.connect(server.direct_dsn(database, role))) as connection:
            connection.execute("select '[1]'::vector")
            shown = {
                name: connection.execute("select current_setting(%s)", (name,)).fetchone()
                for name in ("plan_cache_mode", "hnsw.ef_search", "hnsw.iterative_scan", "search_path", "lock_timeout")
            }
        assert {name: row[0] for name, row in shown.items() if row} == {
            "plan_cache_mode": "force_custom_plan",
            "hnsw.ef_search": "100",
            "hnsw.iterative_scan": "strict_order",
            "search_path": "public, pg_temp",
            "lock_timeout": "3s",
        }


def test_a_payload_is_sent_as_text_by_other_drivers_too(service: Connection) -> None:
    identifier = uuid.uuid4()
    service.execute("insert into mem0 values (%s, %s, %s)", (identifier, VECTOR, json.dumps({"user_id": "a"})))
    assert mem0_sees(service, identifier)
