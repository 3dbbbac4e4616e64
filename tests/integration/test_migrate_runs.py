"""Runs of migrations at the command line, from a source that has embeddings: what decides, what is kept, what is undone."""

from __future__ import annotations

import hashlib
import json
import shlex
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from memharbor.embedder import embed
from memharbor.errors import StateRefusedError
from memharbor.migrate.load import Loader
from memharbor.migrate.opening import EmbeddingSpec
from memharbor.migrate.record import NAMESPACE, Record, pack_vector, unpack_vector
from memharbor.migrate.recorded_model import read_model
from memharbor.migrate.vector import Vector
from memharbor.operations import migrations_folder
from memharbor.settings import Settings
from tests.command_line import memharbor, ok, refused
from tests.embedding_server import StrictEmbeddingServer
from tests.memory_database import Server
from tests.schema_databases import DIMS, scratch_database
from tests.user_rows import populate, state

EMBED = ("--model", "memharbor-hash")
# More words than a tsvector holds, in less than 1 MiB.
ENDLESS = " ".join(f"w{number:06}" for number in range(120_000))
Line = dict[str, Any]


def line(number: int, user: str = "alice", /, **fields: Any) -> Line:
    """A memory with an embedding, which no model has made."""
    return {
        "id": str(uuid.uuid5(NAMESPACE, f"run {number}")),
        "memory": f"fact {number}",
        "user_id": user,
        "created_at": f"2025-01-{number % 28 + 1:02}T00:00:00+00:00",
        "embedding": [number + 1.0, *[0.5] * (DIMS - 1)],
        **fields,
    }


def source(path: Path, lines: list[Line]) -> tuple[str, ...]:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return ("migrate", "run", "--from", "file", "--input", str(path))


def stored(dsn: str) -> dict[str, Any]:
    """User, text and embedding by id."""
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        rows = connection.execute(
            "select id::text, user_id, memory, embedding::text from memharbor.memories"
        ).fetchall()
    return {row[0]: (row[1], row[2], None if row[3] is None else json.loads(row[3])) for row in rows}


def expected(*lines: Line, **changes: Any) -> dict[str, Any]:
    return {each["id"]: (changes.get("user", each["user_id"]), each["memory"], each["embedding"]) for each in lines}


def folder_of(dsn: str, done: Any) -> Path:
    return migrations_folder("dev", dsn) / str(done["run"])


def letters_of(dsn: str, done: Any) -> list[Line]:
    return [json.loads(text) for text in (folder_of(dsn, done) / "dead-letters.jsonl").read_text().splitlines()]


def write_letters(path: Path, letters: list[Line]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in letters))
    return str(path)


def write_names(path: Path, **names: str) -> str:
    path.write_text(json.dumps(names))
    return str(path)


def model_of(dsn: str) -> str | None:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        return read_model(connection)


