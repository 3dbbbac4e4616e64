"""
Sources that are PostgreSQL: tables as unmodified Mem0 and vecs make them, canonical ones as the Supabase guides do.
"""

from __future__ import annotations

import json
import random
import struct
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from memharbor.errors import ConfigError, ConnectError, SourceDataError, StateRefusedError
from memharbor.migrate.record import RawItem, Record, Refusal, pack_vector
from memharbor.migrate.sources.mem0_pgvector import Mem0PgvectorSource
from memharbor.migrate.sources.postgres import PostgresSource
from memharbor.migrate.sources.supabase import CanonicalTableSource, VecsSource
from memharbor.migrate.transform import Choice, transform
from tests.containers import Server
from tests.schema_databases import admin_connection, drop_database, scratch_database

DIMS = 8


class Database:
    """An empty database with pgvector, and connections to it."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self.dsn = server.admin_dsn(name)

    def run(self, *statements: str, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        with closing(admin_connection(self.server, self.name)) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def acting_as(self, role: str) -> str:
        """Spell the DSN of a connection that acts as a role from its beginning."""
        return f"{self.dsn}&options={quote(f'-c role={role}')}"

    @contextmanager
    def roles(self, **attributes: str) -> Iterator[None]:
        """Make roles for the time of a test; they are the cluster's."""
        for name, attribute in attributes.items():
            self.run(f"create role {name} {attribute}", f"grant usage on schema public to {name}")
        try:
            yield
        finally:
            for name in attributes:
                self.run(f"drop owned by {name} cascade", f"drop role {name}")


@pytest.fixture
def database(server: Server) -> Iterator[Database]:
    with scratch_database(server, rolled_out=False) as name:
        found = Database(server, name)
        found.run("create extension vector")
        yield found


def vector(seed: int, dims: int = DIMS) -> tuple[float, ...]:
    """Make an embedding of any finite float32 bit patterns: negative zeros, denormals, largest values."""
    source = random.Random(seed)
    found: list[float] = [-0.0, 1e-45, 3.4028234663852886e38]
    while len(found) < dims:
        (value,) = struct.unpack("<f", source.randbytes(4))
        if value == value and abs(value) != float("inf"):
            found.append(value)
    return tuple(struct.unpack(f"<{dims}f", struct.pack(f"<{dims}f", *found[:dims])))


def spell(values: Sequence[float]) -> str:
    return "[" + ",".join(repr(value) for value in values) + "]"


def payload(number: int, **more: Any) -> dict[str, Any]:
    return {
        "data": f"memory {number}",
        "hash": f"{number:032x}",
        "user_id": f"user{number % 3}",
        "created_at": "2025-01-15T02:00:00.123456-08:00",
        **more,
    }


def make_collection(
    database: Database, name: str, rows: Sequence[tuple[Any, Any, Any]], *, quoted: bool = True
) -> None:
    """Make a table as Mem0's pgvector store does: quoted since 2.0.2, unquoted before."""
    spelled = f'"{name}"' if quoted else name
    with closing(admin_connection(database.server, database.name)) as connection:
        connection.execute(
            f"create table if not exists {spelled} (id uuid primary key, vector vector({DIMS}), payload jsonb)".encode()
        )
        insert = f"insert into {spelled} (id, vector, payload) values (%s, %s, %s)".encode()
        with connection.cursor() as cursor:
            cursor.executemany(insert, [(str(key), given, data) for key, given, data in rows])


def usual_rows(count: int) -> list[tuple[Any, Any, Any]]:
    return [
        (uuid.UUID(int=(number * 7919) % 100_003), spell(vector(number)), json.dumps(payload(number)))
        for number in range(count)
    ]


def items_of(source: PostgresSource, after: str | None = None) -> list[RawItem]:
    found = list(source.read(after))
    assert all(isinstance(each, RawItem) for each in found), [each for each in found if isinstance(each, Refusal)]
    return [each for each in found if isinstance(each, RawItem)]


def bits(items: Sequence[RawItem]) -> dict[str, str | None]:
    return {item.source_id: pack_vector(item.vector) for item in items}


