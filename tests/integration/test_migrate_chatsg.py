"""
ChatSG's tables in PostgreSQL, as its migrations make them: owners that are numbers, embeddings of pgvector or in jsonb.

Sources: ChatSG `001_create_users.sql`, `002_create_mem0_tables.sql` and, for servers without pgvector,
`002_create_mem0_tables_safe.sql`: names, types, constraints and triggers.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from memharbor.errors import SourceDataError, StateRefusedError
from memharbor.migrate.record import RawItem, Refusal, pack_vector
from memharbor.migrate.sources.supabase import CanonicalTableSource
from memharbor.migrate.sources.user_names import UsersFrom
from tests.command_line import memharbor, ok, refused
from tests.integration.test_migrate_commands import rows_of
from tests.integration.test_migrate_sources import spell, vector
from tests.memory_database import Server
from tests.schema_databases import DIMS, admin_connection, scratch_database

USERS = """
create table users (
  id serial primary key, azure_id varchar(255) unique not null, email varchar(255) unique not null, name varchar(255),
  groups text[], last_login timestamptz, created_at timestamptz default current_timestamp,
  updated_at timestamptz default current_timestamp
);
"""
MEM0 = """
create table mem0_memories (
  id uuid primary key default gen_random_uuid(),
  user_id integer not null references users (id) on delete cascade,
  session_id varchar(255) not null, memory text not null, embedding {embedding}, metadata jsonb default '{{}}',
  created_at timestamptz default current_timestamp, updated_at timestamptz default current_timestamp
);
create index idx_mem0_memories_user_session on mem0_memories (user_id, session_id);
create table mem0_history (
  id serial primary key,
  memory_id uuid not null references mem0_memories (id) on delete cascade,
  user_id integer not null references users (id) on delete cascade,
  action varchar(50) not null, previous_content text, new_content text, metadata jsonb default '{{}}',
  created_at timestamptz default current_timestamp
);
create table mem0_metadata (
  id serial primary key, collection_name varchar(255) not null default 'chatsg_memories',
  user_id integer not null references users (id) on delete cascade, total_memories integer default 0,
  last_memory_at timestamptz, metadata jsonb default '{{}}', created_at timestamptz default current_timestamp,
  updated_at timestamptz default current_timestamp, unique (collection_name, user_id)
);
create function update_mem0_metadata_count() returns trigger language plpgsql as $$
begin
  if tg_op = 'INSERT' then
    insert into mem0_metadata (collection_name, user_id, total_memories, last_memory_at)
    values ('chatsg_memories', new.user_id, 1, current_timestamp)
    on conflict (collection_name, user_id) do update
    set total_memories = mem0_metadata.total_memories + 1, last_memory_at = current_timestamp;
  end if;
  return null;
end $$;
create trigger update_mem0_metadata_on_memory_change after insert or delete on mem0_memories
for each row execute function update_mem0_metadata_count();
"""
PGVECTOR = f"vector({DIMS})"
IVFFLAT = "create index on mem0_memories using ivfflat (embedding vector_cosine_ops) with (lists = 100)"
NAMES = {7: ("Alice", "alice@example.org"), 8: ("Bob", "bob@example.org"), 9: ("Carol", "carol@example.org")}
RUN = ("--from", "canonical", "--collection", "mem0_memories")


class ChatSG:
    """A database of ChatSG's with 12 memories of two users and a history; a third user has none."""

    def __init__(self, server: Server, name: str, embedding: str) -> None:
        self.dsn = server.admin_dsn(name)
        self._server, self._name = server, name
        self.run("create extension vector", USERS, MEM0.format(embedding=embedding))
        if embedding == PGVECTOR:
            self.run(IVFFLAT)
        for number, (user, email) in NAMES.items():
            self.run(
                "insert into users (id, azure_id, email, name) values (%s, %s, %s, %s)", (number, user, email, user)
            )
        for n in range(12):
            owner = 7 + n % 2
            self.run(
                'insert into mem0_memories values (%s, %s, %s, %s, %s, \'{"topic": "tea"}\', %s, %s)',
                (
                    identity(n),
                    owner,
                    f"s{n % 3}",
                    f"fact {n}",
                    spell(vector(n)) if n != 11 else None,
                    *["2025-07-01"] * 2,
                ),
            )
            change = (identity(n), owner, "updated", f"old {n}", f"fact {n}", f"2025-07-02 10:00:{n:02}+02")
            self.run(
                "insert into mem0_history (memory_id, user_id, action, previous_content, new_content, created_at)"
                " values (%s, %s, %s, %s, %s, %s)",
                change,
            )

    def run(self, *statements: Any) -> list[tuple[Any, ...]]:
        with closing(admin_connection(self._server, self._name)) as connection:
            texts = [each for each in statements if isinstance(each, str)]
            values = next((each for each in statements if isinstance(each, tuple)), None)
            for statement in texts:
                cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def source(self, users_from: UsersFrom = "id") -> CanonicalTableSource:
        return CanonicalTableSource(self.dsn, "mem0_memories", users_from=users_from)


