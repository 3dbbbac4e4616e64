"""Rolling the schema out: once, twice, half, back and forth, together with others, and after being killed."""

from __future__ import annotations

import base64
import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from memharbor import schema
from memharbor.database import Connection, connect
from memharbor.errors import ConfigError, ConnectError, DatabaseError, StateRefusedError, UsageError
from memharbor.schema import sessions
from memharbor.schema.migrations import LEDGER_COMPONENTS
from memharbor.templates import template_root
from tests.memory_database import Server
from tests.schema_databases import admin_connection, scratch_database, settings_for, template_database


@pytest.fixture
def empty(server: Server) -> Iterator[str]:
    with scratch_database(server, rolled_out=False) as name:
        yield name


@pytest.fixture
def rolled_out(server: Server) -> Iterator[str]:
    with scratch_database(server) as name:
        with closing(admin_connection(server, name)) as connection:
            # A copy of a database lacks the privileges on the database itself.
            schema.apply(connection, settings_for(name), components=["settings"])
        yield name


@pytest.fixture
def connection(server: Server, rolled_out: str) -> Iterator[Connection]:
    with closing(admin_connection(server, rolled_out)) as opened:
        yield opened


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(template_root(), tmp_path / "sql_templates"))


def names_of(connection: Connection, query: str) -> list[str]:
    return [row[0] for row in connection.execute(query).fetchall()]


# --- once and twice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 384, 1536, 3072, 4000])
def test_a_first_run_rolls_everything_out_and_a_second_one_changes_nothing(
    server: Server, empty: str, dims: int
) -> None:
    settings = settings_for(empty, embedding_dims=dims)
    with closing(admin_connection(server, empty)) as connection:
        first = schema.apply(connection, settings)
        assert first.changed
        assert set(first.applied) == {step.name for step in schema.load_steps(settings)}
        second = schema.apply(connection, settings)
        assert (second.changed, second.applied, second.differences) == (False, (), ())
        assert schema.verify(connection, settings) == []
        assert schema.current(connection) == "0006_search_indexes"


def test_each_component_alone_gives_the_same_as_all_together(server: Server, empty: str, rolled_out: str) -> None:
    settings = settings_for(empty)
    with closing(admin_connection(server, empty)) as connection:
        for component in LEDGER_COMPONENTS:
            schema.apply(connection, settings, components=[component])
        assert schema.verify(connection, settings) == []
        apart = schema.describe_catalog(connection)
    with closing(admin_connection(server, rolled_out)) as connection:
        assert apart == schema.describe_catalog(connection)


def test_a_plan_of_an_empty_database_lists_everything_and_writes_nothing(server: Server, empty: str) -> None:
    with closing(admin_connection(server, empty)) as connection:
        connection.execute("set default_transaction_read_only = on")
        planned = schema.plan(connection, settings_for(empty))
        assert {item.state for item in planned} == {"pending"}
        assert len(planned) == len(schema.load_steps(settings_for(empty)))
        assert names_of(connection, "select nspname from pg_namespace where nspname like 'memharbor%'") == []


def test_a_database_that_does_not_exist_can_be_planned() -> None:
    planned = schema.plan(None, settings_for("nowhere"), components=["policies"])
    assert [(item.name, item.state) for item in planned] == [("policies", "pending"), ("grants", "pending")]


def test_a_dry_run_changes_nothing_and_foretells_what_a_run_changes(server: Server, empty: str) -> None:
    settings = settings_for(empty)
    with closing(admin_connection(server, empty)) as connection:
        before = schema.fingerprint(connection)
        foretold = schema.apply(connection, settings, dry_run=True)
        assert foretold.changed
        assert schema.fingerprint(connection) == before
        done = schema.apply(connection, settings)
        assert foretold.applied == done.applied
        missed = {str(d) for d in done.differences} - {str(d) for d in foretold.differences}
        # Indexes that are built CONCURRENTLY cannot be tried in a transaction.
        assert all(text.startswith("index memharbor.") for text in missed), missed
        assert {str(d) for d in foretold.differences} <= {str(d) for d in done.differences}
        assert schema.apply(connection, settings, dry_run=True).changed is False


def test_a_dry_run_of_a_part_whose_ground_is_missing_names_its_steps(server: Server, empty: str) -> None:
    with closing(admin_connection(server, empty)) as connection:
        report = schema.apply(connection, settings_for(empty), components=["policies"], dry_run=True)
    assert (report.changed, report.applied, report.differences) == (True, ("policies", "grants"), ())


