"""The off-site copy and the custodian on a whole stack: a lost store, a lost machine, a stolen backup key."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import docker
import psycopg
import pytest

from memharbor.backup.rows import DatabaseRows, differences, fingerprint
from memharbor.server_files.postgres import STORE_BUCKET, STORE_PORT
from tests.containers import ThrowAway, throw_away
from tests.e2e.conftest import ROOT, Stack

pytestmark = pytest.mark.timeout(1800)

USER = "offsite-user"
OFFSITE_SETTINGS = ("offsite_endpoint", "offsite_bucket", "offsite_ca_certificate")
OFFSITE_KEYS = ("offsite_access_key", "offsite_secret_key")

# What somebody does who has pgBackRest's key: overwrite, delete, and try every version. Runs where boto3 is; the key
# comes by stdin's stead, an environment variable of this one process.
THEFT = """
import collections, json, os
from memharbor_custodian.errors import CustodianError
from memharbor_custodian.places import Place, connect
place = Place("store", connect("https://backup-store:7070", "us-east-1", ("pgbackrest", os.environ["STOLEN"]),
              "/etc/memharbor/tls/ca.crt"), os.environ["BUCKET"])
keys = sorted(place.objects())
for key in keys[::5]:
    place.write(key, b"ransom")
deleted = place.delete(keys)
outcomes = collections.Counter()
for entry in place.entries():
    try:
        place.delete_entries([entry])
        outcomes["deleted"] += 1
    except CustodianError as exc:
        outcomes["denied" if "AccessDenied" in exc.message else exc.message] += 1
print(json.dumps({"objects": deleted, "left": len(place.objects()), **outcomes}))
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with closing(docker.from_env(timeout=120)) as client:
        yield client


@pytest.fixture(scope="module")
def elsewhere(stack: Stack, engine: Any) -> Iterator[ThrowAway]:
    """A second S3 service with a CA of its own, which the stack's network leads to; the stack copies to it."""
    with throw_away(engine) as run:
        store = run.backup_store()
        alias = f"{run.name}-backup-store-0"
        (network,) = engine.containers.get(f"{stack.name}-custodian-0").attrs["NetworkSettings"]["Networks"]
        engine.networks.get(network).connect(store, aliases=[alias])
        plain = (f"https://{alias}:{STORE_PORT}", STORE_BUCKET, run.secrets.authority.certificate)
        key = ("custodian", run.secrets.store_secrets["custodian"])
        options = [f"--plaintext={name}={value}" for name, value in zip(OFFSITE_SETTINGS, plain, strict=True)]
        options += [f"--secret={name}={value}" for name, value in zip(OFFSITE_KEYS, key, strict=True)]
        stack.run("pulumi", "config", "set-all", "--stack", stack.name, *options)
        stack.up()
        try:
            yield run
        finally:
            stack.run("pulumi", "config", "rm-all", "--stack", stack.name, *OFFSITE_SETTINGS, *OFFSITE_KEYS)
            stack.up()


def offsite_store(engine: Any, run: ThrowAway) -> Any:
    return engine.containers.get(f"{run.name}-backup-store-0")


def connect(stack: Stack) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True)


def state(stack: Stack) -> Any:
    with connect(stack) as connection:
        return fingerprint(DatabaseRows(connection))


def add_rows(stack: Stack, count: int) -> None:
    with psycopg.connect(stack.dsn("service")) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "insert into memharbor.memories (id, embedding, payload)"
            " values (gen_random_uuid(), (select array_agg(random())::vector(384) from generate_series(1, 384) where %s > 0), %s)",
            [(1, json.dumps({"user_id": USER, "data": f"memory {number}"})) for number in range(count)],
        )


def archive_everything(stack: Stack) -> None:
    """Let PostgreSQL write its segment out, and wait until the store has it."""
    with connect(stack) as connection:
        row = connection.execute("select pg_walfile_name(pg_switch_wal()) from pg_create_restore_point('x')").fetchone()
        assert row is not None
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            last = connection.execute("select last_archived_wal from pg_stat_archiver").fetchone()
            if last is not None and last[0] is not None and last[0] >= row[0]:
                return
            time.sleep(0.2)
    pytest.fail(f"{row[0]} was not archived within 90 seconds")


def lose(stack: Stack, engine: Any, *names: str) -> None:
    """Containers and volumes are gone, as with a disk."""
    for name in names:
        engine.containers.get(f"{stack.name}-{name}").remove(force=True)
        engine.volumes.get(f"{stack.name}-{name}").remove(force=True)


