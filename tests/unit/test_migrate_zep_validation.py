"""What a validation of Zep Cloud finds: each field that was altered there, and what is missing or doubled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memharbor.migrate.record import Record
from memharbor.migrate.targets.zep_state import ZepState
from memharbor.migrate.targets.zep_validation import report_text
from tests.zep_records import checked, record, turn, words, write
from tests.zep_server import Fault, ZepServer


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_validation_finds_every_difference(tmp_path: Path) -> None:
    records = [record(number) for number in range(12)]
    with ZepServer(page_size_max=3) as server:
        write(server, tmp_path, records)
        for episode in server.episodes:
            episode["processed"] = True
        good = checked(server, tmp_path, records)
        assert good == {
            "users": 3,
            "refused": 0,
            "memories": 12,
            "pieces": 12,
            "there": 12,
            "missing": 0,
            "doubled": 0,
            "other_contents": 0,
            "other_metadata": 0,
            "other_times": 0,
            "other_labels": 0,
            "pending": 0,
            "is_complete": True,
            "named": [],
            "differing": [],
        }
        by_text = {episode["content"]: episode for episode in server.episodes}
        server.episodes.remove(by_text["fact 0"])
        server.episodes.append({**by_text["fact 1"], "uuid": "twice"})
        by_text["fact 2"]["reference_time"] = "2020-01-01T00:00:00Z"
        by_text["fact 4"]["metadata"]["memharbor_hash"] = "0"
        by_text["fact 5"]["processed"] = False
        server.episodes.append({**by_text["fact 6"], "metadata": {"own": 1}, "uuid": "foreign"})
        bad = checked(server, tmp_path, [*records, record(99, user_id="nobody"), record(98, user_id="")])
        assert not bad["is_complete"]
        found = {
            name: bad[name] for name in ("missing", "doubled", "other_times", "other_contents", "pending", "refused")
        }
        assert found == {"missing": 2, "doubled": 1, "other_times": 1, "other_contents": 1, "pending": 1, "refused": 1}
        assert [each["user_id"] for each in bad["named"]] == ["nobody", "u0", "u1", "u2"]
        text = report_text(bad)
        assert "`nobody`: 0 of 1; missing 1" in text
        assert "not all are in Zep" in text


def altered(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, list):
        return [*value, "more"]
    return f"{value} altered" if isinstance(value, str) else value + 1


def rich_records() -> list[Record]:
    """An episode in two parts and a message, each with everything that a piece can have."""
    more = {"memory_type": "insights", "agent_id": "bot", "categories": ["food"], "app_id": True, "expiration_date": 7}
    long = record(1, "A sentence. " * 1000, user_id="alice", run_id="talk", **more)
    return [long, turn(2, **{**more, "memory_type": "preferences"})]


FIELDS = [
    *[("episode", f"metadata.{name}") for name in ("memharbor_hash", "memharbor_parts", "memory_type", "run_id")],
    *[("episode", f"metadata.{name}") for name in ("agent_id", "categories", "app_id", "expiration_date")],
    *[("episode", name) for name in ("content", "reference_time", "source_description")],
    *[
        ("message", f"metadata.{name}")
        for name in ("memharbor_hash", "preferences", "run_id", "agent_id", "categories")
    ],
    *[("message", name) for name in ("content", "reference_time", "role", "name")],
]


@pytest.mark.parametrize("how", ["altered", "gone"])
@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda value: str(value))
def test_a_validation_names_each_field_that_was_altered(tmp_path: Path, kind: str, field: str, how: str) -> None:
    records = rich_records()
    with ZepServer() as server:
        assert words(write(server, tmp_path, records, threads=True)) == {"inserted": 2}
        assert checked(server, tmp_path, records, threads=True)["is_complete"]
        item = next(each for each in server.episodes if ("thread_uuid" in each) == (kind == "message"))
        place, name = (item["metadata"], field.removeprefix("metadata.")) if "." in field else (item, field)
        if how == "gone":
            del place[name]
        else:
            place[name] = "2020-01-01T00:00:00Z" if name == "reference_time" else altered(place[name])
        found = checked(server, tmp_path, records, threads=True)
        if how == "gone" and field in ("role", "name", "source_description"):
            assert found["is_complete"]  # a list need not show them
            return
        assert not found["is_complete"]
        (one,) = found["differing"]
        assert (one["id"], one["fields"]) == (item["metadata"]["memharbor_id"], [field])
        assert f"{one['id']}, part {one['part']}: {field}" in report_text(found)
        group = {"content": "contents", "reference_time": "times", "metadata.memharbor_hash": "contents"}.get(
            field, "metadata" if field.startswith("metadata") else "labels"
        )
        assert {name: found[name] for name in found if str(name).startswith("other_") and found[name]} == {
            f"other_{group}": 1
        }


@pytest.mark.parametrize("field", ["memharbor_id", "memharbor_part"])
def test_what_is_not_known_again_is_missing(tmp_path: Path, field: str) -> None:
    records = rich_records()
    with ZepServer() as server:
        write(server, tmp_path, records, threads=True)
        server.episodes[0]["metadata"][field] = altered(server.episodes[0]["metadata"][field])
        found = checked(server, tmp_path, records, threads=True)
        assert (found["missing"], found["is_complete"]) == (1, False)


def test_a_validation_asks_the_service_alone_and_writes_nothing(tmp_path: Path) -> None:
    records = [*rich_records(), *(turn(n) for n in range(20, 60, 2)), record(70)]
    with ZepServer(page_size_max=7) as server:
        write(server, tmp_path / "state", records, threads=True)
        server.episodes[-1]["metadata"]["added"] = "by the service"
        server.requests.clear()
        elsewhere = checked(server, tmp_path / "none", records, threads=True)
        assert elsewhere["is_complete"]
        assert (elsewhere["there"], elsewhere["doubled"]) == (len(server.episodes), 0)
        assert not (tmp_path / "none").exists()
        asked = {(request.method, request.path.split("/")[-1]) for request in server.requests}
        assert asked <= {("POST", "lookup"), ("POST", "list"), ("GET", "messages"), ("GET", "threads")}
        with ZepState(tmp_path / "state"):  # also while a migration holds it
            assert checked(server, tmp_path / "state", records, threads=True)["is_complete"]


def test_messages_that_no_list_of_episodes_shows_are_found_in_their_threads(tmp_path: Path) -> None:
    class Apart(ZepServer):
        def _list_episodes(self, owner: str, request: Any) -> Any:
            page = super()._list_episodes(owner, request)
            return {**page, "items": [each for each in page["items"] if "thread_uuid" not in each]}

    records = rich_records()
    with Apart() as server:
        write(server, tmp_path, records, threads=True)
        found = checked(server, tmp_path, records, threads=True)
        assert (found["there"], found["pending"], found["is_complete"]) == (3, 3, True)
        server.episodes[-1]["content"] = "something else"
        assert checked(server, tmp_path, records, threads=True)["other_contents"] == 1


def test_a_thread_that_is_gone_has_no_messages(tmp_path: Path) -> None:
    records = rich_records()
    with ZepServer() as server:
        write(server, tmp_path, records, threads=True)
        server.faults = [Fault("status", "/threads/*/messages", status=404)]
        found = checked(server, tmp_path, records, threads=True)
        assert (found["missing"], found["there"]) == (1, 2)
