"""OpenMemory with a pgvector store: memories from its SQLite, embeddings from its table, in one run and bit for bit."""

from __future__ import annotations

import json
import struct
import tracemalloc
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from memharbor.errors import SourceDataError, StateRefusedError
from memharbor.migrate.record import RawItem, pack_vector
from memharbor.migrate.sources.openmemory import OpenMemorySource
from memharbor.migrate.sources.openmemory_pgvector import CollectionTable
from tests.command_line import ok, refused
from tests.integration.test_migrate_postgres_sources import Database, make_collection, spell, vector
from tests.integration.test_migrate_sources import counts, of_openmemory
from tests.memory_database import Server
from tests.schema_databases import DIMS, scratch_database
from tests.unit.test_migrate_openmemory import made_id
from tests.unit.test_migrate_openmemory_vectors import database as openmemory_database
from tests.unit.test_migrate_openmemory_vectors import vectors_of, zip_of


@pytest.fixture
def store(server: Server) -> Iterator[Database]:
    """The database of OpenMemory's vector store."""
    with scratch_database(server, rolled_out=False) as name:
        found = Database(server, name)
        found.run("create extension vector")
        yield found


def fill(store: Database, numbers: Sequence[int], name: str = "openmemory", **options: Any) -> None:
    payload = json.dumps({"data": "tea", "user_id": "anna", "source_app": "openmemory"})
    make_collection(store, name, [(made_id(number), spell(vector(number)), payload) for number in numbers], **options)


def read(path: Path, store: Database, collection: str = "openmemory") -> dict[str, Any]:
    return vectors_of(list(OpenMemorySource(path, CollectionTable(store.dsn, collection)).read()))


def bits(found: dict[str, Any]) -> dict[str, str | None]:
    return {key: pack_vector(each) for key, each in found.items()}


def expected(count: int, there: Sequence[int]) -> dict[str, str | None]:
    numbers = range(1, count + 1)
    return {made_id(number): pack_vector(vector(number)) if number in there else None for number in numbers}


@pytest.mark.parametrize("make", [openmemory_database, zip_of])
def test_embeddings_of_unmodified_mem0_s_table_are_read_bit_for_bit(make: Any, store: Database, tmp_path: Path) -> None:
    from mem0.vector_stores.pgvector import PGVector

    there = [*range(1, 251), 9_000]
    mem0 = PGVector(
        dbname=store.name,
        collection_name="openmemory",
        embedding_model_dims=DIMS,
        connection_string=store.dsn,
        user=None,
        password=None,
        host=None,
        port=None,
        diskann=False,
        hnsw=True,
    )
    payloads = [{"data": "tea", "user_id": "anna"} for _ in there]
    mem0.insert([list(vector(number)) for number in there], payloads, [made_id(number) for number in there])
    mem0.connection_pool.close()
    path = make(tmp_path, 450)
    assert bits(read(path, store)) == expected(450, there)
    info = OpenMemorySource(path, CollectionTable(store.dsn, "openmemory")).describe()
    assert (info.name, info.dims) == ("openmemory", DIMS)


def test_any_change_of_the_table_makes_it_another_source_and_no_secret_is_in_its_name(
    store: Database, tmp_path: Path
) -> None:
    fill(store, range(1, 4))
    source = OpenMemorySource(openmemory_database(tmp_path, 3), CollectionTable(store.dsn, "openmemory"))
    identities = [source.describe().identity, source.describe().identity]
    store.run(f"update openmemory set vector = '{spell(vector(99))}' where id = '{made_id(2)}'")
    identities.append(source.describe().identity)
    store.run(f"delete from openmemory where id = '{made_id(3)}'")
    identities.append(source.describe().identity)
    store.run("create table openmemory_entities (like openmemory including all)")
    identities.append(source.describe().identity)
    assert identities[0] == identities[1]
    assert identities[3] == identities[4], "entities are not read"
    assert len(set(identities)) == 3
    assert "public.openmemory#" in identities[0]
    password = psycopg.conninfo.conninfo_to_dict(store.dsn).get("password")
    assert password
    assert str(password) not in identities[0]


def test_a_row_without_an_embedding_and_ids_that_are_no_uuids_have_none(store: Database, tmp_path: Path) -> None:
    fill(store, [1, 2])
    store.run(f"update openmemory set vector = null where id = '{made_id(1)}'")
    path = openmemory_database(tmp_path, 3, ids=[uuid.UUID(int=1).hex, uuid.UUID(int=2).hex, "mem_abc"])
    assert bits(read(path, store)) == {made_id(1): None, made_id(2): pack_vector(vector(2)), "mem_abc": None}


def test_an_older_table_has_a_folded_name_or_texts_as_ids_or_half_the_bits(store: Database, tmp_path: Path) -> None:
    fill(store, [1], "MyMem", quoted=False)
    path = openmemory_database(tmp_path, 2)
    assert bits(read(path, store, "MyMem")) == expected(2, [1])
    store.run(
        f"create table odd (id varchar primary key, vector halfvec({DIMS}), payload jsonb)",
        f"insert into odd values ('{made_id(2)}', '[1,-0.5,0,2,4,8,0.25,-0.125]', '{{}}')",
    )
    found = read(path, store, "odd")
    assert found[made_id(1)] is None
    assert tuple(found[made_id(2)]) == (1.0, -0.5, 0.0, 2.0, 4.0, 8.0, 0.25, -0.125)


