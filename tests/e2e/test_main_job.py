"""
The main job, in order, on a freshly provisioned stack: stand up, roll out, use, back up, wreck, restore, use again.

One story in numbered steps: each test needs the ones before it, so the file runs in its own order.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from tests import corpus
from tests.e2e.conftest import ROOT, Stack

POINT = "before-the-mistake"
DIMS = 384
# One hash a user over every memory: id, text, payload and the vector's bits.
USER_HASHES = """
select user_id, count(*), md5(string_agg(md5(id::text || payload::text || md5(vector_send(embedding))), '' order by id))
from memharbor.memories where user_id like 'user-%' group by user_id order by user_id
"""

story: dict[str, Any] = {}


def connect(stack: Stack, role: str, *options: str) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn(role, *options), autocommit=True)


def user_hashes(stack: Stack) -> dict[str, tuple[int, str]]:
    with connect(stack, "admin", "--direct") as connection:
        return {user: (count, digest) for user, count, digest in connection.execute(USER_HASHES)}


@contextmanager
def waiting_client(stack: Stack) -> Iterator[list[float]]:
    """One client of the pool that asks again and again; yields how long each answer took, fails where one failed."""
    waits: list[float] = []
    stop = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            with connect(stack, "service") as connection:
                while not stop.is_set():
                    begun_at = time.monotonic()
                    connection.execute("select 1")
                    waits.append(time.monotonic() - begun_at)
                    time.sleep(0.02)
        except psycopg.Error as exc:
            failures.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits
    finally:
        stop.set()
        thread.join(timeout=60)
    assert failures == []


def test_01_the_quickstart_runs_against_the_fresh_stack(stack: Stack) -> None:
    variables = stack.json("stack", "env")
    done = stack.run("python", "examples/quickstart.py", **variables)
    assert "deterministic" in done.stdout + done.stderr
    for role in ("app", "service"):
        password = psycopg.conninfo.conninfo_to_dict(stack.dsn(role))["password"]
        assert password not in done.stdout + done.stderr


def test_02_twenty_thousand_memories_of_fifty_users_are_copied_in(stack: Stack) -> None:
    begun_at = time.monotonic()
    with connect(stack, "admin", "--direct") as connection:
        count = corpus.load(connection, DIMS)
    story["rows_per_second"] = round(count / (time.monotonic() - begun_at))
    assert count == corpus.ROW_COUNT
    # The heavy user gets an index of its own from the repeatable step; the others are searched exactly.
    done = stack.run("ansible-playbook", "ansible/playbooks/schema.yml", "--tags", "indexes")
    assert re.search(r"changed=1\b", done.stdout), done.stdout
    with connect(stack, "admin", "--direct") as connection:
        connection.execute("vacuum analyze memharbor.memories")
        indexes = connection.execute(
            "select count(*) from pg_indexes where schemaname = 'memharbor' and indexdef like '%%USING hnsw%%WHERE%%'"
        ).fetchone()
    assert indexes == (1,)


def test_03_a_backup_is_created_and_listed(stack: Stack) -> None:
    created = stack.json("backup", "create", "--type", "full")
    (backup,) = created
    assert backup["type"] == "full"
    assert backup["database_bytes"] > backup["stored_bytes"] > 1_000_000
    assert [each["id"] for each in stack.json("backup", "list")] == [backup["id"]]
    assert stack.json("backup", "show", backup["id"])["start_lsn"] == backup["start_lsn"]
    story["backup"] = backup


def test_04_more_rows_come_and_the_moment_is_named(stack: Stack) -> None:
    with connect(stack, "service") as connection:
        for number in range(200):
            connection.execute(
                "insert into public.memories (user_id, memory, embedding) values (%s, %s, %s)",
                (
                    f"user-{number % 50:02d}",
                    f"written after the backup, number {number}",
                    str([1.0] + [0.0] * (DIMS - 1)),
                ),
            )
    story["hashes"] = user_hashes(stack)
    assert sum(count for count, _ in story["hashes"].values()) >= corpus.ROW_COUNT + 200
    with connect(stack, "admin", "--direct") as connection:
        connection.execute("select pg_create_restore_point(%s)", (POINT,))


def test_05_the_database_is_wrecked(stack: Stack) -> None:
    with connect(stack, "admin", "--direct") as connection:
        connection.execute("delete from memharbor.memories where user_id = %s", (corpus.USERS[7],))
        connection.execute("drop schema memharbor cascade")
        connection.execute("checkpoint")
    assert stack.memharbor("validate", check=False).returncode == 10


def test_06_a_restore_that_cannot_be_done_is_refused_and_touches_nothing(stack: Stack) -> None:
    with connect(stack, "admin", "--direct") as connection:
        before = connection.execute("select pg_postmaster_start_time(), pg_current_wal_insert_lsn()").fetchone()
    for arguments, code, said in (
        (("--name", "no-such-point"), 9, "there is no restore point `no-such-point`"),
        (("--at", "2020-01-01T00:00:00Z"), 9, "the first one ended at"),
        (("--at", "2020-01-01"), 2, "has no time zone"),
        (("--at", "2999-01-01T00:00:00Z"), 2, "lies in the future"),
        (("--at", "2020-01-01T00:00:00Z", "--name", POINT), 2, "exclude each other"),
    ):
        done = stack.memharbor("restore", *arguments, "--yes", check=False)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "needs a confirmation" in stack.memharbor("restore", "--name", POINT, check=False).stderr
    with connect(stack, "admin", "--direct") as connection:
        after = connection.execute("select pg_postmaster_start_time(), pg_current_wal_insert_lsn()").fetchone()
    assert before is not None
    assert after is not None
    assert after[0] == before[0], "the server was restarted by a refused restore"


def test_07_the_restore_to_the_named_point_brings_every_row_back(stack: Stack) -> None:
    plan = stack.json("restore", "--name", POINT, "--dry-run")
    assert plan["backup"] == story["backup"]["id"]
    begun_at = time.monotonic()
    with waiting_client(stack) as waits:
        report = stack.json("restore", "--name", POINT, "--yes")
    story["restore_seconds"] = round(time.monotonic() - begun_at, 1)
    # A client of the pool was never disconnected and never failed: one of its statements waited for the restore.
    assert max(waits) > 1
    story["client_waited_seconds"] = round(max(waits), 1)
    assert report["undo_point"].startswith("memharbor-before-restore-")
    assert user_hashes(stack) == story["hashes"]


def test_08_policies_are_on_and_indexes_are_valid(stack: Stack) -> None:
    with connect(stack, "admin", "--direct") as connection:
        unprotected = connection.execute(
            "select relname from pg_class where relnamespace = 'memharbor'::regnamespace and relkind = 'r'"
            " and not (relrowsecurity and relforcerowsecurity)"
            " and relname not in ('schema_migrations', 'schema_state')"
        ).fetchall()
        invalid = connection.execute("select indexrelid::regclass from pg_index where not indisvalid").fetchall()
        leftovers = connection.execute(
            "select name from pg_file_settings where sourcefile like '%%postgresql.auto.conf'"
        ).fetchall()
    assert (unprotected, invalid, leftovers) == ([], [], [])
    with connect(stack, "app") as connection:
        assert connection.execute("select count(*) from public.mem0").fetchone() == (0,)


def test_09_mem0_answers_again(stack: Stack) -> None:
    variables = stack.json("stack", "env")
    stack.run("python", "examples/quickstart.py", **variables)
    stack.memharbor("validate")
    assert user_hashes(stack) == story["hashes"], "validate and the quickstart leave nothing behind"


def test_10_a_second_up_and_playbook_change_nothing(stack: Stack) -> None:
    stack.memharbor("stack", "init")
    begun_at = time.monotonic()
    stack.run("pulumi", "up", "--yes", "--skip-preview", "--expect-no-changes", "--stack", stack.name)
    stack.run("pulumi", "preview", "--refresh", "--expect-no-changes", "--stack", stack.name)
    done = stack.playbook()
    story["second_up_seconds"] = round(time.monotonic() - begun_at, 1)
    assert re.search(r"changed=0\b.*failed=0\b", done.stdout), done.stdout
    check = stack.playbook("--check", "--diff")
    assert re.search(r"changed=0\b", check.stdout)


def test_11_archiving_goes_on_after_the_restore_and_a_backup_follows(stack: Stack) -> None:
    created = stack.json("backup", "create", "--type", "incr")
    assert created[0]["timeline"] == 2
    assert len(stack.json("backup", "list")) == 2
    status = stack.json("status")
    assert status["archive"]["waiting_segments"] <= 1
    assert status["database"]["users"] >= 50
    assert stack.memharbor("doctor", check=False).returncode == 0


def test_12_the_restore_itself_can_be_undone(stack: Stack) -> None:
    undo = next(
        line for line in stack.memharbor("restore", "--name", POINT, "--yes").stdout.splitlines() if "to undo" in line
    ).split("--name ")[1]
    with connect(stack, "service") as connection:
        connection.execute("delete from public.memories where user_id = %s", (corpus.USERS[3],))
    stack.memharbor("restore", "--name", undo, "--yes")
    assert user_hashes(stack) == story["hashes"]


def test_13_an_idle_database_is_restored_to_a_moment(stack: Stack) -> None:
    with connect(stack, "admin", "--direct") as connection:
        row = connection.execute(
            "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
        ).fetchone()
    assert row is not None
    report = stack.json("restore", "--at", row[0], "--yes")
    assert report["new_timeline"] > 3
    assert user_hashes(stack) == story["hashes"]


def test_14_no_secret_is_seen_in_arguments_environment_logs_or_state(stack: Stack) -> None:
    import docker

    secrets = [psycopg.conninfo.conninfo_to_dict(stack.dsn(role, "--direct"))["password"] for role in ("admin", "app")]
    client = docker.from_env()
    containers = client.containers.list(all=True, filters={"label": f"memharbor.stack={stack.name}"})
    assert len(containers) >= 3
    seen = [json.dumps(container.attrs) + container.logs().decode(errors="replace") for container in containers]
    seen += [json.dumps(c.top(ps_args="-eo pid,args")["Processes"]) for c in containers if c.status == "running"]
    state = stack.environ["PULUMI_BACKEND_URL"].removeprefix("file://")
    from pathlib import Path

    seen += [path.read_text(errors="replace") for path in Path(state).rglob("*.json*")]
    seen += [(ROOT / f"Pulumi.{stack.name}.yaml").read_text()]
    for secret in secrets:
        assert not any(secret in text for text in seen)


def test_15_figures_are_said(stack: Stack, record_testsuite_property: Callable[[str, object], None]) -> None:
    """Into the JUnit report and the terminal; nothing is asserted of a time."""
    with connect(stack, "admin", "--direct") as connection:
        size = connection.execute("select pg_size_pretty(pg_database_size(current_database()))").fetchone()
    figures: dict[str, object] = {name: value for name, value in story.items() if "second" in name}
    figures |= {"database": size, **stack.seconds}
    record_testsuite_property("figures", json.dumps(figures, default=str))
    assert story["rows_per_second"] > 0
