"""Every source into a real database: what a dry run foretells is what a run does, a second run changes nothing."""

from __future__ import annotations

import gzip
import json
import random
import sqlite3
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from mem0.memory.storage import SQLiteManager
from psycopg.conninfo import make_conninfo

from memharbor.migrate.record import pack_vector
from tests.command_line import memharbor, ok
from tests.integration.test_migrate_commands import rows_of
from tests.memory_database import Server
from tests.platform_server import KEY, PlatformServer, memory_of
from tests.schema_databases import DIMS, admin_connection, scratch_database
from tests.zep_server import KEY as ZEP_KEY
from tests.zep_server import ZepServer

USERS = ("alice", "bob")


def vector(number: int) -> tuple[float, ...]:
    draw = random.Random(number)
    return struct.unpack(f"<{DIMS}f", struct.pack(f"<{DIMS}f", *(draw.uniform(-1, 1) for _ in range(DIMS))))


def spell(values: tuple[float, ...]) -> str:
    return f"[{','.join(map(repr, values))}]"


def payload(number: int) -> dict[str, Any]:
    at = f"2025-01-15T02:00:{number:02}.123456-08:00"
    times = {"created_at": at, "updated_at": at}
    return {"data": f"fact {number}", "user_id": USERS[number % 2], **times, "mood": number / 3}