def at_pauses(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], None]) -> list[float]:
    """Do something at each pause that `--max-rate` makes, which takes no time; returns how long they were to be."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) <= len(actions):
            actions[len(pauses) - 1]()

    monkeypatch.setattr(time, "sleep", pause)
    return pauses


def after_first_segment(dsn: str, action: Callable[[], None]) -> Callable[[], None]:
    """Do something once the first segment is loaded, which is done behind the reading of the next ones."""

    def wait() -> None:
        ends_at = time.monotonic() + 60
        while not list(migrations_folder("dev", dsn).glob("*/loaded/000001.json")):
            assert time.monotonic() < ends_at, "the first segment is not loaded"
            threading.Event().wait(0.01)
        action()

    return wait


def interrupt() -> None:
    raise KeyboardInterrupt


# What decides about a run's result


def test_only_what_was_created_between_the_dates_comes_in(dsn: str, tmp_path: Path) -> None:
    lines = [line(number) for number in range(10)]
    run = source(tmp_path / "in.jsonl", lines)
    done = ok(dsn, *run, "--from-date", "2025-01-03", "--to-date", "2025-01-06T00:00:00Z", "--no-checkpoint")
    assert (done["inserted"], done["not_chosen"]) == (3, 7)
    assert stored(dsn) == expected(*lines[2:5])


def test_only_the_named_users_come_in(dsn: str, tmp_path: Path) -> None:
    lines = [line(number, f"user {number % 3}") for number in range(9)]
    run = source(tmp_path / "in.jsonl", lines)
    done = ok(dsn, *run, "--users", "user 0, user 2", "--no-checkpoint")
    assert (done["inserted"], done["not_chosen"]) == (6, 3)
    assert stored(dsn) == expected(*(each for each in lines if each["user_id"] != "user 1"))
    refused(2, "names nobody", dsn, *run, "--users", ",")


def test_users_come_in_under_their_new_names(dsn: str, tmp_path: Path) -> None:
    lines = [line(0, "1"), line(1, "2"), line(2, "3")]
    names = tmp_path / "names.csv"
    names.write_text("1,alice\n2,bob\n")
    done = ok(dsn, *source(tmp_path / "in.jsonl", lines), "--remap-users", str(names), "--no-checkpoint")
    assert (done["inserted"], done["reasons"]) == (2, {"not-mapped": 1})
    assert stored(dsn) == expected(lines[0], user="alice") | expected(lines[1], user="bob")


def test_embeddings_are_carried_to_the_bit_or_all_made_anew(dsn: str, server: Server, tmp_path: Path) -> None:
    lines = [line(number) for number in range(3)] + [line(3, embedding=None)]
    run = source(tmp_path / "in.jsonl", lines)
    ok(dsn, *run, *EMBED, "--no-checkpoint")
    found = stored(dsn)
    made = {each["id"]: ("alice", each["memory"], pytest.approx(embed(each["memory"], DIMS))) for each in lines}
    assert found == expected(*lines[:3]) | {lines[3]["id"]: made[lines[3]["id"]]}
    with scratch_database(server) as name:
        other = server.admin_dsn(name)
        refused(2, "no model is named", other, *run, "--generate-embeddings")
        refused(2, "no model is named", other, "migrate", "plan", *run[2:], "--generate-embeddings")
        assert not migrations_folder("dev", other).exists()
        ok(other, *run, *EMBED, "--generate-embeddings", "--no-checkpoint")
        assert stored(other) == made


def test_a_rate_is_held_between_segments(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = source(tmp_path / "in.jsonl", [line(number) for number in range(25)])
    pauses = at_pauses(monkeypatch)
    done = ok(dsn, *run, "--batch-size", "10", "--max-rate", "0.001", "--no-checkpoint")
    assert done["inserted"] == 25
    # Of two segments; behind the last one there is nothing to wait for.
    assert [round(pause, -3) for pause in pauses] == [10_000, 10_000]


def test_ids_of_two_tables_that_count_from_one_do_not_meet(dsn: str, tmp_path: Path) -> None:
    first = source(tmp_path / "a.jsonl", [line(number, id=number) for number in (1, 2)])
    second = source(tmp_path / "b.jsonl", [line(number + 10, "bob", id=number) for number in (1, 2)])
    assert ok(dsn, *first, "--no-checkpoint")["inserted"] == 2
    assert ok(dsn, *second, "--no-checkpoint", "--dry-run")["skipped"] == 2, "they meet by the kind of source"
    named = (*second, "--source-name", "second-shop", "--no-checkpoint")
    assert ok(dsn, *named, "--dry-run")["inserted"] == 2
    assert ok(dsn, "migrate", "plan", *second[2:], "--source-name", "second-shop")["sample"]["inserted"] == 2
    done = ok(dsn, *named, "--until", "read")
    assert ok(dsn, "migrate", "resume", done["run"])["inserted"] == 2
    wanted = {str(uuid.uuid5(NAMESPACE, f"{name}:{number}")) for name in ("file", "second-shop") for number in (1, 2)}
    assert set(stored(dsn)) == wanted
    assert ok(dsn, *named)["same"] == 2
    refused(2, "source-name", dsn, *second, "--source-name", "a name: with signs")


def test_a_run_that_cannot_embed_takes_no_checkpoint_and_leaves_no_run(dsn: str, tmp_path: Path) -> None:
    run = source(tmp_path / "in.jsonl", [line(0)])
    model = ("--model", "text-embedding-3-small", "--dims", str(DIMS))
    refused(3, "the key of the embedding endpoint", dsn, *run, *model, OPENAI_API_KEY="", OPENAI_API_KEY_FILE="")
    assert ok(dsn, "checkpoint", "list") == []
    assert ok(dsn, "migrate", "status") == []


# What is kept of a run, and goes on


def test_other_settings_than_a_run_began_with_are_noticed(dsn: str, tmp_path: Path) -> None:
    run = source(tmp_path / "in.jsonl", [line(number) for number in range(3)])
    done = ok(dsn, *run, "--until", "transform", "--no-checkpoint")
    resume = ("migrate", "resume", done["run"])
    dims = {"MEMHARBOR_EMBEDDING_DIMS": str(DIMS + 1)}
    refused(9, f"embedding_dims was {DIMS} and is {DIMS + 1}", dsn, *resume, **dims)
    refused(9, "embedding_distance was cosine and is l2", dsn, *resume, MEMHARBOR_EMBEDDING_DISTANCE="l2")
    path = folder_of(dsn, done) / "run.json"
    whole = path.read_text()
    for edited in (
        whole.replace('"on_conflict": "skip"', '"on_conflict": "overwrite"'),
        whole.replace('"name": "file"', '"name": "other"'),
    ):
        assert edited != whole
        path.write_text(edited)
        refused(9, "was changed since this run began", dsn, *resume)
    assert stored(dsn) == {}
    path.write_text(whole)
    assert ok(dsn, *resume)["inserted"] == 3


def test_a_status_says_whether_a_run_was_compared(dsn: str, tmp_path: Path) -> None:
    lines = [line(number) for number in range(25)]
    run = (*source(tmp_path / "in.jsonl", [*lines, line(99, user_id="")]), "--no-checkpoint", "--batch-size", "10")

    def states() -> list[str]:
        return [each["state"] for each in ok(dsn, "migrate", "status")]

    done = ok(dsn, *run, "--until", "embed")
    assert states() == ["to resume"]
    ok(dsn, "migrate", "resume", done["run"], "--until", "load")
    assert states() == ["to verify"]
    ok(dsn, "migrate", "resume", done["run"])
    assert states() == ["complete"]
    spoil(dsn, lines[0])
    refused(10, "not in the database as they were loaded", dsn, "migrate", "resume", done["run"])
    assert states() == ["differs"]
    spoil(dsn, lines[0], lines[0]["embedding"])
    ok(dsn, "migrate", "resume", done["run"])
    assert states() == ["complete"]


def spoil(dsn: str, changed: Line, embedding: list[float] | None = None) -> None:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        values = (json.dumps(embedding or [2.0] * DIMS), changed["id"])
        assert connection.execute("update memharbor.memories set embedding = %s where id = %s", values).rowcount == 1


@pytest.mark.parametrize("end", ["interrupted", "different"])
def test_dead_letters_are_there_whatever_ended_a_run(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    lines = [line(number) for number in range(25)]
    run = (*source(tmp_path / "in.jsonl", [line(99, user_id=""), *lines]), "--no-checkpoint", "--batch-size", "10")
    action = interrupt if end == "interrupted" else lambda: spoil(dsn, lines[0])
    at_pauses(monkeypatch, after_first_segment(dsn, action))
    done = memharbor(dsn, *run, "--max-rate", "1")
    assert done.exit_code != 0
    (folder,) = migrations_folder("dev", dsn).iterdir()
    (letter,) = letters_of(dsn, {"run": folder.name})
    assert letter["reason"] == "no-owner"
    (listed,) = ok(dsn, "migrate", "status")
    assert (listed["refused"], listed["state"]) == (1, "to resume" if end == "interrupted" else "differs")


def test_databases_do_not_share_their_runs(dsn: str, server: Server, tmp_path: Path) -> None:
    run = source(tmp_path / "in.jsonl", [line(0)])
    first = ok(dsn, *run, "--no-checkpoint", "--until", "read")
    with scratch_database(server) as name:
        other = server.admin_dsn(name)
        refused(3, "there is no run", other, "migrate", "resume")
        second = ok(other, *run, "--no-checkpoint")
        assert [each["name"] for each in ok(other, "migrate", "status")] == [second["run"]]
        assert [each["name"] for each in ok(dsn, "migrate", "status")] == [first["run"]]
        # Also where somebody names the folder.
        refused(9, "loads into database", other, "migrate", "resume", str(folder_of(dsn, first)))
        secret = conninfo_to_dict(dsn)["password"]
        kept = [path.read_bytes() for path in Path("memharbor-migrations").rglob("run.json")]
        assert len(kept) == 2
        assert not [each for each in kept if str(secret).encode() in each]


# What was refused, tried again


def test_what_a_later_step_refused_is_neither_renamed_nor_chosen_again(dsn: str, tmp_path: Path) -> None:
    lines = [line(0, "1"), line(1, "1", memory=ENDLESS, memory_of="x"), line(2, "3"), line(3, "4")]
    run = source(tmp_path / "in.jsonl", lines)
    names = write_names(tmp_path / "names.json", **{"1": "alice"})
    done = ok(dsn, *run, "--remap-users", names, "--users", "1,3", "--no-checkpoint")
    assert (done["inserted"], done["not_chosen"]) == (1, 1)
    assert done["reasons"] == {"text-too-long": 1, "not-mapped": 1}
    by_reason = {each["reason"]: each for each in letters_of(dsn, done)}
    assert by_reason["text-too-long"]["record"]["data"]["user_id"] == "alice"

    longer = write_names(tmp_path / "longer.json", **{"1": "alice", "3": "carol"})
    foretold = ok(dsn, "migrate", "retry", done["run"], "--remap-users", longer, "--dry-run")
    again = ok(dsn, "migrate", "retry", done["run"], "--remap-users", longer, "--no-checkpoint")
    assert (again["inserted"], again["reasons"]) == (1, {"text-too-long": 1})
    assert {name: again[name] for name in foretold if name != "dry_run"}.items() <= foretold.items()
    assert stored(dsn) == expected(lines[0], user="alice") | expected(lines[2], user="carol")

    # A text that was mended has nothing of the old one; an owner that is nobody's in the source is mended as well.
    (letter,) = letters_of(dsn, again)
    letter["record"]["data"]["data"] = "Likes Tea"
    path = write_letters(tmp_path / "mended.jsonl", [letter])
    last = ok(dsn, "migrate", "retry", again["run"], "--input", path, "--no-checkpoint")
    assert (last["inserted"], last["refused"], last["not_chosen"]) == (1, 0, 0)
    assert stored(dsn)[lines[1]["id"]] == ("alice", "Likes Tea", None), "the embedding of another text is none"
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        row = connection.execute(
            "select payload ->> 'hash', payload ->> 'text_lemmatized' from memharbor.memories where id = %s",
            (lines[1]["id"],),
        ).fetchone()
    assert row == (hashlib.md5(b"Likes Tea", usedforsecurity=False).hexdigest(), "likes tea")


def test_what_was_refused_with_an_embedding_of_ours_gets_that_of_its_new_text(dsn: str, tmp_path: Path) -> None:
    run = source(tmp_path / "in.jsonl", [line(0, memory=ENDLESS, embedding=None)])
    done = ok(dsn, *run, *EMBED, "--no-checkpoint")
    assert done["reasons"] == {"text-too-long": 1}
    assert model_of(dsn) is None, "nothing of it was written"
    (letter,) = letters_of(dsn, done)
    letter["record"]["data"]["data"] = "likes tea"
    path = write_letters(tmp_path / "mended.jsonl", [letter])
    assert ok(dsn, "migrate", "retry", done["run"], "--input", path, "--no-checkpoint")["inserted"] == 1
    ((_, _, vector),) = stored(dsn).values()
    assert vector == pytest.approx(embed("likes tea", DIMS))
    assert model_of(dsn) == "memharbor-hash"


def test_a_retry_takes_a_checkpoint_too(dsn: str, tmp_path: Path) -> None:
    done = ok(dsn, *source(tmp_path / "in.jsonl", [line(0), line(1, user_id="")]), "--no-checkpoint")
    assert done["checkpoint"] is None
    (letter,) = letters_of(dsn, done)
    letter["item"]["data"]["user_id"] = "bob"
    path = write_letters(tmp_path / "mended.jsonl", [letter])
    before = stored(dsn)
    again = ok(dsn, "migrate", "retry", done["run"], "--input", path)
    assert len(stored(dsn)) == 2
    assert again["checkpoint"] in {each["name"] for each in ok(dsn, "checkpoint", "list")}
    ok(dsn, "migrate", "rollback", again["run"], "--yes")
    assert stored(dsn) == before


# What is undone


def test_the_printed_command_takes_the_database_back_exactly(dsn: str, tmp_path: Path) -> None:
    def rows() -> Any:
        with closing(psycopg.connect(dsn, autocommit=True)) as connection:
            return state(connection)

    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        populate(connection, DIMS, ("alice", "bob"))
    ok(dsn, *source(tmp_path / "first.jsonl", [line(number) for number in range(20)]), "--no-checkpoint")
    before = rows()
    changed = [line(number, memory=f"another {number}") for number in range(10)] + [line(99)]
    run = source(tmp_path / "second.jsonl", [*changed, line(100, embedding=None)])
    done = memharbor(dsn, *run, *EMBED, "--on-conflict", "overwrite")
    assert done.exit_code == 0, done.output
    assert "2 inserted, 10 updated" in done.output
    assert rows() != before
    (command,) = [text.removeprefix("to undo: ") for text in done.output.splitlines() if text.startswith("to undo: ")]
    program, *arguments = shlex.split(command)
    assert program == "memharbor"
    assert ok(dsn, *arguments, "--dry-run")["dry_run"]
    ok(dsn, *arguments, "--yes")
    assert rows() == before
    assert model_of(dsn) is None
    (_, listed) = ok(dsn, "migrate", "status")
    assert listed["state"] == "rolled back"


# Which model made the embeddings


def test_a_model_is_on_record_from_its_first_embedding_on(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(number, embedding=None) for number in range(25)]
    run = (*source(tmp_path / "in.jsonl", lines), "--batch-size", "10", "--no-checkpoint")
    at_pauses(monkeypatch, after_first_segment(dsn, interrupt))
    assert memharbor(dsn, *run, *EMBED, "--max-rate", "1").exit_code != 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", str(DIMS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert 10 <= len(stored(dsn)) < 25
    assert model_of(dsn) == "memharbor-hash"
    with StrictEmbeddingServer(DIMS) as endpoint:
        refused(9, "cannot be compared", dsn, *run, "--model", "other", "--embedding-url", endpoint.base_url)
        assert endpoint.requests == []
    ok(dsn, "migrate", "resume")
    assert {key: value[2] for key, value in stored(dsn).items()} == {
        each["id"]: pytest.approx(embed(each["memory"], DIMS)) for each in lines
    }


def test_a_model_that_made_nothing_here_is_not_on_record(dsn: str, tmp_path: Path) -> None:
    lines = [line(number) for number in range(3)]
    run = source(tmp_path / "in.jsonl", lines)
    ok(dsn, *run, *EMBED, "--no-checkpoint")
    assert model_of(dsn) is None, "all embeddings are the source's"
    # A new text whose embedding would be ours, of a memory that stays as it is.
    changed = source(tmp_path / "changed.jsonl", [line(0, memory="another", embedding=None)])
    assert ok(dsn, *changed, *EMBED, "--no-checkpoint")["skipped"] == 1
    assert model_of(dsn) is None
    assert stored(dsn) == expected(*lines)


def test_of_two_models_at_once_one_comes_in(dsn: str) -> None:
    vector = unpack_vector(pack_vector([1.0] * DIMS))
    settings = Settings(embedding_dims=DIMS)

    def load(model: str, number: int) -> None:
        with closing(psycopg.connect(dsn, autocommit=True)) as connection:
            spec = EmbeddingSpec(model, DIMS)
            loader = Loader(connection, settings, uuid.uuid4(), "test", "skip", embedding=spec)
            loader.load(1, [record(number, vector)])

    load("one", 1)
    with pytest.raises(StateRefusedError, match="`one` came in meanwhile"):
        load("two", 2)
    load("one", 3)
    assert sorted(text for _, text, _ in stored(dsn).values()) == ["text 1", "text 3"]


def record(number: int, vector: Vector | None) -> Record:
    data = {"data": f"text {number}", "user_id": "alice", "hash": f"{number}", "text_lemmatized": f"text {number}"}
    return Record("memory", uuid.uuid5(NAMESPACE, f"model {number}"), f"{number}", data, vector, is_made=True)
