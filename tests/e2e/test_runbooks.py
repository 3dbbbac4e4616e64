"""
Every runbook, step by step, on a stack to which it has happened.

But `docs/runbooks/new-machine.md`, which needs a stack that it may lose: test_backup_store_faults.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import docker
import psycopg
import pytest

from tests import corpus
from tests.e2e.conftest import ROOT, Stack
from tests.e2e.crashes import wait_until_healthy
from tests.e2e.pages import RUNBOOKS, follow

pytestmark = pytest.mark.timeout(1800)

USER, OTHER = corpus.USERS[40], corpus.USERS[41]


def connect(stack: Stack) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True)


def fingerprints(stack: Stack) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Of every user's rows but the audit trail, which a restore of one user writes on."""
    with connect(stack) as connection:
        rows = connection.execute(
            "select * from memharbor.fingerprint_users() where table_name <> 'memory_history'"
        ).fetchall()
    return {(user, table): tuple(rest) for user, table, *rest in rows}


def moment(stack: Stack) -> str:
    with connect(stack) as connection:
        row = connection.execute(
            "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
        ).fetchone()
        # Something is committed after it, as in life.
        connection.execute("select pg_current_xact_id()")
    assert row is not None
    return str(row[0])


@pytest.fixture(scope="module", autouse=True)
def two_users(stack: Stack) -> Iterator[None]:
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories where user_id = any (%s)", ([USER, OTHER],))
        corpus.load(connection, 384, chosen=[*corpus.of_user(USER), *corpus.of_user(OTHER)])
    stack.memharbor("backup", "create", "--type", "full")
    yield
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories where user_id = any (%s)", ([USER, OTHER],))


def digest(user_id: str) -> str:
    return sha256(user_id.encode()).hexdigest()


def test_every_runbook_is_run() -> None:
    tests = (Path(__file__), Path(__file__).with_name("test_backup_store_faults.py"))
    followed = {name for test in tests for name in re.findall(r'RUNBOOKS / "([a-z-]+\.md)"', test.read_text())}
    pages = {page.name for page in RUNBOOKS.glob("*.md")} - {"README.md"}
    assert pages == followed, "a runbook that no test follows"
    index = (RUNBOOKS / "README.md").read_text()
    assert {page for page in pages if f"({page})" not in index} == set()


def test_before_a_mistake(stack: Stack) -> None:
    expected, before = fingerprints(stack), moment(stack)
    with connect(stack) as connection:
        connection.execute('update memharbor.memories set payload = payload || \'{"data": "overwritten"}\'')
        connection.execute("delete from memharbor.memories where user_id = %s", (OTHER,))
    assert fingerprints(stack) != expected
    said = follow(stack, RUNBOOKS / "before-a-mistake.md", BEFORE=before)
    assert fingerprints(stack) == expected
    assert "it can be undone by: memharbor restore --name memharbor-before-restore-" in said


def test_one_user(stack: Stack) -> None:
    expected, before = fingerprints(stack), moment(stack)
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories where user_id = %s and id::text < '8'", (USER,))
        connection.execute(
            'update memharbor.memories set payload = payload || \'{"data": "wrong"}\' where user_id = %s', (USER,)
        )
        connection.execute(
            'update memharbor.memories set payload = payload || \'{"data": "later"}\' where user_id = %s', (OTHER,)
        )
    others = fingerprints(stack)
    follow(stack, RUNBOOKS / "one-user.md", USER_ID=USER, BEFORE=before)
    after = fingerprints(stack)
    assert after[digest(USER), "memories"] == expected[digest(USER), "memories"]
    assert after[digest(OTHER), "memories"] == others[digest(OTHER), "memories"] != expected[digest(OTHER), "memories"]


def test_a_lost_key(stack: Stack, tmp_path: Path) -> None:
    escrow = ROOT / ".memharbor" / stack.name / "key-escrow.json"
    stack.memharbor("stack", "init")  # what other files have set in the meantime is in it, too
    held = sha256(escrow.read_bytes()).hexdigest()
    escrow.unlink()
    follow(stack, RUNBOOKS / "lost-key.md", KEEP=str(tmp_path))
    assert sha256(escrow.read_bytes()).hexdigest() == held, "never shown: it holds secrets"
    assert escrow.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob("memharbor-*/manifest.json"))


def test_a_store_that_takes_nothing(stack: Stack) -> None:
    # Down, not full: to PostgreSQL both are an archive that takes nothing. A disk that is full for real is in
    # test_backup_store_faults.py.
    with closing(docker.from_env(timeout=120)) as client:
        store = client.containers.get(f"{stack.name}-backup-store-0")
        store.stop()
        try:
            with connect(stack) as connection:
                connection.execute("create table if not exists public.waiting (number int)")
                connection.execute("insert into public.waiting values (1)")
                connection.execute("select pg_switch_wal()")
                connection.execute("drop table public.waiting")
            said = stack.memharbor("status", check=False)
            assert said.returncode == 10
        finally:
            store.start()
    wait_until_healthy(stack)
    follow(stack, RUNBOOKS / "store-full.md")
    assert stack.json("status")["archive"]["waiting_segments"] == 0


@contextmanager
def damaged_backup(stack: Stack) -> Iterator[str]:
    """The newest backup with one byte of its largest file flipped, in the store's own volume."""
    newest = stack.json("backup", "list")[-1]["id"]
    flip = (
        f'file=$(find /data/buckets/*/pgbackrest/{stack.name}/backup/main/{newest} -type f ! -name "backup.manifest*"'
        ' -printf "%s %p\\n" | sort -rn | head -1 | cut -d" " -f2-); '
        'printf \'\\377\\000\\377\' | dd of="$file" bs=1 seek=$(( $(stat -c %s "$file") / 2 )) conv=notrunc status=none'
    )
    with closing(docker.from_env(timeout=120)) as client:
        store = client.containers.get(f"{stack.name}-backup-store-0")
        done = store.exec_run(["sh", "-c", flip])
        assert done.exit_code == 0, done.output
    yield newest


def test_a_failed_drill(stack: Stack) -> None:
    stack.memharbor("backup", "create", "--type", "full")
    with damaged_backup(stack) as backup_id:
        done = stack.memharbor("drill", check=False)
        assert done.returncode != 0
        follow(stack, RUNBOOKS / "failed-drill.md")
        listed = {each["id"]: each for each in stack.json("backup", "list")}
        assert not listed.get(backup_id, {}).get("verified")
        assert list(listed.values())[-1]["verified"]


def test_erase_a_user(stack: Stack) -> None:
    before = moment(stack)
    others = fingerprints(stack)
    follow(stack, RUNBOOKS / "erase-a-user.md", USER_ID=USER, REASON="request 4711")
    after = fingerprints(stack)
    assert {key for key in after if key[0] == digest(USER)} == set()
    assert after == {key: value for key, value in others.items() if key[0] != digest(USER)}
    # And no restore brings them back.
    stack.memharbor("restore", "--at", before, "--yes")
    assert fingerprints(stack) == after
