"""
The main job, in order, on a freshly provisioned stack: stand up, roll out, use, back up, wreck, restore, use again.

One story in numbered steps: each test needs the ones before it, so the file runs in its own order.
"""

from __future__ import annotations

import gzip
import json
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import psycopg
from psycopg import sql

from memharbor.stack.secrets import parse_secrets
from memharbor.validation.probe import PROBE_PREFIX
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


def containers_of(stack: Stack) -> dict[str, dict[str, Any]]:
    """What the engine says of each container of the stack, stopped ones included, by its name in the stack."""
    with closing(docker.from_env()) as client:
        found = client.containers.list(all=True, filters={"label": f"memharbor.stack={stack.name}"})
        return {str(container.name).removeprefix(f"{stack.name}-"): container.attrs for container in found}


# What a refused restore must leave as it is: the server, its history, every relation and every row of a witness.
SERVER_STATE = """
select pg_postmaster_start_time(), (select system_identifier from pg_control_system()),
  (select timeline_id from pg_control_checkpoint()),
  (select md5(string_agg(md5(row(oid, relname, relnamespace, relfilenode)::text), '' order by oid)) from pg_class),
  (select md5(string_agg(md5(witness::text), '' order by number)) from public.witness)
"""


def server_state(stack: Stack) -> tuple[object, ...]:
    with connect(stack, "admin", "--direct") as connection:
        row = connection.execute(SERVER_STATE).fetchone()
    assert row is not None
    assert None not in row
    return tuple(row)


def rows_with(connection: psycopg.Connection[Any], text: str) -> dict[str, int]:
    """Count the rows of every table of ours that hold a text in any column."""
    tables = connection.execute(
        "select relname from pg_class where relnamespace = 'memharbor'::regnamespace and relkind in ('r', 'p')"
    ).fetchall()
    counts = {}
    for (table,) in tables:
        query = sql.SQL("select count(*) from memharbor.{} as t where strpos(t::text, %s) > 0")
        ((counts[table],),) = connection.execute(query.format(sql.Identifier(table)), (text,)).fetchall()
    return counts


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
    assert stack.backup_ids()[0] == backup["id"]
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
        connection.execute(
            "create table public.witness as select number, md5(number::text) from generate_series(1, 5000) number"
        )
    state, backups = server_state(stack), stack.json("backup", "list")
    started = {name: attrs["State"]["StartedAt"] for name, attrs in containers_of(stack).items()}
    with waiting_client(stack) as waits:
        for arguments, code, said in (
            (("--name", "no-such-point"), 9, "there is no restore point `no-such-point`"),
            (("--at", "2020-01-01T00:00:00Z"), 9, "what can be restored begins at"),
            (("--at", "2020-01-01"), 2, "has no time zone"),
            (("--at", "2999-01-01T00:00:00Z"), 2, "lies in the future"),
            (("--at", "2020-01-01T00:00:00Z", "--name", POINT), 2, "exclude each other"),
        ):
            done = stack.memharbor("restore", *arguments, "--yes", check=False)
            assert (done.returncode, said in done.stderr) == (code, True), done.stderr
        done = stack.memharbor("restore", "--name", POINT, check=False)
        assert (done.returncode, "needs a confirmation" in done.stderr) == (2, True), done.stderr
    assert server_state(stack) == state
    assert stack.json("backup", "list")[: len(backups)] == backups
    assert {name: attrs["State"]["StartedAt"] for name, attrs in containers_of(stack).items()} == started
    # The pool answered all along, and lets new clients in.
    assert len(waits) > 10
    with connect(stack, "service") as connection:
        assert connection.execute("select 1").fetchone() == (1,)


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
    assert user_hashes(stack) == story["hashes"], "validate and the quickstart touch no other user's memories"
    with connect(stack, "admin", "--direct") as connection:
        left = rows_with(connection, PROBE_PREFIX)
        assert set(left) >= {"memories", "entities", "memory_relationships", "memory_history"}
        assert set(left.values()) == {0}, f"validate left rows behind: {left}"
        # The question itself can find something.
        with connection.transaction(force_rollback=True):
            connection.execute(
                "insert into memharbor.memories (payload) values (jsonb_build_object('user_id', %s::text, 'data', 'x'))",
                (f"{PROBE_PREFIX}control",),
            )
            assert rows_with(connection, PROBE_PREFIX)["memories"] == 1


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
    story["backups"] = stack.backup_ids()
    assert [story["backup"]["id"], created[0]["id"]] == [story["backups"][0], story["backups"][-1]]
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


def test_14_a_stack_that_was_down_has_all_its_data(stack: Stack) -> None:
    command = ("pulumi", "destroy", "--yes", "--skip-preview", "--exclude-protected", "--stack", stack.name)
    assert " ".join(command) in stack.run("make", "-n", "down", f"STACK={stack.name}").stdout
    begun_at = time.monotonic()
    stack.run(*command)
    assert containers_of(stack) == {}
    with closing(docker.from_env()) as client:
        kept = {v.name for v in client.volumes.list(filters={"label": f"memharbor.stack={stack.name}"})}
    assert kept >= {f"{stack.name}-postgres-0", f"{stack.name}-backup-store-0"}
    stack.up()
    story["down_and_up_seconds"] = round(time.monotonic() - begun_at, 1)
    assert user_hashes(stack) == story["hashes"]
    done = stack.playbook()
    assert re.search(r"changed=0\b.*failed=0\b", done.stdout), done.stdout
    assert stack.backup_ids()[: len(story["backups"])] == story["backups"]
    stack.memharbor("validate")