def test_what_is_no_collection_is_said_to_be_none(store: Database, tmp_path: Path) -> None:
    path = openmemory_database(tmp_path, 1)
    fill(store, [1], "mem0")
    store.run("create table numbered (id bigint primary key, vector vector(8), payload jsonb)")
    for collection, said in (("openmemory", "no table for collection"), ("numbered", "is no UUID")):
        with pytest.raises(SourceDataError, match=said) as caught:
            read(path, store, collection)
        assert caught.value.hints
    with store.roles(reader="login"):
        store.run("alter table mem0 enable row level security", "grant select on mem0 to reader")
        source = OpenMemorySource(path, CollectionTable(store.acting_as("reader"), "mem0"))
        for use in (source.describe, lambda: list(source.read())):
            with pytest.raises(StateRefusedError, match="row security"):
                use()


def test_reading_is_of_one_snapshot_and_goes_on_behind_every_item(store: Database, tmp_path: Path) -> None:
    fill(store, range(1, 301))
    source = OpenMemorySource(openmemory_database(tmp_path, 300), CollectionTable(store.dsn, "openmemory"))
    items = source.read()
    seen = [next(items)]
    store.run("update openmemory set vector = null")
    seen += items
    assert bits(vectors_of(seen)) == expected(300, range(1, 301))
    store.run("delete from openmemory")
    fill(store, range(1, 301))
    for at in (1, 199, 200, 201, 300):
        item = seen[at - 1]
        assert isinstance(item, RawItem)
        assert list(source.read(item.position)) == seen[at:]


def test_memory_stays_flat(store: Database, tmp_path: Path) -> None:
    fill(store, [])
    store.run(
        "insert into openmemory select lpad(to_hex(n), 32, '0')::uuid, array_fill(0.5::float4, array[8])::vector, '{}'"
        " from generate_series(1, 10000) n"
    )

    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()
        source = OpenMemorySource(openmemory_database(folder, count), CollectionTable(store.dsn, "openmemory"))
        tracemalloc.start()
        try:
            assert sum(1 for item in source.read() if isinstance(item, RawItem) and item.vector is not None) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # what is imported and kept once
    assert peak(10_000) - peak(1_000) < 1_000_000


def stored(dsn: str) -> dict[str, bytes]:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        rows = connection.execute(
            "select id::text, vector_send(embedding) from memharbor.memories where embedding is not null"
        ).fetchall()
    return {str(key): bytes(sent)[4:] for key, sent in rows}


def test_a_run_carries_them_embeds_the_rest_and_changes_nothing_twice(
    dsn: str, store: Database, server: Server, tmp_path: Path
) -> None:
    fill(store, range(1, 9))
    with ExitStack() as stack:
        arguments, _ = of_openmemory(tmp_path, stack, server)
    environ = {"MEMHARBOR_SOURCE_DSN": store.dsn}
    run = ["migrate", "run", *arguments, "--collection", "openmemory", "--model", "memharbor-hash", "--no-checkpoint"]
    foretold = ok(dsn, *run, "--dry-run", **environ)
    done = ok(dsn, *run, **environ)
    assert counts(done) == {"read": 13, "inserted": 12, "refused": 1}
    assert (counts(foretold), foretold["reasons"]) == (counts(done), done["reasons"])
    found = stored(dsn)
    carried = {made_id(number): struct.pack(f">{DIMS}f", *vector(number)) for number in range(1, 9)}
    assert {key: found[key] for key in carried} == carried
    assert len(found) == 12, "four had none and were embedded"
    again = ok(dsn, *run, **environ)
    assert again["same"] + again["refused"] == again["read"]
    assert stored(dsn) == found
    assert ok(dsn, "migrate", "compare", **environ) == {"missing": 0, "extra": 0, "different": 0, "rows": []}


def test_embeddings_of_other_dims_are_refused_and_the_others_come_in(
    dsn: str, store: Database, server: Server, tmp_path: Path
) -> None:
    store.run("create table openmemory (id uuid primary key, vector vector, payload jsonb)")
    store.run(f"insert into openmemory values ('{made_id(1)}', '[1,2,3]', '{{}}')")
    store.run(f"insert into openmemory values ('{made_id(2)}', '{spell(vector(2))}', '{{}}')")
    with ExitStack() as stack:
        arguments, _ = of_openmemory(tmp_path, stack, server)
    run = ["migrate", "run", *arguments, "--collection", "openmemory", "--no-checkpoint"]
    done = ok(dsn, *run, MEMHARBOR_SOURCE_DSN=store.dsn)
    assert (done["reasons"], done["inserted"]) == ({"not-mapped": 1, "wrong-dims": 1}, 11)
    assert list(stored(dsn)) == [made_id(2)]


def test_a_table_that_changed_meanwhile_is_noticed_and_refused(
    dsn: str, store: Database, server: Server, tmp_path: Path
) -> None:
    fill(store, range(1, 13))
    with ExitStack() as stack:
        arguments, _ = of_openmemory(tmp_path, stack, server)
    environ = {"MEMHARBOR_SOURCE_DSN": store.dsn}
    ok(dsn, "migrate", "run", *arguments, "--collection", "openmemory", "--no-checkpoint", "--until", "read", **environ)
    refused(3, "address of the database that has the embeddings", dsn, "migrate", "resume", MEMHARBOR_SOURCE_DSN="")
    store.run(f"update openmemory set vector = '{spell(vector(99))}' where id = '{made_id(2)}'")
    refused(9, "is not what it was", dsn, "migrate", "resume", **environ)
