"""Where a restore can go to, what it refuses with the database untouched, and who is let in when."""

from __future__ import annotations

import io
import re
import secrets
import signal
import sqlite3
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import docker
import psycopg
import pytest
from mem0.memory.storage import SQLiteManager

from tests.e2e.conftest import ROOT, Stack, free_port, remove_files

pytestmark = pytest.mark.timeout(1800)

Fingerprints = list[tuple[Any, ...]]


def connect(stack: Stack, *options: str) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct", *options), autocommit=True)


def remember(stack: Stack, *texts: str) -> None:
    with connect(stack) as connection:
        for text in texts:
            connection.execute(
                "insert into public.memories (id, user_id, memory) values (gen_random_uuid(), 'restorer', %s)", (text,)
            )


def memories(stack: Stack) -> set[str]:
    with connect(stack) as connection:
        return {row[0] for row in connection.execute("select memory from public.memories where user_id = 'restorer'")}


def fingerprints(stack: Stack) -> Fingerprints:
    with connect(stack) as connection:
        return sorted(connection.execute("select * from memharbor.fingerprint_users()").fetchall())


def leader(stack: Stack) -> Any:
    return docker.from_env(timeout=120).containers.get(f"{stack.name}-postgres-0")


@pytest.fixture(scope="module", autouse=True)
def backup(stack: Stack) -> Iterator[str]:
    """A backup with one memory in it; its id."""
    remember(stack, "in the backup")
    created = stack.json("backup", "create", "--type", "full")
    yield str(created[0]["id"])
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories where user_id = 'restorer'")
        connection.execute("delete from memharbor.memory_history where user_id = 'restorer'")


def test_up_to_a_transaction_and_no_further_and_back_again(stack: Stack) -> None:
    with connect(stack) as connection, connection.transaction():
        connection.execute(
            "insert into public.memories (id, user_id, memory) values (gen_random_uuid(), 'restorer', 'wanted')"
        )
        row = connection.execute("select pg_current_xact_id()::text").fetchone()
        assert row is not None
    remember(stack, "a mistake")
    before = fingerprints(stack)
    report = stack.json("restore", "--xid", row[0], "--yes")
    assert memories(stack) == {"in the backup", "wanted"}
    stack.memharbor("restore", "--name", report["undo_point"], "--yes")
    assert fingerprints(stack) == before


def test_up_to_a_position_of_the_log(stack: Stack) -> None:
    with connect(stack) as connection:
        row = connection.execute("select pg_current_wal_insert_lsn()").fetchone()
        assert row is not None
    remember(stack, "after the position")
    stack.memharbor("restore", "--lsn", row[0], "--yes")
    assert "after the position" not in memories(stack)
    assert "a mistake" in memories(stack)


