"""`memharbor migrate embed`: which rows it takes, that it foretells itself, and what others see and do meanwhile."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from memharbor.commands import cli
from memharbor.embedder import embed
from memharbor.migrate import reembed
from memharbor.migrate.opening import Pace
from memharbor.migrate.run_folders import find_run
from memharbor.migrate.runs import opened_run
from memharbor.operations import migrations_folder
from memharbor.output import Output
from memharbor.target import find_target
from tests.command_line import memharbor, ok, refused
from tests.embedding_server import StrictEmbeddingServer
from tests.memory_database import Server
from tests.schema_databases import DIMS, admin_connection, scratch_database

EMBED = ("migrate", "embed", "--model", "memharbor-hash")
OLD = [9.0] * DIMS
NIL = uuid.UUID(int=0)


@dataclass(frozen=True)
class Row:
    """A row as the database has it, or should."""

    table: str
    id: uuid.UUID
    text: str | None
    user: str = "alice"
    agent: str | None = None
    state: str = "active"
    updated: str = "2026-01-10T00:00:00+00:00"
    old: bool = True

    @property
    def updated_at(self) -> datetime:
        return datetime.fromisoformat(self.updated)

    @property
    def payload(self) -> dict[str, Any]:
        data = {"data": self.text, "user_id": self.user, "agent_id": self.agent, "updated_at": self.updated}
        return {key: value for key, value in data.items() if value is not None}


def _rows() -> list[Row]:
    """Every combination of what can be chosen by, and what is at an edge: the nil id, and blank or absent texts."""
    found = [
        Row("memories", uuid.uuid4(), f"text {user} {agent} {state} {month} {old}", user, agent, state, moment, old)
        for user in ("alice", "o'brien %s")
        for agent in (None, "bot")
        for state in ("active", "archived")
        for month, moment in enumerate(("2026-01-10T00:00:00+00:00", "2026-02-10T12:00:00+02:00"))
        for old in (False, True)
    ]
    found += [Row("memories", NIL, "of the nil id", old=False), Row("memories", uuid.uuid4(), " \n\u3000", old=False)]
    found += [Row("memories", uuid.uuid4(), None), Row("memories", uuid.uuid4(), "", old=False)]
    found += [
        Row("entities", uuid.uuid4(), f"entity {old} {agent}", agent=agent, old=old)
        for old in (False, True)
        for agent in (None, "bot")
    ]
    return [*found, Row("entities", NIL, "of the nil id", old=False)]


ROWS = _rows()
CHOSEN = [row.id for row in ROWS[::3]]
BEFORE = datetime(2026, 2, 10, 10, tzinfo=UTC)


def is_missing(row: Row) -> bool:
    return not row.old


def is_memory(row: Row) -> bool:
    return row.table == "memories"


@pytest.fixture
def dsn(dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """One with the rows, and small pages."""
    monkeypatch.setattr(reembed, "_BATCH", 4)
    Path("ids.txt").write_text("\n".join([*map(str, CHOSEN), "", str(CHOSEN[1]).upper(), str(uuid.uuid4())]))
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        for row in ROWS:
            vector = str(OLD) if row.old else None
            values = [row.id, json.dumps(row.payload), vector]
            column, more, place = ("vector", "", "")
            if is_memory(row):
                column, more, place = "embedding", ", state", ", %s"
                values.append(row.state)
            statement = f"insert into memharbor.{row.table} (id, payload, {column}{more}) values (%s, %s, %s{place})"
            connection.execute(statement.encode(), values)
    return dsn


def vectors(dsn: str) -> dict[tuple[str, uuid.UUID], list[float] | None]:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        found = connection.execute(
            "select 'memories', id, embedding::real[] from memharbor.memories"
            " union all select 'entities', id, vector::real[] from memharbor.entities"
        ).fetchall()
    return {(table, row_id): vector for table, row_id, vector in found}


def note_model(dsn: str, model: str) -> None:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        connection.execute(
            "insert into memharbor.configs (key, value) values ('embedding_model', jsonb_build_object('model', %s::text))"
            " on conflict (key) do update set value = excluded.value",
            (model,),
        )


def noted_model(dsn: str) -> str | None:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        row = connection.execute(
            "select value ->> 'model' from memharbor.configs where key = 'embedding_model'"
        ).fetchone()
    return row[0] if row else None


def agreed(dsn: str, *arguments: str, **environ: str) -> Any:
    """Foretell, hold that nothing was done, do it, and hold that it was what was foretold."""
    before = vectors(dsn)
    foretold = ok(dsn, *arguments, "--dry-run", **environ)
    assert vectors(dsn) == before
    assert foretold.pop("tokens") >= foretold["embedded"]
    foretold.pop("usd")
    done = ok(dsn, *arguments, **environ)
    assert {**foretold, "dry_run": False} == done
    return done


CASES: list[tuple[tuple[str, ...], Callable[[Row], bool]]] = [
    ((), is_missing),
    (("--filter", "missing"), is_missing),
    (("--filter", "all"), lambda row: True),
    (("--user", "alice"), lambda row: is_missing(row) and row.user == "alice"),
    (("--filter", "all", "--user", "o'brien %s"), lambda row: row.user == "o'brien %s"),
    (("--filter", "all", "--agent", "bot"), lambda row: row.agent == "bot"),
    (("--agent", "bot", "--user", "alice"), lambda row: is_missing(row) and (row.agent, row.user) == ("bot", "alice")),
    (("--filter", "all", "--updated-since", "2026-02-10T10:00"), lambda row: is_memory(row) and row.updated_at >= BEFORE),
    (("--filter", "all", "--updated-before", "2026-02-10T10:00Z"), lambda row: is_memory(row) and row.updated_at < BEFORE),
    (
        ("--updated-since", "2026-02-01", "--updated-before", "2026-02-11"),
        lambda row: is_memory(row) and is_missing(row) and row.updated_at.month == 2,
    ),
    (("--filter", "all", "--state", "archived"), lambda row: is_memory(row) and row.state == "archived"),
    (("--state", "active", "--state", "archived"), lambda row: is_memory(row) and is_missing(row)),
    (("--filter", "all", "--state", "deleted"), lambda row: False),
    (("--filter", "all", "--user", "nobody"), lambda row: False),
    (("--filter", "all", "--ids", "ids.txt"), lambda row: row.id in CHOSEN),
    (("--ids", "ids.txt"), lambda row: is_missing(row) and row.id in CHOSEN),
    (
        ("--filter", "all", "--ids", "ids.txt", "--agent", "bot", "--state", "active", "--updated-since", "2026-01-10"),
        lambda row: is_memory(row) and row.id in CHOSEN and (row.agent, row.state) == ("bot", "active"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "is_chosen"), CASES, ids=lambda value: " ".join(value) or "-" if isinstance(value, tuple) else ""
)
def test_exactly_the_chosen_rows_are_embedded_and_it_is_foretold(
    dsn: str, options: tuple[str, ...], is_chosen: Callable[[Row], bool]
) -> None:
    chosen = [row for row in ROWS if is_chosen(row)]
    done = agreed(dsn, *EMBED, *options)
    with_text = [row for row in chosen if (row.text or "").strip()]
    assert done["tables"] == {table: sum(row.table == table for row in with_text) for table in ("memories", "entities")}
    assert (done["refused"], done["reasons"].get("no-text", 0)) == (len(chosen) - len(with_text),) * 2
    assert done["unknown_ids"] == ("--ids" in options)
    found = vectors(dsn)
    for row in ROWS:
        new = embed(row.text or "", DIMS) if row in with_text else OLD if row.old else None
        assert found[row.table, row.id] == (new if new is None else pytest.approx(new)), row
    if "all" not in options:
        assert ok(dsn, *EMBED, *options)["embedded"] == 0, "what was missing is there"


def test_ids_come_from_a_pipe_too(dsn: str) -> None:
    row = next(row for row in ROWS if row.old and row.text)
    done = CliRunner().invoke(
        cli, [*EMBED, "--filter", "all", "--ids", "-", "--output", "json"], input=f"{row.id}\n", env={"MEMHARBOR_DSN": dsn}
    )  # fmt: skip
    assert json.loads(done.stdout)["embedded"] == 1
    assert vectors(dsn)[row.table, row.id] == pytest.approx(embed(row.text or "", DIMS))


def test_what_is_asked_for_wrongly_is_refused_and_nothing_is_done(dsn: str, tmp_path: Path) -> None:
    before = vectors(dsn)
    (tmp_path / "bad.txt").write_text(f"{NIL}\nmem_7\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    refused(2, "`--user` is empty", dsn, *EMBED, "--filter", "all", "--user", "")
    refused(2, "`--agent` is empty", dsn, *EMBED, "--agent", " ")
    refused(2, "is no moment: soon", dsn, *EMBED, "--updated-since", "soon")
    refused(2, "nothing was changed", dsn, *EMBED, "--updated-since", "2026-02-01", "--updated-before", "2026-01-01")
    refused(2, "line 2 of `--ids` is no id: 'mem_7'", dsn, *EMBED, "--ids", "bad.txt")
    refused(2, "line 2 of `--ids` is no id", dsn, *EMBED, "--ids", "bad.txt", "--dry-run")
    refused(2, "line 1 of `--ids` is no id", dsn, *EMBED, "--ids", "binary.txt")
    refused(2, "names no id", dsn, *EMBED, "--ids", "empty.txt")
    refused(2, "No such file", dsn, *EMBED, "--ids", "absent.txt")
    refused(2, "stale", dsn, *EMBED, "--filter", "stale")
    refused(2, "gone", dsn, *EMBED, "--state", "gone")
    refused(2, "--embedding-rate", dsn, *EMBED, "--embedding-rate", "-1")
    refused(2, "--embedding-concurrency", dsn, *EMBED, "--embedding-concurrency", "0")
    refused(2, "no model is named", dsn, "migrate", "embed")
    refused(3, "do not fit the schema", dsn, *EMBED, "--filter", "all", "--dims", str(DIMS + 1))
    assert vectors(dsn) == before
    assert noted_model(dsn) is None


def test_the_model_is_on_record_after_the_first_rows_and_another_one_is_not_mixed_in(dsn: str) -> None:
    assert ok(dsn, *EMBED, "--user", "nobody")["embedded"] == 0
    assert noted_model(dsn) is None
    ok(dsn, *EMBED, "--agent", "bot")
    assert noted_model(dsn) == "memharbor-hash"
    note_model(dsn, "other")
    for part in ((), ("--filter", "all", "--agent", "bot"), ("--filter", "all", "--ids", "ids.txt")):
        refused(9, "cannot be compared", dsn, *EMBED, *part)
        refused(9, "cannot be compared", dsn, *EMBED, *part, "--dry-run")
    assert noted_model(dsn) == "other"


def test_no_embedding_of_another_model_is_left_when_it_changes(dsn: str) -> None:
    """What the new model cannot embed would be searched by numbers of the old one, which mean nothing any more."""
    kept = [row for row in ROWS if row.old and not (row.text or "").strip()]
    assert agreed(dsn, *EMBED, "--filter", "all")["cleared"] == 0
    assert all(vectors(dsn)[row.table, row.id] == OLD for row in kept), "the model is the same: it stays"
    note_model(dsn, "other")
    assert agreed(dsn, *EMBED, "--filter", "all")["cleared"] == len(kept) == 1
    assert all(vectors(dsn)[row.table, row.id] is None for row in kept)
    assert noted_model(dsn) == "memharbor-hash"


def test_nobody_sees_half_of_it_and_what_is_written_meanwhile_is_embedded_as_it_is_then(dsn: str) -> None:
    changed = next(row for row in ROWS if not row.old and row.text and is_memory(row) and row.state == "active")
    before = vectors(dsn)
    seen: list[bool] = []
    write = "update public.memories set memory = %s where id = %s"

    def look_and_write(answer: dict[str, Any]) -> dict[str, Any]:
        seen.append(vectors(dsn) == before)
        with closing(psycopg.connect(dsn, autocommit=True)) as connection:
            if changed.text in endpoint.requests[-1]["input"]:
                connection.execute(write, ("likes tea", changed.id))
            if endpoint.requests[-1]["input"] == ["likes tea"]:
                # It is about to be put in place: a text that came now would stay without its embedding.
                connection.execute("set lock_timeout = '50ms'")
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    connection.execute(write, ("likes coffee", changed.id))
                held.append(changed.id)
        return answer

    held: list[uuid.UUID] = []
    with StrictEmbeddingServer(DIMS) as endpoint:
        endpoint.change = look_and_write
        model = ("--model", "nomic", "--embedding-url", endpoint.base_url, "--embedding-concurrency", "1")
        done = ok(dsn, "migrate", "embed", *model, "--filter", "all")
    assert len(seen) > 5
    assert all(seen)
    assert held == [changed.id]
    assert done["embedded"] == sum(bool((row.text or "").strip()) for row in ROWS)
    found = vectors(dsn)
    assert found["memories", changed.id] == pytest.approx(embed("likes tea", DIMS))
    assert OLD not in [found[row.table, row.id] for row in ROWS if row.text]


# How hard an endpoint is asked


def memories_file(path: Path, count: int) -> str:
    path.write_text(
        json.dumps([{"id": str(uuid.uuid4()), "memory": f"m {n}", "user_id": "alice"} for n in range(count)])
    )
    return str(path)


def test_a_run_asks_as_hard_as_it_may_and_goes_on_at_another_pace(dsn: str, tmp_path: Path) -> None:
    """With a rate requests are filled; without one the texts are spread over those that may be under way."""
    with StrictEmbeddingServer(DIMS) as endpoint:
        model = ("--model", "nomic", "--embedding-url", endpoint.base_url)
        source = ("--from", "file", "--input", memories_file(tmp_path / "one.json", 200))
        run = ("migrate", "run", *source, *model, "--no-checkpoint", "--batch-size", "100")
        plan = ok(dsn, "migrate", "plan", *source, *model, "--embedding-rate", "1", "--embedding-concurrency", "2")
        assert plan["embedding"]["texts"] == 200
        done = ok(dsn, *run, "--embedding-concurrency", "1", "--until", "transform")
        assert endpoint.requests == []
        folder = find_run(migrations_folder("dev", dsn), done["run"])
        assert folder.read_run()["settings"]["embedding"]["concurrency"] == 1
        with opened_run(folder, find_target("dev", dsn), Output(), pace=Pace(concurrency=4)) as opened:
            assert opened.carry_out("verify").counts["inserted"] == 200
        assert sorted(len(each["input"]) for each in endpoint.requests) == [4, 4, *[32] * 6]
        endpoint.requests.clear()
        other = ("--from", "file", "--input", memories_file(tmp_path / "two.json", 200), "--keep-duplicates")
        run = ("migrate", "run", *other, "--model", "other", *model[2:], "--batch-size", "100", "--until", "embed")
        refused(9, "cannot be compared", dsn, *run)
        ok(dsn, *run[:-2], "--model", "nomic", "--embedding-rate", "1000", XDG_CACHE_HOME=str(tmp_path / "new"))
        assert [len(each["input"]) for each in endpoint.requests] == [100, 100]


def test_embed_asks_as_hard_as_it_may(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reembed, "_BATCH", 100)
    with StrictEmbeddingServer(DIMS) as endpoint:
        endpoint.gate = threading.Barrier(2)
        model = ("--model", "nomic", "--embedding-url", endpoint.base_url)
        path = memories_file(Path("in.json"), 64)
        ok(dsn, "migrate", "run", "--from", "file", "--input", path, "--no-checkpoint")
        ids = Path("new.txt")
        ids.write_text("\n".join(each["id"] for each in json.loads(Path(path).read_text())))
        assert ok(dsn, "migrate", "embed", *model, "--ids", str(ids), "--embedding-concurrency", "2")["embedded"] == 64
        assert (endpoint.at_once, len(endpoint.requests)) == (2, 2)


# What a source wants to be read


def test_what_a_source_noticed_is_said_once_by_every_command_that_asks_it(
    dsn: str, server: Server, tmp_path: Path
) -> None:
    with scratch_database(server, rolled_out=False) as name:
        with closing(admin_connection(server, name)) as connection:
            connection.execute("create extension vector")
            connection.execute("create table mymem (id uuid primary key, vector vector(8), payload jsonb)")
            connection.execute(
                "insert into mymem values (%s, %s, %s)",
                (uuid.uuid4(), str(OLD), '{"data": "likes tea", "user_id": "alice"}'),
            )
        source = ("--from", "mem0-pgvector", "--collection", "MyMem")
        environ = {"MEMHARBOR_SOURCE_DSN": server.admin_dsn(name)}
        for command in (
            ("plan", *source),
            ("run", *source, "--dry-run"),
            ("run", *source, "--no-checkpoint"),
            ("read", *source, "--output-file", str(tmp_path / "out.jsonl")),
        ):
            done = memharbor(dsn, "migrate", *command, "--output", "json", **environ)
            assert done.exit_code == 0, done.stderr
            assert len(re.findall("note: collection `MyMem` is in table `mymem`", done.stderr)) == 1, command
            json.loads(done.stdout)
