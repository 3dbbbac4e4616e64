"""`memharbor migrate plan` on a real database: its numbers are those of the dry run, and nothing remains of it."""

from __future__ import annotations

import gzip
import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from memharbor.migrate.record import pack_vector
from tests.command_line import memharbor, ok, refused
from tests.embedding_server import StrictEmbeddingServer
from tests.platform_server import KEY, PlatformServer, memory_of
from tests.schema_databases import DIMS

STEPS = ("read", "transform", "embed", "load", "verify")
WORDS = ("read", "inserted", "updated", "same", "skipped", "not_chosen", "refused", "reasons")


@pytest.fixture
def dsn(dsn: str, tmp_path: Path) -> Iterator[str]:
    """One that is as empty in the end."""
    yield dsn
    with closing(psycopg.connect(dsn)) as connection:
        for table in ("memories", "entities", "memory_history", "migration_ledger", "configs"):
            row = connection.execute(f"select count(*) from memharbor.{table}").fetchone()
            assert row == (0,), f"a plan left something in {table}"
    assert not (tmp_path / "cache").exists(), "a plan left embeddings"
    assert not (tmp_path / "memharbor-migrations").exists(), "a plan left a run"


def memory(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"mem_{number}",
        "memory": f"fact {number}",
        "user_id": "alice",
        "created_at": "2025-01-15T10:00:00Z",
        **fields,
    }


def vector(number: int, dims: int = DIMS) -> str | None:
    draw = random.Random(number)
    return pack_vector([draw.uniform(-1, 1) for _ in range(dims)])


BAD: list[dict[str, Any]] = [
    {"user_id": ""},
    {"memory": ""},
    {"created_at": "1066-10-14T09:00:00Z"},
    {"embedding": vector(1, DIMS + 1)},
]