def secrets_of(stack: Stack) -> dict[str, str]:
    """Everything that is secret of the stack, by a name that may be said."""
    held = parse_secrets(stack.run("pulumi", "config", "get", "memharbor:secrets", "--stack", stack.name).stdout)
    found = {f"password of {role}": password for role, password in held.passwords.items()}
    found |= {f"key {name} of the store": key for name, key in held.store_secrets.items()}
    found["passphrase of the repository"] = held.repository_passphrase
    found["passphrase of the config"] = Path(stack.environ["PULUMI_CONFIG_PASSPHRASE_FILE"]).read_text()
    for name, pair in {"the CA": held.authority, **held.certificates}.items():
        # Line by line: wherever it stands, its line ends may be spelled in another way.
        lines = [line for line in pair.key.splitlines() if len(line) > 40 and not line.startswith("-----")]
        found |= {f"private key of {name}, line {number}": line for number, line in enumerate(lines)}
    assert min(map(len, found.values())) > 20
    return found


def said_by_commands(stack: Stack) -> Iterator[tuple[str, str]]:
    name = ("--stack", stack.name)
    for command in (
        ("ansible-playbook", "ansible/playbooks/site.yml", "--diff", "-vvv"),
        ("memharbor", "stack", "init"),
        ("memharbor", "stack", "show"),
        ("memharbor", "stack", "inventory"),
        ("memharbor", "settings", "show"),
        ("memharbor", "schema", "history"),
        ("memharbor", "status"),
        ("memharbor", "doctor"),
        ("memharbor", "validate"),
        ("memharbor", "backup", "list"),
        ("pulumi", "stack", "output", "--json", *name),
        ("pulumi", "stack", "export", *name),
        ("pulumi", "config", *name),
        ("pulumi", "preview", "--diff", *name),
    ):
        done = stack.run(*command)
        yield f"`{' '.join(command)}`", done.stdout + done.stderr
        if command[0] == "memharbor":
            yield f"`{' '.join(command)} --output json`", stack.run(*command, "--output", "json").stdout


def said_by_containers(stack: Stack) -> Iterator[tuple[str, str]]:
    with closing(docker.from_env()) as client:
        found = client.containers.list(all=True, filters={"label": f"memharbor.stack={stack.name}"})
        for container in found:
            yield f"`docker inspect {container.name}`", json.dumps(container.attrs)
            if container.attrs["HostConfig"]["RestartPolicy"]["Name"] != "no":
                yield f"`docker logs {container.name}`", container.logs().decode(errors="replace")
            if container.status == "running":
                yield (
                    f"arguments of the processes in {container.name}",
                    json.dumps(container.top(ps_args="-eo pid,args")["Processes"]),
                )
    with connect(stack, "admin", "--direct") as connection:
        connection.execute("select pg_stat_clear_snapshot()")
        queries = connection.execute("select query from pg_stat_activity").fetchall()
    yield "pg_stat_activity", "\n".join(query or "" for (query,) in queries)


def said_in_files(stack: Stack) -> Iterator[tuple[str, str]]:
    state = Path(stack.environ["PULUMI_BACKEND_URL"].removeprefix("file://"))
    # The one file whose purpose is to hold them: nobody else reads it, and git does not take it.
    escrow = ROOT / ".memharbor" / stack.name / "key-escrow.json"
    assert stat.S_IMODE(escrow.stat().st_mode) == 0o600
    stack.run("git", "check-ignore", "--quiet", str(escrow))
    for path in [*state.rglob("*"), ROOT / f"Pulumi.{stack.name}.yaml", *(ROOT / ".memharbor" / stack.name).rglob("*")]:
        if path.is_file() and path != escrow:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            yield str(path), content.decode(errors="replace")


def test_15_no_secret_is_seen_in_arguments_environment_logs_or_state(stack: Stack) -> None:
    held = secrets_of(stack)
    assert len(held) > 9 + 3 + 2 + 4
    # Its logs begin with the last `up`: restores and backups, too, are to have been said.
    stack.memharbor("backup", "create")
    # A server that writes every statement down, and a password that the playbook has to set.
    with connect(stack, "admin", "--direct") as connection:
        connection.execute("alter role postgres set log_statement = 'all'")
        connection.execute("alter role memharbor_app password 'drifted'")
    try:
        said = [*said_by_commands(stack), *said_by_containers(stack), *said_in_files(stack)]
    finally:
        with connect(stack, "admin", "--direct") as connection:
            connection.execute("alter role postgres reset log_statement")
    places = dict(said)
    assert re.search("(?i)alter role .*memharbor_app.* password", places[f"`docker logs {stack.name}-postgres-0`"])
    with connect(stack, "app") as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    assert any(path.endswith(f"/{stack.name}.json") and "memharbor:" in text for path, text in said), "no state file"
    empty = [place for place, text in said if not text.strip() and place.startswith("`memharbor")]
    assert empty == []
    seen = [f"{name} in {place}" for place, text in said for name, secret in held.items() if secret in text]
    assert seen == []
    # And what is looked for is what is really used.
    assert held["password of app"] in stack.dsn("app")


def test_16_figures_are_said(stack: Stack, record_testsuite_property: Callable[[str, object], None]) -> None:
    """Into the JUnit report and the terminal; nothing is asserted of a time."""
    with connect(stack, "admin", "--direct") as connection:
        size = connection.execute("select pg_size_pretty(pg_database_size(current_database()))").fetchone()
    figures: dict[str, object] = {name: value for name, value in story.items() if "second" in name}
    figures |= {"database": size, **stack.seconds}
    record_testsuite_property("figures", json.dumps(figures, default=str))
    assert story["rows_per_second"] > 0