def identity(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


# Each makes a source of 12 good memories and some that are refused, and says how a person names it.
Arguments = tuple[list[str], dict[str, str]]


def of_export(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    results = [
        {"id": identity(n), "memory": f"fact {n}", "user_id": USERS[n % 2], "metadata": {"n": n}} for n in range(12)
    ]
    results += [{"id": "mem_abc", "memory": ""}, {"id": identity(1), "memory": "another", "user_id": "alice"}]
    path = folder / "export.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"results": results}).encode()))
    return ["--from", "file", "--input", str(path)], {}


def of_lines(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    path = folder / "memories.jsonl"
    lines = [json.dumps({"id": identity(n), **payload(n), "embedding": pack_vector(vector(n))}) for n in range(12)]
    path.write_text("\n".join([*lines[:6], "{broken", "[]", *lines[6:]]))
    return ["--from", "file", "--input", str(path)], {}


def of_points(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    path = folder / "vector_store.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table vectors (id text primary key, vector blob not null, payload text not null)")
        for n in range(12):
            data = {"data": f"fact {n}", "user_id": USERS[n % 2], "createdAt": f"2025-01-15T10:00:{n:02}.000Z"}
            packed = struct.pack(f"<{DIMS}f", *vector(n))
            connection.execute("insert into vectors values (?, ?, ?)", (identity(n), packed, json.dumps(data)))
        connection.execute("insert into vectors values ('short', x'00', '{}')")
    return ["--from", "sqlite", "--input", str(path)], {}


def of_history(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    path = folder / "history.db"
    manager = SQLiteManager(str(path))
    for n in range(12):
        manager.add_history(identity(n), "before", f"fact {n}", "UPDATE", created_at=f"2025-01-15T10:00:{n:02}-08:00")
    # As Mem0 0.1 and 1.x write it: without a time.
    manager.add_history(identity(3), "fact 3", None, "DELETE", is_deleted=1)
    manager.connection.close()
    return ["--from", "sqlite", "--input", str(path)], {}


def of_chatsg(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    path = folder / "chatsg.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(
            """
            create table users (id integer primary key, username text, email text);
            insert into users values (1, 'alice', 'a@example.org'), (2, 'bob', 'b@example.org');
            create table mem0_memories (id text primary key, user_id integer, session_id text, memory text, embedding blob,
              metadata text, created_at text, updated_at text);
            create table mem0_history (id integer primary key, memory_id text, user_id integer, action text,
              previous_content text, new_content text, metadata text, created_at text);
            create table mem0_metadata (id integer primary key, collection_name text, user_id integer, memory_count integer);
            """
        )
        for n in range(12):
            row = (f"m{n}", n % 2 + 1, "s", f"fact {n}", struct.pack(f"<{DIMS}f", *vector(n)), "{}", "2025-01-15", None)
            connection.execute("insert into mem0_memories values (?, ?, ?, ?, ?, ?, ?, ?)", row)
            change = (n, f"m{n}", n % 2 + 1, "ADD", None, f"fact {n}", "{}", f"2025-01-15 10:00:{n:02}")
            connection.execute("insert into mem0_history values (?, ?, ?, ?, ?, ?, ?, ?)", change)
    return ["--from", "sqlite", "--input", str(path), "--users-from", "username"], {}


def of_openmemory(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    path = folder / "openmemory.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(
            """
            create table users (id char(32) primary key, user_id varchar, name varchar, email varchar, metadata json,
              created_at datetime, updated_at datetime);
            create table apps (id char(32) primary key, owner_id char(32), name varchar, description varchar, metadata json,
              is_active boolean, created_at datetime, updated_at datetime);
            create table memories (id char(32) primary key, user_id char(32), app_id char(32), content varchar,
              vector varchar, metadata json, state varchar(8), created_at datetime, updated_at datetime,
              archived_at datetime, deleted_at datetime);
            create table categories (id char(32) primary key, name varchar, description varchar, created_at datetime,
              updated_at datetime);
            create table memory_categories (memory_id char(32), category_id char(32));
            create table memory_status_history (id char(32) primary key, memory_id char(32), changed_by char(32),
              old_state varchar(8), new_state varchar(8), changed_at datetime);
            create table memory_access_logs (id char(32) primary key, memory_id char(32), app_id char(32),
              accessed_at datetime, access_type varchar, metadata json);
            """
        )
        at = "2026-01-01 10:00:00.000000"
        owners = [uuid.UUID(int=900 + n).hex for n in range(2)]
        for owner, name in zip(owners, USERS, strict=True):
            connection.execute("insert into users values (?, ?, null, null, '{}', ?, ?)", (owner, name, at, at))
        app = uuid.UUID(int=990).hex
        connection.execute("insert into apps values (?, ?, 'cursor', null, '{}', 1, ?, ?)", (app, owners[0], at, at))
        for n in range(12):
            state = ("active", "paused", "archived", "deleted")[n % 4]
            row = (uuid.UUID(int=n + 1).hex, owners[n % 2], app, f"fact {n}", None, '{"n": 1}', state, at, at)
            moments = (at if state == "archived" else None, at if state == "deleted" else None)
            connection.execute("insert into memories values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, *moments))
        orphan = (
            uuid.UUID(int=99).hex,
            uuid.UUID(int=1000).hex,
            app,
            "nobody's",
            None,
            "{}",
            "active",
            at,
            at,
            None,
            None,
        )
        connection.execute("insert into memories values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", orphan)
    return ["--from", "openmemory", "--input", str(path)], {}


def of_platform(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    memories = [
        memory_of(
            f"fact {n}", n, user_id=USERS[n % 2], agent_id="a" if n % 3 == 0 else None, run_id="r" if n % 4 else None
        )
        for n in range(11)
    ]
    memories.append(memory_of("of an agent only", 11, agent_id="helper", expiration_date="2020-01-01"))
    memories.append(memory_of("of an app only", 12, app_id="app"))
    platform = stack.enter_context(PlatformServer(memories))
    return ["--from", "platform", "--url", platform.base_url], {"MEM0_API_KEY": KEY}


def other_database(stack: ExitStack, server: Server) -> tuple[psycopg.Connection[Any], dict[str, str]]:
    name = stack.enter_context(scratch_database(server, rolled_out=False))
    connection = stack.enter_context(closing(admin_connection(server, name)))
    connection.execute("create extension vector")
    return connection, {"MEMHARBOR_SOURCE_DSN": server.admin_dsn(name)}


def of_mem0(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    connection, environ = other_database(stack, server)
    for table in ("mymem", "mymem_entities", "mem0migrations"):
        connection.execute(f"create table {table} (id uuid primary key, vector vector({DIMS}), payload jsonb)".encode())
    for n in range(12):
        data = json.dumps(payload(n))
        connection.execute("insert into mymem values (%s, %s, %s)", (identity(n), spell(vector(n)), data))
    entity = {"data": "Berlin", "user_id": "alice", "entity_type": "place", "linked_memory_ids": [identity(0)]}
    connection.execute(
        "insert into mymem_entities values (%s, %s, %s)", (identity(50), spell(vector(50)), json.dumps(entity))
    )
    connection.execute("insert into mymem values (%s, null, '{}')", (identity(60),))
    return ["--from", "mem0-pgvector", "--collection", "MyMem"], environ


def of_vecs(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    connection, environ = other_database(stack, server)
    connection.execute("create schema vecs")
    connection.execute(f"create table vecs.mem0 (id varchar primary key, vec vector({DIMS}), metadata jsonb)".encode())
    for n in range(12):
        row = (f"memory:{n}", spell(vector(n)), json.dumps(payload(n)))
        connection.execute("insert into vecs.mem0 values (%s, %s, %s)", row)
    return ["--from", "supabase-vecs"], environ


def of_canonical(folder: Path, stack: ExitStack, server: Server) -> Arguments:
    connection, environ = other_database(stack, server)
    connection.execute(
        f"""
        create table memories (id uuid primary key, user_id text, agent_id text, run_id text, memory text not null,
          hash text, metadata jsonb, categories text[], embedding vector({DIMS}), created_at timestamptz,
          updated_at timestamptz);
        create table memory_relationships (id uuid primary key, source_memory_id uuid, target_memory_id uuid,
          relationship_type text, strength numeric, metadata jsonb, user_id text, created_at timestamptz)
        """.encode()
    )
    for n in range(12):
        connection.execute(
            "insert into memories values (%s, %s, null, null, %s, null, '{\"n\": 1.5}', '{a,b}', %s, '2025-01-15', now())",
            (identity(n), USERS[n % 2], f"fact {n}", spell(vector(n))),
        )
    for n, end in enumerate((2, 4, 700)):
        connection.execute(
            "insert into memory_relationships values (%s, %s, %s, 'related_to', 0.5, '{}', 'alice', '2025-01-15')",
            (identity(80 + n), identity(0), identity(end)),
        )
    return ["--from", "canonical"], environ


SOURCES: dict[str, tuple[Callable[..., Arguments], dict[str, int]]] = {
    "export": (of_export, {"read": 14, "inserted": 12, "refused": 2}),
    "lines": (of_lines, {"read": 14, "inserted": 12, "refused": 2}),
    "points": (of_points, {"read": 13, "inserted": 12, "refused": 1}),
    # Nobody can tell whose they are while their memories are not there.
    "history": (of_history, {"read": 13, "refused": 13}),
    "chatsg": (of_chatsg, {"read": 24, "inserted": 24}),
    "openmemory": (of_openmemory, {"read": 13, "inserted": 12, "refused": 1}),
    "platform": (of_platform, {"read": 13, "inserted": 12, "refused": 1}),
    "mem0": (of_mem0, {"read": 14, "inserted": 13, "refused": 1}),
    "vecs": (of_vecs, {"read": 12, "inserted": 12}),
    "canonical": (of_canonical, {"read": 15, "inserted": 14, "refused": 1}),
}


def counts(report: dict[str, Any]) -> dict[str, int]:
    words = ("read", "inserted", "updated", "same", "skipped", "not_chosen", "refused")
    return {word: report[word] for word in words if report[word]}


@pytest.mark.parametrize("name", SOURCES)
def test_a_dry_run_foretells_a_run_and_a_second_run_changes_nothing(
    name: str, dsn: str, server: Server, tmp_path: Path
) -> None:
    make, expected = SOURCES[name]
    with ExitStack() as stack:
        arguments, environ = make(tmp_path, stack, server)
        run = ["migrate", "run", *arguments, "--batch-size", "5", "--no-checkpoint"]
        foretold = ok(dsn, *run, "--dry-run", **environ)
        assert rows_of(dsn) == {}, "a dry run wrote something"
        done = ok(dsn, *run, **environ)
        assert counts(done) == expected
        assert (counts(foretold), foretold["reasons"]) == (counts(done), done["reasons"])
        rows = rows_of(dsn)
        again = ok(dsn, *run, **environ)
        assert again["same"] + again["refused"] == again["read"]
        assert rows_of(dsn) == rows
        assert ok(dsn, "migrate", "compare", **environ) == {"missing": 0, "extra": 0, "different": 0, "rows": []}
        plan = memharbor(dsn, "migrate", "plan", *arguments, **environ)
        assert plan.exit_code == 0, plan.output
        assert "of a sample of" in plan.stdout


HALF = """
delete from memharbor.memories where left(id::text, 1) in ('0', '1', '2', '3') and right(id::text, 1) in ('1', '4', 'a');
update memharbor.memories set payload = payload || '{"mood": "changed here"}' where right(id::text, 1) in ('2', '5', 'b');
update memharbor.memories set payload = payload || '{"user_id": "mallory"}' where right(id::text, 1) in ('3', 'c');
update memharbor.memories set embedding = null where right(id::text, 1) in ('6', 'd');
delete from memharbor.memory_history where id % 2 = 0;
"""


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("on_conflict", ["skip", "overwrite", "new-id"])
def test_a_dry_run_foretells_a_run_into_a_database_that_has_other_versions(
    name: str, on_conflict: str, dsn: str, server: Server, tmp_path: Path
) -> None:
    make, _ = SOURCES[name]
    with ExitStack() as stack, closing(psycopg.connect(dsn, autocommit=True)) as connection:
        arguments, environ = make(tmp_path, stack, server)
        run = ["migrate", "run", *arguments, "--batch-size", "5", "--no-checkpoint", "--on-conflict", on_conflict]
        ok(dsn, *run, **environ)
        connection.execute(HALF)
        before = rows_of(dsn)
        foretold = ok(dsn, *run, "--dry-run", **environ)
        assert rows_of(dsn) == before, "a dry run wrote something"
        done = ok(dsn, *run, **environ)
        assert (counts(foretold), foretold["reasons"]) == (counts(done), done["reasons"])
        rows = rows_of(dsn)
        again = ok(dsn, *run, **environ)
        assert (again["inserted"], again["updated"]) == (0, 0)
        assert rows_of(dsn) == rows


def test_mem0_s_tables_are_adopted_in_the_same_database(dsn: str) -> None:
    """Renamed, as the roll-out asks for where they have the names that it needs."""
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        for table in ("mem0_old", "mem0_old_entities"):
            connection.execute(
                f"create table {table} (id uuid primary key, vector vector({DIMS}), payload jsonb)".encode()
            )
        for n in range(12):
            data = json.dumps(payload(n))
            connection.execute("insert into mem0_old values (%s, %s, %s)", (identity(n), spell(vector(n)), data))
        entity = json.dumps({"data": "Berlin", "user_id": "alice", "linked_memory_ids": [identity(0)]})
        connection.execute(
            "insert into mem0_old_entities values (%s, %s, %s)", (identity(50), spell(vector(50)), entity)
        )
        run = ("migrate", "run", "--from", "mem0-pgvector", "--collection", "mem0_old", "--no-checkpoint")
        done = ok(dsn, *run, MEMHARBOR_SOURCE_DSN=dsn)
        assert counts(done) == {"read": 13, "inserted": 13}
        same = connection.execute(
            "select count(*) from mem0_old o join public.mem0 n using (id) where vector_send(o.vector) = vector_send(n.vector)"
            " and n.payload @> o.payload"
        ).fetchone()
        assert same == (12,)
        assert connection.execute("select count(*) from public.mem0_entities").fetchone() == (1,)


def test_mem0_s_history_follows_its_memories_and_comes_once(dsn: str, server: Server, tmp_path: Path) -> None:
    with ExitStack() as stack:
        arguments, _ = of_lines(tmp_path, stack, server)
        ok(dsn, "migrate", "run", *arguments, "--no-checkpoint")
        arguments, _ = of_history(tmp_path, stack, server)
    run = ["migrate", "run", *arguments, "--batch-size", "5", "--no-checkpoint"]
    foretold = ok(dsn, *run, "--dry-run")
    done = ok(dsn, *run)
    assert counts(done) == counts(foretold) == {"read": 13, "inserted": 13}
    query = (
        "select user_id, operation, count(*) from memharbor.memory_history where operation <> 'create' group by 1, 2"
    )
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        found = connection.execute(query.encode()).fetchall()
        assert sorted(found) == [("alice", "update", 6), ("bob", "delete", 1), ("bob", "update", 6)]
        assert ok(dsn, "migrate", "compare")["rows"] == []
        assert counts(ok(dsn, *run)) == {"read": 13, "same": 13}
        assert connection.execute(query.encode()).fetchall() == found


def test_states_of_openmemory_stay(dsn: str, server: Server, tmp_path: Path) -> None:
    with ExitStack() as stack:
        arguments, environ = of_openmemory(tmp_path, stack, server)
        ok(dsn, "migrate", "run", *arguments, "--no-checkpoint", **environ)
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        found = connection.execute(
            "select state, count(*), count(archived_at), count(deleted_at) from memharbor.memories group by 1 order by 1"
        ).fetchall()
        assert found == [("active", 3, 0, 0), ("archived", 3, 3, 0), ("deleted", 3, 0, 3), ("paused", 3, 0, 0)]
        assert connection.execute("select count(*) from public.mem0").fetchone() == (0,), "Mem0 meets no half memory"


@pytest.mark.parametrize("file", ["out.jsonl", "out.jsonl.gz"])
def test_what_is_taken_out_comes_in_again_to_the_bit(dsn: str, server: Server, tmp_path: Path, file: str) -> None:
    with ExitStack() as stack:
        for make in (of_lines, of_openmemory):
            arguments, environ = make(tmp_path, stack, server)
            # Both have the same ids.
            ok(dsn, "migrate", "run", *arguments, "--no-checkpoint", "--on-conflict", "new-id", **environ)
    assert ok(dsn, "migrate", "export", "--output-file", file, "--dry-run")["memories"] == 24
    manifest = ok(dsn, "migrate", "export", "--output-file", file)
    assert (manifest["memories"], manifest["users"]) == (24, 2)
    before = {key: value for key, value in rows_of(dsn).items() if key[1] == "memories"}
    again = memharbor(dsn, "migrate", "export", "--output-file", file)
    assert "is there already" in getattr(again.exception, "message", "")
    with scratch_database(server) as name:
        other = server.admin_dsn(name)
        done = ok(other, "migrate", "run", "--from", "file", "--input", file, "--no-checkpoint", "--keep-duplicates")
        assert counts(done) == {"read": 24, "inserted": 24}
        assert {key: value for key, value in rows_of(other).items() if key[1] == "memories"} == before


def test_to_the_platform_and_only_once(dsn: str, server: Server, tmp_path: Path) -> None:
    with ExitStack() as stack:
        arguments, environ = of_lines(tmp_path, stack, server)
        ok(dsn, "migrate", "run", *arguments, "--no-checkpoint", **environ)
    with PlatformServer() as platform:
        export = ("migrate", "export", "--to", "platform", "--url", platform.base_url)
        assert ok(dsn, *export, MEM0_API_KEY=KEY)["counts"] == {"inserted": 12, "same": 0, "changed": 0, "refused": 0}
        assert len(platform.memories) == 12
        assert ok(dsn, *export, MEM0_API_KEY=KEY)["counts"]["same"] == 12
        assert len(platform.memories) == 12
    refused = memharbor(dsn, *export, MEM0_API_KEY="")
    assert getattr(refused.exception, "exit_code", 0) == 3


def test_from_the_platform_to_a_file_looks_like_its_export(dsn: str, server: Server, tmp_path: Path) -> None:
    with ExitStack() as stack:
        arguments, environ = of_platform(tmp_path, stack, server)
        ok(dsn, "migrate", "run", *arguments, "--no-checkpoint", **environ)
        ok(dsn, "migrate", "export", "--output-file", "out.json", "--shape", "platform")
    found = json.loads(Path("out.json").read_text())["results"]
    assert {memory["memory"] for memory in found} == {*(f"fact {n}" for n in range(11)), "of an agent only"}
    assert not [memory for memory in found if "embedding" in memory or "hash" in memory]


def test_a_source_is_read_into_a_file_and_goes_on_where_it_was_stopped(
    dsn: str, server: Server, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        arguments, environ = of_platform(tmp_path, stack, server)
        read = ("migrate", "read", *arguments, "--output-file", "platform.jsonl")
        assert ok(dsn, *read, "--dry-run", **environ)["counts"]
        manifest = ok(dsn, *read, **environ)
        assert (manifest["items"], manifest["refused"]) == ({"memory": 13}, {})
        whole = Path("platform.jsonl").read_bytes()
        assert not Path("platform.jsonl.partial").exists()
        assert "is there already" in getattr(memharbor(dsn, *read, **environ).exception, "message", "")
        direct = ok(dsn, "migrate", "run", *arguments, "--no-checkpoint", "--dry-run", **environ)
        from_file = ok(
            dsn, "migrate", "run", "--from", "file", "--input", "platform.jsonl", "--no-checkpoint", "--dry-run"
        )
        assert counts(direct) == counts(from_file)
    path = tmp_path / "memories.jsonl"
    with ExitStack() as stack:
        arguments, environ = of_lines(tmp_path, stack, server)
        read = ("migrate", "read", *arguments, "--output-file", "lines.jsonl")
        manifest = ok(dsn, *read, **environ)
        assert manifest["refused"] == {"bad-json": 2}
        assert len(Path("lines.jsonl.refused.jsonl").read_text().splitlines()) == 2
        expected = Path("lines.jsonl").read_bytes()
        # As a process leaves it that was killed while it wrote the fifth line.
        from memharbor.migrate.record import item_as_data
        from memharbor.migrate.sources.files import FileSource

        source = FileSource(path)
        lines = [json.dumps({"identity": source.describe().identity})]
        lines += [json.dumps(item_as_data(item)) for item in list(source.read())[:4]]  # type: ignore[arg-type]
        Path("lines.jsonl.partial").write_text("\n".join(lines) + '\n{"kind":"mem')
        assert ok(dsn, *read, "--replace", **environ)["items"] == manifest["items"]
        assert Path("lines.jsonl").read_bytes() == expected
    assert whole.count(b"\n") == 13


@pytest.fixture
def administrator(dsn: str) -> Iterator[str]:
    """The DSN of an administrator who is no superuser, as managed services have it."""
    with closing(psycopg.connect(dsn, autocommit=True)) as admin:
        admin.execute("create role migrate_test_admin login password 'managed'")  # pragma: allowlist secret
        admin.execute("grant memharbor_owner, memharbor_service to migrate_test_admin with inherit false, set true")
        database = admin.info.dbname
        admin.execute(f'grant temporary on database "{database}" to migrate_test_admin'.encode())
        try:
            yield make_conninfo(dsn, user="migrate_test_admin", password="managed")  # pragma: allowlist secret
        finally:
            admin.execute("drop owned by migrate_test_admin cascade")
            admin.execute("drop role migrate_test_admin")


@pytest.mark.parametrize("name", ["lines", "canonical", "chatsg"])
def test_an_administrator_who_is_no_superuser_migrates_too(
    name: str, administrator: str, dsn: str, server: Server, tmp_path: Path
) -> None:
    """Row level security binds the administrator, and would hide everything in silence."""
    make, expected = SOURCES[name]
    with ExitStack() as stack:
        arguments, environ = make(tmp_path, stack, server)
        run = ["migrate", "run", *arguments, "--batch-size", "5", "--no-checkpoint", "--model", "memharbor-hash"]
        assert counts(ok(administrator, *run, **environ)) == expected
        rows = rows_of(dsn)
        assert sum(each.rows for key, each in rows.items() if key[1] == "memories") in (0, 12)
        again = ok(administrator, *run, **environ)
        assert (again["inserted"], again["updated"], again["skipped"]) == (0, 0, 0)
        assert rows_of(dsn) == rows
        assert ok(administrator, "migrate", "compare", **environ)["different"] == 0
        texts = ok(administrator, "migrate", "export", "--output-file", "out.jsonl")["memories"]
        assert texts == ok(dsn, "migrate", "export", "--output-file", "out2.jsonl")["memories"]
        assert (
            ok(administrator, "migrate", "embed", "--filter", "all", "--model", "memharbor-hash")["embedded"] == texts
        )


def test_to_zep_and_only_once(dsn: str, server: Server, tmp_path: Path) -> None:
    with ExitStack() as stack:
        arguments, environ = of_lines(tmp_path, stack, server)
        ok(dsn, "migrate", "run", *arguments, "--no-checkpoint", **environ)
    with ZepServer() as zep:
        export = ("migrate", "export", "--to", "zep", "--url", zep.base_url, "--validate")
        done = ok(dsn, *export, ZEP_API_KEY=ZEP_KEY)
        assert (done["inserted"], done["validation"]["is_complete"]) == (12, True)
        again = ok(dsn, *export, ZEP_API_KEY=ZEP_KEY)
        assert (again["inserted"], again["same"], again["validation"]["is_complete"]) == (0, 12, True)
    refused = memharbor(dsn, *export, ZEP_API_KEY="")
    assert getattr(refused.exception, "exit_code", 0) == 3
