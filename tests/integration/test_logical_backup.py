"""Logical backups of a live database: whole, incremental, encrypted, damaged, killed, in S3, and back again bit for bit."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import docker
import psycopg
import pyrage
import pytest
from mem0.memory.storage import SQLiteManager

from memharbor.backup.logical import snapshot
from memharbor.backup.logical_format import MANIFEST, SUMS
from memharbor.backup.rows import differences, fingerprint
from memharbor.backup.selection import Choice, fingerprint_rows, read_tables
from memharbor.errors import ConfigError
from memharbor.server_files.postgres import STORE_BUCKET, STORE_PORT
from tests import corpus
from tests.command_line import memharbor, ok, refused
from tests.containers import Server, throw_away
from tests.schema_databases import DIMS, admin_connection, scratch_database
from tests.user_rows import USERS, add_user, memories_of, memory_id, populate, state, wipe

Admin = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def template(server: Server) -> Iterator[str]:
    """A database in which every user has rows in every table."""
    with scratch_database(server) as name:
        with closing(admin_connection(server, name)) as connection:
            populate(connection, DIMS)
        yield name


@pytest.fixture
def database(server: Server, template: str) -> Iterator[str]:
    with closing(admin_connection(server)) as connection:
        name = f"{template}_copy"
        connection.execute(f"drop database if exists {name} with (force)")
        connection.execute(f"create database {name} template {template}")
        yield name
        connection.execute(f"drop database {name} with (force)")


@pytest.fixture
def dsn(server: Server, database: str) -> str:
    return server.admin_dsn(database)


@pytest.fixture
def admin(server: Server, database: str) -> Iterator[Admin]:
    with closing(admin_connection(server, database)) as connection:
        yield connection


@pytest.fixture
def empty(server: Server) -> Iterator[str]:
    """Another database with the schema and no rows."""
    with scratch_database(server) as name:
        yield server.admin_dsn(name)


def whole(dsn: str, folder: Path, *options: str, **environ: str) -> str:
    place: str = ok(dsn, "backup", "create", "--type", "logical", "--destination", str(folder), *options, **environ)[
        "place"
    ]
    return place


def state_of(dsn: str) -> Any:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        return state(connection)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_its_digests_are_those_of_the_function_in_the_database(admin: Admin) -> None:
    with snapshot(admin) as rows:
        found = fingerprint_rows(rows, [(table, Choice().query(table)) for table in read_tables(rows)])
        assert {(each.user_sha256, each.table): each for each in found} == fingerprint(rows)
    assert len(found) > 6 * len(USERS) - 1


def test_a_user_has_the_same_digests_alone_as_among_all(admin: Admin) -> None:
    everybody = state(admin)
    for user in USERS:
        with snapshot(admin) as rows:
            found = fingerprint_rows(rows, [(t, Choice(user).query(t)) for t in read_tables(rows) if not t.is_shared])
        mine = {(each.user_sha256, each.table): each for each in found if each.user_sha256}
        assert mine == {key: everybody[key] for key in mine}
        assert len(mine) == 6


def test_the_manifest_names_no_user_and_vouches_for_every_file(dsn: str, tmp_path: Path, admin: Admin) -> None:
    place = Path(whole(dsn, tmp_path))
    text = (place / MANIFEST).read_text()
    assert not any(user in text for user in USERS)
    manifest = json.loads(text)
    assert manifest["format"] == 1
    assert set(manifest["versions"]) == {"memharbor", "postgresql", "pgvector"}
    assert [[f.user_sha256, f.table, f.rows, f.digest] for _, f in sorted(state(admin).items())] == sorted(
        manifest["fingerprints"]
    )
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {line.split()[1] for line in (place / SUMS).read_text().splitlines()} == {
        path.name for path in place.iterdir()
    } - {SUMS}
    assert {oct(path.stat().st_mode & 0o777) for path in [place, *place.iterdir()]} == {"0o700", "0o600"}


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_whole_backup_fills_an_empty_database_bit_for_bit(dsn: str, empty: str, tmp_path: Path) -> None:
    place = whole(dsn, tmp_path)
    before = state_of(empty)
    foretold = ok(empty, "backup", "restore", place, "--dry-run")
    assert state_of(empty) == before
    done = ok(empty, "backup", "restore", place, "--yes")
    assert differences(state_of(dsn), state_of(empty)) == []
    assert {**foretold, "dry_run": False} == done
    assert done["inserted"] == sum(each.rows for each in state_of(dsn).values())
    with closing(psycopg.connect(empty)) as connection:
        (source, detail) = connection.execute("select source, detail from memharbor.migration_ledger").fetchone() or (
            "",
            {},
        )
        assert source == Path(place).name
        assert detail["tables"]["memories"]["inserted"] == 12 * len(USERS)


def test_the_audit_trail_keeps_its_order(dsn: str, empty: str, tmp_path: Path, admin: Admin) -> None:
    ok(empty, "backup", "restore", whole(dsn, tmp_path), "--yes")
    query = "select operation, old_value, new_value, user_id from public.memory_history order by memory_id, id"
    with closing(psycopg.connect(empty)) as connection:
        assert connection.execute(query).fetchall() == admin.execute(query).fetchall()


def test_a_database_with_memories_is_refused_unless_one_says_how(dsn: str, tmp_path: Path) -> None:
    place = whole(dsn, tmp_path)
    before = state_of(dsn)
    refused(9, r"it has 72 memories", dsn, "backup", "restore", place, "--yes")
    done = ok(dsn, "backup", "restore", place, "--yes", "--on-conflict", "skip")
    assert done["same"] == sum(each.rows for each in before.values())
    assert state_of(dsn) == before


def test_other_dimensions_are_refused(dsn: str, server: Server, tmp_path: Path) -> None:
    from tests.memory_database import memory_database

    place = whole(dsn, tmp_path)
    other = server.admin_dsn(memory_database(server, "logical_wide", 16))
    refused(9, r"vector\(8\) in the backup and vector\(16\)", other, "backup", "restore", place, "--yes")


def test_an_edge_comes_along_only_with_both_of_its_ends(dsn: str, empty: str, tmp_path: Path, admin: Admin) -> None:
    middle = corpus.memories()[6].created_at.isoformat()
    place = whole(dsn, tmp_path, "--from", middle)
    with closing(psycopg.connect(empty, autocommit=True)) as connection:
        done = ok(empty, "backup", "restore", place, "--yes")
        assert done["tables"]["memories"]["inserted"] == 6 * len(USERS)
        assert done["tables"]["memory_relationships"]["inserted"] == 5 * len(USERS)
        orphans = connection.execute(
            "select count(*) from memharbor.memory_relationships r where not exists"
            " (select from memharbor.memories m where m.id in (r.source_memory_id))"
        ).fetchone()
        assert orphans == (0,)


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "end", "per_user", "entities_per_user"),
    [("2024-01-01", "2024-01-01", 12, 3), ("2024-01-01T00:00:00Z", "2024-01-01T06:00:00+01:00", 6, 2)],
)
def test_a_range_of_time_holds_the_memories_that_were_made_in_it(
    dsn: str, empty: str, tmp_path: Path, admin: Admin, begin: str, end: str, per_user: int, entities_per_user: int
) -> None:
    ok(empty, "backup", "restore", whole(dsn, tmp_path, "--from", begin, "--to", end), "--yes")
    query = "select id, payload, embedding::text from memharbor.memories {} order by id"
    expected = admin.execute(
        query.format("where created_at >= %s and created_at < %s"),  # type: ignore[arg-type]
        (f"{begin[:10]}Z", "2024-01-02Z" if len(end) == 10 else end),
    ).fetchall()
    assert len(expected) == per_user * len(USERS)
    with closing(psycopg.connect(empty)) as connection:
        assert connection.execute(query.format("")).fetchall() == expected  # type: ignore[arg-type]
        linked = connection.execute("select count(*) from memharbor.entities").fetchone()
        assert linked == (entities_per_user * len(USERS),)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from", "2024-01-01T00:00:00"], "no time zone"),
        (["--from", "yesterday"], "not a time"),
        (["--since", "last", "--from", "2024-01-01"], "excludes"),
        (["--from", "2024-02-01", "--to", "2024-01-01"], "not before"),
        (["--destination", "ftp://x"], "no destination"),
    ],
)
def test_what_cannot_be_meant_is_a_wrong_command_line(dsn: str, options: list[str], said: str) -> None:
    refused(2, said, dsn, "backup", "create", "--type", "logical", *options)


def test_options_of_logical_backups_belong_to_them(dsn: str) -> None:
    refused(2, "`--user` belongs to `--type logical`", dsn, "backup", "create", "--type", "full", "--user", "alice")


def test_a_user_without_rows_is_refused(dsn: str, tmp_path: Path) -> None:
    refused(9, "has no rows", dsn, "user", "backup", "nobody", "--destination", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# --- chains -----------------------------------------------------------------------------------------------------------


def change(admin: Admin, step: int) -> None:
    """Change, add and delete, also what no timestamp tells."""
    admin.execute("delete from memharbor.memories where id = %s", (memory_id("alice", 3 + step),))
    admin.execute("update memharbor.memories set embedding = null where id = %s", (memory_id("bob", 5 + step),))
    admin.execute(
        "update memharbor.memories set payload = payload || %s where id = %s",
        (json.dumps({"data": f"changed {step}", "updated_at": "1999-01-01T00:00:00Z"}), memory_id("bob", 9)),
    )
    admin.execute("update memharbor.entities set payload = payload || '{\"n\": 1}' where payload ->> 'user_id' = 'bob'")
    corpus.load(admin, DIMS, chosen=memories_of("alice", 2, first=100 + 2 * step))
    admin.execute("update memharbor.categories set description = %s where name = 'work'", (f"step {step}",))
    if step == 0:
        wipe(admin, USERS[2])
    if step == 1:
        add_user(admin, DIMS, USERS[2], 5)


@pytest.fixture
def chain(dsn: str, tmp_path: Path, admin: Admin) -> list[str]:
    places = [whole(dsn, tmp_path)]
    for step in range(3):
        change(admin, step)
        places.append(whole(dsn, tmp_path, "--since", "last"))
    return places


def test_a_chain_brings_back_changes_deletions_and_additions(dsn: str, empty: str, chain: list[str]) -> None:
    ok(empty, "backup", "restore", chain[-1], "--yes")
    assert differences(state_of(dsn), state_of(empty)) == []


def test_an_incremental_backup_holds_what_changed_and_no_more(chain: list[str], dsn: str, tmp_path: Path) -> None:
    described = json.loads((Path(chain[2]) / MANIFEST).read_text())
    memories = next(table for table in described["tables"] if table["name"] == "memories")
    # Step 1: one deleted, an embedding and a text changed, two added, five of a user who came back.
    assert memories["gone"]["rows"] == 1
    assert memories["rows"]["rows"] == 2 + 2 + 5
    nothing = ok(dsn, "backup", "create", "--type", "logical", "--since", "last", "--destination", str(tmp_path))
    assert sum(nothing["rows"].values()) == nothing["gone"] == 0
    foretold = ok(
        dsn, "backup", "create", "--type", "logical", "--since", "last", "--destination", str(tmp_path), "--dry-run"
    )
    assert set(foretold["rows"].values()) == {0}


def test_a_backup_in_the_middle_of_a_chain_is_that_moment(chain: list[str], empty: str) -> None:
    ok(empty, "backup", "restore", chain[1], "--yes")
    expected = json.loads((Path(chain[1]) / MANIFEST).read_text())["fingerprints"]
    assert sorted([f.user_sha256, f.table, f.rows, f.digest] for f in state_of(empty).values()) == sorted(expected)


def test_since_a_time_builds_on_the_newest_backup_before_it(dsn: str, tmp_path: Path, admin: Admin) -> None:
    first = whole(dsn, tmp_path)
    taken_at = json.loads((Path(first) / MANIFEST).read_text())["taken_at"]
    second = whole(dsn, tmp_path)
    third = whole(dsn, tmp_path, "--since", taken_at)
    assert json.loads((Path(third) / MANIFEST).read_text())["parent"]["id"] == Path(first).name != Path(second).name
    refused(
        9, "no logical backup of the same rows taken at", dsn, "backup", "create", "--type", "logical", "--since",
        "2001-01-01", "--destination", str(tmp_path),
    )  # fmt: skip
    refused(
        9, "no logical backup of the same rows", dsn, "user", "backup", "alice", "--since", "last", "--destination",
        str(tmp_path),
    )  # fmt: skip


def test_a_chain_ends_where_columns_change(dsn: str, tmp_path: Path, admin: Admin) -> None:
    whole(dsn, tmp_path)
    admin.execute("alter table memharbor.org_members add column note text")
    refused(
        9, "has other columns now", dsn, "backup", "create", "--type", "logical", "--since", "last", "--destination",
        str(tmp_path),
    )  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_or_exchanged_link_is_refused(chain: list[str], empty: str, dsn: str) -> None:
    before = state_of(empty)
    middle = Path(chain[1])
    middle.rename(middle.with_name("aside"))
    refused(9, "builds on `.*`, which is not beside it", empty, "backup", "restore", chain[-1], "--yes")
    other = Path(whole(dsn, middle.parent / "elsewhere"))
    other.rename(middle)
    refused(9, "builds on another", empty, "backup", "restore", chain[-1], "--yes")
    assert state_of(empty) == before


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_refused_before_anything_is_written(dsn: str, empty: str, tmp_path: Path) -> None:
    place = Path(whole(dsn, tmp_path))
    before = state_of(empty)
    looked_at = sorted(place.iterdir())
    assert len(looked_at) == 3 + 2 * 8
    for path in looked_at:
        good = path.read_bytes()
        for position in (0, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            done = memharbor(empty, "backup", "restore", str(place), "--yes")
            assert getattr(done.exception, "exit_code", 0) == 7, (path.name, position, done.output, done.exception)
        path.write_bytes(good[:-1])
        assert getattr(memharbor(empty, "backup", "restore", str(place), "--yes").exception, "exit_code", 0) == 7
        path.unlink()
        assert getattr(memharbor(empty, "backup", "restore", str(place), "--yes").exception, "exit_code", 0) == 7
        path.write_bytes(good)
    assert state_of(empty) == before
    ok(empty, "backup", "restore", str(place), "--yes")


def test_rows_that_were_exchanged_with_their_sums_are_still_told_by_their_fingerprints(
    dsn: str, empty: str, tmp_path: Path, admin: Admin
) -> None:
    first = Path(whole(dsn, tmp_path))
    change(admin, 0)
    second = Path(whole(dsn, tmp_path))
    manifests = [json.loads((each / MANIFEST).read_text()) for each in (first, second)]
    manifests[0]["tables"] = manifests[1]["tables"]
    for file in second.glob("*.zst"):
        (first / file.name).write_bytes(file.read_bytes())
    (first / MANIFEST).write_text(json.dumps(manifests[0]))
    names = [line.split()[1] for line in (first / SUMS).read_text().splitlines()]
    sums = subprocess.run(["sha256sum", *names], cwd=first, capture_output=True, text=True, check=True).stdout
    (first / SUMS).write_text(sums)
    refused(7, "not those that its manifest has fingerprints of", empty, "backup", "restore", str(first), "--yes")


def test_a_killed_backup_is_never_taken_for_one_and_the_next_one_tidies_up(
    dsn: str, tmp_path: Path, empty: str, admin: Admin
) -> None:
    corpus.load(admin, DIMS, chosen=corpus.memories()[6000:14000])
    folder = tmp_path / "kept"
    good = whole(dsn, folder)
    command = [sys.executable, "-m", "memharbor", "backup", "create", "--type", "logical", "--destination", str(folder)]
    environ = {**os.environ, "MEMHARBOR_DSN": dsn, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (left := list(folder.glob("*.partial/memories.copy.zst"))):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    partial = left[0].parent
    assert partial.is_dir()
    refused(7, "no complete logical backup", empty, "backup", "restore", str(partial), "--yes")
    chained = whole(dsn, folder, "--since", "last")
    assert json.loads((Path(chained) / MANIFEST).read_text())["parent"]["id"] == Path(good).name
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(each).name for each in (good, chained))


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def identity(tmp_path: Path) -> tuple[str, Path]:
    made = pyrage.x25519.Identity.generate()
    path = tmp_path / "key.txt"
    path.write_text(f"# made for a test\n{made}\n")
    return str(made.to_public()), path


def test_an_encrypted_backup_is_opened_by_its_identity_only(
    dsn: str, empty: str, tmp_path: Path, identity: tuple[str, Path], admin: Admin
) -> None:
    recipient, key = identity
    recipients = tmp_path / "recipients.txt"
    recipients.write_text(f"# us\n{recipient}\n")
    place = Path(whole(dsn, tmp_path, "--recipients-file", str(recipients)))
    files = [path for path in place.iterdir() if path.name not in (MANIFEST, SUMS, "read.sql")]
    assert all(
        path.name.endswith(".zst.age") and path.read_bytes().startswith(b"age-encryption.org/v1") for path in files
    )
    import zstandard

    plain = pyrage.decrypt(
        (place / "memories.copy.zst.age").read_bytes(), [pyrage.x25519.Identity.from_str(key.read_text().split()[-1])]
    )
    assert zstandard.ZstdDecompressor().decompressobj().decompress(plain).startswith(b"PGCOPY\n\xff\r\n\0")
    refused(3, "the backup is encrypted", empty, "backup", "restore", str(place), "--yes")
    other = tmp_path / "other.txt"
    other.write_text(str(pyrage.x25519.Identity.generate()))
    refused(3, "no identity opens", empty, "backup", "restore", str(place), "--yes", "--identity-file", str(other))
    ok(empty, "backup", "restore", str(place), "--yes", "--identity-file", str(key))
    assert differences(state_of(dsn), state_of(empty)) == []


def test_an_encrypted_chain_needs_the_identity_to_grow(
    dsn: str, empty: str, tmp_path: Path, identity: tuple[str, Path], admin: Admin
) -> None:
    recipient, key = identity
    whole(dsn, tmp_path, "--recipient", recipient)
    change(admin, 0)
    arguments = (
        "backup",
        "create",
        "--type",
        "logical",
        "--since",
        "last",
        "--destination",
        str(tmp_path),
        "--recipient",
        recipient,
    )
    refused(3, "is encrypted", dsn, *arguments)
    place = ok(dsn, *arguments, "--identity-file", str(key))["place"]
    ok(empty, "backup", "restore", place, "--yes", "--identity-file", str(key))
    assert differences(state_of(dsn), state_of(empty)) == []


def test_a_wrong_recipient_is_said(dsn: str, tmp_path: Path) -> None:
    refused(
        3,
        "no age recipient",
        dsn,
        "backup",
        "create",
        "--type",
        "logical",
        "--recipient",
        "age1x",
        "--destination",
        str(tmp_path),
    )


# --- the page, with psql and zstd alone -------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "logical-backup-format.md"


def commands_of_the_page() -> list[str]:
    text = PAGE.read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


class Reader:
    """A machine with psql and zstd, and nothing of ours: the server's own container, and a folder in it."""

    def __init__(self, server: Server, database: str) -> None:
        self._server = server
        self.environ = f"DATABASE_URL='postgresql:///{database}?host=/run/postgresql'"

    def take(self, place: str) -> str:
        folder = f"/tmp/{Path(place).name}"
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(place, arcname=Path(place).name)
        encoded = base64.b64encode(packed.getvalue()).decode()
        self.run(f"mkdir -p {folder}", cwd="/")
        for begin in range(0, len(encoded), 60_000):
            self.run(f"printf %s {encoded[begin : begin + 60_000]} >> {folder}.tar.base64", cwd="/")
        self.run(f"base64 -d {folder}.tar.base64 | tar -x -C /tmp --no-same-owner", cwd="/")
        return folder

    def run(self, command: str, *, cwd: str) -> str:
        code, said = self._server.execute("postgres", ["sh", "-c", f"cd {cwd} && export {self.environ} && {command}"])
        assert code == 0, f"{command}\n{said}"
        return said


