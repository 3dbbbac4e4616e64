"""
One user from any moment of the archive: out of a throw-away container and into the live stack, beside what others wrote.

One story in order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import docker
import psycopg
import pytest

from memharbor.backup.erasure import user_digest
from memharbor.backup.rows import differences
from tests.e2e.conftest import ROOT, Stack
from tests.user_rows import HOSTILE_USERS, add_user, memory_id, populate, state, wipe

pytestmark = pytest.mark.timeout(1800)

DIMS = 384
USERS = ("alice", "bob", HOSTILE_USERS[0], "erased-user")
moments: dict[str, Any] = {}


def connect(stack: Stack) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True)


def now(stack: Stack) -> str:
    with connect(stack) as connection:
        row = connection.execute(
            "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
        ).fetchone()
    assert row is not None
    return str(row[0])


def containers(stack: Stack) -> set[str]:
    client = docker.from_env()
    try:
        return {each.name for each in client.containers.list(all=True) if stack.name in each.name}
    finally:
        client.close()


@pytest.fixture(scope="module", autouse=True)
def users(stack: Stack) -> Iterator[None]:
    with connect(stack) as connection:
        for user in USERS:
            wipe(connection, user)
    stack.memharbor("backup", "create", "--type", "full")
    yield
    with connect(stack) as connection:
        for user in (*USERS, "alice-then", "late"):
            wipe(connection, user)
        connection.execute("delete from memharbor.categories")
        connection.execute("delete from memharbor.configs")


def of(user: str, everybody: Any) -> Any:
    return {key: value for key, value in everybody.items() if key[0] == user_digest(user)}


def test_01_a_user_comes_back_as_they_were_and_nobody_else_changes(stack: Stack) -> None:
    with connect(stack) as connection:
        populate(connection, DIMS, USERS, count=30)
        then = state(connection)
    moments["then"], moments["state"] = now(stack), then
    with connect(stack) as connection:
        # What went wrong, and what went on.
        wipe(connection, "alice")
        add_user(connection, DIMS, "late", 10)
        connection.execute("update memharbor.memories set state = 'archived' where id = %s", (memory_id("bob", 8),))
        live = state(connection)
    there = containers(stack)
    foretold = stack.json("user", "restore", "alice", "--at", moments["then"], "--dry-run")
    with connect(stack) as connection:
        assert state(connection) == live
    done = stack.json("user", "restore", "alice", "--at", moments["then"], "--yes")
    counts = ("inserted", "overwritten", "skipped", "same", "orphaned", "tables")
    assert {name: done[name] for name in counts} == {name: foretold[name] for name in counts}
    with connect(stack) as connection:
        after = state(connection)
    assert of("alice", after) == of("alice", then)
    assert (
        differences({**live, **of("alice", then)}, after, tables=[t for _, t in after if t != "memory_relationships"])
        == []
    )
    # Her edge of nobody came back too.
    assert after["", "memory_relationships"].rows == live["", "memory_relationships"].rows + 1
    assert of("bob", after) == of("bob", live) != of("bob", then)
    assert containers(stack) == there
    moments["undo"], moments["live"] = done["undo_point"], live


def test_02_a_user_with_a_hostile_id_comes_in_as_somebody_else(stack: Stack) -> None:
    user = HOSTILE_USERS[0]
    with connect(stack) as connection:
        wipe(connection, user)
    done = stack.json("user", "restore", user, "--at", moments["then"], "--into", "alice-then", "--yes")
    assert done["tables"]["memories"]["inserted"] == 30
    with connect(stack) as connection:
        after = state(connection)
        assert of(user, after) == {}
        assert {t: each.rows for (_, t), each in of("alice-then", after).items()} == {
            t: each.rows for (_, t), each in of(user, moments["state"]).items()
        }


def test_03_a_user_goes_to_a_file_and_comes_from_it(stack: Stack, tmp_path: Any) -> None:
    user = HOSTILE_USERS[0]
    described = stack.json(
        "user", "restore", user, "--at", moments["then"], "--into", "file", "--destination", str(tmp_path)
    )
    assert described["taken_at"] == moments["then"].replace("Z", "+00:00")
    manifest = json.loads((tmp_path / described["backup"] / "manifest.json").read_text())
    expected = of(user, moments["state"])
    assert {(f[0], f[1]): f[3] for f in manifest["fingerprints"] if f[0]} == {k: v.digest for k, v in expected.items()}
    with connect(stack) as connection:
        wipe(connection, "alice-then")
    stack.memharbor("user", "restore", described["place"], "--yes")
    with connect(stack) as connection:
        assert of(user, state(connection)) == expected


def test_04_who_was_erased_does_not_come_back_from_before(stack: Stack) -> None:
    stack.memharbor("user", "erase", "erased-user", "--reason", "request 4711", "--yes")
    done = stack.memharbor("user", "restore", "erased-user", "--at", moments["then"], "--yes", check=False)
    assert done.returncode == 9, done.stderr
    assert "erased" in done.stderr
    with connect(stack) as connection:
        assert of("erased-user", state(connection)) == {}


def test_05_a_moment_that_nothing_leads_to_is_refused(stack: Stack) -> None:
    for at, code in (("2001-01-01T00:00:00Z", 9), ("2001-01-01T00:00:00", 2), ("2999-01-01T00:00:00Z", 2)):
        done = stack.memharbor("user", "restore", "alice", "--at", at, "--yes", check=False)
        assert done.returncode == code, done.stderr


def test_06_the_command_that_undoes_it_does(stack: Stack) -> None:
    stack.memharbor("restore", "--name", moments["undo"], "--yes")
    with connect(stack) as connection:
        found = state(connection)
    expected = {key: value for key, value in moments["live"].items() if key[0] != user_digest("erased-user")}
    assert differences(expected, found, tables=["memories", "entities", "memory_history", "org_members"]) == []
    assert of("alice", found) == {}


def test_07_the_rows_of_the_seeds_table_that_need_a_stack_run(stack: Stack) -> None:
    """The other rows are run by tests/integration/test_logical_backup.py."""
    page = (ROOT / "docs" / "reference" / "seed-commands.md").read_text()
    rows = re.findall(r"^\| `.+?` \| `memharbor (.+?)` \|", page, re.MULTILINE)
    schedule, create, rollback = (
        row for row in rows if row.split()[0] in ("checkpoint", "rollback") or "schedule" in row
    )
    # What it changes, and that `pulumi up` brings it into force, is tests/e2e/test_backup_schedule.py's.
    stack.memharbor(*schedule.split(), "--dry-run")
    with connect(stack) as connection:
        before = state(connection)
    stack.memharbor(*create.split())
    with connect(stack) as connection:
        wipe(connection, "bob")
    stack.memharbor(*rollback.split(), "--yes")
    with connect(stack) as connection:
        assert differences(before, state(connection), tables=["memories", "entities", "org_members"]) == []
    stack.memharbor("checkpoint", "delete", "pre-migration", "--yes")
