"""Our images with our server files: logins, TLS, what the pool forgets and keeps, crashes, and what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import docker
import psycopg
import pytest

from memharbor.stack.certificates import create_authority
from tests.containers import Server, throw_away
from tests.memory_database import memory_database

CONSOLE = ["psql", "-XAtq", "-h", "/run/pgbouncer", "-p", "6432", "-U", "pgbouncer", "-d", "pgbouncer", "-c"]


@pytest.fixture(scope="module")
def database(server: Server) -> str:
    return memory_database(server, "servers", 8)


def connect(dsn: str, **options: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(dsn, autocommit=True, **options)


def one(connection: psycopg.Connection[Any], query: str) -> Any:
    row = connection.execute(query).fetchone()  # type: ignore[arg-type]
    return row[0] if row else None


def console(server: Server, command: str) -> str:
    code, said = server.execute("pgbouncer", [*CONSOLE, command])
    assert code == 0, said
    return said


# --- the server


def test_the_cluster_is_made_as_decided(server: Server) -> None:
    with closing(connect(server.admin_dsn())) as admin:
        assert one(admin, "show data_checksums") == "on"
        assert one(admin, "show password_encryption") == "scram-sha-256"
        assert admin.execute(
            "select pg_encoding_to_char(encoding), datlocprovider::text, datlocale from pg_database where datname ="
            " 'template1'"
        ).fetchone() == ("UTF8", "b", "C.UTF-8")


def test_server_settings_come_from_one_file(server: Server) -> None:
    with closing(connect(server.admin_dsn())) as admin:
        files = admin.execute(
            "select distinct sourcefile from pg_settings where source = 'configuration file'"
        ).fetchall()
        assert files == [("/etc/memharbor/postgres/postgresql.conf",)]
        assert one(admin, "select count(*) from pg_file_settings where error is not null") == 0
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="ALTER SYSTEM"):
            admin.execute("alter system set work_mem = '5MB'")


def test_a_role_that_is_not_superuser_sets_vector_settings_and_wrong_ones_are_refused(
    server: Server, database: str
) -> None:
    with closing(connect(server.direct_dsn(database, "app"))) as app:
        app.execute("set hnsw.ef_search = 77")
        assert one(app, "show hnsw.ef_search") == "77"
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            app.execute("set hnsw.ef_search = 100000")
    with closing(connect(server.direct_dsn(database, "owner"))) as owner:
        owner.execute("alter role memharbor_owner set hnsw.iterative_scan = 'strict_order'")
        owner.execute("alter role memharbor_owner reset hnsw.iterative_scan")


def test_an_index_is_built_in_parallel(server: Server) -> None:
    with closing(connect(server.admin_dsn("postgres"))) as admin:
        admin.execute("create extension if not exists vector")
        admin.execute("drop table if exists parallel_build")
        admin.execute(
            "create table parallel_build as select array_agg(random())::vector(64) as v"
            " from generate_series(1, 3000 * 64) g group by g % 3000"
        )
        admin.execute("set max_parallel_maintenance_workers = 2; set min_parallel_table_scan_size = 0")
        admin.execute("create index on parallel_build using hnsw (v vector_cosine_ops)")
        assert one(admin, "select count(*) from pg_index where not indisvalid") == 0
        admin.execute("drop table parallel_build; drop extension vector")


def test_no_statement_parameter_or_row_reaches_the_log(server: Server) -> None:
    marker = "memory-that-must-stay-private"
    with closing(connect(server.admin_dsn())) as admin:
        admin.execute("create temp table notes (id int primary key, note text check (note = 'x'))")
        for statement, parameters in [
            (f"insert into notes values (1, '{marker}')", None),
            ("insert into notes values (1, %s)", [marker]),
            (f"select '{marker}'::int", None),
            ("do $$ begin raise exception 'no'; end $$", None),
        ]:
            with pytest.raises(psycopg.Error):
                admin.execute(statement, parameters)
    log = server.log("postgres")
    assert "violates check constraint" in log
    # The message of a failed cast quotes the value: PostgreSQL has no switch for it.
    assert log.count(marker) == log.count("invalid input syntax")


# --- logins and TLS


@pytest.mark.parametrize("through", ["direct_dsn", "pool_dsn"])
def test_nobody_gets_in_without_tls(server: Server, database: str, through: str) -> None:
    dsn = getattr(server, through)(database, "app").replace("sslmode=verify-full", "sslmode=disable")
    with pytest.raises(psycopg.OperationalError, match="no pg_hba.conf entry|SSL required|TLS required"):
        connect(dsn)


@pytest.mark.parametrize("through", ["direct_dsn", "pool_dsn"])
def test_a_client_notices_another_authority(server: Server, database: str, through: str, tmp_path: Any) -> None:
    other = tmp_path / "other.crt"
    other.write_text(create_authority("memharbor dev CA").certificate)
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        connect(getattr(server, through)(database, "app"), sslrootcert=str(other))


@pytest.mark.parametrize("through", ["direct_dsn", "pool_dsn"])
def test_a_wrong_password_is_refused(server: Server, database: str, through: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        connect(getattr(server, through)(database, "app"), password="wrong")  # pragma: allowlist secret


def test_the_superuser_does_not_pass_the_pool(server: Server, database: str) -> None:
    admin = psycopg.conninfo.conninfo_to_dict(server.admin_dsn())
    with pytest.raises(psycopg.OperationalError, match="no such user"):
        connect(server.pool_dsn(database, "app"), user="postgres", password=admin["password"])


def test_the_console_is_not_reached_from_the_network(server: Server) -> None:
    for role in ("pooler", "app", "owner"):
        with pytest.raises(psycopg.OperationalError):
            connect(server.pool_dsn("pgbouncer", role))


def test_the_pool_speaks_tls_to_the_server(server: Server, database: str) -> None:
    with closing(connect(server.pool_dsn(database, "app"))) as app:
        assert one(app, "select ssl from pg_stat_ssl where pid = pg_backend_pid()") is True


def test_the_pool_refuses_settings_that_it_would_lose(server: Server, database: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="options"):
        connect(server.pool_dsn(database, "app"), options="-c app.user_id=alice")


# --- what the pool forgets, and what it keeps

LEAVINGS = {
    "the user": ("set app.user_id = 'alice'", "select current_setting('app.user_id', true)", ("", None)),
    "claims": ("set request.jwt.claims = '{}'", "select current_setting('request.jwt.claims', true)", ("", None)),
    "a setting": ("set statement_timeout = '7ms'; set statement_timeout = '7s'", "show statement_timeout", None),
    "a search path": ("set search_path = pg_temp", "show search_path", None),
    "a cursor": (
        "begin; declare kept cursor with hold for select 1; commit",
        "select count(*) from pg_cursors where name = 'kept'",
        (0,),
    ),
    "an advisory lock": (
        "select pg_advisory_lock(4711)",
        "select count(*) from pg_locks where locktype = 'advisory' and objid = 4711",
        (0,),
    ),
    "a listener": ("listen news", "select count(*) from pg_listening_channels()", (0,)),
    "a read-only session": (
        "set session characteristics as transaction read only",
        "show default_transaction_read_only",
        ("off",),
    ),
}


@pytest.mark.parametrize("what", LEAVINGS)
def test_the_pool_forgets(server: Server, database: str, what: str) -> None:
    leave, look, expected = LEAVINGS[what]
    with closing(connect(server.pool_dsn(database, "app"))) as first:
        fresh = one(first, look)
        pid = first.execute("select pg_backend_pid()").fetchone()
        first.execute(leave)  # type: ignore[arg-type]
    with closing(connect(server.pool_dsn(database, "app"))) as second:
        assert second.execute("select pg_backend_pid()").fetchone() == pid, "another connection proves nothing"
        assert one(second, look) in (expected or (fresh,))


def test_the_pool_forgets_a_role_and_a_temporary_table(server: Server, database: str) -> None:
    with closing(connect(server.pool_dsn(database, "owner"))) as first:
        before = first.execute("select current_user, session_user, pg_backend_pid()").fetchone()
        first.execute("create temp table left_over (x int)")
        first.execute("set role pg_database_owner")
    with closing(connect(server.pool_dsn(database, "owner"))) as second:
        assert second.execute("select current_user, session_user, pg_backend_pid()").fetchone() == before
        assert one(second, "select to_regclass('pg_temp.left_over')") is None


def test_the_pool_keeps_prepared_statements_and_the_settings_of_roles(server: Server, database: str) -> None:
    with closing(psycopg.connect(server.pool_dsn(database, "app"), autocommit=True, prepare_threshold=0)) as app:
        for number in range(20):
            assert app.execute("select 4000 + %s", (number,)).fetchone() == (4000 + number,)
        calls = app.execute(
            "select generic_plans + custom_plans from pg_prepared_statements where statement like 'select 4000%'"
        ).fetchall()
        assert calls == [(20,)]
        assert one(app, "show plan_cache_mode") == "force_custom_plan"


def test_clients_wait_while_the_pool_is_paused_new_ones_too(server: Server, database: str) -> None:
    answers: list[float] = []

    def ask(connection: psycopg.Connection[Any] | None) -> None:
        with closing(connection or connect(server.pool_dsn(database, "app"))) as client:
            client.execute("select 1")
            answers.append(time.monotonic())

    waiting = connect(server.pool_dsn(database, "app"))
    console(server, f'pause "{database}"')
    threads = [threading.Thread(target=ask, args=(client,)) for client in (waiting, None)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        assert answers == []
    finally:
        resumed_at = time.monotonic()
        console(server, f'resume "{database}"')
        for thread in threads:
            thread.join(timeout=10)
    assert len(answers) == 2
    assert min(answers) >= resumed_at


# --- crashes and refusals: servers of their own


@pytest.fixture(scope="module")
def engine(server: Server) -> Iterator[Any]:
    server.container("postgres")
    with closing(docker.from_env(timeout=120)) as client:
        yield client


def test_a_killed_server_comes_back_with_its_rows(engine: Any) -> None:
    with throw_away(engine) as run:
        container = run.postgres()
        sql(container, "create table kept as select generate_series(1, 1000) as x")
        for _ in range(3):
            container.kill()
            container.start()
            run.wait(container)
            assert sql(container, "select count(*) from kept") == "1000"


def test_a_second_server_on_the_same_volume_is_refused(engine: Any) -> None:
    with throw_away(engine) as run:
        first = run.postgres()
        code, said = run.again(first)
        assert (code, "another container runs a server" in said) == (65, True), said
        assert sql(first, "select 1") == "1"


def test_a_standbys_data_directory_is_refused(engine: Any) -> None:
    with throw_away(engine) as run:
        container = run.postgres()
        container.exec_run(["touch", "/var/lib/postgresql/18/data/standby.signal"])
        container.stop()
        code, said = run.again(container)
        assert (code, "standby.signal" in said) == (65, True), said
        assert "hint:" in said


def test_a_data_directory_without_a_database_is_refused(engine: Any) -> None:
    with throw_away(engine) as run:
        container = run.postgres()
        container.exec_run(["rm", "/var/lib/postgresql/18/data/PG_VERSION"])  # pragma: allowlist secret
        container.kill()
        code, said = run.again(container)
        assert (code, "holds files but no database" in said) == (65, True), said


def sql(container: Any, statement: str) -> str:
    done = container.exec_run(["psql", "-XAtq", "-c", statement])
    said: str = done.output.decode()
    assert done.exit_code == 0, said
    return said.strip()
