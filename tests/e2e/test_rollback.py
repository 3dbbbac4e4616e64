"""The drill of the seeds: a checkpoint, a migration that breaks midway, the way back, identical hashes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from memharbor.backup.erasure import user_digest
from tests.e2e.conftest import Stack

pytestmark = pytest.mark.timeout(1800)

ALICE, BOB, GONE = "rollback-alice", "rollback-bob", "rollback-gone"

Fingerprints = dict[tuple[str, str], tuple[int, str]]


def connect(stack: Stack) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True)


def fingerprints(stack: Stack) -> Fingerprints:
    with connect(stack) as connection:
        rows = connection.execute("select * from memharbor.fingerprint_users()").fetchall()
    return {(row[0], row[1]): (row[2], row[3]) for row in rows}


def without(user: str, found: Fingerprints) -> Fingerprints:
    return {key: each for key, each in found.items() if key[0] != user_digest(user)}


def of(user: str, found: Fingerprints) -> Fingerprints:
    return {key: each for key, each in found.items() if key[0] == user_digest(user)}


def insert(connection: psycopg.Connection[Any], user: str, count: int = 200) -> None:
    connection.execute(
        """
        insert into memharbor.memories (embedding, payload)
        select (select array_agg((random() - 0.5)::real) from generate_series(1, 384) d where n > 0)::vector,
          jsonb_build_object('user_id', %s::text, 'data', 'fact ' || n, 'text_lemmatized', 'fact ' || n)
        from generate_series(1, %s) n
        """,
        (user, count),
    )


@pytest.fixture(scope="module", autouse=True)
def memories(stack: Stack) -> Iterator[None]:
    """Three users, and a backup that leads to everything after it."""
    # This story is told of these users and its own checkpoints alone, whatever other files have left.
    for left in stack.json("checkpoint", "list"):
        stack.memharbor("checkpoint", "delete", left["name"], "--yes")
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories")
        connection.execute("delete from memharbor.memory_history")
        for user in (ALICE, BOB, GONE):
            insert(connection, user)
    stack.memharbor("backup", "create")
    yield
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories where user_id ~ '^rollback-'")
        connection.execute("delete from memharbor.memory_history where user_id ~ '^rollback-'")


def break_midway(stack: Stack) -> None:
    """A migration that embeds anew and dies after half of the rows."""
    with connect(stack) as connection:
        connection.execute(
            "update memharbor.memories set embedding = (select array_agg(v * 2) from unnest(embedding::real[]) v)::vector,"
            " payload = payload || '{\"model\": \"new\"}' where memory ~ '[02468]$'"
        )
        connection.execute("delete from memharbor.memories where memory ~ '7$'")
        insert(connection, "rollback-new", 10)


def test_01_a_migration_that_broke_midway_is_rolled_back_to_identical_hashes(stack: Stack) -> None:
    before = fingerprints(stack)
    stack.memharbor("checkpoint", "create", "checkpoint-2025-10-27")
    break_midway(stack)
    diff = {row["table"]: row for row in stack.json("checkpoint", "diff", "last")["tables"]}
    assert diff["memories"]["added"] == 10
    assert diff["memories"]["removed"] == 60
    broken = fingerprints(stack)
    plan = stack.json("rollback", "--to", "checkpoint-2025-10-27", "--dry-run")
    assert (plan["way"], fingerprints(stack)) == ("copies", broken)
    report = stack.json("rollback", "--to", "checkpoint-2025-10-27", "--yes")
    assert report["way"] == "copies"
    assert "restore takes about" in report["why"]
    assert report["undo_point"].startswith("memharbor-before-rollback-")
    assert fingerprints(stack) == before


def test_02_an_unknown_checkpoint_is_refused_and_the_known_one_is_listed(stack: Stack) -> None:
    done = stack.memharbor("rollback", "--to", "never", "--yes", check=False)
    assert done.returncode == 9
    assert "no checkpoint `never`" in done.stderr
    (row,) = stack.json("checkpoint", "list")
    assert (row["name"], row["ways"]) == ("checkpoint-2025-10-27", ["copies", "restore"])


def test_03_one_users_rows_come_out_of_a_restored_copy(stack: Stack) -> None:
    before = fingerprints(stack)
    stack.memharbor("checkpoint", "create", "alice", "--user", ALICE, "--no-copy")
    break_midway(stack)
    broken = fingerprints(stack)
    report = stack.json("rollback", "--to", "last", "--yes")
    assert report["way"] == "restored-copy"
    assert of(ALICE, fingerprints(stack)) == of(ALICE, before)
    assert without(ALICE, fingerprints(stack)) == without(ALICE, broken)
    stack.memharbor("checkpoint", "delete", "alice", "--yes")
    # Leaves everybody as they were.
    stack.memharbor("rollback", "--to", "last", "--yes")
    assert fingerprints(stack) == before


def test_04_a_schema_that_was_dropped_comes_back_and_an_erased_user_does_not(stack: Stack) -> None:
    before = fingerprints(stack)
    assert of(GONE, before)
    stack.memharbor("checkpoint", "create", "before-the-drop")
    stack.memharbor("user", "erase", GONE, "--reason", "request 1", "--yes")
    with connect(stack) as connection:
        connection.execute("drop schema memharbor cascade")
    report = stack.json("rollback", "--to", "last", "--yes")
    assert report["way"] == "restore"
    assert "definitions are not as they were" in report["refused"]["copies"]
    after = fingerprints(stack)
    assert of(GONE, after) == {}
    assert without(GONE, after) == without(GONE, before)
    # Applications work again, through the pool.
    with psycopg.connect(stack.dsn("service")) as connection:
        assert connection.execute("select count(*) from memories where user_id = %s", (ALICE,)).fetchone() == (200,)


def test_05_a_checkpoint_of_before_a_restore_still_leads_back(stack: Stack) -> None:
    ways = {row["name"]: row["ways"] for row in stack.json("checkpoint", "list")}
    # The restore went to its point, which is before its rows were copied.
    assert ways == {"checkpoint-2025-10-27": ["copies", "restore"], "before-the-drop": ["restore"]}
    for name in ways:
        stack.memharbor("checkpoint", "delete", name, "--yes")
    assert stack.json("checkpoint", "list") == []