def identity(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


@pytest.fixture(params=[PGVECTOR, "jsonb"], ids=["pgvector", "jsonb"])
def chatsg(server: Server, request: pytest.FixtureRequest) -> Iterator[ChatSG]:
    with scratch_database(server, rolled_out=False) as name:
        yield ChatSG(server, name, request.param)


def items(source: CanonicalTableSource, after: str | None = None) -> list[RawItem]:
    found = list(source.read(after))
    assert not [each for each in found if isinstance(each, Refusal)]
    return [each for each in found if isinstance(each, RawItem)]


NAMED = {"id": ["7", "8"], "username": ["Alice", "Bob"], "email": ["alice@example.org", "bob@example.org"]}


@pytest.mark.parametrize("users_from", NAMED)
def test_every_row_is_read_with_its_owner_as_asked(chatsg: ChatSG, users_from: UsersFrom) -> None:
    source = chatsg.source(users_from)
    info = source.describe()
    assert (info.name, info.counts, info.dims) == ("canonical", {"memory": 12, "history": 12}, DIMS)
    assert ["mem0_metadata` only counts" in note for note in source.notes] == [True]
    found = items(source)
    assert found[0].data == {
        "user_id": NAMED[users_from][0],
        "session_id": "s0",
        "memory": "fact 0",
        "metadata": {"topic": "tea"},
        "created_at": "2025-07-01T00:00:00+00:00",
        "updated_at": "2025-07-01T00:00:00+00:00",
    }
    assert [item.data["user_id"] for item in found] == NAMED[users_from] * 12
    for n, item in enumerate(found[:11]):
        assert item.vector is not None
        assert pack_vector(item.vector) == pack_vector(vector(n))
    assert [item.vector for item in found[11:]] == [None] * 13
    for number, item in enumerate(found):
        assert items(source, item.position) == found[number + 1 :]


@pytest.mark.parametrize("users_from", NAMED)
def test_a_run_foretells_itself_and_a_second_one_changes_nothing(
    chatsg: ChatSG, dsn: str, users_from: UsersFrom
) -> None:
    environ = {"MEMHARBOR_SOURCE_DSN": chatsg.dsn}
    run = ("migrate", "run", *RUN, "--users-from", users_from, "--no-checkpoint")
    foretold = ok(dsn, *run, "--dry-run", **environ)
    assert rows_of(dsn) == {}
    done = ok(dsn, *run, **environ)
    assert (done["read"], done["inserted"], done["refused"]) == (24, 24, 0)
    assert {name: done[name] for name in foretold if name != "dry_run"} == {
        name: value for name, value in foretold.items() if name != "dry_run"
    }
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        memories = connection.execute(
            "select id::text, user_id, run_id, memory, metadata, embedding::real[]::text, created_at::text"
            " from memharbor.memories order by id"
        ).fetchall()
        changes = connection.execute(
            "select memory_id::text, user_id, old_value, changed_at::text from memharbor.memory_history"
            " where operation = 'update' order by memory_id"
        ).fetchall()
    names = NAMED[users_from]
    assert [row[:5] for row in memories] == [
        (identity(n), names[n % 2], f"s{n % 3}", f"fact {n}", {"topic": "tea"}) for n in range(12)
    ]
    for n, row in enumerate(memories[:11]):
        assert tuple(map(float, row[5].strip("{}").split(","))) == pytest.approx(vector(n), abs=1e-6)
    assert changes == [
        (identity(n), names[n % 2], {"data": f"old {n}"}, f"2025-07-02 08:00:{n:02}+00") for n in range(12)
    ]
    rows = rows_of(dsn)
    again = ok(dsn, *run, **environ)
    assert (again["same"], again["inserted"], again["updated"]) == (24, 0, 0)
    assert rows_of(dsn) == rows
    assert ok(dsn, "migrate", "compare", **environ)["different"] == 0


def test_numbers_are_mapped_by_a_file(chatsg: ChatSG, dsn: str, tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("7,alice\n")
    remap = ("--remap-users", str(tmp_path / "users.csv"))
    environ = {"MEMHARBOR_SOURCE_DSN": chatsg.dsn}
    done = ok(dsn, "migrate", "run", *RUN, *remap, "--no-checkpoint", **environ)
    assert (done["inserted"], done["reasons"]) == (12, {"not-mapped": 12})
    chosen = ok(dsn, "migrate", "run", *RUN, "--users", "8", "--no-checkpoint", **environ)
    assert (chosen["inserted"], chosen["not_chosen"]) == (12, 12)


def test_an_embedding_in_json_that_is_none_is_refused_alone(server: Server) -> None:
    bad = ('{"0": 1}', '["x"]', "7", '"no"')
    with scratch_database(server, rolled_out=False) as name:
        chatsg = ChatSG(server, name, "jsonb")
        for n, text in enumerate(bad):
            chatsg.run("update mem0_memories set embedding = %s where id = %s", (text, identity(n)))
        chatsg.run("update mem0_memories set embedding = to_jsonb(embedding::text) where id = %s", (identity(4),))
        chatsg.run("update mem0_memories set embedding = 'null' where id = %s", (identity(5),))
        found = list(chatsg.source("username").read())
        assert [each.reason for each in found if isinstance(each, Refusal)] == ["bad-vector"] * len(bad)
        first, other, none = found[0], found[4], found[5]
        assert isinstance(first, Refusal)
        # Mended, it keeps its owner.
        assert (first.item.data["memory"], first.item.data["user_id"]) == ("fact 0", "Alice")
        assert isinstance(other, RawItem)
        assert other.vector == vector(4)
        assert isinstance(none, RawItem)
        assert none.vector is None
        for each in found[:6]:
            position = each.position if isinstance(each, RawItem) else each.item.position
            assert list(chatsg.source("username").read(position)) == found[found.index(each) + 1 :]


def test_a_user_without_a_name_is_not_mapped_and_never_becomes_another_one(chatsg: ChatSG, dsn: str) -> None:
    chatsg.run("update users set name = null where id = 8", "update users set name = '8' where id = 7")
    environ = {"MEMHARBOR_SOURCE_DSN": chatsg.dsn}
    done = ok(dsn, "migrate", "run", *RUN, "--users-from", "username", "--no-checkpoint", **environ)
    assert (done["inserted"], done["reasons"]) == (12, {"not-mapped": 12})
    (path,) = Path("memharbor-migrations").rglob(f"{done['run']}/dead-letters.jsonl")
    letters = path.read_text().splitlines()
    assert "its user `8` has no name" in json.loads(letters[0])["detail"]
    again = ok(dsn, "migrate", "retry", done["run"])
    assert (again["inserted"], again["refused"]) == (12, 0)
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        query = "select user_id, count(*) from memharbor.memories group by 1 order by 1"
        assert connection.execute(query).fetchall() == [("8", 6), ("users:8", 6)]


def test_a_name_of_two_users_is_refused_since_one_would_see_the_others_memories(chatsg: ChatSG, dsn: str) -> None:
    chatsg.run("update users set name = 'Alice' where id = 8")
    with pytest.raises(SourceDataError, match="has the same `name` twice"):
        chatsg.source("username").describe()
    with pytest.raises(SourceDataError, match="has the same `name` twice"):
        list(chatsg.source("username").read())
    assert len(items(chatsg.source("email"))) == 24
    # Two that have none are none that share one.
    chatsg.run("update users set name = '' where id in (8, 9)")
    assert sum(isinstance(each, Refusal) for each in chatsg.source("username").read()) == 12


def test_another_name_is_another_source_and_a_login_is_not(chatsg: ChatSG) -> None:
    source = chatsg.source("username")
    before = source.describe().identity
    chatsg.run("update users set last_login = now()", "update users set name = 'Caroline' where id = 9")
    assert source.describe().identity == before
    chatsg.run("update users set name = 'Alicia' where id = 7")
    assert source.describe().identity != before
    assert chatsg.source("id").describe().identity != chatsg.source("email").describe().identity


def test_a_table_of_users_must_be_there_and_tell_all_of_them(chatsg: ChatSG) -> None:
    chatsg.run("alter table mem0_memories drop constraint mem0_memories_user_id_fkey", "drop table mem0_metadata")
    role = "mig_chatsg"
    chatsg.run(f"create role {role} bypassrls", f"grant select on mem0_memories, mem0_history to {role}")
    try:
        reader = make_conninfo(chatsg.dsn, options=f"-c role={role}")
        with pytest.raises(StateRefusedError, match="permission denied for table users"):
            list(CanonicalTableSource(reader, "mem0_memories", users_from="email").read())
        assert len(items(CanonicalTableSource(reader, "mem0_memories"))) == 24
    finally:
        chatsg.run(f"drop owned by {role}", f"drop role {role}")
    chatsg.run("alter table mem0_memories alter user_id type text", "alter table users rename email to address")
    assert [item.data["user_id"] for item in items(chatsg.source("username"))] == NAMED["username"] * 12
    with pytest.raises(SourceDataError, match="no table `users` with `id` and `email`"):
        chatsg.source("email").describe()
    chatsg.run("drop table users cascade")
    with pytest.raises(SourceDataError, match="no table `users`"):
        chatsg.source("username").describe()
    assert chatsg.source().notes == ()
    assert len(items(chatsg.source())) == 24


def test_sources_without_users_do_not_name_them(dsn: str) -> None:
    for kind in ("platform", "mem0-pgvector", "supabase-vecs"):
        refused(2, "has no table `users`", dsn, "migrate", "run", "--from", kind, "--users-from", "email")
    assert memharbor(dsn, "migrate", "status").exit_code == 0