# Mem0's own tables


def test_a_collection_of_unmodified_mem0_is_read_bit_for_bit(database: Database) -> None:
    from mem0.vector_stores.pgvector import PGVector

    ids = [str(uuid.uuid4()) for _ in range(30)]
    vectors = {key: vector(number) for number, key in enumerate(ids)}
    for collection, many in (("mem0", ids), ("mem0_entities", ids[:3])):
        store = PGVector(
            dbname=database.name,
            collection_name=collection,
            embedding_model_dims=DIMS,
            connection_string=database.dsn,
            user=None,
            password=None,
            host=None,
            port=None,
            diskann=False,
            hnsw=True,
        )
        store.insert([list(vectors[key]) for key in many], [payload(number) for number in range(len(many))], many)
        store.connection_pool.close()
    source = Mem0PgvectorSource(database.dsn)
    info = source.describe()
    assert (info.name, info.counts, info.dims) == ("mem0-pgvector", {"memory": 30, "entity": 3}, DIMS)
    assert (info.size_bytes or 0) > 0
    items = items_of(source)
    assert [item.kind for item in items] == ["memory"] * 30 + ["entity"] * 3
    assert [item.source_id for item in items[:30]] == sorted(ids)
    assert bits(items[:30]) == {key: pack_vector(found) for key, found in vectors.items()}
    assert bits(items[30:]) == {key: pack_vector(vectors[key]) for key in ids[:3]}
    by_id = {item.source_id: item.data for item in items[:30]}
    assert by_id == {key: payload(number) for number, key in enumerate(ids)}
    assert all(isinstance(transform(item, info.name, Choice(dims=DIMS)), Record) for item in items)


def test_reading_goes_on_behind_every_position(database: Database) -> None:
    make_collection(database, "mem0", usual_rows(25))
    make_collection(database, "mem0_entities", usual_rows(7))
    source = Mem0PgvectorSource(database.dsn)
    items = items_of(source)
    assert len({item.position for item in items}) == 32
    for number, item in enumerate(items):
        assert items_of(source, item.position) == items[number + 1 :]


@pytest.mark.parametrize("position", ["x", "history:1", "memories:1"])
def test_a_position_of_another_source_is_refused(database: Database, position: str) -> None:
    make_collection(database, "mem0", usual_rows(1))
    with pytest.raises(SourceDataError, match="is none of this source"):
        list(Mem0PgvectorSource(database.dsn).read(position))


def test_what_is_written_meanwhile_changes_nothing(database: Database) -> None:
    rows = usual_rows(1000)
    make_collection(database, "mem0", rows)
    make_collection(database, "mem0_entities", rows[:1])
    reading = Mem0PgvectorSource(database.dsn).read()
    items = [next(reading)]
    database.run(
        "delete from mem0 where payload ->> 'user_id' = 'user1'", "update mem0 set payload = '{}', vector = null"
    )
    for name in ("mem0", "mem0_entities"):
        make_collection(database, name, [(uuid.UUID(int=1 << 120), None, "{}")])
    items += reading
    found = [item.source_id for item in items if isinstance(item, RawItem)]
    assert found == [*sorted(str(row[0]) for row in rows), str(rows[0][0])]
    assert all(isinstance(item, RawItem) and item.vector and item.data for item in items)


def test_a_collection_of_an_older_mem0_is_found_under_its_folded_name(database: Database) -> None:
    make_collection(database, "MyMem", usual_rows(3), quoted=False)
    source = Mem0PgvectorSource(database.dsn, "MyMem")
    assert "public.mymem#" in source.describe().identity
    assert source.notes == ("collection `MyMem` is in table `mymem`: Mem0 before 2.0.2 did not quote its name",)
    assert len(items_of(source)) == 3
    make_collection(database, "MyMem", usual_rows(1))
    make_collection(database, "MyMem_entities", usual_rows(2))
    assert "public.MyMem#" in source.describe().identity
    assert "`mymem`" in source.notes[0]
    assert [item.kind for item in items_of(source)] == ["memory", "entity", "entity"]


