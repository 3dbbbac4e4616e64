"""Zep Cloud as a target, against a loopback server with real sockets."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import traceback
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from memharbor.errors import ConfigError, ConnectError, MemharborError, SourceDataError, StateRefusedError, UsageError
from memharbor.migrate.record import Record
from memharbor.migrate.targets.platform import Outcome
from memharbor.migrate.targets.zep import ZepTarget
from memharbor.migrate.targets.zep_client import ZEP_URL, connect
from memharbor.migrate.targets.zep_mapping import (
    DEFAULT,
    Mapped,
    Speller,
    parse_mapping,
    read_mapping,
    split_text,
    write_mapping,
)
from memharbor.migrate.targets.zep_migrator import Mem0ToZepMigrator
from memharbor.migrate.targets.zep_state import FILE, ZepState
from tests import zep_server
from tests.platform_server import FakeClock
from tests.zep_records import checked, record, turn, words, write
from tests.zep_server import Fault, ZepServer, client

ROOT = Path(__file__).resolve().parents[2]
HOW_TO = ROOT / "docs" / "how-to" / "migrate-to-zep.md"
EPISODES = "/graphs/*/episodes"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_memory_becomes_an_episode_of_its_user(tmp_path: Path) -> None:
    one = record(
        6,
        "Alice likes tea",
        user_id="alice",
        agent_id="bot",
        run_id="r1",
        categories=["food", "drink"],
        memory_type="insights",
        mood={"a": 1},
    )
    with ZepServer() as server:
        (outcome,) = write(server, tmp_path, [one])
        (user,) = server.users.values()
        (body,) = [request.body for request in server.requests if request.path.endswith("/episodes")]
        (digest,) = (body["metadata"].pop("memharbor_hash"),)
        assert len(digest) == 64
        assert body == {
            "type": "text",
            "data": "Alice likes tea",
            "source_description": "EMOTIONAL_STATE",
            "reference_time": "2025-03-01T07:06:00.500000Z",
            "metadata": {
                "memharbor_id": str(one.id),
                "memory_type": "EMOTIONAL_STATE",
                "run_id": "r1",
                "agent_id": "bot",
                "categories": ["food", "drink"],
            },
        }
        assert user["user_id"] == "alice"
        assert outcome == Outcome(str(one.id), "inserted", server.episodes[0]["uuid"])


@pytest.mark.parametrize("batch_items", [0, 40, 5000])
@pytest.mark.parametrize("has_batches", [True, False])
def test_a_second_run_adds_nothing(tmp_path: Path, batch_items: int, has_batches: bool) -> None:
    records = [record(number) for number in range(130)]
    with ZepServer(has_batches=has_batches) as server:
        outcomes = write(server, tmp_path, records, batch_items=batch_items)
        assert [outcome.record_id for outcome in outcomes] == [str(each.id) for each in records]
        assert words(outcomes) == {"inserted": 130}
        assert Counter(server.texts()) == Counter(each.text for each in records)
        assert len(server.users) == 3
        assert (server.count(EPISODES) == 0) == (has_batches and batch_items > 0)
        server.requests.clear()
        again = write(server, tmp_path, records, batch_items=batch_items)
        assert words(again) == {"same": 130}
        assert {request.method for request in server.requests} == {"GET"}  # the project, the batches
        assert len(server.episodes) == 130


def test_a_lost_state_is_read_from_the_service(tmp_path: Path) -> None:
    records = [*(record(number) for number in range(250)), record(250, "x. " * 5000), *map(turn, range(300, 310))]
    with ZepServer(page_size_max=7) as server:
        assert set(words(write(server, tmp_path / "a", records, threads=True))) == {"inserted"}
        (thread,) = server.threads
        before = len(server.episodes)
        assert words(write(server, tmp_path / "b", records, threads=True)) == {"same": 261}
        more = [turn(number) for number in range(310, 313)]
        assert words(write(server, tmp_path / "b", more, threads=True)) == {"inserted": 3}
        assert len(server.episodes) == before + 3
        assert set(server.threads) == {thread}


@pytest.mark.parametrize("kind", ["late", "cut"])
@pytest.mark.parametrize("keeps_keys", [True, False])
def test_a_fault_after_a_single_write_doubles_nothing(tmp_path: Path, kind: Any, keeps_keys: bool) -> None:
    records = [*map(record, range(6)), *map(turn, range(10, 13))]
    with ZepServer(keeps_keys=keeps_keys) as server:
        server.faults = [
            Fault(kind, "/users", method="POST"),
            Fault(kind, "/threads", method="POST"),
            Fault(kind, EPISODES, skip=2),
            Fault(kind, EPISODES, skip=1),
            Fault(kind, "/threads/*/messages", method="POST"),
            Fault("drop", EPISODES),
            Fault("status", EPISODES, status=500),
        ]
        assert words(write(server, tmp_path, records, threads=True, batch_items=0)) == {"inserted": 9}
        assert server.faults == []
        assert Counter(server.keys()).most_common(1)[0][1] == 1
        assert len(server.episodes) == 9
        assert len(server.users) == 4
        assert len(server.threads) == 1


@pytest.mark.parametrize("kind", ["late", "cut", "drop"])
@pytest.mark.parametrize("path", ["/batches", "/batches/*/items", "/batches/*/process"])
def test_a_fault_in_a_batch_doubles_nothing(tmp_path: Path, kind: Any, path: str) -> None:
    records = [record(number) for number in range(1200)]
    with ZepServer() as server:
        server.faults = [Fault(kind, path, method="POST")]
        if kind == "drop" or not path.endswith("process"):  # what was heard is not said again
            server.faults.append(Fault(kind, path, skip=int(path.endswith("items")), method="POST"))
        assert words(write(server, tmp_path, records)) == {"inserted": 1200}
        assert server.faults == []
        assert len(server.keys()) == len(set(server.keys())) == 1200
        assert [batch["status"] for batch in server.batches.values()] == ["succeeded"]
        assert words(write(server, tmp_path, records)) == {"same": 1200}
        assert max(len(r.body["items"]) for r in server.requests if r.path.endswith("/items") and r.body) == 500


def test_the_same_key_goes_with_the_same_write(tmp_path: Path) -> None:
    with ZepServer() as server:
        server.faults = [Fault("drop", EPISODES), Fault("status", EPISODES)]
        write(server, tmp_path, [record(1), record(2)])
        keys = [
            request.headers.get("idempotency-key") for request in server.requests if request.path.endswith("/episodes")
        ]
        assert len(keys) == 4
        assert keys[0] == keys[1] == keys[2] != keys[3]
        assert all("idempotency-key" not in r.headers for r in server.requests if r.path.endswith(("list", "lookup")))


_SCRIPT = """
import sys
from pathlib import Path
from pydantic import SecretStr
from memharbor.migrate.targets.zep_client import ZepClient
from memharbor.migrate.targets.zep_migrator import Mem0ToZepMigrator
key, url, folder, export, batch = sys.stdin.read().split()
with ZepClient(SecretStr(key), url) as http:
    Mem0ToZepMigrator(http, Path(folder), Path(export), threads=True, batch_items=int(batch)).migrate_all()