def test_the_key_of_the_copy_is_only_in_the_custodian_and_encrypted_in_the_config(
    stack: Stack, elsewhere: ThrowAway, engine: Any
) -> None:
    secret = elsewhere.secrets.store_secrets["custodian"]
    assert secret not in (ROOT / f"Pulumi.{stack.name}.yaml").read_text()
    state_folder = Path(stack.environ["PULUMI_BACKEND_URL"].removeprefix("file://"))
    files = [path for path in state_folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    custodians = [secret, elsewhere.secrets.store_secrets["custodian"]]
    for service in ("postgres-0", "pgbouncer-0", "custodian-0"):
        container = engine.containers.get(f"{stack.name}-{service}")
        assert secret not in str(container.attrs)
        found = container.exec_run(["sh", "-c", "cat $(find -L /etc/memharbor -type f)"]).output.decode()
        assert len(found) > 500
        assert any(key in found for key in custodians) == (service == "custodian-0"), service


def test_the_copy_is_in_step_and_another_one_has_nothing_to_do(stack: Stack, elsewhere: ThrowAway) -> None:
    add_rows(stack, 50)
    stack.memharbor("backup", "create", "--type", "full")
    add_rows(stack, 5)
    archive_everything(stack)
    assert stack.json("backup", "offsite", "copy", "--dry-run")["copied"] > 0
    assert stack.json("backup", "offsite", "copy")["copied"] > 0
    assert stack.json("backup", "offsite", "copy")["copied"] == 0
    status = stack.json("backup", "offsite", "status")
    assert status["offsite"]["waiting_objects"] == 0
    assert status["copy"]["last_good_at"]


def test_a_copy_that_is_down_does_not_hold_up_archiving_and_catches_up(
    stack: Stack, elsewhere: ThrowAway, engine: Any
) -> None:
    offsite_store(engine, elsewhere).stop()
    failed = stack.memharbor("backup", "offsite", "copy", check=False)
    assert failed.returncode == 4, failed.stderr
    assert "off-site copy" in failed.stderr
    begun_at = time.monotonic()
    for _ in range(3):
        archive_everything(stack)
    assert time.monotonic() - begun_at < 30
    assert "cannot" in stack.memharbor("backup", "offsite", "status").stdout
    assert stack.memharbor("status", check=False).returncode == 0, "the stack itself is well"
    store = offsite_store(engine, elsewhere)
    store.start()
    elsewhere.wait(store)
    assert stack.json("backup", "offsite", "copy")["copied"] >= 3


@pytest.mark.soak
def test_after_a_lost_store_the_copy_fills_a_new_one_and_backups_go_on(
    stack: Stack, elsewhere: ThrowAway, engine: Any
) -> None:
    stack.memharbor("backup", "create", "--type", "full")
    stack.memharbor("backup", "offsite", "copy")
    before = stack.backup_ids()
    lose(stack, engine, "backup-store-0")
    stack.up("--refresh")
    # What the running server does by itself: a new stanza, which the copy must not follow.
    add_rows(stack, 3)
    refused = stack.memharbor("backup", "offsite", "copy", check=False)
    assert refused.returncode == 9, refused.stderr
    assert "fetch" in refused.stderr
    stack.memharbor("backup", "offsite", "fetch", "--yes")
    assert stack.backup_ids()[: len(before)] == before
    stack.memharbor("backup", "create", "--type", "full")
    archive_everything(stack)
    stack.memharbor("backup", "offsite", "copy")


def test_a_lost_machine_is_restored_from_the_copy_alone(stack: Stack, elsewhere: ThrowAway, engine: Any) -> None:
    add_rows(stack, 7)
    archive_everything(stack)
    stack.memharbor("backup", "offsite", "copy")
    before = state(stack)
    assert len(before) >= 1
    lose(stack, engine, "postgres-0", "backup-store-0")
    stack.up("--refresh")
    stack.memharbor("backup", "offsite", "fetch", "--yes")
    stack.memharbor("restore", "--yes")
    assert differences(before, state(stack)) == []
    stack.memharbor("backup", "create", "--type", "full")
    archive_everything(stack)


def test_a_stolen_backup_key_destroys_nothing_for_good(stack: Stack, engine: Any) -> None:
    add_rows(stack, 2)
    archive_everything(stack)
    before = state(stack)
    backups = stack.backup_ids()
    stolen = engine.containers.get(f"{stack.name}-postgres-0").exec_run(
        ["sed", "-n", "s/^repo1-s3-key-secret=//p", "/etc/memharbor/pgbackrest/conf.d/secrets.conf"]
    )
    moment = stack.run("date", "-u", "+%Y-%m-%dT%H:%M:%S.%6NZ").stdout.strip()
    done = engine.containers.get(f"{stack.name}-custodian-0").exec_run(
        ["python3", "-c", THEFT],
        workdir="/usr/local/lib/memharbor",
        environment={"STOLEN": stolen.output.decode().strip(), "BUCKET": STORE_BUCKET},
    )
    assert done.exit_code == 0, done.output.decode()
    outcome = json.loads(done.output.decode().splitlines()[-1])
    assert outcome["objects"] > 15
    assert outcome["left"] == 0
    assert outcome["denied"] > outcome["objects"]
    assert set(outcome) == {"objects", "left", "denied"}, "a version was deleted for good"

    alarm = stack.memharbor("backup", "purge", "--yes", check=False)
    assert alarm.returncode == 9, "what is to be brought back is not purged"
    report = stack.json("backup", "undelete", "--at", moment, "--yes")
    assert report["brought_back"] >= outcome["objects"] - 5
    assert stack.backup_ids()[: len(backups)] == backups
    stack.memharbor("restore", "--yes")
    assert differences(before, state(stack)) == []
    archive_everything(stack)
