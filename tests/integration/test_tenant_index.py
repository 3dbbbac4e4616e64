"""Users with many memories get a vector index of their own, and the planner takes it for Mem0's own SQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from memharbor import schema
from memharbor.database import Connection, connect
from memharbor.errors import ConnectError, StateRefusedError
from memharbor.schema.tenants import index_name
from memharbor.settings import Settings
from tests.memory_database import Server
from tests.schema_databases import (
    admin_connection,
    apply_roles,
    drop_database,
    role_connection,
    scratch_database,
    settings_for,
)

HEAVY, MIDDLE, LIGHT = "heavy", "middle", "light"
# Verbatim from mem0ai 2.2.1, vector_stores/pgvector.py.
SEARCH = (
    'SELECT id, vector <=> %s::vector AS distance, payload FROM "{}" WHERE payload->>%s = %s ORDER BY distance LIMIT 60'
)
KEYWORD_SEARCH = (
    "SELECT id, ts_rank_cd(to_tsvector('simple', payload->>'text_lemmatized'), plainto_tsquery('simple', %s)) AS score,"
    " payload FROM \"{}\" WHERE to_tsvector('simple', payload->>'text_lemmatized') @@ plainto_tsquery('simple', %s)"
    " AND payload->>%s = %s ORDER BY score DESC LIMIT 60"
)
HOSTILE = [
    "o'brien",
    'dr "drop" \\ table; --',
    "{{ 7 * 7 }} {% raw %}",
    "$$; drop table memharbor.memories; --",
    "%s %(x)s %",
    "ünï🐘\n\t",
    "x" * 500,
]


def insert_memories(connection: Connection, user: str, count: int, dims: int) -> None:
    """Insert memories whose embeddings lie in forty clusters, made on the server."""
    connection.execute(
        "insert into public.mem0 (id, vector, payload)"
        " select gen_random_uuid(),"
        " (select array_agg(sin(d * (1 + n %% 40)) + random() - 0.5 + 0 * n) from generate_series(1, %s) d)::vector,"
        " jsonb_build_object('data', 'fact ' || n, 'user_id', %s::text, 'text_lemmatized', 'fact ' || n)"
        " from generate_series(1, %s) n",
        (dims, user, count),
    )


def roll_out(server: Server, settings: Settings) -> None:
    apply_roles(server)
    drop_database(server, settings.database)
    with closing(admin_connection(server)) as connection:
        schema.ensure_database(connection, settings)
    with closing(admin_connection(server, settings.database)) as connection:
        schema.apply(connection, settings)


@pytest.fixture(scope="module", params=[(384, 6000), (2000, 4000)], ids=["vector(384)", "halfvec(2000)"])
def searched(server: Server, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """A database with one user past the threshold, one below it, and many small ones."""
    dims, heavy_count = request.param
    settings = settings_for("schema_tenants", embedding_dims=dims, tenant_index_threshold_rows=heavy_count * 5 // 6)
    roll_out(server, settings)
    with closing(admin_connection(server, settings.database)) as connection:
        connection.execute("select setseed(0.5)")
        insert_memories(connection, HEAVY, heavy_count, dims)
        insert_memories(connection, MIDDLE, heavy_count // 8, dims)
        insert_memories(connection, LIGHT, 60, dims)
        for number in range(20):
            insert_memories(connection, f"small-{number}", 20, dims)
        report = schema.tenant_indexes(connection, settings)
        assert [(index.user_id, index.row_count) for index in report.created] == [(HEAVY, heavy_count)]
    yield settings
    drop_database(server, settings.database)


def explain(connection: Connection, query: str, *parameters: object) -> str:
    rows = connection.execute(f"explain (costs off) {query}", parameters).fetchall()
    return "\n".join(row[0] for row in rows)


def vector(dims: int) -> str:
    return "[" + ",".join(str((number * 7919) % 13 - 6) for number in range(dims)) + "]"


@pytest.mark.parametrize("role", ["app", "service"])
@pytest.mark.parametrize("collection", ["mem0", "memories"])
def test_mem0s_search_takes_the_users_own_index_and_exact_search_for_the_others(
    server: Server, searched: Settings, role: str, collection: str
) -> None:
    probe, query = vector(searched.embedding_dims), SEARCH.format(collection)
    with closing(role_connection(server, searched.database, role)) as connection:
        for user in (HEAVY, MIDDLE, LIGHT, "small-3"):
            with connection.transaction():
                connection.execute("select set_config('app.user_id', %s, true)", (user,))
                plan = explain(connection, query, probe, "user_id", user)
                found = connection.execute(query, (probe, "user_id", user)).fetchall()
            if user == HEAVY:
                assert f"Index Scan using {index_name(HEAVY)} on memories" in plan
            else:
                assert "memories_payload_user_id" in plan
                assert "hnsw" not in plan
            assert len(found) == (20 if user == "small-3" else 60)
            if role == "app":
                assert "One-Time Filter" in plan


@pytest.mark.parametrize("role", ["app", "service"])
def test_mem0s_keyword_search_takes_an_index_for_everyone(server: Server, searched: Settings, role: str) -> None:
    with closing(role_connection(server, searched.database, role)) as connection:
        for user in (HEAVY, LIGHT):
            with connection.transaction():
                connection.execute("select set_config('app.user_id', %s, true)", (user,))
                plan = explain(connection, KEYWORD_SEARCH.format("mem0"), "17", "17", "user_id", user)
            assert "Seq Scan" not in plan
            if user == HEAVY:
                assert "memories_text_lemmatized" in plan


def test_the_plan_is_the_same_after_many_executions_of_a_prepared_statement(server: Server, searched: Settings) -> None:
    probe = vector(searched.embedding_dims)
    with closing(role_connection(server, searched.database, "app")) as connection, connection.transaction():
        connection.execute("select set_config('app.user_id', %s, true)", (HEAVY,))
        connection.execute(
            "prepare search (text, text, text) as select id, vector <=> $1::vector as distance, payload"
            " from mem0 where payload->>$2 = $3 order by distance limit 60"
        )
        for _ in range(12):
            connection.execute(f"execute search ('{probe}', 'user_id', '{HEAVY}')")
        plan = explain(connection, f"execute search ('{probe}', 'user_id', '{HEAVY}')")
    assert index_name(HEAVY) in plan


def test_nine_of_ten_nearest_are_found(server: Server, searched: Settings) -> None:
    query = SEARCH.format("mem0")
    hits = 0
    with closing(role_connection(server, searched.database, "app")) as connection:
        for number in range(10):
            with connection.transaction():
                connection.execute("select set_config('app.user_id', %s, true)", (HEAVY,))
                row = connection.execute("select vector::text from mem0 offset %s limit 1", (number * 37,)).fetchone()
                assert row is not None
                found = connection.execute(query, (row[0], "user_id", HEAVY)).fetchall()
                connection.execute("set local enable_indexscan = off")
                exact = connection.execute(query, (row[0], "user_id", HEAVY)).fetchall()
            assert len(found) == 60
            hits += len({row[0] for row in found[:10]} & {row[0] for row in exact[:10]})
    assert hits >= 90


def test_a_second_run_changes_nothing_and_drift_knows_no_users_index(server: Server, searched: Settings) -> None:
    with closing(admin_connection(server, searched.database)) as connection:
        report = schema.tenant_indexes(connection, searched)
        assert (report.changed, [index.user_id for index in report.kept]) == (False, [HEAVY])
        assert schema.verify(connection, searched) == []
        assert schema.apply(connection, searched).changed is False


# --- which users -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(server: Server) -> Iterator[Settings]:
    with scratch_database(server) as name:
        yield settings_for(name, tenant_index_threshold_rows=10, tenant_index_limit=len(HOSTILE))


@pytest.fixture
def connection(server: Server, small: Settings) -> Iterator[Connection]:
    with closing(admin_connection(server, small.database)) as opened:
        yield opened


def indexes(connection: Connection) -> set[str]:
    rows = connection.execute("select indexname from pg_indexes where indexname like 'memories\\_hnsw\\_%'").fetchall()
    return {row[0] for row in rows}


def test_user_ids_may_hold_anything(server: Server, connection: Connection, small: Settings) -> None:
    for user in HOSTILE:
        insert_memories(connection, user, 10, small.embedding_dims)
    report = schema.tenant_indexes(connection, small)
    assert {index.user_id for index in report.created} == set(HOSTILE)
    assert indexes(connection) == {index_name(user) for user in HOSTILE}
    comments = connection.execute(
        "select obj_description(oid, 'pg_class') from pg_class where relname like 'memories\\_hnsw\\_%'"
    ).fetchall()
    assert {comment for (comment,) in comments} == set(HOSTILE)
    assert schema.tenant_indexes(connection, small).changed is False
    with closing(role_connection(server, small.database, "service")) as service:
        service.execute("set enable_indexscan = on; set enable_sort = off")
        for user in HOSTILE:
            plan = explain(service, SEARCH.format("mem0"), vector(small.embedding_dims), "user_id", user)
            assert index_name(user) in plan


def test_the_largest_come_first_within_the_limit(connection: Connection, small: Settings) -> None:
    for number, user in enumerate("abcdefghi"):
        insert_memories(connection, user, 10 + number, small.embedding_dims)
    report = schema.tenant_indexes(connection, small)
    assert [index.user_id for index in report.created] == list("ihgfedc")
    assert [index.user_id for index in report.waiting] == ["b", "a"]


def test_an_index_goes_when_its_user_is_below_half_the_threshold(connection: Connection, small: Settings) -> None:
    insert_memories(connection, "a", 10, small.embedding_dims)
    schema.tenant_indexes(connection, small)
    for left, expected in ((6, False), (4, True)):
        connection.execute(
            "delete from memharbor.memories where id in (select id from memharbor.memories offset %s)", (left,)
        )
        foretold = schema.tenant_indexes(connection, small, dry_run=True)
        assert (foretold.changed, indexes(connection) != set()) == (expected, True)
        done = schema.tenant_indexes(connection, small)
        assert [index.user_id for index in done.dropped] == (["a"] if expected else [])
    assert indexes(connection) == set()


def test_memories_without_a_user_have_no_index(connection: Connection, small: Settings) -> None:
    connection.execute(
        'insert into public.mem0 select gen_random_uuid(), null, \'{"agent_id": "a"}\' from generate_series(1, 20)'
    )
    assert schema.tenant_indexes(connection, small).changed is False


def test_without_a_schema_it_is_refused_with_the_next_command(server: Server) -> None:
    with (
        scratch_database(server, rolled_out=False) as name,
        closing(admin_connection(server, name)) as connection,
        pytest.raises(StateRefusedError, match="not rolled out"),
    ):
        schema.tenant_indexes(connection, settings_for(name))


def test_a_build_that_is_killed_is_finished_by_the_next_run(
    server: Server, connection: Connection, small: Settings
) -> None:
    insert_memories(connection, "a", 10, small.embedding_dims)
    blocker = connect(server.admin_dsn(small.database))
    blocker.execute("lock table memharbor.memories in row exclusive mode")

    def kill() -> None:
        with closing(admin_connection(server)) as other:
            for _ in range(200):
                killed = other.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s"
                    " and wait_event_type = 'Lock' and query like '%%create index concurrently%%'",
                    (small.database,),
                ).fetchall()
                if killed:
                    return
                time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ConnectError, match=f"create the vector index `{index_name('a')}`"):
        schema.tenant_indexes(connection, small)
    killer.join()
    blocker.close()
    with closing(admin_connection(server, small.database)) as again:
        foretold = schema.tenant_indexes(again, small, dry_run=True)
        assert (foretold.repaired, [index.user_id for index in foretold.created]) == ((index_name("a"),), ["a"])
        done = schema.tenant_indexes(again, small)
        assert (done.repaired, [index.user_id for index in done.created]) == (foretold.repaired, ["a"])
        row = again.execute("select bool_and(indisvalid) from pg_index").fetchone()
        assert row == (True,)
        assert schema.tenant_indexes(again, small).changed is False


def test_writers_go_on_while_an_index_is_built(server: Server, connection: Connection, small: Settings) -> None:
    insert_memories(connection, "a", 2000, small.embedding_dims)
    written: list[int] = []
    stop = threading.Event()

    def write() -> None:
        with closing(psycopg.connect(server.direct_dsn(small.database, "app"), autocommit=True)) as app:
            app.execute("select set_config('app.user_id', 'b', false)")
            while not stop.is_set():
                app.execute('insert into mem0 values (gen_random_uuid(), null, \'{"user_id": "b"}\')')
                written.append(1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not written:
            time.sleep(0.01)
        before = len(written)
        schema.tenant_indexes(connection, small)
        assert len(written) > before
    finally:
        stop.set()
        writer.join()
    assert index_name("a") in indexes(connection)