def test_payloads_of_every_age_stay_as_they_were_written(database: Database) -> None:
    old = {
        "data": "older than 1.0.7",
        "user_id": "u",
        "created_at": "2024-07-01T10:00:00.5-07:00",
        "x": [1, None, "é東"],
    }
    typescript = {"data": "of the TypeScript SDK", "userId": "u", "createdAt": "2025-01-01T00:00:00.000Z"}
    make_collection(
        database, "mem0", [(uuid.UUID(int=1), None, json.dumps(old)), (uuid.UUID(int=2), None, json.dumps(typescript))]
    )
    items = items_of(Mem0PgvectorSource(database.dsn))
    assert [item.data for item in items] == [old, typescript]
    assert [item.vector for item in items] == [None, None]


def test_unusual_rows_are_refused_one_by_one(database: Database) -> None:
    nested = "[" * 3000 + "]" * 3000
    unusual = [
        (None, "bad-json"),
        ('["a list"]', "bad-json"),
        ('"a text"', "bad-json"),
        (f'{{"data": {"9" * 5000}}}', "bad-number"),
        (f'{{"data": {nested}}}', "bad-json"),
    ]
    rows = [(uuid.UUID(int=number + 1), None, text) for number, (text, _) in enumerate(unusual)]
    make_collection(database, "mem0", [(uuid.UUID(int=0), None, '{"data": "first"}'), *rows])
    make_collection(database, "mem0", [(uuid.UUID(int=99), spell(vector(1)), '{"data": "last"}')])
    source = Mem0PgvectorSource(database.dsn)
    found = list(source.read())
    refused = [each for each in found if isinstance(each, Refusal)]
    assert [each.reason for each in refused] == [reason for _, reason in unusual]
    assert [each.data["data"] for each in found if isinstance(each, RawItem)] == ["first", "last"]
    assert json.loads(refused[1].item.data["payload"]) == ["a list"]
    for number, each in enumerate(refused):
        assert list(source.read(each.item.position)) == found[number + 2 :]


@pytest.mark.parametrize(
    ("column", "count", "dims"),
    [("vector(8)", 1, 8), ("halfvec(8)", 1, 8), ("vector", 1, 8), ("vector", 0, None), ("real[]", 1, 8)],
)
def test_dimensions_are_those_of_the_column_or_of_the_first_row(
    database: Database, column: str, count: int, dims: int | None
) -> None:
    database.run(f"create table c (id uuid primary key, vector {column}, payload jsonb)")
    values = (0.5, -0.0, 1.0, -2.0, 0.25, 0.0, 3.0, 1024.0)
    for number in range(count):
        spelled = f"'{spell(values)}'".translate(str.maketrans("[]", "{}") if column == "real[]" else {})
        database.run(f"insert into c values ('{uuid.UUID(int=number)}', {spelled}, '{{\"data\": \"x\"}}')")
    source = Mem0PgvectorSource(database.dsn, "c")
    assert source.describe().dims == dims
    assert [pack_vector(item.vector) for item in items_of(source)] == [pack_vector(values)] * count


def test_every_change_changes_the_identity_and_reading_does_not(database: Database) -> None:
    make_collection(database, "mem0", usual_rows(40))
    make_collection(database, "mem0_entities", usual_rows(2))
    source = Mem0PgvectorSource(database.dsn)
    identities = [source.describe().identity]
    items_of(source)
    database.run("vacuum (freeze, analyze) mem0")
    database.run("vacuum full mem0")
    assert source.describe().identity == identities[0]
    for change in (
        "update mem0 set payload = payload || '{\"x\": 1}' where id = (select id from mem0 order by id limit 1)",
        "update mem0 set vector = vector where id = (select id from mem0 order by id limit 1)",
        "delete from mem0 where id = (select id from mem0 order by id limit 1)",
        "insert into mem0 values (gen_random_uuid(), null, '{}')",
        "update mem0_entities set payload = payload",
        "drop table mem0_entities",
    ):
        database.run(change)
        identities.append(source.describe().identity)
    assert len(set(identities)) == len(identities)


