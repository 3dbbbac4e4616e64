"""A backup store that is down, full, or all that is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import psycopg
import pytest

from memharbor.settings import Settings
from tests import corpus
from tests.e2e.conftest import BIN, PREFIX, ROOT, Stack, remove_files, stack_environment
from tests.e2e.pages import RUNBOOKS, follow

pytestmark = pytest.mark.timeout(1800)

# What the playbook does, without Ansible's start-up times.
ROLL_OUT = """
import sys
from memharbor.rollout import roll_out
from memharbor.target import find_target
settings = find_target(sys.argv[1]).settings.model_dump()
for action, component in (("roles", None), ("database", None), *(("apply", name) for name in sys.argv[2:])):
    roll_out(action=action, component=component, stack=sys.argv[1], settings=settings, dry_run=False)
"""


def connect(stack: Stack, role: str = "admin", *options: str) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn(role, *options), autocommit=True)


def container(stack: Stack, service: str) -> Any:
    return docker.from_env(timeout=300).containers.get(f"{stack.name}-{service}")


def write(stack: Stack, segments: int = 1) -> None:
    """Commit something in each of so many WAL segments."""
    with connect(stack, "admin", "--direct") as connection:
        connection.execute("create table if not exists public.faults (at timestamptz default clock_timestamp())")
        for _ in range(segments):
            connection.execute("insert into public.faults default values")
            connection.execute("select pg_switch_wal()")


def archive(stack: Stack) -> dict[str, Any]:
    done = stack.memharbor("status", "--output", "json", check=False)
    read: dict[str, Any] = json.loads(done.stdout)["archive"]
    return read


def wait_until(found: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found():
            return
        time.sleep(1)
    pytest.fail(f"{what}: not within {seconds} s")


@contextlib.contextmanager
def own_stack(folder: Path, prepare: Callable[[str], None] = lambda name: None, *, dims: int = 8) -> Iterator[Stack]:
    """A stack of this file's own, up but not rolled out; `prepare` is called with its name before."""
    name = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(2)}"
    stack = Stack(name, stack_environment(name, folder, dims=dims))
    try:
        prepare(name)
        stack.memharbor("stack", "init")
        stack.up()
        yield stack
    finally:
        done = stack.memharbor("stack", "destroy", name, "--yes", check=False)
        sys.stderr.write(done.stderr if done.returncode else "")
        remove_files(name)


def test_a_store_that_is_down_is_told_and_caught_up_with(stack: Stack) -> None:
    write(stack)
    stack.memharbor("backup", "create")
    before = stack.backup_ids()
    store = container(stack, "backup-store-0")
    store.stop(timeout=10)
    try:
        write(stack, segments=3)
        wait_until(lambda: bool(archive(stack)["is_failing"]), "the archiver's failure", 60)
        lag = archive(stack)
        assert lag["waiting_segments"] >= 3
        assert lag["waiting_bytes"] == lag["waiting_segments"] << 24
        assert 0 < lag["oldest_waiting_age_seconds"] < 300
        assert lag["seconds_until_full"] > 0
        said = stack.memharbor("status", check=False).stdout
        assert "the backup store does not take them; at this rate the disk (" in said
        doctor = stack.memharbor("doctor", check=False)
        assert doctor.returncode == 10
        assert "segments wait" in doctor.stdout
        for command in (["backup", "create"], ["backup", "prune"]):
            done = stack.memharbor(*command, check=False)
            assert done.returncode == 6, done.stderr
            assert "hint: " in done.stderr
        write(stack)
    finally:
        store.start()
    # A write makes the archiver try at once; by itself it does within a minute.
    write(stack)
    wait_until(lambda: archive(stack)["waiting_segments"] == 0, "the archive", 120)
    assert not archive(stack)["is_failing"]
    assert stack.backup_ids()[: len(before)] == before
    stack.memharbor("backup", "create")
    with connect(stack, "admin", "--direct") as connection:
        connection.execute("drop table public.faults")


