"""
Long-lived connections over 20,000 memories: stock Mem0 silently loses rows there, Memharbor's schema gives them all.

After five executions psycopg prepares a statement, and after five more PostgreSQL may take a plan that does not know the
user: an HNSW scan of everybody's memories that is filtered afterwards. So every search here runs more often than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from memharbor import schema
from memharbor.database import connect
from memharbor.embedder import embed
from memharbor.settings import Settings
from tests import corpus
from tests.containers import Server
from tests.memory_database import memory_database
from tests.unmodified_mem0 import Memories, Role, unmodified_mem0

DIMS = 384
REPEATS = 25
TOP_K = 20
LIGHT_USER, MIDDLE_USER, HEAVY_USER = corpus.USERS[-1], corpus.USERS[1], corpus.HEAVY_USER
QUERIES = ("a walk to the sea", "who was married", "the captain and his ship", "a letter from London")


@pytest.fixture(scope="module")
def database(server: Server) -> str:
    name = memory_database(server, "mem0_corpus", DIMS)
    with closing(connect(server.admin_dsn(name), autocommit=True)) as connection:
        if connection.execute("select count(*) from memories").fetchone() == (0,):
            assert corpus.load(connection, DIMS) == corpus.ROW_COUNT
            connection.execute("vacuum analyze memharbor.memories")
        report = schema.tenant_indexes(connection, Settings(database=name, embedding_dims=DIMS))
        assert [index.user_id for index in (*report.created, *report.kept)] == [HEAVY_USER]
    return name


@pytest.fixture(scope="module", params=["service", "app"])
def memories(request: pytest.FixtureRequest, server: Server, database: str) -> Iterator[Memories]:
    role: Role = request.param
    with unmodified_mem0(role, server.pool_dsn(database, role), dims=DIMS) as made:
        yield made


def exact_ids(server: Server, database: str, user_id: str, query: str, count: int) -> list[str]:
    """The nearest memories by comparing with every one."""
    with closing(connect(server.admin_dsn(database))) as connection:
        connection.execute("set local enable_indexscan = off")
        found = connection.execute(
            "select id from memories where user_id = %s order by embedding <=> %s::real[]::vector, id limit %s",
            (user_id, embed(query, DIMS), count),
        )
        return [str(row[0]) for row in found]


def nearest(memory: Any, user_id: str, query: str, count: int) -> list[str]:
    return [row.id for row in memory.vector_store.search(query, embed(query, DIMS), count, {"user_id": user_id})]


@pytest.mark.parametrize("user_id", [LIGHT_USER, MIDDLE_USER])
@pytest.mark.parametrize("query", QUERIES)
def test_a_user_without_an_index_gets_every_search_exactly_right(
    memories: Memories, server: Server, database: str, user_id: str, query: str
) -> None:
    expected = set(exact_ids(server, database, user_id, query, 60))
    for _ in range(REPEATS):
        assert set(nearest(memories.of(user_id), user_id, query, 60)) == expected


@pytest.mark.parametrize("query", QUERIES)
def test_a_user_with_an_index_gets_full_results_with_high_recall(
    memories: Memories, server: Server, database: str, query: str
) -> None:
    expected = set(exact_ids(server, database, HEAVY_USER, query, 10))
    for _ in range(REPEATS):
        found = nearest(memories.of(HEAVY_USER), HEAVY_USER, query, 60)
        assert len(found) == 60
        assert len(expected & set(found[:10])) >= 9


@pytest.mark.parametrize("user_id", [LIGHT_USER, MIDDLE_USER, HEAVY_USER])
def test_mem0s_own_search_is_full_every_time(memories: Memories, user_id: str) -> None:
    for _ in range(REPEATS):
        found = memories.of(user_id).search(
            "the captain and his ship", filters={"user_id": user_id}, top_k=TOP_K, threshold=0.0
        )["results"]
        assert len(found) == TOP_K
        assert {result["user_id"] for result in found} == {user_id}


def test_a_new_memory_of_a_user_with_an_index_is_found_at_once(memories: Memories) -> None:
    text = f"The zeppelin of {memories.role} landed on the roof"
    memory = memories.of(HEAVY_USER)
    identifier = memory.add(text, user_id=HEAVY_USER, infer=False)["results"][0]["id"]
    try:
        assert nearest(memory, HEAVY_USER, text, 5)[0] == identifier
    finally:
        memory.delete(identifier)


def test_stock_mem0_loses_rows_of_the_same_memories(server: Server) -> None:
    """The control: without it nobody would know whether the tests above can fail."""
    database = "mem0_stock"
    with closing(connect(server.admin_dsn(), autocommit=True)) as connection:
        connection.execute(f"drop database if exists {database} with (force)".encode())
        connection.execute(f"create database {database}".encode())
    with unmodified_mem0("service", server.admin_dsn(database), dims=DIMS) as stock:
        memory = stock.of(LIGHT_USER)
        with closing(connect(server.admin_dsn(database))) as connection:
            connection.execute("create extension vector")
            connection.commit()
            load_stock(connection)
            memory.vector_store._ensure_collection()  # finds its table
            connection.execute("create index mem0_hnsw_idx on mem0 using hnsw (vector vector_cosine_ops)")
            connection.commit()
        counts = [len(nearest(memory, LIGHT_USER, QUERIES[2], 60)) for _ in range(REPEATS)]
        assert min(counts) < 10, f"stock Mem0 returned {counts} of 60 rows"


def load_stock(connection: psycopg.Connection[Any]) -> None:
    """Put two users' memories into Mem0's own table, as Mem0 creates it; its index comes after the rows."""
    connection.execute(f"create table mem0 (id uuid primary key, vector vector({DIMS}), payload jsonb)".encode())
    connection.execute("create temporary table staging (id uuid, vector real[], payload jsonb) on commit drop")
    with connection.cursor().copy("copy staging from stdin (format binary)") as copy:
        copy.set_types(["uuid", "float4[]", "jsonb"])
        for row in corpus.rows(DIMS, [*corpus.of_user(HEAVY_USER), *corpus.of_user(LIGHT_USER)]):
            copy.write_row(row)
    connection.execute(f"insert into mem0 select id, vector::vector({DIMS}), payload from staging".encode())
    connection.commit()