def test_what_is_no_collection_is_refused_with_what_is_there(database: Database) -> None:
    make_collection(database, "work", [])
    make_collection(database, "work_entities", [])
    make_collection(database, "mem0migrations", [])
    database.run(
        "create table memory_migrations (id serial, user_id text unique)",
        "create table memories (id uuid primary key, memory text)",
        "create table odd (id uuid primary key, vector text, payload jsonb)",
    )
    with pytest.raises(SourceDataError, match="no table for collection `mem0`") as raised:
        Mem0PgvectorSource(database.dsn).describe()
    assert raised.value.hints == ("it has `odd`, `work`",)
    with pytest.raises(SourceDataError, match="no column `vector`"):
        Mem0PgvectorSource(database.dsn, "memories").describe()
    with pytest.raises(SourceDataError, match="holds no embeddings"):
        Mem0PgvectorSource(database.dsn, "odd").describe()
    with pytest.raises(SourceDataError, match="no collections|has no table"):
        Mem0PgvectorSource(database.dsn, schema="nowhere").describe()


def test_a_key_that_two_rows_share_is_refused_and_a_view_with_one_is_read(database: Database) -> None:
    make_collection(database, "base", usual_rows(5))
    database.run(
        "create view mem0 as select * from base",
        "create table twice as select * from base union all select * from base",
        "create table holes as select null::uuid id, vector, payload from base limit 1",
    )
    source = Mem0PgvectorSource(database.dsn)
    before = source.describe()
    assert len(items_of(source)) == before.counts["memory"] == 5
    database.run("update base set payload = '{}' where id = (select id from base limit 1)")
    assert source.describe().identity != before.identity
    for name in ("twice", "holes"):
        with pytest.raises(SourceDataError, match="two rows with the same one"):
            Mem0PgvectorSource(database.dsn, name).describe()


def test_names_and_keys_are_quoted(database: Database) -> None:
    name = 'we"ird; drop table x --'
    make_collection(database, name.replace('"', '""'), usual_rows(3))
    source = Mem0PgvectorSource(database.dsn, name)
    items = items_of(source)
    assert [items_of(source, item.position) for item in items] == [items[1:], items[2:], []]


def test_a_database_of_another_encoding_is_read(database: Database) -> None:
    name = f"{database.name}_latin1"
    database.run(f"create database {name} encoding 'LATIN1' locale 'C' template template0")
    try:
        other = Database(database.server, name)
        other.run("create extension vector")
        make_collection(other, "mem0", [(uuid.UUID(int=1), None, '{"data": "café"}')])
        assert [item.data for item in items_of(Mem0PgvectorSource(other.dsn))] == [{"data": "café"}]
    finally:
        drop_database(database.server, name)


