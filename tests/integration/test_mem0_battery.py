"""
Everything that Mem0 2.2.1 can do, unmodified, through the pooler: as service and as app, on `vector` and on `halfvec`.

Each test uses users of its own, so that they share a database and run in any order.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.containers import Server
from tests.memory_database import memory_database
from tests.unmodified_mem0 import Memories, unmodified_mem0

CASES = [
    ("service", 384, "mem0"),
    ("app", 384, "mem0"),
    ("service", 384, "memories"),
    ("app", 384, "memories"),
    ("service", 3072, "mem0"),
    ("app", 3072, "mem0"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def memories(request: pytest.FixtureRequest, server: Server) -> Iterator[Memories]:
    role, dims, collection = request.param
    database = memory_database(server, f"mem0_{dims}", dims)
    with unmodified_mem0(role, server.pool_dsn(database, role), dims=dims, collection=collection) as made:
        yield made


@dataclass
class Person:
    """A user with the Mem0 that acts for them."""

    memories: Memories
    user_id: str

    @property
    def memory(self) -> Any:
        return self.memories.of(self.user_id)

    def add(self, text: str, **metadata: Any) -> str:
        added = self.memory.add(text, user_id=self.user_id, infer=False, metadata=metadata or None)["results"]
        assert [result["memory"] for result in added] == [text]
        identifier: str = added[0]["id"]
        return identifier

    def search(self, query: str, *, top_k: int = 20, **filters: Any) -> list[dict[str, Any]]:
        found = self.memory.search(query, filters={"user_id": self.user_id, **filters}, top_k=top_k, threshold=0.0)
        results: list[dict[str, Any]] = found["results"]
        return results

    def texts(self, query: str = "anything", **filters: Any) -> set[str]:
        return {result["memory"] for result in self.search(query, **filters)}

    def all(self, **options: Any) -> set[str]:
        found = self.memory.get_all(filters={"user_id": self.user_id}, **options)["results"]
        return {result["memory"] for result in found}


@pytest.fixture
def alice(memories: Memories) -> Person:
    return Person(memories, f"alice-{uuid.uuid4()}")


@pytest.fixture
def bob(memories: Memories) -> Person:
    return Person(memories, f"bob-{uuid.uuid4()}")


def test_a_memory_is_added_and_got_with_its_metadata(alice: Person) -> None:
    identifier = alice.add("Alice drinks green tea", topic="food", importance=3, confirmed=True)
    got = alice.memory.get(identifier)
    assert got["memory"] == "Alice drinks green tea"
    assert got["user_id"] == alice.user_id
    assert got["metadata"]["topic"] == "food"
    assert got["metadata"]["importance"] == 3
    assert got["metadata"]["confirmed"] is True
    assert got["hash"]
    assert got["created_at"].endswith("+00:00")


def test_a_conversation_is_added_message_by_message(alice: Person) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "I moved to Lisbon", "name": "alice"},
        {"role": "assistant", "content": "Lisbon is noted"},
    ]
    added = alice.memory.add(messages, user_id=alice.user_id, agent_id="helper", run_id="run-1", infer=False)["results"]
    assert [(result["memory"], result["role"]) for result in added] == [
        ("I moved to Lisbon", "user"),
        ("Lisbon is noted", "assistant"),
    ]
    assert alice.texts(agent_id="helper", run_id="run-1") == {"I moved to Lisbon", "Lisbon is noted"}


def test_facts_are_inferred_stored_and_not_stored_twice(alice: Person, memories: Memories) -> None:
    memories.stub.facts = ["Alice is allergic to peanuts", "Alice works at a library"]
    said = "I can't eat peanuts, and I work at the library."
    first = alice.memory.add(said, user_id=alice.user_id)["results"]
    assert {result["memory"] for result in first} == set(memories.stub.facts)
    assert alice.memory.add(said, user_id=alice.user_id)["results"] == []
    assert alice.all() == set(memories.stub.facts)
    assert alice.memory.get(first[0]["id"])["attributed_to"] == "user"


def test_nothing_is_stored_when_nothing_is_inferred(alice: Person, memories: Memories) -> None:
    memories.stub.facts = []
    assert alice.memory.add("hello", user_id=alice.user_id)["results"] == []
    assert alice.all() == set()


def test_the_nearest_memory_is_found_first_and_strangers_never(alice: Person, bob: Person) -> None:
    alice.add("Alice likes hiking in the Alps")
    alice.add("Alice has a cat called Tom")
    bob.add("Bob likes hiking in the Alps too")
    found = alice.search("who likes hiking in the Alps")
    assert [result["memory"] for result in found] == ["Alice likes hiking in the Alps", "Alice has a cat called Tom"]
    assert found[0]["score"] > found[1]["score"]


def test_a_search_explains_its_scores_with_keywords(alice: Person) -> None:
    alice.add("Alice keeps bees on the roof")
    alice.add("Alice plays the violin")
    found = alice.memory.search("bees roof", filters={"user_id": alice.user_id}, threshold=0.0, explain=True)["results"]
    assert found[0]["memory"] == "Alice keeps bees on the roof"
    details = found[0]["score_details"]
    assert details["semantic_score"] > 0
    assert details["bm25_score"] > 0


OPERATORS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "equality": ({"topic": "food"}, {"a", "b"}),
    "a list": ({"topic": ["food", "work"]}, {"a", "b", "c"}),
    "any value": ({"rare": "*"}, {"c"}),
    "eq": ({"topic": {"eq": "work"}}, {"c"}),
    "ne": ({"topic": {"ne": "food"}}, {"c", "d"}),
    "gt": ({"importance": {"gt": 2}}, {"c", "d"}),
    "gte": ({"importance": {"gte": 2}}, {"b", "c", "d"}),
    "lt": ({"importance": {"lt": 2}}, {"a"}),
    "lte": ({"importance": {"lte": 2.5}}, {"a", "b"}),
    "a range": ({"importance": {"gt": 1, "lt": 4}}, {"b", "c"}),
    "in": ({"topic": {"in": ["work", "home"]}}, {"c", "d"}),
    "nin": ({"topic": {"nin": ["work", "home"]}}, {"a", "b"}),
    "contains": ({"title": {"contains": "50%_"}}, {"a"}),
    "contains, other case": ({"title": {"contains": "GREEN"}}, set()),
    "icontains": ({"title": {"icontains": "GREEN"}}, {"b"}),
    "true": ({"confirmed": True}, {"a", "c"}),
    "false": ({"confirmed": False}, {"b", "d"}),
    "AND": ({"AND": [{"topic": "food"}, {"confirmed": True}]}, {"a"}),
    "OR": ({"OR": [{"topic": "home"}, {"importance": {"lt": 2}}]}, {"a", "d"}),
    "NOT": ({"NOT": [{"topic": "food"}, {"topic": "home"}]}, {"c"}),
    "OR and NOT": ({"OR": [{"topic": "food"}, {"topic": "work"}], "NOT": [{"confirmed": False}]}, {"a", "c"}),
}


def test_every_filter_operator_answers_for_its_user_only(alice: Person, bob: Person) -> None:
    alice.add("a", topic="food", importance=1, confirmed=True, title="sold 50%_off")
    alice.add("b", topic="food", importance=2, confirmed=False, title="green tea")
    alice.add("c", topic="work", importance=3, confirmed=True, title="report 50 of", rare="x")
    alice.add("d", topic="home", importance=4, confirmed=False, title="roof")
    # Matches where it can, and cannot be compared as a number.
    bob.add("bob's", topic="food", importance="high", confirmed=True, title="sold 50%_off green", rare="y")
    found = {name: alice.texts(**filters) for name, (filters, _) in OPERATORS.items()}
    assert found == {name: expected for name, (_, expected) in OPERATORS.items()}


def test_an_update_replaces_text_vector_and_hash(alice: Person) -> None:
    identifier = alice.add("Alice lives in Rome")
    before = alice.memory.get(identifier)
    alice.memory.update(identifier, text="Alice lives in Oslo near the fjord")
    after = alice.memory.get(identifier)
    assert after["memory"] == "Alice lives in Oslo near the fjord"
    assert after["hash"] != before["hash"]
    assert after["created_at"] == before["created_at"]
    assert after["updated_at"] > before["updated_at"]
    assert alice.search("Oslo fjord")[0]["id"] == identifier


def test_an_update_of_metadata_keeps_the_owner(alice: Person, bob: Person) -> None:
    identifier = alice.add("Alice reads novels", topic="books")
    alice.memory.update(identifier, text="Alice reads novels", metadata={"topic": "reading", "user_id": bob.user_id})
    assert alice.memory.get(identifier)["metadata"]["topic"] == "reading"
    assert alice.texts(topic="reading") == {"Alice reads novels"}
    assert bob.all() == set()


def test_the_history_of_a_memory_is_complete(alice: Person) -> None:
    identifier = alice.add("first")
    alice.memory.update(identifier, text="second")
    alice.memory.delete(identifier)
    events = [(entry["event"], entry["new_memory"]) for entry in alice.memory.history(identifier)]
    assert events == [("ADD", "first"), ("UPDATE", "second"), ("DELETE", None)]


def test_entities_are_linked_once_boost_a_search_and_go_with_their_memory(alice: Person) -> None:
    first, second = alice.add("Alice met Zubin at the harbour"), alice.add("Zubin repaired the boat")
    scope = {"user_id": alice.user_id}
    alice.memory._upsert_entity("Zubin", "PROPER", first, scope)
    alice.memory._upsert_entity("Zubin", "PROPER", second, scope)
    entities = alice.memory.entity_store.list(filters=scope)[0]
    assert [entity.payload["linked_memory_ids"] for entity in entities] == [[first, second]]
    boosts = alice.memory._compute_entity_boosts([("PROPER", "Zubin")], scope)
    assert set(boosts) == {first, second}
    assert all(boost > 0 for boost in boosts.values())
    alice.memory.delete(first)
    entities = alice.memory.entity_store.list(filters=scope)[0]
    assert [entity.payload["linked_memory_ids"] for entity in entities] == [[second]]


def test_a_deleted_memory_is_gone(alice: Person) -> None:
    identifier = alice.add("to be forgotten")
    alice.add("to be kept")
    alice.memory.delete(identifier)
    assert alice.memory.get(identifier) is None
    assert alice.all() == {"to be kept"}


def test_deleting_all_of_one_user_leaves_the_others(alice: Person, bob: Person) -> None:
    for number in range(5):
        alice.add(f"memory {number}")
    bob.add("bob's own")
    alice.memory.delete_all(user_id=alice.user_id)
    assert alice.all() == set()
    assert bob.all() == {"bob's own"}


def test_more_memories_than_one_page_are_listed(alice: Person) -> None:
    texts = {f"memory number {number}" for number in range(70)}
    for text in texts:
        alice.add(text)
    assert alice.all(top_k=100) == texts


def test_a_reset_is_refused_and_loses_no_vector(alice: Person, bob: Person) -> None:
    alice.add("survives")
    bob.add("survives too")
    with pytest.raises(Exception, match='"(mem0|memories)" is not a table'):
        alice.memory.vector_store.reset()
    assert (alice.all(), bob.all()) == ({"survives"}, {"survives too"})


def test_the_collection_is_known_and_is_counted(alice: Person, memories: Memories) -> None:
    alice.add("one")
    assert {memories.collection, f"{memories.collection}_entities"} <= set(alice.memory.vector_store.list_cols())
    info = alice.memory.vector_store.col_info()
    assert info["name"] == memories.collection
    assert info["count"] == 1 if memories.role == "app" else info["count"] >= 1


def test_awkward_texts_and_users_come_back_as_they_were(memories: Memories) -> None:
    person = Person(memories, f"o'brien\"%s{{}}\\名前-{uuid.uuid4()}")
    texts = {'it\'s 100% \\ "quoted" {braces} $1 %s', "多字节 🐘 текст", "line\nbreak\ttab", "x" * 20_000}
    for text in texts:
        person.add(text)
    assert person.all() == texts
    person.memory.delete_all(user_id=person.user_id)
    assert person.all() == set()


def test_a_caller_may_write_anything_into_created_at(alice: Person) -> None:
    identifier = alice.add("old", created_at="not a date")
    assert alice.memory.get(identifier)["created_at"] == "not a date"
    backdated = alice.add("older", created_at="2020-02-03T04:05:06+00:00")
    assert alice.memory.get(backdated)["created_at"] == "2020-02-03T04:05:06+00:00"


def test_an_expired_memory_is_hidden_until_it_is_asked_for(alice: Person) -> None:
    alice.memory.add("over", user_id=alice.user_id, infer=False, expiration_date="2020-01-01")
    alice.add("still true")
    assert alice.all() == {"still true"}
    assert alice.all(show_expired=True) == {"over", "still true"}