def test_progress_and_history_name_every_step(server: Server, empty: str) -> None:
    settings = settings_for(empty)
    seen: list[tuple[str, int, int]] = []
    with closing(admin_connection(server, empty)) as connection:
        report = schema.apply(
            connection, settings, progress=lambda item, number, total: seen.append((item.name, number, total))
        )
        assert tuple(name for name, _, _ in seen) == report.applied
        assert [number for _, number, _ in seen] == list(range(1, len(seen) + 1))
        entries = schema.history(connection)
    assert tuple(entry.name for entry in entries) == report.applied
    assert {entry.direction for entry in entries} == {"up"}
    assert all(entry.applied_at.tzinfo is not None and entry.execution_ms >= 0 for entry in entries)


# --- back and forth --------------------------------------------------------------------------------------------------


def test_up_down_up_gives_the_identical_catalog(connection: Connection, rolled_out: str) -> None:
    settings = settings_for(rolled_out)
    before = schema.describe_catalog(connection)
    report = schema.downgrade(connection, settings, to="base")
    assert report.reverted[0] == "0006_search_indexes"
    assert report.reverted[-1] == "0001_memories"
    left = set(names_of(connection, "select relname from pg_class where relnamespace = 'memharbor'::regnamespace"))
    assert {name for name in left if not name.startswith("schema_")} == set()
    assert schema.current(connection) is None
    schema.apply(connection, settings)
    assert schema.describe_catalog(connection) == before
    assert schema.verify(connection, settings) == []


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_each_number_of_steps_down_and_up_again_gives_the_identical_catalog(
    connection: Connection, rolled_out: str, steps: int
) -> None:
    settings = settings_for(rolled_out)
    before = schema.describe_catalog(connection)
    assert len(schema.downgrade(connection, settings, steps=steps).reverted) == steps
    schema.apply(connection, settings)
    assert schema.describe_catalog(connection) == before


def test_a_downgrade_refuses_to_drop_rows_and_says_which(connection: Connection, rolled_out: str) -> None:
    settings = settings_for(rolled_out)
    connection.execute('insert into public.mem0 values (gen_random_uuid(), null, \'{"data": "x", "user_id": "a"}\')')
    before = schema.fingerprint(connection)
    with pytest.raises(
        StateRefusedError, match=r"memharbor\.memory_history \(1 rows\), memharbor\.memories \(1 rows\)"
    ):
        schema.downgrade(connection, settings, to="base")
    assert schema.fingerprint(connection) == before
    foretold = schema.downgrade(connection, settings, to="base", dry_run=True)
    assert (foretold.rows_lost, schema.fingerprint(connection)) == ({"memory_history": 1, "memories": 1}, before)
    assert schema.downgrade(connection, settings, to="0002_history").reverted[-1] == "0003_graph"
    done = schema.downgrade(connection, settings, to="base", allow_data_loss=True)
    assert done.rows_lost == {"memory_history": 1, "memories": 1}


@pytest.mark.parametrize("wrong", [{}, {"to": "base", "steps": 1}, {"to": "0009_other"}, {"steps": 0}])
def test_a_downgrade_to_nowhere_is_a_usage_error(
    connection: Connection, rolled_out: str, wrong: dict[str, object]
) -> None:
    with pytest.raises(UsageError):
        schema.downgrade(connection, settings_for(rolled_out), **wrong)  # type: ignore[arg-type]


# --- killed ----------------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    """As SIGKILL: nothing of ours catches it, and the server finds the connection gone."""


def test_a_run_that_is_killed_after_any_statement_is_continued_by_the_next(server: Server, rolled_out: str) -> None:
    with closing(admin_connection(server, rolled_out)) as connection:
        expected = schema.describe_catalog(connection)
    kills = 0
    with scratch_database(server, rolled_out=False) as name:
        settings = settings_for(name)
        killed_at: set[tuple[str, int]] = set()

        def kill(step: str, number: int, total: int) -> None:
            if (step, number) not in killed_at:
                killed_at.add((step, number))
                raise _Killed

        while True:
            with closing(admin_connection(server, name)) as connection:
                connection.execute("set synchronous_commit = off")

                def kill_connection(step: str, number: int, total: int) -> None:
                    try:
                        kill(step, number, total)
                    except _Killed:
                        connection.pgconn.finish()
                        raise

                try:
                    schema.apply(connection, settings, on_statement=kill_connection)
                    break
                except _Killed:
                    kills += 1
        assert kills == sum(len(step.statements) for step in schema.load_steps(settings))
        with closing(admin_connection(server, name)) as connection:
            assert schema.describe_catalog(connection) == expected
            assert schema.verify(connection, settings) == []
            names = [entry.name for entry in schema.history(connection)]
            assert len(names) == len(set(names))


