"""Mem0 Platform as a target, against a loopback server with real sockets."""

from __future__ import annotations

import hashlib
import traceback
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from memharbor.errors import ConfigError, ConnectError, SourceDataError
from memharbor.migrate.record import RawItem, Record
from memharbor.migrate.sources.platform import PlatformSource
from memharbor.migrate.targets.platform import HASH, KEY, Outcome, PlatformTarget, import_key
from memharbor.migrate.transform import Choice, transform
from tests import platform_server
from tests.platform_server import FakeClock, Fault, PlatformServer, client, memory_of

ADD = "/v3/memories/add/"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def record(number: int, text: str | None = None, **data: Any) -> Record:
    owner = {} if {"user_id", "agent_id", "run_id"} & set(data) else {"user_id": f"u{number % 3}"}
    payload = {
        "data": text or f"fact {number}",
        "hash": "0123",
        "text_lemmatized": "fact",
        "created_at": "2025-03-01T08:00:00.5+00:00",
        "updated_at": "2025-04-01T08:00:00+00:00",
        **owner,
        **data,
    }
    return Record("memory", uuid.UUID(int=number + 1), str(number), payload)


def write(server: PlatformServer, records: Iterable[Record], **options: Any) -> list[Outcome]:
    with client(server) as http:
        return list(PlatformTarget(http, **options).write(records))


def words(outcomes: Iterable[Outcome]) -> list[str]:
    return [outcome.word for outcome in outcomes]


def test_a_memory_is_spelled_as_the_service_takes_it() -> None:
    one = record(
        6,
        "Alice likes tea",
        user_id="alice",
        agent_id="bot",
        run_id="r1",
        categories=["food"],
        app_id="shop",
        role="assistant",
        expiration_date="2030-01-31",
        mem0_migration_collection="of an earlier journey",
    )
    with PlatformServer() as server:
        (outcome,) = write(server, [one])
        body = next(request.body for request in server.requests if request.path == ADD)
        metadata = body.pop("metadata")
        assert body == {
            "messages": [{"role": "user", "content": "Alice likes tea"}],
            "infer": False,
            "user_id": "alice",
            "agent_id": "bot",
            "run_id": "r1",
            "timestamp": 1740816000,
            "expiration_date": "2030-01-31",
        }
        assert len(metadata.pop(HASH)) == 64
        assert metadata == {
            "categories": ["food"],
            "app_id": "shop",
            "role": "assistant",
            "mem0_migration_source": "memharbor",
            "mem0_migration_local_id": str(one.id),
            "mem0_migration_updated_at": "2025-04-01T08:00:00+00:00",
            KEY: import_key(str(one.id)),
        }
        assert outcome == Outcome(str(one.id), "inserted", server.memories[0]["id"])
        assert server.memories[0]["created_at"] == "2025-03-01T08:00:00+00:00"


def test_the_order_is_kept() -> None:
    with PlatformServer() as server:
        outcomes = write(server, map(record, range(25)))
        assert [outcome.record_id for outcome in outcomes] == [str(uuid.UUID(int=n + 1)) for n in range(25)]
        assert words(outcomes) == ["inserted"] * 25
        assert [memory["memory"] for memory in server.memories] == [f"fact {n}" for n in range(25)]


@pytest.mark.parametrize("null_scoping", [False, True])
def test_a_second_run_adds_nothing(null_scoping: bool) -> None:
    records = [
        *(record(n) for n in range(230)),
        *(record(n, user_id="u1", agent_id="bot", run_id=f"r{n}") for n in range(230, 240)),
        *(record(n, agent_id="bot") for n in range(240, 245)),
        *(record(n, run_id="alone") for n in range(245, 250)),
        record(250, user_id="u1", expiration_date="2020-01-31"),
    ]
    with PlatformServer(null_scoping=null_scoping, one_of_a_text=False) as server:
        assert words(write(server, records)) == ["inserted"] * 251
        server.requests.clear()
        again = write(server, records)
        assert words(again) == ["same"] * 251
        assert {outcome.detail for outcome in again} == {memory["id"] for memory in server.memories}
        assert len(server.memories) == 251
        assert server.count(ADD) == 0


