"""Backups that come by themselves: the schedule, what each backup records, what is kept, and what a kill leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import docker
import psycopg
import pytest

from memharbor.cron import find_next
from tests.e2e.conftest import ROOT, Stack

pytestmark = pytest.mark.timeout(1800)

LIBRARY = "/usr/local/lib/memharbor"
USERS = ("schedule-ada", "schedule-bob")


DEFAULT = ["17 2 * * 0", "17 2 * * 1-6", "47 * * * *"]


def connect(stack: Stack) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True)


def inside(stack: Stack, *command: str) -> tuple[int, str]:
    done = docker.from_env(timeout=300).containers.get(f"{stack.name}-postgres-0").exec_run(list(command))
    return int(done.exit_code), done.output.decode()


def manifest(stack: Stack, label: str) -> dict[str, Any]:
    code, text = inside(stack, f"{LIBRARY}/record", "get", f"manifests/{label}.json")
    assert code == 0, text
    read: dict[str, Any] = json.loads(text)
    return read


def fingerprints(stack: Stack) -> list[list[Any]]:
    with connect(stack) as connection:
        rows = connection.execute("select * from memharbor.fingerprint_users()").fetchall()
    return sorted([list(row) for row in rows])


def add_memory(connection: psycopg.Connection[Any], user: str) -> None:
    connection.execute(
        "insert into memharbor.memories (id, embedding, payload) select gen_random_uuid(),"
        " (select array_agg(random()) from generate_series(1, 384))::public.vector, jsonb_build_object('user_id', %s::text,"
        " 'data', md5(random()::text))",
        (user,),
    )


def wait_for(found: Callable[[], Any], what: str, seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.5)
    pytest.fail(f"{what}: not within {seconds} s")


@pytest.fixture(scope="module", autouse=True)
def memories(stack: Stack) -> Iterator[None]:
    """Two users' memories, and the schedule that a stack has from the start."""
    with connect(stack) as connection:
        for user in USERS:
            for _ in range(3):
                add_memory(connection, user)
    yield
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories where payload ->> 'user_id' = any(%s)", (list(USERS),))
    # The next files begin with the default schedule, and meet no backup every minute.
    stack.memharbor("backup", "schedule", "set", "--schedule", "hourly", "--retention", "0", "--keep-full", "2")
    shown = stack.json("backup", "schedule", "show")
    assert shown["is_in_force"]
    assert [each["in_force"] for each in shown["backups"]] == DEFAULT


@contextmanager
def asking(stack: Stack) -> Iterator[list[str]]:
    """A client of the pool that asks all the time; yields what went wrong with it."""
    stop, wrong = threading.Event(), []

    def ask() -> None:
        with psycopg.connect(stack.dsn("service"), autocommit=True, prepare_threshold=None) as connection:
            while not stop.is_set():
                try:
                    connection.execute("select 1")
                except psycopg.Error as exc:
                    wrong.append(str(exc))
                    return
                time.sleep(0.05)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        thread.join(timeout=60)


def test_a_new_stack_backs_itself_up(stack: Stack) -> None:
    shown = stack.json("backup", "schedule", "show")
    assert shown["is_in_force"]
    assert [each["schedule"] for each in shown["backups"]] == DEFAULT
    assert all(datetime.fromisoformat(each["next_run_at"]) > datetime.now(UTC) for each in shown["backups"])


def test_the_scheduler_understands_an_expression_as_we_do(stack: Stack) -> None:
    crons = [
        "47 * * * *",
        "17 2 * * 0",
        "*/20 13 * * *",
        "5/50 * * * *",
        "0 0 29 2 *",
        "30 4 * 1,3-4 1-5",
        "1-59/7 1,5-7 * * *",
    ]
    crontab = "\n".join(f"{cron} true" for cron in crons)
    script = 'printf "%s\\n" "$0" > /tmp/crontab; timeout 3 supercronic -no-reap -debug /tmp/crontab; rm /tmp/crontab'
    begun_at = datetime.now(UTC)
    said = inside(stack, "sh", "-c", script, crontab)[1]
    found = re.findall(r'next at (\S+ \S+) \S+ UTC".*job.schedule="(.*?)"', said)
    if datetime.now(UTC).minute != begun_at.minute:
        pytest.skip("the minute ended in between")
    assert {cron: at for at, cron in found} == {
        cron: find_next(cron, begun_at).strftime("%Y-%m-%d %H:%M:%S") for cron in crons
    }


def test_a_wrong_schedule_changes_nothing(stack: Stack) -> None:
    done = stack.memharbor("backup", "schedule", "set", "--incr", "61 * * * *", check=False)
    assert done.returncode == 3
    assert "`61` is no minute: it goes from 0 to 59" in done.stderr
    dry = stack.json("backup", "schedule", "set", "--schedule", "weekly", "--dry-run")
    assert dry["changed"] == ["backup_schedule_diff", "backup_schedule_incr"]
    assert stack.json("backup", "schedule", "show")["is_in_force"]


def test_the_seeds_command_works_as_typed_and_clients_of_the_pool_only_wait(stack: Stack) -> None:
    command = ["memharbor", "backup", "schedule", "set", "--schedule", "daily", "--retention", "30"]
    with asking(stack) as wrong:
        # Every minute, so that this test sees one.
        report = json.loads(stack.run(*command, "--incr", "* * * * *", "--output", "json").stdout)
    assert wrong == []
    assert report["next"] is None
    shown = stack.json("backup", "schedule", "show")
    assert shown["is_in_force"]
    assert shown["retention_days"] == 30
    assert shown["backups"][2]["in_force"] == "* * * * *"
    stack.run("pulumi", "preview", "--expect-no-changes", "--stack", stack.name)