@pytest.fixture
def reader(server: Server) -> Iterator[Reader]:
    server.container("postgres")
    with closing(admin_connection(server)) as connection:
        connection.execute("drop database if exists read_by_hand with (force)")
        connection.execute("create database read_by_hand")
        yield Reader(server, "read_by_hand")
        connection.execute("drop database read_by_hand with (force)")


def read_back(server: Server, admin: Admin) -> Any:
    """Fingerprint what stands in schema `restored` of the reader's database."""
    with snapshot(admin) as rows:
        tables = read_tables(rows)
    with closing(admin_connection(server, "read_by_hand")) as connection, snapshot(connection) as rows:
        found = fingerprint_rows(rows, [(t, f"select {t.column_list} from restored.{t.name}") for t in tables])
    return {(each.user_sha256, each.table): each for each in found}


def test_the_page_reads_a_backup_without_our_code(
    server: Server, dsn: str, admin: Admin, tmp_path: Path, reader: Reader
) -> None:
    place = whole(dsn, tmp_path)
    folder = reader.take(place)
    # Each line in a shell of its own: what is exported holds for those after it.
    for command in commands_of_the_page():
        said = reader.run(command, cwd=folder)
        if command.startswith("export "):
            reader.environ += " " + command.removeprefix("export ")
        if "encode(sha256(" in command:
            manifest = json.loads((Path(place) / MANIFEST).read_text())
            table = "org_members" if "org_members" in command else "entities"
            expected = {
                (user, str(rows), digest) for user, name, rows, digest in manifest["fingerprints"] if name == table
            }
            assert {tuple(line.split("|")) for line in said.splitlines()} == expected
            assert len(expected) == len(USERS)
    assert reader.run("wc -l < alice.jsonl", cwd=folder).strip() == "12"
    assert differences(state(admin), read_back(server, admin)) == []