def test_a_memory_is_known_again_whatever_its_database_was_called() -> None:
    """The keys of before were made of a name, and one database had several."""
    records = [record(n) for n in range(40)]
    with PlatformServer(one_of_a_text=False) as server:
        write(server, records)
        for number, memory in enumerate(server.memories):
            name = "stack dev" if number % 2 else "the database of MEMHARBOR_DSN"
            local_id = memory["metadata"]["mem0_migration_local_id"]
            memory["metadata"][KEY] = hashlib.sha256(f"memharbor:{name}:{local_id}".encode()).hexdigest()
        again = write(server, records)
        assert words(again) == ["same"] * 40
        assert [outcome.detail for outcome in again] == [memory["id"] for memory in server.memories]
        assert len(server.memories) == 40


def test_a_copy_in_another_database_is_the_same_memory() -> None:
    review: list[Mapping[str, Any]] = []
    with PlatformServer() as server:
        write(server, [record(1)])
        assert words(write(server, [record(1)])) == ["same"]
        assert words(write(server, [record(1, "another text")], on_review=review.append)) == ["changed"]
        assert [memory["memory"] for memory in server.memories] == ["fact 1"]
        assert [each["record"]["data"]["data"] for each in review] == ["another text"]  # nothing is lost without a word


def test_what_another_tool_brought_is_not_ours() -> None:
    theirs = {"mem0_migration_source": "oss", "mem0_migration_local_id": str(record(1).id), KEY: "theirs"}
    with PlatformServer([memory_of("fact of theirs", user_id="u1", metadata=theirs)]) as server:
        assert words(write(server, [record(1)])) == ["inserted"]


def test_an_owner_is_listed_once() -> None:
    with PlatformServer([memory_of(f"theirs {n}", n, user_id="u1") for n in range(450)]) as server:
        write(server, [record(n, user_id="u1") for n in range(20)])
        assert server.count("/v3/memories/") == 6  # three pages of both lists
        assert server.count(ADD) == 20


@pytest.mark.parametrize("fault", [Fault("late", ADD, skip=3), Fault("cut", ADD, skip=3), Fault("drop", ADD, skip=3)])
def test_a_write_whose_answer_was_lost_is_not_done_twice(fault: Fault) -> None:
    fault.skip = 3  # the same object serves every run of this test
    with PlatformServer(one_of_a_text=False) as server:
        server.faults = [fault]
        outcomes = write(server, map(record, range(8)))
        assert words(outcomes) == ["inserted"] * 8
        assert [memory["memory"] for memory in server.memories] == [f"fact {n}" for n in range(8)]
        assert {outcome.detail for outcome in outcomes} == {memory["id"] for memory in server.memories}
        assert server.count(ADD) == (9 if fault.kind == "drop" else 8)
        assert words(write(server, map(record, range(8)))) == ["same"] * 8


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_write_that_was_not_done_is_done_later(status: int) -> None:
    with PlatformServer() as server:
        server.faults = [Fault("status", ADD, status=status), Fault("status", ADD, status=status)]
        assert words(write(server, map(record, range(3)))) == ["inserted"] * 3
        assert len(server.memories) == 3


def test_a_run_that_ended_after_a_write_goes_on_with_the_next_one() -> None:
    """Every way to die: the process is gone after any request of the run, before anyone heard of its answer."""
    records = [record(n) for n in range(4)]
    with PlatformServer() as whole:
        write(whole, records)
        total = len(whole.requests)
    for dies_at in range(total):
        with PlatformServer(one_of_a_text=False) as server:
            server.faults = [Fault("late", skip=dies_at)] + [Fault("status", status=503) for _ in range(40)]
            with client(server, attempts=2) as http, pytest.raises(ConnectError):
                list(PlatformTarget(http).write(records))
            server.faults.clear()
            assert set(words(write(server, records))) <= {"inserted", "same"}
            assert [memory["memory"] for memory in server.memories] == [f"fact {n}" for n in range(4)]