def history_of(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("select * from history order by memory_id").fetchall()


def test_mem0_s_own_history_is_in_the_backup_and_comes_back_under_a_mem0_that_has_it_open(
    stack: Stack, tmp_path: Path
) -> None:
    path = tmp_path / "history.db"
    manager = SQLiteManager(str(path))
    try:
        for number in range(20):
            manager.add_history(f"m{number}", None, f"text {number} 🐘", "ADD")
        expected = history_of(path)
        carried = ("--mem0-history", str(path))
        assert stack.json("backup", "create", *carried, "--dry-run")["mem0_history_rows"] == 20
        (made,) = stack.json("backup", "create", *carried)
        assert made["mem0_history_rows"] == 20
        (without,) = stack.json("backup", "create")
        assert without["mem0_history_rows"] is None
        assert leader(stack).exec_run(["sh", "-c", "ls $PGDATA/mem0-history.db"]).exit_code != 0
        refused = stack.memharbor("restore", "--backup", without["id"], *carried, "--yes", check=False)
        assert (refused.returncode, "no history of Mem0's" in refused.stderr) == (9, True)
        manager.add_history("later", None, "not in the backup", "ADD")
        before = fingerprints(stack)
        report = stack.json("restore", "--backup", made["id"], *carried, "--yes")
        assert fingerprints(stack) == before, "without a target it goes to the end of the archive"
        assert history_of(path) == expected
        assert len(history_of(Path(report["mem0_history_kept"]))) == 21
        assert leader(stack).exec_run(["sh", "-c", "ls $PGDATA/mem0-history.db"]).exit_code != 0
    finally:
        manager.connection.close()


def test_nobody_is_let_in_before_it_is_verified(stack: Stack) -> None:
    remember(stack, "to be seen")
    with connect(stack) as connection:
        connection.execute("select pg_create_restore_point('verified-first')")
        remember(stack, "never to be seen again")
    dsn = stack.dsn("admin", "--direct")
    seen: list[tuple[float, set[str]]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                with psycopg.connect(dsn, connect_timeout=2) as connection:
                    row = connection.execute("select pg_is_in_recovery()").fetchone()
                    rows = connection.execute("select memory from public.memories where user_id = 'restorer'")
                    seen.append((time.monotonic(), {each[0] for each in rows} if row == (False,) else {"recovering"}))
            except psycopg.OperationalError:
                pass
            time.sleep(0.01)

    thread = threading.Thread(target=look)
    thread.start()
    command = ["memharbor", "restore", "--name", "verified-first", "--yes"]
    opened_at = 0.0
    with subprocess.Popen(command, cwd=ROOT, env=stack.environ, stderr=subprocess.PIPE, text=True) as restore:
        assert restore.stderr is not None
        stopped_at = 0.0
        for line in restore.stderr:
            if line.startswith("Stop PostgreSQL: done"):
                stopped_at = time.monotonic()
            if line.startswith("Let clients in again …"):
                opened_at = time.monotonic()
    stop.set()
    thread.join()
    assert restore.returncode == 0
    assert [state for at, state in seen if stopped_at + 0.1 < at < opened_at] == []
    assert "never to be seen again" not in seen[-1][1]
    assert "to be seen" in seen[-1][1]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--at", "2020-01-01T00:00:00Z"], 9, r"lead.* to 2020-01-01.*what can be restored begins at 20\d\d-"),
        (["--at", "2999-01-01T00:00:00Z"], 2, "lies in the future"),
        (["--lsn", "0/1"], 9, "LSN 0/1.*what can be restored begins at"),
        (["--lsn", "FFF/0"], 9, "LSN FFF/0.*what can be restored begins at"),
        (["--xid", "4000000000"], 9, "no commit of transaction 4000000000.*what can be restored begins at"),
        (["--name", "no-such-point"], 9, "no restore point `no-such-point`"),
        (["--backup", "20200101-000000F"], 9, "no backup `20200101-000000F`"),
        (["--lsn", "0/1", "--xid", "5"], 2, "exclude each other"),
        (["--replace"], 2, "goes with `--into`"),
        (["--into", "/nowhere/at/all"], 9, "`/nowhere/at` does not exist"),
        (["--into", str(ROOT) + "/"], 9, "is not empty and no data directory"),
        (["--into", "no-such-stack"], 3, "no-such-stack"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_database_untouched(
    stack: Stack, options: list[str], code: int, said: str
) -> None:
    before, begun = fingerprints(stack), leader(stack).attrs["State"]["StartedAt"]
    done = stack.memharbor("restore", *options, "--yes", check=False)
    assert done.returncode == code, done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert code == 2 or "hint: " in done.stderr
    assert (fingerprints(stack), leader(stack).attrs["State"]["StartedAt"]) == (before, begun)


def test_a_wrong_key_is_refused_with_the_database_untouched(stack: Stack) -> None:
    before = fingerprints(stack)
    path = "/files/pgbackrest/conf.d/secrets.conf"
    engine = docker.from_env(timeout=120)
    files = next(mount["Name"] for mount in leader(stack).attrs["Mounts"] if mount["Destination"] == "/etc/memharbor")

    def change(script: str) -> None:
        engine.containers.run(
            leader(stack).attrs["Image"],
            entrypoint=["sh", "-c", script],
            user="root",
            volumes={files: {"bind": "/files", "mode": "rw"}},
            remove=True,
        )

    change(f"cp -p {path} {path}.kept && sed -i 's/^repo1-cipher-pass=.*/repo1-cipher-pass=wrong/' {path}")
    try:
        done = stack.memharbor("restore", "--yes", check=False)
    finally:
        change(f"mv {path}.kept {path}")
    assert done.returncode == 6
    assert "cannot be read" in done.stderr
    assert "its passphrase is not the one that it was written with" in done.stderr
    assert fingerprints(stack) == before


def test_into_a_folder_come_the_files_of_a_server_that_was_shut_down(stack: Stack, tmp_path: Path) -> None:
    remember(stack, "for the folder")
    with connect(stack) as connection:
        connection.execute("select pg_create_restore_point('for-the-folder')")
    remember(stack, "too late for the folder")
    before = fingerprints(stack)
    folder = tmp_path / "restored"
    report = stack.json("restore", "--name", "for-the-folder", "--into", str(folder))
    assert report["folder"] == str(folder)
    assert fingerprints(stack) == before
    assert memories_of_folder(stack, folder) >= {"in the backup", "for the folder"}
    assert "too late for the folder" not in memories_of_folder(stack, folder)
    assert list(tmp_path.iterdir()) == [folder]

    done = stack.memharbor("restore", "--into", str(folder), "--yes", check=False)
    assert (done.returncode, "--replace" in done.stderr) == (9, True)
    stack.memharbor("restore", "--into", str(folder), "--replace", "--yes")
    assert "too late for the folder" in memories_of_folder(stack, folder)
    assert list(tmp_path.iterdir()) == [folder]


def memories_of_folder(stack: Stack, folder: Path) -> set[str]:
    """Open a data directory with the server of the stack's image, without a network, and read it."""
    packed = io.BytesIO()

    def owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 101
        return member

    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, arcname="restored", filter=owned)
    engine = docker.from_env(timeout=120)
    container = engine.containers.create(
        leader(stack).attrs["Image"],
        name=f"{stack.name}-folder-{secrets.token_hex(3)}",
        entrypoint=["postgres", "-D", "/tmp/restored", "-c", "unix_socket_directories=/tmp"],
        labels={"memharbor.stack": stack.name},
        network_mode="none",
    )
    try:
        container.put_archive("/tmp", packed.getvalue())
        container.start()
        query = "select memory from public.memories where user_id = 'restorer'"
        for _ in range(100):
            done = container.exec_run(["psql", "-h", "/tmp", "-d", "memharbor", "-tAc", query])
            if done.exit_code == 0:
                return set(done.output.decode().split("\n")) - {""}
            time.sleep(0.2)
        raise AssertionError(container.logs().decode())
    finally:
        container.remove(force=True)


def test_a_restore_that_is_interrupted_after_the_stop_is_continued_by_the_same_command(stack: Stack) -> None:
    remember(stack, "before the interruption")
    with connect(stack) as connection:
        connection.execute("select pg_create_restore_point('interrupted')")
    remember(stack, "after the interruption")
    command = ["memharbor", "restore", "--name", "interrupted", "--yes"]
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
            if line.startswith("Restore backup"):
                break
        restore.send_signal(signal.SIGINT)
        said = restore.stderr.read()
    assert restore.returncode == 130, said
    assert "the database is not open and the pool is paused" in said
    stack.memharbor("restore", "--name", "interrupted", "--yes")
    assert "before the interruption" in memories(stack)
    assert "after the interruption" not in memories(stack)


@pytest.fixture
def other(stack: Stack, tmp_path: Path) -> Iterator[Stack]:
    """A second stack beside the first, not rolled out."""
    name = f"{stack.name}-b"
    ports = {"MEMHARBOR_POSTGRES_PORT": str(free_port()), "MEMHARBOR_POOL_PORT": str(free_port())}
    names = dict.fromkeys(("MEMHARBOR_STACK", "PULUMI_STACK", "STACK"), name)
    second = Stack(name, {**stack.environ, **names, **ports})
    try:
        second.memharbor("stack", "init")
        second.up()
        yield second
    finally:
        second.memharbor("stack", "destroy", name, "--yes", check=False)
        remove_files(name)


@pytest.mark.soak
def test_into_another_stack_which_is_itself_backed_up_and_drilled_from_then_on(stack: Stack, other: Stack) -> None:
    before = fingerprints(stack)
    for options in ([], ["--replace"]):
        stack.memharbor("restore", "--into", other.name, "--yes", *options)
        assert fingerprints(other) == before
        with psycopg.connect(other.dsn("service"), connect_timeout=20) as connection:
            assert connection.execute("select count(*) > 0 from memories").fetchone() == (True,)
        other.memharbor("backup", "create", "--type", "full")
        assert other.json("drill")["result"] == "verified"
        remember(other, "of its own")
        undone = other.json("restore", "--yes")
        assert undone["undo_point"]
        assert "of its own" in memories(other)
    done = stack.memharbor("restore", "--into", other.name, "--yes", check=False)
    assert (done.returncode, "memories" in done.stderr) == (9, True)
    assert fingerprints(stack) == before