def test_the_page_reads_a_chain(server: Server, dsn: str, admin: Admin, tmp_path: Path, reader: Reader) -> None:
    (read,) = [command for command in commands_of_the_page() if "--file=read.sql" in command]
    folders = [reader.take(whole(dsn, tmp_path))]
    for step in range(2):
        change(admin, step)
        folders.append(reader.take(whole(dsn, tmp_path, "--since", "last")))
    for folder in folders:
        reader.run(read, cwd=folder)
    assert differences(state(admin), read_back(server, admin)) == []


# --- in a bucket ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A store that speaks S3 over TLS with a CA of its own, as the variables that AWS's tools read."""
    server.container("postgres")
    with closing(docker.from_env(timeout=120)) as engine, throw_away(engine) as run:
        try:
            store = run.backup_store()
        except ConfigError as exc:
            if os.environ.get("CI") == "true":
                pytest.fail(exc.message)
            pytest.skip(exc.message)
        authority = tmp_path_factory.mktemp("s3") / "ca.crt"
        authority.write_text(run.secrets.authority.certificate)
        yield {
            "AWS_ENDPOINT_URL": f"https://localhost:{run._address(store, STORE_PORT).rpartition(':')[2]}",
            "AWS_ACCESS_KEY_ID": "pgbackrest",
            "AWS_SECRET_ACCESS_KEY": run.secrets.store_secrets["pgbackrest"],
            "AWS_CA_BUNDLE": str(authority),
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "localhost",
        }