def test_a_lost_answer_that_is_never_found_ends_the_run() -> None:
    with PlatformServer() as server:
        server.faults = [Fault("drop", ADD) for _ in range(20)]
        with client(server) as http, pytest.raises(ConnectError, match="8 times") as caught:
            list(PlatformTarget(http).write([record(1)]))
        assert caught.value.hints
        assert server.count(ADD) == 8


def test_one_that_was_changed_here_goes_to_the_review_and_is_not_written() -> None:
    review: list[Mapping[str, Any]] = []
    with PlatformServer() as server:
        write(server, [record(1), record(2)])
        changed = [record(1, "another text"), record(2, colour="red"), record(2)]
        outcomes = write(server, changed, on_review=review.append)
        assert words(outcomes) == ["changed", "changed", "same"]
        assert [each["platform_memory_id"] for each in review] == [memory["id"] for memory in server.memories]
        assert [each["record"]["data"]["data"] for each in review] == ["another text", "fact 2"]
        assert [each["status"] for each in review] == ["changed_existing"] * 2
        assert all(each["existing_hash"] != each["local_hash"] for each in review)
        assert [memory["memory"] for memory in server.memories] == ["fact 1", "fact 2"]


def test_one_whose_text_was_changed_there_goes_to_the_review_too() -> None:
    review: list[Mapping[str, Any]] = []
    records = [record(1), record(2, "  space around it \n"), record(3)]
    with PlatformServer() as server:
        write(server, records)
        server.memories[1]["memory"] = "space around it"  # as a service may keep it
        server.memories[2]["memory"] = "edited in the dashboard"
        outcomes = write(server, records, on_review=review.append)
        assert words(outcomes) == ["same", "same", "changed"]
        (one,) = review
        assert (one["status"], one["platform_memory_id"]) == ("changed_there", server.memories[2]["id"])
        assert one["existing_hash"] == one["local_hash"]
        assert server.memories[2]["memory"] == "edited in the dashboard"


def test_a_record_that_comes_twice_is_written_once() -> None:
    with PlatformServer(one_of_a_text=False) as server:
        assert words(write(server, [record(1), record(1)])) == ["inserted", "same"]
        assert len(server.memories) == 1


def test_a_text_that_its_scope_has_already_is_said_to_be_there() -> None:
    with PlatformServer([memory_of("fact 1", user_id="u1")]) as server:
        for _ in range(2):
            (outcome,) = write(server, [record(1)])
            assert (outcome.word, "another key" in outcome.detail) == ("same", True)
        assert len(server.memories) == 1


def test_an_empty_answer_to_a_write_that_was_done_is_understood() -> None:
    """The guide of direct import shows an empty list as the answer."""

    class Silent(PlatformServer):
        def _add(self, body: Mapping[str, Any]) -> Any:
            super()._add(body)
            return []

    with Silent() as server:
        (outcome,) = write(server, [record(1)])
        assert outcome == Outcome(str(record(1).id), "inserted", server.memories[0]["id"])


@pytest.mark.parametrize("queued", ["answer", "results", "both"])
@pytest.mark.parametrize("polls", [1, 2, 4])
def test_an_event_is_asked_for_until_it_is_done(polls: int, queued: Any) -> None:
    clock = FakeClock()
    with PlatformServer(polls=polls, queued=queued) as server, client(server, clock) as http:
        outcomes = list(PlatformTarget(http).write([record(1), record(2)]))
        assert words(outcomes) == ["inserted", "inserted"]
        assert {outcome.detail for outcome in outcomes} == {memory["id"] for memory in server.memories}
        events = [request.path for request in server.requests if request.path.startswith("/v1/event/")]
        assert len(events) == 2 * polls
        assert len(clock.slept) == 2 * (polls - 1)
    assert words(outcomes) == ["inserted", "inserted"]


