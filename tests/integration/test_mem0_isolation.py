"""What one user's Mem0 can do to another user's memories through the pooler: nothing."""

from __future__ import annotations

import asyncio
import gc
import itertools
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from memharbor.errors import ConfigError
from memharbor.mem0 import user_pool
from tests.containers import Server
from tests.memory_database import memory_database
from tests.unmodified_mem0 import Memories, memory_class, unmodified_mem0

DIMS = 384


@pytest.fixture(scope="module")
def app_dsn(server: Server) -> str:
    return server.pool_dsn(memory_database(server, f"mem0_{DIMS}", DIMS), "app")


@pytest.fixture(scope="module")
def memories(app_dsn: str) -> Iterator[Memories]:
    with unmodified_mem0("app", app_dsn, dims=DIMS) as made:
        yield made


@pytest.fixture
def users() -> tuple[str, str]:
    mark = uuid.uuid4()
    return f"alice-{mark}", f"bob-{mark}"


@pytest.fixture
def secret(memories: Memories, users: tuple[str, str]) -> str:
    """The id of a memory of alice's."""
    added = memories.of(users[0]).add("Alice hides the key under the mat", user_id=users[0], infer=False)["results"]
    identifier: str = added[0]["id"]
    return identifier


def texts(memory: Any, user_id: str) -> list[str]:
    return [result["memory"] for result in memory.get_all(filters={"user_id": user_id})["results"]]


def test_a_foreign_memory_cannot_be_read(memories: Memories, users: tuple[str, str], secret: str) -> None:
    alice, bob = users
    intruder = memories.of(bob)
    assert intruder.get(secret) is None
    for user_id in (alice, "*"):
        assert intruder.get_all(filters={"user_id": user_id})["results"] == []
        assert intruder.search("key", filters={"user_id": user_id}, threshold=0.0)["results"] == []
    assert intruder.vector_store.list() == [[]]
    assert intruder.vector_store.keyword_search("key", filters={"user_id": alice}) == []
    assert intruder.vector_store.col_info()["count"] == 0
    assert texts(memories.of(alice), alice) == ["Alice hides the key under the mat"]


def test_a_foreign_memory_cannot_be_changed_or_deleted(memories: Memories, users: tuple[str, str], secret: str) -> None:
    alice, bob = users
    intruder = memories.of(bob)
    with pytest.raises(ValueError, match="not found"):
        intruder.update(secret, text="taken over")
    with pytest.raises(ValueError, match="not found"):
        intruder.delete(secret)
    intruder.delete_all(user_id=alice)
    # Below Mem0's own checks.
    intruder.vector_store.delete(secret)
    intruder.vector_store.update(secret, payload={"data": "taken over", "user_id": bob})
    assert texts(memories.of(alice), alice) == ["Alice hides the key under the mat"]


def test_a_memory_cannot_be_given_to_somebody_else_or_to_nobody(memories: Memories, users: tuple[str, str]) -> None:
    alice, bob = users
    intruder = memories.of(bob)
    for scope in ({"user_id": alice}, {"agent_id": "agent"}, {"run_id": "run"}):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            intruder.add("planted", infer=False, **scope)
    identifier = intruder.add("bob's own", user_id=bob, infer=False)["results"][0]["id"]
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        intruder.vector_store.update(identifier, payload={"data": "moved", "user_id": alice})
    assert texts(intruder, bob) == ["bob's own"]


def test_an_existing_id_cannot_be_taken_over(memories: Memories, users: tuple[str, str], secret: str) -> None:
    payload = {"data": "taken over", "user_id": users[1]}
    with pytest.raises(psycopg.errors.UniqueViolation):
        memories.of(users[1]).vector_store.insert([[0.1] * DIMS], [payload], [secret])
    assert texts(memories.of(users[0]), users[0]) == ["Alice hides the key under the mat"]


def test_foreign_entities_are_not_seen_or_linked(memories: Memories, users: tuple[str, str], secret: str) -> None:
    alice, bob = users
    memories.of(alice)._upsert_entity("Zubin", "PROPER", secret, {"user_id": alice})
    intruder = memories.of(bob)
    assert intruder._compute_entity_boosts([("PROPER", "Zubin")], {"user_id": alice}) == {}
    assert intruder.entity_store.list() == [[]]
    intruder._upsert_entity("Zubin", "PROPER", str(uuid.uuid4()), {"user_id": alice})  # refused, which Mem0 logs
    linked = memories.of(alice).entity_store.list(filters={"user_id": alice})[0]
    assert [entity.payload["linked_memory_ids"] for entity in linked] == [[secret]]


def test_a_pool_without_a_user_sees_nothing_and_writes_nothing(
    memories: Memories, app_dsn: str, users: tuple[str, str], secret: str
) -> None:
    config = memories.config(users[0])
    config["vector_store"]["config"] |= {"connection_pool": None, "connection_string": app_dsn}
    nobody = memory_class().from_config(config)
    try:
        assert nobody.get(secret) is None
        assert texts(nobody, users[0]) == []
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            nobody.add("planted", user_id=users[0], infer=False)
    finally:
        nobody.vector_store.connection_pool.close()
        nobody.close()