def mixed(count: int) -> list[dict[str, Any]]:
    """Every tenth is bad, for four reasons in turn."""
    return [
        memory(number, **(BAD[number // 10 % len(BAD)] if number % 10 == 9 else {"embedding": vector(number)}))
        for number in range(count)
    ]


def lines(path: Path, memories: list[dict[str, Any]]) -> tuple[str, ...]:
    text = "".join(json.dumps(each) + "\n" for each in memories).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return ("--from", "file", "--input", str(path))


def check_timeline(plan: dict[str, Any]) -> None:
    """Times are those of this machine; that they are there for every step, add up, and are of all items, is not."""
    for row in plan["timeline"]:
        parts = [row[f"{step}_seconds"] for step in STEPS]
        assert row["total_seconds"] == pytest.approx(sum(part or 0 for part in parts), abs=0.001)
    first = plan["timeline"][0]
    assert first["items"] == plan["items"]
    assert plan["minutes"] == pytest.approx(first["total_seconds"] / 60, abs=0.051)
    if plan["items"]:
        assert all(first[f"{step}_seconds"] != 0 for step in STEPS)
        assert plan["timeline"][-1]["total_seconds"] > first["total_seconds"]


@pytest.mark.parametrize("name", ["export.jsonl", "export.jsonl.gz"])
def test_the_numbers_are_those_of_the_dry_run(dsn: str, tmp_path: Path, name: str) -> None:
    source = lines(tmp_path / name, mixed(400))
    plan = ok(dsn, "migrate", "plan", *source, "--sample", "80")
    foretold = ok(dsn, "migrate", "run", *source, "--dry-run")
    assert (plan["items"], plan["items_are_counted"]) == (foretold["read"], True) == (400, True)
    assert plan["expected_reasons"] == foretold["reasons"]
    assert plan["expected_refusals"] == foretold["refused"] == 40
    assert sorted(foretold["reasons"].values()) == [10, 10, 10, 10]
    assert plan["sample"]["refused"] == 8
    assert (plan["dims"], plan["without_embedding"], plan["embedding"]) == (DIMS, 0, None)
    check_timeline(plan)


@pytest.mark.parametrize("size", [33, 34, 1000])
def test_a_source_that_is_no_larger_than_the_sample_is_exact(dsn: str, tmp_path: Path, size: int) -> None:
    source = lines(tmp_path / "export.jsonl", [*mixed(23), *(memory(number) for number in range(23, 33))])
    plan = ok(dsn, "migrate", "plan", *source, "--sample", str(size), "--model", "memharbor-hash")
    foretold = ok(dsn, "migrate", "run", *source, "--dry-run", "--model", "memharbor-hash")
    assert {word: plan["sample"][word] for word in WORDS} == {word: foretold[word] for word in WORDS}
    assert (plan["items"], plan["expected_reasons"]) == (33, foretold["reasons"])
    assert plan["embedding"]["texts"] == 10
    check_timeline(plan)


def test_a_rate_is_reckoned_and_not_waited_for(dsn: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "export.jsonl", [memory(number, embedding=vector(number)) for number in range(400)])
    plan = ok(dsn, "migrate", "plan", *source, "--sample", "80", "--batch-size", "10", "--max-rate", "0.1")
    row = plan["timeline"][0]
    assert sum(row[f"{step}_seconds"] for step in ("transform", "embed", "load")) == pytest.approx(4_000, abs=0.01)


def test_an_empty_source_takes_nothing(dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    for empty in ("[]", "{}", '{"results": []}'):
        path.write_text(empty)
        plan = ok(dsn, "migrate", "plan", "--from", "file", "--input", str(path), "--model", "memharbor-hash")
        assert (plan["items"], plan["expected_refusals"], plan["embedding"]["texts"]) == (0, 0, 0)
        check_timeline(plan)


def test_only_a_model_of_this_machine_is_asked(dsn: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "export.jsonl", [memory(number) for number in range(300)])
    plan = ("migrate", "plan", *source, "--sample", "100")
    local = ok(dsn, *plan, "--model", "memharbor-hash")
    assert (local["embedding"]["texts"], local["embedding"]["timed_by"]) == (300, "measured")
    paid = ok(dsn, *plan, "--model", "text-embedding-3-small", "--dims", str(DIMS))
    assert (paid["embedding"]["texts"], paid["embedding"]["timed_by"]) == (300, "limits")
    assert paid["embedding"]["usd"] > 0
    with StrictEmbeddingServer(DIMS) as server:
        other = ok(dsn, *plan, "--model", "nomic-embed", "--embedding-url", server.base_url)
        assert not server.requests
    assert other["embedding"]["timed_by"] == "unknown"
    assert other["timeline"][0]["embed_seconds"] is None
    for each in (local, paid, other):
        check_timeline(each)
    anew = ok(dsn, *plan, "--model", "memharbor-hash", "--generate-embeddings")
    assert anew["embedding"]["texts"] == 300


def test_a_source_that_counts_is_believed(dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "vector_store.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table vectors (id text primary key, vector blob not null, payload text not null)")
        connection.executemany(
            "insert into vectors values (?, ?, ?)",
            (
                (f"m{n}", b"\0\0\x80\x3f" * DIMS, json.dumps({"data": f"fact {n}", "userId": "alice"}))
                for n in range(200)
            ),
        )
    plan = ok(dsn, "migrate", "plan", "--from", "sqlite", "--input", str(path), "--sample", "20")
    assert (plan["items"], plan["counts"], plan["sample"]["inserted"]) == (200, {"memory": 200}, 20)


@pytest.mark.parametrize(("versions", "items", "is_counted"), [(["v3"], 250, True), (["v1"], 20, False)])
def test_a_platform_is_not_read_to_its_end(dsn: str, versions: list[str], items: int, is_counted: bool) -> None:
    memories = [memory_of(f"fact {number}", number, user_id="alice") for number in range(250)]
    with PlatformServer(memories, versions=versions) as platform:
        arguments = ("--from", "platform", "--url", platform.base_url, "--sample", "20")
        plan = ok(dsn, "migrate", "plan", *arguments, MEM0_API_KEY=KEY)
    assert (plan["items"], plan["items_are_counted"]) == (items, is_counted)


def test_a_person_gets_a_table(dsn: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "export.jsonl", mixed(400))
    done = memharbor(dsn, "migrate", "plan", *source, "--sample", "80", "--model", "memharbor-hash")
    assert done.exit_code == 0, done.stderr
    text, table = done.stdout.split("\n\n")
    assert "source file: 400 items" in text
    assert "refused as no-owner: 2, of all about 10" in text
    assert [line.split()[0] for line in table.splitlines()[:6]] == [
        *("items", "400", "1,000", "10,000", "100,000", "1,000,000")
    ]
    assert [line.partition(" …")[0] for line in done.stderr.splitlines() if "…" in line] == [
        "Try the first 80 items",
        "Count the items",
    ]


def test_a_damaged_end_is_found_before_anything_is_done(dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    path.write_text(json.dumps([memory(number) for number in range(100)])[:-20])
    refused(
        7, "ends inside the value", dsn, "migrate", "plan", "--from", "file", "--input", str(path), "--sample", "10"
    )