"""


@pytest.mark.parametrize("batch_items", [0, 20])
def test_a_killed_run_goes_on_and_doubles_nothing(tmp_path: Path, batch_items: int) -> None:
    export = tmp_path / "export.jsonl"
    lines = [
        {"id": str(each.id), "memory": each.text, "user_id": each.user_id}
        | {"created_at": each.data["created_at"], "metadata": {"role": each.data.get("role")}}
        | {"run_id": each.data.get("run_id")}
        for each in (turn(n) if n % 5 == 0 else record(n) for n in range(240))
    ]
    export.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    chance = random.Random(batch_items)
    with ZepServer() as server:
        given = f"{zep_server.KEY} {server.base_url} {tmp_path / 'state'} {export} {batch_items}"
        reached = threading.Event()
        target = 0
        plain = server.fault_for

        def watched(method: str, path: str) -> Fault | None:
            if len(server.requests) >= target:
                reached.set()
            return plain(method, path)

        server.fault_for = watched  # type: ignore[method-assign]

        def start() -> subprocess.Popen[str]:
            run = subprocess.Popen([sys.executable, "-c", _SCRIPT], stdin=subprocess.PIPE, text=True, cwd=ROOT)
            assert run.stdin is not None
            run.stdin.write(given)
            run.stdin.close()
            return run

        for _ in range(3):
            reached.clear()
            target = len(server.requests) + chance.randrange(8, 15 if batch_items else 60)
            run = start()
            while not reached.wait(0.05):
                assert run.poll() is None  # it must not end before it is killed
            run.send_signal(signal.SIGKILL)
            assert run.wait(60) == -signal.SIGKILL
        assert start().wait(60) == 0
        assert len(server.keys()) == len(set(server.keys())) == 240
        assert len(server.threads) == 1
        assert "draft" not in {batch["status"] for batch in server.batches.values()}


def test_what_a_batch_could_not_ingest_is_sent_again(tmp_path: Path) -> None:
    records = [record(number) for number in range(40)]
    with ZepServer(slow=1) as server:
        server.failing = {"fact 7", "fact 8"}
        assert words(write(server, tmp_path, records)) == {"inserted": 40}
        assert server.episodes == []  # the batch is still read
        assert words(write(server, tmp_path, records)) == {"same": 40}
        assert words(write(server, tmp_path, records)) == {"same": 38, "inserted": 2}
        assert sorted(server.texts()) == sorted(each.text for each in records)
        assert server.count(EPISODES) == 2


def test_a_state_that_is_new_waits_for_the_batches_of_another(tmp_path: Path) -> None:
    records = [record(number) for number in range(20)]
    with ZepServer(slow=3) as server:
        write(server, tmp_path / "a", records)
        with pytest.raises(StateRefusedError, match="a batch of another migration is queued"):
            write(server, tmp_path / "b", records)
        assert server.episodes == []


def test_one_bad_item_of_a_batch_is_refused_alone(tmp_path: Path) -> None:
    records = [record(n, "[refuse]" if n == 13 else None) for n in range(30)]
    with ZepServer() as server:
        outcomes = write(server, tmp_path, records)
        assert words(outcomes) == {"inserted": 29, "refused": 1}
        assert outcomes[13].word == "refused"
        assert outcomes[13].detail.startswith("400 the text is not allowed")
        assert len(server.episodes) == 29
        assert server.batches == {}


def test_a_user_who_is_refused_is_asked_for_once(tmp_path: Path) -> None:
    with ZepServer() as server:
        outcomes = write(server, tmp_path, [record(number, user_id="[refuse]") for number in range(5)])
        assert words(outcomes) == {"refused": 5}
        assert server.count("/users") == 1


def test_a_failure_that_the_service_remembers_is_got_over(tmp_path: Path) -> None:
    with ZepServer() as server:
        plain, first = server.fault_for, list[str]()

        def remembers(method: str, path: str) -> Fault | None:
            key = server.requests[-1].headers.get("idempotency-key", "")
            if key and path.endswith("/episodes"):
                first.append(key)
                return Fault("status", status=500) if key == first[0] else None
            return plain(method, path)

        server.fault_for = remembers  # type: ignore[method-assign]
        assert words(write(server, tmp_path, [record(1)])) == {"inserted": 1}
        assert len(set(first)) == 2
        assert server.texts() == ["fact 1"]


def test_users_who_are_gone_there_are_named(tmp_path: Path) -> None:
    with ZepServer() as server:
        write(server, tmp_path, [record(0), record(1)])
        gone = next(uuid_ for uuid_, user in server.users.items() if user["user_id"] == "u0")
        del server.users[gone]
        outcomes = write(server, tmp_path, [record(n) for n in range(30, 60)])
        assert words(outcomes) == {"inserted": 20, "refused": 10}
        assert {outcome.detail for outcome in outcomes if outcome.word == "refused"} == {"graph not found"}
        (single,) = write(server, tmp_path, [record(3)])
        assert single.detail == "404 graph not found"


@pytest.mark.parametrize("at", ["not a date", "0001-01-01T00:00:00+14:00", 7])
def test_an_instant_that_is_none_stops_nothing(tmp_path: Path, at: Any) -> None:
    records = [record(1, created_at=at), record(2)]
    with ZepServer() as server:
        assert words(write(server, tmp_path, records)) == {"inserted": 2}
        bodies = [request.body for request in server.requests if request.path.endswith("/episodes")]
        assert ["reference_time" in body for body in bodies] == [False, True]
        assert checked(server, tmp_path, records)["is_complete"]


def test_other_contents_stay(tmp_path: Path) -> None:
    with ZepServer() as server:
        write(server, tmp_path, [record(1, "old")])
        (outcome,) = write(server, tmp_path, [record(1, "new")])
        assert outcome.word == "changed"
        assert server.texts() == ["old"]


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (Record("entity", uuid.UUID(int=1), "", {"data": "x", "user_id": "u"}), "what is a entity"),
        (Record("memory", uuid.UUID(int=1), "", {"data": "x", "user_id": "u"}, state="archived"), "archived here"),
        (Record("memory", uuid.UUID(int=1), "", {"data": " \n", "user_id": "u"}), "no text"),
        (Record("memory", uuid.UUID(int=1), "", {"data": "x", "agent_id": "bot"}), "no user_id"),
        (Record("memory", uuid.UUID(int=1), "", {"data": "x", "user_id": "u" * 501}), "500 characters"),
        (Record("memory", uuid.UUID(int=1), "", {"data": "x", "user_id": "[refuse]"}), "400 user_id is not valid"),
    ],
)
def test_what_zep_does_not_take_is_refused(tmp_path: Path, one: Record, why: str) -> None:
    with ZepServer() as server:
        (outcome, good) = write(server, tmp_path, [one, record(9)])
        assert outcome.word == "refused"
        assert why in outcome.detail
        assert good.word == "inserted"


@given(st.text(alphabet=st.sampled_from("ab .!?\n。é😀"), max_size=400), st.integers(1, 40))
def test_nothing_is_lost_when_a_text_is_split(text: str, limit: int) -> None:
    parts = list(split_text(text, limit))
    assert all(0 < len(part) <= limit and part.strip() for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_a_long_text_becomes_numbered_parts(tmp_path: Path) -> None:
    text = "This sentence is one of many. " * 900
    with ZepServer() as server:
        assert words(write(server, tmp_path, [record(1, text)])) == {"inserted": 1}
        assert "".join(server.texts()) == text
        assert all(len(part) <= 10_000 and part.endswith(". ") for part in server.texts())
        marks = [(e["metadata"]["memharbor_part"], e["metadata"]["memharbor_parts"]) for e in server.episodes]
        assert marks == [(1, 3), (2, 3), (3, 3)]
        lost = server.episodes.pop(1)
        assert words(write(server, tmp_path / "new", [record(1, text)])) == {"inserted": 1}
        assert [episode["content"] for episode in server.episodes[2:]] == [lost["content"]]


def test_metadata_is_ten_keys_of_scalars(tmp_path: Path) -> None:
    mapping = parse_mapping({"metadata": ["a", "b", "c", "d"]})
    text = "Word. " * 2000
    data = {"a": {"deep": [1]}, "b": [1, {"x": 2}], "c": 1.5, "d": True, "e": "left", "memory_type": "own"}
    with ZepServer() as server, client(server) as http:
        target = ZepTarget(http, tmp_path, mapping)
        outcomes = list(target.write([record(1, text, run_id="r", **data), record(2, e="left", a=None)]))
        assert words(outcomes) == {"inserted": 2}
        found = server.episodes[0]["metadata"]
        assert len(found) == 10
        assert {name: found[name] for name in "abcd"} == {
            "a": '{"deep": [1]}',
            "b": '[1, {"x": 2}]',
            "c": 1.5,
            "d": True,
        }
        assert found["memory_type"] == "own"
        assert target.speller.left_behind == {"e": 2}


def test_turns_become_messages_of_a_thread(tmp_path: Path) -> None:
    records = [
        *(turn(number) for number in range(70)),
        turn(70, text="Long sentence. " * 300),
        turn(71, role="therapist"),
        turn(72, role="stranger"),
        turn(73, run_id=None),
        turn(74, run_id="other"),
    ]
    with ZepServer() as server:
        outcomes = write(server, tmp_path, records, threads=True, batch_items=0)
        assert words(outcomes) == {"inserted": 75}
        sizes = [len(r.body["messages"]) for r in server.requests if r.path.endswith("/messages")]
        assert max(sizes) <= 30
        assert sum(sizes) == 72 + 1 + 1  # the long one is cut in two
        assert len(server.threads) == 2
        said = [episode for episode in server.episodes if "thread_uuid" in episode]
        assert [episode["name"] for episode in said[-2:]] == ["therapist", "patient"]
        assert [episode["role"] for episode in said[-2:]] == ["user", "user"]
        assert all(len(episode["content"]) <= 2500 for episode in said)
        assert {e["metadata"]["memharbor_id"] for e in server.episodes if "thread_uuid" not in e} == {
            str(uuid.UUID(int=73)),
            str(uuid.UUID(int=74)),
        }
        assert checked(server, tmp_path, records, threads=True)["is_complete"]


def test_messages_go_in_batches_too(tmp_path: Path) -> None:
    records = [*map(turn, range(40)), *(record(n) for n in range(50, 70))]
    with ZepServer() as server:
        assert words(write(server, tmp_path, records, threads=True)) == {"inserted": 60}
        assert server.count("/threads/*/messages") == 0
        assert sum("thread_uuid" in episode for episode in server.episodes) == 40


def test_a_pause_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    clock = FakeClock()
    with ZepServer() as server, client(server, clock) as http:
        server.faults = [Fault("status", EPISODES, status=429, headers={"Retry-After": "17"})]
        assert words(ZepTarget(http, tmp_path).write([record(1)])) == {"inserted": 1}
        assert clock.slept == [17.0]
        assert server.count("/graphs/*/episodes/list") == 0  # what was not done is not looked for


def test_a_wrong_key_is_said_and_not_shown(tmp_path: Path) -> None:
    from memharbor.migrate.targets.zep_client import ZepClient

    wrong = "z_wrongKEYwrongKEY"  # pragma: allowlist secret
    with ZepServer() as server, ZepClient(SecretStr(wrong), server.base_url) as http:
        with pytest.raises(ConfigError, match="refuses the key") as caught:
            list(ZepTarget(http, tmp_path).write([record(1)]))
        assert caught.value.hints == ("check the value of ZEP_API_KEY",)
        shown = "".join(traceback.format_exception(caught.value)) + repr(http)
        assert wrong not in shown
        assert "***" in shown


@pytest.mark.parametrize("kind", ["text", "status"])
def test_faults_that_stay_are_told_and_a_later_run_goes_on(tmp_path: Path, kind: Any) -> None:
    records = [record(number) for number in range(6)]
    with ZepServer() as server:
        server.faults = [Fault(kind, EPISODES, skip=3) for _ in range(1)] + [Fault(kind, EPISODES) for _ in range(9)]
        with pytest.raises((ConnectError, SourceDataError)) as caught:
            write(server, tmp_path, records)
        assert zep_server.KEY not in "".join(traceback.format_exception(caught.value))
        server.faults.clear()
        write(server, tmp_path, records)
        assert len(server.keys()) == len(set(server.keys())) == 6


def test_a_state_is_of_one_project_and_one_process(tmp_path: Path) -> None:
    with ZepServer() as server, client(server) as http:
        target = ZepTarget(http, tmp_path)
        list(target.write([record(1)]))
        server.project = "another"
        with pytest.raises(StateRefusedError, match="is of the project"):
            list(target.write([record(1)]))
        server.project = zep_server.PROJECT
        with ZepState(tmp_path), pytest.raises(StateRefusedError, match="locked") as caught:
            list(target.write([record(2)]))
        assert "another migration" in str(caught.value.hints)
        assert (tmp_path / FILE).stat().st_mode & 0o077 == 0
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / FILE).write_text("this is no database at all, but a text that is long enough" * 20)
    with pytest.raises(StateRefusedError, match="not a database"):
        ZepState(tmp_path / "bad")


def test_the_table_of_the_seed_is_the_default() -> None:
    """`preferences` is no type there but is stored in message metadata."""
    assert DEFAULT["memory_types"] == {
        "messages": "CONVERSATION",
        "insights": "EMOTIONAL_STATE",
        "summary": "SESSION_SUMMARY",
        "traits": "TREATMENT_PLAN",
    }
    assert DEFAULT["user_roles"] == {
        "user": "patient",
        "therapist": "therapist",
        "admin": "admin",
        "support": "support",
    }
    seeds = {"user": "user", "assistant": "assistant", "ai": "assistant", "system": "system", "therapist": "user"}
    assert DEFAULT["roles"].items() >= seeds.items()
    likes = turn(1, text="prefers mornings", memory_type="preferences")
    (message,) = Speller(Mapped(), threads=True).pieces(likes)
    assert message.body["metadata"]["preferences"] == message.body["content"] == "prefers mornings"
    assert "memory_type" not in message.body["metadata"]
    (episode,) = Speller(Mapped()).pieces(likes)
    assert episode.body["metadata"]["preferences"] == "prefers mornings"
    assert episode.body["source_description"] == "preferences"
    as_label = parse_mapping({"types_in_metadata": {}, "memory_types": {"preferences": "LIKES"}})
    assert Speller(as_label).pieces(likes)[0].body["metadata"]["memory_type"] == "LIKES"
    long = record(1, "Word. " * 3000, run_id="r", agent_id="a", app_id="b", categories=["c"], memory_type="preferences")
    parts = Speller(Mapped()).pieces(Record("memory", long.id, "", {**long.data, "expiration_date": "2030-01-31"}))
    assert len(parts) == 2
    assert all(len(part.body["metadata"]) == 10 for part in parts)
    assert all(part.body["metadata"]["preferences"] == part.body["data"] for part in parts)


def test_the_default_mapping_can_be_written_edited_and_read(tmp_path: Path) -> None:
    path = tmp_path / "mapping.json"
    write_mapping(path)
    assert read_mapping(path) == Mapped() == read_mapping(None)
    with pytest.raises(StateRefusedError):
        write_mapping(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data == DEFAULT
    data["roles"]["coach"] = "assistant"
    path.write_text(json.dumps(data), encoding="utf-8")
    body = Speller(read_mapping(path), threads=True).pieces(turn(1, role="Coach"))[0].body
    assert (body["role"], body["name"]) == ("assistant", "Coach")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([], "no JSON object"),
        ({"role": {}}, "`role`"),
        ({"roles": {"coach": "therapist"}}, "`roles.coach`"),
        ({"roles": []}, "`roles`"),
        ({"memory_types": {"messages": 3}}, "`memory_types.messages`"),
        ({"user_roles": {"admin": ""}}, "`user_roles.admin`"),
        ({"types_in_metadata": {"likes": "memharbor_id"}}, "`types_in_metadata.likes`"),
        ({"types_in_metadata": ["likes"]}, "`types_in_metadata`"),
        ({"role_key": 7}, "`role_key`"),
        ({"metadata": "categories"}, "`metadata`"),
        ({"metadata": ["memharbor_id"]}, "`memharbor_id`"),
        ({"metadata": ["a", "b", "c", "d", "e"]}, "choose 4"),
    ],
)
def test_a_wrong_mapping_is_named(tmp_path: Path, data: Any, named: str) -> None:
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(named)):
        read_mapping(path)


def test_a_mapping_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    for name in ("broken.json", "none.json"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_mapping(tmp_path / name)


def test_the_key_comes_from_the_environment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the key of Zep Cloud is not given"):
        connect({})
    file = tmp_path / "key"
    file.write_text(f"{zep_server.KEY}\n", encoding="utf-8")
    with connect({"ZEP_API_KEY_FILE": str(file)}) as http:
        assert http.base_url == ZEP_URL
        assert zep_server.KEY not in repr(http)
    with pytest.raises(UsageError, match="50,000"), connect({"ZEP_API_KEY": "z_1"}) as http:  # pragma: allowlist secret
        ZepTarget(http, tmp_path, batch_items=50_001)


def test_the_migrator_does_what_the_seeds_did(tmp_path: Path) -> None:
    export = tmp_path / "export.json"
    lines = [
        {"id": str(each.id), "memory": each.text, "user_id": each.user_id, "mood": "good"}
        for each in map(record, range(9))
    ]
    export.write_text(json.dumps({"results": [*lines, {"id": "x", "user_id": "u1"}]}), encoding="utf-8")
    with ZepServer() as server, client(server) as http:
        migrator = Mem0ToZepMigrator(http, tmp_path / "state", export)
        there = migrator.migrate_user({"id": "u1", "name": "Jane van Doe", "email": "jane@example.com"}, role="user")
        assert server.users[there]["first_name"] == "Jane"
        assert server.users[there]["last_name"] == "van Doe"
        assert server.users[there]["metadata"] == {"role": "patient"}
        assert server.texts() == ["fact 1", "fact 4", "fact 7"]
        assert migrator.migrate_conversation_history(
            "u1",
            "session",
            [{"role": "user", "content": "I feel anxious"}, {"role": "therapist", "content": "Tell me more"}],
        )
        assert migrator.migrate_conversation_history("u1", "session", [{"role": "user", "content": "I feel anxious"}])
        assert migrator.migrate_memory_snapshot("u1", "insights", {"emotions": ["calm"]})
        assert not migrator.migrate_memory_snapshot("u1", "insights", "[refuse]")
        seen: list[Outcome] = []
        report = migrator.migrate_all(on_outcome=seen.append)
        assert words(seen) == {"same": 3, "inserted": 6}
        assert report["users_migrated"] == 3
        assert report["memories_migrated"] == 3 + 2 + 1 + 6
        assert report["refused"] == 1
        assert report["named"][0]["what"] == "refused"
        assert report["unreadable"] == {"no-text": 2}
        assert migrator.validate()["is_complete"]
        assert migrator.validate(users=["u2"])["memories"] == 3
        assert "mood" in report["left_behind"]
        with pytest.raises(UsageError):
            Mem0ToZepMigrator(http, tmp_path / "state").migrate_all()
        with pytest.raises(UsageError):
            migrator.migrate_user({"name": "nobody"})


def test_the_code_of_the_how_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    lines = [{"id": str(each.id), "memory": each.text, "user_id": each.user_id} for each in map(record, range(12))]
    Path("mem0-export.json").write_text(json.dumps({"results": lines}), encoding="utf-8")
    with ZepServer() as server:
        monkeypatch.setenv("ZEP_API_KEY", zep_server.KEY)
        monkeypatch.setenv("ZEP_API_URL", server.base_url)
        names: dict[str, Any] = {}
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"{HOW_TO.name}, block {number}", "exec"), names)
        assert {each.text for each in map(record, range(12))} <= set(server.texts())
        assert len(server.keys()) == len(set(server.keys()))
        assert os.environ["ZEP_API_KEY"] not in HOW_TO.read_text(encoding="utf-8")


def test_every_error_has_a_class_of_ours(tmp_path: Path) -> None:
    with ZepServer() as server:
        for path, kind in (("/project", "text"), ("/users/lookup", "text"), ("/users", "text")):
            server.faults = [Fault(kind, path)]  # type: ignore[arg-type]
            with pytest.raises(MemharborError):
                write(server, tmp_path / path.strip("/"), [record(1)])