def test_one_mem0_less_leaves_the_shared_pool_to_the_others(app_dsn: str, users: tuple[str, str]) -> None:
    with unmodified_mem0("app", app_dsn, dims=DIMS) as memories:
        alice, bob = users
        memories.of(alice).add("first", user_id=alice, infer=False)
        memories.of(bob).add("second", user_id=bob, infer=False)
        memories.forget(alice)
        gc.collect()
        assert texts(memories.of(bob), bob) == ["second"]
        assert texts(memories.of(alice), alice) == ["first"]


def test_many_threads_over_one_pool_never_see_each_other(memories: Memories) -> None:
    mark = uuid.uuid4()
    people = [f"thread-{number}-{mark}" for number in range(6)]
    for person in people:
        for number in range(5):
            memories.of(person).add(f"{person} saw lighthouse {number}", user_id=person, infer=False)

    def look(person: str) -> set[str]:
        seen: set[str] = set()
        for number in range(40):
            found = memories.of(person).search(f"lighthouse {number % 5}", filters={"user_id": person}, threshold=0.0)
            seen |= {result["user_id"] for result in found["results"]}
            assert len(found["results"]) == 5
        return seen

    with ThreadPoolExecutor(len(people)) as threads:
        assert list(threads.map(look, people)) == [{person} for person in people]


def test_mem0_without_waiting_works_for_its_user_too(memories: Memories, users: tuple[str, str], secret: str) -> None:
    from mem0 import AsyncMemory

    alice, bob = users

    async def remember() -> tuple[list[str], list[str]]:
        memory = AsyncMemory.from_config(memories.config(bob))
        try:
            await memory.add("Bob bakes bread", user_id=bob, infer=False)
            own, foreign = await asyncio.gather(
                memory.search("bread", filters={"user_id": bob}, threshold=0.0), memory.get(secret)
            )
            assert foreign is None
            listed = await memory.get_all(filters={"user_id": bob})
            return [result["memory"] for result in own["results"]], [result["memory"] for result in listed["results"]]
        finally:
            memory.close()

    assert asyncio.run(remember()) == (["Bob bakes bread"], ["Bob bakes bread"])


def test_the_identity_ends_with_the_transaction(app_dsn: str) -> None:
    with ConnectionPool(app_dsn, min_size=1, max_size=1, open=True) as pool:
        for ending in ("commit", "rollback"):
            with user_pool(pool, "alice").connection() as connection:
                assert connection.execute("select memharbor.current_user_id()").fetchone() == ("alice",)
                getattr(connection, ending)()
                assert connection.execute("select memharbor.current_user_id()").fetchone() == (None,)
        with pytest.raises(ZeroDivisionError), user_pool(pool, "alice").connection():
            raise ZeroDivisionError
        with pool.connection() as connection:
            assert connection.execute("select memharbor.current_user_id()").fetchone() == (None,)


def test_a_pool_in_autocommit_is_refused(app_dsn: str) -> None:
    with (
        ConnectionPool(app_dsn, min_size=1, max_size=1, kwargs={"autocommit": True}, open=True) as pool,
        pytest.raises(ConfigError, match="autocommit"),
        user_pool(pool, "alice").connection(),
    ):
        pass


@pytest.mark.parametrize("user_id", ["o'brien", "名前", "a" * 5_000, "'; reset all; --", "%s", "\\", "*", "null"])
def test_any_identity_reaches_the_policies_as_it_is(app_dsn: str, user_id: str) -> None:
    with (
        ConnectionPool(app_dsn, min_size=1, max_size=1, open=True) as pool,
        user_pool(pool, user_id).connection() as connection,
    ):
        assert connection.execute("select memharbor.current_user_id()").fetchone() == (user_id,)


def test_users_with_similar_names_are_different_users(app_dsn: str) -> None:
    mark = str(uuid.uuid4())
    names = [f"ann-{mark}", f"Ann-{mark}", f"ann-{mark}x", f"ann_{mark}", f"ánn-{mark}", f"a\u0301nn-{mark}"]
    with ConnectionPool(app_dsn, min_size=1, max_size=2, open=True) as pool:
        for name in names:
            with user_pool(pool, name).connection() as connection:
                connection.execute("insert into memories (user_id, memory) values (%s, %s)", (name, name))
        for name in names:
            with user_pool(pool, name).connection() as connection:
                assert connection.execute("select memory from memories").fetchall() == [(name,)]
        for name, other in itertools.permutations(names[:3], 2):
            with user_pool(pool, name).connection() as connection:
                found = connection.execute("delete from memories where user_id = %s", (other,))
                assert found.rowcount == 0
