"""What is kept of a run: its settings, its state, what was refused of it, and which database it loads into."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.errors import StateRefusedError
from memharbor.migrate.opening import EmbeddingSpec, SourceSpec
from memharbor.migrate.record import (
    NAMESPACE,
    RawItem,
    Record,
    Refusal,
    item_as_data,
    item_from_data,
    record_as_data,
    record_from_data,
)
from memharbor.migrate.run_folders import describe_run
from memharbor.migrate.runs import RunSettings, settings_of_retry
from memharbor.migrate.sources.dead_letters import DeadLetterSource
from memharbor.migrate.transform import Choice, transform
from memharbor.migrate.vector import Vector
from memharbor.migrate.workfolder import WorkFolder, refusal_as_data
from memharbor.target import find_target, folder_name, identify_database

VECTOR = Vector.of((1.0, 2.0))
# As a run has it: other users, and another time, than the record's.
CHOICE = Choice(users=frozenset({"1"}), remap_users={"1": "alice"}, to_at=None, dims=2)


def record(**fields: Any) -> Record:
    text = "Likes tea"
    data = {"data": text, "hash": md5(text), "text_lemmatized": "likes tea", "user_id": "alice", **fields}
    return Record("memory", uuid.uuid5(NAMESPACE, "1"), "mem_1", data, VECTOR)


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def read_back(path: Path, *letters: dict[str, Any]) -> list[RawItem | Refusal]:
    path.write_text("".join(json.dumps(each) + "\n" for each in letters))
    return list(DeadLetterSource(path).read())


def letter_of(made: Record) -> dict[str, Any]:
    return {"reason": "rejected", "detail": "…", "record": record_as_data(made)}


# What was refused


def test_a_record_that_was_refused_is_the_same_record_when_it_is_tried_again(tmp_path: Path) -> None:
    # A user's own metadata may have any name.
    made = record(memory="a field of the user's own", metadata={"x": 1}, userId="x")
    (item,) = read_back(tmp_path / "letters.jsonl", letter_of(made))
    assert isinstance(item, RawItem)
    again = transform(item, "file", CHOICE)
    assert again == replace(made, source_id=str(made.id))


def test_a_record_that_is_refused_over_and_over_stays_settled(tmp_path: Path) -> None:
    (item,) = read_back(tmp_path / "first.jsonl", letter_of(record()))
    assert isinstance(item, RawItem)
    letter = refusal_as_data(Refusal("erased-user", "…", item_from_data(item_as_data(item))))
    assert read_back(tmp_path / "second.jsonl", letter) == [item]


def test_an_item_that_was_refused_is_chosen_and_renamed_as_the_run_does(tmp_path: Path) -> None:
    items = [RawItem("memory", f"mem_{user}", {"memory": "x", "user_id": user}, user) for user in ("1", "2")]
    letters = [refusal_as_data(Refusal("bad-time", "…", item)) for item in items]
    first, second = read_back(tmp_path / "letters.jsonl", *letters)
    assert isinstance(first, RawItem)
    assert isinstance(second, RawItem)
    made = transform(first, "file", CHOICE)
    assert isinstance(made, Record)
    assert (made.user_id, made.id) == ("alice", uuid.uuid5(NAMESPACE, "file:mem_1"))
    assert transform(second, "file", CHOICE) is None


def test_a_text_that_was_mended_has_nothing_of_the_old_one(tmp_path: Path) -> None:
    of_record = letter_of(record())
    of_record["record"]["data"]["data"] = "Likes milk"
    data = {"data": "Likes milk", "hash": md5("Likes tea"), "textLemmatized": "likes tea", "user_id": "1"}
    of_item = refusal_as_data(Refusal("no-owner", "…", RawItem("memory", "1", data, "1", VECTOR)))
    for item in read_back(tmp_path / "letters.jsonl", of_record, of_item):
        assert isinstance(item, RawItem)
        made = transform(item, "file", CHOICE)
        assert isinstance(made, Record)
        assert (made.data["hash"], made.data["text_lemmatized"]) == (md5("Likes milk"), "likes milk")
        assert "textLemmatized" not in made.data
        assert made.embedding is None


def test_what_was_not_mended_keeps_all_of_its_source(tmp_path: Path) -> None:
    data = {"memory": "Likes tea", "hash": md5("Likes tea"), "text_lemmatized": "like tea", "user_id": "1"}
    letter = refusal_as_data(Refusal("bad-time", "…", RawItem("memory", "1", data, "1", VECTOR)))
    (item,) = read_back(tmp_path / "letters.jsonl", letter)
    assert isinstance(item, RawItem)
    assert (item.data, item.vector) == (data, VECTOR)


def test_an_embedding_that_the_run_has_made_is_made_again(tmp_path: Path) -> None:
    made = replace(record(), is_made=True)
    assert record_from_data(record_as_data(made)) == made
    (item,) = read_back(tmp_path / "letters.jsonl", letter_of(made))
    assert isinstance(item, RawItem)
    assert (item.data, item.vector) == (made.data, None)


# The settings of a run


SETTINGS = RunSettings(
    SourceSpec("file", ("/x",)),
    users=("1",),
    remap_users={"1": "alice"},
    vectors="generate",
    embedding=EmbeddingSpec("m", 8),
    source_name="shop",
)


def begun(folder: Path, settings: RunSettings = SETTINGS) -> WorkFolder:
    run = WorkFolder(folder)
    run.begin({"source": {"name": settings.source_name or "file"}, "settings": settings.as_data()})
    return run


def test_settings_come_back_as_they_were_kept(tmp_path: Path) -> None:
    assert RunSettings.from_data(begun(tmp_path / "run").read_run()["settings"]) == SETTINGS


def test_a_retry_does_as_its_run_did(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", replace(SETTINGS, source_name=None))
    letters = SourceSpec("dead-letters", (str(run.path / "dead-letters.jsonl"),))
    assert settings_of_retry(run, None) == replace(SETTINGS, source=letters, source_name="file")
    longer = {"1": "alice", "2": "bob"}
    assert settings_of_retry(run, None, longer) == replace(
        SETTINGS, source=letters, source_name="file", remap_users=longer
    )
    run.write_json("cleared.json", {})
    with pytest.raises(StateRefusedError, match="went with a user"):
        settings_of_retry(run, None)


# How far a run is


def test_the_state_of_a_run_is_what_is_true_of_it(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")

    def state() -> Any:
        return describe_run(run)["state"]

    for step in ("read", "transformed", "embedded"):
        run.write_segment(step, 1, [], {"counts": {}})
        assert state() == "to resume"
    run.write_json("loaded/000001.json", {"refused": []})
    assert state() == "to resume", "the source may have more"
    run.write_json("read/complete.json", {})
    assert state() == "to verify"
    run.write_json("verified.json", {"same": False})
    assert state() == "differs"
    run.write_json("verified.json", {"same": True})
    assert state() == "complete"
    run.write_json("rolled-back.json", {})
    assert state() == "rolled back"
    run.write_json("cleared.json", {})
    assert state() == "cleared"


# Which database a run loads into


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("postgresql://me@a/x", "postgresql://me@b/x"),
        ("postgresql://me@a/x", "postgresql://me@a/y"),
        ("postgresql://me@a:1/x", "postgresql://me@a:2/x"),
        ("host=/run/a dbname=x", "host=/run/b dbname=x"),
        ("postgresql://postgres.one@pool:6543/postgres", "postgresql://postgres.two@pool:6543/postgres"),
        ("service=one", "service=two"),
        ("dbname=a-b host=c", "dbname=a host=b-c"),
    ],
)
def test_two_databases_are_told_apart(one: str, other: str) -> None:
    names = [identify_database(each, environ={}) for each in (one, other)]
    assert len(set(names)) == 2
    assert len(set(map(folder_name, names))) == 2


@pytest.mark.parametrize(
    "same",
    [
        "host=db.example port=5432 dbname=memories user=you password=other",  # pragma: allowlist secret
        "postgresql://DB.example:5432/memories?sslmode=require&application_name=x",
        "postgresql:///memories?host=db.example",
        "dbname=memories",
    ],
)
def test_one_database_has_one_name_however_it_is_spelled(same: str) -> None:
    environ = {"PGHOST": "db.example"}
    of_this = "postgresql://me:secret@db.example/memories"  # pragma: allowlist secret
    assert identify_database(same, environ=environ) == identify_database(of_this, environ=environ)


def test_a_password_is_in_no_name() -> None:
    uri = "postgresql://me:hunter2@db.example/memories?sslpassword=hunter2&passfile=hunter2"  # pragma: allowlist secret
    target = find_target("dev", uri, environ={"PGPASSWORD": "hunter2"})  # pragma: allowlist secret
    assert target.identity == "database memories at db.example:5432"
    assert "hunter2" not in target.identity + target.name


@given(st.text(max_size=300))
def test_the_folder_of_any_database_is_a_plain_name(identity: str) -> None:
    name = folder_name(identity)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*-[0-9a-f]{8}", name)
    assert len(name.encode()) < 100
