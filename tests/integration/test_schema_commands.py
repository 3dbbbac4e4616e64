"""The schema commands, the status and the doctor on a live server: dry runs, refusals, and what an administrator sees."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import make_conninfo

from memharbor import doctor, schema
from memharbor.commands import cli
from memharbor.database import connect
from memharbor.errors import StateRefusedError
from memharbor.schema import ledger
from memharbor.schema.tenants import index_name
from memharbor.status import take_status
from memharbor.target import find_target
from tests.memory_database import Server
from tests.schema_databases import DIMS, admin_connection, apply_roles, scratch_database, settings_for

USER = "somebody@example.org"


def run(dsn: str, *arguments: str, **environ: str) -> Result:
    given = {"MEMHARBOR_DSN": dsn, "MEMHARBOR_EMBEDDING_DIMS": str(DIMS), **environ}
    return CliRunner().invoke(cli, list(arguments), env=given)


def add_memories(server: Server, database: str, count: int) -> None:
    with closing(admin_connection(server, database)) as connection:
        connection.execute(
            "insert into public.mem0 select gen_random_uuid(), null, jsonb_build_object('user_id', %s::text)"
            " from generate_series(1, %s)",
            (USER, count),
        )


@contextmanager
def whole_database(server: Server) -> Iterator[str]:
    """Make a copy that has its own name in its settings, so that nothing differs."""
    with scratch_database(server) as name:
        with closing(admin_connection(server, name)) as connection:
            schema.apply(connection, settings_for(name), components=["settings"])
        yield name


def test_a_dry_run_before_the_database_exists_tells_every_step_as_what_would_be(server: Server) -> None:
    apply_roles(server)
    done = run(server.admin_dsn("schema_nowhere"), "schema", "apply", "--dry-run", "--output", "json")
    assert done.exit_code == 0, done.output
    changes = [row["change"] for row in json.loads(done.stdout)]
    assert "database schema_nowhere would be added" in changes
    assert "step 0001_memories would run" in changes
    assert all(" would " in change for change in changes)
    planned = run(server.admin_dsn("schema_nowhere"), "schema", "plan", "--output", "json")
    assert {row["state"] for row in json.loads(planned.stdout)} == {"pending"}


def test_a_dry_run_tells_differences_as_what_would_be(server: Server) -> None:
    with scratch_database(server) as name:
        with closing(admin_connection(server, name)) as connection:
            connection.execute("drop view public.mem0_entities")
        done = run(server.admin_dsn(name), "schema", "apply", "--component", "tables", "--dry-run", "--output", "json")
        changes = [row["change"] for row in json.loads(done.stdout)]
        assert any("public.mem0_entities would be added" in change for change in changes), changes
        assert not any(" was " in change for change in changes)


def test_a_dry_run_does_not_hide_that_another_roll_out_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = functools.partial(ledger.advisory_lock, wait_seconds=0.1)
    with scratch_database(server) as name, closing(admin_connection(server, name)) as other:
        with ledger.advisory_lock(other):
            monkeypatch.setattr(ledger, "advisory_lock", waiting)
            done = run(server.admin_dsn(name), "schema", "apply", "--component", "indexes", "--dry-run")
        assert isinstance(done.exception, StateRefusedError)
        assert "another roll-out" in done.exception.message


def test_users_are_not_named_where_their_indexes_are(server: Server) -> None:
    with whole_database(server) as name:
        add_memories(server, name, 20)
        arguments = ("schema", "apply", "--component", "indexes")
        said = []
        for options in (["--dry-run"], [], ["--dry-run"]):
            done = run(server.admin_dsn(name), *arguments, *options, MEMHARBOR_TENANT_INDEX_THRESHOLD_ROWS="10")
            assert done.exit_code == 0, done.output
            assert USER not in done.output
            said.append(done.output)
        assert "of 20 rows would be added" in said[0]
        assert f"[1/1] create the vector index {index_name(USER)}" in said[1]
        assert "nothing would change" in said[2]


def test_the_grants_of_rewind_in_database_postgres_are_verified(server: Server) -> None:
    function = "pg_catalog.pg_read_binary_file(text)"
    with whole_database(server) as name, closing(admin_connection(server)) as maintenance:
        assert json.loads(run(server.admin_dsn(name), "schema", "verify", "--output", "json").stdout) == []
        maintenance.execute(f"revoke execute on function {function} from memharbor_rewind")
        try:
            done = run(server.admin_dsn(name), "schema", "verify", "--output", "json")
            found = json.loads(done.stdout)
            assert [(finding["name"], finding["hint"]) for finding in found if finding["kind"] == "missing"] == [
                ("rewind", "memharbor schema apply --component roles")
            ]
        finally:
            schema.apply_roles(lambda other: admin_connection(server, other), settings_for("nowhere"), {})
        assert json.loads(run(server.admin_dsn(name), "schema", "verify", "--output", "json").stdout) == []


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    with whole_database(server) as name:
        yield name


@pytest.fixture
def administrator(server: Server, database: str) -> Iterator[str]:
    """The DSN of an administrator who is no superuser and so is held by row level security."""
    with closing(admin_connection(server, database)) as connection:
        connection.execute("create role status_test_admin login password 'managed'")  # pragma: allowlist secret
        connection.execute("grant memharbor_owner, memharbor_service to status_test_admin with inherit true, set true")
        try:
            dsn = server.admin_dsn(database)
            yield make_conninfo(dsn, user="status_test_admin", password="managed")  # pragma: allowlist secret
        finally:
            connection.execute("drop role status_test_admin")


def test_the_status_counts_every_memory_also_for_an_administrator_who_is_no_superuser(
    server: Server, database: str, administrator: str
) -> None:
    add_memories(server, database, 3)
    for dsn in (administrator, server.admin_dsn(database), server.direct_dsn(database, "service")):
        found = take_status(find_target("dev", dsn, environ={}))["database"]
        assert (found.get("memories"), found.get("users")) == (3, 1), found


def test_the_status_of_a_role_that_may_not_look_is_an_error_in_its_place(server: Server, database: str) -> None:
    found = take_status(find_target("dev", server.direct_dsn(database, "pooler"), environ={}))["database"]
    assert "permission denied" in found["error"]


def test_the_doctor_finds_a_rolled_out_database_well_and_names_what_is_not(
    server: Server, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", str(DIMS))
    found = doctor.examine("dev", server.admin_dsn(database))
    assert {finding.level for finding in found} == {"ok"}, found
    assert {finding.area for finding in found} == {"database", "pgvector", "leakproof", "schema"}
    with closing(connect(server.admin_dsn(database), autocommit=True)) as connection:
        connection.execute("drop policy isolate on memharbor.memories")
        connection.execute("alter function pg_catalog.ts_match_vq(tsvector, tsquery) not leakproof")
    bad = [finding for finding in doctor.examine("dev", server.admin_dsn(database)) if finding.level != "ok"]
    assert {finding.area for finding in bad} == {"leakproof", "schema"}
    assert all(finding.next_command.startswith("memharbor schema ") for finding in bad)
    assert not any("Finding(" in finding.cause for finding in bad)


def test_the_doctor_reports_what_it_may_not_see(server: Server, database: str) -> None:
    found = doctor.examine("dev", server.direct_dsn(database, "pooler"))
    assert [finding.level for finding in found][-1] == "failed"
    assert all(finding.next_command for finding in found if finding.level != "ok")
