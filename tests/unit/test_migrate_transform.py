"""What an item of any shape becomes, and why one does not travel."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.errors import ConfigError, SourceDataError, StateRefusedError
from memharbor.migrate.reasons import REASONS
from memharbor.migrate.record import (
    RawItem,
    Record,
    Refusal,
    State,
    item_as_data,
    item_from_data,
    pack_vector,
    record_as_data,
    record_from_data,
)
from memharbor.migrate.seen import Seen
from memharbor.migrate.transform import Choice, parse_bound, transform
from memharbor.migrate.workfolder import WorkFolder

SHAPES = {
    "python payload": {
        "data": "likes tea", "user_id": "alice", "hash": "h", "created_at": "2025-01-15T10:00:00-08:00",
        "text_lemmatized": "like tea", "session_id": "the caller's own", "score": 3,
    },
    "typescript payload": {
        "data": "likes tea", "user_id": "alice", "createdAt": "2025-01-15T10:00:00.000Z", "textLemmatized": "like tea",
    },
    "old typescript payload": {"data": "likes tea", "userId": "alice", "runId": "r"},
    "platform": {
        "id": "x", "memory": "likes tea", "user_id": "alice", "session_id": "r", "metadata": {"mood": "good"},
        "categories": ["food"], "expiration_date": None, "created_at": "2025-01-15T10:00:00Z", "score": 0.3,
    },
    "first platform": {"id": "mem_abc123", "content": "likes tea", "user_id": "alice", "metadata": {"category": "food"}},
    "owner in metadata": {"id": "1", "memory": "likes tea", "metadata": {"user_id": "alice"}},
}  # fmt: skip
EXPECTED: dict[str, dict[str, Any]] = {
    "python payload": {
        "hash": "h", "created_at": "2025-01-15T10:00:00-08:00", "text_lemmatized": "like tea",
        "session_id": "the caller's own", "score": 3,
    },
    "typescript payload": {"created_at": "2025-01-15T10:00:00.000Z", "text_lemmatized": "like tea"},
    "old typescript payload": {"run_id": "r"},
    "platform": {"run_id": "r", "mood": "good", "categories": ["food"], "created_at": "2025-01-15T10:00:00Z"},
    "first platform": {"category": "food"},
    "owner in metadata": {},
}  # fmt: skip
MADE = {"hash": hashlib.md5(b"likes tea").hexdigest(), "text_lemmatized": "likes tea"}


def made(data: dict[str, Any], choice: Choice | None = None, **fields: Any) -> Record:
    found = transform(RawItem("memory", fields.pop("source_id", "7"), data, "1", **fields), "test", choice or Choice())
    assert isinstance(found, Record), found
    return found


def reason(data: dict[str, Any], choice: Choice | None = None, **fields: Any) -> str:
    found = transform(RawItem("memory", fields.pop("source_id", "7"), data, "1", **fields), "test", choice or Choice())
    assert isinstance(found, Refusal), found
    assert found.reason in REASONS
    return found.reason


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_becomes_a_payload_of_mem0(shape: str) -> None:
    assert made(SHAPES[shape]).data == {"data": "likes tea", "user_id": "alice", **MADE, **EXPECTED[shape]}


def test_metadata_never_becomes_the_memory_s_text_or_owner() -> None:
    data = {"memory": "likes tea", "user_id": "alice", "metadata": {"data": "x", "user_id": "mallory", "hash": "y"}}
    found = made(data).data
    assert (found["data"], found["user_id"]) == ("likes tea", "alice")
    assert (found["metadata_data"], found["metadata_user_id"]) == ("x", "mallory")


def test_an_id_that_is_a_uuid_stays_and_any_other_is_the_same_in_every_run() -> None:
    given_id = str(uuid.uuid4())
    assert str(made({"data": "x", "user_id": "a"}, source_id=given_id).id) == given_id
    assert made({"data": "x", "user_id": "a"}, source_id=given_id.replace("-", "")).id == uuid.UUID(given_id)
    first, second = (made({"data": "x", "user_id": "a"}, source_id="mem_1").id for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2025-01-15 10:00:00.123456", "2025-01-15T10:00:00.123456+00:00"),
        ("2025-01-15T10:00:00-08:00", "2025-01-15T10:00:00-08:00"),
        (1736935200, "2025-01-15T10:00:00+00:00"),
        (1736935200000, "2025-01-15T10:00:00+00:00"),
        (" 2025-01-15T10:00:00Z\n", "2025-01-15T10:00:00Z"),
        # Spellings that PostgreSQL does not read.
        ("2025-W03-3T10:00Z", "2025-01-15T10:00:00+00:00"),
        ("20250115T100000,5Z", "2025-01-15T10:00:00.500000+00:00"),
    ],
)
def test_instants(value: Any, expected: str) -> None:
    assert made({"data": "x", "user_id": "a", "created_at": value}).data["created_at"] == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"user_id": ""}, "no-owner"),
        ({"data": " "}, "no-text"),
        ({"data": "x" * (1 << 20) + "y"}, "text-too-long"),
        ({"created_at": "1066-10-14"}, "bad-time"),
        ({"created_at": True}, "bad-time"),
        ({"created_at": 10**40}, "bad-time"),
        ({"deep": [{"er": "a\0b"}]}, "bad-text"),
        ({"de\ud800ep": 1}, "bad-text"),
        ({"deep": [float("nan")]}, "bad-number"),
        ({"data": None, "memory": "x", "metadata": [1]}, "bad-json"),
    ],
)
def test_what_cannot_travel_says_why(changes: dict[str, Any], expected: str) -> None:
    assert reason({"data": "x", "user_id": "a", **changes}) == expected


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        ((1.0,), "wrong-dims"),
        ((1.0, float("inf")), "bad-vector"),
        ((1e300, 0.0), "bad-vector"),
        ((0.0, 0.0), "bad-vector"),
        (("a", "b"), "bad-vector"),
        ((None, 1.0), "bad-vector"),
    ],
)
def test_a_bad_embedding_is_refused_unless_all_are_made_anew(vector: Any, expected: str) -> None:
    data = {"data": "x", "user_id": "a"}
    assert reason(data, Choice(dims=2), vector=vector) == expected
    assert made(data, Choice(dims=2, carry_vectors=False), vector=vector).embedding is None


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool), min_size=1, max_size=20))
def test_float32_values_are_carried_bit_for_bit(values: list[float]) -> None:
    found = made({"data": "x", "user_id": "a"}, vector=tuple(values)).embedding
    assert found is not None
    assert struct.pack(f"<{len(found)}f", *found) == struct.pack(f"<{len(values)}f", *values)
    assert pack_vector(found) == pack_vector(values)


def test_who_and_what_was_chosen() -> None:
    choice = Choice(frozenset({"alice"}), parse_bound("2025-01-01"), parse_bound("2025-02-01"), {"alice": "a"})
    data = {"data": "x", "user_id": "alice", "created_at": "2025-01-31T23:59:59Z"}
    assert made(data, choice).user_id == "a"
    for changes in ({"user_id": "bob"}, {"created_at": "2025-02-01T00:00:00Z"}, {"created_at": "2024-12-31T23:00:00Z"}):
        assert transform(RawItem("memory", "7", {**data, **changes}, "1"), "test", choice) is None
    assert reason({**data, "user_id": "bob"}, Choice(remap_users={"alice": "a"})) == "not-mapped"
    change = {"memory_id": "mem_1", "user_id": "alice", "event": "UPDATE", "updated_at": "2025-01-31T23:59:59Z"}
    for at, is_chosen in (("2025-01-31T23:59:59Z", True), ("2025-02-01T00:00:00Z", False)):
        found = transform(RawItem("history", "7", {**change, "updated_at": at}, "1"), "test", choice)
        assert isinstance(found, Record) is is_chosen


@given(
    st.dictionaries(
        st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text() | st.floats(), max_size=4
    ),
    st.lists(st.floats(), max_size=3) | st.none(),
)
def test_an_item_survives_its_file(data: dict[str, Any], vector: list[float] | None) -> None:
    item = RawItem("memory", "7", data, "9", vector, "archived", {"archived_at": "2025-01-01"})
    spelled = json.loads(json.dumps(item_as_data(item)))
    read = item_from_data(spelled)
    assert item_as_data(read) == spelled or any(value != value for value in [*data.values(), *(vector or [])])
    assert (read.source_id, read.position, read.state) == ("7", "9", "archived")


def test_a_record_survives_its_file() -> None:
    moment = datetime(2025, 1, 1, tzinfo=UTC)
    record = Record("memory", uuid.uuid4(), "7", {"data": "x🐘"}, (1.5, -0.0), "deleted", {"deleted_at": moment})
    assert record_from_data(json.loads(json.dumps(record_as_data(record)))) == record


def test_a_segment_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "run")
    folder.begin({"source": {}})

    def lines() -> Any:
        yield {"a": "\ud800"}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        folder.write_segment("read", 1, lines(), {})
    assert folder.segments("read") == []
    assert list((folder.path / "read").iterdir()) == []
    folder.write_segment("read", 1, [{"a": "\ud800"}, {"b": 2}], {"position": "2"})
    assert folder.segments("read") == [1]
    assert list(folder.read_segment("read", 1)) == [{"a": "\ud800"}, {"b": 2}]
    assert folder.read_end("read", 1) == {"position": "2"}
    path = folder.path / "read" / "000001.jsonl.zst"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (bytes(flipped), whole[: len(whole) // 2], b"", b"x" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(SourceDataError, match="damaged"):
            list(folder.read_segment("read", 1))
    with pytest.raises(StateRefusedError, match="has a run already"):
        folder.begin({})
    with pytest.raises(ConfigError, match="no work folder"):
        WorkFolder(tmp_path).read_run()


def test_what_was_noted_of_a_segment_that_never_appeared_is_forgotten(tmp_path: Path) -> None:
    records = [made({"data": f"fact {number}", "user_id": "a"}, source_id=str(number)) for number in range(3)]
    seen = Seen(tmp_path / "seen.sqlite", segment=0)
    seen.note_target([(uuid.uuid4(), "a", None, None, hashlib.md5(records[2].text.encode()).hexdigest())])
    seen.begin()
    assert [seen.meet(record, record_as_data(record), 1) for record in records] == ["new", "new", "same-text"]
    seen.commit(1)
    seen.close()
    again = Seen(tmp_path / "seen.sqlite", segment=0)
    assert again.knows_target
    assert [again.meet(record, record_as_data(record), 1) for record in records] == ["new", "new", "same-text"]
    assert again.meet(records[0], record_as_data(records[0]), 1) == "same-id"
    other = made({"data": "another", "user_id": "a"}, source_id="0")
    assert again.meet(other, record_as_data(other), 1) == "other-content"
    assert again.missing == []
    again.close()
    later = Seen(tmp_path / "seen.sqlite", segment=2)
    assert later.missing == [1, 2]
    later.close()


def test_what_was_noted_and_cut_by_a_power_failure_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "seen.sqlite"
    seen = Seen(path, segment=0)
    seen.begin()
    seen.meet(made({"data": "x", "user_id": "a"}), {}, 1)
    seen.commit(1)
    seen.close()
    path.write_bytes(path.read_bytes()[:5000] + b"\0" * 3000)
    again = Seen(path, segment=1)
    assert (again.missing, again.knows_target) == ([1], False)
    again.close()


@pytest.mark.parametrize("first", ["active", "paused", "archived", "deleted"])
@pytest.mark.parametrize("second", ["active", "paused", "archived", "deleted"])
def test_only_what_mem0_meets_twice_is_left_out(tmp_path: Path, first: State, second: State) -> None:
    # The hash of a source may be of a text that it had before, or of none.
    data = {"data": "likes tea", "user_id": "a"}
    states = [(first, {**data, "hash": "one"}), (second, {**data, "hash": "two"})]
    seen = Seen(tmp_path / "seen.sqlite", segment=0)
    verdicts = []
    for number, (state, fields) in enumerate(states):
        item = RawItem("memory", str(number), fields, "1", state=state)
        record = transform(item, "test", Choice())
        assert isinstance(record, Record)
        verdicts.append(seen.meet(record, record_as_data(record), 1))
    other = made({"data": "likes coffee", "user_id": "a", "hash": "one"}, source_id="3")
    assert seen.meet(other, record_as_data(other), 1) == "new"
    seen.close()
    assert verdicts == ["new", "same-text" if first == second == "active" else "new"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {
                "table": "history", "memory_id": "mem_1", "old_memory": "before", "new_memory": "after", "event": "UPDATE",
                "created_at": "2025-01-01T00:00:00-08:00", "updated_at": "2025-01-02T00:00:00-08:00", "actor_id": None,
            },
            {"operation": "update", "old_value": {"data": "before"}, "changed_at": "2025-01-02T00:00:00-08:00",
             "actor": "history"},
        ),
        (
            {"table": "mem0_history", "memory_id": "mem_1", "action": "ADD", "user_id": 7, "created_at": 1736935200},
            {"operation": "create", "user_id": "7", "changed_at": "2025-01-15T10:00:00+00:00", "actor": "mem0_history"},
        ),
        (
            {"table": "memory_status_history", "memory_id": "mem_1", "changed_by": "u", "old_state": "active",
             "new_state": "deleted", "changed_at": "2025-01-15 10:00:00"},
            {"operation": "update", "old_value": {"state": "active"}, "changed_at": "2025-01-15T10:00:00+00:00",
             "actor": "u"},
        ),
    ],
)  # fmt: skip
def test_a_change_of_any_history_names_the_memory_by_the_id_that_it_got(
    data: dict[str, Any], expected: dict[str, Any]
) -> None:
    memory = made({"data": "x", "user_id": "a"}, source_id="mem_1")
    found = transform(RawItem("history", "1", data, "1"), "test", Choice())
    assert isinstance(found, Record)
    assert found.data == {"memory_id": str(memory.id), **expected}


def test_an_entity_of_the_typescript_sdk_names_its_memories_by_the_ids_that_they_got() -> None:
    memory = made({"data": "x", "user_id": "a"}, source_id="mem_1")
    fields = {"data": "Berlin", "userId": "a", "entityType": "PLACE", "linkedMemoryIds": ["mem_1", str(memory.id)]}
    found = transform(RawItem("entity", "1", fields, "1"), "test", Choice())
    assert isinstance(found, Record)
    assert found.data["linked_memory_ids"] == [str(memory.id)] * 2
    assert (found.data["entity_type"], found.user_id) == ("PLACE", "a")
    # In a memory it is the caller's own.
    assert made({"data": "x", "user_id": "a", "entityType": "PLACE"}).data["entityType"] == "PLACE"


def test_messages_stay_behind() -> None:
    assert transform(RawItem("history", "1", {"table": "messages", "role": "user"}, "1"), "test", Choice()) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"strength": 2}, "bad-number"),
        ({"relationship_type": ""}, "bad-json"),
        ({"target_memory_id": None}, "dangling"),
    ],
)
def test_a_relationship_that_cannot_be(changes: dict[str, Any], expected: str) -> None:
    edge = {"source_memory_id": "a", "target_memory_id": "b", "relationship_type": "x", **changes}
    found = transform(RawItem("relationship", "1", edge, "1"), "test", Choice())
    assert isinstance(found, Refusal)
    assert found.reason == expected


def test_what_a_newer_memory_has_replaced_is_archived_and_says_by_which() -> None:
    at = "2025-01-15T10:00:00Z"
    found = made({"memory": "x", "user_id": "a", "replaced_by": "newer", "updated_at": at})
    assert (found.state, found.data["replaced_by"]) == ("archived", "newer")
    assert found.lifecycle == {"archived_at": datetime(2025, 1, 15, 10, tzinfo=UTC)}
    assert made({"memory": "x", "user_id": "a", "replaced_by": None}).state == "active"