def test_no_message_has_the_password(database: Database) -> None:
    secret = "s3cret-of-the-source"  # pragma: allowlist secret
    with pytest.raises(ConnectError) as raised:
        Mem0PgvectorSource(f"postgresql://app:{secret}@{database.server.address}/none").describe()
    with pytest.raises(ConfigError) as unreadable:
        list(Mem0PgvectorSource(f"host=db password='{secret}").read())
    for error in (raised.value, unreadable.value):
        assert secret not in str(error) + repr(error) + str(error.hints)
    assert secret not in repr(Mem0PgvectorSource(f"password={secret}"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_large_collection_takes_no_more_memory_than_a_small_one(database: Database) -> None:
    database.run(
        "create table mem0 (id uuid primary key, vector vector(256), payload jsonb)",
        "insert into mem0 select gen_random_uuid(), array_fill(random()::real, array[256])::vector,"
        " jsonb_build_object('data', repeat(md5(n::text), 60)) from generate_series(1, 50000) n",
    )  # 50 MB of embeddings and 96 MB of texts
    make_collection(database, "small", usual_rows(500))
    assert len(items_of(Mem0PgvectorSource(database.dsn, "small"))) == 500
    before, count, highest = resident_bytes(), 0, 0
    for _ in Mem0PgvectorSource(database.dsn).read():
        count += 1
        if count % 1000 == 1:
            highest = max(highest, resident_bytes())
    assert count == 50_000
    assert highest - before < 24 << 20


# Row security


POLICY = "create policy own on mem0 using ((payload ->> 'user_id') = current_setting('app.user_id', true))"


def test_rows_that_a_policy_hides_are_never_left_out_silently(database: Database) -> None:
    rows = {
        "mig_owner": "nologin",
        "mig_reader": "nologin",
        "mig_all": "nologin bypassrls",
        "mig_login": "login bypassrls",
    }
    with database.roles(**rows):
        make_collection(database, "mem0", usual_rows(6))
        database.run(
            "alter table mem0 owner to mig_owner",
            "grant select on mem0 to mig_reader, mig_all, mig_login",
            "alter table mem0 enable row level security",
            POLICY,
            "create view invoked with (security_invoker = true) as select * from mem0",
            "grant select on invoked to mig_reader, mig_all",
        )
        reader = Mem0PgvectorSource(database.acting_as("mig_reader"))
        for use in (reader.describe, lambda: list(reader.read())):
            with pytest.raises(StateRefusedError, match="row security of `public.mem0` would hide rows") as raised:
                use()
            assert "`mig_login`" in raised.value.hints[0]
        for role in ("mig_owner", "mig_all"):
            assert len(items_of(Mem0PgvectorSource(database.acting_as(role)))) == 6
        with pytest.raises(StateRefusedError, match="may not read all rows"):
            list(Mem0PgvectorSource(database.acting_as("mig_reader"), "invoked").read())
        assert len(items_of(Mem0PgvectorSource(database.acting_as("mig_all"), "invoked"))) == 6
        database.run("alter table mem0 force row level security")
        with pytest.raises(StateRefusedError, match="would hide rows from role `mig_owner`"):
            Mem0PgvectorSource(database.acting_as("mig_owner")).describe()
        assert len(items_of(Mem0PgvectorSource(database.dsn))) == 6


def test_a_role_without_the_right_to_read_is_refused(database: Database) -> None:
    with database.roles(mig_reader="nologin"):
        make_collection(database, "mem0", usual_rows(1))
        with pytest.raises(StateRefusedError, match="permission denied for table mem0"):
            Mem0PgvectorSource(database.acting_as("mig_reader")).describe()
        database.run("grant select on mem0 to mig_reader")
        assert len(items_of(Mem0PgvectorSource(database.acting_as("mig_reader")))) == 1


# vecs


def make_vecs(database: Database, name: str, rows: Sequence[tuple[str, Any, Any]]) -> None:
    """Make a collection as vecs 0.4 does."""
    database.run(
        "create schema if not exists vecs",
        f'create table vecs."{name}" (id varchar not null, vec vector({DIMS}) not null,'
        " metadata jsonb not null default '{}'::jsonb, primary key (id))",
        f'create index on vecs."{name}" using gin (metadata jsonb_path_ops)',
    )
    with closing(admin_connection(database.server, database.name)) as connection, connection.cursor() as cursor:
        cursor.executemany(f'insert into vecs."{name}" values (%s, %s, %s)'.encode(), rows)


def test_a_collection_of_vecs_is_read_and_resumed(database: Database) -> None:
    keys = ["b", "a", "B", "ä", "a:b", "", " ", "memory:1", "Ω" * 40, str(uuid.uuid4()), "10", "9"]
    rows = [(key, spell(vector(number)), json.dumps(payload(number))) for number, key in enumerate(keys)]
    make_vecs(database, "mem0", rows)
    make_vecs(database, "mem0_entities", rows[:2])
    source = VecsSource(database.dsn)
    info = source.describe()
    assert (info.name, info.counts, info.dims) == ("vecs", {"memory": 12, "entity": 2}, DIMS)
    items = items_of(source)
    assert bits(items[:12]) == {key: pack_vector(vector(number)) for number, key in enumerate(keys)}
    assert {item.source_id: item.data for item in items[:12]} == {key: payload(n) for n, key in enumerate(keys)}
    for number, item in enumerate(items):
        assert items_of(source, item.position) == items[number + 1 :]
    with pytest.raises(SourceDataError, match="no collection `other`") as raised:
        VecsSource(database.dsn, "other").describe()
    assert raised.value.hints == ("it has `mem0`",)


# Canonical tables on Supabase


@pytest.fixture
def supabase(server: Server) -> Iterator[Database]:
    """A database with what a Supabase project has: its roles, `auth.uid()`, pgvector in schema `extensions`."""
    roles = {"anon": "nologin", "authenticated": "nologin", "service_role": "nologin bypassrls"}
    with scratch_database(server, rolled_out=False) as name:
        database = Database(server, name)
        with database.roles(**roles):
            database.run(
                "create schema extensions",
                "create extension vector schema extensions",
                "create schema auth",
                "create function auth.uid() returns uuid language sql stable as"
                " $$ select nullif(current_setting('request.jwt.claims', true)::json ->> 'sub', '')::uuid $$",
                "grant usage on schema auth, extensions to anon, authenticated, service_role",
                "alter default privileges in schema public grant all on tables to anon, authenticated, service_role",
            )
            yield database


CANONICAL = """
create table memories (
  id uuid primary key default gen_random_uuid(), user_id text, agent_id text, run_id text, memory text not null,
  hash text, metadata jsonb default '{}', categories text[] default '{}', embedding extensions.vector(8),
  created_at timestamptz default now(), updated_at timestamptz default now(),
  fts tsvector generated always as (to_tsvector('english', memory)) stored
);
create table memory_relationships (
  id uuid primary key default gen_random_uuid(), source_memory_id uuid references memories, target_memory_id uuid
  references memories, relationship_type text, strength numeric, metadata jsonb, user_id text, created_at timestamptz
);
create table memory_history (
  id uuid primary key default gen_random_uuid(), memory_id uuid, operation text, old_value jsonb, new_value jsonb,
  user_id text, timestamp timestamptz default now()
);
alter table memories enable row level security;
create policy own on memories using (auth.uid()::text = user_id);
alter table memory_history enable row level security;
create policy own on memory_history using (auth.uid()::text = user_id);
"""
ALICE = uuid.UUID(int=0xA)


def fill_canonical(database: Database, count: int) -> None:
    with closing(admin_connection(database.server, database.name)) as connection:
        connection.execute(b"set search_path = public, extensions")
        for number in range(count):
            connection.execute(
                b"insert into memories (id, user_id, agent_id, memory, hash, metadata, categories, embedding, created_at,"
                b" updated_at) values (%s, %s, null, %s, %s, %s, %s, %s, '2025-01-15 10:00:00.5+01', 'infinity')",
                (
                    uuid.UUID(int=number + 1), str(ALICE), f"memory {number}", f"{number:032x}",
                    json.dumps({"topic": "x", "n": 1.5}), ["a", "b, c"], spell(vector(number)),
                ),
            )  # fmt: skip


def test_canonical_tables_are_read_with_their_relationships_and_history(supabase: Database) -> None:
    supabase.run(CANONICAL)
    fill_canonical(supabase, 6)
    supabase.run(
        "insert into memory_relationships select gen_random_uuid(), a.id, b.id, 'related_to', 0.50, '{}', a.user_id,"
        " '2025-01-15T10:00:00Z' from memories a join memories b on a.id < b.id",
        "insert into memory_history (memory_id, operation, new_value, user_id, timestamp)"
        " select id, 'create', '{\"memory\": \"x\"}', user_id, '2025-01-15T10:00:00Z' from memories",
        "create view mem0_history as select * from memory_history",
    )
    source = CanonicalTableSource(supabase.dsn)
    info = source.describe()
    assert (info.name, info.dims) == ("canonical", DIMS)
    assert info.counts == {"memory": 6, "relationship": 15, "history": 6}
    items = items_of(source)
    first = items[0]
    assert first.data == {
        "user_id": str(ALICE),
        "agent_id": None,
        "run_id": None,
        "memory": "memory 0",
        "hash": "0" * 32,
        "metadata": {"topic": "x", "n": 1.5},
        "categories": ["a", "b, c"],
        "created_at": "2025-01-15T09:00:00.5+00:00",
        "updated_at": "infinity",
    }
    assert bits(items[:6]) == {str(uuid.UUID(int=n + 1)): pack_vector(vector(n)) for n in range(6)}
    relationship, change = items[6], items[-1]
    assert relationship.data["strength"] == 0.5
    assert relationship.data["source_memory_id"] in bits(items[:6])
    assert (change.kind, change.data["operation"], change.data["new_value"]) == ("history", "create", {"memory": "x"})
    for number, item in enumerate(items):
        assert items_of(source, item.position) == items[number + 1 :]


def test_policies_of_supabase_hide_nothing(supabase: Database) -> None:
    supabase.run(CANONICAL)
    fill_canonical(supabase, 3)
    for role in ("anon", "authenticated"):
        with pytest.raises(StateRefusedError, match=f"would hide rows from role `{role}`"):
            list(CanonicalTableSource(supabase.acting_as(role)).read())
    assert len(items_of(CanonicalTableSource(supabase.acting_as("service_role")))) == 3
    supabase.run("alter table memories disable row level security")
    with pytest.raises(StateRefusedError, match="`public.memory_history` would hide rows from role `authenticated`"):
        CanonicalTableSource(supabase.acting_as("authenticated")).describe()


def test_columns_may_be_missing_and_others_may_be_there(supabase: Database) -> None:
    supabase.run(
        'create table notes (id bigint primary key, content text, "User" text, vec extensions.halfvec(4), deleted_at'
        " timestamptz, archived_at timestamp, state text)",
        "insert into notes values (2, 'two', 'u', '[1,2,3,4]', null, null, null),"
        " (10, 'ten', 'u', null, null, '2025-01-01', null),"
        " (9, 'nine', 'u', null, '2025-01-01', null, 'paused'), (1, 'one', 'u', null, '2025-01-01 12:00+00', null, 'odd')",
        "create table texts (id text primary key, memory text)",
    )
    source = CanonicalTableSource(supabase.dsn, "notes")
    assert (source.describe().counts, source.describe().dims) == ({"memory": 4}, 4)
    items = items_of(source)
    assert [item.source_id for item in items] == ["1", "2", "9", "10"]
    assert [item.state for item in items] == ["deleted", "active", "paused", "archived"]
    assert items[0].lifecycle == {"deleted_at": "2025-01-01T12:00:00+00:00"}
    assert items[1].data == {"content": "two", "User": "u", "state": None}
    assert items[1].vector == (1.0, 2.0, 3.0, 4.0)
    for before, after in pairwise(items):
        assert items_of(source, before.position)[0] == after
    bare = CanonicalTableSource(supabase.dsn, "texts")
    assert (bare.describe().dims, items_of(bare)) == (None, [])


def test_what_is_no_canonical_table_is_refused(supabase: Database) -> None:
    supabase.run(
        "create table memories (id uuid primary key, vector extensions.vector(8), payload jsonb)",
        "create table old_memories (id uuid, memory text)",
        "create table keyless (memory text)",
    )
    with pytest.raises(SourceDataError, match="none of the columns memory, content, text, data") as raised:
        CanonicalTableSource(supabase.dsn).describe()
    assert "pgvector store" in raised.value.hints[0]
    with pytest.raises(SourceDataError, match="no table `other`") as missing:
        CanonicalTableSource(supabase.dsn, "other").describe()
    assert missing.value.hints == ("it has `old_memories`",)
    with pytest.raises(SourceDataError, match="no column `id`"):
        CanonicalTableSource(supabase.dsn, "keyless").describe()


def test_a_connection_that_is_lost_ends_in_an_error_and_a_position_to_go_on_behind(database: Database) -> None:
    make_collection(database, "mem0", usual_rows(1000))
    source = Mem0PgvectorSource(database.dsn)
    whole = items_of(source)
    read: list[Any] = []

    def read_on() -> None:
        for item in source.read():
            read.append(item)
            if len(read) == 250:
                database.run(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'memharbor migrate'"
                    " and datname = current_database()"
                )

    with pytest.raises(ConnectError, match="the connection was lost"):
        read_on()
    assert len(read) < 1000
    assert read + items_of(source, read[-1].position) == whole