def test_a_scheduled_backup_comes_and_records_what_was_in_it(stack: Stack) -> None:
    def incr() -> Any:
        run = stack.json("backup", "schedule", "show")["backups"][2]["last_run"]
        return run if run and run["result"] == "done" and run["backup"] in stack.backup_ids() else None

    before = fingerprints(stack)
    run = wait_for(incr, "a scheduled backup", 90)
    recorded = manifest(stack, run["backup"])
    assert recorded["exact"] is True
    assert sorted(recorded["fingerprints"]) == before
    assert {name for _, name, *_ in recorded["fingerprints"]} >= {"memories"}
    annotated = json.loads(inside(stack, "pgbackrest", "info", "--output=json")[1])[0]["backup"]
    points = {each["label"]: each.get("annotation", {}).get("memharbor-point") for each in annotated}
    assert points[run["backup"]] == recorded["point"]


def test_two_backups_never_overlap_and_the_schedule_says_that_it_skipped_one(stack: Stack) -> None:
    code, said = inside(stack, "sh", "-c", f"flock /run/pgbackrest/memharbor-backup sh -c '{LIBRARY}/backup diff' 2>&1")
    assert code == 0
    assert "diff backup skipped: another backup is running" in said
    assert stack.json("backup", "schedule", "show")["backups"][1]["last_run"]["result"] == "skipped"


def test_a_dead_scheduler_is_unhealthy_and_comes_back(stack: Stack) -> None:
    assert inside(stack, f"{LIBRARY}/healthcheck")[0] == 0
    code, said = inside(stack, "sh", "-c", f"kill $(cat /run/pgbackrest/scheduler); sleep 1; {LIBRARY}/healthcheck")
    assert code != 0, said
    wait_for(lambda: inside(stack, f"{LIBRARY}/healthcheck")[0] == 0, "the scheduler", 15)


def test_the_record_is_exact_to_the_row_while_others_write(stack: Stack) -> None:
    stop = threading.Event()
    written = []

    def write() -> None:
        with connect(stack) as connection:
            while not stop.is_set():
                add_memory(connection, USERS[0])
                written.append(1)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        created = stack.json("backup", "create")[0]["id"]
        count = len(written)
        time.sleep(0.5)
        assert len(written) > count > 20, "nobody wrote"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    recorded = manifest(stack, created)
    assert recorded["exact"] is True
    assert sorted(recorded["fingerprints"]) != fingerprints(stack)
    stack.memharbor("restore", "--name", recorded["point"], "--yes")
    assert sorted(recorded["fingerprints"]) == fingerprints(stack)


@pytest.mark.soak
def test_a_dry_run_of_prune_is_what_prune_does(stack: Stack) -> None:
    for _ in range(2):
        stack.memharbor("backup", "create", "--type", "full")
    assert stack.json("backup", "prune", "--dry-run")["backups"] == [], "all of it is of the last 30 days"
    stack.memharbor("backup", "schedule", "set", "--schedule", "hourly", "--retention", "0", "--keep-full", "2")
    there = stack.backup_ids()
    fulls = [label for label in there if label.endswith("F")]
    promised = stack.json("backup", "prune", "--dry-run")
    assert stack.backup_ids() == there
    assert promised["wal"]
    done = stack.json("backup", "prune")
    assert (done["backups"], done["wal"]) == (promised["backups"], promised["wal"])
    left = stack.backup_ids()
    assert set(there) - set(left) == set(promised["backups"])
    assert [label for label in left if label.endswith("F")] == fulls[-2:]
    records = inside(stack, f"{LIBRARY}/record", "list", "manifests")[1].split()
    assert {path.split("/")[1].removesuffix(".json") for path in records} <= set(left)
    assert stack.json("backup", "prune", "--dry-run")["backups"] == []


def pgbackrest_runs(stack: Stack) -> bool:
    script = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -q -e 'type=full[ ]*backup'"
    return inside(stack, "sh", "-c", script)[0] == 0


@pytest.fixture
def ballast(stack: Stack) -> Iterator[None]:
    """A data directory that takes some seconds to back up."""
    inside(stack, "sh", "-c", "head -c 150M /dev/urandom > $PGDATA/ballast")
    yield
    inside(stack, "sh", "-c", "rm -f $PGDATA/ballast")


@pytest.mark.soak
@pytest.mark.usefixtures("ballast")
def test_what_is_interrupted_or_killed_leaves_no_backup_and_the_next_one_works(stack: Stack) -> None:
    before = stack.backup_ids()
    command = ["memharbor", "backup", "create", "--type", "full"]
    for ending in ("ctrl-c", "kill"):
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=stack.environ,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as create:
            wait_for(lambda: pgbackrest_runs(stack), "pgBackRest", 20)
            if ending == "ctrl-c":
                create.send_signal(signal.SIGINT)
            else:
                kill = (
                    'for p in /proc/[0-9]*; do read -r n < $p/comm; [ "$n" != pgbackrest ] || kill -9 ${p#/proc/}; done'
                )
                inside(stack, "sh", "-c", kill)
            _, said = create.communicate(timeout=120)
        assert create.returncode == {"ctrl-c": 130, "kill": 6}[ending], said
        assert [label for label in stack.backup_ids() if label.endswith("F") and label not in before] == [], ending
        assert not pgbackrest_runs(stack)
    created = stack.json("backup", "create", "--type", "full")[0]
    assert created["id"] in stack.backup_ids()
    assert manifest(stack, created["id"])["backup"] == created["id"]