def test_a_chain_in_a_bucket(dsn: str, empty: str, admin: Admin, bucket: dict[str, str]) -> None:
    place = f"s3://{STORE_BUCKET}/mem0-backups/"
    create = ("backup", "create", "--type", "logical", "--destination", place)
    first = ok(dsn, *create, **bucket)["place"]
    assert first.startswith(place)
    change(admin, 0)
    second = ok(dsn, *create, "--since", "last", **bucket)
    assert second["parent"] == first.rpartition("/")[2]
    # A whole one for another choice of rows is nobody's parent here.
    mine = ok(dsn, "user", "backup", "bob", "--destination", place, **bucket)["place"]
    ok(empty, "backup", "restore", second["place"], "--yes", **bucket)
    assert differences(state_of(dsn), state_of(empty)) == []
    before = state(admin)
    wipe(admin, "bob")
    ok(dsn, "user", "restore", mine, "--yes", **bucket)
    assert differences(before, state(admin)) == []


def test_what_is_not_in_a_bucket_is_said(dsn: str, bucket: dict[str, str]) -> None:
    refused(9, "there is no backup", dsn, "backup", "restore", f"s3://{STORE_BUCKET}/x/y", "--yes", **bucket)
    refused(2, "names no backup", dsn, "backup", "restore", f"s3://{STORE_BUCKET}", "--yes", **bucket)
    create = ("backup", "create", "--type", "logical", "--destination")
    refused(6, "cannot write to", dsn, *create, "s3://another-bucket/", **bucket)
    wrong = {**bucket, "AWS_SECRET_ACCESS_KEY": "wrong"}  # pragma: allowlist secret
    refused(6, "cannot write to", dsn, *create, f"s3://{STORE_BUCKET}/", **wrong)


