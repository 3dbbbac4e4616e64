"""Verification and drift: whatever is missing or changed is found, and what can be repaired is repaired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from memharbor import schema
from memharbor.database import Connection, run_statement, transaction
from memharbor.errors import DatabaseError
from memharbor.schema.statements import split_statements
from memharbor.settings import Settings
from tests.memory_database import Server
from tests.schema_databases import admin_connection, scratch_database, settings_for


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    with scratch_database(server) as name:
        with closing(admin_connection(server, name)) as connection:
            schema.apply(connection, settings_for(name), components=["settings"])
        yield name


@pytest.fixture
def settings(database: str) -> Settings:
    return settings_for(database)


@pytest.fixture
def connection(server: Server, database: str) -> Iterator[Connection]:
    with closing(admin_connection(server, database)) as opened:
        yield opened


# What somebody may have done by hand; each is of another kind of object.
REPAIRABLE = {
    "a policy is dropped": "drop policy isolate on memharbor.memories",
    "a policy is weakened": "alter policy isolate on memharbor.memories using (true)",
    "a policy is added": "create policy extra on memharbor.memories for select to memharbor_app using (true)",
    "row security is off": "alter table memharbor.memory_history disable row level security",
    "the owner is exempt": "alter table memharbor.entities no force row level security",
    "a function is changed": "create or replace function memharbor.current_user_id() returns text"
    " language sql stable parallel safe as $$ select 'alice' $$",
    "a function is gone": "drop function memharbor.related_memories(uuid, integer)",
    "a trigger is disabled": "alter table memharbor.memories disable trigger history_update",
    "a trigger is gone": "drop trigger sync on memharbor.memories",
    "a view is gone": "drop view public.mem0_entities",
    "a view shows with its owner's rights": "alter view public.mem0 set (security_invoker = false)",
    "a view is filtered otherwise": "create or replace view public.mem0 with (security_invoker = true) as"
    " select id, embedding as vector, payload from memharbor.memories",
    "a privilege is granted": "grant truncate on memharbor.memories to memharbor_app",
    "a privilege is revoked": "revoke insert on public.mem0 from memharbor_service",
    "a default is gone": "alter table memharbor.memory_categories alter user_id drop default",
    "everybody may create": "grant create on schema public to public",
    "everybody may make temporary tables": "do $$ begin execute format('grant temporary on database %I to public',"
    " current_database()); end $$",
    "the pooler's lookup is open": "grant execute on function memharbor_pooler.lookup(text) to public",
    "the pooler's lookup is gone": "drop schema memharbor_pooler cascade",
}
LASTING = {
    "a column is added": ("alter table memharbor.memories add column extra text", "column memharbor.memories.extra"),
    "a column is changed": (
        "alter table memharbor.categories alter description set not null",
        "column memharbor.categories.description",
    ),
    "a constraint is gone": (
        "alter table memharbor.memories drop constraint memories_user_id_check",
        "constraint memharbor.memories.memories_user_id_check",
    ),
    "an index is gone": ("drop index memharbor.memories_payload_user_id", "memories_payload_user_id"),
    "storage is changed": (
        "alter table memharbor.memories alter embedding set storage extended",
        "column memharbor.memories.embedding",
    ),
    "an option is changed": (
        "alter table memharbor.memories reset (toast_tuple_target)",
        "relation memharbor.memories",
    ),
    "a table of somebody else's": ("create table memharbor.mine (id int)", "relation memharbor.mine"),
}


def test_a_fresh_roll_out_has_no_findings(connection: Connection, settings: Settings) -> None:
    assert schema.verify(connection, settings) == []


def test_verification_writes_nothing(connection: Connection, settings: Settings) -> None:
    connection.execute("set default_transaction_read_only = on")
    assert schema.verify(connection, settings) == []


@pytest.mark.parametrize("damage", REPAIRABLE)
def test_what_was_changed_by_hand_is_found_and_repaired(
    connection: Connection, settings: Settings, damage: str
) -> None:
    before = schema.describe_catalog(connection)
    run_statement(connection, REPAIRABLE[damage])
    found = schema.verify(connection, settings)
    assert [finding for finding in found if finding.kind == "drift"] != []
    assert all(finding.message and finding.hint for finding in found)
    assert schema.apply(connection, settings).changed
    assert schema.describe_catalog(connection) == before
    assert schema.verify(connection, settings) == []
    assert schema.apply(connection, settings).changed is False


@pytest.mark.parametrize("damage", LASTING)
def test_what_no_step_repairs_stays_a_finding_until_it_is_adopted(server: Server, damage: str) -> None:
    statement, named = LASTING[damage]
    with scratch_database(server) as name, closing(admin_connection(server, name)) as connection:
        settings = settings_for(name)
        schema.apply(connection, settings, components=["settings"])
        run_statement(connection, statement)
        schema.apply(connection, settings)
        assert any(named in finding.name for finding in schema.verify(connection, settings) if finding.kind == "drift")
        schema.apply(connection, settings, adopt_drift=True)
        assert [finding for finding in schema.verify(connection, settings) if finding.kind == "drift"] == []


def test_a_change_of_settings_is_a_pending_step(connection: Connection, database: str) -> None:
    found = schema.verify(connection, settings_for(database, hnsw_ef_search=77))
    assert ("pending", "search_settings") in {(finding.kind, finding.name) for finding in found}


def test_every_verify_twin_raises_where_its_thing_is_missing(server: Server) -> None:
    with scratch_database(server, rolled_out=False) as name, closing(admin_connection(server, name)) as connection:
        silent = []
        # The settings are on the roles, and the marks on the built-in functions of this database.
        for step in schema.load_steps(settings_for(name)):
            if step.name in ("role_settings", "search_settings"):
                connection.execute("begin")
                for role in ("app", "service", "readonly"):
                    run_statement(connection, f"alter role memharbor_{role} reset all")
            try:
                with transaction(connection, rollback=True):
                    for statement in split_statements(step.verify_sql):
                        run_statement(connection, statement)
                silent.append(step.name)
            except psycopg.errors.DatabaseError:
                pass
            connection.rollback()
        assert silent == []


@pytest.mark.parametrize("leakproof", [True, False])
def test_the_leakproof_marks_follow_the_setting_and_come_back_after_a_restore(
    connection: Connection, database: str, leakproof: bool
) -> None:
    marks = "select bool_and(proleakproof), bool_or(proleakproof) from pg_proc where oid in ("
    marks += "'jsonb_object_field_text(jsonb,text)'::regprocedure, 'ts_match_vq(tsvector,tsquery)'::regprocedure,"
    marks += "'to_tsvector(regconfig,text)'::regprocedure)"
    settings = settings_for(database, leakproof=leakproof)
    try:
        schema.apply(connection, settings)
        assert connection.execute(marks).fetchone() == (leakproof, leakproof)
        assert schema.verify(connection, settings) == []
        # As pg_restore leaves it, which does not know of marks on built-in functions.
        run_statement(connection, f"alter function jsonb_object_field_text(jsonb, text) {'not ' * leakproof}leakproof")
        kinds = {finding.kind for finding in schema.verify(connection, settings)}
        assert kinds == {"missing", "drift"}
        assert schema.apply(connection, settings).changed
        assert schema.verify(connection, settings) == []
    finally:
        schema.apply(connection, settings_for(database))


def test_a_database_that_was_never_rolled_out_has_every_step_pending(server: Server) -> None:
    with scratch_database(server, rolled_out=False) as name, closing(admin_connection(server, name)) as connection:
        found = schema.verify(connection, settings_for(name))
        pending = {finding.name for finding in found if finding.kind == "pending"}
        assert pending == {step.name for step in schema.load_steps(settings_for(name))}
        assert (schema.current(connection), schema.history(connection)) == (None, ())


def test_a_fingerprint_ignores_rows_and_users_own_indexes(server: Server) -> None:
    with scratch_database(server) as name, closing(admin_connection(server, name)) as connection:
        before = schema.fingerprint(connection)
        connection.execute('insert into public.mem0 values (gen_random_uuid(), null, \'{"user_id": "a"}\')')
        connection.execute("create index memories_hnsw_x on memharbor.memories (id) where payload ->> 'user_id' = 'x'")
        assert schema.fingerprint(connection) == before


def test_a_statement_that_is_refused_while_verifying_is_a_finding_not_a_crash(
    connection: Connection, settings: Settings
) -> None:
    with pytest.raises(DatabaseError):
        schema.apply(connection, settings.model_copy(update={"database": "does_not_exist"}), components=["settings"])
    found = schema.verify(connection, settings.model_copy(update={"database": "does_not_exist"}))
    assert any(finding.kind == "missing" and "does_not_exist" in finding.message for finding in found)