def test_a_killed_step_leaves_nothing_and_a_lost_connection_is_said(server: Server, empty: str) -> None:
    settings = settings_for(empty)

    def kill(step: str, number: int, total: int) -> None:
        if (step, number) == ("0003_graph", 2):
            with closing(admin_connection(server)) as other:
                other.execute(
                    "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                    " where datname = %s and pid <> pg_backend_pid()",
                    (empty,),
                )

    with (
        closing(admin_connection(server, empty)) as connection,
        pytest.raises(ConnectError, match="step `0003_graph`, statement 3 of"),
    ):
        schema.apply(connection, settings, on_statement=kill)
    with closing(admin_connection(server, empty)) as connection:
        assert schema.current(connection) == "0002_history"
        assert names_of(connection, "select to_regclass('memharbor.memory_relationships')::text") == [None]
        schema.apply(connection, settings)
        assert schema.verify(connection, settings) == []


def test_an_index_build_that_was_interrupted_is_built_again(server: Server, empty: str) -> None:
    settings = settings_for(empty)
    with closing(admin_connection(server, empty)) as connection:
        schema.apply(connection, settings, components=["settings", "extension", "tables"])
    blocker = connect(server.admin_dsn(empty))
    # A transaction that may write keeps CREATE INDEX CONCURRENTLY waiting after it has made an invalid index.
    blocker.execute("lock table memharbor.memories in row exclusive mode")

    def interrupt() -> None:
        with closing(admin_connection(server)) as other:
            for _ in range(200):
                killed = other.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and wait_event_type ="
                    " 'Lock' and query like '%%create index concurrently%%'",
                    (empty,),
                ).fetchall()
                if killed:
                    return
                time.sleep(0.05)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with (
        closing(admin_connection(server, empty)) as connection,
        pytest.raises(ConnectError, match="step `0006_search_indexes`"),
    ):
        schema.apply(connection, settings)
    killer.join()
    blocker.close()
    with closing(admin_connection(server, empty)) as connection:
        invalid = "select relname from pg_index join pg_class on oid = indexrelid where not indisvalid"
        assert names_of(connection, invalid) != []
        schema.apply(connection, settings)
        assert names_of(connection, invalid) == []
        assert schema.verify(connection, settings) == []


# --- together with others --------------------------------------------------------------------------------------------


def test_two_runs_at_once_apply_each_step_once(server: Server, empty: str) -> None:
    settings = settings_for(empty)
    reports: list[schema.ApplyReport] = []

    def run() -> None:
        with closing(admin_connection(server, empty)) as connection:
            reports.append(schema.apply(connection, settings))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.changed for report in reports) == [False, False, True]
    with closing(admin_connection(server, empty)) as connection:
        names = [entry.name for entry in schema.history(connection)]
    assert len(names) == len(set(names))


def test_a_lock_that_is_released_in_time_only_delays_a_run(server: Server, rolled_out: str) -> None:
    settings = settings_for(rolled_out, lock_timeout_ms=100)
    reader = connect(server.admin_dsn(rolled_out))
    reader.execute("select count(*) from memharbor.memories")
    threading.Timer(0.6, reader.close).start()
    with closing(admin_connection(server, rolled_out)) as connection:
        connection.execute("drop policy isolate on memharbor.org_members")
        report = schema.apply(connection, settings, components=["policies"])
        assert report.changed