# --- Mem0's own history -----------------------------------------------------------------------------------------------


def add_history(path: Path, count: int, *, journal: str = "wal") -> Any:
    """Write a history with Mem0's own code; returns its manager, which has it open."""
    manager = SQLiteManager(str(path))
    manager.connection.execute(f"pragma journal_mode = {journal}")
    for number in range(count):
        manager.add_history(f"m{number}", None, f"text {number} 🐘", "ADD")
    return manager


def history_of(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("select * from history order by memory_id").fetchall()


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_mem0_s_history_comes_along_while_mem0_writes_and_goes_back(
    dsn: str, empty: str, tmp_path: Path, journal: str
) -> None:
    path = tmp_path / "history.db"
    manager = add_history(path, 20, journal=journal)
    expected = history_of(path)
    try:
        described = ok(
            dsn, "backup", "create", "--type", "logical", "--destination", str(tmp_path), "--mem0-history", str(path)
        )
        assert described["mem0_history_rows"] == 20
        manager.add_history("later", None, "not in the backup", "ADD")
        place = described["place"]
        refused(9, "has 21 rows", empty, "backup", "restore", place, "--yes", "--mem0-history", str(path))
        # It is put back under a Mem0 that has it open, and what was there is kept.
        done = ok(empty, "backup", "restore", place, "--yes", "--mem0-history", str(path), "--on-conflict", "overwrite")
        assert history_of(path) == expected
        assert len(history_of(Path(done["mem0_history_kept"]))) == 21
        manager.add_history("after", None, "goes on", "ADD")
        assert len(history_of(path)) == 21
    finally:
        manager.connection.close()
    elsewhere = tmp_path / "new.db"
    ok(empty, "backup", "restore", place, "--yes", "--mem0-history", str(elsewhere), "--on-conflict", "skip")
    assert history_of(elsewhere) == expected


def test_what_is_no_history_of_mem0_is_refused(dsn: str, tmp_path: Path) -> None:
    create = ("backup", "create", "--type", "logical", "--destination", str(tmp_path / "kept"), "--mem0-history")
    refused(7, "is no file", dsn, *create, str(tmp_path / "absent.db"))
    (tmp_path / "text.db").write_text("not a database")
    refused(7, "cannot be copied", dsn, *create, str(tmp_path / "text.db"))
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("create table x (y)")
    refused(7, "no table `history`", dsn, *create, str(tmp_path / "other.db"))
    assert not list((tmp_path / "kept").glob("memharbor-*"))


# --- the seeds' commands ----------------------------------------------------------------------------------------------

SEEDS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "seed-commands.md"


def test_every_seed_command_has_its_equal_and_each_of_them_runs(
    dsn: str, empty: str, tmp_path: Path, bucket: dict[str, str], admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|", SEEDS.read_text(), re.MULTILINE)
    ours = [
        command
        for _, command in rows
        if "--type logical" in command or command.startswith("memharbor user") or "backup restore" in command
    ]
    assert len(ours) == 7
    first = ok(dsn, "backup", "create", "--type", "logical")
    backdate(Path(first["place"]), "2025-09-30T00:00:00+00:00")
    change(admin, 0)
    admin.execute(
        'update memharbor.memories set payload = payload || \'{"created_at": "2025-10-27T23:00:00Z"}\' where id = %s',
        (memory_id("bob", 10),),
    )
    results = {}
    for command in ours:
        said = (
            command.replace("customer-123", "bob").replace("my-bucket", STORE_BUCKET).replace("BACKUP", first["place"])
        )
        target = empty if "restore" in said else dsn
        results[command] = ok(target, *shlex.split(said.removeprefix("memharbor ")), **bucket)
    by_word = {
        word: data for command, data in results.items() for word in ("--since", "--from", "s3://") if word in command
    }
    assert by_word["--since"]["parent"] == Path(first["place"]).name
    assert by_word["--since"]["rows"]["memories"] > 0
    assert by_word["--from"]["rows"]["memories"] == 1
    assert by_word["s3://"]["place"].startswith(f"s3://{STORE_BUCKET}/mem0-backups/")
    assert results["memharbor backup restore BACKUP --yes"]["inserted"] > 300


def backdate(place: Path, taken_at: str) -> None:
    """Let a backup have been taken at another time."""
    manifest = json.loads((place / MANIFEST).read_text())
    (place / MANIFEST).write_text(json.dumps({**manifest, "taken_at": taken_at}))
    names = [line.split()[1] for line in (place / SUMS).read_text().splitlines()]
    sums = subprocess.run(["sha256sum", *names], cwd=place, capture_output=True, text=True, check=True).stdout
    (place / SUMS).write_text(sums)