@pytest.mark.parametrize("queued", ["answer", "results", "both"])
def test_an_event_that_fails_refuses_its_record_only(queued: Any) -> None:
    with PlatformServer(polls=1, event_ends="FAILED", queued=queued) as server:
        outcomes = write(server, [record(1), record(2)])
        assert words(outcomes) == ["refused", "refused"]
        assert all("failed" in outcome.detail for outcome in outcomes)


def test_an_event_that_does_not_end_ends_the_run() -> None:
    with PlatformServer(polls=100) as server, client(server) as http:
        with pytest.raises(ConnectError, match="still PENDING") as caught:
            list(PlatformTarget(http).write([record(1)]))
        assert "run the same command again" in caught.value.hints[0]


def test_what_the_service_refuses_is_said_with_its_words_and_the_rest_is_written() -> None:
    with PlatformServer() as server:
        outcomes = write(server, [record(1), record(2, "[refuse] this"), record(3)])
        assert words(outcomes) == ["inserted", "refused", "inserted"]
        assert outcomes[1].detail == "400 Invalid input data: the content is not allowed."


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (Record("entity", uuid.UUID(int=1), "1", {"data": "x", "user_id": "u"}), "entity"),
        (Record("memory", uuid.UUID(int=1), "1", {"data": "x", "user_id": "u"}, state="deleted"), "deleted"),
        (Record("memory", uuid.UUID(int=1), "1", {"data": " ", "user_id": "u"}), "no text"),
        (Record("memory", uuid.UUID(int=1), "1", {"data": "x"}), "user_id"),
    ],
)
def test_what_the_service_has_no_place_for_is_not_sent(one: Record, why: str) -> None:
    with PlatformServer() as server:
        (outcome,) = write(server, [one])
        assert outcome.word == "refused"
        assert why in outcome.detail
        assert server.requests == []


def test_an_expiry_of_ours_becomes_the_day_of_theirs() -> None:
    expiring = Record(
        "memory",
        uuid.UUID(int=1),
        "1",
        {"data": "x", "user_id": "u"},
        lifecycle={"expires_at": datetime(2030, 1, 31, 5, tzinfo=UTC)},
    )
    with PlatformServer() as server:
        write(server, [expiring])
        assert server.memories[0]["expiration_date"] == "2030-01-31"


@pytest.mark.parametrize("at", ["not a date", "0001-01-01T00:00:00+14:00", 7])
def test_an_instant_that_is_none_stops_nothing(at: Any) -> None:
    with PlatformServer() as server:
        assert words(write(server, [record(1, created_at=at), record(2)])) == ["inserted", "inserted"]
        bodies = [request.body for request in server.requests if request.path == ADD]
        assert [type(body.get("timestamp")) for body in bodies][-1] is int
        assert words(write(server, [record(1, created_at=at)])) == ["same"]


def test_a_key_that_is_refused_stops_the_run() -> None:
    with PlatformServer() as server, client(server) as http:
        server.faults = [Fault("status", ADD, status=401)]
        with pytest.raises(ConfigError) as caught:
            list(PlatformTarget(http).write([record(1)]))
        assert platform_server.KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("body", ["text", 7, {"results": "x"}])
def test_an_answer_of_another_shape_is_said_to_be_one(body: Any) -> None:
    with PlatformServer() as server, client(server) as http:
        server.faults = [Fault("status", ADD, status=200, body=body)]
        with pytest.raises(SourceDataError):
            list(PlatformTarget(http).write([record(1)]))


def test_what_travels_there_and_back_is_the_same() -> None:
    records = [record(n, categories=["food"], expiration_date="2020-01-31", colour=f"c{n}") for n in range(6)]
    with PlatformServer() as server:
        write(server, records)
        with client(server) as http:
            items = [item for item in PlatformSource(http).read() if isinstance(item, RawItem)]
    back = [transform(item, "platform", Choice()) for item in items]
    for one, there in zip(records, reversed(back), strict=True):
        assert isinstance(there, Record)
        for name in ("data", "user_id", "categories", "expiration_date", "colour"):
            assert there.data[name] == one.data[name]
        assert there.data["mem0_migration_local_id"] == str(one.id)