def test_a_lock_that_is_never_released_is_given_up_and_nothing_is_left(
    server: Server, connection: Connection, rolled_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LOCK_ATTEMPTS", 2)
    settings = settings_for(rolled_out, lock_timeout_ms=100)
    connection.execute("drop policy isolate on memharbor.org_members")
    before = schema.fingerprint(connection)
    with closing(connect(server.admin_dsn(rolled_out))) as reader:
        reader.execute("select count(*) from memharbor.memories")
        with pytest.raises(StateRefusedError, match=r"step `policies` could not get its locks in 2 attempts"):
            schema.apply(connection, settings, components=["policies"])
    assert schema.fingerprint(connection) == before


def test_a_run_that_waits_too_long_for_another_says_who_it_is(
    server: Server, rolled_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memharbor.schema import ledger

    with closing(admin_connection(server, rolled_out)) as one, closing(admin_connection(server, rolled_out)) as two:
        with (
            ledger.advisory_lock(one),
            pytest.raises(
                StateRefusedError, match=r"held this database for 0 seconds: process \d+, `\w+`, `memharbor`"
            ),
            ledger.advisory_lock(two, wait_seconds=0.2),
        ):
            pass
        with ledger.advisory_lock(two, wait_seconds=0.2):
            pass


def test_a_pooled_connection_is_refused(server: Server, rolled_out: str) -> None:
    with (
        closing(psycopg.connect(server.pool_dsn(rolled_out, "owner"))) as connection,
        pytest.raises(StateRefusedError, match="goes through a pooler"),
    ):
        schema.apply(connection, settings_for(rolled_out))


# --- refused ---------------------------------------------------------------------------------------------------------


def test_an_edited_versioned_step_is_refused_by_name(connection: Connection, rolled_out: str, root: Path) -> None:
    file = root / "versioned" / "0003_graph.up.sql"
    file.write_text(file.read_text() + "select 1;\n")
    with pytest.raises(StateRefusedError, match="`0003_graph` was applied with another text") as caught:
        schema.apply(connection, settings_for(rolled_out), root=root)
    assert caught.value.exit_code == 9
    assert caught.value.hints[-1] == "memharbor schema history"


def test_other_dimensions_are_refused_with_the_reason(connection: Connection, rolled_out: str) -> None:
    with pytest.raises(StateRefusedError, match=r"vector\(8\), the settings say vector\(16\), and dimensions cannot"):
        schema.apply(connection, settings_for(rolled_out, embedding_dims=16))


def test_a_database_of_a_newer_release_is_refused(connection: Connection, rolled_out: str, root: Path) -> None:
    for suffix in (".up.sql", ".down.sql", ".verify.sql"):
        (root / "versioned" / f"0006_search_indexes{suffix}").unlink()
    with pytest.raises(StateRefusedError, match="`0006_search_indexes` is applied .* a newer one was here"):
        schema.plan(connection, settings_for(rolled_out), root=root)


def test_a_part_without_its_ground_is_refused_with_the_next_command(server: Server, empty: str) -> None:
    with (
        closing(admin_connection(server, empty)) as connection,
        pytest.raises(StateRefusedError, match="`tables` needs `extension`") as caught,
    ):
        schema.apply(connection, settings_for(empty), components=["tables"])
    assert caught.value.hints == ("memharbor schema apply --component extension",)


def test_an_unknown_component_is_refused(connection: Connection, rolled_out: str) -> None:
    with pytest.raises(ConfigError, match="`tabels` is no component"):
        schema.apply(connection, settings_for(rolled_out), components=["tabels"])


def test_stock_mem0s_table_in_the_way_is_refused_by_name(server: Server, empty: str) -> None:
    with closing(admin_connection(server, empty)) as connection:
        connection.execute("create table public.mem0 (id uuid primary key)")
        with pytest.raises(StateRefusedError, match=r"public\.mem0 is a table of `\w+` already"):
            schema.apply(connection, settings_for(empty))
        assert names_of(connection, "select nspname from pg_namespace where nspname = 'memharbor'") == []


def test_pgvector_in_another_schema_is_refused_with_the_way_out(server: Server, empty: str) -> None:
    with closing(admin_connection(server, empty)) as connection:
        connection.execute("create schema extensions; create extension vector with schema extensions")
        with pytest.raises(DatabaseError, match="(?s)schema extensions, not in public.*alter extension vector set"):
            schema.apply(connection, settings_for(empty))


def test_a_refused_statement_is_named_with_its_step_and_number(server: Server, empty: str, root: Path) -> None:
    file = root / "versioned" / "0002_history.up.sql"
    file.write_text(
        file.read_text().replace("create index memory_history_memory_id", "create index memory_history_pkey")
    )
    with closing(admin_connection(server, empty)) as connection:
        with pytest.raises(DatabaseError, match=r"step `0002_history`, statement 2 of 4: .*already exists.*42P07"):
            schema.apply(connection, settings_for(empty), root=root)
        assert schema.current(connection) == "0001_memories"


def test_a_connection_inside_a_transaction_is_refused(server: Server, rolled_out: str) -> None:
    with closing(connect(server.admin_dsn(rolled_out))) as connection:
        connection.execute("select 1")
        with pytest.raises(ValueError, match="inside a transaction"):
            schema.apply(connection, settings_for(rolled_out))


# --- new text --------------------------------------------------------------------------------------------------------


def test_a_repeatable_step_runs_again_when_a_setting_in_it_changes(connection: Connection, rolled_out: str) -> None:
    before = schema.fingerprint(connection)
    slower = settings_for(rolled_out, statement_timeout_ms=12_345)
    try:
        report = schema.apply(connection, slower)
        assert report.applied == ("role_settings",)
        assert {d.key for d in report.differences} == {
            f"settings memharbor_{role}" for role in ("app", "service", "readonly")
        }
    finally:
        schema.apply(connection, settings_for(rolled_out))
    assert schema.fingerprint(connection) == before


def test_an_added_versioned_step_is_applied_with_its_number(
    connection: Connection, rolled_out: str, root: Path
) -> None:
    head = "-- component: tables\n-- purpose: x\n-- variables: none\n-- runs as: owner\n-- safe to repeat: x\n"
    added = root / "versioned"
    (added / "0007_extra.up.sql").write_text(head + "alter table memharbor.categories add column color text;\n")
    (added / "0007_extra.down.sql").write_text(head + "alter table memharbor.categories drop column color;\n")
    (added / "0007_extra.verify.sql").write_text(head + "select color from memharbor.categories where false;\n")
    before = schema.describe_catalog(connection)
    report = schema.apply(connection, settings_for(rolled_out), root=root)
    assert (report.applied, schema.current(connection)) == (("0007_extra",), "0007_extra")
    assert [str(d) for d in report.differences] == ["column memharbor.categories.color was added"]
    schema.downgrade(connection, settings_for(rolled_out), steps=1, root=root)
    schema.apply(connection, settings_for(rolled_out))
    assert schema.describe_catalog(connection) == before


def run_in_psql(server: Server, database: str, script: str) -> tuple[int, str]:
    """Run a script in the psql of the server's own container; its exit code and all that it said."""
    text = base64.b64encode(script.encode()).decode()
    command = 'printf %s "$1" | base64 -d | psql --no-psqlrc --quiet --output=/dev/null --dbname="$2" 2>&1'
    return server.execute("postgres", ["sh", "-c", command, "psql", text, database])


def test_the_rendered_script_runs_in_psql_twice_and_memharbor_takes_over(server: Server, empty: str) -> None:
    template_database(server)
    settings = settings_for(empty)
    for _ in range(2):
        assert run_in_psql(server, empty, schema.render_script(settings)) == (0, "")
    with closing(admin_connection(server, empty)) as connection:
        assert schema.apply(connection, settings).applied == ()
        assert schema.verify(connection, settings) == []
    with closing(admin_connection(server, template_database(server))) as connection:
        expected = schema.describe_catalog(connection)
    with closing(admin_connection(server, empty)) as connection:
        found = schema.describe_catalog(connection)
    assert {d.key for d in schema.differences(expected, found)} <= {"database"}


def test_a_script_without_graph_and_history_can_be_completed_later(server: Server, empty: str) -> None:
    settings = settings_for(empty)
    assert (
        run_in_psql(server, empty, schema.render_script(settings, include_graph=False, include_history=False))[0] == 0
    )
    with closing(admin_connection(server, empty)) as connection:
        assert names_of(connection, "select to_regclass('memharbor.memory_history')::text") == [None]
        connection.execute('insert into public.mem0 values (gen_random_uuid(), null, \'{"user_id": "a"}\')')
        schema.apply(connection, settings)
        assert schema.verify(connection, settings) == []


def test_template_roots_of_one_release_are_never_mixed_up(root: Path) -> None:
    settings = settings_for("x")
    assert [
        a == b for a, b in itertools.zip_longest(schema.load_steps(settings), schema.load_steps(settings, root=root))
    ]
