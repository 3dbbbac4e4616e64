"""Restores when things are bad already: a dead server, a broken cluster, a lost volume, strangers, an impatient person."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
import psycopg
import pytest

from tests.e2e.conftest import ROOT, Stack


@pytest.fixture(scope="module", autouse=True)
def table(stack: Stack) -> Iterator[None]:
    """A table of its own in a database that is backed up."""
    with connect(stack) as connection:
        connection.execute(
            "create table if not exists public.marks (mark text primary key, at timestamptz default now())"
        )
    stack.memharbor("backup", "create", "--type", "full")
    yield
    with connect(stack) as connection:
        connection.execute("drop table if exists public.marks")


def connect(stack: Stack) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True)


def mark(stack: Stack, *marks: str) -> None:
    with connect(stack) as connection:
        for each in marks:
            connection.execute("insert into public.marks (mark) values (%s)", (each,))


def marks(stack: Stack) -> set[str]:
    with connect(stack) as connection:
        return {row[0] for row in connection.execute("select mark from public.marks")}


def name_point(stack: Stack, name: str) -> None:
    with connect(stack) as connection:
        connection.execute("select pg_create_restore_point(%s)", (name,))


def container(stack: Stack, service: str = "postgres-0") -> Any:
    return docker.from_env(timeout=120).containers.get(f"{stack.name}-{service}")


def now(stack: Stack) -> str:
    with connect(stack) as connection:
        row = connection.execute(
            "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"
        ).fetchone()
    assert row is not None
    return f"{row[0]}Z"


@contextmanager
def repeating(work: Any, pause_seconds: float = 0.05) -> Iterator[None]:
    """Do something again and again in the background."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            work()
            time.sleep(pause_seconds)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=60)


def test_a_backup_and_a_validation_work_while_wal_is_archived_all_the_time(stack: Stack) -> None:
    with connect(stack) as connection:

        def switch() -> None:
            connection.execute("select pg_switch_wal() from pg_create_restore_point('x')")

        with repeating(switch):
            stack.memharbor("backup", "create", "--type", "incr")
            stack.memharbor("validate")


def test_what_a_killed_server_had_not_archived_is_not_lost(stack: Stack) -> None:
    mark(stack, "before the kill")
    name_point(stack, "not-archived-yet")
    mark(stack, "after the point")
    container(stack).kill()
    report = stack.json("restore", "--name", "not-archived-yet", "--yes")
    assert report["undo_point"] is None
    assert "before the kill" in marks(stack)
    assert "after the point" not in marks(stack)


@pytest.mark.soak
def test_strangers_with_a_wrong_password_do_not_stop_a_restore(stack: Stack) -> None:
    mark(stack, "kept")
    name_point(stack, "strangers")
    wrong = {"password": "wrong"}  # pragma: allowlist secret
    stranger = psycopg.conninfo.make_conninfo(stack.dsn("app", "--direct"), **wrong)

    def knock() -> None:
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(stranger)

    with repeating(knock, 0.01):
        stack.memharbor("restore", "--name", "strangers", "--yes")
    assert "kept" in marks(stack)


def test_a_moment_on_an_abandoned_timeline_is_restored_as_it_was(stack: Stack) -> None:
    mark(stack, "one")
    name_point(stack, "fork")
    mark(stack, "two")
    moment = now(stack)
    time.sleep(0.1)
    mark(stack, "three")
    stack.memharbor("restore", "--name", "fork", "--yes")
    assert "two" not in marks(stack)
    mark(stack, "four")
    time.sleep(2)
    stack.memharbor("restore", "--at", moment, "--yes")
    assert marks(stack) >= {"one", "two"}
    assert not marks(stack) & {"three", "four"}


def test_a_cluster_that_does_not_start_any_more_is_restored(stack: Stack) -> None:
    mark(stack, "in the archive")
    name_point(stack, "broken")
    with connect(stack) as connection:
        connection.execute("select pg_switch_wal()")
    time.sleep(2)
    container(stack).exec_run(["rm", "/var/lib/postgresql/18/data/global/pg_control"])
    container(stack).exec_run(["sh", "-c", "kill -QUIT $(head -1 $PGDATA/postmaster.pid)"])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and container(stack).status != "restarting":
        time.sleep(0.2)
    assert stack.memharbor("doctor", check=False).returncode == 10
    stack.memharbor("restore", "--name", "broken", "--yes")
    assert "in the archive" in marks(stack)


@pytest.mark.soak
def test_a_lost_data_directory_is_restored_over_the_new_empty_cluster(stack: Stack) -> None:
    mark(stack, "before the loss")
    name_point(stack, "loss")
    with connect(stack) as connection:
        connection.execute("select pg_switch_wal()")
    time.sleep(2)
    container(stack).exec_run(["sh", "-c", "rm -rf $PGDATA/* && kill -QUIT 1"])
    container(stack).restart()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and container(stack).attrs["State"].get("Health", {}).get("Status") != "healthy":
        time.sleep(0.5)
    with pytest.raises(psycopg.OperationalError):
        connect(stack)
    stack.memharbor("restore", "--name", "loss", "--yes")
    assert "before the loss" in marks(stack)


def test_ctrl_c_while_the_pool_is_paused_lets_the_clients_go_on(stack: Stack) -> None:
    name_point(stack, "impatient")
    command = ["memharbor", "restore", "--name", "impatient", "--yes"]
    with psycopg.connect(stack.dsn("service")) as holder:
        holder.execute("select 1")  # an open transaction, for which the pause waits
        # A suite that was started in the background ignores SIGINT, and so would its children.
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=stack.environ,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as restore:
            assert restore.stderr is not None
            for line in restore.stderr:
                if line.startswith("Pause the pool"):
                    break
            time.sleep(1)
            restore.send_signal(signal.SIGINT)
            said = restore.stderr.read()
        assert restore.returncode == 130, said
        holder.execute("select 2")
    with psycopg.connect(stack.dsn("app"), connect_timeout=20) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_a_restore_goes_on_with_a_stopped_pooler(stack: Stack) -> None:
    name_point(stack, "no-pooler")
    container(stack, "pgbouncer-0").stop()
    try:
        stack.memharbor("restore", "--name", "no-pooler", "--yes")
    finally:
        container(stack, "pgbouncer-0").start()