@pytest.mark.soak
def test_everything_comes_back_from_the_escrow_file_and_the_store_alone(tmp_path: Path) -> None:
    (tmp_path / "state-of-before").mkdir()
    with own_stack(tmp_path / "state-of-before", dims=384) as stack:
        roll_out(stack)
        with connect(stack, "admin", "--direct") as connection:
            corpus.load(connection, 384, chosen=corpus.of_user(corpus.USERS[40]))
        before = fingerprints(stack)
        passwords = {role: stack.dsn(role) for role in ("app", "service", "readonly")}
        stack.memharbor("backup", "create", "--type", "full")
        kept = tmp_path / "key-escrow.json"
        shutil.copyfile(ROOT / ".memharbor" / stack.name / "key-escrow.json", kept)
        lose_the_machine(stack)
        (tmp_path / "new-machine").mkdir()
        stack.environ |= {
            name: value
            for name, value in stack_environment(stack.name, tmp_path / "new-machine", dims=384).items()
            if name.startswith("PULUMI_")
        }
        said = follow(stack, RUNBOOKS / "new-machine.md", ESCROW=str(kept))
        assert "secrets of the escrow file taken" in said
        assert fingerprints(stack) == before
        assert {role: stack.dsn(role) for role in passwords} == passwords
        for role in passwords:
            with connect(stack, role) as connection:
                assert connection.execute("select 1").fetchone() == (1,)
        assert stack.memharbor("status").returncode == 0


def roll_out(stack: Stack) -> None:
    stack.run(str(BIN / "python"), "-c", ROLL_OUT, stack.name, "extension", "tables", "indexes", "policies")


def fingerprints(stack: Stack) -> list[Any]:
    with connect(stack, "admin", "--direct") as connection:
        return sorted(connection.execute("select * from memharbor.fingerprint_users()").fetchall())


def lose_the_machine(stack: Stack) -> None:
    """Delete all that is of a stack, on the engine and in the checkout, but the volume of the backup store."""
    client = docker.from_env(timeout=300)
    mine = {"label": f"memharbor.stack={stack.name}"}
    for each in client.containers.list(all=True, filters=mine):
        each.remove(force=True)
    for volume in client.volumes.list(filters=mine):
        if volume.name != f"{stack.name}-backup-store-0":
            volume.remove(force=True)
    for network in client.networks.list(filters=mine):
        network.remove()
    remove_files(stack.name)


@pytest.mark.soak
def test_a_store_that_is_full_stops_nothing_and_is_caught_up_with(tmp_path: Path) -> None:
    def small(name: str) -> None:
        client = docker.from_env()
        labels = {"memharbor.stack": name, "memharbor.service": "backup-store"}
        options = {"type": "tmpfs", "device": "tmpfs", "o": "size=60m,uid=10001,gid=10001,mode=0750"}
        volume = client.volumes.create(f"{name}-backup-store-0", driver="local", driver_opts=options, labels=labels)
        # Memory keeps it only as long as somebody has it mounted, and is not filled from the image.
        client.containers.run(
            Settings().base_image,
            ["sh", "-c", "mkdir /data/buckets /data/versions /data/iam && exec sleep infinity"],
            user="10001:10001",
            labels=labels,
            volumes={volume.name: {"bind": "/data", "mode": "rw"}},
            network_mode="none",
            init=True,
            detach=True,
        )

    with own_stack(tmp_path, small) as stack:
        roll_out(stack)
        store = container(stack, "backup-store-0")
        stack.memharbor("backup", "create", "--type", "full")
        before = stack.backup_ids()
        store.exec_run(["sh", "-c", "cat /dev/zero > /data/ballast"])
        write(stack, segments=3)
        wait_until(lambda: bool(archive(stack)["is_failing"]), "the archiver's failure", 180)
        assert archive(stack)["waiting_segments"] >= 3
        done = stack.memharbor("backup", "create", "--type", "full", check=False)
        assert done.returncode == 6
        # Which comes first: its own files are refused, or the WAL that it needs does not arrive.
        assert re.search("Insufficient Storage|unable to push WAL file|was not archived before", done.stderr), (
            done.stderr
        )
        assert stack.backup_ids() == before
        write(stack)
        store.exec_run(["rm", "/data/ballast"])
        write(stack)
        wait_until(lambda: archive(stack)["waiting_segments"] == 0, "the archive", 240)
        stack.memharbor("backup", "create")
